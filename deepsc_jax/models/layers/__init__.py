"""Blocks that networks are made of."""
