"""What merging does to a model that really draws: the embedded base, fine-tuned twice, blended, baked and extracted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from examples import blend
from examples.blend import __main__ as program
from merge.command import main as merge
from tuner import cli
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.publish.verify import listening

ROOT = Path(__file__).parent.parent
FEW = Sampling(steps=4, guidance=3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `python -m examples.blend` has run, in small."""
    folder = tmp_path_factory.mktemp("blend")
    (folder / "examples").symlink_to(ROOT / "examples")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(program, "SEEDS", (1,))
        patch.setattr(program, "SAMPLING", FEW)
        program.main(["run.samples=32"])
    assert blend.__doc__
    return folder


@pytest.fixture(autouse=True)
def there(made, monkeypatch):
    monkeypatch.chdir(made)


def samples(folder: str, lora: str | None = None) -> list[np.ndarray]:
    model = BaseModel(base=folder).open(torch.device("cpu"))
    if lora is not None:
        with listening():
            model.pipeline().load_lora_weights(Path(lora).parent, weight_name=Path(lora).name)
    return [np.asarray(picture).astype(int) for picture in model.sample(["sks bear"], [1], FEW)]


def test_every_step_towards_a_model_is_better_at_its_subject_and_worse_at_the_others(made, capsys):
    losses = {
        colour: [
            program.loss(program.opened(Path(f"runs/blend/share-{share:g}")), pictures, program.PROMPT)
            for share in program.SHARES
        ]
        for colour, pictures in (
            ("white", Path("runs/blend/pictures/white/held-out")),
            ("red", Path("runs/blend/pictures/red/held-out")),
        )
    }
    white, red = losses["white"], losses["red"]
    assert white[0] < white[-1] and red[-1] < red[0]
    assert white == sorted(white)
    assert red == sorted(red, reverse=True)


def test_the_ends_of_a_blend_are_the_models(made):
    for share, colour in ((0, "white"), (1, "red")):
        for file in sorted(Path(f"runs/blend/{colour}/model").rglob("*.safetensors")):
            place = file.relative_to(f"runs/blend/{colour}/model")
            merged = load_file(Path(f"runs/blend/share-{share}") / place)
            assert all(torch.equal(merged[name], tensor) for name, tensor in load_file(file).items())


def test_the_program_leaves_a_grid_and_a_curve(made):
    with Image.open("runs/blend/grid.png") as grid, Image.open("runs/blend/curve.png") as curve:
        assert grid.height > 5 * program.CELL
        assert curve.width == 600


@pytest.fixture(scope="module")
def extracted(made) -> dict[int, Path]:
    """LoRAs of growing rank, of what the red fine-tune has learnt since the base."""
    base = BaseModel(base="pocket").locate()
    found: dict[int, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for rank in (1, 4, 16):
            found[rank] = made / f"red-{rank}.safetensors"
            words = [f"base={base}", "tuned=runs/blend/red/model", f"output={found[rank]}"]
            words += [f"rank={rank}", "dialect=diffusers", "vectors=false"]
            assert cli.main(["extract", *words]) == 0
    return found


def test_a_lora_that_is_extracted_with_more_directions_is_nearer_to_the_fine_tune(made, extracted):
    goal = samples("runs/blend/red/model")
    start = samples("pocket")
    distances = [float(np.mean([np.abs(a - b).mean() for a, b in zip(start, goal, strict=True)]))]
    for path in extracted.values():
        drawn = samples("pocket", str(path))
        distances.append(float(np.mean([np.abs(a - b).mean() for a, b in zip(drawn, goal, strict=True)])))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


def test_a_baked_lora_draws_what_the_lora_draws(made, extracted):
    base = BaseModel(base="pocket").locate()
    assert merge(["add", str(base), str(extracted[4]), "weight=1.0", "to=baked"]) == 0
    for baked, applied in zip(samples("baked"), samples("pocket", str(extracted[4])), strict=True):
        assert np.abs(baked - applied).max() <= 2
