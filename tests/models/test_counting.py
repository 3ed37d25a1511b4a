"""Parameters and multiply-adds of every model against the papers and other libraries."""

import re
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from flax import linen as nn

import resjax

# (model, shortcut): parameters, multiply-adds at 224. Parameters are those of
# docs.pytorch.org/vision/stable/models.html and timm where they have the net; the papers'
# 3.8, 7.6 and 11.3 G are the strides in the 1x1 ("v1"). Where three decimals are known,
# the value is a string.
IMAGENET = {
    ("resnet18", None): (11_689_512, 1_814_073_344),
    ("resnet18", "A"): (11_515_688, 1_794_805_760),
    ("resnet18", "C"): (12_043_816, 1_878_298_624),
    ("resnet34", None): (21_797_672, 3_663_761_408),
    ("resnet34", "A"): (21_623_848, 3_644_493_824),
    ("resnet34", "C"): (22_716_840, 3_830_747_136),
    ("resnet50", None): (25_557_032, 4_089_184_256),
    ("resnet50", "C"): (40_128_552, 6_555_435_008),
    ("resnet50", "none"): (22_780_456, 3_729_522_688),
    ("resnet101", None): (44_549_160, 7_801_405_440),
    ("resnet101", "none"): (41_772_584, 7_441_743_872),
    ("resnet152", None): (60_192_808, 11_513_626_624),
    ("resnet200", None): (64_673_832, 15_007_481_856),
    ("resnet50_v1", None): (25_557_032, 3_857_973_248),
    ("resnet101_v1", None): (44_549_160, 7_570_194_432),
    ("resnet152_v1", None): (60_192_808, 11_282_415_616),
    ("plain18", None): (11_515_688, 1_794_805_760),
    ("plain34", None): (21_623_848, 3_644_493_824),
    ("preact_resnet18", None): (11_687_720, "1.814 G"),
    ("preact_resnet34", None): (21_795_880, "3.664 G"),
    ("preact_resnet50", None): (25_549_352, 4_089_184_256),
    ("preact_resnet101", None): (44_541_480, 7_801_405_440),
    ("preact_resnet152", None): (60_185_128, 11_513_626_624),
    ("preact_resnet200", None): (64_666_152, 15_007_481_856),
    ("resnext50_2x40d", None): (25_425_000, "4.125 G"),
    ("resnext50_4x24d", None): (25_292_968, "4.160 G"),
    ("resnext50_8x14d", None): (25_603_016, "4.267 G"),
    ("resnext50_32x4d", None): (25_028_904, 4_230_479_872),
    ("resnext101_32x4d", None): (44_177_704, 7_969_996_800),
    ("resnext101_32x8d", None): (88_791_336, 16_414_015_488),
    ("resnext101_64x4d", None): (83_455_272, 15_460_270_080),
    ("wide_resnet50_2", None): (68_883_240, "11.398 G"),
}


def cifar_net(blocks, convs, shortcut="A", preact=False, width=16):
    """(parameters, parameters of norms, multiply-adds) of three stages, layer by layer.

    `convs` lists the (kernel size, groups, outputs) of a block from the stage's width.
    """
    kernels, norms, macs, channels = 27 * width, 2 * width, 27 * width * 32**2, width
    if preact:
        norms = 0
    for stage, side in enumerate((32, 16, 8)):
        for block in range(blocks):
            x, now = channels, 2 * side if stage and block == 0 else side
            resized = now != side
            for size, groups, out in convs(width * 2**stage):
                now = side if size == 3 else now
                weights = size * size * x * out // groups
                kernels, macs = kernels + weights, macs + weights * now**2
                norms += 2 * (x if preact else out)
                x = out
            changed = resized or x != channels
            if shortcut == "C" or (shortcut == "B" and changed):
                kernels, macs = kernels + channels * x, macs + channels * x * side**2
                norms += 0 if preact else 2 * x
            channels = x
    norms += 2 * channels if preact else 0
    head = 10 * channels
    return kernels + norms + head + 10, norms, macs + head


def pair(w):
    return [(3, 1, w), (3, 1, w)]


def triple(w):
    return [(1, 1, w), (3, 1, w), (1, 1, 4 * w)]


def resnext(groups, width=64):
    def convs(w):
        inner = groups * width * w // 64
        return [(1, 1, inner), (3, groups, inner), (1, 1, 4 * w)]

    return convs


# He et al. 2016 (arXiv:1603.05027), table 4; Xie et al. 2016 (arXiv:1611.05431), table 7.
BY_LAYER = {
    ("cifar_resnet56", "B"): cifar_net(9, pair, "B"),
    ("cifar_resnet110", "B"): cifar_net(18, pair, "B"),
    ("cifar_resnet110", "C"): cifar_net(18, pair, "C"),
    ("cifar_preact_resnet110", None): cifar_net(18, pair, preact=True),
    ("cifar_preact_resnet164", None): cifar_net(18, triple, "B", preact=True),
    ("cifar_preact_resnet1001", None): cifar_net(111, triple, "B", preact=True),
    **{
        (f"cifar_resnext29_{groups}x{width}d", None): cifar_net(
            3, resnext(groups, width), "B", width=64
        )
        for groups, width in ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4))
    },
    ("cifar_resnext29_8x64d", None): cifar_net(3, resnext(8), "B", width=64),
    ("cifar_resnext29_16x64d", None): cifar_net(3, resnext(16), "B", width=64),
}
# He et al. 2015 (arXiv:1512.03385), table 6: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 M.
CIFAR = {
    ("cifar_resnet20", None): (269_722, 40_551_040),
    ("cifar_resnet32", None): (464_154, 68_862_592),
    ("cifar_resnet44", None): (658_586, 97_174_144),
    ("cifar_resnet56", None): (853_018, 125_485_696),
    ("cifar_resnet110", None): (1_727_962, 252_887_680),
    ("cifar_resnet1202", None): (19_421_274, 2_829_238_912),
}
CIFAR |= {  # a plain net is the one of option A less its shortcuts
    (name.replace("resnet", "plain"), None): counts
    for (name, _), counts in CIFAR.items()
    if name != "cifar_resnet1202"
} | {key: (params, macs) for key, (params, _, macs) in BY_LAYER.items()}
COUNTS = IMAGENET | CIFAR


