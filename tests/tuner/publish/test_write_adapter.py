"""Every adapter's files give, in the programs that read them, the network that was trained."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.tuner.methods.variations import every_method
from tests.tuner.publish.test_write_lora import PROVENANCE
from tuner.methods._adapter import Adapter, AdapterTrainable
from tuner.publish.trained import write_adapter
from tuner.publish.verify import modules_of
from tuner.weights.adapters.base import Difference, Transform
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.low_rank import LowRank

ADAPTERS = {
    name: made
    for name, made in every_method().items()
    if isinstance(made, Adapter) and "dropout" not in name and not name.endswith("with text encoder")
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


class Model:
    """As much of a model as methods ask for, over a stock pipeline's networks."""

    denoiser = "unet"
    text_encoders = ("text_encoder",)

    def __init__(self, pipeline: Any) -> None:
        self.adapter_targets = {"unet": r"\.attentions\.", "text_encoder": r"\.(self_attn|mlp)\."}
        self.unused: dict[str, str] = {}
        self.networks: dict[str, nn.Module] = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        flat = not hasattr(pipeline.text_encoder, "text_model")
        self.prefixes = {"unet": "unet.", "text_encoder": "text_encoder.text_model." if flat else "text_encoder."}


def learn(pipeline: Any, method: Adapter) -> AdapterTrainable:
    """As after a training: every value is moved a little."""
    model: Any = Model(pipeline)
    trainable = method.attach(model, seed=0)
    for index, p in enumerate(trainable.parameters().values()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        p.data += 0.05 * noise * (p.abs().mean() if method.kind == "lora" and p.any() else 1)
    for network in model.networks.values():
        network.eval()
    return trainable


def picture(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("the red cat", num_inference_steps=2, generator=generator, output_type="pt").images[0] * 255


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, what was learned, what was written, and the picture of the trained network."""
    done: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in done:
            pipeline = tiny.sd1()
            trainable = learn(pipeline, ADAPTERS[name])
            folder = tmp_path_factory.mktemp("adapter")
            networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
            adapters = Adapters(trainable.changes())
            files = write_adapter(folder, adapters, trainable.in_peft(), PROVENANCE, networks=networks)
            done[name] = folder, adapters, files, picture(pipeline)
        return done[name]

    return make


@pytest.fixture(scope="module")
def untrained() -> Tensor:
    return picture(tiny.sd1())


def close(got: Tensor, expected: Tensor, before: Tensor, within: float) -> bool:
    effect = (expected - before).abs().max()
    assert effect > 3, "it changes no picture"
    return bool((got - expected).abs().max() <= within * effect)


@every_adapter
def test_baked_into_the_base_the_file_gives_the_trained_networks_picture(name, made, untrained):
    """As `tuner merge` does, and as programs that add it up while loading."""
    _, adapters, files, expected = made(name)
    pipeline = tiny.sd1()
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    read = read_adapters(files.kohya, modules_of(networks))
    assert read.changes.keys() == adapters.changes.keys()
    prefixes = Model(pipeline).prefixes
    for key, change in read.changes.items():
        component = key.partition(".")[0]
        weight: Any = networks[component].get_parameter(key.removeprefix(prefixes[component]))
        if isinstance(change, Difference):
            weight.data += change.dense().reshape(weight.shape).float()
        else:
            assert isinstance(change, Transform)
            weight.data = change.effect(weight.data)
    half = adapters.as_lora() is not None
    assert files.error < (1e-3 if half else 1e-6)
    assert close(picture(pipeline), expected, untrained, 2e-2 if half else 1e-3)


@pytest.mark.parametrize("name", [name for name, method in ADAPTERS.items() if method.kind == "lora"])
def test_a_stock_pipeline_with_diffusers_file_gives_the_trained_networks_picture(name, made, untrained):
    folder, _, files, expected = made(name)
    pipeline = tiny.sd1()
    pipeline.load_lora_weights(folder, weight_name=files.diffusers.name)
    assert close(picture(pipeline), expected, untrained, 2e-2)
    assert not (folder / "peft").exists()


@pytest.mark.parametrize("name", [name for name, method in ADAPTERS.items() if method.kind in ("loha", "lokr", "ia3")])
def test_a_stock_pipeline_with_pefts_folders_gives_the_trained_networks_picture(name, made, untrained):
    folder, _, files, expected = made(name)
    pipeline: Any = tiny.sd1()
    for part in (folder / "peft").iterdir():  # as the card says
        setattr(pipeline, part.name, peft.PeftModel.from_pretrained(getattr(pipeline, part.name), str(part)))
    assert close(picture(pipeline), expected, untrained, 1e-3)
    assert files.diffusers is None
    assert {path.name for path in (folder / "peft").iterdir()} <= {"unet", "text_encoder"}


@pytest.mark.parametrize("name", [name for name, method in ADAPTERS.items() if method.kind in ("oft", "boft")])
def test_of_rotations_there_is_one_file_alone(name, made):
    folder, _, files, _ = made(name)
    assert files.diffusers is None and [path.name for path in folder.iterdir()] == ["robot.safetensors"]


def test_pefts_config_holds_nothing_of_this_machine(made):
    folder: Path = made("lokr, whole")[0]
    table = json.loads((folder / "peft" / "unet" / "adapter_config.json").read_text())
    assert table["base_model_name_or_path"] is None and str(Path.home()) not in json.dumps(table)


def test_a_pissa_file_is_for_the_base_as_it_was(made):
    """Of twice the rank, and no less exact in half precision than any LoRA."""
    _, adapters, files, _ = made("pissa")
    assert files.error < 1e-3
    ranks = {change.rank for change in adapters.changes.values() if isinstance(change, LowRank)}
    assert ranks == {2 * 4, 2 * 2}
