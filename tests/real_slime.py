"""The slime adapter in slime's own loss, as far as that goes without GPUs: from log-probabilities to logits' gradient.

    git clone https://github.com/THUDM/slime && python tests/real_slime.py slime

slime's Megatron backend computes advantages by the adapter, which it finds by its path, and the policy loss from
made-up logits, on one process. The gradient with respect to the logits must be that of -w d log pi, each sample's
tokens averaged as slime does, to 1e-6. `make long ONLY=slime SLIME=slime` prepares the environment. Not run: Megatron's
models and SGLang, which need GPUs.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch

sys.path.insert(0, sys.argv[1])
from megatron.core import mpu
from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean
from slime.backends.megatron_utils.loss import compute_advantages_and_returns, policy_loss_function

from sgopd_kernels import gated_advantage

V, PROMPT = 11, 3
LENGTHS = (5, 1, 4, 2)
ARGUMENTS = SimpleNamespace(
    custom_advantage_function_path="sgopd.integrations.slime.sg_opd",
    use_opd=True,
    opd_type="megatron",
    opd_kl_coef=0.0,
    advantage_estimator="grpo",
    kl_coef=0.0,
    entropy_coef=0.0,
    eps_clip=0.2,
    eps_clip_high=0.2,
    eps_clip_c=None,
    log_probs_chunk_size=-1,
    rollout_temperature=1.0,
    rollout_top_p=1.0,
    calculate_per_token_loss=False,
    **dict.fromkeys(
        (
            *("normalize_advantages", "use_rollout_logprobs", "use_kl_loss", "use_opsm", "use_tis", "allgather_cp"),
            "get_mismatch_metrics",
        ),
        False,
    ),
)


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29532"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    mpu.initialize_model_parallel()
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, V, (PROMPT + n,), generator=g) for n in LENGTHS]
    logits = torch.randn(sum(map(len, tokens)), V, generator=g, requires_grad=True)
    parts = logits.split([len(one) for one in tokens])
    log_probs = [
        torch.log_softmax(part[PROMPT - 1 : -1], -1).gather(-1, one[PROMPT:, None]).squeeze(-1)
        for part, one in zip(parts, tokens)
    ]
    student = [one.detach() for one in log_probs]
    teacher = [-3 * torch.rand(n, generator=g) for n in LENGTHS]
    reward = [1.0, 0.0, 1.0, 0.0]
    data = {
        "unconcat_tokens": tokens,
        "log_probs": student,
        "teacher_log_probs": teacher,
        "rewards": [0.5, -0.5, 0.5, -0.5],
        "local_raw_reward": reward,
        "response_lengths": list(LENGTHS),
        "total_lengths": [len(one) for one in tokens],
        "loss_masks": [torch.ones(n) for n in LENGTHS],
    }
    compute_advantages_and_returns(ARGUMENTS, data)
    mean = get_sum_of_sample_mean(data["total_lengths"], data["response_lengths"], data["loss_masks"])
    loss, _ = policy_loss_function(ARGUMENTS, data, logits.unsqueeze(0), mean)
    (ours,) = torch.autograd.grad(loss, logits)

    expected = torch.zeros(())
    for own, theirs, verdict, now in zip(student, teacher, reward, log_probs):
        advantage, _ = gated_advantage(own, theirs, torch.tensor(2 * int(verdict) - 1), gate="sg-opd")
        expected = expected - (advantage * now).mean()
    error = float((ours - torch.autograd.grad(expected, logits)[0]).abs().max())
    print(f"slime's gradient with respect to logits, beside that of -w d log pi: {error:.2g} (at most 1e-6)")
    print({name: value for name, value in data.items() if name.startswith("gate_")})
    sys.exit(not error <= 1e-6)


if __name__ == "__main__":
    main()
