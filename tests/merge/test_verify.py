"""What a merge looks at before its file gets its name: the same bytes again, and the same numbers in float64."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import command, output
from merge.command import METHODS
from merge.methods.base import Elementwise, Space
from merge.verify import ulps

METHODS_FILE = """
from dataclasses import dataclass
import torch
from merge.methods.base import Elementwise, Space

@dataclass(frozen=True, kw_only=True)
class Method(Elementwise):
    takes = (Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT

class Another(Method):
    "Gives something else each time."
    times = [0]
    def merge(self, inputs, out):
        self.times[0] += 1
        torch.lerp(inputs[0], inputs[1], 0.1 * self.times[0], out=out)

class Coarse(Method):
    "Loses digits: of b in numbers that are large beside it."
    def merge(self, inputs, out):
        torch.add(inputs[0] * 1e8, inputs[1], out=out).sub_(inputs[0] * 1e8)

class Plain(Method):
    def merge(self, inputs, out):
        torch.lerp(inputs[0], inputs[1], 0.3, out=out)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"methods_of_{tmp_path.name}"
    Path(f"{name}.py").write_text(METHODS_FILE)
    rng = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(300, 40, generator=rng), "b": torch.randn(40, generator=rng)}
    for file in ("a", "b", "c"):
        moved = {key: (value + 0.05 * torch.randn(value.shape, generator=rng)).half() for key, value in base.items()}
        save_file(moved, f"{file}.safetensors")
    Path("out.safetensors").write_bytes(b"before")
    return name


def merge(*words: str) -> int:
    return command.main([*words, "to=out.safetensors", "--overwrite"])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("Another", "worked out again it is not what was written"),
        ("Coarse", "Coarse loses digits; say dtype = 'float32'"),
    ],
)
def test_a_broken_method_is_refused_and_the_old_file_stays(here, capsys, method, said):
    assert merge(f"{here}:{method}", "a.safetensors", "b.safetensors") == 3
    assert said in capsys.readouterr().err
    assert Path("out.safetensors").read_bytes() == b"before"
    assert not list(Path().glob(".*"))
    assert merge(f"{here}:{method}", "a.safetensors", "b.safetensors", "verify=0") == 0


def test_what_loses_digits_keeps_enough_of_them_in_float64(here, capsys):
    assert merge(f"{here}:Coarse", "a.safetensors", "b.safetensors", "dtype=float32") == 0
    b, out = load_file("b.safetensors"), load_file("out.safetensors")
    assert torch.allclose(out["w"], b["w"].float(), atol=1e-7)


def test_a_bit_that_was_lost_on_the_way_to_the_disk_is_noticed(here, monkeypatch, capsys):
    write = output.Output.write

    def flipped(self, block, data):
        write(self, block, data)
        place = self.header_bytes + 2000
        os.pwrite(self.file, bytes([os.pread(self.file, 1, place)[0] ^ 1]), place)

    monkeypatch.setattr(output.Output, "write", flipped)
    assert merge(f"{here}:Plain", "a.safetensors", "b.safetensors") == 3
    assert "w: worked out again" in capsys.readouterr().err
    assert Path("out.safetensors").read_bytes() == b"before"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float8_e4m3fn", "float32"])
def test_right_methods_are_never_refused_and_their_error_is_told(here, capsys, dtype, rounding):
    assert merge(f"{here}:Plain", "a.safetensors", "b.safetensors", f"dtype={dtype}", f"rounding={rounding}") == 0
    told = float(capsys.readouterr().out.split("largest error ")[1].split()[0])
    assert told <= (1 if rounding == "stochastic" else 0.501)


NEEDED = {"posthoc_ema": ("snapshot_steps=[100, 200]", "snapshot_sigma_rel=[0.05]", "sigma_rel=0.1")}


def elementwise() -> list[str]:
    """Methods whose result is a checkpoint, on a base where they take differences."""
    kinds = {name: METHODS.find(name, "test") for name in METHODS.names()}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, Elementwise) and (kind.takes[0] is not Space.WEIGHT or kind.gives is not Space.DELTA)
    ]


@pytest.mark.parametrize("name", elementwise())
@pytest.mark.parametrize("numbers", ["fine-tunes", "a coarse grid", "far apart"])
def test_every_method_of_ours_is_as_exact_as_rounding_lets_it_be(capsys, name, numbers):
    """Also where differences cancel, where signs hang on the last digit, and where sizes are unlike."""
    rng = torch.Generator().manual_seed(5)
    for file in ("a", "b", "c"):
        tensors = load_file(f"{file}.safetensors")
        if numbers == "a coarse grid":
            tensors = {key: torch.randint(-8, 9, value.shape, generator=rng).half() for key, value in tensors.items()}
        elif numbers == "far apart":
            tensors = {
                key: value * 10 ** (2 * torch.randn(value.shape, generator=rng)) for key, value in tensors.items()
            }
            tensors = {key: value.clamp(-6e4, 6e4).half() for key, value in tensors.items()}
        save_file(tensors, f"{file}.safetensors")
    kind = METHODS.find(name, "test")
    files = [f"{file}.safetensors" for file in "abc"[: max(len(kind.takes), 2 if kind.repeats else 1)]]
    words = [name, *files, *NEEDED.get(name, ())]
    words += [f"{field.name}=0.3" for field in fields(kind) if isinstance(field.default, float)]
    if Space.DELTA in kind.takes and Space.WEIGHT not in kind.takes:
        words = [*words, "base=c.safetensors"]
    elif Space.DELTA in kind.takes:
        pytest.skip("adds a difference to a checkpoint: what is merged on a base ends with it")
    assert merge(*words, "dtype=bfloat16", "verify=40") == 0, capsys.readouterr().err


def test_an_error_is_told_in_units_of_the_last_place():
    exact = torch.tensor([1.0, 2.0, 1000.0, 2.0**-20], dtype=torch.float64)
    moved = torch.tensor([2**-11, 2**-9, 1.0, 2.0**-24], dtype=torch.float64)
    assert torch.allclose(ulps((exact + moved).float(), exact), moved / torch.tensor([2**-23, 2**-22, 2**-14, 2**-43]))
    assert ulps(torch.zeros(1, dtype=torch.float16), torch.tensor([2.0**-25], dtype=torch.float64)).item() == 0.5
