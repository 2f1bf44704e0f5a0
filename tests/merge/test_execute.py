"""The executor: the right numbers, the same bytes however it works, and nothing left behind when it fails."""

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge import content, crew, cut, execute, memory
from merge.cut import Settings
from merge.methods.base import Elementwise, Fitted, Merge, Space, Tensors, Whole
from merge.methods.ties import Ties
from merge.plan import Plan, make_plan
from merge.read import Files
from merge.recipe import Apply, Select, Source, on_base
from merge.rounding import Rounding
from tests.merge.memory import apply
from tuner.errors import ConfigError, DataError
from tuner.weights.store import SafetensorsFile


@dataclass(frozen=True, kw_only=True)
class Blend(Elementwise):
    t: float = 0.25
    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(self.t)

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        torch.lerp(inputs[0], inputs[1], self.t, out=out)


@dataclass(frozen=True, kw_only=True)
class Difference(Elementwise):
    takes = (Space.WEIGHT, Space.WEIGHT)
    gives = Space.DELTA

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        torch.sub(inputs[0], inputs[1], out=out)


@dataclass(frozen=True, kw_only=True)
class Onto(Elementwise):
    takes = (Space.WEIGHT, Space.DELTA)
    gives = Space.WEIGHT

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        torch.add(inputs[0], inputs[1], out=out)


@dataclass(frozen=True, kw_only=True)
class Normed(Fitted):
    """Each input divided by its norm, added up: every number depends on all others."""

    takes = (Space.EITHER,)
    repeats = True
    gives = Space.EITHER

    def fit(self, tensors: Tensors) -> Merge:
        squares = [0.0] * tensors.inputs
        for _, inputs in tensors.chunks():
            for index, tensor in enumerate(inputs):
                squares[index] += tensor.double().square().sum().item()

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            out.zero_()
            for tensor, square in zip(inputs, squares, strict=True):
                out.add_(tensor, alpha=1 / max(square, 1e-30) ** 0.5)

        return merge


@dataclass(frozen=True, kw_only=True)
class Turned(Whole):
    """The first input's rows in reverse."""

    takes = (Space.WEIGHT,)
    gives = Space.WEIGHT

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].flip(0) if tensors[0].ndim else tensors[0].clone()


SHAPES = {
    "wide": (1500, 700),
    "conv": (96, 32, 3, 3),
    "point": (64, 64, 1, 1),
    "bias": (64,),
    "scalar": (),
    "empty": (0,),
    "long": (300_001,),
    **{f"small.{index}": (index + 1, 7) for index in range(40)},
}


def checkpoint(path: Path, seed: int, dtype: torch.dtype = torch.float16, **changed: Tensor) -> Source:
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}
    tensors["ids"] = torch.arange(77)
    save_file({**tensors, **changed}, path, {"who": path.stem})
    return Source(path.stem, SafetensorsFile(path))


def no_metadata(found: str, sources: Sequence[str]) -> dict[str, str]:
    return {"root": found, "sources": json.dumps(list(sources))}


@pytest.fixture
def a(tmp_path):
    return checkpoint(tmp_path / "a.safetensors", 1)


@pytest.fixture
def b(tmp_path):
    return checkpoint(tmp_path / "b.safetensors", 2)


@pytest.fixture
def threads_alone(monkeypatch):
    """As where no process can be forked."""
    monkeypatch.setattr(crew, "possible", lambda settings: False)


@pytest.fixture(params=["processes", "threads"])
def how(request, monkeypatch):
    """By what the work is shared."""
    monkeypatch.setattr(crew, "possible", lambda settings: request.param == "processes")
    return request.param


