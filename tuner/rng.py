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
    place: int | None = None
    """Of the showing in the run's whole order, for what has to be spread evenly over an update; None outside a run."""

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one use; uses do not disturb each other."""
        return generator_at(self.seed, purpose, self.epoch, self.sample, device=device)
