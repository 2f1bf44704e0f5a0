"""Worker processes: what they share out, what they do when one of them or the one that made them ends, and memory."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge import crew, memory, output
from merge.methods.slerp import Slerp
from merge.plan import make_plan
from merge.recipe import Apply, Source
from tests.merge.test_execute import Blend, Turned, a, b, checkpoint, digest, patch, run
from tests.merge.test_faults import LERP, OUT, cut_up, here, main, refused
from tests.merge.test_run import model
from tests.tuner.weights import original
from tuner.errors import ResourceError
from tuner.weights.store import SafetensorsFile

__all__ = ["a", "b", "cut_up", "here", "refused"]  # fixtures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
CREW = (*LERP, "threads=3")
SLOW = (
    "import os, sys, time; from merge import output, run, crew\n"
    "for name, module in list(sys.modules.items()):\n"
    "    if name.startswith('merge.') and hasattr(module, 'BLOCK'): module.BLOCK = 1 << 16\n"
    "write = output.Output.write\n"
    "def slowly(self, block, data): write(self, block, data); os.write(1, b'w%d\\n' % os.getpid()); time.sleep(1)\n"
    "output.Output.write = slowly\n"
    "from merge.command import main; sys.exit(main(sys.argv[1:]))"
)


@contextlib.contextmanager
def slow_merge() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A merge by three workers in a process group of its own, that has written a block; which worker did."""
    program = [sys.executable, "-c", SLOW, *CREW, "--overwrite"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline()[1:])
        assert worker != process.pid
        yield process, worker


def gone(group: int) -> bool:
    """Whether no process of a group is left, after a while."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("method", [Blend(), Slerp(t=0.3), Turned()], ids=["elementwise", "fitted", "whole"])
@pytest.mark.parametrize("gaps", [False, True])
def test_shifts_are_all_blocks_in_order_and_cut_nothing_large_that_is_looked_at(tmp_path, monkeypatch, method, gaps):
    patch(monkeypatch, BLOCK=1 << 12)
    a, b = (checkpoint(tmp_path / f"{name}.safetensors", 1) for name in "ab")
    plan = make_plan(Apply("x", method, (a, b)[: len(method.takes)]))
    blocks = -(-plan.value_bytes // (1 << 12))
    pending = [block for block in range(blocks) if not gaps or block % 37]
    found = crew.shifts(plan, pending, 2)
    assert [block for shift in found for block in shift] == pending
    offsets = [entry.offset for entry in plan.entries]
    for one, two in itertools.pairwise(found):
        if one.stop == two.start:
            again = [index for index in memory.in_advance(plan, offsets, two.start) if offsets[index] < two.start << 12]
            assert sum(plan.entries[index].meta.bytes for index in again) <= len(one) << 12 >> 4
    if isinstance(method, Blend) and not gaps:
        sizes = [len(shift) for shift in found]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == crew.SHIFT and sizes[-1] == 1
    if gaps:
        assert all(len(shift) <= 36 for shift in found)


def test_the_scales_that_one_worker_finds_are_known_to_those_that_write_them(tmp_path, monkeypatch):
    """Else they would look at the tensors again."""
    patch(monkeypatch, BLOCK=1 << 13)
    given: list[int] = []
    work = crew._work

    def counted(pool, function, shift, scales):
        given.append(len(scales))
        return submit(pool, work, shift, scales)

    submit = crew.ProcessPoolExecutor.submit
    monkeypatch.setattr(crew.ProcessPoolExecutor, "submit", counted)
    for seed, name in enumerate(("a", "b")):
        model(Path(f"{name}.safetensors"), seed, original.unet(width=32, context=48))
    assert main((*LERP, "dtype=float8_e4m3fn_scaled", "threads=2")) == 0
    assert given[0] == 0 and given[-1] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole", [False, True], ids=["the process", "its group"])
def test_a_signal_ends_all_of_them_with_a_journal(cut_up, number, whole):
    """A terminal's Ctrl-C goes to every process; so does what `timeout` and schedulers send."""
    with slow_merge() as (process, _):
        time.sleep(1.2)  # until some shifts have ended
        (os.killpg if whole else os.kill)(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert gone(process.pid)
    assert process.returncode == 128 + number
    assert said.endswith("\ninterrupted; what is done is kept, and the same command with --resume goes on\n")
    assert Path(OUT).read_bytes() == b"before" and Path(f".{OUT}.journal").exists()
    assert main((*CREW, "--resume")) == 0
    assert digest(Path(OUT)) == cut_up and not list(Path().glob(".*"))


def test_they_end_with_a_process_that_is_killed_and_the_merge_is_gone_on_with_at_once(cut_up):
    with slow_merge() as (process, _):
        process.kill()
        process.wait(60)
        assert main((*CREW, "--resume")) == 0
        assert gone(process.pid)
    assert digest(Path(OUT)) == cut_up and not list(Path().glob(".*"))


def test_a_worker_that_is_killed_is_said(cut_up):
    """As by the system, for want of memory."""
    with slow_merge() as (process, worker):
        os.kill(worker, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert gone(process.pid)
    assert process.returncode == ResourceError.exit_code and "Traceback" not in said
    assert "a worker process was killed" in said.splitlines()[-1] and "threads = 1" in said.splitlines()[-1]
    assert Path(OUT).read_bytes() == b"before" and not list(Path().glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), ZeroDivisionError("oh")])
