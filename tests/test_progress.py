"""Progress: bars on a terminal, lines in a file, nothing where nothing was asked for."""

import io
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm.auto import tqdm

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.progress import Bar, Lines, Step, showing, track

PRUNE = ["--num_examples", "4", "--calib_seq_len", "16", "--max_seq_len", "16", "--device", "cpu", "--preset", "paper"]


@pytest.fixture
def at_once(monkeypatch):
    """Show steps from the start, many times a second."""
    for display in (Bar, Lines):
        monkeypatch.setattr(display, "first", 0.01)
        monkeypatch.setattr(display, "seconds", 0.01)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait(what="waiting"):
    for _ in track(range(4), what):
        time.sleep(0.05)


def test_lines_say_how_far_and_how_long(at_once, capsys):
    with showing():
        wait()
    lines = capsys.readouterr().err.splitlines()
    assert any("waiting: 0 of 4, 0 s so far" in line for line in lines)
    assert any("waiting: 3 of 4 (75%), 0 s so far, about 0 s left" in line for line in lines)


def test_a_bar_goes_away_with_its_step(at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with showing():
        wait()
    drawn = terminal.getvalue().split("\r")
    assert any("waiting:  75%" in line and "3/4" in line for line in drawn)
    assert not drawn[-1].strip()


def test_short_steps_are_not_shown(capsys):
    with showing():
        wait()
        list(tqdm(range(3), desc="of another library"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["library", "quiet", "environment"])
def test_nothing_where_nothing_was_asked_for(how, at_once, monkeypatch, capsys):
    if how == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    threads = threading.active_count()
    if how == "library":
        wait()
    else:
        with showing(quiet=how == "quiet"):
            wait()
            list(tqdm(range(3)))
    assert capsys.readouterr().err == "" and threading.active_count() == threads


def test_a_step_inside_another_is_not_shown(at_once, capsys):
    with showing():
        with Step("outside", 1):
            wait("inside")
        wait("behind")
    error = capsys.readouterr().err
    assert "outside" in error and "behind" in error and "inside" not in error


def test_an_error_ends_the_step(at_once, capsys):
    threads = threading.active_count()
    with pytest.raises(RuntimeError) as caught, showing():
        for _ in track(range(4), "waiting"):
            raise RuntimeError
    assert threading.active_count() == threads, caught
    capsys.readouterr()
    wait()
    assert capsys.readouterr().err == ""


def test_bars_of_other_libraries_become_lines(monkeypatch, capsys):
    monkeypatch.setattr("llm_pruner.progress.FIRST_LINE", 0.01)
    with showing():
        for _ in tqdm(range(4), desc="of another library"):
            time.sleep(0.15)
    error = capsys.readouterr().err
    assert error.count("of another library") == 1 and "\r" not in error and "left" not in error
    with showing(), showing(quiet=True):
        pass
    list(tqdm(range(3), desc="as before", file=sys.stderr))
    assert "as before: 100%" in capsys.readouterr().err


def commands(home, text):
    few = ["--datasets", text, "--seq_len", "16", "--max_windows", "4", "--tokens", "0"]
    data = ["--data_path", str(home / "data.jsonl"), "--extra_val_dataset", text, "--max_windows", "2", "--merge"]
    train = ["--max_steps", "2", "--batch_size", "2", "--micro_batch_size", "2", "--cutoff_len", "64"]
    train += ["--resume_from_checkpoint", "auto"]
    base, pruned = str(home / "base"), str(home / "pruned")
    held_out = str(shutil.copy(text, Path(text).with_name("held_out.txt")))
    return {
        "prune": ["prune", base, "out", *PRUNE, "--calib_dataset", text, "--eval_datasets", held_out],
        "recover": ["recover", pruned, "out", *data, *train, "--device", "cpu"],
        "evaluate": ["evaluate", base, pruned, *few],
        "vocab": [
            "vocab",
            base,
            "out",
            "--keep",
            "0.8",
            "--corpus",
            text,
            "--eval_dataset",
            text,
            "--max_windows",
            "2",
        ],
        "apply": ["apply", str(home / "pruned" / "pruning_plan.json"), base, "out"],
    }


@pytest.mark.parametrize("name", ["prune", "recover", "evaluate", "vocab", "apply"])
def test_a_file_has_no_bars_and_quiet_prints_results_only(name, home, home_text, tmp_path, monkeypatch, capfd):
    """In a file neither bars nor warnings of others; with --quiet nothing but results."""
    monkeypatch.chdir(tmp_path)
    argv = commands(home, str(home_text))[name]
    assert main(argv) == 0
    error = capfd.readouterr().err
    assert "\r" not in error and "%|" not in error and "arning" not in error
    assert all(line[2:3] == line[5:6] == ":" for line in error.splitlines()), error
    assert main([*argv, "--quiet"]) == 0
    seen = capfd.readouterr()
    assert seen.err == "" or name == "apply"
    assert seen.out == {"prune": "", "recover": "", "evaluate": seen.out, "vocab": "out\n", "apply": "out\n"}[name]


def test_progress_of_the_call_is_stages_alone(home, home_text, capfd, at_once):
    stages = []
    lp.prune(
        str(home / "base"),
        progress=lambda *event: stages.append(event),
        **{"preset": "paper", "num_examples": 4, "calib_seq_len": 16, "calib_dataset": str(home_text)},
        **{"eval_datasets": "", "device": "cpu"},
    )
    assert (
        ("score", 0, 1) in stages and ("score", 1, 1) in stages and {event[1:] for event in stages} == {(0, 1), (1, 1)}
    )
    assert "so far" not in capfd.readouterr().err
