"""The loop: one update is one global batch, however it is split, and nothing that is not finite gets into a weight."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests import toy
from tuner.diffusion.objective import Loss, Objective
from tuner.errors import DivergedError
from tuner.methods.base import Method
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.optim.adamw import AdamW
from tuner.optim.schedules.linear import Linear
from tuner.training.ema import Ema

METHODS = pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(rank=4, conv_rank=2)], ids=["full", "lora"])


def begin(method: Method | None = None, **options: Any) -> Any:
    model = toy.ToyModel()
    return toy.trainer(model, (method or Full()).attach(model, seed=0), **options)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.trainable.state().items()}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@METHODS
def test_an_update_is_the_same_however_its_batch_is_split(method):
    """In micro-batches of 8, 4, 3 and 1, with several buckets, weights and a tail in each."""
    runs = {size: begin(method, micro_batch=size) for size in (8, 4, 3, 1)}
    reports = {size: toy.train(trainer, 20) for size, trainer in runs.items()}
    counts = {size: len(next(trainer.stream(0)).micro_batches) for size, trainer in runs.items()}
    assert counts == {8: 3, 4: 3, 3: 4, 1: 8}  # three buckets, of which the largest is in parts of 3 and a tail
    for size in (4, 3, 1):
        assert furthest(weights(runs[size]), weights(runs[8])) <= 1e-6
        assert [r.loss for r in reports[size]] == pytest.approx([r.loss for r in reports[8]], abs=1e-6)
        assert [r.grad_norm for r in reports[size]] == pytest.approx([r.grad_norm for r in reports[8]], rel=1e-4)
    assert furthest(weights(runs[8]), weights(begin(method))) > 1e-2


def test_the_loss_is_the_weighted_mean_over_the_global_batch():
    trainer = begin(micro_batch=2)
    objective, total, weight = Objective(), 0.0, 0.0
    for batch in next(trainer.stream(0)).micro_batches:
        per_example = objective.loss(trainer.model, batch).weighted
        total += float((per_example * batch.weight).sum().detach())
        weight += float(batch.weight.sum())
    (report,) = toy.train(trainer, 1)
    assert report.loss == pytest.approx(total / weight, rel=1e-6)
    assert weight not in (8.0, float(len(toy.WEIGHTS))), "the weights are all alike"


def test_gradients_are_clipped_once_an_update_and_together():
    """By the norm of the whole batch's gradient, not of a micro-batch's or a tensor's."""
    free, tight = begin(micro_batch=1, clip_norm=None), begin(micro_batch=8, clip_norm=1e-3)
    norms = [trainer.train_step(next(trainer.stream(0))).grad_norm for trainer in (free, tight)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1
    whole = begin(micro_batch=8)
    batch = next(whole.stream(0))
    loss = sum((whole.objective.loss(whole.model, b).weighted * b.weight).sum() for b in batch.micro_batches)
    gradient = torch.autograd.grad(loss / batch.weight, list(whole.trainable.parameters().values()))
    assert norms[0] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradient)), rel=1e-5)

    seen: list[float] = []
    clipped = begin(micro_batch=1, clip_norm=0.01, optimizer=AdamW(lr=1e-2))
    step = clipped.optimizer.step

    def spy() -> None:
        gradients = [p.grad for p in clipped.trainable.parameters().values()]
        seen.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        step()

    clipped.optimizer.step = spy
    toy.train(clipped, 3)
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)


class Spoilt(Objective):
    """NaN for one sample, in the loss or in the gradient alone."""

    def __init__(self, sample: int, where: str) -> None:
        super().__init__()
        object.__setattr__(self, "sample", sample)
        object.__setattr__(self, "where", where)

    def loss(self, model: Any, batch: Any, t: Any = None) -> Loss:
        loss = super().loss(model, batch, t)
        spoilt = torch.tensor([at.sample == self.sample for at in batch.positions])
        if self.where == "loss":
            return replace(loss, weighted=torch.where(spoilt, float("nan"), loss.weighted))
        root = torch.where(spoilt, (loss.weighted * 0).abs().sqrt(), torch.zeros(()))  # 0, with a slope that is none
        return replace(loss, weighted=loss.weighted + root)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@METHODS
