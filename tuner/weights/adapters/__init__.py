"""Adapters at rest: what LoRA files and their kin do to the tensors of a checkpoint, one kind a file."""
