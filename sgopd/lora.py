"""LoRA students, by peft: adapters on a frozen model, which alone are trained, saved and resumed.

Adapters stand on linear layers inside the model. The loss reads the head's weight, and tied embeddings are the head, so
these two stay as they are. There is no dropout in adapters: the model that is trained must be the one that sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.data import derive_seed
from sgopd.models import load_model, some

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"  # peft's own, so that it stands in no file
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of an adapter's config: what would put more than two matrices beside a linear layer, or let other weights train.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_dropout": 0.0,
    **dict.fromkeys(("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")),
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out"), False),
}


def load_student(source: str, config: Config) -> tuple[PreTrainedModel, list[str]]:
    """The student from a folder or the hub, and what a person should know of how it was read.

    With `use_peft` it has adapters: those of `source`, where that is an adapter's folder (a checkpoint, or final/, of a
    run like this one), else new ones, which change nothing until they are trained.

    Raises:
        UserError: as for `load_model`; there is no peft, no such module, or an adapter stands where none can.
    """
    setting = "model_name_or_path"
    if not config.use_peft:
        return load_model(source, config, setting, config.dtype)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"use_peft needs peft ({error}): pip install 'peft>=0.17'") from error
    if not (Path(source) / CONFIG).is_file():
        model, said = load_model(source, config, setting, config.dtype)
        adapter = new_adapter(model, config)
        insert(model, adapter, source, derive_seed(config.seed, "lora"))
        return model, [*said, describe(model, adapter)]
    adapter, weights = read_adapter(Path(source))
    model, said = load_model(adapter.base_model_name_or_path, config, setting, config.dtype)
    insert(model, adapter, adapter.base_model_name_or_path, 0)
    fill(model, weights, source)
    return model, [*said, f"{describe(model, adapter)}, from {source}"]


def base_of(source: str, config: Config) -> tuple[str, int]:
    """Where the weights below a student's adapters are, and the adapters' rank; read without peft."""
    if not config.use_peft or not (Path(source) / CONFIG).is_file():
        return source, config.lora_r
    try:
        given = json.loads((Path(source) / CONFIG).read_text())
        return str(given["base_model_name_or_path"]), int(given["r"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise unreadable_adapter(source, error) from error


def new_adapter(model: PreTrainedModel, config: Config) -> LoraConfig:
    from peft import LoraConfig

    wanted = config.lora_target_modules
    for name in wanted if isinstance(wanted, list) else []:
        if not any(known == name or known.endswith(f".{name}") for known, _ in model.named_modules()):
            raise UserError(f"lora_target_modules: {type(model).__name__} has no module {name!r}. {remedy(model)}")
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=wanted, task_type="CAUSAL_LM")


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What peft wrote, if it is of the kind that `new_adapter` makes."""
    from peft import LoraConfig

    try:
        given = json.loads((folder / CONFIG).read_text())
        others = [
            f"{name} {given[name]!r}" for name, plain in PLAIN.items() if (given.get(name) or None) != (plain or None)
        ]
        if not others:
            adapter = LoraConfig(**{**LoraConfig.from_pretrained(str(folder)).to_dict(), "inference_mode": False})
            return adapter, load_file(folder / WEIGHTS)
    except Exception as error:  # peft, safetensors and json have their own
        raise unreadable_adapter(str(folder), error) from error
    raise UserError(
        f"model_name_or_path: the adapter in {str(folder)!r} has {', '.join(others)}, expected a plain LoRA on linear "
        "layers. Merge it into its model (peft's merge_and_unload), and train new adapters on that"
    )


def unreadable_adapter(source: str, error: Exception) -> UserError:
    return UserError(f"model_name_or_path: cannot read the adapter in {source!r}: {type(error).__name__}: {error}")


def insert(model: PreTrainedModel, adapter: LoraConfig, source: str, seed: int) -> None:
    """Puts adapters into `model`, the same on every process, and freezes all else."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Where the base is found again, from wherever the adapter is loaded.
    adapter.base_model_name_or_path = str(Path(source).resolve()) if Path(source).is_dir() else source
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(adapter, model, NAME)  # transformers' own way asks for the newest peft
    except ValueError as error:
        raise UserError(f"lora_target_modules: {str(error).rstrip('.')}. {remedy(model)}") from error
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module is model.get_output_embeddings():
            raise UserError(
                f"lora_target_modules: {name!r} is the head, whose weight the loss reads as it is. Leave it out; "
                "all-linear does"
            )
        if not isinstance(module, Linear):
            raise UserError(
                f"lora_target_modules: {name!r} is of {type(module.get_base_layer()).__name__}, expected linear layers "
                f"inside the model. {remedy(model)}"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:  # small updates are lost in bfloat16, and there are few of these weights
            parameter.data = parameter.data.float()
    if not isinstance(adapter.target_modules, str):
        adapter.target_modules = sorted(adapter.target_modules)  # a set would be written in any order


def fill(model: PreTrainedModel, weights: dict[str, Tensor], source: str) -> None:
    """Gives the adapters their trained values."""
    own = dict(model.named_parameters())
    wanted = {in_file(name): name for name in own if ".lora_" in name}
    if odd := sorted(wanted.keys() ^ weights.keys()):
        raise UserError(
            f"model_name_or_path: {len(odd)} weights of the adapter in {source!r} are missing or have no place in "
            f"{type(model).__name__}: {some(odd)}. Use the model that it was trained on"
        )
    for name, weight in weights.items():
        mine = own[wanted[name]]
        if weight.shape != mine.shape:
            raise UserError(
                f"model_name_or_path: {name} of the adapter in {source!r} is {list(weight.shape)} instead of "
                f"{list(mine.shape)}. Use the model that it was trained on"
            )
        if not torch.isfinite(weight).all():
            raise UserError(
                f"model_name_or_path: {name} of the adapter in {source!r} is not finite. Use an earlier one"
            )
        mine.data.copy_(weight)


def in_file(name: str) -> str:
    """A parameter's name, as peft writes it."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def save_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor]
) -> None:
    """The student as `load_student`, from_pretrained or peft load it: the whole model, or its adapters alone."""
    tokenizer.save_pretrained(folder)
    adapter = getattr(model, "peft_config", {}).get(NAME)
    if adapter is None:
        model.save_pretrained(folder, state_dict=weights)
        return
    adapter.save_pretrained(str(folder))
    trained = {in_file(name): weight.contiguous() for name, weight in weights.items() if ".lora_" in name}
    save_file(trained, folder / WEIGHTS, {"format": "pt"})


def describe(model: PreTrainedModel, adapter: LoraConfig) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"LoRA: {trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters are trained, "
        f"r {adapter.r}, alpha {adapter.lora_alpha}"
    )


def remedy(model: PreTrainedModel) -> str:
    """Which names there are."""
    head = model.get_output_embeddings()
    linear = (
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return f"Take some of {', '.join(dict.fromkeys(linear))}, or all-linear for all of them"


def base_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict with adapters, or without: the weights of the model below them, by its own names."""
    return {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}


def merged(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the adapters added to them: W + alpha / r · B A, in the dtype of W."""
    result = base_weights(weights)
    for name, module in model.named_modules():
        if f"{name}.base_layer.weight" in weights:
            A, B = (weights[f"{name}.lora_{side}.{NAME}.weight"].float() for side in "AB")
            delta: Any = B @ A * module.scaling[NAME]
            weight = result[f"{name}.weight"]
            delta = delta.T if module.fan_in_fan_out else delta  # GPT-2's layers hold the transpose
            result[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return result
