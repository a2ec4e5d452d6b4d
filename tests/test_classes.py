"""Model classes besides language models: encoders, classifiers, rewards, embeddings."""

import copy
import json

import pytest
import torch
import transformers
from helpers.models import pruned_by, tokens
from transformers import AutoConfig

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.evaluation.similarity import outputs, similarity
from llm_pruner.files import read_json
from llm_pruner.importance.gradients import visit_moments
from llm_pruner.models.per_layer import REFUSAL
from llm_pruner.models.tasks import predicts_tokens, task_of, task_of_config
from llm_pruner.surgery.slicing import mask

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 512, "max_position_embeddings": 144, "pad_token_id": 0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
CLASSES = {
    "BertForMaskedLM": ("bert", {}),
    "RobertaForTokenClassification": ("roberta", {"num_labels": 5}),
    "DebertaV2ForSequenceClassification": ("deberta-v2", DISENTANGLED),
    "ElectraForQuestionAnswering": ("electra", {"embedding_size": 32}),
    "XLMRobertaModel": ("xlm-roberta", {}),
    "ModernBertForSequenceClassification": ("modernbert", {"num_labels": 3}),
    "LlamaForSequenceClassification": ("llama", {"num_labels": 1}),
    "Qwen2ForTokenClassification": ("qwen2", {"num_key_value_heads": 2}),
}


@pytest.fixture
def tokenizer(tokenizer):
    """A copy, since some tests change it."""
    return copy.deepcopy(tokenizer)


def model_of(name: str, **changes) -> transformers.PreTrainedModel:
    model_type, extra = CLASSES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | extra | changes)
    return getattr(transformers, name)(config).eval()


def loaded_in_its_class(model, folder):
    """The model as `load` gives it from a checkpoint of it."""
    lp.save(model, None, folder)
    loaded, _ = lp.load(str(folder))
    assert type(loaded) is type(model)
    return loaded


def stock_model(model, pruned, plan, folder):
    """The pruned model as the class of the original reads it from a checkpoint, with no key missing or left over."""
    lp.save(pruned, None, folder, plan)
    stock, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return stock


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_stays_and_equals_its_masked_original(name, tmp_path):
    """Neurons by a quarter, in the class that the checkpoint declares; loaded again by that class itself."""
    model = model_of(name)
    loaded = loaded_in_its_class(model, tmp_path / "original")
    plan, pruned = pruned_by(loaded, kinds=["neurons"])
    assert lp.verify(loaded, pruned, plan).equivalent
    assert {unit.kind for unit in lp.trace(loaded).units} >= {"neurons", "heads", "vocabulary"}
    stock = stock_model(model, pruned, plan, tmp_path / "pruned")
    assert stock.num_parameters() == pruned.num_parameters() < model.num_parameters()
    assert task_of_config(stock.config).auto_class == task_of(name).auto_class


@pytest.mark.parametrize("criterion", ("taylor", "wanda", "activation"))
@pytest.mark.parametrize("name", ("BertForMaskedLM", "ElectraForQuestionAnswering", "XLMRobertaModel"))
def test_criteria_need_no_labels(name, criterion):
    model = model_of(name)
    graph = lp.trace(model)
    scores = lp.score(model, graph, tokens(4, 16), criterion=criterion, taylor="param_second", kinds=("neurons",))
    assert all(values.std() > 0 for values in scores.values.values())


def test_random_projections_estimate_how_far_the_output_moves():
    """The mean square of their gradients is the diagonal of the Gauss-Newton matrix, computed here weight by weight."""
    model = model_of("RobertaForTokenClassification", num_labels=2, num_hidden_layers=1)
    name, ids = "classifier.weight", tokens(1, 8)
    squares: list[torch.Tensor] = []
    visit_moments(model, [name], ids.expand(600, -1), lambda _, __, moments: squares.append(moments.square))
    (found,) = squares
    with torch.no_grad():
        hidden = model.roberta(ids).last_hidden_state[0]
    expected = hidden.square().sum(0) / (hidden.shape[0] * 2)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0.4, atol=0.05 * expected.max().item())


def test_commands_that_need_next_tokens_refuse_other_classes():
    model = model_of("XLMRobertaModel")
    assert not predicts_tokens(model)
    with pytest.raises(PrunerError, match="XLMRobertaModel does not predict the next token"):
        perplexity(model, tokens(2, 16))


