from collections import Counter
from itertools import islice
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from tuner.data.order import Order, Showing, share

SIZES = [(64, 64), (56, 72), (72, 56), (48, 80)]
BUCKETS = st.lists(st.sampled_from(SIZES), min_size=1, max_size=40).map(tuple)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any data set: also fewer pictures than a batch, lone buckets, and batches of one."""
    return Order(buckets=draw(BUCKETS), seed=draw(st.integers(0, 5)), batch_size=draw(st.integers(1, 12)))


def sizes(order: Order, batch: list[Showing]) -> set[tuple[int, int]]:
    return {order.buckets[showing.sample] for showing in batch}


@given(orders())
def test_every_sample_comes_once_in_each_epoch(order):
    count = len(order.buckets)
    for epoch in range(3):
        line = [order.at(epoch * count + place) for place in range(count)]
        assert {showing.epoch for showing in line} == {epoch}
        assert sorted(showing.sample for showing in line) == list(range(count))


@given(orders(), st.integers(0, 30))
def test_batches_are_full_and_follow_the_line(order, batches):
    line = [order.at(place) for place in range((batches + 1) * order.batch_size)]
    given_out = [showing for batch in islice(order.batches(0), batches + 1) for showing in batch]
    assert given_out == line


@given(orders(), st.integers(0, 30))
def test_starting_late_is_skipping(order, skipped):
    unbroken = list(islice(order.batches(0), skipped + 3))[skipped:]
    again = Order(buckets=order.buckets, seed=order.seed, batch_size=order.batch_size)
    assert list(islice(again.batches(skipped * order.batch_size), 3)) == unbroken


@given(orders())
def test_few_batches_mix_buckets(order):
    """What is left over makes fewer mixed batches than there are buckets; one more crosses the epochs."""
    batches = -(-3 * len(order.buckets) // order.batch_size)
    mixed = sum(len(sizes(order, batch)) > 1 for batch in islice(order.batches(0), batches))
    assert mixed <= 3 * (len(set(order.buckets)) + 1)


def test_of_a_usual_data_set_most_batches_are_of_one_bucket_in_every_epoch():
    order = Order(buckets=tuple(SIZES[i % 7 % 4] for i in range(1003)), seed=1, batch_size=8)
    batches = list(islice(order.batches(0), 10 * 125))
    assert sum(len(sizes(order, batch)) == 1 for batch in batches) >= 0.97 * len(batches)


def test_epochs_and_seeds_have_different_orders():
    def line(seed: int, epoch: int) -> tuple[int, ...]:
        order = Order(buckets=(SIZES[0],) * 20, seed=seed, batch_size=4)
        return tuple(order.at(epoch * 20 + place).sample for place in range(20))

    assert len({line(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_a_sample_is_as_likely_early_in_an_epoch_as_late_whatever_its_bucket():
    """A lone picture of its bucket would else always end its epoch, say."""
    order = Order(buckets=(*[SIZES[0]] * 12, *[SIZES[1]] * 3, SIZES[2]), seed=0, batch_size=4)
    places = {sample: [] for sample in range(16)}
    for epoch in range(400):
        for place in range(16):
            places[order.at(epoch * 16 + place).sample].append(place)
    for sample, found in places.items():
        assert 6 < sum(found) / len(found) < 9, sample  # the middle is 7.5


@given(orders(), st.integers(0, 5), st.integers(1, 4), st.integers(1, 5))
def test_the_parts_of_all_processes_make_up_the_batch_in_micro_batches_of_one_bucket(order, at, world, micro_batch):
    world = min(world, order.batch_size)
    batch = next(islice(order.batches(0), at, None))
    parts = [share(batch, order.buckets, micro_batch, rank, world) for rank in range(world)]
    given_out = [showing for part in parts for micro in part for showing in micro]
    assert sorted(given_out, key=repr) == sorted(batch, key=repr)
    counts = [sum(map(len, part)) for part in parts]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1
    for part in parts:
        for micro in part:
            assert 1 <= len(micro) <= micro_batch
            assert len(sizes(order, micro)) == 1


@given(orders(), st.integers(1, 5))
def test_there_are_no_more_micro_batches_than_the_buckets_need(order, micro_batch):
    for batch in islice(order.batches(0), 5):
        counts = Counter(order.buckets[showing.sample] for showing in batch)
        needed = sum(ceil(count / micro_batch) for count in counts.values())
        assert len(share(batch, order.buckets, micro_batch, 0, 1)) == needed
