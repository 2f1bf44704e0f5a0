"""DreamBooth: a few pictures of one subject, and many of its class (Ruiz et al. 2022, arXiv:2208.12242)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.data.example import Example
from tuner.data.sources.base import Source, Wanted
from tuner.data.sources.folder import PictureFolder, find_pictures
from tuner.errors import DataError

RECORD = "generated.json"
"""In a class folder: what its pictures were made from."""


@dataclass(frozen=True, kw_only=True)
class Dreambooth:
    """The subject's pictures, and class pictures that keep what the model knew of the class.

    An epoch shows each class picture once and the subject's pictures as often in all, so both are seen alike often
    (the paper pairs them in each batch). The loss is the mean over both, each class picture weighted by `prior_weight`.
    """

    subject: Path
    """The folder of the subject's pictures."""
    prompt: str
    """What the subject is called, with a rare word as its name: `a sks robot`."""
    class_folder: Path | None = None
    """The folder of class pictures; missing ones are made by the base model."""
    class_prompt: str | None = None
    """What the class is called: `a robot`."""
    class_count: int = 100
    """How many class pictures there have to be."""
    prior_weight: float = 1.0
    """What each class picture's loss is multiplied by."""
    repeats: int = 1
    """How many times an epoch shows each subject picture where there are no class pictures."""

    def __post_init__(self) -> None:
        if (self.class_folder is None) != (self.class_prompt is None):
            raise ValueError("class_folder and class_prompt go together: give both or none")
        if self.class_count < 1:
            raise ValueError(f"class_count must be at least 1, got {self.class_count}")
        if self.prior_weight <= 0:
            raise ValueError(f"prior_weight must be positive, got {self.prior_weight}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def wanted(self, base: str) -> Sequence[Wanted]:
        if self.class_folder is None or self.class_prompt is None:
            return ()
        folder = self.class_folder.expanduser()
        there = find_pictures(folder) if folder.is_dir() else []
        made_from = {"base": base, "prompt": self.class_prompt}
        record = folder / RECORD
        if record.is_file() and (was := json.loads(record.read_text(encoding="utf-8"))) != made_from:
            raise DataError(f"{folder}: was made from {was}, not {made_from}; give another class_folder or remove it")
        if len(there) >= self.class_count:
            return ()
        taken = {path.name for path in there}
        names = ((seed, f"class-{seed:05d}.png") for seed in range(self.class_count + len(there)))
        free = [(seed, name) for seed, name in names if name not in taken]
        return [
            Wanted(image=folder / name, prompt=self.class_prompt, seed=seed)
            for seed, name in free[: self.class_count - len(there)]
        ]

    def examples(self) -> Sequence[Example]:
        subject = PictureFolder(path=self.subject, prompt=self.prompt, repeats=self.repeats).examples()
        subject = [replace(example, source="subject") for example in subject]
        if self.class_folder is None:
            return subject
        prior = PictureFolder(path=self.class_folder, prompt=self.class_prompt, weight=self.prior_weight).examples()
        prior = [replace(example, source="class") for example in prior]
        repeats = max(1, round(len(prior) / len(subject)))
        return [replace(example, repeats=repeats) for example in subject] + prior


def record(wanted: Sequence[Wanted], base: str) -> None:
    """Write down in each class folder what its pictures are made from."""
    for image, prompt in {(w.image.parent, w.prompt) for w in wanted}:
        image.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"base": base, "prompt": prompt}, ensure_ascii=False, indent=1)
        (image / RECORD).write_text(text, encoding="utf-8")


SPEC: type[Source] = Dreambooth