def test_a_value_that_is_not_finite_stops_before_anything_is_updated(method, where):
    trainer = begin(method, micro_batch=2, ema=Ema(decay=0.9), name_of=lambda sample: f"pictures/{sample}.png")
    toy.train(trainer, 3)
    before, average, moments = weights(trainer), dict(trainer.ema.average), trainer.optimizer.state_dict()["state"]
    before_average = {name: tensor.clone() for name, tensor in average.items()}
    steps = [float(state["step"]) for state in moments.values()]
    trainer.objective = Spoilt(5, where)
    with pytest.raises(DivergedError) as failure:
        toy.train(trainer, 1)
    message = str(failure.value)
    assert message.startswith(f"update 4: the {where} is not finite")
    pictures = message.partition("its pictures ")[2].partition(";")[0].split(", ")
    assert "pictures/5.png" in pictures and "lower optimizer.lr" in message
    assert len(pictures) == (1 if where == "loss" else 6)  # whose loss it is is known, whose gradient is not
    assert trainer.samples_seen == 24 and furthest(weights(trainer), before) == 0
    assert furthest(trainer.ema.average, before_average) == 0
    assert [float(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()] == steps


def test_reports_count_updates_and_samples_and_tell_the_learning_rate():
    trainer = begin(
        Full(text_encoder=True, text_encoder_lr=1e-4), learning_rate=Linear(warmup=2), samples=40, batch_size=8
    )
    reports = toy.train(trainer, 5)
    assert [report.update for report in reports] == [1, 2, 3, 4, 5]
    assert [report.samples_seen for report in reports] == [8, 16, 24, 32, 40]
    expected = [1e-2 * Linear(warmup=2).factor(update, 5) for update in range(5)]
    assert [report.lr for report in reports] == pytest.approx(expected)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [expected[-1], expected[-1] / 100]
    )
    assert not any(report.skipped for report in reports)


class Loud(Objective):
    """A hundred times the loss."""

    def loss(self, model: Any, batch: Any, t: Any = None) -> Loss:
        loss = super().loss(model, batch, t)
        return replace(loss, weighted=100 * loss.weighted)


@pytest.fixture
def half(monkeypatch) -> Any:
    """A trainer with torch's own loss scaler, as float16 on a GPU has it."""
    accelerator = Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    for name, value in {"native_amp": True, "autocast": contextlib.nullcontext, "scaler": scaler}.items():
        monkeypatch.setattr(accelerator, name, value)
    monkeypatch.setattr(accelerator, "prepare_model", lambda network: network)
    trainer = begin(accelerator=accelerator, objective=Loud(), ema=Ema(decay=0.9))
    assert not any(report.skipped for report in toy.train(trainer, 2))
    return trainer


def test_gradients_that_overflow_in_float16_leave_the_update_out_and_lower_the_loss_scale(half):
    """Neither weights nor moments nor the average move."""
    scaler = half.accelerator.scaler
    scaler.update(2.0**127)  # the gradients of such a loss are infinite
    before, average = weights(half), {name: tensor.clone() for name, tensor in half.ema.average.items()}
    moments = {id(state): state["exp_avg"].clone() for state in half.optimizer.state.values()}
    reports = toy.train(half, 1)
    assert reports[0].skipped and not math.isfinite(reports[0].grad_norm) and math.isfinite(reports[0].loss)
    assert furthest(weights(half), before) == 0 == furthest(half.ema.average, average)
    assert all(torch.equal(moments[id(state)], state["exp_avg"]) for state in half.optimizer.state.values())
    assert scaler.get_scale() == 2.0**126 and half.samples_seen == 24
    while reports[-1].skipped:
        reports += toy.train(half, 1)
    assert len(reports) > 3 and furthest(weights(half), before) > 0  # and then it learns again
    assert reports[-1].grad_norm < 1000  # the gradient itself, without the scale


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run(half):
    half.accelerator.scaler.update(16.0)
    half.objective, before = Spoilt(5, "gradient"), weights(half)
    with pytest.raises(DivergedError, match="the gradient is not finite"):
        toy.train(half, 100)
    assert furthest(weights(half), before) == 0 and half.accelerator.scaler.get_scale() == 1


