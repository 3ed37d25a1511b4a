"""Runs per-device programs on all devices: pmap or shard_map, same function, same numbers.

State has no device axis: it is replicated. Batches have a leading device axis. With several
hosts every process runs the same program on its own devices.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"  # the mapped axis of all per-device programs


def _devices() -> list[jax.Device]:
    """Those of all processes, each process's together."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def _mesh() -> Mesh:
    return Mesh(np.array(_devices()), (AXIS,))


def _with_pmap(step: Callable, donate: tuple[int, ...], sharded: bool) -> Callable:
    on_all = partial(
        jax.pmap,
        axis_name=AXIS,
        out_axes=None,
        donate_argnums=donate,
        devices=_devices(),
    )
    if sharded:
        return on_all(step, in_axes=(None, 0))
    run = on_all(lambda state, batch, _: step(state, batch), in_axes=(None, None, 0))
    nothing = shard(np.zeros(jax.local_device_count()))  # pmap must map over something
    return lambda state, batch: run(state, batch, nothing)


def _with_shard_map(step: Callable, donate: tuple[int, ...], sharded: bool) -> Callable:
    def per_device(state: Any, batch: Any) -> Any:
        return step(state, jax.tree.map(lambda x: x[0], batch) if sharded else batch)

    # check_vma would insert a sum of the gradients of replicated parameters of its own.
    mapped = jax.shard_map(
        per_device,
        mesh=_mesh(),
        in_specs=(P(), P(AXIS) if sharded else P()),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=donate)


RUNNERS = {"pmap": _with_pmap, "shard_map": _with_shard_map}


def run_on_devices(
    step: Callable, runner: str, donate_state: bool = False, sharded: bool = True
) -> Callable:
    """A per-device program as a function of replicated state and a batch.

    Args:
      step: (state, batch) -> outputs, using collectives over `AXIS`, whose outputs are
        the same on every device.
      runner: "pmap" or "shard_map".
      donate_state: reuse the memory of `state`, which the caller must not touch again.
      sharded: each device takes its part of the batch; else all of it.

    Returns:
      (state, batch) -> outputs; state and outputs replicated, batch from `shard`, or from
      `replicate` if it is not sharded.
    """
    return RUNNERS[runner](step, (0,) if donate_state else (), sharded)


MEMBERS = "members"  # the axis of runs that are trained at once, each on one device


def member_mesh(num_members: int) -> Mesh:
    """The devices for so many members; the mapped axis of steps is of length 1."""
    devices = np.array(_devices()[:num_members])
    return Mesh(devices[:, None], (MEMBERS, AXIS))


def members_take_turns() -> bool:
    """Whether they do on a device: on a CPU one keeps a core busy and fits its cache."""
    return jax.default_backend() == "cpu"


def run_members(step: Callable, mesh: Mesh, donate_state: bool = False) -> Callable:
    """The program of one member as one of all members at once, spread over the devices.

    On a device its members are a batch of the program (`vmap`), or take turns in a loop of
    it, as `members_take_turns` says.

    Args:
      step: (state, own, shared) -> outputs, of one member.
      mesh: from `member_mesh`.
      donate_state: reuse the memory of `state`, which the caller must not touch again.

    Returns:
      (states, own, shared) -> outputs, where all but `shared` have an axis of the members
      in front, a multiple of the devices long.
    """
    map_members = jax.lax.map if members_take_turns() else _map_all

    def per_device(states: Any, own: Any, shared: Any) -> Any:
        def one(args: tuple[Any, Any]) -> Any:
            return step(*args, shared)

        return map_members(one, (states, own))

    mapped = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P(MEMBERS), P(MEMBERS), P()),
        out_specs=P(MEMBERS),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if donate_state else ())


def _map_all(step: Callable, args: Any) -> Any:
    return jax.vmap(step)(args)


def shard_members(trees: Sequence[Any], mesh: Mesh) -> Any:
    """Trees of equal arrays, one a member, stacked and spread over the devices.

    The last is repeated until every device has as many members.
    """
    more = -len(trees) % mesh.shape[MEMBERS]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees, *(more * [trees[-1]]))
    return jax.device_put(stacked, NamedSharding(mesh, P(MEMBERS)))


def replicated() -> NamedSharding:
    """The sharding of the state: one copy on every device."""
    return NamedSharding(_mesh(), P())


def replicate(tree: Any) -> Any:
    """The arrays of `tree`, the same in every process, one copy on every device."""
    return jax.device_put(tree, replicated())


def as_global(tree: Any) -> Any:
    """Replicated arrays as arrays of all processes, which pmap leaves to each its own."""

    def join(x: jax.Array) -> jax.Array:
        if not x.is_fully_addressable or jax.process_count() == 1:
            return x
        copies = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(), copies)

    return jax.tree.map(join, tree)


def shard(batch: Any) -> Any:
    """A host's arrays [b, ...] as arrays of all devices [devices, b / local devices, ...].

    Host h holds the h-th contiguous slice of the global batch, and so does each of its
    devices of that slice.
    """
    sharding = NamedSharding(_mesh(), P(AXIS))

    def put(x: np.ndarray) -> jax.Array:
        x = x.reshape(jax.local_device_count(), -1, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def prefetch(batches: Iterable[Any], depth: int = 1) -> Iterator[Any]:
    """`shard` of every batch, `depth` batches ahead of the consumer."""
    ready: deque = deque()
    for batch in batches:
        ready.append(shard(batch))
        if len(ready) > depth:
            yield ready.popleft()
    yield from ready
