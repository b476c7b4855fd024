"""Rollouts: batched sampling through the model's own forward, with a key-value cache and an explicit generator.

`transformers.generate` would do; this loop is here because a run must resume bit-exactly (so the random numbers come
from a generator that the caller names) and because at 100k parameters half of generate's time is its own overhead.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.grading import THOUGHT_TAGS, Tags


@dataclass
class Sampling:
    """How to sample.

    Args:
        max_completion_length: tokens per completion, the end-of-sequence token included.
        eos_ids: tokens that end a completion.
        vocabulary: ids >= this are never sampled: the shared prefix of student's and teacher's vocabulary.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: filters on the tempered distribution; 0 and 1 are off.
        batch_size: completions sampled at once; None is all of them.
        bf16: autocast the forward to bfloat16.
        thought_tags: (open, close) pairs that a completion's text keeps, also where they are special tokens.
    """

    max_completion_length: int
    eos_ids: tuple[int, ...]
    vocabulary: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int | None = None
    bf16: bool = False
    thought_tags: Tags = THOUGHT_TAGS


@dataclass
class Completion:
    """One sampled completion of T tokens."""

    ids: Tensor  # [T] int64 on the CPU, with the end-of-sequence token if there is one
    logprobs: Tensor  # [T] float32: log-probability of each token, at the temperature, before top-k and top-p
    truncated: bool  # ran out of tokens
    text: str  # without special tokens but those of thoughts; it begins with the thought that the prompt opened


@dataclass
class Rollout:
    """A completion in its place in the batch, with the verifier's word on it."""

    example: int  # index of the prompt's example
    prompt_ids: list[int]
    completion: Completion
    source: str  # "student" or "teacher"
    in_teacher_slot: bool  # the teacher tried for this slot (and failed, where source is "student")
    verdict: int = 0  # 1 correct, -1 incorrect, 0 unknown
    reason: str = ""  # the verifier's
    reliability: float = 0.0  # how far the teacher is trusted in conflicts, in [0, 1]
    weight: float = 1.0  # of all its tokens in the distillation loss, beside the gate's
    advantage: float = 0.0  # of all its tokens in the task reward's term
    token_stats: Tensor | None = None  # [8, T] of the last update on it: sgopd.completions.keep_token_stats

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion.ids)


def sampling_of(config: Config, eos_ids: tuple[int, ...], vocabulary: int) -> Sampling:
    """The training rollouts' settings."""
    return Sampling(
        max_completion_length=config.max_completion_length,
        eos_ids=eos_ids,
        vocabulary=vocabulary,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        batch_size=config.generation_batch_size,
        bf16=config.bf16,
        thought_tags=config.thought_tags,
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
) -> list[Completion]:
    """One completion for each prompt (token ids, not empty). The same seed and batch give the same completions.

    Raises:
        UserError: the model's logits are not finite, so that there is nothing to sample from.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    completions: list[Completion] = []
    size = sampling.batch_size or max(len(prompts), 1)
    # Around all steps: within it a weight that requires a gradient is rounded to bfloat16 once.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=sampling.bf16):
        for start in range(0, len(prompts), size):
            completions += _generate_batch(model, tokenizer, prompts[start : start + size], sampling, generator)
    model.train(was_training)
    return completions


# What forwards call the cache, in the order in which they took the names on.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class Steps:
    """A model's forward over a left-padded batch, a token a step, with its cache. Rows can leave. Prompts that are the
    same are read once.

    Most forwards swallow a keyword that they do not know, and would then sample without their state. So each gets
    only names that its signature has; `sgopd.model_checks.check_sampling` compares the steps with the uncached forward.
    The model makes its own cache, of the kind that it needs.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        self.model = model
        self.names = arguments_of(model)
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.copies: Tensor | None = None
        if len(places) < len(prompts):
            self.copies = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=model.device)
        B, P = len(places), max(map(len, places))
        # Left padding, so that every prompt ends in the last column; the mask hides it and positions skip it.
        input_ids = torch.zeros(B, P, dtype=torch.long)
        mask = torch.zeros(B, P, dtype=torch.long)
        for prompt, row in places.items():
            input_ids[row, P - len(prompt) :] = torch.tensor(prompt)
            mask[row, P - len(prompt) :] = 1
        self.input_ids, self.mask = input_ids.to(model.device), mask.to(model.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache: Any = None

    def logits(self) -> Tensor:
        """[B, V]: of each row's next token."""
        # A state without columns has the padding left out already; the mask is of what is new.
        stateful = self.cache is not None and all(getattr(self.cache, "is_linear", None) or [False])
        offered = {
            "input_ids": self.input_ids,
            "attention_mask": self.mask[:, -1:] if stateful else self.mask,
            "position_ids": self.positions,
            "use_cache": True,
            "logits_to_keep": 1,
            **dict.fromkeys(CACHE_NAMES, self.cache),
        }
        output = self.model(**{name: value for name, value in offered.items() if name in self.names})
        self.cache = next((cache for name in CACHE_NAMES if (cache := getattr(output, name, None)) is not None), None)
        if self.cache is None:
            raise ValueError("its forward takes or gives back no cache under a name that this version knows")
        logits = output.logits[:, -1]
        if self.copies is not None:  # the prompts have been read
            logits, rows, self.copies = logits[self.copies], self.copies, None
            self.take(rows)
        return logits

    def take(self, rows: Tensor) -> None:
        """Goes on with these rows, in this order; one may be there several times."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.reorder_cache(rows)

    def go_on(self, token: Tensor, keep: Tensor | None) -> None:
        """Adds the tokens [B]; only the rows `keep` (indices, None for all) go on."""
        if keep is not None:
            token = token[keep]
            self.take(keep)
        self.input_ids = token.unsqueeze(-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1


def arguments_of(model: PreTrainedModel) -> set[str]:
    """The names that a forward takes: its own, and its base model's where it hands on what it does not know."""
    own = inspect.signature(model.forward).parameters
    names = set(own)
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values()):
        names |= {"use_cache", "position_ids"} & set(inspect.signature(model.base_model.forward).parameters)
    return names & {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}


