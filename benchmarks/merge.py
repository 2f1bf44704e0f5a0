"""How fast checkpoints are merged, beside other mergers and beside plain reading and writing.

    python -m benchmarks.merge                        # exact-shape SDXL, weighted sum
    python -m benchmarks.merge --model sd15 --method ties
    python -m benchmarks.merge --peers ~/peers/bin/python      # where sd-mecha and mergekit are installed

Checkpoints with the names, shapes and dtype of the real ones are generated first (random values, 6.9 GB each for SDXL).
Every program runs as a process of its own, all of them in turn, round after round, on the same files in the page cache.
The floor is a loop that reads the inputs into one buffer and writes an output of that size, and does nothing else.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POOL = (1 << 24) - 3
"""Random numbers that the checkpoints are made of: a prime-like size, so that tensors differ."""
OURS = {
    "lerp": ["lerp", "{a}", "{b}", "t=0.3", "to={out}"],
    "add_difference": ["add_difference", "{a}", "{b}", "{c}", "weight=0.7", "to={out}"],
    "slerp": ["slerp", "{a}", "{b}", "t=0.3", "to={out}"],
    "ties": ["ties", "{b}", "{c}", "base={a}", "density=0.3", "to={out}"],
}
INPUTS = {"lerp": "ab", "add_difference": "abc", "slerp": "ab", "ties": "abc"}
MECHA = {
    "lerp": "sd_mecha.weighted_sum(a, b, alpha=0.3)",
    "add_difference": "sd_mecha.add_difference(a, b, c, alpha=0.7)",
    "slerp": "sd_mecha.slerp(a, b, alpha=0.3)",
    "ties": "sd_mecha.add_difference_ties(a, b, c, alpha=1.0, k=0.3)",
}
MERGEKIT = {
    "lerp": {"merge_method": "linear", "weights": {"a": 0.7, "b": 0.3}},
    "add_difference": {"merge_method": "task_arithmetic", "base": "c", "weights": {"a": 1.0, "b": 0.7}},
    "slerp": {"merge_method": "slerp", "base": "a", "parameters": {"t": 0.3}, "weights": {"a": None, "b": None}},
    "ties": {"merge_method": "ties", "base": "a", "weights": {"b": 1.0, "c": 1.0}, "density": 0.3},
}
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
NAIVE = """
import sys, torch
from safetensors.torch import load_file, save_file
out, *inputs = sys.argv[1:]
a, b = load_file(inputs[0]), load_file(inputs[1])
save_file({name: torch.lerp(a[name].float(), b[name].float(), 0.3).to(a[name].dtype) for name in a}, out)
"""


@dataclass(frozen=True)
class Cost:
    """What one run of a program took."""

    wall: float
    cpu: float
    anonymous: float
    """Peak of memory that is not a file's, in GB."""


