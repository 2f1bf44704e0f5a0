"""DreamBooth: a few pictures of one subject, and many of its class (Ruiz et al. 2022, arXiv:2208.12242)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.data.example import Example, Size
from tuner.data.sources.base import NONE, Broken, Source, Wanted, read_all, whole
from tuner.data.sources.folder import PictureFolder, find_pictures
from tuner.errors import DataError, UserError
from tuner.weights.writer import atomic_write_text, resource_error

RECORD = "generated.json"
"""In a class folder: what its pictures were made from."""


@dataclass(frozen=True, kw_only=True)
class Dreambooth:
    """The subject's pictures, and class pictures that keep what the model knew of the class.

    An epoch shows each picture of the larger side once, and the other side's as often as makes it about as many, so
    both are seen alike often (the paper pairs them in each batch). The loss is the weighted mean over both, in which
    each class picture has the weight `prior_weight`: sum of w l / sum of w, where the paper adds two means.
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
    """How many class pictures there have to be; more that are there are used too."""
    prior_weight: float = 1.0
    """What each class picture's loss is multiplied by."""
    prior_prediction: bool = False
    """Whether class examples have as their target what the base itself predicts for the same noise and time, instead of
    what was added to a picture it made. Then none are made: any pictures in `class_folder` do, and without it the
    subject's own are shown under `class_prompt` too."""
    repeats: int = 1
    """How many times an epoch shows each subject picture where there are no class pictures."""

    def __post_init__(self) -> None:
        if self.prior_prediction:
            if self.class_prompt is None:
                raise ValueError("prior_prediction needs class_prompt: what the base is asked to go on predicting")
            if self.class_count != 100:
                raise ValueError("class_count has no effect with prior_prediction, which makes none; leave it out")
        elif (self.class_folder is None) != (self.class_prompt is None):
            raise ValueError("class_folder and class_prompt go together: give both or none")
        if self.class_count < 1:
            raise ValueError(f"class_count must be at least 1, got {self.class_count}")
        if self.prior_weight <= 0:
            raise ValueError(f"prior_weight must be positive, got {self.prior_weight}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.class_folder is not None and self.repeats != 1:
            raise ValueError("repeats has no effect with class_folder, whose pictures decide it; leave it out")
        without = self.class_folder is None and not self.prior_prediction
        if without and (self.class_count, self.prior_weight) != (100, 1.0):
            raise ValueError("class_count and prior_weight have no effect without class_folder; give it, or leave them")

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        if self.class_folder is None or self.prior_prediction:
            return ()
        was = _recorded(self.class_folder.expanduser())
        if was and was.get("prompt") != self.class_prompt:
            raise DataError(
                f"{self.class_folder}: was made from the prompt {was.get('prompt')!r}, not {self.class_prompt!r}; "
                "give another class_folder or remove it"
            )
        if was and not _same_base(was, base, contents):
            raise DataError(
                f"{self.class_folder}: was made by the base {was.get('base')!r}, not by {base!r}"
                f"{' as it is now' if was.get('base') == base else ''}; give another class_folder or remove it"
            )
        return self._wanted()

    def _wanted(self) -> Sequence[Wanted]:
        if self.class_folder is None or self.class_prompt is None or self.prior_prediction:
            return ()
        folder = self.class_folder.expanduser()
        if folder.resolve().is_relative_to(self.subject.expanduser().resolve()):
            raise DataError(f"{folder}: class_folder lies inside the subject's folder; move it beside {self.subject}")
        there = find_pictures(folder) if folder.is_dir() else []
        taken = {path.name for path in there}
        names = ((seed, f"class-{seed:05d}.png") for seed in range(self.class_count + len(there)))
        free = [(seed, name) for seed, name in names if name not in taken]
        return [
            Wanted(image=folder / name, prompt=self.class_prompt, seed=seed)
            for seed, name in free[: max(0, self.class_count - len(there))]
        ]

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        folder = PictureFolder(path=self.subject, prompt=self.prompt, repeats=self.repeats, source="subject")
        subject, wrong = read_all([folder], broken)
        if self.class_folder is None:
            told = self.class_prompt
            if told is None:
                return subject, wrong
            again = {"caption": told, "weight": self.prior_weight, "prior": True, "source": "class"}
            return [*subject, *(replace(example, **again) for example in subject)], wrong
        wanted = () if unmade is None else self._wanted()
        prior: list[Example] = []
        if unmade is None or len(wanted) < self.class_count:
            folder = PictureFolder(path=self.class_folder, prompt=self.class_prompt, weight=self.prior_weight)
            prior, faults = read_all([folder], broken)
            wrong += faults
        prior += [
            Example(image=w.image, size=unmade or (0, 0), caption=w.prompt, weight=self.prior_weight) for w in wanted
        ]
        return (self.balanced(subject, prior) if subject and prior else [*subject, *prior]), wrong

    def balanced(self, subject: Sequence[Example], prior: Sequence[Example]) -> list[Example]:
        """Both sides of which there is at least one each, as often as an epoch is to show them."""
        balance = len(prior) / len(subject)
        often, times = max(1, round(balance)), max(1, round(1 / balance))
        return [replace(example, repeats=often) for example in subject] + [
            replace(example, repeats=times, prior=self.prior_prediction, source="class") for example in prior
        ]


def record(wanted: Sequence[Wanted], base: str, contents: str) -> None:
    """Write down in each class folder which of its pictures are made, and from what.

    Raises:
        ResourceError: it cannot be written.
    """
    for folder, prompt in sorted({(w.image.parent, w.prompt) for w in wanted}):
        pictures = {w.image.name for w in wanted if w.image.parent == folder} | {*_recorded(folder).get("pictures", ())}
        content = {"base": base, "contents": contents, "prompt": prompt, "pictures": sorted(pictures)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise resource_error(folder, error) from error
        atomic_write_text(folder / RECORD, json.dumps(content, ensure_ascii=False, indent=1))


def _same_base(was: dict[str, Any], base: str, contents: str | None) -> bool:
    """By what it holds where that is known, since a base may be moved; else by its name."""
    if contents is None or "contents" not in was:
        return was.get("base") == base
    return was["contents"] == contents


def _recorded(folder: Path) -> dict[str, Any]:
    """What is written down in a class folder; nothing where all its pictures are the user's own."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); remove it with the pictures beside it") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: is no JSON object; remove it with the pictures beside it")
    return content


SPEC: type[Source] = Dreambooth
