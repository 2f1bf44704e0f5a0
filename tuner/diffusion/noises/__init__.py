"""Kinds of training noise, one file each."""
