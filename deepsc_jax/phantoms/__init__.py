"""Phantom chest CT, made on demand."""
