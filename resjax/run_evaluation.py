"""Evaluates checkpoints as the papers do: crops, scales, ensembles. What eval.py calls."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from flax import linen as nn

from resjax import (
    build,
    build_data,
    checkpoint,
    evaluation,
    hooks,
    hosts,
    loop,
    parallel,
    records,
    runs,
)
from resjax import config as configs
from resjax.build_prediction import Prediction, Protocol, build_prediction, check_protocol
from resjax.config import Config, UsageError
from resjax.evaluation import Predictions
from resjax.models import fold

_LONG_NAME = 150  # characters of a file's name, of which systems allow 255


def evaluate(
    workdir: str | epath.Path | Sequence[str | epath.Path],
    step: int | str | None = None,
    split: str = "test",
    batch_size: int | None = None,
    data_dir: str | None = None,
    fold_batch_norm: bool = False,
    *,
    crops: int = 1,
    scales: Sequence[int] = (),
    ema: bool = False,
    precise_bn: int = 0,
    details: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a whole split, each example once; or several together.

    The softmax of several views of an image is averaged, and so is that of several runs.

    Args:
      workdir: of the run; of several for an ensemble, on one data set.
      step: of the checkpoint; None = the latest; "best" = that which evaluated best.
      split: "train" or "test".
      batch_size: images of the size of the training at a time, of larger ones fewer; None =
        see `build.eval_batch_size`.
      data_dir: where the data is; None = as in the training (of the first run).
      fold_batch_norm: evaluate the net of `resjax.fold_batch_norm`, the same to rounding.
      crops: 1 = the crop in the middle; 10 = corners, middle and their mirror images.
      scales: for dense evaluation, see `models.dense.dense_logits`: shorter sides in
        pixels of the whole image.
      ema: the averages of `config.ema_decay` in place of the weights.
      precise_bn: evaluate with statistics taken anew over so many training examples, see
        `with_precise_bn`, after an evaluation with those of the checkpoint; 0 = with those.
      details: also write classes.csv, confusion.png, calibration.png and mistakes.png into
        a folder beside the JSON file.

    Returns:
      {"top1", "top5" (percent), "loss" (nats), "num_examples", "step", "split", "model",
      "data", "ece" (`evaluation.calibration_error`, percent), "images_per_second"}, and
      what is not plain: "crops", "scales", "ema", "precise_bn" and "before" (top1, top5 and
      loss with the statistics of the checkpoint), "fold_batch_norm", "members" (of an
      ensemble, each with its own top1). The speed is of images of the split, with all that
      is done to them and without the time of compiling. Also written to
      `eval_<split>_<step>.json` of the first workdir, if that can be written; the name says
      what is not plain.

    Raises:
      UsageError: no such checkpoint, split or data; no batch norm to fold; views that the
        data or the model does not allow; runs that do not go together.

    Source: Krizhevsky et al. 2012, section 4.1 (crops); Simonyan & Zisserman 2014
      (arXiv:1409.1556), section 3.2 (scales); He et al. 2015, section 3.4 (both).
    """
    is_one = isinstance(workdir, str) or not isinstance(workdir, Sequence)
    protocol = Protocol(crops, tuple(scales))
    check_protocol(protocol)
    if precise_bn < 0 or precise_bn == 1:
        raise UsageError(f"--precise_bn: {precise_bn} is not 0, or 2 or more")
    members = _open_members([workdir] if is_one else workdir, step, data_dir, ema)
    first = members[0]
    predictions = _build(members, split, batch_size, protocol)
    before: dict[str, Any] = {}
    if precise_bn:
        members, before = _recompute(members, predictions, precise_bn)
    if fold_batch_norm:
        members = [_fold(member) for member in members]
        sizes = predictions[0].sizes
        predictions = _build(members, split, batch_size, protocol, sizes)
    mean, own, seconds = _predict(members, predictions)
    numbers = evaluation.summarize(mean)
    if precise_bn:
        _say(f"precise ones: loss {numbers['loss']:.4f} top-1 {numbers['top1']:.2f} %")
    result = {
        **_chosen(numbers, "top1", "top5", "loss", "num_examples"),
        "step": first.step,
        "split": split,
        "model": " + ".join(dict.fromkeys(member.config.model for member in members)),
        "data": first.config.data.name,
        **({"data_dir": str(data_dir)} if data_dir else {}),
        "ece": numbers["ece"],
        "images_per_second": round(numbers["num_examples"] / seconds, 1),
        **protocol.described,
        **({"ema": True} if ema else {}),
        **({"precise_bn": precise_bn, "before": before} if precise_bn else {}),
        **({"fold_batch_norm": True} if fold_batch_norm else {}),
        **({"members": own} if len(members) > 1 else {}),
    }
    suffix = _suffix(result, members[1:])
    stem = f"eval_{split}_{first.step}{suffix}"
    with contextlib.suppress(OSError):  # a run may be kept where nobody can write
        records.write_json(first.workdir / f"{stem}.json", result)
    if details and hosts.is_main():
        what = f"{result['model']} on {result['data']}, {split}, step {first.step}"
        title = f"{what}{suffix.replace('_', ', ')}: top-1 {result['top1']:.2f} %"
        _write_details(first, stem, mean, predictions[0], title)
    return result


