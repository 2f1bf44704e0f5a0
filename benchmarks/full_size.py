"""What a run over a network of a released size needs, with numbers drawn at random in place of the released ones.

    python -m benchmarks.full_size                                 # Stable Diffusion 1.5, 3 updates of a LoRA at 256 px
    python -m benchmarks.full_size --model sdxl --dtype bfloat16 --resolution 512

writes the single file that one would download, with the names and shapes of the released model, trains a LoRA from it
in a process of its own, as `tuner lora` does, and prints the seconds of each update and the most memory that it took.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuner.rng import generator_at
from tuner.weights import published
from tuner.weights.layouts.ldm import from_diffusers
from tuner.weights.store import TensorMeta
from tuner.weights.writer import file_header, file_order, raw_bytes, whole_file

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "examples" / "demo" / "subject"
SPREAD = 0.02
"""Of the numbers in matrices."""


@dataclass(frozen=True)
class Drawn:
    """A released model's tensors by canonical names, with numbers that are drawn when they are asked for."""

    metas: dict[str, TensorMeta]

    @staticmethod
    def of(variant: str, dtype: torch.dtype) -> "Drawn":
        """Those of the released model `variant`."""
        return Drawn({name: TensorMeta(tuple(s), dtype) for name, s in published.tensors(variant).items()})

    def read(self, name: str) -> Tensor:
        """Ones for what scales, zeros for what is added, else a normal distribution."""
        meta = self.metas[name]
        if len(meta.shape) < 2:
            return (torch.ones if name.endswith("weight") else torch.zeros)(meta.shape, dtype=meta.dtype)
        return (torch.randn(meta.shape, generator=generator_at(0, name)) * SPREAD).to(meta.dtype)

    def locate(self, name: str) -> None:
        """Nowhere."""


def write(variant: str, dtype: torch.dtype, file: Path) -> None:
    """The single file, tensor by tensor."""
    drawn = Drawn.of(variant, dtype)
    single = from_diffusers(drawn.metas).of(drawn)
    with whole_file(file) as out:
        out.write(file_header(single.metas, {"format": "pt"}))
        for name in file_order(single.metas):
            out.write(raw_bytes(single.read(name)))


def main() -> None:
    """Write, train, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=published.variants(), default="sd1")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="of the file")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the arithmetic")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if left out")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="more of the run's config")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = given.folder or Path(temporary)
        file = folder / f"{given.model}.safetensors"
        since = time.perf_counter()
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(given.model, getattr(torch, given.dtype), file)
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB, written in {time.perf_counter() - since:.0f} s")
        output = folder / f"{given.precision}-{given.resolution}"
        arguments = (
            f"model.base='{file}'", f"run.output='{output}'", f"run.cache='{folder / 'cache'}'",
            f"run.updates={given.updates}", "run.batch_size=1", f"run.precision='{given.precision}'",
            "run.resume='never'", f"pictures.resolution={given.resolution}",
            f"data=[{{type='folder',path='{PICTURES}',prompt='sks bear'}}]", "method={rank=16}", *given.overrides,
        )  # fmt: skip
        subprocess.run([sys.executable, str(ROOT / "recipes" / "lora.py"), *arguments], check=True, cwd=ROOT)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
        seconds = [row["seconds"] for row in rows if row["kind"] == "update"]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"seconds an update: {', '.join(f'{each:.1f}' for each in seconds)}")
        print(f"peak memory: {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
