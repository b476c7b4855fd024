"""Weights beside the gate's four cells: what a whole rollout, its prompt or a token's place in it says.

For gates that need a rollout: the loss knows tokens, not rollouts. So a first call of it, without a gradient, gives
both models' log-probabilities of the sampled tokens (by the same projections as the loss itself, from hidden states
that are there: the cost is the loss's forward once more, no model runs again); the rule makes a number a token of them,
rollout by rollout; and that is the second call's `reliability` or `token_weight`. All of it is a constant for the
gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sgopd.config import Config, UserError, unknown
from sgopd.phases import Phases
from sgopd.rollout import Batch, Rollout
from sgopd_kernels import CORRECT, PRESETS, UNKNOWN, Gate, Stats, resolve_gate


class Told(NamedTuple):
    """One rollout of T tokens, with what the first call said of it. Log-probabilities are float64, in nats."""

    student_logprob: Tensor  # [T] log pi_S of the sampled tokens
    teacher_logprob: Tensor  # [T]; -inf in a column that it masks
    verdict: int  # as the gate is told: 1, -1, 0
    truncated: bool = False  # it ran out of tokens
    kl: Tensor | None = None  # [T] divergence from the teacher; None: only the sampled token's ratio is known

    @property
    def logratio(self) -> Tensor:
        """d [T]; 0, no word, where both models mask the token."""
        d = self.teacher_logprob - self.student_logprob
        return d.masked_fill(d.isnan(), 0.0)


class Rule(NamedTuple):
    """A gate of the loop's own."""

    gate: Gate  # of the second call
    argument: Literal["reliability", "token_weight"] = "token_weight"  # of the loss, that `weigh` gives
    weigh: Callable[[Told, Config], Tensor] | None = None  # -> [T] float64; None: `share_out` says all


def q_protect(told: Told, config: Config) -> Tensor:
    """r = 1 - pi_T(y) in an incorrect rollout y, else 0: where the teacher would itself have written what is wrong, its
    word in conflicts counts less. This project's (docs/gates.md). In rollouts of hundreds of tokens pi_T(y) is 0, and
    this is `protect`."""
    r = -torch.expm1(told.teacher_logprob.sum().clamp(max=0.0))
    return (r if told.verdict < 0 else torch.zeros_like(r)).expand_as(told.teacher_logprob)


def rg_opd(told: Told, config: Config) -> Tensor:
    """RG-OPD (arXiv 2607.04037, Eq. 2): 1 on every token of a correct rollout that the teacher finds likelier than the
    student does by more than delta nats, log pi_T(y) > log pi_S(y) + delta, and of an incorrect one that it finds less
    likely; else 0. Summed over tokens, delta is `gate_margin`. An unknown verdict, which the paper has not, is 1."""
    kept = told.verdict == 0 or float(told.verdict * told.logratio.sum()) > config.gate_margin
    return torch.full_like(told.logratio, float(kept))


def r2_opd(told: Told, config: Config) -> Tensor:
    """R2-OPD (arXiv 2609.35517, Eqs. 13 to 16): w = Z g, g = sigmoid(beta v d / nu), nu the rollout's median |d| (1e-8
    at least), Z such that sum |w d| = sum |d|. beta is `gate_sharpness`; 0 is plain distillation.

    A truncated rollout and one without a verdict weigh 1, the first as in the paper. What is infinite in d takes part
    in neither nu nor Z. Under the full estimator w weighs a token's divergence, which the paper has not.
    """
    d = told.logratio
    size = d.abs()
    finite = size.isfinite()
    if told.verdict == 0 or told.truncated or config.gate_sharpness == 0 or not finite.any():  # 0 times infinity is NaN
        return torch.ones_like(d)
    typical = size[finite].quantile(0.5).clamp(min=1e-8)
    gate = torch.sigmoid(config.gate_sharpness * told.verdict * d / typical)
    kept = (gate * size)[finite].sum()
    return gate * (size[finite].sum() / kept if kept > 0 else 2.0)  # all d are 0: every g is 1/2


