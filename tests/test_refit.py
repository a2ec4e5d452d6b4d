"""Refits by training: block by block and end to end, without labels, for models with and without a closed form."""

import json
import math
import re

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build, pruned_by, tokens
from test_apply import equal_weights
from test_encoders import TEXT
from test_encoders import build as classifier

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.models import arithmetic
from llm_pruner.models.inputs import ModelInputs
from llm_pruner.models.loss import total_loss
from llm_pruner.models.running import forward, main_output
from llm_pruner.pruning.arguments import PruneArguments
from llm_pruner.pruning.settings import resolve_settings
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.distill import Distillation, distill, divergence
from llm_pruner.refit.lora import RANK, _layers, lora, low_rank, next_token_loss
from llm_pruner.refit.reconstruct import reconstruct
from llm_pruner.refit.tokens import KeptTokens
from llm_pruner.refit.training import TOKENS_PER_STEP, endless_batches, hold_out

SMALL = Budget(tokens=6000)
COUNTS = (torch.arange(512)[:, None] + torch.arange(16)) % 80  # next tokens can be learned


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def written_by(model, samples, seed):
    """Return LongTensor ``[samples, 16]`` drawn from a model, behind a first token that is drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(96, (samples, 1), generator=generator)
    for _ in range(15):
        chances = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids


def test_the_room_is_its_function():
    import llm_pruner.refit.distill as module

    assert callable(lp.refit) and module.distill is distill


@pytest.mark.parametrize("method", ("blocks", "distill"))
@pytest.mark.parametrize("family", ("llama", "mixtral"))
def test_unseen_tokens_come_closer_than_by_the_ridge_alone(family, method):
    model = build(family)
    pruned, ridge = (pruned_by(model, kinds=("neurons",))[1] for _ in range(2))
    ids, unseen = tokens(1024 if family == "mixtral" else 256, 16), tokens(16, 16, seed=9)
    before = weights(model)
    lp.refit(model, ridge, ids)
    report = lp.refit(model, pruned, ids, method, tokens=30_000)
    assert report.compensation is not None and not report.no_compensation
    p, q, r = (logits(m, unseen).log_softmax(-1) for m in (model, pruned, ridge))
    assert divergence(q, p) < 0.995 * divergence(r, p)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the original changed"
    assert {p.requires_grad for p in pruned.parameters()} == {True} and all(p.grad is None for p in pruned.parameters())


@pytest.mark.parametrize("method", (distill, reconstruct, lora))
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: build("llama"), "hidden"),
        (lambda: build("llama"), "layers"),
        (lambda: tiny_model("t5:seq2seq"), "neurons"),
        (lambda: build("llama").to(torch.bfloat16), "neurons"),
    ],
    ids=("hidden", "layers", "two stacks", "16 bits"),
)
def test_models_without_a_closed_form_come_closer_too(make, kinds, method):
    model = make()
    plan, pruned = pruned_by(model, kinds=(kinds,))
    dtype = next(pruned.parameters()).dtype
    ids = COUNTS if method is lora else tokens(64, 16)
    report = method(model, pruned, ids, SMALL, **({"plan": plan} if method is reconstruct else {}))
    for one in getattr(report, "blocks", [report]):
        assert one.after <= one.before
    assert any(one.after < one.before for one in getattr(report, "blocks", [report]))
    assert {p.dtype for p in pruned.parameters()} == {dtype}


@pytest.mark.parametrize("method", (reconstruct, distill, lora))
def test_the_seed_decides(method):
    model, ids = build("gpt2"), COUNTS
    results = []
    for seed in (0, 0, 1):
        pruned = pruned_by(model, kinds=("neurons",))[1]
        method(model, pruned, ids, Budget(tokens=4000), seed=seed)
        results.append(weights(pruned))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("method", (distill, reconstruct))
def test_a_model_that_lost_nothing_stays_as_it_is(method):
    model, twin = build("llama"), build("llama")
    method(model, twin, tokens(64, 16), Budget(tokens=1000))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(model.parameters(), twin.parameters()))


def test_the_loss_is_that_by_hand():
    model = build("llama")
    _, pruned = pruned_by(model, kinds=("layers",), ratio=0.34)
    ids = tokens(2, 8)
    p, q = (logits(m, ids).log_softmax(-1) for m in (model, pruned))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert Distillation(model, pruned).loss(ids).item() == pytest.approx(expected, rel=1e-4)


def test_every_step_reads_the_weights_of_the_step_before():
    """Casts of weights that are kept over steps would train, and measure, on those of the first step."""
    model, ids = build("gpt2"), tokens(64, 16)
    pruned = pruned_by(model, kinds=("neurons",))[1]
    report = distill(model, pruned, ids, Budget(tokens=12000))
    assert report.after < 0.97 * report.before
    _, held_out = hold_out(ids, 4)
    assert Distillation(model, pruned).loss(held_out).item() == pytest.approx(report.after, rel=0.02)


def test_low_rank_updates_teach_a_model_the_text_that_the_original_wrote():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # a model that prefers some tokens
    text, unseen = written_by(model, 2048, seed=1), written_by(model, 64, seed=2)
    pruned = pruned_by(model, kinds=("neurons",))[1]
    before = weights(pruned)
    p, q = (logits(m, unseen).log_softmax(-1) for m in (model, pruned))
    report = lora(model, pruned, text, Budget(tokens=60_000))
    assert report.after < report.before
    assert divergence(logits(pruned, unseen).log_softmax(-1), p) < 0.9 * divergence(q, p)
    after = weights(pruned)
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        *("model.embed_tokens.weight", "lm_head.weight")
    }
    assert {p.requires_grad for p in pruned.parameters()} == {True} and all(p.grad is None for p in pruned.parameters())


def test_next_tokens_are_read_hardly_more_than_once():
    pruned = pruned_by(build("llama"), kinds=("neurons",))[1]
    assert lora(pruned, pruned, COUNTS[:64], Budget(tokens=100_000)).tokens <= 1.34 * 60 * 16 + TOKENS_PER_STEP


@pytest.mark.parametrize("family", ("llama", "gpt2", "mixtral"))
def test_updates_of_low_rank_are_merged(family):
    model, ids = build(family), tokens(4, 16)
    layers, plain = _layers(model), weights(model)
    assert len(layers) == {"llama": 7, "gpt2": 4, "mixtral": 4}[family] * model.config.num_hidden_layers
    with torch.no_grad(), low_rank(layers, 0, torch.device("cpu")) as factors:
        assert torch.equal(logits(model, ids), logits(build(family), ids)), "updates begin at 0"
        for factor in factors:
            factor.copy_(0.02 * torch.randn(factor.shape))
        added = logits(model, ids)
    assert torch.allclose(logits(model, ids), added, rtol=1e-3, atol=1e-4)
    ranks = [int(torch.linalg.matrix_rank(m - plain[n], rtol=1e-4)) for n, m in weights(model).items() if m.ndim == 2]
    assert max(ranks) <= RANK and not torch.allclose(added, logits(build(family), ids), atol=1e-3)


@pytest.mark.parametrize("family", ("llama", "t5:seq2seq"))
def test_the_loss_of_next_tokens_is_that_by_hand(family):
    model, ids = tiny_model(family).eval(), tokens(4, 16)
    total, count = total_loss(model, [ids])
    assert next_token_loss(model, ids).item() == pytest.approx(total / count, rel=1e-5)


def test_a_model_that_predicts_no_tokens_learns_its_output():
    model = classifier("BertForSequenceClassification", "bert", **TEXT)
    _, pruned = pruned_by(model, kinds=("neurons",))
    ids = tokens(64, 16)
    expected = (model(ids).logits - pruned(ids).logits).square().sum(-1) / model(ids).logits.square().sum(-1)
    assert Distillation(model, pruned).loss(ids).item() == pytest.approx(expected.mean().item(), rel=1e-4)
    for method, untrained in ((distill, pruned), (lora, pruned_by(model, kinds=("neurons",))[1])):
        report = method(model, untrained, ids, SMALL)
        assert report.after < report.before


def test_minutes_end_a_training():
    model = build("llama")
    pruned = pruned_by(model, kinds=("neurons",))[1]
    assert distill(model, pruned, tokens(64, 16), Budget(minutes=0.01)).steps >= 1


@pytest.mark.parametrize("limits", [{}, {"tokens": 0}, {"minutes": math.inf}])
def test_a_budget_is_needed(limits):
    with pytest.raises(lp.PrunerError, match="give tokens or minutes above 0"):
        Budget(**limits)


def test_every_sample_is_read_once_an_epoch():
    ids = torch.arange(20).view(10, 2)
    fitted, held_out = hold_out(ids, 2)
    assert sorted([*fitted[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(0, 20, 2)) and len(held_out) == 2
    batches = endless_batches(ids, 4, seed=3)
    epochs = [torch.cat([next(batches) for _ in range(3)])[:, 0].tolist() for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 20, 2))
    images = ModelInputs({"pixel_values": torch.rand(6, 3, 4, 4)})
    assert [len(part) for part in hold_out(images, 2)] == [4, 2]
    assert len(next(endless_batches(images, 4, seed=0))) in (2, 4)


@pytest.mark.parametrize("family", ("llama", "t5:seq2seq"))
def test_a_cut_vocabulary_is_distilled(family):
    """The calibration set is the pruned model's tokens; the original reads the same by its own ids."""
    model = tiny_model(family) if ":" in family else build(family)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=("neurons",))
    (unit,) = graph.of_kind("vocabulary")
    plan.keep(unit, torch.cat([torch.arange(4), torch.arange(5, unit.size, 2)]), graph.shapes)
    kept = torch.tensor(plan.tokens)
    pruned, ids = lp.apply(model, plan), tokens(96, 16) % len(kept)
    with torch.no_grad():
        theirs, ours = (main_output(forward(m, i))[:, :-1] for m, i in ((model, kept[ids]), (pruned, ids)))
    before = divergence(ours.log_softmax(-1), theirs[..., kept].log_softmax(-1)) / ours[..., 0].numel()
    loss = Distillation(model, pruned, KeptTokens(kept)).loss(ids).item()
    assert loss == pytest.approx(before.item(), rel=0.1)  # all positions here, all but the last there
    report = lp.refit(model, pruned, ids, "distill", plan=plan, tokens=20_000)
    assert report.training.after < report.training.before and report.compensation is None
    with pytest.raises(lp.PrunerError, match="vocabulary of"):
        lp.refit(model, pruned, ids + 1, "distill", plan=plan)
    for method in ("blocks", "lora"):
        with pytest.raises(lp.PrunerError, match="the plan cuts it: use distill"):
            lp.refit(model, pruned, ids, method, plan=plan)


