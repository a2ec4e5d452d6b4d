"""Simulations of macOS and Windows, neither of which is at hand: files, locks, signals and terminals."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llm_pruner import replacing
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.files import write_text
from llm_pruner.report.drawing import Drawing
from llm_pruner.report.figure_files import make_names_unique

SHORT = ["--max_seq_len", "16", "--max_windows", "2", "--num_examples", "2", "--calib_seq_len", "16", "--refit", "none"]
PRUNE = ["--pruning_ratio", "0.4", "--save_model", "--save_ckpt_log_name", "pruned", *SHORT]


def users_of(path):
    """Return the files in a folder, or the file, that this process has open or mapped."""
    process = psutil.Process()
    used = {file.path for file in process.open_files()} | {place.path for place in process.memory_maps()}
    return [one for one in used if one == path or one.startswith(path + os.sep)]


@pytest.fixture
def held(monkeypatch):
    """Refuse to rename, replace or remove a file that is open, or a folder that holds one, as Windows does."""
    refused = []

    def refusing(change):
        def changed(source, *others, **options):
            for place in (source, *others):
                place = os.path.abspath(os.fsdecode(place))
                if used := users_of(place):
                    refused.append(used[0])
                    raise PermissionError(13, "being used by another process", place)
            if change is os_rename and os.path.exists(others[0]):
                raise FileExistsError(17, "there already", others[0])
            return change(source, *others, **options)

        return changed

    os_rename = os.rename
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    return refused


def test_no_open_file_is_replaced_or_removed(home, tmp_path, held):
    """Locks are the exception: they are removed once they are closed, by whoever takes them next."""
    place = tmp_path / "a folder with ü"
    prune = ["prune", str(home / "base"), *PRUNE, "--output_root", str(place)]
    apply = ["apply", str(place / "pruned" / "pruning_plan.json"), str(home / "base"), str(place / "applied")]
    (tmp_path / "corpus.txt").write_text("This is 1 times 2.\n\n" * 40)
    vocab = [
        "vocab",
        str(home / "base"),
        str(place / "fewer"),
        "--keep",
        "0.9",
        "--corpus",
        str(tmp_path / "corpus.txt"),
    ]
    recover = ["recover", str(place / "pruned"), str(place / "healed"), "--data_path", str(home / "data.jsonl")]
    recover += ["--max_steps", "2", "--batch_size", "2", "--micro_batch_size", "2", "--cutoff_len", "64", "--merge"]
    report = ["report", str(place / "pruned"), str(place / "healed"), "--output", str(place / "page.html")]
    for command in (prune, prune, apply, vocab, recover, report):
        assert main(command) == 0
    assert [file for file in held if not file.endswith(".lock")] == []


@pytest.mark.parametrize("blocked", [2, 9])
def test_a_file_that_somebody_reads_is_replaced_when_it_is_closed(blocked, tmp_path, monkeypatch):
    replace, tries = Path.replace, []

    def replace_later(self, target):
        tries.append(target)
        if len(tries) <= blocked:
            raise PermissionError(13, "being used by another process")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_later)
    monkeypatch.setattr(replacing.time, "sleep", lambda _: None)
    monkeypatch.setattr(replacing, "READERS_BLOCK", True)
    if blocked > 3:
        with pytest.raises(PrunerError, match="being used"):
            write_text(tmp_path / "a.json", "new")
        assert list(tmp_path.iterdir()) == []
    else:
        write_text(tmp_path / "a.json", "new")
        assert (tmp_path / "a.json").read_text() == "new"
    monkeypatch.setattr(replacing, "READERS_BLOCK", False)
    tries.clear()
    with pytest.raises(PrunerError, match="being used"):
        write_text(tmp_path / "b.json", "new")
    assert len(tries) == 1, "elsewhere, the answer is final"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_a_terminal_lacks_are_no_error(encoding, home, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert main(["inspect", str(home / "base")]) == 0
    sys.stdout.flush()
    assert b"neurons" in written.getvalue() and b"?" in written.getvalue()


def test_figures_of_names_that_differ_by_case_are_two_files():
    drawings = [Drawing(name=name, title="", alt="", figure=None) for name in ("Base", "base", "other")]
    make_names_unique(drawings)
    assert [drawing.name for drawing in drawings] == ["Base", "base-2", "other"]


# A process without what Windows lacks: run in another one, since the modules are imported by then in this one.
WITHOUT = """
import multiprocessing, os, signal, sys
import psutil  # as it asks Windows, in its own way
for module in ("fcntl", "resource"):
    sys.modules[module] = None
import transformers.trainer  # with torch, which asks what the system is
for name in ("fork", "forkpty", "statvfs", "posix_fallocate", "getuid", "geteuid", "sched_getaffinity", "symlink"):
    delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGPIPE", "alarm", "setitimer"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn")
from llm_pruner.checkpoint import on_disk
on_disk.CAN_UNLINK_OPEN = False
from llm_pruner.cli import main
if __name__ == "__main__":
    for words in COMMANDS:
        assert main(words) == 0, words
"""


def test_a_system_without_forks_locks_and_signals(home, tmp_path):
    place = tmp_path / "a folder"
    place.mkdir()
    (place / "text.txt").write_text("Grüße to the world.\n\n" * 40, encoding="utf-8")
    commands = [
        ["prune", str(home / "base"), *PRUNE, "--output_root", str(place), "--stream"],
        ["apply", str(place / "pruned" / "pruning_plan.json"), str(home / "base"), str(place / "applied")],
        ["evaluate", str(place / "applied"), "--datasets", str(place / "text.txt"), "--seq_len", "16", "--tokens", "8"],
    ]
    script = place / "run.py"
    script.write_text(f"COMMANDS = {json.dumps(commands)}\n{WITHOUT}", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment = os.environ | locale | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
