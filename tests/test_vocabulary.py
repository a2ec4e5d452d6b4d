"""``llm-pruner vocab``, and plans that cut the vocabulary."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from helpers.models import build
from helpers.tiny_tokenizers import byte_level
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.cli import main
from llm_pruner.data import text
from llm_pruner.errors import PrunerError
from llm_pruner.surgery.config.token_ids import ids_in, renumber
from llm_pruner.vocabulary import comparison
from llm_pruner.vocabulary.arguments import VocabArguments
from llm_pruner.vocabulary.counting import count
from llm_pruner.vocabulary.run import resolve


def test_rows_without_tokens_do_not_hide_removed_tokens(model_folder, tmp_path):
    """More rows than tokens: the tokenizer is still the original's, and is cut; once, however often it is saved."""
    model, tokenizer = lp.load(str(model_folder))
    graph = lp.trace(model)
    (unit,) = graph.of_kind("vocabulary")
    plan = lp.PruningPlan()
    gone = [i for i in range(300, 700) if i != 700][:3]
    plan.keep(unit, torch.tensor([i for i in range(unit.size) if i not in gone]), graph.shapes)
    assert len(plan.tokens) > len(tokenizer) - 3
    pruned = lp.apply(model, plan)
    lp.save(pruned, tokenizer, tmp_path / "a", plan=plan)
    again, small = lp.load(str(tmp_path / "a"))
    assert len(small) == len(tokenizer) - 3
    text = tokenizer.decode([i for i in range(400, 500)])
    assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text
    lp.save(again, small, tmp_path / "b", plan=lp.PruningPlan.load(tmp_path / "a" / "pruning_plan.json"))
    assert lp.load(str(tmp_path / "b"))[1].get_vocab() == small.get_vocab()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8,  # rows that no token has
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=[2, 700],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.suppress_tokens = [1, 799]
    lp.save(model, tokenizer, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("tied", [False, True])
def test_the_command(tied, model_folder, tmp_path):
    flags = ["--corpus", "python-docs", "--keep", "0.9", "--save_counts", str(tmp_path / "counts.json")]
    folder = model_folder
    if tied:
        model, tokenizer = lp.load(str(model_folder))
        config = LlamaConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": True})
        folder = tmp_path / "tied"
        lp.save(LlamaForCausalLM(config).eval(), tokenizer, folder)
    assert main(["vocab", str(folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    compared = found["comparison"]
    assert found["tokens_after"] == int(0.9 * 800)
    assert compared["compared"] > 0 and compared["largest_difference"] < 1e-6
    assert compared["generations_equal"] == compared["generations"]
    assert compared["byte_perplexity_before"] > 1 and compared["byte_perplexity_after"] > 1
    assert "perplexity per byte: " in (tmp_path / "out" / "vocabulary.log").read_text()
    assert 0 <= compared["tokenized_otherwise"] < 1 and compared["fertility_after"] >= compared["fertility_before"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").tokens
    assert model.config.vocab_size == len(tokenizer) == len(kept) == found["tokens_after"]
    assert model.config.eos_token_id == [kept.index(2), kept.index(700)]
    assert model.config.bos_token_id == kept.index(1)
    original, large = lp.load(str(folder))
    ids = [i for i in large(text("python-docs", "test")[:3000])["input_ids"] if i in kept][:100]
    with torch.no_grad():
        expected = original(torch.tensor([ids])).logits[..., kept]
        logits = model(torch.tensor([[kept.index(i) for i in ids]])).logits
    assert (logits - expected).abs().max() < 1e-6
    # The same by the plan alone, file by file.
    apply_to_files(lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json"), str(folder), tmp_path / "files")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "files")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "files").get_vocab() == tokenizer.get_vocab()


def test_both_models_are_measured_on_the_same_text(model_folder, tmp_path, monkeypatch):
    texts, measure = [], comparison.byte_perplexity

    def noted(model, tokenizer, held_out, *window):
        texts.append(held_out)
        return measure(model, tokenizer, held_out, *window)

    monkeypatch.setattr(comparison, "byte_perplexity", noted)
    flags = ["--corpus", "python-docs", "--keep", "0.6", "--eval_dataset", "python-docs", "--max_windows", "3"]
    assert main(["vocab", str(model_folder), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    before, after = texts
    assert before == after and before in text("python-docs", "test")
    _, large = lp.load(str(model_folder))
    assert len(large(before, add_special_tokens=False)["input_ids"]) < 4 * comparison.WINDOW


def test_suppressed_tokens_move_or_go(model_folder, tmp_path):
    flags = ["--corpus", "python-docs", "--keep", "0.7", "--output_dir", str(tmp_path / "out")]
    assert main(["vocab", str(model_folder), *flags]) == 0
    model, _ = lp.load(str(tmp_path / "out"))
    kept = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json").tokens
    expected = [kept.index(i) for i in (1, 799) if i in kept]
    assert model.generation_config.suppress_tokens == expected


def test_flags_become_settings_that_nothing_changes():
    flags = VocabArguments(keep="0.5", corpus=["a.txt"], languages=["en"], scripts=["Greek"], max_documents=0)
    before = asdict(flags)
    flags.check()
    flags.check()
    settings = resolve(flags)
    assert asdict(flags) == before
    assert settings.scripts == ("Greek", "Latin") and settings.corpus == ("a.txt",) and settings.max_documents is None
    with pytest.raises(AttributeError):
        settings.keep = "0.1"  # type: ignore[misc]


def test_counting_sets_no_environment_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    (tmp_path / "a.txt").write_text("some words")
    count(PreTrainedTokenizerFast(tokenizer_object=byte_level()), [str(tmp_path / "a.txt")])
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_token_that_the_config_names_cannot_go():
    model = build("llama")
    graph = lp.trace(model)
    (unit,) = graph.of_kind("vocabulary")
    plan = lp.PruningPlan()
    plan.keep(unit, torch.arange(1, 96), graph.shapes)
    with pytest.raises(PrunerError, match="drops token 0, which the config names"):
        lp.apply(model, plan)


def test_vocabulary_and_neurons_in_one_plan():
    model = build("llama_grouped")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5)
    (unit,) = graph.of_kind("vocabulary")
    plan.keep(unit, torch.arange(0, 80), graph.shapes)
    pruned = lp.apply(model, plan)
    assert pruned.config.vocab_size == 80 and pruned.lm_head.weight.shape == (80, 32)
    ids = torch.arange(2, 14)[None]
    narrow = lp.apply(model, lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5))
    with torch.no_grad():
        assert torch.allclose(pruned(ids).logits, narrow(ids).logits[..., :80], atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say which tokens stay"),
        (["--keep", "0.5"], "give --corpus"),
        (["--keep", "0.5", "--corpus", "/no/file.txt"], "no data set '/no/file.txt'"),
        (["--scripts", "Latin", "--characters", "corpus"], "--characters corpus needs the characters of a text"),
        (["--keep", "0.9", "--characters", "corpus", "--corpus", "python-docs"], "falls back on bytes"),
        (["--languages", "xx"], "--languages 'xx' is unknown"),
        (["--scripts", "Latin", "--keep_tokens", "/no/file"], "cannot read /no/file"),
        (["--kep", "3"], "did you mean --keep?"),
        (["--keep", "inf", "--corpus", "python-docs"], "is not valid: give 15000"),
        (["--to_tokenizer", "/no/tokenizer"], "there is no model folder"),
    ],
)
def test_bad_input_of_the_command(argv, message, model_folder, tmp_path, capsys):
    assert main(["vocab", str(model_folder), *argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    flags = ["--corpus", str(tmp_path / "empty.txt"), "--keep", "0.5", "--output_dir", str(tmp_path / "out")]
    assert main(["vocab", str(model_folder), *flags]) == 2
    assert "the corpus is empty" in capsys.readouterr().err


def test_no_list_of_words_is_left_empty():
    """Generation refuses a list of forbidden words without any."""
    settings = GenerationConfig(bad_words_ids=[[5, 6], [7]], suppress_tokens=[2, 6])
    renumber(settings, [0, 1, 2, 5])
    assert settings.bad_words_ids is None and settings.suppress_tokens == [2]


def test_entries_that_are_no_ids_stay():
    settings = GenerationConfig(eos_token_id=[2, None, -1])
    renumber(settings, [0, 2])
    assert settings.eos_token_id == [1, None, -1]


def test_nested_tokens_of_a_generation_config_are_renumbered():
    """Biases are no ids, even as whole numbers; words that must come have to stay."""
    settings = GenerationConfig(sequence_bias=[[[5, 2], 2], [[6], -1]], force_words_ids=[[5], [[1], [2]]])
    assert ids_in(settings) >= {1, 2, 5}
    renumber(settings, [0, 1, 5, 2])
    assert settings.sequence_bias == [[[2, 3], 2]] and settings.force_words_ids == [[2], [[1], [3]]]
    with pytest.raises(PrunerError, match="drops token 3, which the config names as force_words_ids"):
        renumber(settings, [0, 1, 2])
