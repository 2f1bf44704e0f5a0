"""The training loop, its checkpoints and what watches it; accelerate is imported here alone."""
