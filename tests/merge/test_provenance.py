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


@pytest.mark.parametrize("says", ["noise", "nothing"])
def test_a_yaml_that_is_not_true_of_the_result_is_not_left_beside_it(tmp_path, capsys, says):
    for number, name in enumerate(("v", "other")):
        tiny(tmp_path / f"{name}.safetensors", number)
    velocity, other, out = (str(tmp_path / f"{name}.safetensors") for name in ("v", "other", "out"))
    (tmp_path / "v.yaml").write_text(f"model:\n{SAID['v']}")
    if (text := SAID[says]) is not None:
        (tmp_path / "other.yaml").write_text(f"model:\n{text}")
    beside = tmp_path / "out.yaml"
    assert command.main(["lerp", velocity, velocity, f"to={out}"]) == 0
    assert beside.exists()
    assert command.main(["lerp", other, other, f"to={out}", "--overwrite"]) == 0
    assert not beside.exists()
    assert "out.yaml is removed" in capsys.readouterr().out
    before = (tmp_path / "out.safetensors").read_bytes()
    beside.write_text("model:\n  parameterization: v # mine\n")
    assert command.main(["lerp", other, other, f"to={out}", "t=0.1", "--overwrite"]) == 2
    assert "out.yaml: is there already, and tells programs that" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == before and beside.exists()
