"""The front end: starts and stops the processes that are ranks, gives them requests, and loses none.

It hosts the store where ranks meet and is no rank itself, so no rank's death takes it along. A request whose rank died
or left goes back to the head of the queue and starts again from its prompt; the tokens come out the same (`rows`), and
those that its caller has are not given twice. Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal, Self

from jax_nixlep.store.tcp import StoreServer
from serving.model import open_model
from serving.process import RankProcess
from serving.rows import Request, Token
from serving.worker import Settings

_KEPT_SWITCHES = 1024
_ABORT_S = 5.0
_LEAVE_S = 10.0  # for a rank that left the group to end by itself
_log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The queue is full; try later."""


class Unavailable(RuntimeError):
    """No rank serves any more."""


class ChangeRuns(RuntimeError):
    """One change of the group may run at a time; names the one that does."""


class ScaleError(RuntimeError):
    """A change of the group did not happen; those that served go on. Says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
      source: for `open_model`.
      max_ranks: ranks that there can ever be.
      experts_per_rank: experts that a rank has room for.
      rows, chunk, context, detection_timeout_s: see `worker.Settings`.
      max_queue: requests that may wait for a row.
      start_timeout_s: from the start of a process to its first step, which includes reading its weights.
    """

    source: dict[str, str]
    max_ranks: int
    experts_per_rank: int
    rows: int = 8
    chunk: int = 16
    context: int = 512
    detection_timeout_s: float = 0.5
    max_queue: int = 256
    start_timeout_s: float = 120.0


