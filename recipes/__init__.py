"""The recipes: each assembles a run and reads from top to bottom."""
