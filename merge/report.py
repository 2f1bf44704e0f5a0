"""A plan in words: what would be read, done and written, before anything is."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from textwrap import wrap

from merge import execute
from merge.cut import Settings
from merge.methods.base import MergeMethod, Space
from merge.plan import Entry, Plan
from merge.recipe import Source
from tuner.weights.architecture import identify
from tuner.weights.store import DTYPE_NAMES

SHOWN = 12
"""Groups of tensors that are listed; the rest is counted."""
WIDE = 120
"""Characters of a line, beyond which steps are told one by one."""


def describe(plan: Plan, settings: Settings, verify: int = 0) -> str:
    """The plan as lines of text; `verify`: how many runs are worked out again afterwards."""
    return "\n".join(_lines(plan, settings, verify))


def _lines(plan: Plan, settings: Settings, verify: int) -> Iterator[str]:
    yield "models:"
    for source in plan.sources:
        yield f"  {source.name}: {_source(source)}"
    yield "what is done:"
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in plan.entries:
        groups[_what(plan, entry)].append(entry)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    for what, entries in ranked[:SHOWN]:
        first = f"  {len(entries):>5} tensors, {_size(sum(entry.meta.bytes for entry in entries))}:"
        if len(f"{first} {what}") <= WIDE or len(entries[0].program.steps) < 2:
            yield f"{first} {what}"
        else:
            yield first
            for line in _steps(plan, entries[0]):
                yield from _wrapped(line)
        yield from _wrapped(_examples(entries))
    if len(ranked) > SHOWN:
        rest = ranked[SHOWN:]
        yield f"  {sum(len(entries) for _, entries in rest):>5} tensors in {len(rest)} more ways (all: --json)"
    if plan.casts:
        yield f"  {len(plan.casts):>5} tensors change their dtype"
    for source, count in plan.extra.items():
        yield f"  {count:>5} tensors of {source} are used nowhere"
    for note in plan.notes:
        yield f"note: {note}"
    dtypes = Counter(DTYPE_NAMES[entry.meta.dtype] for entry in plan.entries)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    yield f"output: {len(plan.entries)} tensors ({kinds}), {_size(plan.value_bytes)}"
    memory = execute.memory(plan, settings, verify)
    yield f"reads {_size(plan.bytes_read)}; memory {_size(memory)} beyond the program itself"


def _wrapped(text: str) -> Iterator[str]:
    """Lines of what belongs to a group."""
    indent = " " * 8
    yield from wrap(
        text,
        WIDE,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _source(source: Source) -> str:
    metas = source.store.metas
    dtypes = Counter(DTYPE_NAMES[meta.dtype] for meta in metas.values())
    total = sum(meta.bytes for meta in metas.values())
    kind = "differences" if source.space is Space.DELTA else "weights"
    known = identify((source.origin or source.store).metas)
    predicts = f" that predicts {known.prediction}" if known.prediction else ""
    numbers = ", ".join(dtype for dtype, _ in dtypes.most_common())
    return f"{known}{predicts}; {len(metas)} tensors of {kind}, {_size(total)}, {numbers}"


def _what(plan: Plan, entry: Entry) -> str:
    program = entry.program
    if not program.leaves:
        return "scales of 8-bit weights, and what marks the file"
    names = _leaves(plan, entry)
    if not program.steps:
        return f"copied from {names[0]}"
    for step in program.steps:
        names.append(f"{call(step.method)}({', '.join(names[slot] for slot in step.inputs)})")
    return names[-1]


def _leaves(plan: Plan, entry: Entry) -> list[str]:
    return ["nothing" if leaf.source is None else plan.sources[leaf.source].name for leaf in entry.program.leaves]


def _steps(plan: Plan, entry: Entry) -> Iterator[str]:
    """What is done, a line for each step; later ones call the results of those above by their numbers."""
    names = _leaves(plan, entry)
    for number, step in enumerate(entry.program.steps, 1):
        yield f"({number}) = {call(step.method)}({', '.join(names[slot] for slot in step.inputs)})"
        names.append(f"({number})")


def call(method: MergeMethod) -> str:
    """A method and its numbers, those that are not the defaults first."""
    assert is_dataclass(method)
    numbers = [f"{item.name}={_number(getattr(method, item.name))}" for item in fields(method)]
    return type(method).__name__ + (f"[{', '.join(numbers)}]" if numbers else "")


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _examples(entries: list[Entry]) -> str:
    names = [entry.name for entry in entries[:3]]
    return ", ".join(names) + (f", … {entries[-1].name}" if len(entries) > 3 else "")


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
