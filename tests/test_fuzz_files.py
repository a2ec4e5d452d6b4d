"""Bad files of every other kind: rows of data, processors, quantized and GGUF checkpoints, leftovers of a run."""

import json

import numpy as np
import pytest
import torch
from helpers.fuzzing import (
    FEW,
    JSON,
    SOME,
    harmed,
    harmed_bytes,
    join_header,
    linked,
    refused_or_done,
    scratch,
    sizes_of,
    split_header,
)
from helpers.media import save_llava
from helpers.quantized import FORMATS, quantized, unquantized
from hypothesis import assume, given
from hypothesis import strategies as st

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.quantized.registry import open_shards
from llm_pruner.checkpoint.shards import INDEX
from llm_pruner.checkpoint.unread import UNREAD
from llm_pruner.cli import main
from llm_pruner.corpora import check_text, conversations, documents
from llm_pruner.data import calibration_sources, check_calibration_text
from llm_pruner.media import load_processor, media_inputs
from llm_pruner.recovery.rows import check_rows, read_rows
from llm_pruner.recovery.tokenize import ExampleFormat, tokenize
from llm_pruner.serving.gguf_writer import write_gguf
from llm_pruner.unfinished import Unfinished

ROWS = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"text": "Yes"}]}]},
    "instruction": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "pair": {"prompt": "1 + 2", "completion": 3},
    "text": {"text": "some words that fill a window of eight tokens or more"},
}
TEXTS = st.text(max_size=6).filter(lambda text: not text.startswith("~"))  # names of users
CALIBRATED = ("general:3", "python-docs", "c4:0.5", "self:0.2", ":", "general:nan", "general:-1", "a:b:1", ",")


@SOME
@given(data=st.data())
def test_training_rows(tmp_path_factory, tokenizer, data):
    """Rows of a file: read for training, and for calibration as a text and as conversations."""
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    rows = [data.draw(st.one_of(st.just(ROWS[kind]), harmed(ROWS[kind]), JSON)) for _ in range(3)]
    with scratch(tmp_path_factory, "rows") as place:
        file = str(place / data.draw(st.sampled_from(["rows.json", "rows.jsonl"])))
        with open(file, "w") as stream:
            stream.write(json.dumps(rows) if file.endswith("json") else "\n".join(map(json.dumps, rows)))
        form = ExampleFormat(cutoff_len=8, packing=data.draw(st.booleans()))
        refused_or_done(lambda: check_rows(file))
        refused_or_done(lambda: list(tokenize(read_rows(file, streaming=True), tokenizer, form, file)))
        refused_or_done(lambda: list(conversations(file, tokenizer)))
        refused_or_done(lambda: (check_text(file), list(documents(file))))


@SOME
@given(data=st.data())
def test_training_rows_as_bytes(tmp_path_factory, tokenizer, data):
    """A damaged file of rows is read up to the damage, or refused."""
    content = data.draw(harmed_bytes("\n".join(map(json.dumps, ROWS.values())).encode()))
    with scratch(tmp_path_factory, "rows") as place:
        file = place / data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.txt", "rows.csv", "rows.parquet"]))
        file.write_bytes(content)
        refused_or_done(lambda: list(tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=8), str(file))))
        refused_or_done(lambda: list(documents(str(file))))


@SOME
@given(parts=st.lists(st.one_of(st.sampled_from(CALIBRATED), TEXTS), max_size=4))
def test_calibration_texts_with_proportions(parts):
    def read():
        sources = calibration_sources(",".join(parts))
        assert abs(sum(source.share for source in sources) - 1) < 1e-6
        for source in sources:
            if source.name not in ("c4", "self"):
                check_calibration_text(source.name)

    refused_or_done(read)


@pytest.fixture(scope="module")
def llava_folder(tokenizer, tmp_path_factory):
    return save_llava(tokenizer, tmp_path_factory.mktemp("fuzz") / "llava")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    place = tmp_path_factory.mktemp("images")
    Image.fromarray(np.full((20, 24, 3), 90, dtype=np.uint8)).save(place / "a.png")
    return place


@FEW
@given(data=st.data())
def test_processors(llava_folder, images, tmp_path_factory, data):
    """Settings of a checkpoint for its images: their size, their colours, their place in the text."""
    name = data.draw(st.sampled_from(["processor_config.json", "tokenizer_config.json", "chat_template.jinja"]))
    original = (llava_folder / name).read_text()
    with scratch(tmp_path_factory, "processor") as place:
        linked(llava_folder, place, name)
        if name.endswith(".json"):
            document = data.draw(harmed(json.loads(original)))
            assume(not sizes_of(document) or name == "tokenizer_config.json")
            (place / name).write_text(json.dumps(document))
        else:
            content = data.draw(harmed_bytes(original.encode())).decode(errors="replace")
            (place / name).write_text(content)
        model = lp.load(str(llava_folder))[0]
        model.config.name_or_path = model.name_or_path = str(place)
        refused_or_done(lambda: (load_processor(model), media_inputs(model, str(images), samples=1)))


