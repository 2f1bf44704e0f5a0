"""Making a merged file again, from the recipe in its header and a folder with the models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge.content import root_of, table
from merge.custom import CODE, refuse_other_code
from merge.plan import Leaf, Plan
from merge.provenance import Ancestry
from merge.run import Config, files, merge, plan
from tuner.errors import ConfigError, DataError, UserError
from tuner.plugins import read
from tuner.weights.checkpoint import open_files


def from_recipe(table: Mapping[str, Any], models: Mapping[str, Path], output: Path) -> Config:
    """The config of a recipe that a file's header holds, with `models` in their places.

    Raises:
        DataError: a method from outside of the project is not the one that was used.
    """
    refuse_other_code(table)
    table = {key: value for key, value in table.items() if key != CODE}
    paths = {name: str(path) for name, path in models.items()}
    return read(Config, {**table, "models": paths, "output": str(output), "mixed": True})  # it was meant once


def rebuild(made: Path, folder: Path, output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make a merged file again from its recipe and the models in `folder`, and see that it is the same.

    `resume` goes on where an interrupted one has stopped; `overwrite` replaces what another recipe has made.

    Raises:
        DataError: the file holds no recipe, a model is not there, or the result differs.
    """
    made_files = (
        {"": made}
        if made.is_file()
        else {str(path.relative_to(made)): path for path in sorted(made.rglob("*.safetensors"))}
    )
    if not made_files:
        raise DataError(f"{made}: no such file, and no folder of a model")
    if made.is_dir() == (output.suffix == ".safetensors"):
        raise ConfigError(
            f"{output}: {made} is a {'folder' if made.is_dir() else 'file'}; give the name of another one"
        )
    family = {file: Ancestry.of(path) for file, path in made_files.items()}
    known = next(iter(family.values()))
    found: dict[str, list[Path]] = {}
    for source in known.sources:
        found[source.name] = [
            path for path in candidates(folder) if output not in (path, *path.parents) and _fits(path, source.table)
        ]
        if not found[source.name]:
            raise DataError(f"{folder}: no model with the tensors of {source.name!r} (content {source.root[:16]})")
    models = _pick(family, found, output)
    config = replace(from_recipe(known.recipe, models, output), overwrite=overwrite)
    results = merge(config, resume=resume)
    for file, path in made_files.items():
        expected = family[file].root
        if file not in results or results[file].root != expected:
            raise DataError(
                f"{output / file}: is not the same as {path} (content {expected[:16]}), which was made by another "
                "version of this program, or on another kind of processor"
            )
    print(f"{output}: the same content as {made}")


def _pick(family: Mapping[str, Ancestry], found: Mapping[str, Sequence[Path]], output: Path) -> dict[str, Path]:
    """Of the models that look alike, those whose contents are the recipe's.

    Args:
        family: what each file of the output says of itself.
        found: the models that may be meant, by their names in the recipe.
        output: where the result will go.

    Raises:
        DataError: there is none.
    """
    known = next(iter(family.values()))
    names: list[str] = known.recipe["models"]
    config = from_recipe(known.recipe, {name: found[name][0] for name in names}, output)
    made = plan(config)
    parts = {"": made} if config.single else files(config, made).plans
    models: dict[str, Path] = {}
    for index, source in enumerate(known.sources):
        roots = {file: ancestry.sources[index].root for file, ancestry in family.items()}
        likely = sorted(found[source.name], key=lambda path: path.stem != source.name)
        match = next((path for path in likely if _is(path, roots, parts, index)), None)
        if match is None:
            raise DataError(
                f"{source.name}: none of {', '.join(str(path) for path in likely[:5])} has the content "
                f"{source.root[:16]}; give the folder with the very model"
            )
        models[source.name] = match
    return {name: models[name] for name in names}


def _is(path: Path, roots: Mapping[str, str], parts: Mapping[str, Plan], index: int) -> bool:
    """Whether the model at `path` has the contents of a recipe's, for every file that is made."""
    store = open_files(path)
    for file, part in parts.items():
        used = [entry.name for entry in part.entries if Leaf(index) in entry.program.leaves]
        whole = part.sources[index].origin is not None
        if root_of(store, store.metas if whole else used) != roots[file]:
            return False
    return True


def candidates(folder: Path) -> list[Path]:
    """The models in a folder, files, shards by their index, and diffusers folders, by name."""
    endings = ("*.safetensors", "*.safetensors.index*.json")
    models = [path for ending in endings for path in folder.rglob(ending) if not path.name.startswith(".")]
    return sorted([*models, *(path.parent for path in folder.rglob("model_index.json"))])


def _fits(path: Path, wanted: str) -> bool:
    try:
        return table(open_files(path).metas) == wanted
    except UserError:
        return False