def _chosen(numbers: dict[str, float], *names: str) -> dict[str, float]:
    return {name: numbers[name] for name in names}


def _say(text: str) -> None:
    """A line on standard error: the output is the JSON line."""
    if hosts.is_main():
        print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class _Member:
    """A checkpoint that is evaluated, alone or with others.

    Attributes:
      path: as it was given.
      workdir: of the run.
      step: of the checkpoint.
      config: of the run.
      class_names: that it was trained on.
      model: that is evaluated.
      variables: of it.
    """

    path: epath.Path
    workdir: epath.Path
    step: int
    config: Config
    class_names: list[str]
    model: Any
    variables: dict[str, Any]


def _open_members(
    paths: Sequence[str | epath.Path],
    step: int | str | None,
    data_dir: str | None,
    ema: bool,
) -> list[_Member]:
    """The checkpoints, at least one, checked to be of one data set, which is read once."""
    if not paths:
        raise UsageError("--workdir: none is given")
    members: list[_Member] = []
    for path in paths:
        member = _open_member(checkpoint.to_path(path), step, ema)
        if members:
            _check_together(members, member)
            data_dir = data_dir or members[0].config.data.dir
        data = member.config.data
        data = dataclasses.replace(data, dir=data_dir or data.dir)
        config = dataclasses.replace(member.config, data=data)
        members.append(dataclasses.replace(member, config=config))
    return members


def _open_member(path: epath.Path, step: int | str | None, ema: bool) -> _Member:
    """A checkpoint with the model of its run."""
    found = runs.read_checkpoint(path, step, ema)
    try:
        config = configs.from_dict(found.record["config"])
    except UsageError as error:
        raise UsageError(f"{path} is no run of this version: {error}") from error
    stored, own = found.record.get("preprocess"), build_data.describe_preprocess(config)
    if stored and stored != own:
        raise UsageError(
            f"{path} was trained and evaluated with {stored}, and this version has "
            f"{own} for {config.data.name}; `resjax.restore` predicts with the former"
        )
    model = build.build_model(config)
    return _Member(
        path=path,
        workdir=path.parent.parent if checkpoint.is_checkpoint(path) else path,
        step=found.step,
        config=config,
        class_names=found.record["class_names"],
        model=model,
        variables=runs.find_variables(found, model),
    )


def _fold(member: _Member) -> _Member:
    model, variables = fold.fold_batch_norm(member.model, member.variables)
    return dataclasses.replace(member, model=model, variables=variables)


def _check_together(members: Sequence[_Member], other: _Member) -> None:
    """Raises `UsageError` if a run cannot be averaged with those before."""
    first = members[0]
    if any((other.workdir, other.step) == (m.workdir, m.step) for m in members):
        raise UsageError(f"--workdir: {other.path} is there twice")
    names = first.config.data.name, other.config.data.name
    if names[0] != names[1]:
        raise UsageError(
            f"--workdir: {other.path} is of {names[1]}, and {first.path} of {names[0]}; "
            "an ensemble needs one data set"
        )
    ours, theirs = first.class_names, other.class_names
    if len(ours) != len(theirs):
        raise UsageError(
            f"--workdir: {other.path} has {len(theirs)} classes, and {first.path} "
            f"{len(ours)}; an ensemble needs the same"
        )
    different = build.other_class(theirs, ours)
    if different and build.other_class(ours, theirs):  # the names of both are known
        index, name, before = different
        raise UsageError(
            f"--workdir: class {index} of {other.path} is {name!r}, and of {first.path} "
            f"{before!r}; an ensemble needs the same"
        )


def _build(
    members: Sequence[_Member],
    split: str,
    batch_size: int | None,
    protocol: Protocol,
    sizes: Sequence[tuple[int, int] | None] | None = None,
) -> list[Prediction]:
    """What predicts the split, of each; the sizes of its images are read once."""
    built: list[Prediction] = []
    for member in members:
        prediction = build_prediction(
            member.config,
            split,
            batch_size or build.eval_batch_size(member.config, jax.device_count()),
            member.model,
            protocol,
            member.class_names,
            sizes,
        )
        sizes = prediction.sizes
        built.append(prediction)
    return built


