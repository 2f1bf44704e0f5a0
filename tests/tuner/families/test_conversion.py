"""A base trained to be of another kind: its loss, its previews and what is published of it agree on the kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import safe_open

from tests import tiny
from tests.tuner.families.stock import fixed_batch, opened, pixels, stock
from tuner.diffusion.objective import Objective
from tuner.diffusion.weightings.min_snr import MinSnr
from tuner.errors import ConfigError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.publish.full import write_full
from tuner.weights.convert import convert

TO_ZERO = {"prediction": "v_prediction", "zero_terminal_snr": True}
SAID = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of epsilon-prediction, on a schedule that leaves a little of the picture."""
    folder = tmp_path_factory.mktemp("conversion") / request.param
    getattr(tiny, request.param)().save_pretrained(folder)
    return folder


def test_the_loss_is_that_of_the_converted_schedule_and_its_weights_too(base: Path):
    batch, noise, t = fixed_batch()
    t[0] = 999
    model = opened(base, **TO_ZERO)
    loss = Objective(weighting=MinSnr()).loss(model, batch, t)
    schedule: Any = DDPMScheduler.from_config({**stock(base).scheduler.config, **SAID})
    x_t = schedule.add_noise(batch.latents, noise, t)
    torch.testing.assert_close(x_t[0], noise[0])  # nothing is left of the picture
    conditioning = model.encode_text(batch.captions)
    with torch.no_grad():
        output = model.denoise(x_t, t, type(conditioning)(**{**conditioning.__dict__, "frame": batch.frame}))
    expected = (output - schedule.get_velocity(batch.latents, noise, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.plain, expected, rtol=1e-4, atol=0)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    torch.testing.assert_close(loss.weighted, snr.clamp(max=5) / (snr + 1) * expected, rtol=1e-3, atol=1e-7)
    assert loss.weighted[0] < 1e-6 < loss.plain[0]


@torch.no_grad()
def test_previews_are_those_of_a_stock_pipeline_over_what_is_published(base: Path, tmp_path: Path):
    model = opened(base, **TO_ZERO)
    (picture,) = model.sample(["the red cat"], [3], Sampling(width=64, height=64, steps=3, guidance=4.0))
    folder = write_full(tmp_path / "model", model.pipeline(), base / "tokenizer", dtype=torch.float32)
    published = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert {key: published[key] for key in SAID} == SAID
    pipeline = stock(folder)
    pipeline.scheduler.set_timesteps(3)
    assert int(pipeline.scheduler.timesteps[0]) == 999  # the time that is nothing but noise is sampled
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    told = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = pipeline("the red cat", latents=latents, guidance_rescale=0.7, **told).images[0]
    assert abs(pixels(picture) - pixels(expected)).max() <= 1
    other = pipeline("the red cat", latents=latents, **told).images[0]
    assert abs(pixels(picture) - pixels(other)).max() > 1


def test_the_kind_is_in_a_single_file_of_what_is_published(tmp_path: Path):
    tiny.sdxl().save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base", **TO_ZERO)
    folder = write_full(tmp_path / "model", model.pipeline(), tmp_path / "base" / "tokenizer", dtype=torch.float32)
    convert(folder, tmp_path / "single.safetensors", layout="ldm")
    with safe_open(tmp_path / "single.safetensors", "pt") as file:
        assert {"v_pred", "ztsnr"} <= {*file.keys()}
    assert opened(folder).prediction_type == "v_prediction"
    alpha, _ = opened(folder).schedule.alpha_sigma(torch.tensor([999]))
    assert alpha == 0


def test_only_what_is_said_changes(base: Path):
    plain, v = opened(base), opened(base, prediction="v_prediction")
    assert (plain.prediction_type, v.prediction_type) == ("epsilon", "v_prediction")
    assert torch.equal(plain.schedule.alphas_cumprod, v.schedule.alphas_cumprod)
    assert dict(v.scheduler_config) == {**plain.scheduler_config, "prediction_type": "v_prediction"}
    assert opened(base, prediction="epsilon", zero_terminal_snr=False).prediction_type == "epsilon"


def test_nothing_but_noise_is_refused_to_a_model_that_predicts_it(base: Path, tmp_path: Path):
    for said in ({"zero_terminal_snr": True}, {"prediction": "epsilon", "zero_terminal_snr": True}):
        with pytest.raises(ConfigError, match=r"^model.zero_terminal_snr: needs v-prediction.*model.prediction"):
            opened(base, **said)
    write_full(tmp_path / "zero", opened(base, **TO_ZERO).pipeline(), base / "tokenizer")
    with pytest.raises(ConfigError, match="needs v-prediction"):
        opened(tmp_path / "zero", prediction="epsilon")
    back = opened(tmp_path / "zero", prediction="epsilon", zero_terminal_snr=False)
    assert float(back.schedule.alpha_sigma(torch.tensor([999]))[0]) > 0.01


def test_a_base_that_flows_has_no_such_kinds(tmp_path: Path):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    for name, value in TO_ZERO.items():
        with pytest.raises(ConfigError, match=f"model.{name}: .* is of the family sd3, without it"):
            BaseModel(base=str(tmp_path / "sd3"), **{name: value}).open(torch.device("cpu"))  # pyright: ignore
