"""Coverage-guided fuzzing (atheris) of what is read from files, byte by byte.

    pip install atheris
    python tests/helpers/fuzz_bytes.py plan -max_total_time=600        # or another of KINDS

Anything but a line for the user is an error. Begins with a sound document of each kind.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "llm_pruner.selection.plan",
        "llm_pruner.recipes",
        "llm_pruner.checkpoint.shards",
        "llm_pruner.corpora",
    ]
):
    from llm_pruner.checkpoint.shards import shard_files, tensors_in
    from llm_pruner.corpora import documents
    from llm_pruner.errors import PrunerError
    from llm_pruner.recipes.recipe import read
    from llm_pruner.recipes.sweep import points_of
    from llm_pruner.selection.plan import PruningPlan
    from llm_pruner.vocabulary.counting import Counts

PLAN = {
    "format": "llm-pruner plan",
    "version": 1,
    "settings": {},
    "notes": ["a note"],
    "units": {"a.neurons": {"kind": "neurons", "layer": 0, "size": 4, "kept": "0-1,3", "removed": 0.5}},
    "positions": ["0-1,3"],
    "parameters": {"a.weight": {"shape": [4, 2], "kept": {"0": 0}}},
}
RECIPE = (
    "model: m\noutput: o\nstages:\n  - prune: {pruning_ratio: 0.5}\nsweep:\n  grid: {prune.seed: [1, 2]}\nseeds: [0]\n"
)
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
COUNTS = {"tokenizer": "t", "size": 9, "sources": {"x": {"read": 1, "stamp": [3, 4], "counts": {"1": [5, 2]}}}}
ROW = {"text": "a text", "instruction": "Add.", "messages": [{"role": "user", "content": "Hi"}]}
HEADER = json.dumps({"a.weight": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
KINDS = {
    "plan": (json.dumps(PLAN), "plan.json", PruningPlan.load),
    "recipe": (RECIPE, "recipe.yaml", lambda file: points_of(read(file))),
    "index": (json.dumps(INDEX), "model.safetensors.index.json", lambda file: shard_files(file.parent)),
    "counts": (json.dumps(COUNTS), "counts.json", lambda file: Counts.load(file, "t")),
    "tensors": (len(HEADER).to_bytes(8, "little") + HEADER + bytes(8), "model.safetensors", tensors_in),
    "rows": (json.dumps(ROW), "rows.jsonl", lambda file: list(documents(str(file)))),
}


def main() -> None:
    kind = sys.argv.pop(1)
    seed, name, action = KINDS[kind]
    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed if isinstance(seed, bytes) else seed.encode())

    def one(data: bytes) -> None:
        file = folder / name
        file.write_bytes(data)
        try:
            action(file)
        except PrunerError as error:
            assert str(error).strip()

    atheris.Setup([sys.argv[0], *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
