"""Runs an elastic plan file of NIXL-EP on this machine, and checks every row.

    python -m jax_nixlep.plan PLAN.json

A plan is a JSON list of phases, each a list of rank ids. A negative id takes part in its phase and is killed (SIGKILL,
in the middle of a call) at its end; a rank that a phase does not list leaves before it, and may come back. Every rank
is a process. In each phase every member compares every row it gets from dispatch, and every token from combine, with
numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_nixlep.crew import Crew, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 if every phase was right."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_nixlep.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="steps that every member checks in every phase")
    parser.add_argument("--experts-per-rank", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="tokens that each rank brings to a step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument(
        "--detect", type=float, default=2.0, metavar="SECONDS", help="how long a rank waits for another"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for each phase")
    args = parser.parse_args(argv)
    plan = json.loads(args.plan.read_text())
    check_plan(plan)
    experts = min(sum(r >= 0 for r in phase) for phase in plan) * args.experts_per_rank
    settings = Settings(
        max_ranks=max(abs(r) for phase in plan for r in phase) + 1,
        num_experts=experts,
        experts_per_rank=args.experts_per_rank,
        tokens=args.tokens,
        hidden=args.hidden,
        top_k=min(args.top_k, experts),
        detect_s=args.detect,
    )
    with Crew(settings, timeout_s=args.timeout) as crew:
        for i in range(len(plan)):
            run_phase(crew, plan, i, args.steps)
        last = survivors(plan[-1])
        crew.tell(last[0], do="end")
        crew.wait_gone(last)
    print(f"all {len(plan)} phases right")
    return 0


def check_plan(plan: Any) -> None:
    """
    Raises:
      ValueError: not a plan; says where.
    """
    if not isinstance(plan, list) or not plan:
        raise ValueError(f"plan: must be a list of phases; got {plan!r}; see python -m jax_nixlep.plan --help")
    for i, phase in enumerate(plan):
        whole = isinstance(phase, list) and phase and all(isinstance(r, int) for r in phase)
        if not whole or len({abs(r) for r in phase}) != len(phase):
            raise ValueError(f"plan: phase {i} must be a list of distinct rank ids; got {phase!r}; correct it")
        if all(r < 0 for r in phase):
            raise ValueError(f"plan: phase {i} must leave a survivor; got {phase!r}; make an id positive")
        if i and not ({abs(r) for r in phase} & {r for r in plan[i - 1] if r >= 0}):
            raise ValueError(f"plan: phase {i} must keep a member of the phase before; got {phase!r}; correct it")


def survivors(phase: Sequence[int]) -> list[int]:
    return sorted(r for r in phase if r >= 0)


def run_phase(crew: Crew, plan: Sequence[Sequence[int]], i: int, steps: int) -> None:
    """
    Raises:
      CrewError: a rank ended, got something wrong, or was not done in time.
    """
    members = sorted(abs(r) for r in plan[i])
    killed = sorted(-r for r in plan[i] if r < 0)
    began = time.monotonic()
    for rank in members:
        if rank not in crew.running:
            crew.start(rank, None if i else members)
    before = survivors(plan[i - 1]) if i else members
    if before != members:
        crew.tell(next(r for r in before if r in members), do="resize", members=members)
    crew.wait_right(members, steps)
    print(f"phase {i}: ranks {members} right after {time.monotonic() - began:.1f} s", flush=True)
    crew.wait_gone(r for r in before if r not in members)
    if killed:
        began = time.monotonic()
        for rank in killed:
            crew.tell(rank, do="die", at="call", delay_s=float(np.random.default_rng().uniform(0, 2e-3)))
        crew.wait_gone(killed)
        crew.wait_right(survivors(plan[i]), steps)
        done = f"ranks {survivors(plan[i])} right after {time.monotonic() - began:.1f} s"
        print(f"phase {i}: killed {killed}; {done}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
