"""Any value for any argument: right, or an error that names the argument. And every way to differentiate."""

from __future__ import annotations

import copy
import enum
import inspect
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgopd_kernels import Gate, Options, gated_advantage, gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss
from sgopd_kernels.backends.cpu import CpuBackend
from sgopd_kernels.backends.torch import TorchBackend

BACKENDS = ["torch", "cpu", "reference"]
FUSED = ["torch", "cpu"]
N, V, H, K = 12, 40, 8, 5
NAN, INF = math.nan, math.inf


def operands(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student = dict(student_hidden=randn(N, H), student_weight=randn(V, H))
    teacher = dict(teacher_hidden=randn(N, H), teacher_weight=randn(V, H))
    log_q = torch.log_softmax(teacher["teacher_hidden"].double() @ teacher["teacher_weight"].double().T, -1)
    ids = torch.randint(0, V, (N,), generator=g)
    top = log_q.topk(K, -1)
    words = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    verdict = torch.randint(-1, 2, (N,), generator=g)
    ids[3] = -100
    if function is gated_kl_loss:
        return dict(**student, **teacher, token_ids=ids, verdict=verdict)
    if function is gated_logprob_loss:
        return dict(**student, token_ids=ids, teacher_logprob=words.float(), verdict=verdict)
    if function is gated_topk_kl_loss:
        top_k = dict(topk_ids=top.indices, topk_logprob=top.values.float())
        return dict(**student, token_ids=ids, **top_k, verdict=verdict)
    return dict(student_logprob=words.float() - 0.1, teacher_logprob=words.float(), verdict=verdict)


def measured(function: Callable[..., Any], given: dict[str, Any], **options: Any) -> list[Tensor]:
    """Loss, gradients of the student's head and hidden states, statistics."""
    given = dict(given)
    for name in ("student_hidden", "student_weight"):
        given[name] = given[name].detach().requires_grad_()
    loss, stats = function(**given, **options, return_stats=True)
    loss.sum().backward()
    gradients = [given[name].grad for name in ("student_hidden", "student_weight")]
    return [loss.detach(), *gradients, stats.kl, stats.student_logprob, stats.teacher_logprob, stats.gate]


def agree(kit: Any, got: list[Tensor], want: list[Tensor], bound: float = 1e-5) -> bool:
    """Relative to 1 where the numbers are finite, in the same places not."""
    for a, b in zip(got, want):
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite) or kit.relative(a[finite], b[finite]) > bound:
            return False
    return True


# ---- values that are no such thing ------------------------------------------------------------------------------


class Thing:
    """Of no use to anybody."""


TEXTS: list[Any] = ["text", b"bytes", [], {}, Thing(), 1j]
NOT_POSITIVE = [*TEXTS, True, NAN, INF, -INF, -1, 0, 1e-60, 1e60, 10**400, torch.ones(()), np.array([1.0])]
NOT_NAMES = [None, "no such name", b"mean", 3, True, NAN, [], ["mean"], Thing(), torch.ones(2)]
NOT_TENSORS = [None, *TEXTS, True, NAN, 3.5, [1.0] * N, np.ones(N)]


def not_of_kind(x: Tensor) -> list[Any]:
    kinds = [x.long(), x > 0, x.to(torch.complex64), x.to(torch.float8_e4m3fn), x.to_sparse(), x.to("meta")]
    return [*NOT_TENSORS, *kinds, torch.nested.nested_tensor([x, x])]


def not_of_shape(x: Tensor) -> list[Any]:
    return [x[:0], x[..., :0], x.unsqueeze(0), x[..., None], x.sum()]


def not_float(x: Tensor) -> list[Any]:
    return [*not_of_kind(x), *not_of_shape(x), x[:-1]]


def not_integer(x: Tensor) -> list[Any]:
    kinds = [x.float(), x > 0, x.to(torch.complex64), x.to_sparse(), x.to("meta")]
    return [*NOT_TENSORS, *kinds, x.masked_fill(x == x[0], V), x.masked_fill(x == x[0], -1)]


