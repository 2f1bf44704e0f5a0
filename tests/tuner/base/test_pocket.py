"""The embedded base model does what its card says, with a margin; the figures are `tuner.base.evaluate`'s."""

from pathlib import Path

import pytest
import torch

from tuner.base.evaluate import (
    SAMPLING,
    Known,
    Pair,
    background,
    held_out_loss,
    latents_of,
    named,
    spread,
)
from tuner.base.pictures import COLOURS, objects
from tuner.families.source import EMBEDDED, BaseModel

REFERENCE = Path(__file__).with_name("reference")
CAPTIONS = 24


@pytest.fixture(scope="module")
def model():
    return BaseModel(base="pocket").open(torch.device("cpu"))


def test_the_weights_stay_small():
    weights = list((EMBEDDED / "pocket").rglob("*.safetensors"))
    assert len(weights) == 3
    assert sum(file.stat().st_size for file in weights) <= 30_000_000


def test_it_has_the_layers_of_stable_diffusion_1(model):
    """686 U-Net tensors and 196 less the text encoder's other depth: the names are SD 1's."""
    unet = model.networks["unet"].state_dict()
    assert len(unet) == 686
    assert {"down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight", "up_blocks.3.resnets.2.conv1.weight",
            "mid_block.attentions.0.proj_in.weight"} <= unet.keys()  # fmt: skip


@torch.no_grad()
def test_backgrounds_of_held_out_pairs_are_right(model):
    held = spread(Known.read(REFERENCE / "validation.safetensors").pairs, 8)
    samples = model.sample([pair.caption for pair in held], list(range(len(held))), SAMPLING)
    right = [background(sample) == pair.colour for sample, pair in zip(samples, held, strict=True)]
    assert sum(right) >= 7, right


@torch.no_grad()
def test_samples_show_what_was_named_and_shuffled_captions_do_not(model):
    training = Known.read(REFERENCE / "train.safetensors")
    asked = spread([Pair(icon, colour) for icon in objects()["shown"] for colour in COLOURS], CAPTIONS)
    latents = latents_of(model, model.sample([p.caption for p in asked], list(range(CAPTIONS)), SAMPLING))
    _, top5 = named(latents, [pair.icon for pair in asked], training.latents, training.icons)
    _, chance = named(latents, [pair.icon for pair in asked[1:] + asked[:1]], training.latents, training.icons)
    assert top5 >= 0.58 and chance <= 0.17, (top5, chance)


def test_captions_explain_held_out_pictures(model):
    held = Known.read(REFERENCE / "validation.safetensors")
    latents, pairs = held.latents[::16], held.pairs[::16]
    told = held_out_loss(model, [pair.caption for pair in pairs], latents)
    untold = held_out_loss(model, [""] * len(pairs), latents)
    assert told < 0.8 * untold, (told, untold)
