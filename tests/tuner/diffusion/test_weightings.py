"""Each weighting against its published formula at every time, for each prediction; and laws of all of them."""

import math

import pytest
import torch
from torch import Tensor

from tuner.diffusion.prediction import Clean as CleanPrediction
from tuner.diffusion.prediction import Epsilon, FlowVelocity, Prediction, Velocity
from tuner.diffusion.schedule import Flow, Schedule, flow_share, rescale_zero_terminal_snr, scaled_linear
from tuner.diffusion.weightings.base import Weighting
from tuner.diffusion.weightings.clean import Clean
from tuner.diffusion.weightings.cosmap import CosMap
from tuner.diffusion.weightings.debiased import Debiased
from tuner.diffusion.weightings.edm import Edm
from tuner.diffusion.weightings.min_snr import MinSnr
from tuner.diffusion.weightings.p2 import P2
from tuner.diffusion.weightings.sigma_sqrt import SigmaSqrt
from tuner.diffusion.weightings.soft_min_snr import SoftMinSnr
from tuner.diffusion.weightings.uniform import Uniform
from tuner.plugins import Folder

EVERY = [Folder("tuner.diffusion.weightings").find(name)() for name in Folder("tuner.diffusion.weightings").names()]
MORE = [
    MinSnr(gamma=1.0),
    SoftMinSnr(gamma=1.0),
    Debiased(convention="output"),
    P2(gamma=0.5, k=2.0),
    Edm(sigma_data=1.0),
    SigmaSqrt(least=0.2),
]
DISCRETE = torch.arange(1000)
CONTINUOUS = torch.arange(1, 1001) - 0.5
PAIRS: list[tuple[Prediction, Schedule, Tensor]] = [
    (Epsilon(), scaled_linear(), DISCRETE),
    (Velocity(), scaled_linear(), DISCRETE),
    (CleanPrediction(), scaled_linear(), DISCRETE),
    (Velocity(), rescale_zero_terminal_snr(scaled_linear()), DISCRETE),
    (FlowVelocity(), Flow(), CONTINUOUS),
]


