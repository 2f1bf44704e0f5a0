"""The machine that cannot run 8-bit AdamW says so before the run, and what can be done."""

import sys
from types import SimpleNamespace

import pytest

from tests import toy
from tuner.errors import ConfigError
from tuner.methods.full import Full
from tuner.optim.adamw8bit import AdamW8bit


def groups():
    return Full().attach(toy.ToyModel(), seed=0).groups


def test_without_bitsandbytes_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"'adamw8bit' needs bitsandbytes .*pip install bitsandbytes, or set optimizer"
    ):
        AdamW8bit().build(groups())


def test_where_it_is_installed_but_cannot_step_the_message_names_the_device(monkeypatch):
    class Broken:
        def __init__(self, *arguments, **settings) -> None: ...

        def step(self) -> None:
            raise RuntimeError("no kernel image is available\nmore that nobody reads")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Broken)))
    with pytest.raises(ConfigError) as refusal:
        AdamW8bit().build(groups())
    assert str(refusal.value) == (
        "optimizer.type: bitsandbytes cannot run 'adamw8bit' on cpu here (no kernel image is available); "
        "set optimizer.type = 'adamw'"
    )