# no_grad, not inference_mode: tensors made in inference mode may not take part in later in-place updates.
@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[Completion]:
    device = model.device
    B, T = len(prompts), sampling.max_completion_length
    eos_ids = torch.tensor(sampling.eos_ids, device=device)
    ids_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logprobs_BT = torch.zeros(B, T, dtype=torch.float32, device=device)
    length_B = torch.full((B,), T, device=device)
    ended_B = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # the unfinished ones
    steps = Steps(model, prompts)
    for t in range(T):
        logits = steps.logits()[:, : sampling.vocabulary].float()
        # The largest tells: one NaN makes it NaN, and tokens ruled out by -inf do not show.
        largest = logits.amax(-1) / (sampling.temperature or 1.0)
        if broken := int((~largest.isfinite()).sum()):
            raise UserError(
                f"{model.name_or_path or type(model).__name__}: the logits after {broken} of {len(rows)} texts are not "
                "finite (NaN or infinite), so no token can be sampled. Its weights or activations have overflowed: go "
                "back to an earlier checkpoint and lower learning_rate, use float32 throughout, or raise temperature "
                f"({sampling.temperature:g}) if it is tiny"
            )
        token, logprob = sample(logits, sampling, generator)
        ids_BT[rows, t], logprobs_BT[rows, t] = token, logprob
        running, keep = ~torch.isin(token, eos_ids), None
        if not running.all():
            ended_B[rows[~running]] = True
            length_B[rows[~running]] = t + 1
            # Finished rows leave the batch: growing the cache copies it anyway, and long tails get cheap.
            keep = running.nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            rows = rows[keep]
        steps.go_on(token, keep)

    lengths, ended = length_B.tolist(), ended_B.tolist()
    ids = [row[:length] for row, length in zip(ids_BT.cpu(), lengths)]
    logprobs = [row[:length] for row, length in zip(logprobs_BT.cpu(), lengths)]
    texts = texts_of(tokenizer, prompts, ids, sampling.thought_tags)
    return [Completion(*parts) for parts in zip(ids, logprobs, (not end for end in ended), texts)]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], completions: Sequence[Tensor], tags: Tags
) -> list[str]:
    """The completions as text, in which a verifier can tell thoughts from the answer.

    Special tokens are left out, but not those that open or close a thought. Where a chat template opened one at the end
    of the prompt, the text begins with that tag: the completion alone doesn't show that it is a thought until it ends.
    """
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {id for id, text in added.items() if any(text in tag for pair in tags for tag in pair)}
    left_out = torch.tensor(sorted(added.keys() - kept), dtype=torch.long)
    if kept:
        texts = tokenizer.batch_decode([ids[~torch.isin(ids, left_out)] for ids in completions])
    else:
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    ends = [end.rstrip() for end in tokenizer.batch_decode([prompt[-16:] for prompt in prompts])]
    opened = [next((start for start, _ in tags if end.endswith(start)), "") for end in ends]
    return [start + text for start, text in zip(opened, texts)]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32 -> token ids [B] and their log-probabilities [B], before top-k and top-p."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        logprobs = torch.log_softmax(logits, -1)
    else:
        logprobs = torch.log_softmax(logits / sampling.temperature, -1)
        probs = filtered(logprobs.exp(), sampling.top_k, sampling.top_p)
        token = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def filtered(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """probs [B, V] with the tokens outside the top k, and outside the nucleus of mass p, set to 0; not renormalised."""
    if 0 < top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = torch.where(probs >= kth, probs, 0.0)
    if top_p < 1:
        total = probs.sum(-1, keepdim=True)
        ordered, order = probs.sort(dim=-1, descending=True)
        # A token stays if the mass before it is short of p: the likeliest one always does.
        outside = ordered.cumsum(-1) - ordered >= top_p * total
        probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return probs


def collate(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """B rollouts, right-padded to T tokens: ids and attention mask [B, T] int64, predicts [B, T - 1] bool.

    predicts[b, t] says that token t + 1 is part of the completion: position t's hidden state predicts it.
    """
    B, T = len(rollouts), max(map(len, rollouts))
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    mask_BT = torch.zeros(B, T, dtype=torch.long)
    predicts_BT = torch.zeros(B, T - 1, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt_ids), len(rollout)
        ids_BT[row, :start] = torch.tensor(rollout.prompt_ids)
        ids_BT[row, start:end] = rollout.completion.ids
        mask_BT[row, :end] = 1
        predicts_BT[row, start - 1 : end - 1] = True
    return ids_BT, mask_BT, predicts_BT


def parts_by_tokens(lengths: Sequence[int], limit: int, padding_free: bool = False) -> list[slice]:
    """Divides texts, sorted by length, into as few parts of consecutive ones as keep each within `limit` tokens: rows
    times longest, or without padding the sum.

    A text that is longer is a part of its own.
    """
    starts, total = [0], 0
    for end, length in enumerate(lengths):
        total += length
        if (total if padding_free else length * (end + 1 - starts[-1])) > limit and end > starts[-1]:
            starts.append(end)
            total = length
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(lengths)])]


