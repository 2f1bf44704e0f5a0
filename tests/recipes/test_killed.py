"""Real processes, killed and stopped as machines do it: the next one goes on from what was saved, bit for bit."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs

ROOT = Path(__file__).parent.parent.parent
UPDATES = 24
PATIENCE = 240
"""Seconds that a busy machine may take to come to the point that is waited for."""
WHOLE = (f"run.updates={UPDATES}", "run.checkpoint_every=4", "run.keep=3")


def start(ground: runs.Ground, output: Path, *more: str, launcher: bool = False) -> subprocess.Popen[bytes]:
    """The recipe in a process group of its own, as a shell starts it."""
    program = ("-m", "accelerate.commands.launch", "--num_processes", "1") if launcher else ()
    arguments = ground.arguments(output, *runs.COMMON, *runs.METHODS["lora"], *WHOLE, *more)
    command = [sys.executable, *program, "recipes/lora.py", *arguments]
    environment = runs.environment(ACCELERATE_USE_CPU="true")
    with (output.parent / f"{output.name}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    STARTED.append(process)
    return process


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """What a test that fails has started ends with it."""
    yield
    while STARTED:
        process = STARTED.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(output: Path) -> str:
    return (output.parent / f"{output.name}.log").read_text(errors="replace")


def wait_until(what: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    """Until it is so, while the process lives; it is what the test needs, so that no kill comes to nothing."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, f"ended with {process.returncode} too early: {said(output)[-2000:]}"
        assert time.monotonic() < end, f"too slow: {said(output)[-2000:]}"
        time.sleep(0.01)


def newest(output: Path) -> int:
    try:
        return max(runs.places(output), default=0)
    except ValueError:  # a save that is being replaced
        return 0


def seen(output: Path) -> int:
    """Lines of the metrics: updates that were made."""
    file = output / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_a_process_that_is_killed_and_then_terminated_ends_as_the_unbroken_one(ground, tmp_path, monkeypatch):
    unbroken, output = tmp_path / "unbroken", tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        assert ground.run("lora", unbroken, *WHOLE) == 0

    process = start(ground, output)
    wait_until(lambda: newest(output) >= 8, process, output)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = newest(output)
    assert 8 <= saved < UPDATES * 4, "it was not killed before its end, or nothing was saved"
    assert "going on from" not in said(output)

    process = start(ground, output)
    wait_until(lambda: newest(output) > saved, process, output)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert process.wait(60) == 143
    assert time.monotonic() - asked < 30
    stopped = newest(output)
    assert saved < stopped < UPDATES * 4, "it was not stopped before its end"
    assert f"going on from {output}/checkpoints/samples-" in said(output)
    assert f"stopped at {stopped} of {UPDATES * 4} samples" in said(output)

    process = start(ground, output)
    assert process.wait(PATIENCE) == 0, said(output)[-2000:]
    assert said(output).count("going on from") == 2 and "warning: skipped" not in said(output)
    assert runs.digests(output) == runs.digests(unbroken)
    assert runs.updates(output) == runs.updates(unbroken)
    assert (output / "lora" / "model.safetensors").exists()  # the outcome of the whole


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_launcher_that_is_terminated_leaves_a_checkpoint_and_no_orphan(ground, tmp_path):
    """`accelerate launch` of one process dies of a SIGTERM and passes none on; its worker saves and ends too."""
    output = tmp_path / "run"
    launcher = start(ground, output, "run.updates=100000", "run.checkpoint_every=1000000", launcher=True)
    wait_until(lambda: seen(output) >= 3, launcher, output)
    worker = int((output / ".lock").read_text().split()[1])
    assert worker != launcher.pid and alive(worker) and not runs.places(output)
    launcher.send_signal(signal.SIGTERM)  # to the launcher alone, as a scheduler does
    assert launcher.wait(30) != 0
    end = time.monotonic() + 30
    while alive(worker):
        assert time.monotonic() < end, f"an orphan trains on: {said(output)[-2000:]}"
        time.sleep(0.05)
    (place,) = runs.places(output)
    assert place >= 12 and runs.digests(output)["samples_seen"] == place
    assert [row["samples_seen"] for row in runs.updates(output)] == list(range(4, place + 1, 4))
    assert f"stopped at {place} of 400000 samples" in said(output)
