"""Random calls of the CPU extension's own functions, below every check of the package.

    python tests/fuzz_native.py --minutes 10     # new seeds until then; `make long ONLY=fuzz`
    python tests/fuzz_native.py --seed 123       # one case again

A case draws a function, an instruction set, a thread count, sizes (0, 1, odd, a vector more or less, beyond a block),
strides, elements and values (ordinary, tiny, huge, denormal, -inf, +inf, NaN). Every operand lies in memory of its own
that ends, or begins, at a page that cannot be touched, or is a heap block that AddressSanitizer surrounds; what lies
between the rows of an output must not change. The result is compared with float64. One call in three is made wrong in
one argument (null, misaligned, a negative or impossible size, a stride shorter than the row, a token outside the
vocabulary, ...): it must raise ValueError, IndexError, TypeError or MemoryError and write nothing.

What no callee can check is left out: an address that is wrong but aligned. Exit status 1 and the seed on a finding; a
crash of the process is a finding.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import math
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgopd_kernels import Gate, _cpu
from sgopd_kernels.backends.torch import TorchBackend
from sgopd_kernels.options import DIVERGENCES, Head, Options
from sgopd_kernels.problem import Chunk, Problem

PAGE = mmap.PAGESIZE
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
REFUSED = (ValueError, IndexError, TypeError, MemoryError)
SENTINEL = 0x5A


class Finding(AssertionError):
    """What a case found."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise Finding(what)


class Block:
    """[rows, width] elements of `dtype` at a row stride >= width, in memory with edges that are watched."""

    def __init__(self, rng: random.Random, rows: int, width: int, dtype: torch.dtype, tight: bool = False) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self.stride = width + (0 if tight else rng.choice([0, 0, 1, 3, 17]))
        size = torch.empty((), dtype=dtype).element_size()
        self.count = (rows - 1) * self.stride + width if rows else 0
        nbytes = self.count * size
        kind = rng.choice(["end", "begin", "heap"])
        if kind == "heap" or nbytes == 0:
            self._flat = torch.empty(self.count, dtype=dtype)
        else:
            inner = -(-nbytes // PAGE) * PAGE
            self._map = mmap.mmap(-1, inner + 2 * PAGE)
            base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            for guard in (base, base + PAGE + inner):
                check(LIBC.mprotect(guard, PAGE, PROT_NONE) == 0, "mprotect")
            offset = PAGE + (inner - nbytes if kind == "end" else 0)
            self._flat = torch.frombuffer(self._map, dtype=dtype, count=self.count, offset=offset)
        self._flat.view(torch.uint8).fill_(SENTINEL)
        self.tensor = (
            torch.as_strided(self._flat, (rows, width), (self.stride, 1)) if rows else self._flat[:0].view(0, width)
        )

    @property
    def address(self) -> int:
        return self._flat.data_ptr() if self.count else 0

    def set(self, values: Tensor) -> Block:
        self.tensor.copy_(values)
        return self

    def gaps_untouched(self) -> bool:
        inside = torch.zeros(self.count, dtype=torch.bool)
        if self.rows:
            torch.as_strided(inside, (self.rows, self.width), (self.stride, 1)).fill_(True)
        raw = self._flat.view(torch.uint8).view(self.count, -1) if self.count else torch.empty(0, 1, dtype=torch.uint8)
        return bool((raw[~inside] == SENTINEL).all())

    def bits(self) -> Tensor:
        return self._flat.view(torch.uint8).clone()


def size(rng: random.Random, most: int) -> int:
    edge = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 1023, 1024, 1025, 2049]
    return min(most, rng.choice(edge) if rng.random() < 0.7 else rng.randint(1, most))


def values(rng: random.Random, rows: int, width: int, wild: bool) -> Tensor:
    """fp32 of one of several scales; `wild`: with special values in some places."""
    g = torch.Generator().manual_seed(rng.getrandbits(31))
    x = torch.randn(rows, width, generator=g) * rng.choice([0.0, 1e-3, 1.0, 1.0, 3.0, 10.0])
    if wild and x.numel():
        specials = [0.0, -0.0, 1e-42, -1e-45, 1e-38, 60.0, -104.0, -1e4, -math.inf, math.inf, math.nan, 1e18]
        for _ in range(rng.randint(0, 3)):
            x[rng.randrange(rows), rng.randrange(width)] = rng.choice(specials)
        if rng.random() < 0.1:
            x[rng.randrange(rows)] = rng.choice(specials)
    return x


def common(rng: random.Random) -> dict[str, Any]:
    return {"threads": rng.choice([1, 1, 2, 3, 8, 1000]), "isa": rng.choice(["", *_cpu.available()])}