def diffgate(told: Told, config: Config) -> Tensor:
    """DiffGate's bound (arXiv 2610.04596): tanh(x) / x, x = gap / `gate_bound`, so that what a token pulls levels off.
    The gap is the estimator's: the token's divergence under full, |d| under sampled. Which rollouts are pulled, and how
    much, says `share_out`. The paper's public text says "smoothly bounded" of the gap; tanh is this project's."""
    gap = told.kl if told.kl is not None and config.estimator == "full" else told.logratio
    x = gap.abs() / config.gate_bound
    return torch.where(x > 0, x.tanh() / x.clamp(min=1e-300), 1.0)


RULES: dict[str, Rule] = {
    "q-protect": Rule(Gate(1.0, 0.0), "reliability", q_protect),
    "rg-opd": Rule(Gate(1.0, 1.0), "token_weight", rg_opd),
    "r2-opd": Rule(Gate(1.0, 1.0), "token_weight", r2_opd),
    "tgopd": Rule(Gate(1.0, 1.0)),
    "diffgate": Rule(Gate(1.0, 1.0, keep="incorrect"), "token_weight", diffgate),
}


def weigh(
    rule: Rule, stats: Stats, rows: Tensor, verdict: Tensor, rollouts: Sequence[Rollout], config: Config
) -> Tensor:
    """The rule's number for each of n tokens, [n] float32.

    Args:
        stats: the first call's, each [n].
        rows: [n] the place in `rollouts` of a token's; a rollout's tokens stand together.
        verdict: [n] as the gate is told.
    """
    assert rule.weigh is not None
    found, counts = rows.unique_consecutive(return_counts=True)
    columns = stats.student_logprob.double(), stats.teacher_logprob.double(), verdict, stats.kl.double()
    parts = zip(found.tolist(), *(column.split(counts.tolist()) for column in columns))
    told = [
        Told(ours, theirs, int(words[0]), rollouts[row].completion.truncated, None if kl.isnan().all() else kl)
        for row, ours, theirs, words, kl in parts
    ]
    return torch.cat([rule.weigh(one, config) for one in told]).float() if told else verdict.float()


def share_out(rollouts: Sequence[Rollout], config: Config, phases: Phases) -> None:
    """Gives rollouts their `weight` in the distillation loss and their `advantage` in the task reward's term.

    The advantage of a student rollout is its reward, 1 correct and 0 incorrect, less the mean reward of its prompt's
    student rollouts in the batch (not divided by their deviation: as in TGOPD, and Dr. GRPO, arXiv 2503.20783). One
    without a verdict has none and counts for none; the teacher's are not of the student's policy.

    tgopd (arXiv 2609.02998, Eq. 6): a prompt on which the teacher is reliable, its pass rate at least 2/3, is distilled
    alone; on the others the reward alone teaches. diffgate (arXiv 2610.04596): the reward everywhere, and an incorrect
    rollout is distilled with the share of its prompt's rollouts that failed.
    """
    groups: dict[int, list[Rollout]] = {}
    for one in rollouts:
        if config.prompt_weight is not None:
            one.weight = phases.prompt_weight(one.example)
        if one.source == "student" and one.verdict != UNKNOWN:
            groups.setdefault(one.example, []).append(one)
    for group in groups.values():
        mean = sum(one.verdict == CORRECT for one in group) / len(group)
        for one in group:
            one.advantage = (one.verdict == CORRECT) - mean
            if config.gate == "diffgate":
                one.weight *= 1.0 - mean
    if config.gate == "tgopd":
        for one in rollouts:
            one.weight, one.advantage = one.weight * one.reliability, one.advantage * (1.0 - one.reliability)


def weighs_rollouts(config: Config) -> bool:
    return config.prompt_weight is not None or config.gate in ("tgopd", "diffgate")


def token_weights(batch: Batch, config: Config) -> Tensor | None:
    """Weights [N] float32 that need no model: the rollout's, times 2^(-t / h) for the t-th token of its
    completion (t from 0, h `position_half_life`). None: all are 1."""
    if not weighs_rollouts(config) and config.position_half_life is None:
        return None
    rollouts, device = batch.rollouts, batch.rows.device
    weights = torch.tensor([one.weight for one in rollouts], device=device)[batch.rows]
    if config.position_half_life is not None:
        first = torch.tensor([len(one.prompt_ids) - 1 for one in rollouts], device=device)[batch.rows]
        weights = weights * torch.exp2((first - batch.columns) / config.position_half_life)
    return weights


