"""What goes wrong ends `tuner merge` with a line that names it, and an exit code; what was there before stays."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import command, crew, output
from tests.merge.test_run import IDS, SHAPES, folder, kohya_lora, model, peft_lora, tiny
from tests.tuner.weights import original
from tests.tuner.weights.test_store import DAMAGED

OUT = "out.safetensors"
LERP = ("lerp", "a.safetensors", "b.safetensors", f"to={OUT}")
REMEDY = r"download|choose|leave|use |say |run |put |wait|repeat|give|check|free|made for"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with two models, a base, and an output of before."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "base")):
        model(Path(f"{name}.safetensors"), seed)
    Path(OUT).write_bytes(b"before")


def main(words: Sequence[str]) -> int:
    """`tuner merge` with leave to replace the output of before."""
    return command.main((*words, "--overwrite"))


def tree() -> dict[str, str]:
    """Every file, by its content."""
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def refused(capsys):
    """Runs a merge that has to be refused, and gives what was said."""

    def run(code: int, *words: str) -> str:
        before = tree()
        capsys.readouterr()
        start = time.monotonic()
        assert main(words) == code, capsys.readouterr().err
        *notes, said = capsys.readouterr().err.splitlines()
        assert time.monotonic() - start < 5
        assert all(note.startswith("note: ") for note in notes)
        assert said.startswith("error: ") and said.isprintable()
        assert re.search(REMEDY, said), said
        assert tree() == before
        return said

    return run


def test_what_is_refused_here_is_merged_when_it_is_right():
    Path("b.safetensors").rename("b.ckpt")  # a safetensors file by another name
    Path("link.safetensors").symlink_to("a.safetensors")
    save_file(load_file("base.safetensors"), "base-00001-of-00001.safetensors")
    names = [*SHAPES, IDS]
    index = {"weight_map": dict.fromkeys(names, "base-00001-of-00001.safetensors")}
    Path("base.safetensors.index.json").write_text(json.dumps(index))
    words = ("add_difference", "link.safetensors", "b.ckpt", "base.safetensors.index.json", f"to={OUT}")
    assert main(words) == 0
    assert set(load_file(OUT)) == set(names)


# Damaged files


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_malformed_header_is_refused_naming_file_and_tensor(refused, fault):
    content, message = DAMAGED[fault]
    Path("bad.safetensors").write_bytes(content)
    said = refused(3, "lerp", "a.safetensors", "bad.safetensors", f"to={OUT}")
    assert "bad.safetensors" in said and re.search(message, said)


@pytest.mark.parametrize("place", ["the first model", "a LoRA", "a model that no step uses"])
def test_a_damaged_file_is_refused_wherever_it_stands(refused, place):
    Path("bad.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-1])
    words = {
        "the first model": ("lerp", "bad.safetensors", "b.safetensors"),
        "a LoRA": ("add", "a.safetensors", "bad.safetensors"),
        "a model that no step uses": ("lerp", "a.safetensors", "b.safetensors", "models.unused='bad.safetensors'"),
    }[place]
    assert "bad.safetensors" in refused(3, *words, f"to={OUT}")


@pytest.mark.parametrize("left", ["all but a byte", "three quarters", "half of the header", "nothing"])
def test_a_file_that_was_cut_short_is_refused(refused, left):
    whole = Path("b.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    size = {
        "all but a byte": len(whole) - 1,
        "three quarters": len(whole) * 3 // 4,
        "half of the header": header // 2,
        "nothing": 0,
    }[left]
    Path("b.safetensors").write_bytes(whole[:size])
    assert "b.safetensors" in refused(3, *LERP)


@pytest.mark.parametrize("fate", ["grows", "shrinks", "is replaced", "is rewritten", "is gone"])
@pytest.mark.parametrize("which", ["b.safetensors", "style/adapter_config.json"])
def test_an_input_that_changes_meanwhile_is_named_and_nothing_is_written(capsys, cut_up, fate, which):
    """Also a file that holds no tensors and decides what they mean."""
    words = LERP
    if which != "b.safetensors":
        tiny(Path("a.safetensors"), 1)
        peft_lora(Path("style"))
        words = ("add", "a.safetensors", "style", f"to={OUT}")
    file = Path(which)
    whole = file.read_bytes()

    def change() -> None:
        match fate:
            case "grows":
                file.write_bytes(whole + b" ")
            case "shrinks":
                os.truncate(file, len(whole) // 2)
            case "is replaced":
                Path("other").write_bytes(whole)
                Path("other").replace(file)
            case "is rewritten":
                file.write_bytes(whole[:-1] + b" ")
                os.utime(file, (1, 1))
            case _:
                file.unlink()

    with at_block(5, change):
        code = main((*words, "threads=1"))
    assert code in ((3, 5) if fate == "is gone" else (3,))
    said = capsys.readouterr().err.splitlines()[-1]
    how = "changed while it was read|changed its size|became shorter|cannot be opened"  # by when it is noticed
    assert file.name in said and re.search(how, said)
    assert Path(OUT).read_bytes() == b"before"
    assert not list(Path().glob(".*"))


# An output that is an input


@pytest.mark.parametrize("alias", ["itself", "a dot", "a link", "a hard link", "a linked folder", "an unused model"])
def test_an_input_is_never_written_over(refused, tmp_path, alias):
    Path("folder").mkdir()
    Path("here").symlink_to(".")
    to = {
        "itself": "a.safetensors",
        "a dot": "./folder/../a.safetensors",
        "a link": "link.safetensors",
        "a hard link": "hard.safetensors",
        "a linked folder": str(tmp_path / "here" / "a.safetensors"),
        "an unused model": "base.safetensors",
    }[alias]
    Path("link.safetensors").symlink_to("a.safetensors")
    os.link("a.safetensors", "hard.safetensors")
    words = ("lerp", "a.safetensors", "b.safetensors", "models.unused='base.safetensors'", f"to={to}")
    assert "is also an input" in refused(2, *words)


# Ends before the end

LAYERS = {f"layers.{index}.weight": (64, 128) for index in range(40)}


@pytest.fixture
def cut_up(monkeypatch):
    """Models whose merge writes eleven blocks, and what it gives; the output of before is back in its place."""
    model(Path("a.safetensors"), 1, LAYERS)
    model(Path("b.safetensors"), 2, LAYERS)
    for name, module in list(sys.modules.items()):
        if name.startswith("merge.") and hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 1 << 16)
    assert main(LERP) == 0
    expected = digest(OUT)
    Path(OUT).write_bytes(b"before")
    return expected


@contextlib.contextmanager
def at_block(number: int, action) -> Iterator[None]:
    """Does something just before the block `number` that is written, from 0 on; no other is written meanwhile.

    All is done in this process.
    """
    write, possible, seen, lock = output.Output.write, crew.possible, [], threading.Lock()

    def written(self, block, data):
        with lock:
            seen.append(block)
            if len(seen) == number + 1:
                action()
        write(self, block, data)

    output.Output.write, crew.possible = written, lambda settings: False
    try:
        yield
    finally:
        output.Output.write, crew.possible = write, possible


def fail(error: BaseException):
    def action():
        raise error

    return action


def ask(number: int = signal.SIGTERM):
    """Asks this process to stop, and waits until the main thread has heard of it."""

    def action():
        os.kill(os.getpid(), number)
        end = time.monotonic() + 30
        while signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
            assert time.monotonic() < end, "the main thread has not heard of the signal"
            time.sleep(0.01)

    return action


def test_a_disk_that_fails_half_way_leaves_nothing(refused, cut_up):
    with at_block(5, fail(OSError(errno.EIO, os.strerror(errno.EIO)))):
        said = refused(5, *LERP)
    assert OUT in said and "Input/output error" in said


def test_a_bug_half_way_leaves_nothing(capsys, cut_up):
    before = tree()
    with at_block(5, fail(ZeroDivisionError("oh"))):
        assert main(LERP) == 1
    assert "please report it" in capsys.readouterr().err
    assert tree() == before


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NEEDED = sum(64 * 128 * 2 for _ in LAYERS) + 77 * 8


@pytest.mark.parametrize("when", ["before the first byte", "half-way"])
def test_a_full_disk_is_said_with_what_is_needed_and_leaves_nothing(refused, cut_up, monkeypatch, when):
    full = fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if when == "half-way":  # as where a file system cannot set space aside
        with at_block(5, full):
            said = refused(5, *LERP)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", lambda *arguments: full())
            said = refused(5, *LERP)
    assert OUT in said and "disk is full" in said and f"needed {NEEDED} bytes" in said
    assert main(LERP) == 0
    assert digest(OUT) == cut_up


@pytest.mark.parametrize("when", ["before the first byte", "half-way"])
def test_a_limit_on_the_size_of_files_is_said_and_leaves_nothing(refused, cut_up, monkeypatch, when):
    if when == "half-way":
        monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: None)
    with largest_file(300_000):
        said = refused(5, *LERP)
    assert OUT in said and "larger than a file may be here" in said and f"needed {NEEDED} bytes" in said
    assert "'ulimit -f' allows this process 300000" in said and "disk is full" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("block", [0, 5, 10])
def test_a_signal_ends_a_merge_with_its_code_and_resume_goes_on_to_the_same_bytes(capsys, cut_up, number, block):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with at_block(block, ask(number)), pytest.raises(SystemExit) as caught:
        main((*LERP, "threads=1"))
    assert caught.value.code == 128 + number
    assert "the same command with --resume goes on" in capsys.readouterr().err.splitlines()[-1]
    assert Path(OUT).read_bytes() == b"before"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    written = []
    with at_block(0, lambda: written.append(True)):
        assert main((*LERP, "--resume")) == 0
    assert bool(written) == (block < 10)  # all that was done was kept
    assert digest(OUT) == cut_up
    assert not list(Path().glob(".*"))


def test_what_a_stopped_merge_left_is_removed_by_the_next(cut_up):
    with at_block(5, ask()), pytest.raises(SystemExit):
        main(LERP)
    assert len(list(Path().glob(".*"))) == 2
    assert main(LERP) == 0
    assert digest(OUT) == cut_up
    assert not list(Path().glob(".*"))


def test_a_signal_before_the_first_byte_leaves_nothing(monkeypatch, capsys):
    before = tree()
    monkeypatch.setattr("merge.run.plan", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        main(LERP)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "interrupted\n"
    assert tree() == before


def test_a_signal_that_the_process_ignores_stays_ignored(cut_up):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with at_block(5, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert main(LERP) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert digest(OUT) == cut_up


def test_an_unfinished_file_that_lost_its_end_is_begun_again(cut_up):
    with at_block(5, ask()), pytest.raises(SystemExit):
        main(LERP)
    os.truncate(f".{OUT}.part", 100_000)
    assert main((*LERP, "--resume")) == 0
    assert digest(OUT) == cut_up


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_that_is_asked_to_stop_says_so_last(cut_up, number):
    """Also a Ctrl-C that comes twice, as impatient people's do: the second ends it on the spot."""
    slow = (
        "import sys, time; from merge import output, run\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('merge.') and hasattr(module, 'BLOCK'): module.BLOCK = 1 << 16\n"
        "write = output.Output.write\n"
        "def slowly(self, block, data): print('w', flush=True); time.sleep(1); write(self, block, data)\n"
        "output.Output.write = slowly\n"
        "from merge.command import main; sys.exit(main(sys.argv[1:]))"
    )
    program = [sys.executable, "-c", slow, *LERP, "threads=1", "--overwrite"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        if number == signal.SIGINT:
            time.sleep(0.4)  # until the first has been heard
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert said.endswith("\ninterrupted; what is done is kept, and the same command with --resume goes on\n")
    else:
        assert process.returncode == -signal.SIGINT
    assert Path(OUT).read_bytes() == b"before"
    assert main((*LERP, "--resume")) == 0
    assert digest(OUT) == cut_up
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("block", [0, 5, 10])
def test_a_merge_that_was_killed_leaves_what_was_there_and_goes_on(cut_up, block):
    """As by `kill -9`, or by the system for want of memory: no code of ours runs any more."""
    with at_block(block, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        child = os.fork()
        if not child:
            main((*LERP, "threads=1"))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert Path(OUT).read_bytes() == b"before"
    assert main((*LERP, "--resume")) == 0
    assert digest(OUT) == cut_up
    assert not list(Path().glob(".*"))


def test_a_folder_is_whole_or_not_there_and_nothing_of_an_earlier_merge_gets_into_it(capsys):
    for seed, name in enumerate(("one", "two", "three", "old")):
        folder(Path(name), seed)
    shutil.rmtree("three/vae")
    words = ("lerp", "one", "two", "to=old")
    assert main(("lerp", "one", "two", "to=expected")) == 0
    before = tree()
    with at_block(1, ask()), pytest.raises(SystemExit):
        main((*words, "threads=1"))
    assert {name: content for name, content in tree().items() if not name.startswith(".")} == before
    assert "--resume" in capsys.readouterr().err
    stopped = Path("stopped")
    shutil.copytree(".old.part", stopped)
    assert main((*words, "--resume")) == 0
    now = tree()
    made, wanted = ({name: now[name] for name in now if name.startswith(start)} for start in ("old/", "expected/"))
    assert {f"expected/{name[4:]}": content for name, content in made.items()} == wanted
    stopped.rename(".old.part")
    assert main(("lerp", "three", "three", "to=old")) == 0
    assert not Path("old/vae").exists()
    assert not list(Path().glob(".*"))


def test_an_output_that_another_process_writes_is_left_alone(refused):
    folder(Path("one"), 1)
    Path(".blend.part").mkdir()
    Path(f".{OUT}.part").write_bytes(b"at work")
    for place, words in ((f".{OUT}.part", LERP), (".blend.part", ("lerp", "one", "one", "to=blend"))):
        descriptor = os.open(place, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another process is writing it" in refused(7, *words)
        os.close(descriptor)


# Models that do not fit


def changed(name: str, **tensors: torch.Tensor | None) -> str:
    """Model b with other tensors; None leaves one out."""
    file = f"{name}.safetensors"
    whole = load_file("b.safetensors") | tensors
    save_file({key: value for key, value in whole.items() if value is not None}, file)
    return file


NAMES = list(SHAPES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("method", ["lerp", "ties"])
def test_what_is_not_finite_is_refused_with_the_first_five_names_and_a_count(refused, value, count, method):
    bad = {name: torch.full(SHAPES[name], value).half() for name in NAMES[:count]}
    words = (method, "a.safetensors", changed("odd", **bad), f"to={OUT}")
    said = refused(3, *words, *(["base=base.safetensors"] if method == "ties" else []))
    assert "odd: " in said and "NaN or infinity" in said
    listed = [name for name in load_file("odd.safetensors") if name in said]
    assert len(listed) == min(count, 5) and set(listed) <= set(bad)
    assert (" and 2 more" in said) == (count == 7)


@pytest.mark.parametrize("lacking", ["odd", "a"])
@pytest.mark.parametrize("count", [1, 7])
def test_names_that_a_model_lacks_are_listed_with_a_count(refused, lacking, count):
    if lacking == "odd":
        file = changed("odd", **dict.fromkeys(NAMES[:count]))
    else:
        file = changed("odd", **{f"model.diffusion_model.more.{n}": torch.ones(1) for n in range(count)})
    said = refused(3, "lerp", "a.safetensors", file, f"to={OUT}")
    assert f"{lacking}: lacks " in said and "missing = 'take'" in said
    assert len(re.findall(r"model[\w.]+(?=,| and| that)", said)) == min(count, 5)
    assert (" and 2 more" in said) == (count == 7)


@pytest.mark.parametrize("count", [1, 6])
def test_shapes_that_differ_are_listed_with_a_count(refused, count):
    bad = {name: torch.zeros(*SHAPES[name], 2).half() for name in NAMES[-count:]}
    said = refused(3, "lerp", "a.safetensors", changed("odd", **bad), f"to={OUT}")
    assert len([name for name in bad if name in said]) == min(count, 5)
    assert "a [100, 16], odd [100, 16, 2]" in said
    assert (" and 1 more" in said) == (count == 6)


def test_models_of_two_families_are_refused_by_name(refused):
    sdxl = original.unet("model.diffusion_model.", 4, (1, 2, 4), (0, 2, 3), 3, 6, conv=False, sizes=5)
    tiny(Path("sd.safetensors"), 1)
    model(Path("xl.safetensors"), 1, sdxl)
    said = refused(3, "lerp", "sd.safetensors", "xl.safetensors", f"to={OUT}")
    assert "sd and xl" in said and "Stable Diffusion 1" in said and "Stable Diffusion XL" in said


def test_a_result_that_does_not_fit_its_dtype_is_refused(refused):
    large = changed("odd", **{NAMES[0]: torch.full(SHAPES[NAMES[0]], 65000.0).half()})
    said = refused(3, "add_difference", large, large, "base.safetensors", "weight=1.5", f"to={OUT}")
    assert NAMES[0] in said and "does not fit float16" in said and "bfloat16" in said
    again = ("add_difference", large, large, "base.safetensors", "weight=1.5", "dtype=bfloat16", f"to={OUT}")
    assert main(again) == 0


LORAS = {
    "NaN": ("lora_unet_mid_block_resnets_0_conv1.lora_up.weight", "holding NaN"),
    "no up": ("lora_unet_mid_block_resnets_0_conv1", "lacks up"),
    "empty": ("", "holds no tensors"),
    "other": ("lora_unet_nowhere_0_to_k", "modules are not in the network"),
    "other shape": ("unet.mid_block.resnets.0.conv1.weight", "do not fit"),
}


@pytest.mark.parametrize("fault", LORAS)
def test_a_lora_that_is_not_right_is_refused_by_name(refused, fault):
    tiny(Path("sd.safetensors"), 1)
    kohya_lora(Path("style.safetensors"))
    tensors = load_file("style.safetensors")
    up = LORAS["NaN"][0]
    match fault:
        case "NaN":
            tensors[up][0, 0] = float("nan")
        case "no up":
            del tensors[up]
        case "empty":
            tensors = {}
        case "other":
            tensors = {name.replace("mid_block_resnets_0_conv1", "nowhere_0_to_k"): t for name, t in tensors.items()}
        case _:
            tensors[up] = torch.zeros(64, 2, 1, 1)
    save_file(tensors, "style.safetensors")
    name, words = LORAS[fault]
    said = refused(3, "add", "sd.safetensors", "style.safetensors", f"to={OUT}")
    assert "style" in said and name in said and words in said


def test_the_output_has_the_tensors_of_the_plan(capsys):
    more = torch.ones(3).half()
    words = ("lerp", "a.safetensors", changed("odd", **{NAMES[2]: None, "more": more}), "missing=take", f"to={OUT}")
    assert main((*words, "--json")) == 0
    planned = json.loads(capsys.readouterr().out)["tensors"]
    assert main(words) == 0
    assert set(load_file(OUT)) == set(planned) == {*SHAPES, IDS, "more"}


# What could run code


class Canary:
    def __reduce__(self):
        return (os.system, ("touch canary",))


def pickles() -> dict[str, bytes]:
    old, new, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"w": Canary()}, old, _use_new_zipfile_serialization=False)
    torch.save({"w": Canary()}, new)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(200_000_000))
    return {
        "torch's": new.getvalue(),
        "an old one": old.getvalue(),
        "a plain one": pickle.dumps({"w": Canary()}),
        "a bomb": archive.getvalue(),
    }


@pytest.fixture(scope="module")
def pickled() -> dict[str, bytes]:
    return pickles()


@pytest.mark.parametrize("kind", ["torch's", "an old one", "a plain one", "a bomb"])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "safetensors"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(refused, pickled, kind, suffix):
    Path(f"bad.{suffix}").write_bytes(pickled[kind])
    said = refused(4, "lerp", "a.safetensors", f"bad.{suffix}", f"to={OUT}")
    assert f"bad.{suffix}" in said and "tuner convert" in said
    assert not Path("canary").exists()


def test_a_folder_of_pickles_is_refused(refused, pickled):
    folder(Path("one"), 1)
    Path("one/unet/diffusion_pytorch_model.safetensors").unlink()
    Path("one/unet/diffusion_pytorch_model.bin").write_bytes(pickled["torch's"])
    assert "tuner convert" in refused(4, "lerp", "one", "one", f"to={OUT}")
    assert not Path("canary").exists()


INDEX = "model/model.safetensors.index.json"


def index(**weight_map: str) -> None:
    Path("model").mkdir(exist_ok=True)
    Path(INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("place", ["../a.safetensors", "/tmp/a.safetensors", "sub/a.safetensors", "link.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(refused, place):
    index(w=place)
    Path("model/link.safetensors").symlink_to(Path("a.safetensors").absolute())
    said = refused(4, "lerp", "a.safetensors", INDEX, f"to={OUT}")
    assert Path(place).name in said


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"w": "one.safetensors", "x": "lost.safetensors"}, "lost.safetensors is missing"),
        ({"w": "one.safetensors", "x": "two.safetensors"}, "'w' is in both"),
        ({"w": "one.safetensors", "x": "one.safetensors"}, "'x' is not in one.safetensors"),
    ],
)
def test_an_index_that_its_shards_contradict_is_refused(refused, weight_map, said):
    index(**weight_map)
    save_file({"w": torch.ones(1)}, "model/one.safetensors")
    save_file({"w": torch.ones(1), "x": torch.ones(1)}, "model/two.safetensors")
    assert said in refused(3, "lerp", "a.safetensors", INDEX, f"to={OUT}")


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("what", ["its file", "a shard", "a shard of another folder"])
def test_a_component_whose_weights_lie_elsewhere_is_refused(refused, component, what):
    folder(Path("one"), 1)
    for path in Path("one", component).glob("*.safetensors*"):
        path.unlink()
    stem = f"one/{component}/{'model' if component == 'text_encoder' else 'diffusion_pytorch_model'}"
    save_file({"w": torch.ones(1)}, "secret.safetensors")
    if what == "its file":
        Path(f"{stem}.safetensors").symlink_to(Path("secret.safetensors").absolute())
    else:
        shard = "link.safetensors" if what == "a shard" else "../../secret.safetensors"
        Path(f"one/{component}/link.safetensors").symlink_to(Path("secret.safetensors").absolute())
        Path(f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "one" in refused(4, "lerp", "one", "one", "to=blend")


@pytest.mark.parametrize("place", ["bad.safetensors", "one/unet/diffusion_pytorch_model.safetensors", INDEX])
def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_it(refused, place):
    folder(Path("one"), 1)
    Path("model").mkdir()
    Path(place).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n")
    said = refused(3, "lerp", "a.safetensors", place.partition("/")[0] if "unet" in place else place, f"to={OUT}")
    assert "git lfs pull" in said and Path(place).name in said


def test_code_in_a_models_folder_is_neither_run_nor_copied():
    folder(Path("one"), 1)
    Path("one/unet/modeling.py").write_text("open('canary', 'w')")
    Path("one/pipeline.py").write_text("open('canary', 'w')")
    Path("one/unet/config.json").write_text('{"auto_map": {"AutoModel": "modeling.UNet"}}')
    Path("one/model_index.json").write_text('{"_class_name": ["pipeline", "Pipeline"]}')
    assert main(("lerp", "one", "one", "to=blend")) == 0
    assert not Path("canary").exists()
    assert not list(Path("blend").rglob("*.py"))
