"""Random recipes over random little models, against an interpreter that knows whole tensors and float64 only.

It shares nothing with `merge` but the recipe: formulas are those of the methods' docstrings, blocks a table.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge import command

SHAPES = {
    "unet.conv_in.weight": (8, 4, 3, 3),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 768),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": (8, 8),
    "unet.down_blocks.1.resnets.0.time_emb_proj.bias": (13,),
    "unet.mid_block.resnets.0.conv1.weight": (8, 8, 3, 3),
    "unet.up_blocks.3.resnets.2.conv2.bias": (8,),
    "unet.conv_out.weight": (4, 8, 3, 3),
    "vae.encoder.conv_in.weight": (8, 3, 3, 3),
    "vae.decoder.conv_out.bias": (3,),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
    "text_encoder.text_model.embeddings.token_embedding.weight": (100, 16),
}
LABELS = ["IN00", "IN01", "IN01", "IN04", "M00", "OUT11", "OUT11", "VAE", "VAE", "BASE", "BASE"]
BLOCKS = dict(zip(SHAPES, LABELS, strict=True))
PATTERNS = ["*attn2*", "*.bias", "unet.conv*", "*.weight", "vae.*", "*", "*to_?.weight"]
LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    ),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    ),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": "lora_te_text_model_encoder_layers_0_mlp_fc1",
}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""What models and outputs are in."""

Model = dict[str, Tensor]
W, D, E = "weight", "delta", "either"


def angle(a: Tensor, b: Tensor) -> float:
    u, v = a / a.norm(), b / b.norm()
    return 2 * math.atan2((u - v).norm().item(), (u + v).norm().item())


def pointing(x: Sequence[Tensor]) -> None:
    """Give a case up in which rounding decides where something points."""
    assume(all(tensor.abs().max() > 1e-3 for tensor in x))


def slerp(x: Sequence[Tensor], t: float) -> Tensor:
    pointing(x)
    a, b = x
    theta = angle(a, b)
    if theta > math.pi - 1e-5 or theta == 0:
        return (1 - t) * a + t * b
    direction = (math.sin((1 - t) * theta) * a / a.norm() + math.sin(t * theta) * b / b.norm()) / math.sin(theta)
    return direction * ((1 - t) * a.norm() + t * b.norm())


def perpendicular(x: Sequence[Tensor]) -> Tensor:
    pointing(x)
    a, b = x
    return b - a * (a * b).sum() / (a * a).sum()


def trim(d: Tensor, density: float) -> Tensor:
    kept = max(int(density * d.numel() + 1e-6), 1) if density > 0 else 0
    places = d.abs().reshape(-1).sort(descending=True, stable=True).indices[:kept]
    out = torch.zeros_like(d).reshape(-1)
    out[places] = d.reshape(-1)[places]
    return out.reshape(d.shape)


def ties(x: Sequence[Tensor], density: float, scale: float, weights: Sequence[float]) -> Tensor:
    trimmed = torch.stack([trim(d, density) for d in x])
    by = torch.tensor(weights or [1.0] * len(x), dtype=torch.float64).reshape(-1, *[1] * x[0].ndim)
    elected = (by * trimmed).sum(0).sign()
    agreeing = ((by * trimmed).sign() == elected) & (elected != 0)
    total = torch.where(agreeing, by.abs(), 0).sum(0)
    return scale * torch.where(agreeing, by * trimmed, 0).sum(0) / torch.where(total == 0, 1, total)


