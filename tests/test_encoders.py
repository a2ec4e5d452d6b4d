"""Encoders: whole layers, refits behind norms, classifiers of two texts and of both halves of an encoder-decoder."""

import json

import pandas
import pytest
import torch
import transformers
from helpers.architectures import tiny_model
from helpers.media import model_of as media_model
from helpers.models import pruned_by, tokens
from torch import nn
from torch.nn.functional import cosine_similarity, mse_loss
from transformers import AutoConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.labelled import measure_labelled
from llm_pruner.evaluation.similarity import outputs, similarity
from llm_pruner.models.blockwise import standing_in
from llm_pruner.models.inputs import example_inputs
from llm_pruner.models.per_layer import layer_lists
from llm_pruner.models.running import logits, main_output
from llm_pruner.pruning import loading

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 512, "max_position_embeddings": 144, "pad_token_id": 0}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
SIDES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "d_model": 32, "vocab_size": 512, "pad_token_id": 0}
SIDES |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}
STACKS = {
    "BertForSequenceClassification": ("bert", TEXT),
    "XLMRobertaModel": ("xlm-roberta", TEXT),
    "ViTForImageClassification": ("vit", SIZES | {"image_size": 16, "patch_size": 8}),
}
ENCODER_DECODERS = {
    "T5ForSequenceClassification": (
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 512}
        | {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0},
    ),
    "BartForSequenceClassification": ("bart", SIDES),
}
T5 = ENCODER_DECODERS["T5ForSequenceClassification"]
OF_TOKENS = {
    "T5ForQuestionAnswering": T5,
    "BartForQuestionAnswering": ("bart", SIDES),
    "T5ForTokenClassification": T5,
}


def build(name, model_type, **fields):
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("flags", ("--num_layers 2", "--kinds layers --pruning_ratio 0.5 --depth contiguous"))
def test_layers_of_encoders(name, flags, tokenizer, tmp_path, capsys):
    """The result gives what the original gives without the layers that went."""
    model_type, fields = STACKS[name]
    model = build(name, model_type, **fields)
    reads_text = "vocab_size" in fields
    lp.save(model, tokenizer if reads_text else None, tmp_path / "original")
    data = "--calib_dataset python-docs --calib_seq_len 16" if reads_text else ""
    prune = f"prune {tmp_path}/original {tmp_path}/pruned {flags} {data} --num_examples 8 --compensate none"
    assert main([*prune.split(), "--eval_datasets="]) == 0
    assert ("chosen by --depth cosine" in "".join(capsys.readouterr())) == ("--depth" not in flags)
    pruned, _ = lp.load(str(tmp_path / "pruned"))
    plan = lp.PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json")
    ((path, kept),) = plan.layers.items()
    assert len(kept) == 2
    layers = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList([layers[i] for i in kept.tolist()]))
    inputs = example_inputs(pruned, seed=3)
    torch.testing.assert_close(logits(pruned, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)


def test_cosine_is_that_of_the_last_hidden_states():
    model = build("XLMRobertaModel", "xlm-roberta", **TEXT)
    ids, layers = tokens(4, 12), model.encoder.layer
    found = lp.score(model, lp.trace(model), ids, "cosine", kinds=["layers"]).values["encoder.layer.layers"]
    whole = logits(model, ids)
    for i in range(4):
        model.encoder.layer = nn.ModuleList([layer for j, layer in enumerate(layers) if j != i])
        expected = 1 - cosine_similarity(logits(model, ids), whole, dim=-1).mean()
        assert found[i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_criteria_that_need_a_loss_are_refused_before_loading(tokenizer, tmp_path, monkeypatch, capsys):
    lp.save(build("XLMRobertaModel", "xlm-roberta", **TEXT), tokenizer, tmp_path / "model")
    monkeypatch.setattr(loading, "load", None)
    for flags, message in (
        ("--num_layers 2 --depth loss", "--depth loss: XLMRobertaModel does not predict the next token"),
        ("--target_params 0.8 --shares measured:layers,neurons", "--shares measured: XLMRobertaModel has no loss"),
    ):
        assert main(f"prune {tmp_path}/model {tmp_path}/out {flags}".split()) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ("WhisperForConditionalGeneration", "SiglipModel", "Wav2Vec2ForCTC", "Dinov2Model"))
def test_hidden_channels_that_no_config_expresses_are_refused_before_loading(name, tmp_path, monkeypatch, capsys):
    lp.save(media_model(name), None, tmp_path / "model")
    monkeypatch.setattr(loading, "load", None)
    assert main(f"prune {tmp_path}/model {tmp_path}/out --kinds hidden --pruning_ratio 0.25".split()) == 2
    assert "hidden" in capsys.readouterr().err and not (tmp_path / "out").exists()


DISTILLED = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 512}


