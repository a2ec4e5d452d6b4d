"""Calibration sets of several texts, of chats, packed, and by the number of tokens."""

import json

import pytest
import torch
from helpers.models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.data import Source, calibration, calibration_sources
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.shared_texts import sources_of
from llm_pruner.selection.plan import PruningPlan

END = 300
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer():
    """Build a tokenizer of the numbers 0 to 297 and the words user and assistant."""
    words = {str(i): i for i in range(298)} | {"user": 298, "assistant": 299, "</s>": END, "?": 301}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def numbers(start, count):
    return " ".join(str(i) for i in range(start, start + count))


@pytest.fixture
def files(tmp_path):
    """Write texts whose tokens tell which one they come from: hundreds of 0, 1 and 2."""
    for hundred, name in enumerate(("a", "b", "c")):
        text = "\n\n".join(numbers(100 * hundred + i, 20) for i in range(0, 60, 2))
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def test_proportions():
    assert calibration_sources("c4") == (Source("c4", 1.0),)
    assert calibration_sources("a, b") == (Source("a", 0.5), Source("b", 0.5))
    assert calibration_sources("c4:3,self:1") == (Source("c4", 0.75), Source("self", 0.25))
    for text, problem in (("a:1,b", "b has no proportion"), ("a:0,b:1", "above 0"), (",", "names no text")):
        with pytest.raises(PrunerError, match=problem):
            calibration_sources(text)


def test_names_of_files_may_hold_commas_and_colons(tmp_path):
    (tmp_path / "a,b:2.txt").write_text("one")
    assert calibration_sources(str(tmp_path / "a,b:2.txt")) == (Source(str(tmp_path / "a,b:2.txt")),)
    (tmp_path / "c:3.txt").write_text("one")
    names = [source.name for source in calibration_sources(f"{tmp_path / 'c:3.txt'},general")]
    assert names == [str(tmp_path / "c:3.txt"), "general"]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_texts_are_mixed_evenly(files, tokenizer, seed, packed):
    mixture = ",".join(f"{files / name}.txt:{share}" for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
    ids = calibration(mixture, tokenizer, 20, 10, seed=seed, packed=packed)
    origin = [row[row < END][0].item() // 100 for row in ids]
    assert [origin.count(i) for i in range(3)] == [10, 6, 4]
    assert [origin[:10].count(i) for i in range(3)] == [5, 3, 2]
    alone = calibration(str(files / "b.txt"), tokenizer, 6, 10, seed=seed, packed=packed)
    assert torch.equal(ids[[i for i, one in enumerate(origin) if one == 1]], alone)
    assert torch.equal(ids, calibration(mixture, tokenizer, 20, 10, seed=seed, packed=packed))


def test_a_text_without_any_sample_is_told(files, tokenizer):
    with pytest.raises(PrunerError, match=r"b\.txt would give none of 4 samples"):
        calibration(f"{files / 'a.txt'}:50,{files / 'b.txt'}:1", tokenizer, 4, 10)


def test_a_model_writes_its_share(files, tokenizer):
    model = build("llama", vocab_size=302)
    ids = calibration(f"{files / 'a.txt'}:1,self:1", tokenizer, 8, 10, model=model)
    assert ids.shape == (8, 10)
    assert not torch.equal(ids, calibration(f"{files / 'a.txt'}:1,self:1", tokenizer, 8, 10, model=model, self_seed=1))
    with pytest.raises(PrunerError, match="written by a model"):
        calibration("self", tokenizer, 8, 10)


def test_packed_samples_hold_every_document(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("\n\n".join(numbers(3 * i, 3) for i in range(40)))
    with pytest.raises(PrunerError, match="its longest document has 3"):
        calibration(str(path), tokenizer, 2, 8)
    ids = calibration(str(path), tokenizer, 20, 8, packed=True).flatten()
    running = [t for i in range(40) for t in (3 * i, 3 * i + 1, 3 * i + 2, END)]
    assert ids.tolist() == running
    one, other = (calibration(str(path), tokenizer, 10, 8, packed=True, seed=seed) for seed in (1, 2))
    assert not torch.equal(one, other)
    with pytest.raises(PrunerError, match="gives 20 samples of 8 tokens"):
        calibration(str(path), tokenizer, 21, 8, packed=True)


def test_documents_that_occur_again_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps({"text": numbers(i % 2, 9)}) + "\n" for i in range(8)))
    assert calibration(str(path), tokenizer, 8, 9, fewer=True).tolist() == [list(range(9)), list(range(1, 10))]


ROWS = {
    "chat": {"messages": [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3 4"}]},
    "instruction": {"instruction": "1", "input": "2", "output": "3 4"},
    "pair": {"prompt": "1 2", "completion": "3 4"},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_conversations_are_written_as_the_model_reads_them(tmp_path, tokenizer, kind, template):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[kind]) + "\n")
    tokenizer.chat_template = template
    expected = [298, 1, 2, 299, 3, 4] if template else [1, 2, 3, 4]
    assert calibration(str(path), tokenizer, 1, len(expected)).tolist() == [expected]


def test_malformed_conversations_are_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["chat"]) + "\n" + json.dumps({"messages": 3}) + "\n")
    with pytest.raises(PrunerError, match=r"rows\.jsonl, row 2: messages is a number"):
        calibration(str(path), tokenizer, 4, 6)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PrunerError, match=r"row 1: .*TemplateError: no"):
        calibration(str(path), tokenizer, 4, 6)


def test_runs_calibrate_on_several_texts(files, tokenizer, tmp_path, capsys):
    lp.save(build("llama", vocab_size=302), tokenizer, tmp_path / "model")
    mixture = f"{files / 'a.txt'}:0.5,{files / 'b.txt'}:0.25,self:0.25"
    command = ["prune", str(tmp_path / "model"), "--pruning_ratio", "0.25", "--calib_seq_len", "10", "--eval_datasets"]
    command += [str(files / "b.txt"), "--max_seq_len", "10", "--calib_dataset", mixture]
    assert main([*command, "--calib_tokens", "400", "--output", str(tmp_path / "run"), "--calib_packing"]) == 0
    log = capsys.readouterr().err
    assert "calibration: 40 samples of 10 tokens" in log and "b.txt flatters" in log
    plan = PruningPlan.load(tmp_path / "run" / "pruning_plan.json")
    assert {str(files / "b.txt"), str(files / "a.txt"), "self"} <= sources_of(plan)
    assert plan.settings["refit"]["calibration"]["packed"] is True
    again = ["apply", str(tmp_path / "run" / "pruning_plan.json"), str(tmp_path / "model"), str(tmp_path / "again")]
    assert main([*again, "--refit", "--quiet"]) == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again"))
    assert one == other


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--calib_tokens", "0.5"], "--calib_tokens '0.5' is not valid"),
        (["--calib_tokens", "1M", "--num_examples", "64"], "exclude each other"),
        (["--calib_dataset", "general:0.5,nowhere.txt:0.5"], "nowhere.txt"),
        (["--calib_dataset", "general:x,self:1"], "general:x"),
    ],
)
def test_bad_calibration_sets_are_refused(flags, problem, tmp_path, capsys):
    assert main(["prune", "smollm2-135m", "--output", str(tmp_path / "run"), *flags]) != 0
    assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()