def levels(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, on the circle or the straight line that float32 is next to."""
    alpha, sigma = (level.double() for level in schedule.alpha_sigma(times))
    radius = alpha + sigma if isinstance(schedule, Flow) else (alpha**2 + sigma**2).sqrt()
    return alpha / radius, sigma / radius


def output_weight(weighting: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """As the objective has it."""
    gain = prediction.x_0_gain(alpha, sigma)
    return weighting.x_0_weight(alpha, sigma, gain) * gain**2


def published(weighting: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The weight of the output's squared error, as its source has it for this prediction."""
    snr, s = (alpha / sigma) ** 2, sigma
    match weighting, prediction:
        case Uniform(), _:
            return torch.ones_like(snr)
        case MinSnr(gamma=g), Epsilon():  # Hang et al., eq. 6 and appendix
            return snr.clamp(max=g) / snr
        case MinSnr(gamma=g), Velocity():
            return snr.clamp(max=g) / (snr + 1)
        case MinSnr(gamma=g), CleanPrediction():
            return snr.clamp(max=g)
        case MinSnr(gamma=g), FlowVelocity():  # the same loss of x_0, whose error is s times that of the velocity
            return torch.minimum((1 - s) ** 2, g * s**2)
        case SoftMinSnr(gamma=g), Epsilon():  # Crowson et al., eq. 9: 1 / (n² + 1 / gamma) on x_0, n² = 1 / SNR
            return g / (snr + g)
        case SoftMinSnr(gamma=g), Velocity():
            return snr * g / ((snr + g) * (snr + 1))
        case SoftMinSnr(gamma=g), CleanPrediction():
            return 1 / (1 / snr + 1 / g)
        case SoftMinSnr(gamma=g), FlowVelocity():
            return g * (1 - s) ** 2 * s**2 / ((1 - s) ** 2 + g * s**2)
        case Debiased(), Epsilon():  # Yu et al., eq. 10; sd-scripts and OneTrainer
            return 1 / snr.sqrt()
        case Debiased(convention="paper"), Velocity():
            return snr.sqrt() / (snr + 1)
        case Debiased(convention="output"), Velocity():  # OneTrainer
            return 1 / (snr + 1).sqrt()
        case Debiased(convention="paper"), CleanPrediction():
            return snr.sqrt()
        case Debiased(convention="output"), CleanPrediction():
            return torch.ones_like(snr)
        case Debiased(convention="paper"), FlowVelocity():
            return s * (1 - s)
        case Debiased(convention="output"), FlowVelocity():
            return s
        case Clean(), Epsilon():
            return 1 / snr
        case Clean(), Velocity():  # sd-scripts' debiased estimation for v
            return 1 / (snr + 1)
        case Clean(), CleanPrediction():
            return torch.ones_like(snr)
        case Clean(), FlowVelocity():
            return s**2
        case P2(gamma=g, k=k), Epsilon():  # Choi et al., eq. 8, over L_simple
            return 1 / (k + snr) ** g
        case P2(gamma=g, k=k), Velocity():
            return snr / (snr + 1) / (k + snr) ** g
        case P2(gamma=g, k=k), CleanPrediction():
            return snr / (k + snr) ** g
        case P2(gamma=g, k=k), FlowVelocity():
            return (1 - s) ** 2 / (k + snr) ** g
        case Edm(sigma_data=d), CleanPrediction():  # Karras et al., table 1
            n = sigma / alpha
            return (n**2 + d**2) / (n * d) ** 2
        case Edm(sigma_data=d), Epsilon():
            return 1 + 1 / (snr * d**2)
        case Edm(sigma_data=d), Velocity():
            return (snr + d**-2) / (snr + 1)
        case Edm(sigma_data=d), FlowVelocity():
            return (1 - s) ** 2 + (s / d) ** 2
        case CosMap(), FlowVelocity():  # Esser et al., eq. 21
            return 2 / (math.pi - 2 * math.pi * s + 2 * math.pi * s**2)
        case SigmaSqrt(least=least), FlowVelocity():  # diffusers' compute_loss_weighting_for_sd3
            return s.clamp(min=least) ** -2.0
        case ((CosMap() | SigmaSqrt()), _):  # the flow's own weight at equal SNR; errors by way of x_0
            flow = flow_share(alpha, sigma)
            own = published(weighting, FlowVelocity(), 1 - flow, flow)
            return own * (prediction.x_0_gain(alpha, sigma) / flow) ** 2
        case _:
            raise AssertionError(f"write down the published weight of {weighting} for {prediction}")


@pytest.mark.parametrize("weighting", EVERY + MORE, ids=str)
@pytest.mark.parametrize(("prediction", "schedule", "times"), PAIRS, ids=lambda value: type(value).__name__)
def test_the_weight_of_the_output_is_the_published_one_at_every_time(weighting, prediction, schedule, times):
    alpha, sigma = levels(schedule, times)
    expected = published(weighting, prediction, alpha, sigma)
    torch.testing.assert_close(output_weight(weighting, prediction, alpha, sigma), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", EVERY + MORE, ids=str)
@pytest.mark.parametrize(("prediction", "schedule", "times"), PAIRS, ids=lambda value: type(value).__name__)
def test_no_weight_is_negative_or_infinite_in_float32(weighting, prediction, schedule, times):
    """The schedule with no signal at its last time included, where SNR is 0 and 1 / SNR is not a number to use."""
    alpha, sigma = schedule.alpha_sigma(times)
    weight = output_weight(weighting, prediction, alpha, sigma)
    assert weight.dtype == torch.float32 and bool(weight.isfinite().all()) and bool((weight >= 0).all())
    exact = output_weight(weighting, prediction, alpha.double(), sigma.double())
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("weighting", [Clean(), CosMap(), Debiased(), Edm(), MinSnr(), P2(), SigmaSqrt(), SoftMinSnr()])
def test_what_is_said_of_x_0_is_one_loss_whatever_is_predicted(weighting):
    """Only `uniform`, and `debiased` by its other convention, are about the output itself."""
    alpha, sigma = levels(scaled_linear(), DISCRETE)
    gains = [prediction.x_0_gain(alpha, sigma) for prediction in (Epsilon(), Velocity(), CleanPrediction())]
    weights = [weighting.x_0_weight(alpha, sigma, gain) for gain in gains]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("weighting", [Clean(), CosMap(), Debiased(), Edm(), MinSnr(), P2(), SigmaSqrt(), SoftMinSnr()])
def test_a_weight_of_x_0_is_a_function_of_the_snr_alone(weighting):
    """So it means on the flow's straight line what it means on a circle."""
    alpha, sigma = levels(scaled_linear(), DISCRETE)
    s = flow_share(alpha, sigma)
    torch.testing.assert_close(
        weighting.x_0_weight(1 - s, s, s), weighting.x_0_weight(alpha, sigma, sigma), rtol=1e-9, atol=0
    )


def test_edm_with_data_of_unit_variance_is_the_plain_loss_of_v():
    alpha, sigma = levels(scaled_linear(), DISCRETE)
    weight = output_weight(Edm(sigma_data=1.0), Velocity(), alpha, sigma)
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=1e-6, atol=0)


def test_soft_min_snr_is_half_of_gamma_where_min_snr_has_its_corner():
    at = torch.tensor([0.01, 5.0, 1e4], dtype=torch.float64).sqrt()
    weight = SoftMinSnr(gamma=5.0).x_0_weight(at, torch.ones_like(at), at)
    assert weight[1] == pytest.approx(2.5)
    hard = MinSnr(gamma=5.0).x_0_weight(at, torch.ones_like(at), at)
    torch.testing.assert_close(weight[[0, 2]], hard[[0, 2]], rtol=3e-3, atol=0)


def test_the_cosmap_weight_is_the_density_of_the_cosmap_times():
    """Uniform times so weighted, and times so drawn, are the same loss."""
    from tuner.diffusion.timesteps.cosmap import CosMap as CosMapTimes

    u = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    drawn = (CosMapTimes().quantile(u, (8, 8)) ** 3).mean()
    weighted = (output_weight(CosMap(), FlowVelocity(), 1 - u, u) * u**3).mean()
    assert float(drawn) == pytest.approx(float(weighted), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftMinSnr(gamma=0.0), "gamma must be positive"),
        (lambda: P2(gamma=-0.1), "gamma must be 0 or more"),
        (lambda: P2(k=0.0), "k positive"),
        (lambda: Edm(sigma_data=0.0), "sigma_data must be positive"),
        (lambda: SigmaSqrt(least=0.0), "least must lie in"),
    ],
)
def test_what_weighs_nothing_or_divides_by_zero_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
