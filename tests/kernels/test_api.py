"""The door: every argument is right or refused by name; masks, reductions, edge sizes, identities of the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sgopd_kernels import (
    PRESETS,
    Gate,
    Head,
    Options,
    SampledTeacher,
    TopKTeacher,
    gated_advantage,
    gated_kl_loss,
    gated_logprob_loss,
    gated_loss,
)

BACKENDS = ["torch", "cpu", "reference"]


@pytest.fixture
def inputs(kit: Any) -> Any:
    return kit.make_inputs(n=60, v=300, hs=32, seed=1)


# ---- identities (docs/method.md, section 2) -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", ("jsd", 0.5)])
def test_equal_models_give_exactly_nothing(kit: Any, estimator: str, divergence: Any, backend: str) -> None:
    if estimator == "sampled" and divergence != "reverse-kl":
        return  # refused, see test_refusals
    same = kit.make_inputs(n=50, v=2500, near=0.0, seed=4)
    loss, d_hidden, d_weight, stats = kit.call(same, estimator=estimator, divergence=divergence, backend=backend)
    assert loss == 0 and not d_hidden.any() and not d_weight.any() and not stats.kl.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_unit_gate_and_unknown_verdicts_are_plain_distillation(
    kit: Any, inputs: Any, estimator: str, backend: str
) -> None:
    plain = kit.call(inputs, gate="opd", estimator=estimator, backend=backend)
    unknown = inputs.__class__(*inputs.args()[:5], torch.zeros_like(inputs.verdict))
    for other in (kit.call(unknown, gate="sg-opd", estimator=estimator, backend=backend),):
        for a, b in zip(plain[:3], other[:3]):
            assert torch.equal(a, b)
    assert bool((plain[3].gate[inputs.token_ids != -100] == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_equal_to_the_student_is_the_multiplicative_gate(kit: Any, inputs: Any, backend: str) -> None:
    plain = kit.call(inputs, backend=backend)
    extrapolated = kit.call(
        inputs, backend=backend, reference_hidden=inputs.student_hidden, reference_weight=inputs.student_weight
    )
    # The gradients agree (the target's normaliser is constant); the values are different functionals.
    assert kit.relative(extrapolated[1], plain[1]) < 2e-6
    assert kit.relative(extrapolated[2], plain[2]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_logit_gradient_sums_to_zero(kit: Any, inputs: Any, estimator: str, backend: str) -> None:
    """Sum over v of d(loss)/dz_v = 0: with a bias, its gradient is that sum over tokens, column by column."""
    bias = torch.zeros(300, requires_grad=True)
    loss = gated_kl_loss(*inputs.args(), student_bias=bias, estimator=estimator, backend=backend)
    loss.backward()
    assert bias.grad is not None
    assert abs(float(bias.grad.sum())) < 1e-6 * float(bias.grad.abs().sum())


# ---- gates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("random", "shuffled")])
def test_presets_weigh_the_four_cells(kit: Any, inputs: Any, preset: str, backend: str) -> None:
    gate = PRESETS[preset]
    *_, stats = kit.call(inputs, gate=preset, reliability=1.0 if gate.needs_reliability else None, backend=backend)
    valid = inputs.token_ids != -100
    d, v = stats.logratio, inputs.verdict
    for i in torch.nonzero(valid).flatten().tolist():
        side = 0 if v[i] > 0 else 1
        if v[i] == 0:
            expected = gate.neutral
        elif d[i] * v[i] > 0:
            expected = gate.agree_pair[side]
        else:
            expected = gate.conflict_pair[side]
        if (gate.keep == "correct" and v[i] <= 0) or (gate.keep == "incorrect" and v[i] >= 0):
            expected = 0.0
        assert float(stats.gate[i]) == pytest.approx(expected)
    assert not stats.gate[~valid].any() and not stats.agree[~valid].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tolerance_and_reliability(kit: Any, inputs: Any, backend: str) -> None:
    *_, wide = kit.call(inputs, gate=Gate(2.0, 0.5, neutral=0.75, tolerance=1e9), backend=backend)
    assert set(wide.gate[inputs.token_ids != -100].tolist()) == {0.75}
    trusted = kit.call(inputs, gate=Gate(1.0, 0.0), reliability=1.0, backend=backend)
    plain = kit.call(inputs, gate="opd", backend=backend)
    assert torch.equal(trusted[1], plain[1])
    *_, half = kit.call(inputs, gate=Gate(1.0, 0.0), reliability=0.25, backend=backend)
    assert set(half.gate[inputs.token_ids != -100].tolist()) == {0.25, 1.0}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize(("way", "ceiling"), [("scale", 1.0), ("scale", 0.5), ("cap", 1.0), ("cap", 0.5)])
def test_an_incorrect_rollout_weighs_its_reliability(
    kit: Any, inputs: Any, way: str, ceiling: float, estimator: str, backend: str
) -> None:
    """r, c r or min(c, r) on every token of it, ties too; correct and unknown ones as the gate has them."""
    n = len(inputs.token_ids)
    r = torch.rand(n, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # 0 and 1 among them
    gate = Gate((1.0, ceiling), (0.0, ceiling), neutral=0.9, tolerance=0.2, reliability=way)
    d = kit.call(inputs, backend="reference")[3].logratio
    v = inputs.verdict.tolist()
    expected = torch.zeros(n)
    for i in torch.nonzero(inputs.token_ids != -100).flatten().tolist():
        signed = float(d[i]) * v[i]
        cell = "neutral" if v[i] == 0 or abs(signed) <= 0.2 else "agree" if signed > 0 else "conflict"
        if v[i] < 0:
            base = 0.9 if cell == "neutral" else ceiling
            expected[i] = base * r[i] if way == "scale" else min(base, float(r[i]))
        else:
            expected[i] = {"neutral": 0.9, "agree": 1.0, "conflict": 0.0}[cell]
    exact = inputs.to(torch.float64)
    if backend == "reference":
        inputs = exact
    got = kit.call(inputs, gate=gate, reliability=r, estimator=estimator, backend=backend)
    weight = got[3].gate
    assert float((weight - expected).abs().max()) < 1e-6
    for a, b in zip(got[:3], kit.call(exact, gate="opd", token_weight=expected, estimator=estimator)[:3]):
        assert kit.relative(a, b) <= 1e-5
    ours = gated_advantage(got[3].student_logprob, got[3].teacher_logprob, inputs.verdict, gate=gate, reliability=r)
    kept = inputs.token_ids != -100
    assert torch.equal(ours[1][kept], weight[kept]) and torch.allclose(ours[0][kept], (weight * d)[kept], atol=1e-5)


def test_a_gate_that_weighs_by_reliability_asks_for_it(kit: Any, inputs: Any) -> None:
    for backend in ("reference", *BACKENDS):
        with pytest.raises(ValueError, match=r"reliability: the gate weighs .*'scale', .* got None: pass"):
            kit.call(inputs, gate="trust", backend=backend)
    with pytest.raises(ValueError, match="reliability: the gate weighs"):
        gated_advantage(torch.zeros(1), torch.zeros(1), 1, gate="trust")
    with pytest.raises(ValueError, match=r"Gate\.reliability"):
        Gate(reliability="always")  # type: ignore[arg-type]


def test_half_is_protect_with_incorrect_rollouts_at_half() -> None:
    assert PRESETS["half"] == Gate((1.0, 0.5), (0.0, 0.5)) and PRESETS["protect"].conflict == (0.0, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_controls_are_reproducible_and_keep_the_rate(kit: Any, backend: str) -> None:
    inputs = kit.make_inputs(n=2000, v=50, hs=16, masked=0.1, seed=8)

    def run(gate: str, seed: int) -> Any:
        return kit.call(inputs, gate=gate, backend=backend, generator=torch.Generator().manual_seed(seed))

    for control in ("random", "shuffled"):
        a, b, c = run(control, 1), run(control, 1), run(control, 2)
        assert torch.equal(a[3].gate, b[3].gate) and torch.equal(a[1], b[1])
        assert not torch.equal(a[3].gate, c[3].gate)
    tested = (inputs.token_ids != -100) & (inputs.verdict != 0)
    *_, gated = kit.call(inputs, gate="sg-opd", backend=backend)
    rate, drawn = gated.agree[tested].float().mean(), run("random", 1)[3].agree[tested].float().mean()
    assert abs(float(rate - drawn)) < 4 * (0.25 / int(tested.sum())) ** 0.5
    agreement = (run("random", 1)[3].agree == gated.agree)[tested].float().mean()
    assert float(agreement) < 0.65, "the random control follows the sign test"


# ---- masks, sizes, reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_valid_is_a_differentiable_zero(kit: Any, n: int, backend: str) -> None:
    inputs = kit.make_inputs(n=n, v=20, hs=8, masked=1.1)
    loss, d_hidden, d_weight, stats = kit.call(inputs, backend=backend)
    assert loss == 0 and not d_hidden.any() and not d_weight.any() and stats.kl.shape == (n,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "estimator, divergence",
    [("full", "reverse-kl"), ("full", "forward-kl"), ("full", ("jsd", 0.5)), ("sampled", "reverse-kl")],
)
@pytest.mark.parametrize("teacher_rows", [1, 3])
def test_a_vocabulary_of_one_token(kit: Any, estimator: str, divergence: Any, teacher_rows: int, backend: str) -> None:
    """Its probability is 1 whatever the logits: no loss, no gradient, no entropy. A padded teacher changes nothing."""
    rounding = 1e-6  # of logits of about 3, in float32
    inputs = kit.make_inputs(n=9, v=1, hs=8, v_teacher=teacher_rows)
    loss, d_hidden, d_weight, stats = kit.call(inputs, estimator=estimator, divergence=divergence, backend=backend)
    per_token = stats.kl, stats.student_logprob, stats.teacher_logprob, stats.student_entropy
    assert all(one.abs().max() < rounding for one in (loss, d_hidden, d_weight, *per_token))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_positions_do_not_matter(kit: Any, inputs: Any, backend: str) -> None:
    hidden = inputs.student_hidden.clone()
    hidden[inputs.token_ids == -100] = torch.nan
    poisoned = inputs.__class__(hidden, *inputs.args()[1:])
    clean, dirty = kit.call(inputs, backend=backend), kit.call(poisoned, backend=backend)
    for a, b in zip(clean[:3], dirty[:3]):
        assert torch.equal(a, b)
    assert not clean[1][inputs.token_ids == -100].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(kit: Any, inputs: Any, backend: str) -> None:
    count = int((inputs.token_ids != -100).sum())
    mean, total = kit.call(inputs, backend=backend), kit.call(inputs, backend=backend, reduction="sum")
    assert kit.relative(mean[0] * count, total[0]) < 1e-6 and kit.relative(mean[2] * count, total[2]) < 1e-6
    for items in (2 * count, torch.tensor(2 * count)):
        halved = kit.call(inputs, backend=backend, num_items=items)
        assert kit.relative(halved[0] * 2, mean[0]) < 1e-6 and kit.relative(halved[1] * 2, mean[1]) < 1e-6

    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    losses = gated_kl_loss(hidden, weight, *inputs.args()[2:], backend=backend, reduction="none")
    assert losses.shape == inputs.token_ids.shape and not losses[inputs.token_ids == -100].any()
    incoming = torch.linspace(-1, 2, losses.numel())
    losses.backward(incoming)
    # The same by a weighted sum of scalar losses.
    expected_h, expected_w = torch.zeros_like(hidden), torch.zeros_like(weight)
    for i in torch.nonzero(inputs.token_ids != -100).flatten().tolist():
        one = inputs.__class__(
            inputs.student_hidden[i : i + 1],
            inputs.student_weight,
            inputs.teacher_hidden[i : i + 1],
            inputs.teacher_weight,
            inputs.token_ids[i : i + 1],
            inputs.verdict[i : i + 1],
        )
        _, d_hidden, d_weight, _ = kit.call(one, backend=backend, reduction="sum")
        expected_h[i] = incoming[i] * d_hidden[0]
        expected_w += incoming[i] * d_weight
    assert hidden.grad is not None and weight.grad is not None
    assert kit.relative(hidden.grad, expected_h) < 3e-6 and kit.relative(weight.grad, expected_w) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient_scales(kit: Any, inputs: Any, backend: str) -> None:
    plain = kit.call(inputs, backend=backend)
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    (gated_kl_loss(hidden, weight, *inputs.args()[2:], backend=backend) * -2.5).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert kit.relative(hidden.grad, -2.5 * plain[1]) < 1e-6 and kit.relative(weight.grad, -2.5 * plain[2]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_broadcast_per_rollout(kit: Any, inputs: Any, backend: str) -> None:
    h, w, th, tw, ids, _ = inputs.args()
    verdict = torch.tensor([1, -1, 0, 1, -1, 1])
    flat = gated_kl_loss(h, w, th, tw, ids, verdict.repeat_interleave(10), backend=backend)
    b = lambda t: t.reshape(6, 10, *t.shape[1:])  # noqa: E731
    loss, stats = gated_kl_loss(b(h), w, b(th), tw, b(ids), verdict[:, None], backend=backend, return_stats=True)
    assert torch.equal(loss, flat) and stats.kl.shape == (6, 10) and stats.agree.dtype == torch.bool
    assert torch.isfinite(gated_kl_loss(b(h), w, b(th), tw, b(ids), 1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parts_and_tied_heads(kit: Any, inputs: Any, backend: str) -> None:
    _, d_hidden, d_weight, _ = kit.call(inputs, backend=backend)
    frozen_head = inputs.student_hidden.clone().requires_grad_()
    gated_kl_loss(frozen_head, *inputs.args()[1:], backend=backend).backward()
    assert frozen_head.grad is not None and torch.equal(frozen_head.grad, d_hidden)
    frozen_body = inputs.student_weight.clone().requires_grad_()
    gated_kl_loss(inputs.student_hidden, frozen_body, *inputs.args()[2:], backend=backend).backward()
    assert frozen_body.grad is not None and torch.equal(frozen_body.grad, d_weight)
    assert not gated_kl_loss(*inputs.args(), backend=backend).requires_grad

    embedding = inputs.student_weight.clone().requires_grad_()  # tied: hidden states come from the head itself
    tokens = torch.arange(60) % 300
    gated_kl_loss(embedding[tokens], embedding, *inputs.args()[2:], backend=backend).backward()
    double = inputs.student_weight.double().requires_grad_()
    gated_kl_loss(
        double[tokens], double, *(t.double() for t in inputs.args()[2:4]), *inputs.args()[4:], backend="reference"
    ).backward()
    assert embedding.grad is not None and double.grad is not None
    assert kit.relative(embedding.grad, double.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_minus_infinity(kit: Any, inputs: Any, estimator: str, backend: str) -> None:
    """Masked vocabulary rows on both sides equal a shorter vocabulary; on one side they stay finite."""
    h, w, th, tw, ids, verdict = inputs.args()
    ids = torch.where(ids >= 250, 7, ids)
    mask = torch.zeros(300)
    mask[250:] = -torch.inf
    short = kit.call(inputs.__class__(h, w[:250], th, tw[:250], ids, verdict), estimator=estimator, backend=backend)
    for student_bias, teacher_bias in ((mask, mask), (None, mask)):
        long = kit.call(
            inputs.__class__(h, w, th, tw, ids, verdict),
            estimator=estimator,
            backend=backend,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        )
        assert kit.relative(long[0], short[0]) < 1e-6 and kit.relative(long[1], short[1]) < 1e-6
        assert not long[2][250:].any() and kit.relative(long[2][:250], short[2]) < 1e-6
    one_sided = kit.call(
        inputs.__class__(h, w, th, tw, ids, verdict), estimator=estimator, backend=backend, student_bias=mask
    )
    assert all(bool(torch.isfinite(t).all()) for t in one_sided[:3])
    assert bool((one_sided[3].kl >= 0).all())


@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", ("jsd", 0.3)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_backends_agree_on_masked_columns(kit: Any, inputs: Any, softcap: float | None, divergence: Any) -> None:
    """-inf on the student's side alone, on the teacher's, on both; a softcap leaves what is masked masked."""
    h, w, th, tw, ids, verdict = inputs.args()
    inputs = inputs.__class__(h, w, th, tw, torch.where(ids >= 250, 7, ids), verdict)
    for student, teacher in ((250, 300), (300, 250), (250, 260)):
        masks = []
        for end in (student, teacher):
            masks.append(torch.where(torch.arange(300) < end, 0.0, -torch.inf))
        results = [
            kit.call(
                inputs,
                divergence=divergence,
                backend=backend,
                student_bias=masks[0],
                teacher_bias=masks[1],
                student_softcap=softcap,
                teacher_softcap=softcap,
            )
            for backend in BACKENDS
        ]
        infinite = divergence == "forward-kl" and student < teacher
        for loss, d_hidden, d_weight, stats in results:
            assert bool(torch.isinf(loss)) == infinite and not bool(torch.isnan(loss))
            assert kit.relative(stats.student_logprob, results[-1][3].student_logprob) < 1e-6
            if not infinite:
                assert not d_weight[min(student, teacher) :].any()
                assert kit.relative(loss, results[-1][0]) < 1e-5
                assert kit.relative(d_hidden, results[-1][1]) < 1e-5
                assert kit.relative(d_weight, results[-1][2]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", ("jsd", 0.3)])
def test_a_student_without_support_has_no_finite_loss(kit: Any, inputs: Any, divergence: Any, backend: str) -> None:
    """Every column masked: there is no distribution to measure, and no divergence that says 0."""
    masked = torch.full((300,), -torch.inf)
    loss, *_ = kit.call(inputs, divergence=divergence, backend=backend, student_bias=masked)
    assert not torch.isfinite(loss)


OPERANDS = ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(
    "estimator, divergence",
    [("full", "reverse-kl"), ("full", "forward-kl"), ("full", ("jsd", 0.5)), ("sampled", "reverse-kl")],
)
def test_nan_is_not_hidden(kit: Any, inputs: Any, estimator: str, divergence: Any, operand: str, backend: str) -> None:
    """One NaN row of either side: the loss says so wherever the gradient would carry it, with all columns or some."""
    position = OPERANDS.index(operand)
    for row in (3, slice(None)):
        args = [t.clone() for t in inputs.args()]
        args[position][row] = torch.nan
        args[4][3] = 3
        hidden, weight = args[0].requires_grad_(), args[1].requires_grad_()
        loss, stats = gated_kl_loss(
            hidden, weight, *args[2:], estimator=estimator, divergence=divergence, backend=backend, return_stats=True
        )
        loss.backward()
        assert torch.isnan(loss) and torch.isnan(stats.kl[3])
        assert hidden.grad is not None and torch.isnan(hidden.grad[3]).any()
        assert weight.grad is not None and torch.isnan(weight.grad).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operand", ["hidden", "teacher_logprob", "behaviour_logprob"])
def test_nan_is_not_hidden_in_the_logprob_loss(kit: Any, inputs: Any, operand: str, backend: str) -> None:
    *_, stats = kit.call(inputs, estimator="sampled", backend=backend)
    given = dict(
        hidden=inputs.student_hidden,
        teacher_logprob=stats.teacher_logprob,
        behaviour_logprob=stats.student_logprob,
    )
    given[operand] = given[operand].clone()
    i = int(torch.nonzero(inputs.token_ids != -100)[0])
    given[operand][i] = torch.nan
    hidden = given.pop("hidden").requires_grad_()
    loss = gated_logprob_loss(
        hidden,
        inputs.student_weight,
        inputs.token_ids,
        given["teacher_logprob"],
        inputs.verdict,
        behaviour_logprob=given["behaviour_logprob"],
        backend=backend,
    )
    loss.backward()
    assert torch.isnan(loss) and hidden.grad is not None and torch.isnan(hidden.grad[i]).any()


# ---- the other calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprob_loss_equals_the_sampled_estimator(kit: Any, inputs: Any, backend: str) -> None:
    loss, d_hidden, d_weight, stats = kit.call(inputs, estimator="sampled", backend=backend)
    hidden = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.student_weight.clone().requires_grad_()
    args = (hidden, weight, inputs.token_ids, stats.teacher_logprob, inputs.verdict)
    other, own = gated_logprob_loss(*args, backend=backend, return_stats=True)
    other.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert kit.relative(other.detach(), loss) < 1e-6 and kit.relative(hidden.grad, d_hidden) < 2e-6
    assert kit.relative(weight.grad, d_weight) < 2e-6 and torch.equal(own.gate, stats.gate)
    # On-policy behaviour changes nothing; a behaviour twice as likely halves the ratio; the clip holds.
    behaviour = own.student_logprob
    same = gated_logprob_loss(*args, behaviour_logprob=behaviour, backend=backend)
    assert kit.relative(same.detach(), loss) < 1e-5
    halved = gated_logprob_loss(*args, behaviour_logprob=behaviour + torch.log(torch.tensor(2.0)), backend=backend)
    assert kit.relative(halved.detach() * 2, loss) < 1e-5
    rare = gated_logprob_loss(*args, behaviour_logprob=behaviour - 50, ratio_clip=3.0, backend=backend)
    assert kit.relative(rare.detach(), 3 * loss) < 1e-5


def test_advantage(kit: Any, inputs: Any) -> None:
    *_, stats = kit.call(inputs, estimator="sampled")
    advantage, weight = gated_advantage(stats.student_logprob, stats.teacher_logprob, inputs.verdict)
    valid = inputs.token_ids != -100
    assert torch.equal(weight[valid], stats.gate[valid])
    assert torch.allclose(advantage[valid], (stats.gate * stats.logratio)[valid], atol=1e-5)
    clipped, _ = gated_advantage(stats.student_logprob, stats.teacher_logprob, inputs.verdict, clip=0.5)
    assert float(clipped.abs().max()) == 0.5
    with pytest.raises(ValueError, match="teacher_logprob"):
        gated_advantage(torch.zeros(3), torch.zeros(4), 1)


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSALS = {
    "gate-name": (dict(gate="sgopd"), ValueError, r"gate.*sg-opd"),
    "gate-type": (dict(gate=1.8), TypeError, "gate"),
    "estimator": (dict(estimator="fulls"), ValueError, "estimator"),
    "divergence": (dict(divergence="kl"), ValueError, "divergence"),
    "beta": (dict(divergence=("jsd", 1.5)), ValueError, "beta"),
    "sampled-jsd": (dict(estimator="sampled", divergence=("jsd", 0.5)), ValueError, "sampled"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature"),
    "scale": (dict(student_logit_scale=float("nan")), ValueError, "student_logit_scale"),
    "softcap": (dict(teacher_softcap=-3.0), ValueError, "teacher_softcap"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction"),
    "num-items": (dict(num_items=0), ValueError, "num_items"),
    "num-items-sum": (dict(num_items=5, reduction="sum"), ValueError, "num_items"),
    "precision": (dict(precision="fp8"), ValueError, "precision"),
    "backend": (dict(backend="cudnn"), ValueError, "backend"),
    "workspace": (dict(workspace=0), ValueError, "workspace"),
    "reference": (dict(reference_hidden=torch.zeros(60, 32)), ValueError, "reference_weight"),
    "reference-scale": (dict(reference_logit_scale=2.0), ValueError, "reference"),
    "reliability": (dict(reliability=1.5), ValueError, "reliability"),
    "bias": (dict(student_bias=torch.zeros(299)), ValueError, "student_bias"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(inputs: Any, name: str) -> None:
    kwargs, error, match = REFUSALS[name]
    with pytest.raises(error, match=match):
        gated_kl_loss(*inputs.args(), **kwargs)


def test_refused_operands(inputs: Any) -> None:
    h, w, th, tw, ids, verdict = inputs.args()
    with pytest.raises(ValueError, match=r"student_hidden.*shifted"):
        gated_kl_loss(h[1:], w, th, tw, ids, verdict)
    with pytest.raises(ValueError, match="teacher_hidden"):
        gated_kl_loss(h, w, th[:, :5], tw, ids, verdict)
    with pytest.raises(TypeError, match="token_ids"):
        gated_kl_loss(h, w, th, tw, ids.float(), verdict)
    with pytest.raises(TypeError, match="student_weight"):
        gated_kl_loss(h, w.int(), th, tw, ids, verdict)
    with pytest.raises(ValueError, match=r"verdict.*\[:, None\]"):
        gated_kl_loss(h.view(6, 10, -1), w, th.view(6, 10, -1), tw, ids.view(6, 10), torch.ones(6))
    with pytest.raises(TypeError, match="bool"):
        gated_kl_loss(h, w, th, tw, ids, verdict > 0)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="verdict"):
            gated_kl_loss(h, w, th, tw, ids.clamp(min=0), torch.full_like(verdict, 2), backend=backend)
        for bad in (300, -1):
            with pytest.raises(ValueError, match=rf"token_ids.*first is {bad}"):
                gated_kl_loss(h, w, th, tw, torch.where(ids == ids[ids >= 0][0], bad, ids), verdict, backend=backend)
    with pytest.raises(ValueError, match="reference"):
        gated_kl_loss(h.double(), w.double(), th.double(), tw.double(), ids, verdict, backend="cpu")
    for broken in (dict(agree=float("inf")), dict(conflict=(1.0, 2.0, 3.0)), dict(tolerance=-1.0), dict(keep="some")):
        with pytest.raises(ValueError, match=next(iter(broken))):
            Gate(**broken)  # type: ignore[arg-type]


# What cannot be passed by keywords: teacher, options and a reference as dataclasses.
DATACLASSES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "top k, reference": (
        dict(teacher=TopKTeacher(torch.zeros(4, 1).long(), torch.zeros(4, 1))),
        NotImplementedError,
        "^reference: .*distribution.*a TopKTeacher .*: pass the teacher's Head, or no reference$",
    ),
    "words, reference": (
        dict(teacher=SampledTeacher(torch.zeros(4)), options=Options(estimator="sampled")),
        NotImplementedError,
        "^reference: .*distribution.*a SampledTeacher .*: pass the teacher's Head, or no reference$",
    ),
    "teacher": (dict(teacher=3), TypeError, "^teacher must be a Head, a SampledTeacher or a TopKTeacher, got int$"),
    "reference": (dict(reference=3), TypeError, "^reference must be a Head, got int$"),
    "options": (dict(options={}), TypeError, "^options must be an Options, got dict: pass Options"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DATACLASSES)
def test_refused_dataclasses(name: str, backend: str) -> None:
    changes, error, match = DATACLASSES[name]
    head = Head(torch.zeros(4, 3), torch.zeros(9, 3))
    ids = torch.zeros(4).long()
    given = dict(student=head, teacher=head, token_ids=ids, verdict=1, reference=head, backend=backend)
    with pytest.raises(error, match=match):
        gated_loss(**{**given, **changes})  # type: ignore[call-overload]


def test_messages_have_their_own_remedy(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"^gate: no preset 'nothing like it'\. Presets: opd"):
        Options(gate="nothing like it")
    flags = inputs.verdict > 0
    for name in ("reliability", "token_weight"):
        with pytest.raises(TypeError, match=rf"^{name} must be numeric, got bool: pass .*\.float\(\)$"):
            gated_kl_loss(*inputs.args(), **{name: flags})
    ids = inputs.token_ids.clamp(min=0)
    hidden = inputs.student_hidden.clone().requires_grad_()
    loss = gated_logprob_loss(hidden, inputs.student_weight, ids, -torch.ones(60), inputs.verdict)
    with pytest.raises(RuntimeError, match=r"^the gated loss is differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^the gated loss: backward was called twice"):
        loss.backward()


def test_a_dataclass_with_a_field_replaced(inputs: Any) -> None:
    divergences = ("reverse-kl", "forward-kl", ("jsd", 0.3), ("jsd", 1.0), ["alpha", 0.2])
    for divergence in divergences:
        for precision in ("auto", "exact", "bf16", 1e-3):
            options = Options(gate="opdvr", divergence=divergence, precision=precision)
            changed = replace(options, temperature=2.0)
            assert changed == Options(gate="opdvr", divergence=divergence, precision=precision, temperature=2.0)
            assert replace(changed, temperature=1.0) == options
    h, w, th, tw, ids, verdict = inputs.args()
    student, teacher, once = Head(h, w), Head(th, tw), Options(temperature=2.0)
    assert torch.equal(
        gated_loss(replace(student, softcap=5.0), replace(teacher, logit_scale=0.5), ids, verdict, replace(once)),
        gated_kl_loss(*inputs.args(), temperature=2.0, student_softcap=5.0, teacher_logit_scale=0.5),
    )
    words, top = SampledTeacher(th[:, 0]), TopKTeacher(ids, th)
    assert replace(words, behaviour_logprob=words.logprob).behaviour_logprob is words.logprob
    assert replace(top, logprob=h).ids is ids
