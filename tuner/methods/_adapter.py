"""What all adapters have in common: which layers learn, how fast, and what that does to the base's weights."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tuner.diffusion.model import DiffusionModel
from tuner.errors import ConfigError
from tuner.methods.base import ParameterGroup, Trainable, decides, freeze, learning_encoders
from tuner.rng import Position, generator_at
from tuner.weights.adapters.base import Change


@dataclass(frozen=True)
class Size:
    """How large the adapter of a layer is."""

    rank: int
    """The rank, or how many outputs are turned together."""
    alpha: float = 1.0
    """What is learned is scaled by alpha / rank, where it is scaled."""


@dataclass(frozen=True)
class PeftFiles:
    """What peft keeps of an adapter of one network."""

    config: Mapping[str, Any]
    """Of `adapter_config.json`."""
    tensors: Mapping[str, Tensor]
    """Of `adapter_model.safetensors`."""


@dataclass(frozen=True, kw_only=True)
class AdapterTrainable(Trainable):
    """Adapters in some layers of the networks."""

    method: "Adapter"
    layers: Mapping[str, Any]
    """The layers that learn, by their modules' canonical names; the base's own layer is each one's `base_layer`."""
    networks: Mapping[str, Mapping[str, Any]]
    """The same by component, and by the layers' names in that network."""

    def changes(self) -> dict[str, Change]:
        """What is done to the base's tensors, by their canonical names: float32, on the CPU, copies."""
        made = ((module, self.method.change(layer)) for module, layer in self.layers.items())
        return {f"{module}.{change.slot}": change for module, change in made}

    def in_peft(self) -> dict[str, PeftFiles]:
        """By component, the files that peft reads; nothing of a kind that it has not, or diffusers reads itself."""
        files = {component: self.method.in_peft(layers) for component, layers in self.networks.items()}
        return {component: own for component, own in files.items() if own is not None}

    def weight(self, module: str) -> Tensor:
        """The base's weight of `module`, as it was before: float32, on the CPU."""
        return self.method.weight(self.layers[module]).detach().to("cpu", torch.float32, copy=True)

    def at(self, positions: Sequence[Position]) -> None:
        for layer in self.layers.values():
            self.method.tell(layer, positions)


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """Some layers learn something small beside or around them; the layers themselves do not learn."""

    kind: ClassVar[str]
    """What it is called: its `type`."""
    drawn: ClassVar[str] = r"(?!)"
    """A regular expression of the parameters that begin with random values."""
    choosing: ClassVar[tuple[str, ...]] = ("targets",)
    """The options whose regular expressions may bring a layer in."""

    targets: tuple[str, ...] = ()
    """Regular expressions found in the names of the layers that learn (`unet.*attn2.*to_[kv]$`); where left out, the
    family's choice: every layer of the attention blocks."""
    learning_rates: dict[str, float] = field(default_factory=dict[str, float])
    """Learning rates of layers by regular expression (`up_blocks`), over all others; the last that is found counts."""
    text_encoder: bool = False
    """Whether the text encoders' attention and MLP layers learn too."""
    text_encoder_lr: float | None = None
    """The text encoders' learning rate; the optimizer's own where left out."""

    def __post_init__(self) -> None:
        for lr in (self.text_encoder_lr, *self.learning_rates.values()):
            if lr is not None and lr <= 0:
                raise ValueError(
                    f"learning rates must be positive, got {lr}; ranks or block_sizes of 0 leave layers out"
                )
        if self.text_encoder_lr is not None and not self.text_encoder:
            raise ValueError("text_encoder_lr has no effect with text_encoder = false; set text_encoder = true")
        for pattern in (*self.targets, *(pattern for patterns in self.patterns().values() for pattern in patterns)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    @property
    @abstractmethod
    def convolutions(self) -> str | None:
        """The option by which every convolution larger than 1 x 1 learns, where it is set."""

    @property
    def dense(self) -> bool:
        """Whether it needs the numbers of the base's weights, which a quantized base has not got."""
        return False

    @abstractmethod
    def size(self, name: str, layer: nn.Module, wanted: bool) -> Size | None:
        """How large the adapter of the layer of this canonical name is; None where it has none.

        `wanted` says whether `targets`, or the family, have chosen it.
        """

    @abstractmethod
    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        """Put adapters into layers of `network`, by the layers' own names; they change no output yet."""

    @abstractmethod
    def change(self, layer: Any) -> Change:
        """What an adapted layer does to its base layer's weight, from float32 copies on the CPU."""

    def patterns(self) -> dict[str, Sequence[str]]:
        """The regular expressions by the option that they stand in, besides `targets`."""
        return {"learning_rates": list(self.learning_rates)}

    def check(self, learning: Mapping[str, nn.Module]) -> None:
        """Refuse options that mean nothing for the layers that learn, by canonical name.

        Raises:
            ConfigError: there is such an option.
        """
        return

    def begin(self, layer: Any, name: str, seed: int) -> None:
        """Set the values that the layer of this canonical name begins with; its parameters are float32 already."""
        for own, p in adapted(layer):
            if re.search(self.drawn, own):
                start = torch.empty(p.shape)  # on the CPU, so that every device begins alike
                nn.init.kaiming_uniform_(
                    start, a=math.sqrt(5), generator=generator_at(seed, self.kind, f"{name}.{own}")
                )
                p.data.copy_(start)

    def weight(self, layer: Any) -> Tensor:
        """The weight of an adapted layer before anything learned."""
        return layer.base_layer.weight

    def rate(self, own: str) -> float:
        """What the learning rate of a layer's parameter of this name is multiplied by."""
        return 1.0

    def tell(self, layer: Any, positions: Sequence[Position]) -> None:
        """See `Trainable.at`."""
        return

    def in_peft(self, layers: Mapping[str, Any]) -> PeftFiles | None:
        """peft's files of the layers of one network, by their own names; None where peft's are not wanted."""
        return None

    def attach(self, model: DiffusionModel, seed: int) -> AdapterTrainable:
        freeze(model)
        encoders = learning_encoders(model, self.text_encoder)
        chosen = {component: self._choose(model, component) for component in (model.denoiser, *encoders)}
        self._refuse_dead_options(model, chosen)
        groups: list[ParameterGroup] = []
        layers: dict[str, Any] = {}
        networks: dict[str, dict[str, Any]] = {}
        for component, sizes in chosen.items():
            if not sizes:
                continue
            network, prefix = model.networks[component], model.prefixes[component]
            self.insert(network, sizes)
            rates: dict[tuple[float | None, float], dict[str, nn.Parameter]] = {}
            for own_name in sizes:
                name, layer = prefix + own_name, network.get_submodule(own_name)
                lr = self.text_encoder_lr if component in encoders else None
                for pattern, own in self.learning_rates.items():
                    lr = own if re.search(pattern, name) else lr
                for own, p in adapted(layer):
                    p.data = p.data.float()
                    rates.setdefault((lr, self.rate(own)), {})[f"{name}.{own}"] = p
                self.begin(layer, name, seed)
                layers[name] = networks.setdefault(component, {})[own_name] = layer
            groups += [
                ParameterGroup(name=component, parameters=parameters, lr=lr, factor=factor)
                for (lr, factor), parameters in rates.items()
            ]
            network.train()
        return AdapterTrainable(groups=groups, method=self, layers=layers, networks=networks)

    def _choose(self, model: DiffusionModel, component: str) -> dict[str, Size]:
        """The layers of `component` that learn, by their own names."""
        chosen: dict[str, Size] = {}
        prefix = model.prefixes[component]
        for own, layer in _layers(model.networks[component]).items():
            name = prefix + own
            if not decides(model, component, f"{name}."):
                continue
            if self.targets:
                wanted = any(re.search(pattern, name) for pattern in self.targets)
            else:
                in_blocks = re.search(model.adapter_targets[component], name) is not None
                wanted = in_blocks or (spatial(layer) and self.convolutions is not None)
            size = self.size(name, layer, wanted)
            if size is not None:
                chosen[own] = size
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
        for key, patterns in {"targets": self.targets, **self.patterns()}.items():
            among, what = (layers, "layer") if key in self.choosing else (learning, "layer that learns")
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in among):
                    raise ConfigError(
                        f"method.{key}: {pattern!r} is found in no {what}; a layer's name is like {example}"
                    )
        if not learning:
            raise ConfigError(f"method: no layer is left to learn; widen {' or '.join(self.choosing)}")
        if self.convolutions is not None and not any(spatial(layer) for layer in learning.values()):
            raise ConfigError(
                f"method.{self.convolutions}: none of targets is found in a convolution; widen them or leave it out"
            )
        for component, names in chosen.items():
            if component != model.denoiser and not names:
                raise ConfigError(
                    f"method.text_encoder: none of targets is found in {component}; widen them, or leave it out"
                )
        held = (name for name, layer in learning.items() if not is_dense(layer))
        if self.dense and (name := next(held, None)):
            raise ConfigError(
                f"method: {self.kind} with these options needs the numbers of the weights, and those of {name} are "
                "quantized; leave out model.quantize, or use a plain lora"
            )
        self.check(learning)


