"""The model as it was before training, kept beside the one that learns: what prior prediction has as its target."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from tuner.diffusion.model import DiffusionModel
from tuner.methods.base import Trainable


def keep_untrained(model: DiffusionModel, trainable: Trainable) -> int:
    """Copy all that learns as it is now, and let `model.untrained` put it back for a while; returns the copy's bytes.

    At the beginning no method changes an output, so this is the base, whatever the method. It takes as much memory as
    what learns does: little for adapters, another model for full fine-tuning. Call it before a checkpoint is loaded.
    """
    kept = {name: p.detach().clone() for name, p in trainable.parameters().items()}

    def swap() -> None:
        torch.clear_autocast_cache()  # where autocast keeps the rounded weights of the other model
        for name, p in trainable.parameters().items():
            kept[name], p.data = p.data, kept[name].to(p.device)

    @contextmanager
    def untrained() -> Generator[None]:
        training = [network for network in model.networks.values() if network.training]
        for network in training:
            network.eval()  # nothing is dropped
        swap()
        try:
            yield
        finally:
            swap()
            for network in training:
                network.train()

    model.untrained = untrained
    return sum(tensor.nbytes for tensor in kept.values())
