"""Random numbers by position: one for each element of each input, whatever is asked for first, and by which thread.

They are those of Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), which makes the k-th
block of numbers from k and a key alone. The key is a hash of the seed, the tensor's name and the input's index, so two
tensors of one shape, and two inputs of one tensor, have nothing in common.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BLOCK = 8
"""Elements whose numbers come from one step of the counter: 4 words of 64 bits, half a word each."""


@dataclass(frozen=True)
class Uniform:
    """Numbers from 0 to 1, 1 excluded, in steps of 2^-24, for the elements of one input of one tensor."""

    seed: int
    name: str
    """Of the tensor."""
    input: int

    def run(self, start: int, out: Tensor) -> None:
        """Write those from element `start` on into `out`, which is float32."""
        first, last = start // BLOCK, -(-(start + out.numel()) // BLOCK)
        words = np.random.Philox(key=self._key, counter=first).random_raw((last - first) * BLOCK // 2)
        halves = words.astype("<u8", copy=False).view("<u4")[start - first * BLOCK :][: out.numel()]
        halves >>= np.uint32(8)
        out.copy_(torch.from_numpy(halves.view(np.int32))).mul_(2.0**-24)

    @cached_property
    def _key(self) -> int:
        position = repr((self.seed, self.name, self.input)).encode()
        return int.from_bytes(hashlib.blake2b(position, digest_size=16).digest(), "little")
