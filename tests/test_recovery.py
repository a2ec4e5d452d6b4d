"""Recovery: what is learnt, that it is learnt again alike after a crash, and that nothing half-written stays."""

import copy
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.architectures import perturbed, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.models.running import relative_difference
from llm_pruner.recovery.arguments import RecoverArguments
from llm_pruner.recovery.distill import Collator, Teacher, labelled
from llm_pruner.recovery.prompts import plain, prompt
from llm_pruner.recovery.run import recover
from llm_pruner.recovery.tokenize import IGNORED, Format, kind_of, rows, tokenized
from llm_pruner.recovery.trainer import RecoveryTrainer


def arguments(home, out, **changes):
    usual = {
        "prune_model": str(home / "pruned"),
        "data_path": str(home / "data.jsonl"),
        "output": str(out),
        "device": "cpu",
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 8,
        "val_set_size": 8,
        "cutoff_len": 96,
        "lora_r": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    return RecoverArguments.of(**(usual | changes))


def pruned(name, tokenizer, folder, kind):
    """A tiny random model of a type, pruned, in a folder."""
    config = tiny_config(name)
    config.vocab_size = len(tokenizer)
    model = perturbed(AutoModelForCausalLM, config)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, kinds=(kind,), round_to=8)
    lp.save(lp.apply(model, plan), tokenizer, folder, plan=plan)


def losses(folder):
    return json.loads((Path(folder) / "curves.json").read_text())["loss"]


def final(folder):
    return json.loads((Path(folder) / "recovery.json").read_text())


# --- Data ---------------------------------------------------------------------------------------------------------


def learnt(example, tokenizer):
    return tokenizer.decode([i for i, label in zip(*example.values(), strict=True) if label != IGNORED])


@pytest.mark.parametrize("template", ("alpaca", None))
def test_answers_are_learnt_and_prompts_are_not(home, tokenizer, template):
    data = tokenized(rows(str(home / "data.jsonl")), tokenizer, Format(96, template), "data")
    assert len(data) == 60 and set(data.column_names) == {"input_ids", "labels"}
    for i, example in enumerate(data):
        answer = learnt(example, tokenizer)
        assert answer.strip() == f"This is {i} times {i % 7}.</s>"
        assert all(label in (IGNORED, token) for token, label in zip(*example.values(), strict=True))
        assert tokenizer.decode(example["input_ids"]).count(f"Say {i}") == 1
    whole = tokenized(rows(str(home / "data.jsonl")), tokenizer, Format(96, template, train_on_inputs=True), "data")
    assert all(example["input_ids"] == example["labels"] for example in whole)


def test_prompts():
    ask = prompt("alpaca")
    assert ask("Do {input} it", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo {input} it\n\n### Response:\n"
    )
    assert "### Input:\nthis\n\n### Response:\n" in ask("Do it", "this")
    assert (plain("Do it.", ""), plain("Why?", "that")) == ("Do it: ", "Why? that.")
    with pytest.raises(lp.PrunerError, match="no prompt template"):
        prompt("vicuna")


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"prompt_input": "{instruction}|{input}|", "prompt_no_input": "{instruction}|"}))
    assert prompt(str(file))("a", "b") == "a|b|"
    file.write_text(json.dumps({"prompt_input": "{instruction}|"}))
    with pytest.raises(lp.PrunerError, match="prompt_no_input"):
        prompt(str(file))


