"""Two full fine-tunes of the embedded base model, merged at five shares: what merging does, as a picture and a curve.

    python -m examples.blend

One model learns the demo's white bear, the other the same bear in red. `tuner merge lerp` blends them; every blend
draws the same prompt from the same seeds, and its loss is measured on held-out pictures of both bears under fixed
noise. It takes some minutes on two CPU cores. Arguments change values of full.toml, such as run.samples=200.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from merge.command import main as merge
from tuner.cli import recipe_module
from tuner.config.command_line import guarded
from tuner.config.loader import load
from tuner.errors import DataError
from tuner.families.base import OpenedModel, Sampling
from tuner.families.source import BaseModel

from .measure import loss, recoloured

HERE = Path(__file__).parent
DEMO = Path("examples/demo")
RUNS = Path("runs/blend")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPT = "sks bear"
SEEDS = (1, 2, 3, 4)
SAMPLING = Sampling(steps=20, guidance=3.0)
CELL, GAP, HEAD, TEXT = 96, 6, 26, 15


def main(overrides: Sequence[str]) -> None:
    """Make the pictures, train twice, merge, draw and measure."""
    if not DEMO.is_dir():
        raise DataError(f"{DEMO}: not here; go to the project's folder and type: python -m examples.blend")
    torch.set_num_threads(1)
    full = recipe_module("full")
    models: dict[str, Path] = {}
    held_out: dict[str, Path] = {}
    for colour in ("white", "red"):
        for part in ("subject", "held-out"):
            recoloured(DEMO / part, RUNS / "pictures" / colour / part, colour)
        held_out[colour] = RUNS / "pictures" / colour / "held-out"
        print(f"\n== fine-tuning: {PROMPT!r} is a {colour} bear", flush=True)
        data = f"data=[{{type='folder', path='{RUNS}/pictures/{colour}/subject', prompt='{PROMPT}'}}]"
        config = load(full.Config, HERE / "full.toml", [f"run.output={RUNS}/{colour}", data, *overrides])
        full.main(config)
        models[colour] = RUNS / colour / "model"

    rows: dict[float, list[Image.Image]] = {}
    losses: dict[str, list[float]] = {colour: [] for colour in models}
    for share in SHARES:
        folder = RUNS / f"share-{share:g}"
        print(f"\n== merging: {share:.0%} of the red one", flush=True)
        words = ["lerp", str(models["white"]), str(models["red"]), f"t={share}", f"to={folder}"]
        if code := merge(words):
            raise SystemExit(code)
        model = opened(folder)
        rows[share] = model.sample([PROMPT] * len(SEEDS), SEEDS, SAMPLING)
        for colour, pictures in held_out.items():
            losses[colour].append(loss(model, pictures, PROMPT))

    grid(rows).save(RUNS / "grid.png")
    curve(losses).savefig(RUNS / "curve.png", dpi=100)
    print("\nshare of red   loss on white bears   loss on red bears")
    for index, share in enumerate(SHARES):
        print(f"{share:>12.2f}   {losses['white'][index]:>19.4f}   {losses['red'][index]:>17.4f}")
    print(f"\n{RUNS}/grid.png and {RUNS}/curve.png show it")


def opened(folder: Path) -> OpenedModel:
    """A model that a merge wrote."""
    return BaseModel(base=str(folder)).open(torch.device("cpu"))


def grid(rows: dict[float, list[Image.Image]]) -> Image.Image:
    """The samples of each blend, seed by seed."""
    font = ImageFont.load_default(TEXT)
    width = HEAD * 3 + len(SEEDS) * (CELL + GAP)
    sheet = Image.new("RGB", (width, GAP + len(rows) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (share, pictures) in enumerate(rows.items()):
        top = GAP + row * (CELL + GAP)
        draw.text((GAP, top + CELL // 2 - TEXT), f"{share:.0%} red", "black", font)
        for column, picture in enumerate(pictures):
            left = HEAD * 3 + column * (CELL + GAP)
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
    return sheet


def curve(losses: dict[str, list[float]]) -> Figure:
    """Both losses over the share."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, values in losses.items():
        axes.plot(SHARES, values, "o-", color={"white": "0.5", "red": "C3"}[colour], label=f"on {colour} bears")
    axes.set(title="loss of the blends, held-out pictures, fixed noise", xlabel="share of the red model", ylabel="loss")
    axes.legend()
    return figure


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: main(sys.argv[1:])))