def close(got: Tensor, want: Tensor, limit: Tensor | float, what: str) -> None:
    """|got - want| <= limit where want is finite; where it is not, got is not either."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    bad = torch.where(finite, ~((got - want).abs() <= limit), torch.isfinite(got))
    if bool(bad.any()):
        at = tuple(torch.nonzero(bad)[0].tolist())
        raise Finding(f"{what}{list(at)}: got {float(got[at])!r}, float64 says {float(want[at])!r}")


# ---- the functions: each returns (call, arguments, judge of a valid call, outputs) ----------------------------------

Case = tuple[Callable[..., Any], dict[str, Any], Callable[[Any], None], list[Block]]


def rows_case(rng: random.Random, wild: bool) -> Case:
    n, v = rng.choice([0, 1, 1, 2, 5, 9]), size(rng, 3000)
    estimator = rng.choice(["full", "sampled"])
    alone = estimator == "sampled" and rng.random() < 0.4  # the teacher's word for the sampled token only
    extrapolates = not alone and rng.random() < 0.25
    divergence = rng.choice(["reverse-kl", "forward-kl", "jsd"])
    if divergence == "jsd" and (n + v) % 2:  # the seeds that found something stay what they were
        divergence = ("skew-reverse-kl", "skew-forward-kl", "alpha")[(n + v) // 2 % 3]
    if estimator == "sampled":
        divergence = "reverse-kl"
    temperature = rng.choice([1.0, 1.0, 0.5, 2.0])
    z = values(rng, n, v, wild)
    near = rng.choice([None, None, 0.0, 1e-3, 0.1])
    t = values(rng, n, v, wild) if near is None else z + near * values(rng, n, v, False)
    student = Block(rng, n, v, torch.float32).set(z)
    teacher = None if alone else Block(rng, n, v, torch.float32).set(t)
    reference = Block(rng, n, v, torch.float32).set(values(rng, n, v, wild)) if extrapolates else None

    held: list[Block] = []

    def vector(x: Tensor, dtype: torch.dtype) -> tuple[int, Tensor]:
        x = x.reshape(1, -1)
        block = Block(rng, 1 if x.numel() else 0, max(1, x.shape[1]), dtype, tight=True)
        held.append(block.set(x) if x.numel() else block)
        return block.address, x.reshape(-1)

    def head() -> tuple[tuple[int, float, float], Head]:
        scale, cap = rng.choice([1.0, 1.0, 0.5, 1.7]), rng.choice([0.0, 0.0, 5.0, 30.0])
        address, bias = vector(values(rng, 1, v, wild), torch.float32) if rng.random() < 0.3 else (0, None)
        return (address, scale, cap), Head(torch.empty(n, 0), torch.empty(v, 0), bias, scale, cap or None)

    g = torch.Generator().manual_seed(rng.getrandbits(31))
    y = torch.randint(0, v, (n,), generator=g)
    verdict = torch.randint(-1, 2, (n,), generator=g).float()
    weights = torch.rand(3, n, generator=g, dtype=torch.float64) * (torch.rand(3, n, generator=g) > 0.2)
    forced = torch.randint(-1, 2, (n,), generator=g).to(torch.int8) if rng.random() < 0.2 else None
    scale = torch.rand(n, generator=g)
    word = -3 * torch.rand(n, generator=g) if alone else None
    behaviour = -3 * torch.rand(n, generator=g) if rng.random() < 0.3 and not extrapolates else None
    (s_head, s), (t_head, q), (r_head, r) = head(), head(), head()
    tolerance, clip = rng.choice([0.0, 0.0, 0.3]), rng.choice([1.0, 2.5])
    gradient = rng.random() < 0.8
    stats = Block(rng, n, _cpu.COLUMNS, torch.float64, tight=True)

    def address(block: Block | None) -> int:
        return 0 if block is None else block.address

    def stride(block: Block | None) -> int:
        return 0 if block is None else block.stride

    arguments = dict(
        rows=n,
        vocabulary=v,
        student=student.address,
        student_stride=student.stride,
        teacher=address(teacher),
        teacher_stride=stride(teacher),
        reference=address(reference),
        reference_stride=stride(reference),
        student_head=s_head,
        teacher_head=t_head,
        reference_head=r_head,
        token_ids=vector(y, torch.int64)[0],
        verdict=vector(verdict, torch.float32)[0],
        weights=vector(weights, torch.float64)[0],
        forced=0 if forced is None else vector(forced, torch.int8)[0],
        row_scale=vector(scale, torch.float32)[0],
        teacher_logprob=0 if word is None else vector(word, torch.float32)[0],
        behaviour_logprob=0 if behaviour is None else vector(behaviour, torch.float32)[0],
        stats=stats.address,
        energy=0,
        sampled=estimator == "sampled",
        divergence=list(DIVERGENCES).index(divergence),
        parameter=0.3,
        tolerance=tolerance,
        ratio_clip=clip,
        temperature=temperature,
        gradient=gradient,
        **common(rng),
    )
    if n == 0 and not alone:  # an empty tensor's address is null, which says "no teacher" to this function
        arguments.update(teacher=64, teacher_stride=v)
    chosen = divergence if DIVERGENCES[divergence] is None else (divergence, 0.3)
    problem = Problem(
        options=Options(
            gate=Gate(tolerance=tolerance),
            estimator=estimator,
            divergence=chosen,
            temperature=temperature,
            ratio_clip=clip,
        ),
        student=s,
        token_ids=y,
        verdict=verdict,
        teacher=None if alone else q,
        teacher_logprob=word,
        behaviour_logprob=behaviour,
        reference=r if extrapolates else None,
    )
    inputs = [None if b is None else b.tensor.clone() for b in (student, teacher, reference)]

    def judge(_: Any) -> None:
        assert inputs[0] is not None
        want = inputs[0].clone()
        others = [None if x is None else x.clone() for x in inputs[1:]]
        chunk = Chunk(torch.arange(n), problem.student.hidden, want, *others, weights, forced, scale)
        truth = TorchBackend().rows(problem, chunk, torch.float32 if gradient else None)
        # fp32 logits of this size are given to this much
        caps = [h.softcap or 0.0 for h in (s, q, r)]  # what an infinite one comes to
        pairs = [(x, cap) for x, cap in zip(inputs, caps) if x is not None]
        logits = torch.stack([x.double().nan_to_num(0, cap, cap).abs().amax(-1) for x, cap in pairs])
        biases = [0.0 if h.bias is None else float(h.bias.nan_to_num(0, 0, 0).abs().max()) for h in (s, q, r)]
        unit = 1e-6 * ((logits.amax(0) + max(biases)) * 2 + 10) / temperature
        got = stats.tensor
        near_tie = ((truth[:, 3] - truth[:, 2]) * verdict).abs() - tolerance
        sure = ~(near_tie.abs() < 8 * unit) & torch.isfinite(truth[:, 2]) & torch.isfinite(truth[:, 3])
        sure |= torch.zeros_like(sure) if forced is None else forced >= 0
        if inputs[2] is not None:
            # Where the teacher masks a column, the reference has no part in the target, be it NaN. Its own log-softmax,
            # which float64 takes first and the target's normalisation cancels, has.
            masked, nan = (x if h.bias is None else x + h.bias for x, h in zip(inputs[1:], (q, r)))
            sure &= ~(torch.isnan(nan) & (masked == -torch.inf)).any(-1)
        # Without a column that student and targets share there is no distribution, and no one number to agree on.
        lost = torch.isnan(truth[:, 4])
        check(not bool((torch.isfinite(got[:, 0]) & lost & (got[:, 6] != 0)).any()), "a loss without a distribution")
        for column in range(1, 6):
            limit = 4 * unit + 3e-4 * truth[:, column].abs()
            close(got[~lost, column], truth[~lost, column], limit[~lost], f"stats.{column}")
        sure &= ~lost
        check(bool((got[sure, 6:] == truth[sure, 6:]).all()), "the gate differs")
        loss_unit = (4 * unit + 3e-4) * (1 + truth[:, 1:4].nan_to_num(0, 0, 0).abs().amax(-1) ** 2)
        close(got[sure, 0], truth[sure, 0], (loss_unit + 3e-4 * truth[:, 0].abs())[sure], "stats.0")
        if gradient:
            sure &= torch.isfinite(truth[:, 1])  # at an infinite divergence a masked column has no one gradient
            # A row that is NaN throughout has to show it. In another without a loss the NaN may come from a column that
            # the student cannot produce: it has no part in some forms of the gradient, and the loss shows it.
            undefined, lossless = torch.isnan(want).all(-1), torch.isnan(want).any(-1) & torch.isnan(truth[:, 0])
            check(bool(torch.isnan(student.tensor[sure & undefined]).any(-1).all()), "a NaN is not in the gradient")
            sure &= ~(undefined | lossless)
            reach = want.double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if n else want.double()
            limit = 1e-3 * reach + (unit * 40 * scale).unsqueeze(-1) if n else 0.0
            close(student.tensor[sure], want[sure], limit[sure] if n else 0.0, "gradient")

    outputs = [b for b in (student, teacher, reference, stats) if b is not None]
    return _hold(_cpu.rows, held + outputs), arguments, judge, outputs


def _hold(call: Callable[..., Any], held: list[Block]) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        result = call(**arguments)
        assert held is not None  # the blocks live until here
        return result

    return run


def matrix(rng: random.Random, rows: int, width: int, dtype: torch.dtype, wild: bool = False) -> Block:
    return Block(rng, rows, width, dtype).set(values(rng, rows, width, wild))


def product_limit(x: Tensor, w: Tensor, relative: float) -> Tensor:
    return (
        relative
        * x.double().nan_to_num(0, 0, 0).norm(dim=-1, keepdim=True)
        * w.double().nan_to_num(0, 0, 0).norm(dim=-1)
        + 1e-30
    )


def project_case(rng: random.Random, wild: bool) -> Case:
    n, v, h = rng.choice([0, 1, 2, 5, 6, 7, 13]), size(rng, 300), size(rng, 500)
    elements = [torch.float32, torch.bfloat16]
    x, w = matrix(rng, n, h, rng.choice(elements), wild), matrix(rng, v, h, rng.choice(elements), wild)
    out = Block(rng, n, v, torch.float32)
    way = common(rng)
    if not _cpu.kernels(way["isa"]).int16:
        way["isa"] = ""
    fed = rng.random() < 0.5
    feedback = [Block(rng, h, 16, torch.float32, tight=True).set(values(rng, h, 16, wild)) for _ in range(2 * fed)]

    def judge(_: Any) -> None:
        truth = x.tensor.double() @ w.tensor.double().T
        # a row whose integer step would leave fp32's range is given as NaN, and the plan computes it exactly
        sizes = [m.tensor.double().norm(dim=-1) for m in (x, w)]
        beyond_x, beyond_w = (~((size == 0) | ((size > 1e-24) & (size < 1e14))) for size in sizes)
        beyond = beyond_x.unsqueeze(-1) | beyond_w
        truth = torch.where(beyond & torch.isnan(out.tensor), torch.nan, truth)
        # Half a step an element, all of one sign where a row is constant; a segment's norm is 46,341 steps. With
        # feedback a hidden state's element moves up to a step more.
        relative = 1e-5 + (1.5 + 2 * fed) * min(h, arguments["segment"]) ** 0.5 / 46_341
        close(out.tensor, truth, product_limit(x.tensor, w.tensor, relative), "product")

    arguments: dict[str, Any] = dict(
        hidden=(x.address, x.stride, x.dtype == torch.bfloat16),
        weight=(w.address, w.stride, w.dtype != torch.float32),
        segment=rng.choice([2, 16, 192, 576, 2048]),
        **{name: m.address for name, m in zip(("along", "absorb"), feedback)},
        **dict(n=n, v=v, h=h, out=out.address, out_stride=out.stride, **way),
    )
    return _hold(_cpu.project_int16, [x, w, out, *feedback]), arguments, judge, [out]


def select_case(rng: random.Random, wild: bool) -> Case:
    n, v = rng.choice([0, 1, 2, 5, 40]), size(rng, 3000)
    z, t = matrix(rng, n, v, torch.float32, wild), matrix(rng, n, v, torch.float32, wild)
    ids = Block(rng, 1 if n else 0, max(n, 1), torch.int64, tight=True)
    y = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(rng.getrandbits(31)))
    if n:
        ids.set(y.unsqueeze(0))
    report = Block(rng, n, 6, torch.float64, tight=True).set(torch.zeros(n, 6))
    scales = rng.choice([1.0, 0.5, 3.0]), rng.choice([1.0, 0.5, 3.0])
    threshold = rng.choice([1e-4, 1e-2, 0.5])
    arguments = dict(
        student=z.address,
        student_stride=z.stride,
        student_scale=scales[0],
        teacher=t.address,
        teacher_stride=t.stride,
        teacher_scale=scales[1],
        n=n,
        v=v,
        token_ids=ids.address,
        threshold=threshold,
        report=report.address,
        **common(rng),
    )

    def judge(pairs: Any) -> None:
        logits = [b.tensor.double() * s for b, s in zip((z, t), scales)]
        lse = torch.stack([x.logsumexp(-1) for x in logits], -1) if n else torch.empty(0, 2)
        size_of = torch.stack([x.nan_to_num(0, 0, 0).abs().amax(-1) for x in logits], -1) if n else lse
        close(report.tensor[:, :2], lse, 1e-6 * (size_of + 10), "lse")
        if not n or not bool(torch.isfinite(lse).all()):
            return
        margin = 1e-5 * (1 + size_of.max()) + 1e-5
        excess = torch.maximum(*(x - e.unsqueeze(-1) for x, e in zip(logits, lse.T))) - math.log(threshold)
        excess[torch.arange(n), y] = 1e9
        low, high = int((excess >= margin).sum()), int((excess >= -margin).sum())
        check(low <= pairs.count <= high, f"select_mass kept {pairs.count} pairs, float64 says {low} to {high}")

    return _hold(_cpu.select_mass, [z, t, ids, report]), arguments, judge, [report]


def refine_case(rng: random.Random, wild: bool) -> Case:
    """select_mass, then refine of its pairs: the wrong argument is one of refine's."""
    n, v, widths = rng.choice([0, 1, 2, 5, 40]), size(rng, 1500), (size(rng, 90), size(rng, 90))
    hidden = [matrix(rng, n, h, torch.float32, wild) for h in widths]
    weight = [matrix(rng, v, h, rng.choice([torch.float32, torch.bfloat16]), wild) for h in widths]
    exact = [x.tensor.double() @ w.tensor.double().T for x, w in zip(hidden, weight)]
    noise = rng.choice([0.0, 1e-3])
    z = [Block(rng, n, v, torch.float32).set(e.float() + noise * values(rng, n, v, False)) for e in exact]
    quantized = [b.tensor.clone() for b in z]
    ids = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(rng.getrandbits(31)))
    report = Block(rng, n, 6, torch.float64, tight=True).set(torch.zeros(n, 6))
    sides: dict[str, Any] = {"report": report.address, **common(rng)}
    for name, block in zip(("student", "teacher"), z):
        sides |= {name: block.address, f"{name}_stride": block.stride, f"{name}_scale": 1.0}
    pairs = _cpu.select_mass(**sides, n=n, v=v, token_ids=ids.data_ptr(), threshold=1e-3)
    arguments = dict(sides)
    for name, x, w, h in zip(("student", "teacher"), hidden, weight, widths):
        arguments[f"{name}_hidden"] = (x.address, x.stride, False)
        arguments[f"{name}_weight"] = (w.address, w.stride, w.dtype == torch.bfloat16)
        arguments[f"{name}_width"] = h

    def judge(_: Any) -> None:
        changed = 0
        for block, before, true, x, w in zip(z, quantized, exact, hidden, weight):
            if not bool(torch.isfinite(true).all()):
                continue
            moved = block.tensor != before
            changed = max(changed, int(moved.sum()))
            # A token's pairs are its exact products less one shift, at most the largest error of quantizing.
            limit = product_limit(x.tensor, w.tensor, 4e-6).amax(-1, keepdim=True) + 60 * noise + 1e-6 * true.abs()
            close(torch.where(moved, block.tensor, true.float()), true, limit, "refined")
        check(changed <= pairs.count, f"refine moved {changed} logits of {pairs.count} pairs")
        if noise == 0 and all(float(e.nan_to_num(math.inf).abs().max()) < 1e3 for e in exact if n):
            check(bool((report.tensor[:, 4:] < 1e-2).all()), "an exact product has a variance")

    return _hold(pairs.refine, [*hidden, *weight, *z, report]), arguments, judge, [*z, report]


