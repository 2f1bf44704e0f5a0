"""The measurement itself: its contenders train, and its table says what was measured."""

from contextlib import ExitStack

import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead import CONTENDERS, Setting, Speed, report, speeds
from tests import tiny


@pytest.fixture
def setting(tmp_path):
    tiny.sd1().save_pretrained(tmp_path)
    return Setting(base=str(tmp_path), method="lora", attention="auto", batch=2, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_trains_the_same_network_and_ends_clean(name, setting, monkeypatch):
    monkeypatch.setattr(overhead, "OPTIMIZER", overhead.AdamW(lr=1e-2))
    with ExitStack() as held:
        step = CONTENDERS[name](setting, held)
        losses = [step() for _ in range(12)]
    assert all(0 < loss < 3 for loss in losses)
    if name == "bare":  # the others draw new noise each time
        assert losses[-1] < losses[0]


def test_every_contender_has_its_turn_in_every_round(setting, monkeypatch):
    monkeypatch.setattr(overhead, "ROUND", 1)
    with ExitStack() as held:
        measured = speeds(setting, held, seconds=0)
    assert measured.keys() == CONTENDERS.keys()
    assert {len(turns) for turns in measured.values()} == {3}


def test_the_table_says_whether_the_goals_are_met(capsys):
    turns = {"tuner": [Speed(9.0, 9.4)] * 3, "bare": [Speed(10.0, 10.0)] * 3, "diffusers": [Speed(6.0, 6.0)] * 3}
    report(turns, {name: {"peak": 100.0, "before": 50.0} for name in turns})
    shown = capsys.readouterr().out
    assert "tuner beside bare: speed 0.900, memory 1.000 (goals: 0.95 missed, 1.05 met)" in shown
    assert "tuner beside diffusers: speed 1.500" in shown
    assert "0.940" in shown
