"""Random resizes and deaths, with every row checked: `python -m jax_nixlep.soak`.

Ranks serve without end while the group changes to random members (holes, leavers, joiners, ranks that rejoin, the same
members again to rebalance) and random ranks are killed with SIGKILL: in the middle of a call, while they prepare, while
others read their weights, and between the first promise to hold and the switch. Each rank compares every row from
dispatch, every token from combine and the weights of every epoch with numpy, exactly. A killed rank is started again
and joins later. One rank, drawn from the seed, is never killed; what its process uses is measured again and again with
all ranks as members.

Fails on a hang, the end of a rank that was not killed, a wrong row, a recompile, a resize that does not happen though
nobody was killed, or a leak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_nixlep.crew import Crew, CrewError, Settings

KILLS_AT = ("call", "prepare", "sending", "commit")
DELAY_S = {"call": 2e-3, "prepare": 0.05, "sending": 0.05, "commit": 0.01}  # at most, after that moment
MEASURE_EVERY = 20  # rounds
STEPS = 5  # that every member does right after each change
# More is a leak, from the middle to the last third of the measurements: connections to the store and sockets of UCX
# come and go. Not from the first third: the heap of a process in which NIXL and UCX run grows for the first 200 changes
# or so (docs/results/soak.json).
GROWTH = {"rss_bytes": 8 << 20, "descriptors": 4, "threads": 2, "regions": 0}


class Soak:
    """A run: its random choices, and what was seen."""

    def __init__(self, args: argparse.Namespace, crew: Crew):
        self._args, self._crew = args, crew
        self._random = random.Random(args.seed)
        self._survivor = self._random.randrange(args.ranks)
        self._all = list(range(args.ranks))
        self._members, self._epoch = self._all, 1
        self._resizes = self._kills = 0
        self._refused: list[str] = []
        self._blocked_ms: list[float] = []
        self._kill_to_step_ms: dict[str, list[float]] = {at: [] for at in KILLS_AT}
        self._kill_to_restored_ms: list[float] = []  # of those that took experts along
        self._evicted_alive = 0
        self._used: list[dict[str, int]] = []
        self._recompiles = 0

    def run(self) -> dict[str, Any]:
        args, crew, began = self._args, self._crew, time.monotonic()
        for rank in self._all:
            crew.start(rank, self._all)
        crew.wait_right(self._all, STEPS)
        kinds = ["resize"] * args.resizes + ["kill"] * args.kills
        self._random.shuffle(kinds)
        for i, kind in enumerate(kinds):
            if i % MEASURE_EVERY == 0:
                self._measure()
            if kind == "resize":
                self._resize()
            else:
                self._kill()
            done = f"{self._resizes}/{args.resizes} resizes, {self._kills}/{args.kills} kills"
            print(f"[{time.monotonic() - began:6.0f} s] {done}; now {self._members}", flush=True)
        self._measure()
        return self._result(time.monotonic() - began)

    # --- What happens. ---

    def _choose(self) -> list[int]:
        """Other members: enough to serve all experts, of ranks that are there."""
        here = sorted(r for r in self._crew.reports() if r in self._crew.running)
        fewest = -(-self._args.experts // self._args.experts_per_rank)
        while len(here) < fewest:
            here = self._wait_here(self._all)
        count = self._random.randint(fewest, len(here))
        return sorted(self._random.sample(here, count))

    def _wait_here(self, ranks: Sequence[int]) -> list[int]:
        """Until the processes of `ranks` run and have said something."""
        self._crew.wait(lambda: set(ranks) <= set(self._crew.reports()), f"ranks {list(ranks)} to start")
        return list(ranks)

    def _ask(self, members: Sequence[int]) -> int:
        by = self._random.choice([r for r in self._members if r in self._crew.running])
        return self._crew.tell(by, do="resize", members=members, deadline_s=self._args.deadline)

    def _resize(self, members: Sequence[int] | None = None) -> None:
        crew, wanted = self._crew, list(members or self._choose())
        number = self._ask(wanted)
        crew.wait(lambda: crew.answer(number) is not None, f"the resize to {wanted}")
        if error := crew.answer(number):
            self._refused.append(error)
            print(f"refused: {error}", flush=True)
        self._settle(set(), newer=not error)
        if not error and self._members != wanted and not crew.switches(self._epoch):
            raise CrewError(f"soak: a resize to {wanted} must give those members; got {self._members}")
        self._resizes += members is None

    def _kill(self) -> None:
        crew, at, before = self._crew, self._random.choice(KILLS_AT), self._epoch
        if len(self._members) < 2:
            self._resize(self._wait_here(self._all))
        delay_s = self._random.uniform(0, DELAY_S[at])
        wanted = self._members if at == "call" else self._choose()
        # A rank that joins may be killed too while it prepares; only members before the change send, and hold.
        may_die = {*self._members, *wanted} if at == "prepare" else {*self._members}
        victim = self._random.choice(sorted(may_die - {self._survivor}))
        crew.tell(victim, do="die", at=at, delay_s=delay_s)
        number = None
        if at != "call":
            time.sleep(0.05)  # it now looks for its moment
            asker = self._random.choice([r for r in self._members if r != victim])  # who can answer
            number = crew.tell(asker, do="resize", members=wanted, deadline_s=self._args.deadline)
        crew.wait_gone([victim])
        died = crew.died(victim)
        was_member = victim in self._members
        if number is not None:
            crew.wait(lambda: crew.answer(number) is not None, f"the end of a resize to {wanted}")
            was_member = was_member or not crew.answer(number)
        self._settle({victim}, newer=was_member)
        for epoch in range(before + 1, self._epoch + 1):
            losses = [s for s in crew.switches(epoch).values() if victim in s["lost"]]
            if losses:
                ms = 1e3 * (max(s["right_at"] for s in losses) - died)
                restored = any(s["epochs"] > 1 for s in losses)
                (self._kill_to_restored_ms if restored else self._kill_to_step_ms[at]).append(ms)
        self._kills += 1
        crew.start(victim)

    def _settle(self, dead: set[int], *, newer: bool) -> None:
        """Until the members agree, without the `dead`, and are right, in a `newer` epoch than the last time; counts
        what the epochs since then cost."""
        crew, before = self._crew, self._epoch
        self._epoch, self._members = crew.wait_settled(STEPS, after=before if newer else 0, dead=dead)
        for epoch in range(before + 1, self._epoch + 1):
            switches = crew.switches(epoch).values()
            lost = {r for s in switches for r in s["lost"]}
            self._evicted_alive += len(lost - dead)
            if switches and not lost and all(s["epochs"] == 1 or not s["blocked_s"] for s in switches):
                self._blocked_ms.append(1e3 * max(s["blocked_s"] for s in switches))
                if self._blocked_ms[-1] > 100:
                    print(f"epoch {epoch}: {switches}", flush=True)
        self._recompiles = max([self._recompiles, *(r["compiled"] - 1 for r in crew.reports().values())])

    def _measure(self) -> None:
        """What the survivor uses with all ranks as members."""
        self._wait_here(self._all)
        self._resize(self._all)
        self._resize(self._all)  # at rest: nothing of the change before
        self._used.append(self._crew.measure(self._survivor))
        print(f"survivor {self._survivor}: {self._used[-1]}", flush=True)

    # --- What it amounts to. ---

    def _result(self, seconds: float) -> dict[str, Any]:
        used = self._used[1:] or self._used  # the first measurement is before any change
        third = max(1, len(used) // 3)

        def growth(what: str) -> float:
            middle, last = used[-2 * third : -third], used[-third:]
            return statistics.median(u[what] for u in last) - statistics.median(u[what] for u in middle or last)

        grown = {what: growth(what) for what in GROWTH}
        kills = [ms for of in self._kill_to_step_ms.values() for ms in of]
        return {
            "settings": {k: v for k, v in vars(self._args).items() if k != "json"},
            "cores": len(os.sched_getaffinity(0)),
            "seconds": seconds,
            "resizes": self._resizes,
            "refused": self._refused,
            "kills": self._kills,
            "evicted_alive": self._evicted_alive,
            "commits": len(self._blocked_ms),
            "blocked_ms_median": statistics.median(self._blocked_ms),
            "blocked_ms_max": max(self._blocked_ms),
            "kill_to_step_ms_median": statistics.median(kills) if kills else 0.0,
            "kill_to_step_ms_max": max(kills, default=0.0),
            "kill_to_step_ms": self._kill_to_step_ms,
            "kill_to_restored_ms": self._kill_to_restored_ms,
            "detection_timeout_ms": 1e3 * self._args.detect,
            "recompiles": self._recompiles,
            "steps_checked": self._crew.reports()[self._survivor]["steps"],  # a wrong row ends its rank, and this run
            "growth": grown,
            "measured": self._used,
            "leaks": sorted(what for what, by in grown.items() if by > GROWTH[what]),
        }


def table(result: dict[str, Any]) -> str:
    rows = {
        "resizes": f"{result['resizes']} ({len(result['refused'])} refused)",
        "kills": f"{result['kills']} ({result['evicted_alive']} living ranks given up)",
        "blocked ms": f"median {result['blocked_ms_median']:.1f}, worst {result['blocked_ms_max']:.1f} "
        f"of {result['commits']} commits",
        "kill to step ms": f"median {result['kill_to_step_ms_median']:.0f}, worst {result['kill_to_step_ms_max']:.0f}, "
        f"detection timeout {result['detection_timeout_ms']:.0f}",
        "recompiles": str(result["recompiles"]),
        "steps checked": f"{result['steps_checked']} by the survivor, every row right",
        "leaks": ", ".join(result["leaks"]) or "none",
        "growth": ", ".join(f"{what} {grown:+.0f}" for what, grown in result["growth"].items()),
    }
    return "\n".join(f"{name:<16} {text}" for name, text in rows.items())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jax_nixlep.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resizes", type=int, default=300)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=4, help="processes (4)")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-rank", type=int, default=4, help="slots of a rank (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", default="shared", choices=("shared", "nixl"))
    parser.add_argument("--detect", type=float, default=0.5, metavar="SECONDS", help="detection timeout (0.5)")
    parser.add_argument("--deadline", type=float, default=20.0, metavar="SECONDS", help="of a change (20)")
    parser.add_argument("--hang", type=float, default=60.0, metavar="SECONDS", help="what counts as a hang (60)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
      CrewError: a hang, a rank that ended, or a wrong row.
    """
    settings = Settings(
        max_ranks=args.ranks,
        num_experts=args.experts,
        experts_per_rank=args.experts_per_rank,
        detect_s=args.detect,
        join_s=1e4,
        bulk=1 << 16,
        move_bytes_per_s=20e6,  # so slow that a kill meets it
        rejoins=True,
    )
    env = {"JAX_NIXLEP_P2P": "0" if args.transport == "nixl" else "1"}
    with Crew(settings, timeout_s=args.hang, env=env) as crew:
        return Soak(args, crew).run()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    result = run(args)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 1 if result["leaks"] or result["recompiles"] or result["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
