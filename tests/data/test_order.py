"""The order of the stream: whole permutations, one per epoch, frozen for ever."""

import numpy as np
import pytest
from scipy.stats import kstest

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


def test_augmentation_draws_are_frozen():
    # numpy.random.Philox(key=[3, 1], counter=240).random_raw(2) / 2**64, written down once.
    drawn = order.uniforms(3, 40, 1)
    assert drawn.shape == (1, 24)
    np.testing.assert_allclose(
        drawn[0, :2], [0.1929873454064968, 0.5401335536728725], rtol=0, atol=1e-15
    )


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


def test_draws_of_a_position_are_the_same_in_any_batch():
    rows = order.uniforms(3, 0, 50)
    for first, count in [(0, 1), (7, 1), (7, 20), (49, 1)]:
        np.testing.assert_array_equal(
            order.uniforms(3, first, count), rows[first : first + count]
        )
    far = 2**31 - 5
    np.testing.assert_array_equal(
        order.uniforms(3, far, 4)[3:], order.uniforms(3, far + 3, 1)
    )


def test_draws_differ_between_positions_and_seeds():
    rows = np.concatenate([order.uniforms(seed, 0, 20) for seed in (0, 1, LARGEST_SEED)])
    assert len(np.unique(rows)) == rows.size


def test_draws_are_uniform():
    drawn = order.uniforms(0, 1000, 2000).ravel()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert kstest(drawn, "uniform").pvalue > 0.01
    columns = order.uniforms(0, 0, 4000)
    correlation = np.corrcoef(columns.T) - np.eye(24)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
