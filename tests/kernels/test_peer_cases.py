"""The cases of TRL's and Liger's own tests, recomputed with our call.

Each group names the public test whose shapes, dtypes, betas, temperatures, masks and edge cases it takes. The truth is
a plain float64 computation on the same operands, and the bound is test_parity's: 1e-5, or 1.5 times the error of fp32
projections followed by a float64 softmax; a gradient in low precision is rounded once. On TRL's cases its own function
runs beside ours. Left out: Liger's hard loss (a cross-entropy, no divergence), `accum_dtype` (ours is always fp32).

    TRL     tests/test_distillation_trainer.py (TestChunkedDivergenceLoss)
            tests/experimental/test_distillation_trainer.py, test_gkd_trainer.py (TestGeneralizedJSDLoss)
    Liger   test/transformers/test_fused_linear_jsd.py, test/transformers/test_jsd.py
            test/chunked_loss/test_jsd_loss.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgopd_kernels import gated_kl_loss

BACKENDS = ["torch", "cpu"]
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    student_hidden: Tensor  # [..., Hs]
    student_weight: Tensor  # [V, Hs]
    teacher_hidden: Tensor  # [..., Ht]
    teacher_weight: Tensor  # [V, Ht]
    token_ids: Tensor  # [...]
    beta: float = 0.5
    ignore_index: int = -100
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # temperature, logit scales, softcaps
    frozen: bool = False  # hidden states that take no gradient

    @property
    def valid(self) -> Tensor:
        return self.token_ids != self.ignore_index

    @property
    def count(self) -> int:
        return max(int(self.valid.sum()), 1)


def draw(
    shape: tuple[int, ...],
    hs: int,
    ht: int,
    v: int,
    *,
    uniform: bool = False,
    scalar: float = 1.0,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> Case:
    """Operands as the peers draw them: TRL normal, Liger uniform in [0, 1): logits lie around H / 4."""
    g = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=g) if uniform else torch.randn(*size, generator=g)

    heads = weight_dtype or dtype
    return Case(
        (random(*shape, hs) * scalar).to(dtype),
        random(v, hs).to(heads),
        (random(*shape, ht) * scalar).to(dtype),
        random(v, ht).to(heads),
        torch.randint(0, v, shape, generator=g),
        student_bias=random(v).to(heads) if bias else None,
        teacher_bias=random(v).to(heads) if bias else None,
        **kwargs,
    )


def ignoring(case: Case, count: int, seed: int = 0) -> Case:
    """`count` positions get ignore_index; all others keep an id that may equal it (Liger's ignore_index 2 and 42)."""
    ids = case.token_ids.clone()
    where = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    ids.view(-1)[where] = case.ignore_index
    return replace(case, token_ids=ids)


def ours(case: Case, backend: str, incoming: float = 1.0, **kwargs: Any) -> dict[str, Tensor]:
    hidden = case.student_hidden.detach().clone().requires_grad_(not case.frozen)
    weight = case.student_weight.detach().clone().requires_grad_()
    bias = None if case.student_bias is None else case.student_bias.detach().clone().requires_grad_()
    loss, stats = gated_kl_loss(
        hidden,
        weight,
        case.teacher_hidden,
        case.teacher_weight,
        case.token_ids,
        1,
        gate="opd",
        divergence=("jsd", case.beta),
        student_bias=bias,
        teacher_bias=case.teacher_bias,
        ignore_index=case.ignore_index,
        backend=backend,
        return_stats=True,
        **case.options,
        **kwargs,
    )
    (loss * incoming).backward()
    assert stats.backend == backend
    out = {"loss": loss.detach(), "kl": stats.kl, "entropy": stats.student_entropy}
    for name, leaf in (("d_hidden", hidden), ("d_weight", weight), ("d_bias", bias)):
        if leaf is not None and leaf.requires_grad:
            assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
            out[name] = leaf.grad
    return out


def truth(case: Case, projections: torch.dtype = torch.float64, sums: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What `ours` returns, by autograd on float64 logits; products in `projections`, the bias added in `sums`."""
    options = case.options

    def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = hidden.reshape(-1, hidden.shape[-1]).to(projections) @ weight.to(projections).T
        return (logits if bias is None else logits.to(sums) + bias.to(sums)).double()

    def log_softmax(logits: Tensor, side: str) -> Tensor:
        logits = logits * options.get(f"{side}_logit_scale", 1.0)
        cap = options.get(f"{side}_softcap")
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits / options.get("temperature", 1.0), -1)

    z = project(case.student_hidden, case.student_weight, case.student_bias).requires_grad_()
    log_p = log_softmax(z, "student")
    log_q = log_softmax(project(case.teacher_hidden, case.teacher_weight, case.teacher_bias), "teacher")
    p, q, beta = log_p.exp(), log_q.exp(), case.beta
    if beta == 0:
        kl = (q * (log_q - log_p)).sum(-1)
    elif beta == 1:
        kl = (p * (log_p - log_q)).sum(-1)
    else:
        share = torch.tensor([1 - beta, beta], dtype=torch.float64).log()
        log_m = torch.logaddexp(log_p + share[0], log_q + share[1])
        kl = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)
    keep = case.valid.reshape(-1)
    loss = kl[keep].sum() / case.count
    (g,) = torch.autograd.grad(loss, z)
    shape = case.token_ids.shape
    return {
        "loss": loss.detach(),
        "kl": (kl * keep).detach().view(shape),
        "entropy": (-(p * log_p).sum(-1) * keep).detach().view(shape),
        "d_hidden": (g @ case.student_weight.double()).view(case.student_hidden.shape),
        "d_weight": g.T @ case.student_hidden.reshape(-1, case.student_hidden.shape[-1]).double(),
        "d_bias": g.sum(0),
    }


def check(
    kit: Any, case: Case, incoming: float = 1.0, run: Callable[..., dict[str, Tensor]] = ours, **kwargs: Any
) -> dict[str, dict[str, Tensor]]:
    """Both backends against one truth, which costs more than both. `incoming`: the gradient that meets the loss."""
    exact = truth(case)

    @functools.cache
    def limits() -> list[dict[str, Tensor]]:
        # fp32 products fix the error; whether a bias is added in fp32 or later is a backend's own choice.
        return [truth(case, torch.float32, sums) for sums in (torch.float32, torch.float64)]

    results = {backend: run(case, backend, incoming, **kwargs) for backend in BACKENDS}
    for backend, got in results.items():
        for name, value in got.items():
            scale = incoming if name.startswith("d_") else 1.0
            want = exact[name] * scale
            rounding = 1.1 * kit.relative(want.to(value.dtype), want) if value.dtype != torch.float32 else 0.0
            error, allowed = kit.relative(value, want), rounding + 1e-5
            if error > allowed:
                allowed = max(allowed, rounding + 1.5 * max(kit.relative(x[name] * scale, want) for x in limits()))
            assert error <= allowed, f"{backend}, {name}: {error:.2e} > {allowed:.2e}"
            if name in ("d_hidden", "kl", "entropy"):
                assert not value[~case.valid].any(), f"{backend}, {name} of ignored positions"
    return results


def check_nothing(case: Case) -> None:
    """All ignored: a zero that backward passes through, so that distributed training does not wait for a rank."""
    for backend in BACKENDS:
        for name, value in ours(
            replace(case, token_ids=torch.full_like(case.token_ids, case.ignore_index)), backend
        ).items():
            assert not value.any(), f"{backend}, {name}"


# Liger, test/transformers/test_fused_linear_jsd.py: the student's hidden states are half as wide as the teacher's.

# Liger's first shape is (8, 128): 2 s a case, mostly the float64 truth; 64 of its 1,024 tokens take 0.3 s. Rows are
# independent, and `test_liger_fused_linear_jsd_full_size` runs one case whole.
LIGER_SHAPES = [((8, 8), 1024, 4096), ((4, 423), 167, 1423)]
LIGER_CASES: list[tuple[float, float, int | None]] = [
    # test_correctness
    (1.0, 0.5, None),
    (2.0, 0.1, None),
    (1.0, 0.0, None),
    (1.0, 1.0, None),
    # test_correctness_with_ignore_index
    (1.0, 0.5, 2),
    (1.0, 0.0, 2),
    (2.0, 0.1, 42),
    (1.0, 1.0, 2),
]


def liger(shape: tuple[int, int], h: int, v: int, temperature: float, beta: float, **kwargs: Any) -> Case:
    options = {"temperature": temperature}
    return draw((shape[0] * shape[1],), h // 2, h, v, uniform=True, beta=beta, options=options, **kwargs)


@pytest.mark.parametrize(("temperature", "beta", "ignore_index"), LIGER_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "h", "v"), LIGER_SHAPES)
def test_liger_fused_linear_jsd(
    kit: Any,
    shape: tuple[int, int],
    h: int,
    v: int,
    dtype: torch.dtype,
    temperature: float,
    beta: float,
    ignore_index: int | None,
) -> None:
    case = liger(
        shape, h, v, temperature, beta, dtype=dtype, ignore_index=-100 if ignore_index is None else ignore_index
    )
    check(kit, case if ignore_index is None else ignoring(case, case.token_ids.numel() // 3))


def test_liger_fused_linear_jsd_full_size(kit: Any) -> None:
    check(kit, ignoring(liger((8, 128), 1024, 4096, 2.0, 0.1, ignore_index=42), 300))


@pytest.mark.parametrize(("temperature", "beta", "ignore_index"), [(1.0, 0.5, -100), (2.0, 0.1, 42)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "h", "v"), [((2, 2), 8, 8), ((9, 7), 41, 41)])
def test_liger_fused_linear_jsd_functional(
    kit: Any,
    shape: tuple[int, int],
    h: int,
    v: int,
    dtype: torch.dtype,
    temperature: float,
    beta: float,
    ignore_index: int,
) -> None:
    """ignore_index 42 lies beyond these vocabularies."""
    case = liger(shape, h, v, temperature, beta, scalar=0.5, dtype=dtype, ignore_index=ignore_index)
    check(kit, ignoring(case, 1 if case.token_ids.numel() < 8 else 20))


@pytest.mark.parametrize(("temperature", "beta", "ignore_index"), [(1.0, 0.5, 2), (2.0, 0.1, 42)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "h", "v"), [((8, 128), 1024, 4096), ((4, 423), 167, 1423)])
def test_liger_fused_linear_jsd_all_ignored(
    shape: tuple[int, int], h: int, v: int, dtype: torch.dtype, temperature: float, beta: float, ignore_index: int
) -> None:
    check_nothing(liger(shape, h, v, temperature, beta, dtype=dtype, ignore_index=ignore_index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_liger_fused_linear_jsd_amp(kit: Any, dtype: torch.dtype) -> None:
    """Hidden states in the autocast's dtype, heads in fp32. Liger rounds the heads too; ours takes them as they are."""
    case = liger((2, 4), 2048, 3200, 1.0, 0.5, dtype=dtype, weight_dtype=torch.float32)

    def under_autocast(*args: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return ours(*args)

    check(kit, ignoring(case, 3), run=under_autocast)


# Liger, test/transformers/test_jsd.py: from log-probabilities. With hidden = I [N, N] and weight = log-probabilities
# transposed [V, N] (not contiguous), the logits are the log-probabilities and dW their gradient. Liger's own is with
# respect to log p taken as free; ours goes through the softmax. The hidden states are frozen: dH is the product of a
# gradient whose rows sum to 0 with log-probabilities around -8, so it is rounding magnified, and no quantity of
# Liger's. An identity costs N^2 V, and rows are independent: of (2, 1024) and (41, 401) tokens 16 and 41 stay.

JSD_SHAPES = [(16, 3200), (41, 1271)]
JSD_DTYPES = [*DTYPES, torch.float16]


def from_logits(student: Tensor, teacher: Tensor, **kwargs: Any) -> Case:
    """Logits [N, V] as hidden states [N, N] on heads [V, N]."""
    eye = torch.eye(len(student), dtype=student.dtype)
    ids = torch.arange(len(student)) % student.shape[1]
    return Case(eye, student.T, eye, teacher.T, ids, **kwargs)


def logprobs(n: int, v: int, dtype: torch.dtype, **kwargs: Any) -> Case:
    g = torch.Generator().manual_seed(n)
    student, teacher = (torch.randn(n, v, generator=g).log_softmax(-1).to(dtype) for _ in range(2))
    return from_logits(student, teacher, frozen=True, **kwargs)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", JSD_DTYPES)
@pytest.mark.parametrize(("n", "v"), JSD_SHAPES)
def test_liger_jsd(kit: Any, n: int, v: int, dtype: torch.dtype, beta: float) -> None:
    """test_correctness, _with_beta; at 1/2 the divergence is symmetric."""
    case = logprobs(n, v, dtype, beta=beta)
    results = check(kit, case)
    if beta == 0.5:
        swapped = replace(case, student_weight=case.teacher_weight, teacher_weight=case.student_weight)
        for backend, got in results.items():
            assert kit.relative(ours(swapped, backend)["kl"], got["kl"]) <= 1e-5


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("n", "v"), JSD_SHAPES)
def test_liger_jsd_not_last(kit: Any, n: int, v: int, dtype: torch.dtype, ignore_index: int) -> None:
    """test_correctness_not_last and _functional: the loss is doubled before the backward."""
    case = logprobs(n, v, dtype, ignore_index=ignore_index)
    check(kit, case if ignore_index == -100 else ignoring(case, n // 3), incoming=2.0)


@pytest.mark.parametrize(("beta", "ignore_index"), [(0.5, 2), (0.5, 42), (0.1, 42)])
@pytest.mark.parametrize("dtype", JSD_DTYPES)
@pytest.mark.parametrize(("n", "v"), JSD_SHAPES)
def test_liger_jsd_ignore_index(kit: Any, n: int, v: int, dtype: torch.dtype, beta: float, ignore_index: int) -> None:
    """test_correctness_with_ignore_index and _functional."""
    check(kit, ignoring(logprobs(n, v, dtype, beta=beta, ignore_index=ignore_index), n // 3))


def test_liger_jsd_all_ignored() -> None:
    check_nothing(logprobs(20, 32, torch.bfloat16))


# Liger, test/chunked_loss/test_jsd_loss.py: the soft loss, with and without biases. Its first shape is shrunk as above.


@pytest.mark.parametrize("ignore_index", [-100, 42])
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.0, 0.8), (0.5, 0.2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "h", "v"), [((8, 4), 1024, 4096), ((3, 47), 31, 123)])
def test_liger_chunked_jsd(
    kit: Any,
    shape: tuple[int, int],
    h: int,
    v: int,
    dtype: torch.dtype,
    bias: bool,
    temperature: float,
    beta: float,
    ignore_index: int,
) -> None:
    case = liger(shape, h, v, temperature, beta, dtype=dtype, bias=bias, ignore_index=ignore_index)
    check(kit, ignoring(case, case.token_ids.numel() // 4))


@pytest.mark.parametrize(("temperature", "ignore_index"), [(1.0, -100), (2.0, 42)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "h", "v"), [((2, 2), 8, 8), ((9, 7), 41, 41)])
def test_liger_chunked_jsd_functional(
    kit: Any,
    shape: tuple[int, int],
    h: int,
    v: int,
    dtype: torch.dtype,
    bias: bool,
    temperature: float,
    ignore_index: int,
) -> None:
    check(kit, liger(shape, h, v, temperature, 0.5, dtype=dtype, bias=bias, ignore_index=ignore_index))


# TRL, TestChunkedDivergenceLoss: B 2, K 6, H 8, V 17, three positions masked. TRL divides its work into tiles of 4
# tokens by 5 columns there; a workspace of one byte makes ours go token by token.


def trl(shape: tuple[int, int] = (2, 6), hs: int = 8, ht: int = 8, v: int = 17, masked: int = 3, **kwargs: Any) -> Case:
    return ignoring(draw(shape, hs, ht, v, **kwargs), masked)


def theirs(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """TRL's own function on the case."""
    module = pytest.importorskip("trl.kernels.chunked_divergence", reason="TRL is not installed (extra: trl)")
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", 4)
    monkeypatch.setattr(module, "VOCAB_CHUNK_SIZE", 5)
    keep, options = case.valid, case.options
    hidden, weight = (t.detach().clone().requires_grad_() for t in (case.student_hidden, case.student_weight))
    bias = None if case.student_bias is None else case.student_bias.detach().clone().requires_grad_()
    kl, entropy = module.ChunkedDivergenceFunction.apply(
        hidden[keep],
        weight,
        bias,
        case.teacher_hidden[keep],
        case.teacher_weight,
        case.teacher_bias,
        case.beta,
        options.get("temperature", 1.0),
        options.get("student_logit_scale", 1.0),
        options.get("student_softcap"),
        options.get("teacher_logit_scale", 1.0),
        options.get("teacher_softcap"),
    )
    (kl.sum() / case.count).backward()
    assert hidden.grad is not None and weight.grad is not None
    out = {"kl": kl.detach(), "entropy": entropy, "d_hidden": hidden.grad, "d_weight": weight.grad}
    if bias is not None:
        assert bias.grad is not None
        out["d_bias"] = bias.grad
    return out


def check_trl(kit: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth, ours whole and ours token by token, and TRL's function."""
    results = list(check(kit, case).values()) + list(check(kit, case, workspace=1).values())
    for name, value in theirs(case, monkeypatch).items():
        for got in results:
            mine = got[name][case.valid] if name in ("kl", "entropy") else got[name]
            # TRL's gradient tiles are rounded to the operands' dtype.
            bound = 2e-5 if value.dtype == torch.float32 else 8e-3
            assert kit.relative(mine, value) <= bound, name


TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "caps": {
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "student_softcap": 50.0,
        "teacher_softcap": 30.0,
    },
    "warm": {"temperature": 2.0},
    # test_backward_matches_reference
    "cool": {"temperature": 0.7},
    "tight cap": {"student_logit_scale": 0.5, "student_softcap": 3.0},
    "warm, tight cap": {"temperature": 2.0, "student_softcap": 3.0},
}


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", TRL_OPTIONS)
def test_trl_chunked_divergence(
    kit: Any, options: str, bias: bool, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_matches_naive_full_vocab, _applies_*, _beta_1_is_reverse_kl, _backward_matches_reference."""
    check_trl(kit, trl(beta=beta, bias=bias, options=TRL_OPTIONS[options]), monkeypatch)


def test_trl_different_hidden_sizes(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl(kit, trl((2, 5), 8, 12, 13, masked=1, seed=2), monkeypatch)


def test_trl_bf16_hidden_fp32_weight(kit: Any) -> None:
    """TRL rounds the head to bf16 as well and allows 2e-2; ours keeps it."""
    check(kit, trl(dtype=torch.bfloat16, weight_dtype=torch.float32))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trl_low_precision_backward(
    kit: Any, dtype: torch.dtype, beta: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaked logits (standard deviation 10 or 30), fp32 biases. Under autocast TRL rounds fp32 operands, ours not."""
    case = trl(hs=64, ht=64, beta=beta)
    spread = (10.0 if beta == 0.5 else 30.0) / 8
    operand = torch.float32 if autocast else dtype
    case = replace(
        case,
        student_hidden=case.student_hidden.to(operand),
        teacher_hidden=case.teacher_hidden.to(operand),
        student_weight=(case.student_weight * spread).to(operand),
        teacher_weight=(case.teacher_weight * spread).to(operand),
        student_bias=torch.linspace(-1, 1, 17),
        teacher_bias=torch.linspace(1, -1, 17),
    )
    if not autocast:
        check_trl(kit, case, monkeypatch)
        return
    with torch.autocast("cpu", dtype=dtype):
        results = {backend: ours(case, backend) for backend in BACKENDS}
    check(kit, case, run=lambda _, backend, __: results[backend])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_jsd_underflow_across_blocks(kit: Any, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,051 columns at -120, whose probabilities underflow in fp32; both models' in one place. TRL's is beta 1/2."""
    column = torch.full((2053, 1), -120.0)
    student, teacher = column.clone(), column.clone()
    student[:2, 0], teacher[:2, 0] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    ids = torch.tensor([[0, 1, -100]])
    check_trl(kit, Case(torch.ones(1, 3, 1), student, torch.ones(1, 3, 1), teacher, ids, beta=beta), monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("added", [5.0, torch.inf, torch.nan])
def test_trl_masked_positions_ignored(added: float, backend: str) -> None:
    """Whatever stands at masked positions of either model (TRL adds 5) changes no bit, and gets no gradient."""
    case = trl()
    masked = ~case.valid
    dirty = replace(case, student_hidden=case.student_hidden.clone(), teacher_hidden=case.teacher_hidden.clone())
    dirty.student_hidden[masked] += added
    dirty.teacher_hidden[masked] += added
    clean, got = ours(case, backend), ours(dirty, backend)
    for name, value in clean.items():
        assert torch.equal(got[name], value), name
    assert not got["d_hidden"][masked].any() and got["d_hidden"][case.valid].any(-1).all()


def test_trl_fully_masked_batch_keeps_graph() -> None:
    check_nothing(trl(bias=True))


# TRL, GKDTrainer.generalized_jsd_loss: from logits, and the parity of the chunked loss with it.


def test_trl_parity_with_gkd(kit: Any) -> None:
    """One identity is both heads: the student's gradient of a tied head has nothing of the teacher's."""
    g = torch.Generator().manual_seed(1)
    logits = [torch.randn(2, 5, 11, generator=g) for _ in range(2)]
    ids = torch.ones(2, 5, dtype=torch.long)
    ids[0, -1] = -100
    eye = torch.eye(11)
    for beta in (0.0, 0.5, 1.0):
        case = Case(logits[0], eye, logits[1], eye, ids, beta=beta)
        check(kit, case)
        for backend in BACKENDS:
            tied = eye.clone().requires_grad_()
            args = (logits[0], tied, logits[1], tied, ids, 1)
            loss = gated_kl_loss(*args, gate="opd", divergence=("jsd", beta), backend=backend, num_items=1)
            assert isinstance(loss, Tensor)
            loss.backward()
            want = truth(case)
            assert kit.relative(loss.detach(), want["loss"] * case.count) <= 1e-5
            assert kit.relative(tied.grad, want["d_weight"] * case.count) <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("labels", [None, [-100, 1, 2, -100, -100, 3]])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_trl_generalized_jsd(kit: Any, beta: float, labels: list[int] | None, temperature: float) -> None:
    """B 2, T 3, V 5. Without labels TRL's "batchmean" divides by B: `num_items` here."""
    g = torch.Generator().manual_seed(42)
    student, teacher = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    case = from_logits(student, teacher, beta=beta, options={"temperature": temperature})
    if labels is not None:
        case = replace(case, token_ids=torch.tensor(labels))
    check(kit, case)
    want = truth(case)
    for backend in BACKENDS:
        assert kit.relative(ours(case, backend, num_items=2)["loss"], want["loss"] * case.count / 2) <= 1e-5
        assert kit.relative(ours(case, backend, reduction="sum")["loss"], want["loss"] * case.count) <= 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_generalized_jsd_edges(kit: Any, beta: float) -> None:
    """(0.1, 0.9) against (0.9, 0.1), uniform and identical logits, all in TRL's TestGeneralizedJSDLoss."""
    check(kit, from_logits(torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.9, 0.1]]).log(), beta=beta))
    for logits in (torch.ones(1, 5), torch.randn(6, 5, generator=torch.Generator().manual_seed(0))):
        for backend in BACKENDS:
            got = ours(from_logits(logits, logits.clone(), beta=beta), backend)
            assert got["loss"] == 0 and not got["d_weight"].any()
