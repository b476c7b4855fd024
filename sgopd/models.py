"""Models as the loss sees them: last hidden states and a head. The teacher is one of them, frozen.

Everything here serves student and teacher alike, so that both are read in the same way. `sgopd.model_checks` checks
that what is read here is what the model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError


class Head(NamedTuple):
    """A language-model head: logits = softcap * tanh(z / softcap), z = logit_scale * (hidden @ weight.T + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], unfused: for checks and small pieces."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# What transformers' models do to the logits after the head, by the name in their config; `check_head` tells
# whether this list covers a model.
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
LOGIT_DIVISORS = ("logits_scaling",)  # Granite


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with what its config does to the logits."""
    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; expected a causal language model")
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for name in LOGIT_FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in LOGIT_DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, getattr(output, "bias", None), scale, softcap)


def head_arguments(student: Head, teacher: Head) -> dict[str, Any]:
    """What `gated_kl_loss` has to know of two heads beside their weights."""
    return {
        "student_bias": student.bias,
        "teacher_bias": teacher.bias,
        "student_logit_scale": student.logit_scale,
        "teacher_logit_scale": teacher.logit_scale,
        "student_softcap": student.softcap,
        "teacher_softcap": teacher.softcap,
    }


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states [B, T, H], after the final norm, of right-padded input_ids [B, T]; no logits are made.

    Or of texts one after another in one row: position_ids [1, T] then count each from 0, and there is no mask.
    transformers keeps them apart by their positions: by cu_seqlens in flash attention, by a mask elsewhere.
    """
    base = model.base_model
    if base is model:  # the class gives its base model another name than it has (Llama 4's text model)
        base = model.model
    given = {} if position_ids is None else {"position_ids": position_ids}
    return base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given).last_hidden_state


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, texts: Sequence[list[int]], temperature: float = 1.0) -> Tensor:
    """[all tokens of the texts but each first] log-probabilities of a model in this process; for a few texts."""
    found = []
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        logits = head_of(model).logits(hidden_states(model, ids, torch.ones_like(ids)))[0, :-1].float() / temperature
        found.append(torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1).cpu())
    return torch.cat(found)


def load_model(path: str, config: Config, setting: str, dtype: str) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model from a folder or the hub, and what a person should know of how it was read.

    Args:
        setting: the config's field that errors name.

    Raises:
        UserError: it cannot be loaded, is an adapter, lacks a weight, or a weight has another shape or is not finite.
    """
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(adapter(path, setting))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            weights_only=True,  # of a pytorch_model.bin, which is a pickle: no code from it
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except Exception as error:  # transformers, safetensors, the hub and json all raise their own
        raise unreadable("a model", path, setting, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter from the hub
        raise UserError(adapter(path, setting))
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [f"{name} is {list(found)} instead of {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    for faults, what in ((missing, "are missing from"), (sorted(shapes), "have other shapes in")):
        if faults:
            raise UserError(
                f"{setting}: {len(faults)} weights of {type(model).__name__} {what} {path!r}: {some(faults)}. They "
                "would be made at random. Use a whole checkpoint, with the config.json that belongs to it"
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise UserError(
                f"{setting}: {count} weights of {name} in {path!r} are not finite (NaN or infinite): the checkpoint is "
                "damaged, or its training diverged. Use an earlier one"
            )
    if not unexpected:
        return model, []
    said = f"warning: {setting}: {len(unexpected)} weights in {path!r} have no place in {type(model).__name__}"
    return model, [f"{said} and are left out: {some(unexpected)}"]


def some(names: Sequence[str]) -> str:
    """The first of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def adapter(path: str, setting: str) -> str:
    going_on = "Set use_peft to train it further. Or put" if setting == "model_name_or_path" else "Put"
    return (
        f"{setting}: {path!r} is an adapter (LoRA), expected a whole model. {going_on} it into its base model and save "
        "that: peft.AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…), with the "
        "tokenizer beside it; a folder with merged weights must have no adapter_config.json"
    )


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model.to(device)`, which transformers wraps so that type checkers lose sight of it."""
    nn.Module.to(model, device)
    return model


def load_frozen(path: str, config: Config, setting: str, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """A model that is only read: the teacher, the reference; and as for `load_model`."""
    model, said = load_model(path, config, setting, config.teacher_dtype)
    return move(model, device).eval().requires_grad_(False), said


def recompute_activations(model: PreTrainedModel) -> None:
    """Activation checkpointing, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_tokenizer(path: str, config: Config, setting: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        if not tokenizer.get_vocab():
            raise ValueError("it has no tokens")
        return tokenizer
    except Exception as error:
        raise unreadable("a tokenizer", path, setting, error) from error


def unreadable(what: str, path: str, setting: str, error: Exception) -> UserError:
    """What to say of a model or tokenizer that a library could not load."""
    nowhere = f"there is no such folder in {Path.cwd()}"
    if not Path(path).exists() and (path.count("/") > 1 or path[:1] in "./~"):  # no hub name: the hub's error misleads
        return UserError(f"{setting}: cannot load {what} from {path!r}: {nowhere}. A hub name is OWNER/NAME")
    hint = "" if Path(path).is_dir() else f" ({nowhere}, so it was taken for a hub name)"
    return UserError(f"{setting}: cannot load {what} from {path!r}{hint}: {type(error).__name__}: {error}")


TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json", "*.bpe*")


def has_tokenizer(path: str) -> bool:
    """Whether a folder has a file that looks like a tokenizer's, readable or not; a hub name is taken to have one."""
    return not Path(path).is_dir() or any(any(Path(path).glob(pattern)) for pattern in TOKENIZER_FILES)


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the generation config's and the tokenizer's.

    Raises:
        UserError: one of them is no row of the head, so that it could never be sampled.
    """
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    rows = head_of(model).weight.shape[0]
    if wrong := [one for one in ids if type(one) is not int or not 0 <= one < rows]:
        raise UserError(
            f"{model.name_or_path or type(model).__name__}: eos_token_id has {wrong}, but its head has {rows} rows, so "
            f"an id is a whole number from 0 to {rows - 1}. Correct eos_token_id in its generation_config.json, "
            "config.json and tokenizer"
        )
    return tuple(sorted(set(ids)))