def test_what_fails_in_a_worker_is_said_as_if_it_were_here(refused, capsys, cut_up, monkeypatch, error):
    write, parent = output.Output.write, os.getpid()

    def fails(self, block, data):
        assert os.getpid() != parent
        if block == 5:
            raise error
        write(self, block, data)

    monkeypatch.setattr(output.Output, "write", fails)
    if isinstance(error, OSError):
        assert "Input/output error" in refused(5, *CREW)
    else:
        assert main(CREW) == 1
        assert "oh" in capsys.readouterr().err
    assert not list(Path().glob(".*"))


def test_all_tensors_that_are_not_finite_are_named_though_each_worker_knows_its_own(refused, cut_up):
    tensors = load_file("a.safetensors")
    first, *_, last = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for name in (first, last):
        tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, "a.safetensors")
    said = refused(3, *CREW)
    assert first in said and last in said and "hold NaN or infinity" in said


@dataclass(frozen=True, kw_only=True)
class Noted(Turned):
    """Writes down when it works, and on how much."""

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        begin = time.monotonic()
        time.sleep(0.02)
        with Path("times").open("a") as file:
            file.write(f"{begin} {time.monotonic()} {tensors[0].numel()}\n")
        return super().compute(tensors)


def test_together_they_hold_no_more_than_the_largest_tensor_takes_alone(tmp_path, monkeypatch):
    patch(monkeypatch, BLOCK=1 << 16, GRID=1 << 13, CELL=1 << 10)
    rng = torch.Generator().manual_seed(0)
    tensors = {f"{index:02}": torch.randn(100 * rows, 100, generator=rng) for index, rows in enumerate([10] + [2] * 40)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = Source("a", SafetensorsFile(tmp_path / "a.safetensors"))
    run(make_plan(Apply("x", Noted(), (source,))), tmp_path / "out.safetensors", threads=4)
    times = [list(map(float, line.split())) for line in Path("times").read_text().splitlines()]
    most = [sum(size for begin, end, size in times if begin <= at < end) for at, _, _ in times]
    largest = max(tensor.numel() for tensor in tensors.values())
    assert largest <= max(most) <= 1.2 * largest
    assert max(most[1:]) > 20_000, "they do work together"


def test_where_processes_cannot_wait_for_each_other_threads_work(cut_up, monkeypatch):
    """Some containers have no shared memory."""

    def lock(*given):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(type(multiprocessing.get_context("fork")), "Lock", lock)
    monkeypatch.setattr(crew, "work", None)
    assert main(CREW) == 0
    assert digest(Path(OUT)) == cut_up
