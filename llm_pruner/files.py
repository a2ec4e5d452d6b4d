"""Atomic writes of files and folders, one process at a time.

A writer holds a lock of the operating system, which ends with its process. The lock tells the leftovers of a killed
process, which are removed, from the work of a running one, which is left alone.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .errors import PrunerError
from .replacing import replace_file

CARD = "README.md"
# Suffixes and names of the files of checkpoints and runs.
OURS = {".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".log", ".scores", ".py"}
OUR_NAMES = {CARD, "LICENSE", "NOTICE"}
OUR_FOLDER = re.compile(r"\d+_[A-Z]\w*")  # of sentence-transformers' modules, such as 1_Pooling
MODEL_CONFIGS = ("config.json", "adapter_config.json")  # a folder with one of them holds a model or an adapter
# Flags that say where and how loudly a run takes place, not what it computes.
PLACE_FLAGS = {"output", "output_root", "save_ckpt_log_name", "quiet", "fresh", "resume_from_checkpoint"}
LOCKS = ".locks"
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # locks and flushes by a file system
# Messages of a full disk in the errors of torch and safetensors, which are no OSErrors.
DISK = ("No space left", "os error 28", "Disk quota", "File too large", "file write failed", "unexpected pos")


def digest(value: Any) -> str:
    """Return a short hash of a JSON value; other objects count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        PrunerError: the file cannot be read, is not JSON, or is nested or has numbers beyond Python's limits.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # numbers of 5,000 digits, lists in lists without end
        raise PrunerError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def strict_json(document: Any) -> str:
    """Format a document as JSON that every parser reads; numbers that are not finite become null.

    >>> print(strict_json({"score": float("nan")}), end="")
    {
     "score": null
    }
    """
    return json.dumps(_without_infinities(document), indent=1, default=str, allow_nan=False) + "\n"


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, content: str) -> None:
    """Write a file atomically, in UTF-8; raises as :func:`write_bytes`."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises as :func:`replaced_file`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block succeeds, and is removed when it fails.

    Leftovers of processes of this machine that were killed while they wrote the same file are removed first.

    Raises:
        PrunerError: the file cannot be written.
    """
    ours = f".{path.name}.{platform.node()}-"
    temporary = path.with_name(f"{ours}{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{glob.escape(ours)}*.tmp"):
            process = other.name.removeprefix(ours).removesuffix(".tmp")
            if not (process.isdecimal() and psutil.pid_exists(int(process))):
                other.unlink(missing_ok=True)
        yield temporary
        _sync(temporary)
        replace_file(temporary, path)
    except OSError as error:
        raise PrunerError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # of a name that is none, there is nothing to remove either
            temporary.unlink(missing_ok=True)


def same_folder(folder: str | Path, other: str | Path) -> bool:
    """Return True if both paths exist and are the same folder."""
    one, two = Path(folder).expanduser(), Path(other).expanduser()
    return one.exists() and two.exists() and one.samefile(two)


def place_for_run(place: Path, obstacle: Callable[[Path], str], *, flag: str, named: bool) -> Path:
    """Return the folder or file that a run may write, so that no run silently replaces another's results.

    Args:
        place: folder or file that the flags name.
        obstacle: returns what is in a place that the run must not replace, "" for a place that it may write.
        flag: flag that names the place.
        named: the user named the place. Otherwise ``NAME-2``, ``NAME-3``, ... are taken where the default is not free.

    Raises:
        PrunerError: the user named a place with such an obstacle.
    """
    what = obstacle(place)
    if what and named:
        raise PrunerError(f"{place} holds {what}, which this run would replace: remove it, or give another --{flag}")
    number, free = 1, place
    while obstacle(free):
        number += 1
        free = place.with_name(f"{place.stem}-{number}{place.suffix}" if place.is_file() else f"{place.name}-{number}")
    return free


def folder_for_run(
    folder: str | Path, record: str, arguments: Mapping[str, Any], *, named: bool, beside_models: bool = False
) -> Path:
    """Return the folder that a run may write: :func:`place_for_run` for a run that leaves a record.

    A run with the same arguments may replace its own earlier results.

    Args:
        record: JSON file with the ``arguments`` of the finished run that a folder holds.
        arguments: those of the new run.
        named: the user named the folder.
        beside_models: the run replaces no model, so a model that another command wrote is no obstacle.

    Raises:
        PrunerError: the user named a folder that holds another run.
    """

    def obstacle(place: Path) -> str:
        if (place / record).is_file():
            same = same_arguments(_recorded_arguments(place / record), arguments)
            return "" if same else "a run with other arguments"
        holds_model = any((place / name).is_file() for name in MODEL_CONFIGS)
        return "a model that another command wrote" if holds_model and not beside_models else ""

    return place_for_run(Path(folder), obstacle, flag="output", named=named)


def file_for_run(file: str | Path, arguments: Mapping[str, Any]) -> Path:
    """Return the JSON file that a run may write: :func:`folder_for_run` for a record that is a file of its own."""

    def obstacle(place: Path) -> str:
        free = not place.exists() or same_arguments(_recorded_arguments(place), arguments)
        return "" if free else "something else"

    return place_for_run(Path(file), obstacle, flag="output", named=True)


def same_arguments(recorded: Any, arguments: Mapping[str, Any]) -> bool:
    """Return True if two runs were asked for the same; where they are written does not count.

    >>> same_arguments({"model": "m", "kinds": ["heads"], "output": "a"}, {"model": "m", "kinds": ("heads",)})
    True
    """
    if not isinstance(recorded, dict):
        return False
    one, two = ({k: v for k, v in flags.items() if k not in PLACE_FLAGS} for flags in (recorded, arguments))
    return digest(one) == digest(two)


