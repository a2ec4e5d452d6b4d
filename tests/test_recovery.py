"""Recovery runs: what is trained, what is written, and that the loss falls."""

import copy
import json
import shutil

import pytest
import torch
from helpers.architectures import perturbed
from helpers.models import build
from helpers.recovery import arguments, read_losses, read_record, write_pruned
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import llm_pruner as lp
from llm_pruner.files import read_json
from llm_pruner.models.running import relative_difference
from llm_pruner.recovery import settings
from llm_pruner.recovery.datasets import padding_collator, training_data
from llm_pruner.recovery.run import recover
from llm_pruner.recovery.settings import DataSettings, ModelSettings
from llm_pruner.recovery.tokenize import ExampleFormat


@pytest.mark.parametrize(("method", "model"), (("lora", "pruned"), ("lora", "uniform"), ("dora", "pruned")))
def test_adapters_are_trained_and_merged(home, tmp_path, method, model):
    out = tmp_path / "out"
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    recover(arguments(home, out, method=method, prune_model=str(home / model), merge=True))
    base, _ = lp.load(str(home / model))
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        expected, logits = adapted(ids).logits, merged(ids).logits
        untouched = lp.load(str(home / model))[0](ids).logits
    assert relative_difference(logits, expected) < 1e-4 < relative_difference(untouched, expected)
    adapted_layers = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert adapted_layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    record = read_record(out)
    first, last = record["losses"]["validation"]
    assert last < first and record["steps"] == 8 and record["tokens"] > 0
    assert (out / "curves.png").stat().st_size > 1000 and len(read_losses(out)) == 8
    assert not list(out.glob(".*"))
    again, _ = lp.load(str(out))  # the adapter's folder alone, merged into what it names
    with torch.no_grad():
        assert relative_difference(again(ids).logits, expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "method"),
    (("mixtral", "lora"), ("deepseek_v3", "lora"), ("llama4_text", "lora"), ("deepseek_v3", "dora")),
)
def test_adapters_of_stacked_experts_are_trained_and_merged(home, tmp_path, tokenizer, name, method):
    """The matrices of all experts are one parameter, which peft renames and gives no dropout."""
    write_pruned(name, tokenizer, tmp_path / "pruned", "neurons")
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    out = tmp_path / "out"
    changes = {"prune_model": str(tmp_path / "pruned"), "method": method, "merge": True, "max_steps": 3}
    recover(arguments(home, out, **changes, packing=True, cutoff_len=48))
    base, _ = lp.load(str(tmp_path / "pruned"))
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    merged, untouched = (AutoModelForCausalLM.from_pretrained(f) for f in (out / "merged", tmp_path / "pruned"))
    with torch.no_grad():
        logits, expected, before = (m(ids, use_cache=False).logits for m in (merged, adapted, untouched))
    assert relative_difference(logits, expected) < 1e-4 < relative_difference(before, expected)
    changed = {n for (n, a), b in zip(merged.named_parameters(), untouched.parameters()) if not torch.equal(a, b)}
    experts = {n for n, p in merged.named_parameters() if ".experts." in n and p.ndim == 3}
    # DoRA adapts no parameters, which experts and some layers named like experts are for peft.
    skipped = {"lm_head", "router"} | ({"gate_proj", "up_proj", "down_proj"} if method == "dora" else set())
    adapted_layers = {f"{name}.weight" for name in linear if name.split(".")[-1] not in skipped}
    assert changed == adapted_layers | (experts if method == "lora" else set())


