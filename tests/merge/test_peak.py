"""What the plan says of memory, against what merges take, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merge import peak
from tests.merge.peak import models

LARGE = {"wide.weight": (640, 1280, 3, 3), "norm.weight": (640,), "norm.bias": (640,)} | {
    f"{index}.proj.weight": (2560, 640) for index in range(4)
}
SOME = ("lerp", "slerp", "ties", "dare_ties", "distribution_crossover")
"""In runs, in runs after a look at all of the tensor, and on whole tensors. Of all: `python -m tests.merge.peak`."""
SLACK = 1_000_000
"""Bytes: what loading the program happens to leave over counts where all is so small."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the most memory")


@pytest.mark.parametrize(
    ("methods", "shapes", "threads"),
    [(SOME, LARGE, (1, 2))],
    ids=["large models, one thread and two"],
)
def test_the_plan_tells_the_memory_that_a_merge_takes(tmp_path, methods, shapes, threads):
    paths = models(tmp_path, shapes)
    words = [*methods, "--threads", *map(str, threads), "--verify", "2", "--json", "--models", *map(str, paths)]
    told = subprocess.run(
        [sys.executable, "-m", "tests.merge.peak", *words], capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(found) == len(threads) * len(methods), told.stderr[-2000:]
    wrong = [
        f"{name}, {count} threads: {predicted / 1e6:.1f} MB said, {measured / 1e6:.1f} MB taken"
        for name, count, predicted, measured in found
        if predicted != pytest.approx(measured, rel=0.1, abs=SLACK)
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize(("taken", "off"), [((120, 100, 120), True), ((108, 80, 120), False)], ids=["off", "near"])
def test_a_forecast_that_is_off_in_the_median_is_told_and_ends_with_1(monkeypatch, capsys, taken, off):
    found = iter(taken)
    monkeypatch.setattr(peak, "models", lambda folder, shapes: [folder / "a", folder / "b"])
    monkeypatch.setattr(peak, "peak", lambda config: peak.Peak(100, next(found)))
    monkeypatch.setattr(sys, "argv", ["peak", "lerp", "--threads", "1", "--shapes", "unet", "--repeat", "3"])
    assert peak.main() == int(off)
    assert ("OFF" in capsys.readouterr().out) == off
