"""`EpGroup`: who takes part, over which transport, from `initialize` to `shutdown`."""

from __future__ import annotations

import atexit
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jax_nixlep import _ffi
from jax_nixlep import store as stores
from jax_nixlep.agreement import Described, described
from jax_nixlep.config import EpConfig
from jax_nixlep.elastic import Change, Elastic, Restore
from jax_nixlep.elastic import run as run_steps
from jax_nixlep.nixl_ep import setup as nixl_ep
from jax_nixlep.placement import Placement, check_experts, identity_placement
from jax_nixlep.rank_env import rank_env
from jax_nixlep.rendezvous import Rendezvous, Seat
from jax_nixlep.seating import check_ranks, member_places, mesh_numbers, mesh_places, mesh_store, misplaced
from jax_nixlep.store.tcp import StoreServer


@dataclasses.dataclass(frozen=True)
class PeerHealth:
    """What one rank counted about one peer since `initialize`.

    Attributes:
      member: it takes part in this epoch.
      masked: it was given up.
      path: "self", "shared memory" or "nixl" on CPU, "pointer" or "put" on GPU, or "none".
      bytes_out: pushed to it; nothing where it pulls.
      bytes_in: pulled from it, or read from what it pushed.
      wait_s: seconds that operations waited for it.
      timeouts: how often it was given up: late, dead or failed.
    """

    member: bool
    masked: bool
    path: str
    bytes_out: int
    bytes_in: int
    wait_s: float
    timeouts: int


@dataclasses.dataclass(frozen=True)
class Health:
    """State and counters of one rank since `initialize`; see `EpGroup.health`."""

    rank: int
    epoch: int
    members: tuple[int, ...]
    masked: tuple[int, ...]
    operations: int
    dropped_rows: int
    invalid_ids: int
    symmetric_bytes: int
    failure: str  # why no operation can run any more; "" while all is well
    peers: dict[int, PeerHealth]


