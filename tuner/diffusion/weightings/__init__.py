"""Weights of noise levels, one file each."""