def not_verdict(x: Tensor) -> list[Any]:
    shapes = [x[:-1], x.unsqueeze(0), x.reshape(3, 4)]
    values = [x + 0.5, x * 2, x.float().masked_fill(x == x[0], NAN), x.float().masked_fill(x == x[0], INF)]
    return [
        None,
        *TEXTS,
        True,
        NAN,
        INF,
        2,
        -0.5,
        10**400,
        1e39,
        x > 0,
        x.to(torch.complex64),
        x.to_sparse(),
        x.to("meta"),
        *shapes,
        *values,
    ]


def not_logprob(x: Tensor) -> list[Any]:
    return [*not_float(x), x + 8, -x + 1, x.exp() + 1, torch.full_like(x, INF)]


def wrong(function: Callable[..., Any]) -> dict[str, list[Any]]:
    """For each argument what it is not."""
    given = operands(function)
    table: dict[str, list[Any]] = {
        "gate": [None, *NOT_NAMES, 1.8, dict(agree=1.8)],
        "verdict": not_verdict(given["verdict"]),
        "reliability": [
            *TEXTS,
            True,
            NAN,
            INF,
            1e39,
            -0.1,
            1.1,
            torch.full((N,), 2.0),
            torch.full((N,), NAN),
            torch.ones(2),
        ],
        "generator": [*TEXTS, 3, True, NAN, "cpu"],
    }
    if function is gated_advantage:
        return table | {
            "student_logprob": not_logprob(given["student_logprob"]),
            "teacher_logprob": [*not_logprob(given["teacher_logprob"]), torch.full((N,), -INF)],
            "clip": NOT_POSITIVE,
        }
    not_weights = [
        *TEXTS,
        True,
        NAN,
        INF,
        1e39,
        -(10**39),
        torch.full((N,), NAN),
        torch.full((N,), -INF),
        torch.ones(2),
    ]
    table["token_weight"] = not_weights
    sides = ["student"] + ["teacher"] * (function is gated_kl_loss)
    for side in sides:
        table |= {
            f"{side}_hidden": not_float(torch.ones(N, H)) if side == "student" else not_float(given["teacher_hidden"]),
            # A head of other rows is a padded one, or a shorter vocabulary.
            f"{side}_weight": [*not_of_kind(torch.ones(V, H)), *not_of_shape(torch.ones(V, H))],
            f"{side}_bias": [x for x in not_float(torch.zeros(V)) if x is not None],
            f"{side}_logit_scale": [None, *NOT_POSITIVE, 1e-7, 1e7],
            f"{side}_softcap": NOT_POSITIVE,
        }
    counts = [0, -1.0, NAN, INF]
    tensors = [torch.tensor(x) for x in (*counts, True, 1j)] + [torch.ones(2), torch.ones(0), torch.ones(3, 3)]
    table |= {
        "token_ids": not_integer(given["token_ids"]),
        "temperature": [None, *NOT_POSITIVE, 1e-7, 1e7],
        "ignore_index": [None, *TEXTS, True, NAN, INF, -100.0, 2**60, -(10**400), torch.tensor(-100)],
        "reduction": NOT_NAMES,
        "num_items": [
            *TEXTS,
            True,
            -INF,
            10**400,
            *counts,
            *tensors,
            torch.ones(()).to_sparse(),
            torch.ones((), device="meta"),
        ],
        "precision": [*NOT_NAMES, *TEXTS, INF, -1e-3, 0, 1.0, 1e9, 10**400],
        "backend": [*NOT_NAMES, "cuda", "triton"],
        "workspace": [*TEXTS, True, NAN, INF, 0, -1, 1e6, 10**400, torch.tensor(100)],
        "return_stats": [None, *TEXTS, 1, 0.0, torch.ones(2)],
    }
    if function is gated_kl_loss:
        betas = [("jsd", x) for x in (None, "0.5", True, NAN, INF, -0.1, 1.1, 1j, [], torch.tensor(0.5))]
        table |= {
            "estimator": NOT_NAMES,
            "divergence": [*NOT_NAMES, "jsd", ("jsd",), ("kl", 0.5), *betas],
            "reference_hidden": [torch.ones(N, H), Thing()],
            "reference_weight": [torch.ones(V, H)],
            "reference_bias": [torch.zeros(V)],
            "reference_logit_scale": [2.0, *NOT_POSITIVE],
            "reference_softcap": NOT_POSITIVE,
            "process_group": [*TEXTS, 3, True],
        }
    if function is gated_logprob_loss:
        table |= {
            "teacher_logprob": [*not_logprob(given["teacher_logprob"]), torch.full((N,), -INF)],
            "behaviour_logprob": [
                *(x for x in not_logprob(given["teacher_logprob"]) if x is not None),
                torch.full((N,), -INF),
            ],
            "ratio_clip": [None, *NOT_POSITIVE],
        }
    if function is gated_topk_kl_loss:
        ids, words = given["topk_ids"], given["topk_logprob"]
        table |= {
            "topk_ids": [*not_integer(ids), ids[:, :0], ids[:, 0], ids.fill_(4), ids - V, ids.unsqueeze(0)],
            "topk_logprob": [*not_float(words), words * 0, words + 3, words[:, :-1], torch.full_like(words, INF)],
        }
    return table


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function", [gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss, gated_advantage], ids=lambda f: f.__name__
)
def test_nonsense_is_refused_by_name(function: Callable[..., Any]) -> None:
    complaints = []
    assert set(wrong(function)) == set(inspect.signature(function).parameters), "an argument without a row"
    for name, values in wrong(function).items():
        for value in values:
            try:
                function(**{**operands(function), name: value})
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                if name not in str(error):
                    complaints.append(f"{name}={value!r}: {type(error).__name__}: {error}")
            else:
                complaints.append(f"{name}={value!r} was taken")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("field", ["agree", "conflict", "neutral", "tolerance", "keep", "control"])
