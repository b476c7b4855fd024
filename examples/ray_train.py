r"""The trainer as it is under Ray Train, where Ray already has the machines.

    python examples/ray_train.py config.yaml --workers 2 --output_dir /shared/run --save_steps 50

Takes what `sgopd train` takes. Ray starts the processes and lets them find each other; from there on they do what they
do under torchrun. A worker that dies is started again with all others, `--max_failures` times, and the run goes on from
its newest checkpoint. Workers on several hosts need the paths of the config under the same names, and `output_dir` on a
file system that all of them see. Needs `pip install "ray[train]"`.

Simpler than the name suggests: metrics, checkpoints and the report are in the run directory, and Ray is told of none.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sgopd.cli import parse
from sgopd.config import Config, UserError
from sgopd.trainer import train


def work(settings: dict[str, Any]) -> None:
    """Each worker's part, in the process group that Ray has made."""
    os.chdir(settings.pop("folder"))  # where relative paths begin
    train(Config(**settings), say=lambda line: print(line, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one a GPU where the config uses GPUs")
    parser.add_argument("--max_failures", type=int, default=3, help="how often a worker may die")
    arguments, words = parser.parse_known_args()
    try:
        _, path, flags = parse(["train", *words])
        config = Config.load(path, {"resume_from_checkpoint": "auto", **flags})  # a second start goes on
    except UserError as error:
        sys.exit(str(error))
    settings = {**vars(config), "output_dir": os.path.abspath(config.output_dir), "folder": os.getcwd()}
    TorchTrainer(
        work,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="gloo" if config.use_cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=not config.use_cpu),
        run_config=RunConfig(
            storage_path=settings["output_dir"] + ".ray",  # Ray's own notes on the run
            failure_config=FailureConfig(max_failures=arguments.max_failures),
        ),
    ).fit()


if __name__ == "__main__":
    main()
