"""One thread's work: reading runs of numbers, applying the methods, checking, rounding."""

import math
import mmap
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from merge.allocator import private
from merge.content import CELL
from merge.cut import Part, Shared
from merge.lora.in_memory import InMemory
from merge.memory import Arena, work_dtype
from merge.methods.base import Elementwise, Fitted, Merge
from merge.output import BLOCK
from merge.plan import Entry, Program, Step
from merge.scaling import Divided
from tuner.errors import DataError

SHOWN = 5
"""Tensors that a message names."""


class NotFinite(DataError):
    """A source holds NaN or infinity."""

    def __init__(self, source: int, model: str, names: Sequence[str]) -> None:
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        verb = "holds" if len(names) == 1 else "hold"
        super().__init__(
            f"{model}: {shown}: {verb} NaN or infinity; use another copy of the file, or say non_finite = 'keep'"
        )
        self.source = source
        self.model = model
        self.names = names

    def __reduce__(self) -> tuple[type["NotFinite"], tuple[int, str, Sequence[str]]]:
        return NotFinite, (self.source, self.model, self.names)

    def whole(self, names: Sequence[str]) -> "NotFinite":
        """The same, said of all such tensors of the source and not only of the first that was met."""
        return NotFinite(self.source, self.model, names) if names else self


class Page:
    """Memory for one block of the output; it begins at a page of the system's, as writing past its cache asks for."""

    def __init__(self) -> None:
        self.memory = private(BLOCK)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)