def test_bfloat16_learns_nearly_the_same_on_a_cpu(home, tmp_path):
    for dtype in ("float32", "bfloat16"):
        recover(arguments(home, tmp_path / dtype, dtype=dtype, lora_dropout=0.0, val_set_size=0))
    exact, narrow = (dict(read_losses(tmp_path / dtype)) for dtype in ("float32", "bfloat16"))
    assert narrow == pytest.approx(exact, rel=0.02) and narrow != exact
    stored = load_file(tmp_path / "bfloat16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_full_training_changes_all_weights(home, tmp_path):
    recover(arguments(home, tmp_path / "out", method="full"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, _ = lp.load(str(home / "pruned"))
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in before.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").units


@pytest.mark.parametrize("method", ("lora", "full"))
def test_gradient_checkpointing_keeps_the_losses(home, tmp_path, method):
    options = {"method": method, "lora_dropout": 0.0, "max_steps": 3, "val_set_size": 0}
    recover(arguments(home, tmp_path / "plain", **options))
    recover(arguments(home, tmp_path / "checkpointed", **options, gradient_checkpointing=True))
    plain, checkpointed = (read_losses(tmp_path / name) for name in ("plain", "checkpointed"))
    assert checkpointed == [[step, pytest.approx(loss, abs=1e-5)] for step, loss in plain]


def test_streamed_data_is_trained_on(home, home_text, tmp_path):
    recover(arguments(home, tmp_path / "out", streaming=True, max_steps=3, data_path=str(home_text)))
    assert len(read_losses(tmp_path / "out")) == 3


def test_tokenized_data_is_cached(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recover(arguments(home, tmp_path / "a", cache_dataset=True, max_steps=2, val_set_size=0))
    (kept,) = (tmp_path / "datasets" / "cache").iterdir()
    monkeypatch.setattr("llm_pruner.recovery.datasets.tokenize", None)  # no second call
    recover(arguments(home, tmp_path / "b", cache_dataset=True, max_steps=2, val_set_size=0))
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b") and kept.is_dir()


@pytest.mark.parametrize(
    ("objective", "method"), (("causal", "lora"), ("ul2", "lora"), ("o_ul2", "lora"), ("causal", "distill"))
)
def test_encoder_decoders_learn(tokenizer, tmp_path, home_text, objective, method):
    torch.manual_seed(0)
    words = copy.deepcopy(tokenizer)
    words.add_special_tokens(
        {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(64)], "pad_token": "<unk>"}
    )
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    lp.save(model, words, tmp_path / "base")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=("neurons",))
    plan.settings["base_model"] = str(tmp_path / "base")
    lp.save(lp.apply(model, plan), words, tmp_path / "pruned", plan=plan)
    hidden = {"distill_hidden": 0.1} if method == "distill" else {}
    recover(
        arguments(tmp_path, tmp_path / "out", data_path=str(home_text), method=method, objective=objective, **hidden)
    )
    first, last = read_record(tmp_path / "out")["losses"]["validation"]
    assert last < first


def test_held_out_examples_of_a_stream_stay_out(tokenizer):
    data = DataSettings(sources=("python-docs", "python-docs"), streaming=True, validation_size=20)
    train, held_out = training_data(data, tokenizer, ExampleFormat(cutoff_len=32))
    kept = {tuple(row["input_ids"]) for row in held_out}
    for epoch in range(2):
        train.set_epoch(epoch)
        seen = [tuple(row["input_ids"]) for row in train.take(200)]
        assert len(kept) == 10 and not kept & set(seen[:20])  # each text twice, so half of them are alike


def test_merged_weights_keep_the_digits_of_the_checkpoint(home, tmp_path, monkeypatch):
    """Frozen weights are narrow on a GPU while an adapter is trained."""
    narrow = {"device": "cpu", "compute": torch.bfloat16, "weights": torch.bfloat16}
    model = ModelSettings(name=str(home / "pruned"), **narrow)
    monkeypatch.setattr(settings, "_model_settings", lambda *_: model)
    recover(arguments(home, tmp_path / "out", max_steps=1, val_set_size=0, merge=True))
    stored, merged = (lp.load(str(path))[0] for path in (home / "pruned", tmp_path / "out" / "merged"))
    assert torch.equal(merged.get_input_embeddings().weight, stored.get_input_embeddings().weight)
    adapted, _ = lp.load(str(tmp_path / "out"))
    expected, weights = dict(adapted.named_parameters()), dict(merged.named_parameters())
    assert all(torch.allclose(weights[name], weight, atol=1e-6) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ("m2m_100", "blenderbot"))
def test_encoder_decoders_that_shift_their_labels_themselves_learn(tokenizer, home, tmp_path, kind):
    """The classes have no method of their own that makes the decoder's inputs."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), d_model=32, pad_token_id=0, **sizes)
    config.decoder_start_token_id = config.eos_token_id = 2
    model = perturbed(AutoModelForSeq2SeqLM, config)
    lp.save(model, tokenizer, tmp_path / "pruned")
    inputs, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 2]])
    collate = padding_collator(tokenizer, model)
    batch = collate([{"input_ids": inputs[0].tolist(), "labels": labels[0].tolist()}])
    width = labels.shape[1]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :width]
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    data = {"data_path": str(home / "data.jsonl"), "method": "full"}
    recover(arguments(tmp_path, tmp_path / "out", **data))
    first, last = read_record(tmp_path / "out")["losses"]["validation"]
    assert last < first


def test_no_example_is_padded_beyond_the_context(tokenizer, tmp_path, home_text):
    model = build("gpt2", vocab_size=len(tokenizer), n_positions=100)
    lp.save(model, tokenizer, tmp_path / "pruned")
    recover(arguments(tmp_path, tmp_path / "out", data_path=str(home_text), cutoff_len=None, max_steps=1))
    assert read_record(tmp_path / "out")["steps"] == 1


def test_further_chat_templates_and_fields_are_kept(home, tokenizer, tmp_path):
    shutil.copytree(home / "pruned", tmp_path / "pruned")
    words = copy.deepcopy(tokenizer)
    words.chat_template = {"default": tokenizer.chat_template, "tools": "{{ messages }}"}
    words.save_pretrained(tmp_path / "pruned")
    config = read_json(tmp_path / "pruned" / "config.json")
    (tmp_path / "pruned" / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    for steps in (1, 2):
        options = {"data_path": str(home / "data.jsonl"), "method": "full", "max_steps": steps}
        recover(arguments(tmp_path, tmp_path / "out", resume_from_checkpoint="auto", **options))
    folder = tmp_path / "out" / "additional_chat_templates"
    assert folder.stat().st_mode & 0o100 and (folder / "tools.jinja").read_text() == "{{ messages }}"
    assert read_json(tmp_path / "out" / "config.json")["use_cache"] is False
