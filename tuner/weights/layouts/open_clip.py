"""What OpenCLIP calls the tensors of its text encoder, and how it keeps them: three projections in one tensor."""

import re
from collections.abc import Mapping

from tuner.errors import DataError
from tuner.weights.store import TensorMeta, quote
from tuner.weights.views import Piece

ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
PROJECTION = "text_projection"
"""Kept transposed: `[width, projection]`, where transformers' `text_projection.weight` is `[projection, width]`."""
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LEFT_OUT = {"logit_scale", "text_model.embeddings.position_ids", "embeddings.position_ids"}
"""Numbers of training, and of a table 0, 1, 2, …: one side has them, the other has no name for them."""

_OURS = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_THEIRS = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def to_transformers(metas: Mapping[str, TensorMeta], prefix: str) -> dict[str, Piece]:
    """transformers' tensors as pieces of OpenCLIP's, whose names start with `prefix` in the file.

    Raises:
        DataError: a name that OpenCLIP does not have.
    """
    made: dict[str, Piece] = {}
    for name, meta in metas.items():
        whole = Piece(prefix + name, meta.shape)
        if name in ENDS:
            made[ENDS[name]] = whole
        elif name == PROJECTION:
            made["text_projection.weight"] = Piece(prefix + name, (*meta.shape[::-1],), transposed=True)
        elif match := _FUSED.fullmatch(name):
            rows = meta.shape[0] // 3
            for index, part in enumerate("qkv"):
                target = f"text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"
                made[target] = Piece(prefix + name, (rows, *meta.shape[1:]), start=index * rows, rows=rows)
        elif (match := _THEIRS.fullmatch(name)) and match[2] in LAYER:
            made[f"text_model.encoder.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"] = whole
        elif name not in LEFT_OUT:
            raise DataError(f"{quote(prefix + name)}: no tensor of an OpenCLIP text encoder")
    return made


def from_transformers(metas: Mapping[str, TensorMeta], prefix: str) -> dict[str, tuple[Piece, ...]]:
    """OpenCLIP's tensors as pieces of transformers', whose names start with `prefix` in the store.

    Raises:
        DataError: a name that transformers does not have, or a layer without one of its three projections.
    """
    ends = {ours: theirs for theirs, ours in ENDS.items()}
    layer = {ours: theirs for theirs, ours in LAYER.items()}
    made: dict[str, tuple[Piece, ...]] = {}
    for name, meta in metas.items():
        whole = Piece(prefix + name, meta.shape)
        if name in ends:
            made[ends[name]] = (whole,)
        elif name == "text_projection.weight":
            made[PROJECTION] = (Piece(prefix + name, (*meta.shape[::-1],), transposed=True),)
        elif (match := _OURS.fullmatch(name)) and match[2] in layer:
            made[f"transformer.resblocks.{match[1]}.{layer[match[2]]}.{match[3]}"] = (whole,)
        elif match and re.fullmatch(r"self_attn\.[qkv]_proj", match[2]):
            parts = [f"text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}" for part in "qkv"]
            if lost := [part for part in parts if part not in metas]:
                raise DataError(
                    f"{quote(prefix + lost[0])}: missing; OpenCLIP keeps it in one tensor with {quote(name)}"
                )
            fused = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            made[fused] = tuple(Piece(prefix + part, metas[part].shape) for part in parts)
        elif name not in LEFT_OUT:
            raise DataError(f"{quote(prefix + name)}: no tensor of a CLIP text encoder")
    return made


def layer(name: str) -> int:
    """The number of the layer that the tensor belongs to, by OpenCLIP's name; -1 for those of none."""
    match = re.match(r"transformer\.resblocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def repeated(made: Mapping[str, tuple[Piece, ...]], number: int) -> dict[str, tuple[Piece, ...]]:
    """A layer more, which is the layer `number` once again."""
    old, new = (f"transformer.resblocks.{each}." for each in (number, number + 1))
    return {name.replace(old, new): pieces for name, pieces in made.items() if name.startswith(old)}