def run(plan: Plan, path: Path, **settings) -> SafetensorsFile:
    resume = settings.pop("resume", False)
    execute.execute(plan, path, no_metadata, Settings(**settings), resume=resume)
    return SafetensorsFile(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def patch(monkeypatch: pytest.MonkeyPatch, **numbers: int) -> None:
    for name, number in numbers.items():
        for path, module in list(sys.modules.items()):
            if path.startswith("merge.") and hasattr(module, name):
                monkeypatch.setattr(module, name, number)


@pytest.fixture
def small_blocks(monkeypatch):
    """So that little tensors are cut in many places."""
    patch(monkeypatch, BLOCK=1 << 16, GRID=1 << 13, CELL=1 << 10)


@pytest.mark.parametrize("blocks", ["large", "small"])
def test_every_number_is_the_methods(tmp_path, a, b, blocks, request):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    merged = run(make_plan(Apply("x", Blend(), (a, b))), tmp_path / "out.safetensors")
    assert set(merged.metas) == {*SHAPES, "ids"}
    for name in SHAPES:
        expected = torch.lerp(a.store.read(name).float(), b.store.read(name).float(), 0.25).half()
        assert torch.equal(merged.read(name), expected), name
    assert torch.equal(merged.read("ids"), torch.arange(77))


def graph(a: Source, b: Source) -> Apply:
    change = Apply("normed", Normed(), (Apply("d", Difference(), (b, a)), Apply("e", Difference(), (a, b))))
    return Apply("sum", Onto(), (Apply("turned", Turned(), (Apply("x", Blend(), (a, b)),)), change))


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
@pytest.mark.usefixtures("how")
def test_workers_and_blocks_change_no_bit(tmp_path, a, b, dtype, monkeypatch):
    plan = make_plan(graph(a, b), dtype=dtype)
    digests = set()
    for threads in (1, 2, 4):
        run(plan, tmp_path / "out.safetensors", threads=threads)
        digests.add(digest(tmp_path / "out.safetensors"))
    for block in (1 << 16, 1 << 18):
        patch(monkeypatch, BLOCK=block)
        run(plan, tmp_path / "out.safetensors", threads=3)
        digests.add(digest(tmp_path / "out.safetensors"))
    assert len(digests) == 1


@pytest.mark.parametrize("blocks", ["large", "small"])
def test_a_method_that_looks_at_places_first_finds_in_files_what_it_finds_in_memory(tmp_path, a, b, blocks, request):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    plan = make_plan(on_base("ties", Ties(density=0.3), a, [b, checkpoint(tmp_path / "c.safetensors", 3)]))
    digests = set()
    for threads in (1, 3):
        merged = run(plan, tmp_path / "out.safetensors", threads=threads)
        digests.add(digest(tmp_path / "out.safetensors"))
    assert len(digests) == 1
    for name in ("wide", "long", "conv", "small.3"):
        base, *others = (source.store.read(name).float() for source in plan.sources)
        change = apply(Ties(density=0.3), *(other - base for other in others))
        assert torch.equal(merged.read(name), (base + change).half()), name


@pytest.fixture
def shared(tmp_path, a, b, small_blocks):
    """Of a plan that needs all of a tensor in advance."""
    plan = make_plan(Apply("x", Normed(), (a, b)))
    files = Files(plan.sources)
    yield cut.Shared(plan, files, None, Settings())
    files.close()


def blocks_of(plan: Plan, name: str) -> list[int]:
    entry = plan.entries[plan.numbers[name]]
    return list(range(entry.offset // cut.BLOCK, (entry.offset + entry.meta.bytes - 1) // cut.BLOCK + 1))


@pytest.fixture
def nobody_wakes_up_alone(monkeypatch):
    """So that a thread goes on only when it is told."""
    patch(monkeypatch, AWAKE=1000)


def taking(shared: cut.Shared, pending: list[int]) -> tuple[threading.Thread, list[int | None]]:
    """A thread that takes a block, and what it has taken."""
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(shared.take(pending)), daemon=True)
    thread.start()
    thread.join(0.3)
    return thread, found


def test_a_thread_takes_a_block_that_waits_for_no_other_thread(shared, nobody_wakes_up_alone):
    first, second, *rest, last = blocks_of(shared.plan, "long")
    pending = [first, second, *rest, last, last + 1]
    assert shared.take(pending) == first
    assert shared.take(pending) == last + 1, "the first that holds nothing of the tensor"
    thread, found = taking(shared, pending)
    assert not found and pending == [second, *rest, last], "all have to wait"
    shared.once(shared.plan.numbers["long"], lambda: [None])
    thread.join(60)
    assert found == [second], "nothing to wait for"


def test_a_thread_that_waits_for_a_block_ends_with_the_others(shared):
    pending = blocks_of(shared.plan, "long")
    shared.take(pending)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: shared.take(pending, ended.is_set), daemon=True)
    thread.start()
    ended.set()
    thread.join(60)
    assert not thread.is_alive() and len(pending) > 1


@dataclass(frozen=True, kw_only=True)
class Watched(Turned):
    """Tells how many numbers are worked on at once."""

    now: list[int] = field(default_factory=list[int], compare=False)
    most: list[int] = field(default_factory=list[int], compare=False)

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        self.now.append(tensors[0].numel())
        self.most.append(sum(self.now))
        time.sleep(0.01)
        self.now.remove(tensors[0].numel())
        return super().compute(tensors)


def test_whole_tensors_together_take_no_more_memory_than_the_largest_alone(tmp_path, small_blocks, threads_alone):
    rng = torch.Generator().manual_seed(0)
    tensors = {f"{index:02}": torch.randn(100 * rows, 100, generator=rng) for index, rows in enumerate([1, 3, 10] * 5)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = Source("a", SafetensorsFile(tmp_path / "a.safetensors"))
    method = Watched()
    digests = set()
    for threads in (1, 4):
        run(make_plan(Apply("x", method, (source,))), tmp_path / "out.safetensors", threads=threads)
        digests.add(digest(tmp_path / "out.safetensors"))
    assert len(digests) == 1
    largest = max(tensor.numel() for tensor in tensors.values())
    assert len(method.now) == 0 and largest <= max(method.most)
    assert max(method.most) <= 1.2 * largest, "what is held of the tensor before stands beside it"
    assert any(numbers not in (10_000, 30_000, 100_000) for numbers in method.most), "threads do work together"


def test_where_there_is_no_memory_a_thread_waits_until_a_block_is_written(shared, nobody_wakes_up_alone):
    shared.budget = memory.Budget([1] * len(shared.plan.entries), [0] * len(shared.plan.entries), 1)
    pending = [blocks_of(shared.plan, name)[0] for name in ("wide", "long")]
    one = shared.take(pending)
    thread, found = taking(shared, pending)
    assert one is not None and not found, "there is memory for one"
    shared.forget(one)
    thread.join(60)
    assert found == [blocks_of(shared.plan, "long")[0]]


def test_a_block_for_which_there_is_never_enough_memory_is_worked_on_alone(shared):
    shared.budget = memory.Budget([2] * len(shared.plan.entries), [0] * len(shared.plan.entries), 1)
    assert shared.take(blocks_of(shared.plan, "wide")) == blocks_of(shared.plan, "wide")[0]


def test_a_nested_graph_is_worked_out_as_written(tmp_path, a, b):
    merged = run(make_plan(graph(a, b), dtype="float32"), tmp_path / "out.safetensors")
    for name in ("wide", "scalar", "long", "small.3"):
        x, y = a.store.read(name).double(), b.store.read(name).double()
        d = y - x
        blend = torch.lerp(x, y, 0.25)
        expected = (blend.flip(0) if blend.ndim else blend) + d / d.norm() + -d / d.norm()
        assert torch.allclose(merged.read(name).double(), expected, rtol=1e-7, atol=1e-7)


def test_hashes_are_those_of_the_tensors_whoever_wrote_them(tmp_path, a, b, small_blocks):
    out = run(make_plan(Apply("x", Blend(), (a, b))), tmp_path / "out.safetensors", threads=2)
    told = json.loads(out.metadata["sources"])

    def of(store: SafetensorsFile, unused: str = "") -> str:
        digests = {}
        for name, meta in store.metas.items():
            if name == unused:
                continue
            data = store.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() if meta.bytes else b""
            tensor = content.TensorHash(meta)
            for cell in range(content.cells(meta)):
                tensor.update(cell, content.digest(data[cell * content.CELL : (cell + 1) * content.CELL]))
            digests[name] = tensor.digest()
        return content.root(store.metas, digests)

    assert out.metadata["root"] == of(out)
    assert told == [of(a.store), of(b.store, unused="ids")]  # whole numbers are taken from the first


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_numbers_that_leave_an_input_alone_copy_it_bit_for_bit(tmp_path, a, b, t):
    plan = make_plan(Apply("x", Blend(t=t), (a, b)))
    assert all(entry.kind == "copied" for entry in plan.entries)
    merged = run(plan, tmp_path / "out.safetensors")
    for name in SHAPES:
        assert torch.equal(merged.read(name), (a, b)[int(t)].store.read(name))


def test_values_start_at_a_page(tmp_path, a, b):
    assert run(make_plan(Apply("x", Blend(), (a, b))), tmp_path / "out.safetensors").header.data_start % 4096 == 0


def test_components_are_taken_or_left_out(tmp_path, a, b):
    plan = make_plan(Select("pick", a, {"small": b, "conv": None}), component=lambda name: name.partition(".")[0])
    out = run(plan, tmp_path / "out.safetensors")
    assert "conv" not in out.metas
    assert torch.equal(out.read("small.3"), b.store.read("small.3"))
    assert torch.equal(out.read("wide"), a.store.read("wide"))


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "b: wide: holds NaN"), (float("inf"), "b: wide: holds NaN")]
)
@pytest.mark.parametrize("t", [0.5, 1.0])
def test_what_is_not_finite_is_refused_by_name(tmp_path, a, value, words, t):
    bad = torch.zeros(SHAPES["wide"], dtype=torch.float16)
    bad[1400, 3] = value
    b = checkpoint(tmp_path / "b.safetensors", 2, wide=bad)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(DataError, match="b: wide: holds NaN or infinity"):
        run(make_plan(Apply("x", Blend(t=t), (a, b))), out)
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]
    kept = run(make_plan(Apply("x", Blend(t=t), (a, b))), out, keep_non_finite=True)
    assert not torch.isfinite(kept.read("wide")[1400, 3])


