"""The gated loss by hand on eight tokens: two answers, their four cells, ten lines of torch, the library beside them.

    python examples/tour.py

Needs torch and sgopd_kernels alone, and takes a second. Read it from top to bottom; what it prints is the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgopd_kernels import PRESETS, gated_kl_loss

# --- Two answers of four tokens each. "17+25=42" is right, "17+25=43" is wrong. Toy models: random hidden states. ---

ANSWERS = [["17", "+25", "=", "42"], ["17", "+25", "=", "43"]]
VOCABULARY = ["17", "+25", "=", "42", "43", "?"]
VERDICT_B = torch.tensor([1, -1])  # the verifier's word on each answer: 1 correct, -1 incorrect, 0 unknown


def toy_models() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [B, T, H] and heads [V, H] of a student and of a wider teacher."""
    g = torch.Generator().manual_seed(3)
    student_hidden, teacher_hidden = torch.randn(2, 4, 8, generator=g), torch.randn(2, 4, 16, generator=g)
    student_head, teacher_head = torch.randn(6, 8, generator=g) / 3, torch.randn(6, 16, generator=g) / 3
    return student_hidden.requires_grad_(), student_head.requires_grad_(), teacher_hidden, teacher_head


def by_hand(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, ids: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, then of each token: d, weight, KL). Gate sg-opd, on the exact reverse KL."""
    log_p = torch.log_softmax(student_hidden @ student_head.T, dim=-1)  # the student's next-token distribution
    log_q = torch.log_softmax(teacher_hidden @ teacher_head.T, dim=-1)  # the teacher's
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # how far the student is from the teacher, in nats
    d = (log_q - log_p).gather(-1, ids[..., None])[..., 0].detach()  # > 0: the teacher likes this token more
    agree = d * v > 0  # teacher and verifier push the token the same way
    weight = torch.where(agree, 1.8, 1.0)  # a constant for the gradient
    return (weight * kl).mean(), d, weight, kl


def picture(d: Tensor, weight: Tensor, verdict: Tensor) -> str:
    """The answers' tokens, each with the teacher's direction, and how many fell into each of the four cells."""
    lines = []
    for tokens, d_T, weight_T, v in zip(ANSWERS, d.tolist(), weight.tolist(), verdict.tolist()):
        lines.append(
            f"{'correct' if v > 0 else 'incorrect'} answer, so the verifier says {'up ▲' if v > 0 else 'down ▼'}"
        )
        lines.append("  token    " + "".join(f"{token:>9}" for token in tokens))
        lines.append("  d        " + "".join(f"{'▲' if x > 0 else '▼':>3}{x:+6.2f}" for x in d_T))
        lines.append("  weight   " + "".join(f"{w:>9.1f}" for w in weight_T))
    cell = [[int(((d * side > 0) & (verdict[:, None] == v)).sum()) for side in (1, -1)] for v in (1, -1)]
    (up, held), (liked, down) = cell
    lines += [
        "",
        "             teacher ▲             teacher ▼",
        "           ┌─────────────────────┬─────────────────────┐",
        f"  correct  │ agree     {up} tokens  │ conflict  {held} tokens  │",
        "           ├─────────────────────┼─────────────────────┤",
        f"  incorrect│ conflict  {liked} tokens  │ agree     {down} tokens  │",
        "           └─────────────────────┴─────────────────────┘",
    ]
    return "\n".join(lines)


def main() -> None:
    models = toy_models()
    ids = torch.tensor([[VOCABULARY.index(token) for token in answer] for answer in ANSWERS])
    loss, d, weight, _ = by_hand(*models, ids, VERDICT_B[:, None])
    gradients = torch.autograd.grad(loss, models[:2])
    print(picture(d, weight, VERDICT_B))

    # The library: the same call for 8 tokens of 6 words, or a million tokens of 150,000 (the logits are never whole).
    ours, stats = gated_kl_loss(*models, ids, VERDICT_B[:, None], gate="sg-opd", return_stats=True)
    their_gradients = torch.autograd.grad(ours, models[:2])
    print(f"\nloss by hand {loss:.6f}, by gated_kl_loss {ours:.6f} (backend {stats.backend}, plan {stats.plan})")
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(stats.logratio, d)
    torch.testing.assert_close(stats.gate, weight)
    for mine, theirs, name in zip(gradients, their_gradients, ("hidden states", "head")):
        torch.testing.assert_close(theirs, mine)
        print(f"gradient in the {name}: the same to {float((mine - theirs).abs().max()):.0e}")

    print("\nThe same eight tokens under every gate: weights (agree / conflict), and the loss")
    for name in ("opd", "sg-opd", "opdvr", "protect"):
        gate, value = PRESETS[name], float(gated_kl_loss(*models, ids, VERDICT_B[:, None], gate=name).detach())
        cells = zip(("correct", "incorrect"), gate.agree_pair, gate.conflict_pair)
        weights = "   ".join(f"{answer} {agree:.1f} / {conflict:.1f}" for answer, agree, conflict in cells)
        print(f"  {name:8} {weights}   {value:.4f}")


if __name__ == "__main__":
    main()
