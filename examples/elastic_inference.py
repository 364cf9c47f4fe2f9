"""Generates text for a stream of prompts while the group of ranks grows, shrinks and loses a member.

    python examples/elastic_inference.py --checkpoint out --json out.json --plot elastic.png

The model is the one that train_lm.py trains. The ranks are processes of this machine, each with its share of the
experts and its own requests (`serving`). First a group that is never resized answers all prompts. Then the same
prompts come again and again while the group changes as --members says, new tables of experts are put into use in
between, and one rank is killed; every answer is compared with the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import text
from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.table import Table
from serving.model import find_checkpoint
from serving.router import Options, Router, Stream, Unavailable

MAX_PROMPT = 96  # bytes
_BIN_S = 0.5  # of the figures over time
_VIEW_S = 0.25  # between two pictures on the terminal


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("out"), help="file, or --out of train_lm.py")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 3], help="ranks first, and after each change")
    parser.add_argument("--max-ranks", type=int, default=4)
    parser.add_argument("--experts-per-rank", type=int, default=6, help="6 on 3 ranks: each of the 8 experts twice")
    parser.add_argument("--hold", type=float, default=4.0, metavar="SECONDS", help="between two changes")
    parser.add_argument("--rebalances", type=int, default=12, help="changes of the table alone, between two of members")
    parser.add_argument(
        "--drain", type=float, default=10.0, metavar="SECONDS", help="for ranks that leave, to finish what they work on"
    )
    parser.add_argument("--prompts", type=int, default=32, help="pieces of Python's standard library")
    parser.add_argument("--tokens", type=int, default=128, help="bytes to add to each prompt")
    parser.add_argument("--streams", type=int, default=24, help="prompts that are answered at a time")
    parser.add_argument("--rows", type=int, default=8, help="prompts that a rank works on at a time")
    parser.add_argument("--detect", type=float, default=0.5, metavar="SECONDS", help="wait of a rank for another")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    try:
        args.checkpoint = find_checkpoint(args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    if args.members[-1] < 2 or min(args.prompts, args.tokens, args.streams, args.rows) < 1:
        parser.error("--members must end with 2 or more, one of which is killed; the other numbers be at least 1")
    return args


def sample_prompts(count: int) -> list[list[int]]:
    """Pieces of 8 to MAX_PROMPT bytes of text that the model was not trained on."""
    _, valid = text.split(text.load_corpus())
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, MAX_PROMPT, count, endpoint=True)
    starts = rng.integers(0, len(valid) - MAX_PROMPT, count)
    return [valid[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


class Recorder:
    """What happened, in seconds since it was made."""

    def __init__(self, router: Router):
        self._router, self._began = router, time.monotonic()
        self.streams: list[tuple[int, Stream]] = []  # with the number of the prompt
        self.lost = 0
        self.over = False  # no more prompts
        self.events: list[tuple[float, str]] = []
        self.members: list[tuple[float, list[int]]] = [(0.0, [*router.members])]
        self._first_epoch = router.epoch
        self._tokens: list[float] = []
        router.on_event.append(self._on_event)

    def now(self, at: float | None = None) -> float:
        return (time.monotonic() if at is None else at) - self._began

    def note(self, what: str) -> None:
        self.events.append((self.now(), what))

    def tokens_per_s(self, window_s: float = 1.0) -> float:
        now = self.now()
        recent = itertools.takewhile(lambda at: at > now - window_s, reversed(self._tokens))
        return sum(1 for _ in recent) / window_s

    def _on_event(self, event: str, **details: Any) -> None:
        if event == "tokens":
            self._tokens += [self.now()] * details["new"]
        elif event == "switch":
            if details["members"] != self.members[-1][1]:
                self.members.append((self.now(details["at"]), details["members"]))
                lost = f", lost {details['lost']}" if details["lost"] else ""
                self.note(f"epoch {details['epoch']}: ranks {details['members']}{lost}")
        elif event == "ended" and not details["expected"]:
            self.note(f"rank {details['rank']} is gone; its {details['requests']} prompts start again elsewhere")

    # --- Figures. ---

    def token_times(self) -> np.ndarray:
        return np.sort([self.now(at) for _, stream in self.streams for at in stream.times])

    def stream_gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """When each token came, and how long after the one before it in its stream; seconds."""
        pairs = [pair for _, stream in self.streams for pair in itertools.pairwise(stream.times)]
        after = np.array([self.now(b) for _, b in pairs])
        return after, np.array([b - a for a, b in pairs])

    def blocked_ms(self) -> dict[int, float]:
        return {epoch: ms for epoch, ms in self._router.blocked_ms().items() if epoch > self._first_epoch}

    def loss(self, killed_at: float) -> dict[str, float]:
        """From the kill to the epoch without the dead rank, and to the end of its first step on the last survivor."""
        lost = [s for s in self._router.switches if s["lost"] and s["at"] > killed_at]
        return {
            "kill_to_epoch_ms": 1e3 * (max(s["at"] for s in lost) - killed_at),
            "kill_to_step_ms": 1e3 * (max(s["first_step"] for s in lost) - killed_at),
        }


class View:
    """The terminal: live where there is one, else a line for each event."""

    def __init__(self, router: Router, recorder: Recorder, console: Console):
        self._router, self._recorder = router, recorder
        self._console, self._shown = console, 0

    async def run(self) -> None:
        live = Live(self._draw(), console=self._console, auto_refresh=False)
        with live if self._console.is_terminal else contextlib.nullcontext():
            while True:
                if self._console.is_terminal:
                    live.update(self._draw(), refresh=True)
                else:
                    for at, what in self._recorder.events[self._shown :]:
                        self._console.print(f"{at:6.2f} s  {what}  ({self._recorder.tokens_per_s():,.0f} tokens/s)")
                    self._shown = len(self._recorder.events)
                await asyncio.sleep(_VIEW_S)

    def _draw(self) -> Group:
        router, recorder = self._router, self._recorder
        blocked = recorder.blocked_ms()
        table = Table.grid(padding=(0, 2))
        table.add_row("members", " ".join(map(str, router.members)))
        table.add_row("epoch", str(router.epoch))
        table.add_row("tokens/s", f"{recorder.tokens_per_s():,.0f}")
        table.add_row("prompts", f"{router.running} in work, {router.waiting} waiting, {len(recorder.streams)} in all")
        table.add_row("last resize", f"blocked {blocked[max(blocked)]:.1f} ms" if blocked else "-")
        table.add_row("now", f"changing: {router.scaling}" if router.scaling else "serving")
        events = "\n".join(f"{at:6.2f} s  {what}" for at, what in recorder.events[-10:])
        return Group(Panel(table, title="elastic inference"), Panel(events or "-", title="events"))


async def finish(stream: Stream) -> list[int]:
    async for _ in stream:
        pass
    return stream.tokens


async def change_group(router: Router, recorder: Recorder, args: argparse.Namespace) -> tuple[list[Any], float]:
    """What --members says, and a kill; returns how long each change took, and time.monotonic() of the kill."""

    async def hold() -> None:
        for _ in range(args.rebalances):
            await asyncio.sleep(args.hold / args.rebalances)
            await router.rebalance()
        if not args.rebalances:
            await asyncio.sleep(args.hold)

    changes = []
    for ranks in args.members[1:]:
        await hold()
        recorder.note(f"scale to {ranks}")
        began = time.monotonic()
        await router.scale(ranks, drain_timeout_s=args.drain)
        changes.append({"ranks": ranks, "seconds": time.monotonic() - began})
    await hold()
    victim = router.members[len(router.members) // 2]
    recorder.note(f"kill rank {victim}")
    killed_at = router.kill(victim)
    async with asyncio.timeout(30):
        while victim in router.members or router.scaling:
            await asyncio.sleep(0.05)
    await hold()
    return changes, killed_at


async def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    options = Options(
        {"checkpoint": str(args.checkpoint)},
        max_ranks=args.max_ranks,
        experts_per_rank=args.experts_per_rank,
        rows=args.rows,
        context=MAX_PROMPT + args.tokens,
        detection_timeout_s=args.detect,
        max_queue=max(args.prompts, args.streams),
    )
    prompts = sample_prompts(args.prompts)
    async with Router(options) as router:
        console.print(f"starting {args.members[0]} ranks")
        await router.start(args.members[0])
        expected = await asyncio.gather(*(finish(router.submit(prompt, args.tokens)) for prompt in prompts))

        recorder, numbers = Recorder(router), itertools.count()

        async def keep_asking() -> None:
            while not recorder.over:
                number = next(numbers) % args.prompts
                stream = router.submit(prompts[number], args.tokens)
                recorder.streams.append((number, stream))
                try:
                    await finish(stream)
                except Unavailable:
                    recorder.lost += 1

        view = asyncio.create_task(View(router, recorder, console).run())
        asking = [asyncio.create_task(keep_asking()) for _ in range(args.streams)]
        try:
            changes, killed_at = await change_group(router, recorder, args)
        finally:
            recorder.over = True
            await asyncio.gather(*asking)
            view.cancel()

    blocked = recorder.blocked_ms()
    _, gaps = recorder.stream_gaps()
    times = recorder.token_times()
    streams = [stream for _, stream in recorder.streams]
    if args.plot:
        plot(args.plot, recorder)
    return {
        "resizes": len(blocked),
        "blocked_ms_median": statistics.median(blocked.values()),
        "blocked_ms_max": max(blocked.values()),
        "blocked_ms": [*blocked.values()],
        "recompiles": router.recompiles,
        "requests": len(streams),
        "requests_lost": recorder.lost,
        "requests_restarted": sum(stream.restarts > 0 for stream in streams),
        "tokens": len(times),
        "tokens_identical": all(
            stream.tokens == expected[number] and not stream.differing for number, stream in recorder.streams
        ),
        "tokens_per_s": len(times) / (times[-1] - times[0]),
        "longest_gap_ms": 1e3 * float(np.diff(times).max()),  # in which no stream got a token
        "longest_stream_gap_ms": 1e3 * float(gaps.max()),
        "detection_timeout_ms": 1e3 * args.detect,
        **recorder.loss(killed_at),
        "scale": changes,
        "members_timeline": recorder.members,
        "events": recorder.events,
    }


def plot(path: Path, recorder: Recorder) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (members, rate, gap) = pyplot.subplots(3, 1, figsize=(9, 6.5), sharex=True, height_ratios=[1, 2, 2])
    times = recorder.token_times()
    bins = np.arange(0.0, times[-1], _BIN_S)
    at, counts = zip(*[(at, len(ranks)) for at, ranks in recorder.members], strict=True)
    members.step([*at, times[-1]], [*counts, counts[-1]], where="post")
    members.set(ylabel="ranks", ylim=(0, max(counts) + 0.5), title="Serving while the group changes")
    rate.plot(bins[:-1] + _BIN_S / 2, np.histogram(times, bins)[0] / _BIN_S)
    rate.set(ylabel="tokens/s", ylim=(0, None))
    when, gaps = recorder.stream_gaps()
    of_bin = np.digitize(when, bins)
    longest = [1e3 * gaps[of_bin == i].max(initial=0) for i in range(1, len(bins))]
    gap.semilogy(bins[:-1] + _BIN_S / 2, longest)
    gap.set(ylabel="longest gap in a stream, ms", xlabel="seconds")
    for when_s, what in recorder.events:
        if what.startswith(("scale", "kill")):
            colour = "tab:red" if what.startswith("kill") else "tab:green"
            for axes in (members, rate, gap):
                axes.axvline(when_s, color=colour, linestyle=":")
            members.annotate(what, (when_s, 0.2), color=colour, xytext=(3, 0), textcoords="offset points")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    args = parse_args()
    console = Console(stderr=True)
    logging.basicConfig(handlers=[RichHandler(console=console, show_path=False)], format="%(message)s")
    result = asyncio.run(run(args, console))
    print(json.dumps({name: value for name, value in result.items() if name != "events"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["tokens_identical"] and not result["requests_lost"] else 1)


if __name__ == "__main__":
    main()
