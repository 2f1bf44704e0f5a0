"""Laws of every merge method: of each file in `merge/methods`.

That inputs stay as they were and that every number is written, `tests.merge.memory.apply` asserts in each of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from itertools import permutations, product
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from merge.coefficients import Number
from merge.methods.base import GRID, Elementwise, MergeMethod, Space
from merge.methods.posthoc_ema import PosthocEma
from tests.merge.memory import apply, same_bits
from tuner.plugins import Folder, read, write

METHODS = Folder("merge.methods")
EXAMPLES: dict[str, MergeMethod] = {
    "posthoc_ema": PosthocEma(snapshot_steps=(100, 100, 200), snapshot_sigma_rel=(0.05, 0.1, 0.1), sigma_rel=0.07),
}
"""What stands for a method that cannot be made without settings, or does nothing without."""
SHAPES = [(), (1,), (7,), (8, 1), (1, 8), (5, 4), (6, 5, 1, 1), (1, 5, 3, 3), (4, 3, 3, 3), (0,)]
SHAPE = (6, 5, 3, 3)

SIGN_CONSENSUS = ("breadcrumbs_ties", "dare_ties", "della", "ties")
ADDED_UP = "equal differences add up"
THINNED = "it leaves small differences out"
RANDOM = "it leaves differences out at random"
NOT_IDEMPOTENT = {
    "breadcrumbs": ADDED_UP,
    "breadcrumbs_ties": THINNED,
    "dare_linear": RANDOM,
    "dare_ties": RANDOM,
    "della": RANDOM,
    "della_linear": RANDOM,
    "magnitude": ADDED_UP,
    "perpendicular": "what is new in the second is nothing",
    "ram": THINNED,
    "sce": "what all inputs agree about is left out",
    "task_arithmetic": ADDED_UP,
    "ties": THINNED,
}
"""Methods that take equal inputs and give something else, and why."""
SYMMETRIC = {
    *("lerp", "geometric", "multiply_difference", "euclidean_add_difference"),
}
"""Methods of two inputs that count the same with the default settings; all that repeat are judged anyway."""
ORDERED = {
    "dare_linear": RANDOM,
    "dare_ties": RANDOM,
    "della": RANDOM,
    "della_linear": RANDOM,
    "posthoc_ema": "each input has its step",
}
"""Methods whose inputs repeat but are not alike, and why."""
FIRST_APART = {"clamp": "the first is clamped, the others are bounds"}
"""Methods whose first input stands apart from those that repeat, though its space is theirs."""
UNEVEN = {"weights": (1.0, -2.0, 0.5)}
BASES: dict[tuple[str, str], dict[str, object]] = {
    ("lerp", "curve"): {"t": 0.3},
    ("ram", "alpha"): {"r": 0.5},
    ("sce", "of"): {"select": 0.5},
    **{(name, field): UNEVEN for name in SIGN_CONSENSUS for field in ("elect", "divide")},
    **{(name, "draw"): {"elect": "count"} for name in SIGN_CONSENSUS},
}
"""Settings with which a field counts that does nothing by default."""
OTHERS: dict[tuple[str, str], object] = {
    ("posthoc_ema", "snapshot_steps"): (100, 150, 200),
    ("posthoc_ema", "snapshot_sigma_rel"): (0.05, 0.2, 0.1),
    ("posthoc_ema", "sigma_rel"): 0.06,
    ("posthoc_ema", "step"): 150,
    ("smooth_add", "median"): 1,
}
"""Another value of a field, where none can be made up from its type."""

every_method = pytest.mark.parametrize("name", METHODS.names())


def example(name: str) -> Any:
    """The method, with its default settings as far as it has any."""
    return EXAMPLES.get(name) or METHODS.find(name)()


def spaces(name: str) -> list[Space]:
    """The spaces of as many inputs as a method is tried with; where one may recur it does so three times."""
    method = example(name)
    if isinstance(method, PosthocEma):
        return [Space.WEIGHT] * len(method.snapshot_steps)
    return [*method.takes, *([method.takes[-1]] * 2 if method.repeats else [])]


def inputs(name: str, shape: Sequence[int] = SHAPE, *, seed: int = 0) -> list[Tensor]:
    """Models of one base, or differences from it; every number is one of float16, and some differences coincide."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.05 * torch.randn(shape, generator=generator)
    made: list[Tensor] = []
    for space in spaces(name):
        difference = 0.01 * torch.randn(shape, generator=generator)
        coarse = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        difference = torch.where(coarse, (difference * 256).round() / 256, difference)
        made.append((difference if space is Space.DELTA else base + difference).half().float())
    return made