def test_long_answers_are_cut_and_rows_without_any_left_out(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    cases = [("a", "long " * 200), ("question " * 200, "x"), ("b", ""), ("c", "fine")]
    file.write_text("\n".join(json.dumps({"instruction": a, "output": b}) for a, b in cases))
    data = tokenized(rows(str(file)), tokenizer, Format(64, None), "d")
    assert len(data[0]["input_ids"]) == 64 and len(data) == 2
    assert data[0]["labels"][-1] != tokenizer.eos_token_id and data[1]["labels"][-1] == tokenizer.eos_token_id


def test_only_the_assistant_of_a_chat_is_learnt(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    turns = [("user", "Hello"), ("assistant", "Good day"), ("user", "And now"), ("assistant", "Farewell")]
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    (example,) = tokenized(rows(str(file)), tokenizer, Format(96), "d")
    assert learnt(example, tokenizer) == "Good day</s>Farewell</s>"
    shared = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    file.write_text(json.dumps({"conversations": shared}))
    (example,) = tokenized(rows(str(file)), tokenizer, Format(96), "d")
    assert learnt(example, tokenizer) == "Good day</s>"


def test_an_answer_to_nothing_is_left_out(tmp_path, tokenizer):
    turns = [{"from": who, "value": f"{who} says {i}"} for i, who in enumerate(("gpt", "human", "gpt"))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    (row,) = tokenized(rows(str(tmp_path / "a.jsonl")), tokenizer, Format(96), "a")
    learnt = tokenizer.decode([i for i in row["labels"] if i != IGNORED])
    assert "gpt says 2" in learnt and "gpt says 0" not in learnt


def test_text_is_packed_without_loss(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    texts = ["one two three " * n for n in (1, 9, 4, 30)]
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    data = tokenized(rows(str(file)), tokenizer, Format(16), "d")
    assert {len(e["input_ids"]) for e in data} == {16} and all(e["labels"] == e["input_ids"] for e in data)
    stream = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    packed = [i for e in data for i in e["input_ids"]]
    assert packed == stream[: len(packed)] and len(stream) - len(packed) < 16
    streamed = list(tokenized(rows(str(file), streaming=True), tokenizer, Format(16), "d"))
    assert streamed == list(data)


@pytest.mark.parametrize("streaming", (False, True))
def test_answers_are_packed_without_padding(tmp_path, tokenizer, streaming):
    file = tmp_path / "d.jsonl"
    cases = [(f"question {i}", "word " * n) for i, n in enumerate((3, 0, 40, 1, 9, 30))]
    file.write_text("\n".join(json.dumps({"instruction": a, "output": b}) for a, b in cases))
    one_by_one = tokenized(rows(str(file)), tokenizer, Format(500, "question"), "d")
    assert len(one_by_one) == 5, "the empty answer teaches nothing"
    stream = {name: [i for e in one_by_one for i in e[name]] for name in ("input_ids", "labels")}
    packed = list(tokenized(rows(str(file), streaming), tokenizer, Format(16, "question", packing=True), "d"))
    expected = [
        {name: ids[i : i + 16] for name, ids in stream.items()} for i in range(0, len(stream["labels"]) - 15, 16)
    ]
    assert packed == [e for e in expected if any(label != IGNORED for label in e["labels"])]
    assert len(packed) > 4 and any(IGNORED in e["labels"] for e in packed)
    with pytest.raises(lp.PrunerError, match="--packing is for decoders"):
        tokenized(rows(str(file)), tokenizer, Format(16, packing=True, encoder_decoder=True), "d")
    with pytest.raises(lp.PrunerError, match="does not fill one window"):
        tokenized(rows(str(file)), tokenizer, Format(5000, packing=True), "d")


def test_the_blank_before_an_answer_is_learnt_with_it(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "Say", "input": "so", "output": "fine words"}))
    (example,) = tokenized(rows(str(tmp_path / "d.jsonl")), tokenizer, Format(96, "question"), "d")
    assert tokenizer.decode(example["input_ids"]) == "Question: Say\nso\nAnswer: fine words</s>"
    assert learnt(example, tokenizer) == " fine words</s>"


@pytest.mark.parametrize("suffix", (".json", ".parquet", ".csv", ".txt"))
def test_files(tmp_path, suffix):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["some words", "and more"]})
    file = tmp_path / f"d{suffix}"
    if suffix == ".txt":
        file.write_text("some words\nand more")
    else:
        getattr(data, f"to_{suffix[1:]}")(str(file))
    assert " ".join(r["text"] for r in rows(str(file))).split() == ["some", "words", "and", "more"]


def test_columns_that_say_nothing():
    with pytest.raises(lp.PrunerError, match="has the columns id, title"):
        kind_of(["title", "id"], "d")
    assert [kind_of(c, "d") for c in (["prompt", "completion"], ["instruction", "response"], ["text"])] == [
        "pair",
        "instruction",
        "text",
    ]


