"""A run that was stopped goes on with what it had done, and ends with the same weights."""

from contextlib import nullcontext

import pytest
import torch
from helpers.models import build, made, pruned_by, tokens
from transformers import BertConfig, BertModel

import llm_pruner as lp
from llm_pruner import data
from llm_pruner import unfinished as module
from llm_pruner.cli import main
from llm_pruner.importance import gradients, taylor
from llm_pruner.refit import compensate, reconstruct, training
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.methods import train
from llm_pruner.unfinished import Unfinished

IDS = tokens(64, 16)


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    monkeypatch.setattr(module, "SHARE", 0)


def stop_at(monkeypatch, owner, name, call):
    """Let a function raise at its so-manieth call; return a function that tells how often it was called."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Stopped
        return original(*args, **options)

    monkeypatch.setattr(owner, name, stopping)
    return lambda: len(calls)


def same(one, other):
    other = dict(other.state_dict())
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


def closed_form(model, pruned, unfinished):
    return compensate.compensate(model, pruned, IDS, unfinished=unfinished)


def by(method, tokens):
    def refit(model, pruned, unfinished):
        return train(model, pruned, IDS, method, plan=None, budget=Budget(tokens=tokens), seed=0, unfinished=unfinished)

    return refit


STEPS = {
    "closed form": (closed_form, (compensate, "_refit_layer"), 3),
    "closed form of experts": (closed_form, (compensate, "_refit_layer"), 3),
    "blocks": (by("blocks", 2000), (reconstruct.BlockTrainer, "_train_block"), 3),
    "lora": (by("lora", 4000), (training.Descent, "_step"), 3),
    "distill": (by("distill", 4000), (training.Descent, "_step"), 3),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_goes_on_where_it_was_stopped(name, tmp_path, monkeypatch):
    refit, (owner, function), call = STEPS[name]
    model = build("mixtral" if "experts" in name else "llama", num_hidden_layers=4)
    whole, pruned, again = (pruned_by(model, kinds=("neurons",))[1] for _ in range(3))
    expected = refit(model, whole, Unfinished())
    with monkeypatch.context() as patch:
        calls = stop_at(patch, owner, function, call)
        with pytest.raises(Stopped):
            refit(model, pruned, Unfinished(tmp_path / "step"))
        rest = stop_at(patch, owner, function, 0)
        report = refit(model, again, Unfinished(tmp_path / "step"))
        rest = rest()
    assert same(whole, again) and report == expected
    assert rest and calls() == call + rest  # what was done is not done again, apart from the call that was stopped


T5 = {"d_model": 24, "num_heads": 4, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 3}
BERT = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 5}
MODELS = {
    "llama": lambda: build("llama", num_hidden_layers=5),
    "t5": lambda: made("t5", seq2seq=True, **T5),  # the layers of its decoder all read what the encoder ends with
    "bert": lambda: BertModel(BertConfig(**BERT)).eval(),  # scored by random projections
}


@pytest.mark.parametrize(("least", "stops"), ((0, (2, 7)), (gradients.LEAST_TAPES, (2, 3))), ids=("parts", "one part"))
@pytest.mark.parametrize("variant", ("vectorize", "param_first", "param_second", "param_mix"))
@pytest.mark.parametrize("name", MODELS)
def test_scores_go_on_where_they_were_stopped(name, variant, least, stops, tmp_path, monkeypatch):
    model = MODELS[name]()
    graph, ids = lp.trace(model), tokens(96, 64)
    monkeypatch.setattr(gradients, "LEAST_TAPES", least)

    def score(stop, cache):  # of all kinds, embeddings among them
        with monkeypatch.context() as patch:
            blocks = stop_at(patch, gradients._Sweep, "_backward_block", stop)
            with pytest.raises(Stopped) if stop else nullcontext():
                values = lp.score(model, graph, ids, taylor=variant, cache=cache).values
            return blocks(), None if stop else values

    whole, expected = score(0, None)
    for stop in stops:
        score(stop, tmp_path / "scores")
        assert [path.name for path in tmp_path.iterdir()] == ["scores.part"]
    rest, found = score(0, tmp_path / "scores")
    assert rest == whole - sum(stops) + len(stops)
    assert all(torch.equal(found[unit], values) for unit, values in expected.items())
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_stack_that_was_done_is_not_trained_again(tmp_path, monkeypatch):
    model = made("t5", seq2seq=True, d_model=24, num_heads=4, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=2)
    whole, pruned, again = (pruned_by(model, kinds=("neurons",))[1] for _ in range(3))
    refit = by("blocks", 2000)
    expected = refit(model, whole, Unfinished())
    with monkeypatch.context() as patch:
        stop_at(patch, reconstruct.BlockTrainer, "_train_block", 4)  # the second of the decoder
        with pytest.raises(Stopped):
            refit(model, pruned, Unfinished(tmp_path / "step"))
    assert refit(model, again, Unfinished(tmp_path / "step")) == expected and same(whole, again)


def test_what_another_run_left_is_not_read(tmp_path):
    file = tmp_path / "folder" / "step"
    Unfinished(file, key=[1]).write({"a": torch.ones(1)})
    assert Unfinished(file, key=[2]).read() is None and Unfinished(file, key=[1]).read().tensors["a"] == 1
    file.write_bytes(file.read_bytes()[:-1])
    assert Unfinished(file, key=[1]).read() is None
    assert Unfinished(tmp_path / "none").read() is None and not Unfinished().due


def test_a_step_goes_on_where_nothing_can_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    unfinished = Unfinished(tmp_path / "file" / "step")
    assert unfinished.due
    unfinished.write({"a": torch.ones(1)})
    assert "going on without" in caplog.text and not unfinished.due


def test_writing_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "INTERVAL", 60.0)
    monkeypatch.setattr(module, "SHARE", 10)
    save = module.save_file

    def slow(*args):
        now[0] += 30
        save(*args)

    monkeypatch.setattr(module, "save_file", slow)
    unfinished = Unfinished(tmp_path / "step")
    assert not unfinished.due
    now[0] = 60.0
    assert unfinished.due
    unfinished.write({"a": torch.ones(1)})  # until 90
    now[0] = 389.0
    assert not unfinished.due
    now[0] = 390.0
    assert unfinished.due


def prune(home, text, folder, *flags):
    argv = ["prune", f"{home}/base", str(folder), "--pruning_ratio", "0.5", "--calib_dataset", str(text)]
    argv += ["--num_examples", "32", "--calib_seq_len", "16", "--self_examples", "32", "--refit_tokens", "2000"]
    return main([*argv, "--eval_datasets", "", *flags])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_command_goes_on_where_it_was_stopped(home, home_text, tmp_path, monkeypatch):
    assert prune(home, home_text, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, training.Descent, "_step", 3)
        with pytest.raises(Stopped):
            prune(home, home_text, tmp_path / "out")
    left = tmp_path / ".out.unfinished"
    assert not (tmp_path / "out").exists()
    assert {file.stem for file in left.iterdir()} >= {"self-samples", "closed-form", "training"}
    with monkeypatch.context() as patch:
        written, scored = stop_at(patch, data, "generate", 0), stop_at(patch, taylor, "visit_moments", 0)
        assert prune(home, home_text, tmp_path / "out") == 0
        assert not written() and not scored()
    assert weights(tmp_path / "out") == weights(tmp_path / "whole") and not left.exists()


def test_a_failure_at_once_leaves_what_an_earlier_run_had_done(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 60.0)
    for left, fresh, stays in ((True, False, True), (True, True, False), (False, False, False)):
        folder = tmp_path / f"{left}{fresh}"
        if left:
            Unfinished(folder / "step").write({"a": torch.ones(1)})
        with pytest.raises(Stopped), module.kept_until_done(folder, fresh=fresh):
            Unfinished(folder / "other").write({"a": torch.ones(1)})
            raise Stopped
        assert (folder / "step").exists() == folder.exists() == stays


def test_a_fresh_command_begins_anew(home, home_text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, training.Descent, "_step", 3)
        with pytest.raises(Stopped):
            prune(home, home_text, tmp_path / "out")
    with monkeypatch.context() as patch:
        written = stop_at(patch, data, "generate", 0)
        assert prune(home, home_text, tmp_path / "out", "--fresh") == 0
        assert written()
    assert isinstance(lp.load(str(tmp_path / "out"))[0], torch.nn.Module)
