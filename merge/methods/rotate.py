"""Turning a's neurons into b's frame: orthogonal Procrustes (P. Schönemann 1966, doi:10.1007/BF02289451).

The rotation that fits best comes from a singular value decomposition; where the best fit has a reflection, the next
best that has none (W. Kabsch 1976, doi:10.1107/S0567739476001873).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Extent, MergeMethod, Space, Whole

LIBRARY = 9000
"""Bytes for each row of a matrix that is decomposed, of the library's own: measured, as what squares take is."""
PACKED = 3400
"""Rows of a matrix that the library copies at once when it multiplies: measured."""
TURNED = 1e-7
"""Rotations nearer to half a turn than this have no way round that rounding has not chosen."""


@dataclass(frozen=True, kw_only=True)
class Rotate(Whole):
    """[(1 - t) A + t B Q^T] Q^alignment + mean: rows are points, about their mean; Q rotates A's onto B's best.

    Q = argmin |A Q - B| over rotations, without reflections, which have no half. Q^s goes the share s of every plane's
    angle. The mean of the rows goes from a's to b's as a straight line, at `alignment`; so with alignment = t = 0 the
    result is a, with both 1 it is b, and in between a's shape is turned, and its remainder interpolated.

    A matrix has its outputs as rows. A vector has none, and is (1 - t) a + t b. Where rows are fewer than what they are
    made of, points lie in a subspace, and Q is determined there alone: of all that fit equally it is the one nearest to
    the identity. (sd-mecha takes what its decomposition happens to give, reflections for whole alignments included.)

    Linear algebra is float64; its last digits depend on the machine's library. The work for n rows of m numbers is
    that of decomposing a square matrix of side min(m, 2 n): of all methods the most.
    """

    alignment: Number = 1.0
    """In [0, 1]: how far a is turned."""
    t: Number = 0.0
    """In [0, 1]: how much of what no rotation explains comes from b."""
    rows: Literal["filters", "kernels"] = "filters"
    """Of a convolution: whole `filters`, whose inputs are turned too; or the `kernels` of each pair of input and output
    (sd-mecha), whose few pixels are mixed, which is much less work."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("alignment", self.alignment)
        check_range("t", self.t)

    def unchanged(self) -> int | None:
        return {(0.0, 0.0): 0, (1.0, 1.0): 1}.get((fixed(self.alignment), fixed(self.t)))

    def computing(self, of: Extent) -> float:
        if len(of.shape) < 2:
            return of.size * of.elements
        kernel = math.prod(of.shape[2:]) if self.rows == "kernels" else 1
        rows = of.shape[0] * (of.shape[1] if kernel > 1 else 1)
        columns = of.elements // max(rows, 1)
        side = min(columns, 2 * rows)
        library = LIBRARY * side
        square = (54 if fixed(self.alignment) == 1 else 62) * side**2 + library
        if columns > side:  # there is a frame first, which stays
            return max(32 * of.elements + 8 * side**2 + library, 16 * of.elements + 8 * side**2 + square)
        turning = (24 if fixed(self.t) == 0 else 32) * of.elements + 8 * side * (side + min(rows, PACKED))
        return max(turning, 16 * of.elements + square)

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        first, second = tensors
        alignment, t = fixed(self.alignment), fixed(self.t)
        if first.ndim < 2:
            return torch.lerp(first, second, t)
        if torch.equal(first, second):
            return first.clone()
        kernels = self.rows == "kernels" and math.prod(first.shape[2:]) > 1
        a, mean_a = _centered(first, kernels=kernels)
        b, mean_b = _centered(second, kernels=kernels)
        frame, rows = None, len(a)
        if a.shape[1] > 2 * rows:
            a = torch.cat([a, b]).T
            del b  # as large as a was
            frame, a = torch.linalg.qr(a)
            a, b = a[:, :rows].T, a[:, rows:].T
        rotation = nearest_rotation(a.T @ b)
        if t != 0:
            a = torch.lerp(a, b @ rotation.T, t)
        a = a @ power(rotation, alignment)
        if frame is not None:
            a = a @ frame.T
        a += torch.lerp(mean_a, mean_b, alignment)
        return a.to(first.dtype).reshape(first.shape)


def _centered(tensor: Tensor, *, kernels: bool) -> tuple[Tensor, Tensor]:
    """A tensor's rows as points `[rows, columns]` about their mean, and the mean; in float64."""
    points = tensor.flatten(0, 1 if kernels else 0).flatten(1).double()
    mean = points.mean(0)
    return points - mean, mean


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation Q `[n, n]` with the largest trace of Q^T `matrix`; of several, that nearest to the identity."""
    u, sigma, vt = torch.linalg.svd(matrix)
    rank = int((sigma > sigma[0] * len(sigma) * torch.finfo(sigma.dtype).eps).sum())
    rotation = u[:, :rank] @ vt[:rank]
    free_u, free_v = u[:, rank:], vt[rank:]
    inner_u, _, inner_vt = torch.linalg.svd(free_u.T @ free_v.T)
    rotation += (free_u @ inner_u) @ (inner_vt @ free_v)
    if torch.linalg.slogdet(rotation).sign < 0:  # turn the direction that costs least to the other side
        last_u, last_v = (u[:, -1], vt[-1]) if rank == len(sigma) else (free_u @ inner_u[:, -1], inner_vt[-1] @ free_v)
        rotation -= 2 * torch.outer(last_u, last_v)
    return rotation


def power(rotation: Tensor, exponent: float) -> Tensor:
    """`rotation` with every plane's angle theta in [0, pi] times `exponent`.

    In its planes Q = cos(theta) I + sin(theta) J with J^2 = -I. So the symmetric half of Q has the planes as
    eigenspaces with eigenvalues cos(theta), and the other half is sin(theta) J: no complex numbers are needed, and it
    does no harm when several planes share an angle. Half turns are put in planes as they come.
    """
    if exponent == 1:
        return rotation
    even, odd = (rotation + rotation.T) / 2, (rotation - rotation.T) / 2
    cosine, vectors = torch.linalg.eigh(even)
    sine = torch.linalg.vector_norm(odd @ vectors, dim=0)
    theta = torch.atan2(sine, cosine)
    turned = (sine < TURNED) & (cosine < 0)
    ratio = torch.where(sine < TURNED, exponent, torch.sin(exponent * theta) / sine.clamp(min=TURNED))
    ratio = torch.where(turned, 0, ratio)
    result = (vectors * torch.cos(exponent * theta)) @ vectors.T + (vectors * ratio) @ (vectors.T @ odd)
    one, two = vectors[:, turned][:, 0::2], vectors[:, turned][:, 1::2]
    if one.shape == two.shape:
        half = torch.sin(exponent * theta[turned][0::2])
        result += (one * half) @ two.T - (two * half) @ one.T
    return result


SPEC: type[MergeMethod] = Rotate
