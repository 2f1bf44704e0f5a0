"""A merge from its config to its file: what is read, what is planned, what is said, what is written."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from merge import execute
from merge.adapted import lora_source, refuse_moved
from merge.blocks import Blocks
from merge.coefficients import check, resolve
from merge.content import table
from merge.custom import CODE, code_of
from merge.cut import Settings
from merge.folder import MODELS, Finished, Parts, clear, copy_the_rest, key_of, parts, size_of, workplace
from merge.kinship import Kinship, same_base
from merge.methods.base import AnyMergeMethod, MergeMethod, Space
from merge.output import unfinished
from merge.plan import Plan, make_plan
from merge.provenance import Ancestry, ancestors, facts_of, metadata
from merge.rebasin import align
from merge.recipe import Apply, Node, Select, Source, on_base, ordered
from merge.rounding import Rounding
from merge.scaling import Scaled
from merge.stopping import Stopped, at_once
from merge.verify import LargestError, Read, largest_error
from tuner.errors import ConfigError, DataError, UserError, did_you_mean
from tuner.plugins import write
from tuner.weights.architecture import MARKS, identify
from tuner.weights.checkpoint import open_files, open_store
from tuner.weights.config_beside import refuse_contradicting, settle
from tuner.weights.facts import Facts
from tuner.weights.folder import DiffusersFolder
from tuner.weights.layouts.ldm import UNREAD, from_diffusers, to_diffusers
from tuner.weights.store import SafetensorsFile, TensorStore
from tuner.weights.views import Assembled
from tuner.weights.writer import clear_up, resource_error, take_place

SCALED = "float8_e4m3fn_scaled"
TRANSLATE = {"ldm": from_diffusers, "diffusers": to_diffusers}
"""To the names of original single files, and to those of folders."""
LEFT_OUT = "none"
"""Said of a component: the output has none."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A method applied to models or to steps above."""

    name: str
    """What later steps call the result."""
    method: AnyMergeMethod
    """What is done; `tuner merge methods` lists what there is."""
    inputs: tuple[str, ...]
    """Names of models, or of steps above this one."""
    base: str | None = None
    """For methods that merge differences: subtracted from every input, and the merged difference is added to it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Models, what is done to them, and where the result goes."""

    output: Path
    """The safetensors file to write; or a folder, when the first model is a diffusers folder or `max_shard_size` is
    given."""
    models: Mapping[str, Path]
    """Names, and the files or folders that they stand for."""
    steps: tuple[Step, ...] = ()
    """What is done, in order; the last step is the result, and the first model when there are none."""
    align: Mapping[str, str] = field(default_factory=dict[str, str])
    """Git Re-Basin: `b = "a"` puts the units of model b in the order of a's before anything is done with it."""
    components: Mapping[str, str] = field(default_factory=dict[str, str])
    """Parts that come from elsewhere: `vae = "b"` takes the one of a model or step, `vae = "none"` leaves it out."""
    dtype: Literal[
        "keep", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_scaled"
    ] = "keep"
    """Of the output's weights. `keep`: that of the first model that a tensor is made of. `float8_e4m3fn_scaled`: the
    denoiser's linear layers in 8 bits with a scale each, as ComfyUI reads them, and the rest as with `keep`."""
    missing: Literal["refuse", "take"] = "refuse"
    """A tensor that a model lacks: refuse to merge, or take it from the first model that has it."""
    max_shard_size: str = ""
    """Of each file in a folder, such as `5GB`: larger ones are cut into shards with an index. Empty: none is."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To the output's dtype. `stochastic` keeps changes smaller than its steps, on average."""
    seed: int = 0
    """Of stochastic rounding. Methods that draw have seeds of their own."""
    non_finite: Literal["refuse", "keep"] = "refuse"
    """What to do about NaN and infinity in a model."""
    mixed: bool = False
    """Merge models that predict different things (noise and velocity), or that do not come from one base."""
    threads: int = 0
    """How many threads or processes work; 0: as many as there are cores, at most 8. Changes nothing but the time."""
    device: str = "cpu"
    """Where the arithmetic is done: `cpu`, or such as `cuda`, whose last bits may differ from it."""
    overwrite: bool = False
    """Replace an output that is there already. It need not be said of what the same recipe has made before."""
    verify: int = 16
    """How many runs of numbers are worked out again in float64 afterwards, to tell the largest rounding error."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: none given; name at least one")
        names = Counter([*self.models, *(step.name for step in self.steps)])
        if unknown := sorted(set(self.align) - set(self.models)):
            raise ValueError(f"align.{unknown[0]}: is no model")
        for name, other in self.align.items():
            if other in self.align and other != name:
                raise ValueError(f"align.{name}: {other!r} is itself put in another order; name a model that is not")
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"steps: {twice[0]!r} is the name of two models or steps; rename one")
        if LEFT_OUT in names:
            raise ValueError(f"models: {LEFT_OUT!r} means that a component is left out; choose another name")
        try:
            size_of(self.max_shard_size)
        except ValueError as error:
            raise ValueError(f"max_shard_size: {error}") from error
        for name in ("threads", "verify"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if self.max_shard_size and self.single:
            raise ValueError(f"output: {self.output}: shards and their index make a folder; leave '.safetensors' out")

    @property
    def single(self) -> bool:
        """Whether the output is one file."""
        return self.output.suffix == ".safetensors"


def build(config: Config) -> Node:
    """The graph of a config; opens the models.

    Raises:
        ConfigError: a step uses what is not there, or methods and inputs do not fit.
        DataError: a model is damaged.
    """
    stores = {name: open_store(path) for name, path in config.models.items()}
    if empty := [name for name, store in stores.items() if not store.metas]:
        raise DataError(f"{config.models[empty[0]]}: holds no tensors; download it again")
    loras = {name for name, store in stores.items() if identify(store.metas).lora}
    if loras and config.align:
        raise ConfigError(
            f"align: nothing says whose order of units {min(loras)}, a LoRA, is made for; add it to its model first "
            "(tuner merge add), then align"
        )
    used = _used(config)
    for name, other in config.align.items():
        if idle := [each for each in (name, other) if each in stores and each not in used]:
            raise ConfigError(f"align.{name}: {idle[0]!r} goes nowhere; name models that are merged")
    target = next((stores[name] for name in (*used, *stores) if name in stores and name not in loras), None)
    if target is not None:
        layout = identify(target.metas).layout
        stores = {
            name: store if name in loras else translated(store, layout, config.models[name])
            for name, store in stores.items()
        }
    nodes: dict[str, Node] = {}
    made_for: dict[Node, Node] = {}
    for name in sorted(stores, key=lambda name: name in loras):
        if name not in loras:
            raw = open_files(config.models[name])
            shown = _aligned(config, stores, name)
            nodes[name] = Source(name, shown, origin=None if type(shown) is type(raw) else raw)
        elif target is None:
            raise ConfigError(f"models.{name}: a LoRA, and there is no checkpoint that it could be added to")
        else:
            steps = [step for step in config.steps if name in step.inputs and step.name in used]
            beside = [each for step in steps for each in (step.base, *step.inputs)]
            onto = next((each for each in (*beside, *stores) if each in stores and each not in loras), "")
            nodes[name] = lora_source(name, config.models[name], stores[onto])
            made_for[nodes[name]] = nodes[onto]
    for step in config.steps:
        place = f"steps.{step.name}"
        inputs = [_node(nodes, name, place) for name in step.inputs]
        if step.base is None:
            nodes[step.name] = Apply(step.name, step.method, tuple(inputs))
        else:
            if Space.WEIGHT in step.method.takes:
                raise ConfigError(f"{place}: base: {type(step.method).__name__} merges checkpoints; leave 'base' out")
            nodes[step.name] = on_base(step.name, step.method, _node(nodes, step.base, place), inputs)
    last = config.steps[-1].name if config.steps else next(iter(config.models))
    root = nodes[last]
    refuse_moved(root, made_for)
    if not config.components:
        return root
    chosen = {
        component: None if name == LEFT_OUT else _node(nodes, name, f"components.{component}")
        for component, name in config.components.items()
    }
    return Select("components", root, chosen)


def _used(config: Config) -> list[str]:
    """The names of models, steps and whatever else the output is made of, the first to be used first."""
    steps = {step.name: step for step in config.steps}
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        found[name] = None
        step = steps.get(name)
        for below in () if step is None else (step.base, *step.inputs):
            if below is not None:
                visit(below)

    visit(config.steps[-1].name if config.steps else next(iter(config.models)))
    for name in config.components.values():
        visit(name)
    return list(found)


def translated(store: TensorStore, layout: str | None, path: Path) -> TensorStore:
    """A checkpoint by the names of `layout`, so that a folder and a single file go together.

    Raises:
        DataError: it has tensors that are called nothing there.
    """
    if layout not in TRANSLATE or identify(store.metas).layout in (None, layout):
        return store
    try:
        view = Assembled(store, TRANSLATE[layout](store.metas).pieces)
        _ = view.metas
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return view


def _aligned(config: Config, stores: Mapping[str, TensorStore], name: str) -> TensorStore:
    """A model as it is, or with its units in the order of another's; a second's work for every hundred units or so."""
    if name not in config.align:
        return stores[name]
    other = config.align[name]
    if other not in stores or other == name:
        raise ConfigError(f"align.{name}: {other!r} is no other model; there are: {', '.join(stores)}")
    aligned = align(stores[other], stores[name])
    moved = ", ".join(f"{count} of {unit}" for unit, count in list(aligned.moved.items())[:5])
    print(f"{name} in the order of {other}: moved {moved or 'nothing'}", file=sys.stderr)
    return aligned


def _node(nodes: Mapping[str, Node], name: str, place: str) -> Node:
    if name not in nodes:
        hint = did_you_mean(name, list(nodes)) or f"; there are: {', '.join(nodes)}"
        raise ConfigError(f"{place}: {name!r} is neither a model nor a step above{hint}")
    return nodes[name]


def plan(config: Config) -> Plan:
    """What the merge will do; reads headers, and a few numbers to see whether the models belong together."""
    _check_output(config)
    root = build(config)
    weights = [node for node in ordered(root) if isinstance(node, Source) and node.space is Space.WEIGHT]
    for source in weights[1:]:
        _refuse_strangers(weights[0], source, config)
    telling = [source for source in weights if _facts(source, config).prediction is not None]
    for source in telling[1:]:  # the first of all may say nothing
        _refuse_strangers(telling[0], source, config)
    names = list(dict.fromkeys(name for source in weights for name in source.store.metas))
    blocks = Blocks.of(names)
    components = {blocks.component(name) for name in names}
    for component in config.components:
        if component not in components:
            known = sorted(name for name in components if name)
            raise ConfigError(
                f"components.{component}: the models have no such part"
                + (did_you_mean(component, known) or f"; there are: {', '.join(known) or 'none that is known'}")
            )
    for node in ordered(root):
        if isinstance(node, Apply):
            check(node.method, names, blocks, f"steps.{node.name}.method")

    def resolved(method: MergeMethod, name: str) -> MergeMethod:
        return resolve(method, name, blocks)

    scaled = Scaled.of(weights[0].store.metas) if config.dtype == SCALED else None
    made = make_plan(
        root,
        dtype="keep" if scaled is not None else config.dtype,
        missing=config.missing,
        optional={*_counters(weights), *filter(UNREAD.fullmatch, names), *(MARKS if config.mixed else ())},
        component=blocks.component,
        resolve=resolved,
        scaled=scaled,
    )
    return replace(made, notes=(*made.notes, *_idle(config), *_strangers(weights), *_names(config, weights[0])))


def _idle(config: Config) -> list[str]:
    """A note about models and steps that the output is not made of."""
    used = _used(config)
    idle = [name for name in (*config.models, *(step.name for step in config.steps)) if name not in used]
    return [f"{', '.join(idle)}: used nowhere; the result is {used[0]}"] if idle else []


def _counters(weights: Sequence[Source]) -> set[str]:
    """The names of tensors that are no weights, such as the positions that some programs save and others leave out."""
    metas = [item for source in weights for item in source.store.metas.items()]
    return {name for name, meta in metas if not meta.dtype.is_floating_point}


def _names(config: Config, first: Source) -> list[str]:
    """A note about a single file that gets the names of a folder."""
    if not config.single or not isinstance(first.store, DiffusersFolder):
        return []
    return [
        f"{config.output} gets the names of a diffusers folder, which most programs expect in folders only; give the "
        "name of a folder as output, or say 'tuner convert FILE ANOTHER --layout ldm' afterwards"
    ]


def _strangers(weights: Sequence[Source]) -> list[str]:
    """Warnings about models that do not come from one base, told from a few of their numbers."""
    warnings: list[str] = []
    for source in weights[1:]:
        relation = same_base(weights[0].store, source.store)
        if relation.kinship is Kinship.UNRELATED:
            names = f"{weights[0].name} and {source.name}"
            warnings.append(f"{names} are not of one base, so their mixture may be noise: {relation}")
        elif relation.kinship is Kinship.DISTANT:
            warnings.append(f"{weights[0].name} and {source.name} are far apart: {relation}")
    return warnings


def _refuse_strangers(one: Source, two: Source, config: Config) -> None:
    """Refuse to merge what is of another architecture, or, unless `mixed`, of another prediction.

    Raises:
        DataError: naming both.
    """
    first, second = identify(one.store.metas), identify(two.store.metas)
    reason = replace(first, marks=frozenset()).difference(replace(second, marks=frozenset()))
    if reason:
        raise DataError(f"{one.name} and {two.name} cannot be merged: {reason}; choose models of one architecture")
    reason = first.difference(second) or _said_otherwise(*(_facts(source, config) for source in (one, two)))
    if reason and not config.mixed:
        raise DataError(f"{one.name} and {two.name} do not go together: {reason}; say mixed = true if it is meant")


def _facts(source: Source, config: Config) -> Facts:
    return Facts.of(config.models[source.name].expanduser(), source.origin or source.store, source.store)


def _said_otherwise(one: Facts, two: Facts) -> str | None:
    """Why models do not predict the same, by what headers and folders say; None where one of them says nothing."""
    if None in (one.prediction, two.prediction):
        return None
    if one.prediction != two.prediction:
        guess = ", as far as numbers tell" if one.guessed or two.guessed else ""
        return f"one predicts {one.prediction}, the other {two.prediction}{guess}"
    if one.zero_terminal_snr != two.zero_terminal_snr:
        return f"only the {'first' if one.zero_terminal_snr else 'second'} was trained down to no signal at all"
    return None


def settings(config: Config) -> Settings:
    """How the executor works."""
    return Settings(
        threads=config.threads,
        rounding=Rounding(config.rounding == "stochastic", config.seed),
        device=config.device,
        keep_non_finite=config.non_finite == "keep",
    )


def merge(config: Config, *, resume: bool = False) -> Mapping[str, execute.Result]:
    """Merge, and say what was made; the result of each file that was written, by its path in the output.

    Raises:
        Stopped: a signal came; it has been said what is left to do.
    """
    try:
        with at_once(), execute.one_thread_each():
            return _merge(config, resume)
    except Stopped as stopped:
        print(stopped.message, file=sys.stderr, flush=True)
        raise


def _merge(config: Config, resume: bool) -> Mapping[str, execute.Result]:
    _check_device(config.device)
    made = plan(config)
    if (there := in_the_way(config, made)) and not (resume and _begun(config.output)):
        raise ConfigError(f"output: {there}; choose another name, or say --overwrite")
    facts = facts_of(made)
    if config.single:
        refuse_contradicting(config.output, facts)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    errors: list[LargestError] = []
    with tqdm(total=made.value_bytes, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
        if config.single:
            results = {"": _write(config, made, config.output, config.verify, resume, bar, errors)}
        else:
            results = _write_folder(config, made, resume, bar, errors)
    kinds = Counter(entry.kind for entry in made.entries)
    worst = max(errors, key=lambda error: error.ulps, default=None)
    checked = "" if worst is None else f", largest error {worst.ulps:.3f} ulp ({worst.name})"
    content = f"content {results[''].root[:16]}" if config.single else f"{len(results)} files"
    print(
        f"{config.output}: {len(made.entries)} tensors ({kinds['merged']} merged, {kinds['copied']} copied), "
        f"{made.value_bytes / 1e9:.2f} GB, {content}{checked}"
    )
    if config.single and (beside := settle(config.output, facts)):
        print(beside)
    return results


def _write(
    config: Config, made: Plan, path: Path, runs: int, resume: bool, bar: "tqdm[Any]", errors: list[LargestError]
) -> execute.Result:
    """Carry out a plan whose output is one file; tells in `errors` how exact `runs` runs of it are."""
    kept = ancestors(made.sources)

    def texts(root: str, roots: Sequence[str]) -> Mapping[str, str]:
        return metadata(recipe(config, made), made, root, roots, kept)

    def check(read: Read) -> None:
        error = largest_error(made, read, settings(config), runs)
        if error is not None:
            errors.append(error)

    result = execute.execute(
        made, path, texts, settings(config), resume=resume, progress=lambda done: _advance(bar, done), check=check
    )
    wanted = {entry.called or entry.name for entry in made.entries}
    if set(SafetensorsFile(path).metas) != wanted:
        raise DataError(f"{path}: holds other tensors than planned; do not use it")
    return result


def files(config: Config, made: Plan) -> Parts:
    """The files that a plan whose output is a folder comes to.

    Raises:
        ConfigError: it cannot be one.
    """
    return parts(made, config.output, size_of(config.max_shard_size))


def _write_folder(
    config: Config, made: Plan, resume: bool, bar: "tqdm[Any]", errors: list[LargestError]
) -> Mapping[str, execute.Result]:
    """Carry out a plan whose output is a folder: file by file aside, and then the whole gets its name."""
    found = files(config, made)
    place = Path(os.path.realpath(config.output))
    clear_up(place)
    runs = -(-config.verify // len(found.plans))
    results: dict[str, execute.Result] = {}
    with workplace(place, config.output) as aside:
        finished = Finished(aside, key_of(recipe(config, made), made), resume=resume)
        known = {file: result for file, part in found.plans.items() if (result := finished.result(file, part))}
        try:
            clear(aside, found.plans if resume else (), known)
            for file, part in found.plans.items():
                (aside / file).parent.mkdir(exist_ok=True)
                if file in known:
                    results[file] = known[file]
                    _advance(bar, part.value_bytes)
                    continue
                results[file] = _write(config, part, aside / file, runs, resume, bar, errors)
                finished.add(file, results[file])
            for file, text in found.indices.items():
                (aside / file).write_text(text, "utf-8")
            if found.model is not None:
                copy_the_rest(found.model, aside)
            finished.remove()
            take_place(aside, place)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise resource_error(config.output, error, made.value_bytes) from error
            raise
    return results


def _check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ConfigError: naming it.
    """
    try:
        torch.empty(1, device=name).to("cpu")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch says it in all of these ways
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"device: {name!r} cannot be used here: {said}; say 'cpu', or mend the installation"
        ) from error


