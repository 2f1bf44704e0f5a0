"""How fast pictures become cached latents, and what a large data set costs before the first one is read.

python -m benchmarks.data                     # pictures a second, and 100,000 small pictures at the start
python -m benchmarks.data --start 10000

Against a bare Pillow loop: open, decode, turn upright, cut, scale (Lanczos), to a tensor. The autoencoder is left out
on both sides, since it is the same; hashing and the cache's writing are ours alone. One process each, in turns.
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
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

PICTURES, SIDE = 96, 1500
BUCKET = (512, 512)


def pictures(folder: Path) -> None:
    """Noise over gradients, as large as photographs are, in JPEG."""
    for index in range(PICTURES):
        draw = np.random.default_rng(index)
        coarse = draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        made = Image.fromarray(coarse).resize((SIDE, SIDE - 300), Image.Resampling.BICUBIC)
        made.save(folder / f"{index:03}.jpg", quality=92)


def bare(folder: Path, workers: int) -> float:
    """Pictures a second of a plain loop."""
    from concurrent.futures import ThreadPoolExecutor

    def one(file: Path) -> torch.Tensor:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        cut = ImageOps.fit(upright, BUCKET, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1

    files = sorted(folder.glob("*.jpg"))
    begun = time.perf_counter()
    if workers == 1:
        for file in files:
            one(file)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(one, files):
                pass
    return len(files) / (time.perf_counter() - begun)


@dataclass
class Free:
    """An autoencoder that costs nothing."""

    def encode_images(self, pixels: torch.Tensor) -> Any:
        from tuner.diffusion.model import LatentDistribution

        small = pixels[:, :1, ::8, ::8].expand(-1, 4, -1, -1)
        return LatentDistribution(small, small)


def ours(folder: Path, workers: int) -> float:
    """Pictures a second into the cache: checked, hashed, cut, encoded by nothing, written."""
    from tuner.data import ahead
    from tuner.data.buckets import Buckets
    from tuner.data.cache import Cache
    from tuner.data.encode import Encoded
    from tuner.data.images import Pictures
    from tuner.data.sources.folder import PictureFolder

    ahead.workers = lambda: workers
    with tempfile.TemporaryDirectory() as cache:
        begun = time.perf_counter()
        encoded = Encoded(
            examples=PictureFolder(path=folder, prompt="a picture").examples(),
            buckets=Buckets(resolution=BUCKET[0], step=64, max_ratio=1.0),
            pictures=Pictures(),
            cache=Cache(Path(cache)),
            autoencoder="none",
            text_encoder=None,
        )
        model: Any = Free()
        encoded.fill_latents(model, encoded.missing_latents(), lambda keys, _: keys)
        return PICTURES / (time.perf_counter() - begun)


def start(count: int) -> dict[str, float]:
    """Seconds and memory of reading the headers and captions of many pictures, and of hashing them; then again."""
    from tuner.data.hashes import file_hashes
    from tuner.data.sources.folder import PictureFolder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        draw = np.random.default_rng(0)
        for index in range(count):
            inside = folder / f"{index // 1000:03}"
            inside.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(inside / f"{index}.png")
            (inside / f"{index}.txt").write_text(f"picture {index}")
        time.sleep(6)  # what changed just now is not remembered
        before = _memory()
        found: dict[str, float] = {}
        for turn in ("first", "again"):
            begun = time.perf_counter()
            examples = PictureFolder(path=folder).examples()
            found[f"{turn}: headers and captions, s"] = time.perf_counter() - begun
            begun = time.perf_counter()
            file_hashes([example.image for example in examples], Path(name) / "cache")
            found[f"{turn}: hashes, s"] = time.perf_counter() - begun
        found["memory, MB"] = (_memory() - before) / 1e6
        return found


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--start", type=int, default=100_000, help="how many pictures the start is measured with; 0: not"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        kind, folder, workers = given.one
        print(json.dumps((bare if kind == "bare" else ours)(Path(folder), int(workers))))
        return
    with tempfile.TemporaryDirectory() as name:
        pictures(Path(name))
        for workers in (1, 2):
            rates: dict[str, list[float]] = {"bare": [], "ours": []}
            for _ in range(given.rounds):
                for kind, found in rates.items():
                    command = [sys.executable, "-m", "benchmarks.data", "--one", kind, name, str(workers)]
                    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
                    found.append(float(said.splitlines()[-1]))
            bare_rate, our_rate = (sorted(found)[len(found) // 2] for found in rates.values())
            print(
                f"{workers} workers: ours {our_rate:.1f} pictures/s, bare Pillow {bare_rate:.1f}, "
                f"ratio {our_rate / bare_rate:.2f}"
            )
    if given.start:
        for what, value in start(given.start).items():
            print(f"{given.start:,} pictures, {what}: {value:.2f}")


if __name__ == "__main__":
    main()
