"""No option is dead: each one changes what a run does, and one that is added has to be shown to do so here."""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from tests import runs
from tests.recipes.test_every_config import classes
from tuner.config.command_line import run as run_command

ROOT = Path(__file__).parent.parent.parent
PLAIN = ("run.updates=2", "run.precision='fp32'")
CLASS = ("data.class_folder='<other pictures>'", "data.class_prompt='the cat'", "data.class_count=7")


def data(more: str = "", *others: str) -> str:
    first = f"{{type='folder',path='<pictures>'{more and f',{more}'}}}"
    return f"data=[{','.join((first, *others))}]"


def method(more: str = "") -> str:
    return f"method={{rank=2{more and f',{more}'}}}"


def words(more: str = "") -> str:
    return f"captions={{shuffle=true,separator=' '{more and f',{more}'}}}"


def new_words(word: str = "", more: str = "") -> tuple[str, str]:
    return "captions.prefix='<new> '", f"method={{tokens={{'<new>'={{{word}}}}}{more and f',{more}'}}}"


OTHER = "{type='folder',path='<other pictures>'}"
LORA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "training.run.samples": (("run={samples=8}",), ("run={samples=12}",)),
    "training.run.epochs": (("run={epochs=1.0}",), ("run={epochs=2.0}",)),
    "training.run.updates": ((), ("run.updates=3",)),
    "training.run.batch_size": ((), ("run.batch_size=3",)),
    "training.run.seed": ((), ("run.seed=1",)),
    "training.run.precision": ((), ("run.precision='bf16'",)),
    "training.run.clip_norm": ((), ("run.clip_norm=1e-3",)),
    "training.run.ema": (("run.ema=0.5",), ("run.ema=0.1",)),
    "families.source.base": ((), ("model.base='<other base>'",)),
    "families.source.attention": (("model.attention='math'",), ("model.attention='torch'",)),  # they round otherwise
    "families.source.prediction": ((), ("model.prediction='v_prediction'",)),
    "families.source.zero_terminal_snr": (
        ("model.prediction='v_prediction'",),
        ("model.prediction='v_prediction'", "model.zero_terminal_snr=true"),
    ),
    "data.images.resolution": ((), ("pictures.resolution=32",)),
    "data.images.bucket_step": ((), ("pictures.bucket_step=32",)),
    "data.images.max_ratio": ((), ("pictures.max_ratio=1.0",)),
    "data.images.flip": ((), ("pictures.flip=true",)),
    "data.images.areas": (
        ("pictures.resolution=[32,64]",),
        ("pictures.resolution=[32,64]", "pictures.areas='each'"),
    ),
    "data.images.crop": ((), ("pictures.crop='random'",)),
    "data.images.variants": (
        ("run={samples=32}", "pictures.crop='random'"),
        ("run={samples=32}", "pictures={crop='random',variants=2}"),
    ),
    **{
        f"data.augment.{field}": ((), (f"pictures.augment={{{field}={value}}}",))
        for field, value in (
            ("brightness", "0.2"),
            ("contrast", "0.2"),
            ("saturation", "0.5"),
            ("hue", "90.0"),
            ("rotation", "10.0"),
        )
    },
    "data.images.background": ((), ("pictures.background='black'",)),
    "data.images.latents": ((), ("pictures.latents='mean'",)),
    "data.captions.prefix": ((), ("captions.prefix='red'",)),
    "data.captions.shuffle": ((), (words(),)),
    "data.captions.separator": (("captions={shuffle=true}",), (words(),)),
    "data.captions.keep": ((words(),), (words("keep=3"),)),
    "data.captions.dropout": ((), ("captions.dropout=0.5",)),
    "data.captions.part_dropout": ((), ("captions={separator=' ',part_dropout=0.5}",)),
    "data.captions.suffix": ((), ("captions.suffix=', red'",)),
    "data.captions.trigger": ((), ("captions.trigger='robot'",)),
    "data.captions.wildcards": (
        (data("prompt='a {red|blue} cat'"),),
        (data("prompt='a {red|blue} cat'"), "captions.wildcards=true"),
    ),
    "data.captions.lines": (
        (data(r'prompt="a cat\nthe red"'),),
        (data(r'prompt="a cat\nthe red"'), "captions.lines='choose'"),
    ),
    "data.sources.folder.path": ((), (f"data=[{OTHER}]",)),
    "data.sources.folder.prompt": ((), (data("prompt='the cat'"),)),
    "data.sources.folder.repeats": ((), (data("repeats=2"),)),
    "data.sources.folder.weight": (
        (data("", OTHER),),
        (data("weight=0.25", OTHER),),
    ),
    "diffusion.timesteps.uniform.start": ((), ("objective.timesteps={type='uniform',start=0.5}",)),
    "diffusion.timesteps.uniform.end": ((), ("objective.timesteps={type='uniform',end=0.5}",)),
    **{
        f"diffusion.timesteps.{name}.{field}": (
            (f"objective.timesteps={{type='{name}'}}",),
            (f"objective.timesteps={{type='{name}',{field}={value}}}",),
        )
        for name, field, value in (
            ("logit_normal", "mean", "1.0"),
            ("logit_normal", "std", "0.5"),
            ("mode", "scale", "0.5"),
            ("beta", "alpha", "5.0"),
            ("beta", "beta", "5.0"),
            ("shifted", "shift", "2.0"),
            ("shifted", "of", "{type='uniform'}"),
            ("shifted_by_size", "base", "2.0"),
            ("shifted_by_size", "max", "2.0"),
            ("shifted_by_size", "of", "{type='uniform'}"),
        )
    },
    "diffusion.weightings.min_snr.gamma": (
        ("objective.weighting={type='min_snr',gamma=1.0}",),
        ("objective.weighting={type='min_snr',gamma=0.1}",),
    ),
    **{
        f"diffusion.weightings.{name}.{field}": (
            (f"objective.weighting={{type='{name}'}}",),
            (f"objective.weighting={{type='{name}',{field}={value}}}",),
        )
        for name, field, value in (
            ("soft_min_snr", "gamma", "0.1"),
            ("debiased", "convention", "'output'"),
            ("p2", "gamma", "0.5"),
            ("p2", "k", "0.1"),
            ("edm", "sigma_data", "1.0"),
            ("sigma_sqrt", "least", "0.9"),
        )
    },
    "diffusion.objective.stratified": ((), ("objective.stratified=true",)),
    "diffusion.objective.input_perturbation": ((), ("objective.input_perturbation=0.1",)),
    "diffusion.objective.unmasked_weight": (
        ("pictures.alpha='mask'",),
        ("pictures.alpha='mask'", "objective.unmasked_weight=0.5"),
    ),
    "diffusion.measures.huber.delta": (
        ("objective.error={type='huber'}",),
        ("objective.error={type='huber',delta=0.2}",),
    ),
    "diffusion.measures.huber.schedule": (
        ("objective.error={type='huber'}",),
        ("objective.error={type='huber',schedule='snr'}",),
    ),
    "diffusion.noises.pyramid.discount": (
        ("objective.noise={type='pyramid'}",),
        ("objective.noise={type='pyramid',discount=0.5}",),
    ),
    "diffusion.noises.pyramid.levels": (
        ("objective.noise={type='pyramid'}",),
        ("objective.noise={type='pyramid',levels=2}",),
    ),
    "diffusion.noises.offset.strength": (
        ("objective.noise={type='offset'}",),
        ("objective.noise={type='offset',strength=0.2}",),
    ),
    "optim.schedules.constant.warmup": ((), ("learning_rate={type='constant',warmup=3}",)),
    "methods.lora.rank": ((method(),), ("method={rank=3}",)),
    "methods.lora.alpha": ((method(),), (method("alpha=1.0"),)),
    "methods.lora.conv_rank": ((method(),), (method("conv_rank=2"),)),
    "methods.lora.conv_alpha": ((method("conv_rank=2"),), (method("conv_rank=2,conv_alpha=1.0"),)),
    "methods.lora.targets": ((method(),), (method("targets=['to_q$']"),)),
    "methods.lora.ranks": ((method(),), (method("ranks={to_q=1}"),)),
    "methods.lora.alphas": ((method(),), (method("alphas={to_q=1.0}"),)),
    "methods.lora.text_encoder": ((method(),), (method("text_encoder=true"),)),
    "methods.lora.text_encoder_lr": (
        (method("text_encoder=true"),),
        (method("text_encoder=true,text_encoder_lr=1e-5"),),
    ),
    **{
        f"optim.{name}.{field}": (
            (f"optimizer={{type='{name}'}}",),
            (f"optimizer={{type='{name}',{field}={value}}}",),
        )
        for name in ("adamw", "adamw8bit")
        for field, value in (("lr", "1e-3"), ("betas", "[0.5,0.9]"), ("eps", "1e-3"), ("weight_decay", "0.5"))
    },
    **{
        f"optim.schedules.{name}.{field}": (
            ("run.updates=3", f"learning_rate={{type='{name}'}}"),
            ("run.updates=3", f"learning_rate={{type='{name}',{field}={value}}}"),
        )
        for name in ("cosine", "linear")
        for field, value in (("warmup", "2"), ("final", "0.5"))
    },
}
"""For each option: arguments without it, and with it."""
FULL = {
    "methods.full.text_encoder": (("method={}",), ("method={text_encoder=true}",)),
    "methods.full.text_encoder_lr": (
        ("method={text_encoder=true}",),
        ("method={text_encoder=true,text_encoder_lr=1e-3}",),
    ),
}
DREAMBOOTH = {
    "data.sources.dreambooth.subject": ((), ("data.subject='<other pictures>'",)),
    "data.sources.dreambooth.prompt": ((), ("data.prompt='the dog'",)),
    "data.sources.dreambooth.class_folder": ((), CLASS),
    "data.sources.dreambooth.class_prompt": (CLASS, (*CLASS, "data.class_prompt='the dog'")),
    "data.sources.dreambooth.prior_weight": (CLASS, (*CLASS, "data.prior_weight=0.1")),
    "data.sources.dreambooth.prior_prediction": (
        (*CLASS[:2], "data.class_count=6"),  # as many as are there
        (*CLASS[:2], "data.prior_prediction=true"),
    ),
    "data.sources.dreambooth.repeats": ((), ("data.repeats=2",)),
}
TEXTUAL_INVERSION = {
    "methods.textual_inversion.tokens": (new_words(), ("captions.prefix='<new2> '", "method={tokens={'<new2>'={}}}")),
    "methods.textual_inversion.init": (new_words(), new_words("init='red'")),
    "methods.textual_inversion.vectors": (new_words("init='red'"), new_words("init='red',vectors=2")),
    "methods.textual_inversion.embeddings_lr": (new_words(), new_words(more="embeddings_lr=1e-2")),
    "methods.textual_inversion.adapter": (new_words(), new_words(more="adapter={rank=2}")),
    "methods.textual_inversion.embeddings_until": (
        new_words(more="adapter={rank=2}"),
        new_words(more="adapter={rank=2},embeddings_until=0.5"),
    ),
}
ELSEWHERE = {
    "training.run.output": "tests/recipes/test_failures.py",
    "training.run.name": "tests/recipes/test_outcome.py",
    "training.run.micro_batch": "tests/recipes/test_several_processes.py",  # which shows that it changes nothing
    "training.run.checkpoint_every": "tests/recipes/test_resume.py",
    "training.run.keep": "tests/tuner/training/test_checkpoint.py",
    "training.run.resume": "tests/recipes/test_failures.py",
    "training.run.accept_changes": "tests/recipes/test_failures.py",
    "training.run.cache": "tests/tuner/data/test_cache.py",
    **dict.fromkeys(
        (
            *(f"methods.{kind}." for kind in ("loha", "lokr", "oft", "boft", "ia3")),
            *(f"methods.lora.{name}" for name in ("rslora", "dora", "init", "dropout", "lora_plus", "learning_rates")),
        ),
        "tests/laws/test_every_adapter.py",
    ),
    **{
        f"families.source.{name}": "tests/tuner/families/test_clip.py"
        for name in ("clip_skip", "chunks", "empty_caption")
    },
    "families.source.revision": "tests/tuner/families/test_source.py",
    **{f"families.source.{name}": "tests/tuner/families/test_single_file.py" for name in ("add", "config")},
    "families.source.gradient_checkpointing": "tests/tuner/families/test_sd1.py",
    **{  # which Stable Diffusion 1 has not
        f"families.source.{name}": "tests/tuner/families/test_flow.py"
        for name in ("precision", "quantize", "t5_length", "guidance")
    },
    **{f"families.source.{name}": "tests/tuner/families/test_ddpm.py" for name in ("classes", "null_class")},
    "data.sources.dreambooth.class_count": "tests/tuner/data/sources/test_dreambooth.py",
    **{
        f"data.sources.{name}": "tests/tuner/data/sources/test_every_source.py"
        for name in ("dataset", "kohya", "table", "webdataset", "folder.fallback", "folder.masks", "folder.source")
    },
    **dict.fromkeys(("data.guides", "data.sources.folder.guides"), "tests/tuner/families/test_guides.py"),
    "trigger": "tests/recipes/test_outcome.py",
    "data.images.alpha": "tests/tuner/data/test_stream.py",
    "data.images.broken": "tests/recipes/test_broken_pictures.py",
    "training.observers": "tests/tuner/training/observers",
    "families.base": "tests/tuner/training/observers",
}
"""What changes no weight, and the tests of what it does change."""
RECIPES = {"lora": LORA, "full": FULL, "dreambooth": DREAMBOOTH, "textual_inversion": TEXTUAL_INVERSION}
CASES = [pytest.param(recipe, *pair, id=name) for recipe, table in RECIPES.items() for name, pair in table.items()]


