"""The training loop: sign-gated on-policy distillation with a verifier in the loop.

    Trainer(config).train()

One batch: prompts -> rollouts of the student (and, in the cold start, of the teacher) -> verdicts -> hidden states of
both models -> the gated loss -> one or more updates. Read `train` for the order of things, `make_batch` for how
rollouts come about, `update` and `loss_of` for what is done with them, `StudentLoss` for the loss.

What can be done in several ways is behind a protocol, with one file a way: where rollouts come from (`sgopd.samplers`),
where the teacher is (`sgopd.teachers`), how the student lies over the processes (`sgopd.engines`). Sampling takes a
generator named by (seed, step, process), so there is no sampling state to carry over, and evaluation does not disturb
training. Runs stop and resume only where a batch of rollouts is used up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler, set_seed

from sgopd import __version__, checkpoint, lora, startup
from sgopd.checkpoint import RunState
from sgopd.completions import keep_token_stats, write_completions
from sgopd.config import Config, UserError
from sgopd.data import derive_seed, has_eval_data, load_prompts, take
from sgopd.engines import Engine, fsdp
from sgopd.engines.ddp import DataParallel
from sgopd.evaluate import evaluate
from sgopd.files import make_folder, new_file, new_folder, remove_folder, remove_leftovers, writing
from sgopd.hub import Hub
from sgopd.metrics import (
    MetricsFile,
    Sums,
    add_rollout_metrics,
    add_teacher_metrics,
    add_token_metrics,
    add_verifier_metrics,
    finite,
)
from sgopd.models import (
    eos_ids_of,
    head_of,
    load_frozen,
    load_tokenizer,
    recompute_activations,
)
from sgopd.phases import NO_EXAMPLE, Phases
from sgopd.processes import Interrupt, Processes
from sgopd.report import write_report
from sgopd.report.checks import Health
from sgopd.report.run import read_metrics
from sgopd.rollout import Rollout, batch_of, in_parts, parts_by_tokens, sampling_of, whole_texts
from sgopd.run_dir import compare_contents, lock_run_dir, open_run_dir
from sgopd.samplers import Sampler, student_sampler
from sgopd.student_loss import StudentLoss
from sgopd.teachers import Hidden, Teacher, whole
from sgopd.teachers.local import LocalTeacher
from sgopd.teachers.routed import RoutedTeacher
from sgopd.verdicts import VerdictWatch, verifying
from sgopd.verifier import Verdict
from sgopd.weights import gate_of, share_out, weighs_rollouts
from sgopd_kernels import CORRECT, INCORRECT, UNKNOWN

Record = dict[str, Any]


class Trainer:
    """One run. Making it takes the run directory, loads and checks everything; nothing else is written before `train`.

    Args:
        config: all settings.
        say: receives lines for a person, on the main process only.
        on_record: receives every record of metrics.jsonl, on the main process only.

    Raises:
        UserError: what the user can put right, found before the first rollout where possible.
    """

    def __init__(
        self,
        config: Config,
        *,
        say: Callable[[str], None] = print,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.config = config
        self.gate, self.rule = gate_of(config)
        self.processes = processes = Processes(config)
        self.device = processes.device
        self.say = say if processes.main else lambda text: None
        self.on_record = on_record if processes.main else lambda record: None
        self.run_dir = Path(config.output_dir)
        self.opened = contextlib.ExitStack()
        self.metrics: MetricsFile | None = None  # from `train` on, on the main process
        self.health = Health()  # sees records there
        try:
            self.prepare()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Takes the run directory; loads and checks models and data; goes back to the checkpoint, if there is one."""
        config, processes = self.config, self.processes
        resume_from, said = processes.on_main(self.open_run_dir)
        for line in said:
            self.say(line)
        # What is left to the global generators (dropout) differs between processes.
        set_seed(derive_seed(config.seed, "global", processes.rank) % 2**32)

        # --- models ---
        source = str(resume_from or config.model_name_or_path)
        self.tokenizer = load_tokenizer(source, config, "model_name_or_path")
        self.student, self.findings = lora.load_student(source, config)
        self.findings += startup.unread(config, self.gate)
        self.student.to(self.device).train()
        self.models = {"student": self.student}
        teachers = self.load_teachers()
        self.reference: LocalTeacher | None = None
        if (path := config.reference_model_name_or_path) is not None:
            self.reference = self.load_local("reference", path, "reference_model_name_or_path")
        if config.gradient_checkpointing:
            recompute_activations(self.student)

        # --- data, and whether it all fits together ---
        self.prompts = load_prompts(config, self.tokenizer, "train")
        self.teacher = teachers[""] if config.teacher_column is None else RoutedTeacher(teachers, self.prompts, config)
        self.questions = load_prompts(config, self.tokenizer, "eval") if has_eval_data(config) else None
        self.findings += startup.check_models(config, self.models, self.tokenizer, self.prompts)
        self.findings += startup.check_prompts(config, self.prompts, self.questions, self.tokenizer, self.models)
        self.eos_ids = eos_ids_of(self.student, self.tokenizer)
        self.findings += self.teacher.check(self.prompts, self.questions, self.tokenizer)
        others = [self.teacher] if self.reference is None else [self.teacher, self.reference]
        self.vocabulary = min(head_of(self.student).weight.shape[0], *(one.vocabulary for one in others))
        self.loss = StudentLoss(self.student, config, self.gate, self.vocabulary, self.rule)
        self.check_loss()
        self.contents = self.digests()
        self.watch = VerdictWatch(processes, self.say)

        # --- how the student is trained and sampled from ---
        self.engine: Engine
        if config.fsdp:
            mesh = fsdp.mesh_of(processes)
            self.engine = fsdp.FullySharded(self.loss, processes, mesh)
            if config.fsdp_teacher:
                assert isinstance(self.teacher, LocalTeacher)
                fsdp.shard_teacher(self.teacher, mesh)
        else:
            self.engine = DataParallel(self.loss, processes)
        self.sampler = student_sampler(
            config, processes, self.student, self.tokenizer, self.engine.whole, self.vocabulary
        )
        self.opened.callback(self.sampler.close)
        self.findings += self.sampler.check(self.prompts, self.questions)
        matrices = [p for p in self.engine.parameters if p.ndim >= 2]
        vectors = [p for p in self.engine.parameters if p.ndim < 2]  # norms and biases do not decay
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )

        self.state = RunState(Phases(config, whole=self.gate.needs_reliability or config.gate == "tgopd"))
        self.stopped_by: int | None = None  # the signal that ended `train` early
        if resume_from is not None:
            self.restore(resume_from)
        self.hub: Hub | None = None  # on the main process
        if config.push_to_hub:
            processes.on_main(self.open_hub)

    def open_hub(self) -> None:
        self.hub = Hub(self.config, self.say)

    def load_teachers(self) -> dict[str, Teacher]:
        """By their names, "" where there is but one; names with the same settings share theirs."""
        asked, found = self.config.teachers, dict[str, Teacher]()
        for name, config in asked.items():
            twin = next((found[other] for other in found if asked[other] == config), None)
            if twin is not None:
                found[name] = twin
            elif config.teacher_url is not None:
                from sgopd.teachers.connect import remote_teacher  # it needs an extra

                found[name] = remote_teacher(config, self.tokenizer, self.device)
                self.opened.callback(found[name].close)
            else:
                setting = "teacher_model_name_or_path" + f" ({name})" * bool(name)
                found[name] = self.load_local(f"teacher {name}".rstrip(), config.teacher_model_name_or_path, setting)
        return found

    def load_local(self, whose: str, path: Any, setting: str) -> LocalTeacher:
        """A frozen model in this process, which goes into `models`; what there is to say of it into `findings`."""
        self.models[whose], said = load_frozen(path, self.config, setting, self.device)
        self.findings += said
        return LocalTeacher(self.models[whose], self.tokenizer, self.config.bf16)

    def open_run_dir(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and what to say, once no other run can change the folder any more."""
        lock, said = lock_run_dir(self.config)
        self.opened.callback(lock.release)
        resume_from, more = open_run_dir(self.config)
        return resume_from, said + more

    def digests(self) -> dict[str, str | None]:
        """Of data and models: what a resumed run must find as it was."""
        theirs = self.processes.on_main(self.teacher.digest)
        base = lora.base_weights(self.student.state_dict()) if self.config.use_peft else None
        mine = {
            "prompts": self.prompts.digest(),
            "questions": self.questions.digest() if self.questions else None,
            "teacher": theirs if self.teacher.same(theirs) else self.teacher.digest(),
            "reference": self.reference.digest() if self.reference is not None else None,
            "base": checkpoint.weights_digest(base) if base is not None else None,
        }
        everyones = self.processes.gather([mine])
        if others := sorted({name for one in everyones for name in one if one[name] != everyones[0][name]}):
            raise UserError(f"the processes of this run read different {' and '.join(others)}: give all the same files")
        return mine

    def close(self) -> None:
        """Gives the run directory, and what a teacher has open, back."""
        self.opened.close()

    # --- the loop ---

    def train(self) -> Path:
        """Trains from where the run stands to max_steps, or until SIGTERM or SIGINT. Returns the run directory."""
        began = time.perf_counter()
        try:
            self.loop()
            if self.stopped_by is None:
                self.save_final()
                self.write({"step": self.state.step, "kind": "end", "time/total": time.perf_counter() - began})
            self.processes.accelerator.end_training()
            if self.processes.main:
                write_report(self.run_dir)
            if self.hub is not None and self.stopped_by is None:
                self.hub.push_final(self.run_dir)
        finally:
            self.close()
        return self.run_dir

    def loop(self) -> None:
        config, processes = self.config, self.processes
        with startup.start_verifier(config) as self.verifier, Interrupt() as interrupt:
            self.findings += processes.on_main(lambda: startup.check_golds(self.verifier, self.prompts, self.questions))
            for line in self.findings:
                self.say(line)
            processes.on_main(self.start_writing)
            while True:
                last = self.state.step == config.max_steps
                self.stopped_by = processes.any(interrupt.signal)
                if self.stopped_by is None:
                    try:
                        self.evaluate_if_due(last)
                    except UserError:  # the verifier fails, on all processes: what was learned is kept
                        if self.state.step:
                            self.save()
                        raise
                if last or self.stopped_by is not None or due(self.state.step, config.save_steps):
                    self.save()
                if last or self.stopped_by is not None:
                    break
                rollouts, record = self.make_batch()
                for iteration in range(config.num_iterations):
                    record |= self.update(rollouts, fresh=iteration == 0)
                    self.log(record, rollouts)
                    record = {}
                if self.state.step % config.logging_steps < config.num_iterations:  # one of these updates was logged
                    self.check_health()
                if (skipped := self.state.skipped) >= config.max_skipped_steps:
                    raise UserError(
                        f"stopped at step {self.state.step}: {skipped} updates had a loss or gradient that was not "
                        "finite. They left the weights alone, so the checkpoints are sound: resume from one with a "
                        "lower learning_rate or lower gate weights, or with float32 throughout. If the first update "
                        "already failed, the teacher or a prompt is the likelier cause"
                    )

    # --- a batch of rollouts ---

    def make_batch(self) -> tuple[list[Rollout], Record]:
        """The next prompts' rollouts with their verdicts, and what was measured on the way.

        The teacher goes first: it tries some of each prompt group's slots and keeps those in which the verifier
        endorses it; the student fills the others.
        """
        config, processes, sums = self.config, self.processes, Sums()
        slots_per_group = config.num_generations
        groups = config.rollouts_per_batch // slots_per_group
        taken = take(self.state.position, groups * processes.count, len(self.prompts), config.seed)
        examples = taken[processes.rank * groups : (processes.rank + 1) * groups]
        self.state.position += len(taken)

        offered = self.state.phases.slots(
            self.state.step, groups, derive_seed(config.seed, "slots", self.state.step, processes.rank)
        )
        tries = [
            (examples[group], number < offered[group], group)
            for group in range(groups)
            for number in range(max(offered[group], config.teacher_probes))
        ]
        verdicts: list[Verdict] = []
        tried = self.roll_out("teacher", [(example, in_slot) for example, in_slot, _ in tries], sums, verdicts)
        outcomes = [(rollout.example, rollout.verdict, rollout.in_teacher_slot) for rollout in tried]
        self.state.phases.record(processes.gather(outcomes))

        rollouts, filled = [], [0] * groups
        for rollout, (_, _, group) in zip(tried, tries):
            if rollout.in_teacher_slot and rollout.verdict == CORRECT:
                rollouts.append(rollout)
                filled[group] += 1
        open_slots = [
            (examples[group], number < offered[group] - filled[group])
            for group in range(groups)
            for number in range(slots_per_group - filled[group])
        ]
        rollouts += self.roll_out("student", open_slots, sums, verdicts)
        self.watch.see(verdicts)
        add_verifier_metrics(sums, [verdict.reason for verdict in verdicts])

        self.see_attempts(rollouts)
        if self.loss.takes_reliability or config.gate == "tgopd":
            self.trust(rollouts, sums)
        share_out(rollouts, config, self.state.phases)
        for rollout in rollouts:
            if weighs_rollouts(config):
                sums.add("rollout/weight", rollout.weight, 1)
            if config.reward_weight:
                sums.add("reward/taught", rollout.advantage != 0, 1)
        add_rollout_metrics(sums, rollouts)
        sums.count("phase/teacher_proposed", sum(offered))
        sums.count("phase/teacher_endorsed", sum(filled))
        sums.add("phase/acceptance", sum(filled), sum(offered))
        record = {"phase/teacher_share": self.state.phases.share(self.state.step), **sums.reduced(processes)}
        if not record.get("rollout/correct") and not record.get("rollout/incorrect"):
            record.pop("rollout/accuracy", None)  # no verdict is no accuracy of 0
        return rollouts, record

    def see_attempts(self, rollouts: list[Rollout]) -> None:
        """Counts what the student passed, on all processes, where a setting asks for that."""
        if self.config.teacher_reliability_source == "student" or self.config.prompt_weight is not None:
            own = [one for one in rollouts if one.source == "student" and one.verdict != UNKNOWN]
            self.state.phases.attempt(self.processes.gather([(one.example, one.verdict == CORRECT) for one in own]))

    def trust(self, rollouts: list[Rollout], sums: Sums) -> None:
        """Gives the rollouts that the gate weighs by it their reliability."""
        config, phases = self.config, self.state.phases
        if config.teacher_reliability == "all" or config.gate == "tgopd" or self.gate.control == "shuffled":
            asking = rollouts  # shuffled: the gate may be told of any that it is incorrect
        elif self.gate.needs_reliability:
            asking = [one for one in rollouts if one.verdict == INCORRECT]
        else:
            asking = [one for one in rollouts if one.verdict != CORRECT]
        examples = list(dict.fromkeys(one.example for one in asking))
        of = dict(zip(examples, examples))
        if config.teacher_reliability_source == "dealt":  # control: another prompt's, once round a random circle
            seed = derive_seed(config.seed, "reliability", self.state.step, self.processes.rank)
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
            of = {examples[a]: examples[b] for a, b in zip(order, order[1:] + order[:1])}
            if len(examples) == 1:
                of = {examples[0]: NO_EXAMPLE}
        for one in asking:
            one.reliability = phases.reliability(of[one.example])
            sums.add("phase/reliability", one.reliability, 1)

    def roll_out(self, source: str, slots: list[tuple[int, bool]], sums: Sums, heard: list[Verdict]) -> list[Rollout]:
        """A verified rollout of the student or the teacher for each (example, whether the slot is the teacher's).

        Adds the verdicts to `heard`.
        """
        if self.processes.any(len(slots) or None) is None:  # without any here, a student in shards is still gathered
            return []
        config = self.config
        prompts = [self.prompts.ids[example] for example, _ in slots]
        sampling = sampling_of(config, self.eos_ids, self.vocabulary)
        seed = derive_seed(config.seed, source, self.state.step, self.processes.rank)
        sampler, facts = self.sampler_of(source, [example for example, _ in slots])
        for name, value in facts.items():
            sums.count(name, value / self.processes.count)
        began = time.perf_counter()
        completions = sampler.sample(prompts, sampling, seed)
        rollouts = [
            Rollout(example, prompt, completion, source, in_teacher_slot)
            for (example, in_teacher_slot), prompt, completion in zip(slots, prompts, completions)
        ]
        if source == "student":
            self.teacher.start(rollouts)
        generated = time.perf_counter()
        with verifying():
            verdicts = self.verifier.verify(
                [completion.text for completion in completions],
                [self.prompts.examples[example] for example, _ in slots],
                [completion.truncated for completion in completions],
            )
        sums.count("time/rollout", (generated - began) / self.processes.count)  # a mean over processes
        sums.count("time/verify", (time.perf_counter() - generated) / self.processes.count)
        heard += verdicts
        for rollout, verdict in zip(rollouts, verdicts):
            rollout.verdict, rollout.reason = verdict.value, verdict.reason
        return rollouts

    def sampler_of(self, whose: str, examples: Sequence[int] = ()) -> tuple[Sampler, Record]:
        """The "student"'s, with its present weights and what that took, or the "teacher"'s for these examples."""
        if whose == "student":
            return self.sampler, self.sampler.sync(self.state.step, self.weights, self.logprobs)
        sampler = self.teacher.sampler_of(examples)
        assert sampler is not None
        return sampler, {}

    def weights(self) -> dict[str, Tensor]:
        """The student's with its adapters merged, whole on the main process."""
        return lora.merged(self.student, self.engine.weights())

    def logprobs(self, texts: Sequence[list[int]], temperature: float) -> Tensor:
        """The student's, of all tokens of the texts but each first."""
        return self.engine.logprobs(batch_of(whole_texts(texts), self.device), temperature).cpu()

    # --- an update ---

    def update(self, rollouts: list[Rollout], fresh: bool) -> Record:
        """One optimiser step on a batch. `fresh`: the rollouts are from the present weights."""
        config, sums, began = self.config, Sums(), time.perf_counter()
        rollouts = sorted(rollouts, key=Rollout.__len__)  # rows of like length share a forward pass
        generator = torch.Generator().manual_seed(
            derive_seed(config.seed, "gate", self.state.step, self.processes.rank)
        )
        verdicts = torch.tensor([rollout.verdict for rollout in rollouts])
        if self.gate.control == "shuffled":  # over the rollouts of the batch, not over the tokens of a micro-batch
            verdicts = verdicts[torch.randperm(len(verdicts), generator=generator)]

        # Every gradient is divided by the tokens of the whole update, over all micro-batches and processes.
        tokens = self.processes.sum(sum(len(rollout.completion.ids) for rollout in rollouts))
        for part in self.parts_of(rollouts):
            loss = self.loss_of(rollouts[part], verdicts[part], tokens, generator, sums, fresh)
            self.engine.backward(loss)
        self.engine.reduce()

        learning_rate = self.scheduler.get_last_lr()[0]
        norm = self.engine.clip(config.max_grad_norm or math.inf)
        measured = sums.reduced(self.processes)
        faults = [name for name, value in (("loss", measured["loss"]), ("gradient", norm)) if not math.isfinite(value)]
        if faults:
            self.state.skipped += 1
            self.say(
                f"warning: update {self.state.step + 1} is left out, since its {' and '.join(faults)} is not finite "
                f"(NaN or infinite); {self.state.skipped} so far, and the run stops at {config.max_skipped_steps}"
            )
        else:
            self.optimizer.step()
            self.check_weights()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.state.step += 1
        return {
            **measured,
            "optim/lr": learning_rate,
            "optim/grad_norm": norm,
            "optim/clipped_share": float(0 < config.max_grad_norm < norm) if math.isfinite(norm) else math.nan,
            "optim/skipped": self.state.skipped,
            "tokens": tokens,
            "time/update": time.perf_counter() - began,
        }

    def parts_of(self, rollouts: Sequence[Rollout]) -> list[slice]:
        """An update's rollouts, sorted by length, as micro-batches: as many on every process."""
        size, limit = self.config.per_device_train_batch_size, self.config.max_tokens_per_device_batch
        if limit is None:
            return [slice(start, start + size) for start in range(0, len(rollouts), size)]
        parts = parts_by_tokens([len(rollout) for rollout in rollouts], limit, self.config.padding_free)
        # With models in shards the processes meet in each forward pass. All have as many rollouts.
        return in_parts(parts, max(self.processes.gather([len(parts)])))

    def check_weights(self) -> None:
        """A finite gradient can still make a weight overflow; then nothing is of use, least of all a checkpoint."""
        if not self.engine.finite():
            raise UserError(
                f"stopped: update {self.state.step + 1} made weights that are not finite (NaN or infinite), at "
                f"learning_rate {self.scheduler.get_last_lr()[0]:g}. They were not saved: resume from a checkpoint, if "
                "there is one, with a lower learning_rate"
            )

    def loss_of(
        self,
        rollouts: Sequence[Rollout],
        verdicts: Tensor,
        num_items: int,
        generator: torch.Generator,
        sums: Sums,
        fresh: bool,
    ) -> Tensor:
        """The loss of a micro-batch of B rollouts, divided by `num_items`; adds what it measured to `sums`."""
        config, batch = self.config, batch_of(rollouts, self.device, self.config.padding_free)
        verdicts = verdicts.to(self.device)
        if config.max_tokens_per_device_batch is not None:
            positions = batch.inputs[0].numel()
            sums.add("update/padding", positions - sum(map(len, rollouts)), positions)
            sums.count("update/forward_passes", 1 / self.processes.count)
        targets = self.teacher.score(batch)
        reference = self.reference.score(batch) if self.reference is not None else None
        loss, measured = self.engine.forward(batch, verdicts, targets, reference, num_items, generator)
        own, stats, their_loss, their_stats, importance, reward = measured
        if importance is not None and config.importance_clip is not None:
            sums.add("importance/mean", importance.sum(), len(importance))
            sums.add("importance/clipped", (importance >= config.importance_clip).sum(), len(importance))
        engine_logprob = None
        if fresh:
            logprobs = [rollout.completion.logprobs for rollout in rollouts]
            engine_logprob = torch.cat(logprobs).to(self.device)[own]
        add_token_metrics(sums, stats, verdicts[batch.rows][own], engine_logprob, self.gate.tolerance, whole(targets))
        if config.teacher_column is not None:
            names = [self.prompts.examples[one.example][config.teacher_column] for one in rollouts]
            add_teacher_metrics(sums, stats, batch.rows[own], names, config.teachers, whole(targets))
        keep_token_stats(rollouts, "student", stats, verdicts, self.gate.tolerance)
        if their_stats is not None:
            keep_token_stats(rollouts, "teacher", their_stats, verdicts, self.gate.tolerance)
        if their_loss is not None:
            sums.add("loss/teacher_rollouts", their_loss * num_items, len(batch.rows) - len(own))
        if reward is not None:
            sums.add("loss/reward", reward * num_items, len(own))
        sums.count("loss", loss.detach())  # added up over micro-batches and processes: the loss of the update
        return loss

    def check_loss(self) -> None:
        """One token through the loss: what it refuses (a backend, a precision), it refuses at the start."""
        weight = head_of(self.student).weight
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        choices = {"reliability": 1.0} if self.loss.takes_reliability else {}
        reference = Hidden.specimen(self.reference.head) if self.reference is not None else None
        try:
            with torch.no_grad():
                hidden_1H = weight.new_zeros(1, weight.shape[1])
                for specimen in self.teacher.specimens():
                    self.loss.gated(hidden_1H, specimen, reference, token, token, **choices)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the loss refuses these settings: {error}") from error

    # --- evaluation ---

    def evaluate_if_due(self, last: bool) -> None:
        """At the start, every eval_steps and at the end, unless this step's evaluation is done."""
        config = self.config
        if self.questions is None:
            return
        if self.state.step == 0 and config.eval_teacher:
            self.evaluate("teacher")
        wanted = config.eval_on_start if self.state.step == 0 else last or due(self.state.step, config.eval_steps)
        if wanted and self.state.evaluated_at != self.state.step:
            self.state.metric, self.state.evaluated_at = self.evaluate("student"), self.state.step
            self.state.saved_at = None  # a signal may have had this step saved without the metric, so never as the best

    def evaluate(self, whose: str) -> float | None:
        """Evaluates the "student" or the "teacher", writes the record and returns avg@k; None without any verdict."""
        assert self.questions is not None
        result = evaluate(
            self.sampler_of(whose)[0],
            self.questions,
            self.verifier,
            self.config,
            self.processes,
            eos_ids=self.eos_ids,
            vocabulary=self.vocabulary,
            watch=self.watch,
        )
        self.write({"step": self.state.step, "kind": "eval", "model": whose, **result})
        return finite(result["eval/avg_at_k"])

    # --- what is written ---

    def start_writing(self) -> None:
        """From here on the run directory changes: what came after the checkpoint that was resumed from goes."""
        with new_file(self.run_dir / "config.yaml") as path:
            path.write_text(self.config.to_yaml(), encoding="utf-8")
        # In this order: where it is cut short, the newest checkpoint that is left still has all that goes with it.
        with writing(self.run_dir / "checkpoints"):
            make_folder(self.run_dir / "checkpoints")  # before the first record: if it is gone later, it was taken away
            for path in reversed(checkpoint.saved(self.run_dir / "checkpoints")):
                if checkpoint.step_of(path) > self.state.step:
                    remove_folder(path)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.state.metrics_position)
        self.opened.callback(self.metrics.close)
        settings = dataclasses.asdict(self.config)
        self.health = Health(read_metrics(self.run_dir / "metrics.jsonl")[0])
        self.health.course.settings = settings  # a resumed run may have others than its first record
        with writing(self.run_dir):
            for folder in (".", "checkpoints", "completions"):
                remove_leftovers(self.run_dir / folder)
            for path in (self.run_dir / "completions").glob("step-*.parquet"):
                if (number := path.stem.removeprefix("step-")).isdecimal() and int(number) > self.state.step:
                    path.unlink()
        name = {"name": self.config.run_name or self.run_dir.name}
        self.processes.accelerator.init_trackers(
            "sgopd",
            config={key: str(value) for key, value in settings.items()},
            init_kwargs={"wandb": name, "trackio": name},
        )
        if self.metrics.position == 0:
            facts = {
                "version": __version__,
                "processes": self.processes.count,
                "device": str(self.device),
                "parameters": sum(p.numel() for p in self.engine.parameters),
                "findings": self.findings,
            }
            self.write({"step": 0, "kind": "config", **settings, **facts})

    def log(self, record: Record, rollouts: Sequence[Rollout]) -> None:
        """A train record; every logging_steps also to the trackers, with some completions."""
        seconds = sum(value for name, value in record.items() if name.startswith("time/"))
        record = {"step": self.state.step, "kind": "train", **record, "tokens_per_second": record["tokens"] / seconds}
        self.write(record)
        if self.state.step == 1 or due(self.state.step, self.config.logging_steps):
            self.processes.accelerator.log(
                {k: v for k, v in record.items() if k not in ("step", "kind")}, self.state.step
            )
            if self.processes.main and (limit := self.config.num_completions_to_log):
                kept = rollouts[:: -(-len(rollouts) // limit)]  # evenly spaced: the teacher's come first
                folder = self.run_dir / "completions"
                write_completions(folder, self.state.step, kept, self.prompts, self.tokenizer, self.config)

    def check_health(self) -> None:
        """Says what the report's checks warn of, once; with `stop_on_warning` the run ends there, saved."""
        warned = self.processes.on_main(self.health.news)
        for check in warned:
            self.say(f"warning: {check.name}: {check.finding} {check.advice}")
        if warned and self.config.stop_on_warning:
            self.save()
            raise UserError(
                f"stopped at step {self.state.step}, and saved (stop_on_warning): "
                f"{', '.join(check.name for check in warned)}. The advice is in the warning above, the curves are in "
                "`sgopd report`. To go on all the same, resume: what was warned of stops a run once"
            )

    def write(self, record: Record) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
            self.health.see(record)
            self.on_record(record)

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.state.saved_at != self.state.step:
            self.save_checkpoint(self.processes.gather([checkpoint.random_state()]))
            self.state.saved_at = self.state.step
            if self.hub is not None and self.config.hub_strategy == "every_save":
                self.hub.push_checkpoint(self.run_dir / "checkpoints" / f"step-{self.state.step:06d}", self.state.step)

    def save_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        folder = self.run_dir / "checkpoints"
        if self.metrics is not None:
            self.metrics.sync()
            self.state.metrics_position, self.state.metrics_sha256 = self.metrics.position, self.metrics.sha256
        checkpoint.save(
            folder,
            self.state.step,
            processes=self.processes,
            model=self.student,
            weights=self.engine.weights(),
            tokenizer=self.tokenizer,
            optimizer=lambda folder: {
                "optimizer": self.engine.save_optimizer(self.optimizer, folder),
                "scheduler": self.scheduler.state_dict(),
            },
            random_states=random_states,
            state={
                **self.state.to_json(),
                "config": self.config.to_yaml(launch=False),
                "contents": self.contents,
            },
        )

        def prune() -> None:
            with writing(folder):
                checkpoint.prune(folder, self.config.save_total_limit)

        self.processes.on_main(prune)

    def restore(self, path: Path) -> None:
        """Everything but the weights, which are loaded already."""
        state, optimizer, random_states = checkpoint.load(path)
        before, now = len(random_states), self.processes.count
        if before != now and not self.config.fsdp:
            raise UserError(
                f"{path} was written by {before} processes, this run has {now}: launch as many, or start a new run "
                "with that folder as model_name_or_path"
            )
        contents = state.get("contents", {})
        if self.teacher.same(contents.get("teacher", "")):
            contents["teacher"] = self.contents["teacher"]
        self.findings = compare_contents(self.contents, state, path) + self.findings
        if before == now:
            checkpoint.set_random_state(random_states[self.processes.rank])
        else:
            set_seed(derive_seed(self.config.seed, "global", state["step"], self.processes.rank) % 2**32)
            self.findings.append(
                f"warning: {path} was written by {before} processes, this run has {now}: weights and optimiser go on, "
                "with other random numbers, and per_device_train_batch_size is of each process"
            )
        self.load_optimizer(optimizer, path)
        self.state.restore(state)

    def load_optimizer(self, state: dict[str, Any], path: Path) -> None:
        """The moments are the checkpoint's; all settings are the config's, as if the run had begun with them."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.engine.load_optimizer(self.optimizer, path, state["optimizer"])
        schedule = {**state["scheduler"], "base_lrs": self.scheduler.base_lrs}
        factors = [factor(schedule["last_epoch"]) for factor in self.scheduler.lr_lambdas]
        schedule["_last_lr"] = [base * factor for base, factor in zip(schedule["base_lrs"], factors)]
        for group, own, rate in zip(self.optimizer.param_groups, settings, schedule["_last_lr"]):
            group.update({**own, "lr": rate})
        self.scheduler.load_state_dict(schedule)

    def save_final(self) -> None:
        """final/: the trained model and its tokenizer, for from_pretrained."""
        weights = self.engine.weights()

        def write() -> None:
            with new_folder(self.run_dir / "final") as path:
                lora.save_student(self.student, self.tokenizer, path, weights)

        self.processes.on_main(write)


def due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def train(config: Config, **callbacks: Any) -> Path:
    """`Trainer(config).train()`; returns the run directory."""
    return Trainer(config, **callbacks).train()
