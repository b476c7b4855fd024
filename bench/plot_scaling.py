"""Time and memory against tokens or vocabulary, from `bench/loss.py --scale`: one PNG beside each JSON file.

pip install matplotlib
python bench/plot_scaling.py bench/results/scale_tokens.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    for argument in sys.argv[1:] or ["bench/results/scale_tokens.json"]:
        path = Path(argument)
        data = json.loads(path.read_text(encoding="utf-8"))
        figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2))
        for name in [row["peer"] for row in data["runs"][0]["rows"]]:
            rows = [(run["inputs"][data["scale"]], row) for run in data["runs"] for row in run["rows"]]
            points = [(size, row) for size, row in rows if row["peer"] == name]
            style = {"marker": "o", "linewidth": 2.2 if name.startswith("sgopd") else 1.2, "label": name}
            time.plot([s for s, _ in points], [r["seconds"] for _, r in points], **style)
            held = [(s, r["peak bytes"] / 2**20) for s, r in points if r.get("peak bytes") is not None]
            if held:
                memory.plot(*zip(*held, strict=True), **style)
        for axis, what in ((time, "forward + backward, s (median)"), (memory, "peak above inputs and gradients, MiB")):
            axis.set(xscale="log", yscale="log", xlabel=data["scale"], ylabel=what)
            axis.grid(alpha=0.3, which="both")
        time.legend(fontsize=8)
        inputs = data["runs"][0]["inputs"]
        figure.suptitle(f"{inputs['dtype']}, {data['processor']}, {data['runs'][0]['threads']} threads", fontsize=10)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=120)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
