r"""Precision and recall of `VerifierPool("math")` beside plain math-verify, on hand-checked answers, as Markdown.

    python tools/verifier_accuracy.py             the table, and whether the pool's size changes a verdict
    python tools/verifier_accuracy.py --wrong     and every row that our verifier gets wrong
    python tools/verifier_accuracy.py --page docs/trials.md       and puts the table into that page

The rows are in tests/sgopd/corpora: those the rules were written against (answers_rules.txt), rows written later and
then used to better them (answers_later.txt), rows of that same sitting that were set aside (answers_unseen.txt), rows
by someone who had not read the rules (answers_blind.txt), some of which led to a rule afterwards, and rows by a third
hand over what had gone wrong elsewhere: answers_dev.txt, on which rules were bettered, and answers_heldout.txt, whose
first figures are in docs/trials.md. An interval is Wilson's, at 95 %: what the share may be on further rows of
the same kind. "Plain math-verify" is its documented use, with its defaults: `verify(parse(gold), parse(response))`,
the gold in a box. Endorsed means verdict correct; a gold that cannot be read (unknown) counts as not endorsed.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import page

CORPORA = Path(__file__).resolve().parent.parent / "tests" / "sgopd" / "corpora"
FILES = tuple(f"answers_{name}.txt" for name in ("rules", "later", "unseen", "blind", "dev", "heldout"))
POOLS = (1, 2, 4)


class Row(NamedTuple):
    form: str  # the heading it stands under
    gold: str
    response: str
    correct: bool

    def __str__(self) -> str:
        return f"{self.gold} {'=' if self.correct else '!'} {self.response}"


def read(name: str) -> list[Row]:
    """The rows of a corpus; an answer that is not a whole response is put in a box."""
    rows, form = [], ""
    for line in (CORPORA / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            form = line[2:]
        elif line:
            gold, sign, answer = line.split(" | ", 2)
            whole = sign.endswith("r")
            response = answer if whole else rf"So the answer is $\boxed{{{answer}}}$."
            rows.append(Row(form, gold.replace("⏎", "\n"), response.replace("⏎", "\n"), sign[0] == "="))
    return rows


def reasons(rows: list[Row], workers: int = 2) -> list[str]:
    from sgopd.verifier import VerifierPool

    with VerifierPool("math", workers=workers, timeout=10.0) as pool:
        verdicts = pool.verify([row.response for row in rows], [{"answer": row.gold} for row in rows])
    return [verdict.reason for verdict in verdicts]


def ours(rows: list[Row]) -> list[int]:
    from sgopd.verifier import VALUES

    return [VALUES[reason] for reason in reasons(rows)]


def math_verify(rows: list[Row]) -> list[int]:
    from math_verify import parse, verify

    from sgopd.grading import reference_answer

    logging.disable(logging.ERROR)
    verdicts = []
    for row in rows:
        gold = reference_answer({"answer": row.gold})
        verdicts.append(1 if verify(parse(rf"\boxed{{{gold}}}"), parse(row.response)) else -1)
    logging.disable(logging.NOTSET)
    return verdicts


def figures(rows: list[Row], verdicts: list[int]) -> dict[str, float]:
    pairs = [(row.correct, verdict) for row, verdict in zip(rows, verdicts)]
    right = pairs.count((True, 1))
    endorsed = sum(verdict == 1 for _, verdict in pairs)
    return {
        "precision": right / endorsed,
        "recall": right / sum(correct for correct, _ in pairs),
        "false_correct": endorsed - right,
        "false_incorrect": pairs.count((True, -1)),
        "unknown": sum(verdict == 0 for _, verdict in pairs),
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.96, successes / trials
    middle = share + z * z / (2 * trials)
    width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - width) / (1 + z * z / trials)), min(1.0, (middle + width) / (1 + z * z / trials))


def share(successes: float, trials: float) -> str:
    low, high = wilson(round(successes), round(trials))
    return f"{100 * successes / trials:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", action="store_true", help="list the rows that our verifier gets wrong")
    parser.add_argument("--plain-wrong", action="store_true", help="list the rows that plain math-verify gets wrong")
    parser.add_argument("--page", type=Path, help="write the table between its marks on this page")
    parser.add_argument("--files", nargs="+", default=list(FILES), help="corpora to read")
    arguments = parser.parse_args()
    graders: dict[str, Callable[[list[Row]], list[int]]] = {"sgopd": ours, "plain math-verify": math_verify}
    lines = [
        "| rows | verifier | precision, % (95 %) | recall, % (95 %) | wrong endorsed | right rejected | unknown |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    wrong = []
    for name in arguments.files:
        rows = read(name)
        for grader, verdicts in ((grader, grade(rows)) for grader, grade in graders.items()):
            f = figures(rows, verdicts)
            right, endorsed = sum(row.correct for row in rows), sum(verdict == 1 for verdict in verdicts)
            lines.append(
                f"| {name} ({len(rows)}) | {grader} | {share(endorsed - f['false_correct'], endorsed)} "
                f"| {share(f['recall'] * right, right)} "
                f"| {f['false_correct']:.0f} | {f['false_incorrect']:.0f} | {f['unknown']:.0f} |"
            )
            print(lines[-1], flush=True)
            if arguments.wrong if grader == "sgopd" else arguments.plain_wrong:
                wrong += [(name, grader, row, v) for row, v in zip(rows, verdicts) if (v == 1) != row.correct]
    for name, grader, row, verdict in wrong:
        print(f"{grader} on {name}, {row.form}: {row} -> {verdict:+d}")

    everything = [row for name in arguments.files for row in read(name)]
    verdicts_of = {workers: reasons(everything, workers) for workers in POOLS}
    different = [row for row, *said in zip(everything, *verdicts_of.values()) if len(set(said)) > 1]
    print(f"\n{len(everything)} rows, pools of {', '.join(map(str, POOLS))} workers: {len(different)} verdicts differ")
    for row in different:
        print(f"differs: {row}")
    if different:
        sys.exit("the size of the pool changed a verdict")
    if arguments.page:
        pools = f"{len(everything)} rows; pools of {', '.join(map(str, POOLS))} workers gave the same verdicts."
        page.write(arguments.page, "accuracy", "\n".join([*lines, "", pools]))


if __name__ == "__main__":
    main()
