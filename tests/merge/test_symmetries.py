"""Networks with their units in another order compute the same, and nothing that belongs to a unit is forgotten."""

from collections import OrderedDict
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from merge.symmetries import Permuted, Structure, symmetries
from tests import tiny
from tests.tuner.weights import original
from tuner.errors import DataError
from tuner.weights.layouts import ldm
from tuner.weights.store import TensorMeta
from tuner.weights.views import Assembled

STRUCTURE = Structure(groups=8, heads=4, width=8)
"""Of the networks in `tests.tiny`."""
CHANGES_NOTHING = ("k_proj.bias", "to_k.bias")
"""What all keys have in common changes no attention, and so it might stand in any order."""


@dataclass(frozen=True)
class Tensors:
    """A store in memory."""

    tensors: dict

    @property
    def metas(self):
        return {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name].clone()

    def locate(self, name):
        return None


def shuffled(store, found, seed=0):
    """`store` with all its units in a random order."""
    rng = torch.Generator().manual_seed(seed)
    orders = {}
    for symmetry in found:
        size = symmetry.units // symmetry.blocks
        blocks = torch.randperm(symmetry.blocks, generator=rng)
        orders[symmetry.name] = tuple(
            torch.cat([block * size + torch.randperm(size, generator=rng) for block in blocks]) for _ in symmetry.roles
        )
    return Permuted(store, found, orders)


def roughened(network, seed=0):
    """`network` in float64 with random numbers everywhere, so that no norm or bias is the same for all units."""
    rng = torch.Generator().manual_seed(seed)
    network = network.double().eval().requires_grad_(False)
    for tensor in network.parameters():
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
    return network


def unet():
    network = roughened(tiny.unet())
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=rng, dtype=torch.float64)
    text = torch.randn(1, 5, 32, generator=rng, dtype=torch.float64)
    return network, lambda: network(x, torch.tensor([400]), text).sample


def text_encoder():
    from transformers import CLIPTextModel

    network = roughened(CLIPTextModel(tiny.text_config(tiny.tokenizer())))
    ids = torch.tensor([[1, 5, 9, 2, 30, 7, 1, 0]])
    return network, lambda: network(ids).last_hidden_state


def autoencoder():
    network = roughened(tiny.sd1().vae)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run():
        latents = network.encode(x).latent_dist.mode()
        return torch.cat([latents.flatten(), network.decode(latents).sample.flatten()])

    return network, run


class Block(nn.Module):
    """A layer of a text encoder, as OpenCLIP builds and names it."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        known = self.ln_1(x)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        x = x + self.attn(known, known, known, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """OpenCLIP's text encoder, whose names the second encoder of XL and that of Stable Diffusion 2 have in files."""

    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.token_embedding = nn.Embedding(50, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(77, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, heads) for _ in range(layers))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(0.1 * torch.randn(width, width))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_final(x) @ self.text_projection


def open_clip():
    network = roughened(OpenClip())
    ids = torch.tensor([[1, 5, 9, 2, 30, 7, 1, 0]])
    return network, lambda: network(ids)


