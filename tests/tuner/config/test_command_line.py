"""The command line of a recipe: what is run, and how errors end."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tuner.config.drawing import Config
from tuner.config.command_line import OUT_OF_MEMORY, REPORT, guarded, run
from tuner.config.loader import load
from tuner.errors import CheckpointError, ConfigError, DataError, DivergedError, LockedError, PeerError, UnsafeError

GOOD = ["output=out", "shape.type=circle"]


@pytest.fixture
def ran() -> list[Config]:
    return []


def test_a_file_and_overrides_reach_the_recipe_in_any_order_with_options(tmp_path, ran):
    file = tmp_path / "a=b.toml"
    file.write_text('output = "out"\nshape = { type = "circle" }\n')
    assert run(Config, ran.append, [str(file), "--debug", "copies=2"]) == 0
    assert run(Config, ran.append, [*GOOD, "copies=2"]) == 0
    assert ran[0] == ran[1] == load(Config, file, ["copies=2"])


def test_check_runs_the_check_alone(ran):
    checked: list[Config] = []
    assert run(Config, ran.append, [*GOOD, "--check"], check=checked.append) == 0
    assert (len(checked), len(ran)) == (1, 0)


@pytest.mark.parametrize("option", ["--print-config", "--check"])
def test_the_resolved_config_is_printed_and_loads(tmp_path, capsys, ran, option):
    assert run(Config, ran.append, [*GOOD, option]) == 0
    assert not ran
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert load(Config, tmp_path / "printed.toml") == load(Config, None, GOOD)


def test_help_and_unknown_options_do_not_run_the_recipe(capsys, ran):
    assert run(Config, ran.append, ["--help"], name="tuner draw") == 0
    assert "usage: tuner draw" in capsys.readouterr().out
    assert run(Config, ran.append, ["--rank", "4"]) == 2
    assert "--rank" in capsys.readouterr().err
    assert not ran


def test_each_wrong_value_is_a_line_and_the_exit_code_is_2(capsys, ran):
    assert run(Config, ran.append, ["copies=x", "verbos=true", *GOOD]) == 2
    assert capsys.readouterr().err.split("\n") == [
        "error: command line: copies: expected a whole number, got 'x'",
        "error: command line: verbos: unknown key; did you mean 'verbose'?",
        "",
    ]


@pytest.mark.parametrize(
    "kind, code",
    [
        (ConfigError, 2),
        (DataError, 3),
        (UnsafeError, 4),
        (DivergedError, 6),
        (LockedError, 7),
        (CheckpointError, 8),
        (PeerError, 9),
    ],
)
def test_an_error_of_the_user_is_one_line_and_its_class_the_exit_code(capsys, kind, code):
    def body() -> None:
        raise kind("a.png: not a picture; remove it")

    assert guarded(body) == code
    assert capsys.readouterr().err == "error: a.png: not a picture; remove it\n"


def test_debug_shows_the_traceback_before_the_line(capsys):
    def body() -> None:
        raise DataError("a.png: not a picture")

    assert guarded(body, debug=True) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nerror: a.png: not a picture\n")


def test_what_would_steer_a_terminal_is_not_printed(capsys):
    def body() -> None:
        raise DataError("\x1b[2Ja\x07.png\x9b: 日本 not a picture\r")

    guarded(body)
    assert capsys.readouterr().err == "error: \ufffd[2Ja\ufffd.png\ufffd: 日本 not a picture\ufffd\n"


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class SafetensorError(Exception):
    """As safetensors'."""


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/step-5")


FULL = "/out/step-5: no space left on device; free some space, or choose another folder"


@pytest.mark.parametrize(
    "error, message",
    [
        (full_disk(), FULL),
        (OSError(errno.EDQUOT, "x", "f"), f"f: {os.strerror(errno.EDQUOT).lower()}; free some space, or choose"),
        (PermissionError(errno.EACCES, "x", "f"), "f: permission denied; change its permissions, or choose"),
        (OSError(errno.EMFILE, "x"), "too many open files; raise the limit"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), OUT_OF_MEMORY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_machine_with_too_little_is_told_so(capsys, error, message):
    def body() -> None:
        raise error

    assert guarded(body) == 5
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


def test_a_full_disk_is_told_when_another_error_came_of_it(capsys):
    def body() -> None:
        try:
            raise full_disk()
        except OSError:
            raise RuntimeError("could not write the archive")  # noqa: B904, as a library does

    assert guarded(body) == 5
    assert capsys.readouterr().err == f"error: {FULL}\n"


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "x", "f"), AssertionError()])
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(capsys, error):
    def body() -> None:
        raise error

    assert guarded(body) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"{REPORT}\n")


def test_ctrl_c_ends_with_130(capsys):
    def body() -> None:
        raise KeyboardInterrupt

    assert guarded(body) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_recipe_chooses_its_own_exit_code():
    def body() -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit) as end:
        guarded(body)
    assert end.value.code == 143


@pytest.mark.parametrize(
    "rank, kind, shown", [("0", ConfigError, True), ("1", ConfigError, False), ("1", DataError, True)]
)
def test_of_several_processes_the_first_tells_what_all_of_them_meet(capsys, monkeypatch, rank, kind, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def body() -> None:
        raise kind("wrong")

    assert guarded(body) == kind.exit_code
    assert capsys.readouterr().err == (f"[process {rank}] error: wrong\n" if shown else "")


RECIPE = '''"""Draw a page."""

from tests.tuner.config.drawing import Config
from tuner.config.command_line import run


def main(config: Config) -> None:
    for number in range(100_000 if config.verbose else 1):
        print(number, flush=True)


if __name__ == "__main__":
    raise SystemExit(run(Config, main))
'''


def test_a_recipe_is_a_program(tmp_path):
    recipe = tmp_path / "draw.py"
    recipe.write_text(RECIPE)

    def draw(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        return subprocess.run(
            [sys.executable, recipe, *arguments], env=environment, text=True, capture_output=True, check=False
        )

    assert draw(*GOOD).stdout == "0\n"
    assert "Draw a page." in draw("--help").stdout
    refused = draw(*GOOD, "copies=x")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: command line: copies: expected a whole number, got 'x'\n"


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    recipe = tmp_path / "draw.py"
    recipe.write_text(RECIPE)
    command = [sys.executable, str(recipe), *GOOD, "verbose=true"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
