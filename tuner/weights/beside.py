"""What a diffusers folder has beside weights: configs, tokenizers, a scheduler that says what is predicted."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tuner.errors import ConfigError, DataError
from tuner.weights import published
from tuner.weights.architecture import FOLDERS, TRANSFORMERS
from tuner.weights.facts import SCHEDULER, Facts
from tuner.weights.published import Json
from tuner.weights.store import refuse_outside

INDEX = "model_index.json"
COPIED = (".json", ".txt", ".model", ".jinja")
"""Endings of the files in a folder that a pipeline reads beside weights: configs, vocabularies."""
MAX_COPIED_BYTES = 100_000_000
NETWORKS = (*FOLDERS, "safety_checker", "depth_estimator")
DISPENSABLE = ("safety_checker", "image_encoder", "depth_estimator", "text_encoder_3")
"""Networks without which a pipeline makes pictures: Stable Diffusion 3 is trained to do without T5."""


@dataclass
class Beside:
    """The files beside the weights of a folder that is to be written, by their paths in it."""

    configs: dict[str, Json]
    others: dict[str, bytes] = field(default_factory=dict[str, bytes])
    notes: list[str] = field(default_factory=list[str])
    """What there is to say about it, a sentence each."""

    @staticmethod
    def of_folder(folder: Path) -> "Beside":
        """Those of another folder.

        Raises:
            DataError: no diffusers folder, or a damaged config.
            UnsafeError: a file that leads out of it.
        """
        found = Beside(dict(published.read(folder)))
        for path in sorted(folder.glob("*/*")):
            place = path.relative_to(folder).as_posix()
            wanted = path.suffix in COPIED and ".safetensors.index" not in path.name and not path.name.startswith(".")
            if wanted and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
                refuse_outside(path, folder)
                if place not in found.configs:
                    found.others[place] = path.read_bytes()
        return found

    @staticmethod
    def of_released(name: str) -> "Beside":
        """Those of a released model."""
        configs = published.configs(name)
        return Beside(dict(configs), dict(published.tokenizers(configs)))

    @staticmethod
    def chosen(config: str) -> "Beside":
        """Those of the folder, or of the released model, that the user names.

        Raises:
            ConfigError: it is neither.
        """
        folder = Path(config).expanduser()
        if config in published.variants() or not folder.is_dir():
            return Beside.of_released(config)
        try:
            return Beside.of_folder(folder)
        except DataError as error:
            raise ConfigError(f"--config: {error}") from error

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file."""
        return {**{path: published.to_json(content) for path, content in self.configs.items()}, **self.others}

    def refuse_lacking(self, components: Collection[str]) -> None:
        """Raises: DataError: `components` lack a network that pictures cannot be made without."""
        index = self.configs[INDEX]
        named = {part for part, names in index.items() if part in NETWORKS and names != [None, None]}
        if lacking := sorted(named - {*components, *DISPENSABLE}):
            kind = index["_class_name"]
            raise DataError(f"holds no {', '.join(lacking)}, which a {kind} needs; give their files with --add")

    def fit_components(self, components: Collection[str]) -> None:
        """Say null in `model_index.json` of every network that is not among `components`, and take its config out.

        Raises:
            DataError: one of `components` has no place in such a pipeline.
        """
        index = self.configs[INDEX]
        for component in components:
            if index.get(component, [None, None]) == [None, None] or f"{component}/config.json" not in self.configs:
                kind = index["_class_name"]
                raise DataError(f"{component}: has no place in a folder of a {kind}; choose another --config")
        lost: list[str] = []
        for part, names in list(index.items()):
            if part in NETWORKS and part not in components and isinstance(names, list) and names != [None, None]:
                index[part] = [None, None]
                lost.append(part)
                for files in (self.configs, self.others):
                    for path in [path for path in files if path.startswith(f"{part}/")]:
                        del files[path]
        if "safety_checker" in lost:
            index["requires_safety_checker"] = False
            lost.remove("safety_checker")
        if index.get("depth_estimator") == [None, None] and "depth_estimator" not in lost:
            lost.append("depth_estimator")
        if lost:
            given = ", ".join(f"{part}=…" for part in lost)
            self.notes.append(
                f"Not in the source: {', '.join(lost)}; open the folder with from_pretrained(folder, {given})."
            )

    def fit_prediction(self, facts: Facts, chosen: bool) -> None:
        """Say in the scheduler's config what `facts` say; a guess yields to configs that the user has chosen."""
        scheduler = self.configs.get(SCHEDULER)
        if scheduler is None or facts.known.family in TRANSFORMERS or (facts.guessed and chosen):
            return
        said = scheduler.get("prediction_type", "epsilon")
        wanted = {"v": "v_prediction", "epsilon": "epsilon", None: said}[facts.prediction]
        if said != wanted:
            scheduler["prediction_type"] = wanted
        if facts.zero_terminal_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if facts.guessed:
            told, other = ("velocity", "sd2-base") if facts.prediction == "v" else ("noise", "sd2")
            self.notes.append(
                f"It seems to predict {told}, going by one layer's numbers; if pictures are grey or noise, name the "
                f"other with --config {other}."
            )