def test_nonsense_in_a_gate(field: str) -> None:
    numbers = [None, *TEXTS, True, NAN, INF, 10**400, torch.ones(()), (1.0,), (1.0, NAN), ("a", 1.0), (True, 1.0)]
    values: list[Any] = {
        "keep": NOT_NAMES,
        "control": NOT_NAMES[1:],
        "tolerance": [*numbers, -0.1],
    }.get(field, numbers)
    for value in values:
        with pytest.raises(ValueError, match=field):
            Gate(**{field: value})


# ---- odd, and meant --------------------------------------------------------------------------------------------


def spread(x: Tensor) -> Tensor:
    """The same values, every stride twice as long."""
    out = x.new_zeros([2 * n for n in x.shape])
    out[tuple(slice(None, None, 2) for _ in x.shape)] = x
    return out[tuple(slice(None, None, 2) for _ in x.shape)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss], ids=lambda f: f.__name__)
def test_odd_and_legal(kit: Any, function: Callable[..., Any], backend: str) -> None:
    given = operands(function)
    want = measured(function, {k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    floats = [k for k, v in given.items() if v.is_floating_point()]
    cases: dict[str, dict[str, Any]] = {
        "strided": {k: spread(v) for k, v in given.items()},
        "transposed": {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in given.items()},
        "parameters": {k: torch.nn.Parameter(given[k]) for k in floats},
        "small integers": {"token_ids": given["token_ids"].int(), "verdict": given["verdict"].to(torch.int8)},
        "verdict in bf16": {"verdict": given["verdict"].bfloat16()},
        "numpy": {"temperature": np.float32(1.0), "num_items": np.int64(11), "ignore_index": np.int32(-100)},
        "num_items": {"num_items": torch.full((1,), 11.0, requires_grad=True)},
        "a fp32 count": {"num_items": torch.tensor(11, dtype=torch.int32)},
    }
    if "topk_ids" in given:
        cases["int32 columns"] = {"topk_ids": given["topk_ids"].int()}
    for name, changed in cases.items():
        assert agree(kit, measured(function, {**given, **changed}, backend=backend), want), name
    # One row of a matrix for all, without a copy.
    row = {k: given[k][:1] for k in floats if k.endswith("hidden")}
    same = {**given, **{k: v.expand(N, H) for k, v in row.items()}}
    copied = {**given, **{k: v.repeat(N, 1) for k, v in row.items()}}
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in copied.items()}
    assert agree(kit, measured(function, same, backend=backend), measured(function, doubles))


class Word(str, enum.Enum):
    """Of which an f-string writes the member, and not what it is."""

    MEAN, SUM, NONE, FULL, SAMPLED = "mean", "sum", "none", "full", "sampled"
    EXACT, FORWARD, JSD, CORRECT, RANDOM, SCALE, GATE = (
        "exact", "forward-kl", "jsd", "correct", "random", "scale", "opdvr"
    )  # fmt: skip
    CPU, TORCH, REFERENCE = "cpu", "torch", "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_of_an_enum(backend: str) -> None:
    """Words that are no plain str mean what they equal, and are kept as plain ones."""
    given, member = operands(gated_kl_loss), Word(backend)
    given["token_ids"][5] = -100
    cases: list[dict[str, Any]] = [
        dict(reduction=Word.MEAN, estimator=Word.FULL, precision=Word.EXACT),
        dict(reduction=Word.SUM, estimator=Word.SAMPLED, gate=Word.GATE),
        dict(reduction=Word.NONE, divergence=Word.FORWARD),
        dict(divergence=(Word.JSD, 0.3)),
    ]
    for case in cases:
        plain = {k: (v[0].value, v[1]) if isinstance(v, tuple) else v.value for k, v in case.items()}
        got, want = (
            measured(gated_kl_loss, given, backend=member, **case),
            measured(gated_kl_loss, given, **plain, backend=backend),
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want)), case
        kept = Options(**case)
        assert kept == Options(**plain)
        words = [kept.reduction, kept.estimator, kept.precision, kept.divergence]
        assert all(type(w[0] if isinstance(w, tuple) else w) is str for w in words), case
    assert type(gated_kl_loss(**given, backend=member, return_stats=True)[1].backend) is str
    gate = Gate(keep=Word.CORRECT, control=Word.RANDOM, reliability=Word.SCALE)  # type: ignore[arg-type]
    assert [type(w) for w in (gate.keep, gate.control, gate.reliability)] == [str] * 3
    gate = Gate(keep=Word.CORRECT, reliability=Word.SCALE)  # type: ignore[arg-type]
    got = measured(gated_kl_loss, given, backend=backend, gate=gate, reliability=0.3)
    want = measured(
        gated_kl_loss, given, backend=backend, gate=Gate(keep="correct", reliability="scale"), reliability=0.3
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_ignored_position_holds(
    monkeypatch: pytest.MonkeyPatch, backend: str, reduction: str, captured: bool
) -> None:
    """Is of no account; nor in a captured CUDA graph, where such a position takes part by weight 0."""
    if captured:
        monkeypatch.setattr(TorchBackend, "capturing", lambda *_: True)
    given = operands(gated_kl_loss)
    ignored = given["token_ids"] == -100
    third = dict(reference_hidden=given["teacher_hidden"].flip(0), reference_weight=given["teacher_weight"].flip(0))
    given |= dict(
        token_weight=torch.full((N,), 0.5), reliability=torch.full((N,), 0.3), verdict=given["verdict"].float()
    )
    names = ["token_weight", "reliability", "verdict", "student_hidden", "teacher_hidden"]
    for heads in ({}, third):
        options = dict(backend=backend, reduction=reduction, **heads)
        want = measured(gated_kl_loss, given, **options)
        for name in names:
            for value in (NAN, INF):
                where = ignored.reshape(-1, *[1] * (given[name].ndim - 1))
                got = measured(gated_kl_loss, {**given, name: given[name].masked_fill(where, value)}, **options)
                assert all(torch.equal(a, b) for a, b in zip(got, want)), (name, value, list(heads))


ISAS = ["amx-emulated", *(i for i in CpuBackend().instruction_sets() if not CpuBackend().module.kernels(i).tiles)][:2]  # type: ignore[union-attr]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_heads_of_odd_strides(
    kit: Any, calibrate: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, isa: str
) -> None:
    """One row for all, rows over one another, and a stride of a dimension of one: as their contiguous copies."""
    monkeypatch.setattr(CpuBackend, "isa", isa)
    calibrate(pairs={"worthwhile": 0.0}, blocks={"worthwhile": 0.0})
    i = kit.make_inputs(n=40, v=600, hs=24, peak=6.0, near=0.3, seed=2, dtype=dtype)
    thin = kit.make_inputs(n=40, v=600, hs=1, peak=3.0, seed=3, dtype=dtype)
    long = torch.cat([i.student_weight.reshape(-1)[:2000], i.student_weight[0]])
    odd = {
        "one row": (i, i.student_weight[:1].expand(600, 24)),
        "overlapping": (i, long.as_strided((600, 24), (3, 1))),
        "one column": (thin, thin.student_weight.reshape(1, 600).t()),
    }
    for name, (inputs, head) in odd.items():
        for side in ("student_weight", "teacher_weight"):
            got, want = (kit.call(replace(inputs, **{side: h}), backend="cpu") for h in (head, head.repeat(1, 1)))
            assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3])), (name, side)


