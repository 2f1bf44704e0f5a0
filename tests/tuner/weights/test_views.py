"""The law of every view: what is read is what is said, and the bytes at a location are the tensor."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.store import SafetensorsFile, TensorMeta, TensorStore, read_location
from tuner.weights.views import Assembled, Extended, Filtered, Joined, Piece, Renamed
from tuner.weights.writer import save_safetensors

TENSORS = {
    "a": torch.arange(24.0).reshape(6, 4),
    "b": torch.arange(8.0).reshape(2, 4),
    "c": torch.arange(12, dtype=torch.int64).reshape(3, 2, 2, 1),
    "d": torch.tensor(7.0),
    "half": torch.arange(4.0).half().reshape(1, 4),
}


@pytest.fixture
def store(tmp_path: Path) -> SafetensorsFile:
    save_safetensors(tmp_path / "x.safetensors", TENSORS)
    return SafetensorsFile(tmp_path / "x.safetensors")


def check(view: TensorStore, expected: dict[str, Tensor], located: set[str]) -> None:
    assert view.metas == {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        values = view.read(name)
        assert torch.equal(values, tensor) and values.is_contiguous()
        place = view.locate(name)
        assert (place is not None) == (name in located)
        if place is not None:
            assert place.meta == view.metas[name]
            assert torch.equal(read_location(place, name), tensor)
    for ask in (view.read, view.locate):
        with pytest.raises(KeyError):
            ask("nowhere")


def test_renamed_tensors_are_the_same_tensors(store: SafetensorsFile) -> None:
    view = Renamed(store, {"x": "a", "a": "c"})
    check(view, {"x": TENSORS["a"], "a": TENSORS["c"]}, {"x", "a"})


def test_what_is_filtered_out_is_not_there(store: SafetensorsFile) -> None:
    view = Filtered(store, keep=("?",), drop=("[bc]",))
    check(view, {"a": TENSORS["a"], "d": TENSORS["d"]}, {"a", "d"})
    with pytest.raises(KeyError):
        view.read("b")


def test_pieces_are_assembled_and_located_where_the_bytes_are_the_same(store: SafetensorsFile) -> None:
    a, b, c = TENSORS["a"], TENSORS["b"], TENSORS["c"]
    recipes = {
        "rows": [Piece("a", (2, 4), start=3, rows=2)],
        "reshaped": [Piece("c", (3, 4))],
        "rows of four dimensions": [Piece("c", (1, 2, 2, 1), start=2, rows=1)],
        "scalar": [Piece("d", ())],
        "transposed": [Piece("a", (4, 6), transposed=True)],
        "joined": [Piece("b", (2, 4)), Piece("a", (1, 4), start=5, rows=1)],
    }
    expected = {
        "rows": a[3:5],
        "reshaped": c.reshape(3, 4),
        "rows of four dimensions": c[2:],
        "scalar": TENSORS["d"],
        "transposed": a.t(),
        "joined": torch.cat([b, a[5:]]),
    }
    check(Assembled(store, recipes), expected, {"rows", "reshaped", "rows of four dimensions", "scalar"})


def test_a_view_of_a_view_is_a_view(store: SafetensorsFile) -> None:
    once = Assembled(store, {"q": [Piece("a", (4, 4), start=2, rows=4)], "t": [Piece("a", (4, 6), transposed=True)]})
    twice = Assembled(once, {"q": [Piece("q", (1, 4), start=3, rows=1)], "t": [Piece("t", (6, 4), transposed=True)]})
    check(Renamed(twice, {"x": "q", "y": "t"}), {"x": TENSORS["a"][5:], "y": TENSORS["a"]}, {"x"})


def test_pieces_of_several_dtypes_are_refused(store: SafetensorsFile) -> None:
    with pytest.raises(DataError, match="one tensor of several dtypes"):
        _ = Assembled(store, {"x": [Piece("b", (2, 4)), Piece("half", (1, 4))]}).metas


def test_given_tensors_stand_beside_those_of_a_store(store: SafetensorsFile) -> None:
    more = {"e": torch.zeros(0), "f": torch.ones(2, 3)}
    view = Extended(store, more)
    check(view, TENSORS | more, set(TENSORS))
    view.read("f").zero_()
    assert view.read("f").sum() == 6  # what is read is a copy


def test_two_stores_are_one(store: SafetensorsFile) -> None:
    other = Renamed(store, {"x": "a", "y": "d"})
    check(Joined(store, other), TENSORS | {"x": TENSORS["a"], "y": TENSORS["d"]}, {*TENSORS, "x", "y"})


def test_the_places_of_pieces_are_the_tensor_one_after_another(store: SafetensorsFile) -> None:
    recipes = {
        "joined": [Piece("b", (2, 4)), Piece("a", (3, 4), start=2, rows=3)],
        "turned": [Piece("a", (4, 6), transposed=True)],
    }
    view = Assembled(store, recipes)
    places = view.places("joined")
    assert places is not None and view.places("turned") is None
    assert torch.equal(torch.cat([read_location(place, "joined") for place in places]), view.read("joined"))
