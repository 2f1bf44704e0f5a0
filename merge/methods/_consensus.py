"""How differences that have been thinned out are put together: added up, or by consensus on the sign.

The methods of this kind are a way to thin out (`merge.methods._sparsify`) with one of two ways to put together.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._sparsify import Sparsify
from merge.methods._sums import factors, refuse_zero_sum
from merge.methods.base import Extent, Fitted, Memory, Merge, Space, Tensors
from merge.scratch import scratch

Elect = Literal["weighted", "sum", "count"]
"""How the sign of a number is elected.

    weighted  the sign of the sum of w_i d_i; an input with a negative weight votes against its own sign. As in mergekit
    sum       the sign of the sum of d_i, without weights. As in PEFT
    count     the sign that more inputs have, each with one vote. As in sd-mecha
"""
Draw = Literal["zero", "positive"]
"""What becomes of a number whose votes cancel: 0, as sgn(0) is in the paper and sd-mecha, or `positive` wins, as in
mergekit and PEFT."""
Divide = Literal["weights", "count", "none"]
"""What the sum of the w_i d_i that agree with the elected sign is divided by.

    weights  the sum of their |w_i|: a weighted mean. (mergekit adds up w_i, which may vanish if some are negative)
    count    how many they are. As in PEFT
    none     nothing
"""


@dataclass(frozen=True, kw_only=True)
class SparseSum(Fitted):
    """scale * sum_i w_i s(d_i), where s thins out."""

    weights: tuple[Number, ...] = ()
    """One for each input, any numbers; none: 1 each."""
    scale: Number = 1.0
    """Times the sum: the papers' and mergekit's lambda; any number."""
    normalize: bool = False
    """Whether the weights are divided by their sum, which must not be 0."""

    takes = (Space.DELTA,)
    repeats = True
    gives = Space.DELTA

    def __post_init__(self) -> None:
        if self.normalize:
            refuse_zero_sum(self.weights)

    @abstractmethod
    def sparsify(self, tensors: Tensors) -> Sparsify:
        """How the inputs are thinned out."""

    @abstractmethod
    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        """What that takes, and then thinning out an input."""

    def memory(self, of: Extent) -> Memory:
        before, each = self.thinning(of)
        return together(before, each, of.size * of.run + each.lent)

    def fit(self, tensors: Tensors) -> Merge:
        scale = fixed(self.scale)
        weights = [scale * weight for weight in factors(self.weights, tensors.inputs, normalize=self.normalize)]
        sparsify = self.sparsify(tensors)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            out.zero_()
            with scratch(out) as (left,):
                for index, values in enumerate(inputs):
                    if weights[index] != 0:
                        sparsify(index, values, start, left)
                        out.add_(left, alpha=weights[index])

        return merge


@dataclass(frozen=True, kw_only=True)
class SignConsensus(Fitted):
    """scale * sum_{i in A} w_i s(d_i) / sum_{i in A} |w_i|: s thins out, A are the inputs of the elected sign.

    It is the second half of TIES (Yadav et al. 2023, arXiv:2306.01708). Where no input is left it is 0.
    """

    weights: tuple[Number, ...] = ()
    """One for each input, any numbers; none: 1 each, as in the paper."""
    elect: Elect = "weighted"
    """How the sign of a number is elected: by the `weighted` sum, the plain `sum`, or the `count` of signs."""
    draw: Draw = "zero"
    """What a number becomes whose votes cancel: `zero`, or `positive` wins."""
    divide: Divide = "weights"
    """What the sum of those that agree is divided by: their `weights`, their `count`, or `none`."""
    scale: Number = 1.0
    """Times the result: the paper's lambda; any number."""

    takes = (Space.DELTA,)
    repeats = True
    gives = Space.DELTA

    @abstractmethod
    def sparsify(self, tensors: Tensors) -> Sparsify:
        """How the inputs are thinned out."""

    @abstractmethod
    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        """What that takes, and then thinning out an input."""

    def memory(self, of: Extent) -> Memory:
        before, each = self.thinning(of)
        return together(before, each, of.inputs * of.size * of.run + max(each.lent, agreeing(of)))

    def fit(self, tensors: Tensors) -> Merge:
        weights = factors(self.weights, tensors.inputs, normalize=False)
        sparsify, scale = self.sparsify(tensors), fixed(self.scale)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            with scratch(out, len(inputs)) as deltas:
                for index, (values, left) in enumerate(zip(inputs, deltas, strict=True)):
                    sparsify(index, values, start, left)
                agree(deltas, weights, out, self.elect, self.draw, self.divide)
            if scale != 1:
                out.mul_(scale)

        return merge


def together(before: Memory, each: Memory, merging: int) -> Memory:
    """What a method takes before it merges, or when it does: then it is lent `merging`."""
    return replace(before, lent=max(before.lent, merging), asked=max(before.asked, each.asked))


def agreeing(of: Extent) -> int:
    """Bytes that `agree` takes."""
    return 3 * of.size * of.run


def agree(
    deltas: Sequence[Tensor], weights: Sequence[float], out: Tensor, elect: Elect, draw: Draw, divide: Divide
) -> None:
    """Elect a sign for each place, and write what those of `deltas` that have it come to."""
    with scratch(out, 3) as (elected, divisor, agreeing):
        for index, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
            vote = torch.sign(delta, out=divisor) if elect == "count" else delta
            _add(vote, weight if elect == "weighted" else 1, elected, first=index == 0)
        elected.sign_()
        if draw == "positive":
            elected.add_(0.5).sign_()
        voting = [each for each in zip(deltas, weights, strict=True) if elect != "weighted" or each[1] != 0]
        if not voting:
            out.zero_()
            return
        for index, (delta, weight) in enumerate(voting):
            torch.mul(delta, elected, out=agreeing)  # |delta| where it has the elected sign, else 0 or less
            against = elect == "weighted" and weight < 0
            agreeing.clamp_(max=0) if against else agreeing.clamp_(min=0)
            _add(agreeing, weight, out, first=index == 0)
            if divide != "none":
                counted = 1 if divide == "count" else abs(weight)
                _add(agreeing.sign_(), -counted if against else counted, divisor, first=index == 0)
        out.mul_(elected)
        if divide != "none":
            counted = [1.0 if divide == "count" else abs(weight) for weight in weights if weight]
            out.div_(divisor.clamp_(min=min(counted, default=1.0)))  # 0 where nothing agrees, and so is the sum


def _add(values: Tensor, weight: float, total: Tensor, *, first: bool) -> None:
    """Add `values`, times `weight`, to `total`, which the first of them makes."""
    torch.mul(values, weight, out=total) if first else total.add_(values, alpha=weight)
