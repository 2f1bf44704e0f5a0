"""The base model's autoencoder: what it starts from, and what whitening leaves as it is."""

import pytest
import torch

pytest.importorskip("diffusers")

from tuner.base.autoencoder import fresh, whiten
from tuner.rng import generator_at


def smooth_pictures(count: int) -> torch.Tensor:
    """Random pictures `[count, 3, 32, 32]` that vary slowly."""
    small = torch.rand(count, 3, 4, 4, generator=generator_at("smooth")) * 2 - 1
    return torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear")


def moments(vae, pictures):
    return vae.encode(pictures).latent_dist


@torch.no_grad()
def test_it_starts_as_the_average_of_colours():
    vae = fresh((32, 32, 48), 1).eval()
    pictures = smooth_pictures(4)
    means = torch.nn.functional.avg_pool2d(pictures, 4)
    latents = moments(vae, pictures)
    assert torch.allclose(latents.mean[:, :3], means, atol=0.05)
    rebuilt = vae.decode(latents.mean).sample
    assert torch.allclose(rebuilt, torch.nn.functional.interpolate(means, scale_factor=4), atol=0.1)


@torch.no_grad()
def test_whitened_latents_have_mean_0_and_variance_1_and_say_the_same():
    vae = fresh((32, 32, 48), 2).eval()
    pictures = smooth_pictures(8)
    before = vae.decode(moments(vae, pictures).mean).sample
    whiten(vae, list(pictures))
    posterior = moments(vae, pictures)
    assert torch.allclose(vae.decode(posterior.mean).sample, before, atol=1e-4)
    channels = posterior.mean.transpose(0, 1).flatten(1)
    variance = channels.var(1) + posterior.var.transpose(0, 1).flatten(1).mean(1)
    assert torch.allclose(channels.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(variance, torch.ones(4), atol=1e-2)
