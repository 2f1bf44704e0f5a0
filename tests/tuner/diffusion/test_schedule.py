"""Schedules, and the one that ends in nothing but noise."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tuner.diffusion.schedule import Flow, flow_share, rescale_zero_terminal_snr, scaled_linear

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_zero_terminal_snr_is_that_of_diffusers_and_of_the_paper():
    ours = rescale_zero_terminal_snr(scaled_linear())
    theirs = DDIMScheduler(**SCALED, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=2e-8)
    root = scaled_linear().alphas_cumprod.double().sqrt()
    paper = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al., algorithm 1
    torch.testing.assert_close(ours.alphas_cumprod.double().sqrt(), paper, rtol=1e-6, atol=0)


def test_zero_terminal_snr_keeps_the_first_time_and_leaves_nothing_of_the_picture_at_the_last():
    before, after = scaled_linear(), rescale_zero_terminal_snr(scaled_linear())
    times = torch.arange(1000)
    alpha, sigma = after.alpha_sigma(times)
    assert alpha[-1] == 0 and sigma[-1] == 1
    assert float(alpha[0]) == pytest.approx(float(before.alpha_sigma(times)[0][0]), rel=1e-6)
    assert bool((alpha.diff() < 0).all())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))


def test_a_schedule_that_ends_in_noise_already_stays_as_it_is():
    once = rescale_zero_terminal_snr(scaled_linear())
    torch.testing.assert_close(rescale_zero_terminal_snr(once).alphas_cumprod, once.alphas_cumprod, rtol=1e-6, atol=0)


def test_the_snr_weight_has_to_be_computed_after_the_rescaling():
    """What sd-scripts does in the other order is five times as much at t = 900: min-SNR's weight of v there."""
    weights: list[float] = []
    for schedule in (scaled_linear(), rescale_zero_terminal_snr(scaled_linear())):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([900]))
        snr = float((alpha / sigma) ** 2)
        weights.append(min(snr, 5.0) / (snr + 1))
    assert weights == pytest.approx([0.01415, 0.00296], abs=1e-5)


def test_the_flows_share_has_the_flows_snr():
    alpha, sigma = scaled_linear().alpha_sigma(torch.arange(1000))
    flow_alpha, flow_sigma = Flow().alpha_sigma(flow_share(alpha, sigma) * 1000)
    torch.testing.assert_close(flow_alpha / flow_sigma, alpha / sigma, rtol=1e-3, atol=0)
