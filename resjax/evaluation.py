"""Predictions of a split, and the numbers that follow from them; numpy alone.

Knows no model, no devices and no data set: what is evaluated are log-probabilities.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from resjax.config import RunError

_ROWS = 4096  # examples that are looked at at once


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was said of each example of a split, once.

    Attributes:
      log_probs: [N, K] float32.
      labels: [N] int.
      indices: [N] int, the places in the split, increasing; a damaged example is missing.
    """

    log_probs: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @property
    def num_classes(self) -> int:
        """K."""
        return self.log_probs.shape[1]


def collect(
    outputs: Iterable[Mapping[str, Any]], expected: Sequence[int] | np.ndarray
) -> Predictions:
    """Puts the outputs of batches in the order of the split.

    Args:
      outputs: of `steps.make_predict_step`, any batches; rows whose index is negative are
        padding, those whose mask is False and index is not are damaged examples.
      expected: the places in the split of the examples that are evaluated.

    Raises:
      RunError: an example is there twice, or not at all, or not one of those expected.
    """
    expected = np.sort(np.asarray(expected))
    places = np.full(int(expected.max(initial=-1)) + 1, -1)
    places[expected] = np.arange(len(expected))
    counts = np.zeros(len(expected), int)
    kept = np.zeros(len(expected), bool)
    labels = np.zeros(len(expected), np.int32)
    log_probs = np.zeros((len(expected), 0), np.float32)
    for output in outputs:
        index, mask = np.asarray(output["index"]), np.asarray(output["mask"])
        real = index >= 0
        unknown = [i for i in index[real] if i >= len(places) or places[i] < 0]
        if unknown:
            raise RunError(f"evaluation: example {unknown[0]} was not to be evaluated")
        rows = places[index[real]]
        np.add.at(counts, rows, 1)
        if not log_probs.shape[1]:
            shape = len(expected), output["log_probs"].shape[1]
            log_probs = np.zeros(shape, np.float32)
        log_probs[rows] = output["log_probs"][real]
        labels[rows], kept[rows] = output["label"][real], mask[real]
    wrong = np.flatnonzero(counts != 1)
    if wrong.size:
        example, times = expected[wrong[0]], counts[wrong[0]]
        raise RunError(
            f"evaluation: example {example} was evaluated {times} times, not once"
        )
    return _select(Predictions(log_probs, labels, expected), kept)


def _select(predictions: Predictions, kept: np.ndarray) -> Predictions:
    """Those for which `kept` [N] is True."""
    if kept.all():
        return predictions
    arrays = (predictions.log_probs, predictions.labels, predictions.indices)
    return Predictions(*(array[kept] for array in arrays))


def average(each: Iterable[Predictions]) -> Predictions:
    """The predictions whose softmax is the mean of those given, at least one.

    In the logarithm, so that no loss becomes infinite because a probability underflows.
    Examples that are missing in one of them are left out.
    """
    total, count = None, 0
    for one in each:
        count += 1
        if total is None:
            total = one
            continue
        both = np.intersect1d(total.indices, one.indices, assume_unique=True)
        total = _select(total, np.isin(total.indices, both))
        one = _select(one, np.isin(one.indices, both))
        sums = np.logaddexp(total.log_probs, one.log_probs)
        total = dataclasses.replace(total, log_probs=sums)
    if total is None:
        raise ValueError("average: no predictions")
    if count == 1:
        return total
    mean = total.log_probs - np.float32(np.log(count))
    return dataclasses.replace(total, log_probs=mean)


