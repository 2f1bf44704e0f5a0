"""Methods of a user's own file: what is in it is part of the recipe."""

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from merge import command
from merge.custom import refuse_other_code
from merge.provenance import Ancestry
from tests.merge.test_faults import ask, at_block
from tests.merge.test_run import model
from tuner.errors import DataError

CODE = """
from dataclasses import dataclass
import torch
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class Chosen(Elementwise):
    takes = (Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT

    def merge(self, inputs, out):
        torch.maximum(inputs[0], inputs[1], out=out)
"""
WORDS = ("own_methods:Chosen", "a.safetensors", "b.safetensors", "to=out.safetensors", "threads=1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    layers = {f"layers.{index}.weight": (64, 128) for index in range(40)}
    for seed, name in enumerate("ab"):
        model(Path(f"{name}.safetensors"), seed, layers)
    write(CODE)
    for name, module in list(sys.modules.items()):
        if name.startswith("merge.") and hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 1 << 16)
    yield
    sys.modules.pop("own_methods", None)


def write(code: str) -> None:
    """The user's file, as a new process would read it."""
    Path("own_methods.py").write_text(code)
    os.utime("own_methods.py", (len(code), len(code)))  # bytecode goes by the second
    sys.modules.pop("own_methods", None)
    importlib.invalidate_caches()


def test_a_merge_is_not_gone_on_with_by_other_code(capsys):
    with at_block(5, ask()), pytest.raises(SystemExit):
        command.main(WORDS)
    write(CODE.replace("maximum", "minimum"))
    assert command.main([*WORDS, "--resume"]) == 2
    assert "merge without --resume" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()
    write(CODE)
    assert command.main([*WORDS, "--resume"]) == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    assert all(bool((out[name] == a[name].maximum(b[name])).all()) for name in out)


def test_the_header_says_which_code_it_was_and_rebuild_refuses_another(capsys):
    assert command.main(WORDS) == 0
    said = Ancestry.of(Path("out.safetensors")).recipe["code"]
    assert said == {"own_methods": hashlib.sha256(CODE.encode()).hexdigest()}
    assert str(Path.cwd()) not in json.dumps(dict(Ancestry.of(Path("out.safetensors")).recipe))
    again = ["rebuild", "out.safetensors", "--sources", ".", "--to", "again.safetensors"]
    assert command.main(again) == 0
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    Path("again.safetensors").unlink()
    write(CODE + "# edited\n")
    capsys.readouterr()
    assert command.main(again) == 3
    assert "own_methods: is not the file that was used" in capsys.readouterr().err
    Path("own_methods.py").unlink()
    sys.modules.pop("own_methods", None)
    assert command.main(again) == 3
    assert "own_methods: the file with this method is not here" in capsys.readouterr().err
    assert not Path("again.safetensors").exists()
    with pytest.raises(DataError, match="recipe: code: expected a table"):
        refuse_other_code({"code": [1]})


def test_what_other_code_has_made_is_not_replaced_unasked(capsys):
    assert command.main(WORDS) == 0
    write(CODE.replace("maximum", "minimum"))
    assert command.main(WORDS) == 2
    assert "was made by another recipe" in capsys.readouterr().err


def test_a_recipe_of_the_projects_own_methods_says_no_code():
    assert command.main(["lerp", *WORDS[1:]]) == 0
    assert "code" not in Ancestry.of(Path("out.safetensors")).recipe
