"""Laws of every kind of noise, and pyramid noise against its definition."""

import random

import pytest
import torch
from torch import Tensor

from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.noises.pyramid import Pyramid
from tuner.plugins import Folder
from tuner.rng import generator_at

EVERY = [Folder("tuner.diffusion.noises").find(name)() for name in Folder("tuner.diffusion.noises").names()]
SHAPE = (4, 24, 32)


def draws(noise, count: int = 200, shape=SHAPE) -> Tensor:
    return torch.stack([noise.draw(shape, generator_at("noise", i)) for i in range(count)])


@pytest.mark.parametrize("noise", [*EVERY, Pyramid(discount=0.9, levels=10)], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 1), (16, 7, 3)])
def test_noise_is_float32_of_mean_zero_and_about_unit_size_and_a_function_of_its_place(noise, shape):
    found = draws(noise, 60, shape)
    assert found.dtype == torch.float32 and found.shape == (60, *shape) and bool(found.isfinite().all())
    assert torch.equal(found[:3], draws(noise, 3, shape))
    assert abs(float(found.mean())) < 0.3 and 0.8 < float(found.std()) < 1.3


def published(count: int, discount: float, levels: int) -> Tensor:
    """Whitaker's sum as sd-scripts has it, normalised for each sample; of other random numbers, so alike on average."""
    chance = random.Random(1)
    channels, height, width = SHAPE
    rng = torch.Generator().manual_seed(1)
    enlarge = torch.nn.Upsample(size=(height, width), mode="bilinear")
    found: list[Tensor] = []
    for _ in range(count):
        total = torch.randn(1, channels, height, width, generator=rng)
        for i in range(levels):
            r = chance.random() * 2 + 2
            h, w = max(1, int(height / r**i)), max(1, int(width / r**i))
            total = total + enlarge(torch.randn(1, channels, h, w, generator=rng)) * discount**i
            if h == 1 or w == 1:
                break
        found.append(total[0] / total.std())
    return torch.stack(found)


def spectrum(noise: Tensor) -> list[float]:
    """Mean power of the mean, of the longest waves, of middle ones and of the shortest."""
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))
    return [float(power[0, 0]), float(power[0, 1] + power[1, 0]), float(power[2:5, 2:5].mean()), float(power[12, 16])]


@pytest.mark.parametrize(("discount", "levels"), [(0.3, 6), (0.8, 8), (0.8, 2)])
def test_pyramid_noise_has_the_spectrum_of_the_published_sum(discount, levels):
    ours = spectrum(draws(Pyramid(discount=discount, levels=levels), 400))
    theirs = spectrum(published(400, discount, levels))
    assert ours == pytest.approx(theirs, rel=0.25)
    white = spectrum(draws(Gaussian(), 400))
    assert ours[0] > 1.5 * white[0] and ours[3] < white[3]


def test_pyramid_noise_has_unit_variance_in_each_sample_whatever_its_company():
    found = draws(Pyramid(discount=0.9, levels=8), 50)
    torch.testing.assert_close(found.flatten(1).std(1), torch.ones(50))


def test_pyramid_noise_of_one_level_is_white():
    assert spectrum(draws(Pyramid(levels=1), 400)) == pytest.approx([1.0, 2.0, 1.0, 1.0], rel=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pyramid(discount=1.1), "discount must lie in"),
        (lambda: Pyramid(discount=-0.1), "discount must lie in"),
        (lambda: Pyramid(levels=0), "levels must be at least 1"),
    ],
)
def test_what_is_no_pyramid_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
