"""What the demo claims, learned for real on the embedded base in a smaller budget: on fixed noise, before and after."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from examples.demo import prior
from examples.demo.measure import similarity
from recipes import dreambooth
from tuner.config.loader import load
from tuner.errors import ConfigError
from tuner.families.base import OpenedModel, Sampling
from tuner.families.source import BaseModel
from tuner.publish.verify import listening

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
SHOWN = 240
"""How many times each run shows a picture of the subject."""
SEEDS = range(16)
CLASS_PICTURES = 6


@dataclass(frozen=True)
class Both:
    """Two runs of the demo's recipe that show the subject equally often."""

    config: dreambooth.Config
    kept: prior.Learned
    """With class pictures."""
    alone: prior.Learned


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("demo")
    AcceleratorState._reset_state(reset_partial_state=True)
    validation = f"{{type='validation',every=100000,data=[{{type='folder',path='{DEMO / 'held-out'}'}}]}}"
    config = load(
        dreambooth.Config,
        DEMO / "dreambooth.toml",
        [
            f"run.output='{folder / 'run'}'",
            f"run.cache='{folder / 'cache'}'",
            f"run.samples={2 * SHOWN}",  # half of them show the class
            f"data.subject='{DEMO / 'subject'}'",
            f"data.class_folder='{folder / 'class'}'",
            f"data.class_count={CLASS_PICTURES}",
            f"observers=[{validation}]",
        ],
    )
    return Both(config, *prior.compare(config))


def samples(model: OpenedModel) -> list[Image.Image]:
    return model.sample(["sks bear"] * len(SEEDS), SEEDS, Sampling(steps=12, guidance=3.0))


def test_the_loss_on_pictures_of_the_subject_that_were_not_trained_on_falls(both):
    for learned in (both.kept, both.alone):
        first, last = learned.loss
        assert last < 0.9 * first, learned


def test_samples_come_to_look_like_the_subject(both):
    model = BaseModel(base="pocket").open(torch.device("cpu"))
    subject = [Image.open(file).convert("RGB") for file in sorted((DEMO / "subject").glob("*.png"))]
    before = similarity(model, samples(model), subject)
    with listening():  # it remarks that there is nothing for the text encoder
        model.pipeline().load_lora_weights(both.kept.run / "lora", weight_name="white-bear-diffusers.safetensors")
    after = similarity(model, samples(model), subject)
    assert after > before + 0.1, (before, after)


def test_with_prior_preservation_the_class_changes_less(both):
    assert 0 < both.kept.drift < 0.7 * both.alone.drift, both


def test_both_runs_show_the_subject_equally_often_and_one_shows_nothing_else(both):
    alone = load(dreambooth.Config, both.alone.run / "config.toml")
    assert alone.run.samples == SHOWN and alone.data.class_folder is None
    kept = load(dreambooth.Config, both.kept.run / "config.toml")
    back = {"run": kept.run, "data": kept.data, "observers": kept.observers}
    assert replace(alone, **back) == kept == both.config
    assert replace(alone.run, output=kept.run.output, samples=kept.run.samples) == kept.run


def test_the_report_says_what_was_measured(both):
    text = prior.report(both.config, both.kept, both.alone)
    said = [both.kept.drift, both.alone.drift, *both.kept.loss, both.alone.loss[1]]
    assert all(f"{figure:.4f}" in text for figure in said) and f"{both.kept.drift / both.alone.drift:.0%}" in text


def test_a_config_without_class_pictures_is_refused(both):
    with pytest.raises(ConfigError, match=r"data\.class_folder: left out"):
        prior.compare(prior.without_class_pictures(both.config))
