"""Interruptions: a run resumes with the same losses, and no checkpoint is ever half-written."""

import errno
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.recovery import arguments, read_losses, read_record
from safetensors.torch import load_file
from transformers.trainer_utils import EvalLoopOutput

import llm_pruner as lp
from llm_pruner.recovery.run import recover
from llm_pruner.recovery.trainer import RecoveryTrainer

WEIGHTS = "adapter_model.safetensors"


def often_saved(home, out, **changes):
    return arguments(home, out, eval_steps=2, save_steps=2, **changes)


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    plain_step = RecoveryTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return plain_step(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "training_step", training_step)


def test_a_resumed_run_counts_the_seconds_before_it(home, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            recover(often_saved(home, tmp_path / "out", max_steps=10))
    (state,) = (tmp_path / "out").glob("checkpoint-6/trainer_state.json")
    document = json.loads(state.read_text())
    (*_, last) = (entry for entry in document["log_history"] if "train_seconds" in entry)
    assert last["step"] == 6 and last["train_seconds"] >= 0
    last["train_seconds"] = 1000.0
    state.write_text(json.dumps(document))
    recover(often_saved(home, tmp_path / "out", max_steps=10, resume_from_checkpoint="auto"))
    assert 1000 < read_record(tmp_path / "out")["seconds"] < 1900
    assert "train_seconds" not in json.loads((tmp_path / "out" / "curves.json").read_text())


@pytest.mark.parametrize("method", ("lora", "full"))
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(home, tmp_path, monkeypatch, method):
    """Same data in the same order, same dropout."""
    recover(often_saved(home, tmp_path / "whole", method=method, max_steps=10))
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            recover(often_saved(home, tmp_path / "out", method=method, max_steps=10))
    (tmp_path / "out" / ".partial-8").mkdir()
    with pytest.raises(lp.PrunerError, match="resume_from_checkpoint auto"):
        recover(often_saved(home, tmp_path / "out", method=method, max_steps=10))
    recover(often_saved(home, tmp_path / "out", method=method, max_steps=10, resume_from_checkpoint="auto"))
    whole, resumed = dict(read_losses(tmp_path / "whole")), dict(read_losses(tmp_path / "out"))
    assert set(whole) == set(resumed) == set(range(1, 11))
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, abs=1e-5)
    assert read_record(tmp_path / "out")["losses"] == read_record(tmp_path / "whole")["losses"]
    left = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    assert not list((tmp_path / "out").glob(".*"))


def test_resuming_without_a_checkpoint_starts_anew(home, tmp_path):
    recover(often_saved(home, tmp_path / "out", resume_from_checkpoint="auto", max_steps=2))
    assert read_record(tmp_path / "out")["steps"] == 2


def test_a_full_disk_keeps_the_last_good_checkpoint(home, tmp_path, monkeypatch):
    plain_save = RecoveryTrainer._save_rng_state

    def full(self, folder):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain_save(self, folder)

    monkeypatch.setattr(RecoveryTrainer, "_save_rng_state", full)
    with pytest.raises(lp.PrunerError, match=r"step 4 .*No space left.*last good one is .*checkpoint-2"):
        recover(often_saved(home, tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".partial*"))


def test_nan_stops_the_training(home, tmp_path, monkeypatch):
    plain_step = RecoveryTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = plain_step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and self.model.training else loss

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", compute_loss)
    with pytest.raises(lp.PrunerError, match=r"loss is nan at step 4.*checkpoint-2"):
        recover(often_saved(home, tmp_path / "out"))
    monkeypatch.undo()
    with pytest.raises(lp.PrunerError, match=r"is (nan|inf) at step"):
        recover(often_saved(home, tmp_path / "wild", method="full", learning_rate=1e30, warmup_steps=0))


@pytest.mark.slow
def test_runs_killed_again_and_again_end_like_uninterrupted_ones(home, tmp_path):
    """SIGKILL at any moment."""
    settings = {"prune_model": home / "pruned", "data_path": home / "data.jsonl", "device": "cpu", "batch_size": 8}
    settings |= {"micro_batch_size": 2, "max_steps": 40, "val_set_size": 8, "cutoff_len": 96, "lora_r": 4}
    settings |= {"eval_steps": 2, "save_steps": 2, "logging_steps": 1, "resume_from_checkpoint": "auto"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    script = str(Path(__file__).parents[1] / "post_training.py")

    def start(folder):
        command = [sys.executable, script, *flags, "--output", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for step in (2, 10, 24):  # as soon as a checkpoint of that step exists
        process = start(tmp_path / "out")
        while not any(int(p.name[11:]) >= step for p in (tmp_path / "out").glob("checkpoint-*")):
            with suppress(subprocess.TimeoutExpired):
                assert process.wait(timeout=0.02) is None, "the run ended before it was killed"
        process.kill()
        process.wait()
    assert start(tmp_path / "out").wait() == 0
    whole, resumed = dict(read_losses(tmp_path / "whole")), dict(read_losses(tmp_path / "out"))
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert not list((tmp_path / "out").glob(".*"))


def test_the_best_checkpoint_is_kept_whatever_the_loss_was_between(home, tmp_path, monkeypatch):
    losses = {0: 3.0, 1: 2.0, 2: 2.1, 3: 1.9, 4: 2.5}

    def measure(self, *args, metric_key_prefix="eval", **options):
        metrics = {f"{metric_key_prefix}_loss": losses[self.state.global_step]}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=1)

    monkeypatch.setattr(RecoveryTrainer, "evaluation_loop", measure)
    steps = {"max_steps": 4, "eval_steps": 1, "save_steps": 2, "save_total_limit": 1}
    recover(arguments(home, tmp_path / "out", **steps))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    kept, written = (load_file(tmp_path / "out" / place / WEIGHTS) for place in ("checkpoint-2", "."))
    assert all(torch.equal(kept[name], written[name]) for name in written)


@pytest.mark.parametrize("changes", ({"lora_r": 8}, {"method": "full"}))
def test_a_checkpoint_of_another_model_is_refused(home, tmp_path, changes):
    recover(often_saved(home, tmp_path / "out", max_steps=2))
    with pytest.raises(lp.PrunerError, match=r"checkpoint-2 does not fit the model .* give the --method and --lora_"):
        recover(often_saved(home, tmp_path / "out", max_steps=4, resume_from_checkpoint="auto", **changes))
