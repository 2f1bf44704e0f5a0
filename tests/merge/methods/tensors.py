"""Tensors that merge methods are tried on: ordinary ones and those that break formulas."""

import torch
from torch import Tensor


def random(*shape: int, inputs: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers as differences of fine-tunes have them."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).mul(1e-3).to(dtype) for _ in range(inputs)]


def rounded(*shape: int, inputs: int = 3, seed: int = 0, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Differences of weights that were stored in 16 bits: many numbers are equal, and many are zero."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=rng).mul(0.05).to(dtype)
    moved = [(base.float() + torch.randn(shape, generator=rng) * 2e-4).to(dtype) for _ in range(inputs)]
    return [tensor.float() - base.float() for tensor in moved]


CASES: dict[str, list[Tensor]] = {
    "matrix": random(37, 29),
    "convolution": random(11, 7, 3, 3),
    "1x1 convolution": random(24, 16, 1, 1),
    "depthwise": random(16, 1, 3, 3),
    "rows of one": random(40, 1),
    "one row": random(1, 50),
    "vector": random(64),
    "one number": random(1),
    "scalar": random(),
    "empty": random(0),
    "zeros": [torch.zeros(9, 8) for _ in range(3)],
    "one of them zero": [*random(9, 8, inputs=2), torch.zeros(9, 8)],
    "equal inputs": random(9, 8, inputs=1) * 3,
    "opposite inputs": [random(9, 8, inputs=1)[0] * sign for sign in (1, -1, 1)],
    "constant": [torch.full((9, 8), 0.25 * sign) for sign in (1, -1, 1)],
    "from float16": rounded(40, 30),
    "from bfloat16": rounded(40, 30, dtype=torch.bfloat16),
    "tiny and huge": [tensor * 10.0 ** torch.arange(-30, 31).float() for tensor in random(20, 61)],
}
"""By what is special about them; three inputs each."""
