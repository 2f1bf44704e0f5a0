"""Who may import whom, checked on the import statements themselves and on what is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATION = {"tuner.errors", "tuner.plugins", "tuner.config", "tuner.weights"}
# What each layer may import of the project; a layer is a module or package directly in `tuner`, or a package beside it.
# `tuner` itself, which is its version, costs nothing and is open to all.
MAY_IMPORT: dict[str, set[str]] = {
    "tuner": set(),
    "tuner.errors": set(),
    "tuner.rng": set(),
    "tuner.plugins": {"tuner.errors"},
    "tuner.config": {"tuner.errors", "tuner.plugins"},
    "tuner.weights": {"tuner.errors"},
    "tuner.diffusion": {"tuner.errors", "tuner.plugins", "tuner.rng"},
    "tuner.families": {"tuner.errors", "tuner.plugins", "tuner.rng", "tuner.diffusion", "tuner.weights"},
    "tuner.data": {"tuner.errors", "tuner.plugins", "tuner.rng", "tuner.diffusion", "tuner.weights"},
    "tuner.methods": {"tuner.errors", "tuner.plugins", "tuner.rng", "tuner.diffusion", "tuner.weights"},
    "tuner.optim": {"tuner.errors", "tuner.plugins", "tuner.methods"},
    "tuner.publish": {"tuner.errors", "tuner.plugins", "tuner.config", "tuner.methods", "tuner.weights"},
    "tuner.training": {
        *("tuner.errors", "tuner.plugins", "tuner.rng", "tuner.config", "tuner.weights", "tuner.diffusion"),
        *("tuner.families", "tuner.data", "tuner.methods", "tuner.optim", "tuner.publish"),
    },
    "tuner.audit": {"tuner.errors", "tuner.rng", "tuner.weights", "tuner.families", "tuner.data"},
    "tuner.base": {  # how the embedded model was made: a recipe with its data, above everything
        *("tuner.errors", "tuner.plugins", "tuner.rng", "tuner.config", "tuner.weights", "tuner.diffusion"),
        *("tuner.families", "tuner.data", "tuner.methods", "tuner.optim", "tuner.training"),
    },
    "tuner.cli": {"tuner.errors", "tuner.plugins", "tuner.config", "tuner.weights"},
    "tuner.__main__": {"tuner.cli"},
    "merge": FOUNDATION,
}
ADDRESSES = {
    "diffusers": ("tuner/families/", "tuner/base/", "tuner/publish/"),
    "transformers": ("tuner/families/", "tuner/base/"),
    "peft": ("tuner/methods/", "tuner/publish/verify.py"),
    "accelerate": ("tuner/training/",),
    "datasets": ("tuner/data/sources/",),
    "bitsandbytes": ("tuner/optim/", "tuner/families/"),
    "wandb": ("tuner/training/observers/wandb.py",),
    "huggingface_hub": ("tuner/families/", "tuner/publish/", "tuner/data/sources/"),
    "pydantic": ("tuner/plugins.py", "tuner/config/", "tuner/publish/provenance.py"),
    "resvg_py": ("tuner/base/",),
}
"""Where each heavy dependency may be imported, and nowhere else."""
FILES = sorted([*ROOT.glob("tuner/**/*.py"), *ROOT.glob("merge/**/*.py")])


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def layer(module: str) -> str | None:
    """`tuner.config.loader` is in the layer `tuner.config`; what is not of the project is in none."""
    top, *rest = module.split(".")
    if top in ("merge", "recipes", "examples", "benchmarks", "tests"):
        return top
    if top != "tuner":
        return None
    return f"tuner.{rest[0]}" if rest and rest[0] != "__init__" else "tuner"


def imports(file: Path) -> set[str]:
    """What a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: imports are absolute"
            assert node.module
            # `from tuner import errors` names a layer, `from tuner import __version__` none
            names = [alias.name for alias in node.names if node.module == "tuner" and not alias.name.startswith("_")]
            found |= {f"tuner.{name}" for name in names} or {node.module}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_layers_below_it(file):
    own = layer(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert own in MAY_IMPORT, f"{own} is a new layer: say in MAY_IMPORT what it may import"
    for module in imports(file):
        other = layer(module)
        if other not in (None, "tuner", own):
            assert other in MAY_IMPORT[own], f"{own} may not import {module}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_heavy_dependency_is_imported_at_its_address(file):
    for module in imports(file):
        addresses = ADDRESSES.get(module.split(".")[0])
        assert addresses is None or name_of(file).startswith(addresses), f"{module} is imported in {addresses} only"


def test_the_layers_have_no_circle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, below in MAY_IMPORT.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


@pytest.mark.parametrize("package", [path for path in ROOT.glob("tuner/**/") if any(path.glob("*.py"))], ids=name_of)
def test_every_folder_of_modules_is_a_package(package):
    assert (package / "__init__.py").is_file()


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after `code`."""
    code = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(result.stderr.split())


HEAVY = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib", "PIL"}


@pytest.mark.parametrize("module", ["tuner", "tuner.errors", "tuner.plugins", "tuner.cli", "tuner.config.command_line"])
def test_the_front_door_loads_nothing_heavy(module):
    assert not loaded(f"import {module}") & HEAVY


def test_help_loads_nothing_heavy_not_even_what_reads_configs():
    assert not loaded("from tuner.cli import main; main(['--help'])") & {*HEAVY, "pydantic"}


@pytest.mark.parametrize("folder", ["merge/", "tuner/weights/"])
def test_tensors_at_rest_need_no_training_stack(folder):
    files = [file for file in FILES if name_of(file).startswith(folder)]
    modules = sorted(name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files)
    assert not loaded(f"import {', '.join(modules)}") & {"diffusers", "transformers", "peft", "accelerate", "datasets"}
