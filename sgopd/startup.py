"""What is checked before the first rollout: the run directory, the two models, the prompts.

Each check refuses with a `UserError` what cannot work, and returns a line for what a person should know; lines that
ask for action begin with "warning".
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd import checkpoint
from sgopd.config import Config, UserError
from sgopd.data import Prompts, has_eval_data
from sgopd.files import LOCK, FolderLock, make_folder
from sgopd.lora import save_student
from sgopd.metrics import lost_records
from sgopd.models import (
    LOGIT_DIVISORS,
    LOGIT_FACTORS,
    eos_ids_of,
    has_tokenizer,
    head_of,
    hidden_states,
    load_tokenizer,
)
from sgopd.report.run import is_run, read_metrics
from sgopd.rollout import Steps
from sgopd.rows import is_file, texts_of
from sgopd.verdicts import verifying
from sgopd.verifier import VerifierPool

# What a run that was killed before its first record may have left, in an otherwise empty folder.
BEFORE_RECORDS = {LOCK, ".writable", ".config.yaml.tmp", "config.yaml", "checkpoints"}


def lock_run_dir(config: Config) -> tuple[FolderLock, list[str]]:
    """Takes the run directory, before anything in it is read, and what to say about it.

    Raises:
        UserError: another run is at work in it, it has files of something else, or it cannot be written.
    """
    run_dir = Path(config.output_dir)
    try:
        make_folder(run_dir)
        if not is_run(run_dir) and (there := sorted(path.name for path in run_dir.iterdir())):
            raise UserError(
                f"output_dir: {run_dir} has files that are no run's: {', '.join(there[:5])}{' …' * (len(there) > 5)}. "
                "Choose an empty or a new folder, or that of a run to go on with (it has a .lock and metrics.jsonl)"
            )
        lock = FolderLock(run_dir)
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {run_dir}: {error.strerror}. Choose another folder") from error
    if lock.held:
        return lock, []
    return lock, [f"warning: the file system of {run_dir} has no locks: see to it that no second run is started there"]


def open_run_dir(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and what to say about it. Changes nothing in the run directory.

    Raises:
        UserError: it cannot be written, holds a run and resume_from_checkpoint is not set, or lacks what was there; a
            setting has changed that a resumed run cannot change.
    """
    run_dir = Path(config.output_dir)
    try:
        make_folder(run_dir)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
        there = {path.name for path in run_dir.iterdir()}
        empty = not (run_dir / "checkpoints").exists() or not any((run_dir / "checkpoints").iterdir())
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {run_dir}: {error.strerror}. Choose another folder") from error
    used = not (there <= BEFORE_RECORDS and empty)
    if config.resume_from_checkpoint is None:
        if used:
            raise UserError(
                f"output_dir: {run_dir} already holds a run. Pass --resume_from_checkpoint auto to go on with it, or "
                "choose another folder"
            )
        return None, []
    path, said = checkpoint.find(config.resume_from_checkpoint, run_dir / "checkpoints")
    own = path is None or path.resolve().parent == (run_dir / "checkpoints").resolve()
    if not own and used:
        raise UserError(
            f"resume_from_checkpoint: {path} belongs to another run than the one in {run_dir}. To branch off from it, "
            "choose a new output_dir"
        )
    if path is None:
        if used and (what := missing_checkpoints(run_dir)):
            raise UserError(
                f"resume_from_checkpoint: {run_dir} has no checkpoint, but {what}: to start from the beginning would "
                f"overwrite that. Put {run_dir / 'checkpoints'} back from a copy; or, to start anew, choose another "
                f"output_dir or move {run_dir} away"
            )
        return None, [*said, f"no whole checkpoint in {run_dir}: starting from the beginning"]
    state = checkpoint.state_of(path)
    if own:
        check_records(run_dir, path)
    said += compare_settings(config, state, path)
    said.append(f"resuming from {path}: its weights and tokenizer, not those of model_name_or_path")
    if own and (later := [one.name for one in checkpoint.later(path)]):
        said.append(f"warning: what came after it goes: {', '.join(later)} and their metrics")
    return path, said


