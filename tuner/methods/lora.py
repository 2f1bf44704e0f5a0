"""LoRA: low-rank updates to chosen layers (Hu et al. 2021, arXiv:2106.09685), on peft's layers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

from tuner.diffusion.model import DiffusionModel
from tuner.errors import ConfigError
from tuner.methods.base import Method, ParameterGroup, Trainable, freeze
from tuner.rng import generator_at


@dataclass(frozen=True, kw_only=True)
class LoraTrainable(Trainable):
    """The factors of a LoRA: `<module>.lora_A.weight` `[r, in, ...]` and `<module>.lora_B.weight` `[out, r, ...]`."""

    alphas: Mapping[str, float]
    """By module's canonical name; the module's update is alpha / r * B A."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Learn `B A`, of rank `rank`, beside each target layer; it adds `alpha / rank * B A x`."""

    rank: int = 16
    """The rank of linear layers' and 1x1 convolutions' updates."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; where left out, alpha = rank, so the scale is 1."""
    conv_rank: int | None = None
    """The rank of other convolutions' updates (resnets, samplers: "LoCon"); where left out they learn only if a
    pattern of `targets` or `ranks` is found in them."""
    conv_alpha: float | None = None
    """As `alpha`, for the convolutions of `conv_rank`."""
    targets: tuple[str, ...] = ()
    """Regular expressions found in the names of the layers that learn (`unet.*attn2.*to_[kv]$`); where left out, the
    family's choice: every layer of the attention blocks."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Ranks of layers by regular expression, over `rank` and `conv_rank`; the last that is found counts, 0 leaves the
    layer out. A layer with a rank of its own has alpha = rank unless `alphas` says otherwise."""
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    """Alphas of layers by regular expression; the last that is found counts."""
    text_encoder: bool = False
    """Whether the text encoders' attention and MLP layers get a LoRA too."""
    text_encoder_lr: float | None = None
    """The text encoders' learning rate; the optimizer's own where left out."""

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank, "conv_rank": self.conv_rank}
        for name, rank in ranks.items():
            if rank is not None and rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}")
        if any(rank < 0 for rank in self.ranks.values()):
            raise ValueError("ranks must be 0 (left out) or more")
        for alpha in (self.alpha, self.conv_alpha, *self.alphas.values()):
            if alpha is not None and alpha <= 0:
                raise ValueError(f"alpha must be positive, got {alpha}")
        if self.conv_alpha is not None and self.conv_rank is None:
            raise ValueError("conv_alpha has no effect without conv_rank")
        if self.text_encoder_lr is not None and not self.text_encoder:
            raise ValueError("text_encoder_lr has no effect with text_encoder = false; set text_encoder = true")
        for pattern in (*self.targets, *self.ranks, *self.alphas):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    def attach(self, model: DiffusionModel, seed: int) -> LoraTrainable:
        freeze(model)
        alphas: dict[str, float] = {}
        groups: list[ParameterGroup] = []
        encoders = model.text_encoders if self.text_encoder else ()
        chosen = {component: self._choose(model, component) for component in (model.denoiser, *encoders)}
        self._refuse_dead_options(model, chosen)
        for component, ranks in chosen.items():
            if not ranks:
                continue
            network, prefix = model.networks[component], model.prefixes[component]
            _inject(network, ranks)
            parameters = {
                prefix + name.replace(".default.", "."): p for name, p in network.named_parameters() if p.requires_grad
            }
            for name, p in parameters.items():
                p.data = p.data.float()
                if ".lora_A." in name:
                    drawn = torch.empty(p.shape)  # on the CPU, so that every device begins alike
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator_at(seed, "lora", name))
                    p.data.copy_(drawn)
            groups.append(
                ParameterGroup(
                    name=component,
                    parameters=parameters,
                    lr=self.text_encoder_lr if component in encoders else None,
                )
            )
            alphas |= {prefix + name: alpha for name, (_, alpha) in ranks.items()}
            network.train()
        return LoraTrainable(groups=groups, alphas=alphas)

    def _choose(self, model: DiffusionModel, component: str) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each layer of `component` that learns, by the layer's own name."""
        chosen: dict[str, tuple[int, float]] = {}
        prefix = model.prefixes[component]
        for name, layer in _layers(model.networks[component]).items():
            spatial = _spatial(layer)
            if self.targets:
                wanted = any(re.search(pattern, prefix + name) for pattern in self.targets)
                rank = (self.conv_rank or self.rank) if spatial else self.rank
            else:
                in_blocks = re.search(model.adapter_targets[component], prefix + name) is not None
                wanted = in_blocks or (spatial and self.conv_rank is not None)
                rank = self.conv_rank if spatial and self.conv_rank else self.rank
            alpha = self.conv_alpha if spatial and self.conv_rank is not None else self.alpha
            for pattern, own in self.ranks.items():
                if re.search(pattern, prefix + name):
                    wanted, rank, alpha = own > 0, own, None
            for pattern, own in self.alphas.items():
                if re.search(pattern, prefix + name):
                    alpha = own
            if wanted:
                chosen[name] = (rank, float(rank) if alpha is None else alpha)
        return chosen

    def _refuse_dead_options(self, model: DiffusionModel, chosen: Mapping[str, Mapping[str, object]]) -> None:
        """What is found in no layer is a mistake, never silence."""
        layers = {
            model.prefixes[component] + name: (layer, name in chosen[component])
            for component in chosen
            for name, layer in _layers(model.networks[component]).items()
        }
        learning = {name: layer for name, (layer, learns) in layers.items() if learns}
        example = next((name for name in layers if "to_q" in name), next(iter(layers)))
        for key, patterns in (("targets", self.targets), ("ranks", self.ranks), ("alphas", self.alphas)):
            among, what = (learning, "layer that learns") if key == "alphas" else (layers, "layer")
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in among):
                    raise ConfigError(
                        f"method.{key}: {pattern!r} is found in no {what}; a layer's name is like {example}"
                    )
        if not learning:
            raise ConfigError("method: no layer is left to learn; widen targets or ranks")
        if self.conv_rank is not None and not any(_spatial(layer) for layer in learning.values()):
            raise ConfigError("method.conv_rank: none of targets is found in a convolution; widen them or leave it out")
        for component, names in chosen.items():
            if component != model.denoiser and not names:
                raise ConfigError(
                    f"method.text_encoder: none of targets is found in {component}; widen them, or leave it out"
                )


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def _spatial(layer: nn.Module) -> bool:
    """Whether `layer` looks around: a convolution larger than 1 x 1."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _inject(network: nn.Module, layers: Mapping[str, tuple[int, float]]) -> None:
    """Put peft's LoRA layers into `network`, which learns nothing else; each layer by its whole name."""
    alike: dict[tuple[int, float], list[str]] = {}
    for name, shape in layers.items():
        alike.setdefault(shape, []).append(re.escape(name))
    patterns = {f"^(?:{'|'.join(names)})": shape for shape, names in alike.items()}
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules="|".join(re.escape(name) for name in layers),
        rank_pattern={pattern: rank for pattern, (rank, _) in patterns.items()},
        alpha_pattern={pattern: alpha for pattern, (_, alpha) in patterns.items()},
    )
    peft.inject_adapter_in_model(config, network)
    ending = ".lora_A.default"
    adapted = {name.removesuffix(ending): m for name, m in network.named_modules() if name.endswith(ending)}
    assert adapted.keys() == layers.keys(), sorted(adapted.keys() ^ layers.keys())[:3]
    for name, (rank, alpha) in layers.items():
        layer: Any = network.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, alpha / rank), name


SPEC: type[Method] = Lora
