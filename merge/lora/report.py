"""What was done to a LoRA, in lines for a person."""

from collections import Counter
from collections.abc import Mapping, Sequence

from merge.lora.extract import Part
from merge.lora.save import Saved

SHOWN = 3
"""Layers that are named."""


def lost(parts: Sequence[Part], error: float) -> str:
    """What a smaller rank cost: over all, and where most."""
    cut = [part for part in parts if part.rank is not None]
    ranks = [part.rank or 0 for part in cut]
    if not ranks:
        return "no rank was cut"
    spread = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    worst = sorted(cut, key=lambda part: -part.error * part.norm)[:SHOWN]
    lines = [f"{len(cut)} layers of rank {spread}; ‖ΔW - kept‖ / ‖ΔW‖ = {error:.3g}, exactly, over all of them"]
    lines += [
        f"  most is lost in {part.name}: {part.error:.3g} at rank {part.rank}" for part in worst if part.error > 1e-6
    ]
    return "\n".join(lines)


def left_out(names: Mapping[str, str]) -> str:
    """Tensors that are not told of, by reason; nothing when there are none."""
    lines: list[str] = []
    for reason, count in Counter(names.values()).most_common():
        some = [name for name, why in names.items() if why == reason][:SHOWN]
        more = " …" if count > len(some) else ""
        lines.append(f"left out: {count} changed tensors ({reason}): {', '.join(some)}{more}")
    return "\n".join(lines)


def saved(file: Saved) -> str:
    """The file, and how well it reads back."""
    return f"{file.path}: {file.bytes:,} bytes, read back with a largest relative error of {file.worst:.2g}" + (
        f" ({file.where})" if file.where else ""
    )