def in_parts(parts: list[slice], count: int) -> list[slice]:
    """Halves the part with the most texts until there are `count`; there must be as many texts."""
    while len(parts) < count:
        at = max(range(len(parts)), key=lambda at: parts[at].stop - parts[at].start)
        start, stop = parts[at].start, parts[at].stop
        parts[at : at + 1] = [slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)]
    return parts


def whole_texts(texts: Sequence[list[int]]) -> list[Rollout]:
    """Texts as completions of their first tokens, to look at all others."""
    return [
        Rollout(0, ids[:1], Completion(torch.tensor(ids[1:]), torch.zeros(len(ids) - 1), False, ""), "student", False)
        for ids in texts
    ]


class Batch(NamedTuple):
    """Rollouts as the models take them, and the N positions at which a token of a completion is predicted."""

    rollouts: Sequence[Rollout]
    inputs: tuple[Tensor, Tensor | None, Tensor | None]  # ids, mask, positions, as `hidden_states` takes them
    at: tuple[Tensor, Tensor]  # [N] each: where in the hidden states
    rows: Tensor  # [N]: the rollout
    columns: Tensor  # [N]: the position in it
    token_ids: Tensor  # [N]: the token that is predicted there


def batch_of(rollouts: Sequence[Rollout], device: torch.device, padding_free: bool = False) -> Batch:
    """`padding_free`: one after another in one row, in place of a padded row each."""
    ids_BT, mask_BT, predicts_BT = (tensor.to(device) for tensor in collate(rollouts))
    rows, columns = at = predicts_BT.nonzero(as_tuple=True)
    token_ids = ids_BT[rows, columns + 1]
    if not padding_free:
        return Batch(rollouts, (ids_BT, mask_BT, None), at, rows, columns, token_ids)
    there, lengths = mask_BT.bool(), mask_BT.sum(1)
    positions = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)[there]
    starts = lengths.cumsum(0) - lengths
    packed = ids_BT[there].unsqueeze(0), None, positions.unsqueeze(0)
    return Batch(rollouts, packed, (torch.zeros_like(rows), starts[rows] + columns), rows, columns, token_ids)
