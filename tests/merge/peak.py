"""What merges take in memory, beside what their plans say: a table of methods, and 1 as exit status if one is off.

    python -m tests.merge.peak                              # every method, on two kinds of small models, made first
    python -m tests.merge.peak ties slerp --threads 2 --repeat 5
    python -m tests.merge.peak --models a.safetensors b.safetensors c.safetensors

Memory is what is anonymous (no file's pages) at its peak, above what the loaded program has: that of the process that
merges, and what its workers do not share with it. Every merge is a process of its own, forked from one that has loaded
everything and done nothing. Of repetitions the median counts.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merge import crew, execute, run
from merge.methods.base import MergeMethod, Space
from merge.methods.dare_linear import DareLinear
from merge.methods.della import Della
from merge.methods.model_stock import ModelStock
from merge.methods.ram import Ram
from merge.methods.rotate import Rotate
from merge.methods.sce import Sce
from merge.methods.ties import Ties
from merge.run import Config, Step
from tests.merge.methods.test_laws import METHODS, example, spaces

NORMS = {"norm.weight": (640,), "norm.bias": (640,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {"in.weight": (320, 4, 3, 3), "wide.weight": (640, 1280, 3, 3), "wide.bias": (640,)}
    | {
        f"block.{index}.{name}": shape
        for index in range(2)
        for name, shape in {"proj.weight": (5120, 640), "conv.weight": (320, 320, 3, 3), **NORMS}.items()
    },
    "transformer": {"embed.weight": (20480, 448)}
    | {
        f"block.{index}.{name}": shape
        for index in range(5)
        for name, shape in {"qkv.weight": (2304, 768), "out.weight": (768, 768), **NORMS}.items()
    },
}
"""As in Stable Diffusion 1, where one convolution is much larger than all else; and layers of one size, as in newer
models. 32 and 42 MB in float16."""
NEAR = 0.1
"""What a forecast may be off, of what is taken."""
VARIATIONS: dict[str, MergeMethod] = {
    "dare_linear rescale=norm": DareLinear(rescale="norm"),
    "della ranks=tensor": Della(ranks="tensor"),
    "model_stock per=rows": ModelStock(per="rows"),
    "ram r=0.1": Ram(r=0.1),
    "rotate alignment=t=0.5": Rotate(alignment=0.5, t=0.5),
    "sce of=varying": Sce(of="varying"),
    "ties density=0.5": Ties(density=0.5),
}
"""Settings that take other memory than the default ones; the first word is the method."""
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

    @property
    def off(self) -> bool:
        """Whether the forecast is not true."""
        return abs(self.ratio - 1) > NEAR


def models(folder: Path, shapes: Mapping[str, Sequence[int]], count: int = 3) -> list[Path]:
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


def recipe(
    name: str, paths: Sequence[Path], output: Path, threads: int, verify: int = 16, dtype: Any = "keep"
) -> Config:
    """A merge by a method, or one of `VARIATIONS`; differences are those from the first model."""
    method = VARIATIONS[name] if name in VARIATIONS else example(name)
    wanted = spaces(name.split()[0])
    names = "abcdefgh"[: len(paths)]
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
    return Config(output=output, models=found, steps=tuple(steps), threads=threads, verify=verify, dtype=dtype)


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
    seen = [_tree(process)]
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen.append(_tree(process))
        time.sleep(LOOK)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader) as told:
        *workers, last = told.read().splitlines() or [""]
    if status:
        raise RuntimeError(f"{config.steps[-1].method}: the merge failed")
    predicted, before, highest = json.loads(last)
    shared = {int(worker): int(size) for worker, size in (line.split() for line in workers)}
    together = [
        sum(size - (0 if one == process else shared.get(one, size)) for one, size in sizes.items()) for sizes in seen
    ]
    return Peak(predicted, max(*together, highest) - before)


def _tree(process: int) -> dict[int, int]:
    """Bytes of anonymous memory of a process and of its children."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return {one: size for one in (process, *map(int, children)) if (size := memory(one).get("RssAnon"))}
    return {process: 0}


def _child(config: Config, writer: int) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest from here on
        before = memory()["RssAnon"]
        crew.Member.work = _telling(crew.Member.work, writer)
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


def _telling(work: Any, writer: int) -> Any:
    """A worker's work, after which it says how much of its memory it has in common with the process that merges."""

    def told(member: crew.Member, shift: range, scales: dict[int, float]) -> crew.Done:
        found = work(member, shift, scales)
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Private_Dirty:"))
        os.write(writer, f"{os.getpid()} {memory()['RssAnon'] - private}\n".encode())
        return found

    return told


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes by their names in Linux; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "VmHWM"))}


def main() -> int:
    """Measure and print; 1 when a forecast is not true."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="all, if none are named; or one of: " + ", ".join(VARIATIONS))
    parser.add_argument("--models", nargs="*", type=Path, help="else small ones are made")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="of which kinds")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1, help="measure so often; 3 times what seems off")
    parser.add_argument("--verify", type=int, default=16, help="as in a recipe")
    parser.add_argument("--dtype", default="keep", help="as in a recipe")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that was forked from one with several waits for them in vain
    off = 0
    with tempfile.TemporaryDirectory() as folder:
        made = {"given": given.models} if given.models else {}
        for kind in () if made else given.shapes:
            (Path(folder) / kind).mkdir()
            made[kind] = models(Path(folder) / kind, SHAPES[kind])
        if not given.json:
            print(f"{'method':<28} {'models':<12} threads  forecast MB  measured MB  ratio")
        for name in given.methods or (*METHODS.names(), *VARIATIONS):
            for kind, paths in made.items():
                for threads in given.threads:
                    config = recipe(
                        name, paths, Path(folder) / "out.safetensors", threads, given.verify, dtype=given.dtype
                    )
                    found = [peak(config) for _ in range(given.repeat)]
                    while found[-1].off and len(found) < 3:
                        found.append(peak(config))
                    one = sorted(found, key=lambda one: one.measured)[len(found) // 2]
                    off += one.off
                    if given.json:
                        print(json.dumps([name, threads, one.predicted, one.measured]), flush=True)
                        continue
                    sizes = f"{one.predicted / 1e6:11.1f}  {one.measured / 1e6:11.1f}"
                    mark = "  OFF" if one.off else ""
                    print(f"{name:<28} {kind:<12} {threads:7}  {sizes}  {one.ratio:5.2f}{mark}", flush=True)
    if not given.json:
        print(f"{off} off by more than {NEAR:.0%}" if off else f"all within {NEAR:.0%}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