def test_every_model_has_an_expected_count():
    assert sorted(name for name, option in COUNTS if not option) == resjax.list_models()


DEEP = re.compile(r".*(152|164|200|1001|1202)(_v1)?")  # up to ten seconds each
ROWS = [
    pytest.param(*key, marks=[pytest.mark.slow] if DEEP.fullmatch(key[0]) else [])
    for key in COUNTS
]


@pytest.mark.parametrize("name, shortcut", ROWS)
def test_counts_are_the_published_ones_and_take_less_than_20_seconds(name, shortcut):
    model = resjax.create_model(name, **({"shortcut": shortcut} if shortcut else {}))
    params, macs = COUNTS[name, shortcut]
    size = 32 if name.startswith("cifar") else 224
    start = time.process_time()
    assert resjax.count_params(model) == params
    middle = time.process_time()
    counted = resjax.count_macs(model, size)
    assert max(middle - start, time.process_time() - middle) < 20  # seconds each
    assert (f"{counted / 1e9:.3f} G" if isinstance(macs, str) else counted) == macs


def test_the_layers_of_the_papers_add_up_to_what_the_papers_print():
    assert cifar_net(18, pair)[::2] == (1_727_962, 252_887_680)
    assert cifar_net(200, pair)[::2] == (19_421_274, 2_829_238_912)
    assert BY_LAYER["cifar_resnet56", "B"][0] == 855_770  # pycls
    assert BY_LAYER["cifar_resnet110", "B"][0] == 1_730_714  # pycls
    assert BY_LAYER["cifar_resnet110", "C"][0] == 1_826_202
    assert BY_LAYER["cifar_preact_resnet164", None][0] == 1_703_258
    assert BY_LAYER["cifar_preact_resnet1001", None][0] == 10_327_706
    printed = {"preact_resnet164": 1.7, "preact_resnet1001": 10.2}
    printed |= {"resnext29_8x64d": 34.4, "resnext29_16x64d": 68.1}
    for name, millions in printed.items():
        params, norms, _ = BY_LAYER[f"cifar_{name}", None]
        assert round((params - norms) / 1e6, 1) == millions, name  # without the norms


@pytest.mark.parametrize("remat", ["blocks", "convs"])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet50", "resnext50_32x4d"])
def test_rematerialisation_changes_no_count(name, remat):
    model = resjax.create_model(name, remat=remat)
    params, macs = COUNTS[name, None]
    assert (resjax.count_params(model), resjax.count_macs(model, 224)) == (params, macs)


@pytest.mark.parametrize("size", [32, 45])
def test_parameters_do_not_depend_on_the_image_size(size):
    assert resjax.count_params(resjax.create_model("resnet18"), size) == 11_689_512


@pytest.mark.parametrize("side, half", [(32, 16), (33, 17)])
def test_macs_follow_the_image_size(side, half):
    model = resjax.create_model("resnet18", num_classes=0).clone(stage_sizes=(1,))
    quarter = -(-half // 2)  # after the max-pool
    expected = 49 * 3 * 64 * half**2 + 2 * 9 * 64 * 64 * quarter**2
    assert resjax.count_macs(model, side) == expected


class PlainFlax(nn.Module):
    """A strided, a grouped and a dense layer, all with biases; two calls of one layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.Conv(12, (1, 3), feature_group_count=4)(x)
        twice = nn.Dense(12)
        return nn.Dense(5)(twice(twice(x)).mean(axis=(1, 2)))


def test_layers_of_flax_are_counted_too():
    conv, grouped, dense, head = 9 * 3 * 8, 3 * 2 * 12, 12 * 12, 12 * 5
    biases = 8 + 12 + 12 + 5
    assert resjax.count_params(PlainFlax()) == conv + grouped + dense + head + biases
    macs = (conv + grouped + 2 * dense) * 8 * 8 + head
    assert resjax.count_macs(PlainFlax(), 16) == macs


def test_counting_computes_nothing():
    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(1 << 20)(x.mean(axis=(1, 2)))
            return nn.Dense(1 << 20)(x)  # four terabytes

    assert resjax.count_macs(Huge(), 8) == 3 * 2**20 + 2**40
    assert resjax.count_params(Huge(), 8) == 3 * 2**20 + 2**40 + 2**21


def test_a_count_leaves_the_model_as_it_was():
    model = resjax.create_model("cifar_resnet20")
    resjax.count_macs(model, 32)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    logits = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], images
    )
    assert logits.shape == (1, 10)


def test_the_page_of_models_has_these_counts():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", page)
    assert sorted(name for name, *_ in rows) == resjax.list_models()
    for name, *printed in rows:
        params, macs = (int(count.replace(",", "")) for count in printed)
        expected = COUNTS[name, None]
        macs = f"{macs / 1e9:.3f} G" if isinstance(expected[1], str) else macs
        assert (params, macs) == expected, name
