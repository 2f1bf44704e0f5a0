"""What the plan says of memory, against what merges take, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merge.peak import models

SHAPES = {"wide.weight": (640, 1280, 3, 3), "norm.weight": (640,), "norm.bias": (640,)} | {
    f"{index}.proj.weight": (2560, 640) for index in range(4)
}
METHODS = ("lerp", "slerp", "ties", "dare_ties", "distribution_crossover")
"""In runs, in runs after a look at all of the tensor, and on whole tensors. Of all: `python -m tests.merge.peak`."""
SLACK = 1_000_000
"""Bytes: what loading the program happens to leave over counts where all is so small."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the most memory")
def test_the_plan_tells_the_memory_that_a_merge_takes(tmp_path):
    paths = models(tmp_path, SHAPES)
    words = [*METHODS, "--threads", "1", "2", "--verify", "2", "--json", "--models", *map(str, paths)]
    told = subprocess.run(
        [sys.executable, "-m", "tests.merge.peak", *words], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(found) == 2 * len(METHODS)
    for name, threads, predicted, measured in found:
        near = predicted == pytest.approx(measured, rel=0.1, abs=SLACK)
        assert near, f"{name}, {threads} threads: {predicted / 1e6:.1f} MB said, {measured / 1e6:.1f} MB taken"
