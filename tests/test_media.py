"""Models that read images or sounds: traced by their signature, calibrated on folders or noise, compared on both."""

import json
import re
import wave

import numpy as np
import pytest
import torch
import transformers
from helpers.media import CLASSES, TEXT, model_of
from helpers.models import pruned_by
from PIL import Image

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation.labelled import form_of, measure_labelled
from llm_pruner.evaluation.similarity import outputs
from llm_pruner.files import read_json
from llm_pruner.media import (
    Medium,
    check_dataset,
    is_media,
    load_processor,
    media_inputs,
    process_sound,
    read_media,
)
from llm_pruner.models.inputs import ModelInputs, example_inputs, hash_of, needed_inputs
from llm_pruner.models.per_layer import has_per_layer_widths
from llm_pruner.models.running import forward, main_output
from llm_pruner.surgery.config.stacks import configs_in


@pytest.mark.parametrize("name", CLASSES)
def test_neurons_by_a_quarter(name, tmp_path):
    """Loaded in its class, cut, equal to the masked original, and read by that class with no key missing or left."""
    model = model_of(name)
    lp.save(model, None, tmp_path / "original")
    loaded, tokenizer = lp.load(str(tmp_path / "original"))
    assert type(loaded) is type(model) and tokenizer is None
    plan, pruned = pruned_by(loaded, kinds=["neurons"])
    assert lp.verify(loaded, pruned, plan).equivalent
    lp.save(pruned, None, tmp_path / "pruned", plan)
    stock, info = type(model).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = example_inputs(model, seed=3)
    with torch.no_grad():
        outputs = [main_output(forward(one.eval(), inputs)) for one in (stock, pruned, model)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs[1], outputs[2], rtol=1e-6, atol=1e-7), "something went"


@pytest.mark.parametrize("name", ("ViTForImageClassification", "CLIPModel", "WhisperForConditionalGeneration"))
def test_heads_and_criteria_of_data(name):
    model = model_of(name)
    graph, inputs = lp.trace(model), example_inputs(model, rows=4, seed=1)
    for criterion in ("taylor", "wanda"):
        scores = lp.score(model, graph, inputs, criterion, taylor="param_second", kinds=["heads", "neurons"])
        assert all(values.isfinite().all() and values.std() > 0 for values in scores.values.values())
    plan = lp.select(graph, scores, 0.5, kinds=["heads"])
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


def test_the_hidden_channels_of_a_vision_transformer():
    model = model_of("ViTForImageClassification")
    plan, pruned = pruned_by(model, kinds=["hidden"])
    assert pruned.config.hidden_size == 16 and lp.verify(model, pruned, plan).equivalent


def test_samples_add_up_whatever_the_batches():
    """Per-sample gradients of images do not depend on how they are cut into mappings."""
    model = model_of("ViTForImageClassification")
    graph, whole = lp.trace(model), example_inputs(model, rows=3, seed=2)
    parts = [part.tensors() for part in whole.split(1)]
    found = [
        lp.score(model, graph, inputs, taylor="param_second", kinds=["neurons"]).values
        for inputs in (whole, whole.tensors(), parts)
    ]
    for scores in found[1:]:
        for name, values in scores.items():
            torch.testing.assert_close(values, found[0][name])


def test_inputs_that_cannot_be_guessed_are_asked_for_and_taken():
    class Fusing(transformers.BertModel):
        def forward(self, input_ids, weights, attention_mask=None):
            output = super().forward(input_ids, attention_mask)
            output.last_hidden_state = output.last_hidden_state * weights[..., None]
            return output

    torch.manual_seed(0)
    model = Fusing(transformers.BertConfig(**TEXT)).eval()
    assert needed_inputs(model) == ["input_ids", "weights"]
    with pytest.raises(PrunerError, match=r"needs 'weights', which cannot be guessed: give lp\.trace"):
        lp.trace(model)
    given = {"input_ids": torch.randint(0, 99, (2, 8)), "weights": torch.rand(2, 8)}
    graph = lp.trace(model, inputs=given)
    plan = lp.select(graph, lp.score(model, graph, given, kinds=["neurons"]), 0.25, kinds=["neurons"])
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent
    with pytest.raises(PrunerError, match="must be inputs by name"):
        lp.score(model, graph, given["input_ids"])


