"""The `sgopd` command.

sgopd train CONFIG.yaml [--key value …]       one run: metrics.jsonl, checkpoints, the trained model, report.html
sgopd quickstart [--key value …]              the shipped example, in half a minute on a CPU
sgopd evaluate RUN_DIR|CONFIG.yaml [--key …]  avg@k and pass@k of a trained model; --benchmarks aime24,math500
sgopd watch RUN_DIR                           a run in this terminal: at work in another process, or finished
sgopd report RUN_DIR                          report.html anew
sgopd report RUN_DIR RUN_DIR … [--output FILE]  comparison.html: curves over each other, paired differences
sgopd plan CONFIG.yaml [--key value …]        memory and seconds of a step, before anything is loaded
sgopd serve-teacher MODEL                     a teacher for trainers on other machines (docs/scaling/teacher.md)

Every setting of a config file is a flag: `sgopd train --help` lists them. On several processes or GPUs:
torchrun --nproc_per_node 8 -m sgopd train CONFIG.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sgopd import __version__
from sgopd.config import Config, LostProcess, UserError, default_text, parse_flag, unknown

if TYPE_CHECKING:  # torch and transformers take seconds to import: `--help` does without them
    from sgopd.report.run import Run

Record = dict[str, Any]
OWN = ("benchmarks", "device", "processes", "prompt_tokens", "measured")  # of `evaluate` and `plan`, beside settings
UNSET = ("watch", "report", "serve-teacher")  # commands that take no settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for a user's error, 128 + n after signal n."""
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        command, path, overrides = parse(arguments)
        if command == "train":
            return run(Config.load(path, overrides))
        if command == "quickstart":
            return quickstart(overrides)
        assert path is not None
        if command == "watch":
            return watch(path)
        if command == "plan":
            return show_plan(path, **overrides)
        if command == "serve-teacher":
            from sgopd.teachers.serve import Options, serve

            return serve(Options(model=str(path), **overrides))
        return evaluate(path, overrides) if command == "evaluate" else report(path, **overrides)
    except UserError as error:
        if main_process or isinstance(error, LostProcess):  # the main process may be the one that was lost
            print(f"sgopd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None) -> tuple[str, Path | None, dict[str, Any]]:
    """(command, its path, settings given as flags)."""
    parser = argparse.ArgumentParser("sgopd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"sgopd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path, what in (
        ("train", "CONFIG.yaml", "train a student"),
        ("quickstart", None, "train the shipped example"),
        ("evaluate", "RUN_DIR|CONFIG.yaml", "evaluate a trained model; JSON lines if the output is not a terminal"),
        ("plan", "CONFIG.yaml", "say what memory and seconds a step takes, and whether it fits (docs/scaling/plan.md)"),
        ("watch", "RUN_DIR", "show a run that is at work in another process, or a finished one"),
        ("report", "RUN_DIR", "write report.html from a run directory, or comparison.html from several"),
    ):
        usage = " ".join(filter(None, ("sgopd", name, path, "[--key value …]" if name not in UNSET else None)))
        command = commands.add_parser(name, usage=usage, help=what, description=what, allow_abbrev=False)
        if path is not None:
            command.add_argument("path", type=Path, metavar=path, nargs="?" if name == "train" else None)
        if name == "evaluate":
            what = "on these in place of the configuration's questions: aime24,math500 or aime24=FILE (docs/start.md)"
            command.add_argument("--benchmarks", metavar="NAMES", default=argparse.SUPPRESS, help=what)
        if name == "report":
            command.add_argument("others", type=Path, metavar="RUN_DIR", nargs="*", help="runs to compare it with")
            command.add_argument("--output", type=Path, metavar="FILE", help="of the comparison: comparison.html")
        if name == "plan":
            what = "h100, h200, a100, l40s or cpu (default: %(default)s)"
            command.add_argument("--device", default="h100", help=what)
            command.add_argument("--processes", type=int, default=1, help="one a device (default: %(default)s)")
            command.add_argument("--prompt_tokens", type=int, default=256, help="of a prompt (default: %(default)s)")
            command.add_argument("--measured", type=Path, metavar="RUN_DIR", help="a run whose seconds are scaled")
        if name in UNSET:
            continue
        for field in dataclasses.fields(Config):
            required = field.default is field.default_factory is dataclasses.MISSING
            default = "required" if required else f"default: {default_text(field)}"
            options: dict[str, Any] = {"nargs": "?", "const": "true"} if field.type == "bool" else {}
            options["help"] = f"{field.metadata['help']} ({default})".replace("%", "%%")
            command.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar="VALUE", **options)
    what = "give a model's last hidden states to trainers elsewhere (teacher_url)"
    command = commands.add_parser("serve-teacher", help=what, description=what, allow_abbrev=False)
    command.add_argument("path", type=Path, metavar="MODEL", help="a folder or a hub name")
    command.add_argument("--name", help="the trainer's teacher_model_name_or_path (default: MODEL)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    command.add_argument("--max_tokens", type=int, default=32_768, help="of a text (default: %(default)s)")
    command.add_argument("--max_body", type=int, default=2**24, help="bytes of a request (default: %(default)s)")
    command.add_argument("--use_cpu", action="store_true", help="run on the CPU even where there is a GPU")
    known, rest = parser.parse_known_args(arguments)
    for word in rest:
        flag = word.split("=")[0]
        names = [f"--{field.name}" for field in dataclasses.fields(Config)]
        raise UserError(unknown("argument", flag, names if known.command not in UNSET else []))
    values = vars(known)
    command_name, path_given = values.pop("command"), values.pop("path", None)
    if command_name == "serve-teacher":
        values["name"] = values["name"] or str(path_given)
    if command_name in UNSET:
        return command_name, path_given, values
    own = {name: values.pop(name) for name in OWN if name in values}
    return command_name, path_given, {name: parse_flag(name, text) for name, text in values.items()} | own


def quickstart(overrides: dict[str, Any]) -> int:
    """The shipped config and models, in a new run directory unless one is named."""
    with resources.as_file(resources.files("sgopd") / "assets" / "quickstart") as assets:
        shipped = {
            "model_name_or_path": str(assets / "student"),
            "teacher_model_name_or_path": str(assets / "teacher"),
            "output_dir": "runs/quickstart",
        }
        if "output_dir" not in overrides and "resume_from_checkpoint" not in overrides:
            shipped["output_dir"] = str(next(free_folders(Path("runs/quickstart"))))
        return run(Config.load(assets / "quickstart.yaml", {**shipped, **overrides}))


def free_folders(path: Path) -> Iterator[Path]:
    """`path`, or path-2, path-3 …: those that do not exist."""
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not candidate.exists():
            yield candidate
        number += 1


def evaluate(path: Path, overrides: dict[str, Any]) -> int:
    """A run directory's final model, or a config's model."""
    quiet_libraries()
    from sgopd.benchmarks import configs_of
    from sgopd.evaluate import evaluate_models
    from sgopd.report.run import is_run

    if path.is_dir():
        if not (path / "config.yaml").is_file() or not is_run(path):
            raise UserError(
                f"cannot read the config file of {path}: it is no run directory, which has config.yaml and "
                "metrics.jsonl. Name one, or a config file"
            )
        if "model_name_or_path" not in overrides:
            if not (path / "final").is_dir():
                there = sorted(str(one) for one in path.glob("checkpoints/step-*"))
                raise UserError(
                    f"{path} has no final/: its run is not finished. Go on with it, or evaluate a checkpoint with "
                    f"--model_name_or_path; there: {', '.join(there) or 'none'}"
                )
            overrides["model_name_or_path"] = str(path / "final")
        path = path / "config.yaml"
    names = overrides.pop("benchmarks", None)
    benchmarks = None if names is None else configs_of(names, path, overrides)
    records = evaluate_models(Config.load(path, overrides), benchmarks)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if sys.stdout.isatty():
        for name in dict.fromkeys(record.get("benchmark") for record in records):
            rows = [(record["model"], record) for record in records if record.get("benchmark") == name]
            Console().print(table(rows, name))
    else:
        for record in records:
            print(json.dumps(record))
    return 0


def show_plan(
    path: Path, device: str, processes: int, prompt_tokens: int, measured: Path | None, **overrides: Any
) -> int:
    """What a step takes; on a terminal as a table, else as JSON lines."""
    from sgopd import plan

    if device not in plan.DEVICES:
        raise UserError(unknown("device", device, plan.DEVICES))
    for name, given in (("--processes", processes), ("--prompt_tokens", prompt_tokens)):
        if given < 1:
            raise UserError(f"{name}: got {given}, expected >= 1")
    config, one = Config.load(path, overrides), plan.DEVICES[device]
    stages = plan.plan(config, one, processes, prompt_tokens)
    if measured is not None:
        stages = plan.as_in(measured, stages, one, processes, prompt_tokens)
    if sys.stdout.isatty():
        Console().print(plan.table(stages))
    else:
        for stage in stages:
            print(json.dumps({**dataclasses.asdict(stage), "memory": stage.memory}))
    for line in plan.warnings_of(stages, one, config, processes):
        print(line, file=sys.stderr)
    return 0


def watch(path: Path) -> int:
    """A run in this terminal."""
    from sgopd.watch import watch

    watch(path, Console())
    return 0


def report(path: Path, others: list[Path], output: Path | None) -> int:
    """report.html of a run directory, or the comparison of several."""
    from sgopd.report import write_comparison, write_report

    if output is not None and not others:
        raise UserError(f"--output: got {output}, but the report of one run goes into its folder. Leave it out")
    try:
        print(write_comparison([path, *others], output or Path("comparison.html")) if others else write_report(path))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return 0


def run(config: Config) -> int:
    """Trains, with the view of `sgopd watch` on a terminal and plain lines elsewhere, and ends with the results."""
    quiet_libraries()
    from sgopd.report.run import read_run
    from sgopd.trainer import Trainer
    from sgopd.watch import Display

    display = Display(config)
    trainer = Trainer(config, say=display.say, on_record=display.record)
    with display.start(trainer.state.step):
        run_dir = trainer.train()
    if trainer.stopped_by is not None:
        trainer.say(
            f"stopped after {trainer.state.step} of {config.max_steps} updates, and saved. To go on, the same command "
            f"with --output_dir {run_dir} --resume_from_checkpoint auto"
        )
        return 128 + trainer.stopped_by
    if not trainer.processes.main:
        return 0
    console = display.console
    if rows := results(read_run(run_dir)):
        console.print(table(rows))
    trained = "trained adapter" if config.use_peft else "trained model"
    for name, what in (("", "run directory"), ("final", trained), ("report.html", "report")):
        console.print(f"{what:>{len(trained)}}  {run_dir / name}", soft_wrap=True, highlight=False)
    return 0


def quiet_libraries() -> None:
    """No progress bars of libraries between ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def results(run: Run) -> list[tuple[str, Record]]:
    """A run's evaluations, by what to call them."""
    rows = (("student before", run.before), ("student after", run.after), ("teacher", run.teacher))
    return [(name, record) for name, record in rows if record is not None]


def table(rows: Sequence[tuple[str, Record]], name: str | None = None) -> Table:
    """avg@k and pass@k with standard errors over questions; `name` is what they are of."""
    from sgopd.watch import score

    first = rows[0][1]
    what = f"{first['eval/questions']} questions, {first['eval/samples']} rollouts each"
    result = Table(title=f"{name}: {what}" if name else what)
    result.add_column("")
    result.add_column(f"avg@{first['eval/samples']}", justify="right")
    result.add_column(f"pass@{first['eval/k']}", justify="right")
    result.add_column("tokens", justify="right")
    for name, record in rows:
        length = f"{record['eval/length_mean']:.1f}"
        result.add_row(name, score(record, "avg"), score(record, "pass"), length)
    return result


if __name__ == "__main__":
    sys.exit(main())
