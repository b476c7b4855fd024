"""The sign gate as slime's advantage function (slime of August 2026).

    --custom-advantage-function-path sgopd.integrations.slime.sg_opd
    --use-opd --opd-type megatron --opd-teacher-load <teacher> --opd-kl-coef 0

slime keeps generation, the teacher's log-probabilities and the policy loss; this replaces each token's advantage by
w * d. Another gate: `protect = gated("protect")` in a module of your own, named by the same option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgopd_kernels import Gate, gated_advantage, resolve_gate


def gated(gate: str | Gate = "sg-opd", correct_at: float = 0.5) -> Callable[[Any, dict[str, Any]], None]:
    """An advantage function `fn(args, rollout_data)` for slime.

    Args:
        gate: a preset's name or a `Gate`. Its controls see one rank's samples at a time.
        correct_at: a sample whose raw reward is at least this is correct; below, incorrect; None or NaN, unknown.

    The function reads log_probs (rollout_log_probs under --use-rollout-logprobs) and teacher_log_probs, lists of float
    [T_i], one a sample, and local_raw_reward, a list of numbers: `rewards` are normalised in their group and say
    nothing of right or wrong. It sets advantages and returns, and gate_mean and gate_agree_fraction, which slime logs.

    Raises (the function):
        ValueError: a key is missing, or a setting would add the KL a second time or whiten the advantages.
    """
    chosen = resolve_gate(gate)

    def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
        if args.use_opd and args.opd_kl_coef != 0:
            raise ValueError(
                f"opd_kl_coef={args.opd_kl_coef}: slime would add the KL to the gated advantage a second time. Pass "
                "--opd-kl-coef 0"
            )
        if args.normalize_advantages:
            raise ValueError(
                "normalize_advantages whitens the gate's ratio away: remove --normalize-advantages from the arguments"
            )
        student = _read(rollout_data, "rollout_log_probs" if args.use_rollout_logprobs else "log_probs", "")
        teacher = _read(
            rollout_data, "teacher_log_probs", ": pass --use-opd and --opd-type, so that slime asks a teacher"
        )
        reward = _read(
            rollout_data,
            "local_raw_reward",
            ": this rank's rewards as the reward function gave them, needed as verdicts",
        )
        if not len(student) == len(teacher) == len(reward):
            raise ValueError(
                f"samples do not match: {len(student)} of log_probs, {len(teacher)} of teacher_log_probs, "
                f"{len(reward)} of local_raw_reward"
            )
        lengths = [len(row) for row in student]
        student_N = torch.cat(student)
        teacher_N = torch.cat([row.to(student_N.device) for row in teacher])
        verdict = torch.tensor([_verdict(value, correct_at) for value in reward])
        verdict_N = verdict.repeat_interleave(torch.tensor(lengths)).to(student_N.device)
        # Flat, so that a control draws over the rank's tokens and over nothing else.
        advantage_N, weight_N = gated_advantage(student_N, teacher_N, verdict_N, gate=chosen)
        rollout_data["advantages"] = list(advantage_N.split(lengths))
        rollout_data["returns"] = list(rollout_data["advantages"])
        # slime logs the mean of a list of numbers, over ranks; each rank must bring every key.
        agree_N = (teacher_N.double() - student_N.double()) * verdict_N > chosen.tolerance
        rollout_data["gate_mean"] = [weight_N.sum().item() / max(len(weight_N), 1)]
        rollout_data["gate_agree_fraction"] = [agree_N.sum().item() / max(int((verdict_N != 0).sum()), 1)]

    return advantages


def _read(rollout_data: dict[str, Any], key: str, remedy: str) -> Any:
    if rollout_data.get(key) is None:
        raise ValueError(f"rollout_data has no {key}{remedy} (it has {', '.join(sorted(rollout_data))})")
    return rollout_data[key]


def _verdict(reward: Any, correct_at: float) -> int:
    if reward is None or reward != reward:
        return 0
    if isinstance(reward, dict):
        raise ValueError(
            "raw rewards are dictionaries, a teacher server's answer perhaps: put the verifier's number in "
            'sample.metadata["raw_reward"]'
        )
    return 1 if reward >= correct_at else -1


sg_opd = gated()