def gate_of(config: Config) -> tuple[Gate, Rule | None]:
    """The preset, or the rule's gate, with the config's numbers in place of its own; and the rule, if it is one."""
    names = ("agree", "conflict", "neutral", "tolerance", "reliability", "control")
    given = {name: getattr(config, f"gate_{name}") for name in names}
    rule = RULES.get(config.gate)
    try:
        if rule is None and config.gate not in PRESETS:
            raise ValueError(unknown("gate", config.gate, [*PRESETS, *RULES]))
        preset = rule.gate if rule else resolve_gate(config.gate)
        gate = dataclasses.replace(preset, **{k: v for k, v in given.items() if v not in (None, "preset")})
    except ValueError as error:
        raise UserError(str(error)) from error
    own = config.gate == "tgopd" or (rule is not None and rule.argument == "reliability")
    for name, none in (("teacher_reliability", "off"), ("gate_reliability", "preset")):
        if (value := getattr(config, name)) != none and own:
            raise UserError(f"{name}: got {value!r}, expected {none} with gate {config.gate}, which has one of its own")
    if config.teacher_reliability != "off" and gate.needs_reliability:
        raise UserError(
            f"teacher_reliability: got {config.teacher_reliability!r}, expected off with a gate whose reliability is "
            f"{gate.reliability} ({config.gate}): r weighs incorrect rollouts there, and no conflicts"
        )
    if config.teacher_reliability == "incorrect" and gate.control == "shuffled":
        raise UserError(
            "teacher_reliability: got 'incorrect', expected off or all with a shuffled gate, which is told other "
            "rollouts' verdicts"
        )
    check_control(config, gate, rule)
    asks_teacher = asks_pass_rate(config, gate) and config.teacher_reliability_source != "student"
    if config.teacher_probes and not asks_teacher:
        raise UserError(
            f"teacher_probes: got {config.teacher_probes}, expected 0 where no pass rate of the teacher is asked for "
            f"(gate {config.gate}, teacher_reliability {config.teacher_reliability}, teacher_reliability_source "
            f"{config.teacher_reliability_source}): gate trust asks for it"
        )
    if asks_teacher and not (config.teacher_probes or config.cold_start_steps * config.teacher_share):
        served = any(one.teacher_url is not None for one in config.teachers.values())
        remedy = "set teacher_reliability_source to student, for the student's own"
        if served:
            remedy += " (a served teacher writes nothing)"
        else:
            remedy = f"set teacher_probes to 1 or more, or cold_start_steps, or {remedy}"
        raise UserError(
            f"gate: {config.gate} weighs rollouts by the teacher's pass rate on the prompt, and nothing would measure "
            f"it: {remedy}"
        )
    if config.gate == "exopd" and config.reference_model_name_or_path is None:
        raise UserError(
            "gate: exopd extrapolates from a reference to the teacher, and without one it is opd with a larger loss: "
            "set reference_model_name_or_path (the teacher before its reinforcement learning, or the student)"
        )
    if config.gate in ("tgopd", "diffgate") and not config.reward_weight:
        raise UserError(
            f"gate: {config.gate} teaches some rollouts by the task reward alone, and reward_weight is 0: set it, to 1 "
            "for a start"
        )
    return gate, rule if rule and rule.weigh else None


def asks_pass_rate(config: Config, gate: Gate) -> bool:
    """Whether a prompt's reliability r enters, from wherever."""
    return gate.needs_reliability or config.gate == "tgopd" or config.teacher_reliability != "off"


def check_control(config: Config, gate: Gate, rule: Rule | None) -> None:
    """Refuses a `gate_control` that would control nothing."""
    if config.gate_control == "preset":
        return
    why = None
    if config.gate in ("tgopd", "diffgate"):
        why = f"with gate {config.gate}, whose reward goes by the verdict as it is"
    elif config.gate_control == "random" and gate.agree_pair == gate.conflict_pair:
        why = f"with gate {config.gate}, in which agree and conflict weigh the same: there is nothing to deal"
    elif rule is None and gate.keep == "all" and len({*gate.agree_pair, *gate.conflict_pair, gate.neutral}) == 1:
        why = f"with gate {config.gate}, in which all tokens weigh the same"
    if why is not None:
        raise UserError(f"gate_control: got {config.gate_control!r}, expected preset {why}")
