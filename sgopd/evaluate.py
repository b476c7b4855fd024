"""avg@k and pass@k with standard errors over questions (docs/metrics.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sgopd import lora
from sgopd.config import Config, UserError
from sgopd.data import Prompts, derive_seed, has_eval_data, load_prompts
from sgopd.metrics import finite
from sgopd.model_checks import check_model
from sgopd.models import eos_ids_of, head_of, load_model, load_tokenizer, logprobs_of, move
from sgopd.processes import Processes
from sgopd.rollout import sampling_of
from sgopd.samplers import Sampler, student_sampler
from sgopd.samplers.plain import PlainSampler
from sgopd.scores import scores
from sgopd.startup import check_golds, check_prompts, start_verifier
from sgopd.verdicts import VerdictWatch, verifying
from sgopd.verifier import CORRECT, UNKNOWN, VerifierPool


def evaluate(
    sampler: Sampler,
    prompts: Prompts,
    pool: VerifierPool,
    config: Config,
    processes: Processes,
    *,
    eos_ids: tuple[int, ...],
    vocabulary: int,
    watch: VerdictWatch,
) -> dict[str, Any]:
    """num_generations_eval rollouts for each question, verified: the eval/* metrics.

    The questions are dealt out over the processes. The sampling seed depends on the run's seed alone, so every
    evaluation of a run draws the same random numbers, and none of them disturbs training. A rollout without a verdict
    counts as not correct, and where there is none at all, accuracies are NaN.

    Raises:
        UserError: the verifier fails on everything (`sgopd.verdicts`).
    """
    began = time.perf_counter()
    samples = config.num_generations_eval
    mine = range(processes.rank, len(prompts), processes.count)
    sampling = dataclasses.replace(
        sampling_of(config, eos_ids, vocabulary),
        temperature=config.eval_temperature,
        batch_size=config.per_device_eval_batch_size,
    )
    asked = [question for question in mine for _ in range(samples)]
    seed = derive_seed(config.seed, "evaluation", processes.rank)
    completions = sampler.sample([prompts.ids[q] for q in asked], sampling, seed)
    with verifying():
        verdicts = pool.verify(
            [completion.text for completion in completions],
            [prompts.examples[q] for q in asked],
            [completion.truncated for completion in completions],
        )
    watch.see(verdicts)
    # (question, verdict, tokens, clipped) of each rollout
    own = [
        (question, verdict.value, len(completion.ids), completion.truncated)
        for question, verdict, completion in zip(asked, verdicts, completions)
    ]
    rows = processes.gather(own)
    correct = dict.fromkeys(range(len(prompts)), 0)
    for question, verdict, _, _ in rows:
        correct[question] += verdict == CORRECT
    unknown = sum(verdict == UNKNOWN for _, verdict, _, _ in rows)
    result = scores(list(correct.values()), samples, config.eval_k or samples)
    if unknown == len(rows):
        result |= {name: math.nan for name in result if "_at_k" in name}
    return {
        **result,
        "eval/correct": list(correct.values()),
        "eval/questions_sha256": prompts.digest(),
        "eval/unknown": unknown / len(rows),
        "eval/length_mean": sum(length for _, _, length, _ in rows) / len(rows),
        "eval/length_clipped": sum(clipped for _, _, _, clipped in rows) / len(rows),
        "time/eval": time.perf_counter() - began,
    }


def evaluate_models(config: Config, benchmarks: dict[str, Config] | None = None) -> list[dict[str, Any]]:
    """Evaluates the student, and the teacher if eval_teacher is set, without training: one record a model.

    With `benchmarks` (`sgopd.benchmarks.configs_of`) it is one a model and benchmark, on each one's questions.
    """
    if not benchmarks and not has_eval_data(config):
        raise UserError("there is nothing to evaluate on: set eval_dataset_name (and dataset_test_split)")
    processes = Processes(config)
    told: set[str] = set()

    def warn(line: str) -> None:
        if processes.main:  # standard output is for the records
            print(line, file=sys.stderr)

    def tell(lines: Iterable[str]) -> None:
        """Once, of two models or several benchmarks."""
        for line in lines:
            if line not in told:
                told.add(line)
                warn(line)

    models = [("student", config.model_name_or_path, "model_name_or_path")]
    if config.eval_teacher:
        assert isinstance(config.teacher_model_name_or_path, str)
        models.append(("teacher", config.teacher_model_name_or_path, "teacher_model_name_or_path"))
    sets = benchmarks or {"": config}
    records = []
    with start_verifier(next(iter(sets.values()))) as pool:
        for whose, path, setting in models:
            tokenizer = load_tokenizer(path, config, setting)
            own = whose == "student"
            model, said = (
                lora.load_student(path, config) if own else load_model(path, config, setting, config.teacher_dtype)
            )
            model = move(model, processes.device).eval()
            eos_ids, vocabulary = eos_ids_of(model, tokenizer), head_of(model).weight.shape[0]
            whole = functools.partial(contextlib.nullcontext, model)
            sampler: Sampler = (
                student_sampler(config, processes, model, tokenizer, whole, vocabulary)
                if own
                else PlainSampler(whole, tokenizer)
            )
            with contextlib.closing(sampler):
                for name, of in sets.items():
                    questions = load_prompts(of, tokenizer, "eval")
                    check_model(model, setting, questions, of)
                    tell(check_prompts(of, None, questions, tokenizer, {whose: model}))
                    said += processes.on_main(functools.partial(check_golds, pool, None, questions))
                    tell(said + sampler.check(questions, None))
                    said = []
                    sampler.sync(0, functools.partial(weights_of, model), functools.partial(logprobs_of, model))
                    result = evaluate(
                        sampler,
                        questions,
                        pool,
                        of,
                        processes,
                        eos_ids=eos_ids,
                        vocabulary=vocabulary,
                        watch=VerdictWatch(processes, warn),
                    )
                    which = {"benchmark": name} if name else {}
                    records.append({"kind": "eval", "model": whose, "path": path, **which, **finite(result)})
    return records


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return lora.merged(model, model.state_dict())