class EpGroup:
    """An expert-parallel group, as this process sees it. Made by `initialize`; one per process.

    Attributes:
      config: the group's `EpConfig`.
    """

    def __init__(self, config: EpConfig, members: Sequence[int], seats: list[Seat]):
        self.config = config
        self._members = tuple(sorted(members))
        self._epoch = 1
        self._elastic: Elastic | None = None
        self._seats = seats
        self._server: StoreServer | None = None
        self._store: stores.Store | None = None
        self._rendezvous: Rendezvous | None = None

    @property
    def rank(self) -> int:
        """This process's rank; of its first device, if it has several."""
        return self._seats[0].rank

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks that take part; of an elastic group before its first `step`, and of a rank that is out, none."""
        return self._members if self._elastic is None else self._elastic.members

    @property
    def epoch(self) -> int:
        """Number of the membership; grows when it changes. 0 before the first `step`, and for a rank that is out."""
        return self._epoch if self._elastic is None else self._elastic.epoch

    @property
    def is_elastic(self) -> bool:
        """Whether its members may come, go and be lost while it serves."""
        return self._elastic is not None

    @property
    def placement(self) -> Placement:
        """Which slots serve which expert, at first in order over the members' slots.

        Pass it to `nixlep_moe` as a runtime argument. Of an elastic group, `step` changes its content, not its shape.
        """
        if self._elastic is not None:
            return self._elastic.placement
        per_rank = self.config.experts_per_rank
        return identity_placement(len(self.members) * per_rank, self.members, per_rank)

    # --- Elastic groups: initialize(elastic=True) or initialize(join=True). Protocol: jax_nixlep/elastic. ---

    @property
    def elastic(self) -> Elastic:
        """The machinery, with what is rarely needed: `history`, `on_prepare`, `on_commit`.

        Raises:
          RuntimeError: the group is not elastic.
        """
        if self._elastic is None:
            raise RuntimeError(
                "group: must be elastic; got a fixed one; pass elastic=True to initialize on every member"
            )
        return self._elastic

    @property
    def table(self) -> np.ndarray:
        """[max_ranks * experts_per_rank] int32, the logical expert of each slot, -1 for none. Slot `rank *
        experts_per_rank + i` is row i of that rank's weights; so this says what a first member loads."""
        return self.elastic.table

    @property
    def experts(self) -> dict[str, Any]:
        """Weights of this rank's slots, nested dicts of [experts_per_rank, ...], as `load` got them; new in `step`."""
        return self.elastic.experts

    @property
    def dense(self) -> dict[str, Any]:
        """The other weights, equal on all ranks, as `load` got them."""
        return self.elastic.dense

    @property
    def lost_experts(self) -> list[int]:
        """Experts that no member serves, after a loss; their tokens get nothing from them."""
        return self.elastic.lost_experts()

    def load(self, experts: Mapping[str, Any], dense: Mapping[str, Any] | None = None) -> None:
        """Hands over this rank's weights, which are copied to memory that other ranks can read. Each first member must
        call, before its first step; a rank that joins gets its weights from the others instead.

        Args:
          experts: nested dicts of arrays [experts_per_rank, ...]: row i serves slot `rank * experts_per_rank + i`.
          dense: nested dicts of arrays, equal on all ranks.

        Raises:
          ValueError, TypeError: not of this form.
        """
        self.elastic.load(experts, dense or {})

    def observe(self, load: Any) -> None:
        """Adds to the load that `prepare` balances: [L] tokens of this rank that chose each expert (`MoeAux.load`)."""
        self.elastic.observe(load)

    def prepare(self, members: Iterable[int] | None = None, *, deadline_s: float = 60.0, **plan: Any) -> Change:
        """Begins a change of the members, or (None) of the placement only. Any one member calls, from any thread.

        Returns at once; connecting, moving weights and warming up go on in the background of all, while they serve.
        An equal call on another member, or one without `table=` for the same members, joins this one.

        Args:
          members: all ranks after the change. New ones call `initialize(join=True)`, before or after this.
          deadline_s: the change is aborted, and the old members go on, if it has not happened by then.
          **plan: `table=`, or options of `placement.plan_table`.

        Raises:
          ElasticError: another change runs; names it.
          ValueError: members out of range, or with too few slots for the experts.
        """
        return self.elastic.prepare(members, deadline_s=deadline_s, **plan)

    def commit(self, change: Change) -> None:
        """Waits until all are ready and has all members switch at the same step, in their `step`, or none.

        Returns after the switch; in the thread that steps, when it is agreed, usually for a few steps later.

        Raises:
          ElasticError: the change did not happen; says why. The old members go on.
        """
        self.elastic.commit(change)

    def abort(self, change: Change, reason: str = "aborted by its caller") -> None:
        """Gives up a change that has not happened yet; the old members go on."""
        self.elastic.abort(change, reason)

    def resize(self, members: Iterable[int] | None = None, **options: Any) -> None:
        """`prepare` and `commit`, in a thread beside the one that serves."""
        self.commit(self.prepare(members, **options))

    def step(self) -> bool:
        """The boundary between two steps. Every member must call it before each step, with no operation running.

        Here a rank switches to a new epoch, or waits for the others to. Costs microseconds when nothing changes.

        Returns:
          True: go on, with `placement`, `experts` and `dense` as they are now. False: this rank is out of the group.

        Raises:
          TimeoutError: a joining rank was not taken in.
          StoreError: a member was lost and the store is away.
          RuntimeError: the thread that follows the group's log failed.
        """
        return self.elastic.step()

    def ok(self) -> bool:
        """Whether the operations since `step` had all members. Else their results are to be dropped and the step, after
        the next call of `step`, is to be done again."""
        return self.elastic.ok()

    def run(self, program: Callable[..., Any], *args: Any) -> Any:
        """`step`, then program(*args) to its end, again if a member was lost meanwhile. Every member must call.

        The program takes what changes from the group: `run(lambda: decode(group.experts, group.placement, tokens))`. It
        must not donate its arguments.

        Raises:
          ElasticError: this rank is out of the group, or no attempt succeeds.
        """
        return run_steps(self.elastic, program, *args)

    def rejoin(self) -> None:
        """Of a rank that is out (`step` gave False): waits like `initialize(join=True)` to be taken in again."""
        self.elastic.join()

    def health(self, device: int = 0) -> Health:
        """State and counters of the rank on local device number `device` (as placed in the mesh). Cheap; any thread."""
        seat = self._seats[device]
        endpoint = seat.endpoint
        peers = {r: PeerHealth(**endpoint.health(r)) for r in range(self.config.max_ranks)}
        return Health(
            rank=seat.rank,
            epoch=endpoint.epoch,
            members=tuple(r for r, peer in peers.items() if peer.member),
            masked=tuple(r for r, peer in peers.items() if peer.masked),
            operations=endpoint.num_operations,
            dropped_rows=endpoint.dropped_rows,
            invalid_ids=endpoint.invalid_ids,
            symmetric_bytes=endpoint.num_bytes,
            failure=endpoint.failure(),
            peers=peers,
        )

    def misplaced(self, mesh: jax.sharding.Mesh, axis: str | tuple[str, ...]) -> str:
        """See `seating.misplaced`, for the devices of this process in the group."""
        return misplaced({seat.device: seat for seat in self._seats}, mesh, axis)

    def _open(
        self,
        url: str,
        serve: bool,
        secret: str | None,
        timeout_s: float,
        make_elastic: Callable[[], Elastic] | None,
        about: Described,
    ) -> None:
        """Meets the other members at `url`; returns when all are connected and active."""
        server, self._store = stores.serve_or_connect(url, serve=serve, secret=secret, timeout_s=timeout_s)
        self._server = self._server or server
        if make_elastic is not None:
            self._elastic = make_elastic()
        if self._elastic is not None and not self._members:
            self._elastic.join()
            return
        self._rendezvous = Rendezvous(self._store, self._seats, about, self._members, timeout_s)
        self._rendezvous.connect()
        with self._rendezvous.telling():
            if self._elastic is None:
                self._activate()
            else:
                self._seats[0].endpoint.prepare(list(self._members))
                self._seats[0].endpoint.activate(0, [self.rank])  # alone, until the first `step`
                if self.rank == self._members[0]:
                    self._elastic.create(self._members)
        self._rendezvous.barrier("active")
        if self._elastic is not None:
            self._elastic.open(self._rendezvous.nonces(self._seats[0]), timeout_s)
        if self._server is None:
            self._rendezvous.say("begun")
        else:
            self._rendezvous.barrier("begun")  # may leave at once, and takes the store along

    def _activate(self) -> None:
        for seat in self._seats:
            here = seat.rank in self._members
            seat.endpoint.activate(self._epoch, list(self._members) if here else [seat.rank])

    def _replace_members(self, members: Sequence[int]) -> None:
        """Other ranks of a mesh take part from now on. Every process of the mesh calls; no operation runs."""
        assert self._rendezvous is not None
        if _ffi.kernels() != "nixl_ep":  # whoever comes back is not to be waited for while it maps the others
            for seat in self._seats:
                if seat.rank in members:
                    seat.endpoint.prepare(list(members))
        # Nobody is in an operation of the old epoch any more.
        self._rendezvous.barrier(f"epoch {self._epoch + 1}", op="ElasticMesh.resize")
        self._epoch, self._members = self._epoch + 1, tuple(members)
        self._activate()
        if _ffi.kernels() == "nixl_ep":  # whose signals do not say of which epoch they are
            self._rendezvous.barrier(f"active {self._epoch}", op="ElasticMesh.resize")

    def _close(self) -> None:
        _ffi.use_kernels("native")
        if self._elastic is not None:
            self._elastic.close()
        for seat in self._seats:
            _ffi.set_endpoint(seat.device, None)
            seat.endpoint.close()
        try:
            if self._rendezvous is not None:
                self._rendezvous.close()
        except (stores.StoreError, OSError):
            pass  # the rank that served the store left first
        if self._store is not None:
            self._store.close()
        if self._server is not None:
            self._server.close()


