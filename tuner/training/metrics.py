"""The run's numbers, one JSON object a line: `metrics.jsonl`."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.weights.writer import atomic_write_text

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Metrics:
    """Appends to `metrics.jsonl`, on the main process only; listeners (wandb) hear the same."""

    file: Path
    main: bool
    listeners: list[Listener] = field(default_factory=list[Listener])

    def rewind(self, samples_seen: int) -> None:
        """Drop what a broken run wrote past the checkpoint it now goes on from."""
        if not self.main or not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _samples_seen(line) <= samples_seen]
        atomic_write_text(self.file, "".join(f"{line}\n" for line in kept))

    def write(self, kind: str, samples_seen: int, **values: Any) -> None:
        """Append one line of `kind`, at a place of the run."""
        if not self.main:
            return
        row = {"kind": kind, "samples_seen": samples_seen, **values}
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for listener in self.listeners:
            listener(row)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole line of a `metrics.jsonl`, in order."""
    rows = (line for line in file.read_text(encoding="utf-8").splitlines() if _samples_seen(line) < math.inf)
    return [json.loads(line) for line in rows]


def _samples_seen(line: str) -> float:
    try:
        return float(json.loads(line)["samples_seen"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill
