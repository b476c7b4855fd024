"""Everything this project wants to know from a GPU, in one command, on one bare machine with PyTorch and Triton.

    python tools/gpu_suite.py --minutes 8 --output runs/gpu         # runs/gpu/results.json, results.md, logs
    python tools/gpu_suite.py --dry-run --output runs/dry           # the same code on the CPU, tiny, Triton interpreted

In this order, so that a run that is cut early has the most important things: the environment and the two ceilings of
the device; tests/gpu; a call's stages, each alone; the target shape, our plans beside the peers and beside the bare
products, interleaved, with the error of loss, dH and dW against float64 beside every time; a trace of one call, and
what ncu says of the row kernel; the same on other distributions; a sweep of chunk sizes and tiles. Both files are
written anew after every reading. Measuring happens in child processes: a kernel that takes the device's context down
loses its own row, and the rest goes on. What is not installed, not built, out of memory or wrong has a row that says
so. docs/gpu.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import roofline

if TYPE_CHECKING:
    from candidates import Meter

ROOT = Path(__file__).resolve().parent.parent
MARK = "@@ "  # a child's line that is a record
# Share of the time that is left when a stage begins, relative to the stages after it.
WEIGHTS = {"environment": 1, "tests": 7, "pieces": 4, "target": 8, "trace": 1, "ncu": 1, "distributions": 3, "sweep": 3}
MEASURED = ("pieces", "target", "trace", "ncu", "distributions", "sweep")  # one child
RESTARTS = 4
GRACE = 20.0  # seconds beyond its time after which a child is killed
SILENCE = 120.0  # seconds without a word after which it is: a kernel that doesn't end; compilation takes less

Record = dict[str, Any]


# ---- the parent: starts children, keeps what they say, never touches the device


class Results:
    """What is known so far; on disk after every change."""

    def __init__(self, folder: Path, settings: Record) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.data: Record = {
            "settings": settings,
            "environment": {},
            "stages": {name: {"status": "not reached"} for name in WEIGHTS},
            "tests": {},
            "tables": {},
        }
        self.write()

    def add(self, record: Record) -> None:
        record = dict(record)
        kind = record.pop("kind")
        if kind == "row":
            table = self.data["tables"].setdefault(record.pop("table"), {"facts": {}, "rows": {}})
            table["rows"].setdefault(record.pop("name"), {}).update(record)
        elif kind == "facts":
            self.data["tables"].setdefault(record.pop("table"), {"facts": {}, "rows": {}})["facts"].update(record)
        elif kind == "stage":
            self.data["stages"][record.pop("name")] = record
        else:
            self.data[kind].update(record)
        self.write()

    def write(self) -> None:
        for name, text in (("results.json", json.dumps(self.data, indent=1)), ("results.md", markdown(self.data))):
            half = self.folder / f".{name}"
            half.write_text(text + "\n", encoding="utf-8")
            half.replace(self.folder / name)


def environment_of_children(args: argparse.Namespace) -> dict[str, str]:
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.source or importlib.util.find_spec("sgopd_kernels") is None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env["SGOPD_TEST_SOURCE"] = "1"
    if args.dry_run:
        env.update(TRITON_INTERPRET="1", SGOPD_GPU_DRY_RUN="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return env


def follow(
    command: list[str], env: dict[str, str], until: float, log: Path, hear: Callable[[Record], None]
) -> tuple[str, list[str]]:
    """Runs a child and hears its records: ("" where it ended well, else how it ended; its last lines)."""
    last: list[str] = []
    killed, quiet, over = "", 0.0, threading.Event()
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def watch() -> None:
        nonlocal killed, quiet
        while not over.wait(0.5):
            quiet += 0.5  # counted, not read off a clock: a machine that slept has not been silent
            if time.time() > until + GRACE:
                killed = "killed: it was over its time"
            elif quiet > SILENCE:
                killed = f"killed: nothing heard of it for {SILENCE:.0f} s"
            if killed:
                child.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert child.stdout is not None
    with log.open("a", encoding="utf-8") as kept:
        try:
            for line in child.stdout:
                quiet = 0.0
                if line.startswith(MARK):
                    hear(json.loads(line[len(MARK) :]))
                else:
                    kept.write(line)
                    last = [*last[-19:], line.rstrip()]
            status = child.wait()
        finally:
            over.set()
            child.kill()
    watcher.join()
    return killed or ("" if status == 0 else f"the process died ({status})"), last


def measure(results: Results, command: list[str], stages: list[str], env: dict[str, str], ends: float) -> None:
    """The measuring child, started again without the candidate that took it down."""
    without: list[str] = []
    running: Record = {}

    def hear(record: Record) -> None:
        if record["kind"] == "running":
            running.update(record)
            return
        if record["kind"] == "stage" and record["status"] != "running" and record["name"] in stages:
            stages.remove(record["name"])
        results.add(record)

    for _ in range(RESTARTS + 1):
        child = [*command, "--child", ",".join(stages), "--until", str(ends)]
        for name in without:
            child += ["--without", name]
        running.clear()
        why, last = follow(child, env, ends, results.folder / "measure.log", hear)
        if not why:
            return
        if not why.startswith("killed"):
            why += f": {' / '.join(last[-3:])}"
        if not running:
            break
        results.add({"kind": "row", "table": running["table"], "name": running["name"], "status": why})
        without.append(f"{running['table']}:{running['name']}")
        if time.time() > ends:
            break
    for name in stages:
        if results.data["stages"][name]["status"] in ("running", "not reached"):
            results.add({"kind": "stage", "name": name, "status": "cut", "why": why})


def device_tests(results: Results, env: dict[str, str], until: float) -> None:
    began, report, log = time.time(), results.folder / "tests.xml", results.folder / "tests.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-ra", f"--junitxml={report}"]
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(command, cwd=results.folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        status = "done"
        try:
            child.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            status = "cut"
            child.send_signal(signal.SIGINT)  # pytest then writes its report
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    if report.exists():
        results.add({"kind": "tests", **summary(report)})
    if (status == "done" and child.returncode not in (0, 1)) or not report.exists():
        status = f"failed: pytest ended with {child.returncode}, see {log.name}"
    results.add({"kind": "stage", "name": "tests", "status": status, "seconds": round(time.time() - began, 1)})


def summary(report: Path) -> Record:
    """Counts, what failed and why, what was skipped and why, of a JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed, skipped = {}, Counter[str]()
    for case in cases:
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        for bad in (*case.iter("failure"), *case.iter("error")):
            failed[name] = (bad.get("message") or "").split("\n")[0][:300]
        for skip in case.iter("skipped"):
            skipped[skip.get("message") or ""] += 1
    count = len(cases)
    return {
        "run": count,
        "passed": count - len(failed) - sum(skipped.values()),
        "failed": failed,
        "skipped": dict(skipped),
    }


