"""What families of a discrete schedule have in common: they may be trained to predict something else, or to its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner.errors import ConfigError
from tuner.families.detect import read_config


@dataclass(frozen=True, kw_only=True)
class DiscreteFamily:
    """Options that turn a base into another kind, while it is trained."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the network is trained to predict; where left out, what the base predicts."""
    zero_terminal_snr: bool | None = None
    """Whether the last time is nothing but noise (Lin et al. 2023, arXiv:2305.08891); left out, as in the base."""

    def read_scheduler(self, folder: Path) -> Mapping[str, Any]:
        """The scheduler's config of a diffusers folder, changed as it has to be for what is trained: what previews and
        published models are sampled by.

        Raises:
            ConfigError: the last time would be nothing but noise, of which an epsilon-prediction says nothing.
        """
        file = folder / "scheduler" / "scheduler_config.json"
        flat = folder / file.name  # of folders from diffusers' first days
        config: dict[str, Any] = read_config(flat if flat.is_file() and not file.is_file() else file)
        if self.prediction is not None:
            config["prediction_type"] = self.prediction
        if self.zero_terminal_snr is not None:
            config["rescale_betas_zero_snr"] = self.zero_terminal_snr
        if self.zero_terminal_snr:
            config["timestep_spacing"] = "trailing"  # or the last time, which is trained, is never sampled
        changed = self.prediction is not None or self.zero_terminal_snr
        to_zero = config.get("rescale_betas_zero_snr", False)
        if changed and to_zero and config.get("prediction_type", "epsilon") == "epsilon":
            raise ConfigError(
                "model.zero_terminal_snr: needs v-prediction, as an epsilon-prediction says nothing of a picture where "
                "there is only noise; add model.prediction = 'v_prediction', or set it to false"
            )
        return config
