"""What a merge takes in memory, beside what its plan says: of one method, or of all of them.

    python -m tests.merge.peak                              # every method, on small models that are made first
    python -m tests.merge.peak ties slerp --threads 2
    python -m tests.merge.peak --models a.safetensors b.safetensors c.safetensors

Memory is what is anonymous (no file's pages) at its peak, above what the loaded program has. Every merge is a process
of its own, forked from one that has loaded everything and done nothing.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge import execute, run
from merge.methods.base import Space
from merge.run import Config, Step
from tests.merge.methods.test_laws import METHODS, example, spaces

SHAPES = {"in.weight": (320, 4, 3, 3), "wide.weight": (1280, 2560, 3, 3), "wide.bias": (1280,)} | {
    f"block.{index}.{name}": shape
    for index in range(2)
    for name, shape in {
        "proj.weight": (10240, 1280),
        "conv.weight": (640, 640, 3, 3),
        "norm.weight": (1280,),
        "norm.bias": (1280,),
    }.items()
}
"""As in Stable Diffusion 1: one tensor is much larger than the others. 126 MB in float16."""
LOOK = 0.002
"""Seconds between two looks at a process."""


@dataclass(frozen=True)
class Peak:
    """Bytes."""

    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Of what was predicted to what was measured."""
        return self.predicted / self.measured


def models(folder: Path, shapes: Mapping[str, Sequence[int]] = SHAPES, count: int = 3) -> list[Path]:
    """Fine-tunes of one base."""
    paths: list[Path] = []
    for index in range(count):
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
            change = torch.randn(shape, generator=torch.Generator().manual_seed(index + 1))
            tensors[name] = base.add_(change, alpha=0.002).half()
        paths.append(folder / f"{'abcdefgh'[index]}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def recipe(name: str, paths: Sequence[Path], output: Path, threads: int, verify: int = 16) -> Config:
    """A merge by a method, differences being those from the first model."""
    wanted = spaces(name)
    names = "abcdefgh"[: len(paths)]
    method = example(name)
    if all(space is Space.DELTA for space in wanted):
        inputs = tuple((names[1:] * len(wanted))[: len(wanted)])
        steps = [Step(name="merged", method=method, inputs=inputs, base="a")]
    else:
        steps, inputs = list[Step](), list[str]()
        for index, space in enumerate(wanted):
            model = names[index % len(names)]
            if space is Space.DELTA:
                steps.append(Step(name=f"d{index}", method=METHODS.find("subtract")(), inputs=(model, "a")))
            inputs.append(f"d{index}" if space is Space.DELTA else model)
        steps.append(Step(name="merged", method=method, inputs=tuple(inputs)))
        if method.gives is Space.DELTA:
            steps.append(Step(name="added", method=METHODS.find("add")(), inputs=("a", "merged")))
    found = dict(zip(names, paths, strict=True))
    return Config(output=output, models=found, steps=tuple(steps), threads=threads, verify=verify)


def peak(config: Config) -> Peak:
    """Merge in a process of its own, and remove what was made.

    Raises:
        RuntimeError: it failed.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what loading has left over would be used first
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os._exit(_child(config, writer))
    os.close(writer)
    seen = memory(process)["RssAnon"]
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen = max(seen, memory(process).get("RssAnon", 0))
        time.sleep(LOOK)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader) as told:
        text = told.read()
    if status:
        raise RuntimeError(f"{config.steps[-1].method}: the merge failed")
    predicted, before, highest = json.loads(text)
    return Peak(predicted, max(seen, highest) - before)


def _child(config: Config, writer: int) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest from here on
        before = memory()["RssAnon"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run.merge(config)
        after = memory()
        config.output.unlink()
        predicted = execute.memory(run.plan(config), run.settings(config), config.verify)
        os.write(writer, json.dumps([predicted, before, after["VmHWM"] - after["RssFile"]]).encode())
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes by their names in Linux; nothing of a process that has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "VmHWM"))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="all, if none are named")
    parser.add_argument("--models", nargs="*", type=Path, help="else small ones are made")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--verify", type=int, default=16, help="as in a recipe")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = given.models or models(Path(folder))
        for name in given.methods or METHODS.names():
            for threads in given.threads:
                found = peak(recipe(name, paths, Path(folder) / "out.safetensors", threads, given.verify))
                if given.json:
                    print(json.dumps([name, threads, found.predicted, found.measured]), flush=True)
                    continue
                sizes = f"{found.predicted / 1e6:8.1f} MB predicted, {found.measured / 1e6:8.1f} MB measured"
                print(f"{name:<28} {threads} threads: {sizes}, {found.ratio - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()
