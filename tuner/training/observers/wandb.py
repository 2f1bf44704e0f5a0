"""Weights & Biases: the numbers of `metrics.jsonl` and the preview grid, there too."""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from tuner.errors import ConfigError
from tuner.training.observers.base import Observer, Scene
from tuner.training.trainer import StepReport, Trainer, Watcher


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Logs to wandb; nothing is sent with `mode = "offline"`."""

    project: str
    """The project's name."""
    name: str | None = None
    """The run's name; wandb makes one up where left out."""
    mode: Literal["online", "offline"] = "online"
    """Whether to send at once, or to write into the output folder for `wandb sync`."""

    def watch(self, scene: Scene) -> Watcher:
        if not scene.accelerator.is_main_process:
            return WandbWatcher(None, scene)
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError("observers: 'wandb' is not installed; pip install wandb, or leave it out") from error
        try:
            session = wandb.init(
                project=self.project, name=self.name, mode=self.mode, dir=str(scene.folder), config=scene.config
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"observers: wandb cannot start ({reason}); or set its mode = 'offline'") from error
        watcher = WandbWatcher(session, scene)
        scene.metrics.listeners.append(watcher.hear)
        return watcher


@dataclass
class WandbWatcher:
    """Passes metrics on."""

    session: Any
    scene: Scene

    def hear(self, row: dict[str, Any]) -> None:
        """Log one line of the metrics, by the samples seen."""
        kind = row["kind"]
        values = {f"{kind}/{key}": value for key, value in row.items() if key not in ("kind", "samples_seen")}
        self.session.log({**values, "samples_seen": row["samples_seen"]})

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        pass

    def finish(self, trainer: Trainer) -> None:
        if self.session is None:
            return
        grid = self.scene.folder / "samples" / "grid.png"
        if grid.exists():
            wandb = importlib.import_module("wandb")
            self.session.log({"previews": wandb.Image(str(grid)), "samples_seen": trainer.samples_seen})
        self.session.finish()


SPEC: type[Observer] = Wandb
