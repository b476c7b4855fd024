"""The filtered and the screened plan's parts: an error budget, who keeps to it, and what happens when it isn't kept.

Reverse KL's gradient G = w p ((z_S - z_T) - E_p[z_S - z_T]) carries the factor p: of a chunk's entries, 1-4 %
hold all but a thousandth of its norm. They differ from token to token (the union of their columns over 256 tokens is
half of the vocabulary), so the gradient's products run over (token, column) pairs and not over columns:

    filtered   logits as in the exact plan; dW = pairs^T H; dH = pairs W + (the rest U) B
    screened   logits in 16-bit integers; the pairs that carry probability again in fp32; then as filtered

The rest of a row, thousands of entries below the threshold, is no noise: heads' rows share directions, along which it
adds up. B [r, H] are those directions (the leading ones of a sample of the head's rows) and U = W B^T, so that the rest
moves dH within them; what is lost is its part outside them.

Nothing is trusted that was not measured on the chunk at hand. The threshold comes from a histogram of |G|; what it
leaves is summed; the screen's error is measured on the pairs that are computed twice. From these an error is estimated,
and a chunk whose estimate exceeds the budget is computed again by the exact plan. docs/kernels.md has the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ._checks import number
from .problem import Problem
from .reference import TokenValues

KL, GATE_WEIGHT = (TokenValues._fields.index(name) for name in ("kl", "gate"))

AUTO = 1.5e-3  # relative Frobenius error of a gradient: what rounding it to bf16 costs
BF16 = 2.0**-8
RANK = 16  # directions of the head that the rest of a gradient keeps, and that rounding feeds back (csrc/cpu/int16.h)
SAMPLED_ROWS = 1024  # of the head, from which they come: 0.5 % more of a row lies outside them than with all rows
# ||rest outside the directions|| against its entries taken as independent: 2.6-4.6 measured
COHERENCE = 5.0
SHARE = 0.25  # of the budget: what is left of ||G|| at first, before the estimate's factors
NOISE_SHARE = 0.9  # of the budget: the most that a screen's noise may take, where there is a rest as well


@dataclass(frozen=True)
class Setting:
    """A way to screen."""

    segment: int  # products that the screen sums in one int32: longer ones are 8 % faster, a logit's variance 2.5 times
    feedback: bool  # hidden states rounded with feedback
    coherence: float  # its noise in the hidden gradient, against errors that are independent
    kl: float  # where it leaves room for the rest, at a budget of 1: the noise goes with 1 / sqrt(KL)


# From the fastest to the most exact. What rounding a hidden state leaves is one vector for all columns of its token,
# and adds up along what they share: 2.9-5.1 times independent errors measured, 1.5-1.7 with feedback (`Rounding`).
SETTINGS = (Setting(576, False, 5.0, 4e-9), Setting(576, True, 2.5, 1e-9), Setting(192, True, 2.5, 2.5e-10))
MOST = 0.12  # share of pairs above which dense products are faster
# Probability from which a logit is computed again in fp32: where the KL leaves no more room than the first setting
# needs, and at most. The variance that the tail leaves in a gradient goes with MASS * tail / KL.
MASS, MOST_MASS = 1e-4, 4e-4
GATE = 1e-4  # log-ratio below which a sign may flip (docs/method.md)
WORTHWHILE = 2.0**31.5  # multiply-adds of one projection below which a call is exact: 105 tokens of SmolLM2
PROBED_ROWS, PROBED_STRIDE = 16, 16


def budget_of(precision: str | float) -> float:
    """The relative gradient error a call allows; 0: exact."""
    named = {"exact": 0.0, "auto": AUTO, "bf16": BF16}
    if isinstance(precision, str) and precision in named:
        return named[precision]
    expected = "'auto', 'exact', 'bf16' or a relative error above 0 and below 1, such as 1e-3"
    return number("precision", precision, expected, 0.0, 1.0)


@dataclass
class Report:
    """What the plans did, over a call's chunks."""

    screened: int = 0  # tokens
    filtered: int = 0
    exact: int = 0
    kept: float = 0.0  # entries of the gradient that entered its products
    entries: float = 0.0
    error: float = 0.0  # the worst chunk's estimate

    def tensor(self) -> Tensor:
        """[3] float64: plan (0 exact, 1 filtered, 2 screened: the cheapest that ran), share kept, error estimate."""
        plan = 2 if self.screened else 1 if self.filtered else 0
        share = self.kept / self.entries if self.entries else 1.0
        return torch.tensor([plan, share, self.error], dtype=torch.float64)