def _check_output(config: Config) -> None:
    """Refuse an output that is an input, or whatever else is not to be written over.

    Raises:
        ConfigError: naming it.
    """
    output = config.output
    place = Path(os.path.realpath(output))
    for path in config.models.values():  # also those that no step uses
        path = path.expanduser()
        if output.is_file() and path.is_file() and output.samefile(path):
            raise ConfigError(f"output: {output}: is also an input ({path}); choose another output")
        real = Path(os.path.realpath(path))
        if not config.single and (place == real or place in real.parents or real in place.parents):
            raise ConfigError(f"output: {output}: is, or holds, or lies in an input ({path}); choose another")
    if not config.single and place.exists() and not any((place / name).is_file() for name in MODELS):
        raise ConfigError(f"output: {output}: is there already, and is no model; choose another")


def in_the_way(config: Config, made: Plan) -> str | None:
    """What there is already at the output's place and is not to be replaced unasked; None where nothing is."""
    place = config.output
    if config.overwrite or not place.exists():
        return None
    try:
        family = Ancestry.of(place if place.is_file() else min(place.rglob("*.safetensors"), default=place))
    except (UserError, OSError):
        return f"{place} is there already, and was not made by this recipe"
    tables = [(source.name, table((source.origin or source.store).metas)) for source in made.sources]
    same = family.recipe == json.loads(json.dumps(recipe(config, made))) and tables == [
        (one.name, one.table) for one in family.sources
    ]
    return None if same else f"{place} is there already, and was made by another recipe"


