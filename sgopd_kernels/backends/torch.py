"""Primitives in torch operations: any device. The row work runs in float64, where nothing cancels."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..gate import choose
from ..options import Head
from ..problem import Chunk, Problem

# Bytes of one cast tile of a low-precision head: the cast is done again for every token chunk, in pieces that
# stay in the last-level cache.
TILE_BYTES = 16 * 2**20


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one: launches, streams and captures mean the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products take their operands as they are: under autocast torch would round fp32 ones first."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Ieee:
    """Who is inside `ieee_matmul`, and what each setting that it changed was before."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: dict[Any, str] = {}


_ieee = _Ieee()


@contextlib.contextmanager
def ieee_matmul() -> Iterator[None]:
    """fp32 products mean fp32: neither TF32 nor bf16, whatever the process-wide settings.

    By the settings of CUDA and of the CPU: `set_float32_matmul_precision` sets both, and asking it what it is raises
    where a user has set one of them. Of threads that are inside at once the last one out puts back what was there.
    """
    with _ieee.lock:
        _ieee.inside += 1
        for settings in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            before = settings.fp32_precision
            if before not in ("none", "ieee"):
                _ieee.before[settings] = before
                settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _ieee.lock:
            _ieee.inside -= 1
            while _ieee.before and not _ieee.inside:
                settings, before = _ieee.before.popitem()
                settings.fp32_precision = "none"  # what was inherited from a wider setting is inherited again
                if settings.fp32_precision != before:
                    settings.fp32_precision = before


