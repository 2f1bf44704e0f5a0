"""Rules that say how many directions of each layer a LoRA keeps, one file each."""
