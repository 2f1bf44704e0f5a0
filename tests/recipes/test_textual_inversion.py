"""Runs that teach words: resumed, split and published, and what a stock pipeline draws of their files."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from tests.recipes.test_cache import entries
from tuner.config.command_line import run as run_command

ROOT = Path(__file__).parent.parent.parent
TOKENS = "tokens={'<new>'={init='red cat',vectors=3},'<other>'={init='9'}}"
PROMPT = "the <new> <other>"
WORDS = f"method={{{TOKENS}}}"
PIVOTAL = f"method={{{TOKENS},embeddings_lr=2e-2,embeddings_until=0.5,adapter={{rank=4,text_encoder=true}}}}"
PREVIEW = f"{{type='previews',prompts=['{PROMPT}'],every=99,sampling={{steps=3}}}}"
WATCHED = f"observers=[{PREVIEW},{{type='validation',every=8,pictures=2,levels=2}},{{type='forgetting',every=8}}]"
METHODS = pytest.mark.parametrize("method", [WORDS, PIVOTAL], ids=["words", "pivotal"])


@pytest.fixture(scope="module")
def run(ground: runs.Ground, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of the recipe with every nuisance on; its exit code."""

    def run(output: Path, *more: str) -> int:
        recipe = importlib.import_module("recipes.textual_inversion")
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = arguments(ground, output, *more)
        try:
            return run_command(recipe.Config, recipe.main, argv, check=recipe.check)
        except SystemExit as end:
            return int(end.code or 0)

    return run


def arguments(ground: runs.Ground, output: Path, *more: str) -> list[str]:
    data = f"data=[{{type='folder',path='{ground.pictures}',prompt='{PROMPT}'}}]"
    mine = [a for a in ground.arguments(output) if not a.startswith("data=")]
    return [*mine, data, *runs.COMMON, "optimizer={type='adamw',lr=2e-2}", *more]


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> Any:
    """The output of an unbroken run of each method."""
    outputs: dict[str, Path] = {}

    def made(method: str) -> Path:
        if method not in outputs:
            outputs[method] = tmp_path_factory.mktemp("words") / "run"
            cache = f"run.cache='{outputs[method].with_name('cache')}'"
            assert run(outputs[method], method, "run.updates=4", "run.keep=9", WATCHED, cache) == 0
        return outputs[method]

    return made


def stock(ground: runs.Ground) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(ground.folder / "base", torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, prompt: str = PROMPT) -> np.ndarray:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return np.asarray(pipeline(prompt, num_inference_steps=3, latents=noise).images[0]).astype(int)


def preview(output: Path, at: int) -> np.ndarray:
    return np.asarray(Image.open(output / "samples" / f"samples-{at:010d}" / "000.png").convert("RGB")).astype(int)


@METHODS
def test_a_run_ends_with_files_that_draw_its_pictures_in_a_stock_pipeline(method, made, ground):
    output = made(method)
    pipeline = stock(ground)
    base = drawn(pipeline, "the red cat 9")
    if method == PIVOTAL:
        pipeline.load_lora_weights(output / "lora", weight_name="model-diffusers.safetensors")
    else:
        assert not (output / "lora").exists()
    for token in ("<new>", "<other>"):
        file = output / "embeddings" / f"model-{token.strip('<>')}.safetensors"
        pipeline.load_textual_inversion(str(file), token=token, local_files_only=True)
    assert abs(drawn(pipeline) - preview(output, 16)).max() <= (2 if method == PIVOTAL else 1)
    assert abs(preview(output, 16) - base).max() > 5


@METHODS
def test_a_resumed_run_ends_as_the_unbroken_one_to_the_bit(method, made, run, tmp_path):
    whole, again = made(method), tmp_path / "run"
    assert runs.places(whole) == [8, 16]
    shutil.copytree(whole / "checkpoints", again / "checkpoints")
    shutil.rmtree(again / "checkpoints" / "samples-0000000016")
    shutil.copy(whole / "forgetting.safetensors", again / "forgetting.safetensors")
    assert run(again, method, "run.updates=4", "run.keep=9", WATCHED) == 0
    assert runs.digests(again) == runs.digests(whole)
    words = [
        load_file(whole / "checkpoints" / f"samples-{at:010d}" / "trainable.safetensors")[
            "text_encoder.text_model.embeddings.token_embedding.vectors"
        ]
        for at in (8, 16)
    ]
    assert words[0].shape == (4, words[0].shape[1])
    assert torch.equal(*words) == (method == PIVOTAL)  # where they rest from the middle on