@pytest.fixture(scope="module")
def effect(tmp_path_factory) -> Any:
    """What comes of a run with these arguments: what is learned, what the optimizer remembers, and after how long."""
    folder = tmp_path_factory.mktemp("options")
    ground, other = runs.make(folder / "ground"), runs.make(folder / "other", seed=1)
    seen_through = Image.new("RGBA", (64, 64), (200, 0, 0, 100))
    seen_through.paste((0, 200, 0, 255), (0, 0, 32, 64))
    seen_through.save(ground.pictures / "6.png")
    places = {
        "<pictures>": ground.pictures,
        "<other pictures>": other.pictures,
        "<other base>": other.folder / "base",
    }

    @functools.cache
    def run(recipe: str, arguments: tuple[str, ...]) -> Any:
        output = folder / str(run.cache_info().misses)
        said = [
            functools.reduce(lambda text, place: text.replace(*map(str, place)), places.items(), a) for a in arguments
        ]
        length = [argument for argument in said if argument.startswith("run={")]  # a table comes before values in it
        subject = [f"data.subject='{ground.pictures}'", "data.prompt='the red cat'"]
        base = ground.arguments(output)
        if recipe == "dreambooth":
            base = [argument for argument in base if not argument.startswith("data=")] + subject
        module = importlib.import_module(f"recipes.{recipe}")
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = [*length, *base, *(() if length else PLAIN), *(a for a in said if a not in length)]
        assert run_command(module.Config, module.main, argv) == 0
        files = {name: value for name, value in runs.digests(output).items() if name.endswith(".safetensors")}
        return files, [row["samples_seen"] for row in runs.updates(output)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        yield run
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("recipe", "without", "with_it"), CASES)
def test_an_option_changes_what_a_run_does(recipe, without, with_it, effect, request):
    if "adamw8bit" in request.node.callspec.id:
        pytest.importorskip("bitsandbytes")
    assert effect(recipe, with_it) != effect(recipe, without)


def options(tables: bool = False) -> set[str]:
    """Every value that the training recipes' configs hold, by the module of its class; with `tables`, those too."""
    found: set[str] = set()
    for recipe in RECIPES:
        for kind in classes(importlib.import_module(f"recipes.{recipe}").Config):
            hints = get_type_hints(kind, include_extras=True)
            for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
                if tables or not any(dataclasses.is_dataclass(inner) for inner in classes(hint)):
                    module = kind.__module__.removeprefix("tuner.").removeprefix(f"recipes.{recipe}")
                    found.add(f"{module}.{name}".removeprefix("."))
    return found


def test_every_option_is_shown_to_do_something():
    shown = {name for table in RECIPES.values() for name in table}
    missing = {name for name in options() - shown if not name.startswith(tuple(ELSEWHERE))}
    assert not missing, f"show what these change: {sorted(missing)}"
    assert not shown - options(tables=True), f"there are no such options: {sorted(shown - options(tables=True))}"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(name):
    assert any(option.startswith(name) for option in options()) and (ROOT / ELSEWHERE[name]).exists()
