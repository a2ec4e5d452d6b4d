"""Self-data distillation: training data that the original writes."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.recovery import arguments, read_losses, read_record
from tokenizers import processors

import llm_pruner as lp
from llm_pruner.evaluation.shared_texts import TRAINED_ON
from llm_pruner.inputs import InputCheck
from llm_pruner.models.loss import IGNORED
from llm_pruner.recovery import self_data
from llm_pruner.recovery.checking import check_recovery_inputs
from llm_pruner.recovery.run import recover
from llm_pruner.recovery.self_data import rewritten_sources
from llm_pruner.recovery.settings import SelfDataSettings
from llm_pruner.recovery.tokenize import ExampleFormat, tokenize

END = 2
CHAT = [{"role": "user", "content": "Say this."}, {"role": "assistant", "content": "no"}]


@pytest.fixture
def written(monkeypatch, tmp_path, tokenizer):
    """Replace the original's words, by row of a batch; return the prompts that it was given, without padding."""
    monkeypatch.chdir(tmp_path)
    given = []

    def write(model, ids, *, new_tokens, attention_mask, **options):
        answers = [" This is the answer.", "", " This is" * 20, " This is 1 times 2. Say now."]
        rows = [row[mask.bool()].tolist() for row, mask in zip(ids, attention_mask, strict=True)]
        given.extend(rows)
        words = [tokenizer(answers[i % 4])["input_ids"] + [END] * (i % 5 != 4) for i in range(len(rows))]
        return torch.tensor([(row + [END if END in row else 9] * new_tokens)[:new_tokens] for row in words])

    monkeypatch.setattr(self_data, "generate", write)
    return given


def rewrite(home, rows, tmp_path, **form):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    form = ExampleFormat(**{"cutoff_len": 96} | form)
    (file,) = rewritten_sources(
        (str(tmp_path / "rows.jsonl"),), SelfDataSettings(), str(home / "base"), form, seed=0, trust=False
    )
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("template", (None, "alpaca", "question"))
def test_the_original_reads_the_prompts_of_training(home, tmp_path, tokenizer, written, template):
    """The first row is answered; the others are empty, repetitive, fine, and unended."""
    rows = [{"instruction": f"Say {i}", "input": "now" * (i % 2), "output": "x", "id": i} for i in range(5)]
    told = rewrite(home, rows, tmp_path, template=template)
    form = ExampleFormat(cutoff_len=96, template=template)
    assert len(told) == 2 and all(row.keys() == {"instruction", "input", "output"} for row in told)
    import datasets

    for row, example in zip(told, tokenize(datasets.Dataset.from_list(told), tokenizer, form, "told"), strict=True):
        learnt = [label != IGNORED for label in example["labels"]]
        prompt = example["input_ids"][: learnt.index(True)]
        assert prompt in written
        answer = tokenizer.decode(example["input_ids"][len(prompt) :])
        assert answer.strip() == f"{row['output']}</s>".strip()


def test_the_original_reads_no_end_behind_a_prompt(home, tokenizer):
    words = copy.deepcopy(tokenizer)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    for kind, row in (("pair", {"prompt": "Say this.", "completion": "x"}), ("text", {"text": "Say this."})):
        prompt = self_data._prompt(row, kind, words, ExampleFormat())
        assert words.decode(prompt.ids) == "Say this."


def test_texts_and_chats(home, tmp_path, tokenizer, written):
    told = rewrite(home, [{"text": "This is the beginning of a text, which goes on and on. " * 9}] * 5, tmp_path)
    assert all(len(ids) == 24 for ids in written)
    assert [row["text"].startswith("This is the beginning of a text") for row in told] == [True] * len(told)
    assert len(told) == 2 and told[0]["text"].endswith(" This is the answer.")
    written.clear()
    told = rewrite(home, [{"conversations": CHAT}, {"conversations": CHAT[1:]}], tmp_path)
    assert told == [{"messages": [CHAT[0], {"role": "assistant", "content": "This is the answer."}]}]
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert written == [tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    with pytest.raises(lp.PrunerError, match="row 1: messages is a text"):
        rewrite(home, [{"messages": "Hello"}], tmp_path)
    with pytest.raises(lp.PrunerError, match=r"leaves no row of .*1 no prompt that fits.*raise --cutoff_len, now 96"):
        rewrite(home, [{"instruction": "Say this. " * 99, "output": "x"}], tmp_path)


def test_a_run_learns_the_originals_words(home, home_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"data_path": str(home_text), "self_data": True, "self_data_rows": 40, "val_set_size": 0}
    options |= {"cutoff_len": 32, "method": "full", "max_steps": 6, "learning_rate": 3e-3}
    recover(arguments(home, tmp_path / "a", **options))
    (file,) = (tmp_path / "datasets" / "self_data").glob("*.jsonl")
    rows, time = [json.loads(line)["text"] for line in file.read_text().splitlines()], file.stat().st_mtime_ns
    assert 20 < len(rows) <= 40
    _, words = lp.load(str(home / "base"))
    assert all(len(words(row)["input_ids"]) > 8 for row in rows)
    monkeypatch.setattr(self_data, "load_with_tokenizer", None)  # the rows are there
    recover(arguments(home, tmp_path / "b", **options))
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b") and file.stat().st_mtime_ns == time
    assert read_losses(tmp_path / "a")[-1][1] < read_losses(tmp_path / "a")[0][1]
    assert read_record(tmp_path / "a")["arguments"]["self_data_rows"] == 40
    assert lp.PruningPlan.load(tmp_path / "a" / "pruning_plan.json").settings[TRAINED_ON] == [str(home_text)]


def test_self_data_is_refused_without_an_original(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ({"self_data_rows": 3}, "--self_data_rows needs --self_data"),
        ({"self_data": True, "self_data_rows": -1}, "--self_data_rows -1 is out of range"),
        ({"self_data": True, "streaming": True}, "--self_data and --streaming exclude each other"),
    ):
        with pytest.raises(lp.PrunerError, match=message):
            recover(arguments(home, tmp_path / "out", **flags))
    shutil.copytree(home / "pruned", tmp_path / "pruned")
    plan = lp.PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json")
    del plan.settings["base_model"]
    plan.save(tmp_path / "pruned" / "pruning_plan.json")
    lost = arguments(home, tmp_path / "out", self_data=True, prune_model=str(tmp_path / "pruned"))
    with pytest.raises(lp.PrunerError, match="no plan names the unpruned model"):
        recover(lost)
    with pytest.raises(lp.PrunerError, match="no plan names the unpruned model"):
        check_recovery_inputs(lost, InputCheck())
