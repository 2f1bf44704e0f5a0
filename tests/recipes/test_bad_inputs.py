"""A bad input ends a run with a line that names it and what to do, and an exit code; what was there before stays."""

import hashlib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import runs
from tuner.config.command_line import run as run_command


def tree(folder: Path) -> dict[str, str]:
    """Every file, by its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def done(ground: runs.Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is complete, which the next one may not harm."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert ground.run("lora", folder, "run.updates=2") == 0
    return folder


@pytest.fixture
def copy(ground: runs.Ground, done: Path, tmp_path: Path) -> runs.Ground:
    """Base, pictures, cache and a finished run, which may be changed."""
    shutil.copytree(done, tmp_path / "ground" / "run")
    return runs.Ground(Path(shutil.copytree(ground.folder, tmp_path / "ground", dirs_exist_ok=True)))


def spoil(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[runs.Ground], None]:
    def change(ground: runs.Ground) -> None:
        file = ground.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content(file.read_bytes()))

    return change


def remove(name: str) -> Callable[[runs.Ground], None]:
    def change(ground: runs.Ground) -> None:
        path = ground.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def animate(ground: runs.Ground) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(ground.pictures / "0.png", save_all=True, append_images=frames[1:])


def nothing(ground: runs.Ground) -> None:
    pass


CASES: dict[str, tuple[Callable[[runs.Ground], None], str, int, tuple[str, ...]]] = {
    # pictures and captions
    "half a picture": (spoil("pictures/2.png", lambda b: b[: len(b) // 2]), "", 3, ("2.png", "replace or remove it")),
    "no picture": (spoil("pictures/2.png", b"<html>404</html>"), "", 3, ("2.png", "not a readable picture")),
    "moving picture": (animate, "", 3, ("0.png", "has 2 frames; save the one you mean")),
    "missing caption": (remove("pictures/4.txt"), "", 3, ("1 of 7", "4.png", "write 4.txt, or give all one `prompt`")),
    "empty caption": (spoil("pictures/4.txt", b" \n"), "", 3, ("4.txt", "is empty")),
    "caption in UTF-16": (spoil("pictures/4.txt", b"\xff\xfec\0"), "", 3, ("4.txt", "byte 0", "save it as UTF-8")),
    "no data folder": (remove("pictures"), "", 3, ("pictures", "no such folder")),
    "no data": (nothing, "data=[]", 2, ("data: empty", "give at least one source")),
    # the base
    "missing base": (nothing, "model.base='/nowhere/base'", 3, ("model.base", "/nowhere/base", "give one of them")),
    "misspelt base": (nothing, "model.base='pockett'", 3, ("model.base", "pockett", "diffusers folder")),
    "base without a part": (remove("base/vae"), "", 3, ("base", "vae")),
    "damaged weights": (spoil("base/unet/diffusion_pytorch_model.safetensors", lambda b: b[:-9]), "", 3, ("unet",)),
    # the config
    "unknown key": (nothing, "method.rnak=8", 2, ("command line: method.rnak: unknown key; did you mean 'rank'?",)),
    "wrong type": (nothing, "method.rank='8'", 2, ("method.rank", "expected")),
    "text for a number": (nothing, "run.batch_size='four'", 2, ("run.batch_size",)),
    "unknown variant": (nothing, "optimizer.type='adamv'", 2, ("optimizer.type", "adamw")),
    "out of range": (nothing, "captions.dropout=1.5", 2, ("captions", "dropout must lie in [0, 1], got 1.5")),
    "not a number": (nothing, "optimizer.lr=nan", 2, ("optimizer.lr",)),
    "no effect": (nothing, "captions.keep=2", 2, ("captions", "keep has no effect", "set shuffle = true")),
    "no such layer": (nothing, "method.targets=['atention']", 2, ("method.targets", "'atention' is found in no layer")),
    "no such colour": (nothing, "pictures.background='whitish'", 2, ("pictures", "background", "#rrggbb")),
    "no bucket": (nothing, "pictures.resolution=100", 2, ("pictures", "resolution", "multiple of 8")),
    "no step": (nothing, "pictures.bucket_step=12", 2, ("pictures.bucket_step", "multiple of 8")),
    "too large a step": (nothing, "pictures.bucket_step=128", 2, ("pictures", "resolution", "128")),
    # the machine
    "cache that is a file": (spoil("a file", b""), "run.cache='{folder}/a file'", 5, ("run.cache", "a file")),
    "output that is a file": (spoil("file", b""), "run.output='{folder}/file'", 5, ("run.output", "file")),
    "output below a file": (spoil("file", b""), "run.output='{folder}/file/run'", 5, ("run.output", "file/run")),
}  # fmt: skip
CHECKED = [name for name in CASES if not name.startswith(("cache", "output"))]


def errors(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were said of errors; no other ones that look like a crash."""
    err = capfd.readouterr().err
    assert "Traceback" not in err and "This is a bug" not in err, err
    lines = [line for line in err.split("\n") if line.startswith("error: ")]
    assert all(line.isprintable() for line in lines)
    return lines


