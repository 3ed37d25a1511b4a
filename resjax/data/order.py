"""Which example stands at which position: one permutation of the whole set per epoch.

Position p of the endless training stream is example `permutation(seed, p // N)[p % N]`.
Update t of minibatch size B takes positions [t * B, (t + 1) * B), so the last, short part
of an epoch flows into the next. Nothing depends on devices, hosts or workers.
"""

import functools

import numpy as np

_ORDER, _AUGMENT = 0, 1  # domains of the random streams drawn from one seed


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


def augmentation_rng(seed: int, position: int) -> np.random.RandomState:
    """The random stream of the host-side augmentation of one position."""
    return np.random.RandomState([seed, position, _AUGMENT])
