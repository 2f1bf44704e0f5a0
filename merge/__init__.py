"""Merging models: from safetensors files to one safetensors file."""
