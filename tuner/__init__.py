"""Fine-tuning for Stable Diffusion: every variation a file, every run a readable recipe.

Importing this package costs nothing: torch, diffusers and the rest are loaded by the modules that need them.
"""

__version__ = "0.1.0"
