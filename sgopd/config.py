"""Every setting of a run, in one flat dataclass: defaults, then a YAML file, then `--key value` flags.

The names are TRL's and transformers' where the meaning is the same. The resolved config is written to
`<output_dir>/config.yaml`, which is itself a valid config file.
"""

# ruff: noqa: RUF009 (`free`, `fixed`, `content` and `launch` below are dataclasses.field)

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sgopd.grading import THOUGHT_TAGS

MAX_DEPTH = 64  # of lists and mappings in each other; Python's own limit ends some readers and writers at a few hundred
# What a mapping of arguments may not hold, and what to do instead.
RESERVED = {
    "chat_template_kwargs": {
        "chat_template": "save the template with the student's tokenizer (chat_template.jinja)",
        **dict.fromkeys(
            (
                *("conversation", "conversations", "messages", "add_generation_prompt", "continue_final_message"),
                *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
                *("return_assistant_tokens_mask", "tokenizer_kwargs"),
            ),
            "transformers' apply_chat_template takes it for itself, and training needs its own value. Leave it out",
        ),
    },
    "dataset_kwargs": {
        "path": "use dataset_name",
        "name": "use dataset_config",
        "split": "use dataset_train_split and dataset_test_split",
        "size": "use dataset_size and eval_dataset_size",
        "streaming": "data sets are read whole. Leave it out",
    },
}


# What other libraries call a setting, where spelling would not lead to it.
ELSEWHERE = {
    "lr": "learning_rate",
    **dict.fromkeys(("model", "student"), "model_name_or_path"),
    **dict.fromkeys(("teacher", "teacher_model", "teacher_model_name"), "teacher_model_name_or_path"),
    **dict.fromkeys(("dataset", "data", "train_file"), "dataset_name"),
    **dict.fromkeys(("eval_dataset", "eval_file", "validation_file"), "eval_dataset_name"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "per_device_train_batch_size"),
    "eval_batch_size": "per_device_eval_batch_size",
    **dict.fromkeys(("steps", "epochs", "num_train_epochs"), "max_steps"),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_length"), "max_completion_length"),
    **dict.fromkeys(("reward", "reward_fn", "reward_funcs"), "verifier"),
    **dict.fromkeys(("lora", "peft"), "use_peft"),
    "resume": "resume_from_checkpoint",
    "wandb": "report_to",
    **dict.fromkeys(("packing", "use_remove_padding", "remove_padding"), "padding_free"),
    **dict.fromkeys(("ppo_max_token_len_per_gpu", "use_dynamic_bsz"), "max_tokens_per_device_batch"),
    **dict.fromkeys(("teacher_key", "teacher_routing_column"), "teacher_column"),
    **dict.fromkeys(("teachers", "teacher_models", "teacher_model_names_or_paths"), "teacher_model_name_or_path"),
}


class UserError(Exception):
    """Something the user can put right: its message says what came, what was expected and the remedy."""


class LostProcess(UserError):
    """Another process of the run has ended, or cannot be reached."""


def setting(resume: str, help: str, default: Any = MISSING) -> Any:
    """A dataclass field with the text that `--help` prints, and what a resumed run makes of another value."""
    given = (
        {"default_factory": lambda: copy.deepcopy(default)}
        if isinstance(default, (dict, list))
        else {"default": default}
    )
    return dataclasses.field(**given, metadata={"help": help, "resume": resume})


# What a resumed run makes of another value than its checkpoint was saved with; docs/reliability.md has a table.
free = functools.partial(setting, "free")  # it takes effect from the next update on, and is said
fixed = functools.partial(setting, "fixed")  # refused
content = functools.partial(setting, "content")  # said, and refused unless what it names or makes is the same
launch = functools.partial(setting, "launch")  # says where this process finds the run: not part of it