TOPK_ENDS = ["masked", "masked and sampled", "all masked", "no tail", "over 1", "NaN"]

# ---- log-probabilities at and beyond their ends ---------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_words_at_the_ends(kit: Any, backend: str) -> None:
    """Beside each other: a rounding above 0, NaN; -inf where the gate leaves the token out."""
    given = operands(gated_logprob_loss)
    for value, options in ((5e-4, {}), (NAN, {}), (-INF, dict(gate=Gate(0.0, 0.0, 0.0)))):
        changed = {**given, "teacher_logprob": given["teacher_logprob"].clone().index_fill(0, torch.tensor([0]), value)}
        got = measured(gated_logprob_loss, changed, backend=backend, **options)
        assert agree(kit, got, measured(gated_logprob_loss, changed, backend="reference", **options)), value
        assert bool(torch.isnan(got[0])) == math.isnan(value)
    behaviour = torch.full((N,), NAN)
    assert torch.isnan(gated_logprob_loss(**given, behaviour_logprob=behaviour, backend=backend))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", TOPK_ENDS)
def test_topk_at_the_ends(kit: Any, case: str, backend: str) -> None:
    given = operands(gated_topk_kl_loss)
    words, ids = given["topk_logprob"], given["token_ids"]
    ids[0] = given["topk_ids"][0, 1]
    if case.startswith("masked"):
        words[0, 1 if case.endswith("sampled") else 2] = -INF
    elif case == "all masked":
        words[1] = -INF
    elif case in ("no tail", "over 1"):
        words[:] = torch.log_softmax(words, -1) + (0 if case == "no tail" else 5e-4)
        words[:, 0] = torch.log1p(-words[:, 1:].double().exp().sum(-1)).float() + (1e-7 if case == "no tail" else 5e-4)
        inside = torch.arange(N) % 2 == 0  # the others' tokens have no teacher
        ids[:] = torch.where(inside, given["topk_ids"][:, 2], ids)
    else:
        words[2, 0] = NAN
    got = measured(gated_topk_kl_loss, given, backend=backend)
    want = measured(gated_topk_kl_loss, given, backend="reference")
    assert agree(kit, got, want, 3e-5)
    assert bool(torch.isnan(got[0])) == (case == "NaN")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_sampled_token_that_is_masked(kit: Any, side: str, backend: str) -> None:
    """Under "full" its gate is neutral (teacher) or follows d = +inf (student); under "sampled" it is refused."""
    given = operands(gated_kl_loss)
    mask = torch.zeros(V).index_fill(0, given["token_ids"][:1], -INF)
    options = {f"{side}_bias": mask, "gate": Gate(2.0, 3.0, 0.5)}
    got = measured(gated_kl_loss, given, backend=backend, **options)
    assert agree(kit, got, measured(gated_kl_loss, given, backend="reference", **options))
    assert torch.isfinite(got[0]) and got[4][0] == -INF
    assert got[-1][0] == (0.5 if side == "teacher" else {1: 2.0, 0: 0.5, -1: 3.0}[int(given["verdict"][0])])
    with pytest.raises(ValueError, match=r"token_ids.*ignore_index.*first at position 0"):
        gated_kl_loss(**given, estimator="sampled", backend=backend, **options)
    gated_kl_loss(**given, estimator="sampled", backend=backend, **{**options, "gate": Gate(0.0, 0.0, 0.0)})


