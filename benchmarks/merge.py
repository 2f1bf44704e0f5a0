"""How fast checkpoints are merged, beside other mergers and beside plain reading and writing.

    python -m benchmarks.merge                                   # two checkpoints of SDXL's shapes, weighted sum
    python -m benchmarks.merge --model sd15 --method ties
    python -m benchmarks.merge --peers ~/peers/bin/python        # where sd-mecha and mergekit are installed
    python -m benchmarks.merge --compare --rounds 1              # also how far the others' results are from ours
    python -m benchmarks.merge --memory                          # ours alone: two models and five, small and large

Checkpoints with the names, shapes and dtype of the real ones are generated first (random values, 6.9 GB each for SDXL).
Every program runs as a process of its own, all of them in turn, round after round. Before each run the outputs of the
one before are removed, the disk is synced, and the inputs are read once; how much of them then is in the page cache is
told with the results. The floor is a loop that reads the inputs into one buffer, writes an output of that size and
syncs it; ours syncs its output too, the others leave that to the system.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.mergers import RESULTS, TASKS, Program, ours, programs

if TYPE_CHECKING:
    import torch

POOL = (1 << 24) - 3
"""Random numbers that the checkpoints are made of: a prime-like size, so that tensors differ."""
WAIT = 0.01
"""Seconds between two looks at a program's memory."""
SELDOM = 0.25
"""Seconds between two looks at that of its workers, which takes some milliseconds of the system's time."""


@dataclass(frozen=True)
class Cost:
    """What one run of a program took."""

    wall: float
    cpu: float
    """Seconds of all processors together, in the program and in the system for it."""
    anonymous: float
    """Peak of memory that is not a file's, in GB."""
    cached: float
    """Share of the inputs that was in the page cache at the start; NaN where that cannot be told."""


def measure(words: Sequence[str], inputs: Sequence[Path] = ()) -> Cost:
    """Run a program.

    Raises:
        RuntimeError: it failed.
    """
    peak = 0
    share = cached(inputs)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            workers = looked = 0.0
            while not done.wait(WAIT):
                if time.perf_counter() > looked + SELDOM:
                    workers, looked = of_workers(process.pid), time.perf_counter()
                peak = max(peak, anonymous(process.pid) + int(workers))

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
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak / 1e9, share)


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def of_workers(process: int) -> int:
    """Bytes of anonymous memory that the children of a process hold now, and do not share with it."""
    found = 0
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines():
                found += int(line.split()[1]) * 1024 if line.startswith("Private_Dirty:") else 0
    return found


