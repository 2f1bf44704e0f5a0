"""Which block of a network a tensor belongs to, and which component of a pipeline, told from its name.

The blocks are those that recipes of the field count by, and a number can be given for each. A UNet's, of Stable
Diffusion 1, 2 and XL:

| label        | in a single file                            | in diffusers' names                                  |
|--------------|---------------------------------------------|------------------------------------------------------|
| IN00         | `input_blocks.0`, `time_embed`, `label_emb` | `conv_in`, `time_embedding`, `add_embedding`         |
| IN01, IN02 … | `input_blocks.N`                            | `down_blocks`: of each level its layers, and then    |
|              |                                             | the downsampler as a block of its own                |
| M00          | `middle_block`                              | `mid_block`                                          |
| OUT00 …      | `output_blocks.N`                           | `up_blocks`: of each level its layers, the upsampler |
|              |                                             | with the last of them                                |
| the last OUT | `out`                                       | `conv_norm_out`, `conv_out`                          |
| VAE          | `first_stage_model`                         | `vae`                                                |
| BASE         | everything else: text encoders, constants   | the same                                             |

That makes 12 + 1 + 12 blocks of Stable Diffusion 1 and 2, and 9 + 1 + 9 of XL. A UNet with other numbers of levels or
layers is counted in the same way.

Programs disagree in places. The time embedding is IN00 for supermerger and meh and BASE for sd-mecha; here it is IN00.
The autoencoder is part of BASE in the lists of 26 numbers for Stable Diffusion 1; here VAE is a label of its own that
takes the number of BASE where none is given for it (`merge.coefficients`), which is the same. Whoever wants it
otherwise gives a pattern: `names = [["*time_embed*", 0.0]]` fits both layouts.

A transformer's blocks, of Stable Diffusion 3 and Flux:

| label | in a single file                                | in diffusers' names                          |
|-------|-------------------------------------------------|----------------------------------------------|
| CLIP  | `text_encoders.clip_l`, `.clip_g`               | `text_encoder`; 3 also: `text_encoder_2`     |
| T5    | `text_encoders.t5xxl`                           | `text_encoder_3`; Flux: `text_encoder_2`     |
| IN    | what embeds: `img_in`, `x_embedder`, `pos_embed`… | `x_embedder`, `pos_embed`, `time_text_embed`… |
| D00 … | `joint_blocks.N`; Flux: `double_blocks.N`       | `transformer_blocks.N`                       |
| S00 … | Flux: `single_blocks.N`                         | `single_transformer_blocks.N`                |
| OUT   | `final_layer`                                   | `norm_out`, `proj_out`                       |
| VAE   | `first_stage_model`; Flux: `vae`                | `vae`                                        |

That makes 24 blocks of two streams in Stable Diffusion 3 and 3.5 medium, 38 in 3.5 large, and 19 and 38 in Flux.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tuner.weights.architecture import component_of

BASE = "BASE"
VAE = "VAE"

_SINGLE_FILE = re.compile(r"(model\.)?diffusion_model\.")
_ALONE = re.compile(
    r"(?P<vae>(en|de)coder\.(conv_|down|mid|up|norm_out)|(post_)?quant_conv\.)|(?P<text_encoder>text_model\.)"
)
"""How names start in a file of one component."""
_LAYER = re.compile(r"(?P<side>input|output)_blocks\.(?P<number>\d+)\.")
_LEVEL = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>\w+)\.(?P<layer>\d+)\.")
_MIDDLE = re.compile(r"mid(dle)?_block\.")
_FIRST = re.compile(r"(time_embed(ding)?|label_emb|add_embedding|class_embedding|conv_in)\.")
_LAST = re.compile(r"(out|conv_norm_out|conv_out)\.")
_STREAMS = re.compile(
    r"((?P<two>joint_blocks|double_blocks|transformer_blocks)|single_blocks|single_transformer_blocks)\.(?P<number>\d+)\."
)
_EMBEDDERS = re.compile(r"((img|txt|time|vector|guidance)_in|\w+_embedder|pos_embed|time_text_embed)(\.|$)")
_END = re.compile(r"(final_layer|norm_out|proj_out)\.")
_T5 = re.compile(r"text_encoders\.t5|text_encoder_\d\.(encoder\.block|encoder\.final_layer_norm|shared)\.")


@dataclass(frozen=True)
class Blocks:
    """The blocks and components of one network's tensors."""

    kind: Literal["unet", "transformer"] | None
    """What the denoiser is; None when no block can be told."""
    depth: int = 0
    """A UNet's input blocks, as many as its output blocks; a transformer's blocks of two streams."""
    period: int = 0
    """How many of a UNet's blocks make a level: one more than its layers."""
    single: int = 0
    """A transformer's blocks of one stream."""

    @staticmethod
    def of(names: Iterable[str]) -> "Blocks":
        """Those of a network whose tensors have these names, in either layout; some of its tensors are enough."""
        sides: dict[str, int] = {}
        levels: dict[str, int] = {}
        layers = 0
        unet = False
        for name in names:
            inner = _denoiser(name)
            if inner is None:
                continue
            if found := _LAYER.match(inner):
                _raise(sides, found["side"], int(found["number"]))
            elif found := _LEVEL.match(inner):
                _raise(levels, found["side"], int(found["level"]))
                if found["kind"] in ("resnets", "attentions"):
                    layers = max(layers, int(found["layer"]) + (found["side"] == "down"))
            elif found := _STREAMS.match(inner):
                _raise(sides, "D" if found["two"] else "S", int(found["number"]))
            unet = unet or _MIDDLE.match(inner) is not None
        if "D" in sides or "S" in sides:
            return Blocks("transformer", depth=sides.get("D", -1) + 1, single=sides.get("S", -1) + 1)
        if levels:
            return Blocks("unet", depth=(max(levels.values()) + 1) * (layers + 1), period=layers + 1)
        if sides:
            return Blocks("unet", depth=max(sides.values()) + 1)
        return Blocks("unet" if unet else None)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every label, in the order in which a picture passes the blocks."""
        if self.kind == "unet":
            sides = [[f"{side}{number:02}" for number in range(self.depth)] for side in ("IN", "OUT")]
            return (BASE, *sides[0], "M00", *sides[1], VAE)
        if self.kind == "transformer":
            two = [f"D{number:02}" for number in range(self.depth)]
            one = [f"S{number:02}" for number in range(self.single)]
            return ("CLIP", "T5", "IN", *two, *one, "OUT", VAE)
        return ()

    def block(self, name: str) -> str | None:
        """The label of the tensor `name`; None when it is in no block."""
        if self.kind is None:
            return None
        inner = _denoiser(name)
        if self.kind == "unet" and inner is not None:
            return self._unet(inner)
        if self.kind == "transformer" and inner is not None:
            if found := _STREAMS.match(inner):
                return f"{'D' if found['two'] else 'S'}{int(found['number']):02}"
            if _END.match(inner):
                return "OUT"
            return "IN" if inner != name or _EMBEDDERS.match(inner) else None
        component = self.component(name)
        if component in ("vae", "vqvae"):
            return VAE
        if self.kind == "unet":
            return BASE
        if component == "ema":
            return None
        return "T5" if _T5.match(name) else "CLIP"

    def component(self, name: str) -> str | None:
        """The component of the tensor `name`, as diffusers calls it: `unet`, `vae`, `text_encoder` …; None for none.

        An average of weights over a training, which some files hold beside the weights, is `ema`, in the block BASE.
        In a single file the T5 encoder is `text_encoder_3` of Stable Diffusion 3 and `text_encoder_2` of Flux.
        """
        found = _component(name)
        if found == "unet":
            return self.kind or found
        if found is not None:
            return "text_encoder_2" if found == "text_encoder_3" and self.single else found
        patterns = (
            (_STREAMS, _EMBEDDERS, _END) if self.kind == "transformer" else (_LAYER, _LEVEL, _MIDDLE, _FIRST, _LAST)
        )
        return self.kind if any(pattern.match(name) for pattern in patterns) else None

    def _unet(self, inner: str) -> str:
        """The label of a tensor of the UNet, by its name in there."""
        if found := _LAYER.match(inner):
            return f"{'IN' if found['side'] == 'input' else 'OUT'}{int(found['number']):02}"
        if found := _LEVEL.match(inner):
            first, layer = int(found["level"]) * self.period, int(found["layer"])
            if found["side"] == "down":
                return f"IN{first + (self.period if found['kind'] == 'downsamplers' else 1 + layer):02}"
            return f"OUT{first + (self.period - 1 if found['kind'] == 'upsamplers' else layer):02}"
        if _MIDDLE.match(inner):
            return "M00"
        if _FIRST.match(inner):
            return "IN00"
        return f"OUT{self.depth - 1:02}" if _LAST.match(inner) and self.depth else BASE


def _denoiser(name: str) -> str | None:
    """The name of a denoiser's tensor inside of it, or of one that may be; None for one of another component."""
    if found := _SINGLE_FILE.match(name):
        return name[found.end() :]
    found = _component(name)
    if found is None:
        return name
    return name.partition(".")[2] if found in ("unet", "transformer") else None


def _component(name: str) -> str | None:
    """The component that a name tells by its beginning, also in a file of an autoencoder or text encoder alone."""
    found = component_of(name)
    if found is None and (alone := _ALONE.match(name)):
        return alone.lastgroup
    return found


def _raise(highest: dict[str, int], key: str, number: int) -> None:
    highest[key] = max(highest.get(key, number), number)
