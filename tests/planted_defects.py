# ruff: noqa: E501
"""Plants one defect after another into a copy of the checkout and reports which test caught each.

    python tests/planted_defects.py            # all; needs the build requirements, pytest and Triton
    python tests/planted_defects.py 3 17       # some of them
    python tests/planted_defects.py trainer    # those of the loss, of Triton's kernels, or of the trainer and the study

A defect that no test catches is a missing test. Exit status: the number of those.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from checkout import copy_checkout

MARK = "SGOPD_PLANTED"  # in the environment of every process of a run, however far it has detached itself
PATIENCE = 600.0  # seconds until a run counts as hung, which is a way to notice
GROUPS = ("loss", "triton", "trainer")


class Defect(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    # The trainer's and the study's: files of tests/sgopd, or of another folder, that should notice; of the long ones,
    # one test each.
    tests: str = ""
    device: bool = False  # of what runs on devices: noticed by tests/triton

    @property
    def group(self) -> str:
        return "trainer" if self.tests else "triton" if self.device or self.file == TRITON else "loss"


ROWS = "csrc/cpu/rows.cpp"
TORCH = "sgopd_kernels/backends/torch.py"
TRITON = "sgopd_kernels/backends/triton_kernels.py"
CUDA_ROWS = "csrc/cuda/rows.cuh"
NARROW = "sgopd_kernels/plans/narrow.py"
TENSOR_CORES = "sgopd_kernels/backends/tensor_cores.py"
LOSS = "sgopd_kernels/loss.py"
DIRECTIONS = "sgopd_kernels/plans/directions.py"
ROWS_OF_DATA = "sgopd/rows.py"
CHAT = "sgopd/chat.py"
# fmt: off
DEFECTS = [
    Defect("gate: the sign test turned round", "sgopd_kernels/gate.py", "signed > tolerance, signed <", "signed < tolerance, signed >"),
    Defect("gate: pair's sides swapped", "sgopd_kernels/gate.py", "conflict[0] * correct + conflict[1]", "conflict[1] * correct + conflict[0]"),
    Defect("gate: reliability's complement", "sgopd_kernels/gate.py", "reliability + (1 - reliability) *", "(1 - reliability) + reliability *"),
    Defect("gate: a whole rollout's reliability on correct ones", "sgopd_kernels/gate.py", "torch.where(verdict < 0, limited, weights)", "torch.where(verdict > 0, limited, weights)"),
    Defect("gate: a ceiling that multiplies", "sgopd_kernels/gate.py", "weights.minimum(reliability.double())", "weights * reliability"),
    Defect("gate: rejected rollouts kept", "sgopd_kernels/gate.py", "neutral)]) * kept", "neutral)])"),
    Defect("mean over all tokens, ignored ones too", "sgopd_kernels/ops.py", "(problem.token_ids != problem.options.ignore_index).sum()", "(problem.token_ids == problem.token_ids).sum()"),
    Defect("num_items ignored", "sgopd_kernels/ops.py", "    if denominator is None:", "    if True:"),
    Defect("incoming gradient ignored", "sgopd_kernels/ops.py", "elif not _is_one(grad_loss):", "elif False:"),
    Defect("forward mode gives 0", "sgopd_kernels/ops.py", "    if _inside_derivative():", "    if False:"),
    Defect("num_items as a tensor of 0, or NaN", "sgopd_kernels/ops.py", "(given > 0) & (given < torch.inf)", "given.ge(-1) | True"),
    Defect("a backward that comes later is not reported", "sgopd_kernels/ops.py", "torch.fmax(ctx.report, report, out=ctx.report)", "pass"),
    Defect("log-probabilities above 0", "sgopd_kernels/values.py", "ok = ~(values > ROUNDING) | ignored", "ok = ~(values > values) | ignored"),
    Defect("the sampled estimator of a masked token", "sgopd_kernels/values.py", "masked = (words == -torch.inf)", "masked = (words == torch.inf)"),
    Defect("per-token incoming gradient ignored", "sgopd_kernels/ops.py", "grad_loss.contiguous(), constants", "torch.ones_like(grad_loss), constants"),
    Defect("a chunk's first weight gradient lost", "sgopd_kernels/plans/exact.py", "if out.weight is not None:", "if out.weight is not None and out.weight.any():"),
    Defect("compacted rows not moved", TORCH, "            z[a].copy_(z[b])", "            pass"),
    Defect("teacher's logits from the student's chunk", "sgopd_kernels/plans/exact.py", "project(head.hidden[at],", "project(head.hidden[at if head is p.student else slice(at.numel())],"),
    Defect("fp32 products left to the global setting", TORCH, '                settings.fp32_precision = "ieee"', "                pass"),
    Defect("fp32 products: a setting that was inherited is pinned", TORCH, '            settings.fp32_precision = "none"  # what', "            pass  # what"),
    Defect("autocast reaches into the loss", "sgopd_kernels/driver.py", "with device_guard(device), without_autocast(device):", "with device_guard(device):"),
    Defect("the head's gradient: rows that no chunk has written", "sgopd_kernels/driver.py", "out.weight[0 if out.empty else self.problem.vocabulary :].zero_()", "pass"),
    Defect("the head's gradient: the first chunk adds to what was there", "sgopd_kernels/plans/exact.py", "add=not out.empty, rest", "rest"),
    Defect("compacted rows: gaps filled from the front", "sgopd_kernels/plans/exact.py", "active & (order >= count)", "active & (order < count)"),
    Defect("torch: KL not subtracted in the gradient", TORCH, "p * (ratio - value.unsqueeze(-1))", "p * ratio"),
    Defect("torch: temperature missing in the gradient", TORCH, "(head.logit_scale / temperature)", "(head.logit_scale)"),
    Defect("torch: softcap's slope missing", TORCH, "dense = (dense * slope)", "dense = (dense * 1)"),
    Defect("torch: bias left out", TORCH, "    if head.bias is not None:\n        z +=", "    if False:\n        z +="),
    Defect("rows: the likeliest column takes the others' digits", ROWS, "      add<true>(z, t, count);", "      add<false>(z, t, count);"),
    Defect("cpu: mean of z - t not subtracted", ROWS, "reverse_kl_gradient(e, zb[i] - tb[i], mean.hi, mean.lo)", "reverse_kl_gradient(e, zb[i] - tb[i], 0.f, 0.f)"),
    Defect("cpu: KL from first moments always", ROWS, "value < kPrecise", "value < 0"),
    Defect("cpu: statistics not rescaled at a new maximum", ROWS, "    sum *= factor;", ""),
    Defect("cpu: sampled token's 1 missing", ROWS, "zb[y - first] = static_cast<float>(k.sampled * std::expm1(k.logprob));", "(void)y;"),
    Defect("cpu: advantage not in the sampled gradient", ROWS, "weight * advantage * a.row_scale[n];", "weight * a.row_scale[n];"),
    Defect("cpu: softcap's slope missing", ROWS, "scale * (1.f - th * th)", "scale"),
    Defect("cpu: -inf of the teacher not taken out", ROWS, "    if (t != nullptr) target(t, a.teacher_head);", "    if (t != nullptr) transform(t, a.teacher_head, a.inverse_temperature, first, count);"),
    Defect("cpu: tail of a row beyond a block dropped", ROWS, "first < v; first += kBlock) s.add_block", "first < (v > kBlock ? v - kBlock : v); first += kBlock) s.add_block"),
    Defect("cpu: a NaN importance ratio clipped to a number", ROWS, "ratio > a.ratio_clip ? a.ratio_clip : ratio", "ratio < a.ratio_clip ? ratio : a.ratio_clip"),
    Defect("torch: a softcap unmasks a column", TORCH, "z = torch.where(z == -torch.inf, z, ", "z = torch.where(z == torch.inf, z, "),
    Defect("door: a stride shorter than the row accepted", "csrc/arguments.h", "if (stride < columns)", "if (false)"),
    Defect("pairs: squares of what is left in plain fp32", "csrc/cpu/pair_kernels.cpp", "threshold > 1e-37f ? 1.f / threshold : 1e37f", "1.f"),
    Defect("quantized: the estimate takes another mass than was refined", "sgopd_kernels/plans/quantized.py", "return mass * torch.maximum", "return 1e-4 * torch.maximum"),
    Defect("quantized: feedback with the wrong sign", "csrc/cpu/feedback.h", "x - taken", "x + taken"),
    Defect("quantized: feedback without a limit", "csrc/cpu/int16.h", "constexpr float kMostFeedback = 1.f;", "constexpr float kMostFeedback = 1e9f;"),
    Defect("quantized: feedback left out", "sgopd_kernels/backends/cpu.py", "along=0 if feedback is None else _address(feedback[0])", "along=0 if feedback is None else _address(torch.zeros_like(feedback[0]))"),
    Defect("quantized: a NaN lost at a new maximum", "csrc/cpu/pair_kernels.cpp", "sum *= std::exp(static_cast<double>(highest) - top);", "sum = sum > 0 ? sum * std::exp(static_cast<double>(highest) - top) : 0.0;"),
    Defect("tiles: low limbs left out", "csrc/cpu/tiles.h", "const bool both = (kLowA || kLowB) &&", "const bool both = false &&"),
    Defect("tiles: what lies beyond an edge multiplied too", "csrc/cpu/tiles.h", "Machine::line(x + i * stride, i < rows ? columns : 0)", "Machine::line(x + i * stride, i < rows ? 32 : 0)"),
    Defect("tiles: the sum over chunks in bf16", "csrc/cpu/tiles.h", "rest[c] = static_cast<int8_t>(kept - (rounded << 8));", "rest[c] = 0;"),
    Defect("tiles: one half of a dot product's columns twice", "csrc/cpu/products_bf16.cpp", "w1 = _mm512_load_si512(w + b.strip + word * kTile)", "w1 = w0"),
    Defect("tiles: a part of the width lost", "csrc/cpu/products.cpp", "last_strip = bound(strips, c + 1, columns);", "last_strip = bound(strips, c + 1, columns + (columns > 1));"),
    Defect("blocks: energies of the wrong columns", ROWS, "sum += g[32 * block + i] * g[32 * block + i];", "sum += g[i] * g[i];"),
    Defect("blocks: two numbers where the energy is not", "sgopd_kernels/plans/blocks.py", "order[:coarse]", "order[-coarse:]"),
    Defect("blocks: what rounding costs not estimated", "sgopd_kernels/plans/blocks.py", "factors * numbers.rounding**2 * left", "0 * numbers.rounding**2 * left"),
    Defect("blocks: the noise of fp32 logits not estimated", "sgopd_kernels/plans/blocks.py", "self.numbers.coherence * noise)", "0.0 * noise)"),
    Defect("blocks: rows that weigh nothing take another's place", "sgopd_kernels/plans/blocks.py", "chunk.positions[self.rows]", "chunk.positions[: self.rows.numel()]"),
    Defect("blocks: energies of torch's default dtype", "sgopd_kernels/plans/blocks.py", "dtype=torch.float32, device=z.device", "device=z.device"),
    Defect("blocks: a hidden gradient of torch's default dtype", "sgopd_kernels/plans/blocks.py", "dtype=torch.float32, device=g.device", "device=g.device"),
    Defect("pairs: a hidden gradient of torch's default dtype", "sgopd_kernels/plans/pairs.py", "dtype=torch.float32, device=g.device", "device=g.device"),
    Defect("pairs: directions of torch's default dtype", DIRECTIONS, 'dtype=torch.float32, device="cpu"', 'device="cpu"'),
    Defect("pairs: what lies along directions in torch's default dtype", DIRECTIONS, "dtype=torch.float32, device=weight.device", "device=weight.device"),
    Defect("pairs: tokens to probe chosen in torch's default dtype", DIRECTIONS, "dtype=torch.float32, device=active.device", "device=active.device"),
    Defect("quantized: NaN in the head ends the call", DIRECTIONS, "if not directions.inside.isfinite().all():", "if False:"),
    Defect("a number for all tokens rounded to torch's default dtype", LOSS, "given, dtype=torch.float32, device", "given, device"),
    Defect("a number for all tokens that fp32 does not hold", LOSS, ", -BEYOND, BEYOND)", ")"),
    Defect("the random control drawn in torch's default dtype", LOSS, "torch.rand(count, dtype=torch.float32, device", "torch.rand(count, device"),
    Defect("the random control's rate in torch's default dtype", "sgopd_kernels/gate.py", "(signed > tolerance).sum().float()", "(signed > tolerance).sum()"),
    Defect("verdicts shuffled on torch's default device", LOSS, 'torch.randperm(value.shape[0], device="cpu")', "torch.randperm(value.shape[0])"),
    Defect("an Enum's member kept as an option", "sgopd_kernels/_checks.py", "return choices[choices.index(value)]", "return value"),
    Defect("an Enum's member kept as a divergence", "sgopd_kernels/options.py", 'kind, family = one_of(name, value[0], tuple(DIVERGENCES)),', "kind, family = value[0],"),
    Defect("top k: a softcap unmasks a column", "sgopd_kernels/plans/exact.py", ".masked_fill_(masked, -torch.inf)", ""),
    Defect("top k: no mass where the student masks the tail", "sgopd_kernels/plans/exact.py", "z.masked_fill_(alone.unsqueeze(-1), 0.0)", "pass"),
    Defect("a compiler is told a transposed head's strides", "sgopd_kernels/ops.py", "leaf.new_empty(leaf.shape, dtype=", "torch.empty_like(leaf, dtype="),
    Defect("an ignored token's factor times 0", "sgopd_kernels/problem.py", "self.token_weight.where(self.token_ids != self.options.ignore_index, 0.0)", "self.token_weight"),
    Defect("captured: an ignored token's weight times 0", "sgopd_kernels/driver.py", "weights.masked_fill(~valid, 0.0)", "weights * valid"),
    Defect("fp32 products: the first thread out takes the setting along", TORCH, "while _ieee.before and not _ieee.inside:", "while _ieee.before:"),
    Defect("tiles: a head whose rows lie over one another", "sgopd_kernels/backends/cpu.py", " and tensor.stride(0) >= tensor.shape[1]", ""),
    Defect("tiles: the stride of a dimension of one kept", "sgopd_kernels/backends/cpu.py", "tensor.clone(memory_format=torch.contiguous_format)", "tensor.contiguous()"),
    Defect("cuda: a barrier less", CUDA_ROWS, "    __syncthreads();  // the previous use of `shared` is over\n", ""),
    Defect("cuda: the digits of a sum lost to an offset", CUDA_ROWS, "return (x - max_p) - log(sum_p);", "return x - (max_p + log(sum_p));"),
    Defect("cuda: a cluster's sums read before they are there", CUDA_ROWS, "    cluster_sync();\n    for (int i = thread()", "    for (int i = thread()"),
    Defect("cuda: sums of one call over those of another", CUDA_ROWS, "    turn ^= 1;\n", ""),
    Defect("cuda: copies not waited for", CUDA_ROWS, "    copied();\n", ""),
    Defect("cuda: every block has the first one's columns", CUDA_ROWS, "* blocks + rank) * kThreads", "* blocks) * kThreads"),
    Defect("device: launched while another one is current", "sgopd_kernels/driver.py", "with device_guard(device), without_autocast(device):", "with without_autocast(device):", device=True),
    Defect("device: the host waits twice a chunk", "sgopd_kernels/plans/exact.py", "torch.stack([count, late.sum()]).tolist()", "(int(count), int(late.sum()))", device=True),
    Defect("device: num_items is copied from the host", "sgopd_kernels/loss.py", 'torch.full((), number("num_items", value, expected, 0.0)', 'torch.tensor(number("num_items", value, expected, 0.0)', device=True),
    Defect("device: a value is looked at on the host", "sgopd_kernels/_checks.py", 'ok.device.type in ("cuda", "meta")', 'ok.device.type in ("cuda",)', device=True),
    Defect("a reference beside a teacher without a distribution", "sgopd_kernels/loss.py", "if reference is not None and isinstance(teacher, (SampledTeacher, TopKTeacher)):", "if False:"),
    Defect("duplicates of a top k not looked for", "sgopd_kernels/values.py", "        require(\n            distinct,", "        require(\n            distinct | True,"),
    Defect("device: dW is filled, and then added to", NARROW, "add=not out.empty)", "add=out.weight.zero_() is not None if out.empty else True)", device=True),
    Defect("device: a torch that can't add in place is not asked", TENSOR_CORES, "if adds_in_place(a.device) and (add or factor != 1):", "if add or factor != 1:", device=True),
    Defect("device: fp16 products summed in fp16, where that is allowed", TENSOR_CORES, "settings.allow_fp16_accumulation = False", "pass", device=True),
    Defect("device: fp32 operands lose their low parts", TENSOR_CORES, "if i + j < 2)", "if i + j < 1)"),
    Defect("device: parts of what ignored tokens hold", NARROW, "largest_of_rows(head.hidden)[self.tokens]", "largest_of_rows(head.hidden)"),
    Defect("device: G in fp16 for fp32 heads by \"exact\"", NARROW, "return problem.budget >= error_of(problem) and worthwhile(problem)", "return worthwhile(problem)"),
    Defect("device: tiles of the head but the last lost", NARROW, "add=first > 0)", "add=False)"),
    Defect("triton: the sign test turned round", TRITON, "    signed = d *", "    signed = -d *"),
    Defect("triton: columns beyond the row not masked", TRITON, 'tl.where(inside, z * inverse_temperature, float("-inf"))', "z * inverse_temperature"),
    Defect("triton: last column lost where it begins a block", TRITON, "for first in range(0, V, BLOCK):", "for first in range(0, V - 1, BLOCK):"),
    Defect("triton: mean of z - t not subtracted", TRITON, "((delta - mean_hi) - mean_lo)\n                elif", "delta\n                elif"),
    Defect("triton: moments not centred at the sampled token", TRITON, "0.0, z_y - t_y)", "0.0, 0.0)"),
    Defect("triton: temperature missing in the gradient", TRITON, "scaled * student_scale * inverse_temperature", "scaled * student_scale"),
    Defect("triton: sums not rescaled at a new maximum", TRITON, "        sum_p *= factor", "        pass"),
    Defect("triton: a bound that near models exceed", TRITON, "tl.sqrt(2.0 * p * value) + value", "2.0 * value"),
    Defect("triton: units too small for G", TRITON, "e - 15 + tl.maximum(12 - e, 0) // 3", "e - 19 + tl.maximum(12 - e, 0) // 3"),
    Defect("triton: a divergence's second-order terms by difference", TRITON, "near = tl.abs(u) < 0.2\n", "near = tl.abs(u) < 0.0\n"),
    Defect("triton: a low part is the high one", TRITON, "part = low if (LOW >> i) & 1 else high", "part = high"),
    Defect("triton: a softcap unmasks a column", TRITON, 'tl.where(z == float("-inf"), z, softcap * _tanh(z / softcap))', "softcap * _tanh(z / softcap)"),
]

# A guard of the trainer removed, weakened or turned round; docs/trials.md says what they are for.
FILES = "sgopd/files.py"
CHECKPOINT = "sgopd/checkpoint.py"
METRICS = "sgopd/metrics.py"
FSDP = "sgopd/engines/fsdp.py"
LORA = "sgopd/lora.py"
OPENAI = "sgopd/teachers/openai.py"
REMOTE = "sgopd/teachers/remote.py"
SERVE = "sgopd/teachers/serve.py"
STARTUP = "sgopd/startup.py"
RUN_DIR = "sgopd/run_dir.py"
STUDY = "evidence/study_page.py"
STUDENT_LOSS = "sgopd/student_loss.py"
TRAINER = "sgopd/trainer.py"
VERIFIER = "sgopd/verifier.py"
VLLM = "sgopd/samplers/vllm.py"
PHASES = "sgopd/phases.py"
WEIGHTS = "sgopd/weights.py"
WORKER = "sgopd/verifier_worker.py"
DEFECTS += [
    Defect("trust: r not shrunk to the mean over prompts", PHASES, "(passed + prior * mean) / (tried + prior)", "passed / (tried or 1)", "weights::test_trust_weighs_incorrect_rollouts_by_the_teachers_pass_rate"),
    Defect("trust: what was counted of all prompts lost on resume", PHASES, "zip([0, 0], *self.values())", "zip([0, 0])", "weights::test_reliability_is_shrunk_to_the_mean_over_prompts"),
    Defect("trust: the control deals each prompt its own r", TRAINER, "order[1:] + order[:1]", "order", "weights::test_the_control_deals_reliability_to_other_prompts"),
    Defect("trust: r of rollouts without a verdict", TRAINER, 'one.source == "student" and one.verdict != UNKNOWN', 'one.source == "student"', "weights::test_the_students_own_pass_rate_in_place_of_the_teachers"),
    Defect("q-protect: in correct rollouts too", WEIGHTS, "r if told.verdict < 0 else", "r if told.verdict else", "weights::test_a_rule_is_its_formula"),
    Defect("rules: tokens taken for another rollout's", WEIGHTS, "column.split(counts.tolist())", "column.split(counts.flip(0).tolist())", "weights::test_a_rule_is_its_formula"),
    Defect("prompt weight: the teacher's pass rate", PHASES, "p = self.attempts.rate(", "p = self.probes.rate(", "weights::test_prompts_weigh_by_the_students_pass_rate_and_tokens_by_their_place"),
    Defect("prompt weight: exponents swapped", PHASES, "a, b = self.config.prompt_weight", "b, a = self.config.prompt_weight", "weights::test_prompts_weigh_by_the_students_pass_rate_and_tokens_by_their_place"),
    Defect("prompt weight: a rule's weights replaced", "sgopd/student_loss.py", 'weights[part] * choices.get("token_weight", 1.0)', "weights[part]", "weights::test_prompts_weigh_by_the_students_pass_rate_and_tokens_by_their_place"),
    Defect("position weight: counted from the prompt's first token", WEIGHTS, "len(one.prompt_ids) - 1 for", "0 for", "weights::test_prompts_weigh_by_the_students_pass_rate_and_tokens_by_their_place"),
    Defect("reward: the group's mean not taken off", WEIGHTS, "(one.verdict == CORRECT) - mean", "(one.verdict == CORRECT) - 0.0", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("reward: the teacher's rollouts in the group", WEIGHTS, 'if one.source == "student" and one.verdict != UNKNOWN:', "if one.verdict != UNKNOWN:", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("reward: pushed the other way", "sgopd/student_loss.py", "loss + config.reward_weight * reward", "loss - config.reward_weight * reward", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("tgopd: one probe in three is enough", PHASES, "2 / 3 if threshold is None", "1 / 3 if threshold is None", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("tgopd: the reward where the teacher is followed too", WEIGHTS, "one.advantage * (1.0 - one.reliability)", "one.advantage", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("diffgate: the easier the prompt, the more of the teacher", WEIGHTS, "one.weight *= 1.0 - mean", "one.weight *= mean", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("diffgate: no bound", WEIGHTS, "x.tanh() / x.clamp", "x / x.clamp", "weights::test_the_task_reward_is_the_policy_gradient_on_the_groups_advantage"),
    Defect("gate: a control that is not passed on", WEIGHTS, '"reliability", "control")', '"reliability")', "weights::test_a_control_has_the_weights_of_its_gate"),
    Defect("gate: what is not read is passed over", "sgopd/startup.py", "if (value := getattr(config, name)) != default[name]", "if (value := default[name]) != default[name]", "weights::test_what_is_not_read_is_said"),
    Defect("rg-opd: against the verdict", WEIGHTS, "told.verdict * told.logratio.sum()", "-told.verdict * told.logratio.sum()", "weights::test_a_rule_is_its_formula"),
    Defect("rg-opd: no margin", WEIGHTS, "> config.gate_margin", "> 0", "weights::test_a_rule_is_its_formula"),
    Defect("r2-opd: the verdict left out", WEIGHTS, "config.gate_sharpness * told.verdict * d", "config.gate_sharpness * d", "weights::test_a_rule_is_its_formula"),
    Defect("r2-opd: the sum of |d| not kept", WEIGHTS, "gate * (size[finite].sum() / kept if kept > 0 else 2.0)", "gate * 2.0", "weights::test_a_rule_is_its_formula"),
    Defect("r2-opd: the mean for the median", WEIGHTS, "size[finite].quantile(0.5)", "size[finite].mean()", "weights::test_a_rule_is_its_formula"),
    Defect("r2-opd: 0 times infinity", WEIGHTS, "or config.gate_sharpness == 0 or", "or", "weights::test_what_is_infinite_in_a_rollout_weighs_a_finite_number"),
    Defect("r2-opd: truncated rollouts weighed", WEIGHTS, "told.verdict == 0 or told.truncated or", "told.verdict == 0 or", "weights::test_a_rule_is_its_formula"),
    Defect("a folder gets its name before it is on the disk", FILES, "                sync(path)\n            if target", "                pass\n            if target", "chaos::test_what_is_replaced_is_whole_wherever_the_power_is_cut"),
    Defect("a file gets its name before it is on the disk", FILES, "            sync(temporary)\n", "", "chaos::test_what_is_replaced_is_whole_wherever_the_power_is_cut"),
    Defect("a folder is replaced by way of none", FILES, "if swap and swap(", "if False and swap(", "files"),
    Defect("a failed write leaves half a file", FILES, "            temporary.unlink(missing_ok=True)\n            raise", "            raise", "files"),
    Defect("the run directory's lock shared", FILES, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "files"),
    Defect("checkpoint: sums not compared", CHECKPOINT, "if digest(file) != sha256:", "if False:", "files checkpoint::test_damage_is_noticed"),
    Defect("checkpoint: one without its optimiser passes for whole", CHECKPOINT, '("*.safetensors", STATE, OPTIMIZER, RANDOM)', '("*.safetensors", STATE)', "files"),
    Defect("checkpoint: all damaged, so from the start", CHECKPOINT, "    if skipped:  #", "    if False:  #", "files"),
    Defect("checkpoint: the best one deleted with the others", CHECKPOINT, "if path != best and not", "if not", "checkpoint::test_the_best_checkpoint_is_never_deleted"),
    Defect("checkpoint: unpickled whole", CHECKPOINT, "weights_only=True", "weights_only=False", "safety"),
    Defect("checkpoint: saved with an earlier step's avg@k", CHECKPOINT, "self.metric if self.evaluated_at == self.step else None", "self.metric", "checkpoint::test_a_checkpoint_has_the_avg_at_k_of_its_own_step"),
    Defect("checkpoint: a step saved by a signal stays without its avg@k", TRAINER, "            self.state.saved_at = None  #", "            #", "checkpoint::test_a_checkpoint_has_the_avg_at_k_of_its_own_step"),
    Defect("checkpoint: saved before its records are on the disk", TRAINER, "            self.metrics.sync()\n", "", "trainer"),
    Defect("resume: records not compared", RUN_DIR, "    if own:\n        check_records", "    if False:\n        check_records", "checkpoint::test_records_that_changed_or_went_are_no_ground_to_go_on_from"),
    Defect("resume: records' sum not compared", METRICS, 'if hashlib.sha256(content).hexdigest() != state.get', 'if False and state.get', "files"),
    Defect("resume: random states of another run's", TRAINER, "        checkpoint.set_random_state(random_states[self.processes.rank])\n", "", "trainer"),
    Defect("resume: another number of processes accepted", TRAINER, "if before != now and not self.config.fsdp:", "if False:", "trainer"),
    Defect("resume: later checkpoints stay", TRAINER, "                if checkpoint.step_of(path) > self.state.step:\n", "                if False:\n", "checkpoint::test_what_came_after_the_checkpoint_goes_before_anything_is_written"),
    Defect("shards: the gradient's mean over the processes in place of its sum", FSDP, "                group.set_gradient_divide_factor(1.0)\n", "", "fsdp"),
    Defect("shards: the optimiser begins anew", FSDP, "            dcp.load({\"state\": own[\"state\"]}, storage_reader=Reader(str(folder / SHARDS)))", "            pass", "fsdp"),
    Defect("shards: their list unpickled whole", FSDP, "if (module, name) not in Reader.ALLOWED:", "if False:", "fsdp"),
    Defect("adapters: new ones on resuming", LORA, "    fill(model, weights, source)\n", "", "lora"),
    Defect("adapters: on the head, too", LORA, "if module is model.get_output_embeddings():", "if False:", "lora"),
    Defect("adapters: others on each process", LORA, "            torch.manual_seed(seed)\n", "", "fsdp"),
    Defect("adapters: merged without their scale", LORA, "B @ A * module.scaling[NAME]", "B @ A", "lora"),
    Defect("adapters: any weights below them on resuming", TRAINER, '"base": checkpoint.weights_digest(base) if base is not None else None', '"base": None', "lora"),
    Defect("sampler: a tied head left out", VLLM, "                if tied := tied_head(self.model):", "                if tied := None:", "samplers"),
    Defect("sampler: weights of the first step alone", VLLM, "        if step != self.step:", "        if self.step is None:", "samplers"),
    Defect("sampler: other weights accepted", VLLM, "if not gap.mean() <= self.config.sampler_tolerance:", "if False:", "samplers"),
    Defect("sampler: choices in the order in which they come", VLLM, 'key=lambda one: one["index"]', "key=lambda one: 0", "samplers"),
    Defect("sampler: cut answers accepted", VLLM, "if len(ids) != len(logprobs) or not", "if False and not", "samplers"),
    Defect("sampler: the adapters' part not handed over", TRAINER, "lora.merged(self.student, self.engine.weights())", "lora.base_weights(self.engine.weights())", "samplers"),
    Defect("importance of single tokens in place of rollouts", STUDENT_LOSS, "now.new_zeros(len(batch.rollouts)).index_add(0, batch.rows, now - then)", "(now - then)[:len(batch.rollouts)]", "samplers"),
    Defect("importance not clipped", STUDENT_LOSS, "total.clamp(max=math.log(clip)).exp()", "total.exp()", "samplers"),
    Defect("served teacher: choices in the order in which they come", OPENAI, 'sorted(reply.json()["choices"], key=lambda choice: choice["index"])', 'list(reply.json()["choices"])', "teachers"),
    Defect("served teacher: scores one token late", OPENAI, "found.append((text[start:], entries[start:]))", "found.append((text[start:], entries[start - 1 :]))", "teachers"),
    Defect("served teacher: what is not finite accepted", OPENAI, 'if not all(finite(one["logprob"])', 'if not all(True or finite(one["logprob"])', "teachers"),
    Defect("served teacher: the own token left to the top k", OPENAI, 'return [(id, entry[str(id)]["logprob"]), *likeliest[: k - 1]]', "return likeliest[:k]", "teachers"),
    Defect("served teacher: other weights in the middle not noticed", REMOTE, "        if not distance <= SAME:", "        if False:", "teachers"),
    Defect("served teacher: the copy not compared", REMOTE, "        if not distances.median() <= 0.05:", "        if False:", "teachers"),
    Defect("serve-teacher: any key", SERVE, "if key is not None and not hmac", "if False and not hmac", "teachers"),
    Defect("serve-teacher: a body of any size", SERVE, "if len(body) > options.max_body:", "if False:", "teachers"),
    Defect("serve-teacher: positions one late", SERVE, "start - 1 : len(text) - 1]", "start : len(text)]", "teachers"),
    Defect("a run in the folder of another", RUN_DIR, "        if used:\n            raise", "        if False:\n            raise", "cli::test_a_run_is_never_overwritten"),
    Defect("update: a gradient that is not finite applied", TRAINER, '(("loss", measured["loss"]), ("gradient", norm))', '(("loss", measured["loss"]),)', "numbers"),
    Defect("plan: the gradient beside all that was kept", "sgopd/plan.py", "    if micro >= rollouts:", "    if False:", "plan"),
    Defect("plan: the teacher's probes cost nothing", "sgopd/plan.py", "    if teachers and config.teacher_probes:", "    if False:", "plan"),
    Defect("plan: an adapter's folder taken for a model", "sgopd/plan.py", "    base, rank = lora.base_of(config.model_name_or_path, config)", "    base, rank = config.model_name_or_path, config.lora_r", "plan"),
    Defect("plan: attention keeps no masks", "sgopd/plan.py", 'if not attention.startswith(("flash", "flex")):', "if False:", "plan"),
    Defect("transformers' Trainer: evaluation finds no outputs", "sgopd/integrations/hf_trainer.py", "return (loss, {}) if", "return (loss, None) if", "integrations_hf_trainer"),
    Defect("transformers' Trainer: arguments by position not looked at", "sgopd/integrations/hf_trainer.py", "if self.args.remove_unused_columns:", 'if "args" in kwargs and kwargs["args"].remove_unused_columns:', "integrations_hf_trainer"),
    Defect("hub: a push that fails ends the run", "sgopd/hub.py", "        except Exception as error:\n            self.say(", "        except KeyError as error:\n            self.say(", "hub"),
    Defect("hub: a lost checkpoint is not said", "sgopd/hub.py", "if self.pushing is not None and (error :=", "if False and (error :=", "hub"),
    Defect("hub: paths of this machine in the card", "sgopd/hub.py", "return name if named else None", "return name", "hub"),
    Defect("hub: optimiser and random states are pushed", "sgopd/hub.py", "ignore_patterns(*OURS)", "ignore_patterns()", "hub"),
    Defect("hub: a checkpoint is pruned while it is uploaded", "sgopd/hub.py", "folder_path=copy", "folder_path=folder", "hub"),
    Defect("teachers: a rollout's scores are another one's", "sgopd/teachers/__init__.py", "one.part(place[index[which == number]])", "one.part(place[index[which == number]].flip(0))", "routed::test_each_rollout_is_taught_by_its_own_teacher"),
    Defect("teachers: statistics in the order of the calls", "sgopd/student_loss.py", "order = torch.cat(places).argsort()", "order = torch.arange(len(token_ids))", "routed::test_each_rollout_is_taught_by_its_own_teacher"),
    Defect("teachers: numbers of those that the batch lacks", "sgopd/teachers/routed.py", "torch.bucketize(which_B, torch.tensor(present))", "which_B - 0", "routed::test_each_rollout_is_taught_by_its_own_teacher"),
    Defect("teachers: all write by the first", "sgopd/teachers/routed.py", "[self.numbers[example] for example in examples])", "[0 for example in examples])", "routed::test_each_teacher_writes_for_its_own_prompts"),
    Defect("teachers: resumed with prompts given to others", "sgopd/teachers/routed.py", "return routes and all(", "return all(", "routed::test_it_resumes_to_the_bit_and_other_routes_are_refused"),
    Defect("update: forward passes beyond the limit of tokens", "sgopd/rollout.py", "length * (end + 1 - starts[-1])) > limit", "length * (end - starts[-1])) > limit", "trainer::test_forward_passes_by_tokens_are_the_update_of_fixed_ones"),
    Defect("padding-free: each text's positions go on from the last one's", "sgopd/rollout.py", "expand_as(ids_BT)[there]", "expand_as(ids_BT)[there] * 0 + torch.arange(int(there.sum()), device=device)", "padding_free"),
    Defect("padding-free: hidden states of the first text", "sgopd/rollout.py", "starts[rows] + columns), rows", "columns), rows", "padding_free"),
    Defect("padding-free: a model that mixes texts is trained", "sgopd/model_checks.py", "        check_packing(model, setting, tokens, config.bf16)\n", "        pass\n", "padding_free"),
    Defect("update: some processes make more forward passes", TRAINER, "max(self.processes.gather([len(parts)]))", "len(parts)", "fsdp::test_shards_train_as_one_process_does_and_go_on_with_another_number_of_them"),
    Defect("update: left out without being counted", TRAINER, "            self.state.skipped += 1\n", "", "numbers"),
    Defect("update: no limit to those left out", TRAINER, "if (skipped := self.state.skipped) >= config.max_skipped_steps:", "if (skipped := 0):", "numbers"),
    Defect("rollouts: logits that are not finite sampled from", "sgopd/rollout.py", "if broken := int((~largest.isfinite()).sum()):", "if broken := 0:", "numbers"),
    Defect("rollouts: what was read of a prompt goes on as another one", "sgopd/rollout.py", "places[tuple(prompt)] for prompt in prompts", "row % len(places) for row, _ in enumerate(prompts)", "rollout"),
    Defect("rollouts: weights rounded to bfloat16 in every step", "sgopd/rollout.py", "model.device.type, torch.bfloat16, enabled=sampling.bf16", "model.device.type, torch.bfloat16, enabled=sampling.bf16, cache_enabled=False", "rollout"),
    Defect("weights not looked at before they are saved", TRAINER, "            self.check_weights()\n", "", "numbers"),
    Defect("weights not looked at when they are loaded", "sgopd/models.py", "if not torch.isfinite(parameter).all():", "if not torch.isfinite(parameter).any():", "startup numbers"),
    Defect("config: names of other libraries lead to the nearest spelling", "sgopd/config.py", "near = [meant] if meant in known else", "near =", "config cli"),
    Defect("model: a folder that is not there is called a hub name", "sgopd/models.py", "if not Path(path).exists() and (", "if not Path(path).exists() and False and (", "startup"),
    Defect("model: code beside it is run", "sgopd/models.py", "attn_implementation=config.attn_implementation,\n            trust_remote_code=config.trust_remote_code", "attn_implementation=config.attn_implementation,\n            trust_remote_code=True", "safety"),
    Defect("model: a pickle is unpickled", "sgopd/models.py", "weights_only=True", "weights_only=False", "safety"),
    Defect("prompts: over-long ones kept", "sgopd/data.py", "len(ids) > config.max_prompt_length", "False", "data"),
    Defect("data: an answer that is true taken for a number", ROWS_OF_DATA, "isinstance(value, int) and not isinstance(value, bool)", "isinstance(value, int)", "data"),
    Defect("data: an answer that is not finite", ROWS_OF_DATA, "(float, Decimal)) and math.isfinite(value):", "(float, Decimal)):", "data"),
    Defect("data: float32 read as a double", ROWS_OF_DATA, "kind.bit_width < 64", "kind.bit_width < 32", "data"),
    Defect("data: half a character let through", ROWS_OF_DATA, "        text.encode()\n", "        pass\n", "data"),
    Defect("data: the assistant's turn last", ROWS_OF_DATA, 'if role == "assistant":', "if False:", "data"),
    Defect("data: the last of two keys", ROWS_OF_DATA, "if len(row := dict(pairs)) < len(pairs):", "if len(row := dict(pairs)) < 0:", "data"),
    Defect("prompts: the tokenizer's end of sequence stays", "sgopd/data.py", "while len(ids) > 1 and", "while False and", "chat"),
    Defect("prompts: two beginnings", "sgopd/data.py", "        del ids[0]\n", "        pass\n", "chat"),
    Defect("chat: parts written out as Python has them", CHAT, "any(str(content) in text for content in parts)", "False", "chat"),
    Defect("chat: the clock's handler stays", CHAT, "        signal.signal(signal.SIGALRM, handler)", "        pass", "chat"),
    Defect("chat: any role", CHAT, "if role not in ROLES and", "if False and", "data chat"),
    Defect("config: importance beside a filter", "sgopd/config.py", "        if self.importance_clip is not None:", "        if False:", "config"),
    Defect("checkpoint: that it cannot be the best is not said", STARTUP, "    if both == save:", "    if True:", "weights::test_checkpoints_that_cannot_be_the_best_are_said"),
    Defect("config: the last of two keys", "sgopd/config.py", "and key.value in lines:", "and False:", "config"),
    Defect("prompts: no room in a table of positions", STARTUP, "if has_position_table(model, room):", "if False:", "startup numbers"),
    Defect("evaluate: questions are not looked at", "sgopd/evaluate.py", "tell(check_prompts(of, None, questions, tokenizer, {whose: model}))", "pass", "evaluate"),
    Defect("phases: a teacher rollout of unknown verdict enters", TRAINER, "if rollout.in_teacher_slot and rollout.verdict == CORRECT:", "if rollout.in_teacher_slot and rollout.verdict >= 0:", "trainer"),
    Defect("phases: an unknown verdict counts against the teacher", PHASES, "            if verdict != UNKNOWN:\n                self.probes", "            if True:\n                self.probes", "phases"),
    Defect("trust: one prompt dealt to itself", TRAINER, "            if len(examples) == 1:", "            if False:", "weights"),
    Defect("trust: no r for rollouts that are told incorrect", TRAINER, 'or self.gate.control == "shuffled":', "or False:", "weights"),
    Defect("phases: reliability not kept over a resume", PHASES, "for example, counts in state.items()})", "for example, counts in ()})", "phases"),
    Defect("trainer: a failing evaluation takes the student with it", TRAINER, "                        if self.state.step:\n                            self.save()\n", "", "runs::test_what_was_learned_outlives_an_evaluation_that_fails"),
    Defect("verifier: R and r are one letter", "sgopd/math_equality.py", "lowercase_symbols=False", "lowercase_symbols=True", "verifier::test_letters_stay_apart_and_the_same"),
    Defect("verifier: n is another letter beside an i", "sgopd/math_equality.py", "Symbol(name, real=True) for symbol", "symbol for symbol", "verifier::test_letters_stay_apart_and_the_same"),
    Defect("verifier: a power of T is a transposition", "sgopd/math_equality.py", 'r"^{\\\\mathbf{T}}"', 'r"^{T}"', "verifier::test_letters_stay_apart_and_the_same"),
    Defect("verifier: no deadline", VERIFIER, "if worker.deadline <= time.monotonic()]:", "if False]:", "verifier::test_what_reaches_sympy_is_killed_at_the_deadline"),
    Defect("verifier: twice the memory", WORKER, "int(memory_mb) * 2**20", "int(memory_mb) * 2**21", "verifier::test_a_worker_is_limited_and_goes_before_the_trainer"),
    Defect("verifier: what a worker detached lives on", WORKER, "and _has_children():", "and False:", "verifier::test_what_a_verifier_detached_ends_with_its_worker"),
    Defect("verifier: a dead worker is given work", VERIFIER, "self.ready and self.task is None and alive and not self._poll.poll(0)", "self.ready and self.task is None", "verifier::test_a_worker_killed_while_idle_costs_nothing"),
    Defect("verifier: dead workers not replaced", VERIFIER, "                    self._fill()\n", "", "verifier::test_a_bad_response_harms_only_itself"),
    Defect("verifier: workers outlive the trainer", WORKER, ".prctl(PR_SET_PDEATHSIG, number)", ".prctl(0, 0)", "verifier::test_no_orphans_when_the_trainer_is_killed"),
    Defect("verifier: the trainer dies before a worker does", WORKER, 'write_text("1000")', 'write_text("0")', "verifier::test_a_worker_is_limited_and_goes_before_the_trainer"),
    Defect("verifier: late replies read as the next ones", VERIFIER, "if worker.task is not None]:\n                    self._discard(worker)", "if False]:\n                    self._discard(worker)", "verifier::test_an_interrupt_leaves_no_stale_reply"),
    Defect("verifier: a truncated response is read", VERIFIER, "skip = cut and self.truncated_is_incorrect", "skip = False", "verifier::test_truncated_responses"),
    Defect("verifier: one that cannot start shows our exception's name", WORKER, "    except CannotStart as error:", "    except KeyError as error:", "verifier::test_a_verifier_that_cannot_start_is_an_error"),
    Defect("verifier: a crash is an incorrect answer", VERIFIER, '"crashed": UNKNOWN', '"crashed": INCORRECT', "verifier::test_a_bad_response_harms_only_itself"),
    Defect("verifier: an error while reading ends the run", VERIFIER, "except Exception as error:  # whatever a model", "except MemoryError as error:  # whatever a model", "hostile::test_an_error_while_reading_an_answer_is_a_verdict"),
    Defect("health: nothing is said in time", TRAINER, "                    self.check_health()\n", "                    pass\n", "watch"),
    Defect("health: weights of 0 pass", "sgopd/report/checks.py", "if mean < LEAST_WEIGHT:", "if mean < 0:", "report"),
    Defect("health: only the last update of a batch is looked at", TRAINER, "if self.state.step % config.logging_steps < config.num_iterations:", "if due(self.state.step, config.logging_steps):", "watch::test_a_logged_update_inside_a_batch_is_looked_at_when_the_batch_is_done"),
    Defect("health: weights of 0 beside a reward that teaches", "sgopd/report/checks.py", "    if taught > 0:", "    if False:", "report"),
    Defect("health: the KL to a teacher that the reward leads away from", "sgopd/report/checks.py", 'if course.trends["reward/taught"].total > 0:', "if False:", "report"),
    Defect("health: prompt weights taken for the gate's", "sgopd/report/checks.py", "if course.settings.get(one) is not None]:", "if False]:", "report"),
    Defect("health: a resumed run judged by its first settings", TRAINER, "self.health.course.settings = settings", "_ = settings", "checkpoint::test_a_resumed_run_is_checked_by_the_settings_that_it_has_now"),
    Defect("health: settings of a run that trains not known", "sgopd/report/course.py", "            self.settings = record\n", "            pass\n", "report"),
    Defect("health: what was said before is said again", "sgopd/report/checks.py", "        self.said |= {", "        self.said &= {", "watch"),
    Defect("watch: a model's text moves the cursor", "sgopd/watch.py", "character.isprintable()", "character", "watch"),
    Defect("signal: only the process that got it leaves", TRAINER, "processes.any(interrupt.signal)", "interrupt.signal", "cli::test_a_signal_to_one_of_two_processes_ends_both"),
    Defect("signal: a second one waits too", "sgopd/processes.py", "            raise KeyboardInterrupt\n", "            return\n", "checkpoint::test_a_second_signal_does_not_wait"),
    Defect("signal: the status of a run that is done", "sgopd/cli.py", "return 128 + trainer.stopped_by", "return 0", "checkpoint::test_a_signal_gives_the_conventional_exit_status"),
    Defect("completions: agreement turned round", "sgopd/completions.py", "(signed > tolerance).float() - (signed < -tolerance)", "(signed < -tolerance).float() - (signed > tolerance)", "inspector"),
    Defect("completions: the verdict instead of what the gate was told", "sgopd/completions.py", '"gate_verdict": int(verdict[0])', '"gate_verdict": rollout.verdict', "inspector"),
    Defect("completions: the bound on tokens ignored", "sgopd/completions.py", "rollout.completion.ids[:limit]", "rollout.completion.ids[:]", "inspector"),
    Defect("inspector: a token's bytes in the wrong order", "sgopd/report/inspector.py", "values.dtype.itemsize).T.tobytes()", "values.dtype.itemsize)[:, ::-1].T.tobytes()", "inspector"),
    Defect("inspector: numbers rounded down", "sgopd/report/inspector.py", "(bits + half) & mask", "bits & mask", "inspector"),
    Defect("inspector: texts of a file at their full length", "sgopd/report/inspector.py", "cut(text, PIECE_SHOWN)", "text", "inspector"),
    Defect("report: any script may run in it", "sgopd/report/__init__.py", "f\"script-src 'sha256-{", "f\"script-src 'unsafe-inline' 'sha256-{", "inspector"),
    Defect("report: a difference without its pairs", "sgopd/scores.py", "mean_and_se([b - a for a, b in zip(before, after)])", "mean_and_se([b - a for a, b in zip(sorted(before), reversed(sorted(after)))])", "compare report::test_changes_are_paired_by_question"),
    Defect("report: other questions are paired as well", "sgopd/report/run.py", 'before.get("eval/questions_sha256") != after', 'before.get("eval/k") != after', "report::test_changes_are_paired_by_question"),
    Defect("comparison: a seed is a configuration", "sgopd/report/compare.py", '{"seed", "run_name"', '{"run_name"', "compare"),
    Defect("comparison: a seed that is there twice", "sgopd/report/compare.py", "if seed is not None and seed in first:", "if False:", "compare"),
    Defect("comparison: a run that did not end passes for whole", "sgopd/report/compare.py", "for run in runs if not run.finished]", "for run in runs if False]", "compare"),
    Defect("comparison: evaluations of other updates not said", "sgopd/report/compare.py", "if len(set(steps.values())) > 1:", "if False:", "compare"),
    Defect("comparison: seeds dealt to others", "sgopd/report/compare.py", "[ours[seed] for seed in common]", "[ours[seed] for seed in reversed(common)]", "compare"),
    Defect("study: paired with another seed", STUDY, "cell._replace(arm=base)", "cell._replace(arm=base, seed=0)", "tools/evidence::test_comparisons_are_paired_by_cell"),
    Defect("study: paired with other models", STUDY, "if other is None or models_of(line) != models_of(other):", "if other is None:", "tools/evidence::test_comparisons_are_paired_by_cell"),
    Defect("study: a seed with other models counts", STUDY, "and len({models_of(runs[seed, arm]) for arm in arms}) == 1", "", "tools/evidence::test_the_real_models_table_takes_whole_seeds"),
    Defect("study: answers of another number in the real model's table", STUDY, "if (cell.part, cell.teacher) == (part, teacher) and cell", "if cell.teacher == teacher and cell", "tools/evidence::test_the_real_models_table_takes_whole_seeds"),
    Defect("study: seeds that had been seen count as unseen", STUDY, " and cell.seed >= first", "", "tools/evidence::test_the_real_models_table_takes_whole_seeds"),
    Defect("study: one seed decides the best rate", STUDY, "if paired is None or not paired.freedom:", "if paired is None:", "tools/evidence::test_the_best_rate_is_judged_by_seeds_that_ran_with_all"),
    Defect("study: variances of means without Bessel's correction", STUDY, "square / (n - 1) / n for", "square / n / n for", "tools/evidence::test_statistics_against_tables_and_by_hand"),
    Defect("study: no correction for the number of comparisons", STUDY, "self.se * t_quantile(1 - 0.025 / comparisons", "self.se * t_quantile(1 - 0.025", "tools/evidence::test_statistics_against_tables_and_by_hand"),
    Defect("study: what seeds have in common is noise", STUDY, "values[s][a] - of_arm[a] - of_seed[s] + whole", "values[s][a] - of_arm[a]", "tools/evidence::test_few_seeds_of_many_arms"),
    Defect("report: an axis label in two notations", "sgopd/report/figures.py", "                written = powers", "                pass", "report::test_the_labels_of_an_axis_fit_beside_it_in_one_notation"),
]
# fmt: on
KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "products",
        "blocks",
        "parity",
        "api",
        "ops",
        "options",
        "sparse",
        "fuzz_native",
        "door",
        "topk",
        "cuda_host",
        "tensor_cores",
    )
]
# Where a defect of a file shows soonest: that is asked first.
SOONEST = {
    "sgopd_kernels/gate.py": "options api",
    "sgopd_kernels/ops.py": "ops",
    "sgopd_kernels/values.py": "api",
    "sgopd_kernels/driver.py": "ops",
    "sgopd_kernels/plans/exact.py": "parity topk",
    "sgopd_kernels/plans/pairs.py": "parity sparse",
    DIRECTIONS: "parity sparse",
    LOSS: "door parity",
    "sgopd_kernels/problem.py": "door",
    "sgopd_kernels/options.py": "door",
    "sgopd_kernels/_checks.py": "door",
    "sgopd_kernels/plans/blocks.py": "blocks",
    "sgopd_kernels/plans/quantized.py": "sparse",
    "sgopd_kernels/backends/cpu.py": "sparse",
    "csrc/arguments.h": "door",
    "csrc/cpu/pair_kernels.cpp": "sparse",
    "csrc/cpu/feedback.h": "sparse",
    "csrc/cpu/int16.h": "sparse",
    ROWS: "parity options",
    TORCH: "parity options",
    CUDA_ROWS: "cuda_host",
    TENSOR_CORES: "tensor_cores",
    NARROW: "tensor_cores",
}
INTERPRETED = "tests/triton/interpreted.py"  # in a process of its own: nothing may have imported Triton before


def build(checkout: Path) -> None:
    environment = {**os.environ, "SGOPD_CUDA": "0"}
    commands = [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    if made := [str(folder) for folder in checkout.glob("build/*/cmake")]:  # then only what has changed
        commands = [["cmake", "--build", *made, "--parallel"], ["cmake", "--install", *made]]
    for command in commands:
        subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


def file_of(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"tests/{folder or 'sgopd'}/test_{file}.py"


def tests_of(defect: Defect) -> list[str]:
    if defect.tests:
        names = (word.partition("::") for word in defect.tests.split())
        return [f"{file_of(file)}{colons}{test}" for file, colons, test in names]
    if defect.group == "triton":
        return ["tests/triton/test_plan.py", INTERPRETED]
    soonest = [f"tests/kernels/test_{name}.py" for name in SOONEST.get(defect.file, "products").split()]
    return list(dict.fromkeys([*soonest, *KERNEL_TESTS]))


def failures(checkout: Path, tests: list[str], patience: float = PATIENCE, first: bool = True) -> list[str]:
    """The tests that fail in a built checkout, or the first one; or what went wrong in other ways."""
    parts: tuple[list[str], list[str]] = [], []
    for one in tests:
        parts[one.startswith(INTERPRETED)].append(one)
    found: list[str] = []
    for part in parts:
        if part and not (first and found):
            found += run(checkout, part, patience, first)
    return found


def run(checkout: Path, tests: list[str], patience: float, first: bool) -> list[str]:
    environment = {**os.environ, "SGOPD_TEST_SOURCE": "1", "PYTHONPATH": str(checkout), MARK: str(checkout)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a defect may be as long as what it stands for
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-k", "not peak_memory", *tests, *["-x"] * first]
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, errors="replace", timeout=patience
        )
    except subprocess.TimeoutExpired:
        return [f"no end after {patience:g} s"]
    finally:
        end_left_behind(str(checkout))
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not lines and done.returncode:
        return [f"pytest itself failed: {done.stdout[-500:]}{done.stderr[-500:]}"]
    return [line.partition(" ")[2].partition(" - ")[0] for line in lines]


def end_left_behind(mark: str) -> None:
    """Some defects are processes that nobody ends."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


