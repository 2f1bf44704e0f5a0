"""Named curves over the blocks of a UNet, as they are in use for merging block by block.

Each is a list of 26 numbers for Stable Diffusion 1: of BASE, IN00 … IN11, M00, OUT00 … OUT11. The names and numbers are
those that supermerger ships and others have taken over, so that a recipe which names a preset means the same here. Most
have a formula: the 25 blocks after BASE stand at x = 0, 1/24 … 1.

Stable Diffusion XL has 9 + 1 + 9 blocks; they take the numbers of the same labels, as in supermerger. So the ends of a
curve, IN09 … IN11 and OUT09 … OUT11, are not used there.

The autoencoder has the number of BASE unless VAE is given one. supermerger does the same for Stable Diffusion 1; for XL
it has 0 there whatever the preset. So ALL_B, the one preset whose BASE is not 0, takes b's autoencoder here and leaves
a's there: all of b is what its name says. Say blocks = { VAE = 0 } for theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from math import cos, pi

from tuner.errors import did_you_mean

LABELS = ("BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12)))
"""What the numbers of a preset are for."""


def smoothstep(x: float) -> float:
    """From 0 to 1 with flat ends."""
    return 3 * x**2 - 2 * x**3


def folded(y: float) -> float:
    """`y` reflected at 0 and 1 until it lies between them: up, down, up …"""
    y %= 2
    return min(y, 2 - y)


def hermite(x: float) -> float:
    """A cubic Hermite curve from 0 to 1 whose slope at both ends is 100/24, the step between blocks in percent."""
    slope = 100 / 24
    return (x**3 - 2 * x**2 + x) * slope + smoothstep(x) + (x**3 - x**2) * slope


def steep_hermite(x: float) -> float:
    """The same, begun one step above 0; only its first value is 0 itself."""
    return hermite(x) + (1 - smoothstep(x)) / 24 if x else 0.0


def _over(curve: Callable[[float], float], base: float = 0.0) -> tuple[float, ...]:
    return (base, *(curve(place / 24) for place in range(25)))


def _runs(*runs: tuple[int, float]) -> tuple[float, ...]:
    """BASE 0, then so many blocks of each number."""
    return (0.0, *chain.from_iterable(repeat(number, blocks) for blocks, number in runs))


def _reversed(numbers: Sequence[float]) -> tuple[float, ...]:
    """BASE kept, and the others mirrored between 0 and 1."""
    return (numbers[0], *(1 - number for number in numbers[1:]))


PRESETS: dict[str, tuple[float, ...]] = {
    "GRAD_V": _over(lambda x: abs(2 * x - 1)),
    "GRAD_A": _over(lambda x: 1 - abs(2 * x - 1)),
    "FLAT_25": _over(lambda x: 0.25),
    "FLAT_50": _over(lambda x: 0.5),
    "FLAT_75": _over(lambda x: 0.75),
    "WRAP08": _runs((4, 1), (17, 0), (4, 1)),
    "WRAP12": _runs((6, 1), (13, 0), (6, 1)),
    "WRAP14": _runs((7, 1), (11, 0), (7, 1)),
    "WRAP16": _runs((8, 1), (9, 0), (8, 1)),
    "MID12_50": _runs((5, 0), (14, 0.5), (6, 0)),
    "OUT07": _runs((18, 0), (7, 1)),
    "OUT12": _runs((13, 0), (12, 1)),
    "OUT12_5": _runs((12, 0), (1, 0.5), (12, 1)),
    "RING08_SOFT": _runs((5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0)),
    "RING08_5": _runs((6, 0), (4, 1), (5, 0), (4, 1), (6, 0)),
    "RING10_5": _runs((5, 0), (5, 1), (5, 0), (5, 1), (5, 0)),
    "RING10_3": _runs((6, 0), (5, 1), (3, 0), (5, 1), (6, 0)),
    "SMOOTHSTEP": _over(smoothstep),
    "SMOOTHSTEP*2": _over(lambda x: folded(2 * smoothstep(x))),
    "SMOOTHSTEP*3": _over(lambda x: folded(3 * smoothstep(x))),
    "SMOOTHSTEP*4": _over(lambda x: folded(4 * smoothstep(x))),
    "SMOOTHSTEP/2": _over(lambda x: smoothstep(folded(2 * x))),
    "SMOOTHSTEP/3": _over(lambda x: smoothstep(folded(3 * x))),
    "SMOOTHSTEP/4": _over(lambda x: smoothstep(folded(4 * x))),
    "COSINE": _over(lambda x: (1 + cos(pi * x)) / 2),
    "TRUE_CUBIC_HERMITE": _over(steep_hermite),
    "FAKE_CUBIC_HERMITE": _over(hermite),
    "ALL_A": _over(lambda x: 0.0),
    "ALL_B": _over(lambda x: 1.0, base=1.0),
}
"""The numbers of `LABELS`, by the preset's name."""

REVERSED = {
    "REVERSE-SMOOTHSTEP": "SMOOTHSTEP",
    **{f"R_SMOOTHSTEP{change}": f"SMOOTHSTEP{change}" for change in ("*2", "*3", "*4", "/2", "/3", "/4")},
    "REVERSE_COSINE": "COSINE",
    "TRUE_REVERSE_CUBIC_HERMITE": "TRUE_CUBIC_HERMITE",
    "FAKE_REVERSE_CUBIC_HERMITE": "FAKE_CUBIC_HERMITE",
}
"""Presets that are another one upside down."""
PRESETS |= {name: _reversed(PRESETS[other]) for name, other in REVERSED.items()}

_PARTS = {"*2": "2", "*3": "3", "*4": "4", "/2": "HALF_", "/3": "ONE_THIRD_", "/4": "ONE_FOURTH_"}
ALIASES = {
    "REVERSE_SMOOTHSTEP": "REVERSE-SMOOTHSTEP",
    "REVERSE-COSINE": "REVERSE_COSINE",
    **{f"{part}SMOOTHSTEP": f"SMOOTHSTEP{change}" for change, part in _PARTS.items()},
    **{f"{part}R_SMOOTHSTEP": f"R_SMOOTHSTEP{change}" for change, part in _PARTS.items()},
}
"""Other names in use; some programs cannot have `*` and `/` in them."""


def curve(name: str) -> Mapping[str, float]:
    """The number of each block of the preset `name`, by label.

    Raises:
        ValueError: there is none of that name; the message says a similar one, or lists those there are.
    """
    numbers = PRESETS.get(ALIASES.get(name, name))
    if numbers is None:
        meant = did_you_mean(name.upper(), [*PRESETS, *ALIASES])
        raise ValueError(f"no preset {name!r}{meant or ' (there are: ' + ', '.join(PRESETS) + ')'}")
    return dict(zip(LABELS, numbers, strict=True))