def test_refusals():
    model = build("llama")
    plan, pruned = pruned_by(model, kinds=("layers",))
    with pytest.raises(lp.PrunerError, match="choose from bias, ridge, blocks, distill, lora"):
        lp.refit(model, pruned, tokens(64, 16), "magic")
    with pytest.raises(lp.PrunerError, match="give plan, which names the layers"):
        lp.refit(model, pruned, tokens(64, 16), "blocks", tokens=1000)
    with pytest.raises(lp.PrunerError, match="at least 16 calibration samples, not 8"):
        distill(model, pruned, tokens(8, 16), SMALL)
    with pytest.raises(lp.PrunerError, match="at least 25 calibration samples, not 8"):
        reconstruct(model, pruned, tokens(8, 16), SMALL, plan=plan)
    with pytest.raises(lp.PrunerError, match="give plan, which names channels"):
        reconstruct(model, pruned_by(model, kinds=("hidden",))[1], tokens(32, 16), SMALL)
    for given in (None, plan):
        with pytest.raises(lp.PrunerError, match="one vocabulary, and these have 96 and 90 tokens: give plan"):
            lp.refit(model, build("llama", vocab_size=90), tokens(32, 16) % 90, "distill", plan=given)


@pytest.mark.parametrize(
    ("flags", "compensation", "training"),
    [
        ({}, "least_squares", "lora"),
        ({"refit": "distill"}, "least_squares", "distill"),
        ({"preset": "fast"}, "least_squares", "lora"),
        ({"refit": "ridge"}, "least_squares", "none"),
        ({"preset": "paper"}, "none", "none"),
        ({"refit": "blocks"}, "least_squares", "blocks"),
        ({"refit": "bias"}, "bias", "none"),
        ({"refit": "none"}, "none", "none"),
        ({"compensate": "least_squares"}, "least_squares", "none"),
        ({"compensate": "bias"}, "bias", "none"),
        ({"compensate": "none"}, "none", "none"),
        ({"channel_wise": True}, "none", "lora"),
    ],
)
def test_flags_and_presets_name_the_refit(flags, compensation, training):
    settings = resolve_settings(PruneArguments(device="cpu", eval_device="cpu", **flags))
    assert (settings.refit.compensation, settings.refit.training) == (compensation, training)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"refit": "ridge", "compensate": "bias"}, "--compensate and --refit exclude each other"),
        ({"compensate": "bias", "refit_tokens": 10}, "exclude each other"),
        ({"refit": "ridge", "refit_tokens": 10}, "--refit_tokens has no effect with --refit ridge"),
        ({"refit": "ridge", "refit_minutes": 1.0}, "--refit_minutes has no effect with --refit ridge"),
        ({"refit_tokens": 0}, "--refit_tokens 0"),
        ({"refit_minutes": 0.0}, "--refit_minutes 0.0 is out of range"),
        ({"refit": "distill", "num_examples": 8}, "--refit distill needs --num_examples of at least 32"),
        ({"refit": "ridge", "channel_wise": True}, "--refit ridge"),
    ],
)
def test_flags_that_cannot_work(flags, message):
    with pytest.raises(lp.PrunerError, match=message):
        resolve_settings(PruneArguments(device="cpu", eval_device="cpu", **flags))


