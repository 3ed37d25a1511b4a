"""What a compiled step sends between devices: one gradient, the statistics, no more."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from resjax import optim, parallel, steps
from resjax.models.blocks import basic
from resjax.models.norm import BatchNorm
from resjax.models.resnet import ResNet, create_model

DEVICES, PER_DEVICE = 8, 4
SUMS = 4  # scalars: the loss, two counts of right answers, the number of examples
WIDTH = 8
TINY_PARAMS = 27 * WIDTH + 2 * WIDTH + (WIDTH + 1) * 10  # convolution, norm, classifier
TINY_STATS = 2 * WIDTH  # mean and variance
TINY_STEP = 4 * (TINY_PARAMS + TINY_STATS + SUMS)

# An instruction of the compiled text is `%name = TYPE op(%operand, ...), ...`. An
# asynchronous pair counts at its `-done`: the type of its `-start` repeats the operands.
COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%?\S+ = ([^%\"]+?) "
    r"(?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-done)?\(",
    re.MULTILINE,
)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "f16": 2, "bf16": 2, "pred": 1}


def collective_bytes(text):
    """Bytes of the results of all operations between devices."""
    arrays = [a for types in COLLECTIVE.findall(text) for a in ARRAY.findall(types)]
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in arrays
    )


def tiny_model(group=PER_DEVICE):
    norm = partial(BatchNorm, virtual_batch_size=group, axis_name=parallel.AXIS)
    return ResNet((), basic, WIDTH, downsample=False, num_classes=10, norm=norm)


def compiled_step(model, runner="pmap", size=6, microbatch=0):
    """The text of the train step, compiled for all devices; nothing is computed."""
    tx = optim.sgd(lambda step: jnp.float32(0.1), 0.9, True, 1e-4)
    step = steps.make_train_step(
        model,
        tx,
        lambda batch: batch["image"].astype(jnp.float32),
        DEVICES * PER_DEVICE,
        microbatch=microbatch,
    )
    images = jnp.zeros((PER_DEVICE, size, size, 3))
    local = model.clone(norm=BatchNorm)  # shapes know no devices
    state = jax.eval_shape(
        lambda key: steps.create_state(local.init(key, images), tx), jax.random.key(0)
    )
    shapes = {"image": (size, size, 3), "label": (), "position": ()}
    dtypes = {"image": jnp.uint8, "label": jnp.int32, "position": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct((DEVICES, PER_DEVICE, *shape), dtypes[name])
        for name, shape in shapes.items()
    }
    run_step = parallel.run_on_devices(step, runner, donate_state=True)
    return run_step.lower(state, batch).compile().as_text()


@pytest.mark.parametrize("runner", parallel.RUNNERS)
def test_a_step_sends_one_gradient_the_statistics_and_the_sums(runner):
    sent = collective_bytes(compiled_step(tiny_model(), runner))
    assert sent == pytest.approx(TINY_STEP, rel=0.02)


@pytest.mark.slow
@pytest.mark.long
def test_a_step_of_resnet50_sends_one_gradient_and_the_statistics():
    norm = partial(BatchNorm, virtual_batch_size=PER_DEVICE, axis_name=parallel.AXIS)
    sent = collective_bytes(compiled_step(create_model("resnet50", norm=norm), size=32))
    # Of torchvision's resnet50: parameters, and buffers without num_batches_tracked.
    assert sent == pytest.approx(4 * (25_557_032 + 53_120), rel=0.02)


@pytest.mark.parametrize("joined", [2, DEVICES])
def test_norms_that_join_devices_send_their_moments_besides(joined):
    sent = collective_bytes(compiled_step(tiny_model(joined * PER_DEVICE)))
    # Forward, each device gets the moments of its group's; backward, the slope of its own.
    moments = 4 * TINY_STATS * (joined + 1)
    assert sent == pytest.approx(TINY_STEP + moments, rel=0.02)


def test_accumulation_sends_once_after_the_loop():
    text = compiled_step(tiny_model(1), microbatch=1)
    assert " while(" in text
    after_loop = collective_bytes(text[text.index("\nENTRY ") :])
    assert after_loop == collective_bytes(text)  # nothing in the body
    assert after_loop == pytest.approx(TINY_STEP, rel=0.02)


def test_the_reader_counts_results_and_asynchronous_pairs_once():
    text = """
  %a = (f32[2,3]{1,0}, /*index=1*/bf16[5]{0}) all-reduce(%x, %y), channel_id=1
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%z), dimensions={0}
  %d = f32[32]{0:T(8)} all-gather-done(%s), metadata={op_name="all-gather(f32[9])"}
  %f = f32[7]{0} fusion(%d), calls=%c, metadata={op_name="psum/all-reduce(f32[9])"}
  ROOT %p = s32[] collective-permute(%k), source_target_pairs={{0,1}}
"""
    assert collective_bytes(text) == (2 * 3 * 4 + 5 * 2) + 32 * 4 + 4
