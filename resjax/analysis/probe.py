"""Linear probes: what the frozen features of a net tell of classes it was not trained on.

The features of an image are what the head takes, the last map averaged over positions, in
evaluation mode and of the preprocessing that the weights were evaluated with. A multinomial
logistic regression is fitted to those of some images of each class and tested on others.

  run = resjax.restore("runs/resnet50")  # also of `python -m resjax.convert`
  train = extract_features(run, "folder", "train", "photos")
  test = extract_features(run, "folder", "test", "photos")
  rows = learning_curve(train, test, [1, 2, 5, 10, 20, None], seeds=[0, 1, 2])

Source: Kornblith, Shlens & Le 2019 (arXiv:1805.08974), which compares ImageNet nets so.
Differs: features are standardised, and the penalty is fixed unless it is to be chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resjax.config import UsageError
from resjax.runs import Restored

# Of standardised features, so that one number suits all nets: the weights of largest
# posterior probability if each was drawn from a unit normal, for any number of images.
PENALTY_INVERSE = 1.0
# Those that cross validation chooses among.
PENALTY_INVERSES = tuple(10.0**power for power in range(-4, 3))
_MAX_FOLDS = 5
_MAX_ITERATIONS = 10_000


class Features(NamedTuple):
    """The features of a split, every example once, in order.

    Attributes:
      values: [N, D] float32.
      labels: [N] int32.
      class_names: of the labels, in order.
    """

    values: np.ndarray
    labels: np.ndarray
    class_names: list[str]


def make_features(run: Restored) -> Callable[[Any], jax.Array]:
    """Makes the function images -> features, compiled for one device.

    Args:
      run: a trained net.

    Returns:
      [B, S, S, 3] float32, of `run.preprocess`, -> [B, D] float32.
    """
    headless = run.model.clone(num_classes=0)

    @jax.jit
    def features(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        maps: Any = headless.apply(variables, images, train=False)
        return maps.astype(jnp.float32)

    return lambda images: features(run.variables, images)


def extract_features(
    run: Restored,
    name: str,
    split: str,
    data_dir: str | None = None,
    batch_size: int = 64,
) -> Features:
    """The features of a whole split of a data set, which need not be that of the run.

    Images are cropped and normalised as the weights were evaluated, and decoded as the data
    set says. Threads prepare batches while the device computes.

    Args:
      run: a trained net.
      name: of the data set: "folder", or one of tfds.
      split: "train" or "test".
      data_dir: the folder of images, or of tfds data sets; None as in training.
      batch_size: images of one forward pass, which changes nothing but rounding.

    Raises:
      UsageError: the data set is unknown, not there or empty, or an example is damaged.
    """
    from resjax.data import sources, workers
    from resjax.data.datasets import get_dataset
    from resjax.data.decode import DataError, check_label, decode

    rotates = get_dataset(name).rotates
    source = sources.open_source(name, data_dir, split)
    if not len(source):
        raise UsageError(f"data set {name} has no {split} examples")
    if batch_size < 1:
        raise UsageError(f"batch_size: {batch_size} is not greater than 0")
    size = min(batch_size, len(source))

    def read(index: int) -> tuple[np.ndarray, int]:
        try:
            example = source[index]
            label = int(example["label"])
            check_label(label, len(source.class_names))
            return run.preprocess(decode(example["image"], rotates)), label
        except DataError as error:
            where = source.where(index)
            raise DataError(f"data: example {index} ({where}): {error}") from None

    def load(start: int) -> tuple[np.ndarray, list[int]]:
        part = range(start, min(start + size, len(source)))
        images, labels = zip(*map(read, part), strict=True)
        return np.concatenate(images), list(labels)

    compute = make_features(run)
    values: list[np.ndarray] = []
    labels: list[int] = []
    cores = workers.num_cores()
    starts = range(0, len(source), size)
    for images, known in workers.in_order(load, starts, num_threads=cores, ahead=cores + 1):
        blank = [(0, size - len(known)), (0, 0), (0, 0), (0, 0)]  # one program for all
        values.append(np.asarray(compute(np.pad(images, blank)))[: len(known)])
        labels += known
    return Features(np.concatenate(values), np.array(labels, np.int32), source.class_names)


def check_enough(
    labels: np.ndarray,
    images_per_class: Sequence[int | None],
    class_names: Sequence[str] | None = None,
) -> None:
    """Raises `UsageError`, which names the class, if the rarest has fewer images.

    Args:
      labels: [N] int.
      images_per_class: that are to be drawn; None = all.
      class_names: of the labels; None = their numbers.
    """
    present, sizes = np.unique(labels, return_counts=True)
    least, label = int(sizes.min()), present[sizes.argmin()]
    name = class_names[label] if class_names else str(label)
    for count in images_per_class:
        if count is not None and not 0 < count <= least:
            raise UsageError(
                f"images_per_class: {count}, but class {name!r} has {least}; allowed: 1 to "
                f"{least}, or all"
            )


def draw_subset(labels: np.ndarray, images_per_class: int | None, seed: int) -> np.ndarray:
    """Indices of so many random images of each class, sorted.

    Those of fewer images are among those of more, and a class's do not depend on the other
    classes, so that a curve over numbers of images is of one growing set.

    Args:
      labels: [N] int.
      images_per_class: at most as many as the rarest class has; None = all there are.
      seed: of the draw.

    Returns:
      [images_per_class * classes] int.

    Raises:
      UsageError: a class has fewer images.
    """
    check_enough(labels, [images_per_class])
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # RandomState, not default_rng: numpy promises that its stream never changes.
        order = np.random.RandomState([seed, label]).permutation(members)
        chosen.append(order[:images_per_class])
    return np.sort(np.concatenate(chosen))


def fit_probe(
    values: np.ndarray,
    labels: np.ndarray,
    penalty_inverse: float | None = PENALTY_INVERSE,
) -> Any:
    """Fits a logistic regression to features that are standardised by these examples.

    The weights W [D, K] minimise C * (sum of the cross-entropies) + |W|^2 / 2, of two
    classes w [D], the difference of theirs; the biases are free.

    Args:
      values: [N, D] features.
      labels: [N] int, of two classes or more.
      penalty_inverse: C; None = that of `PENALTY_INVERSES` with the least cross-entropy in
        cross validation within these examples, which takes two of each class; of one
        image a class, `PENALTY_INVERSE`.

    Returns:
      scikit-learn's pipeline, with `predict`; its last step is the LogisticRegression.

    Raises:
      UsageError: a single class, or C that is not greater than 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        raise UsageError("labels: a probe tells classes apart, and there is only one")
    if penalty_inverse is not None and not penalty_inverse > 0:
        raise UsageError(f"penalty_inverse: {penalty_inverse} is not greater than 0")
    values = np.asarray(values, np.float64)
    probe = make_pipeline(
        StandardScaler(),
        LogisticRegression(
            C=penalty_inverse or PENALTY_INVERSE, max_iter=_MAX_ITERATIONS, tol=1e-6
        ),
    )
    folds = min(_MAX_FOLDS, int(np.unique(labels, return_counts=True)[1].min()))
    if penalty_inverse is None and folds > 1:
        search = GridSearchCV(
            probe,
            {"logisticregression__C": PENALTY_INVERSES},
            scoring="neg_log_loss",
            cv=StratifiedKFold(folds, shuffle=True, random_state=0),
        )
        return search.fit(values, labels).best_estimator_
    return probe.fit(values, labels)


