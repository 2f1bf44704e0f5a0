"""Whether patience ends a run near the best that it could have published, on the embedded base.

    python -m benchmarks.early_stopping
    python -m benchmarks.early_stopping --pictures 2 --samples 800     # a shorter trial

trains a LoRA on a few pictures of the demo's subject for far too long, watched by the loss on pictures that are held
out, and then once more with `patience` and `best`. What the second run published is loaded by stock diffusers, put into
the base, and measured anew on the held-out pictures. A table says all of it. The exit code is 1 where the over-long run
was not over-long or patience did not end the other, so that nothing is shown, and where what was published is more than
3 % worse than the best of the over-long run.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes import lora
from tuner.config.loader import load
from tuner.data.sources.folder import find_pictures
from tuner.families.source import BaseModel
from tuner.publish.verify import listening
from tuner.training.metrics import read_metrics

DEMO = Path(__file__).parent.parent / "examples" / "demo"
BASE = "pocket"
NAME = "bear"
EVERY = 100
"""Samples between measurements."""
PATIENCE = 3
NEAR = 1.03
"""What is published may be so many times the best loss of the over-long run, which no run knows before its end."""
OVER_LONG = 1.1
"""The over-long run has to end so many times above its best, or there was nothing to stop for."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An over-long run, and what patience made of the same."""

    pictures: int
    long: dict[int, float]
    """The held-out loss of the over-long run, by samples seen."""
    stopped: int
    """Samples that the patient run had seen at its end."""
    chosen: int
    """Samples after which it had what it published."""
    published: float
    """The held-out loss of the published file."""

    @property
    def best_at(self) -> int:
        """The samples seen at the lowest loss of the over-long run."""
        return min(self.long, key=self.long.__getitem__)

    @property
    def best(self) -> float:
        return self.long[self.best_at]

    @property
    def end(self) -> float:
        """The loss at the end of the over-long run."""
        return self.long[max(self.long)]

    def fault(self) -> str | None:
        """Why it does not show that patience stops near the best; None where it does."""
        if self.end < OVER_LONG * self.best:
            return f"{self.pictures} pictures: not over-long, it ends {self.end / self.best:.3f} times its best"
        if self.stopped == max(self.long):
            return f"{self.pictures} pictures: patience did not end the run"
        if self.published > NEAR * self.best:
            return f"{self.pictures} pictures: published {self.published / self.best:.3f} times the best"
        return None


def trial(pictures: int, samples: int, seed: int, folder: Path) -> Trial:
    """Both runs on the first `pictures` of the subject, in `folder`."""
    subject = folder / "subject"
    subject.mkdir(parents=True)
    for file in find_pictures(DEMO / "subject")[:pictures]:
        shutil.copy(file, subject)
    common = (f"run.samples={samples}", f"run.seed={seed}")
    long = run(folder / "long", subject, BASE, *common)
    patient = run(folder / "patient", subject, BASE, *common, watch=f",patience={PATIENCE},best=true")
    base = baked(folder / "patient" / "lora" / f"{NAME}-diffusers.safetensors", folder / "published")
    anew = run(folder / "anew", subject, str(base), "run.updates=1")
    return Trial(
        pictures=pictures,
        long={row["samples_seen"]: row["loss"] for row in long},
        stopped=patient[-1]["samples_seen"],
        chosen=patient[-1]["best_at"],
        published=anew[0]["loss"],  # before the first update, where a new LoRA changes nothing
    )


def run(output: Path, subject: Path, base: str, *settings: str, watch: str = "") -> list[dict[str, Any]]:
    """Train as `tuner lora` does; the rows of its measurements on the held-out pictures."""
    held_out = f"data=[{{type='folder',path='{DEMO / 'held-out'}'}}]"
    arguments = (
        f"run.output='{output}'", f"run.cache='{output.parent / 'cache'}'", f"run.name='{NAME}'",
        "run.batch_size=4", "run.precision='fp32'", f"model.base='{base}'",
        f"data=[{{type='folder',path='{subject}',prompt='sks bear'}}]", "method={rank=16}",
        "optimizer={type='adamw',lr=3e-3}", f"observers=[{{type='validation',every={EVERY},{held_out}{watch}}}]",
    )  # fmt: skip
    lora.main(load(lora.Config, None, [*arguments, *settings]))
    return [row for row in read_metrics(output / "metrics.jsonl") if row["kind"] == "validation"]


def baked(published: Path, folder: Path) -> Path:
    """The base with a published LoRA in its weights, made by stock diffusers."""
    pipeline: Any = BaseModel(base=BASE).open(torch.device("cpu")).pipeline()
    with listening():  # it remarks that there is nothing for the text encoder
        pipeline.load_lora_weights(published.parent, weight_name=published.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)
    return folder


def table(trials: Sequence[Trial]) -> str:
    """What was measured, in Markdown."""
    head = ("pictures", "loss before", "over-long: best, at", "over-long: at its end", "patience ended it at",
            "published, of", "published / best")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in trials:
        cells = (
            f"{each.pictures}",
            f"{each.long[0]:.4f}",
            f"{each.best:.4f}, {each.best_at}",
            f"{each.end:.4f}, {max(each.long)}",
            f"{each.stopped}",
            f"{each.published:.4f}, {each.chosen}",
            f"{each.published / each.best:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Train, print, and say whether it is shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[2, 6], help="of the subject: one trial each")
    parser.add_argument("--samples", type=int, default=2400, help="of the over-long run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        trials = [trial(n, given.samples, given.seed, Path(folder) / str(n)) for n in given.pictures]
    print(f"\n{BASE}, {given.samples} samples, seed {given.seed}, patience {PATIENCE}, measured every {EVERY} samples; "
          f"losses on held-out pictures, each with the samples seen\n\n{table(trials)}\n")  # fmt: skip
    faults = [fault for each in trials if (fault := each.fault())]
    print("\n".join(faults) or f"published: at most {NEAR} times the best of a run that is too long; shown")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
