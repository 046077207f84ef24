"""Scans in, batches out: reading, preprocessing, phantoms, storage and input pipelines."""
