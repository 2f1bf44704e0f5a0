"""What LyCORIS makes of the kohya files of its kinds. Runs where lycoris-lora is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.tuner.publish.test_write_adapter import PROVENANCE, learn
from tuner.methods.boft import BOFT
from tuner.methods.loha import LoHa
from tuner.methods.lokr import LoKr
from tuner.methods.lora import Lora
from tuner.methods.oft import OFT
from tuner.publish.trained import write_adapter
from tuner.weights.adapters.file import Adapters

kohya: Any = pytest.importorskip("lycoris.kohya", exc_type=ImportError)
METHODS = {
    "lora": Lora(rank=4, conv_rank=2),
    "dora": Lora(rank=4, conv_rank=2, dora=True),
    "loha": LoHa(rank=3, alpha=2.0, conv_rank=2),
    "loha with cores": LoHa(rank=3, conv_rank=2, tucker=True),
    "lokr": LoKr(rank=1, alpha=2.0, factor=4),
    "lokr, whole": LoKr(full_matrix=True),
    "oft": OFT(block_size=8, conv=True),
    "oft, rescaled": OFT(block_size=8, rescale=True),
    "boft": BOFT(block_size=8, conv=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", METHODS)
def test_lycoris_makes_the_trained_network_of_the_file(kind: str, tmp_path: Path) -> None:
    pipeline, other = tiny.sd1(), tiny.sd1()
    trainable = learn(pipeline, METHODS[kind])
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    files = write_adapter(tmp_path, Adapters(trainable.changes()), trainable.in_peft(), PROVENANCE, networks=networks)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected, before = pipeline.unet(x, t, text).sample, other.unet(x, t, text).sample
        tensors = load_file(files.kohya)
        names = {f"lora_unet_{name}".replace(".", "_"): module for name, module in other.unet.named_modules()}
        adapted = {key.partition(".")[0] for key in tensors}
        assert len(adapted) == len(trainable.layers)
        for name in sorted(adapted):
            module = kohya.make_module(*kohya.get_module(tensors, name), name, names[name])
            module.apply_to()
            names[name].kept = module  # which else nothing holds
        got = other.unet(x, t, text).sample
    effect = (expected - before).abs().max()
    assert effect > 1e-2 and (got - expected).abs().max() < 2e-3 * effect