def missing_checkpoints(run_dir: Path) -> str | None:
    """What tells that a run directory without a checkpoint had one, or None: a run may be killed before its first."""
    if not (run_dir / "metrics.jsonl").is_file():
        there = sorted({path.name for path in run_dir.iterdir()} - BEFORE_RECORDS)
        return f"{', '.join(there) or 'unfinished checkpoints'} without metrics.jsonl"
    records, _ = read_metrics(run_dir / "metrics.jsonl")
    step = max((record["step"] for record in records if record["kind"] == "train"), default=0)
    if any(record["kind"] == "end" for record in records):
        return f"metrics.jsonl has a finished run of {step} updates"
    save_steps = next((record.get("save_steps") for record in records if record["kind"] == "config"), None)
    if step and (not (run_dir / "checkpoints").exists() or (save_steps and step > save_steps)):
        return f"metrics.jsonl has {step} updates"
    return None


def compare_settings(config: Config, state: dict[str, Any], path: Path) -> list[str]:
    """What to say of settings that are not those of the checkpoint's run.

    Raises:
        UserError: a resumed run cannot change one of them.
    """
    if state["step"] > config.max_steps:
        raise UserError(
            f"max_steps: got {config.max_steps}, but {path} has {state['step']} updates behind it. Raise max_steps, or "
            "resume from an earlier checkpoint"
        )
    if "config" not in state:
        return [f"warning: {path} is of an earlier version: which settings, data and models it had is not known"]
    before, said, refused = yaml.safe_load(state["config"]), [], []
    for field in dataclasses.fields(config):
        name, kind = field.name, field.metadata["resume"]
        if name not in before or kind == "launch":
            continue
        was, now = before[name], getattr(config, name)
        if was == now or (
            isinstance(was, str) and isinstance(now, str) and os.path.realpath(was) == os.path.realpath(now)
        ):
            continue
        if kind == "fixed":
            refused.append(f"{name} was {was!r} and is {now!r}")
        else:
            said.append(f"warning: {name} was {was!r} and is {now!r} from here on")
    if refused:
        raise UserError(
            f"resume_from_checkpoint: a resumed run cannot change this: {'; '.join(refused)}. Leave it as it was; or "
            f"start a new run from the weights, with --model_name_or_path {path} and a new output_dir"
        )
    return said


def compare_contents(now: dict[str, str | None], state: dict[str, Any], path: Path) -> list[str]:
    """What to say of data and models that are not those of the checkpoint's run; `now` as in a checkpoint's state.

    Raises:
        UserError: they are the prompts, the teacher or the reference: then it would be another run.
    """
    before = state.get("contents", now)
    others = [name for name in now if now[name] != before.get(name)]
    if refused := [CONTENTS[name] for name in others if name != "questions"]:
        raise UserError(
            f"resume_from_checkpoint: {'; '.join(refused)}: not what {path} was saved with (SHA-256). Put it back as "
            f"it was; or start a new run from the weights, with --model_name_or_path {path} and a new output_dir"
        )
    if others:
        return [
            "warning: the evaluation questions are not those of before: avg@k and pass@k from here on, and which "
            "checkpoint is the best, cannot be compared with what was measured earlier"
        ]
    return []


CONTENTS = {
    "prompts": "the prompts (dataset_name and what is made of it: rows, their order, columns, template, tokens)",
    "teacher": "the weights of teacher_model_name_or_path (of several, each one's and which prompts it has)",
    "reference": "the weights of reference_model_name_or_path",
    "base": "the weights of the model that the adapters stand on (model_name_or_path, without its adapters)",
}