def folder_of(name, tokenizer, folder):
    """A checkpoint with a tokenizer; of a bare encoder with the files of sentence-transformers."""
    lp.save(model_of(name), tokenizer, folder)
    if name.endswith("Model"):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
        modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../elsewhere"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    return folder


@pytest.mark.parametrize("name", ("XLMRobertaModel", "DebertaV2ForSequenceClassification"))
def test_commands(name, tokenizer, tmp_path, monkeypatch, capsys):
    """Prune, again into the same place, and evaluate: outputs are compared with the original's."""
    monkeypatch.chdir(tmp_path)
    folder_of(name, tokenizer, tmp_path / "original")
    prune = "prune original pruned --pruning_ratio 0.5 --kinds neurons --calib_dataset python-docs --num_examples 32"
    for _ in range(2):
        assert main([*prune.split(), "--preset", "fast", "--eval_datasets", "general", "--max_windows", "4"]) == 0
    (quality,) = read_json(tmp_path / "pruned" / "metrics.json")["after"]["similarity"].values()
    kind = "cosine" if name.endswith("Model") else "agreement"
    assert 0 < quality[kind] <= 1 and quality["pieces"] == 4
    if name.endswith("Model"):
        assert (tmp_path / "pruned" / "1_Pooling" / "config.json").is_file()
        assert (tmp_path / "pruned" / "modules.json").is_file()
        assert (tmp_path / "pruned" / "sentence_bert_config.json").is_file()
    said = capsys.readouterr()
    assert f"{kind} {quality[kind]:.4f}" in said.out + said.err and "vllm serve" not in said.out + said.err
    command = "evaluate original pruned --datasets general --max_windows 4 --tokens 16 --output measured"
    assert main(command.split()) == 0
    first, second = read_json(tmp_path / "measured" / "evaluation.json")["models"]
    assert not first["similarity"] and second["similarity"]["general"][kind] == pytest.approx(quality[kind], abs=1e-4)
    assert kind in (tmp_path / "measured" / "table.md").read_text()
    for argv in ("evaluate original --tasks piqa", "recover pruned", "chat original"):
        assert main(argv.split()) == 2
        assert f"needs a language model, and {argv.split()[1]} is a {name}" in capsys.readouterr().err


def test_tokens_without_rows_are_named(tokenizer, tmp_path, capsys):
    lp.save(model_of("XLMRobertaModel", vocab_size=300), tokenizer, tmp_path / "original")
    command = f"vocab {tmp_path}/original --keep 0.9 --corpus python-docs --output {tmp_path}/cut"
    assert main(command.split()) == 2
    assert "rows for 300 tokens, and its tokenizer has others" in capsys.readouterr().err


def test_vocabulary_of_an_embedding_model(tokenizer, tmp_path):
    """Padding and truncation of its tokenizer do not reach the counts."""
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    folder_of("XLMRobertaModel", tokenizer, tmp_path / "original")
    (tmp_path / "counted.txt").write_text("This is 1 times 2.\n" * 50)
    command = f"vocab {tmp_path}/original --corpus {tmp_path}/counted.txt --keep 400 --output {tmp_path}/cut"
    assert main([*command.split(), "--max_windows", "8"]) == 0
    record = read_json(tmp_path / "cut" / "vocabulary.json")
    assert record["comparison"]["byte_perplexity_before"] is None and 0 < record["comparison"]["cosine"] <= 1
    assert record["tokens_after"] == 400 and (tmp_path / "cut" / "modules.json").is_file()
    pairs = [lp.load(str(tmp_path / name)) for name in ("original", "cut")]
    pieces = ["This is 1 times 2."] * 3
    assert similarity(*(outputs(*pair, pieces) for pair in pairs)).cosine == pytest.approx(1, abs=1e-5)


def test_rewards_are_compared_by_order():
    scores = [torch.tensor([value]) for value in (1.0, 2.0, 3.0)]
    turned = [torch.tensor([value]) for value in (1.0, 3.0, 2.5)]
    assert similarity(scores, turned).agreement == pytest.approx(2 / 3)


