import pytest
import torch

from merge.execute import execute
from merge.methods.lerp import Lerp
from merge.plan import make_plan
from merge.rebasin import align
from merge.recipe import Apply, Source
from merge.symmetries import Structure, symmetries
from tests import tiny
from tests.merge.memory import same_bits
from tests.merge.test_symmetries import STRUCTURE, OpenClip, Tensors, shuffled
from tuner.errors import DataError
from tuner.weights.store import SafetensorsFile


def networks(seed):
    from transformers import CLIPTextModel

    return {
        "unet": tiny.unet,
        "text_encoder": lambda: CLIPTextModel(tiny.text_config(tiny.tokenizer())),
        "conditioner.embedders.1.model": OpenClip,
        "vae": lambda: tiny.sd1(seed).vae,
    }


def store(component, seed=0):
    """A component with the numbers that its training would start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tensors(
            {f"{component}.{name}": value for name, value in networks(seed)[component]().state_dict().items()}
        )


def trained(one, amount, seed=0):
    """`one` with each number changed by `amount` of its tensor's."""
    rng = torch.Generator().manual_seed(seed)
    return Tensors(
        {
            name: tensor + amount * tensor.std(correction=0) * torch.randn(tensor.shape, generator=rng)
            for name, tensor in one.tensors.items()
        }
    )


def distance(one, other):
    squares = [(one.read(name).double() - other.read(name).double()).square().sum().item() for name in one.metas]
    return sum(squares) ** 0.5


every_component = pytest.mark.parametrize("component", ["unet", "text_encoder", "conditioner.embedders.1.model", "vae"])


@every_component
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_whose_units_were_shuffled_is_found_again_bit_for_bit(component, seed):
    one = store(component)
    other = shuffled(one, symmetries(one.metas, STRUCTURE), seed)
    assert distance(one, other) > 0.1 * distance(one, trained(one, 1.0))
    aligned = align(one, other, STRUCTURE)
    assert all(same_bits(aligned.read(name), one.read(name)) for name in one.metas)
    assert aligned.moved


@every_component
def test_a_shuffled_fine_tune_is_found_again(component):
    one = store(component)
    tuned = trained(one, 0.1)
    aligned = align(one, shuffled(tuned, symmetries(one.metas, STRUCTURE)), STRUCTURE)
    assert all(same_bits(aligned.read(name), tuned.read(name)) for name in one.metas)


@every_component
def test_of_fine_tunes_of_one_base_nothing_moves(component):
    one = store(component)
    assert align(one, one, STRUCTURE).moved == {}
    aligned = align(trained(one, 0.1, seed=1), trained(one, 0.1, seed=2), STRUCTURE)
    assert aligned.moved == {} and aligned.orders == {}


@every_component
def test_networks_that_were_trained_apart_come_nearer(component):
    one, other = store(component), store(component, seed=1)
    aligned = align(one, other, STRUCTURE)
    assert distance(one, aligned) < 0.99 * distance(one, other)
    again = align(one, aligned, STRUCTURE)
    assert again.moved == {}


def test_an_aligned_network_is_merged_like_any_other(tmp_path):
    from safetensors.torch import save_file

    one = store("unet")
    save_file(one.tensors, tmp_path / "one.safetensors")
    file = SafetensorsFile(tmp_path / "one.safetensors")
    other = shuffled(file, symmetries(file.metas, STRUCTURE))
    sources = Source("one", file), Source("other", align(file, other, STRUCTURE))
    plan = make_plan(Apply("blend", Lerp(t=0.5), sources))
    execute(plan, tmp_path / "blend.safetensors", lambda root, roots: {"root": root})
    blend = SafetensorsFile(tmp_path / "blend.safetensors")
    assert all(same_bits(blend.read(name), one.read(name)) for name in one.metas)


def test_unlike_networks_are_refused():
    one = store("unet")
    other = Tensors({**one.tensors, "unet.mid_block.resnets.0.conv1.bias": torch.zeros(32)})
    with pytest.raises(DataError, match=r"unet.mid_block.resnets.0.conv1.bias: is not in both networks, in one shape"):
        align(other, one, STRUCTURE)
    lacking = Tensors({name: tensor for name, tensor in one.tensors.items() if "attn1.to_v" not in name})
    with pytest.raises(DataError, match=r"attn1.to_v.weight: is not in both networks"):
        align(lacking, one, STRUCTURE)
    with pytest.raises(DataError, match="nothing in these tensors may change places"):
        align(Tensors({"w": torch.zeros(3)}), Tensors({"w": torch.zeros(3)}), Structure())