@dataclass(frozen=True, kw_only=True)
class SizelessAdapter(Adapter):
    """An adapter that is as large as its layer says."""

    conv: bool = False
    """Whether convolutions larger than 1x1 learn too; else only if a pattern of `targets` is found in them."""

    @property
    def convolutions(self) -> str | None:
        return "conv" if self.conv else None

    def size(self, name: str, layer: nn.Module, wanted: bool) -> Size | None:
        return Size(1) if wanted else None


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Options of an adapter that has a rank."""

    rank: int = 16
    """The rank of linear layers' and 1x1 convolutions' updates."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; where left out, alpha = rank, so the scale is 1."""
    conv_rank: int | None = None
    """The rank of other convolutions' updates (resnets, samplers: "LoCon"); where left out they learn only if a
    pattern of `targets` or `ranks` is found in them."""
    conv_alpha: float | None = None
    """As `alpha`, for the convolutions of `conv_rank`."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Ranks of layers by regular expression, over `rank` and `conv_rank`; the last that is found counts, 0 leaves the
    layer out. A layer with a rank of its own has alpha = rank unless `alphas` says otherwise."""
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    """Alphas of layers by regular expression; the last that is found counts."""


@dataclass(frozen=True, kw_only=True)
class RankedAdapter(Adapter, Ranked):
    """An adapter whose layers have a rank and an alpha."""

    choosing: ClassVar[tuple[str, ...]] = ("targets", "ranks")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"rank": self.rank, "conv_rank": self.conv_rank}.items():
            if rank is not None and rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}")
        if any(rank < 0 for rank in self.ranks.values()):
            raise ValueError("ranks must be 0 (left out) or more")
        for alpha in (self.alpha, self.conv_alpha, *self.alphas.values()):
            if alpha is not None and alpha <= 0:
                raise ValueError(f"alpha must be positive, got {alpha}")
        if self.conv_alpha is not None and self.conv_rank is None:
            raise ValueError("conv_alpha has no effect without conv_rank")

    @property
    def convolutions(self) -> str | None:
        return None if self.conv_rank is None else "conv_rank"

    def patterns(self) -> dict[str, Sequence[str]]:
        return {"ranks": list(self.ranks), "alphas": list(self.alphas), **super().patterns()}

    def size(self, name: str, layer: nn.Module, wanted: bool) -> Size | None:
        own_rank = spatial(layer) and self.conv_rank is not None
        rank, alpha = (self.conv_rank, self.conv_alpha) if own_rank else (self.rank, self.alpha)
        for pattern, own in self.ranks.items():
            if re.search(pattern, name):
                wanted, rank, alpha = own > 0, own, None
        for pattern, own in self.alphas.items():
            if re.search(pattern, name):
                alpha = own
        if not wanted:
            return None
        assert rank is not None
        return Size(rank, float(rank) if alpha is None else alpha)


def check_tucker(tucker: bool, learning: Mapping[str, nn.Module]) -> None:
    """Raises: ConfigError: no layer has a kernel that a core could have."""
    if tucker and not any(spatial(layer) for layer in learning.values()):
        raise ConfigError("method.tucker: no convolution larger than 1x1 learns; set conv_rank, or leave it out")


def adapted(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn of an adapted layer, by the names that they are saved under."""
    for name, p in layer.named_parameters():
        if p.requires_grad:
            yield re.sub(r"\.default(?=\.|$)|^default\.", "", name), p


def spatial(layer: nn.Module) -> bool:
    """Whether `layer` looks around: a convolution larger than 1 x 1."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def is_dense(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is held number by number, not quantized."""
    weight = layer.weight
    return isinstance(weight, Tensor) and weight.is_floating_point()


def outputs(layer: nn.Module) -> int:
    """How many outputs a linear layer or a convolution has; a quantized weight's shape does not say it."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # pyright: ignore


def still(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, which training does not change."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