def variations(name: str) -> Iterator[tuple[str, MergeMethod, MergeMethod]]:
    """Every field, a method, and the same method with another value of that field alone."""
    kind: Any = METHODS.find(name)
    hints = get_type_hints(kind)
    for field in fields(kind):
        base = replace(example(name), **BASES.get((name, field.name), {}))
        if (name, field.name) in OTHERS:
            others = [OTHERS[name, field.name]]
        else:
            others = other_values(hints[field.name], getattr(base, field.name), len(spaces(name)))
        assert others, f"say in OTHERS what {field.name} of {name} may be beside {getattr(base, field.name)}"
        for other in others:
            yield f"{field.name}={other}", base, replace(base, **{field.name: other})


def other_values(hint: Any, value: Any, inputs: int) -> list[Any]:
    """Values of the type `hint` other than `value`."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if choice != value]
    if hint == tuple[Number, ...]:
        return [tuple(float(2 + index) for index in range(inputs))]
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1]
        case float():
            return [0.25 if value != 0.25 else 0.75]
        case _:
            return []


def test_there_are_methods_to_be_judged():
    assert {"lerp", "weighted_sum", "add_difference", "ram", "smooth_add"} <= set(METHODS.names())


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_shape_works_and_stays(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    result = apply(example(name), *inputs(name, shape), dtype=dtype)
    assert result.shape == shape and result.dtype == dtype
    assert result.isfinite().all()


@every_method
def test_zeros_give_finite_numbers(name: str):
    tensors = inputs(name)
    zeros = torch.zeros(SHAPE)
    assert apply(example(name), *[zeros] * len(tensors)).isfinite().all()
    for index in range(len(tensors)):
        assert apply(example(name), *tensors[:index], zeros, *tensors[index + 1 :]).isfinite().all(), index
        assert (
            apply(example(name), *[zeros] * index, tensors[index], *[zeros] * (len(tensors) - index - 1))
            .isfinite()
            .all()
        )


@every_method
def test_how_a_tensor_is_cut_changes_no_bit(name: str):
    tensors = inputs(name)
    numbers = math.prod(SHAPE)
    whole = apply(example(name), *tensors)
    for runs in ([1, numbers - 1], [7, 64, 100, numbers - 171], [1] * numbers):
        assert same_bits(apply(example(name), *tensors, runs=runs), whole)


@every_method
def test_a_tensor_longer_than_the_grid_may_be_cut_anywhere(name: str):
    tensors = inputs(name, (514, 514))
    numbers = 514 * 514
    assert GRID < numbers < 2 * GRID
    whole = apply(example(name), *tensors)
    assert same_bits(apply(example(name), *tensors, runs=[9, 100_000, numbers - 100_009]), whole)


@every_method
def test_a_model_merged_with_itself_is_that_model(name: str):
    method = example(name)
    taken = set(spaces(name))
    if len(taken) > 1 or (taken == {Space.WEIGHT} and method.gives is Space.DELTA):
        pytest.skip("its inputs cannot be equal, or are what its result is not")
    model = inputs(name)[0]
    result = apply(method, *[model] * len(spaces(name))).half().float()  # what is written
    if name in NOT_IDEMPOTENT:
        assert not torch.equal(result, model), f"it is idempotent: remove {name} from NOT_IDEMPOTENT"
    else:
        assert torch.equal(result, model)


@every_method
def test_no_option_is_dead(name: str):
    tensors = inputs(name)
    for what, method, other in variations(name):
        assert not same_bits(apply(method, *tensors), apply(other, *tensors)), what


@every_method
def test_what_is_called_unchanged_is_that_input(name: str):
    tensors = inputs(name)
    candidates: list[Any] = [example(name)]
    for field in fields(example(name)):
        value = getattr(example(name), field.name)
        values: list[object] = [0.0, 1.0] if isinstance(value, float) else []
        if field.name == "weights":
            values = [tuple(float(i == j) for j in range(len(tensors))) for i in range(len(tensors))]
        for method in list(candidates):
            for other in values:
                try:
                    candidates.append(replace(method, **{field.name: other}))
                except ValueError:
                    continue  # out of its range
    spoilt = torch.full(SHAPE, torch.nan)
    spoilt[0] = torch.inf
    for method in candidates:
        same = method.unchanged()
        if same is not None:
            signed = tensors[same].clone()
            signed[-1, -1] = -0.0
            others = [spoilt] * len(tensors) if isinstance(method, Elementwise) else list(tensors)
            others[same] = signed
            if isinstance(method, Elementwise):
                assert same_bits(apply(method, *others), signed), method
                assert same_bits(apply(method, *others, dtype=torch.float64), signed.double()), method
            else:
                assert torch.equal(apply(method, *others).half().float(), signed), method


@every_method
def test_inputs_that_count_the_same_may_change_places(name: str):
    tensors = inputs(name)
    if name in ORDERED or not (example(name).repeats or name in SYMMETRIC):
        pytest.skip(ORDERED.get(name, "its inputs are not alike"))
    first = 1 if name in FIRST_APART else 0
    result = apply(example(name), *tensors)
    for order in permutations(tensors[first:]):
        torch.testing.assert_close(apply(example(name), *tensors[:first], *order), result, rtol=1e-5, atol=1e-8)


@every_method
def test_what_is_written_is_half_a_step_of_float16_from_the_exact_result(name: str):
    base = example(name)
    if not isinstance(base, Elementwise):
        pytest.skip("what it finds by looking at a whole tensor, it finds in float64")
    tensors = inputs(name)
    rounding = 2**-21 * torch.stack(tensors).abs().sum(0)  # of float32, in what may cancel
    for method in [base, *(other for _, *both in variations(name) for other in both)]:
        exact = apply(method, *tensors, dtype=torch.float64)
        written = apply(method, *tensors).half().double()
        step = 2.0 ** (exact.abs().clamp(min=2**-14).log2().floor() - 10)
        assert ((written - exact).abs() <= 0.5 * step + rounding).all(), method


@every_method
def test_a_nan_stays_visible(name: str):
    method = example(name)
    if not isinstance(method, Elementwise):
        pytest.skip("inputs that are not finite have been refused, or count by what they are")
    tensors = inputs(name)
    for index in range(len(tensors)):
        spoilt = [tensor.clone() for tensor in tensors]
        spoilt[index].view(-1)[5] = torch.nan
        result = apply(method, *spoilt).view(-1)
        assert result[5].isnan() and result.isnan().sum() == 1


SPREADING = {"add", "add_difference", "lerp", "scale", "subtract", "task_arithmetic", "weighted_sum"}


@every_method
def test_what_is_not_finite_never_gets_through_a_method_that_says_so(name: str):
    """Two infinities, too, which may cancel."""
    tensors = inputs(name)
    methods = [example(name), *(method for _, *both in variations(name) for method in both)]
    spreading = [method for method in methods if isinstance(method, Elementwise) and method.spreads()]
    assert bool(spreading) == (name in SPREADING)
    places = [(index,) for index in range(len(tensors))] + [tuple(range(len(tensors)))]
    for method, indices, value in product(spreading, places, (torch.nan, torch.inf, -torch.inf)):
        spoilt = [tensor.clone() for tensor in tensors]
        for index in indices:
            spoilt[index].view(-1)[5] = value
        for dtype in (torch.float32, torch.float64):
            assert not apply(method, *spoilt, dtype=dtype).view(-1)[5].isfinite(), method


@every_method
def test_it_is_written_in_a_config_as_it_was_read(name: str):
    method = example(name)
    assert read(METHODS.find(name), write(method)) == method
    for _, _, other in variations(name):
        assert read(METHODS.find(name), write(other)) == other


@every_method
def test_it_says_what_it_takes_and_gives(name: str):
    kind: Any = METHODS.find(name)
    assert issubclass(kind, MergeMethod) and METHODS.name_of(kind) == name
    assert kind.takes and (kind.gives is not Space.EITHER or Space.EITHER in kind.takes)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), "a method's formula is its docstring"
    assert all(field.default is not MISSING or name in EXAMPLES for field in fields(kind)), "settings have defaults"