def test_captions_with_words_that_learn_are_not_kept(made):
    found = entries(made(WORDS).with_name("cache"))
    assert found and not any("tokens" in entry for entry in found)


def test_a_release_holds_the_words_and_says_how_to_use_them(made, tmp_path, capsys):
    publish = importlib.import_module("recipes.publish")
    target = f"target={{type='folder',path='{tmp_path / 'published'}'}}"
    for method in (WORDS, PIVOTAL):
        assert run_command(publish.Config, publish.main, [f"release='{made(method)}'", target]) == 0
        files = {path.relative_to(tmp_path / "published").as_posix() for path in (tmp_path / "published").rglob("*.s*")}
        words = {"embeddings/model-new.safetensors", "embeddings/model-other.safetensors"}
        lora = {"model.safetensors", "model-diffusers.safetensors", "model-bundle.safetensors"}
        assert files == {*words, *(lora if method == PIVOTAL else ())}
        card = (tmp_path / "published" / "README.md").read_text()
        assert "- textual_inversion\n" in card and "instance_prompt: <new> <other>\n" in card
        assert ("- lora\n" in card) == ("<lora:model-bundle:1>" in card) == (method == PIVOTAL)
        assert 'load_textual_inversion("path/of/this/embeddings/model-new.safetensors", token="<new>")' in card
        assert "`embedding:model-new`" in card
        shutil.rmtree(tmp_path / "published")


def test_two_processes_teach_what_one_does(ground, run, tmp_path):
    """Also where all captions of a process are empty, and so none of its words has a say."""
    one, two = tmp_path / "one", tmp_path / "two"
    rates = ("method.embeddings_lr=1e-3", "optimizer.lr=1e-3")
    settings = (PIVOTAL, *rates, "run.updates=3", "run.batch_size=4", "run.micro_batch=2", "captions.dropout=0.6")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launched = subprocess.run(
        [sys.executable, *launch, "recipes/textual_inversion.py", *arguments(ground, two, *settings)],
        cwd=ROOT,
        env=runs.environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert run(one, *settings) == 0
    at = "checkpoints/samples-0000000012/trainable.safetensors"
    ours, theirs = load_file(two / at), load_file(one / at)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-5


def test_a_word_that_no_caption_holds_is_refused_before_anything_is_encoded(run, tmp_path, capfd):
    for more in ((), ("--check",)):
        assert run(tmp_path / "run", "method={tokens={'<new>'={},'<unsaid>'={}}}", "run.updates=1", *more) == 2
        assert "method.tokens: no caption holds '<unsaid>', so it would learn nothing" in capfd.readouterr().err
    assert run(tmp_path / "run", "method={tokens={'<unsaid>'={}}}", "run.updates=1", "--check",
               "captions.prefix='<Unsaid> '") == 0  # fmt: skip


def test_check_counts_the_vectors_of_words_and_says_what_learns(run, tmp_path, capfd):
    assert run(tmp_path / "run", PIVOTAL, "run.updates=1", "captions.dropout=0.0", "--check") == 0
    out = capfd.readouterr().out
    the = out.partition(f"{PROMPT!r} (")[2].partition(" tokens")[0]
    assert int(the) == 1 + 4
    assert "learns: text_encoder, 128 parameters in 1 tensors, at up to 2.000e-02" in out
    assert not (tmp_path / "run").exists()


def test_a_word_of_the_base_is_refused(run, tmp_path, capfd):
    assert run(tmp_path / "run", "method={tokens={cat={}}}", "run.updates=1", "captions.prefix='cat '", "--check") == 2
    assert "method.tokens: 'cat' is a word of the base already; choose another" in capfd.readouterr().err
