"""Writes requirements/test.lock: every package of the test environment but torch, exact, with its hash.

    make lock      # after a change of requirements/test.txt or of pyproject.toml's dependencies (Python 3.11)

Torch is chosen by the machine (a build for its processor or GPU, see TORCH in the Makefile), so neither it nor what
only its GPU builds need is locked. pip chooses the versions, in an environment that has torch already; the hashes are
those of the files that it chose, for the Python and the platform in the lock's first line. To install it, after torch:

    pip install --no-deps --require-hashes -r requirements/test.lock

`make test` does so where this fits; `python requirements/lock.py --fits` says yes or no.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "test.lock"
LEFT_OUT = ("torch", "nvidia-", "cuda-", "sgopd")


def here() -> str:
    """What a lock is made for, as its first line begins."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"# Python {python}, {sys.platform} {platform.machine()}."


def main() -> None:
    if sys.argv[1:] == ["--fits"]:
        return print("yes" if LOCK.read_text().startswith(here()) else "no")
    import tomllib  # Python 3.11

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [d for d in dependencies if not d.startswith("torch")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    # The torch that is installed, so that the resolver takes no other; it is left out of the lock.
    installed = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch').split('+')[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    command += [f"torch=={installed}", *wanted, "-r", str(ROOT / "requirements" / "test.txt")]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lines = []
    for package in report["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-")
        if name.startswith(LEFT_OUT):
            continue
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={package['metadata']['version']} --hash=sha256:{digest}")
    head = f"{here()} Made by `make lock`; see requirements/lock.py.\n"
    LOCK.write_text(head + "\n".join(sorted(lines)) + "\n")
    print(f"requirements/test.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
