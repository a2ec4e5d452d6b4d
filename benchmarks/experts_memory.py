"""Memory of scoring the experts of a large Qwen3 mixture offloaded, with fewer layers; all weights are zero.

    python benchmarks/experts_memory.py [--shape 235b-a22b] [--layers 8] [--folder DIR] [--output FILE.json]

Writes a checkpoint as the hub stores it, every expert by itself, as sparse files that take no space; the offloaded
copy takes 1.2 GB a layer of 30b-a3b and 4.9 GB of 235b-a22b. ``llm-pruner prune --stream --pruner_type reap`` then
scores it on 4 x 32 tokens and cuts a quarter of the experts, while the anonymous memory of its process is watched:
weights that are mapped from files are not counted, since the system can drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from llm_pruner.provenance import provenance

SHAPES = {"30b-a3b": (2048, 768, 32), "235b-a22b": (4096, 1536, 64)}  # hidden channels, neurons of an expert, heads
EXPERTS, VOCABULARY, KEY_VALUE_HEADS, HEAD_DIM = 128, 151936, 4, 128


def layer_shapes(layer: int, shape: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors, by name."""
    hidden, inner, heads = SHAPES[shape]
    heads, keys = heads * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "mlp.gate": (EXPERTS, hidden),
    }
    for expert in range(EXPERTS):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"mlp.experts.{expert}.{name}_proj"] = shape
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_zeros(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a sparse safetensors file of bfloat16 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def write_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """Write config, tokenizer and weights."""
    hidden, inner, heads = SHAPES[shape]
    folder.mkdir(parents=True)
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}, unk_token="?")
    )
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?").save_pretrained(folder)
    rest = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    shards = {"rest": {**rest, "model.norm.weight": (hidden,)}} | {
        str(i): layer_shapes(i, shape) for i in range(layers)
    }
    for name, shapes in shards.items():
        write_zeros(folder / f"model-{name}.safetensors", shapes)
    where = {tensor: f"model-{name}.safetensors" for name, shapes in shards.items() for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def watch(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the peak of its anonymous memory in GiB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("experts-memory"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    checkpoint = options.folder / f"{options.shape}-{options.layers}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, options.shape, options.layers)
    command = [sys.executable, "-m", "llm_pruner", "prune", str(checkpoint), str(options.folder / "cut"), "--no_save"]
    command += ["--kinds", "experts", "--pruning_ratio", "0.25", "--pruner_type", "reap", "--stream", "--refit", "none"]
    command += ["--num_examples", "4", "--calib_seq_len", "32", "--calib_dataset", "general", "--calib_packing"]
    seconds, peak = watch([*command, "--eval_datasets", ""])
    results = {
        "shape": options.shape,
        "layers": options.layers,
        "seconds": round(seconds, 1),
        "peak_anonymous_gib": round(peak, 2),
    }
    results |= provenance()
    print(json.dumps(results, indent=1))
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        known[f"{options.shape}, {options.layers} layers"] = results
        options.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