def pairs_case(rng: random.Random, wild: bool) -> Case:
    """extract_top, or one of the products over the pairs that it took."""
    n, v, h = rng.choice([0, 1, 2, 5, 40]), size(rng, 3000), size(rng, 90)
    gradient = matrix(rng, n, v, torch.float32, wild)
    gradient.tensor.mul_(rng.choice([1.0, 1.0, 1e-6, 1e6])).pow_(rng.choice([1, 1, 3]))
    before = gradient.tensor.clone()
    budget, most = rng.choice([1e-3, 0.03, 0.3, 1.5]), rng.choice([1.0, 1.0, 0.1])
    take = dict(gradient=gradient.address, stride=gradient.stride, n=n, v=v, budget=budget, most=most, **common(rng))
    wanted = rng.choice(["extract_top", "restore", "add_hidden_gradient", "add_weight_gradient", "add_bias_gradient"])

    def judge_take(pairs: Any) -> None:
        rest = gradient.tensor
        taken = torch.where(rest == before, 0.0, before.double())
        if pairs.dense:
            check(bool((rest.nan_to_num(7) == before.nan_to_num(7)).all()), "dense pairs changed the gradient")
            return
        check(bool(((rest == 0) | (rest == before)).all()), "an entry is neither taken nor left")
        check(pairs.count >= int(((rest == 0) & (before != 0)).sum()), "an entry was zeroed and not taken")
        check(not bool(torch.isnan(rest).any()), "a NaN was left")
        energies = taken.square().sum(), rest.double().square().sum()
        # In units of the threshold a square below fp32's smallest number is 0: nothing to an error, whatever was taken.
        underflow = 1e-37 * pairs.threshold**2 * n * v if math.isfinite(pairs.threshold) else 0.0
        for name, got, want in zip(("taken", "left"), (pairs.taken, pairs.left), energies):
            close(
                torch.tensor(got, dtype=torch.float64),
                want,
                1e-4 * want + 1e-30 * energies[0].nan_to_num(0, 0, 0) + underflow,
                name,
            )
        # every token in the histogram's sample; denormals are never taken
        if n and n <= 16 and bool(torch.isfinite(before).all()) and float(before.abs().max()) > 1e-30:
            check(float(energies[1]) <= 1.001 * budget**2 * float(sum(energies)), "more than the budget was left")

    if wanted == "extract_top":
        return _hold(_cpu.extract_top, [gradient]), take, judge_take, [gradient]

    pairs = _cpu.extract_top(**take)
    judge_take(pairs)
    taken = torch.where((gradient.tensor == before) | torch.tensor(pairs.dense), 0.0, before.double())
    if wanted == "restore":

        def judge_restore(_: Any) -> None:
            check(torch.equal(gradient.tensor.nan_to_num(7, 8, 9), before.nan_to_num(7, 8, 9)), "restore lost bits")

        call = _hold(lambda gradient, stride: pairs.restore(gradient, stride), [gradient])
        return call, dict(gradient=gradient.address, stride=gradient.stride), judge_restore, [gradient]
    if wanted == "add_bias_gradient":
        bias = matrix(rng, 1, v, torch.float32)
        want = bias.tensor.double() + taken.sum(0)
        limit = 1e-5 * (bias.tensor.double().abs() + taken.nan_to_num(0, 0, 0).abs().sum(0)) + 1e-30

        def judge_bias(_: Any) -> None:
            close(bias.tensor, want, limit, "bias gradient")

        return _hold(lambda out: pairs.add_bias_gradient(out), [bias]), dict(out=bias.address), judge_bias, [bias]
    hidden_side = wanted == "add_hidden_gradient"
    rows, inner = (n, v) if hidden_side else (v, n)
    operand = matrix(rng, inner, h, rng.choice([torch.float32, torch.bfloat16]) if hidden_side else torch.float32)
    out = matrix(rng, rows, h, torch.float32)
    factor = taken if hidden_side else taken.T
    # A column that no pair has takes no part, whatever it holds: 0 * NaN does not arise.
    want = out.tensor.double() + factor @ operand.tensor.double()
    reach = factor.nan_to_num(0, 0, 0).abs() @ operand.tensor.double().abs()
    limit = 1e-5 * (out.tensor.double().abs() + reach) + 1e-30

    def judge_product(_: Any) -> None:
        close(out.tensor, want, limit, wanted)

    address = (operand.address, operand.stride, operand.dtype == torch.bfloat16)
    arguments = {"weight" if hidden_side else "hidden": address, "h": h, "out": out.address, "out_stride": out.stride}
    return _hold(getattr(pairs, wanted), [operand, out]), {**arguments, **common(rng)}, judge_product, [out]


