"""`pytest bench`: the candidates of a case take turns, the error stands beside the time, ratios to the fastest peer.

    pytest bench                                         # all of it: half an hour on two cores
    pytest bench/test_loss.py -k "bfloat16 and usual"    # any part: cases and candidates are in the tests' names
    pytest bench --benchmark-json runs/bench.json        # every reading, with pytest-benchmark's statistics
    pytest bench -m smoke --benchmark-disable            # tiny, one call each: errors only (`make test`)

A test is one candidate on one case. The first test of a case lets all of its candidates that were selected run in
turn, round after round, so that a drift of the machine's speed meets them alike; every test then replays the readings
of its own candidate to pytest-benchmark. A ratio is the median over rounds of (the fastest peer's seconds / its own in
that round). Quote ratios, not seconds.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from candidates import times_the_fastest
from rich.console import Console
from rich.table import Table

# (name, whether to look at errors too) -> (seconds, what was seen). A round's figures are shown as medians over rounds.
Turn = Callable[[str, bool], tuple[float, dict[str, Any]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "the benchmarks of bench/")
    group.addoption("--rounds", type=int, default=5, help="timed turns of every candidate (default 5)")
    group.addoption("--hidden", default="", help="a file of tools/hidden_states.py, in place of made hidden states")
    group.addoption("--tokens", default="", help="test_loss: the usual fp32 case alone, at these sizes: 64,256,1024")
    group.addoption("--vocabulary", default="", help="test_loss: the same with these vocabularies")
    group.addoption("--memory", action="store_true", help="test_loss: peak memory too, each in a fresh process")


class Contest:
    """One case: what every candidate took in each round, what it got wrong, or why it has no readings."""

    def __init__(self, turn: Turn, names: list[str], rounds: int) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, BaseException] = {}
        for name in names:  # a warm-up too
            try:
                self.seen[name] = turn(name, True)[1]
            except (Exception, pytest.skip.Exception) as fault:
                self.faults[name] = fault
        self.seconds: dict[str, list[float]] = {name: [] for name in self.seen}
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in self.seen}
        for _ in range(rounds):
            for name, own in self.seconds.items():
                gc.collect()
                seconds, of_round = turn(name, False)
                own.append(seconds)
                figures[name].append(of_round)
        for name, rows in figures.items():
            self.seen[name] |= {key: statistics.median(row[key] for row in rows) for key in (rows[0] if rows else ())}
        peers = [name for name, seen in self.seen.items() if seen.pop("peer", False)]
        for name, ratio in times_the_fastest(self.seconds, peers).items() if rounds else ():
            self.seen[name] = {"× fastest peer": ratio, **self.seen[name]}
            if count := self.seen[name].pop("count", None):
                self.seen[name]["a second"] = count / statistics.median(self.seconds[name])


CONTESTS = pytest.StashKey[dict[str, Contest]]()
_replayed = 0.0


def replayed() -> float:
    """The clock that pytest-benchmark reads: it moves by what was read before."""
    return _replayed


def case_of(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    return f"{item.path.stem.removeprefix('test_')}: {item.callspec.params['case']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replayed))


@pytest.fixture
def in_turn(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Callable[[], Turn]], dict[str, Any]]:
    """Given what makes the case's inputs, returns what was seen of this test's candidate."""
    contests = request.config.stash.setdefault(CONTESTS, {})

    def run(prepare: Callable[[], Turn]) -> dict[str, Any]:
        node = request.node
        case, candidate = case_of(node), node.callspec.params["candidate"]
        if case not in contests:
            named = [i.callspec.params["candidate"] for i in request.session.items if case_of(i) == case]  # type: ignore[attr-defined]
            rounds = request.config.getoption("rounds") if benchmark.enabled else 0
            contests[case] = Contest(prepare(), named, rounds)
        contest = contests[case]
        if candidate in contest.faults:
            raise contest.faults[candidate]
        benchmark.group = case
        benchmark.extra_info |= {"case": case, "candidate": candidate, **contest.seen[candidate]}
        readings = iter(contest.seconds[candidate])

        def replay() -> None:
            global _replayed
            _replayed += next(readings, 0.0)

        benchmark.pedantic(replay, rounds=max(1, len(contest.seconds[candidate])))
        return contest.seen[candidate]

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the tables below in place of pytest-benchmark's


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from sgopd_kernels.backends.cpu import CpuBackend

    machine_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction set": CpuBackend().instruction_sets()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for case, contest in config.stash.get(CONTESTS, {}).items():
        if not any(contest.seconds.values()):
            continue
        columns = list(dict.fromkeys(column for seen in contest.seen.values() for column in seen))
        table = Table("", "median ms", "min–max", *columns, title=case, title_justify="left")
        for name, own in sorted(contest.seconds.items(), key=lambda entry: statistics.median(entry[1])):
            ms = [1e3 * s for s in (statistics.median(own), min(own), max(own))]
            cells = (show(contest.seen[name].get(column, "")) for column in columns)
            table.add_row(name, f"{ms[0]:.1f}", f"{ms[1]:.1f}–{ms[2]:.1f}", *cells)
        for name, fault in contest.faults.items():
            table.add_row(name, "–", str(fault).splitlines()[0][:60] if str(fault) else type(fault).__name__)
        terminalreporter.line("")
        Console(file=terminalreporter._tw._file, width=160).print(table)


def show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.1e}"
