"""Memory that is lent for a moment: nobody else's meanwhile, and the same again afterwards."""

import threading

import pytest
import torch

from merge import scratch as module
from merge.scratch import scratch


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bool, torch.int32])
@pytest.mark.parametrize("numbers", [0, 1, 7, 4096])
def test_what_is_lent_is_as_asked_for_and_overlaps_nothing(dtype, numbers):
    like = torch.zeros(numbers)
    with scratch(like, 3, dtype) as first, scratch(like, 2) as second:
        everything = [*first, *second]
        assert [(tensor.shape, tensor.dtype) for tensor in first] == [(like.shape, dtype or like.dtype)] * 3
        for value, tensor in enumerate(everything):
            tensor.fill_(value % 2)
        for value, tensor in enumerate(everything):
            assert (tensor == value % 2).all()


def test_what_was_given_back_is_lent_again():
    like = torch.zeros(100)
    with scratch(like) as (one,), scratch(like) as (two,):
        places = one.data_ptr(), two.data_ptr()
    with pytest.raises(ZeroDivisionError), scratch(like):
        raise ZeroDivisionError
    with scratch(like, 2) as (one, two):
        assert (one.data_ptr(), two.data_ptr()) == (places[0], one.data_ptr() + 448)


def test_threads_have_their_own():
    like, found = torch.zeros(100), []

    def lend() -> None:
        with scratch(like) as (other,):
            found.append(other.data_ptr())

    with scratch(like) as (mine,):
        thread = threading.Thread(target=lend)
        thread.start()
        thread.join()
        assert found[0] != mine.data_ptr()


def test_more_than_there_is_room_for_is_lent_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 1000)
    with scratch(torch.zeros(200)) as (one,), scratch(torch.zeros(200), 2) as (two, three):
        one.fill_(1), two.fill_(2), three.fill_(3)
        assert (one == 1).all() and (two == 2).all() and (three == 3).all()
