"""The output of `run.sh phases` as the comparison with upstream:

    python compare.py COPY_TB_S phases.txt... > phases.json

COPY_TB_S: a device-to-device copy on the same GPU, bytes read and written (kernel_phases prints it).
"""

import ast
import json
import statistics
import sys
from pathlib import Path


def main(copy_tb_s, paths):
    cases = {}
    for path in paths:
        side = key = None
        for line in Path(path).read_text().splitlines():
            if "experts/rank top_k" in line:
                numbers = line.split("=")[1].split()
                side = "ours" if line.startswith("ours") else "upstream"
                factor = float(numbers[-1]) if side == "ours" else None
                key = tuple(map(int, numbers[:7]))
                if side == "ours" and key in cases and "upstream" in cases[key]:
                    key = None  # a further variant of ours, without a counterpart
            elif key and line[:1].isdigit():
                row = ast.literal_eval(line.split(" ", 1)[1].strip().replace("null", "None"))
                cases.setdefault(key, {}).setdefault(side, []).append(row)
                if side == "ours":
                    cases[key]["factor"] = factor
    phases = []
    for (ranks, tokens, hidden, experts, top_k, _, fp8), sides in cases.items():
        if not sides.get("ours") or not sides.get("upstream"):
            continue
        us = {s: [round(statistics.median(c), 1) for c in zip(*(r["us"] for r in sides[s]), strict=True)]
              for s in ("ours", "upstream")}  # fmt: skip
        dispatched = hidden * (1 if fp8 else 2) + (hidden // 32 if fp8 else 0)
        limit_us = (1 + top_k) * tokens * (dispatched + 2 * hidden) / copy_tb_s * 1e-6
        phases.append({
            "ranks": ranks, "tokens": tokens, "hidden": hidden, "experts_per_rank": experts, "top_k": top_k,
            "wire": "fp8" if fp8 else "bf16", "rows": sides["ours"][0]["rows"],
            "ours_us": us["ours"], "upstream_us": us["upstream"],
            "ours_sum_us": round(sum(us["ours"]), 1), "upstream_sum_us": round(sum(us["upstream"]), 1),
            "ratio": round(sum(us["ours"]) / sum(us["upstream"]), 3),
            "copy_limit_fraction": round(limit_us / sum(us["ours"]), 3),
            "ours_buffer_MB": sides["ours"][0]["buffer_MB"], "upstream_buffer_MB": sides["upstream"][0]["buffer_MB"],
        })  # fmt: skip
    print(json.dumps({"phases": phases}, indent=1))


main(float(sys.argv[1]), sys.argv[2:])
