"""Block by block: other precision, other device, weights in files; the same numbers and a fraction of the memory."""

import weakref

import pytest
import torch
from helpers.models import build, pruned_by, rounded, tokens

import llm_pruner as lp
from llm_pruner.checkpoint.on_disk import on_disk
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.importance import gradients
from llm_pruner.importance.gradients import _Sweep
from llm_pruner.importance.taylor import VARIANTS
from llm_pruner.models.blockwise import StandIns, computing, native_compute, standing_in

FAMILIES = ("llama_grouped", "gpt2", "mixtral", "bloom", "gemma2", "t5:seq2seq", "bart:seq2seq", "mamba", "zamba2")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_weights_score_as_wide_ones(name, variant):
    wide, narrow = rounded(name)
    graph, ids = lp.trace(wide), tokens(3, 16)
    expected = lp.score(wide, graph, ids, taylor=variant)
    found = lp.score(narrow, graph, ids, taylor=variant)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for unit, values in expected.values.items():
        torch.testing.assert_close(found.values[unit], values, rtol=2e-3, atol=2e-3 * values.max().item())


@pytest.mark.parametrize("criterion", ("activation", "wanda", "flap"))
def test_16_bit_weights_score_as_their_float32_copies(criterion):
    wide, narrow = rounded("llama_grouped")
    graph, ids = lp.trace(wide), tokens(3, 16)
    expected = lp.score(wide, graph, ids, criterion).values
    for unit, values in lp.score(narrow, graph, ids, criterion).values.items():
        torch.testing.assert_close(values, expected[unit], rtol=1e-4, atol=0)


def test_only_one_block_is_converted_at_a_time():
    _, narrow = rounded("llama_grouped")
    made: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    most = [0]

    def stand_in(name, tensor):
        copy = tensor.detach().float()
        made.append((name, weakref.ref(copy)))
        most.append(len({n.split(".")[2] for n, copy in made if ".layers." in n and copy() is not None}))
        return copy

    before = dict(narrow.named_parameters())
    with torch.no_grad(), standing_in(narrow, stand_in):
        narrow(tokens(2, 8), use_cache=False)
    assert max(most) == 1 and {n for n, _ in made} >= before.keys()
    assert all(p is before[n] for n, p in narrow.named_parameters())


def test_shared_weights_are_no_block():
    """A layer whose weights another one has too cannot be visited on its own."""
    model = build("llama")
    model.model.layers[2] = model.model.layers[0]
    assert list(StandIns(model, lambda _, t: t).blocks) == ["model.layers.1"] + [
        f"model.layers.{i}" for i in range(3, len(model.model.layers))
    ]


def test_perplexity_in_full_precision():
    wide, narrow = rounded("llama_grouped")
    ids = tokens(4, 16)
    assert perplexity(narrow, ids).loss == pytest.approx(perplexity(wide, ids).loss, rel=1e-5)
    with computing(narrow) as compute:
        assert compute.dtype is torch.float32 and narrow.lm_head.weight.dtype is torch.float32
    assert narrow.lm_head.weight.dtype is torch.bfloat16


def test_tensors_in_files(tmp_path):
    model = build("llama_grouped")
    plan, pruned = pruned_by(model)
    mapped = lp.apply(model, plan, on_disk(tmp_path))
    assert not any(tmp_path.iterdir()), "the files have no names"
    for (name, a), (_, b) in zip(pruned.state_dict().items(), mapped.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    lp.save(mapped, None, tmp_path / "m")
    assert lp.verify(model, mapped, plan).equivalent


def test_a_folder_that_cannot_be_written(tmp_path):
    model = build("llama")
    plan, _ = pruned_by(model)
    with pytest.raises(lp.PrunerError, match="cannot put"):
        lp.apply(model, plan, on_disk(tmp_path / "missing"))


@pytest.mark.slow
def test_the_command_streams(smollm2, tmp_path, monkeypatch):
    """--stream gives the plan that the plain way gives, and the same checkpoint."""
    from llm_pruner.cli import main

    model, tokenizer = smollm2
    monkeypatch.chdir(tmp_path)
    lp.save(model, tokenizer, tmp_path / "m")
    flags = ["--base_model", str(tmp_path / "m"), "--pruning_ratio", "0.25", "--eval_datasets", "", "--save_model"]
    flags += ["--preset", "paper", "--calib_dataset", "general", "--num_examples", "2", "--calib_seq_len", "16"]
    flags += ["--device", "cpu"]
    assert main(["prune", *flags, "--save_ckpt_log_name", "plain"]) == 0
    assert main(["prune", *flags, "--save_ckpt_log_name", "streamed", "--stream"]) == 0
    plain, streamed = (lp.load(str(tmp_path / "prune_log" / n))[0].state_dict() for n in ("plain", "streamed"))
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in plain.items())


def test_layers_go_to_devices_in_order(tmp_path):
    """As many as there is room for; embeddings and head to the first; tied weights stay one."""
    from llm_pruner.models.dispatch import spread

    model = build("llama_grouped")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    size = sum(p.nbytes for p in model.model.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - size * len(model.model.layers)
    spread(model, {torch.device("meta"): rest + 1.5 * size})
    where = [{p.device.type for p in layer.parameters()} for layer in model.model.layers]
    assert where == [{"meta"}] + [{"cpu"}] * (len(where) - 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device.type == model.model.rotary_emb.inv_freq.device.type == "meta"
    with pytest.raises(lp.PrunerError, match="device_map='auto'"):  # as accelerate offloads
        native_compute(model)


def test_without_gpus_a_device_map_changes_nothing(smollm2, tmp_path, monkeypatch):
    model, tokenizer = smollm2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    lp.save(model, tokenizer, tmp_path / "m")
    loaded, _ = lp.load(str(tmp_path / "m"), device_map="auto")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    with pytest.raises(lp.PrunerError, match="give auto"):
        lp.load(str(tmp_path / "m"), device_map="balanced")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ("llama_grouped", "gpt2", "mixtral", "t5:seq2seq"))
def test_calibration_sets_of_any_size_are_scored_part_by_part(name, variant, monkeypatch):
    model, _ = rounded(name)
    graph, ids = lp.trace(model), tokens(96, 64)
    expected = lp.score(model, graph, ids, taylor=variant)
    backward, parts = _Sweep._backward, []
    monkeypatch.setattr(gradients, "LEAST_TAPES", 0)
    monkeypatch.setattr(
        _Sweep, "_backward", lambda self, n, **kw: parts.append(len(self.tapes)) or backward(self, n, **kw)
    )
    found = lp.score(model, graph, ids, taylor=variant)
    assert len(parts) > 1 and sum(parts) % 6 == 0, "6 batches of 1,024 tokens, or 96 of a sample"
    for unit, values in expected.values.items():
        torch.testing.assert_close(found.values[unit], values, rtol=1e-3, atol=1e-5 * values.max().item())
