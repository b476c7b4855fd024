"""What a run gets from real vLLM servers, on a CPU with SmolLM2-135M, beside the same from models in the process.

    python tests/real_vllm.py --vllm .venv-vllm/bin/python        # `make long ONLY=vllm` prepares both environments

The teacher's log-probabilities must be within 1e-4 nats of the teacher's in the process, and the gradient of a batch
within 1e-4 of its own norm. Then a run samples by one server and is taught by another: after each update the sampler
gets the weights; one that keeps the old head must be noticed; one that is killed must end the run in words, which then
goes on. About ten minutes on two cores, and 9 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2_prepare import load_instruct_model

from sgopd.config import Config, UserError
from sgopd.rollout import Batch, Rollout, batch_of, sampling_of
from sgopd.samplers import vllm as module
from sgopd.teachers import Hidden, Logprob, Targets, TopK
from sgopd.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "dataset_name": "task:arithmetic",
    "dataset_size": 64,
    "dataset_test_split": None,
    "max_completion_length": 24,
    "per_device_train_batch_size": 8,
    "precision": "exact",
    "use_cpu": True,
    "num_threads": 2,
    "verifier_workers": 1,
}
failed: list[str] = []


def check(what: str, value: float, limit: float) -> None:
    """Prints a figure beside its limit, and remembers it where it is above."""
    print(f"{'ok' if value <= limit else 'FAILED':>6}  {what}: {value:.2g} (at most {limit:g})", flush=True)
    if not value <= limit:
        failed.append(what)


@contextlib.contextmanager
def vllm(python: Path, model: Path, name: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of `model` in float32: its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64"]
    words += ["--gpu-memory-utilization", "0.1", "--max-logprobs", "100", "--logprobs-mode", "processed_logprobs"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    log = model.parent / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", *words],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the engine, a process of its own, which outlives a server that is killed
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prepare(folder: Path) -> None:
    """teacher/: SmolLM2. student/: the same with every weight 2 % off at random."""
    tokenizer, model = load_instruct_model()
    for name, noise in (("teacher", 0.0), ("student", 0.02)):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def trainer(folder: Path, name: str, **changes: Any) -> Trainer:
    models = {"model_name_or_path": str(folder / "student"), "teacher_model_name_or_path": str(folder / "teacher")}
    return Trainer(Config.load(None, {**SETTINGS, **models, "output_dir": str(folder / name), **changes}))


def gradient(one: Trainer, batch: Batch, targets: Targets) -> Tensor:
    """Of the batch's loss, over all weights; the verdicts alternate."""
    verdicts = torch.tensor([1, -1]).repeat(len(batch.rollouts))[: len(batch.rollouts)]
    loss, _ = one.engine.forward(batch, verdicts, targets, None, len(batch.token_ids), torch.Generator().manual_seed(0))
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in one.engine.parameters if p.grad is not None])
    one.optimizer.zero_grad()
    return found


def compare_teacher(folder: Path, url: str) -> None:
    """Scores and gradients of a served teacher beside those of the same one in the process."""
    served = {"teacher_url": url, "teacher_model_name_or_path": "teacher", "teacher_copy": str(folder / "teacher")}
    for estimator in ("full", "sampled"):
        local = trainer(folder, f"local-{estimator}", estimator=estimator)
        elsewhere = trainer(folder, f"served-{estimator}", estimator=estimator, **served)
        prompts = local.prompts.ids[:8]
        completions = local.sampler.sample(prompts, sampling_of(local.config, local.eos_ids, local.vocabulary), 0)
        rollouts = [Rollout(n, ids, one, "student", False) for n, (ids, one) in enumerate(zip(prompts, completions))]
        batch = batch_of(rollouts, local.device)
        theirs, hidden = elsewhere.teacher.score(batch), local.teacher.score(batch)
        assert isinstance(hidden, Hidden)
        logprobs_NV = torch.log_softmax(hidden.head.logits(hidden.hidden_NH).float(), -1)
        expected: Targets
        if isinstance(theirs, TopK):
            own = logprobs_NV.gather(-1, theirs.ids_NK)
            distance, expected = (own - theirs.logprob_NK).abs().max(), TopK(theirs.ids_NK, own)
        else:
            assert isinstance(theirs, Logprob)
            own = logprobs_NV.gather(-1, batch.token_ids[:, None]).squeeze(-1)
            distance, expected = (own - theirs.logprob_N).abs().max(), hidden
        check(f"teacher, estimator {estimator}: log-probabilities of {own.numel()} tokens, nats", distance.item(), 1e-4)
        ours = gradient(local, batch, expected)
        error = (gradient(elsewhere, batch, theirs) - ours).norm() / ours.norm()
        check(f"teacher, estimator {estimator}: gradient of {len(own)} positions, relative", error.item(), 1e-4)
        local.close()
        elsewhere.close()


