import os
import signal

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
