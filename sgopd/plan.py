"""`sgopd plan CONFIG.yaml`: memory and seconds of a step, before anything is loaded.

Sizes are counted on the models themselves, on torch's meta device, which has shapes and no data: parameters, and the
tensors that a forward pass keeps for its backward. The rest is arithmetic, which docs/scaling/plan.md states. Rates are
assumed shares of the vendor's numbers; with a run at hand, seconds are scaled by what that run has taken.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sgopd import lora
from sgopd.config import Config, UserError
from sgopd.models import adapter, head_of, hidden_states
from sgopd.report.run import read_metrics
from sgopd_kernels import backends

GB = 1e9
# Assumed shares: of the peak rate, of the bandwidth, and of memory before it is tight.
COMPUTE, STREAM, FULL = 0.4, 0.5, 0.92
LIBRARIES = 0.5e9  # bytes of Python and its libraries; on a GPU of the driver's context
DISK = 1e9  # bytes a second, of the folder through which a sampler's server gets the weights


class Device(NamedTuple):
    """Per process: what the vendor states, dense and without sparsity."""

    bf16: float  # floating-point operations a second
    fp32: float
    bandwidth: float  # bytes a second of its memory …
    memory: float  # … and bytes of it
    link: float  # bytes a second between two processes


DEVICES = {
    "h100": Device(989e12, 67e12, 3.35e12, 80e9, 450e9),
    "h200": Device(989e12, 67e12, 4.8e12, 141e9, 450e9),
    "a100": Device(312e12, 19.5e12, 2.04e12, 80e9, 300e9),
    "l40s": Device(362e12, 91.6e12, 0.864e12, 48e9, 32e9),
    "cpu": Device(
        8e11, 4e11, 20e9, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 1e9
    ),  # two cores, roughly
}


@dataclass
class Sizes:
    """Of one model: counts, not bytes."""

    parameters: int  # tied ones once
    head: int
    block: int  # the largest transformer block
    width: int
    vocabulary: int
    layers: int
    heads: int
    cache: int  # numbers that a token leaves in the key-value cache
    model: PreTrainedModel = field(repr=False)

    @property
    def body(self) -> int:
        """Parameters that every token passes through."""
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        return self.parameters - self.head * (1 if tied else 2)


def sizes_of(path: str, dtype: torch.dtype, config: Config, setting: str) -> Sizes:
    """Raises UserError where there is no config of a causal language model."""
    if (Path(path) / lora.CONFIG).is_file():
        raise UserError(adapter(path, setting))  # as training does
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers and the hub have their own
        raise UserError(f"{setting}: cannot read the shape of {path!r}: {type(error).__name__}: {error}") from error
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    depth = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [count(module) for module in model.modules() if type(module).__name__ in names]
    head = head_of(model).weight
    return Sizes(
        parameters=count(model),
        head=head.numel(),
        block=max(blocks, default=0),
        width=head.shape[1],
        vocabulary=head.shape[0],
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        cache=2 * text.num_hidden_layers * heads * depth,
        model=model,
    )


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kept_for_backward(model: PreTrainedModel, rows: int, length: int) -> int:
    """Bytes that a forward pass of `rows` texts of `length` tokens keeps, counted on the meta device.

    Weights are not counted, nor attention's matrices of positions by positions, which depend on its kind.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tuple(tensor.shape[-2:]) != (length, length):
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    # With all four dimensions it is taken as it is; one of fewer would be looked into, and there are no data.
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = hidden_states(model, ids, mask)
        total = sum(storage.nbytes() for storage in kept.values())
    del hidden
    return total


@dataclass
class Stage:
    """A line of the plan: bytes at its peak, and seconds, for one process."""

    name: str
    parts: dict[str, float]  # what is in memory
    seconds: float | None  # None: it depends on the verifier
    source: str = "arithmetic"  # of the seconds

    @property
    def memory(self) -> float:
        return sum(self.parts.values())