@pytest.fixture(scope="module")
def quantized_folders(tmp_path_factory):
    """A tiny checkpoint in every quantized format."""
    home = tmp_path_factory.mktemp("quantized")
    for name in ("qwen3", "gpt_oss"):
        unquantized(name, home / name)
    for how in FORMATS:
        quantized(home / ("gpt_oss" if how == "mxfp4" else "qwen3"), home / how, how)
    return home


@SOME
@given(data=st.data())
def test_quantized_checkpoints(quantized_folders, tmp_path_factory, data):
    """The config and the header of a quantized file: every weight is dequantized, or the file refused."""
    source = quantized_folders / data.draw(st.sampled_from(sorted(FORMATS)))
    config = json.loads((source / "config.json").read_text())
    header, tensors = split_header(source / "model.safetensors")
    with scratch(tmp_path_factory, "quantized") as place:
        linked(source, place, "config.json", "model.safetensors")
        if data.draw(st.booleans()):
            config["quantization_config"] = data.draw(harmed(config["quantization_config"]))
        else:
            names = [name for name in header if "layers.0." in name]
            name = data.draw(st.sampled_from(names))
            header[name] = data.draw(harmed(header[name], most=1))
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(join_header(header, tensors))

        def read():
            shards = open_shards("it", place)
            for name in shards.shapes():
                if "layers.0." in name:
                    assert torch.is_tensor(shards.values(name, torch.float32))

        refused_or_done(read)


@SOME
@given(data=st.data())
def test_headers(quantized_folders, tmp_path_factory, data):
    """Bytes of a header: lengths beyond the file, cut JSON, wrong offsets."""
    source = quantized_folders / "qwen3"
    content = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    with scratch(tmp_path_factory, "header") as place:
        linked(source, place, "model.safetensors")
        (place / "model.safetensors").write_bytes(data.draw(harmed_bytes(content, end)))

        def read():
            shards = open_shards("it", place)
            for name in shards.tensors:
                assert torch.is_tensor(shards.read(name))

        refused_or_done(read)


@pytest.fixture(scope="module")
def gguf_file(home, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(*lp.load(str(home / "uniform")), file, "f32")
    return file


@SOME
@given(data=st.data())
def test_gguf_files(gguf_file, tmp_path_factory, data):
    """Keys, types, counts and offsets of a GGUF file."""
    content = gguf_file.read_bytes()
    tensors = content.index(b"output_norm.weight") + 200
    with scratch(tmp_path_factory, "gguf") as place:
        (place / "a.gguf").write_bytes(data.draw(harmed_bytes(content, data.draw(st.sampled_from([200, tensors])))))
        assert main(["inspect", str(place / "a.gguf")]) in (0, 2)


@pytest.fixture(scope="module")
def full_plan(home, tmp_path_factory):
    """A plan with every field: mended weights, a cut vocabulary, unread tensors and hashes of files."""
    place = tmp_path_factory.mktemp("plans")
    flags = ["--pruning_ratio", "0.5", "--num_examples", "32", "--calib_seq_len", "8", "--calib_dataset", "python-docs"]
    flags += ["--refit", "ridge", "--rescale_norms", "--kinds", "heads", "neurons", "--no_save", "--quiet"]
    assert main(["prune", str(home / "base"), str(place / "run"), *flags]) == 0
    document = json.loads((place / "run" / "pruning_plan.json").read_text())
    document["settings"][UNREAD] = ["extra.weight"]
    return document


@FEW
@given(data=st.data())
def test_plans_of_mended_models(full_plan, home, tmp_path_factory, data):
    """Notes of a plan on its refit and on what its model left out, as applied and as inspected."""
    document = data.draw(harmed(full_plan))
    document["settings"] = data.draw(st.one_of(st.just(document.get("settings")), harmed(full_plan["settings"])))
    with scratch(tmp_path_factory, "plan") as place:
        file = place / "plan.json"
        file.write_text(json.dumps(document))
        refused_or_done(lambda: apply_to_files(lp.PruningPlan.load(file), str(home / "base"), place / "out"))
        assert main(["inspect", str(file)]) in (0, 2)


@SOME
@given(data=st.data())
def test_leftovers_of_a_run(tmp_path_factory, data):
    """A damaged file of an unfinished step is not read."""
    with scratch(tmp_path_factory, "unfinished") as place:
        file = place / "step.safetensors"
        Unfinished(file, key=["a"]).write({"sum": torch.ones(2, 3)}, {"done": 3, "rest": [1, 2]})
        header, tensors = split_header(file)
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(harmed_bytes(file.read_bytes())))
        else:
            file.write_bytes(join_header(data.draw(harmed(header)), tensors))
        kept = Unfinished(file, key=["a"]).read()
        assert kept is None or all(map(torch.is_tensor, kept.tensors.values()))


def test_all_files_of_a_checkpoint_are_harmed_somewhere(home):
    """A new file of a checkpoint needs a test in this module or in test_fuzz.py."""
    tested = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "pruning_plan.json"}
    tested |= {"model.safetensors", INDEX, "processor_config.json", "generation_config.json"}
    assert {file.name for file in (home / "pruned").iterdir()} - tested <= {"README.md"}
