"""Which example stands at which position: one permutation of the whole set per epoch.

Position p of the endless training stream is example `permutation(seed, p // N)[p % N]`.
Update t of minibatch size B takes positions [t * B, (t + 1) * B), so the last, short part
of an epoch flows into the next. Nothing depends on devices, hosts or workers.
"""

import functools

import numpy as np

_ORDER, _AUGMENT = 0, 1  # domains of the random streams drawn from one seed
_DRAWS = 24  # numbers an example may use; a multiple of the 4 that Philox makes at once


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of an epoch, [num_examples] int.

    Drawn from numpy's RandomState, whose streams are frozen for ever (NEP 19).

    Source: Goyal et al. 2017 (arXiv:1706.02677), remark 4: one shuffle per epoch,
      shared by all workers.
    """
    rng = np.random.RandomState([seed, epoch, _ORDER])
    order = rng.permutation(num_examples)
    order.setflags(write=False)
    return order


def example_index(seed: int, position: int, num_examples: int) -> int:
    """The index, into the data set, of the example at a position of the stream."""
    epoch, offset = divmod(position, num_examples)
    return int(permutation(seed, epoch, num_examples)[offset])


def uniforms(seed: int, first: int, count: int) -> np.ndarray:
    """What the host-side augmentation draws, [count, 24] float64 in [0, 1).

    A row for each position from `first` on, which depends on it and the seed alone.

    The words of a counter-based generator, for which any position is as near as the
    first; its bits, unlike numpy's distributions, are frozen for ever (NEP 19).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    """
    words = np.random.Philox(key=[seed, _AUGMENT], counter=first * _DRAWS // 4)
    raw = words.random_raw(count * _DRAWS).reshape(count, _DRAWS)
    return (raw >> np.uint64(11)) * 2.0**-53