def tiles_case(rng: random.Random, wild: bool) -> Case:
    """The products on tiles, the processor's or emulated: fp32 operands have 16 bits, or 8 where `fine` says so."""
    n, v, h = rng.choice([0, 1, 2, 7, 31, 33, 65]), size(rng, 200), size(rng, 100)
    way = common(rng)
    if not _cpu.kernels(way["isa"]).tiles:
        way["isa"] = "amx-emulated"
    elements = [torch.float32, torch.bfloat16]
    x, w = matrix(rng, n, h, rng.choice(elements), wild), matrix(rng, v, h, rng.choice(elements), wild)
    g = matrix(rng, n, v, torch.float32, wild)
    fine = None
    if rng.random() < 0.7:
        fine = Block(rng, -(-n // 32), -(-v // 32), torch.uint8)
        fine.set(
            torch.randint(0, 2, (fine.rows, fine.width), generator=torch.Generator().manual_seed(rng.getrandbits(31)))
        )

    def given(block: Block) -> tuple[int, int, bool]:
        return block.address, block.stride, block.dtype == torch.bfloat16

    wanted = rng.choice(["project_tiles", "add_hidden_gradient_tiles", "add_weight_gradient_tiles"])
    arguments: dict[str, Any] = {"n": n, "v": v, "h": h, **way}
    blocks = {"fine": 0 if fine is None else fine.address, "fine_stride": 0 if fine is None else fine.stride}
    beside: list[Block] = [] if fine is None else [fine]
    left, right = {
        "project_tiles": (x.tensor, w.tensor.T),
        "add_hidden_gradient_tiles": (g.tensor, w.tensor),
        "add_weight_gradient_tiles": (g.tensor.T, x.tensor),
    }[wanted]
    result = torch.float32
    if wanted == "project_tiles":
        out = Block(rng, n, v, torch.float32)
        arguments |= {"hidden": given(x), "weight": given(w), "out": out.address, "out_stride": out.stride}
        start, coarse = torch.zeros(n, v), False
    else:
        arguments |= {"gradient": g.address, "stride": g.stride, **blocks}
        coarse = fine is not None
        if wanted == "add_hidden_gradient_tiles":
            out = matrix(rng, n, h, torch.float32)
            arguments |= {"weight": given(w), "out": out.address, "out_stride": out.stride}
            start = out.tensor.clone()
        else:
            result = rng.choice(elements)
            first = rng.random() < 0.5
            out = matrix(rng, v, h, result)
            start = torch.zeros(v, h) if first else out.tensor.float()
            arguments |= {"hidden": given(x), "out": given(out), "first": first}
            if result == torch.bfloat16 and (not first or rng.random() < 0.5):
                rest = Block(rng, v, h, torch.int8)
                rest.set(torch.zeros(v, h, dtype=torch.int8))
                arguments |= {"rest": rest.address, "rest_stride": rest.stride}
                beside.append(rest)
    limb = 2.0**-8 if coarse else 2.0**-15
    truth = start.double() + left.double() @ right.double()
    reach = left.double().nan_to_num(0, 0, 0).abs() @ right.double().nan_to_num(0, 0, 0).abs()
    # A denormal operand, low limb or sum counts as 0; a number that bf16 would round to infinity is not finite.
    sums = left.double().nan_to_num(0, 0, 0).abs().sum(-1, keepdim=True) + right.double().nan_to_num(0, 0, 0).abs().sum(
        0
    )
    limit = 2.1 * limb * reach + 2.0**-110 * (sums + 1) + 1e-6 * start.double().abs()

    def judge(_: Any) -> None:
        if n == 0:  # nothing to add
            return
        got, allowed = out.tensor.double(), limit
        if result == torch.bfloat16:
            allowed = allowed + 2.0**-8 * (truth.nan_to_num(0, 0, 0).abs() + allowed)
        # where bf16 or fp32 overflow the truth of float64 may be finite
        want = torch.where((truth.abs() > 1e37) & ~torch.isfinite(got), torch.inf, truth)
        close(got, want, allowed, wanted)

    return (
        _hold(getattr(_cpu, wanted), [x, w, g, out, *beside]),
        arguments,
        judge,
        [out, *beside[1 if fine is not None else 0 :]],
    )


CASES = {"rows": rows_case, "select_mass": select_case, "refine": refine_case, "pairs": pairs_case}
PROJECTS = _cpu.kernels().int16  # one seed in ten; the others mean the same on every processor


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def spoil(rng: random.Random, arguments: dict[str, Any]) -> str | None:
    """Makes one argument wrong, and says how; None where the case has nothing to spoil that way."""
    sizes = {k for k in ("n", "v", "vocabulary", "h", "student_width", "teacher_width") if k in arguments}
    unused = {"reference_stride", "teacher_stride"} if "token_ids" in arguments else set()  # without its matrix
    unused |= {"fine_stride", "rest_stride"} & set(arguments)
    unused = {k for k in unused if arguments.get(k.removesuffix("_stride"), 1) == 0}
    strides = {k for k in arguments if k.endswith("stride")} - unused
    addresses = {
        k for k, x in arguments.items() if k not in sizes | strides | unused | {"threads"} and type(x) is int and x > 64
    }
    matrices = {k for k, x in arguments.items() if type(x) is tuple and len(x) == 3 and type(x[2]) is bool}
    optional = {"reference", "forced", "behaviour_logprob", "fine", "rest"}
    if arguments.get("gradient") is False:
        optional.add("row_scale")
    narrow = {"forced", "fine", "rest"}  # of single bytes, never misaligned
    ways: list[tuple[str, str, Any]] = [("threads", "none", 0)] if "threads" in arguments else []
    ways += [(k, "size", x) for k in sorted(sizes) for x in (-1, -(2**62), 2**31, 2**62)]
    ways += [(k, "stride", rng.choice([0, -1, -(2**63)])) for k in sorted(strides) if arguments[k] > 0]
    ways += [(k, "stride", 2**62) for k in sorted(strides) if arguments[k] > 0 and arguments.get("n", 0) > 2]
    ways += [(k, "misaligned", arguments[k] + 1) for k in sorted(addresses - narrow)]
    ways += [(k, "null", 0) for k in sorted(addresses - optional)]
    ways += [(k, "address", x) for k in sorted(addresses) for x in (-8, 2**64, None, 1.5)]
    for k in sorted(matrices):
        address, stride, bf16 = arguments[k]
        if address:
            ways += [(k, "null", (0, stride, bf16)), (k, "misaligned", (address + 1, stride, bf16))]
        ways += [(k, "stride", (address, -1, bf16)), (k, "shape", (address, stride))]
    if "isa" in arguments and arguments.get("n"):
        ways.append(("isa", "unknown", "sse9"))
    if "estimator" in arguments:
        ways += [("estimator", "value", 2), ("divergence", "value", -1), ("temperature", "value", math.nan)]
        ways += [("temperature", "value", 1e-60), ("tolerance", "value", -1.0), ("ratio_clip", "value", math.nan)]
        ways += [("student_head", "value", (0, math.nan, 0.0)), ("teacher_head", "value", (0, 1.0, -2.0))]
    if "threshold" in arguments:
        ways += [("threshold", "value", x) for x in (0.0, -1.0, math.nan, 2.0)] + [("student_scale", "value", math.inf)]
    if "segment" in arguments:
        ways += [("segment", "value", x) for x in (0, -2, 3, 2**20)]
    if "budget" in arguments:
        ways += [(k, "value", x) for k in ("budget", "most") for x in (0.0, math.nan)]
    name, what, value = rng.choice(ways)
    if name == "teacher" and value == 0 and arguments.get("teacher_logprob"):
        return None
    arguments[name] = value
    return f"{name}: {what} ({value!r})"


def one(seed: int) -> str:
    """Runs a case; the name of its kind."""
    rng = random.Random(seed)
    kind = rng.choice(list(CASES))
    make = CASES[kind]
    if seed % 10 == 4:
        kind, make = "tiles", tiles_case
    elif PROJECTS and seed % 10 == 7:
        kind, make = "project", project_case
    wrong = rng.random() < 1 / 3
    call, arguments, judge, outputs = make(rng, wild=not wrong and rng.random() < 0.5)
    if not wrong:
        result = call(**arguments)
        check(all(b.gaps_untouched() for b in outputs), f"{kind}: written between the rows")
        judge(result)
        return kind
    how = spoil(rng, arguments)
    if how is None:
        return "skipped"
    before = [b.bits() for b in outputs]
    try:
        call(**arguments)
    except REFUSED:
        pass
    else:
        raise Finding(f"{kind} took a wrong argument, {how}")
    check(all(torch.equal(b.bits(), was) for b, was in zip(outputs, before)), f"{kind} wrote, then refused {how}")
    return f"{kind}, wrong"


def run(first: int, last: int | None, until: float, progress: str | None) -> collections.Counter[str]:
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    seed = first
    note = None if progress is None else os.open(progress, os.O_WRONLY | os.O_CREAT)
    while (last is None or seed < last) and time.monotonic() < until:
        if note is not None:
            os.pwrite(note, b"%20d" % seed, 0)  # what a crash leaves behind
        try:
            counts[one(seed)] += 1
        except Finding as finding:
            raise Finding(f"seed {seed}: {finding}") from finding
        seed += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="this case alone")
    parser.add_argument("--first", type=int, default=int(time.time()) * 1000, help="the first seed (default: new ones)")
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.seed is not None:
        print(one(given.seed))
        return 0
    if given.progress is None:
        note = os.path.join("/tmp" if os.path.isdir("/tmp") else ".", f"fuzz_native.{os.getpid()}")
        child = subprocess.run(
            [sys.executable, *sys.argv, "--first", str(given.first), "--progress", note], check=False
        )
        with open(note) as last:
            seed = last.read().strip()
        os.unlink(note)
        if child.returncode:
            print(f"a finding at seed {seed} (exit status {child.returncode}); again: {sys.argv[0]} --seed {seed}")
        return 1 if child.returncode else 0
    began = time.monotonic()
    counts = run(given.first, None, began + 60 * given.minutes, given.progress)
    for kind, count in sorted(counts.items()):
        print(f"{count:9,} {kind}")
    took = time.monotonic() - began
    print(f"{sum(counts.values()):9,} cases in {took / 60:.1f} minutes on {', '.join(_cpu.available())}; no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
