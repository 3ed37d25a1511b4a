"""Several processes: who they are told to be, what is refused (and test_topology.py)."""

import jax
import pytest
from jax._src import distributed

from resjax import hosts
from resjax.config import UsageError

FLAGS = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
SLURM = {"SLURM_STEP_NUM_TASKS": "2"}
ALONE = [
    {},
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "8"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"TPU_WORKER_HOSTNAMES": "10.0.0.1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
]
SEVERAL = [
    SLURM,
    {"OMPI_COMM_WORLD_SIZE": "4"},
    {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"},
    {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"},
]


@pytest.fixture
def started(monkeypatch):
    """The calls of jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    monkeypatch.setattr(hosts, "_is_tpu_machine", lambda: False)
    for name in {name for env in ALONE + SEVERAL for name in env}:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize("env", ALONE, ids=str)
def test_a_process_alone_starts_nothing(env, started, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert hosts.run_together(lambda: 7) == 7
    assert not started


@pytest.mark.parametrize("env", SEVERAL, ids=str)
def test_the_environment_of_a_cluster_is_enough(env, started, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert hosts.run_together(lambda: 7) == 7
    ((args, kwargs),) = started
    assert args == (None, None, None)
    assert kwargs["local_device_ids"] is None


@pytest.mark.parametrize("alone", [True, False])
def test_a_tpu_machine_asks_its_metadata(alone, started, monkeypatch):
    def initialize(*args, **kwargs):
        started.append(args)
        if alone:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts, "_is_tpu_machine", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert hosts.run_together(lambda: 7) == 7
    assert started == [(None, None, None)]


def test_flags_say_where_the_others_are(started, monkeypatch):
    waited = []
    monkeypatch.setattr(hosts, "_wait_for", waited.append)
    hosts.run_together(lambda: 0, **FLAGS)
    ((args, _),) = started
    assert waited == ["10.0.0.1:1234"]
    assert args == ("10.0.0.1:1234", 2, 1)


@pytest.mark.parametrize(
    "env, devices",
    [
        ({"SLURM_STEP_NUM_NODES": "2"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_NUM_NODES": "1"}, None),
        ({"SLURM_STEP_NUM_NODES": "2", "OMPI_COMM_WORLD_SIZE": "16"}, None),
        ({"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1"}, None),
    ],
)
def test_the_only_task_of_a_slurm_node_takes_all_its_gpus(
    env, devices, started, monkeypatch
):
    for name, value in {**SLURM, "SLURM_GPUS_ON_NODE": "4", **env}.items():
        monkeypatch.setenv(name, value)
    hosts.run_together(lambda: 0)
    ((_, kwargs),) = started
    assert kwargs["local_device_ids"] == devices


def test_a_process_0_that_never_listens_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "_MEET_SECONDS", 0)
    with pytest.raises(UsageError, match=r"--coordinator_address=localhost:1, .* refused"):
        hosts.run_together(lambda: 0, "localhost:1", 2, 1)


def test_a_cluster_that_does_not_say_enough_is_named(started, monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UsageError, match=r"OMPI_COMM_WORLD_SIZE.*three flags"):
        hosts.run_together(lambda: 0)


@pytest.mark.parametrize(
    "script, flags, named",
    [
        ("eval.py", ["--num_processes=2"], ["--coordinator_address", "--process_id"]),
        (
            "train.py",
            ["--coordinator_address=localhost:1", "--num_processes=0", "--process_id=0"],
            ["--num_processes: 0 is not 1 or more"],
        ),
        ("train.py", ["--process_id=x"], ["--process_id", "'x'"]),
    ],
)
def test_flags_that_do_not_fit_are_one_line(script, flags, named, command):
    done = command(script, "--workdir=run", *flags)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and all(part in line for part in named)


def test_a_notice_of_preemption_comes_from_the_manager_of_jax(monkeypatch):
    assert not hosts.is_preempted(3)  # alone there is none
    asked = []

    class Manager:
        def reached_sync_point(self, step):
            asked.append(step)
            return step == 5

    state = distributed.global_state
    monkeypatch.setattr(state, "preemption_sync_manager", Manager())
    monkeypatch.setattr(state, "client", object())
    assert [hosts.is_preempted(step) for step in (4, 5)] == [False, True]
    assert asked == [4, 5]
