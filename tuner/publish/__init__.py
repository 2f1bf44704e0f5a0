"""What a run gives to the world: checked files, a model card, and where they go."""