def run(ground: runs.Ground, *more: str) -> int:
    module: Any = importlib.import_module("recipes.lora")
    arguments = ground.arguments(ground.folder / "run", *runs.COMMON, *runs.METHODS["lora"], "run.updates=3", *more)
    return run_command(module.Config, module.main, arguments, check=module.check)


@pytest.fixture(autouse=True)
def no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_refused_in_a_line_and_nothing_is_lost(case, copy, capfd):
    spoil_it, argument, code, fragments = CASES[case]
    spoil_it(copy)
    before = tree(copy.folder)
    assert run(copy, *([argument.format(folder=copy.folder)] if argument else [])) == code
    (line,) = errors(capfd)
    assert all(fragment in line for fragment in fragments), line
    after = tree(copy.folder)
    assert {name: after.get(name) for name in before if ".lock" not in name} == {
        name: content for name, content in before.items() if ".lock" not in name
    }
    new = {Path(name).relative_to(copy.folder).parts[0] for name in after.keys() - before.keys()}
    assert new <= {"cache"}  # pictures that were good have been encoded


@pytest.mark.parametrize("case", CHECKED)
def test_check_refuses_it_as_the_run_does(case, copy, capfd):
    spoil_it, argument, code, fragments = CASES[case]
    spoil_it(copy)
    before = tree(copy.folder)
    assert run(copy, *([argument.format(folder=copy.folder)] if argument else []), "--check") == code
    (line,) = errors(capfd)
    assert all(fragment in line for fragment in fragments), line
    assert tree(copy.folder) == before


def test_the_same_run_with_good_inputs_goes_on(copy):
    """The valid twin of all of them; that its folders have moved is a change that can be accepted."""
    assert run(copy, "run.accept_changes=true") == 0 and runs.places(copy.folder / "run")[-1] == 12


def test_all_broken_files_are_named_in_one_go(copy, capfd):
    for index in (1, 3, 5):
        spoil(f"pictures/{index}.png", b"not a picture")(copy)
    assert run(copy) == 3
    assert [Path(line.split(": ")[1]).name for line in errors(capfd)] == ["1.png", "3.png", "5.png"]


def test_a_bad_file_is_named_with_its_line(copy, capfd, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        f"[run]\noutput = '{copy.folder}/run'\nupdates = 3\n[model]\nbase = '{copy.folder}/base'\n"
        f"[[data]]\ntype = 'folder'\npath = '{copy.pictures}'\n[method]\nrnak = 8\n"
    )
    module: Any = importlib.import_module("recipes.lora")
    assert run_command(module.Config, module.main, [str(file)]) == 2
    (line,) = errors(capfd)
    assert "mine.toml:10: method.rnak: unknown key; did you mean 'rank'?" in line


def test_masks_that_the_cut_leaves_nothing_of_are_named_before_the_first_update(ground, tmp_path, capfd):
    """Not when one of them happens to come, hours later."""
    (tmp_path / "pictures").mkdir(), (tmp_path / "masks").mkdir()
    for name, box in {"left": (0, 0, 20, 64), "middle": (120, 20, 136, 40), "right": (236, 0, 256, 64)}.items():
        Image.effect_noise((256, 64), 100).convert("RGB").save(tmp_path / "pictures" / f"{name}.png")
        mask = Image.new("L", (256, 64))
        mask.paste(255, box)
        mask.save(tmp_path / "masks" / f"{name}.png")
    data = f"data=[{{type='folder',path='{tmp_path / 'pictures'}',prompt='a cat',masks='{tmp_path / 'masks'}'}}]"

    def run(*more: str) -> tuple[int, list[str]]:
        output = tmp_path / f"run {len(more)} {more[-1][:20].replace('/', '')}" if more else tmp_path / "run"
        capfd.readouterr()
        code = ground.run("lora", output, data, "run.updates=1", "captions.dropout=0.0", *more)
        assert (output / "checkpoints").exists() == (code == 0)
        return code, [line for line in capfd.readouterr().err.split("\n") if line.startswith("error: ")]

    code, lines = run()
    assert code == 3 and [Path(line.split(": ")[1]).name for line in lines] == ["left.png", "right.png"]
    assert all("is black where it is cut, so that nothing of it counts; draw the mask" in line for line in lines)
    code, lines = run("pictures.crop='random'", "pictures.variants=9")
    assert code == 3 and len(lines) == 3 and all("in some of its cuts" in line for line in lines)
    assert run("objective.unmasked_weight=0.1") == (0, [])
    assert run("pictures.max_ratio=4.0") == (0, [])


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_wildcards_are_looked_at_in_every_line_of_every_caption_before_the_first_update(
    arguments, copy, tmp_path, capfd
):
    (copy.pictures / "0.txt").write_text("a, b, c, d, e, f, g, h")  # too many orders to be listed
    (copy.pictures / "6.txt").write_text("a, b, c, d, e, f, g, h\na {red cat")
    captions = "captions={lines='choose',wildcards=true,shuffle=true}"
    assert copy.run("lora", tmp_path / "run", "run.updates=1", captions, *arguments) == 3
    assert "caption 'a {red cat': a '{' is not closed" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
