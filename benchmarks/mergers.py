"""The programs that `benchmarks.merge` compares, and how each is told to make the same thing.

Peers run at the best settings that were found for them: sd-mecha without its checks and intermediate copies, with small
buffers, and a weighted sum also in the files' float16, which rounds its numbers too; mergekit writing beside its work,
and in float16 where its methods add up in float32 by themselves.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MECHA = (
    "import sys, torch, sd_mecha; from sd_mecha import *; out, *paths = sys.argv[1:]; "
    "a, b, c = ([model(path) for path in paths] + [None])[:3]; "
    "merge({recipe}, output=out, output_dtype=torch.float16, {cast}omit_non_finite_inputs=False, "
    "check_finite_output=False, check_extra_keys=False, validate_mm_contract=False, memoize_intermediates=False, "
    "total_buffer_size=1 << 26)"
)
MECHA_CASTS = {"sd-mecha": "", "sd-mecha in float16": "merge_dtype=None, merge_device=None, output_device=None, "}
NAIVE = """
import sys, torch
from safetensors.torch import load_file, save_file

def slerp(a, b, t):
    x, y = a / a.norm(), b / b.norm()
    angle = (x * y).sum().clamp(-1, 1).acos()
    if angle < 1e-4 or not angle.isfinite():
        return a.lerp(b, t)
    mixed = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()
    return mixed * a.norm().lerp(b.norm(), t)

def ties(deltas, density):
    trimmed = []
    for delta in deltas:
        last = delta.abs().flatten().kthvalue(max(1, int((1 - density) * delta.numel()))).values
        trimmed.append(delta * (delta.abs() >= last))
    stacked = torch.stack(trimmed)
    agree = stacked.sign() == stacked.sum(0).sign()
    return (stacked * agree).sum(0) / (agree & (stacked != 0)).sum(0).clamp(min=1)

out, *paths = sys.argv[1:]
models = [load_file(path) for path in paths]
merged = {}
for name, tensor in models[0].items():
    a, b, c = ([model[name].float() for model in models] + [None])[:3]
    merged[name] = (RECIPE).to(tensor.dtype)
save_file(merged, out)
"""
FLOOR = """
import os, sys
out, *inputs = sys.argv[1:]
buffer = bytearray(4 << 20)
size = os.path.getsize(inputs[0])
files = [os.open(path, os.O_RDONLY) for path in inputs]
target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for start in range(0, size, len(buffer)):
    for file in files:
        os.preadv(file, [buffer], start)
    os.pwrite(target, memoryview(buffer)[: min(len(buffer), size - start)], start)
os.fsync(target)
"""


RESULTS = "results"
"""The folder that the programs write to; what is in it is removed before each run."""


@dataclass(frozen=True)
class Task:
    """One merge, in the words of each program; models are a, b and c."""

    inputs: str
    """Which models there are, in this order."""
    ours: tuple[str, ...]
    naive: str
    mecha: str
    mergekit: Mapping[str, object]
    weights: Mapping[str, object] = field(default_factory=dict[str, object])
    """mergekit's parameters of each model, in its order."""
    half: tuple[str, ...] = ()
    """Programs that can work on float16 without losing much."""