def learning_curve(
    train: Features,
    test: Features,
    images_per_class: Sequence[int | None],
    seeds: Sequence[int] = (0, 1, 2),
    penalty_inverse: float | None = PENALTY_INVERSE,
) -> list[dict[str, Any]]:
    """Accuracies of probes on more and more images of each class.

    Args:
      train: features to fit to.
      test: features to test on.
      images_per_class: of the probes; None = all, of which there is one draw alone.
      seeds: of the draws, see `draw_subset`.
      penalty_inverse: see `fit_probe`.

    Returns:
      A record for each number and seed: "images_per_class", "seed", "num_train" (examples),
      "penalty_inverse" (C), "top1" (percent of the test examples).

    Raises:
      UsageError: a class has fewer images, and is named before anything is fitted; or the
        classes of `test` are others.
    """
    if train.class_names != test.class_names:
        raise UsageError(
            f"test: its classes are {test.class_names}, and those of train are "
            f"{train.class_names}"
        )
    check_enough(train.labels, images_per_class, train.class_names)
    rows = []
    for count in images_per_class:
        for seed in seeds[:1] if count is None else seeds:
            subset = draw_subset(train.labels, count, seed)
            values, labels = train.values[subset], train.labels[subset]
            probe = fit_probe(values, labels, penalty_inverse)
            right = probe.predict(np.asarray(test.values, np.float64)) == test.labels
            rows.append(
                {
                    "images_per_class": count,
                    "seed": seed,
                    "num_train": len(subset),
                    "penalty_inverse": probe[-1].C,
                    "top1": 100 * float(right.mean()),
                }
            )
    return rows
