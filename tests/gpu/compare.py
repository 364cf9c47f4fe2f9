"""The output of `run.sh phases` as the comparison with upstream:

    python compare.py COPY_TB_S phases.txt... > phases.json

COPY_TB_S: a device-to-device copy on the same GPU, bytes read and written (kernel_phases prints it).
"""

import json
import statistics
import sys
from pathlib import Path


def cases_of(paths):
    """{case: {"ours" or "nixl_ep": the rows of its ranks}}; of several capacity factors, the first."""
    cases = {}
    for line in "".join(Path(path).read_text() for path in paths).splitlines():
        if line.startswith("{"):
            case = json.loads(line)
            side, _ = case.pop("side"), case.pop("capacity_factor")
            rows: list = []
            cases.setdefault(tuple(case.items()), {}).setdefault(side, rows)
        elif line[:1].isdigit():
            rows.append(json.loads(line.split(" ", 1)[1]))
    return {case: sides for case, sides in cases.items() if len(sides) == 2}


def main(copy_tb_s, paths):
    phases = []
    for case, sides in cases_of(paths).items():
        of = dict(case)
        ours, upstream = (
            [round(statistics.median(column), 1) for column in zip(*(row["us"] for row in sides[side]), strict=True)]
            for side in ("ours", "nixl_ep")
        )
        dispatched = of["hidden"] + of["hidden"] // 32 if of["fp8"] else of["hidden"] * 2
        limit_us = (1 + of["top_k"]) * of["tokens"] * (dispatched + 2 * of["hidden"]) / copy_tb_s * 1e-6
        phases.append({
            "ranks": of["ranks"], "tokens": of["tokens"], "hidden": of["hidden"], "experts_per_rank": of["experts"],
            "top_k": of["top_k"], "wire": "fp8" if of["fp8"] else "bf16", "rows": sides["ours"][0]["rows"],
            "ours_us": ours, "upstream_us": upstream,
            "ours_sum_us": round(sum(ours), 1), "upstream_sum_us": round(sum(upstream), 1),
            "ratio": round(sum(ours) / sum(upstream), 3),
            "copy_limit_fraction": round(limit_us / sum(ours), 3),
            "ours_buffer_MB": sides["ours"][0]["buffer_MB"], "upstream_buffer_MB": sides["nixl_ep"][0]["buffer_MB"],
        })  # fmt: skip
    print(json.dumps({"phases": phases}, indent=1))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
