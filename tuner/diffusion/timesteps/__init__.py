"""Distributions of training times, one file each."""