NETWORKS = {"unet": unet, "text encoder": text_encoder, "OpenCLIP's": open_clip, "autoencoder": autoencoder}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network, what it computes, and its tensors."""
    made, run = NETWORKS[request.param]()
    return made, run, Tensors({name: tensor.clone() for name, tensor in made.state_dict().items()})


def change(network, run, before, store, names=None):
    """How much the outcome changes when `network` has the tensors of `store`, or those of `names`."""
    parameters = network.state_dict()
    kept = {name: parameters[name].clone() for name in names or store.metas}
    for name in kept:
        parameters[name].copy_(store.read(name))
    after = run()
    for name, tensor in kept.items():
        parameters[name].copy_(tensor)
    return ((after - before).norm() / before.norm()).item()


def test_units_in_another_order_compute_the_same(network):
    made, run, store = network
    found = symmetries(store.metas, STRUCTURE)
    before = run()
    for seed in range(3):
        moved = shuffled(store, found, seed)
        assert change(made, run, before, moved) < 1e-12
    assert sum(not torch.equal(moved.read(name), store.read(name)) for name in store.metas) > len(store.metas) / 3


def test_every_place_of_a_unit_counts(network):
    made, run, store = network
    found = symmetries(store.metas, STRUCTURE)
    before = run()
    for symmetry in found:
        for role, axes in enumerate(symmetry.roles):
            for axis in axes:
                rest = tuple(other for other in axes if other is not axis)
                broken = replace(symmetry, roles=(*symmetry.roles[:role], rest, *symmetry.roles[role + 1 :]))
                names = [other.tensor for axes in symmetry.roles for other in axes]
                changed = change(made, run, before, shuffled(store, (broken,)), names)
                assert changed > 1e-9 or axis.tensor.endswith(CHANGES_NOTHING), f"{axis.tensor} is not needed"


def test_everything_that_may_move_is_found():
    store = Tensors(dict(tiny.unet().state_dict()))
    names = [symmetry.name for symmetry in symmetries(store.metas, STRUCTURE)]
    assert len(set(names)) == len(names)
    residual = [name for name in store.metas if name.endswith("conv1.weight")]
    attention = [name for name in store.metas if name.endswith("to_q.weight")]
    gated = [name for name in store.metas if name.endswith("ff.net.2.weight")]
    streams = [name for name in store.metas if name.endswith("proj_in.weight")]
    assert all((residual, attention, gated, streams))
    assert len(names) == len(residual) + len(attention) + len(gated) + len(streams) + 2


@pytest.mark.parametrize(
    "structure", [replace(STRUCTURE, groups=4), replace(STRUCTURE, groups=1), replace(STRUCTURE, heads=2)]
)
def test_a_wrong_structure_changes_what_is_computed(structure):
    made, run = unet()
    store = Tensors({name: tensor.clone() for name, tensor in made.state_dict().items()})
    assert change(made, run, run(), shuffled(store, symmetries(store.metas, structure))) > 1e-3


def test_a_single_files_units_are_those_of_the_folder():
    pipeline = tiny.sd1()
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    folder = Tensors(
        {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    )
    translation = ldm.from_diffusers(folder.metas)
    single = Assembled(folder, translation.pieces)
    of_folder = symmetries(folder.metas, STRUCTURE)
    of_single = symmetries(single.metas, STRUCTURE)
    own = {name: pieces[0].name for name, pieces in translation.pieces.items()}

    def places(found, names):
        return {
            (symmetry.blocks, frozenset(frozenset((names[axis.tensor], axis.dim) for axis in role)))
            for symmetry in found
            for role in symmetry.roles
        }

    assert places(of_single, own) == places(of_folder, {name: name for name in folder.metas})


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl_refiner"])
def test_of_a_single_file_as_much_may_move_as_of_its_folder(family):
    single = original.metas(getattr(original, family)())
    pieces = ldm.to_diffusers(single).pieces
    folder = {name: TensorMeta(parts[0].shape, torch.float16) for name, parts in pieces.items()}
    structure = Structure.of(single)
    assert structure == Structure.of(folder)

    def sizes(metas):
        return sorted((symmetry.units, symmetry.blocks) for symmetry in symmetries(metas, structure))

    gone = 1 if family == "sd2" else 0  # the last layer of its text encoder goes unused, and no folder has it
    text = [
        (symmetry.units, symmetry.blocks)
        for symmetry in symmetries(single, structure)
        if "resblocks.0" in symmetry.name
    ]
    assert len(text) == 2
    assert sizes(single) == sorted(sizes(folder) + gone * text)


def meta(*shape):
    return TensorMeta(shape, torch.float16)


def test_larger_families_have_heads_of_64():
    prefix = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    metas = {f"{prefix}{name}.weight": meta(640, 640) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    (sdxl,) = symmetries(metas, Structure(heads=None))
    (sd1,) = symmetries(metas, Structure(heads=8))
    assert (sdxl.blocks, sd1.blocks) == (10, 8)


def test_the_structure_is_that_of_the_family(base):
    from tuner.weights.checkpoint import open_store

    assert Structure.of(open_store(base).metas) == Structure(groups=32, heads=8, width=64)
    with pytest.raises(DataError, match="sd1, sd2, sdxl"):
        Structure.of({"weight": meta(3, 3)})


def test_units_that_do_not_make_whole_blocks_are_refused():
    metas = {
        "mid.conv1.weight": meta(30, 30, 3, 3),
        "mid.norm2.weight": meta(30),
        "mid.conv2.weight": meta(30, 30, 3, 3),
    }
    with pytest.raises(DataError, match="mid: 30 units in 32 blocks do not fit"):
        symmetries(metas, Structure())
    metas["mid.norm2.weight"] = meta(32)
    with pytest.raises(DataError, match="mid: 30 and 32 units in 32 blocks do not fit"):
        symmetries(metas, Structure())


def test_what_does_not_move_keeps_its_place_in_the_file():
    @dataclass(frozen=True)
    class Located(Tensors):
        def locate(self, name):
            return f"place of {name}"

    store = Located(dict(tiny.unet().state_dict()))
    moved = shuffled(store, symmetries(store.metas, STRUCTURE))
    assert moved.locate("conv_in.weight") == "place of conv_in.weight"
    assert moved.locate("down_blocks.0.resnets.0.conv1.weight") is None