def check_records(run_dir: Path, path: Path) -> None:
    """Refuses to go on from a checkpoint without the records that it was saved with."""
    metrics = run_dir / "metrics.jsonl"
    if not (problem := lost_records(metrics, checkpoint.state_of(path))):
        return
    earlier = [
        one for one in reversed(checkpoint.saved(path.parent)) if checkpoint.step_of(one) < checkpoint.step_of(path)
    ]
    whole = (
        one for one in earlier if not checkpoint.fault(one) and not lost_records(metrics, checkpoint.state_of(one))
    )
    remedy = f"resume from {one}, which has them all; " if (one := next(whole, None)) else ""
    raise UserError(
        f"resume_from_checkpoint: {metrics} is not what {path} was saved with: {problem}. Put it back from a copy; "
        f"{remedy}or go on without these records in a new output_dir, with --resume_from_checkpoint {path}"
    )


# Relative difference of two computations of the same logits: hundreds of times what rounding makes, and far below
# what a lost cache, mask or position does (tests/architectures.py).
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def difference(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Relative difference of logits [N, V]: the worst token's. In bfloat16 the median token's, since rounding sends
    single tokens to other experts."""
    ours, expected = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (ours, expected))
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    return (errors.max() if dtype == torch.float32 else errors.median()).item()


@contextlib.contextmanager
def trying(model: PreTrainedModel, setting: str, what: str) -> Iterator[None]:
    """Around a try of a model, in eval mode: whatever its code raises becomes a UserError."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except UserError:
        raise
    except Exception as error:  # models are others' code
        raise UserError(
            f"{setting}: {type(model).__name__} of transformers {transformers.__version__} cannot be {what} here: "
            f"{type(error).__name__}: {error}. Use another model, or another version of transformers"
        ) from error
    finally:
        model.train(was_training)


def check_model(model: PreTrainedModel, setting: str, prompts: Prompts, config: Config, samples: bool = True) -> None:
    """Refuses a model that the loss would read wrongly, or that would not be sampled as it is read."""
    tokens = [token for ids in prompts.ids[:8] for token in ids[:32]]  # the model's own kind of text
    check_head(model, setting, tokens)
    if samples:
        check_sampling(model, setting, tokens, config.bf16)
    if config.padding_free:
        check_packing(model, setting, tokens, config.bf16)


def check_head(model: PreTrainedModel, setting: str, tokens: Sequence[int] = range(8)) -> None:
    """Refuses a model whose logits are not what `head_of` and `hidden_states` make of them, in a right-padded batch,
    or depend on later tokens."""
    head = head_of(model)
    long = torch.tensor(repeated(tokens, 8), device=model.device).unsqueeze(0) % head.weight.shape[0]
    short, trained = long[:, :5], model.training
    with trying(model, setting, "trained or read"):
        expected = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in (long, short)]
        mask = torch.ones_like(long).repeat(2, 1)
        mask[1, 5:] = 0
        ours = head.logits(hidden_states(model, long.repeat(2, 1) * mask, mask))
        error = difference(ours[0], expected[0][0], head.weight.dtype)
        later = difference(torch.cat([ours[0, :5], ours[1, :5]]), expected[1][0].repeat(2, 1), head.weight.dtype)
        if trained:  # some ask for more arguments then; without a trace in the random numbers of dropout
            with torch.random.fork_rng():
                hidden_states(model.train(), long, torch.ones_like(long))
    if not error <= TOLERANCES[head.weight.dtype]:
        raise UserError(
            f"{setting}: the logits of {type(model).__name__} differ from head(last hidden state) by {error:.2g} "
            "relative, so something happens between them that this version does not know "
            f"(known: {', '.join((*LOGIT_FACTORS, *LOGIT_DIVISORS))}, final_logit_softcapping)"
        )
    if not later <= TOLERANCES[head.weight.dtype]:
        raise UserError(
            f"{setting}: the logits of {type(model).__name__} change by {later:.2g} relative with the tokens or the "
            "padding after them: expected a causal language model"
        )


