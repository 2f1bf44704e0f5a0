"""Measures of an error, one file each."""