def run_served(folder: Path, python: Path, teacher_url: str) -> None:
    """A run with sampler and teacher on servers; with a planted stale head; with the sampler killed in the middle."""
    served: dict[str, Any] = {"sampler": "vllm", "sampler_tolerance": 1e-3, "importance_clip": 2.0, "save_steps": 1}
    served |= {
        "teacher_url": teacher_url,
        "teacher_model_name_or_path": "teacher",
        "learning_rate": 5e-5,
        "max_steps": 4,
    }
    served |= {"lr_scheduler_type": "constant", "logging_steps": 1}
    records: list[dict[str, Any]] = []

    def run(name: str, url: str, on_record: Callable[[dict[str, Any]], None] = records.append, **changes: Any) -> None:
        records.clear()
        one = trainer(folder, name, **{**served, "sampler_url": url, **changes})
        one.on_record = on_record
        one.train()

    with vllm(python, folder / "student", "student") as (url, server):
        run("run", url)
        steps = [record for record in records if record["kind"] == "train"]
        assert len(steps) == 4
        for name, limit in (
            ("sampler/gap_mean", 1e-4),
            ("sampler/gap_max", 1e-3),
            ("engine/logprob_gap_mean", 1e-4),
            ("engine/logprob_gap_max", 1e-3),
        ):
            check(f"sampler, four updates: {name}, nats", max(record[name] for record in steps), limit)
        check("sampler: |importance/mean - 1|", max(abs(record["importance/mean"] - 1) for record in steps), 1e-2)
        print(*(f"        step {one['step']}: {facts(one)}" for one in steps), sep="\n", flush=True)

        kept, module.tied_head = module.tied_head, lambda model: None
        expect("a stale head", "other log-probabilities than the trainer", lambda: run("stale", url))
        module.tied_head = kept

        def kill(record: dict[str, Any]) -> None:
            if record["kind"] == "train" and record["step"] == 2:
                os.killpg(server.pid, signal.SIGKILL)

        expect("the sampler killed", "sampler_url: no answer from", lambda: run("killed", url, kill))
    with vllm(python, folder / "student", "student") as (url, _):
        run("killed", url, resume_from_checkpoint="auto")
        went_on = [record["step"] for record in records if record["kind"] == "train"]
        check("the sampler killed, the run resumed: updates other than 3 and 4", went_on != [3, 4], 0)
        whole = map(json.loads, (folder / "killed" / "metrics.jsonl").read_text().splitlines())
        steps = [record["step"] for record in whole if record["kind"] in ("train", "end")]
        check("… and finished: records other than of updates 1 to 4 and the end", steps != [1, 2, 3, 4, 4], 0)


def facts(record: dict[str, Any]) -> str:
    names = ("sampler/gap_mean", "engine/logprob_gap_mean", "time/sync", "time/rollout", "time/update")
    return ", ".join(f"{name} {record[name]:.2g}" for name in names)


def expect(what: str, said: str, work: Callable[[], None]) -> None:
    """`work` must end in a UserError that says so."""
    try:
        work()
    except UserError as error:
        print(f"        {what}: {error}", flush=True)
        check(f"{what} is said", said not in str(error), 0)
    else:
        check(f"{what} is said", 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="the Python that has vLLM")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        with vllm(arguments.vllm, folder / "teacher", "teacher") as (url, _):
            compare_teacher(folder, url)
            run_served(folder, arguments.vllm, url)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
