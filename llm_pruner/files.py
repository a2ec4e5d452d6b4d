"""Writing files and folders whole or not at all, one process at a time.

Whoever writes holds a lock of the system on the folder that is written, which goes when the process does, however that
ends. So what a killed process left is told from what a living one is at: the one is cleared away, the other is left
alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import PrunerError

# What checkpoints and runs are made of.
OURS = {".json", ".safetensors", ".jinja", ".txt", ".model", ".log", ".scores", ".py"}
CARD = "README.md"
LOCKS = ".locks"
# What torch and safetensors, which raise errors of their own, say of a disk that takes no more.
DISK = ("No space left", "os error 28", "Disk quota", "File too large", "file write failed", "unexpected pos")


def digest(known: Any) -> str:
    """A short hash of anything that JSON can hold, to tell one from another; what JSON has not counts by its text."""
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        PrunerError: it cannot be read, or is no JSON that a program can hold.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # numbers of 5,000 digits, lists in lists without end
        raise PrunerError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all, in UTF-8; raises as :func:`write_bytes`."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        PrunerError: it cannot be written.
    """
    ours = f".{path.name}.{os.uname().nodename}-"
    temporary = path.with_name(f"{ours}{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{_literal(ours)}*.tmp"):
            if not Path(f"/proc/{left.name.removeprefix(ours).removesuffix('.tmp')}").exists():
                left.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # of a name that is none, there is nothing to remove either
            temporary.unlink(missing_ok=True)
        raise PrunerError(f"cannot write {path}: {error.strerror or error}") from error


def same_folder(folder: str | Path, other: str | Path) -> bool:
    """Return True if both paths exist and are the same folder."""
    one, two = Path(folder).expanduser(), Path(other).expanduser()
    return one.exists() and two.exists() and one.samefile(two)


@contextmanager
def complete_folder(folder: str | Path, owned_if: str, reads: str = "") -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block succeeds, and vanishes when it fails.

    What a process that was killed at the same folder left is cleared away first.

    Args:
        owned_if: an existing non-empty ``folder`` is replaced only if it holds this file, and nothing that is no part
            of a checkpoint or a run.
        reads: a model that is read meanwhile, whose folder is not to be replaced.

    Raises:
        PrunerError: the folder cannot be written, is not ours, or another process is writing it.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise PrunerError(f"{target} is a file; give a folder to write to")
    if reads and same_folder(target, reads):
        raise PrunerError(f"{target} is the model that is read: give another folder to write to")
    leaving = ExitStack()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _holding(target.parent, wait=True):
            _clear(target)
            _check_ours(target, owned_if)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            leaving.enter_context(_holding(temporary))
            leaving.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary
        sync_folder(temporary)
        with _holding(target.parent, wait=True):
            _swap(temporary, target)
    except OSError as error:
        raise PrunerError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:
        if any(sign in str(error) for sign in (*DISK, "Permission denied")):
            raise PrunerError(f"cannot write {target}: {error}") from error
        raise
    finally:
        leaving.close()


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[IO[str] | None]:
    """Hold the lock of a file, which is made if need be; yields it open, or None if another process holds the lock and
    is not waited for.

    Raises:
        PrunerError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise PrunerError(f"cannot write {path.parent}: {error.strerror or error}") from error
    with file:
        yield file if _lock(file.fileno(), wait) else None


@contextmanager
def folder_lock(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock of a folder; yields whether it could be had (always, if waited for).

    Its file says who holds it, or did when it was killed.
    """
    with file_lock(folder / LOCKS / name, wait) as file:
        if file is None:
            yield False
            return
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} {os.uname().nodename}")
            file.flush()
        except OSError as error:
            raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error
        yield True
        file.truncate(0)


def lock_holder(folder: Path, name: str) -> tuple[int, bool]:
    """The process that holds a lock, or was killed with it, 0 for none; and whether it lives, as far as is known.

    The lock is left alone: to try it would keep others from it for a moment.
    """
    try:
        process, machine = (folder / LOCKS / name).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return 0, False
    return int(process), machine != os.uname().nodename or Path(f"/proc/{process}").exists()


def sync_folder(folder: Path) -> None:
    """Force everything in a folder to disk, so that the rename cannot overtake the contents."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_ours(target: Path, owned_if: str) -> None:
    inside = list(target.iterdir()) if target.is_dir() else []
    foreign = [p.name for p in inside if p.is_dir() or (p.suffix not in OURS and p.name != CARD)]
    if inside and (foreign or not (target / owned_if).exists()):
        reason = f"it holds {min(foreign)}" if foreign else f"it has no {owned_if}"
        raise PrunerError(f"the folder {target} is not ours to replace ({reason}); give another")


def _swap(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    if target.exists():
        old = temporary.with_suffix(".old")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)


def _clear(target: Path) -> None:
    """Remove what a killed process left of a folder; if that was between two renames, put the old one back.

    Raises:
        PrunerError: the process lives.
    """
    name = _literal(f".{target.name}.")
    for left in target.parent.glob(f"{name}????????.tmp"):
        with _holding(left) as dead:
            if not dead:
                raise PrunerError(f"another process is writing {target}: wait for it, or give another folder")
            shutil.rmtree(left)
    for old in target.parent.glob(f"{name}????????.old"):
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


@contextmanager
def _holding(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder itself; yields whether it could be had (always, if waited for).

    Of a folder that is written, all along; of the one it lies in, while names there are looked at and changed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock what is open; False if another process holds it. Where a file system has no locks, nobody ever does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _literal(name: str) -> str:
    """A name for glob, in which nothing is a pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