_group: EpGroup | None = None
_lifecycle = threading.Lock()


def current_group() -> EpGroup:
    """The group of this process.

    Raises:
      RuntimeError: there is none.
    """
    if _group is None:
        raise RuntimeError("jax_nixlep: a group must exist; got none; call jax_nixlep.initialize first")
    return _group


def joined() -> EpGroup | None:
    """The group of this process, if there is one."""
    return _group


def initialize(
    config: EpConfig,
    *,
    rank: int | None = None,
    members: Iterable[int] | None = None,
    store: str | Any | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis: str | tuple[str, ...] = "ep",
    secret: str | None = None,
    timeout_s: float = 60.0,
    init_timeout_s: float = 120.0,
    on_timeout: Literal["raise", "mask"] = "raise",
    kernels: Literal["native", "nixl_ep"] = "native",
    elastic: bool = False,
    join: bool = False,
    num_experts: int | None = None,
    restore: Restore | None = None,
    restore_timeout_s: float = 600.0,
    move_bytes_per_s: float | None = None,
) -> EpGroup:
    """Joins this process to its expert-parallel group. Collective: every member must call, with an equal config.

    Either `members=`: each process is a JAX runtime of its own and one rank. Or `mesh=`: ranks are the positions along
    mesh axis `axis`, one group for each coordinate of the other axes; the mesh may span the processes of a
    `jax.distributed` job, or several devices of one process.

    Under `python -m jax_nixlep.launch`, `rank`, `members` and `store` default to the launcher's.

    Args:
      config: capacities; equal on every member.
      rank: this process's rank, 0 <= rank < config.max_ranks.
      members: all ranks of the group.
      store: "tcp://host:port" or "etcd://host:port": where the members meet. The lowest member serves a tcp store
        itself unless one already answers there. With a mesh it is found through jax.distributed. With
        `kernels="nixl_ep"` also a torch.distributed.TCPStore, to meet ranks that are `nixl_ep.Buffer`s.
      mesh: gives rank and members instead.
      axis: mesh axis of the experts, or several, the first varying slowest.
      secret: shared secret of the store; default: environment JAX_NIXLEP_SECRET.
      timeout_s: how long an operation waits for a peer.
      init_timeout_s: how long to wait here for all members.
      on_timeout: "raise": a peer that is late, dead or failed ends the operation with an error on every rank. "mask":
        its tokens and experts are left out, and `Status.peers` and `health()` say so. Not for elastic groups.
      kernels: "native": this package's. "nixl_ep": NVIDIA's NIXL-EP kernels from the installed nixl wheel, on GPUs, for
        inference, within their limits: docs/nixl_ep.md. Programs traced for the other kernels are traced again.
      elastic: members may come, go and be lost: call `group.step()` between steps. Programs run by themselves, to
        compile and warm up, until its first call, which waits for all. Each process is one rank.
        The store is needed even for one member, and should outlive the ranks (`python -m jax_nixlep.store`, or the
        launcher's).
      join: this process is no member yet. Returns when a member has named it in `group.prepare` and it holds what it
        needs; its programs run by themselves, to compile and warm up, until its first `group.step()`, which takes part.
      num_experts: logical experts of an elastic group; default: one for each slot of the first members.
      restore: restore(expert_ids) gives the weights of experts that no rank holds any more, as `group.load` takes
        experts, one row for each id; such as from a checkpoint.
      restore_timeout_s: how long that may take, with moving the other experts. After three attempts the group serves
        without the experts.
      move_bytes_per_s: how fast this rank copies weights from others while it serves; None = as fast as it goes.

    Returns:
      The group; also `current_group()`.

    Raises:
      ValueError: an argument, or one that differs between members, is wrong; names it and the values.
      RuntimeError: already initialized; a member failed, says which and why; no operations for this platform.
      TimeoutError: names the ranks that did not arrive.
      jax_nixlep.store.StoreError: the store cannot be reached, refuses the secret, or its port is taken.
      NixlError: nixl is needed to reach a member and is missing, too old or broken.
      ImportError: kernels="nixl_ep" without torch, or with a nixl that was not built for it.
    """
    global _group
    with _lifecycle:
        if _group is not None:
            raise RuntimeError("initialize: must be called once; got a second call; call jax_nixlep.shutdown() first")
        if on_timeout not in ("raise", "mask"):
            raise ValueError(f'initialize: on_timeout must be "raise" or "mask"; got {on_timeout!r}; choose one')
        if kernels not in ("native", "nixl_ep"):
            raise ValueError(f'initialize: kernels must be "native" or "nixl_ep"; got {kernels!r}; choose one')
        times = {"timeout_s": timeout_s, "init_timeout_s": init_timeout_s, "restore_timeout_s": restore_timeout_s}
        for name, value in times.items():
            if not 0 < value <= 1e9:
                raise ValueError(f"initialize: {name} must be positive, and at most 1e9; got {value}; give seconds")
        elastic = elastic or join
        if elastic and on_timeout == "mask":
            raise ValueError(
                'initialize: on_timeout must be "raise" in an elastic group; got "mask"; leave it out: `group.run` '
                "repeats a step without a rank that is late or dead"
            )
        upstream = None if store is None or isinstance(store, str) else store
        if upstream is not None and (kernels != "nixl_ep" or mesh is not None):
            raise ValueError(
                f'initialize: store must be a URL without kernels="nixl_ep", and with a mesh; got {store!r}; '
                'pass "tcp://host:port" or "etcd://host:port"'
            )
        if elastic and kernels == "nixl_ep":
            raise ValueError(
                'initialize: elastic must be False with kernels="nixl_ep", whose signals do not tell a late peer '
                'from a present one; got True; use ElasticMesh over a mesh, or kernels="native"'
            )
        if elastic and mesh is not None:
            raise ValueError("initialize: elastic must be False with a mesh, whose ranks are fixed; got True; drop one")
        if mesh is not None:
            number = next(mesh_numbers)
            if rank is not None or members is not None:
                raise ValueError("initialize: mesh= must come without rank= and members=; got both; drop one side")
            places, size = mesh_places(mesh, axis)
            ranks: Sequence[int] = range(size)
            url = None
        else:
            places, ranks, url, secret = member_places(rank, members, store, secret, elastic, join)
        check_ranks(config, ranks, [place[2] for place in places])
        if elastic:
            if num_experts is None:
                if join:
                    raise ValueError("initialize: num_experts must be given to join; got None; pass the group's")
                num_experts = len(ranks) * config.experts_per_rank
            if not join:
                check_experts("initialize", num_experts, ranks, config.experts_per_rank)
        if kernels == "nixl_ep" and len({team for _, team, _ in places}) < len(places):
            raise ValueError(
                f'initialize: mesh must have one device of each process along {axis!r} with kernels="nixl_ep", since '
                f"UCX does not connect GPUs of one process; got {len(places)} here; start a process for each GPU, or "
                'use kernels="native"'
            )

        def make_endpoint(device: jax.Device, rank: int) -> _ffi.Endpoint:
            if kernels == "nixl_ep":
                return nixl_ep.make_endpoint(device, rank, config, timeout_s, on_timeout == "mask")
            return _ffi.make_endpoint(
                device,
                rank=rank,
                max_ranks=config.max_ranks,
                experts_per_rank=config.experts_per_rank,
                max_tokens=config.max_tokens_per_rank,
                top_k=config.top_k,
                row_bytes=config.row_bytes,
                timeout_s=timeout_s,
                mask_late_peers=on_timeout == "mask",
            )

        seats = [Seat(device, team, r, make_endpoint(device, r)) for device, team, r in places]
        group = EpGroup(config, [] if join else ranks, seats)
        make_elastic: Callable[[], Elastic] | None = None
        about = described(config, kernels=kernels, elastic=elastic, num_experts=num_experts)
        try:
            if mesh is not None:
                url, secret, group._server = mesh_store(store, secret, number, init_timeout_s)
            if elastic:
                assert url is not None and num_experts is not None
                make_elastic = partial(
                    Elastic,
                    url,
                    seats[0].endpoint,
                    config,
                    seats[0].rank,
                    num_experts,
                    about,
                    secret=secret,
                    timeout_s=timeout_s,
                    join_timeout_s=init_timeout_s,
                    restore=restore,
                    restore_timeout_s=restore_timeout_s,
                    bytes_per_s=move_bytes_per_s,
                )
            if upstream is not None:
                nixl_ep.meet(seats[0].endpoint, seats[0].rank, ranks, upstream, init_timeout_s)
            elif url is None:
                group._activate()
            else:
                serve = mesh is None and not join and seats[0].rank == group._members[0] and rank_env() is None
                group._open(url, serve, secret, init_timeout_s, make_elastic, about)
        except BaseException:
            group._close()
            raise
        for seat in seats:
            _ffi.set_endpoint(seat.device, seat.endpoint)
        _ffi.use_kernels(kernels)
        if kernels == "nixl_ep" and upstream is None:  # a Buffer would not take part
            try:
                nixl_ep.self_test(config, {seat.device: seat.rank for seat in seats}, group.members)
            except BaseException:
                group._close()
                raise
        _group = group
        return group


def shutdown() -> None:
    """Leaves the group: peers that wait for this rank get an error that says so. Without a group, does nothing."""
    global _group
    with _lifecycle:
        group, _group = _group, None
        if group is not None:
            group._close()


atexit.register(shutdown)