# --- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("lora", "dora"))
@pytest.mark.parametrize("model", ("pruned", "uniform"))
def test_adapters(home, tmp_path, method, model):
    out = tmp_path / "out"
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    recover(arguments(home, out, method=method, prune_model=str(home / model), merge=True))
    base, _ = lp.load(str(home / model))
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        expected, found = adapted(ids).logits, merged(ids).logits
        untouched = lp.load(str(home / model))[0](ids).logits
    assert relative_difference(found, expected) < 1e-4 < relative_difference(untouched, expected)
    adapted_layers = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert adapted_layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    told = final(out)
    first, last = told["losses"]["validation"]
    assert last < first and told["steps"] == 8 and told["tokens"] > 0
    assert (out / "curves.png").stat().st_size > 1000 and len(losses(out)) == 8
    assert not list(out.glob(".*"))
    again, _ = lp.load(str(out))  # the adapter's folder alone, merged into what it names
    with torch.no_grad():
        assert relative_difference(again(ids).logits, expected) < 1e-4


@pytest.mark.parametrize("name", ("mixtral", "deepseek_v3", "llama4_text"))
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_adapters_of_experts(home, tmp_path, tokenizer, name, method):
    """All experts' matrices are one parameter, which peft calls otherwise and gives no dropout."""
    pruned(name, tokenizer, tmp_path / "pruned", "neurons")
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    out = tmp_path / "out"
    changes = {"prune_model": str(tmp_path / "pruned"), "method": method, "merge": True, "max_steps": 3}
    recover(arguments(home, out, **changes, packing=True, cutoff_len=48))
    base, _ = lp.load(str(tmp_path / "pruned"))
    plain = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    merged, untouched = (AutoModelForCausalLM.from_pretrained(f) for f in (out / "merged", tmp_path / "pruned"))
    with torch.no_grad():
        found, expected, before = (m(ids, use_cache=False).logits for m in (merged, adapted, untouched))
    assert relative_difference(found, expected) < 1e-4 < relative_difference(before, expected)
    changed = {n for (n, a), b in zip(merged.named_parameters(), untouched.parameters()) if not torch.equal(a, b)}
    wanted = (
        {n for n, p in merged.named_parameters() if ".experts." in n and p.ndim == 3} if method == "lora" else set()
    )
    hidden = {"gate_proj", "up_proj", "down_proj"} if method == "dora" and name == "deepseek_v3" else set()
    wanted |= {f"{n}.weight" for n in plain if n.split(".")[-1] not in {"lm_head", "router", *hidden}}
    assert changed == wanted


