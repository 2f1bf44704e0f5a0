"""The demo's two pictures: samples before and after, and the loss over the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

CELL = 96
GAP = 6
WIDE = 22
HEAD = 26
TEXT = 15


def before_and_after(
    subject: Sequence[Image.Image], rows: Mapping[str, tuple[Sequence[Image.Image], Sequence[Image.Image]]]
) -> Image.Image:
    """The subject's pictures, and below them, prompt by prompt, the base's samples beside the tuned ones'."""
    font = ImageFont.load_default(TEXT)
    samples = max(len(before) for before, _ in rows.values())
    block = samples * (CELL + GAP) - GAP
    width = max(2 * block + WIDE, len(subject) * (CELL + GAP) - GAP) + 2 * GAP
    line = HEAD + CELL + GAP
    sheet = Image.new("RGB", (width, HEAD + line * (len(rows) + 1) + GAP), "white")
    draw = ImageDraw.Draw(sheet)

    def put(pictures: Sequence[Image.Image], left: int, top: int) -> None:
        for picture in pictures:
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            left += CELL + GAP

    draw.text((GAP, GAP), "the subject: what was trained on", "black", font)
    put(subject, GAP, HEAD)
    right = GAP + block + WIDE
    top = line
    draw.text((GAP, top + GAP), "before: the base", "black", font)
    draw.text((right, top + GAP), "after: with the LoRA, same seeds", "black", font)
    top += HEAD
    for prompt, (before, after) in rows.items():
        draw.text((GAP, top + GAP), f"“{prompt}”", "black", font)
        put(before, GAP, top + HEAD)
        put(after, right, top + HEAD)
        top += line
    return sheet


def losses(rows: Sequence[Mapping[str, Any]], smoothing: int = 20) -> Figure:
    """Training and validation loss over the run, and the validation loss by noise level before and after."""
    updates = [row for row in rows if row["kind"] == "update"]
    validations = [row for row in rows if row["kind"] == "validation"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_run, by_level = figure.subplots(1, 2)
    _over_run(over_run, updates, validations, smoothing)
    for row, colour, when in ((validations[0], "0.6", "before"), (validations[-1], "C0", "after")):
        times = [int(t) for t in row["by_time"]]
        by_level.plot(times, list(row["by_time"].values()), "o-", color=colour, label=when)
    by_level.set(title="by noise level", xlabel="time (0 is the picture, 1000 is noise)", ylabel="validation loss")
    by_level.set_ylim(bottom=0)
    by_level.legend()
    return figure


def _over_run(
    axes: Axes, updates: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]], smoothing: int
) -> None:
    seen = [row["samples_seen"] for row in updates]
    loss = [row["loss"] for row in updates]
    width = min(smoothing, max(1, len(loss)))
    smooth = [sum(loss[i + 1 - width : i + 1]) / width for i in range(width - 1, len(loss))]
    axes.plot(seen, loss, ".", color="C1", alpha=0.2, markersize=3)
    axes.plot(seen[width - 1 :], smooth, color="C1", label=f"training, mean of {width} updates")
    axes.plot(
        [row["samples_seen"] for row in validations], [row["loss"] for row in validations], "o-", color="C0",
        label="validation: held-out pictures, fixed noise",
    )  # fmt: skip
    axes.set(title="loss over the run", xlabel="samples seen", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
