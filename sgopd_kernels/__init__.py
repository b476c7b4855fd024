"""Fused kernels for sign-gated on-policy distillation. Needs torch alone.

from sgopd_kernels import gated_kl_loss
loss = gated_kl_loss(h_student, w_student, h_teacher, w_teacher, token_ids, verdict)
"""

from . import _extension  # noqa: F401  before torch, which hangs in a subinterpreter where this refuses
from .api import gated_advantage, gated_kl_loss, gated_logprob_loss, gated_topk_kl_loss
from .gate import CORRECT, INCORRECT, PRESETS, UNKNOWN, Gate, resolve_gate
from .loss import Stats, gated_loss
from .options import Head, Options, SampledTeacher, TopKTeacher
from .plans.base import PLANS

__all__ = [
    "CORRECT",
    "INCORRECT",
    "PLANS",
    "PRESETS",
    "UNKNOWN",
    "Gate",
    "Head",
    "Options",
    "SampledTeacher",
    "Stats",
    "TopKTeacher",
    "gated_advantage",
    "gated_kl_loss",
    "gated_logprob_loss",
    "gated_loss",
    "gated_topk_kl_loss",
    "resolve_gate",
]
__version__ = "0.1.0"