def test_a_mapping_of_other_things_is_refused():
    with pytest.raises(PrunerError, match="must be tensors by name"):
        ModelInputs({"pixel_values": [1, 2]})


def test_inputs_with_a_tensor_without_rows_are_one_sample():
    inputs = ModelInputs({"pixel_values": torch.zeros(3, 4), "scale": torch.tensor(1.0)})
    assert len(inputs) == 1 and inputs[:1].tensors().keys() == {"pixel_values", "scale"} and len(inputs[1:]) == 0


def test_the_hash_of_inputs_in_bfloat16_follows_their_values():
    inputs = [ModelInputs({"pixel_values": torch.full((2, 3), value, dtype=torch.bfloat16)}) for value in (0, 1, 1)]
    hashes = [hash_of(one) for one in inputs]
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.fixture
def pictures(tmp_path):
    folder, noise = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(noise.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def sounds(tmp_path):
    folder, noise = tmp_path / "sounds", np.random.default_rng(0)
    folder.mkdir()
    for i in range(5):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((noise.normal(size=9_000) * 3_000).astype("<i2").tobytes())
    return folder


def saved(name, folder):
    lp.save(model_of(name), None, folder)
    if name.startswith("ViT"):
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    if name.startswith("Whisper"):
        transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    return folder


def test_files_are_held_out(pictures, sounds):
    trained, held_out = (read_media(str(pictures), split) for split in ("train", "test"))
    assert len(trained) == 10 and [medium.file.name for medium in held_out] == ["04.png", "09.png"]
    (pictures / "metadata.jsonl").write_text('{"file_name": "04.png", "text": "noise"}\n')
    assert read_media(str(pictures), "test")[0].text == "noise"
    (pictures / "metadata.jsonl").write_text('{"file": "04.png"}\n')
    with pytest.raises(PrunerError, match=r"metadata.jsonl, line 1: give \{"):
        read_media(str(pictures), "test")
    with pytest.raises(PrunerError, match="reads 16 bits at 8000 Hz: convert it with ffmpeg"):
        read_media(str(sounds), "train")[0].sound(8_000)


def test_a_folder_called_as_a_text_is_that_text(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("general", "self", "wikitext2"):
        (tmp_path / name).mkdir()
        assert not is_media(name) and is_media(f"./{name}")
    check_dataset("general", "test")


def test_commands_with_images(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved("ViTForImageClassification", tmp_path / "original")
    prune = "prune original pruned --pruning_ratio 0.25 --kinds neurons --calib_dataset pictures --preset fast"
    assert main([*prune.split(), "--eval_datasets", "pictures"]) == 0
    metrics = read_json(tmp_path / "pruned" / "metrics.json")
    assert 0 <= metrics["after"]["similarity"]["pictures"]["agreement"] <= 1
    assert (tmp_path / "pruned" / "preprocessor_config.json").is_file()
    assert "processor = AutoProcessor.from_pretrained" in (tmp_path / "pruned" / "README.md").read_text()
    evaluate = "evaluate original pruned --datasets pictures --tokens 0 --output measured"
    assert main(evaluate.split()) == 0
    second = read_json(tmp_path / "measured" / "evaluation.json")["models"][1]
    assert second["similarity"]["pictures"]["pieces"] == 2
    noisy = "prune original noisy --pruning_ratio 0.25 --kinds neurons --refit_tokens 16384"
    assert main(noisy.split()) == 0
    said = capsys.readouterr()
    said = said.out + said.err
    assert "128 samples of noise" in said and re.search("compensation moved [1-4] of 4", said)
    assert re.search("training on 16,384 tokens: held-out loss", said)
    for argv, message in (
        ("prune original x --calib_dataset python-docs", "is a text, and ViTForImageClassification is calibrated on"),
        ("prune original x --calib_dataset original", "holds no images"),
        ("evaluate smollm2-135m --datasets pictures --tokens 0", "reads text and no images or sounds"),
    ):
        assert main(argv.split()) == 2
        assert message in capsys.readouterr().err


def test_commands_with_sounds(sounds, tmp_path, monkeypatch):
    """The tokens of the decoder are those that the model writes itself."""
    monkeypatch.chdir(tmp_path)
    saved("WhisperForConditionalGeneration", tmp_path / "original")
    prune = "prune original pruned --pruning_ratio 0.5 --kinds heads --calib_dataset sounds --eval_datasets sounds"
    assert main([*prune.split(), "--preset", "fast"]) == 0
    similarity = read_json(tmp_path / "pruned" / "metrics.json")["after"]["similarity"]["sounds"]
    assert similarity["pieces"] == 1 and 0 <= similarity["agreement"] <= 1


def test_classes_without_a_tokenizer_that_need_one_are_refused(tmp_path, capsys):
    lp.save(model_of("CLIPModel"), None, tmp_path / "original")
    assert main(["prune", str(tmp_path / "original"), str(tmp_path / "pruned")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("towers", ("vision", "all"))
def test_towers(llava, towers, tmp_path, capsys):
    """Traced, scored and verified with images in chats, here of noise; what is not asked for stays."""
    prune = f"prune {llava} {tmp_path}/pruned --towers {towers} --pruning_ratio 0.25 --kinds neurons --num_examples 4"
    assert main([*prune.split(), "--compensate", "none", "--eval_datasets", ""]) == 0
    assert "equals the masked original" in (said := "".join(capsys.readouterr())), said
    before, _ = lp.load(str(llava))
    after, _ = lp.load(str(tmp_path / "pruned"))
    sizes = [
        [
            module.out_features
            for name, module in model.named_modules()
            if name.endswith(("fc1", "up_proj")) and ("vision" in name) == vision
        ]
        for model in (before, after)
        for vision in (True, False)
    ]
    # The projector reads the last layer but one of the vision tower; one field of the config is the width of both.
    assert sizes == [[48] * 2, [48] * 2, [36] * 2, [48 if towers == "vision" else 36] * 2]
    inputs = media_inputs(before, "synthetic", samples=1)
    assert (inputs.tensors()["input_ids"] == before.config.image_token_index).sum() == 4
    stock, info = type(before).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(has_per_layer_widths(config) for _, config in configs_in(stock.config)), "loads without llm_pruner"
    refused = prune.replace("vision", "audio").replace("all", "audio").split()
    assert main([*refused, "--output", str(tmp_path / "out")]) == 2


def test_accuracy_of_images(pictures, tmp_path, monkeypatch):
    """Labels are the model's own classes, all but two: 10 of 12 are right."""
    monkeypatch.chdir(tmp_path)
    folder = saved("ViTForImageClassification", tmp_path / "model")
    model, _ = lp.load(str(folder))
    seen = outputs(model, None, media_inputs(model, "pictures", None, samples=12))
    labels = [(int(one) + (i < 2)) % 5 for i, one in enumerate(seen)]
    rows = [{"file_name": f"{i:02}.png", "label": f"LABEL_{label}"} for i, label in enumerate(labels)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measure = "evaluate model --datasets= --labelled pictures --tokens 0 --output measured"
    assert main(measure.split()) == 0
    result = read_json(tmp_path / "measured" / "evaluation.json")["models"][0]["tasks"]["pictures"]
    assert result["acc"] == pytest.approx(10 / 12)
    assert result["acc_stderr"] == pytest.approx((10 / 12 * 2 / 12 / 11) ** 0.5)
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, [row | {"label": "cat"} for row in rows])))
    with pytest.raises(PrunerError, match="the model has no class 'cat'; it has LABEL_0, LABEL_1"):
        measure_labelled(model, None, "pictures")


def test_ranks_of_pairs_and_rewards(tokenizer, tmp_path, capsys):
    """Scores that are the model's own, in another scale: a rank correlation of 1; the other way round, of -1."""
    words = ["def f(x):", "return x", "import os", "class A:", "print(1)"]
    for name, task in (("BertModel", "pairs"), ("BertForSequenceClassification", "scores")):
        torch.manual_seed(0)
        config = transformers.BertConfig(**TEXT | {"vocab_size": len(tokenizer)}, num_labels=1)
        model = getattr(transformers, name)(config).eval()
        assert form_of(model) == task
        rows = []
        for text in words:
            given = {"text": text} | ({"other": "x = 1"} if task == "pairs" else {})
            found = [
                main_output(forward(model, tokenizer(part, return_tensors="pt")["input_ids"]))[0].detach()
                for part in given.values()
            ]
            score = torch.cosine_similarity(*(one.mean(0) for one in found), dim=0) if task == "pairs" else found[0]
            rows.append(given | {"score": 7 * score.item()})
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        assert measure_labelled(model, tokenizer, str(file))["spearman"] == pytest.approx(1)
        file.write_text("\n".join(json.dumps(row | {"score": -row["score"]}) for row in rows))
        assert measure_labelled(model, tokenizer, str(file))["spearman"] == pytest.approx(-1)
    file.write_text('{"text": "a"}\n')
    with pytest.raises(PrunerError, match="row 1: rows must be such as"):
        measure_labelled(model, tokenizer, str(file))
    assert main(["evaluate", "smollm2-135m", "--labelled", str(tmp_path / "none.jsonl")]) == 2
    assert "--labelled" in capsys.readouterr().err


def test_words_of_speech(sounds, tokenizer, tmp_path, monkeypatch):
    """Against its own transcripts a model makes no error; with one word more in each, one a file."""
    monkeypatch.chdir(tmp_path)
    folder = saved("WhisperForConditionalGeneration", tmp_path / "model")
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    model, _ = lp.load(str(folder))
    processor = load_processor(model)
    media = read_media("sounds", None)
    heard = [model.generate(**process_sound(processor, one)) for one in media]
    said = [processor.batch_decode(ids, skip_special_tokens=True)[0] for ids in heard]
    for extra, errors in (("", 0), (" indeed", len(media))):
        rows = [{"file_name": one.file.name, "text": text + extra} for one, text in zip(media, said, strict=True)]
        (sounds / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = sum(len(row["text"].split()) for row in rows)
        assert measure_labelled(model, None, "sounds")["wer"] == pytest.approx(errors / max(1, words))


def test_models_of_speech_are_compared_on_the_same_tokens(sounds, tokenizer, tmp_path, monkeypatch):
    """Those that the first one writes: `evaluate` and `prune` agree. A tokenizer in the folder changes nothing."""
    monkeypatch.chdir(tmp_path)
    saved("WhisperForConditionalGeneration", tmp_path / "original")
    prune = "prune original pruned --pruning_ratio 0.5 --kinds heads --calib_dataset sounds --eval_datasets sounds"
    assert main([*prune.split(), "--preset", "fast"]) == 0
    evaluate = "evaluate original pruned --datasets sounds --tokens 0 --output measured"
    assert main(evaluate.split()) == 0
    found = read_json(tmp_path / "measured" / "evaluation.json")["models"][1]["similarity"]["sounds"]["agreement"]
    metrics = read_json(tmp_path / "pruned" / "metrics.json")
    assert found == pytest.approx(metrics["after"]["similarity"]["sounds"]["agreement"])
    rows = [{"file_name": f"{i}.wav", "text": "a word"} for i in range(5)]
    (sounds / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(tmp_path / "original")
    measure = "evaluate original --datasets= --labelled sounds --tokens 0 --dtype bfloat16 --output words"
    assert main(measure.split()) == 0
    assert "wer" in read_json(tmp_path / "words" / "evaluation.json")["models"][0]["tasks"]["sounds"]


def test_speed_and_cost_of_models_of_sounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lp.save(model_of("Wav2Vec2ForCTC"), None, tmp_path / "model")
    assert main(["evaluate", "model", "--output", "measured"]) == 0
    (record,) = read_json(tmp_path / "measured" / "evaluation.json")["models"]
    assert record["macs"] > 10_000 and record["speed"]["tokens"] == 1


def test_files_of_the_other_sort_are_refused(pictures, sounds, tmp_path):
    for name, folder, message in (
        ("ViTForImageClassification", sounds, "the model reads images, and .*0.wav is a sound"),
        ("WhisperForConditionalGeneration", pictures, "reads sounds, and .*00.png is an image"),
    ):
        model, _ = lp.load(str(saved(name, tmp_path / name)))
        with pytest.raises(PrunerError, match=message):
            media_inputs(model, str(folder))
    (pictures / "._00.png").write_bytes(b"resource fork")
    assert len(read_media(str(pictures), None)) == 12
    (sounds / "metadata.jsonl").write_bytes('\ufeff{"file_name": "0.wav", "text": "é"}'.encode())
    assert read_media(str(sounds), None)[0].text == "é"
    (sounds / "metadata.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PrunerError, match=r"cannot read .*metadata\.jsonl"):
        read_media(str(sounds), None)
    content = (sounds / "0.wav").read_bytes()
    (sounds / "0.wav").write_bytes(content[:-3])
    assert len(Medium(file=sounds / "0.wav", is_sound=True).sound(16_000)) in (4_498, 4_499)


def test_rows_that_do_not_fit_are_named(tokenizer, pictures, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT | {"vocab_size": len(tokenizer)})
    model, file = transformers.BertForSequenceClassification(config).eval(), tmp_path / "rows.jsonl"
    for rows, message in (
        ([{"text": "a"}], "row 1 has text: give"),
        ([{"text": "a", "label": 0}, {"text": "", "label": 1}], "row 2: rows must be such as"),
        ([{"text": "a", "other": "b", "third": "c", "label": 0}], "row 1 has text, other, third, label: give"),
        ([{"text": "a", "label": True}], "the model has no class True"),
    ):
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(PrunerError, match=message):
            measure_labelled(model, tokenizer, str(file))
    file.write_text(json.dumps({"text": "many words " * 40, "label": 0}))
    assert measure_labelled(model, tokenizer, str(file))["acc"] in (0, 1), "longer than the model reads"
    vision = model_of("ViTForImageClassification")
    with pytest.raises(PrunerError, match="has no processor to read images or sounds with"):
        measure_labelled(vision, None, str(file))
    with pytest.raises(PrunerError, match="needs a classifier, a model of text embeddings or one of speech"):
        measure_labelled(model_of("CLIPModel"), tokenizer, str(file))


def test_answers_to_images_are_compared_beside_texts(llava, pictures, tmp_path):
    """`prune` takes folders and texts among its data sets, as `evaluate` does, whose comparison is the same."""
    prune = f"prune {llava} {tmp_path}/pruned --towers all --pruning_ratio 0.25 --kinds neurons --pruner_type l2"
    data = f"--num_examples 32 --calib_dataset synthetic --eval_datasets {pictures},general --max_windows 2"
    assert main([*prune.split(), *data.split(), "--refit", "ridge"]) == 0
    after = read_json(tmp_path / "pruned" / "metrics.json")["after"]
    assert list(after["perplexity"]) == ["general"] and list(after["similarity"]) == [str(pictures)]
    evaluate = f"evaluate {llava} {tmp_path}/pruned --datasets {pictures} --tokens 0 --output {tmp_path}/measured"
    assert main([*evaluate.split(), "--max_windows", "2"]) == 0
    found = read_json(tmp_path / "measured" / "evaluation.json")["models"][1]["similarity"][str(pictures)]
    assert found["agreement"] == pytest.approx(after["similarity"][str(pictures)]["agreement"])


def test_a_package_that_a_processor_needs_is_named(llava, tmp_path, monkeypatch, capsys):
    """As torchvision, which processors of videos need: an image processor alone would not read the text."""

    def missing(*_, **__):
        raise ImportError("LlavaProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    assert main(f"prune {llava} {tmp_path}/out --towers all --pruning_ratio 0.25 --kinds neurons".split()) == 2
    assert "cannot be loaded: ImportError: LlavaProcessor requires the Torchvision library" in capsys.readouterr().err


def test_inputs_that_are_not_the_models_are_refused():
    model = model_of("WhisperForConditionalGeneration")
    features = example_inputs(model).tensors()["input_features"]
    for given in ({"input_features": features}, {"features": features}):
        with pytest.raises(PrunerError, match="needs input_features, decoder_input_ids, and the inputs given are"):
            lp.score(model, lp.trace(model), given)
    with pytest.raises(PrunerError, match="inputs must be tensors by name"):
        lp.trace(model, inputs=features)


def test_heads_that_align_words_are_forgotten_with_other_numbers():
    """Times of words would be those of other heads, or end in a traceback."""
    model = model_of("WhisperForConditionalGeneration")
    model.generation_config.alignment_heads = [[1, 1], [1, 0]]
    narrower, fewer_heads = (pruned_by(model, kinds=(kind,))[1] for kind in ("neurons", "heads"))
    assert narrower.generation_config.alignment_heads == [[1, 1], [1, 0]]
    assert not hasattr(fewer_heads.generation_config, "alignment_heads")