def parent(args: argparse.Namespace) -> int:
    began = time.time()
    ends = began + 60 * args.minutes
    settings = {"minutes": args.minutes, "dry run": args.dry_run, "began": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    results = Results(args.output, settings)
    env = environment_of_children(args)
    command = [sys.executable, str(Path(__file__).resolve()), "--output", str(args.output)]
    command += ["--dry-run"] if args.dry_run else []

    def share(name: str) -> float:
        """When the stage has to end, if all after it are to have their part."""
        names = list(WEIGHTS)
        later = sum(WEIGHTS[n] for n in names[names.index(name) :])
        return time.time() + max(0.0, ends - time.time()) * WEIGHTS[name] / later

    measure(results, command, ["environment"], env, ends)
    if results.data["stages"]["environment"]["status"] != "done":
        print(f"no device could be used; see {args.output / 'results.md'}", file=sys.stderr)
        return 1
    device_tests(results, env, share("tests"))
    measure(results, command, list(MEASURED), env, ends)
    results.add({"kind": "settings", "seconds": round(time.time() - began, 1)})
    print((args.output / "results.md").read_text(encoding="utf-8"))
    return int(not good(results.data))


def good(data: Record) -> bool:
    """Every stage ran, no test failed, and nothing of ours did; what peers do is theirs."""
    rows = [r for table in data["tables"].values() for r in table["rows"].values() if r.get("group") == "ours"]
    return (
        all(s["status"] in ("done", "cut") for s in data["stages"].values())
        and not data["tests"].get("failed")
        and not any(r["status"].startswith(("failed", "killed", "the process")) for r in rows)
    )


# ---- the child: measures


def say(kind: str, **fields: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **fields}), flush=True)