def test_a_result_too_large_for_its_dtype_is_refused(tmp_path):
    large = torch.full(SHAPES["wide"], 60_000.0)
    a = checkpoint(tmp_path / "a.safetensors", 1, torch.float32, wide=large)
    b = checkpoint(tmp_path / "b.safetensors", 1, torch.float32, wide=large * 1.2)
    root = Apply("x", Blend(t=0.9), (a, b))
    with pytest.raises(DataError, match=r"wide: 7.08e\+04 does not fit float16"):
        run(make_plan(root, dtype="float16"), tmp_path / "out.safetensors")
    run(make_plan(root, dtype="bfloat16"), tmp_path / "out.safetensors")


@pytest.mark.parametrize("alias", ["same", "dot", "symlink", "hard link"])
def test_an_input_is_never_the_output(tmp_path, a, b, alias):
    path = tmp_path / "a.safetensors"
    before = digest(path)
    target = {
        "same": path,
        "dot": tmp_path / "." / "x" / ".." / "a.safetensors",
        "symlink": tmp_path / "link.safetensors",
        "hard link": tmp_path / "hard.safetensors",
    }[alias]
    (tmp_path / "x").mkdir()
    if alias == "symlink":
        target.symlink_to(path)
    if alias == "hard link":
        os.link(path, target)
    with pytest.raises(ConfigError, match="is also an input"):
        run(make_plan(Apply("x", Blend(), (a, b))), target)
    assert digest(path) == before


