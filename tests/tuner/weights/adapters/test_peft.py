"""Files that peft writes, against the weights that peft merges them into."""

import copy
import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.tuner.weights.adapters.memory import drawn
from tuner.weights.adapters.base import Difference, Transform
from tuner.weights.adapters.file import read_adapters
from tuner.weights.layouts.modules import Modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 16, bias=False)])
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


ALL = ["blocks.0", "blocks.1", "conv", "point"]
LINEAR = ["blocks.0", "blocks.1"]
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "lora by rank": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"conv": 2}, alpha_pattern={"conv": 5, "blocks.1": 1}
    ),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=ALL),
    "loha with cores": peft.LoHaConfig(r=4, alpha=6, target_modules=ALL, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=1, alpha=6, target_modules=ALL),
    "lokr of whole factors": peft.LoKrConfig(r=8, alpha=6, target_modules=ALL),
    "lokr with cores": peft.LoKrConfig(
        r=1, alpha=6, target_modules=ALL, use_effective_conv2d=True, decompose_both=True, decompose_factor=4
    ),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False),
    "oft of a convolution": peft.OFTConfig(r=0, oft_block_size=4, target_modules=ALL, use_cayley_neumann=False),
    **{
        f"oft by {terms} terms": peft.OFTConfig(
            r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=True, num_cayley_neumann_terms=terms
        )
        for terms in (1, 2, 3, 4, 5, 6)
    },
    "coft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False, coft=True, eps=0.3),
    "coft, some blocks bound": peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=True, coft=True, eps=1.1
    ),
    "oft of one block": peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False, block_share=True
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft by butterflies": peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["blocks.1"]),
    "lora with biases": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["blocks.0", "conv"], lora_bias=True),
    "ia3": peft.IA3Config(target_modules=ALL, feedforward_modules=["blocks.1", "conv"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_does_what_peft_merges(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "butterflies" in kind:  # peft has them on GPUs alone, by an extension that does this
        layers = importlib.import_module("peft.tuners.boft.layer")
        monkeypatch.setattr(layers, "get_fbd_cuda", lambda: object())
        monkeypatch.setattr(layers.FastBlockDiag, "apply", lambda x: torch.stack([torch.block_diag(*own) for own in x]))
    torch.manual_seed(0)
    base = Net()
    model = peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind])
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                size = 0.2 if "oft" in name and "boft" not in name else 0.5
                one = any(word in name for word in ("magnitude", "ia3", "boft_s"))
                parameter.copy_(size * drawn(*parameter.shape, seed=index) + one)
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload().state_dict()
    own = base.state_dict()
    adapters = read_adapters(tmp_path, Modules.of_tensors(own))
    assert adapters.dialect == "diffusers"
    left = set(own)
    for name, change in adapters.changes.items():
        if name not in own:
            assert isinstance(change, Transform) and change.optional
            continue
        left.discard(name)
        assert change.fits(own[name].shape)
        weight = own[name].double()
        if isinstance(change, Difference):
            got = weight + change.dense().reshape(weight.shape)
        else:
            assert isinstance(change, Transform)
            got = change.effect(weight)
        assert torch.allclose(got, merged[name].double(), rtol=1e-5, atol=1e-5), name
        assert kind == "oft by 1 terms" or not torch.allclose(got, weight, atol=1e-2)
    assert all(torch.equal(own[name], merged[name]) for name in left)
    targets = CONFIGS[kind].target_modules
    changed = len(targets) * (2 if kind == "lora with biases" else 1) + (2 if kind == "ia3" else 0)
    assert len(left) == len(own) - changed
