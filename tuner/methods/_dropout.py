"""Dropout whose choices are a function of the place in the run: equal in any batch, on any process, after a resume."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tuner.rng import Position


class PositionalDropout(nn.Module):
    """Sets each number of an example to 0 with probability `p`, and divides the others by 1 - p (Srivastava et al.
    2014).

    Which ones depends on the example's position and on `name`, and on the kind of device. Without positions nothing is
    dropped: pictures, validation and published weights are of the whole network.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.positions: Sequence[Position] = ()
        """Of the batch at hand; in training several rows may be one example's, such as the parts of a long caption."""

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, …]`, where the rows of an example follow each other."""
        if not self.positions or not self.training:
            return x
        count = len(self.positions)
        assert len(x) % count == 0, f"{self.name}: {len(x)} rows of {count} examples"
        shape = (len(x) // count, *x.shape[1:])
        purpose = f"dropout {self.name}"
        drawn = [torch.rand(shape, generator=at.generator(purpose, x.device), device=x.device) for at in self.positions]
        return x * (torch.cat(drawn) >= self.p) / (1 - self.p)