def child(args: argparse.Namespace) -> None:
    if args.dry_run:
        runpy.run_path(str(ROOT / "tests" / "triton" / "interpreter.py"))  # before anything imports Triton
    import torch
    from candidates import Meter

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: torch.cuda.is_available() is False; --dry-run runs on the CPU")
    meter = Meter("cpu" if args.dry_run else "cuda")
    stages = args.child.split(",")
    names = list(WEIGHTS)
    for name in stages:
        later = sum(WEIGHTS[n] for n in names[names.index(name) :] if n in stages)
        until = time.time() + max(0.0, args.until - time.time()) * WEIGHTS[name] / later
        began = time.time()
        say("stage", name=name, status="running")
        cut = STAGES[name](meter, args, until)
        say("stage", name=name, status="cut" if cut else "done", seconds=round(time.time() - began, 1))


def nvidia_smi(*fields: str) -> dict[str, str]:
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"nvidia-smi": "not available"}
    return dict(zip(fields, (word.strip() for word in done.stdout.splitlines()[0].split(","))))


CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit", "clocks_throttle_reasons.active")


def environment(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    """Versions, device, clocks; the rates of a large product and a large copy, which the roofline is drawn with."""
    import torch

    import sgopd_kernels

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    facts: Record = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": triton_version,
        "sgopd_kernels": str(Path(sgopd_kernels.__file__).parent),
        "commit": git_commit(),
    }
    if meter.cuda:
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory GiB": round(p.total_memory / 2**30, 1),
            "devices": torch.cuda.device_count(),
            **nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem"),
            "idle": nvidia_smi(*CLOCKS),
        }
    else:
        facts["device"] = "CPU, Triton interpreted: a dry run, no figure here means anything"
    say("environment", **facts)
    side, copied = (256, 2**20) if args.dry_run else (8192, 2**31)
    for what, rate in ceilings(meter, side, copied):
        say("environment", **{what: rate})
    if meter.cuda:
        say("environment", busy=nvidia_smi(*CLOCKS))
    return False


def git_commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"