def _recorded_arguments(record: Path) -> Any:
    """Return the arguments in a record; None if it cannot be read."""
    try:
        content = read_json(record)
    except PrunerError:
        return None
    return content.get("arguments") if isinstance(content, dict) else None


def check_folder(folder: str | Path, owned_if: str, reads: str = "") -> None:
    """Refuse a folder that :func:`complete_folder` would refuse to write, before the work.

    Raises:
        PrunerError: the folder cannot be written, holds foreign files, or is that of the model ``reads``.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise PrunerError(f"{target} is a file; give a folder to write to")
    if reads and same_folder(target, reads):
        raise PrunerError(f"{target} is the model that is read: give another folder to write to")
    _check_parent(target)
    _check_ours(target, owned_if)


def check_file(file: str | Path) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        PrunerError: the file is a folder, or lies where nothing can be written.
    """
    target = Path(file).expanduser().resolve()
    if target.is_dir():
        raise PrunerError(f"cannot write {target}: it is a folder")
    _check_parent(target)


def _check_parent(target: Path) -> None:
    """Refuse a path below a file or below a folder that cannot be written, which a hidden folder there tries."""
    parent = next((path for path in target.parents if path.exists()), None)
    if parent is None:
        raise PrunerError(f"cannot write {target}: name a folder in it")
    if not parent.is_dir():
        raise PrunerError(f"cannot write {target}: {parent} is a file")
    try:
        tempfile.TemporaryDirectory(prefix=".", dir=parent).cleanup()
    except OSError as error:
        raise PrunerError(f"cannot write {target}: {parent}: {error.strerror or error}") from error


@contextmanager
def complete_folder(folder: str | Path, owned_if: str, reads: str = "") -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` when the block succeeds, and is removed when it fails.

    Leftovers of a process that was killed while it wrote the same folder are removed first.

    Args:
        owned_if: an existing non-empty ``folder`` is replaced only if it holds this file, and no file or folder that
            is foreign to checkpoints and runs.
        reads: a model that is read meanwhile, whose folder must not be replaced.

    Raises:
        PrunerError: the folder cannot be written, holds foreign files, or another process is writing it.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise PrunerError(f"{target} is a file; give a folder to write to")
    if reads and same_folder(target, reads):
        raise PrunerError(f"{target} is the model that is read: give another folder to write to")
    try:
        with file_lock(target, wait=False) as lock:
            if lock is None:
                raise PrunerError(f"another process is writing {target}: wait for it, or give another folder")
            _clear(target)
            _check_ours(target, owned_if)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            try:
                yield temporary
                sync_folder(temporary)
                _swap(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise PrunerError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:
        explained = str(error).startswith("cannot write")
        if not explained and any(sign in str(error) for sign in (*DISK, "Permission denied")):
            raise PrunerError(f"cannot write {target}: {error}") from error
        raise


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[Path | None]:
    """Hold the lock of a file or folder, which need not exist; yield its path, or None if another process holds it.

    The lock is a hidden file beside ``path``, which is removed with it. On a file system without locks, every process
    gets it.

    Args:
        wait: wait for the lock.

    Raises:
        PrunerError: the folder around ``path`` cannot be written.
    """
    if not path.name:
        raise PrunerError(f"cannot write {path}: name a folder in it")
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        _check_parent(path.resolve())  # filelock takes a folder that refuses files for another holder
        yield None
        return
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise PrunerError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield path
    finally:
        with suppress(OSError):  # before the release, so that no other process can hold it; Windows does it there
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def folder_lock(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold a named lock of a folder; yield False if another process holds it and is not waited for.

    A file of that name tells who holds the lock, or did when it was killed (:func:`lock_holder`).

    Raises:
        PrunerError: the folder cannot be written.
    """
    with file_lock(folder / LOCKS / name, wait) as holder:
        if holder is None:
            yield False
            return
        write_text(holder, f"{os.getpid()} {platform.node()}")
        yield True
        holder.unlink(missing_ok=True)


def lock_holder(folder: Path, name: str) -> tuple[int, bool]:
    """Return the id of the process that holds a lock or was killed with it (0: none), and whether it may be alive.

    The lock is not tried, which would keep others from it for a moment.
    """
    try:
        process, machine = (folder / LOCKS / name).read_text(encoding="utf-8").split()
        return int(process), machine != platform.node() or psutil.pid_exists(int(process))
    except (OSError, ValueError):
        return 0, False


def sync_folder(folder: Path) -> None:
    """Force everything in a folder to disk, so that its rename cannot overtake its contents."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    windows, is_folder = os.name == "nt", path.is_dir()
    if windows and is_folder:  # Windows opens no folders, and flushes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in UNSUPPORTED:  # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return OUR_FOLDER.fullmatch(path.name) is not None
    return path.suffix in OURS or path.name in OUR_NAMES


def _check_ours(target: Path, owned_if: str) -> None:
    inside = list(target.iterdir()) if target.is_dir() else []
    foreign = [p.name for p in inside if not _is_ours(p)]
    if inside and (foreign or not (target / owned_if).exists()):
        reason = f"it holds {min(foreign)}" if foreign else f"it has no {owned_if}"
        raise PrunerError(f"the folder {target} is not ours to replace ({reason}); give another")


def _swap(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    old = temporary.with_suffix(".old")
    with suppress(FileNotFoundError):
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)  # NFS keeps files that somebody reads


def _clear(target: Path) -> None:
    """Remove the leftovers of a killed writer; put the old folder back if it was killed between the two renames."""
    pattern = f"{glob.escape(f'.{target.name}.')}????????"
    for temporary in target.parent.glob(f"{pattern}.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)
    for old in target.parent.glob(f"{pattern}.old"):
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