def test_bfloat16_on_a_cpu(home, tmp_path):
    for dtype in ("float32", "bfloat16"):
        recover(arguments(home, tmp_path / dtype, dtype=dtype, lora_dropout=0.0))
    exact, narrow = (dict(losses(tmp_path / dtype)) for dtype in ("float32", "bfloat16"))
    assert narrow == pytest.approx(exact, rel=0.02) and narrow != exact
    stored = load_file(tmp_path / "bfloat16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_all_weights(home, tmp_path):
    recover(arguments(home, tmp_path / "out", method="full"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, _ = lp.load(str(home / "pruned"))
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in before.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").units


def test_activations_computed_again_and_streamed_data(home, tmp_path):
    """Less memory, the same losses; and data that comes as it is read trains as well."""
    for method in ("lora", "full"):
        options = {"method": method, "lora_dropout": 0.0, "max_steps": 3}
        recover(arguments(home, tmp_path / f"plain{method}", **options))
        recover(arguments(home, tmp_path / f"again{method}", **options, gradient_checkpointing=True))
        plain, again = (losses(tmp_path / f"{n}{method}") for n in ("plain", "again"))
        assert again == [[step, pytest.approx(loss, abs=1e-5)] for step, loss in plain]
    recover(arguments(home, tmp_path / "streamed", streaming=True, max_steps=3, data_path="python-docs"))
    assert len(losses(tmp_path / "streamed")) == 3


def test_tokenized_data_is_kept(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recover(arguments(home, tmp_path / "a", cache_dataset=True, max_steps=2))
    (kept,) = (tmp_path / "datasets" / "cache").iterdir()
    monkeypatch.setattr("llm_pruner.recovery.datasets.tokenized", None)  # not asked again
    recover(arguments(home, tmp_path / "b", cache_dataset=True, max_steps=2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and kept.is_dir()


class Killed(Exception):
    pass


def killed_at(monkeypatch, step):
    plain_step = RecoveryTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return plain_step(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "training_step", training_step)


@pytest.mark.parametrize("method", ("lora", "full"))
def test_going_on_after_an_interruption(home, tmp_path, monkeypatch, method):
    """The same data in the same order, the same dropout: the same losses as if nothing had happened."""
    recover(arguments(home, tmp_path / "whole", method=method, max_steps=10))
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Killed):
            recover(arguments(home, tmp_path / "out", method=method, max_steps=10))
    (tmp_path / "out" / ".partial-8").mkdir()
    with pytest.raises(lp.PrunerError, match="resume_from_checkpoint auto"):
        recover(arguments(home, tmp_path / "out", method=method, max_steps=10))
    recover(arguments(home, tmp_path / "out", method=method, max_steps=10, resume_from_checkpoint="auto"))
    whole, resumed = dict(losses(tmp_path / "whole")), dict(losses(tmp_path / "out"))
    assert set(whole) == set(resumed) == set(range(1, 11))
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, abs=1e-5)
    assert final(tmp_path / "out")["losses"] == final(tmp_path / "whole")["losses"]
    left = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    assert not list((tmp_path / "out").glob(".*"))


def test_going_on_where_nothing_is(home, tmp_path):
    recover(arguments(home, tmp_path / "out", resume_from_checkpoint="auto", max_steps=2))
    assert final(tmp_path / "out")["steps"] == 2


def test_a_full_disk_keeps_the_last_good_checkpoint(home, tmp_path, monkeypatch):
    plain_save = RecoveryTrainer._save_rng_state

    def full(self, folder):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain_save(self, folder)

    monkeypatch.setattr(RecoveryTrainer, "_save_rng_state", full)
    with pytest.raises(lp.PrunerError, match=r"step 4 .*No space left.*last good one is .*checkpoint-2"):
        recover(arguments(home, tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".partial*"))


def test_nan_stops_the_training(home, tmp_path, monkeypatch):
    plain_step = RecoveryTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = plain_step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and self.model.training else loss

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", compute_loss)
    with pytest.raises(lp.PrunerError, match=r"loss is nan at step 4.*checkpoint-2"):
        recover(arguments(home, tmp_path / "out"))
    monkeypatch.undo()
    with pytest.raises(lp.PrunerError, match=r"is (nan|inf) at step"):
        recover(arguments(home, tmp_path / "wild", method="full", learning_rate=1e30, warmup_steps=0))


# --- Distillation -----------------------------------------------------------------------------------------------------


def batch(tokenizer):
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8]}, {"input_ids": [9, 4], "labels": [9, 4]}]
    from transformers import DataCollatorForSeq2Seq

    padding = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<unk>")
    return Collator(DataCollatorForSeq2Seq(padding, return_tensors="pt"))(examples)


def test_the_loss_of_a_teacher_by_hand(home, tokenizer):
    teacher, student = (lp.load(str(home / name))[0] for name in ("base", "pruned"))
    inputs = batch(tokenizer)
    here, targets = labelled(inputs)
    assert targets.tolist() == [6, 7, 8, 4] and here.tolist()[1] == [True, False, False, False]
    found, _ = Teacher(teacher, weight=0.3, temperature=2.0, hidden=0.1).loss(student, inputs)
    total = 0.0
    for i, t, label in ((0, 0, 6), (0, 1, 7), (0, 2, 8), (1, 0, 4)):
        theirs, ours = (
            m(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
            for m in (teacher, student)
        )
        q, p = ours.logits[i, t], theirs.logits[i, t]
        total = total - 0.7 * q.log_softmax(-1)[label]
        divergence = (p / 2).softmax(-1) @ ((p / 2).log_softmax(-1) - (q / 2).log_softmax(-1))
        total = total + 0.3 * 4 * divergence
        h, g = theirs.hidden_states[-1][i, t], ours.hidden_states[-1][i, t]
        total = total + 0.1 * (h - g).square().sum() / h.square().sum()
    assert found.item() == pytest.approx(total.item() / 4, rel=1e-5)


@pytest.mark.parametrize("method", ("distill", "lora"))
def test_distillation(home, tmp_path, method):
    """Closer to the teacher than before, and a teacher asked once teaches what one that is asked each time does."""
    options = {"method": method, "teacher": "auto", "distill_weight": 1.0, "lora_dropout": 0.0, "learning_rate": 1e-3}
    options |= {"max_steps": 20}
    recover(arguments(home, tmp_path / "asked", **options))
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top": 500}
    recover(arguments(home, tmp_path / "cached", **options, **cache))
    for (step, a), (_, b) in zip(losses(tmp_path / "asked"), losses(tmp_path / "cached"), strict=True):
        assert a == pytest.approx(b, abs=5e-3), step
    (file,) = (tmp_path / "cache").glob("*.arrow")
    made = file.stat().st_mtime_ns
    recover(arguments(home, tmp_path / "again", **options, **cache))
    assert file.stat().st_mtime_ns == made
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")
    assert losses(tmp_path / "asked")[-1][1] < losses(tmp_path / "asked")[0][1]


@pytest.mark.parametrize("objective", ("causal", "ul2", "o_ul2"))
@pytest.mark.parametrize("method", ("lora", "distill"))
def test_encoder_decoders(tokenizer, tmp_path, objective, method):
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
        arguments(tmp_path, tmp_path / "out", data_path="python-docs", method=method, objective=objective, **hidden)
    )
    first, last = final(tmp_path / "out")["losses"]["validation"]
    assert last < first


# --- Many processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rank"), (("llama", 4), ("mamba", 1)))
def test_two_processes_learn_what_one_does(home, tmp_path, tokenizer, name, rank):
    model = home / "pruned"
    if name == "mamba":  # the forward pass calls some of its layers never
        model = tmp_path / "pruned"
        pruned(name, tokenizer, model, "channels")
    settings = {"prune_model": model, "data_path": home / "data.jsonl", "device": "cpu"}
    settings |= {"batch_size": 8, "micro_batch_size": 2, "max_steps": 5, "val_set_size": 8, "cutoff_len": 96}
    settings |= {"lora_r": rank, "lora_dropout": 0, "eval_steps": 5, "save_steps": 5, "logging_steps": 1}
    common = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    script = str(Path(__file__).parents[1] / "post_training.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533", script]
    two = subprocess.run([*launch, *common, "--output", str(tmp_path / "two")], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-2000:]
    one = subprocess.run(
        [sys.executable, script, *common, "--output", str(tmp_path / "one")], capture_output=True, text=True
    )
    assert one.returncode == 0, one.stderr[-2000:]
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    a, b = (final(tmp_path / n)["losses"]["validation"] for n in ("one", "two"))
    assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("method", ("full", "lora"))
def test_weights_spread_over_processes(home, tmp_path, method):
    """FSDP2: every process holds a part of each weight; what is written is whole, and what one process learns."""
    options = {"method": method, "lora_dropout": 0.0, "max_steps": 4, "merge": method == "lora", "cutoff_len": 32}
    options |= {"no_instruction": True}
    recover(arguments(home, tmp_path / "one", **options, data_path="python-docs"))
    flags = {**vars(arguments(home, tmp_path / "two", **options, data_path="python-docs")), "micro_batch_size": 2}
    common = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    fsdp |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    fsdp |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29537"]
    script = [str(Path(__file__).parent / "helpers" / "two_processes.py")]
    two = subprocess.run([*launch, *script, *common], capture_output=True, text=True, env=os.environ | fsdp)
    assert two.returncode == 0, two.stderr[-2000:]
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    for name in ("model",) if method == "full" else ("adapter_model", "merged/model"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)


@pytest.mark.slow
def test_killed_for_good(home, tmp_path):
    """SIGKILL at any moment, again and again: the run ends where one without interruption does."""
    settings = {"prune_model": home / "pruned", "data_path": home / "data.jsonl", "device": "cpu", "batch_size": 8}
    settings |= {"micro_batch_size": 2, "max_steps": 40, "val_set_size": 8, "cutoff_len": 96, "lora_r": 4}
    settings |= {"eval_steps": 2, "save_steps": 2, "logging_steps": 1, "resume_from_checkpoint": "auto"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    script = str(Path(__file__).parents[1] / "post_training.py")

    def start(folder):
        command = [sys.executable, script, *flags, "--output", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for wanted in (2, 10, 24):  # as soon as there is a checkpoint of that step
        process = start(tmp_path / "out")
        while not any(int(p.name[11:]) >= wanted for p in (tmp_path / "out").glob("checkpoint-*")):
            time.sleep(0.02)
            assert process.poll() is None
        process.kill()
        process.wait()
    assert start(tmp_path / "out").wait() == 0
    whole, resumed = dict(losses(tmp_path / "whole")), dict(losses(tmp_path / "out"))
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert not list((tmp_path / "out").glob(".*"))


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_model": "/nowhere"}, "there is no model folder /nowhere"),
        ({"prune_model": "nobody/nothing"}, "there is no pruned model nobody/nothing"),
        ({"prune_model": None}, "--prune_model is needed"),
        ({"prune_model": "base"}, "is not a pruned model"),
        ({"data_path": "/nowhere.json"}, "there is no data file"),
        ({"lora_r": 33}, "--lora_r 33 is more than model.layers.0.self_attn.q_proj"),
        ({"lora_target_modules": "c_attn"}, "has no linear layer c_attn; it has down_proj"),
        ({"prompt_template_name": "vicuna"}, "no prompt template 'vicuna'"),
        ({"method": "qlora"}, "choose from lora, dora, full, distill"),
        ({"batch_size": 5}, "no multiple"),
        ({"val_set_size": 60}, "leaves nothing of 60"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"teacher": "/nowhere"}, "there is no model folder"),
        ({"resume_from_checkpoint": "/nowhere"}, "is no checkpoint"),
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"cutoff_len": 500}, "the model reads at most 128"),
        ({"streaming": True, "max_steps": 0}, "give --max_steps"),
        ({"objective": "gpt"}, "unknown --objective"),
        ({"lr_scheduler_type": "cosin"}, "unknown --lr_scheduler_type 'cosin'"),
        ({"optim": "adamm"}, "unknown --optim 'adamm'"),
    ],
)
def test_bad_input_is_one_clear_line(home, tmp_path, changes, message):
    if changes.get("prune_model") == "base":
        changes = {"prune_model": str(home / "base")}
    with pytest.raises(lp.PrunerError, match=message):
        recover(arguments(home, tmp_path / "out", **changes))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_folders_that_are_not_ours_are_left_alone(home, tmp_path):
    """The model itself, another model, and files beside what is written."""
    import shutil

    shutil.copytree(home / "pruned", tmp_path / "pruned")
    before = {p.name: p.read_bytes() for p in (tmp_path / "pruned").iterdir()}
    with pytest.raises(lp.PrunerError, match="is the model to be trained"):
        recover(arguments(home, tmp_path / "pruned", prune_model=str(tmp_path / "pruned")))
    with pytest.raises(lp.PrunerError, match="holds a model that no run of recover wrote"):
        recover(arguments(home, tmp_path / "pruned"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "pruned").iterdir()} == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tsconfig.json").write_text("{}")
    recover(arguments(home, tmp_path / "out", max_steps=2))
    assert (tmp_path / "out" / "tsconfig.json").read_text() == "{}"


