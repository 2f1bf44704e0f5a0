"""Full fine-tuning: the denoiser's own weights learn, and the text encoders' where asked for."""

from dataclasses import dataclass

from tuner.diffusion.model import DiffusionModel
from tuner.methods.base import (
    Method,
    ParameterGroup,
    Trainable,
    decides,
    freeze,
    learning_encoders,
    refuse_quantized,
)


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train every weight."""

    text_encoder: bool = False
    """Whether the text encoders learn too."""
    text_encoder_lr: float | None = None
    """The text encoders' learning rate; the optimizer's own where left out."""

    def __post_init__(self) -> None:
        if self.text_encoder_lr is not None and not self.text_encoder:
            raise ValueError("text_encoder_lr has no effect with text_encoder = false; set text_encoder = true")

    def attach(self, model: DiffusionModel, seed: int) -> Trainable:
        freeze(model)
        encoders = learning_encoders(model, self.text_encoder)
        groups: list[ParameterGroup] = []
        for component in (model.denoiser, *encoders):
            refuse_quantized(model.networks[component])
            network = model.networks[component].float().train()
            prefix = model.prefixes[component]
            named = {prefix + name: p for name, p in network.named_parameters()}
            used = {name: p for name, p in named.items() if decides(model, component, name)}
            for p in used.values():
                p.requires_grad_(True)
            groups.append(
                ParameterGroup(
                    name=component,
                    parameters=used,
                    lr=self.text_encoder_lr if component in encoders else None,
                )
            )
        return Trainable(groups=groups)


SPEC: type[Method] = Full
