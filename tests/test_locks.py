"""Atomic writes: locks, leftovers of killed processes, and work of running ones."""

import errno
import os
import platform
import stat
import subprocess
import sys

import psutil
import pytest

from llm_pruner.errors import PrunerError
from llm_pruner.files import complete_folder, file_lock, folder_lock, lock_holder, write_text

WRITER = """
import sys, time
from pathlib import Path
from llm_pruner.files import complete_folder, folder_lock
target = Path(sys.argv[1])
with folder_lock(target.parent, "job"), complete_folder(target, "x.txt") as folder:
    (folder / "x.txt").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is writing ``tmp_path / "out"``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_writer(writer, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PrunerError, match="another process is writing"), complete_folder(tmp_path / "out", "x.txt"):
        pass
    assert sorted(tmp_path.iterdir()) == before, "the living writer's files were touched"
    with folder_lock(tmp_path, "job", wait=False) as free:
        assert not free
    assert lock_holder(tmp_path, "job") == (writer.pid, True)


def test_the_next_writer_removes_the_leftovers_of_a_killed_one(writer, tmp_path):
    writer.kill()
    writer.wait()
    assert lock_holder(tmp_path, "job") == (writer.pid, False)
    with complete_folder(tmp_path / "out", "x.txt") as folder:
        (folder / "x.txt").write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks", "out"]
    assert (tmp_path / "out" / "x.txt").read_text() == "whole"
    with folder_lock(tmp_path, "job", wait=False) as free:
        assert free and lock_holder(tmp_path, "job") == (os.getpid(), True)
    assert lock_holder(tmp_path, "job") == (0, False)


def test_a_folder_between_two_renames_is_put_back(tmp_path):
    (tmp_path / ".out.12345678.old").mkdir()
    (tmp_path / ".out.12345678.old" / "x.txt").write_text("old")
    with pytest.raises(RuntimeError), complete_folder(tmp_path / "out", "x.txt"):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "x.txt").read_text() == "old"


@pytest.mark.parametrize("process", ["living", "dead"])
def test_temporary_files_of_living_processes_stay(process, tmp_path):
    """Also where the system has no /proc: processes are looked up by psutil."""
    pid = os.getppid() if process == "living" else max(psutil.pids()) + 10_000
    other = tmp_path / f".plan.json.{platform.node()}-{pid}.tmp"
    other.write_text("half")
    write_text(tmp_path / "plan.json", "whole")
    assert other.exists() == (process == "living") and (tmp_path / "plan.json").read_text() == "whole"


def test_processes_are_looked_up_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == 1)  # as on macOS, where /proc/1 does not exist
    names = [f".a.txt.{platform.node()}-{pid}.tmp" for pid in (1, 2)]
    for name in names:
        (tmp_path / name).touch()
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names[0], "a.txt"])


def test_a_lock_leaves_no_file_behind(tmp_path):
    with file_lock(tmp_path / "a") as first, file_lock(tmp_path / "a", wait=False) as second:
        assert first == tmp_path / "a" and second is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc refuses new files even to root")
def test_a_place_that_refuses_files_has_no_other_writer():
    with pytest.raises(PrunerError, match=r"^cannot write /proc/x: /proc: "), complete_folder("/proc/x", "x.txt"):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    reason = r"^cannot write .*file/a: (Not a directory|File exists)$"
    with pytest.raises(PrunerError, match=reason), complete_folder(tmp_path / "file" / "a", "x.txt"):
        pass


def test_a_file_system_that_flushes_no_folders_is_written(tmp_path, monkeypatch):
    flush = os.fsync

    def flush_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files)
    with complete_folder(tmp_path / "out", "x.txt") as folder:
        write_text(folder / "x.txt", "whole")
    assert (tmp_path / "out" / "x.txt").read_text() == "whole"


def test_a_folder_is_replaced_whose_files_cannot_be_removed(tmp_path, monkeypatch):
    """NFS keeps files that another process reads."""

    def refuse(path, *args, **options):
        raise OSError(errno.EBUSY, "Device or resource busy")

    for content in ("old", "new", "newer"):
        with monkeypatch.context() as patch, complete_folder(tmp_path / "out", "x.txt") as folder:
            write_text(folder / "x.txt", content)
            patch.setattr(os, "unlink", refuse)
        assert (tmp_path / "out" / "x.txt").read_text() == content