@pytest.mark.parametrize("change", ["longer", "shorter", "replaced", "touched"])
def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, a, b, change):
    plan = make_plan(Apply("x", Blend(), (a, b)))
    path = tmp_path / "b.safetensors"

    def meddle(done: int) -> None:
        match change:
            case "longer":
                with path.open("ab") as file:
                    file.write(b"x")
            case "shorter":
                os.truncate(path, 100_000)
            case "replaced":
                path.with_suffix(".new").write_bytes(path.read_bytes())
                path.with_suffix(".new").replace(path)
            case _:
                os.utime(path, ns=(1, 1))

    out = tmp_path / "out.safetensors"
    with pytest.raises(DataError, match=r"b\.safetensors: (changed|became shorter) while it was read"):
        execute.execute(plan, out, no_metadata, Settings(threads=1), progress=meddle)
    assert not out.exists()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 7, 20, 38])
def test_resumed_merge_gives_the_same_bytes(tmp_path, a, b, small_blocks, after, monkeypatch, how):
    patch(monkeypatch, SAVE_BYTES=1 << 17)
    by_shifts = how == "processes" and after >= 20  # in the graph hardly any shift ends before all do
    plan = make_plan(Apply("x", Blend(), (a, b)) if by_shifts else graph(a, b), dtype="float32")
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    run(plan, whole)
    out.write_bytes(b"before")
    calls = []

    def die(done: int) -> None:
        calls.append(done)
        if len(calls) > after:
            raise Stop

    with pytest.raises(Stop):
        execute.execute(plan, out, no_metadata, Settings(threads=2), progress=die)
    assert out.read_bytes() == b"before"
    result = execute.execute(plan, out, no_metadata, Settings(threads=3), resume=True)
    assert digest(out) == digest(whole)
    assert result.resumed_bytes > 0 or (after < 4 if how == "threads" else not by_shifts)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("cell", [1 << 14, 1 << 18])
