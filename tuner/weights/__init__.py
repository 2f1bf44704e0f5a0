"""Tensors at rest: files, names and what their headers say. Knows no network."""
