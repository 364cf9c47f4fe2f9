"""Which device is which rank of which group, and where the members meet."""

from __future__ import annotations

import itertools
import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_nixlep.config import EpConfig
from jax_nixlep.rank_env import rank_env
from jax_nixlep.rendezvous import Seat
from jax_nixlep.store.tcp import StoreServer

mesh_numbers = itertools.count()  # of a job's meshes, one after the other: all processes count alike


class Place(NamedTuple):
    """Of a local device: which group, one for each coordinate of the mesh axes beside the experts', and which rank."""

    device: jax.Device
    team: str
    rank: int


def check_ranks(config: EpConfig, ranks: Sequence[int], own: Sequence[int]) -> None:
    bad = [r for r in ranks if not 0 <= r < config.max_ranks]
    if bad or len(set(ranks)) != len(ranks):
        raise ValueError(
            f"initialize: members must be distinct ranks in [0, {config.max_ranks}); got {list(ranks)}; "
            "raise EpConfig.max_ranks, or number the members from 0"
        )
    if not own:
        raise ValueError(
            "initialize: mesh must contain a device of this process; got none; build it over jax.devices()"
        )
    for r in own:
        if r not in ranks:
            raise ValueError(f"initialize: rank must be one of members {list(ranks)}; got {r}; add it to members")


def member_places(
    rank: int | None,
    members: Iterable[int] | None,
    store: str | None,
    secret: str | None,
    elastic: bool,
    join: bool,
) -> tuple[list[Place], list[int], str | None, str | None]:
    env = rank_env()
    if env is not None:
        rank = env.rank if rank is None else rank
        members = range(env.num_ranks) if members is None else members
        store = env.store if store is None else store
    if join and rank is not None:
        members = [rank]
    if rank is None or members is None:
        raise ValueError(
            f"initialize: rank and members must be given; got rank={rank}, members={members}; "
            "pass them, or pass mesh=, or start with `python -m jax_nixlep.launch -n N script.py`"
        )
    ranks = [int(r) for r in members]
    if store is None and (len(ranks) > 1 or elastic):
        raise ValueError(
            f"initialize: store must be given for {len(ranks)} members; got None; "
            'pass store="tcp://host:port", the same on every member'
        )
    return (
        [Place(jax.local_devices()[0], "", int(rank))],
        ranks,
        store if len(ranks) > 1 or elastic else None,
        secret,
    )


def mesh_places(mesh: jax.sharding.Mesh, axis: str | tuple[str, ...]) -> tuple[list[Place], int]:
    """(device, team, rank) of each local device of the mesh, and the size of a team."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    names = list(mesh.axis_names)
    for name in axes:
        if name not in names:
            raise ValueError(f"initialize: axis must name axes of the mesh {names}; got {name!r}; rename one of them")
    rest = [i for i, name in enumerate(names) if name not in axes]
    sizes = [mesh.shape[name] for name in axes]
    places = []
    for index, device in np.ndenumerate(mesh.devices):
        if device.process_index == jax.process_index():
            team = ",".join(f"{names[i]}={index[i]}" for i in rest)
            rank = int(np.ravel_multi_index([index[names.index(name)] for name in axes], sizes))
            places.append(Place(device, team, rank))
    return places, math.prod(sizes)


def misplaced(seats: Mapping[jax.Device, Seat], mesh: jax.sharding.Mesh, axis: str | tuple[str, ...]) -> str:
    """Which local device of `mesh` is not where the group has it, "" for none. Devices that differ along `axis` only
    must be of one group, in the order of their ranks, and others of others. The mesh may lack members."""
    seen: set[str] = set()
    for _, team in itertools.groupby(sorted(mesh_places(mesh, axis)[0], key=lambda p: p[1:]), lambda p: p.team):
        before: Seat | None = None
        for place in team:
            seat = seats.get(place.device)
            if seat is None:
                return f"{place.device}, which is in no group"
            fits = seat.team == before.team and seat.rank > before.rank if before else seat.team not in seen
            if not fits:
                where = f"{place.rank} of {place.team or 'the mesh'}"
                return f"{place.device} at {where}, rank {seat.rank} of {seat.team or 'its group'}"
            seen.add(seat.team)
            before = seat
    return ""


def mesh_store(
    url: str | None, secret: str | None, number: int, timeout_s: float
) -> tuple[str | None, str | None, StoreServer | None]:
    """The store of a mesh's processes: the given one, the launcher's, or one that process 0 serves."""
    env = rank_env()
    if url is None and env is not None:
        url = env.store
    if url is not None:
        return url, secret, None
    if jax.process_count() == 1:
        secret = secrets.token_hex(16)
        server = StoreServer(secret=secret)
        return server.url, secret, server
    from jax._src.distributed import global_state  # the job's own key-value service has no public name

    client: Any = global_state.client
    key = f"jax_nixlep/store/{number}"
    if jax.process_index() == 0:
        host = str(global_state.coordinator_address).rsplit(":", 1)[0]
        secret = secrets.token_hex(16)
        server = StoreServer(host=host, secret=secret)
        client.key_value_set(key, json.dumps([server.url, secret]))
        return server.url, secret, server
    try:
        url, secret = json.loads(client.blocking_key_value_get(key, int(1e3 * timeout_s)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"initialize: process 0 did not arrive within {timeout_s:g} s ({error}); check that all call initialize "
            "equally often, or raise init_timeout_s"
        ) from error
    return url, secret, None
