"""Merge methods, one file each; `type = "lerp"` in a recipe is `lerp.py`."""
