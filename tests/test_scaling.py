"""Predicted step times: the paper's figures, messages counted one by one, and limits."""

from dataclasses import replace
from functools import partial
from math import inf, log2
from types import SimpleNamespace

import pytest

from benchmarks import scaling
from benchmarks.scaling import Job, communication_ms, efficiency, exposed_ms
from resjax.config import UsageError
from resjax.models import resnet
from resjax.models.blocks import basic

JOB = Job()
PLAIN = Job(all_reduces=1, devices_per_host=1)  # one sum, one kind of link


def ring_messages(hosts):
    """Parts of the buffer that a host sends: its share on to the next, twice around."""
    return [1 / hosts] * (2 * (hosts - 1))


def halving_messages(hosts):
    """The half, the quarter, ..., and the same back."""
    down = [0.5 ** (i + 1) for i in range(int(log2(hosts)))]
    return down + down[::-1]


@pytest.mark.parametrize(
    "algorithm, messages", [("ring", ring_messages), ("halving_doubling", halving_messages)]
)
@pytest.mark.parametrize("hosts", [1, 2, 4, 32])
def test_a_sum_takes_the_time_of_its_messages(algorithm, messages, hosts):
    job = replace(PLAIN, algorithm=algorithm, params=10**6, link_gbit_s=8, latency_us=500)
    # 8 Gbit/s are 1 GB/s; the buffer is 4 MB.
    expected = sum(0.5 + 1e3 * 4e6 * part / 1e9 for part in messages(hosts))
    assert communication_ms(job, hosts) == pytest.approx(expected)


def test_binary_blocks_cost_two_messages_more():
    """Goyal et al. 2017, section 4.1: hosts that are no power of two."""
    job = replace(PLAIN, latency_us=1000, link_gbit_s=inf)
    assert communication_ms(job, 44) == communication_ms(job, 32) + 2


def test_devices_of_a_host_share_its_link():
    """Inside 8 devices 2 * 7/8 of the gradient, between 32 hosts 2 * 31/32 of it."""
    job = Job(params=10**6, host_gbit_s=64, link_gbit_s=8, latency_us=0)
    inside, between = 2 * 7 / 8 * 4 / 8, 2 * 31 / 32 * 4  # MB over GB/s
    assert communication_ms(job, 8) == pytest.approx(inside)
    assert communication_ms(job, 256) == pytest.approx(inside + between)


def test_the_papers_job_follows_from_its_other_numbers():
    hours = 90 * 1_281_167 / 256 * JOB.compute_ms / 3.6e6
    assert hours == pytest.approx(29, rel=0.01)
    assert JOB.backward_fraction * JOB.compute_ms == pytest.approx(120, rel=0.01)
    convolutions = norms = 1 + 3 * (3 + 4 + 6 + 3) + 4  # stem, blocks, shortcuts
    assert JOB.all_reduces == convolutions + 2 * norms + 2  # classifier
    # Section 4.1: 32 hosts sum 3 times faster by halving and doubling.
    ring, halving = (
        communication_ms(replace(JOB, algorithm=name, host_gbit_s=inf), 256)
        for name in ("ring", "halving_doubling")
    )
    assert ring / halving == pytest.approx(3, rel=0.02)


def test_256_gpus_reach_the_papers_efficiency():
    """Section 5.5: 90 % of what 8 do, and steps 12 % longer on 352."""
    assert efficiency(JOB, 256, base=8) == pytest.approx(0.9, abs=0.05)
    assert efficiency(JOB, 8, base=352) == pytest.approx(1.12, abs=0.05)
    # The overlap, which the paper does not give, decides: its ends lie on both sides.
    nothing, everything = (
        efficiency(replace(JOB, overlap=overlap), 256, base=8) for overlap in (0, 1)
    )
    assert nothing < 0.85 and everything > 0.95


def test_the_papers_peak_bandwidth():
    """Section 4.3: 200 MB in 0.125 s are 12.8 Gbit/s."""
    job = Job(params=25_000_000, compute_ms=250, backward_fraction=0.5)
    peaks = [ours for name, _, ours, _ in scaling.paper_figures(job) if "peak" in name]
    assert peaks == [pytest.approx(12.8)]


@pytest.mark.parametrize("overlap", [0, 0.5, 1])
@pytest.mark.parametrize("algorithm", scaling.MESSAGES)
def test_limits(algorithm, overlap):
    job = replace(JOB, algorithm=algorithm, overlap=overlap)
    assert efficiency(job, 1) == 1
    free = replace(job, link_gbit_s=inf, host_gbit_s=inf, latency_us=0)
    assert efficiency(free, 1000) == 1
    endless = replace(job, compute_ms=1e12)
    assert efficiency(endless, 1000) == pytest.approx(1)
    shares = [efficiency(job, k) for k in range(1, 400)]
    assert shares == sorted(shares, reverse=True)


def test_only_the_backward_pass_hides():
    slow = Job(overlap=1, link_gbit_s=0.1, compute_ms=100, backward_fraction=0.25)
    assert exposed_ms(slow, 256) == pytest.approx(communication_ms(slow, 256) - 25)
    half = replace(JOB, overlap=0.5)
    assert exposed_ms(half, 256) == pytest.approx(communication_ms(half, 256) / 2)


def test_the_table_and_the_picture(capsys, tmp_path):
    free = ["--link_gbit_s=inf", "--host_gbit_s=inf", "--latency_us=0"]
    flags = ["--compute_ms=100", "--images=64", "--workers", "5", *free]
    picture = tmp_path / "scaling.png"
    assert scaling.main([*flags, f"--plot={picture}"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    numbers = [float(word) for word in row.replace("%", "").split()]
    assert numbers == [5, 320, 100, 0, 0, 100, 100, 3200]
    assert head.startswith("   k images/step compute ms communication ms exposed ms")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_check_compares_with_the_paper(capsys, monkeypatch):
    assert scaling.main(["--check"]) == 0
    monkeypatch.setitem(scaling.MESSAGES, "halving_doubling", scaling.MESSAGES["ring"])
    assert scaling.main(["--check"]) == 1
    assert "12.8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--compute_ms", "0"),
        ("--latency_us", "-1"),
        ("--overlap", "1.5"),
        ("--link_gbit_s", "nan"),
        ("--workers", "0"),
    ],
)
def test_a_value_out_of_range_is_named(flag, value):
    with pytest.raises(UsageError, match=f"{flag}: {value} is not"):
        scaling.main([f"{flag}={value}"])


@pytest.mark.parametrize("path", ["none/scaling.png", "scaling.abc"])
def test_a_picture_that_cannot_be_written_is_an_error(path, tmp_path):
    with pytest.raises(UsageError, match="--plot: "):
        scaling.main([f"--plot={tmp_path / path}"])


@pytest.mark.slow  # it compiles a step
@pytest.mark.long
def test_measure_takes_the_median_of_warm_steps(capsys, monkeypatch):
    tiny = partial(resnet.ResNet, (), basic, 4, downsample=False)
    monkeypatch.setitem(resnet.MODELS, "tiny", tiny)
    steps = [9.0, 9.0, 9.0] + [0.025] * 6 + [5.0] * 4  # seconds
    ticks = iter([t for step in steps for t in (0, step)])
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(scaling, "time", clock)
    flags = ["--measure", "--model=tiny", "--image_size=6", "--images=2", "--workers", "1"]
    assert scaling.main(flags) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[:3] == ["1", "2", "25.0"]
    assert "CPU" in printed.err
    assert next(ticks, None) is None  # every step was timed
