"""The order of the stream: whole permutations, one per epoch, frozen for ever."""

import numpy as np
import pytest

from resjax.data import order

LARGEST_SEED = 2**32 - 1


@pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED])
@pytest.mark.parametrize("num_examples", [1, 2, 97])
@pytest.mark.parametrize("epoch", [0, 5])
def test_each_epoch_is_a_permutation_of_the_whole_set(seed, epoch, num_examples):
    shuffled = order.permutation(seed, epoch, num_examples)
    assert sorted(shuffled) == list(range(num_examples))


def test_every_seed_and_epoch_has_its_own_permutation():
    pairs = [(seed, epoch) for seed in (0, 1, 2, LARGEST_SEED) for epoch in range(10)]
    assert len({tuple(order.permutation(*pair, 20)) for pair in pairs}) == len(pairs)


def test_stream_is_frozen():
    # numpy.random.RandomState([seed, epoch, 0]).permutation(8), written down once.
    assert list(order.permutation(0, 0, 8)) == [2, 6, 0, 4, 1, 3, 5, 7]
    assert list(order.permutation(3, 2, 8)) == [7, 6, 2, 1, 4, 3, 0, 5]


def test_augmentation_stream_is_frozen():
    # numpy.random.RandomState([3, 40, 1]).randint(0, 1000, 5), written down once.
    drawn = order.augmentation_rng(3, 40).randint(0, 1000, 5)
    assert list(drawn) == [237, 494, 166, 862, 586]


def test_permutation_cannot_be_changed_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(0, 0, 5)[0] = 0


def test_stream_shows_each_example_once_per_epoch():
    indices = [order.example_index(7, p, 10) for p in range(40)]
    epochs = [indices[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_short_last_part_of_an_epoch_flows_into_the_next():
    # Minibatches of 4 over 10 examples: the third takes the last two and the first two.
    third = [order.example_index(7, p, 10) for p in range(8, 12)]
    first, second = order.permutation(7, 0, 10), order.permutation(7, 1, 10)
    assert third == [first[8], first[9], second[0], second[1]]


def test_augmentation_streams_differ_between_positions_seeds_and_from_the_order():
    streams = [order.augmentation_rng(s, p) for s in range(3) for p in range(20)]
    streams += [np.random.RandomState([s, p, 0]) for s in range(3) for p in range(20)]
    assert len({stream.randint(2**31) for stream in streams}) == 120
