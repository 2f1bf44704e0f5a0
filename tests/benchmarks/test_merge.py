"""The programs that merging is measured beside make the same thing, and the table says what was measured."""

import sys

import pytest

from benchmarks import merge
from benchmarks.merge import Cost, difference, generate, measure, prepare, table
from benchmarks.mergers import RESULTS, TASKS, Program, programs
from merge import command


@pytest.mark.parametrize("method", TASKS)
def test_every_program_makes_what_ours_makes(method, tmp_path, monkeypatch):
    task = TASKS[method]
    paths = generate("tiny", tmp_path, task.inputs)
    prepare(tmp_path, paths)
    found = programs(task, dict(zip(task.inputs, paths, strict=True)), tmp_path, tmp_path / "bin" / "python")
    ours, naive = found["ours"], found["naive torch"]
    assert ours.command[1:4] == ("-m", "tuner", "merge")
    assert command.main(ours.command[4:]) == 0
    for name in ("naive torch", "floor"):
        monkeypatch.setattr(sys, "argv", ["-c", *found[name].command[3:]])
        exec(found[name].command[2], {})
    differ, _, _, _, _, _, apart = difference(paths[0], ours.output, naive.output).split(" ", 6)
    assert float(differ.rstrip("%")) < {"slerp": 50, "ties": 5}.get(method, 0.1), apart  # known: last digits, ties
    (copied,) = (tmp_path / RESULTS).glob("copied")
    assert copied.stat().st_size == paths[0].stat().st_size
    assert found["sd-mecha"].peer and found["mergekit"].peer and not ours.peer
    prepare(tmp_path, paths)
    assert not list((tmp_path / RESULTS).iterdir())


def test_a_program_is_measured_with_what_it_holds(tmp_path):
    cost = measure((sys.executable, "-c", "import time; x = b'1' * 100_000_000; time.sleep(0.5)"))
    assert 0.1 <= cost.anonymous < 0.2 and cost.wall > 0.5 and 0 < cost.cpu < cost.wall + 1
    with pytest.raises(RuntimeError, match="oh"):
        measure((sys.executable, "-c", "raise SystemExit('oh')"))


def test_the_table_has_medians_and_ratios():
    costs = {
        "ours": [Cost(wall, wall + 1, 0.2, 1.0) for wall in (2.0, 9.0, 3.0)],
        "floor": [Cost(4.0, 3.0, 0.01, 0.5)],
        "peer": [Cost(6.0, 9.0, 3.0, 1.0)],
        "slower peer": [Cost(60.0, 9.0, 3.0, 1.0)],
    }
    found = {name: Program(("x",), peer="peer" in name) for name in costs}
    lines = list(table(costs, dict.fromkeys(costs, 0.1), found))
    assert "| ours | 3.0 | 2.0 - 9.0 | 4.0 | 0.20 | 0.10 | 0.50 | 0.75 |" in lines
    assert lines[-1] == "inputs in the page cache at the start: 50% - 100%"
    assert merge.machine()
