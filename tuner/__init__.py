"""Fine-tuning for Stable Diffusion: every variation a file, every run a readable recipe.

Importing this package costs nothing: torch, diffusers and the rest are loaded by the modules that need them.
"""

import os

__version__ = "0.1.0"
STARTED = (os.getpid(), os.getppid())
"""This process and the one that started it, as they were before the libraries were loaded, which takes seconds."""
