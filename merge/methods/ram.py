"""Reinforced Agent Merging: what only one model has learned is kept whole (Yuan et al. 2026, arXiv:2601.13572)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods._totals import total
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class Ram(Fitted):
    """At each place the mean over the models that changed it; a change of one model alone is kept, times lambda_i.

    RAM has lambda_i = 1. RAM+ makes up for what the averaging takes from model i: lambda_i = 1 + r min(rho_i, alpha),
    where rho_i is the number of its changes that others share over the number of those that it has alone. Both are
    counted in one tensor, as in mergekit's `ramplus_tl`; the paper counts in the whole model.

    A model has changed a place where its difference exceeds a threshold. The paper's and mergekit's is absolute, 1e-5:
    less than one step of a float16 at 0.02 or of a bfloat16 at 0.002, so that each step that rounding makes counts as
    learned, while a fine-tune of small learning rate may never get there. Here it is relative to the tensor's own
    differences.
    """

    threshold: Number = 0.1
    """What a difference must exceed to count, 0 or more; in units of `unit`."""
    unit: Literal["rms", "absolute"] = "rms"
    """`rms`: the root mean square of the model's difference in this tensor; `absolute`: the weights' own unit."""
    r: Number = 0.0
    """How much RAM+ makes up for, 0 or more: 0.1 in the paper; 0 is RAM."""
    alpha: Number = 0.2
    """What rho_i counts at most, 0 or more."""

    takes = (Space.DELTA,)
    repeats = True
    gives = Space.DELTA

    def __post_init__(self) -> None:
        for name, number in (("threshold", self.threshold), ("r", self.r), ("alpha", self.alpha)):
            check_range(name, number, high=math.inf)

    def memory(self, of: Extent) -> Memory:
        shared = 0 if fixed(self.r) == 0 else (of.size + 4 + of.inputs + 2 + 4) * of.run
        return Memory(max((3 * of.size + 1) * of.run, 8 * of.run, shared))

    def fit(self, tensors: Tensors) -> Merge:
        thresholds = self._thresholds(tensors)
        lambdas = [1.0] * tensors.inputs if fixed(self.r) == 0 else self._lambdas(tensors, thresholds)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            both = out.zero_()
            nothing = out.new_zeros(())
            with scratch(out, 3) as (alone, count, kept), scratch(out, dtype=torch.bool) as (changed,):
                alone.zero_()
                count.zero_()
                for tensor, threshold, factor in zip(inputs, thresholds, lambdas, strict=True):
                    torch.gt(torch.abs(tensor, out=kept), threshold, out=changed)
                    count.add_(kept.copy_(changed))
                    torch.where(changed, tensor, nothing, out=kept)
                    both.add_(kept)
                    alone.add_(kept, alpha=factor)
                torch.gt(count, 1, out=changed)
                torch.where(changed, both.div_(count), alone, out=out)

        return merge

    def _thresholds(self, tensors: Tensors) -> list[float]:
        """What the numbers of each input must exceed."""
        threshold = fixed(self.threshold)
        if self.unit == "absolute":
            return [threshold] * tensors.inputs
        squares = [0.0] * tensors.inputs
        for _, run in tensors.chunks():
            for index, tensor in enumerate(run):
                squares[index] += total(tensor, squared=True)
        return [threshold * math.sqrt(square / max(tensors.elements, 1)) for square in squares]

    def _lambdas(self, tensors: Tensors, thresholds: Sequence[float]) -> list[float]:
        """What the changes that an input has alone are multiplied by."""
        shared, alone = [0] * tensors.inputs, [0] * tensors.inputs
        for _, run in tensors.chunks():
            with (
                scratch(run[0]) as (size,),
                scratch(run[0], dtype=torch.int32) as (count,),
                scratch(run[0], len(run), torch.bool) as changed,
            ):
                count.zero_()
                for tensor, threshold, mask in zip(run, thresholds, changed, strict=True):
                    count.add_(torch.gt(torch.abs(tensor, out=size), threshold, out=mask))
                others = count > 1
                for index, mask in enumerate(changed):
                    both = int(others.logical_and(mask).count_nonzero())
                    shared[index] += both
                    alone[index] += int(mask.count_nonzero()) - both
        ratios = [a / b if b else math.inf for a, b in zip(shared, alone, strict=True)]
        return [1 + fixed(self.r) * min(ratio, fixed(self.alpha)) for ratio in ratios]


SPEC: type[MergeMethod] = Ram