def ceilings(meter: Meter, side: int, copied: int) -> Iterator[tuple[str, float]]:
    """FLOP/s and bytes/s, medians of ten, on random data: a product of zeros is faster than any real one."""
    import torch

    a, b = (torch.randn(side, side, device=meter.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=meter.device)
    target = torch.empty_like(source)

    def median(work: Callable[[], Any]) -> float:
        return statistics.median([meter.seconds(work)[0] for _ in range(13)][3:])

    yield "bf16 FLOP/s", 2 * side**3 / median(lambda: torch.mm(a, b, out=out))
    yield "copy bytes/s", 2 * copied / median(lambda: target.copy_(source))


def compare(
    meter: Meter, args: argparse.Namespace, table: str, shape: Any, distribution: Any, tried: list[Any], until: float
) -> bool:
    """One table: every candidate once for error and memory, then all in turn until the time is over. True: cut."""
    import candidates as g
    import torch

    operands = g.inputs(shape, distribution, torch.bfloat16, meter.device)
    exact = g.truth(operands)
    say("facts", table=table, **vars(shape), KL=float(exact.loss), entropy=exact.entropy, dtype="bfloat16")
    samples: dict[str, list[tuple[float, float]]] = {}
    alive, cut = [], False

    def row(candidate: Any, **fields: Any) -> None:
        say("row", table=table, name=candidate.name, **fields)

    def leaves(candidate: Any) -> list[Any]:
        return [t.detach().requires_grad_(candidate.backward) for t in operands[:2]]

    def work(candidate: Any, own: list[Any]) -> Any:
        with torch.set_grad_enabled(candidate.backward):
            loss = candidate.call(operands._replace(hidden=own[0], weight=own[1]))
            if candidate.backward and loss is not None:
                loss.backward()
        return loss

    for candidate in tried:
        why = g.missing(candidate, meter.device)
        if f"{table}:{candidate.name}" in args.without:
            continue
        if why is None and time.time() > until:
            why, cut = "not reached", True
        row(candidate, status=why or "running", group=candidate.kind, plan=candidate.plan)
        if why is not None:
            continue
        say("running", table=table, name=candidate.name)
        try:
            own = leaves(candidate)
            with meter.peak() as peak:
                loss = work(candidate, own)
                taken = peak()
            found = g.errors(candidate, loss, own, exact)
            if taken is not None:
                taken -= sum(t.grad.numel() * t.grad.element_size() for t in own if t.grad is not None)
                found["memory MiB"] = round(taken / 2**20)
            row(candidate, **found, **g.report(candidate, operands))
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            row(candidate, status=f"failed: {type(error).__name__}: {text.splitlines()[0][:300]}")
            traceback.print_exc()
            if not meter.alive():
                raise SystemExit(3) from None  # nothing more can be done in this process
            continue
        finally:
            loss = own = None
        alive.append(candidate)
    # An odd number of rounds, at least three: a median that is a reading.
    for turn in range(args.rounds):
        for candidate in alive:
            if time.time() > until and turn >= 3:
                break
            say("running", table=table, name=candidate.name)
            own = leaves(candidate)
            taken = meter.seconds(lambda c=candidate, o=own: work(c, o))  # type: ignore[misc]
            samples.setdefault(candidate.name, []).append(taken)
            device, host = zip(*samples[candidate.name])
            row(
                candidate,
                status="done",
                ms=1e3 * statistics.median(device),
                min=1e3 * min(device),
                max=1e3 * max(device),
                host=1e3 * statistics.median(host),
                rounds=len(device),
            )
        else:
            continue
        break
    if meter.cuda:
        say("facts", table=table, clocks=nvidia_smi(*CLOCKS))
    return cut


def backends_here(meter: Meter) -> list[str]:
    """Ours on this device, the automatic one first."""
    import torch

    from sgopd_kernels import backends

    automatic = backends.resolve("auto", torch.device(meter.device), torch.bfloat16)
    if not meter.cuda:
        automatic = "triton" if "triton" in backends.NAMES else "torch"
    order = (automatic, "triton", "cuda", "torch") if meter.cuda else (automatic, "torch")
    return list(dict.fromkeys(name for name in order if name in backends.NAMES))


def target(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    import candidates as g

    shape = g.TINY if args.dry_run else g.TARGET
    tried = g.for_gpu_suite(backends_here(meter), rows=4 if args.dry_run else 2048, dry=args.dry_run)
    return compare(meter, args, "target", shape, g.USUAL, tried, until)


def distributions(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    import candidates as g

    shape = g.TINY if args.dry_run else g.TARGET
    tried = g.for_gpu_suite(backends_here(meter)[:1], rows=4 if args.dry_run else 2048, dry=args.dry_run)
    tried = [c for c in tried if c.compared and c.backward]
    others = (g.NEAR, g.FLAT)
    cut = False
    for n, other in enumerate(others):
        end = time.time() + max(0.0, until - time.time()) / (len(others) - n)
        cut |= compare(meter, args, other.name, shape, other, tried, end)
    return cut


def sweep(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    import candidates as g

    shape = g.TINY if args.dry_run else g.TARGET
    tried = g.swept(backends_here(meter)[0], shape, args.dry_run)
    return compare(meter, args, "sweep", shape, g.USUAL, tried, until)


def pieces(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    """Every stage of a chunk alone, the default's chunk size first. True: cut."""
    import candidates as g
    import pieces as p

    shape = g.TINY if args.dry_run else g.TARGET
    say("facts", table="pieces", **vars(shape), dtype="bfloat16")
    for rows in (8,) if args.dry_run else (2048, 1664, 4096):
        for piece in p.pieces(shape, rows, meter.device):
            name = f"{piece.name}, {rows} rows"
            if f"pieces:{name}" in args.without:
                continue
            if time.time() > until:
                return True
            row = {"table": "pieces", "name": name, "group": "ours", "rows": rows, "piece": piece.name}
            say("row", **row, status="running", flop=piece.stage.flop, bytes=piece.stage.traffic)
            say("running", table="pieces", name=name)
            taken = []
            for _ in range(min(args.rounds, 9) + 2):  # the first two: compilation, clocks
                piece.prepare()
                taken.append(1e3 * meter.seconds(piece.work)[0])
            taken = taken[2:]
            say("row", **row, status="done", ms=statistics.median(taken), min=min(taken), max=max(taken))
    return False


def trace(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    """One default call under torch's profiler: kernels, gaps between them, waits of the host. trace.json.gz has all."""
    import candidates as g
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    operands = g.inputs(g.TINY if args.dry_run else g.TARGET, g.USUAL, torch.bfloat16, meter.device)
    call = g.ours(backends_here(meter)[0])

    def work() -> None:
        leaves = [t.detach().requires_grad_() for t in operands[:2]]
        call(operands._replace(hidden=leaves[0], weight=leaves[1])).backward()
        if meter.cuda:
            torch.cuda.synchronize()

    work()
    on, kind = [ProfilerActivity.CPU], DeviceType.CPU
    if meter.cuda:
        on, kind = [*on, ProfilerActivity.CUDA], DeviceType.CUDA
    with profile(activities=on) as seen:
        work()
    seen.export_chrome_trace(str(args.output / "trace.json.gz"))
    events = list(seen.events())
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == kind)
    gaps, end = [], spans[0][0]
    for began, ended, _ in spans:
        gaps.append(max(0.0, began - end))
        end = max(end, ended)
    waits = Counter(e.name for e in events if "Synchronize" in e.name or "DtoH" in e.name)
    say(
        "facts",
        table="trace",
        kernels=len(spans),
        **{"ms": (end - spans[0][0]) / 1e3, "gaps, ms": sum(gaps) / 1e3, "largest gap, µs": max(gaps)},
        **{"split-K kernels": sum("splitk" in name.lower() for *_, name in spans), "waits": dict(waits)},
    )
    took: dict[str, list[float]] = {}
    for began, ended, name in spans:
        took.setdefault(name[:100], []).append((ended - began) / 1e3)
    for name, each in sorted(took.items(), key=lambda item: -sum(item[1]))[:25]:
        say("row", table="trace", name=name, group="", status="done", calls=len(each), ms=sum(each))
    return False


def ncu(meter: Meter, args: argparse.Namespace, until: float) -> bool:
    """Nsight Compute on the row kernel alone, in a process of its own; a dry run runs the process without it."""
    tool = shutil.which("ncu")
    if tool is None and meter.cuda:
        say("facts", table="ncu", why="ncu is not on the PATH")
        return False
    sections = [
        x for s in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats") for x in ("--section", s)
    ]
    wrapped = [str(tool), "--kernel-name", "regex:rows_kernel", *sections] if meter.cuda else []
    program = [sys.executable, str(ROOT / "bench" / "pieces.py"), *(["--rows", "2"] if args.dry_run else [])]
    program += ["--tiny"] if args.dry_run else []
    with (args.output / "ncu.txt").open("w+", encoding="utf-8") as said:
        try:
            patience = max(60.0, until - time.time())
            done = subprocess.run([*wrapped, *program], stdout=said, stderr=subprocess.STDOUT, timeout=patience)
            status = "" if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"took more than {patience:.0f} s"
        said.seek(0)
        text = said.read()
    if status:
        say("facts", table="ncu", why=f"{status}: {text[-300:]}")
    for found in NCU.finditer(text):
        say("row", table="ncu", name=found[1], group="", status="done", unit=found[2], value=found[3])
    return False


# Lines as "    DRAM Throughput           %        86.31"; those of the last launch stay.
NCU = re.compile(
    r"^ +(Duration|DRAM Throughput|Registers Per Thread|Achieved Occupancy|L2 Hit Rate) +(\S+) +([\d.,]+)$",
    re.MULTILINE,
)


STAGES: dict[str, Callable[[Meter, argparse.Namespace, float], bool]] = {
    "environment": environment,
    "pieces": pieces,
    "target": target,
    "trace": trace,
    "ncu": ncu,
    "distributions": distributions,
    "sweep": sweep,
}


# ---- the tables


def markdown(data: Record) -> str:
    env = data["environment"]
    lines = [f"# {env.get('device', 'No device yet')}", ""]
    if data["settings"]["dry run"]:
        lines += ["**A dry run on the CPU: it shows that the suite runs. Not measured on a device.**", ""]
    facts = {**env, **data["settings"]}
    lines += _table(["", ""], ([k, _plain(v)] for k, v in facts.items()))
    lines += ["", "## Stages", ""]
    stages = data["stages"].items()
    lines += _table(["stage", "", "s"], ([k, _say(s), str(s.get("seconds", ""))] for k, s in stages))
    tests = data["tests"]
    if tests:
        lines += ["", "## Device tests", ""]
        lines += [f"{tests['passed']} passed, {len(tests['failed'])} failed, {sum(tests['skipped'].values())} skipped."]
        lines += [f"- failed: `{name}`: {why}" for name, why in tests["failed"].items()]
        lines += [f"- skipped: {count} × {why}" for why, count in tests["skipped"].items()]
    for name, table in data["tables"].items():
        show = {"pieces": _pieces, "trace": _plain_rows, "ncu": _plain_rows}.get(name, _rows)
        lines += ["", f"## {name}", "", _plain(table["facts"]), "", *show(table, device_of(env))]
    if data["tables"].get("target"):
        lines += ["", "## Bars (docs/gpu.md)", ""]
        rows = (data["tables"].get(name, {"rows": {}})["rows"] for name in ("target", "pieces"))
        lines += _table(["bar", "must", "clearly best", "read"], bars(*rows, device_of(env)))
    return "\n".join(lines)


def device_of(env: Record) -> roofline.Device | None:
    """The roofline's device, with the rates that were read here."""
    bf16, copy = (env.get(k) for k in ("bf16 FLOP/s", "copy bytes/s"))
    if not isinstance(bf16, float) or not isinstance(copy, float):
        return None
    return roofline.Device("this", bf16, copy, "read here")


def _table(head: list[str], rows: Any) -> list[str]:
    clean = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *clean)]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(stage: Record) -> str:
    return f"{stage['status']}: {stage['why']}" if "why" in stage else stage["status"]


def _rows(table: Record, device: roofline.Device | None) -> list[str]:
    rows = table["rows"]
    times = [r["ms"] for r in rows.values() if r.get("group") == "peer" and "ms" in r]
    best = min(times, default=None)
    head = ["", "ms", "min–max", "of fastest peer", "model, ms", "host, ms", "MiB"]
    head += ["loss err", "dH err", "dW err", "plan", "tokens a chunk", "kept", ""]

    def show(name: str, r: Record) -> list[str]:
        model, shape, timed = "", table["facts"], "ms" in r
        if r.get("plan") and "chunk" in r and device is not None:
            sizes = (shape[k] for k in ("tokens", "vocabulary", "student", "teacher"))
            ran = roofline.Shape(*sizes, chunk=r["chunk"])
            model = f"{1e3 * roofline.PLANS[r['plan']](ran).seconds(device):.2f}"
        return [
            name,
            f"{r['ms']:.2f}" if timed else "–",
            f"{r['min']:.2f}–{r['max']:.2f}" if timed else "",
            f"{best / r['ms']:.2f}×" if timed and best else "",
            model,
            f"{r['host']:.2f}" if timed else "",
            str(r.get("memory MiB", "")),
            *(f"{r[k]:.1e}" if k in r else "" for k in ("loss error", "dH error", "dW error")),
            r.get("ran", ""),
            str(r.get("chunk", "")),
            f"{r['kept']:.3f}" if "kept" in r else "",
            "" if r.get("status") == "done" else str(r.get("status", "")),
        ]

    return _table(head, (show(name, r) for name, r in rows.items()))


def _pieces(table: Record, device: roofline.Device | None) -> list[str]:
    """Rates, and what the model says of the same operations and bytes."""

    def show(name: str, r: Record) -> list[str]:
        if "ms" not in r:
            return [name, *[""] * 6, str(r.get("status", ""))]
        seconds, least = r["ms"] / 1e3, roofline.Stage(name, r["flop"], r["bytes"])
        model = 1e3 * least.seconds(device) if device is not None else None
        return [
            name,
            f"{r['ms']:.3f}",
            f"{r['min']:.3f}–{r['max']:.3f}",
            f"{r['flop'] / seconds / 1e12:.1f}" if r["flop"] else "",
            f"{r['bytes'] / seconds / 1e12:.2f}",
            "" if model is None else f"{model:.3f}",
            "" if model is None else f"{100 * model / r['ms']:.0f} %",
            "",
        ]

    head = ["", "ms", "min–max", "TFLOP/s", "TB/s", "model, ms", "of the model", ""]
    return _table(head, (show(name, r) for name, r in table["rows"].items()))


def _plain_rows(table: Record, device: roofline.Device | None) -> list[str]:
    left = ("group", "status")
    heads = list(dict.fromkeys(k for r in table["rows"].values() for k in r if k not in left))
    return _table(["", *heads], ([n, *(_plain(r.get(k, "")) for k in heads)] for n, r in table["rows"].items()))


def bars(
    rows: dict[str, Record], alone: dict[str, Record] | None = None, device: roofline.Device | None = None
) -> Iterator[list[str]]:
    """docs/gpu.md's bars for an H100 at the target shape; the first backend of the table is the automatic one."""
    import pieces

    first = next((name.split(",")[0] for name in rows if name.startswith("sgopd ")), "")

    def ms(name: str) -> float | None:
        return rows.get(name, {}).get("ms")

    def peer(word: str) -> float | None:
        return min(
            (r["ms"] for n, r in rows.items() if word in n and r.get("group") == "peer" and "ms" in r), default=None
        )

    def over(a: float | None, b: float | None) -> str:
        return "–" if a is None or b is None else f"{a / b:.2f}"

    exact, default = ms(f"{first}, exact"), ms(f"{first}, default precision")
    forward = next((r["ms"] for n, r in rows.items() if n.startswith("products of the forward") and "ms" in r), None)
    ours = rows.get(f"{first}, default precision", {})
    chunk = ours.get("chunk", 0)
    times = {r["piece"]: r["ms"] for r in (alone or {}).values() if r.get("rows") == chunk and "ms" in r}
    whole = pieces.a_call(times, round(8192 / chunk)) if chunk else None
    row_pass = next((r for r in (alone or {}).values() if r["piece"] == "rows, KL 0.5" and "ms" in r), None)
    copied = None if row_pass is None or device is None else row_pass["bytes"] / row_pass["ms"] * 1e3 / device.bandwidth
    yield ["exact, ms", "≤ 44", "≤ 38", "–" if exact is None else f"{exact:.1f}"]
    yield ["default precision, ms", "≤ 38", "≤ 36.5", "–" if default is None else f"{default:.1f}"]
    yield ["default / the sum of its stages", "", "≤ 1.03", over(default, whole)]
    yield ["row pass / a copy, bytes a second", "", "≥ 0.80", "–" if copied is None else f"{copied:.2f}"]
    yield ["compiled chunks / default", "≥ 1.0", "≥ 1.15", over(peer("compiled chunks"), default)]
    yield ["Liger's better one / default", "≥ 1.5", "≥ 1.8", over(peer("Liger"), default)]
    yield ["TRL / default", "≥ 2.5", "≥ 3", over(peer("TRL"), default)]
    yield ["gate density ½ / all on", "≤ 0.85", "≤ 0.75", over(ms(f"{first}, gate density ½"), default)]
    yield ["statistics / the two products", "≤ 1.15", "≤ 1.05", over(ms(f"{first}, statistics"), forward)]
    for what in ("dH error", "dW error"):
        yield [f"{what}, default precision", "≤ 5e-3", "≤ 1.7e-3", f"{ours[what]:.1e}" if what in ours else "–"]
    yield [
        "loss error, default precision",
        "≤ 1e-3",
        "≤ 1e-3",
        f"{ours['loss error']:.1e}" if ours.get("loss error") else "–",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default runs/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, Triton's interpreter")
    parser.add_argument("--source", action="store_true", help="the checkout, also where the package is installed")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds, at the most (default 21; a dry run: 1)")
    for name in ("--child", "--until", "--without"):  # between parent and child
        kind: Any = {"--until": float}.get(name, str)
        action = "append" if name == "--without" else "store"
        parser.add_argument(name, type=kind, action=action, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.without = args.without or []
    args.output = args.output.resolve()
    if args.dry_run:
        args.rounds = 1
    if args.child:
        child(args)
        return 0
    return parent(args)


if __name__ == "__main__":
    sys.exit(main())