def _begun(output: Path) -> bool:
    """Whether a merge into `output` was interrupted: what is to become of the older one was said when it began."""
    return unfinished(Path(os.path.realpath(output)))[0].exists()


def _advance(bar: "tqdm[Any]", done: int) -> None:
    bar.update(done)


def recipe(config: Config, made: Plan) -> dict[str, Any]:
    """What of a config decides the output's bytes, as plain data without any path."""
    found = write(config)
    for key in ("output", "threads", "verify", "mixed", "overwrite"):
        found.pop(key, None)
    if not config.max_shard_size:
        del found["max_shard_size"]
    used = _used(config)
    found["steps"] = [step for step in found["steps"] if step["name"] in used]
    found["models"] = [name for name in config.models if name in used]
    if code := code_of(step.method for step in config.steps if step.name in used):
        found[CODE] = code
    return found


def plan_json(made: Plan) -> str:
    """The plan as JSON, tensor by tensor."""
    return json.dumps(
        {
            "bytes": made.value_bytes,
            "tensors": {
                entry.name: {
                    "kind": entry.kind,
                    "dtype": str(entry.meta.dtype).removeprefix("torch."),
                    "shape": list(entry.meta.shape),
                    "sources": [
                        made.sources[leaf.source].name for leaf in entry.program.leaves if leaf.source is not None
                    ],
                    "steps": [write(step.method) for step in entry.program.steps],
                }
                for entry in made.entries
            },
        },
        indent=1,
    )