@pytest.mark.parametrize(
    ("name", "model_type", "fields"),
    [("BertForSequenceClassification", "bert", TEXT), ("DistilBertModel", "distilbert", DISTILLED)],
)
def test_projections_in_front_of_a_norm_are_refitted(name, model_type, fields):
    """Their sum with the stream is what the refit brings back; the original itself is left alone."""
    model = build(name, model_type, **fields)
    _, pruned = pruned_by(model, kinds=["neurons"])
    unseen = tokens(16, 16, seed=9)
    before = mse_loss(logits(pruned, unseen), logits(model, unseen))
    report = lp.compensate(model, pruned, tokens(64, 16))
    assert len(report.layers) == 8 and all(refit.after <= refit.before for refit in report.layers)
    assert mse_loss(logits(pruned, unseen), logits(model, unseen)) < 0.9 * before
    twin = build(name, model_type, **fields)
    assert {refit.ridge for refit in lp.compensate(model, twin, tokens(32, 16)).layers} == {None}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_classifiers_that_read_a_text_twice(name, tokenizer, tmp_path):
    """Every text ends as they expect, whatever it ended with; labels are the model's own."""
    model_type, fields = ENCODER_DECODERS[name]
    model = build(name, model_type, **fields)
    plan, pruned = pruned_by(model, kinds=["neurons"])
    assert lp.verify(model, pruned, plan).equivalent
    ids = tokens(4, 12)
    given = torch.where(ids == fields["eos_token_id"], 5, ids)
    given[:, -1] = fields["eos_token_id"]
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), model(input_ids=given).logits)
    lp.score(model, lp.trace(model), ids, "taylor", taylor="param_second", kinds=["neurons"])
    words = ["def f(x):", "return x", "import os", "class A:"]
    end = torch.tensor([[fields["eos_token_id"]]])
    with torch.no_grad():
        texts = [torch.cat([tokenizer(word, return_tensors="pt")["input_ids"][:, :-1], end], 1) for word in words]
        labels = [int(model(input_ids=text).logits.argmax()) for text in texts]
    rows = [{"text": word, "label": label} for word, label in zip(words, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert measure_labelled(model, tokenizer, str(tmp_path / "rows.jsonl"))["acc"] == 1


@pytest.mark.parametrize("name", OF_TOKENS)
def test_encoder_decoders_give_an_output_for_every_token(name):
    """Calibration and comparison read the whole text, whose tokens all have a class or a place in the answer."""
    model = build(name, OF_TOKENS[name][0], **OF_TOKENS[name][1])
    plan, pruned = pruned_by(model, kinds=["neurons"])
    assert lp.verify(model, pruned, plan).equivalent
    ids = tokens(4, 12).clamp_min(3)
    ids[:, -1] = OF_TOKENS[name][1]["eos_token_id"]
    output = logits(model, ids)
    assert output.shape == (4, 12, 2)
    with torch.no_grad():
        torch.testing.assert_close(output, main_output(model(input_ids=ids)))
    lp.score(model, lp.trace(model), ids, "taylor", taylor="param_second", kinds=["neurons"])


def letters(folder):
    """Return a tokenizer of eight letters."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))


def test_classifiers_that_give_several_classes(tmp_path):
    """All classes with a positive logit count, not the largest alone."""
    tokenizer = letters(tmp_path)
    model = build("BertForSequenceClassification", "bert", **TEXT | {"vocab_size": len(tokenizer)}, num_labels=4)
    model.config.problem_type = "multi_label_classification"
    texts = ["a b", "c d e", "f", "g h a"]
    with torch.no_grad():
        model.classifier.weight.mul_(50)
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    labels = [logit.gt(0).nonzero().flatten().tolist() for logit in logits]
    assert {len(label) for label in labels} - {1}
    labels[0] = [c for c in range(4) if c not in labels[0]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in zip(texts, labels, strict=True)))
    assert measure_labelled(model, tokenizer, str(file))["acc"] == pytest.approx(3 / 4)
    found = outputs(model, tokenizer, texts)
    assert [one.tolist() for one in found] == [logit.gt(0).tolist() for logit in logits]
    assert similarity(found, [~found[0], *found[1:]]).agreement == pytest.approx(3 / 4)
    file.write_text(json.dumps({"text": "a", "label": 1}))
    with pytest.raises(PrunerError, match="label 1: BertForSequenceClassification gives several classes to an input"):
        measure_labelled(model, tokenizer, str(file))
    model.config.problem_type = None
    file.write_text(json.dumps({"text": "a", "label": [1]}))
    with pytest.raises(PrunerError, match="gives one class each"):
        measure_labelled(model, tokenizer, str(file))


@pytest.mark.parametrize("columns", (("premise", "hypothesis"), ("text", "other"), ("sentence1", "sentence2")))
def test_labelled_pairs(columns, tmp_path):
    """Both texts are read as the tokenizer joins them, with which of them each token is of."""
    tokenizer = letters(tmp_path)
    model = build("BertForSequenceClassification", "bert", **TEXT | {"vocab_size": len(tokenizer)}, num_labels=3)
    pairs = [("a b", "c"), ("d", "e f"), ("g h a", "b"), ("c d", "e f g")]
    with torch.no_grad():
        answers = [int(model(**tokenizer(*pair, return_tensors="pt")).logits.argmax()) for pair in pairs]
    labels = [(label + (i == 0)) % 3 for i, label in enumerate(answers)]
    rows = [dict(zip(columns, pair, strict=True)) | {"label": label} for pair, label in zip(pairs, labels, strict=True)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert measure_labelled(model, tokenizer, str(file))["acc"] == pytest.approx(3 / 4)
    file.write_text("\n".join(map(json.dumps, [*rows, {"text": "a", "label": 0}])))
    with pytest.raises(PrunerError, match="row 5: rows must be such as"):
        measure_labelled(model, tokenizer, str(file))
    reward = build("BertForSequenceClassification", "bert", **TEXT | {"vocab_size": len(tokenizer)}, num_labels=1)
    with torch.no_grad():
        scores = [reward(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    rows = [dict(zip(columns, pair, strict=True)) | {"score": score} for pair, score in zip(pairs, scores, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert measure_labelled(reward, tokenizer, str(file))["spearman"] == pytest.approx(1)
    given = [3.0, 1.0, 1.0, 2.0]  # equal scores share a rank
    file.write_text("\n".join(json.dumps(row | {"score": score}) for row, score in zip(rows, given, strict=True)))
    expected = pandas.Series(scores).corr(pandas.Series(given), method="spearman")
    assert measure_labelled(reward, tokenizer, str(file))["spearman"] == pytest.approx(expected)
    with torch.no_grad():
        reward.classifier.weight.fill_(float("nan"))
    with pytest.raises(PrunerError, match="--labelled: the outputs of BertForSequenceClassification are not finite"):
        measure_labelled(reward, tokenizer, str(file))


def test_lists_of_lists_are_no_layers():
    """Funnel's layers lie in three blocks, and weights of half precision are converted in all of them."""
    model = tiny_model("funnel:fill-mask")
    assert list(layer_lists(model)) == [*(f"funnel.encoder.blocks.{i}" for i in range(3)), "funnel.decoder.layers"]
    plan, pruned = pruned_by(model, kinds=["neurons", "heads"])
    assert lp.verify(model, pruned, plan).equivalent
    seen = []
    with torch.no_grad(), standing_in(model, lambda name, tensor: (seen.append(name), tensor)[1]):
        model(torch.arange(10, 26).view(1, 16))
        model(torch.arange(10, 26).view(1, 16))


def test_only_the_heads_of_the_pooling_head_of_siglip_stay():
    model = media_model("SiglipModel")
    graph = lp.trace(model)
    assert len(graph.of_kind("heads")) == 4
    assert [unit.name for unit in graph.frozen if "torch's attention" in (unit.frozen or "")]
    plan, pruned = pruned_by(model, kinds=["heads"])
    assert lp.verify(model, pruned, plan).equivalent


def test_a_vision_transformer_without_register_tokens():
    fields = SIZES | {"image_size": 16, "patch_size": 8, "num_register_tokens": 0}
    model = build("DINOv3ViTModel", "dinov3_vit", **fields)
    plan, pruned = pruned_by(model, kinds=["neurons", "heads"])
    assert lp.verify(model, pruned, plan).equivalent


def test_patches_of_a_grid_are_asked_for_and_taken(tmp_path, monkeypatch, capsys):
    """The encoder of images of Qwen2-VL, by itself, reads a grid that neither signature nor config tells."""
    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(**sizes)
    model = Qwen2VisionTransformerPretrainedModel(config).eval()
    with pytest.raises(PrunerError, match=r"needs .*, which cannot be guessed: give lp\.trace\(model, inputs=…\)"):
        lp.trace(model)
    given = {"hidden_states": torch.randn(16, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]])}
    graph = lp.trace(model, inputs=given)
    plan = lp.select(
        graph, lp.score(model, graph, given, criterion="wanda", kinds=["neurons"]), 0.25, kinds=["neurons"]
    )
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent
