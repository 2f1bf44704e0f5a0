import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.training.signals import StopSignal


@pytest.fixture
def stop():
    stop = StopSignal()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.listen()
    yield stop
    stop.forget()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_while_updates_are_made_a_signal_is_noted(stop, number, code, capfd):
    stop.patient = True
    assert not stop.asked and stop.exit_code == 0
    os.kill(os.getpid(), number)
    assert stop.asked and stop.exit_code == code
    assert "a checkpoint follows" in capfd.readouterr().err
    os.kill(os.getpid(), signal.SIGTERM)  # another one changes nothing
    assert stop.exit_code == code


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_another_ctrl_c_ends_the_program_at_once(stop, first):
    stop.patient = True
    os.kill(os.getpid(), first)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_while_nothing_would_be_lost_a_signal_ends_the_program_at_once(stop):
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


WORKER = """
import os, sys, time
import tuner
from tuner.errors import PeerError

parent = os.getppid()
print("started", flush=True)
while "dies" in sys.argv and os.getppid() == parent:  # the libraries are loaded
    time.sleep(0.01)
if "forks" in sys.argv and (child := os.fork()):
    raise SystemExit(os.waitpid(child, 0)[1])

from tuner.training.signals import StopSignal
try:
    StopSignal().listen()
    print("goes on", flush=True)
except PeerError as error:
    print(error, flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@contextlib.contextmanager
def launched(*how: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose worker has begun; what the worker says comes out of the launcher's pipe."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, *how],
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[3]), **more},
    ) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "started\n"
        yield launcher


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@linux
def test_a_launcher_that_dies_while_libraries_are_loaded_leaves_no_orphan():
    with launched("dies", **BY_ACCELERATE) as launcher:
        launcher.kill()
        assert launcher.stdout is not None
        assert launcher.stdout.read() == "the launcher of this process has died; start it again\n"


@linux
@pytest.mark.parametrize("how", [(), ("forks",)], ids=["as it is", "and it forks"])
def test_a_worker_whose_launcher_lives_goes_on(how):
    with launched(*how, **BY_ACCELERATE) as launcher:
        assert launcher.stdout is not None and launcher.stdout.read() == "goes on\n"


@linux
def test_a_program_that_no_launcher_started_outlives_its_shell():
    with launched("dies") as shell:
        shell.kill()
        assert shell.stdout is not None and shell.stdout.read() == "goes on\n"
