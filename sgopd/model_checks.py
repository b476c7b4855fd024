"""Whether a model is read rightly here: its head, sampling with its cache, packed texts, saving. Each is tried."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.data import Prompts
from sgopd.lora import save_student
from sgopd.models import LOGIT_DIVISORS, LOGIT_FACTORS, head_of, hidden_states
from sgopd.rollout import Steps

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