def _in_parts(predictions: Predictions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities and labels of some examples after others, to bound the memory."""
    for first in range(0, len(predictions.labels), _ROWS):
        part = slice(first, first + _ROWS)
        yield predictions.log_probs[part], predictions.labels[part]


def losses(predictions: Predictions) -> np.ndarray:
    """-log of the probability of each label, [N] float32, in nats."""
    rows = np.arange(len(predictions.labels))
    return -predictions.log_probs[rows, predictions.labels]


def best_classes(predictions: Predictions) -> np.ndarray:
    """The class that is most probable, [N] int; the first of equals.

    It is -1 for an example whose log-probabilities are not all finite.
    """
    best = predictions.log_probs.argmax(axis=1)
    finite = [np.isfinite(part).all(axis=1) for part, _ in _in_parts(predictions)]
    return np.where(np.concatenate(finite), best, -1)


def confidences(predictions: Predictions) -> np.ndarray:
    """The probability of the most probable class, [N] float32."""
    return np.exp(predictions.log_probs.max(axis=1))


def ranks(predictions: Predictions) -> np.ndarray:
    """How many classes are thought more probable than the label, [N] int.

    Of equals the lower class comes first, as in `metrics.classification_sums`. It is beyond
    all ranks for an example whose log-probabilities are not all finite.
    """
    found = []
    for log_probs, labels in _in_parts(predictions):
        own = log_probs[np.arange(len(labels)), labels][:, None]
        before = np.arange(log_probs.shape[1]) < labels[:, None]
        ahead = (log_probs > own) | ((log_probs == own) & before)
        finite = np.isfinite(log_probs).all(axis=1)
        found.append(np.where(finite, ahead.sum(axis=1), np.iinfo(np.int64).max))
    return np.concatenate(found)


def summarize(predictions: Predictions) -> dict[str, float]:
    """The numbers of a split.

    Returns:
      {"top1", "top5" (percent), "loss" (nats), "num_examples", "ece" (percent)}, where the
      last is `calibration_error`.
    """
    rank = ranks(predictions)
    correct = rank < 1
    return {
        "top1": 100 * float(correct.mean()),
        "top5": 100 * float((rank < 5).mean()),
        "loss": float(losses(predictions).mean(dtype=np.float64)),
        "num_examples": len(rank),
        "ece": 100 * calibration_error(confidences(predictions), correct),
    }


def per_class(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many examples each class has, and how many of them are predicted.

    Args:
      labels: [N] int.
      predicted: [N] int; what is negative is no class.
      num_classes: K.

    Returns:
      Two arrays [K] int.
    """
    examples = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[labels == predicted], minlength=num_classes)
    return examples, correct


def confusion_matrix(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> np.ndarray:
    """How many examples of each class (a row) are predicted as each (a column).

    Args:
      labels: [N] int.
      predicted: [N] int; those that are negative are left out.
      num_classes: K.

    Returns:
      [K, K] int.
    """
    known = predicted >= 0
    pairs = labels[known].astype(np.int64) * num_classes + predicted[known]
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def calibration_bins(
    confidences: np.ndarray, correct: np.ndarray, num_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence and accuracy of the examples in bins of equal width.

    Args:
      confidences: probability of the predicted class, [N] from 0 to 1.
      correct: whether it is the label, [N] bool.
      num_bins: M; the m-th holds confidences above (m - 1) / M up to m / M.

    Returns:
      The number of examples, their accuracy and their mean confidence, each [M]; an empty
      bin has zeros.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2, equations 1 and 2.
    """
    edges = np.arange(1, num_bins) / num_bins
    bins = np.digitize(confidences, edges, right=True)
    counts = np.bincount(bins, minlength=num_bins)
    sums = (np.bincount(bins, x, num_bins) for x in (correct, confidences))
    accuracy, confidence = (total / np.maximum(counts, 1) for total in sums)
    return counts, accuracy, confidence


def calibration_error(
    confidences: np.ndarray, correct: np.ndarray, num_bins: int = 15
) -> float:
    """The expected calibration error: the mean over examples of their bin's gap, 0 to 1.

    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3.
    """
    counts, accuracy, confidence = calibration_bins(confidences, correct, num_bins)
    return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())


def worst_mistakes(predictions: Predictions, count: int) -> np.ndarray:
    """The rows of at most so many wrong predictions, those of the highest loss first."""
    loss = np.nan_to_num(losses(predictions), nan=np.inf, posinf=np.inf)
    wrong = np.flatnonzero(best_classes(predictions) != predictions.labels)
    return wrong[np.argsort(-loss[wrong], kind="stable")[:count]]