def cached(paths: Sequence[Path]) -> float:
    """The share of some files that is in the page cache; NaN where that cannot be told."""
    if not paths or shutil.which("fincore") is None:
        return math.nan
    words = ["fincore", "--bytes", "--noheadings", "--raw", "--output", "RES", *map(str, paths)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return sum(map(int, told.split())) / sum(path.stat().st_size for path in paths)


def generate(model: str, folder: Path, names: str) -> list[Path]:
    """Checkpoints of a model's exact names and shapes in float16, as fine-tunes of one another; made when missing."""
    import torch

    from tests.tuner.weights import original
    from tuner.weights.writer import save_safetensors

    shapes = {"sd15": original.sd1, "sdxl": original.sdxl, "tiny": lambda: {"w": (1000, 1000), "b": (1000,)}}[model]()
    paths: list[Path] = []
    for index, name in enumerate(names):
        path = folder / f"{model}-{name}.safetensors"
        paths.append(path)
        if path.is_file():
            continue
        print(f"generating {path} ...", flush=True)
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


def prepare(folder: Path, inputs: Sequence[Path], kept: Sequence[Path] = ()) -> None:
    """The same start for every run: no results but those `kept`, nothing left to write, the inputs read once."""
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    for path in (folder / RESULTS).iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()
    for path in inputs:
        subprocess.run(["cp", str(path), os.devnull], check=True)


def rounds(
    found: Mapping[str, Program], inputs: Sequence[Path], folder: Path, count: int, compare: bool
) -> dict[str, list[Cost]]:
    """Every program's costs; they take turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in found}
    for number in range(count):
        for name, program in found.items():
            prepare(folder, inputs, [found["ours"].output] if compare and found["ours"].output else [])
            try:
                cost = measure(program.command, inputs)
            except RuntimeError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            costs[name].append(cost)
            print(
                f"round {number + 1}: {name}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU-s, {cost.anonymous:.2f} GB, "
                f"{cost.cached:.0%} of the inputs cached",
                flush=True,
            )
            if compare and number == 0 and program.output is not None and name != "ours":
                print(f"  {difference(inputs[0], found['ours'].output or program.output, program.output)}", flush=True)
    return {name: runs for name, runs in costs.items() if runs}


def difference(first: Path, one: Path, other: Path) -> str:
    """How far two merged files are from each other, beside how far they are from the first model."""
    from tuner.weights.store import SafetensorsFile

    models = [SafetensorsFile(path) for path in (first, one, other)]
    if lost := set(models[1].metas) ^ set(models[2].metas):
        return f"{len(lost)} tensors are in one of the two only, such as {min(lost)}"
    numbers = unlike = 0
    apart = moved = 0.0
    for name in models[1].metas:
        base, mine, theirs = (model.read(name).float() for model in models)
        numbers += mine.numel()
        unlike += int((mine != theirs).sum())
        apart += (mine - theirs).double().square().sum().item()
        moved += (mine - base).double().square().sum().item()
    return (
        f"{unlike / numbers:.4%} of the numbers differ from ours; the difference is "
        f"{math.sqrt(apart / max(moved, 1e-300)):.1e} of what the merge changed"
    )


def table(
    costs: Mapping[str, Sequence[Cost]], loaded: Mapping[str, float], found: Mapping[str, Program]
) -> Iterator[str]:
    """What was measured, as Markdown: medians, and how far the runs lie apart."""
    middle = {name: statistics.median(run.wall for run in runs) for name, runs in costs.items()}
    best = min((middle[name] for name in middle if found[name].peer), default=math.nan)
    floor = middle.get("floor", math.nan)
    yield "| program | wall s | from - to | CPU s | peak anonymous GB | above loading | / best peer | / floor |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, runs in costs.items():
        walls = [run.wall for run in runs]
        cpu, memory = (statistics.median(values) for values in zip(*((r.cpu, r.anonymous) for r in runs), strict=True))
        yield (
            f"| {name} | {middle[name]:.1f} | {min(walls):.1f} - {max(walls):.1f} | {cpu:.1f} | {memory:.2f} "
            f"| {memory - loaded[name]:.2f} | {middle[name] / best:.2f} | {middle[name] / floor:.2f} |"
        )
    shares = [run.cached for runs in costs.values() for run in runs]
    yield f"inputs in the page cache at the start: {min(shares):.0%} - {max(shares):.0%}"


def machine() -> str:
    """What it runs on, and how busy that is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores, {memory:.0f} GB, load average {os.getloadavg()[0]:.1f}"


def show_memory(folder: Path) -> None:
    """Ours alone: what memory it takes for two models and five, of small and large networks."""
    print("| models | peak anonymous GB | above loading | wall s |\n|---|---|---|---|")
    load = measure(programs(TASKS["lerp"], dict.fromkeys("ab", folder), folder, None)["ours"].loaded).anonymous
    for model in ("sd15", "sdxl"):
        paths = generate(model, folder, "ab")
        links = [folder / f"{model}-link-{index}.safetensors" for index in range(3)]
        for link, path in zip(links, [*paths, paths[0]], strict=True):  # five models of two files' contents
            link.unlink(missing_ok=True)
            os.link(path, link)
        for models in (paths, [*paths, *links]):
            inputs = dict(zip("abcde", models, strict=False))
            prepare(folder, paths)
            words = ours(
                ["weighted_sum", *(f"{{{name}}}" for name in inputs)], inputs, folder / RESULTS / "ours.safetensors"
            )
            cost = measure(words)
            print(
                f"| {len(models)} of {model} | {cost.anonymous:.3f} | {cost.anonymous - load:.3f} | {cost.wall:.1f} |",
                flush=True,
            )
        for link in links:
            link.unlink()
    prepare(folder, [])


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sdxl", "sd15", "tiny"], default="sdxl")
    parser.add_argument("--method", choices=sorted(TASKS), default="lerp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmark")
    parser.add_argument("--peers", type=Path, help="the Python of an environment with sd-mecha and mergekit")
    parser.add_argument("--only", nargs="*", help="some of the programs, by name; the others are left out")
    parser.add_argument("--compare", action="store_true", help="also tell how far the others' results are from ours")
    parser.add_argument("--memory", action="store_true", help="ours alone: two models and five, small and large")
    parser.add_argument("--json", type=Path, help="where to put all the numbers")
    given = parser.parse_args()
    prepare(given.folder, [])
    print(machine())
    if given.memory:
        show_memory(given.folder)
        return
    task = TASKS[given.method]
    paths = generate(given.model, given.folder, task.inputs)
    found = programs(task, dict(zip(task.inputs, paths, strict=True)), given.folder, given.peers)
    if given.only:
        found = {name: program for name, program in found.items() if name in given.only}
    loaded = {name: measure(program.loaded).anonymous for name, program in found.items()}
    costs = rounds(found, paths, given.folder, given.rounds, given.compare)
    prepare(given.folder, [])
    size = paths[0].stat().st_size / 1e9
    print(f"\n{given.method} of {len(paths)} {given.model} checkpoints of {size:.2f} GB; {machine()}; medians")
    print("\n".join(table(costs, loaded, found)))
    if given.json:
        rows = {name: [asdict(run) for run in runs] for name, runs in costs.items()}
        given.json.write_text(json.dumps({"machine": machine(), "loaded": loaded, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
