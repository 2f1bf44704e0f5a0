"""Tensors of transformers whose original files keep several of diffusers' layers in one: Stable Diffusion 3's, Flux'.

`sd3` and `flux` say which module is made of which; here their rows are put together and taken apart. Three layers on
one input are of one height. Of four the first three are as high as the input is wide, and the last has the rest.
"""

from collections.abc import Collection, Mapping
from types import ModuleType

from tuner.errors import DataError
from tuner.weights.layouts import flux, sd3
from tuner.weights.store import TensorMeta, quote
from tuner.weights.views import Piece

TABLES: Mapping[str, ModuleType] = {"sd3": sd3, "flux": flux}
ENDS = ("weight", "bias")

Metas = Mapping[str, TensorMeta]
Pieces = dict[str, tuple[Piece, ...]]


def to_diffusers(family: str, part: Metas, prefix: str) -> Pieces:
    """diffusers' tensors of a transformer as pieces of the original's, whose names start with `prefix` in the file.

    Raises:
        DataError: a name that such transformers do not have, or rows that cannot be shared out.
    """
    modules, swapped = _modules(family, part)
    made: Pieces = {}
    for name, meta in part.items():
        if name in _constants(family):
            made[_constants(family)[name]] = (Piece(prefix + name, meta.shape),)
            continue
        module, _, end = name.rpartition(".")
        ours = "weight" if end == _weight(family, module) else end
        parts = modules.get(module, ())
        if not parts or ours not in ENDS:
            raise DataError(f"{quote(prefix + name)}: no layer of this transformer")
        start = 0
        for target, rows in zip(parts, _rows(part, module, end, len(parts), prefix), strict=True):
            if target in swapped:
                made[f"{target}.{ours}"] = _halves_swapped(prefix + name, meta)
            elif len(parts) == 1:
                made[f"{target}.{ours}"] = (Piece(prefix + name, meta.shape),)
            else:
                made[f"{target}.{ours}"] = (Piece(prefix + name, (rows, *meta.shape[1:]), start=start, rows=rows),)
            start += rows
    return made


def from_diffusers(family: str, part: Metas, prefix: str) -> Pieces:
    """The original's tensors as pieces of diffusers', whose names start with `prefix` in the store.

    Raises:
        DataError: a name that diffusers does not have, or a layer without one that the original keeps with it.
    """
    modules, swapped = _modules(family, part)
    originals = {target: module for module, parts in modules.items() for target in parts}
    constants = {ours: name for name, ours in _constants(family).items()}
    made: Pieces = {}
    for name, meta in part.items():
        if name in constants:
            made[constants[name]] = (Piece(prefix + name, meta.shape),)
            continue
        target, _, end = name.rpartition(".")
        module = originals.get(target)
        if module is None or end not in ENDS:
            raise DataError(f"{quote(prefix + name)}: no layer of this transformer")
        own = [f"{each}.{end}" for each in modules[module]]
        if lost := [each for each in own if each not in part]:
            raise DataError(
                f"{quote(prefix + lost[0])}: missing; the original keeps it in one tensor with {quote(name)}"
            )
        pieces = tuple(Piece(prefix + each, part[each].shape) for each in own)
        theirs = _weight(family, module) if end == "weight" else end
        made[f"{module}.{theirs}"] = _halves_swapped(prefix + name, meta) if target in swapped else pieces
    return made


def _modules(family: str, names: Collection[str]) -> tuple[Mapping[str, tuple[str, ...]], Collection[str]]:
    """diffusers' modules by original ones, and those of them whose halves are the other way round."""
    table = TABLES[family]
    return table.modules(names), table.swapped(names)


def _constants(family: str) -> Mapping[str, str]:
    """diffusers' names of tensors that are no module's, by original ones."""
    return sd3.TABLE if family == "sd3" else {}


def _weight(family: str, module: str) -> str:
    """What the original calls the weight of `module`."""
    return "scale" if family == "flux" and flux.SCALE.fullmatch(module) else "weight"


def _rows(part: Metas, module: str, end: str, count: int, prefix: str) -> list[int]:
    """How many rows of `module` belong to each of the `count` layers that it is made of."""
    meta = part[f"{module}.{end}"]
    whole = meta.shape[0] if meta.shape else 0
    weight = part.get(f"{module}.weight")
    if count == 1:
        return [whole]
    if count == 3 and whole % 3 == 0:
        return [whole // 3] * 3
    if count == 4 and weight is not None and len(weight.shape) == 2 and whole > 3 * weight.shape[1]:
        width = weight.shape[1]
        return [width, width, width, whole - 3 * width]
    raise DataError(f"{quote(f'{prefix}{module}.{end}')}: of shape {list(meta.shape)}, expected {count} layers' rows")


def _halves_swapped(name: str, meta: TensorMeta) -> tuple[Piece, Piece]:
    if not meta.shape or meta.shape[0] % 2:
        raise DataError(f"{quote(name)}: of shape {list(meta.shape)}, expected two halves")
    half = meta.shape[0] // 2
    shape = (half, *meta.shape[1:])
    return Piece(name, shape, start=half, rows=half), Piece(name, shape, rows=half)
