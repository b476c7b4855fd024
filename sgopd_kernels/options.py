"""What a loss call is given beside its tokens: a model's last layer (`Head`) and the call's choices (`Options`).

An option is one field: its name, its default and its check. It crosses into the op by itself (problem.encode).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from ._checks import integer, number, one_of, positive, scale
from .gate import Gate, resolve_gate

# Relative errors of loss and gradients. "auto" is what rounding a gradient to bf16 costs.
PRECISIONS = {"exact": 0.0, "auto": 1.5e-3, "bf16": 2.0**-8}


# As backends number them (csrc/divergence.h): the parameter's name, and what it comes to at the ends of [0, 1].
DIVERGENCES: dict[str, tuple[str, dict[float, str]] | None] = {
    "reverse-kl": None,
    "forward-kl": None,
    "jsd": ("beta", {0.0: "forward-kl", 1.0: "reverse-kl"}),
    "skew-reverse-kl": ("alpha", {0.0: "reverse-kl"}),
    "skew-forward-kl": ("alpha", {0.0: "forward-kl"}),
    "alpha": ("alpha", {0.0: "forward-kl", 1.0: "reverse-kl"}),
}


@dataclass(frozen=True)
class Head:
    """A language model's last layer, at the positions that predict a call's tokens.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    Args:
        hidden: [..., H] last hidden states. fp32, bf16, fp16 or fp64.
        weight: [V, H] output head; may be tied to the embedding. May differ in dtype from `hidden`.
        bias: [V] or None.
        logit_scale: multiplies projection plus bias. 1e-6 to 1e6.
        softcap: c > 0: logits become c * tanh(logits / c). None: no cap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class SampledTeacher:
    """A teacher that gives only log pi_T of the sampled tokens: `gated_logprob_loss`.

    Args:
        logprob: [...] its log-probabilities of token_ids, in nats, at the loss's temperature.
        behaviour_logprob: [...] those of the policy that sampled token_ids, for stale rollouts. None: no correction.
    """

    logprob: Tensor
    behaviour_logprob: Tensor | None = None


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher that gives its top-k log-probabilities: `gated_topk_kl_loss`.

    Args:
        ids: [..., K] int64 columns, distinct in a row.
        logprob: [..., K] in nats, normalised over the teacher's whole vocabulary, at the loss's temperature.
    """

    ids: Tensor
    logprob: Tensor


# (name, value) -> the value in the form in which it is kept, or raises; what is kept passes, and stays as it is.
Check = Callable[[str, Any], Any]


def _checked(check: Check, row: bool = False) -> dict[str, Any]:
    """`row`: every row pass is given this number, by this name (Problem.row_numbers)."""
    return {"check": check, "row": row}


def _one_of(*names: str) -> dict[str, Any]:
    return _checked(lambda name, value: one_of(name, value, names))


def _precision(name: str, value: Any) -> str | float:
    if isinstance(value, str) and value in PRECISIONS:
        return one_of(name, value, tuple(PRECISIONS))
    expected = "'auto', 'exact', 'bf16' or a relative error above 0 and below 1, such as 1e-3"
    return number(name, value, expected, 0.0, 1.0)


def _bytes(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, "a whole number > 0 of bytes", 1)


def _divergence(name: str, value: Any) -> str | tuple[str, float]:
    """A name, or (name, parameter) where that is no end of the family."""
    if isinstance(value, str) and value in DIVERGENCES and DIVERGENCES[value] is None:
        return one_of(name, value, tuple(DIVERGENCES))
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str) and value[0] in DIVERGENCES:
        kind, family = one_of(name, value[0], tuple(DIVERGENCES)), DIVERGENCES[value[0]]
        if family is None:
            raise ValueError(f"{name}: {kind!r} takes no parameter, got {value!r}: pass {kind!r}")
        symbol, ends = family
        parameter = number(f"{name}: {symbol} of ({kind!r}, {symbol})", value[1], "a number in [0, 1]")
        if 0 < parameter < 1:
            return kind, parameter
        if parameter in ends:
            return ends[parameter]
        within = "[0, 1]" if 1.0 in ends else "[0, 1)"
        raise ValueError(f"{name}: {symbol} of ({kind!r}, {symbol}) must lie in {within}, got {parameter}")
    forms = [repr(kind) if family is None else f"({kind!r}, {family[0]})" for kind, family in DIVERGENCES.items()]
    close = difflib.get_close_matches(str(value), DIVERGENCES, n=1)
    hint = f"; did you mean {forms[list(DIVERGENCES).index(close[0])]}?" if close else ""
    raise ValueError(
        f"{name} must be {', '.join(forms[:-1])} or {forms[-1]} with a parameter in [0, 1]; got {value!r}{hint}"
    )


@dataclass(frozen=True)
class Options:
    """The choices of a loss call. Frozen and checked: a bad value raises, with the remedy, where it is written.

    Args:
        gate: a preset's name (`sgopd_kernels.PRESETS`) or a `Gate`.
        estimator: "full" (sum over the vocabulary) or "sampled" (policy gradient on the sampled token).
        divergence: of the full estimator, between the student's distribution p and the teacher's q:
            "reverse-kl": KL(p || q). "forward-kl": KL(q || p).
            ("jsd", beta): beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta q + (1 - beta) p, as TRL and GKD
            (arXiv 2306.13649) have it; 1 and 0 are the reverse and the forward KL.
            ("skew-reverse-kl", alpha): KL(p || alpha p + (1 - alpha) q), and ("skew-forward-kl", alpha):
            KL(q || alpha q + (1 - alpha) p), 0 <= alpha < 1, of DistiLLM (arXiv 2402.03898, which takes 0.1).
            ("alpha", alpha): (1 - sum_v p^alpha q^(1 - alpha)) / (alpha (1 - alpha)); 1 and 0 are the reverse and
            the forward KL.
        temperature: divides all models' logits (after softcap). 1e-6 to 1e6.
        ratio_clip: > 0, upper bound of the importance ratio. Used with behaviour log-probabilities.
        ignore_index: positions with this token id have loss, stats and gradient 0.
        reduction: "mean" divides the sum by the number of valid tokens, or by `num_items`; "sum"; "none" returns
            the loss per token, shaped like token_ids (its backward computes the logits again).
        precision: the relative error of loss and gradients that may be traded for speed: "exact" (none), "auto"
            (1.5e-3), "bf16" (2^-8), or a number.
        workspace: bytes held above inputs and gradients. None: the backend's default.
    """

    gate: str | Gate = field(default="sg-opd", metadata=_checked(lambda name, value: resolve_gate(value)))
    estimator: Literal["full", "sampled"] = field(default="full", metadata=_one_of("full", "sampled"))
    divergence: str | tuple[str, float] = field(default="reverse-kl", metadata=_checked(_divergence))
    temperature: float = field(default=1.0, metadata=_checked(scale))
    ratio_clip: float = field(default=2.0, metadata=_checked(positive, row=True))
    ignore_index: int = field(
        default=-100, metadata=_checked(lambda n, value: integer(n, value, "a whole number, at most 2^53 in size"))
    )
    reduction: Literal["mean", "sum", "none"] = field(default="mean", metadata=_one_of("mean", "sum", "none"))
    precision: str | float = field(default="auto", metadata=_checked(_precision))
    workspace: int | None = field(default=None, metadata=_checked(_bytes))

    def __post_init__(self) -> None:
        asked = self.divergence
        for name, check in _CHECKS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.estimator == "sampled" and self.divergence != "reverse-kl":
            raise ValueError(
                f"divergence={asked!r} belongs to estimator='full'; the sampled estimator is the policy gradient "
                "of the reverse KL: use divergence='reverse-kl'"
            )


_CHECKS = [(f.name, f.metadata["check"]) for f in fields(Options)]
