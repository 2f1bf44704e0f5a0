"""The part of one difference that another does not have already (the first step of Gram and Schmidt)."""

from dataclasses import dataclass

import numpy as np

from merge.methods._combination import combine, combining
from merge.methods._gram import gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors


@dataclass(frozen=True, kw_only=True)
class Perpendicular(Fitted):
    """b - a (a . b) / |a|^2: what of b is perpendicular to a, the whole tensor being one vector.

    Added to a model that has a, it brings what is new in b and leaves a's strength as it was. A zero a takes nothing
    away (NaN in sd-mecha, turned to zero there). Of models A, B, C: a = A - C and b = B - C; Chattiori's `ORTHO`
    takes away what points along the weights of A themselves, which is another thing.
    """

    takes = (Space.DELTA, Space.DELTA)
    gives = Space.DELTA

    def memory(self, of: Extent) -> Memory:
        return combining(of)

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors)
        square = found.inputs[0, 0]
        along = np.divide(found.inputs[0, 1], square, out=np.zeros_like(square), where=square > 0)
        return combine(np.stack([-along, np.ones_like(along)]), found)


SPEC: type[MergeMethod] = Perpendicular
