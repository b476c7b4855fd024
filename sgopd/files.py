"""Files that are whole or not there, whatever ends the process: a kill, a full disk, a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from sgopd.config import UserError

LOCK = ".lock"
LOCKED_BY = b"process "  # how its content begins


class FolderLock:
    """A folder taken for one run: refused to every other process until `release`, or until this process ends.

    The kernel holds the lock (fcntl's, on the file .lock), so it ends with this process, however that ends, and
    children do not inherit it. It is the process's: taken twice in one, it is there until the first release. The file
    stays: if it were removed, two runs could hold two files of that name. `held` is False where the file system has no
    locks.

    Raises:
        UserError: another process has it.
        OSError: the file cannot be opened or locked.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115 (it lives as long as the run)
        self.held = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._file.seek(0)
                owner = self._file.read(200).decode(errors="replace")
                self._file.close()
                raise UserError(
                    f"output_dir: another run is at work in {folder}{owner and f' ({owner})'}. Wait for its end, or "
                    "stop it and go on with --resume_from_checkpoint auto, or choose another output_dir"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self._file.close()
                raise
            self.held = False
        else:
            self._file.truncate(0)
            self._file.write(LOCKED_BY + f"{os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        self._file.close()


def is_taken(folder: Path) -> bool:
    """Whether another process holds the folder's lock. Asks without taking it; False where that cannot be asked."""
    if sys.platform != "linux":
        return False
    try:
        with open(folder / LOCK, "rb") as file:
            wanted = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # Linux' struct flock
            kind, *_ = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    except (OSError, struct.error):
        return False
    return kind != fcntl.F_UNLCK


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes of a failure to write `target` a UserError that says so."""
    try:
        yield
    except Exception as error:
        # Beside OSError: safetensors has its own, and tokenizers raises plain Exception, for a full disk.
        if not (isinstance(error, (OSError, SafetensorError)) or type(error) is Exception):
            raise
        raise UserError(
            f"cannot write {target}: {error}. Free some space or choose another output_dir; what was written before is "
            "whole, and --resume_from_checkpoint auto goes on from there"
        ) from error


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` (replacing it) once it is complete and on the disk.

    Raises:
        UserError: it cannot be written; nothing of it is left, and what was there before stays.
    """
    temporary = temporary_name(target)
    with writing(target):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(target.parent)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` (replacing it) once it is complete and on the disk.

    Raises:
        UserError: it cannot be written; nothing of it is left, and what was there before stays.
    """
    temporary = temporary_name(target)
    with writing(target):
        try:
            make_folder(target.parent)
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            if target.exists():
                exchange(temporary, target)
            else:
                temporary.rename(target)
            sync(target.parent)
        finally:  # half of the new one, or all of the old one
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """`path` and its parents, each entered in its own parent on the disk."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def remove_folder(path: Path) -> None:
    """Deletes a folder; if that is cut short, what is left no longer bears its name."""
    temporary = temporary_name(path)
    if temporary.exists():
        shutil.rmtree(temporary)
    path.rename(temporary)
    sync(path.parent)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> None:
    """What killed runs left half written or half deleted in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def sync(path: Path) -> None:
    """Waits until a file's, or a folder's, content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> None:
    """Swaps two folders of one parent: at no moment is either name without a whole folder, where the system can."""
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)  # Linux; some network file systems refuse
    if swap and swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    aside = temporary_name(temporary_name(other))
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
