"""Language models that read images: shown one that is drawn by their config, and models that read no text without."""

import json

import pytest
import tokenizers
import torch
import transformers
from helpers.architectures import perturbed, tiny_config, tiny_model

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.models.inputs import inputs_with_image
from llm_pruner.models.running import main_output

# By whole images, lists of them, tiles, patches with a grid, patches with a shape, and a projector that follows.
WAYS = ("llava", "idefics3", "llava_next", "qwen2_5_vl", "paddleocr_vl", "lfm2_vl", "llama4", "gemma3")
MARK = 90


@pytest.mark.parametrize("kind", WAYS)
def test_an_image_is_drawn_by_the_config(kind):
    """The logits change with it, and the units of the vision tower are found and pruned as the others are."""
    model = tiny_model(f"{kind}:image-text-to-text")
    image = inputs_with_image(model, 1, 16, torch.Generator().manual_seed(0))
    tensors = image.tensors()
    with torch.no_grad():
        seen, other = (main_output(model(**tensors | {"pixel_values": p})) for p in _both(tensors["pixel_values"]))
    assert not torch.allclose(seen, other, atol=1e-3)
    graph = lp.trace(model, image)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, kinds=["neurons"])
    assert {"vis" in name for name in plan.units} == {False, True}
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


def _both(pixels):
    return pixels, -pixels


def test_no_image_is_drawn_without_the_token_that_marks_it():
    model = tiny_model("llava:image-text-to-text")
    model.config.image_token_index = model.config.image_token_id = 10**6
    assert inputs_with_image(model, 1, 16, torch.Generator()) is None


def test_a_model_that_reads_no_text_without_an_image_is_pruned(tmp_path, capsys):
    """InstructBLIP, by its processor; without one, the command says what is missing."""
    original = _save_instructblip(tmp_path / "original")
    command = ["--kinds", "neurons", "--pruning_ratio", "0.25", "--num_examples", "4", "--refit", "none"]
    assert main(["prune", str(original), str(tmp_path / "pruned"), *command]) == 0
    assert "pruned model equals the masked original" in capsys.readouterr().err
    units = lp.PruningPlan.load(tmp_path / "pruned" / "pruning_plan.json").units
    assert units and not any(name.startswith("vision_model") for name in units)
    stock, info = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "pruned", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.text_config.ffn_dim == 36
    (original / "processor_config.json").unlink()
    assert main(["prune", str(original), str(tmp_path / "refused"), *command]) == 2
    assert "needs 'qformer_input_ids', which cannot be guessed" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def _save_instructblip(folder):
    config = tiny_config("instructblip")
    config.image_token_index = config.image_token_id = MARK
    lp.save(perturbed(transformers.AutoModelForImageTextToText, config), None, folder)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<image>": MARK}
    words |= {f"w{i}": i for i in range(96) if i not in words.values()}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    pixels = transformers.BlipImageProcessor(size={"height": 28, "width": 28})
    processor = transformers.InstructBlipProcessor(pixels, tokenizer, tokenizer, num_query_tokens=32)
    processor.save_pretrained(folder)
    assert json.loads((folder / "processor_config.json").read_text())["num_query_tokens"] == config.num_query_tokens
    return folder