def measure(words: Sequence[str]) -> Cost:
    """Run a program.

    Raises:
        RuntimeError: it failed.
    """
    peak = 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(words[:4])}: {said.read()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak / 1e9)


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def generate(model: str, folder: Path, names: str) -> list[Path]:
    """Checkpoints of a model's exact names and shapes in float16, as fine-tunes of one another; made when missing."""
    import torch

    from tests.tuner.weights import original

    shapes = {"sd15": original.sd1, "sdxl": original.sdxl, "tiny": lambda: {"w": (1000, 1000), "b": (1000,)}}[model]()
    paths: list[Path] = []
    for index, name in enumerate(names):
        path = folder / f"{model}-{name}.safetensors"
        paths.append(path)
        if path.is_file():
            continue
        print(f"generating {path} ...", flush=True)
        from tuner.weights.writer import save_safetensors

        pool = torch.empty(POOL, dtype=torch.float16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        tensors: dict[str, torch.Tensor] = {}
        at = 0
        for tensor, shape in shapes.items():
            numbers = math.prod(shape)
            values = _piece(pool, at, numbers)
            at += numbers
            if index:
                values += 0.1 * _piece(pool, at * (2 * index + 1) + index, numbers)
            tensors[tensor] = values.reshape(shape)
        save_safetensors(path, tensors)
    return paths


def _piece(pool: "torch.Tensor", start: int, numbers: int) -> "torch.Tensor":
    """Numbers from the pool, over and over."""
    start %= POOL
    return pool.repeat(-(-(start + numbers) // POOL))[start : start + numbers].clone()


def programs(method: str, inputs: Mapping[str, Path], folder: Path, peers: str | None) -> dict[str, list[str]]:
    """The command line of each program."""
    out = folder / "out.safetensors"
    order = [str(inputs[name]) for name in INPUTS[method]]
    places = {name: str(path) for name, path in inputs.items()} | {"out": str(out)}
    found = {
        "ours": [sys.executable, "-m", "tuner", "merge", *(word.format(**places) for word in OURS[method])],
        "floor": [sys.executable, "-c", FLOOR, str(out), *order],
    }
    if method == "lerp":
        found["naive torch"] = [sys.executable, "-c", NAIVE, str(out), *order]
    if peers is None:
        return found
    models = "; ".join(f"{name} = sd_mecha.model({str(path)!r})" for name, path in inputs.items())
    found["sd-mecha"] = [
        peers,
        "-c",
        f"import torch, sd_mecha; {models}; sd_mecha.merge({MECHA[method]}, output={str(out)!r}, "
        "output_dtype=torch.float16)",
    ]
    config = folder / f"{method}.yml"
    config.write_text(json.dumps(_mergekit(MERGEKIT[method], inputs)))
    found["mergekit"] = [str(Path(peers).with_name("mergekit-pytorch")), str(config), str(folder / "mergekit")]
    return found


def _mergekit(known: Mapping[str, object], inputs: Mapping[str, Path]) -> dict[str, object]:
    config: dict[str, object] = {"merge_method": known["merge_method"], "dtype": "float32", "out_dtype": "float16"}
    if "base" in known:
        config["base_model"] = str(inputs[str(known["base"])])
    if "parameters" in known:
        config["parameters"] = known["parameters"]
    models: list[dict[str, object]] = []
    weights = known["weights"]
    assert isinstance(weights, dict)
    for name, weight in weights.items():  # pyright: ignore[reportUnknownVariableType]
        model: dict[str, object] = {"model": str(inputs[str(name)])}  # pyright: ignore[reportUnknownArgumentType]
        if weight is not None:
            model["parameters"] = {"weight": weight} | ({"density": known["density"]} if "density" in known else {})
        models.append(model)
    config["models"] = models
    return config


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sdxl", "sd15", "tiny"], default="sdxl")
    parser.add_argument("--method", choices=sorted(OURS), default="lerp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmark")
    parser.add_argument("--peers", help="the Python of an environment with sd-mecha and mergekit")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    paths = generate(given.model, given.folder, INPUTS[given.method])
    inputs = dict(zip(INPUTS[given.method], paths, strict=True))
    commands = programs(given.method, inputs, given.folder, given.peers)
    for path in paths:  # into the page cache
        measure(["cp", str(path), os.devnull])
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(given.rounds):
        for name, words in commands.items():
            try:
                costs[name].append(measure(words))
            except RuntimeError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            cost = costs[name][-1]
            print(f"round {number + 1}: {name}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU-s, {cost.anonymous:.2f} GB")
    size = paths[0].stat().st_size / 1e9
    print(
        f"\n{given.method} of {len(paths)} {given.model} checkpoints of {size:.2f} GB, {os.cpu_count()} cores, medians"
    )
    print("| program | wall s | CPU s | peak anonymous GB | wall beside ours |\n|---|---|---|---|---|")
    ours = statistics.median(cost.wall for cost in costs["ours"])
    for name, runs in costs.items():
        if runs:
            wall, cpu, memory = (
                statistics.median(values)
                for values in zip(*((run.wall, run.cpu, run.anonymous) for run in runs), strict=True)
            )
            print(f"| {name} | {wall:.1f} | {cpu:.1f} | {memory:.2f} | {wall / ours:.2f} |")


if __name__ == "__main__":
    main()