def _predict(
    members: Sequence[_Member], predictions: Sequence[Prediction]
) -> tuple[Predictions, list[dict[str, Any]], float]:
    """What all say together, what each is worth alone, and the seconds that it took."""
    own: list[dict[str, Any]] = []
    waits = loop.Waits()
    total = sum(p.num_examples * len(p.passes) for p in predictions)

    def of_member(member: _Member, prediction: Prediction) -> Predictions:
        variables = parallel.replicate(member.variables)

        def of_pass(start: Callable[[], Iterable[Any]]) -> Iterator[dict[str, Any]]:
            for output in loop.predict(prediction.step, variables, start(), waits):
                bar.update(int((output["index"] >= 0).sum()))
                yield output

        mean = evaluation.average(
            evaluation.collect(of_pass(start), expected)
            for expected, start in prediction.passes
        )
        place = {"workdir": str(member.path), "step": member.step}
        top1 = evaluation.summarize(mean)["top1"]
        own.append({**place, "model": member.config.model, "top1": top1})
        return mean

    began = time.perf_counter()
    with hooks.progress_bar(total, 0, "evaluating") as bar:
        mean = evaluation.average(map(of_member, members, predictions))
    return mean, own, time.perf_counter() - began - waits.compiling


def _suffix(result: dict[str, Any], others: Sequence[_Member]) -> str:
    """What the name of a file says of an evaluation that is not the plain one."""
    names = "_".join(f"{member.workdir.name}-{member.step}" for member in others)
    if len(names) > _LONG_NAME:
        names = f"{len(others)}_others"
    scales = "-".join(map(str, result.get("scales", ())))
    parts = [
        f"_crops{result['crops']}" if "crops" in result else "",
        f"_scales{scales}" if scales else "",
        "_ema" if "ema" in result else "",
        f"_precise{result['precise_bn']}" if "precise_bn" in result else "",
        "_folded" if "fold_batch_norm" in result else "",
        f"_with_{names}" if others else "",
    ]
    return "".join(parts)


def _recompute(
    members: Sequence[_Member], predictions: Sequence[Prediction], num_examples: int
) -> tuple[list[_Member], dict[str, float]]:
    """The members with precise statistics, and what all said together before."""
    # First what may be refused, then what takes long.
    recompute = [_build_precise_bn(m.config, m.model, num_examples) for m in members]
    mean, _, _ = _predict(members, predictions)
    before = _chosen(evaluation.summarize(mean), "top1", "top5", "loss")
    _say(
        f"running statistics: loss {before['loss']:.4f} top-1 {before['top1']:.2f} %; "
        f"recomputing them over {num_examples:,} training examples"
    )
    refined = [
        dataclasses.replace(m, variables=new(parallel.replicate(m.variables)))
        for m, new in zip(members, recompute, strict=True)
    ]
    return refined, before


def _write_details(
    member: _Member, stem: str, mean: Predictions, prediction: Prediction, title: str
) -> None:
    """Writes the folder of `--details`, or says that it cannot be written."""
    from resjax import evaluation_pictures

    folder = member.workdir / stem
    try:
        evaluation_pictures.write_details(
            folder, mean, member.class_names, prediction.read_image, title
        )
    except OSError as error:
        records.warn(f"--details: {folder} cannot be written: {error}")


def with_precise_bn(
    config: Config, model: nn.Module, variables: dict[str, Any], num_examples: int
) -> dict[str, Any]:
    """Variables whose statistics are taken anew over training examples.

    Args:
      config: of the run, whose training split and augmentation are used.
      model: of `build.build_model`, with batch norm.
      variables: {"params", "batch_stats"}; any weights of the model.
      num_examples: the first of the training stream; as many as the split has are each of
        them once, more go on into its next epoch.

    Returns:
      {"params", "batch_stats"}, replicated.

    Raises:
      UsageError: fewer than two examples, no data, frozen layers, or a model without
        batch norm.
    """
    recompute = _build_precise_bn(config, model, num_examples)
    return recompute(parallel.replicate(variables))


def _build_precise_bn(
    config: Config, model: nn.Module, num_examples: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`with_precise_bn` of variables."""
    reader = build_data.build_reader(config, build_data.build_source(config, "train"))
    return build.build_precise_bn(config, model, reader, num_examples)