def vocabulary_tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(columns, fp32 rows of the head): the whole head where it is fp32, cast tile by tile where it isn't."""
    if weight.dtype == torch.float32:
        yield slice(None), weight
        return
    step = max(256, TILE_BYTES // (4 * max(1, weight.shape[1])))
    cast = torch.empty(min(step, weight.shape[0]), weight.shape[1], dtype=torch.float32, device=weight.device)
    for first in range(0, weight.shape[0], step):
        part = weight[first : first + step]
        yield slice(first, first + step), cast[: part.shape[0]].copy_(part)


class Vocabulary:
    """The vocabulary, all of it in this process. What crosses columns goes through here."""

    def log_softmax(self, z: Tensor) -> Tensor:
        return torch.log_softmax(z, -1)

    def sum(self, values: Tensor) -> Tensor:
        """[n, V] -> [n]"""
        return values.sum(-1)

    def at(self, values: Tensor, y: Tensor) -> Tensor:
        """values [n, V] at the sampled tokens y [n, 1] -> [n]"""
        return values.gather(-1, y).squeeze(-1)

    def subtract_at(self, values: Tensor, y: Tensor) -> Tensor:
        """values - 1[v = y]"""
        return values.scatter_add(-1, y, torch.full_like(y, -1, dtype=values.dtype))

    def add_up(self, partial: Tensor) -> None:
        """A product's sum over columns, in place, of the part in this process."""


class VocabularySlice(Vocabulary):
    """A slice of the vocabulary, columns from `first` on; the other ranks hold the rest. Equal work, in chunks of equal
    size, everywhere.

    `total`: columns over all ranks; `widest`: those of the largest slice.
    """

    def __init__(self, first: int, total: int, widest: int, group: dist.ProcessGroup) -> None:
        self.first, self.total, self.widest, self.group = first, total, widest, group

    @staticmethod
    def of(width: int, device: torch.device, group: dist.ProcessGroup) -> VocabularySlice:
        """Slices are contiguous in the order of ranks; every rank learns every width."""
        widths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(widths, torch.tensor([width], device=device), group=group)
        sizes = [int(w) for w in widths]
        return VocabularySlice(sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes), group)

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def log_softmax(self, z: Tensor) -> Tensor:
        highest = self._reduce(z.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        # A row that is -inf everywhere stays NaN, as in one process.
        total = self._reduce((z - highest).exp().sum(-1, keepdim=True), dist.ReduceOp.SUM)
        return (z - highest) - total.log()  # not z - lse: a large offset would take the digits of the sum

    def sum(self, values: Tensor) -> Tensor:
        return self._reduce(values.sum(-1), dist.ReduceOp.SUM)

    def _own(self, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        local = y - self.first
        return (local >= 0) & (local < values.shape[-1]), local.clamp(0, values.shape[-1] - 1)

    def at(self, values: Tensor, y: Tensor) -> Tensor:
        mine, local = self._own(values, y)
        return self._reduce(torch.where(mine, values.gather(-1, local), 0.0).squeeze(-1), dist.ReduceOp.SUM)

    def subtract_at(self, values: Tensor, y: Tensor) -> Tensor:
        mine, local = self._own(values, y)
        return values.scatter_add(-1, local, -mine.to(values.dtype))

    def add_up(self, partial: Tensor) -> None:
        self._reduce(partial, dist.ReduceOp.SUM)


class TorchBackend:
    name = "torch"
    default_workspace = 256 * 2**20  # bytes, where the caller names none
    row_multiple = 16  # of tokens: the most that a chunk may have …
    whole_multiples = False  # … and what it has; else chunks are of equal size
    waits = False  # whether the host waits for the device where a plan reads a value

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.vocabulary = vocabulary or Vocabulary()

    def available(self) -> bool:
        """Whether what it is made of is there: a native one's extension, Triton."""
        return True

    def workspace(self, problem: Problem) -> int:
        """Bytes that a call may hold above inputs and gradients."""
        return problem.options.workspace or self.default_workspace

    def held_bytes(self, problem: Problem) -> tuple[int, int]:
        """(bytes, bytes a token of the chunk) that `rows` and the products hold beside logits, for the plan's count."""
        return self.cast_bytes(problem) + _block_bytes(problem.token_ids.device.type), 0

    @staticmethod
    def cast_bytes(problem: Problem) -> int:
        """A tile of a head, cast to fp32."""
        return TILE_BYTES if any(h.weight.dtype != torch.float32 for h in problem.heads) else 0

    def capturing(self, device: torch.device) -> bool:
        """Whether a CUDA graph is being captured: nothing may depend on a value."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def move_rows(self, z: Tensor, to: Tensor, origin: Tensor) -> None:
        """z[to] = z[origin], row numbers [m] that have none in common."""
        for a, b in zip(to.tolist(), origin.tolist()):
            z[a].copy_(z[b])

    def logits(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """fp32 [rows, columns] of a chunk, unit stride along its rows."""
        return torch.empty(rows, columns, dtype=torch.float32, device=device)

    def rounds_sums(self, problem: Problem) -> bool:
        """Whether the head's gradient is summed in bf16 and a byte beside each element, where fp32 would be."""
        return False

    def accumulator(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns], for the head's gradient. The first chunk writes all of it, whatever it holds."""
        return torch.empty(rows, columns, dtype=dtype, device=device)

    def project(self, hidden: Tensor, weight: Tensor, out: Tensor, balance: Tensor | None = None) -> None:
        """`balance`: fp32 operands may be split into parts (TensorCoreBackend)."""
        with ieee_matmul():
            hidden = hidden.float()
            for columns, tile in vocabulary_tiles(weight):
                torch.mm(hidden, tile.T, out=out[:, columns])

    def add_hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor, add: bool = True) -> None:
        with ieee_matmul():
            for columns, tile in vocabulary_tiles(weight):
                out.addmm_(gradient[:, columns], tile, beta=int(add))
                add = True

    def add_weight_gradient(
        self, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool = True, rest: Tensor | None = None
    ) -> None:
        """`rest`: beside a sum in bf16 (`rounds_sums`)."""
        with ieee_matmul():
            out.addmm_(gradient.T, hidden.float(), beta=int(add))

    def rows(self, problem: Problem, chunk: Chunk, gradient: torch.dtype | None) -> Tensor:
        """Statistics of a chunk, [n, 8] float64 in the order of `oracle.STATS`, from its raw projections.

        With `gradient`, a dtype, z_student is overwritten by scale * d(loss)/d(projection) in it; rows of weight 0
        become 0.
        """
        n, v = chunk.z_student.shape
        stats = torch.empty(n, 8, dtype=torch.float64, device=chunk.z_student.device)
        step = max(1, _block_bytes(stats.device.type) // (_LIVE_COPIES * 8 * v))
        for first in range(0, n, step):
            block = chunk.part(slice(first, first + step))
            stats[first : first + step] = _block(problem, block, gradient is not None, self.vocabulary)
        return stats


_PLAIN = Head(torch.empty(0), torch.empty(0, 0))  # logits as they are
_LIVE_COPIES = 12  # float64 [n, V] tensors alive at once in _block, at the most


def _block_bytes(device_type: str) -> int:
    """Temporaries of one block of rows: enough work for one call of a threaded operation, or one launch."""
    return (48 if device_type == "cpu" else 128) * 2**20


def _log_softmax(
    z: Tensor, head: Head, temperature: float, vocabulary: Vocabulary, outside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Projections fp32 -> (log-probabilities float64, columns at -inf)."""
    z = z.double()
    if head.bias is not None:
        z += head.bias[: z.shape[1]].double()
    z *= head.logit_scale
    if head.softcap is not None:
        z = torch.where(z == -torch.inf, z, head.softcap * torch.tanh(z / head.softcap))  # masked stays masked
    z /= temperature
    if outside is not None:
        z.masked_fill_(outside, -torch.inf)
    return vocabulary.log_softmax(z), z == -torch.inf


def _expectation(p: Tensor, values: Tensor, vocabulary: Vocabulary) -> Tensor:
    """sum_v p * values with 0 * anything = 0."""
    return vocabulary.sum((p * values).masked_fill_(p == 0, 0.0))


def _divergence(
    divergence: tuple[str, float], log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """(value [n], gradient with respect to the student's logits [n, V])."""
    name, parameter = divergence
    if name == "reverse-kl":
        ratio = log_p - log_q
        value = _expectation(p, ratio, vocabulary)
        gradient = (p * (ratio - value.unsqueeze(-1))).masked_fill_(p == 0, 0.0)
    elif name == "forward-kl":
        value = _expectation(q, log_q - log_p, vocabulary)
        gradient = p - q
    else:
        terms, score = _columns(name, parameter, log_p, p, log_q, q)
        value = vocabulary.sum(terms)
        gradient = (score - p * vocabulary.sum(score).unsqueeze(-1)).masked_fill_(p == 0, 0.0)
    return value, gradient


def _columns(name: str, a: float, log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(p f(u), p s(u)) [n, V] of the divergences that are no KL: csrc/divergence.h."""
    outside = log_p == -torch.inf
    u = (log_q - log_p).masked_fill_(outside, 0.0)
    if name == "alpha":
        power = torch.where(u > 0, q * torch.exp(-a * u), p * torch.exp((1 - a) * u.clamp(max=1.0)))  # p^a q^(1-a)
        value = (a * p + (1 - a) * q - power) / (a * (1 - a))
        score = torch.where(u < 1, p * torch.expm1((1 - a) * u.clamp(max=1.0)), power - p) / (a - 1)
        beyond = q / a
    else:
        b = 1 - a if name == "skew-reverse-kl" else a
        # r = log(m / p) for m = b q + (1 - b) p: exactly 0 for equal models, no overflow for distant ones
        far = torch.logaddexp(u + math.log(b), torch.full_like(u, math.log1p(-b)))
        r = torch.where(u < 30, torch.log1p(b * torch.expm1(u)), far)
        from_q = q * (u - r)
        if name == "jsd":
            value, score, beyond = b * from_q - (1 - b) * p * r, -(1 - b) * p * r, -b * math.log(b) * q
        elif name == "skew-reverse-kl":
            value, score, beyond = b * (q - p) - p * r, b * p * torch.expm1(u - r) - p * r, b * q
        else:
            value, score = from_q - (1 - b) * (q - p), -(1 - b) * p * torch.expm1(u - r)
            beyond = -(math.log(b) + 1 - b) * q
    return torch.where(outside, beyond, value), score.masked_fill_(outside, 0.0)


def _block(problem: Problem, block: Chunk, gradient: bool, vocabulary: Vocabulary) -> Tensor:
    options, temperature = problem.options, problem.options.temperature
    rows, z_student, z_teacher, z_reference = block.positions, block.z_student, block.z_teacher, block.z_reference
    weights = block.weights
    y = problem.token_ids[rows].unsqueeze(-1)
    verdict = problem.verdict[rows].double()
    log_q = log_r = outside = None
    if z_teacher is not None:
        log_q, outside = _log_softmax(z_teacher, problem.teacher or _PLAIN, temperature, vocabulary)
    if z_reference is not None:
        assert problem.reference is not None and outside is not None
        log_r, outside_r = _log_softmax(z_reference, problem.reference, temperature, vocabulary)
        outside = outside | outside_r
    log_p, _ = _log_softmax(z_student, problem.student, temperature, vocabulary, outside)
    p = log_p.exp()
    log_p_y = vocabulary.at(log_p, y)

    dense = None
    if log_q is None:
        assert problem.teacher_logprob is not None
        log_q_y = problem.teacher_logprob[rows].double()
        kl = entropy_q = torch.full_like(log_q_y, torch.nan)
    else:
        log_q_y = vocabulary.at(log_q, y)
        q = log_q.exp()
        kl, dense = _divergence(problem.divergence, log_p, p, log_q, q, vocabulary)
        entropy_q = -_expectation(q, log_q, vocabulary)
        del q
    d = log_q_y - log_p_y
    gate, agree = choose(d, verdict, weights, problem.gate.tolerance, block.forced)

    row_weight, advantage, value = gate, d, kl
    if log_r is not None:
        assert log_q is not None
        row_weight = (weights != 0).any(0).double()
        g = gate.unsqueeze(-1)
        assert outside is not None
        log_q = (g * log_q + (1 - g) * log_r).masked_fill_(outside, -torch.inf)
        if options.estimator == "full":
            log_q = vocabulary.log_softmax(log_q)
            value, dense = _divergence(problem.divergence, log_p, p, log_q, log_q.exp(), vocabulary)
        else:
            advantage = vocabulary.at(log_q, y) - log_p_y
    elif problem.behaviour_logprob is not None:
        ratio = (log_p_y - problem.behaviour_logprob[rows].double()).exp()
        advantage = advantage * ratio.clamp(max=options.ratio_clip)

    loss = row_weight * value if options.estimator == "full" else -row_weight * advantage * log_p_y
    off = row_weight == 0
    stats = torch.stack(
        [
            loss.masked_fill(off, 0.0),
            kl,
            log_p_y,
            log_q_y,
            -_expectation(p, log_p, vocabulary),
            entropy_q,
            gate,
            agree.double(),
        ],
        -1,
    )
    if not gradient:
        return stats
    coefficient = row_weight * block.scale.double()
    if options.estimator == "full":
        assert dense is not None
    else:
        coefficient = coefficient * advantage
        dense = vocabulary.subtract_at(p, y)
    # Through temperature, softcap and scale, back to the projection.
    head = problem.student
    if head.softcap is not None:
        z = z_student.double()
        if head.bias is not None:
            z += head.bias[: z.shape[1]].double()
        slope = 1 - torch.tanh(z * (head.logit_scale / head.softcap)) ** 2
        dense = (dense * slope).masked_fill_(p == 0, 0.0)
    dense = dense * (coefficient * (head.logit_scale / temperature)).unsqueeze(-1)
    z_student.copy_(dense.masked_fill_(off.unsqueeze(-1), 0.0))
    return stats