def weighted(x: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    by = list(weights) or [1.0] * len(x)
    total = math.fsum(by) if normalize else 1.0
    return sum((w / total * each for w, each in zip(by, x, strict=True)), torch.zeros_like(x[0]))


def largest(x: Sequence[Tensor]) -> Tensor:
    high, low = torch.stack(tuple(x)).amax(0), torch.stack(tuple(x)).amin(0)
    return torch.where(high >= -low, high, low)


def clamped(x: Sequence[Tensor]) -> Tensor:
    bounds = torch.stack(tuple(x[1:]))
    return torch.minimum(torch.maximum(x[0], bounds.amin(0)), bounds.amax(0))


def train_difference(x: Sequence[Tensor], weight: float) -> Tensor:
    a, b, c = x
    sizes = (b - c).abs() + (b - a).abs()
    return a + 1.8 * weight * torch.where(sizes == 0, 0, (b - c) * (b - a).abs() / torch.where(sizes == 0, 1, sizes))


def geometric(x: Sequence[Tensor], t: float) -> Tensor:
    if t in (0, 1):
        return x[int(t)]
    return torch.where(x[0].sign() * x[1].sign() > 0, x[0].abs() ** (1 - t) * x[1].abs() ** t * x[0].sign(), 0)


def rows(x: Sequence[Tensor], width: float, offset: float) -> Tensor:
    a, b = x
    count = a.shape[0]
    begin, end = int(offset * count + 1e-6), int((offset + width) * count + 1e-6)
    out = a.clone()
    for row in range(begin, end):
        out[row % count] = b[row % count]
    return out


@dataclass(frozen=True)
class Kind:
    """What the interpreter knows of a method."""

    takes: str
    gives: str
    compute: Callable[..., Tensor]
    numbers: Mapping[str, tuple[float, float]]
    """Those that may vary, and their ranges."""
    repeats: bool = False
    weights: bool = False
    flags: Mapping[str, bool] | None = None


KINDS = {
    "lerp": Kind("ee", E, lambda x, t: (1 - t) * x[0] + t * x[1], {"t": (-0.5, 1.5)}),
    "weighted_sum": Kind("e", E, weighted, {}, True, True, {"normalize": True}),
    "task_arithmetic": Kind(
        "d", D, lambda x, weights, scale, normalize: scale * weighted(x, weights, normalize), {"scale": (-1, 1)}, True,
        True, {"normalize": False},
    ),
    "add": Kind("wd", W, lambda x, weight: x[0] + weight * x[1], {"weight": (-1.5, 1.5)}),
    "add_difference": Kind("www", W, lambda x, weight: x[0] + weight * (x[1] - x[2]), {"weight": (-1.5, 1.5)}),
    "subtract": Kind("ww", D, lambda x: x[0] - x[1], {}),
    "scale": Kind("e", E, lambda x, factor: factor * x[0], {"factor": (-1, 1.5)}),
    "sum_twice": Kind(
        "eee", E, lambda x, alpha, beta: (1 - beta) * ((1 - alpha) * x[0] + alpha * x[1]) + beta * x[2],
        {"alpha": (0, 1), "beta": (0, 1)},
    ),
    "triple_sum": Kind(
        "eee", E, lambda x, alpha, beta: (1 - alpha - beta) * x[0] + alpha * x[1] + beta * x[2],
        {"alpha": (0, 1), "beta": (0, 1)},
    ),
    "weighted_subtraction": Kind("ee", E, lambda x, t: (x[0] - t * x[1]) / (1 - t), {"t": (-1, 0.5)}),
    "slerp": Kind("ee", E, slerp, {"t": (0, 1)}),
    "perpendicular": Kind("dd", D, perpendicular, {}),
    "magnitude": Kind(
        "d", D, lambda x, weights, density, scale: scale * weighted([trim(d, density) for d in x], weights, False),
        {"density": (0, 1), "scale": (-1, 1)}, True, True,
    ),
    "ties": Kind("d", D, ties, {"density": (0, 1), "scale": (-1, 1)}, True, True),
    "maximum": Kind("ee", E, largest, {}, True),
    "clamp": Kind("eee", E, clamped, {}, True),
    "nearswap": Kind("ee", E, lambda x, t: x[0] + (x[1] - x[0]).clamp(-t, t), {"t": (0, 0.1)}),
    "train_difference": Kind("www", W, train_difference, {"weight": (-1, 1)}),
    "geometric": Kind("ee", E, geometric, {"t": (0, 1)}),
    "tensor_sum": Kind("ee", E, rows, {"width": (0, 1), "offset": (0, 1)}),
}  # fmt: skip
JUMPS = {"magnitude", "ties", "maximum", "geometric"}
"""Methods where rounding may decide between two numbers that are far apart."""


def at(number: Any, name: str) -> Any:
    """A number as a recipe writes it, for the tensor `name`."""
    if not isinstance(number, Mapping):
        return number
    for pattern, value in reversed(number.get("names", [])):
        if fnmatchcase(name, pattern):
            return value
    for label in ("VAE", "BASE") if BLOCKS[name] == "VAE" else (BLOCKS[name],):
        if label in number.get("blocks", {}):
            return number["blocks"][label]
    return number["default"]


@dataclass
class Case:
    """A recipe and the models it is for."""

    seed: int
    made: dict[str, tuple[str, float]]
    """The models' dtypes, and how far each is from what they have in common."""
    layers: list[str]
    """That the LoRA changes; none where there is no LoRA."""
    spaces: dict[str, str]
    recipe: dict[str, Any]
    files: dict[str, Model] = field(default_factory=dict[str, Model], init=False, repr=False)
    models: dict[str, Model] = field(default_factory=dict[str, Model], init=False, repr=False)
    """In float64: what the files mean."""

    def make(self) -> None:
        """Make the models."""
        rng = torch.Generator().manual_seed(self.seed)
        common = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
        for model, (dtype, near) in self.made.items():
            self.files[model] = {
                name: (one + near * torch.randn(one.shape, generator=rng)).to(DTYPES[dtype])
                for name, one in common.items()
            }
            self.models[model] = {name: tensor.double() for name, tensor in self.files[model].items()}
        if self.layers:
            self.files["lora"], self.models["lora"] = lora(rng, self.layers)

    def value(self, what: str, name: str) -> Tensor | None:
        """The tensor `name` of a model or step; None where it has none: a difference of nothing."""
        if what in self.models:
            return self.models[what].get(name)
        step = next(step for step in self.recipe["steps"] if step["name"] == what)
        numbers = {**DEFAULTS.get(step["method"]["type"], {}), **step["method"]}
        kind = KINDS[numbers.pop("type")]
        if kind.weights:
            numbers["weights"] = [at(number, name) for number in numbers.get("weights", [])]
        x = [self.value(each, name) for each in step["inputs"]]
        base = None if "base" not in step else self.value(step["base"], name)
        if "base" in step:
            x = [
                each if each is None or self.spaces[one] == D else each - base if base is not None else None
                for one, each in zip(step["inputs"], x, strict=True)
            ]
        if all(each is None for each in x):
            return base
        known = next(each for each in x if each is not None)
        if base is None and kind.takes == "wd" and x[1] is None:
            return x[0]
        x = [torch.zeros_like(known) if each is None else each for each in x]
        made = kind.compute(x, **{key: at(number, name) for key, number in numbers.items()})
        return made if base is None else base + made

    def result(self) -> Model:
        """All tensors of the output."""
        steps, parts = self.recipe["steps"], self.recipe.get("components", {})
        last = steps[-1]["name"] if steps else next(iter(self.models))
        found: Model = {}
        for name in SHAPES:
            part = name.partition(".")[0]
            if parts.get(part) != "none":
                value = self.value(parts.get(part, last), name)
                assert value is not None
                found[name] = value
        return found


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@st.composite
def numbers(draw: st.DrawFn, low: float, high: float) -> Any:
    """One number, or one that varies."""
    one = st.sampled_from([low, high, 0.0, 1.0, 0.5]).filter(lambda x: low <= x <= high) | st.floats(low, high)
    default = draw(one)
    if draw(st.integers(0, 2)):
        return default
    varying: dict[str, Any] = {"default": default}
    if labels := draw(st.lists(st.sampled_from(LABELS), unique=True, max_size=3)):
        varying["blocks"] = {label: draw(one) for label in labels}
    if patterns := draw(st.lists(st.sampled_from(PATTERNS), max_size=3)):
        varying["names"] = [[pattern, draw(one)] for pattern in patterns]
    return varying


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Models and a recipe."""
    dtypes = st.sampled_from([*DTYPES, "float16", "float16", "float32"])
    nearness = st.sampled_from([1.0, 0.1, 0.01])
    made = {f"m{number}": (draw(dtypes), draw(nearness)) for number in range(draw(st.integers(2, 4)))}
    layers = draw(st.lists(st.sampled_from([*LAYERS]), unique=True))
    spaces = dict.fromkeys(made, W) | ({"lora": D} if layers else {})
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 4))):
        steps.append(draw(step_of(f"s{number}", spaces)))
    while spaces[steps[-1]["name"]] != W:
        method = {"type": "add", "weight": draw(numbers(-1.5, 1.5))}
        step = {"name": f"s{len(steps)}", "method": method, "inputs": ["m0", steps[-1]["name"]]}
        steps.append(step)
        spaces[step["name"]] = W
    recipe: dict[str, Any] = {"steps": steps}
    if dtype := draw(st.none() | st.sampled_from(list(DTYPES))):
        recipe["dtype"] = dtype
    weights = [name for name, space in spaces.items() if space == W]
    if draw(st.integers(0, 3)) == 0 and not layers:
        recipe["components"] = draw(
            st.dictionaries(st.sampled_from(["vae", "text_encoder"]), st.sampled_from([*weights, "none"]), min_size=1)
        )
    return Case(draw(st.integers(0, 1 << 30)), made, layers, spaces, recipe)


def lora(rng: torch.Generator, layers: Sequence[str]) -> tuple[dict[str, Tensor], Model]:
    """A LoRA's file, and the differences that it means."""
    file: dict[str, Tensor] = {}
    means: Model = {}
    for layer in layers:
        out, into = SHAPES[layer]
        up = torch.randn(out, 3, generator=rng).half()
        down = torch.randn(3, into, generator=rng).half()
        file |= {
            f"{LAYERS[layer]}.lora_up.weight": up,
            f"{LAYERS[layer]}.lora_down.weight": down,
            f"{LAYERS[layer]}.alpha": torch.tensor(1.5),
        }
        means[layer] = 0.5 * up.double() @ down.double()
    return file, means


@st.composite
def step_of(draw: st.DrawFn, name: str, spaces: dict[str, str]) -> dict[str, Any]:
    """A step on what there is; it is noted in `spaces`."""
    weights = [each for each, space in spaces.items() if space == W]
    deltas = [each for each, space in spaces.items() if space == D]
    kind_name = draw(st.sampled_from([key for key, kind in KINDS.items() if deltas or kind.takes != "wd"]))
    kind = KINDS[kind_name]
    step: dict[str, Any] = {"name": name}
    count = len(kind.takes) + (draw(st.integers(0, 2)) if kind.repeats else 0)
    taken = list(kind.takes) + [kind.takes[-1]] * (count - len(kind.takes))
    on_base = "w" not in taken and ((kind.gives == D and not deltas) or draw(st.booleans()))
    either = D if deltas and draw(st.booleans()) else W
    if on_base:
        step["base"] = draw(st.sampled_from(weights))
        pools = {"d": list(spaces), "e": list(spaces)}
    else:
        pools = {"d": deltas, "e": deltas if either == D else weights}
    pools["w"] = weights
    step["inputs"] = [draw(st.sampled_from(pools[each])) for each in taken]
    method: dict[str, Any] = {"type": kind_name}
    for key, (low, high) in kind.numbers.items():
        if draw(st.integers(0, 5)) or key in ("density", "t", "width"):
            method[key] = draw(numbers(low, high))
    for key in kind.flags or {}:
        method[key] = draw(st.booleans())
    if kind.weights and draw(st.booleans()):
        method["weights"] = [draw(numbers(0.25, 1.5)) for _ in taken]
    step["method"] = method
    spaces[name] = W if on_base else {D: D, W: W, E: either}[kind.gives]
    return step


DEFAULTS: dict[str, dict[str, Any]] = {
    "add": {"weight": 1.0},
    "add_difference": {"weight": 1.0},
    "train_difference": {"weight": 1.0},
    "scale": {"factor": 1.0},
    "sum_twice": {"alpha": 0.5, "beta": 0.5},
    "triple_sum": {"alpha": 1 / 3, "beta": 1 / 3},
    "ties": {"scale": 1.0},
    "magnitude": {"scale": 1.0},
    "task_arithmetic": {"scale": 1.0},
    "tensor_sum": {"offset": 0.0},
}
"""Of numbers that a step leaves out."""


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit of the last place of `dtype` at each number."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=info.smallest_normal)))
    return info.eps * 2.0**exponent


@settings(max_examples=80, derandomize=True)
@given(case=cases())
def test_random_recipes_give_what_an_interpreter_in_float64_gives(tmp_path_factory: Any, case: Case):
    case.make()
    folder = tmp_path_factory.mktemp("fuzz")
    for name, file in case.files.items():
        save_file(file, folder / f"{name}.safetensors")
    recipe = {
        "output": str(folder / "out.safetensors"),
        "models": {name: str(folder / f"{name}.safetensors") for name in case.models},
        **case.recipe,
        "mixed": True,
    }
    (folder / "recipe.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in recipe.items()))
    expected = case.result()
    assert command.main([str(folder / "recipe.toml")]) == 0
    out = load_file(folder / "out.safetensors")
    assert set(out) == set(expected)
    jumps = any(step["method"]["type"] in JUMPS for step in case.recipe["steps"])
    size = max(tensor.abs().max().item() for model in case.models.values() for tensor in model.values())
    for name, tensor in out.items():
        if "dtype" in case.recipe:
            assert tensor.dtype == DTYPES[case.recipe["dtype"]]
        work = torch.float32 if tensor.dtype.itemsize <= 2 or name in case.layers else torch.float64
        allowed = unit(expected[name], tensor.dtype) / 2 + 300 * size * torch.finfo(work).eps
        wrong = (tensor.double() - expected[name]).abs() > allowed
        assert wrong.double().mean() <= (0.02 if jumps else 0), f"{name}: {wrong.sum()} of {wrong.numel()}"
