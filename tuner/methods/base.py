"""A training method: what of a model learns, and what is kept of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn

from tuner.diffusion.model import DiffusionModel
from tuner.errors import ConfigError
from tuner.plugins import Folder
from tuner.rng import Position


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    """float32, by canonical name: component prefix and the parameter's own name."""
    lr: float | None = None
    """A learning rate of its own, or None for the optimizer's."""
    factor: float = 1.0
    """What the learning rate is multiplied by, whosever it is."""
    decays: bool = True
    """Whether an optimizer's weight decay is for these too."""
    until: float = 1.0
    """The share of the run after which these stay as they are."""

    def peak(self, lr: float) -> float:
        """How fast these learn at most, where the optimizer's learning rate is `lr`."""
        return (lr if self.lr is None else self.lr) * self.factor


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What learns, by the names it is saved under."""

    groups: Sequence[ParameterGroup]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns, by canonical name, in a fixed order."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """The learned tensors themselves, not copies: what a checkpoint or a release holds."""
        return {name: p.detach() for name, p in self.parameters().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the learned tensors.

        Raises:
            ValueError: other names or shapes than this trainable's.
        """
        parameters = self.parameters()
        if state.keys() != parameters.keys():
            different = sorted(state.keys() ^ parameters.keys())
            raise ValueError(f"{len(different)} tensors differ, among them {', '.join(different[:3])}")
        with torch.no_grad():
            for name, p in parameters.items():
                if state[name].shape != p.shape:
                    raise ValueError(f"{name}: shape {tuple(state[name].shape)}, expected {tuple(p.shape)}")
                p.copy_(state[name])

    def at(self, positions: Sequence[Position]) -> None:
        """Say which places in the run the rows of the next batch are of, before the networks see it.

        What draws at random while training (dropout) draws from them. Nothing is dropped where there are none, as at
        the beginning, and when training ends or pauses.
        """


class Method(Protocol):
    """A recipe's choice of what learns."""

    @property
    def text_encoder(self) -> bool:
        """Whether something of the text encoders learns, so that nothing they make can be kept."""
        ...

    def attach(self, model: DiffusionModel, seed: int) -> Trainable:
        """Freeze what does not learn, add what does; random initial values come from `seed`.

        Every parameter that learns is float32 afterwards; others keep their dtype.
        """
        ...


AnyMethod = Annotated[Method, Folder("tuner.methods")]
AnyAdapter = Annotated[Method, Folder("tuner.methods", default="lora", without=("full", "textual_inversion"))]
"""Something that learns beside or around the base's own layers, which stay as they are."""


def decides(model: DiffusionModel, component: str, name: str) -> bool:
    """Whether the parameter, or the layer, of this canonical name has an effect on anything."""
    return component not in model.unused or re.search(model.unused[component], name) is None


def learning_encoders(model: DiffusionModel, wanted: bool) -> Sequence[str]:
    """The text encoders that learn, where it is wanted that they do.

    Raises:
        ConfigError: there is none.
    """
    if wanted and not model.text_encoders:
        raise ConfigError("method.text_encoder: the base has no text encoder; leave it out")
    return model.text_encoders if wanted else ()


def freeze(model: DiffusionModel) -> None:
    """Nothing of `model` learns, and layers that training mode changes are in evaluation mode."""
    for network in model.networks.values():
        network.requires_grad_(False).eval()


def refuse_quantized(network: nn.Module) -> None:
    """Raises: ConfigError: numbers of `network` are not its weights themselves."""
    for name, p in network.named_parameters():
        if not p.is_floating_point():
            raise ConfigError(
                f"method: needs the base's own weights, and model.quantize keeps such as {name} in others; "
                "leave that out, or take a plain LoRA"
            )
