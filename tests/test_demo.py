"""What the demo claims, learned for real on the embedded base in a smaller budget: on fixed noise, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from examples.demo.measure import predictions, similarity
from recipes import dreambooth
from tuner.config.loader import load
from tuner.families.base import OpenedModel, Sampling
from tuner.families.source import BaseModel, embedded
from tuner.publish.verify import listening
from tuner.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
BASE = "pocket"
SHOWN = 240
"""How many times each run shows a picture of the subject."""
SEEDS = range(16)
CLASS_PICTURES = 6

pytestmark = pytest.mark.skipif(BASE not in embedded(), reason="the embedded base model is not there yet")


@dataclass(frozen=True)
class Learned:
    """Two runs of the demo's recipe that show the subject equally often, and what was drawn before."""

    folder: Path
    before: list[Image.Image]
    after: list[Image.Image]
    drift: dict[str, float]
    """By run: the mean squared change of the network's output at the class prompt, on the base's own class pictures."""

    def validation(self, run: str) -> list[float]:
        """The loss on held-out pictures of the subject, over the run."""
        return [row["loss"] for row in read_metrics(self.folder / run / "metrics.jsonl") if row["kind"] == "validation"]


def train(folder: Path, name: str, *changes: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    validation = f"{{type='validation',every=100000,data=[{{type='folder',path='{DEMO / 'held-out'}'}}]}}"
    given = (f"run.output='{folder / name}'", f"run.cache='{folder / 'cache'}'", f"model.base='{BASE}'")
    dreambooth.main(load(dreambooth.Config, DEMO / "dreambooth.toml", [*given, f"observers=[{validation}]", *changes]))


def attach(model: OpenedModel, run: Path) -> None:
    file = "white-bear-diffusers.safetensors"
    with listening():  # it remarks that there is nothing for the text encoder
        model.pipeline().load_lora_weights(run / "lora", weight_name=file, adapter_name=run.name)


def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]


def draw(model: OpenedModel) -> list[Image.Image]:
    return model.sample(["sks bear"] * len(SEEDS), SEEDS, Sampling(steps=12, guidance=3.0))


def changes(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([(a - b).square().mean() for a, b in zip(after, before, strict=True)]).mean())


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("demo")
    prior = f"class_folder='{folder / 'class'}',class_prompt='bear',class_count={CLASS_PICTURES}"
    subject = f"subject='{DEMO / 'subject'}',prompt='sks bear'"
    train(folder, "prior", f"run.samples={2 * SHOWN}", f"data={{{subject},{prior}}}")  # half of them show the class
    train(folder, "alone", f"run.samples={SHOWN}", f"data={{{subject}}}")

    model = BaseModel(base=BASE).open(torch.device("cpu"))
    own = pictures(folder / "class")
    before, at_class = draw(model), predictions(model, "bear", own)
    drift: dict[str, float] = {}
    for name in ("alone", "prior"):
        attach(model, folder / name)
        drift[name] = changes(at_class, predictions(model, "bear", own))
        if name == "alone":
            model.pipeline().unload_lora_weights()
    return Learned(folder, before, draw(model), drift)


def test_the_loss_on_pictures_of_the_subject_that_were_not_trained_on_falls(learned):
    first, last = learned.validation("prior")[0], learned.validation("prior")[-1]
    assert last < 0.9 * first, (first, last)


def test_samples_come_to_look_like_the_subject(learned):
    model = BaseModel(base=BASE).open(torch.device("cpu"))
    subject = pictures(DEMO / "subject")
    before, after = similarity(model, learned.before, subject), similarity(model, learned.after, subject)
    assert after > before + 0.1, (before, after)


def test_with_prior_preservation_the_class_changes_less(learned):
    assert learned.drift["prior"] < 0.7 * learned.drift["alone"], learned.drift
