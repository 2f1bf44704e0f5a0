import json
import math

from tuner.training.metrics import Metrics, read_metrics


def test_lines_are_appended_and_heard(tmp_path):
    heard: list[dict[str, object]] = []
    metrics = Metrics(tmp_path / "metrics.jsonl", main=True, listeners=[heard.append])
    metrics.write("update", 8, loss=0.5, lr=1e-4)
    metrics.write("validation", 8, loss=math.nan)
    rows = [
        {"kind": "update", "samples_seen": 8, "loss": 0.5, "lr": 1e-4},
        {"kind": "validation", "samples_seen": 8, "loss": None},
    ]
    assert read_metrics(metrics.file) == rows == heard
    for line in metrics.file.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: (_ for _ in ()).throw(AssertionError(f"{word} is no JSON")))


def test_a_run_is_rewound_to_the_place_it_goes_on_from(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", main=True)
    for place in (8, 16, 24, 32):
        metrics.write("update", place)
    with metrics.file.open("a") as file:
        file.write('{"kind": "update", "samples_se')  # torn by a kill
    metrics.rewind(16)
    metrics.write("update", 24, again=True)
    assert [(row["samples_seen"], row.get("again")) for row in read_metrics(metrics.file)] == [
        (8, None),
        (16, None),
        (24, True),
    ]
    metrics.rewind(-1)
    assert metrics.file.read_text() == ""


def test_other_processes_write_nothing(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", main=False)
    metrics.write("update", 8)
    metrics.rewind(0)
    assert not metrics.file.exists()