class Stream:
    """The answer to one request, as it is made: iterate over its tokens, once.

    Attributes:
      submitted: time.monotonic() at which the request came.
      tokens: all so far; `times`: time.monotonic() at which each was made, on the rank.
      finish: "stop" or "length" once it is over.
      restarts: how often its rank was lost or left.
      differing: tokens that came out differently after a restart. Never, if all is well.
    """

    def __init__(self, request: Request, router: Router):
        self.request, self._router = request, router
        self.submitted = time.monotonic()
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.finish: Literal["", "stop", "length"] = ""
        self.restarts = self.differing = 0
        self._news: asyncio.Queue[int | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[int]:
        while (news := await self._news.get()) is not None:
            if isinstance(news, Exception):
                raise news
            yield news

    def cancel(self) -> None:
        """Ends the work on it; nothing happens if it is over."""
        self._router._cancel(self)

    def _take(self, token: Token, at: float) -> bool:
        """Returns whether it is one that the caller does not have yet."""
        if token.index < len(self.tokens):
            self.differing += self.tokens[token.index] != token.token
            return False
        self.tokens.append(token.token)
        self.times.append(at)
        self._news.put_nowait(token.token)
        if token.finish:
            self.finish = token.finish
            self._news.put_nowait(None)
        return True

    def _fail(self, error: Exception) -> None:
        self._news.put_nowait(error)


class _Rank:
    """A process, and what the router knows about it."""

    def __init__(self, process: RankProcess):
        self.process, self.rank = process, process.settings.rank
        self.streams: dict[int, Stream] = {}
        self.requeued = 0  # streams that went to others
        self.compiled = self.stepped = False
        self.recompiles = 0
        self.leaving = False  # gets no more requests; may end
        self.answer: str | None = None  # to the last "resize": "" or why it failed


class Router:
    """Use it as an asynchronous context manager, then `start`.

    Attributes:
      model: the model, without weights.
      epoch, members: of the group.
      missing_experts: that no rank holds, after a loss; requests wait until the group has room for them.
      switches: what each rank said of each change of epoch, the last ones: {"rank", "epoch", "members", "lost",
        "blocked_ms", "at"}, and once it was made "first_step", of the same clock as "at", time.monotonic().
      on_event: called with "switch", "ended" or "tokens", and details.
    """

    def __init__(self, options: Options):
        self.options, self.model = options, open_model(options.source)
        self.epoch, self.members = 0, ()
        self.missing_experts: list[int] = []
        self.switches: collections.deque[dict[str, Any]] = collections.deque(maxlen=_KEPT_SWITCHES)
        self.on_event: list[Callable[..., None]] = []
        self._ranks: dict[int, _Rank] = {}
        self._ends: dict[int, str] = {}  # how a rank ended last
        self._queue: collections.deque[Stream] = collections.deque()
        self._ids = itertools.count()
        self._changing = ""
        self._resting = False
        self._recompiles = 0  # of ranks that ended
        self._waiters: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._secret = secrets.token_hex(32)

    async def __aenter__(self) -> Self:
        # All ranks compile the same programs: those that come later find them.
        self._programs = tempfile.TemporaryDirectory(prefix="jax_nixlep-programs-")
        self._store = StoreServer(secret=self._secret)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*(rank.process.stop() for rank in self._ranks.values()))
        self._fail_all(Unavailable("the server stops"))
        self._store.close()
        self._programs.cleanup()

    # --- Requests. ---

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the rows of ranks."""
        return sum(len(rank.streams) for rank in self._ranks.values())

    @property
    def scaling(self) -> str:
        """The change of the group that runs; "" for none."""
        return self._changing

    def submit(self, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> Stream:
        """Takes a request; see `rows.Request` for `sampling`.

        Raises:
          ValueError: it cannot be served; says why.
          Overloaded, Unavailable: not now; not any more.
        """
        if not prompt or not all(0 <= token < self.model.vocab_size for token in prompt):
            raise ValueError(f"prompt must have tokens, from 0 to {self.model.vocab_size - 1}; got {list(prompt)[:8]}")
        if max_tokens < 1 or len(prompt) + max_tokens > self.options.context:
            raise ValueError(
                f"prompt and max_tokens must fit a context of {self.options.context} tokens; got {len(prompt)} and "
                f"{max_tokens}; shorten one of them"
            )
        if not self._ranks:
            raise Unavailable("no rank serves")
        if len(self._queue) >= self.options.max_queue:
            raise Overloaded(f"{len(self._queue)} requests wait already; try again later")
        stream = Stream(Request(next(self._ids), tuple(prompt), max_tokens, **sampling), self)
        self._queue.append(stream)
        self._assign()
        return stream

    def _cancel(self, stream: Stream) -> None:
        if stream in self._queue:
            self._queue.remove(stream)
        stream._news.put_nowait(None)
        for rank in self._ranks.values():
            if rank.streams.pop(stream.request.id, None):
                rank.process.tell(do="cancel", id=stream.request.id)
        self._assign()

    def _assign(self) -> None:
        """Gives waiting requests to the ranks with the most free rows, and sets the pace."""
        while self._queue:
            ready = [r for r in self._ranks.values() if r.stepped and r.rank in self.members and not r.leaving]
            rank = min(ready, key=lambda r: len(r.streams), default=None)
            if rank is None or len(rank.streams) >= self.options.rows:
                break
            stream = self._queue.popleft()
            rank.streams[stream.request.id] = stream
            rank.process.tell(do="generate", request=dataclasses.asdict(stream.request))
        resting = not (self._queue or self.running or self._changing)
        if resting != self._resting:
            self._resting = resting
            for rank in self._ranks.values():
                rank.process.tell(do="pace", rest=resting)

    def _fail_all(self, error: Exception) -> None:
        for stream in [*self._queue, *(s for rank in self._ranks.values() for s in rank.streams.values())]:
            stream._fail(error)
        self._queue.clear()

    # --- The group. ---

    @property
    def recompiles(self) -> int:
        """Programs that ranks compiled after their start."""
        return self._recompiles + sum(rank.recompiles for rank in self._ranks.values())

    def blocked_ms(self) -> dict[int, float]:
        """For each resize that `switches` holds, by its epoch: how long no rank could step, at most, of those that
        served before and after."""
        blocked: dict[int, float] = {}
        before: set[int] = set()
        for epoch, group in itertools.groupby(sorted(self.switches, key=lambda s: s["epoch"]), lambda s: s["epoch"]):
            ranks = list(group)
            stayed = [switch["blocked_ms"] for switch in ranks if switch["rank"] in before]
            if stayed and ranks[0]["change"]:  # none after a loss
                blocked[epoch] = max(stayed)
            before = set(ranks[0]["members"])
        return blocked

    async def start(self, ranks: int) -> None:
        """Starts the first ranks; returns when they serve.

        Raises:
          ScaleError: one did not; says why.
        """
        with self._change(f"start of {ranks} ranks"):
            self._check(ranks)
            for rank in range(ranks):
                await self._start(rank, tuple(range(ranks)))
            deadline = time.monotonic() + self.options.start_timeout_s
            await self._until(lambda: all(self._rank(r).stepped for r in range(ranks)), "take a first step", deadline)
            await self._resize(self.members, deadline)  # spreads replicas over the slots that are left

    async def scale(self, ranks: int, *, drain_timeout_s: float = 0.0, deadline_s: float = 120.0) -> None:
        """Changes the number of ranks while they serve. The last ones leave; the requests in their rows start again.

        Args:
          drain_timeout_s: how long ranks that leave may first work on the requests they have.
          deadline_s: for all of it.

        Raises:
          ChangeRuns: another change does.
          ScaleError: it did not happen; says why.
          ValueError: the model's experts, or ranks, do not fit.
        """
        with self._change(f"to {ranks} ranks"):
            self._check(ranks)
            deadline = time.monotonic() + deadline_s
            if not self.members:
                raise ScaleError("no rank serves any more; start the server anew")
            # Of an earlier change or a loss, some may still be ending, or not be missed by the others yet.
            await self._until(lambda: set(self._ranks) == set(self.members), "end", deadline)
            stay = self.members[:ranks]
            free = (rank for rank in range(self.options.max_ranks) if rank not in self._ranks)
            new = tuple(itertools.islice(free, ranks - len(stay)))
            leaving = [self._rank(rank) for rank in self.members[ranks:]]
            try:
                for rank in new:
                    await self._start(rank, ())
                await self._until(lambda: all(self._rank(r).compiled for r in (*stay, *new)), "get ready", deadline)
                for rank in leaving:
                    rank.leaving = True
                self._assign()
                drained = min(deadline, time.monotonic() + drain_timeout_s)
                with contextlib.suppress(ScaleError):
                    await self._until(lambda: not any(rank.streams for rank in leaving), "drain", drained)
                await self._resize((*stay, *new), deadline)
                await self._until(lambda: all(self._rank(r).stepped for r in new), "take a first step", deadline)
                await self._until(lambda: not any(rank.rank in self._ranks for rank in leaving), "end", deadline)
            finally:
                for rank in leaving:
                    rank.leaving = rank.rank not in self.members
                for r in new:
                    if r in self._ranks and r not in self.members:
                        self._ranks[r].leaving = True
                        self._ranks[r].process.kill()

    async def rebalance(self, *, deadline_s: float = 60.0) -> None:
        """Puts a new table of experts into use, for the load that ranks observed and the members as they are.

        Raises:
          ChangeRuns, ScaleError: it did not happen; says why.
        """
        with self._change("of the table"):
            await self._resize(self.members, time.monotonic() + deadline_s)

    def kill(self, rank: int) -> float:
        """Kills a rank (SIGKILL), to see what happens; returns time.monotonic() before."""
        now = time.monotonic()
        self._ranks[rank].process.kill()
        return now

    def _check(self, ranks: int) -> None:
        least = -(-self.model.num_experts // self.options.experts_per_rank)
        if not least <= ranks <= self.options.max_ranks:
            raise ValueError(
                f"ranks must be {least} to {self.options.max_ranks}, for {self.model.num_experts} experts in "
                f"{self.options.experts_per_rank} slots each; got {ranks}"
            )

    @contextlib.contextmanager
    def _change(self, name: str) -> Iterator[None]:
        """Single flight."""
        if self._changing:
            raise ChangeRuns(f"one change may run at a time; got a change {name} while one {self._changing} runs")
        self._changing = name
        self._assign()
        try:
            yield
        finally:
            self._changing = ""
            self._assign()
            self._wake()

    async def _resize(self, members: Sequence[int], deadline: float) -> None:
        """Has one of the members that stay ask for the change, and waits for the outcome."""
        for rank in members:
            self._rank(rank)
        asked = self._rank(min(set(members) & set(self.members)))
        asked.answer = None
        asked.process.tell(do="resize", members=sorted(members), deadline_s=max(0.1, deadline - time.monotonic()))

        def answered() -> bool:
            return all(map(self._rank, members)) and asked.answer is not None

        try:
            await self._until(answered, "answer", deadline + 1)
        except ScaleError:  # the group would wait for a rank that is gone until the deadline
            asked.process.tell(do="abort")
            with contextlib.suppress(ScaleError):
                over = time.monotonic() + _ABORT_S
                await self._until(lambda: self._rank(asked.rank).answer is not None, "answer", over)
            raise
        if asked.answer:
            raise ScaleError(asked.answer)

    async def _spread(self) -> None:
        """After a loss: gives every expert its replicas again."""
        try:
            deadline = time.monotonic() + self.options.start_timeout_s
            await self._until(lambda: not self._changing, "end a change", deadline)
            await self.rebalance()
        except (ChangeRuns, ScaleError) as error:
            _log.warning("replicas were not spread after a loss: %s", error)

    def _rank(self, rank: int) -> _Rank:
        """
        Raises:
          ScaleError: it is no more.
        """
        if rank not in self._ranks:
            raise ScaleError(f"rank {rank} ended with {self._ends.get(rank)}")
        return self._ranks[rank]

    async def _until(self, done: Callable[[], bool], what: str, deadline: float) -> None:
        """Waits until what ranks say makes `done` true.

        Raises:
          ScaleError: it is `deadline` (time.monotonic()), or `done` raised it.
        """
        while not done():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await asyncio.wait_for(waiter, max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise ScaleError(f"a rank did not {what} in time") from None

    # --- Processes. ---

    async def _start(self, rank: int, members: tuple[int, ...]) -> None:
        o = self.options
        settings = Settings(
            source=o.source,
            rank=rank,
            members=members,
            store=self._store.url,
            max_ranks=o.max_ranks,
            experts_per_rank=o.experts_per_rank,
            rows=o.rows,
            chunk=o.chunk,
            context=o.context,
            detection_timeout_s=o.detection_timeout_s,
            start_timeout_s=o.start_timeout_s,
        )
        started = self._ranks[rank] = _Rank(await RankProcess.start(settings, self._secret, self._programs.name))
        self._spawn(self._follow(started))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, rank: _Rank) -> None:
        """Hears what a rank says, to its end; then its requests go to others."""
        async for message in rank.process.messages():
            self._hear(rank, message)
        self._ends[rank.rank] = end = await rank.process.wait()
        del self._ranks[rank.rank]
        self._recompiles += rank.recompiles
        self._requeue(rank)
        if not rank.leaving:
            _log.warning("rank %d ended with %s", rank.rank, end)
        if not self._ranks:
            self.members = ()
            self._fail_all(Unavailable("no rank serves any more"))
        self._tell("ended", rank=rank.rank, requests=rank.requeued, expected=rank.leaving)
        self._assign()
        self._wake()

    def _requeue(self, rank: _Rank) -> None:
        """Its requests go to the head of the queue; what it still says about them is ignored."""
        for stream in reversed(rank.streams.values()):
            stream.restarts += 1
            self._queue.appendleft(stream)
        rank.requeued += len(rank.streams)
        rank.streams.clear()

    async def _see_off(self, rank: _Rank) -> None:
        """Kills a rank that is out of the group and does not end: no other change can begin before."""
        await asyncio.sleep(_LEAVE_S)
        if self._ranks.get(rank.rank) is rank:
            _log.warning("rank %d left and did not end within %g s; it is killed", rank.rank, _LEAVE_S)
            rank.process.kill()

    def _hear(self, rank: _Rank, message: dict[str, Any]) -> None:
        rank.recompiles = message.get("recompiles", rank.recompiles)
        match message.pop("event"):
            case "tokens":
                tokens = [Token(*token) for token in message["tokens"]]
                new = 0
                for token in tokens:
                    stream = rank.streams.get(token.request)
                    if stream is not None:
                        new += stream._take(token, message["at"])
                        if token.finish:
                            del rank.streams[token.request]
                self._tell("tokens", rank=rank.rank, new=new)
                self._assign()
                if rank.streams or not rank.leaving:
                    return  # nobody waits for that
            case "compiled":
                rank.compiled = True
            case "switch":
                self.switches.append(message | {"rank": rank.rank})
                if message["epoch"] > self.epoch:
                    before, self.epoch, self.members = self.members, message["epoch"], tuple(message["members"])
                    self._tell("switch", **message)
                    for gone in [self._ranks[r] for r in before if r in self._ranks and r not in self.members]:
                        self._requeue(gone)
                        self._spawn(self._see_off(gone))
                    if message["lost"]:
                        for lost in set(message["lost"]) & set(self._ranks):
                            self._ranks[lost].process.kill()  # it may only be late; its requests must not wait for it
                        self._spawn(self._spread())
            case "stepped":
                rank.stepped = True
                if message["epoch"] == self.epoch:
                    self.missing_experts = message["missing_experts"]
                for switch in self.switches:
                    if (switch["epoch"], switch["rank"]) == (message["epoch"], rank.rank):
                        switch["first_step"] = message["at"]
                rank.process.tell(do="pace", rest=self._resting)
            case "resized":
                rank.answer = message["error"]
        self._assign()
        self._wake()

    def _tell(self, event: str, **details: Any) -> None:
        for listener in self.on_event:
            listener(event, **details)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
