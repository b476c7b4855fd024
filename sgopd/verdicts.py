"""Whether the verifier verifies: a batch of answers on which it only fails is no measurement."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from sgopd.config import UserError
from sgopd.processes import Processes
from sgopd.verifier import Verdict

FAULTS = ("error", "timeout", "crashed")
NOT_READ = (
    "truncated",
    "bad_gold",
)  # not the verifier's doing: the one is a setting's, the other was said at the start
PATIENCE = 8  # faults in a row that hostile answers may cause, once the verifier has given a verdict


@contextlib.contextmanager
def verifying() -> Iterator[None]:
    """Makes of a pool that cannot work (its workers do not start, an example cannot be sent) a UserError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"verifier: {error}") from error


class VerdictWatch:
    """Ends a run whose verifier fails on everything it reads, over all processes together.

    A batch without a word of the verifier's ends the run if there was none before, or at the PATIENCE-th fault since:
    single answers may run past the deadline. None from a custom verifier is a word; nothing else in the first batch is
    worth a warning.

    Args:
        say: receives that line.
    """

    def __init__(self, processes: Processes, say: Callable[[str], None]) -> None:
        self.processes = processes
        self.say = say
        self.given = 0  # words of the verifier so far
        self.faults = 0  # … and faults since the last

    def see(self, verdicts: Sequence[Verdict]) -> None:
        """Takes note of this process's verdicts in a batch. Every process has to call it, and raises if any does.

        Raises:
            UserError: the verifier fails.
        """
        mine = [(verdict.reason, verdict.detail) for verdict in verdicts if verdict.reason not in NOT_READ]
        seen = self.processes.gather(mine)
        faults = [(reason, detail) for reason, detail in seen if reason in FAULTS]
        given = len(seen) - len(faults)
        self.given += given
        self.faults = 0 if given else self.faults + len(faults)
        if faults and not given and (self.given == 0 or self.faults >= PATIENCE):
            counts = ", ".join(f"{reason} {count}" for reason, count in Counter(reason for reason, _ in faults).items())
            detail = next((detail for _, detail in reversed(faults) if detail), "")
            raise UserError(
                f"verifier: no verdict on any of the {len(faults)} answers that it was given ({counts}), so there is "
                f"nothing to train on or to measure. The last one: {detail or faults[-1][0]}. Put the verifier right; "
                "for timeouts raise verifier_timeout, for crashes verifier_memory_mb"
            )
        if given == self.given and seen and all(reason == "unknown" for reason, _ in seen):
            self.say(
                f"warning: the verifier returned None for all {len(seen)} answers of its first batch: they train as "
                "plain distillation with most gates (docs/gates.md), and count as not correct in an evaluation"
            )
