"""The bits of whole runs: a fingerprint of weights and metrics, before a change of the loop and after it.

    python tests/run_bits.py record before.json       on the tree before
    python tests/run_bits.py compare before.json      on the tree after: which runs end elsewhere

The quickstart, the same run resumed from its middle, and short runs with other settings and on two processes. For
changes that must not move a number. Bits depend on processor and torch, so the file is of one machine and not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHORT = {"max_steps": 4, "cold_start_steps": 2, "eval_dataset_size": 8, "num_generations_eval": 2, "save_steps": 2}
SHORT |= {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "dataset_size": 200, "num_completions_to_log": 0}
TRUST = {"teacher_probes": 1, "teacher_reliability": "all", "num_iterations": 2, "teacher_rollout_loss": "nll"}
STUDENT = Path(__file__).resolve().parent.parent / "sgopd" / "assets" / "quickstart" / "student"
# name -> (processes, settings)
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "quickstart": (1, {}),
    "quickstart, resumed": (1, {"resume_from_checkpoint": "quickstart/checkpoints/step-000060"}),
    "sampled, accumulated, trusted": (1, SHORT | TRUST | {"gradient_accumulation_steps": 2, "gate": "opdvr"}),
    "reference, bf16, forward KL": (
        1,
        SHORT
        | {"reference_model_name_or_path": str(STUDENT), "bf16": True, "teacher_rollout_loss": "forward-kl"}
        | {"gate_conflict": 0.5, "num_generations": 4},
    ),
    "sampled, shuffled, recomputed": (
        1,
        SHORT | {"estimator": "sampled", "gate": "shuffled", "gradient_checkpointing": True, "temperature": 0.8},
    ),
    "two processes": (2, SHORT),
    "two processes, resumed": (2, SHORT | {"resume_from_checkpoint": "two processes/checkpoints/step-000002"}),
}


def run(name: str, folder: Path) -> dict[str, str]:
    """Hashes of what a run ends with."""
    processes, settings = RUNS[name]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["sgopd", "quickstart", "--output_dir", name]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = {}
    for file in sorted(p for where in ("final", "checkpoints") for p in (folder / name / where).rglob("*")):
        if file.suffix in (".safetensors", ".pt"):
            found[str(file.relative_to(folder / name))] = hashlib.sha256(file.read_bytes()).hexdigest()[:24]
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for line in lines
        if line["kind"] in ("train", "eval")
    ]
    found["metrics"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:24]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines if line["kind"] == "train")
    print(f"{name}: {seconds:.1f} s of updates", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=RUNS, action="append")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, Path(folder)) for name in arguments.only or RUNS}
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(arguments.file.read_text())
    different = [f"{name}: {key}" for name in found for key in found[name] if before[name].get(key) != found[name][key]]
    different += [f"{name}: {key} is gone" for name in found for key in before[name] if key not in found[name]]
    print("\n".join(different) or f"{len(found)} runs, the same bits")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
