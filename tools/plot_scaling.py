"""Time and memory against tokens or vocabulary, from a run of the loss's benchmark: one PNG beside each JSON file.

pytest bench/test_loss.py --tokens 64,256,1024,4096 --memory --benchmark-json runs/tokens.json
python tools/plot_scaling.py runs/tokens.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(path: Path) -> Path:
    data = json.loads(path.read_text(encoding="utf-8"))
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    what = ""
    for one in data["benchmarks"]:
        if found := re.search(r"(\d+) (tokens|columns)", one["extra_info"]["case"]):
            what = found[2]
            lines[one["extra_info"]["candidate"]].append((int(found[1]), one))
    if not lines:
        raise SystemExit(f"{path} has no sizes: run bench/test_loss.py with --tokens or --vocabulary")
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, rows in lines.items():
        style = {"marker": "o", "linewidth": 2.2 if name.startswith("sgopd") else 1.2, "label": name}
        time.plot([size for size, _ in rows], [one["stats"]["median"] for _, one in rows], **style)
        peaks = [(size, one["extra_info"].get("peak MiB")) for size, one in rows]
        if held := [pair for pair in peaks if pair[1] is not None]:
            memory.plot(*zip(*held), **style)
    for axis, label in ((time, "seconds (median)"), (memory, "peak above inputs and gradients, MiB")):
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel=label)
        axis.grid(alpha=0.3, which="both")
    time.legend(fontsize=8)
    machine = data["machine_info"]
    title = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['threads']} threads"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="of --benchmark-json")
    for path in parser.parse_args().files:
        print(plot(path))


if __name__ == "__main__":
    main()