def test_another_task_may_be_asked_for(tmp_path, caplog):
    lp.save(model_of("DebertaV2ForSequenceClassification"), None, tmp_path / "model")
    model, _ = lp.load(str(tmp_path / "model"), task="feature-extraction")
    assert type(model).__name__ == "DebertaV2Model"
    assert "are not read by DebertaV2Model" in caplog.text and "classifier" in caplog.text
    with pytest.raises(PrunerError, match="task 'mask' is not valid: choose from text-generation"):
        lp.load(str(tmp_path / "model"), task="mask")
    with pytest.raises(PrunerError, match="deberta-v2 has no class for the task image-text-to-text"):
        lp.load(str(tmp_path / "model"), task="image-text-to-text")


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 64}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}
TURNING = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
WITH_IMAGES = {
    "LlavaForConditionalGeneration": {
        "text_config": transformers.LlamaConfig(**TEXT),
        "vision_config": transformers.CLIPVisionConfig(**VISION),
        "image_token_index": 199,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": TEXT | {"rope_parameters": TURNING},
        "vision_config": QWEN_VISION | {"patch_size": 8},
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT | {"head_dim": 8},
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 199,
    },
    "SmolVLMForConditionalGeneration": {
        "text_config": transformers.LlamaConfig(**TEXT, pad_token_id=0),
        "vision_config": VISION,
        "image_token_id": 199,
        "scale_factor": 1,
    },
}


def model_with_images(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**WITH_IMAGES[name])).eval()


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_models_that_read_images_keep_all_that_is_not_cut(name, tmp_path):
    """The language tower's heads and neurons go; the other towers are as in the original, to the bit."""
    model = model_with_images(name)
    loaded = loaded_in_its_class(model, tmp_path / "original")
    graph = lp.trace(loaded)
    assert all("vision" not in unit.name for unit in graph.units) and not graph.of_kind("hidden")
    scores = lp.score(loaded, graph, tokens(4, 16), kinds=("heads", "neurons"))
    plan = lp.select(graph, scores, 0.5, ("heads", "neurons"))
    pruned = lp.apply(loaded, plan)
    assert lp.verify(loaded, pruned, plan).equivalent
    stock = stock_model(model, pruned, plan, tmp_path / "pruned")
    kept, before = stock.state_dict(), model.state_dict()
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[key], before[key]) for key in kept if key not in plan.kept)


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_the_refusal_of_a_language_tower_stands_in_the_config_of_the_whole_model(name, tmp_path):
    """There transformers reads it: what a part's config says is replaced by what the whole model's says."""
    model = model_with_images(name)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, ("neurons",), layers=[1])
    lp.save(lp.apply(model, plan), None, tmp_path / "pruned", plan)
    assert read_json(tmp_path / "pruned" / "config.json")["experts_implementation"] == REFUSAL
    loaded, _ = lp.load(str(tmp_path / "pruned"))
    assert type(loaded) is type(model)


def test_outputs_for_an_image_are_those_of_the_masked_original(tmp_path):
    """Heads, neurons and tokens go; the place of the image in the text is found by its new id."""
    model = model_with_images("LlavaForConditionalGeneration")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, ("heads", "neurons"))
    plan.keep(graph.of_kind("vocabulary")[0], torch.tensor([0, 1, 2, *range(100, 200)]), graph.shapes)
    pruned = lp.apply(model, plan)
    assert pruned.config.image_token_index == 102
    model.load_state_dict({name: mask(name, tensor, plan) for name, tensor in model.state_dict().items()})
    image = torch.randn(1, 3, 16, 16)
    ids = torch.tensor([[150, 199, 199, 199, 199, 160, 170, 180]])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=image).logits[..., [0, 1, 2, *range(100, 200)]]
        found = pruned(input_ids=ids - 97, pixel_values=image).logits
        without = pruned(input_ids=ids - 97, pixel_values=torch.zeros_like(image)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, without, atol=1e-3), "the image is read"


def test_towers_of_a_model_that_counts_the_places_of_images(tmp_path):
    """As Gemma 3 does, by reading a value, which a model on the meta device cannot."""
    model = model_with_images("Gemma3ForConditionalGeneration")
    ids = torch.tensor([[150, 199, 199, 199, 199, 160, 170, 180]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 199).long()}
    graph = lp.trace(model, inputs)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, ("neurons",))
    assert {"vision" in name for name in plan.units} == {False, True}
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    stock = stock_model(model, pruned, plan, tmp_path / "pruned")
    assert (stock.config.text_config.intermediate_size, stock.config.vision_config.intermediate_size) == (36, 48)
