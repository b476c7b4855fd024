"""`push_to_hub`: the trained model with a card on the Hugging Face Hub; of the main process.

Who pushes, huggingface_hub finds out by itself: HF_TOKEN in the environment, or what `hf auth login` left. A token is
no setting, since settings are written down. What cannot be pushed is said, and ends no run: the model is in `final/`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from sgopd import __version__
from sgopd.checkpoint import MANIFEST, OPTIMIZER, RANDOM, STATE
from sgopd.config import Config, UserError
from sgopd.files import new_file
from sgopd.report.run import read_run

OURS = [MANIFEST, OPTIMIZER, RANDOM, STATE, "optimizer"]  # of a checkpoint: what from_pretrained does not read


class Hub:
    """A repository of this run's, made where it is not there yet.

    Raises:
        UserError: it can be neither found nor made.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say, self.api = config, say, HfApi()
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        try:
            self.repository = self.api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        except Exception as error:  # huggingface_hub, httpx and the operating system have their own
            raise UserError(
                f"push_to_hub: cannot open the repository {name!r} at {self.api.endpoint}: {first_line(error)}. Set "
                "HF_TOKEN to a token that may write there, or log in by `hf auth login`; hub_model_id is OWNER/NAME. "
                f"Or leave push_to_hub out, and push later: hf upload {name} {Path(config.output_dir) / 'final'}"
            ) from error
        self.pushing: Future[Any] | None = None

    def push_checkpoint(self, folder: Path, step: int) -> None:
        """Begins to upload the model of a checkpoint, unless an earlier one is still on its way."""
        if self.pushing is not None and not self.pushing.done():
            return
        self.settle()
        # The checkpoint may be pruned before it is uploaded: files are read as they are sent.
        copy = folder.parent.parent / f".push-{step:06d}.tmp"
        try:
            shutil.copytree(folder, copy, copy_function=link, ignore=shutil.ignore_patterns(*OURS))
        except OSError as error:  # shutil.Error is one
            shutil.rmtree(copy, ignore_errors=True)
            self.say(f"warning: push_to_hub: the checkpoint of step {step} is not pushed: {first_line(error)}")
            return
        self.pushing = self.api.upload_folder(
            repo_id=self.repository, folder_path=copy, commit_message=f"step {step}", run_as_future=True
        )
        self.pushing.add_done_callback(lambda done: shutil.rmtree(copy, ignore_errors=True))

    def settle(self) -> None:
        """Waits for the checkpoint on its way."""
        if self.pushing is not None and (error := self.pushing.exception()) is not None:
            self.say(f"warning: push_to_hub: a checkpoint did not reach {self.repository}: {first_line(error)}")
        self.pushing = None

    def push_final(self, run_dir: Path) -> None:
        """Uploads `final/`, with a card."""
        self.settle()
        folder = run_dir / "final"
        try:
            with new_file(folder / "README.md") as path:
                path.write_text(card(self.config, run_dir, self.repository), encoding="utf-8")
            done = self.api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message=f"step {self.config.max_steps}, the last"
            )
        except Exception as error:
            self.say(
                f"warning: push_to_hub: the model did not reach {self.repository}: {first_line(error)}. It is whole in "
                f"{folder}. By hand: hf upload {self.repository} {folder}"
            )
        else:
            self.say(f"pushed to {done.repo_url}")


def link(source: str, target: str) -> None:
    """The same file under another name, without a copy of its bytes where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def card(config: Config, run_dir: Path, repository: str) -> str:
    """A model card: what it comes from, how it was trained, what it scored. Without paths of this machine."""
    student, data = (on_hub(name) for name in (config.model_name_or_path, config.dataset_name))
    paths = [str(one.teacher_model_name_or_path) for one in config.teachers.values()]
    teachers = " and ".join(dict.fromkeys(on_hub(path) or "a teacher" for path in paths))
    facts: dict[str, Any] = {
        "library_name": "peft" if config.use_peft else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sgopd", "on-policy-distillation"],
    }
    if student:
        facts["base_model"] = student
    if data and "/" in data:
        facts["datasets"] = [data]
    run = read_run(run_dir)
    scores = [
        f"| {name} | {found['eval/questions']} | {100 * found['eval/avg_at_k']:.1f} % |"
        for name, found in (("before", run.before), ("after", run.after), ("teacher", run.teacher))
        if found is not None
    ]
    settings = (
        *("gate", "estimator", "divergence", "temperature", "learning_rate", "max_steps", "num_generations"),
        *("max_completion_length", "reward_weight", "cold_start_steps", "seed"),
    )
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False).strip(),
        "---",
        f"# {repository.rpartition('/')[2]}",
        "",
        f"{student or 'A model'}, trained by on-policy distillation from {teachers} on its own rollouts, "
        f"with a verifier's verdicts, on {data or 'prompts'} (sgopd {__version__}).",
        "",
        *(["| | questions | avg@k |", "|---|---|---|", *scores, ""] if scores else []),
        "```yaml",
        *(f"{name}: {getattr(config, name)}" for name in settings),
        f"rollouts an update: {config.rollouts_per_batch * run.start.get('processes', 1)}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def on_hub(name: str) -> str | None:
    """The name, if it is one of the hub, or of a task, and no path of this machine."""
    named = re.fullmatch(r"(task:)?[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if named else None
