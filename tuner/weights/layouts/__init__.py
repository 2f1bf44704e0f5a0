"""Names that other programs give to the tensors of a LoRA, both ways."""
