"""The console command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuner import __version__, cli
from tuner.config.loader import load

RECIPE = '''"""Draw a page.

At length.
"""

from tests.tuner.config.drawing import Config


def main(config: Config) -> None:
    print("drawn", config.copies)


def check(config: Config) -> None:
    print("checked", config.copies)


def starter(base: str | None, data: str | None) -> dict[str, object]:
    values: dict[str, object] = {"shape": {"type": base or "circle"}}
    return values if data is None else values | {"output": data}
'''


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A project with the one recipe `draw`."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "draw.py").write_text(RECIPE)
    (folder / "_shared.py").write_text("raise AssertionError")
    monkeypatch.setattr(cli, "RECIPES", folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "recipes"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "recipes"]:
        del sys.modules[name]


@pytest.mark.usefixtures("draw")
def test_a_recipe_runs_by_its_name(capsys):
    assert cli.main(["draw", "output=x", "shape.type=circle", "copies=3"]) == 0
    assert cli.main(["draw", "output=x", "shape.type=circle", "copies=3", "--check"]) == 0
    assert capsys.readouterr().out == "drawn 3\nchecked 3\n"
    assert cli.main(["draw", "output=x"]) == 2
    assert capsys.readouterr().err == "error: command line: shape: missing\n"


@pytest.mark.usefixtures("draw")
@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_recipes_and_tools_with_a_line_each(capsys, arguments):
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "  draw     Draw a page.\n" in shown
    assert "At length" not in shown and "_shared" not in shown
    for name in cli.TOOLS:
        assert f"  {name}" in shown


@pytest.mark.usefixtures("draw")
def test_a_wrong_name_is_told_with_the_right_ones(capsys):
    assert cli.main(["drow"]) == 2
    message = (
        "error: command line: no 'drow' here; did you mean 'draw'? (there are: draw, convert, init, schema, version)\n"
    )
    assert capsys.readouterr().err == message
    assert cli.main(["schema", "int"]) == 2
    assert capsys.readouterr().err == "error: command line: no 'int' here (there are: draw)\n"


@pytest.mark.usefixtures("draw")
def test_schema_prints_the_json_schema_of_one_recipe_or_of_all(capsys):
    assert cli.main(["schema", "draw"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["title"] == "tuner draw" and "output" in one["properties"]
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == {"draw": one}


@pytest.mark.usefixtures("draw")
def test_init_writes_a_config_that_loads_and_replaces_none(capsys, tmp_path):
    from tests.tuner.config.drawing import Config
    from tests.tuner.config.shapes.circle import Circle

    file = tmp_path / "new.toml"
    command = ["init", "draw", "--base", "circle", "--data", "pictures", "copies=7", "--out", str(file)]
    assert cli.main(command) == 0
    assert load(Config, file) == Config(output=Path("pictures"), shape=Circle(), copies=7)
    assert file.read_text().startswith("# Draw a page.\n")
    before = file.read_bytes()
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.usefixtures("draw")
def test_init_says_what_is_still_to_be_filled_in(capsys):
    assert cli.main(["init", "draw"]) == 0
    shown = capsys.readouterr()
    assert "#output =  # has to be given" in shown.out
    assert shown.err == "still to be filled in: output\n"


@pytest.mark.usefixtures("draw")
def test_init_refuses_what_would_not_load(capsys):
    assert cli.main(["init", "draw", "--base", "cirkle", "copies=x"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no 'cirkle' here; did you mean 'circle'?" in shown.err
    assert "copies: expected a whole number" in shown.err


def test_version_names_the_libraries_without_loading_them(capsys):
    assert cli.main(["version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"tuner {__version__}, Python ") and "\ntorch " in shown


def test_the_module_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "tuner", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"tuner {__version__}")
