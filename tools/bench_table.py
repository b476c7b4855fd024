"""What `pytest bench/test_loss.py --benchmark-json FILE` measured, as tables of a page; and as a short file to keep.

python tools/bench_table.py runs/fp32.json runs/bf16.json --keep bench/results/amx.json
python tools/bench_table.py bench/results/amx.json --page docs/benchmarks.md --mark amx
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import page

SHOWN = ("peak MiB", "loss error", "dH error", "dW error")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """One a candidate of a case: what it is, the seconds' statistics, and what was seen."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(stored, list):
        return stored
    cpu, commit = stored["machine_info"]["cpu"], stored["commit_info"]["id"][:12]
    best = next((isa for isa in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if isa in cpu.get("flags", ())), "")
    processor = f"{cpu.get('brand_raw', 'unknown')}, {best}"
    rows = []
    for benchmark in stored["benchmarks"]:
        seconds = {name: benchmark["stats"][name] for name in ("median", "min", "max", "rounds")}
        rows.append({**benchmark["extra_info"], **seconds, "processor": processor, "commit": commit})
    return [{key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def figure(value: Any) -> str:
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.1e}"


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = sorted((row for row in rows if row["case"] == case), key=lambda row: row["median"])
        shown = [name for name in SHOWN if any(name in row for row in of_case)]
        heads = [case.removeprefix("loss: "), "× fastest peer", "ms: median (min–max)", *shown]
        lines += ["", f"| {' | '.join(heads)} |"]
        lines.append("|---" * len(heads) + "|")
        for row in of_case:
            name = f"**{row['candidate']}** ({row['ran'].split()[-1]})" if "ran" in row else row["candidate"]
            times = "{:,.0f} ({:,.0f}–{:,.0f})".format(*(1e3 * row[key] for key in ("median", "min", "max")))
            ratio = row.get("× fastest peer")
            cells = [name, f"{ratio:.2f}" if ratio else "–", times, *(figure(row.get(key)) for key in shown)]
            lines.append(f"| {' | '.join(cells)} |")
    where = "; ".join(sorted({f"{row['processor']}, commit {row['commit']}" for row in rows}))
    return "\n".join([*lines, "", f"{where}; {max(row['rounds'] for row in rows)} rounds in turn at most."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of --benchmark-json, or what --keep wrote")
    parser.add_argument("--page", type=Path, help="write the tables between their marks on this page")
    parser.add_argument("--mark", default="bench", help="the marks' name (default bench)")
    parser.add_argument("--keep", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = [row for path in arguments.files for row in rows_of(path)]
    if arguments.keep:
        arguments.keep.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.page:
        page.write(arguments.page, arguments.mark, tables(rows))
    else:
        print(tables(rows))


if __name__ == "__main__":
    main()
