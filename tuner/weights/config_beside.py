"""The `.yaml` beside a single file, by which user interfaces know what they have before them.

They believe it whatever the file is. So one that is there when a file of its name is written, left by an older file,
must say the same as the new one: pictures would be noise otherwise, or the file would not load.
"""

import re
from pathlib import Path

from tuner.errors import ConfigError
from tuner.weights import published
from tuner.weights.architecture import TITLES, Family
from tuner.weights.facts import Facts, text_beside, velocity_in
from tuner.weights.writer import atomic_write_bytes

CONTEXTS: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of what a U-Net attends to, by which a config tells the family."""
CHANNELS = {4, 5, 8, 9}
"""Input channels of U-Nets; those of autoencoders, which configs tell too, are others."""
WRITTEN = ("sd1", "sd2")
"""The families that this program writes configs for."""


def refuse_contradicting(target: Path, facts: Facts) -> None:
    """Refuse to write `target`, of which `facts` are known, beside a config that says something else.

    What this program has written for an older `target` is no reason: `settle` replaces it.

    Raises:
        ConfigError: naming the config, and what it says.
    """
    place = target.with_suffix(".yaml")
    said = contradiction(target, facts)
    if said is None or (target.exists() and _is_ours(place)):
        return
    raise ConfigError(
        f"{place}: is there already, and tells programs that {target.name} {said}; remove it, or choose another name"
    )


def settle(target: Path, facts: Facts) -> str | None:
    """Put beside `target`, which was written, what it needs, or take away what was wrong; says what was done."""
    place = target.with_suffix(".yaml")
    wrong = contradiction(target, facts) is not None and _is_ours(place)
    if facts.needs_yaml and facts.known.layout == "ldm" and (wrong or not place.exists()):
        atomic_write_bytes(place, published.original_config(str(facts.known.family)))
        return f"It predicts velocity, which {place} tells user interfaces; keep it beside the file."
    if wrong:
        place.unlink()
        return f"{place} is removed: it was that of the older {target.name}, and is not true of this one."
    return None


def contradiction(target: Path, facts: Facts) -> str | None:
    """What the config beside `target` says that is not so; None where all is well, or nothing is known."""
    text = text_beside(target)
    known = facts.known
    if text is None or known.family is None or known.lora or known.layout != "ldm":
        return None
    contexts = {int(width) for width in re.findall(r"^\s*context_dim:\s*(\d+)\s*$", text, re.MULTILINE)}
    families: list[Family] = [CONTEXTS[width] for width in contexts if width in CONTEXTS]
    if families and known.family not in families:
        return f"is {TITLES[families[0]]}, but it is {TITLES[known.family]}"
    channels = {int(count) for count in re.findall(r"^\s*in_channels:\s*(\d+)\s*$", text, re.MULTILINE)} & CHANNELS
    if channels and known.channels not in channels:
        return f"has {min(channels)} input channels, but it has {known.channels}"
    if known.family not in WRITTEN:
        return None
    if velocity_in(text) and facts.prediction != "v":
        return f"predicts velocity, but {'nothing says so' if facts.prediction is None else 'it predicts noise'}"
    if facts.prediction == "v" and not velocity_in(text):
        return "predicts noise, but it predicts velocity"
    return None


def _is_ours(place: Path) -> bool:
    """Whether the config at `place` is one that this program writes."""
    return place.read_bytes() in [published.original_config(family) for family in WRITTEN]
