"""Outputs in scaled 8-bit floats: what is read back is within half a step, whoever reads it."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge import command
from tests.merge.test_faults import ask, at_block
from tests.merge.test_run import folder, model, tiny
from tests.tuner.weights import original
from tuner.weights.checkpoint import open_files, open_store
from tuner.weights.store import SafetensorsFile

MARK = "model.diffusion_model.scaled_fp8"
WORDS = ("lerp", "a.safetensors", "b.safetensors", "t=0.3", "dtype=float8_e4m3fn_scaled", "to=out.safetensors")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny(Path(f"{name}.safetensors"), seed)


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def scaled(shapes: dict[str, torch.Tensor]) -> set[str]:
    """The linear layers of the denoiser."""
    return {
        name
        for name, tensor in shapes.items()
        if name.startswith("model.diffusion_model.") and name.endswith(".weight") and tensor.ndim == 2
    }


def test_linear_layers_are_within_half_a_step_and_the_rest_is_as_ever():
    assert command.main(WORDS) == 0
    a, b, meant = (open_store(Path(f"{name}.safetensors")) for name in ("a", "b", "out"))
    raw = open_files(Path("out.safetensors"))
    weights = scaled(load_file("a.safetensors"))
    assert len(weights) > 100
    assert set(raw.metas) == {*a.metas, MARK, *(name.replace(".weight", ".scale_weight") for name in weights)}
    assert set(meant.metas) == set(a.metas)
    assert raw.metas[MARK].shape == (2,)  # so that the layers compute in 16 bits
    for name in a.metas:
        if not a.metas[name].dtype.is_floating_point:
            continue
        expected = torch.lerp(a.read(name).float(), b.read(name).float(), 0.3)
        if name not in weights:
            assert raw.metas[name].dtype == torch.float16 and torch.equal(raw.read(name), expected.half())
            continue
        assert raw.metas[name].dtype == torch.float8_e4m3fn
        scale = raw.read(name.replace(".weight", ".scale_weight"))
        assert scale.dtype == torch.float32 and scale.shape == ()
        assert scale.item() == pytest.approx(expected.abs().max().item() / 448, rel=1e-6)
        units = (expected / scale).abs().double()
        half = torch.exp2(torch.floor(torch.log2(units.clamp(min=2**-6))) - 4)  # of a step of 3 binary places
        error = (meant.read(name).double() - expected.double()).abs() / scale
        assert (error <= half * 1.0001).all(), name
        assert raw.read(name).float().abs().max() == 448


def test_the_error_is_told_in_steps_of_the_output(capsys):
    assert command.main(WORDS) == 0
    said = capsys.readouterr().out
    assert 0.4 < float(said.partition("largest error ")[2].split()[0]) < 0.51


def test_a_scale_keeps_small_weights_that_plain_8_bits_lose():
    for seed, name in enumerate(("a", "b")):
        model(Path(f"{name}.safetensors"), seed, original.unet(width=32, context=48), scale=0.02)
    words = [word.replace("_scaled", "").replace("out", "plain") for word in WORDS]
    assert command.main(WORDS) == command.main(words) == 0
    a, b, out, plain = (open_store(Path(f"{name}.safetensors")) for name in ("a", "b", "out", "plain"))
    for name in sorted(scaled(load_file("a.safetensors")))[:20]:
        expected = torch.lerp(a.read(name).float(), b.read(name).float(), 0.3)
        errors = [(store.read(name).float() - expected).norm() for store in (out, plain)]
        assert errors[0] < 0.8 * errors[1], name


def test_threads_blocks_and_interruptions_change_no_bit(monkeypatch):
    assert command.main(WORDS) == 0
    expected = digest("out.safetensors")
    for name, module in list(sys.modules.items()):
        if name.startswith("merge.") and hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 1 << 16)
    for threads in (1, 3):
        Path("out.safetensors").unlink()
        assert command.main((*WORDS, f"threads={threads}", "verify=0")) == 0
        assert digest("out.safetensors") == expected
    header = SafetensorsFile(Path("out.safetensors")).header
    blocks = -(-(header.file_bytes - header.data_start) // (1 << 16))
    for block in (3, blocks - 1):  # the last one has the scales
        with at_block(block, ask()), pytest.raises(SystemExit):
            command.main((*WORDS, "threads=1"))
        assert command.main((*WORDS, "--resume", "verify=0")) == 0
        assert digest("out.safetensors") == expected


def test_a_tensor_that_is_copied_otherwise_is_scaled_too():
    words = [word.replace("t=0.3", "t=0.0") for word in WORDS]
    assert command.main(words) == 0
    a, out = (open_store(Path(f"{name}.safetensors")) for name in ("a", "out"))
    for name in scaled(load_file("a.safetensors")):
        assert (out.read(name) - a.read(name).float()).norm() < 0.04 * a.read(name).float().norm()


def test_a_layer_of_zeros_has_a_scale(capsys):
    for name in ("a", "b"):
        model(Path(f"{name}.safetensors"), 1, original.unet(width=8, context=6), scale=0.0)
    assert command.main(WORDS) == 0
    out = open_store(Path("out.safetensors"))
    assert all(not out.read(name).any() for name in scaled(load_file("a.safetensors")))


def test_it_is_planned_and_rebuilt(capsys):
    assert command.main((*WORDS, "--plan")) == 0
    assert "scales of 8-bit weights" in capsys.readouterr().out
    assert command.main(WORDS) == 0
    assert command.main(("rebuild", "out.safetensors", "--sources", ".", "--to", "again.safetensors")) == 0
    assert digest("again.safetensors") == digest("out.safetensors")


def test_what_was_scaled_is_merged_as_what_it_means():
    assert command.main(WORDS) == 0
    assert command.main(("lerp", "out.safetensors", "a.safetensors", "dtype=float16", "to=next.safetensors")) == 0
    out, a, merged = (open_store(Path(f"{name}.safetensors")) for name in ("out", "a", "next"))
    name = sorted(scaled(load_file("a.safetensors")))[0]
    assert torch.equal(merged.read(name), torch.lerp(out.read(name), a.read(name).float(), 0.5).half())
    assert set(merged.metas) == set(a.metas)


def test_names_that_comfyui_would_not_read_are_refused(capsys):
    folder(Path("one"), 1)
    assert command.main(("lerp", "one", "one", "dtype=float8_e4m3fn_scaled", "to=o.safetensors")) == 2
    assert "tuner convert --layout ldm" in capsys.readouterr().err