class Worker:
    """One thread's memory, and the arithmetic in it."""

    def __init__(self, shared: Shared, *, exact: bool = False, memory: mmap.mmap | None = None) -> None:
        """With `exact`, all arithmetic is float64, to judge the usual one by; `memory` is another worker's."""
        self.shared = shared
        self.exact = exact
        self.device = torch.device(shared.settings.device)
        self.arena = Arena.of(shared.plan, exact=exact)
        self.memory = private(self.arena.bytes) if memory is None else memory
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.places = list(accumulate(self.arena.raw, initial=0))
        """Where each leaf's bytes are read to; what is left is for numbers."""
        self._views: dict[tuple[int, torch.dtype, int], Tensor] = {}

    def work_dtype(self, entry: Entry) -> torch.dtype:
        """What the arithmetic for an entry is done in."""
        return work_dtype(entry, exact=self.exact)

    def raw(self, index: int, dtype: torch.dtype, numbers: int) -> Tensor:
        """Memory for numbers of a leaf as they are read."""
        return self._at(self.places[index], dtype, numbers)

    def slot(self, index: int, dtype: torch.dtype, numbers: int) -> Tensor:
        """Memory for numbers of a leaf or a step."""
        if self.device.type != "cpu":
            return torch.empty(numbers, dtype=dtype, device=self.device)
        return self._at(self.places[-1] + index * self.arena.grid * dtype.itemsize, dtype, numbers)

    def _at(self, begin: int, dtype: torch.dtype, numbers: int) -> Tensor:
        """This thread's memory from a byte on; what runs of the usual length have is kept."""
        key = begin, dtype, numbers
        if key in self._views:
            return self._views[key]
        found = self.bytes[begin : begin + numbers * dtype.itemsize].view(dtype)
        if numbers == self.arena.grid:
            self._views[key] = found
        return found

    def work(self, block: int, page: Page) -> memoryview:
        """Work out a block of the output, in `page`; returns its bytes there."""
        at = 0
        for run in self.shared.runs(block):
            at += self._run(run, at, page)
        return memoryview(page.memory)[:at]

    def _run(self, run: list[Part], at: int, page: Page) -> int:
        plan = self.shared.plan
        entry = plan.entries[run[0].entry]
        size = entry.meta.dtype.itemsize
        numbers = sum(part.stop - part.start for part in run)
        out = page.bytes[at : at + numbers * size]
        if not entry.program.leaves:
            self._make_up(run, out.view(entry.meta.dtype))
        elif not entry.program.steps and entry.channels is None:
            self._copy(run, out)
        else:
            result = self.values(run)
            self._check_range(result, run)
            self.shared.settings.rounding.store(result, out.view(entry.meta.dtype), entry.name, run[0].start)
        if self.shared.hashes is not None:
            data, begin = memoryview(page.memory), at
            for part in run:
                entry = plan.entries[part.entry]
                end = begin + (part.stop - part.start) * size
                self.shared.hashes.written(entry.name, entry.meta, part.start * size, data[begin:end])
                begin = end
        return numbers * size

    def _make_up(self, run: list[Part], out: Tensor) -> None:
        """Scales of other tensors, and zeros."""
        at = 0
        for part in run:
            of = self.shared.plan.entries[part.entry].scale_of
            end = at + part.stop - part.start
            out[at:end] = 0 if of is None else self._scale(self.shared.plan.numbers[of])
            at = end

    def _scale(self, index: int) -> float:
        if index not in self.shared.scales:
            self._fitted(index)
        return self.shared.scales[index]

    def _copy(self, run: list[Part], out: Tensor) -> None:
        """A tensor that one source gives: its very bytes, or its numbers in another dtype."""
        entry = self.shared.plan.entries[run[0].entry]
        source = entry.program.leaves[0].source
        assert source is not None
        meta = self.shared.plan.sources[source].store.metas[entry.name]
        if not meta.dtype.is_floating_point:
            self._read(0, run, hashing=True)
            out.copy_(self.raw(0, torch.uint8, out.numel()))
            return
        place = self.shared.files.place(source, entry.name)
        if place is not None and place.meta.dtype == entry.meta.dtype:
            self._read(0, run, hashing=True)
            raw = self.raw(0, torch.uint8, out.numel())
            if not _finite_bits(raw, entry.meta.dtype):
                self._refuse_input(source, run, raw.view(entry.meta.dtype).float())
            out.copy_(raw)
            return
        numbers = out.numel() // entry.meta.dtype.itemsize
        values = self.slot(0, self.work_dtype(entry), numbers)
        self._load(0, run, values, hashing=True)
        self._check_range(values, run)
        self.shared.settings.rounding.store(values, out.view(entry.meta.dtype), entry.name, run[0].start)

    def values(self, run: list[Part], *, hashing: bool = True) -> Tensor:
        """The result for a run, in the work's dtype."""
        index = run[0].entry
        entry = self.shared.plan.entries[index]
        if entry.channels is not None:
            whole = self.shared.once(index, lambda: self._assembled(entry))
            assert isinstance(whole, Tensor)
            return whole[run[0].start : run[0].stop]
        merges: Sequence[Merge | None] = ()
        if not entry.program.elementwise:
            merges = self._fitted(index)
        slots = range(len(entry.program.leaves) + len(entry.program.steps))
        return self._evaluate(entry.program, run, slots, merges, hashing=hashing)[-1]

    def _evaluate(
        self,
        program: Program,
        run: list[Part],
        slots: Sequence[int],
        merges: Sequence[Merge | None],
        *,
        hashing: bool,
    ) -> list[Tensor]:
        """The numbers of a run in each of `slots`, which include what they are made of."""
        entry = self.shared.plan.entries[run[0].entry]
        dtype = self.work_dtype(entry)
        numbers = sum(part.stop - part.start for part in run)
        values: dict[int, Tensor] = {}
        for slot in slots:
            values[slot] = self.slot(slot, dtype, numbers)
            if slot >= len(program.leaves):
                step = program.steps[slot - len(program.leaves)]
                merge = merges[slot - len(program.leaves)] if merges else None
                inputs = [values[below] for below in step.inputs]
                if merge is not None:
                    merge(inputs, values[slot], run[0].start)
                else:
                    assert isinstance(step.method, Elementwise)
                    step.method.merge(inputs, values[slot])
            elif program.leaves[slot].source is None:
                values[slot].zero_()
            else:
                self._load(slot, run, values[slot], hashing=hashing, checked=not program.spreads)
        return [values[slot] for slot in slots]

    def look(self, index: int, slots: Sequence[int], places: Sequence[int], length: int) -> list[Tensor] | None:
        """The numbers of an entry in each of `slots` at some places; see `merge.methods.base.Tensors`."""
        entry = self.shared.plan.entries[index]
        program, dtype = entry.program, self.work_dtype(entry)
        values: dict[int, Tensor] = {}
        for slot in program.needed(slots):
            values[slot] = self.slot(slot, dtype, len(places) * length)
            if slot >= len(program.leaves):
                step = program.steps[slot - len(program.leaves)]
                if not isinstance(step.method, Elementwise):
                    return None
                step.method.merge([values[below] for below in step.inputs], values[slot])
            elif (source := program.leaves[slot].source) is None:
                values[slot].zero_()
            else:
                place = self.shared.files.place(source, entry.name)
                if place is None:
                    return None
                size = place.meta.dtype.itemsize
                data = memoryview(self.memory)[self.places[slot] : self.places[slot + 1]]
                for number, start in enumerate(places):
                    piece = data[number * length * size : (number + 1) * length * size]
                    self.shared.files.read_bytes(place, start * size, piece)
                values[slot].copy_(self.raw(slot, place.meta.dtype, len(places) * length))
        return [values[slot] for slot in slots]

    def _fitted(self, index: int) -> Sequence[Merge | None]:
        """What the fitted methods of an entry have found, by step."""
        if self.exact:
            return self._fit(index)
        found = self.shared.once(index, lambda: self._fit(index))
        assert isinstance(found, list)
        return found  # pyright: ignore[reportUnknownVariableType]

    def _fit(self, index: int) -> list[Merge | None]:
        entry = self.shared.plan.entries[index]
        merges: list[Merge | None] = [None] * len(entry.program.steps)
        for number, step in enumerate(entry.program.steps):
            if isinstance(step.method, Fitted):
                merges[number] = step.method.fit(_Inputs(self, index, step, merges))
        if merges and isinstance(merges[-1], Divided):
            self.shared.scales[index] = merges[-1].scale
        return merges

    def passes(
        self, index: int, slots: Sequence[int], merges: Sequence[Merge | None], first: int = 0
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """All of an entry from `first` on in runs: where each starts, and the numbers of every one of `slots`."""
        entry = self.shared.plan.entries[index]
        needed = entry.program.needed(slots)
        total = torch.Size(entry.meta.shape).numel()
        for start in range(first, total, self.arena.grid):
            run = [Part(index, start, min(start + self.arena.grid, total))]
            values = self._evaluate(entry.program, run, needed, merges, hashing=False)
            yield start, dict(zip(needed, values, strict=True))

    def _read(self, leaf: int, run: list[Part], *, hashing: bool) -> None:
        """Read the bytes of a leaf for a run to their place; more than the run has where a hashed cell goes on."""
        shared = self.shared
        first, last = shared.plan.entries[run[0].entry], shared.plan.entries[run[-1].entry]
        source = first.program.leaves[leaf].source
        assert source is not None
        place, end_place = shared.files.place(source, first.name), shared.files.place(source, last.name)
        assert place is not None and end_place is not None
        size = place.meta.dtype.itemsize
        begin = place.offset + run[0].start * size
        stop = run[-1].stop * size
        hashes = shared.hashes if hashing else None
        if hashes is not None:
            stop = min(-(-stop // CELL) * CELL, end_place.meta.bytes)
        total = end_place.offset + stop - begin
        assert total <= self.arena.raw[leaf], "the arena has room for a run"
        data = memoryview(self.memory)[self.places[leaf] : self.places[leaf] + total]
        shared.files.read_bytes(place, run[0].start * size, data)
        if hashes is not None:
            for part in run:
                name = shared.plan.entries[part.entry].name
                here = shared.files.place(source, name)
                assert here is not None
                for cell in range(-(-part.start * size // CELL), -(-part.stop * size // CELL)):
                    at = here.offset + cell * CELL - begin
                    hashes.read(source, name, cell, data[at : at + min(CELL, here.meta.bytes - cell * CELL)])

    def _load(self, leaf: int, run: list[Part], out: Tensor, *, hashing: bool, checked: bool = True) -> None:
        """Numbers of a leaf; every one of them is finite where they are `checked`."""
        entry = self.shared.plan.entries[run[0].entry]
        source = entry.program.leaves[leaf].source
        assert source is not None
        place = self.shared.files.place(source, entry.name)
        if place is None:
            out.copy_(self.shared.files.computed(source, entry.name, run[0].start, run[-1].stop))
        else:
            self._read(leaf, run, hashing=hashing)
            out.copy_(self.raw(leaf, place.meta.dtype, out.numel()))
        # A sum may overflow
        if checked and not math.isfinite(out.sum().item()) and not bool(torch.isfinite(out).all()):
            self._refuse_input(source, run, out)

    def _refuse_input(self, source: int, run: list[Part], values: Tensor) -> None:
        if self.shared.settings.keep_non_finite:
            return
        at = 0
        for part in run:
            piece = values[at : at + part.stop - part.start]
            if not bool(torch.isfinite(piece).all()):
                entry = self.shared.plan.entries[part.entry]
                raise NotFinite(source, self.shared.plan.sources[source].name, [entry.name])
            at += part.stop - part.start

    def _check_range(self, values: Tensor, run: list[Part]) -> None:
        """Every result must be finite, and fit its dtype."""
        if self.shared.settings.keep_non_finite or values.numel() == 0:
            return
        dtype = self.shared.plan.entries[run[0].entry].meta.dtype
        limit = torch.finfo(dtype).max
        if math.sqrt(torch.dot(values, values).item()) <= limit / 2:  # the length of all; no number is larger
            return
        low, high = (bound.item() for bound in torch.aminmax(values))
        if -limit <= low and high <= limit:
            return
        at = 0
        for part in run:
            piece = values[at : at + part.stop - part.start]
            largest = piece.abs().max().item()
            name = self.shared.plan.entries[part.entry].name
            if not math.isfinite(largest):
                self._look_at_inputs(run)
                raise DataError(f"{name}: the result is not finite; change the numbers of the recipe")
            if largest > limit:
                kind = str(dtype).removeprefix("torch.")
                raise DataError(
                    f"{name}: {largest:.4g} does not fit {kind} (at most {limit:g}); choose dtype = bfloat16"
                )
            at += part.stop - part.start

    def _look_at_inputs(self, run: list[Part]) -> None:
        """Refuse those of a run that are not finite, by name."""
        entry = self.shared.plan.entries[run[0].entry]
        numbers = sum(part.stop - part.start for part in run)
        for slot, leaf in enumerate(entry.program.leaves):
            if leaf.source is not None:
                self._load(slot, run, self.slot(slot, self.work_dtype(entry), numbers), hashing=False)

    def _assembled(self, entry: Entry) -> Tensor:
        """A first convolution of inputs with other numbers of channels: the shared ones merged, the rest kept."""
        shared, dtype = self.shared, self.work_dtype(entry)
        assert entry.channels is not None
        wholes: list[Tensor] = []
        for leaf in entry.program.leaves:
            if leaf.source is None:
                wholes.append(torch.zeros(entry.meta.shape, dtype=dtype))
                continue
            meta = shared.plan.sources[leaf.source].store.metas[entry.name]
            whole = shared.plan.sources[leaf.source].store.read(entry.name).to(dtype)
            if not bool(torch.isfinite(whole).all()) and not shared.settings.keep_non_finite:
                raise NotFinite(leaf.source, shared.plan.sources[leaf.source].name, [entry.name])
            wholes.append(whole.reshape(meta.shape))
            place = shared.files.place(leaf.source, entry.name)
            if place is not None and shared.hashes is not None:
                data = memoryview(bytearray(place.meta.bytes))
                shared.files.read_bytes(place, 0, data)
                for cell in range(-(-place.meta.bytes // CELL)):
                    shared.hashes.read(leaf.source, entry.name, cell, data[cell * CELL : (cell + 1) * CELL])
        values = [whole[:, : entry.channels].contiguous() for whole in wholes]
        for step in entry.program.steps:
            inputs = [values[slot] for slot in step.inputs]
            out = torch.empty_like(inputs[0]).reshape(-1)
            flat = [value.reshape(-1) for value in inputs]
            match step.method:
                case Fitted():
                    step.method.fit(InMemory(entry.name, inputs))(flat, out, 0)
                case Elementwise():
                    step.method.merge(flat, out)
                case _:
                    raise AssertionError(f"{step.method} is no method")
            values.append(out.reshape(inputs[0].shape))
        result = wholes[0].clone()
        result[:, : entry.channels] = values[-1]
        return result.reshape(-1)


class _Inputs:
    """What a fitted method sees of its inputs; see `merge.methods.base.Tensors`."""

    def __init__(self, worker: Worker, index: int, step: Step, merges: Sequence[Merge | None]) -> None:
        entry = worker.shared.plan.entries[index]
        self._worker, self._index, self._step, self._merges = worker, index, step, merges
        self.name = entry.name
        self.shape = entry.meta.shape
        self.inputs = len(step.inputs)
        self.elements = torch.Size(entry.meta.shape).numel()

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        for at, values in self._worker.passes(self._index, self._step.inputs, self._merges, start):
            yield at, [values[slot] for slot in self._step.inputs]

    def look(self, places: Sequence[int], length: int) -> list[Tensor] | None:
        return self._worker.look(self._index, self._step.inputs, places, length)

    def whole(self, index: int) -> Tensor:
        entry = self._worker.shared.plan.entries[self._index]
        slot = self._step.inputs[index]
        whole = torch.empty(self.elements, dtype=self._worker.work_dtype(entry), device=self._worker.device)
        for start, values in self._worker.passes(self._index, [slot], self._merges):
            whole[start : start + values[slot].numel()] = values[slot]
        return whole.reshape(self.shape)


def _finite_bits(raw: Tensor, dtype: torch.dtype) -> bool:
    """Whether no number among the bytes `raw` is NaN or infinite."""
    values = raw.view(dtype)
    if dtype.itemsize == 1:
        values = values.float()  # torch cannot add up 8-bit floats
    work = torch.float64 if dtype.itemsize > 2 else torch.float32
    return math.isfinite(values.sum(dtype=work).item()) or bool(torch.isfinite(values).all())