@pytest.mark.parametrize("seed", range(4))
def test_a_merge_whose_blocks_were_finished_in_any_order_is_gone_on_with(tmp_path, a, b, monkeypatch, seed, cell, how):
    """The digests, too, also where one is of what lies in several blocks."""
    patch(monkeypatch, BLOCK=1 << 16, GRID=1 << 13, CELL=cell, SAVE_BYTES=1 << 17)
    plan = make_plan(graph(a, b) if how == "threads" else Apply("x", Blend(), (a, b)), dtype="float32")
    out = tmp_path / "out.safetensors"
    whole = execute.execute(plan, out, no_metadata)
    before = digest(out)
    order, take, shifts, blocks = random.Random(seed), cut.Shared.take, crew.shifts, []

    def any_of(self, pending, *stopped):
        order.shuffle(pending)
        return take(self, pending, *stopped)

    def shuffled(*known):
        found = shifts(*known)
        order.shuffle(found)
        return found

    def die(done: int) -> None:
        blocks.append(done)
        if len(blocks) > 20:
            raise Stop

    monkeypatch.setattr(cut.Shared, "take", any_of)
    monkeypatch.setattr(crew, "shifts", shuffled)
    with pytest.raises(Stop):
        execute.execute(plan, out, no_metadata, progress=die)
    result = execute.execute(plan, out, no_metadata, resume=True)
    assert result.resumed_bytes > 0
    assert (result.root, result.source_roots) == (whole.root, whole.source_roots) and digest(out) == before


def test_a_merge_of_other_inputs_is_not_gone_on_with(tmp_path, a, b, small_blocks, monkeypatch):
    patch(monkeypatch, SAVE_BYTES=1 << 16)
    out = tmp_path / "out.safetensors"
    calls = []

    def die(done: int) -> None:
        calls.append(done)
        if len(calls) > 9:
            raise Stop

    with pytest.raises(Stop):
        execute.execute(make_plan(Apply("x", Blend(), (a, b))), out, no_metadata, Settings(threads=1), progress=die)
    with pytest.raises(ConfigError, match="another merge"):
        run(make_plan(Apply("x", Blend(t=0.3), (a, b))), out, resume=True)


def test_a_merge_of_another_recipe_is_not_gone_on_with(tmp_path, a, b, small_blocks, monkeypatch):
    """Not all that a recipe says is in the plan: a model whose units were put in another order is called the same."""
    patch(monkeypatch, SAVE_BYTES=1 << 16)
    plan, out = make_plan(Apply("x", Blend(), (a, b))), tmp_path / "out.safetensors"
    calls = []

    def die(done: int) -> None:
        calls.append(done)
        if len(calls) > 9:
            raise Stop

    with pytest.raises(Stop):
        execute.execute(plan, out, lambda root, roots: {"recipe": "plain"}, Settings(threads=1), progress=die)
    with pytest.raises(ConfigError, match="another merge"):
        execute.execute(plan, out, lambda root, roots: {"recipe": "align"}, Settings(threads=1), resume=True)


def test_an_unfinished_file_cannot_be_loaded(tmp_path, a, b, small_blocks):
    def die(done: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        plan = make_plan(Apply("x", Blend(), (a, b)))
        execute.execute(plan, tmp_path / "out.safetensors", no_metadata, Settings(threads=1), progress=die)
    [part] = tmp_path.glob(".*.part")
    with pytest.raises(DataError):
        _ = SafetensorsFile(part).header


def test_stochastic_rounding_keeps_small_changes_on_average_and_is_repeatable(tmp_path):
    a = checkpoint(tmp_path / "a.safetensors", 1, torch.float32, wide=torch.full(SHAPES["wide"], 1.0))
    b = checkpoint(tmp_path / "b.safetensors", 1, torch.float32, wide=torch.full(SHAPES["wide"], 1.002))
    plan = make_plan(Apply("x", Blend(t=0.5), (a, b)), dtype="bfloat16")
    out = tmp_path / "out.safetensors"
    nearest = run(plan, out).read("wide").double()
    assert (nearest == 1).all()
    rounded = run(plan, out, rounding=Rounding(stochastic=True), threads=1).read("wide").double()
    assert abs(rounded.mean().item() - 1.001) < 2e-5
    assert rounded.unique().numel() == 2
    first = digest(out)
    run(plan, out, rounding=Rounding(stochastic=True), threads=4)
    assert digest(out) == first
    run(plan, out, rounding=Rounding(stochastic=True, seed=1))
    assert digest(out) != first


def test_memory_is_that_of_the_arenas_not_of_the_models(tmp_path, a, b):
    small = execute.memory(make_plan(Apply("x", Blend(), (a, b))), Settings(threads=2))
    assert small < 40 << 20
