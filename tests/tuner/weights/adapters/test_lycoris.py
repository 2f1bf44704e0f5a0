"""Files that LyCORIS writes, against what its networks compute. Runs where lycoris-lora is installed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.weights.adapters.memory import Memory, drawn
from tuner.weights.adapters.base import Difference, Transform
from tuner.weights.adapters.file import parse_adapters
from tuner.weights.layouts.modules import Modules

lycoris: Any = pytest.importorskip("lycoris", exc_type=ImportError)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, decomposed": {"algo": "lora", "dora_wd": True},
    "lora, decomposed by inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "lora, tucker": {"algo": "lora", "use_tucker": True},
    "lora, rank-stabilized": {"algo": "lora", "rs_lora": True},
    "loha": {},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, decomposed": {"algo": "loha", "dora_wd": True},
    "lokr": {"factor": 4},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, both": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "full": {},
    "ia3": {},
    "diag-oft": {},
    "diag-oft, bound": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "glora": {},
    "boft": {},
    "boft, rescaled": {"algo": "boft", "rescaled": True},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 16)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_an_adapter_does_what_lycoris_computes(kind: str) -> None:
    torch.manual_seed(0)
    options = {"algo": kind, **ALGORITHMS[kind]}
    net = Net()
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lycoris.LycorisNetwork.apply_preset({"target_name": ["linear", "conv"], "enable_conv": True})
    network = lycoris.create_lycoris(
        net, 1.0, linear_dim=2, linear_alpha=3.0, conv_dim=2, conv_alpha=3.0, bypass_mode=False, **options
    )
    network.apply_to()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            if options["algo"] == "full":
                continue  # it holds the weights themselves
            parameter.copy_(0.3 * drawn(*parameter.shape, seed=index) + ("dora" in name) + ("rescale" in name))
        if options["algo"] == "full":
            for parameter in network.parameters():
                parameter.add_(0.3 * drawn(*parameter.shape))
    file = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    adapters = parse_adapters(Memory(file), Modules.of_tensors(own))
    assert {"linear.weight", "conv.weight"} <= set(adapters.changes)
    x = torch.randn(5, 12), torch.randn(2, 8, 6, 6)
    expected = {"linear": net.linear(x[0]), "conv": net.conv(x[1])}
    moved: dict[str, Tensor] = {name: tensor.double() for name, tensor in own.items()}
    for name, change in adapters.changes.items():
        weight = own[name].double()
        assert change.fits(weight.shape)
        if isinstance(change, Difference):
            moved[name] = weight + change.dense().reshape(weight.shape)
        else:
            assert isinstance(change, Transform)
            moved[name] = change.effect(weight)
    got = {
        "linear": nn.functional.linear(x[0].double(), moved["linear.weight"], moved["linear.bias"]),
        "conv": nn.functional.conv2d(x[1].double(), moved["conv.weight"], moved["conv.bias"], padding=1),
    }
    for layer in ("linear", "conv"):
        scale = expected[layer].abs().max().item()
        assert torch.allclose(got[layer], expected[layer].double(), rtol=1e-5, atol=1e-5 * scale), layer
    assert not torch.allclose(moved["linear.weight"], own["linear.weight"].double(), atol=1e-2)
