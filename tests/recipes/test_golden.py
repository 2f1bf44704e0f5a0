"""The first losses of a LoRA and of a full run, to all digits: a change that moves one says why in its commit.

`GOLDEN=write python -m pytest tests/recipes/test_golden.py` writes `tests/golden/*.txt` anew. All digits have to be the
same on the kind of machine that the file names; elsewhere, since other processors round otherwise, those to 1e-5.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from tests import runs

GOLDEN = Path(__file__).parent.parent / "golden"
UPDATES = 10


def machine() -> str:
    """What decides the last digits."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"vendor_id\s*: (\S+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    vendor = found[1] if found else "another processor"
    level = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {vendor} {level}, {torch.get_num_threads()} thread"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("recipe", runs.METHODS)
def test_the_first_losses_are_the_golden_ones(recipe, prediction, tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    ground = runs.make(tmp_path / "ground", prediction)
    assert ground.run(recipe, tmp_path / "run", f"run.updates={UPDATES}", "run.checkpoint_every=1000") == 0
    losses = [row["loss"] for row in runs.updates(tmp_path / "run")]
    file = GOLDEN / f"{recipe}-{prediction}.txt"
    if os.environ.get("GOLDEN") == "write":
        file.write_text("\n".join([f"# {machine()}", *map(repr, losses)]) + "\n")
    first, *lines = file.read_text().splitlines()
    golden = [float(line) for line in lines]
    assert len(golden) == UPDATES and len(set(golden)) == UPDATES
    assert losses == (golden if first == f"# {machine()}" else pytest.approx(golden, abs=1e-5))
