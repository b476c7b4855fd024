"""What is checked before the first rollout: the models together, the prompts, the verifier.

Each check refuses with a `UserError` what cannot work, and returns a line for what a person should know; lines that
ask for action begin with "warning".
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from datetime import date

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.data import Prompts, has_eval_data
from sgopd.model_checks import check_model, check_save
from sgopd.models import eos_ids_of, has_tokenizer, head_of, load_tokenizer
from sgopd.rows import is_file, texts_of
from sgopd.verdicts import verifying
from sgopd.verifier import VerifierPool
from sgopd.weights import asks_pass_rate
from sgopd_kernels import Gate


def unread(config: Config, gate: Gate) -> list[str]:
    """A line for each setting that was given and that is not read beside the others, or does little there."""
    this = f"gate {config.gate}"
    owners = {"gate_margin": "rg-opd", "gate_sharpness": "r2-opd", "gate_bound": "diffgate"}
    beside = {name: this for name, owner in owners.items() if config.gate != owner}
    if not asks_pass_rate(config, gate):
        beside |= {f"teacher_reliability_{name}": this for name in ("source", "prior", "power", "threshold")}
    elif config.gate == "tgopd" or config.teacher_reliability_threshold is not None:
        beside["teacher_reliability_power"] = "a threshold, which makes r 0 or 1"
    parameters = {"jsd_beta": ("jsd",), "divergence_alpha": ("skew-reverse-kl", "skew-forward-kl", "alpha")}
    for name, divergences in parameters.items():
        if config.divergence not in divergences:
            beside[name] = f"divergence {config.divergence}"
    default = {field.name: field.default for field in dataclasses.fields(Config)}
    lines = [
        f"warning: {name} is {value}, and is not read with {what}"
        for name, what in beside.items()
        if (value := getattr(config, name)) != default[name]
    ]
    return lines + seldom_best(config)


def seldom_best(config: Config) -> list[str]:
    """A line where checkpoints are saved that cannot be the best, which `save_total_limit` keeps."""
    save, evaluate = config.save_steps, config.eval_steps
    if save is None or evaluate is None or config.save_total_limit is None or not has_eval_data(config):
        return []
    both = math.lcm(save, evaluate)
    if both == save:
        return []
    few = f"one in {both // save} of the checkpoints before the last is" if both < config.max_steps else "the last is"
    return [
        f"warning: save_steps is {save} and eval_steps {evaluate}: only {few} of an update that is evaluated, and can "
        "be kept as the best. Make save_steps a multiple of eval_steps"
    ]


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
    prompts: Prompts | None,
    questions: Prompts | None,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
) -> list[str]:
    """What became of the prompts, and whether there is room for the completions.

    Args:
        prompts: None where nothing is trained, only evaluated.
        questions: None where nothing is evaluated; one of both is there.
        models: the first one's sequences end the rollouts.

    Raises:
        UserError: there is no room, in a model that cannot go beyond its positions.
    """
    findings: list[str] = []
    if prompts is not None:
        evaluated = f"{len(questions)} evaluation questions" if questions else "no evaluation questions"
        findings.append(f"data: {len(prompts)} prompts, {evaluated}")
    sets = [data for data in (prompts, questions) if data is not None]
    eos_ids = eos_ids_of(next(iter(models.values())), tokenizer)
    for data in sets:
        findings += data.remarks + check_prompt_ends(data, tokenizer, eos_ids)
    findings += unused_settings(config, sets, tokenizer)
    if "strftime_now" in str(tokenizer.chat_template) and f"{date.today().year}" in tokenizer.decode(sets[0].ids[0]):
        findings.append(
            "warning: the chat template writes today's date, so tomorrow the same run has other prompts. If it takes "
            "the date as a variable, set it in chat_template_kwargs, such as {date_string: 26 Jul 2024}"
        )
    plain = isinstance(sets[0].examples[0]["prompt"], str)
    if plain and tokenizer.chat_template is not None and not config.apply_chat_template:
        findings.append("prompts are plain text: the chat template is not used (apply_chat_template: true would)")
    limit = config.max_tokens_per_device_batch
    if prompts is not None and limit is not None:
        most = max(map(len, prompts.ids)) + config.max_completion_length
        if limit < most:
            raise UserError(
                f"max_tokens_per_device_batch: got {limit}, expected {most} or more: a rollout can have so many "
                f"tokens with its prompt ({most - config.max_completion_length} at most), and is not divided. Or lower "
                "max_prompt_length or max_completion_length"
            )
    lengths = [len(ids) for data in sets for ids in data.ids]
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


def unused_settings(config: Config, sets: Sequence[Prompts], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Settings of the data that change nothing."""
    names = [name for name in (config.dataset_name, config.eval_dataset_name) if name is not None]
    unused = []
    if config.dataset_kwargs and all(map(is_file, names)):
        unused.append("dataset_kwargs changes nothing: a file takes none")
    if config.dataset_config is not None and all(is_file(name) or name.startswith("task:") for name in names):
        unused.append("dataset_config changes nothing: it is for a `datasets` name")
    examples = [example for data in sets for example in data.examples]
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
