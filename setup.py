"""Builds the native extensions with CMake. Everything declarative is in pyproject.toml.

The CPU extension is always built. The CUDA one is built where nvcc is found (CUDA_HOME, CUDACXX, PATH or
/usr/local/cuda); SGOPD_CUDA=0 leaves it out, SGOPD_CUDA=1 makes a missing nvcc an error.
SGOPD_SANITIZE=address,undefined or =thread builds the CPU extension for tests/sanitize.py.
`python setup.py build_ext --inplace` puts the extensions beside the sources, for development.
With SOURCE_DATE_EPOCH, sdist and wheel are the same bytes wherever the same sources are built (tests/wheel.py).
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    wanted = os.environ.get("SGOPD_CUDA", "auto")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    found = next((c for c in candidates if c and os.access(c, os.X_OK)), None) or shutil.which("nvcc")
    if found is None and wanted == "1":
        raise SystemExit("SGOPD_CUDA=1, but nvcc was not found: set CUDA_HOME or CUDACXX, or unset SGOPD_CUDA.")
    return found


class CMakeBuild(build_ext):
    """One CMake configure and build for all extensions; CMake installs them where setuptools expects them."""

    def run(self) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        # A cache from an earlier pip names the ninja and pybind11 of its own, deleted, build environment.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        target = Path(self.get_ext_fullpath("sgopd_kernels._cpu")).resolve().parent
        import pybind11

        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        nvcc = find_nvcc()
        if nvcc:
            configure += ["-DSGOPD_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        configure += [f"-DSGOPD_SANITIZE={os.environ.get('SGOPD_SANITIZE', '')}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


class ReproducibleSdist(sdist):
    """Writes an archive without owners, with SOURCE_DATE_EPOCH for every time where that is set."""

    def make_archive(self, base_name: str, format: str, root_dir: Any = None, base_dir: Any = None, **_: Any) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **_)

        def plain(one: tarfile.TarInfo) -> tarfile.TarInfo:
            one.mtime, one.uid, one.gid, one.uname, one.gname = int(epoch), 0, 0, "", ""
            one.mode = 0o755 if one.isdir() or one.mode & 0o100 else 0o644
            return one

        target = Path(f"{base_name}.tar.gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        # mtime and filename: gzip's own header has both.
        with (
            target.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(Path(root_dir or ".") / base_dir, arcname=str(base_dir), filter=plain)  # in order of the names
        return str(target)


setup(
    ext_modules=[Extension("sgopd_kernels._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "sdist": ReproducibleSdist},
)
