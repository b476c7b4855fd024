"""Builds sdist and wheel twice, in two folders, and compares the bytes; then installs the wheel and tests it there.

    python tests/wheel.py                    # `make long ONLY=wheel-check`
    python tests/wheel.py --no-install       # the comparison alone

The two builds differ in folder, time zone, hash seed and time of day, and share SOURCE_DATE_EPOCH, the compiler and the
build requirements of the environment that this runs in (requirements/build.txt). SGOPD_CUDA decides as ever whether the
CUDA extension is part of it. The clean environment gets this one's torch, the locked requirements where the lock is for
this Python (else requirements/test.txt), and the wheel. Exit status 0 if the bytes agree and its tests pass.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkout import ROOT, copy_checkout

EPOCH = "1767225600"  # any will do
PIP = ["-m", "pip", "--disable-pip-version-check"]
# What was installed is the wheel's; its loss and gradients, on every backend, are the float64 reference's.
TESTS = ["test_installed.py", "test_requirements.py", "kernels/test_parity.py"]


def run(command: Sequence[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def build(folder: Path, zone: str, seed: str) -> tuple[Path, Path]:
    """(sdist of the checkout, wheel of that sdist), made in `folder`."""
    checkout, made = copy_checkout(folder / "checkout"), folder / "made"
    (folder / "tmp").mkdir()
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": EPOCH,
        "TZ": zone,
        "PYTHONHASHSEED": seed,
        "TMPDIR": str(folder / "tmp"),  # where pip unpacks and compiles
    }
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(made)], cwd=checkout, env=environment)
    [sdist] = made.glob("*.tar.gz")
    wheel = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(made), str(sdist)]
    run([sys.executable, *wheel], env=environment)
    [made_wheel] = made.glob("*.whl")
    return sdist, made_wheel


def members(path: Path) -> dict[str, tuple[Any, ...]]:
    """What an archive says of each of its files, and the sum of the content."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {
                one.filename: (one.date_time, one.external_attr, hashlib.sha256(wheel.read(one)).hexdigest())
                for one in wheel.infolist()
            }
    found: dict[str, tuple[Any, ...]] = {}
    with tarfile.open(path) as sdist:
        for one in sdist:
            file = sdist.extractfile(one)
            content = hashlib.sha256(file.read()).hexdigest() if file else ""
            found[one.name] = (one.mtime, one.mode, one.uid, one.uname, one.gid, one.gname, content)
    return found


def compare(one: Path, other: Path) -> bool:
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, other)]
    same = sums[0] == sums[1] and one.name == other.name
    print(f"{one.name}: {'the same bytes' if same else 'DIFFERENT BYTES'}, {one.stat().st_size:,}, SHA-256 {sums[0]}")
    if not same:
        ours, theirs = members(one), members(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                print(f"  {name}: {ours.get(name)} and {theirs.get(name)}")
        if list(ours) != list(theirs):
            print("  the order of the files")
    return same


def install_and_test(folder: Path, wheel: Path) -> None:
    """Raises SystemExit if the wheel does not install, or a test of it fails."""
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    torch = importlib.metadata.version("torch").split("+")[0]
    run([python, *PIP, "install", f"torch=={torch}"])
    fits = subprocess.run([python, str(ROOT / "requirements" / "lock.py"), "--fits"], capture_output=True, text=True)
    locked = ["--no-deps", "--require-hashes", "-r", str(ROOT / "requirements" / "test.lock")]
    asked = ["-r", str(ROOT / "requirements" / "test.txt"), f"torch=={torch}"]
    run([python, *PIP, "install", *(locked if fits.stdout.strip() == "yes" else asked)])
    run([python, *PIP, "install", str(wheel)])
    run([python, *PIP, "check"])
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SGOPD_TEST_SOURCE")}
    run([str(folder / "bin" / "sgopd"), "--version"], env=environment)
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
    print(f"installed in a clean environment: {done.stdout.strip().splitlines()[-1]}")


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sgopd-wheel-") as name:
        first, second = Path(name) / "a", Path(name) / "another" / "and-deeper"
        first.mkdir()
        second.mkdir(parents=True)
        one, other = build(first, "UTC", "1"), build(second, "Asia/Kolkata", "2")
        same = [compare(*pair) for pair in zip(one, other)]
        if "--no-install" not in sys.argv:
            install_and_test(Path(name) / "environment", one[1])
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
