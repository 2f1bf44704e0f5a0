"""No token of the environment is in anything that a run writes or says."""

import importlib.util
import io
import zipfile
from pathlib import Path

import pytest

CANARIES = {
    "HF_TOKEN": "hf_canaryABCDEFGHIJKLMNOPQRSTUVWXYZ0123",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryZYXWVUTSRQPONMLKJIHGFEDCBA9876",
    "WANDB_API_KEY": "c0ffee5ec2e7" + "0123456789abcdef" * 2,
    "HTTPS_PROXY": "http://user:canarypassword@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret",
}
PREVIEWS = "{type='previews',prompts=['the red cat'],every=8,sampling={steps=1}}"
VALIDATION = "{type='validation',every=8,levels=2}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, and what is in those that are archives."""
    found: dict[str, bytes] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(io.BytesIO(found[str(path)])) as archive:
                    found |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
    return found


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def hits(folder: Path) -> list[str]:
    """The files in which a secret is, or a word of it that would be enough."""
    files = contents(folder)
    assert len(files) > 5, "there is little to be looked through"
    words = [*(value.encode() for value in CANARIES.values()), b"canarypassword"]
    return [name for name, content in files.items() if any(word in content for word in words)]


def test_a_whole_run_writes_and_says_no_secret(ground, tmp_path, capfd):
    code = ground.run("lora", tmp_path / "run", "run.updates=4", f"observers=[{PREVIEWS},{VALIDATION}]")
    assert code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"checkpoints", "config.toml", "lora", "samples"}
    assert not hits(tmp_path) and not hits(ground.folder)
    captured = capfd.readouterr()
    assert not any(value in captured.out + captured.err for value in CANARIES.values())
    (tmp_path / "leak.txt").write_text(f"token: {CANARIES['HF_TOKEN']}")
    assert hits(tmp_path) == [str(tmp_path / "leak.txt")]  # it would be found


def test_a_crash_with_its_traceback_says_no_secret(ground, tmp_path, monkeypatch, capfd):
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tuner.training.recipe.write_outcome", crash)
    assert ground.run("lora", tmp_path, "run.updates=2", "--debug") == 1
    captured = capfd.readouterr()
    assert "RuntimeError: a bug" in captured.err and "report it" in captured.err
    assert not any(value in captured.out + captured.err for value in CANARIES.values())
    assert not hits(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_what_wandb_writes_offline_holds_no_secret(ground, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    code = ground.run("lora", tmp_path, "run.updates=2", "observers=[{type='wandb',project='test',mode='offline'}]")
    assert code == 0
    assert list(tmp_path.rglob("*.wandb")) and not hits(tmp_path)