def test_a_mistake_is_no_missing_network(home, tmp_path, monkeypatch):
    """Without --data_path only a data set out of reach is replaced; a wrong template is refused."""
    for reach in (True, False):

        def given(source, streaming=False, reach=reach):
            if source == "yahma/alpaca-cleaned" and not reach:
                raise lp.PrunerError("no network")
            return rows(str(home / "data.jsonl"), streaming)

        monkeypatch.setattr("llm_pruner.recovery.datasets.rows", given)
        with pytest.raises(lp.PrunerError, match="no prompt template"):
            recover(arguments(home, tmp_path / "out", data_path=None, prompt_template_name="alpaka", max_steps=2))


def test_what_is_held_out_of_a_stream_stays_out(home, tokenizer):
    from llm_pruner.recovery.datasets import training_data

    args = arguments(home, "out", streaming=True, data_path="python-docs,python-docs", val_set_size=20)
    args.check()
    train, held_out = training_data(args, tokenizer, Format(32))
    kept = {tuple(row["input_ids"]) for row in held_out}
    for epoch in range(2):
        train.set_epoch(epoch)
        seen = [tuple(row["input_ids"]) for row in train.take(200)]
        assert len(kept) == 10 and not kept & set(seen[:20])  # each text twice, so half of them are alike


def test_another_teacher_is_asked_anew(home, tmp_path):
    import shutil

    shutil.copytree(home / "base", tmp_path / "other")
    cache = {"teacher_cache": str(tmp_path / "cache"), "method": "distill", "max_steps": 2}
    for i, teacher in enumerate((home / "base", tmp_path / "other", home / "base")):
        recover(arguments(home, tmp_path / str(i), teacher=str(teacher), **cache))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_the_command(home, tmp_path, capsys):
    code = main(["recover", "--prune_model", str(tmp_path)])
    assert code == 2 and capsys.readouterr().err.startswith("error: ")
