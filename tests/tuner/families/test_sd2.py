"""An opened Stable Diffusion 2 is what a stock pipeline over the same folder is, at 512 and at 768 pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from tests import tiny
from tests.tuner.families.stock import fixed_batch, opened, pixels, stock
from tuner.diffusion.objective import Objective
from tuner.errors import DataError
from tuner.families.base import Sampling

CAPTIONS = ["the red cat", "", "a cat, red " * 40]
ARCHITECTURES = {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("sd2") / request.param
    tiny.sd2(prediction=request.param).save_pretrained(folder)
    return request.param, folder


def test_what_it_is_comes_of_its_configs(base):
    prediction, folder = base
    model = opened(folder)
    assert (model.prediction_type, model.architecture) == (prediction, ARCHITECTURES[prediction])
    assert (model.resolution, model.resolution_step, model.max_tokens) == (64, 8, 75)


@torch.no_grad()
def test_texts_are_encoded_as_by_the_stock_pipeline(base):
    """With its last layer normalised, and filled up with the word that OpenCLIP fills up with."""
    _, folder = base
    pipeline = stock(folder)
    expected = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in CAPTIONS])
    model = opened(folder)
    assert torch.allclose(model.encode_text(CAPTIONS).tokens, expected, atol=1e-6)
    (ids,) = model.ids("text_encoder", ["the"]).tolist()
    words = pipeline.tokenizer.get_vocab()
    assert ids[3:] == [words["!"]] * 74 and words["!"] != words[tiny.END]


@torch.no_grad()
def test_the_loss_is_that_of_the_stock_pipelines_own_pieces(base):
    prediction, folder = base
    batch, noise, t = fixed_batch()
    loss = Objective().loss(opened(folder), batch, t)
    pipeline = stock(folder)
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    tokens = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in batch.captions])
    output = pipeline.unet(schedule.add_noise(batch.latents, noise, t), t, tokens).sample
    target = noise if prediction == "epsilon" else schedule.get_velocity(batch.latents, noise, t)
    expected = (output - target).square().mean((1, 2, 3))
    assert torch.allclose(loss.plain, expected, rtol=1e-5, atol=0)
    assert float(expected.min()) > 0.1


@torch.no_grad()
def test_samples_are_those_of_the_stock_pipeline_from_the_same_latents(base):
    _, folder = base
    (picture,) = opened(folder).sample(["the red cat"], [3], Sampling(width=72, height=56, steps=3, guidance=4.0))
    latents = torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(3))
    told = {"width": 72, "height": 56, "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = stock(folder)("the red cat", latents=latents, **told).images[0]
    assert abs(pixels(picture) - pixels(expected)).max() <= 1


def test_a_schedule_that_ends_in_pure_noise_needs_velocity(base, tmp_path: Path):
    prediction, _ = base
    pipeline = tiny.sd2(prediction=prediction)
    pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path / "zero")
    if prediction == "epsilon":
        with pytest.raises(DataError, match="rescale_betas_zero_snr needs v_prediction"):
            opened(tmp_path / "zero")
        return
    alpha, sigma = opened(tmp_path / "zero").schedule.alpha_sigma(torch.tensor([0, 999]))
    assert float(alpha[1]) < 1e-6 and float(sigma[1]) == pytest.approx(1)
    assert float(alpha[0]) ** 2 == pytest.approx(1 - 0.00085, abs=1e-6)
