"""Vectors whose lengths and angles are known by construction."""

import torch
from torch import Tensor

NUMBERS = 3000
"""In a vector, each about 1 / sqrt(3000)."""


def frame(count: int, *, numbers: int = NUMBERS, seed: int = 0) -> list[Tensor]:
    """`count` unit vectors at right angles to each other, to the last digit of float64."""
    made: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        vector = torch.randn(numbers, generator=generator, dtype=torch.float64)
        for _ in range(2):
            for other in made:
                vector = vector - other * (vector @ other)
        made.append(vector / vector.norm())
    return made


def at_angle(theta: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two unit vectors with the angle `theta` between them."""
    x, y = frame(2, seed=seed)
    angle = torch.tensor(theta, dtype=torch.float64)
    return x, x * angle.cos() + y * angle.sin()


def tensors(*shape: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random tensors, as large as weights are."""
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def relative(result: Tensor, expected: Tensor) -> float:
    """How far `result` is off, as a share of what is expected."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()