def check_sampling(model: PreTrainedModel, setting: str, tokens: Sequence[int] = range(33), bf16: bool = False) -> None:
    """Refuses a model whose sampling steps are not what the loss's forward makes of the same tokens.

    Three prompts, left-padded, one of them twice, go on for six steps with given tokens; after three, one leaves. Each
    row is compared for itself, before that and after, so that a fault of one of these is not lost in a median.
    """
    head = head_of(model)
    stream = [token % head.weight.shape[0] for token in repeated(tokens, 33)]
    lengths, count = (4, 7, 2, 7), 6
    texts = [stream[sum(lengths[:row]) + count * row :][: length + count] for row, length in enumerate(lengths[:3])]
    texts.append(texts[1][:7] + stream[:count])
    dtype = torch.bfloat16 if bf16 else head.weight.dtype
    with (
        trying(model, setting, "sampled from"),
        torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
    ):
        steps = Steps(model, [text[:length] for text, length in zip(texts, lengths)])
        ids, mask = (torch.zeros(4, max(map(len, texts)), dtype=torch.long) for _ in range(2))
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        expected = head.logits(hidden_states(model, ids.to(model.device), mask.to(model.device)))
        rows = [0, 1, 2, 3]
        pairs: dict[tuple[int, bool], list[tuple[Tensor, Tensor]]] = {}  # of (row, before the one leaves)
        for step in range(count):
            logits = steps.logits()
            for row, ours in zip(rows, logits):
                pair = ours, expected[row, lengths[row] - 1 + step]
                pairs.setdefault((row, step < count // 2), []).append(pair)
            token = torch.tensor([texts[row][lengths[row] + step] for row in rows], device=model.device)
            keep = None
            if step == count // 2 - 1:
                keep, rows = torch.tensor([1, 2, 3], device=model.device), [1, 2, 3]
            steps.go_on(token, keep)
        groups = [[torch.stack(logits) for logits in zip(*group)] for group in pairs.values()]
        error = max(difference(ours, expected, dtype) for ours, expected in groups)
    if not error <= TOLERANCES[dtype]:
        raise UserError(
            f"{setting}: what {type(model).__name__} of transformers {transformers.__version__} computes token by "
            f"token, with its cache, differs from what it computes at once by {error:.2g} relative, so rollouts would "
            "not be its own. Use another model, or another version of transformers"
        )


def check_packing(model: PreTrainedModel, setting: str, tokens: Sequence[int] = range(33), bf16: bool = False) -> None:
    """Refuses a model that does not keep texts in one row apart (`padding_free`).

    Which models do depends on the model, its attention and the version of transformers, so they are tried: three texts,
    packed and each alone. Windows and chunks of attention are made shorter than the texts for that long.
    """
    head = head_of(model)
    stream = [token % head.weight.shape[0] for token in repeated(tokens, 33)]
    texts = [torch.tensor([stream[start:end]], device=model.device) for start, end in ((0, 12), (12, 13), (13, 33))]
    positions = torch.cat([torch.arange(ids.shape[1], device=model.device) for ids in texts]).unsqueeze(0)
    dtype = torch.bfloat16 if bf16 else head.weight.dtype
    shape = model.config.get_text_config(decoder=True)
    reach = {name: size for name in ("sliding_window", "attention_chunk_size") if (size := getattr(shape, name, None))}
    try:
        for name in reach:
            setattr(shape, name, 5)
        with (
            trying(model, setting, "given several texts in one row (padding_free: false does without)"),
            torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
        ):
            packed = head.logits(hidden_states(model, torch.cat(texts, 1), None, positions))[0]
            alone = [head.logits(hidden_states(model, ids, torch.ones_like(ids)))[0] for ids in texts]
    finally:
        for name, size in reach.items():
            setattr(shape, name, size)
    parts = packed.split([ids.shape[1] for ids in texts])
    error = max(difference(ours, expected, dtype) for ours, expected in zip(parts, alone))
    if not error <= TOLERANCES[dtype]:
        raise UserError(
            f"padding_free: {type(model).__name__} ({setting}) of transformers {transformers.__version__} does not "
            f"keep texts in one row apart: its logits differ by {error:.2g} relative from those of each alone. Layers "
            "with a state or a convolution do not, nor do masks without positions. Set padding_free to false: "
            "max_tokens_per_device_batch keeps padding low, too"
        )


def repeated(tokens: Sequence[int], count: int) -> list[int]:
    """The first `count` of the tokens, over and over."""
    return list(itertools.islice(itertools.cycle(tokens), count))


def check_save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves all of the student but its weights, so that nothing refuses to be saved at the first checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_student(model, tokenizer, Path(folder), {})
        except Exception as error:  # each class validates in its own way
            raise UserError(
                f"model_name_or_path: the student could not be saved at a checkpoint: {type(error).__name__}: {error}. "
                "Correct what it names in the student's generation_config.json, config.json or tokenizer_config.json"
            ) from error


def check_models(
    config: Config, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> list[str]:
    """All checks on `models`: the "student" and, compared with it, the "teacher", or "teacher NAME" for each of
    several, and perhaps the "reference"."""
    asked = (example["prompt"] for example in prompts.examples[:8])
    texts = [prompt if isinstance(prompt, str) else texts_of(prompt[-1]["content"])[0] for prompt in asked]
    teacher_samples = config.cold_start_steps * config.teacher_share > 0 or config.teacher_probes > 0
    teacher_samples |= config.eval_teacher and has_eval_data(config)
    findings = []
    for whose, model in models.items():
        kind, _, name = whose.partition(" ")
        setting = "model_name_or_path" if kind == "student" else f"{kind}_model_name_or_path"
        path = getattr(config, setting)
        if name:
            setting, path = f"{setting} ({name})", path[name]
        samples = kind == "student" or (kind == "teacher" and teacher_samples)
        check_model(model, setting, prompts, config, samples)
        if whose == "student":
            check_save(model, tokenizer)
            continue
        theirs = load_tokenizer(path, config, setting) if has_tokenizer(path) else None
        said = check_pair(models["student"], model, tokenizer, theirs, texts, whose)
        findings += [line for line in said if not (name and line in findings)]  # once for several teachers
    return findings


def check_pair(
    student: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    other_tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] = (),
    whose: str = "teacher",
) -> list[str]:
    """Vocabulary, end of sequence, padding and chat template of the student and another model.

    Args:
        other_tokenizer: None if there is none beside the other model.
        texts: prompts that both tokenizers should split alike.
        whose: what to call the other model.

    Raises:
        UserError: an id stands for different tokens, a head lacks ids of the tokenizer, or nothing ends a sequence.
    """
    rows_S, rows_T = head_of(student).weight.shape[0], head_of(other).weight.shape[0]
    ids = tokenizer.get_vocab()
    largest = max(ids.values())
    if largest >= min(rows_S, rows_T):
        raise UserError(
            f"the student's tokenizer makes token ids up to {largest}, but the heads have {rows_S} (student) and "
            f"{rows_T} ({whose}) rows. Use the tokenizer that belongs to the models, or resize_token_embeddings"
        )
    rows = f"{rows_S} rows in both heads"
    if rows_S != rows_T:
        rows = f"heads of {rows_S} (student) and {rows_T} ({whose}) rows, compared on the first {min(rows_S, rows_T)}"
    findings = [f"vocabulary: {len(ids)} tokens, {rows}"]
    eos_S = eos_ids_of(student, tokenizer)
    if not eos_S:
        raise UserError("the student has no end-of-sequence token: set eos_token in its tokenizer or generation config")
    if eos_S[0] >= min(rows_S, rows_T):
        raise UserError(
            f"the student's sequences end with {list(eos_S)}, beyond the {min(rows_S, rows_T)} rows that both heads "
            "have, which alone are sampled: set eos_token_id to a token that both know"
        )
    if other_tokenizer is None:
        findings.append(f"warning: there is no tokenizer beside the {whose}; it is taken to share the student's")
        return findings

    other_ids = other_tokenizer.get_vocab()
    other_tokens = {id: token for token, id in other_ids.items()}
    conflicts = [(t, id) for t, id in ids.items() if other_ids.get(t, id) != id or other_tokens.get(id, t) != t]
    if conflicts:
        token, id = min(conflicts, key=lambda conflict: conflict[1])
        raise UserError(
            f"student and {whose} disagree on {len(conflicts)} tokens. The student's {token!r} is id {id}; for the "
            f"{whose} id {id} is {other_tokens.get(id)!r}, and {token!r} is {other_ids.get(token)}. Distributions "
            "cannot be compared token by token then: use models of one family, with the same tokenizer"
        )
    if one_sided := len(ids.keys() ^ other_ids.keys()):
        findings.append(f"warning: {one_sided} tokens are known to one of the two tokenizers (student, {whose}) only")
    for text in texts:
        if tokenizer(text)["input_ids"] != other_tokenizer(text)["input_ids"]:
            findings.append(
                f"warning: the {whose}'s tokenizer splits {text[:40]!r} differently; the {whose} gets the student's "
                "tokens, perhaps in a form it was not trained on"
            )
            break

    eos_T = eos_ids_of(other, other_tokenizer)
    names = ", ".join(str(token or id) for id, token in zip(eos_S, tokenizer.convert_ids_to_tokens(list(eos_S))))
    if eos_S == eos_T:
        findings.append(f"end of sequence: {names}, the same in both")
    else:
        findings.append(
            f"warning: sequences end with {list(eos_S)} ({names}) for the student and {list(eos_T)} for the {whose}. "
            "This is the usual cause of answers that grow without end: set the same eos_token_id in both generation "
            "configs"
        )
    pads = tokenizer.pad_token, other_tokenizer.pad_token
    findings.append(f"padding: {pads[0]}" + ("" if pads[0] == pads[1] else f" and {pads[1]} (masked, so no matter)"))
    if tokenizer.chat_template == other_tokenizer.chat_template:
        findings.append("chat template: " + ("none" if tokenizer.chat_template is None else "the same in both"))
    else:
        findings.append(
            f"warning: the chat templates differ. The student's is used, so the {whose} may read prompts in a form it "
            f"was not trained on: copy the {whose}'s chat_template into the student's tokenizer if the student knows it"
        )
    return findings


def check_prompts(
    config: Config,
    prompts: Prompts,
    questions: Prompts | None,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
) -> list[str]:
    """What became of the prompts, and whether there is room for the completions.

    Raises:
        UserError: there is none, in a model that cannot go beyond its positions.
    """
    findings = [f"data: {len(prompts)} prompts"]
    findings[0] += f", {len(questions)} evaluation questions" if questions else ", no evaluation questions"
    for data in (prompts, questions):
        if data is not None:
            findings += data.remarks + check_prompt_ends(data, tokenizer, eos_ids_of(models["student"], tokenizer))
    findings += unused_settings(config, prompts, questions, tokenizer)
    if "strftime_now" in str(tokenizer.chat_template) and f"{date.today().year}" in tokenizer.decode(prompts.ids[0]):
        findings.append(
            "warning: the chat template writes today's date, so tomorrow the same run has other prompts. If it takes "
            "the date as a variable, set it in chat_template_kwargs, such as {date_string: 26 Jul 2024}"
        )
    plain = isinstance(prompts.examples[0]["prompt"], str)
    if plain and tokenizer.chat_template is not None and not config.apply_chat_template:
        findings.append("prompts are plain text: the chat template is not used (apply_chat_template: true would)")
    most, limit = max(map(len, prompts.ids)) + config.max_completion_length, config.max_tokens_per_device_batch
    if limit is not None and limit < most:
        raise UserError(
            f"max_tokens_per_device_batch: got {limit}, expected {most} or more: a rollout can have so many "
            f"tokens with its prompt ({most - config.max_completion_length} at most), and is not divided. Or lower "
            "max_prompt_length or max_completion_length"
        )
    lengths = [len(ids) for ids in [*prompts.ids, *(questions.ids if questions else [])]]
    longest = max(lengths) + config.max_completion_length
    for whose, model in models.items():
        room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and (over := sum(length >= room for length in lengths)):
            raise UserError(
                f"{over} of {len(lengths)} prompts leave no room for an answer: they have up to {max(lengths)} tokens, "
                f"the {whose} was made for {room}. Set max_prompt_length to {room - 1} or less, which drops them"
            )
        if room is not None and longest > room:
            said = (
                f"prompt and completion can have {longest} tokens, the {whose} was made for {room}: lower "
                "max_completion_length or max_prompt_length"
            )
            if has_position_table(model, room):
                raise UserError(
                    f"{said}. Its positions are a table of {room} rows: the run would end at the first longer"
                )
            findings.append(f"warning: {said}")
    return findings


def unused_settings(
    config: Config, prompts: Prompts, questions: Prompts | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Settings of the data that change nothing."""
    names = [name for name in (config.dataset_name, config.eval_dataset_name) if name is not None]
    unused = []
    if config.dataset_kwargs and all(map(is_file, names)):
        unused.append("dataset_kwargs changes nothing: a file takes none")
    if config.dataset_config is not None and all(is_file(name) or name.startswith("task:") for name in names):
        unused.append("dataset_config changes nothing: it is for a `datasets` name")
    examples = [*prompts.examples, *(questions.examples if questions else [])]
    if not config.apply_chat_template and all(isinstance(example["prompt"], str) for example in examples):
        for setting in ("system_prompt", "chat_template_kwargs"):
            if getattr(config, setting):
                unused.append(f"{setting} changes nothing: the prompts are plain text (apply_chat_template)")
    else:
        known = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
        for name in config.chat_template_kwargs:
            if name not in known and name not in str(tokenizer.chat_template):
                unused.append(f"chat_template_kwargs: {name!r} changes nothing: the chat template does not read it")
    return [f"warning: {line}" for line in unused]


def check_prompt_ends(prompts: Prompts, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[str]:
    """Prompts that end where the answer should begin."""
    ended = [
        ids
        for ids in prompts.ids
        if ids[-1] in eos_ids or (len(ids) > 1 and ids[-2] in eos_ids and tokenizer.decode(ids[-1:]).isspace())
    ]
    if not ended:
        return []
    return [
        f"warning: {len(ended)} of {len(prompts)} prompts, such as {tokenizer.decode(ended[0])[-40:]!r}, end with an "
        "end-of-sequence token: the student is asked to go on where texts end. A chat template should write the header "
        "of the assistant's turn (add_generation_prompt)"
    ]


def has_position_table(model: PreTrainedModel, room: int) -> bool:
    """Whether positions are looked up (GPT-2, OPT with its offset of 2) rather than computed."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return any(room <= one.num_embeddings <= room + 2 for one in tables if one is not model.get_input_embeddings())


def start_verifier(config: Config) -> VerifierPool:
    """The worker processes, starting in the background."""
    try:
        return VerifierPool(
            config.verifier,
            workers=config.verifier_workers,
            timeout=config.verifier_timeout,
            memory_mb=config.verifier_memory_mb,
            truncated_is_incorrect=config.truncated_is_incorrect,
            thought_tags=config.thought_tags,
        )
    except ValueError as error:
        raise UserError(f"verifier: {error}") from error


def check_golds(verifier: VerifierPool, prompts: Prompts | None, questions: Prompts | None) -> list[str]:
    """Reference answers that the verifier cannot use: their rollouts' verdicts are unknown.

    Raises:
        UserError: the verifier does not start, or can use none of the answers.
    """
    findings = []
    for data, name in ((prompts, "training"), (questions, "evaluation")):
        if data is None:
            continue
        with verifying():
            bad = verifier.check_golds(data.examples)
        if not bad:
            continue
        index, reason = bad[0]
        said = f"{len(bad)} of {len(data)} {name} answers, such as {data.examples[index]['answer']!r:.80} ({reason})"
        if len(bad) == len(data):
            raise UserError(f"verifier: cannot use {said}. Check answer_column, or choose another verifier")
        findings.append(f"warning: the verifier cannot use {said}; their rollouts count as unknown")
    return findings