def plan(config: Config, device: Device, processes: int, prompt: int) -> list[Stage]:
    """The stages of one step, for prompts of `prompt` tokens and completions of max_completion_length."""
    base, rank = lora.base_of(config.model_name_or_path, config)
    student = sizes_of(base, dtype_of(config.dtype), config, "model_name_or_path")
    width_S = dtype_of(config.dtype).itemsize
    trained = lora_parameters(student, rank) if config.use_peft else student.parameters
    width_O = 4 if config.use_peft else width_S  # adapters are float32
    shards = processes if config.fsdp else 1
    rollouts, micro = config.rollouts_per_batch, config.per_device_train_batch_size
    prompts = -(-rollouts // config.num_generations)
    answer = config.max_completion_length
    length = prompt + answer
    if config.max_tokens_per_device_batch is not None:
        micro = min(rollouts, max(1, config.max_tokens_per_device_batch // length))
    low = config.bf16 or config.dtype == "bfloat16"
    peak = device.bf16 if low else device.fp32

    # --- what is there throughout ---
    fixed = {
        "libraries": LIBRARIES,
        "student": student.parameters * width_S / shards,
        "optimiser": 2 * trained * width_O / shards,
    }
    others: dict[str, Sizes] = {}
    width_T = dtype_of(config.teacher_dtype).itemsize
    paths: dict[str, Any] = {
        f"teacher {name}".rstrip(): one.teacher_model_name_or_path
        for name, one in config.teachers.items()
        if one.teacher_url is None
    }
    for whose, path in {**paths, "reference": config.reference_model_name_or_path}.items():
        if path is not None:
            other = sizes_of(path, dtype_of(config.teacher_dtype), config, f"{whose.split()[0]}_model_name_or_path")
            split = processes if whose == "teacher" and config.fsdp_teacher else 1
            fixed[whose] = ((other.parameters - other.head) / split + other.head) * width_T
            others[whose] = other

    # --- rollouts ---
    def generation(of: Sizes, texts: int, width: float, width_cache: int) -> tuple[dict[str, float], float]:
        """Bytes beside what is there throughout, and seconds; `width`: bytes read of each weight in a step."""
        at_once = min(config.generation_batch_size or texts, texts)
        batches = -(-texts // at_once)
        cache = at_once * length * of.cache * width_cache
        rows = 8 if config.top_k or config.top_p < 1 else 4  # of float32 logits: as they are, and filtered
        bytes_read = answer * batches * (of.parameters * width + cache * (prompt + answer / 2) / length)
        operations = 2 * (of.body + of.head) * texts * answer
        seconds = max(bytes_read / (device.bandwidth * STREAM), operations / (peak * COMPUTE))
        read = max(prompts, batches)  # a prompt once in each batch of them
        seconds += 2 * of.body * read * prompt / (peak * COMPUTE)
        return {"cache": cache, "logits": rows * 4 * at_once * of.vocabulary}, seconds

    autocast = config.bf16 and config.dtype == "float32"
    keeps_copies = autocast and not config.use_peft  # of weights that require a gradient
    width_W = 2 if keeps_copies else width_S + 4 * autocast  # made once; else in every step, written and read
    memory, generating = generation(student, rollouts, width_W, 2 if config.bf16 else width_S)
    sampling = fixed | memory
    if keeps_copies:
        sampling["copies in bfloat16"] = student.parameters * 2
    if config.fsdp:
        sampling["student, whole"] = student.parameters * width_S
    if config.sampler == "vllm":
        sampling = fixed
    teachers = [other for whose, other in others.items() if whose != "reference"]
    if teachers and config.teacher_probes:
        largest = max(teachers, key=lambda one: one.parameters)
        memory, seconds = generation(largest, prompts * config.teacher_probes, width_T, width_T)
        generating += seconds
        sampling = max(sampling, fixed | memory, key=lambda parts: sum(parts.values()))

    # --- scoring and the update ---
    tokens, scored = rollouts * length, rollouts * answer
    passes = (4 if config.use_peft else 6) + (2 if config.gradient_checkpointing else 0)
    learning = passes * student.body * tokens + 6 * student.head * scored
    learning += sum(2 * other.body * tokens + 2 * other.head * scored for other in others.values())
    kept: float = kept_for_backward(student.model, micro, length)
    if config.gradient_checkpointing:  # the blocks' inputs, and one block at a time
        kept = kept // student.layers + student.layers * micro * length * student.width * (2 if low else 4)
    elif autocast:  # half as wide, beside autocast's copies of the weights
        kept = kept // 2 + student.parameters * 2
    attention = config.attn_implementation or "sdpa"
    if not attention.startswith(("flash", "flex")):  # each layer keeps masks, in the dtype; eager its probabilities
        squares = 1 if config.gradient_checkpointing else student.layers
        squares *= student.heads if attention == "eager" else 1
        kept += squares * micro * length**2 * (micro if config.padding_free else 1) * (2 if low else 4)
    rest = student.parameters - student.layers * student.block
    workspace = backends.get("cpu" if device is DEVICES["cpu"] else "triton").default_workspace
    gradient = trained * width_O / shards
    if micro >= rollouts:  # in one backward pass the gradient grows as what was kept goes
        kept = max(0.0, kept - gradient)
    updating = {
        **fixed,
        "gradient": gradient,
        "kept for backward": kept,
        "loss": workspace + 4 * student.head * (not config.use_peft) + 8 * micro * answer * student.width,
    }
    if config.fsdp:
        updating["gathered"] = (rest + student.block) * width_S
    moved = 3 * student.parameters * width_S * -(-rollouts // micro) if config.fsdp else 2 * trained * width_O
    seconds = learning / (peak * COMPUTE) + 7 * trained * width_O / shards / (device.bandwidth * STREAM)
    seconds += moved * (1 - 1 / processes) / device.link
    stages = [
        Stage("rollout", sampling, generating),
        Stage("verify", fixed, None),
        Stage("update", updating, seconds),
    ]
    if config.sampler == "vllm":
        stages.insert(0, Stage("sync", fixed, 2 * student.parameters * width_S / DISK))
    return stages


def as_in(run: Path, stages: list[Stage], device: Device, processes: int, prompt: int) -> list[Stage]:
    """The stages with seconds scaled by what a run on such devices took over what its own plan says.

    Raises:
        UserError: it is no run, has fewer than three updates, or its models are gone.
    """
    if not (metrics := run / "metrics.jsonl").is_file():
        raise UserError(f"--measured: got {str(run)!r}, expected the folder of a run, with its metrics.jsonl")
    records, _ = read_metrics(metrics)
    updates = [record for record in records if record["kind"] == "train"]
    configs = [record for record in records if record["kind"] == "config"]
    if len(updates) < 3 or not configs:
        raise UserError(
            f"--measured: {run} has {len(updates)} updates and {len(configs)} configurations, expected three or more "
            "and one"
        )
    known = {one.name for one in dataclasses.fields(Config)}
    settings = {k: v for k, v in configs[0].items() if k in known}
    before = {stage.name: stage.seconds for stage in plan(Config.load(None, settings), device, processes, prompt)}
    found = []
    for stage in stages:
        took = [record[f"time/{stage.name}"] for record in updates if record.get(f"time/{stage.name}") is not None]
        measured, planned = statistics.median(took) if took else None, before.get(stage.name)
        if measured is not None and stage.seconds is not None and planned:
            stage = dataclasses.replace(stage, seconds=stage.seconds * measured / planned, source=f"scaled from {run}")
        elif measured is not None and stage.seconds is None:
            stage = dataclasses.replace(stage, seconds=measured, source=f"measured in {run}")
        found.append(stage)
    return found


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def lora_parameters(student: Sizes, rank: int) -> int:
    """Of adapters on all linear layers inside the model; on fewer layers there are fewer."""
    head = student.model.get_output_embeddings()
    linear = (m for m in student.model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return sum(rank * (module.in_features + module.out_features) for module in linear)


def warnings_of(stages: list[Stage], device: Device, config: Config, processes: int) -> list[str]:
    """What does not fit, and what to change, the cheapest first."""
    worst = max(stages, key=lambda stage: stage.memory)
    if worst.memory <= FULL * device.memory:
        return []
    by_rollouts = config.max_tokens_per_device_batch is None
    remedies = [
        ("gradient_checkpointing", not config.gradient_checkpointing and worst.name == "update"),
        (
            "a smaller " + ("per_device_train_batch_size" if by_rollouts else "max_tokens_per_device_batch"),
            (config.per_device_train_batch_size > 1 or not by_rollouts) and worst.name == "update",
        ),
        ("a smaller generation_batch_size", worst.name == "rollout"),
        ("teacher_dtype bfloat16", config.teacher_dtype == "float32" and config.teacher_url is None),
        ("fsdp", not config.fsdp and processes > 1),
        ("fsdp_teacher", config.fsdp and not config.fsdp_teacher and config.teacher_url is None),
        ("more processes", config.fsdp),
        ("teacher_url", config.teacher_url is None),
        ("sampler vllm", config.sampler == "plain" and worst.name == "rollout"),
        ("use_peft", not config.use_peft),
    ]
    parts = ", ".join(f"{part} {size / GB:.1f}" for part, size in worst.parts.items() if size > GB / 10)
    return [
        f"warning: {worst.name} does not fit: {worst.memory / GB:.1f} of {device.memory / GB:.0f} GB a process: "
        f"{parts}. Of use may be: {', '.join(name for name, of_use in remedies if of_use)}"
    ]


def table(stages: list[Stage]) -> Table:
    result = Table(title="one step, of each process")
    for name in ("stage", "memory, GB", "seconds"):
        result.add_column(name, justify="left" if name == "stage" else "right")
    result.add_column("seconds by")
    for stage in stages:
        seconds = "" if stage.seconds is None else f"{stage.seconds:.3g}"
        result.add_row(stage.name, f"{stage.memory / GB:.2f}", seconds, stage.source)
    return result
