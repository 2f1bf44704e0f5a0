"""What a merged file says of itself beside its recipe."""

import pytest

from merge import command
from tests.merge.test_run import tiny
from tuner.weights.facts import PREDICTION
from tuner.weights.store import SafetensorsFile

SAID = {"v": "  parameterization: v\n", "noise": "  linear_start: 0.1\n", "nothing": None}


@pytest.mark.parametrize("says", [("v", "v"), ("v", "nothing"), ("nothing", "v"), ("noise", "noise"), ("nothing",) * 2])
def test_what_is_said_beside_the_models_that_they_predict_is_said_of_the_result(tmp_path, says):
    files = [tmp_path / f"{number}.safetensors" for number in range(len(says))]
    for number, (file, said) in enumerate(zip(files, says, strict=True)):
        tiny(file, number)
        if (text := SAID[said]) is not None:
            file.with_suffix(".yaml").write_text(f"model:\n{text}")
    out = tmp_path / "out.safetensors"
    assert command.main(["lerp", *map(str, files), f"to={out}"]) == 0
    velocity = "v" in says
    assert SafetensorsFile(out).metadata.get(PREDICTION) == ("v" if velocity else None)
    beside = tmp_path / "out.yaml"
    assert beside.exists() == velocity
    assert not velocity or 'parameterization: "v"' in beside.read_text()