@pytest.mark.parametrize("method", ("blocks", "distill", "lora"))
def test_a_run_records_its_training_and_apply_repeats_it(method, home, home_text, tmp_path):
    flags = f"--num_examples 32 --calib_seq_len 16 --calib_dataset {home_text} --pruner_type l2 --self_examples 4"
    flags += f" --refit {method} --refit_tokens 2000 --eval_datasets= --device cpu"
    assert main(["prune", str(home / "base"), str(tmp_path / "run"), *flags.split()]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    record = lp.PruningPlan.load(tmp_path / "run" / "pruning_plan.json").settings["refit"]
    assert metrics["arguments"]["refit"] == record["training"] == method
    assert record["training_tokens"] >= 2000 and record["training_samples"] == (36 if method == "blocks" else 125)
    assert metrics["refit"]["blocks" if method == "blocks" else "training"]
    plan = str(tmp_path / "run" / "pruning_plan.json")
    assert main(["apply", plan, str(home / "base"), str(tmp_path / "again"), "--refit"]) == 0
    again, run = (lp.load(str(tmp_path / name))[0] for name in ("again", "run"))
    assert equal_weights(again, run, rtol=1e-3, atol=1e-4)


def test_an_offloaded_model_is_trained_block_by_block(home, home_text, tmp_path, capsys):
    flags = f"--num_examples 32 --calib_seq_len 16 --calib_dataset {home_text} --pruner_type l2 --self_examples 0"
    argv = ["prune", str(home / "base"), str(tmp_path / "run"), *flags.split(), "--eval_datasets=", "--stream"]
    assert main([*argv, "--refit", "distill", "--refit_tokens", "1000"]) == 2
    assert "use --refit blocks" in capsys.readouterr().err
    assert main([*argv, "--refit", "blocks", "--refit_tokens", "1000"]) == 0
    blocks = json.loads((tmp_path / "run" / "metrics.json").read_text())["refit"]["blocks"]["blocks"]
    assert [one["module"] for one in blocks] == [f"model.layers.{i}" for i in range(3)]
    assert any(one["after"] < one["before"] for one in blocks)


def test_a_training_that_does_not_fit_in_memory_is_refused_or_left_out(home, home_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm_pruner.refit.training.free_bytes", lambda device: 10_000)
    model = build("llama")
    with pytest.raises(lp.PrunerError, match=r"training .* parameters needs .* GiB more .* use --refit blocks"):
        distill(model, pruned_by(model, kinds=("neurons",))[1], tokens(32, 16), SMALL)
    flags = f"--num_examples 32 --calib_seq_len 16 --calib_dataset {home_text} --pruner_type l2 --self_examples 0"
    argv = ["prune", str(home / "base"), *flags.split(), "--eval_datasets=", "--output"]
    assert main([*argv, str(tmp_path / "best")]) == 0
    assert re.search("no training: training .* parameters needs", capsys.readouterr().err)
    assert main([*argv, str(tmp_path / "asked"), "--refit", "distill"]) == 2
    assert not (tmp_path / "asked" / "model.safetensors").exists()


def test_targets_that_the_head_does_not_predict_are_left_out():
    """Mllama's embedding has rows for images, which its head lacks."""
    model, ids = build("llama"), tokens(4, 16)
    outside = ids.clone()
    outside[:, -1] = model.config.vocab_size
    embed = model.get_input_embeddings()
    embed.weight = torch.nn.Parameter(torch.cat([embed.weight, embed.weight[:1]]))
    with torch.no_grad():
        others, found = (next_token_loss(model, one).item() for one in (ids[:, :-1], outside))
    assert found == pytest.approx(others, rel=1e-5)


def test_a_model_that_does_not_run_in_bfloat16_is_named(monkeypatch):
    """DBRX's code adds products of matrices to tensors of float32."""
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device: True)
    model = tiny_model("dbrx")
    plan, pruned = pruned_by(model, kinds=("neurons",))
    with pytest.raises(lp.PrunerError, match=r"does not run with products in bfloat16 .* give --dtype float32"):
        lp.refit(model, pruned, tokens(64, 16), "lora", plan=plan, tokens=512)