PLANS = ("exact", "filtered", "screened")
KEPT = 1  # where Report.tensor has the share


Product = Callable[[Tensor, Tensor, Tensor], None]  # hidden [n, H], weight [V, H], out [n, V] fp32


@dataclass
class Directions:
    """Leading directions of a head's rows: B [r, H] orthonormal, and what lies along and outside them."""

    basis: Tensor
    inside: Tensor  # [r, r] second moments of a row's part along them
    outside: float  # root mean square norm of a row's part outside them

    @staticmethod
    def of(weight: Tensor) -> Directions:
        v, h = weight.shape
        sample = weight[:: max(1, v // SAMPLED_ROWS)].float()
        start = torch.randn(h, min(RANK, h), generator=torch.Generator().manual_seed(0)).to(weight.device)
        for _ in range(2):
            start = torch.linalg.qr(sample.T @ (sample @ start))[0]
        along = sample @ start
        rest = sample.square().sum() - along.square().sum()
        outside = float((rest / sample.shape[0]).clamp(min=0).sqrt())
        return Directions(start.T.contiguous(), along.T @ along / sample.shape[0], outside)

    def along(self, weight: Tensor, project: Product) -> Tensor:
        """U^T = B W^T [r, V] fp32."""
        out = torch.empty(self.basis.shape[0], weight.shape[0], device=weight.device)
        project(self.basis, weight, out)
        return out


class Rounding:
    """Coefficients of rounding with error feedback: `_cpu.project_int16`.

    An element k of a hidden state x is rounded to q_k = round(x_k - a_k . s), s = B (q - x) over the elements before
    it. a_k = (sum_{j >= k} b_j b_j^T + L^-1)^-1 b_k is what makes |W (q - x)|^2 least if the elements from k on could
    take any value, with B the head's directions, b_k its columns, and L their second moments beyond those of all
    others, in units of these (GPTQ's recursion, arXiv 2210.17323, for a matrix of that form).
    """

    def __init__(self, directions: Directions) -> None:
        basis = directions.basis.double()
        r, h = basis.shape
        power, axes = torch.linalg.eigh(directions.inside.double())
        others = max(directions.outside**2 / max(h - r, 1), 1e-12 * float(power.sum()), 1e-300)
        inverse = axes @ torch.diag(1 / (power / others - 1).clamp(1e-6, 1e6)) @ axes.T
        behind = torch.einsum("rk,sk->krs", basis, basis).flip(0).cumsum(0).flip(0)
        absorb = torch.linalg.solve(behind + inverse, basis.T)
        self.along, self.absorb = (
            torch.nn.functional.pad(x, (0, RANK - r)).float().contiguous() for x in (basis.T, absorb)
        )


class Pairs(Protocol):
    """(token, column) pairs of a chunk with their gradient: `_cpu.Pairs`."""

    count: int
    taken: float  # sum of their squares
    left: float  # ... of what stayed in the block
    dense: bool  # too many: nothing was taken


class SparseBackend(Protocol):
    """What a backend brings for these plans. Blocks are [n, V] fp32, hidden states and weights fp32 or bf16."""

    def project_screened(
        self, hidden: Tensor, weight: Tensor, out: Tensor, segment: int, rounding: Rounding | None = None
    ) -> None: ...

    def refine(self, problem: Problem, rows: Tensor, z_s: Tensor, z_t: Tensor, mass: float) -> Tensor: ...

    def take_large(self, g: Tensor, budget: float, most: float) -> Pairs: ...

    def restore(self, pairs: Pairs, g: Tensor) -> None: ...

    def add_pairs_hidden(self, pairs: Pairs, weight: Tensor, out: Tensor) -> None: ...

    def add_pairs_weight(self, pairs: Pairs, hidden: Tensor, out: Tensor) -> None: ...

    def add_pairs_bias(self, pairs: Pairs, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Screen:
    """How the forward pass of a chunk gets its logits where it does not compute them all in fp32."""

    backend: SparseBackend
    setting: Setting
    mass: float
    student: Rounding | None  # of hidden states, by what they are multiplied with
    teacher: Rounding | None

    def project(self, problem: Problem, rows: Tensor, z_s: Tensor, z_t: Tensor) -> None:
        """Both models' logits [n, V]."""
        v, segment = z_s.shape[1], self.setting.segment
        assert problem.teacher is not None and problem.teacher_hidden is not None
        hidden, weight = problem.student_hidden[rows], problem.student.weight[:v]
        self.backend.project_screened(hidden, weight, z_s, segment, self.student)
        hidden, weight = problem.teacher_hidden[rows], problem.teacher.weight[:v]
        self.backend.project_screened(hidden, weight, z_t, segment, self.teacher)

    def refine(self, problem: Problem, rows: Tensor, z_s: Tensor, z_t: Tensor) -> Tensor:
        """In fp32 what carries probability; a report for `Sparse.screen_error`."""
        return self.backend.refine(problem, rows, z_s, z_t, self.mass)


class SparsePlan(Protocol):
    """What plan.py asks of a sparse plan: `Sparse` here, `ColumnFilter` in columns.py. `taken` is its own affair."""

    report: Report
    pays: bool

    def held_bytes(self) -> tuple[int, int]: ...

    def worthwhile(self, rows: Tensor) -> bool: ...

    def probe(self, rows: Tensor) -> None: ...

    def chunk(self, forward: Any, z_s: Tensor, scale: Tensor, need: bool) -> tuple[Tensor, Any]: ...

    def gradients(
        self,
        taken: Any,
        rest: Tensor,
        hidden: Tensor,
        at: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> None: ...


@dataclass
class Taken:
    """What was taken out of a chunk's gradient."""

    pairs: list[Pairs]
    hidden: Tensor  # [n, H] fp32: their part of the hidden gradient

    @property
    def energy(self) -> float:
        """||G||^2 of the chunk, the rest included."""
        return sum(p.taken for p in self.pairs) + self.pairs[-1].left


class RestPlan:
    """What the plans share that keep the rest of a gradient along the head's leading directions."""

    problem: Problem
    _directions: Directions | None
    _along: Tensor | None

    def product(self) -> Product:
        """What computes U^T; its rounding matters to the rest alone."""
        raise NotImplementedError

    def directions(self) -> Directions:
        if self._directions is None:
            weight = self.problem.student.weight[: self.problem.vocabulary]
            self._directions = Directions.of(weight)
        return self._directions

    def along(self) -> Tensor:
        """U^T [r, V]: the head's rows along the directions."""
        if self._along is None:
            weight = self.problem.student.weight[: self.problem.vocabulary]
            self._along = self.directions().along(weight, self.product())
        return self._along

    def left_out(self, left: float, energy: float, hidden: Tensor) -> float:
        """The error estimate of both gradients: `left` of `energy` = ||G||^2 stayed; hidden [n, H], what was taken."""
        reach = float(hidden.norm())
        lost = COHERENCE * left**0.5 * self.directions().outside / reach if reach > 0 else float("inf")
        return max(lost, 1.5 * (left / energy) ** 0.5)

    def with_rest(self, hidden: Tensor, rest: Tensor) -> Tensor:
        """The hidden gradient [n, H]: of what was taken, and of the rest [n, V] along the directions."""
        return torch.addmm(hidden, rest @ self.along().T, self.directions().basis)


@dataclass
class Sparse(RestPlan):
    """One call's sparse plan; `v`: the shared vocabulary."""

    problem: Problem
    backend: SparseBackend
    v: int
    screens: bool
    report: Report = field(default_factory=Report)
    pays: bool = True  # chunks to come should try
    setting: int = 0  # of SETTINGS
    mass: float = MASS
    _directions: Directions | None = None
    _along: Tensor | None = None
    _roundings: tuple[Rounding, Rounding] | None = None

    @property
    def budget(self) -> float:
        return self.problem.spec.budget

    def product(self) -> Product:
        return partial(self.backend.project_screened, segment=SETTINGS[0].segment)

    def held_bytes(self) -> tuple[int, int]:
        """(bytes, bytes a token) held beside logits: threads' scratch; MOST of a row, a column and a value each."""
        return 16 * 2**20, int(8 * MOST * self.v)

    def worthwhile(self, rows: Tensor) -> bool:
        return rows.numel() * self.v * self.problem.student_hidden.shape[1] >= WORTHWHILE

    def probe(self, rows: Tensor) -> None:
        """Turns the screen off where it can't pay: flat distributions, or models too near for 16 bits.

        Every sixteenth column of up to 16 tokens, in fp32: how many carry probability, and the KL between the two
        distributions restricted to them. Worth under 1 % of a chunk.
        """
        if not self.screens or rows.numel() == 0:
            return
        p = self.problem
        assert p.teacher is not None and p.teacher_hidden is not None
        at = rows[:: max(1, rows.numel() // PROBED_ROWS)][:PROBED_ROWS]
        columns = slice(0, self.v, PROBED_STRIDE)
        scale = 1 / p.spec.temperature

        def logits(hidden: Tensor, weight: Tensor, logit_scale: float) -> Tensor:
            z = hidden[at].float() @ weight[columns].float().T
            return torch.log_softmax(z * (logit_scale * scale), -1)

        log_p = logits(p.student_hidden, p.student.weight, p.student.logit_scale)
        log_q = logits(p.teacher_hidden, p.teacher.weight, p.teacher.logit_scale)
        # Restricted to a sixteenth of the columns a probability is sixteen times as large.
        carry = float(((torch.maximum(log_p, log_q) - torch.tensor(PROBED_STRIDE).log()).exp() > MASS).float().mean())
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).median())
        room = kl * self.budget**2
        self.setting = next((i for i, s in enumerate(SETTINGS) if room > s.kl), len(SETTINGS))
        self.screens = carry < MOST and self.setting < len(SETTINGS)
        self.mass = min(MOST_MASS, MASS * max(1.0, room / SETTINGS[0].kl) ** 0.75)

    def chunk(
        self,
        forward: Callable[[Screen | None], tuple[Tensor, Tensor | None]],
        z_s: Tensor,
        scale: Tensor,
        need: bool,
    ) -> tuple[Tensor, Taken | None]:
        """(statistics, what was taken out of the gradient; None where it stays dense in z_s)."""

        def attempt(screen: Screen | None) -> tuple[Tensor, Taken | None, list[float]]:
            values, report = forward(screen)
            loss, noise = (0.0, 0.0)
            if screen is not None and report is not None:
                loss, noise = self.screen_error(report, values, scale, screen.setting.coherence)
            taken, error = self._take(z_s, noise) if need else (None, 0.0)
            return values, taken, [loss, error]

        screened = self.screens
        values, taken, errors = attempt(self._screen() if screened else None)
        # Comparisons that a NaN fails: what cannot be estimated is computed exactly.
        if screened and not all(error <= self.budget for error in errors):
            # Nor will it hold on the chunks to come: they try what is more exact, or no screen where there is none.
            self.setting, self.mass = self.setting + 1, MASS
            self.screens = self.setting < len(SETTINGS)
            screened = False
            values, taken, errors = attempt(None)
        n = z_s.shape[0]
        if screened:
            self.report.screened += n
        elif taken is not None:
            self.report.filtered += n
        else:
            self.report.exact += n
        self.report.error = max(self.report.error, *errors)
        self.report.entries += n * self.v
        self.report.kept += n * self.v if taken is None else sum(p.count for p in taken.pairs)
        return values, taken

    def _screen(self) -> Screen:
        setting = SETTINGS[self.setting]
        if setting.feedback and self._roundings is None:
            assert self.problem.teacher is not None
            teacher = self.problem.teacher.weight[: self.v]
            self._roundings = Rounding(self.directions()), Rounding(Directions.of(teacher))
        student, teacher_rounding = self._roundings if setting.feedback and self._roundings else (None, None)
        return Screen(self.backend, setting, self.mass, student, teacher_rounding)

    def _take(self, g: Tensor, noise: float) -> tuple[Taken | None, float]:
        """Takes the entries of g [n, V] that the budget asks for, leaves the rest in g; and the gradients' error.

        None: g is whole, and dense. `noise`: the screen's, as large as an error of G.
        """
        weight = self.problem.student.weight[: self.v]
        first = self.backend.take_large(g, SHARE * self.budget, MOST)
        if first.dense:
            return None, self._relative(noise, self._energy(g) if noise else 0.0)
        taken = Taken([first], torch.zeros(g.shape[0], weight.shape[1]))
        self.backend.add_pairs_hidden(first, weight, taken.hidden)
        noise = self._relative(noise, taken.energy)
        if taken.energy == 0:
            return taken, noise
        error = math.hypot(noise, left := self._left_out(taken))
        if not error <= self.budget and noise <= NOISE_SHARE * self.budget and math.isfinite(left):
            room = (self.budget**2 - noise**2) ** 0.5
            more = self.backend.take_large(g, 0.8 * room / left, MOST)
            if not more.dense:
                taken.pairs.append(more)
                self.backend.add_pairs_hidden(more, weight, taken.hidden)
                error = math.hypot(noise, self._left_out(taken))
        if error <= self.budget:
            return taken, error
        for pairs in taken.pairs:
            self.backend.restore(pairs, g)
        # A screen that leaves pairs no room would cost dense products: an exact forward pass and pairs are less.
        return None, noise if noise <= NOISE_SHARE * self.budget else math.inf

    @staticmethod
    def _relative(noise: float, energy: float) -> float:
        return noise / max(energy, 1e-300) ** 0.5

    @staticmethod
    def _energy(g: Tensor) -> float:
        """||g||^2, without a copy; a row is summed by one thread."""
        return float(torch.linalg.vector_norm(g, dim=1).double().square().sum())

    def _left_out(self, taken: Taken) -> float:
        return self.left_out(taken.pairs[-1].left, taken.energy, taken.hidden)

    def gradients(
        self,
        taken: Taken,
        rest: Tensor,
        hidden: Tensor,
        at: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> None:
        """Adds a chunk's gradients: rest [n, V] what the pairs left, hidden [n, H], at [n] its rows in d_hidden."""
        if d_hidden is not None:
            d_hidden[at] = self.with_rest(taken.hidden, rest).to(d_hidden.dtype)
        wide = hidden.float().contiguous()
        for pairs in taken.pairs:
            if d_weight is not None:
                self.backend.add_pairs_weight(pairs, wide, d_weight)
            if d_bias is not None:
                self.backend.add_pairs_bias(pairs, d_bias)
        if d_bias is not None:
            d_bias[: self.v] += rest.sum(0)

    def screen_error(self, report: Tensor, values: Tensor, scale: Tensor, coherence: float) -> tuple[float, float]:
        """(estimate of the loss's error, inf where a gate's sign may flip; noise in dH, as large as an error of G).

        report [n, 6] as `_cpu.Pairs.refine` leaves it, values [n, 8] the statistics, scale [n] of the rows' gradients.
        """
        tail = torch.maximum(report[:, 2], report[:, 3])
        variance = report[:, 4] + report[:, 5]
        at_most = self.mass * tail * variance  # bounds the sum over the tail of p^2 times the variance
        ratio = 5 * float(at_most.max().sqrt())
        loss = float((tail * variance).sum() / values[:, KL].abs().sum().clamp(min=1e-300))
        row_weight = (values[:, GATE_WEIGHT] * scale).double()
        noise = coherence * float((row_weight.square() * at_most).sum().sqrt())
        return loss if ratio <= GATE else math.inf, noise