@dataclass(frozen=True)
class Config:
    # --- models ---
    model_name_or_path: str = fixed("the student: a folder or a hub name; it is trained")
    teacher_model_name_or_path: str | dict = content(
        "the teacher: a folder or a hub name; it stays frozen. Several: their names with theirs, {math: …, code: …}"
    )
    # --- data ---
    dataset_name: str = content(
        "prompts: a .jsonl or .parquet file, a `datasets` name, or task:<name> (sgopd/tasks.py)"
    )
    # --- run directory ---
    output_dir: str = launch("the run directory: config.yaml, metrics.jsonl, completions/, checkpoints/, final/")

    # --- models ---
    reference_model_name_or_path: str | None = content(
        "frozen reference policy: the gate's weight then extrapolates from it to the teacher (method.md, section 2)",
        None,
    )
    teacher_column: str | None = content("with several teachers: column with the name of a prompt's teacher", None)
    teacher_url: str | dict | None = content(
        "address of a server that has the teacher (docs/scaling/teacher.md); teacher_model_name_or_path is its name "
        "there. Of several teachers: one server for all, or the names of those that are elsewhere with their addresses",
        None,
    )
    teacher_top_k: int = free("with teacher_url and estimator full: tokens a position that the server gives", 20)
    teacher_copy: str | dict | None = free(
        "a copy of the served teacher, which its scores are compared with at the start; names with copies of several",
        None,
    )
    teacher_timeout: float = free("seconds that the teacher's server may take for a request", 120.0)
    teacher_connections: int = free("requests to the teacher's server at once, of each process", 8)
    dtype: Literal["float32", "bfloat16"] = free("dtype of the student's weights; part of the recipe", "float32")
    teacher_dtype: Literal["float32", "bfloat16"] = free("dtype of the teacher's and reference's weights", "float32")
    bf16: bool = free("autocast the student's forward and backward to bfloat16; its weights keep `dtype`", False)
    attn_implementation: str | None = free("attention: eager, sdpa or flash_attention_2; transformers chooses", None)
    trust_remote_code: bool = free("allow code that comes with a model or data set to run", False)
    gradient_checkpointing: bool = free("recompute activations in the backward pass: less memory, more time", False)
    use_cpu: bool = free("run on the CPU even where there is a GPU", False)
    num_threads: int | None = free("CPU threads of torch; torch's own choice by default", None)

    # --- adapters ---
    use_peft: bool = fixed("train LoRA adapters (peft) and leave the student's own weights as they are", False)
    lora_r: int = fixed("rank of the adapters", 16)
    lora_alpha: int = fixed("the adapters' part is scaled by lora_alpha / lora_r", 32)
    lora_target_modules: str | list[str] | None = fixed(
        "names of the layers with adapters, a regular expression, or all-linear, without the head; null: peft's choice",
        "all-linear",
    )

    # --- data ---
    dataset_config: str | None = content("configuration of a `datasets` name", None)
    dataset_train_split: str = content("split the prompts come from", "train")
    dataset_size: int = content("examples made by a procedural task; other data sets are taken whole", 10_000)
    dataset_kwargs: dict = content("further arguments of the task or of datasets.load_dataset", {})
    eval_dataset_name: str | None = free("evaluation questions; a task's or a `datasets` name's own by default", None)
    dataset_test_split: str | None = free("split of the evaluation questions; null trains without evaluation", "test")
    eval_dataset_size: int = free("at most this many evaluation questions", 256)
    prompt_column: str = content(
        "column with the prompt: text, or a list of {role, content} messages (docs/data.md)", "prompt"
    )
    answer_column: str = content(
        "column with the reference answer: text, a number, or a list of these that all belong to it", "answer"
    )
    system_prompt: str | None = content("system message put before a conversational prompt", None)
    apply_chat_template: bool = content("make a user message of a plain-text prompt; conversations always are", False)
    chat_template_kwargs: dict = content("arguments of the chat template, such as {enable_thinking: false}", {})
    max_prompt_length: int | None = content("drop prompts with more tokens; the count is reported", None)

    # --- rollouts ---
    max_completion_length: int = free("tokens a rollout may have", 512)
    num_generations: int = free("rollouts per prompt", 1)
    temperature: float = free("of sampling, and of both models in the loss", 1.0)
    top_p: float = free("nucleus sampling: keep the likeliest tokens of this total mass; 1 is off", 1.0)
    top_k: int = free("keep the k likeliest tokens; 0 is off", 0)
    generation_batch_size: int | None = free("rollouts generated at once per process; all of a batch by default", None)

    sampler: Literal["plain", "vllm"] = free("where rollouts come from: this process, or a vLLM server", "plain")
    sampler_url: str | None = free("with sampler vllm: its address (docs/scaling/rollouts.md)", None)
    sampler_folder: str | None = free(
        "folder for the weights, which the server sees under the same path; sampler/ in output_dir by default", None
    )
    sampler_timeout: float = free("seconds that the sampler's server may take for a request", 600.0)
    sampler_connections: int = free("requests to the sampler's server at once, of each process", 8)
    sampler_tolerance: float = free(
        "nats by which the server's log-probabilities of known tokens may differ from the trainer's, on average", 0.05
    )
    importance_clip: float | None = free(
        "weight each of the student's rollouts by its probability now over that when it was sampled, at most this; "
        "null: not at all",
        None,
    )

    # --- verifier ---
    verifier: str = free("math, exact, reasoning-gym, or package.module:function", "math")
    verifier_workers: int = free("verifier processes", 2)
    verifier_timeout: float = free("seconds a single answer may take before its worker is killed", 3.0)
    verifier_memory_mb: int = free("MiB of memory a verifier process may use", 2048)
    truncated_is_incorrect: bool = free("a rollout that ran out of tokens is incorrect without being read", True)
    thought_tags: list[list[str]] = free(
        "[open, close] pairs: what stands between is not read for an answer; the tags that are special tokens are kept "
        "in a rollout's text",
        [list(pair) for pair in THOUGHT_TAGS],
    )

    # --- loss (sgopd_kernels.gated_kl_loss) ---
    gate: str = free(
        "sg-opd, opd, opdvr, protect, half, trust, q-protect, exopd, rg-opd, r2-opd, tgopd, diffgate, inverse, "
        "verified-only, failure-only, random, shuffled (docs/gates.md)",
        "sg-opd",
    )
    gate_agree: float | list[float] | None = free(
        "weight where teacher and verdict agree; a pair is (in correct, in incorrect rollouts); the preset's", None
    )
    gate_conflict: float | list[float] | None = free(
        "weight where they disagree; a pair is (in correct, in incorrect rollouts); the preset's", None
    )
    gate_neutral: float | None = free("weight where neither: d within the tolerance, or no verdict; the preset's", None)
    gate_tolerance: float | None = free("nats around d = 0 that count as neither; the preset's", None)
    gate_reliability: Literal["preset", "conflict", "scale", "cap"] = free(
        "how a pass rate r of the teacher on a prompt enters: in conflicts (teacher_reliability); or in an incorrect "
        "rollout, every weight times r, or at most r; the preset's",
        "preset",
    )
    gate_control: Literal["preset", "random", "shuffled"] = free(
        "a control of the gate, with its weights and without its information. random: tokens are dealt to agree and "
        "conflict by chance, at the measured rate; shuffled: with the verdicts of other rollouts; the preset's",
        "preset",
    )
    gate_margin: float = free(
        "of gate rg-opd: nats a whole rollout between teacher and student that count as neither", 0.0
    )
    gate_sharpness: float = free("of gate r2-opd: its beta; 0 is plain distillation, a large one drops conflicts", 1e-3)
    gate_bound: float = free("of gate diffgate: nats at which its pull to the teacher levels off", 1.0)
    prompt_weight: list[float] | None = free(
        "[a, b]: a prompt weighs p^a (1 - p)^b, p the student's share of correct answers to it so far; null is off",
        None,
    )
    position_half_life: float | None = free("tokens of a completion after which a token weighs half; null is off", None)
    estimator: Literal["full", "sampled"] = free("exact KL over the vocabulary, or the sampled token only", "full")
    divergence: Literal["reverse-kl", "forward-kl", "jsd", "skew-reverse-kl", "skew-forward-kl", "alpha"] = free(
        "what is minimised (method.md, section 2)", "reverse-kl"
    )
    jsd_beta: float = free("of divergence jsd, in (0, 1); 0.5 is the symmetric one", 0.5)
    divergence_alpha: float = free("of the skew divergences, where DistiLLM takes 0.1, and of alpha; in [0, 1)", 0.1)
    precision: float | str = free("exact, bf16, auto, or a relative gradient error such as 1e-3", "auto")
    backend: str = free("kernel: auto, reference, torch, cpu, triton or cuda", "auto")

    # --- task reward ---
    reward_weight: float = free(
        "weight, beside the distillation loss, of the policy gradient on being correct: a student rollout's advantage "
        "is its reward, 1 or 0, less the mean of its prompt's rollouts; 0 is off",
        0.0,
    )

    # --- phased teacher sampling ---
    cold_start_steps: int = free("updates during which teacher rollouts may fill slots; 0 is off", 0)
    teacher_share: float = free("share of the rollout slots offered to the teacher at the first update", 0.5)
    teacher_share_schedule: Literal["linear", "cosine", "constant"] = free(
        "how that share falls to 0 over cold_start_steps", "linear"
    )
    teacher_rollout_loss: Literal["same", "forward-kl", "nll"] = free(
        "loss on teacher rollouts: the same as on the student's, the gated forward KL over the vocabulary, or the "
        "plain negative log-likelihood",
        "same",
    )
    teacher_reliability: Literal["off", "all", "incorrect"] = free(
        "trust the teacher in conflicts as far as the verifier endorsed its own rollouts on the prompt: in no, "
        "all, or only incorrect rollouts",
        "off",
    )
    teacher_reliability_source: Literal["teacher", "student", "dealt"] = free(
        "whose share of correct rollouts that is: the teacher's; the student's own; or, as a control, the teacher's on "
        "another prompt of the batch",
        "teacher",
    )
    teacher_reliability_prior: float | None = free(
        "the share over all prompts counts as so many rollouts more on each; 1 with gate trust, else 0, by default",
        None,
    )
    teacher_reliability_power: float = free("exponent on that share", 1.0)
    teacher_reliability_threshold: float | None = free("the share counts as 1 from here on, as 0 below", None)
    teacher_probes: int = free("teacher rollouts drawn for every prompt at least, to measure reliability", 0)

    # --- optimisation ---
    max_steps: int = free("optimiser updates", 1000)
    per_device_train_batch_size: int = free("rollouts per process and forward pass", 8)
    gradient_accumulation_steps: int = free("forward passes per update", 1)
    max_tokens_per_device_batch: int | None = free(
        "tokens of a forward pass, padding among them, at most: an update's rollouts, per_device_train_batch_size x "
        "gradient_accumulation_steps of each process, are divided into forward passes by this instead",
        None,
    )
    padding_free: bool = free(
        "put the rollouts of a forward pass one after another in one row, where attention keeps them apart "
        "(docs/scaling/memory.md)",
        False,
    )
    num_iterations: int = fixed("updates made on each batch of rollouts", 1)
    learning_rate: float = free("peak learning rate of AdamW", 1e-6)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        free("learning-rate schedule over max_steps (transformers.get_scheduler)", "linear")
    )
    warmup_steps: int = free("updates over which the learning rate rises from 0", 0)
    weight_decay: float = free("of AdamW", 0.0)
    adam_beta1: float = free("of AdamW", 0.9)
    adam_beta2: float = free("of AdamW", 0.999)
    adam_epsilon: float = free("of AdamW", 1e-8)
    max_grad_norm: float = free("clip the gradient to this norm; 0 is off", 1.0)
    max_skipped_steps: int = free("stop once this many updates were skipped for a non-finite loss or gradient", 10)
    seed: int = fixed("of data order, sampling and dropout", 0)

    # --- processes ---
    fsdp: bool = fixed(
        "put the student, its gradient and optimiser state into shards over the processes (FSDP2, "
        "docs/scaling/processes.md)",
        False,
    )
    fsdp_teacher: bool = free("with fsdp, the teacher's body as well", False)

    # --- evaluation ---
    eval_steps: int | None = free("evaluate every so many updates; at the end only by default", None)
    eval_on_start: bool = fixed("evaluate the student before the first update", False)
    eval_teacher: bool = fixed("evaluate the teacher before the first update", False)
    num_generations_eval: int = free("rollouts per question: avg@k over all of them", 16)
    eval_k: int | None = free("k of pass@k; num_generations_eval by default", None)
    eval_temperature: float = free("of evaluation rollouts; 0 is greedy", 1.0)
    per_device_eval_batch_size: int = free("evaluation rollouts generated at once per process", 64)

    # --- logging and checkpoints ---
    logging_steps: int = free("print, track and keep completions every so many updates (metrics.jsonl has all)", 10)
    stop_on_warning: bool = free(
        "save and stop when one of the report's checks first warns; they run every logging_steps, after ten updates",
        False,
    )
    num_completions_to_log: int = free("rollouts kept per interval in completions/; 0 is off", 64)
    num_tokens_to_log: int = free(
        "tokens of each of these that are kept with d, KL, weight and entropies, for the report's inspector; 0 is off",
        1024,
    )
    report_to: str | list[str] = free("none, or accelerate's trackers: wandb, tensorboard, trackio, …", "none")
    run_name: str | None = free("name of the run at wandb and trackio; the folder's name by default", None)
    save_steps: int | None = free("checkpoint every so many updates; at the end only by default", None)
    save_total_limit: int | None = free(
        "newest checkpoints kept, besides the best by avg@k of those of evaluated updates; null keeps all", 2
    )
    push_to_hub: bool = free(
        "push final/, with a model card, to the Hugging Face Hub at the end, as whom HF_TOKEN or `hf auth login` says",
        False,
    )
    hub_model_id: str | None = free("the repository there; by default the run directory's name, in your account", None)
    hub_private_repo: bool | None = free("whether it becomes private where it is made; the account's custom", None)
    hub_strategy: Literal["end", "every_save"] = free(
        "push at the end alone, or each checkpoint's model as well", "end"
    )
    resume_from_checkpoint: str | None = launch(
        "a checkpoint folder, or auto: the newest valid one of output_dir, else from the start", None
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for number in value if isinstance(value, list) else [value]:
                self._expect(name, not isinstance(number, float) or math.isfinite(number), "a finite number")
        for name, remedies in RESERVED.items():
            for key in getattr(self, name).keys() & remedies:
                raise UserError(f"{name}: got {key!r}, which is no argument here: {remedies[key]}")
        at_least = {
            0: "top_k cold_start_steps teacher_probes warmup_steps weight_decay max_grad_norm eval_temperature "
            "num_completions_to_log num_tokens_to_log",
            1: "dataset_size eval_dataset_size max_completion_length num_generations verifier_workers max_steps "
            "verifier_memory_mb per_device_train_batch_size gradient_accumulation_steps num_iterations eval_steps "
            "num_generations_eval eval_k per_device_eval_batch_size logging_steps save_steps save_total_limit "
            "max_prompt_length generation_batch_size num_threads max_skipped_steps teacher_top_k teacher_connections "
            "lora_r lora_alpha sampler_connections max_tokens_per_device_batch",
        }
        for least, names in at_least.items():
            for name in names.split():
                self._expect(name, getattr(self, name) is None or getattr(self, name) >= least, f">= {least}")
        prior, power = self.teacher_reliability_prior, self.teacher_reliability_power
        self._expect("teacher_reliability_prior", prior is None or prior >= 0, ">= 0")
        self._expect("teacher_reliability_power", power > 0, "> 0")
        threshold = self.teacher_reliability_threshold
        self._expect("teacher_reliability_threshold", threshold is None or 0 <= threshold <= 1, "a share, in [0, 1]")
        schedule = self.lr_scheduler_type
        rises = self.warmup_steps == 0 or schedule != "constant"
        self._expect("warmup_steps", rises, "0 with lr_scheduler_type constant; constant_with_warmup has them")
        falls = self.learning_rate > 1e-7 or schedule != "polynomial"
        self._expect("learning_rate", falls, "> 1e-7 with lr_scheduler_type polynomial, which ends there")
        exponents, half_life = self.prompt_weight, self.position_half_life
        two = exponents is None or (len(exponents) == 2 and min(exponents) >= 0)
        self._expect("prompt_weight", two, "two exponents >= 0, such as [1, 1]")
        self._expect("position_half_life", half_life is None or half_life > 0, "> 0 tokens")
        self._expect("gate_bound", self.gate_bound > 0, "> 0 nats")
        self._expect("reward_weight", self.reward_weight >= 0, ">= 0")
        if self.reward_weight:
            alone = "with reward_weight: a rollout is compared with the others of its prompt"
            self._expect("num_generations", self.num_generations > 1, f">= 2 {alone}")
            fresh = "1 with reward_weight: its gradient is only right on fresh rollouts"
            self._expect("num_iterations", self.num_iterations == 1, fresh)
        for name in ("gate_margin", "gate_sharpness"):
            self._expect(name, getattr(self, name) >= 0, ">= 0")
        for name in (
            *("temperature", "learning_rate", "verifier_timeout", "teacher_timeout"),
            *("sampler_timeout", "sampler_tolerance", "importance_clip"),
        ):
            self._expect(name, getattr(self, name) is None or getattr(self, name) > 0, "> 0")
        self._expect("adam_epsilon", self.adam_epsilon > 0, "> 0: a weight without a gradient would become 0 / 0")
        pairs = all(len(pair) == len({*pair} - {""}) == 2 for pair in self.thought_tags)
        self._expect("thought_tags", pairs, "pairs of two different texts: [[<think>, </think>], …]")
        for name in ("top_p", "teacher_share"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._expect("top_p", self.top_p > 0, "> 0")
        for name in ("jsd_beta", "divergence_alpha", "adam_beta1", "adam_beta2"):
            self._expect(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("save_steps", "eval_steps", "max_steps"):
            steps = getattr(self, name)
            self._expect(
                name,
                steps is None or steps % self.num_iterations == 0,
                f"a multiple of num_iterations ({self.num_iterations}): a batch of rollouts is used up before",
            )
        self._expect(
            "num_generations",
            self.rollouts_per_batch % self.num_generations == 0,
            "a divisor of per_device_train_batch_size x gradient_accumulation_steps "
            f"({self.per_device_train_batch_size} x {self.gradient_accumulation_steps})",
        )
        self._expect(
            "num_iterations",
            self.num_iterations == 1 or self.estimator == "full",
            "1 with estimator sampled: its gradient is only right on fresh rollouts. Use estimator full",
        )
        self._expect(
            "divergence",
            self.divergence == "reverse-kl" or self.estimator == "full",
            "reverse-kl with estimator sampled, which is the policy gradient of that divergence. Use estimator full",
        )
        if isinstance(self.teacher_model_name_or_path, dict):
            self._check_several(self.teacher_model_name_or_path)
        else:
            several = "without several teachers in teacher_model_name_or_path"
            self._expect("teacher_column", self.teacher_column is None, f"null {several}")
            self._expect("teacher_url", not isinstance(self.teacher_url, dict), f"one address {several}")
            self._expect("teacher_copy", not isinstance(self.teacher_copy, dict), f"one path {several}")
            if self.teacher_url is not None:
                self._check_served()
            self._expect(
                "teacher_copy", self.teacher_copy is None or self.teacher_url is not None, "null without teacher_url"
            )
        self._expect(
            "sampler_url",
            (self.sampler_url is not None) == (self.sampler == "vllm"),
            "http://HOST:PORT with sampler vllm, null with another",
        )
        if self.sampler_url is not None:
            self._expect("sampler_url", self.sampler_url.startswith(("http://", "https://")), "http://HOST:PORT")
            self._expect_no_filter("with sampler vllm: it gives log-probabilities of what is left after the filter")
        if self.importance_clip is not None:
            self._expect_no_filter("with importance_clip: the sampler's log-probabilities are those before the filter")
        self._expect("fsdp_teacher", self.fsdp or not self.fsdp_teacher, "false without fsdp")
        self._expect(
            "eval_k",
            (self.eval_k or 1) <= self.num_generations_eval,
            f"<= num_generations_eval ({self.num_generations_eval})",
        )

    def _expect_no_filter(self, why: str) -> None:
        self._expect("top_k", self.top_k == 0, f"0 {why}")
        self._expect("top_p", self.top_p == 1, f"1 {why}")

    def _check_served(self) -> None:
        """What a teacher elsewhere cannot do."""
        why = "with teacher_url: a served teacher scores, and writes nothing"
        self._expect("teacher_url", str(self.teacher_url).startswith(("http://", "https://")), "http://HOST:PORT")
        self._expect("cold_start_steps", self.cold_start_steps * self.teacher_share == 0, f"0 {why}")
        self._expect("teacher_probes", self.teacher_probes == 0, f"0 {why}")
        self._expect("eval_teacher", not self.eval_teacher, f"false {why}")
        self._expect("fsdp_teacher", not self.fsdp_teacher, "false with teacher_url: it is not in these processes")

    def _check_several(self, paths: dict[str, Any]) -> None:
        """Teachers under names, and what cannot be done with more than one."""
        for name in ("teacher_model_name_or_path", "teacher_url", "teacher_copy"):
            values = getattr(self, name)
            right = not isinstance(values, dict) or (values and all(isinstance(one, str) for one in values.values()))
            self._expect(name, bool(right), "a text for each name: {math: …, code: …}")
        why = "with several teachers"
        column = f"the column with the name of each prompt's teacher ({', '.join(paths)}) {why}"
        self._expect("teacher_column", self.teacher_column is not None, column)
        self._expect("teacher_copy", not isinstance(self.teacher_copy, str), f"a path for each name {why}")
        for name in ("teacher_url", "teacher_copy"):
            if isinstance(values := getattr(self, name), dict):
                known = f"names of teacher_model_name_or_path: {', '.join(paths)}"
                self._expect(name, values.keys() <= paths.keys(), known)
        self._expect("eval_teacher", not self.eval_teacher, f"false {why}: evaluate each as a student, by itself")
        self._expect("fsdp_teacher", not self.fsdp_teacher, f"false {why}: a process may have prompts of one alone")
        _ = self.teachers  # each with its own checks

    @property
    def teachers(self) -> dict[str, Config]:
        """For each teacher the settings of a run that had it alone: under its name, or "" where there is but one."""
        paths = self.teacher_model_name_or_path
        if not isinstance(paths, dict):
            return {"": self}
        urls = self.teacher_url if isinstance(self.teacher_url, dict) else dict.fromkeys(paths, self.teacher_url)
        copies = self.teacher_copy if isinstance(self.teacher_copy, dict) else {}
        return {
            name: dataclasses.replace(
                self,
                teacher_model_name_or_path=path,
                teacher_column=None,
                teacher_url=urls.get(name),
                teacher_copy=copies.get(name),
            )
            for name, path in paths.items()
        }

    def _expect(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise UserError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def divergence_argument(self) -> str | tuple[str, float]:
        """`divergence` and its parameter, as the loss takes them."""
        if self.divergence in ("reverse-kl", "forward-kl"):
            return self.divergence
        return self.divergence, self.jsd_beta if self.divergence == "jsd" else self.divergence_alpha

    @property
    def rollouts_per_batch(self) -> int:
        """Rollouts per process between two updates of the data position."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @classmethod
    def load(cls, path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
        """A YAML file (or none), then `overrides`; values are checked against the fields' types.

        Raises:
            UserError: unreadable file, unknown or missing key, wrong type or value.
        """
        values = {**(read_yaml(path) if path is not None else {}), **(overrides or {})}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise UserError(unknown("setting", name, fields))
        missing = [n for n, f in fields.items() if f.default is f.default_factory is MISSING and n not in values]
        if missing:
            raise UserError(
                f"missing settings: {', '.join(missing)}. Put them in {path or 'a file: sgopd train CONFIG.yaml'}, or "
                f"pass --{missing[0]} …"
            )
        hints = typing.get_type_hints(cls)
        return cls(**{name: convert(name, value, hints[name]) for name, value in values.items()})

    def to_yaml(self, launch: bool = True) -> str:
        """The resolved config as YAML: `Config.load` gives an equal one back. `launch`: with where the run is found."""
        kept = {f.name for f in dataclasses.fields(self) if launch or f.metadata["resume"] != "launch"}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name in kept}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping of settings."""
    text = read_text(path, "config file")
    try:
        values = load_yaml(text, f"{path}")
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's takes the last of two equal keys without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise UserError(
                    f"{self.name}: the key {key.value!r} is there twice, in line {lines[key.value]} and line {line}: "
                    "leave one out"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return node


def load_yaml(text: str, source: str) -> Any:
    """What YAML `text` says; `source` names it in messages."""
    loader = _Loader(text)
    loader.name = source
    try:
        value = loader.get_single_data()
        if nested_deeper(value):
            raise RecursionError
    except RecursionError as error:
        raise UserError(f"{source}: lists and mappings are nested more than {MAX_DEPTH} deep") from error
    finally:
        loader.dispose()
    return value


def nested_deeper(value: Any) -> bool:
    """Whether lists and mappings lie more than MAX_DEPTH deep in each other, or in themselves."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [one for one in level if isinstance(one, (list, dict))]
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def read_text(path: str | Path, what: str) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
        if "\0" not in text:
            return text
        start = data.index(0)  # ASCII in two or four bytes a character is valid UTF-8
    except UnicodeDecodeError as error:
        start = error.start
    readings = {}
    for encoding in (
        ("utf-32", "utf-16", "utf-16-be") if b"\0" in data else ("cp1252", "gb18030", "shift_jis", "euc_kr")
    ):
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if ":" in text and not re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", text):
                readings[encoding] = re.sub(r"(?s)^\ufeff?[\x00-\x7f]*?([\x00-\x7f]{0,12}[^\x00-\x7f])", r"\1", text)[
                    :24
                ]
    line = data.count(b"\n", 0, start) + 1
    problem = f"{path}, line {line}: not UTF-8"
    if not readings:
        raise UserError(f"{problem}, nor text in another encoding that was tried. Is the file compressed, or no text?")
    says = ", as ".join(f"{encoding} {reading!r}" for encoding, reading in readings.items())
    raise UserError(
        f"{problem}. As {says}. Save it in UTF-8 from the encoding that reads right: "
        f"iconv -f {next(iter(readings))} -t UTF-8 {path} > NEW_FILE"
    )


def unknown(what: str, name: object, known: typing.Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    known, dashes = list(known), "--" if str(name).startswith("--") else ""
    meant = dashes + ELSEWHERE.get(str(name).lstrip("-").replace("-", "_"), "")
    near = [meant] if meant in known else difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {what} {name!r}" + (
        f"; did you mean {near[0]!r}?" if near else "; `sgopd train --help` lists them"
    )


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or a UserError that says what was expected.

    An int is taken for a float; so is text such as "1e-6", which YAML 1.1 does not read as a number.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(kind, types.GenericAlias):  # list[str], list[float]
            (item,) = typing.get_args(kind)
            if isinstance(value, (list, tuple)):
                return [convert(name, v, item) for v in value]
        elif typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                continue
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            if kind in (dict, str):
                check_plain(name, value)
            return value
    raise UserError(f"{name}: got {value!r:.200} ({type(value).__name__}), expected {describe(hint)}")


def check_plain(name: str, value: Any) -> None:
    """Refuses what config.yaml and metrics.jsonl cannot give back: dates, sets, bytes, keys that are no text, …"""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UserError(f"{name}: the key {key!r:.80} is no text. Put it in quotes")
            check_plain(f"{name}: {key}", [key, item])
    elif isinstance(value, list):
        for item in value:
            check_plain(name, item)
    elif isinstance(value, str):
        if re.search(r"[\ud800-\udfff]", value):  # bytes of the command line, or an escape in the file
            raise UserError(f"{name}: got {value!a:.80}, which UTF-8 cannot write. Use Unicode text")
    elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise UserError(
            f"{name}: got {value!r:.80} ({type(value).__name__}), expected text, a finite number, true, false, null, a "
            "list or a mapping. Put it in quotes to have it as text"
        )


def describe(hint: Any) -> str:
    """A field's type in words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.GenericAlias):
        return f"a list of {describe(typing.get_args(hint)[0])}"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
    return words.get(hint, "null")


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as one would write it in the YAML file."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return value if isinstance(value, str) else json.dumps(value)


def parse_flag(name: str, text: str) -> Any:
    """The value of `--name text`: as it stands for a text field, else read as YAML (so null, [0, 1], {a: 1} work).

    Where a text or a mapping is expected, it is a mapping if it begins with a brace.
    """
    hint = typing.get_type_hints(Config)[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    texts = all(kind is str or kind is types.NoneType or typing.get_origin(kind) is Literal for kind in kinds)
    if texts or (str in kinds and dict in kinds and not text.startswith("{")):
        return None if text == "null" and types.NoneType in kinds else text
    try:
        return load_yaml(text, f"--{name}")
    except (yaml.YAMLError, ValueError):
        return text
