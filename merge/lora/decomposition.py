"""The largest singular values of a matrix, and how much of it the rest is: exactly, whatever was left out.

For M ≈ U S V with orthonormal U and V made by projecting M, ‖M - U S V‖² = ‖M‖² - Σ σ². So the error of a rank is known
without computing the remaining singular values. The projections are float64, so it is known to about 1e-8 of ‖M‖.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.weights.adapters.base import Product
from tuner.weights.adapters.low_rank import LowRank

POWER_ITERATIONS = 4
OVERSAMPLING = 16
"""Directions that are tried beyond those that are wanted, at least."""


@dataclass(frozen=True)
class Decomposition:
    """M = U S V and a rest that is orthogonal to it."""

    left: Tensor
    """U, `[out, k]`, with orthonormal columns; float64."""
    values: Tensor
    """σ, descending, `[k]`; float64."""
    right: Tensor
    """V, `[k, columns]`, with orthonormal rows; float64."""
    rest: float
    """‖M - U S V‖²"""

    @property
    def total(self) -> float:
        """‖M‖²"""
        return self.values.square().sum().item() + self.rest

    def error(self, rank: int) -> float:
        """‖M - M_rank‖ / ‖M‖ in Frobenius norms; 0 for a matrix of zeros."""
        total = self.total
        left_out = self.values[rank:].square().sum().item() + self.rest
        return (left_out / total) ** 0.5 if total else 0.0

    def low_rank(self, rank: int, shape: tuple[int, ...]) -> LowRank:
        """M_rank as a LoRA of a weight of `shape`, float32: the roots of the singular values go to both factors.

        So neither of them loses small numbers in half precision.
        """
        root = self.values[:rank].sqrt()
        left, right = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        signs = torch.gather(left, 0, left.abs().argmax(0, keepdim=True)).sign()  # one of the two that are as good
        signs = torch.where(signs == 0, 1.0, signs)
        factors = (left * signs).float(), (right * signs.T).float().reshape(rank, *shape[1:])
        return LowRank(Product(*factors), 1.0)


def decompose(matrix: Tensor, most: int | None, seed: int = 0, name: str = "") -> Decomposition:
    """The largest `most` singular values of a matrix, or more, and their vectors; all of them for None.

    Few of many are found by projecting on random directions, made better by power iterations (Halko, Martinsson and
    Tropp 2011, arXiv:0909.4061); which ones depends on `seed` and `name` alone.
    """
    out, columns = matrix.shape
    matrix = matrix.double()
    wanted = min(out, columns) if most is None else most + max(OVERSAMPLING, most // 4)
    if 2 * wanted >= min(out, columns):
        left, values, right = _svd(matrix)
        return Decomposition(left, values, right, 0.0)
    digest = hashlib.sha256(repr((seed, name, out, columns)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    single = matrix.float()
    directions = torch.randn(columns, wanted, generator=generator)
    for _ in range(POWER_ITERATIONS):
        directions = _orthonormal(single.T @ _orthonormal(single @ directions))
    basis = _orthonormal(matrix @ directions.double())
    inner, values, right = _svd(basis.T @ matrix)
    total = matrix.square().sum().item()
    return Decomposition(basis @ inner, values, right, max(0.0, total - values.square().sum().item()))


def decompose_product(left: Tensor, right: Tensor) -> Decomposition:
    """All singular values of left · right, exactly, from the small core between two QR decompositions."""
    inner = left.shape[1]
    if inner >= min(left.shape[0], right.shape[1]):
        return decompose(left.double() @ right.double(), None)
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().T)
    first, values, last = _svd(left_core @ right_core.T)
    return Decomposition(left_basis @ first, values, last @ right_basis.T, 0.0)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _orthonormal(matrix: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(matrix)
    return basis
