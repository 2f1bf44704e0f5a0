"""Randomness as a function of position, so that it never depends on rank, batch split, worker or resume."""

import hashlib
from dataclasses import dataclass

import torch


def generator_at(*position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place in a run, such as `(seed, "noise", epoch, sample)`.

    Equal positions give equal draws, whatever was drawn before; on another kind of device they are others.
    """
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True, slots=True)
class Position:
    """One showing of one sample: all that its noise, time, caption variant and flip may depend on."""

    seed: int
    epoch: int
    sample: int
    stratum: tuple[int, int, int] | None = None
    """Which update it is of, its place in it and how many samples the update has, for what has to be spread evenly over
    them; None outside a run."""

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one use; uses do not disturb each other."""
        return generator_at(self.seed, purpose, self.epoch, self.sample, device=device)