@contextlib.contextmanager
def planted(checkout: Path, defect: Defect) -> Iterator[None]:
    """The built checkout with the defect in it; what is C++ is built with it, and without it again."""
    path = checkout / defect.file
    text = path.read_text()
    assert text.count(defect.before) >= 1, f"{defect.what}: {defect.before!r} is not in {defect.file}"
    for content in (text.replace(defect.before, defect.after, 1), text):
        path.write_text(content)
        if defect.file.startswith("csrc/"):
            build(checkout)
        if content != text:
            yield


def main() -> int:
    words = sys.argv[1:]
    chosen = [n for n, d in enumerate(DEFECTS, start=1) if not words or str(n) in words or d.group in words]
    if not chosen:
        raise SystemExit(f"nothing of that name: {' '.join(words)}; expected numbers to {len(DEFECTS)} or {GROUPS}")
    found: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as name:
        built = copy_checkout(Path(name) / "checkout")
        build(built)
        for number in chosen:
            defect = DEFECTS[number - 1]
            with planted(built, defect):
                found[defect.what] = next(iter(failures(built, tests_of(defect))), None)
            print(f"{number:3}  {defect.what:62}  {found[defect.what] or 'NOT CAUGHT'}", flush=True)
        # What caught one has to pass without any; where no test is named, all of its tests have.
        asked = {
            defect.what: [caught] if caught.startswith("tests/") else tests_of(defect)
            for defect in (DEFECTS[number - 1] for number in chosen)
            if (caught := found[defect.what])
        }
        broken = failures(
            built, sorted({test for tests in asked.values() for test in tests}), 12 * PATIENCE, first=False
        )
    for what, tests in asked.items():
        if any(one.startswith(test) for test in tests for one in broken) or not all("::" in one for one in broken):
            print(f"NOT PROVEN: {what}: fails without the defect, too")
            found[what] = None
    escaped = sum(test is None for test in found.values())
    print(f"{len(chosen) - escaped} of {len(chosen)} caught, by tests that pass without a defect")
    return escaped


if __name__ == "__main__":
    sys.exit(main())
