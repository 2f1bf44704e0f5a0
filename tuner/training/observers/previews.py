"""Pictures from fixed seeds while training, as a grid that grows by a row each time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tuner.families.base import Sampling
from tuner.training.observers.base import Observer, Scene
from tuner.training.trainer import StepReport, Trainer, Watcher
from tuner.training.watchers import passed

MARGIN = 4
LABEL = 18


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Samples of the weights that would be published, before the first update, every so often, and at the end.

    They are made by a stock diffusers pipeline over the networks in training; `samples/grid.png` shows them all.
    """

    prompts: tuple[str, ...]
    """One column of the grid each."""
    every: int = 1000
    """Samples between previews."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn once for each of them."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise ValueError("previews need at least one prompt and one seed")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def watch(self, scene: Scene) -> Watcher:
        return PreviewWatcher(scene=scene, previews=self)


@dataclass(kw_only=True)
class PreviewWatcher:
    """Makes them on the main process, while the others wait at the next update."""

    scene: Scene
    previews: Previews

    def start(self, trainer: Trainer) -> None:
        """The row before the first update: what the base makes of the prompts; or one that a kill has left out.

        Rows past this place are of a course that the run has left, or of another run, and are removed.
        """
        seen = trainer.samples_seen
        if self.scene.accelerator.is_main_process:
            for folder in (self.scene.folder / "samples").glob("samples-*"):
                place = folder.name.removeprefix("samples-")
                if place.isdecimal() and int(place) > seen:
                    shutil.rmtree(folder)
        due = passed(self.previews.every, seen, trainer.batch_size) and not self._folder(seen).exists()
        if seen == 0 or due:
            self._preview(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if passed(self.previews.every, report.samples_seen, trainer.batch_size):
            self._preview(trainer)

    def finish(self, trainer: Trainer) -> None:
        if trainer.complete and not self._folder(trainer.samples_seen).exists():
            self._preview(trainer)

    def _folder(self, samples_seen: int) -> Path:
        return self.scene.folder / "samples" / f"samples-{samples_seen:010d}"

    def _preview(self, trainer: Trainer) -> None:
        if not self.scene.accelerator.is_main_process:
            return
        asked = [(prompt, seed) for prompt in self.previews.prompts for seed in self.previews.seeds]
        with trainer.published_weights(), self.scene.accelerator.autocast():
            pictures = self.scene.model.sample(
                [prompt for prompt, _ in asked], [seed for _, seed in asked], self.previews.sampling
            )
        folder = self._folder(trainer.samples_seen)
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for index, picture in enumerate(pictures):
            picture.save(partial / f"{index:03d}.png")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        self._grid()

    def _grid(self) -> None:
        rows: list[tuple[str, list[Image.Image]]] = []
        for folder in sorted((self.scene.folder / "samples").glob("samples-*")):
            pictures = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
            rows.append((f"{int(folder.name.removeprefix('samples-'))}", pictures))
        titles = [prompt for prompt in self.previews.prompts for _ in self.previews.seeds]
        grid(rows, titles).save(self.scene.folder / "samples" / "grid.png")


def grid(rows: list[tuple[str, list[Image.Image]]], titles: list[str]) -> Image.Image:
    """Pictures in labelled rows, with a title above each column, in as many lines as its width needs."""
    font = ImageFont.load_default(12)
    width = max((picture.width for _, pictures in rows for picture in pictures), default=64)
    height = max((picture.height for _, pictures in rows for picture in pictures), default=64)
    left = MARGIN + max((int(font.getlength(label)) for label, _ in rows), default=0)
    columns = max((len(pictures) for _, pictures in rows), default=1)
    heads = [wrapped(title, width, font.getlength) for title in titles[:columns]]
    head = LABEL * max((len(lines) for lines in heads), default=1)
    sheet = Image.new(
        "RGB",
        (left + MARGIN + columns * (width + MARGIN), head + MARGIN + len(rows) * (height + MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            draw.text((left + MARGIN + column * (width + MARGIN), MARGIN + number * LABEL), line, "black", font)
    for row, (label, pictures) in enumerate(rows):
        top = head + MARGIN + row * (height + MARGIN)
        draw.text((MARGIN // 2, top + height // 2 - 6), label, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + MARGIN + column * (width + MARGIN), top))
    return sheet


def wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """`text` in lines that are not longer than `width`, broken between words where that can be."""
    lines = [""]
    for word in text.split():
        if lines[-1] and length(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while length(lines[-1]) > width and len(lines[-1]) > 1:
            fits = max((n for n in range(1, len(lines[-1])) if length(lines[-1][:n]) <= width), default=1)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


SPEC: type[Observer] = Previews
