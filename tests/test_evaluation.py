"""Numbers of predictions against loops, scikit-learn, and the sums of the eval step."""

import math

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from resjax import evaluation, metrics
from resjax.config import RunError
from resjax.evaluation import Predictions

N, K = 300, 7


def made(seed=0, num_examples=N, num_classes=K, strength=2.0):
    """Log-probabilities that know something of random labels."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(num_classes, size=num_examples).astype(np.int32)
    logits = rng.randn(num_examples, num_classes)
    logits[np.arange(num_examples), labels] += strength
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Predictions(log_probs.astype(np.float32), labels, np.arange(num_examples))


def probabilities(predictions):
    return np.exp(np.float64(predictions.log_probs))


# --- putting batches together ---------------------------------------------------------


def outputs_of(predictions, sizes, order, damaged=()):
    """Batches of these sizes, padded by two, with the examples in that order."""
    order, start = np.asarray(order), 0
    for size in sizes:
        index = np.concatenate([order[start : start + size], [-1, -1]]).astype(np.int32)
        start += size
        yield {
            "index": index,
            "mask": (index >= 0) & ~np.isin(index, damaged),
            "label": predictions.labels[index],
            "log_probs": predictions.log_probs[index],
        }


def test_batches_in_any_order_make_the_split():
    given = made(num_examples=10)
    order = np.random.RandomState(0).permutation(10)
    found = evaluation.collect(outputs_of(given, (3, 1, 6), order), range(10))
    np.testing.assert_array_equal(found.log_probs, given.log_probs)
    np.testing.assert_array_equal(found.labels, given.labels)
    np.testing.assert_array_equal(found.indices, range(10))


def test_damaged_examples_and_those_not_planned_are_left_out():
    given = made(num_examples=10)
    outputs = outputs_of(given, (4, 4), [9, 8, 7, 6, 5, 4, 3, 1], damaged=[8, 1])
    found = evaluation.collect(outputs, [1, 3, 4, 5, 6, 7, 8, 9])
    kept = [3, 4, 5, 6, 7, 9]
    np.testing.assert_array_equal(found.indices, kept)
    np.testing.assert_array_equal(found.log_probs, given.log_probs[kept])
    np.testing.assert_array_equal(found.labels, given.labels[kept])


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 1, 2, 3, 2], "example 2 was evaluated 2 times"),
        ([0, 1, 3, 4], "example 2 was evaluated 0 times"),
        ([0, 1, 2, 3, 4, 5], "example 5 was not to be evaluated"),
    ],
)
def test_an_example_that_is_not_there_exactly_once_is_an_error(order, said):
    outputs = outputs_of(made(num_examples=10), [3, len(order) - 3], order)
    with pytest.raises(RunError, match=said):
        evaluation.collect(outputs, range(5))


# --- averaging --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_softmax_is_averaged(count):
    each = [made(seed) for seed in range(count)]
    mean = evaluation.average(iter(each))
    expected = np.mean([probabilities(one) for one in each], axis=0)
    np.testing.assert_allclose(probabilities(mean), expected, rtol=1e-5)
    assert mean.log_probs.dtype == np.float32


def test_no_loss_is_infinite_because_a_probability_underflows():
    log_probs = np.array([[0, -300], [0, -400]], np.float32)  # exp(-104) is 0 in float32
    each = [Predictions(row[None], np.array([1]), np.array([0])) for row in log_probs]
    loss = evaluation.summarize(evaluation.average(each))["loss"]
    assert loss == pytest.approx(300 + math.log(2), rel=1e-6)


def test_examples_that_one_of_them_lacks_are_left_out():
    one, other = made(0, 6), made(1, 6)
    parts = [
        Predictions(p.log_probs[rows], p.labels[rows], np.array(rows))
        for p, rows in ((one, [0, 1, 2, 4]), (other, [1, 2, 3, 4, 5]))
    ]
    mean = evaluation.average(parts)
    np.testing.assert_array_equal(mean.indices, [1, 2, 4])
    expected = (probabilities(one) + probabilities(other))[[1, 2, 4]] / 2
    np.testing.assert_allclose(probabilities(mean), expected, rtol=1e-5)


# --- numbers ----------------------------------------------------------------------------


def test_accuracy_and_loss_are_scikit_learns():
    given = made()
    found, scores, classes = evaluation.summarize(given), given.log_probs, range(K)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = sklearn_metrics.top_k_accuracy_score(
            given.labels, scores, k=k, labels=classes
        )
        assert found[name] == pytest.approx(100 * expected)
    exact = probabilities(given)
    exact = exact / exact.sum(axis=1, keepdims=True)  # scikit-learn wants float64's digits
    expected = sklearn_metrics.log_loss(given.labels, exact, labels=classes)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["num_examples"] == N


@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_numbers_are_those_of_the_eval_step_also_where_logits_are_equal(num_classes):
    rng = np.random.RandomState(0)
    logits = rng.randint(-2, 3, (200, num_classes)).astype(np.float32)  # many are equal
    labels = rng.randint(num_classes, size=200)
    given = Predictions(np.asarray(jax.nn.log_softmax(logits)), labels, np.arange(200))
    found = evaluation.summarize(given)
    expected = metrics.summarize([metrics.classification_sums(logits, labels)])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_an_example_without_finite_numbers_has_no_hits():
    log_probs = np.log([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]).astype(np.float32)
    log_probs[1] = np.nan
    log_probs[2, 1] = -np.inf
    given = Predictions(log_probs, np.array([0, 0, 0]), np.arange(3))
    found = evaluation.summarize(given)
    assert found["top1"] == found["top5"] == pytest.approx(100 / 3)
    assert np.isnan(found["loss"])
    assert evaluation.best_classes(given).tolist() == [0, -1, -1]
    assert evaluation.worst_mistakes(given, 5)[0] == 1


def test_more_examples_than_are_looked_at_at_once_are_all_counted(monkeypatch):
    given = made()
    whole = evaluation.summarize(given)
    monkeypatch.setattr(evaluation, "_ROWS", 7)
    assert evaluation.summarize(given) == whole


def test_confusions_are_scikit_learns():
    given = made()
    predicted = evaluation.best_classes(given)
    np.testing.assert_array_equal(predicted, probabilities(given).argmax(axis=1))
    found = evaluation.confusion_matrix(given.labels, predicted, K)
    expected = sklearn_metrics.confusion_matrix(given.labels, predicted)
    np.testing.assert_array_equal(found, expected)
    predicted = np.where(np.arange(N) < 10, -1, predicted)
    found = evaluation.confusion_matrix(given.labels, predicted, K)
    assert found.sum() == N - 10


def test_classes_add_up_to_the_total():
    given = made(num_classes=K)
    predicted = evaluation.best_classes(given)
    examples, correct = evaluation.per_class(given.labels, predicted, K + 1)
    for k in range(K + 1):
        assert examples[k] == sum(label == k for label in given.labels)
        pairs = zip(given.labels, predicted, strict=True)
        assert correct[k] == sum(label == guess == k for label, guess in pairs)
    assert examples.sum() == N
    assert 100 * correct.sum() / N == pytest.approx(evaluation.summarize(given)["top1"])


def written_out_error(confidences, correct, num_bins):
    """Guo et al. 2017, equation 3, a bin after the other."""
    total = 0.0
    for m in range(1, num_bins + 1):
        inside = [(m - 1) / num_bins < c <= m / num_bins for c in confidences]
        if any(inside):
            accuracy = np.mean([x for x, i in zip(correct, inside, strict=True) if i])
            mean = np.mean([c for c, i in zip(confidences, inside, strict=True) if i])
            total += sum(inside) / len(correct) * abs(accuracy - mean)
    return total


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_the_calibration_error_is_that_of_the_paper(num_bins):
    given = made(strength=1.0)
    confidences = probabilities(given).max(axis=1)
    correct = probabilities(given).argmax(axis=1) == given.labels
    expected = written_out_error(confidences, correct, num_bins)
    found = evaluation.calibration_error(confidences, correct, num_bins)
    assert found == pytest.approx(expected, rel=1e-6) and found > 0.01
    counts, accuracy, _ = evaluation.calibration_bins(confidences, correct, num_bins)
    assert counts.sum() == N and (counts * accuracy).sum() == pytest.approx(correct.sum())
    np.testing.assert_allclose(evaluation.confidences(given), confidences, rtol=1e-5)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    counts, _, _ = evaluation.calibration_bins(
        np.array([0.5, 0.500001, 1.0, 0.25, 1.0000001]), np.ones(5, bool), 4
    )
    assert counts.tolist() == [1, 1, 1, 2]


def test_the_summary_has_fifteen_bins_and_percent():
    given = made()
    correct = probabilities(given).argmax(axis=1) == given.labels
    expected = written_out_error(probabilities(given).max(axis=1), correct, 15)
    assert evaluation.summarize(given)["ece"] == pytest.approx(100 * expected, rel=1e-5)


def test_the_worst_mistakes_come_first():
    given = made()
    rows = evaluation.worst_mistakes(given, 20)
    wrong = probabilities(given).argmax(axis=1) != given.labels
    of_label = probabilities(given)[np.arange(N), given.labels]
    expected = sorted(np.flatnonzero(wrong), key=lambda row: of_label[row])[:20]
    assert rows.tolist() == expected and len(rows) == 20
    assert len(evaluation.worst_mistakes(given, N)) == wrong.sum()