TASKS = {
    "lerp": Task(
        inputs="ab",
        ours=("lerp", "{a}", "{b}", "t=0.3"),
        naive="a.lerp(b, 0.3)",
        mecha="weighted_sum(a, b, alpha=0.3)",
        mergekit={"merge_method": "linear"},
        weights={"a": {"weight": 0.7}, "b": {"weight": 0.3}},
        half=("sd-mecha in float16", "mergekit"),
    ),
    "slerp": Task(
        inputs="ab",
        ours=("slerp", "{a}", "{b}", "t=0.3"),
        naive="slerp(a, b, 0.3)",
        mecha="slerp(a, b, alpha=0.3)",
        mergekit={"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.3}},
        weights={"a": {}, "b": {}},
        half=("mergekit",),
    ),
    "add_difference": Task(
        inputs="abc",
        ours=("add_difference", "{a}", "{b}", "{c}", "weight=0.7"),
        naive="a + 0.7 * (b - c)",
        mecha="add_difference(a, b, c, alpha=0.7)",
        mergekit={"merge_method": "task_arithmetic", "base_model": "c"},
        weights={"a": {"weight": 1.0}, "b": {"weight": 0.7}},
    ),
    "ties": Task(
        inputs="abc",
        ours=("ties", "{b}", "{c}", "base={a}", "density=0.3"),
        naive="a + ties([b - a, c - a], 0.3)",
        mecha="a + ties_sum(subtract(b, a), subtract(c, a), k=0.3, vote_sgn=True)",  # its `add_difference_ties` fails
        mergekit={"merge_method": "ties", "base_model": "a"},
        weights={"b": {"weight": 1.0, "density": 0.3}, "c": {"weight": 1.0, "density": 0.3}},
    ),
}


@dataclass(frozen=True)
class Program:
    """One of those that are compared."""

    command: tuple[str, ...]
    loaded: tuple[str, ...] = ()
    """A command that does nothing but load the program, and then waits a moment."""
    output: Path | None = None
    """The safetensors file that it makes; None where what it writes is no model."""
    peer: bool = False


def programs(task: Task, inputs: Mapping[str, Path], folder: Path, peers: Path | None) -> dict[str, Program]:
    """Every program that can do `task`; `peers` is the Python of an environment with sd-mecha and mergekit."""
    paths = [str(inputs[name]) for name in task.inputs]
    results = folder / RESULTS
    out, made = results / "out.safetensors", results / "ours.safetensors"
    words = ours(task.ours, inputs, made)
    naive = NAIVE.replace("RECIPE", task.naive)
    found = {
        "ours": Program(words, _loading(sys.executable, "torch, merge.command"), made),
        "floor": Program(
            (sys.executable, "-c", FLOOR, str(results / "copied"), *paths), _loading(sys.executable, "os")
        ),
        "naive torch": Program(
            (sys.executable, "-c", naive, str(out), *paths), _loading(sys.executable, "safetensors.torch"), out
        ),
    }
    if peers is None:
        return found
    for name, cast in MECHA_CASTS.items():
        if name == "sd-mecha" or name in task.half:
            recipe = MECHA.format(recipe=task.mecha, cast=cast)
            words = (str(peers), "-c", recipe, str(out), *paths)
            found[name] = Program(words, _loading(str(peers), "sd_mecha"), out, peer=True)
    config = folder / "mergekit.json"
    config.write_text(json.dumps(_mergekit(task, inputs, "mergekit" in task.half)))
    found["mergekit"] = Program(
        (str(peers.with_name("mergekit-pytorch")), "--async-write", "--quiet", str(config), str(results / "mergekit")),
        _loading(str(peers), "mergekit.scripts.merge_raw_pytorch"),
        results / "mergekit" / "model.safetensors",
        peer=True,
    )
    return found


def ours(words: Sequence[str], inputs: Mapping[str, Path], out: Path) -> tuple[str, ...]:
    """Our command line, in which `{a}` stands for model a."""
    places = {name: str(path) for name, path in inputs.items()}
    return (sys.executable, "-m", "tuner", "merge", *(word.format(**places) for word in words), f"to={out}")


def _loading(python: str, modules: str) -> tuple[str, ...]:
    return (python, "-c", f"import {modules}; import time; time.sleep(0.3)")


def _mergekit(task: Task, inputs: Mapping[str, Path], half: bool) -> dict[str, object]:
    config = {"dtype": "float16" if half else "float32", "out_dtype": "float16"} | dict(task.mergekit)
    if "base_model" in config:
        config["base_model"] = str(inputs[str(config["base_model"])])
    config["models"] = [
        {"model": str(inputs[name]), "parameters": parameters} for name, parameters in task.weights.items()
    ]
    return config