def test_advantages_at_the_ends() -> None:
    given = operands(gated_advantage)
    given["verdict"][:4] = torch.tensor([1, -1, 1, 0])
    given["teacher_logprob"][:3] = torch.tensor([-INF, -INF, NAN])
    with pytest.raises(ValueError, match=r"teacher_logprob.*clip"):
        gated_advantage(**given)
    advantage, weight = gated_advantage(**given, clip=2.0)
    assert (
        advantage[:2].tolist() == [-2, -2] and advantage[2].isnan() and weight[:2].tolist() == [1.0, pytest.approx(1.8)]
    )
    off, _ = gated_advantage(**given, gate=Gate(0.0, 0.0, 0.0))
    assert not off.any()


# ---- ways to differentiate ------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))[0],
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(torch.stack([y, y])).sum() / 2)(x),
    "functional hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "functional jvp": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x))[1],
    "functional jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x]))[0],
}


def tangent(f: Callable[..., Any], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_are_right_or_refused(kit: Any, reduction: str) -> None:
    given = operands(gated_kl_loss)
    hidden = given.pop("student_hidden")
    for name, transform in {**TRANSFORMS, "dual": tangent}.items():

        def loss(x: Tensor, backend: str) -> Tensor:
            return gated_kl_loss(x, **given, backend=backend, reduction=reduction).sum()

        if name != "linearize":
            want = transform(lambda x: loss(x, "reference"), hidden)
        for backend in FUSED:
            try:
                got = transform(lambda x: loss(x, backend), hidden)  # noqa: B023
            except (NotImplementedError, RuntimeError) as error:
                assert "backend='reference'" in str(error), f"{name}: {error}"
                assert name not in ("vmap", "functional jacobian")
                assert name != "vectorized jacobian" or reduction == "none"
            else:
                assert kit.relative(got, want) < 1e-5, name


@pytest.mark.filterwarnings("ignore")
def test_transforms_of_a_compiled_loss() -> None:
    """A graph that was made without tangents, and one made within a transform, say no as well."""
    given = operands(gated_kl_loss)
    hidden = given.pop("student_hidden")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gated_kl_loss(x, **given), backend="aot_eager")
    compiled(hidden)
    for attempt in (
        lambda: tangent(compiled, hidden),
        lambda: torch.func.jvp(compiled, (hidden,), (hidden,)),
        lambda: torch.compile(lambda x: torch.func.jvp(compiled, (x,), (x,))[1], backend="aot_eager")(hidden),
    ):
        with pytest.raises(Exception, match="reverse mode alone"):
            attempt()