class Watcher:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self, trainer: Any) -> None:
        self.heard.append("start")

    def after_step(self, trainer: Any, report: Any) -> None:
        self.heard.append(str(report.samples_seen))

    def finish(self, trainer: Any) -> None:
        self.heard.append("finish")


@pytest.mark.parametrize(("samples", "seen"), [(24, 24), (20, 24), (17, 24), (1, 8)])
def test_the_last_update_may_go_past_the_end_by_less_than_a_batch(samples, seen):
    trainer = begin(samples=samples, watchers=(watcher := Watcher(),))
    trainer.fit()
    assert trainer.samples_seen == seen and trainer.complete and not trainer.stopped
    assert trainer.updates == trainer.update == seen // 8
    assert watcher.heard == ["start", *(str(place) for place in range(8, seen + 1, 8)), "finish"]


def test_a_stop_comes_after_the_update_at_hand():
    watcher = Watcher()
    trainer = begin(samples=80, watchers=(watcher,), stop_asked=lambda: "16" in watcher.heard)
    trainer.fit()
    assert watcher.heard == ["start", "8", "16", "24", "finish"]
    assert trainer.stopped and not trainer.complete


def test_a_complete_run_trains_no_more():
    trainer = begin(samples=16, watchers=(watcher := Watcher(),))
    trainer.fit()
    before = weights(trainer)
    trainer.fit()
    assert furthest(weights(trainer), before) == 0 and watcher.heard[-2:] == ["start", "finish"]


def test_the_average_follows_the_weights_by_its_formula():
    trainer = begin(ema=Ema(decay=0.7))
    expected = weights(trainer)
    for update in range(1, 9):
        toy.train(trainer, 1)
        decay = min(0.7, (1 + update) / (10 + update))
        expected = {name: decay * expected[name] + (1 - decay) * now for name, now in weights(trainer).items()}
    assert (1 + 8) / (10 + 8) < 0.7  # the warm-up of the decay is what was tested
    assert furthest(trainer.ema.average, expected) < 1e-6
    assert {tensor.dtype for tensor in trainer.ema.average.values()} == {torch.float32}


def test_a_high_count_of_updates_leaves_the_decay_that_was_asked_for():
    ema = Ema(decay=0.5, average={"w": torch.zeros(1)}, updates=1000)
    ema.update({"w": torch.ones(1)})
    assert ema.average["w"] == 0.5 and ema.updates == 1001


def test_the_average_is_published_for_the_time_of_a_with_and_the_weights_come_back_bit_for_bit():
    trainer = begin(ema=Ema(decay=0.99))
    toy.train(trainer, 5)
    before = weights(trainer)
    with trainer.published_weights():
        assert furthest(weights(trainer), trainer.ema.average) == 0
    assert furthest(weights(trainer), before) == 0 and furthest(trainer.ema.average, before) > 1e-3
    with pytest.raises(RuntimeError, match="preview failed"), trainer.published_weights():
        raise RuntimeError("preview failed")
    assert furthest(weights(trainer), before) == 0


def test_without_an_average_the_weights_themselves_are_published():
    trainer = begin()
    before = weights(trainer)
    with trainer.published_weights():
        assert furthest(weights(trainer), before) == 0


def test_a_run_that_has_an_average_only_since_it_was_resumed_begins_it_at_the_resumed_weights():
    old = begin()
    toy.train(old, 5)
    new = begin(ema=Ema(decay=0.999))
    new.load_state(old.samples_seen, old.trainable.state(), old.optimizer.state_dict())
    assert furthest(new.ema.average, weights(old)) == 0 and new.ema.updates == 0
    toy.train(new, 1)
    assert furthest(new.ema.average, weights(old)) > 0, "the average is the weights themselves"