def test_compiled_by_name_with_dynamic_shapes(kit: Any) -> None:
    """A preset's name (a control's), an advantage, numbers and shapes that are symbols: one graph, the same bits."""
    given = operands(gated_kl_loss)
    advantage = operands(gated_advantage)

    def step(hidden: Tensor, weight: Tensor, temperature: float, items: int) -> tuple[Tensor, Tensor]:
        inputs = {**given, "student_hidden": hidden, "student_weight": weight}
        loss = gated_kl_loss(**inputs, gate="random", temperature=temperature, num_items=items)
        return loss, gated_advantage(**advantage)[0]

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        hidden, weight = (given[k].clone().requires_grad_() for k in ("student_hidden", "student_weight"))
        torch.manual_seed(5)
        values = function(hidden, weight, 0.7, 20)
        values[0].backward()
        results.append([*(v.detach() for v in values), hidden.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ---- ways to call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inference_tensors(reduction: str, backend: str) -> None:
    """A teacher's, and all but the head: what a backward needs of them is kept."""
    given = operands(gated_kl_loss)
    want = measured(gated_kl_loss, given, backend=backend, reduction=reduction)
    with torch.inference_mode():
        frozen = {k: v.clone() for k, v in given.items()}
        assert torch.isfinite(gated_kl_loss(**frozen, backend=backend, reduction=reduction)).all()
    teacher = {k: v for k, v in frozen.items() if not k.startswith("student")}
    got = measured(gated_kl_loss, {**given, **teacher}, backend=backend, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3]))
    head = given["student_weight"].clone().requires_grad_()
    gated_kl_loss(**{**frozen, "student_weight": head}, backend=backend, reduction=reduction).sum().backward()
    assert head.grad is not None and torch.equal(head.grad, want[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, reduction: str, backend: str) -> None:
    given = operands(gated_kl_loss)
    want = measured(gated_kl_loss, given, backend=backend, reduction=reduction)
    hidden, head = (given.pop(k).requires_grad_() for k in ("student_hidden", "student_weight"))

    def body(hidden: Tensor, head: Tensor) -> Tensor:
        return gated_kl_loss(hidden, head, **given, backend=backend, reduction=reduction)

    loss = checkpoint(body, hidden, head, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    loss.sum().backward()
    assert torch.equal(hidden.grad, want[1]) and torch.equal(head.grad, want[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [("student_hidden",), ("student_weight",), ("student_hidden", "student_weight")])
def test_a_gradient_for_what_asks_for_one(kit: Any, frozen: tuple[str, ...], backend: str) -> None:
    given = operands(gated_kl_loss)
    given["student_bias"] = torch.zeros(V)
    leaves = [k for k in given if k.startswith("student") and k not in frozen]
    for reduction in ("mean", "none"):
        results = []
        for dtype, chosen in ((torch.float32, backend), (torch.float64, "reference")):
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
            for name in leaves:
                inputs[name] = inputs[name].detach().clone().requires_grad_()
            gated_kl_loss(**inputs, backend=chosen, reduction=reduction).sum().backward()
            assert all(inputs[name].grad is None for name in frozen)
            results.append([inputs[name].grad for name in leaves])
        assert agree(kit, *results)


@pytest.mark.parametrize("budget", [1.5e-3, 0.0])
def test_stats_speak_of_a_backward_that_comes_later(calibrate: Any, kit: Any, budget: float) -> None:
    """reduction="none": what the losses took, until the gradients are made; then both."""
    calibrate(pairs={"worthwhile": 0.0}, blocks={"worthwhile": 0.0})
    inputs = kit.make_inputs(n=64, v=4000, hs=64, peak=6.0, near=0.3, masked=0.0, seed=2)
    precision = budget or "exact"
    *_, mean = kit.call(inputs, precision=precision, backend="cpu")
    hidden = inputs.student_hidden.clone().requires_grad_()
    given = (hidden, *inputs.args()[1:])
    losses, stats = gated_kl_loss(*given, precision=precision, backend="cpu", reduction="none", return_stats=True)
    assert math.isnan(stats.kept) and stats.plan in ("exact", "quantized", "blocks")
    before = stats.error_estimate
    for _ in range(2):
        losses.sum().backward(retain_graph=True)
        assert stats.plan == mean.plan and stats.kept == pytest.approx(mean.kept, rel=0.2)
        assert max(before, 1e-9 if budget else 0.0) <= stats.error_estimate <= budget
    assert (stats.kept < 1) == (budget > 0)
    again = pickle.loads(pickle.dumps(stats))
    for other in (again, copy.deepcopy(stats)):
        assert other.kept == stats.kept and torch.equal(other.kl, stats.kl) and other.plan == stats.plan
    with torch.no_grad():
        _, stats = gated_kl_loss(*given, precision=precision, backend="cpu", return_stats=True)
    assert math.isnan(stats.kept)
