"""Memory and time of pruning a model larger than comfortable: random bfloat16 weights, written shard by shard.

    python benchmarks/streaming.py --shape 7b [--folder DIR] [--output FILE.json]

Writes a Llama checkpoint of the shape (13.5 GB for 7b, 26 GB for 13b) into ``--folder``, scores it with param_first on
2 x 32 tokens, cuts 25% of heads and neurons out and checks mask equivalence, all in one process whose anonymous memory
is watched: weights that are mapped from files are not counted, since the system can drop them at any time.

With ``--files``, nothing is loaded at all: ``llm-pruner prune --stream --pruner_type l2`` scores and cuts 25% out of
the files, in a process of its own whose whole resident memory counts; beside it stands the time that copying the same
files takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import llm_pruner as lp
from llm_pruner.checkpoint.config import meta_model
from llm_pruner.checkpoint.on_disk import on_disk

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def write(folder: Path, shape: dict) -> None:
    """A checkpoint of random weights, one shard a layer."""
    config = LlamaConfig(**shape, vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in meta_model(config).state_dict().items():
        parts = name.split(".")
        shards.setdefault(parts[2] if "layers" in parts else "rest", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    where, size = {}, 0
    for shard, shapes in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {
            name: torch.ones(s, dtype=torch.bfloat16)
            if len(s) == 1
            else torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, s in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, file)
        size += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where})
    )
    config.save_pretrained(folder)


class Watch:
    """The largest anonymous memory of this process so far, in GiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def now(self) -> float:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
        return int(line.split()[1]) / 2**20

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path("streaming-benchmark"))
    parser.add_argument("--taylor", default="param_first")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folder = args.folder / args.shape
    if not folder.exists():
        write(folder, SHAPES[args.shape])
    if args.files:
        results = by_files(folder, args.folder)
        print(json.dumps(results, indent=1))
        keep(args.output, f"{args.shape}, files", results)
        return
    watch = Watch()
    results: dict = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shape": args.shape,
        "criterion": args.taylor,
        "seconds": {},
        "peak_anonymous_gib": {"imports": round(watch.now(), 2)},
    }
    clock = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        results["seconds"][stage] = round(time.perf_counter() - clock, 1)
        results["peak_anonymous_gib"][stage] = round(watch.peak, 2)
        print(stage, results["seconds"][stage], results["peak_anonymous_gib"][stage], flush=True)
        watch.peak, clock = 0.0, time.perf_counter()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    results["weights_gib"] = round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)
    done("load")
    graph = lp.trace(model)
    done("trace")
    ids = torch.randint(0, 32000, (2, 32), generator=torch.Generator().manual_seed(0))
    scores = lp.score(model, graph, ids, taylor=args.taylor, kinds=("heads", "neurons"))
    done("score")
    plan = lp.select(graph, scores, 0.25)
    done("select")
    pruned = lp.apply(model, plan, on_disk(args.folder))
    results["parameters"] = round(sum(p.numel() for p in pruned.parameters()) / sum(graph_sizes(graph)), 4)
    done("apply")
    report = lp.verify(model, pruned, plan)
    results["mask_equivalence"] = report.relative
    done("verify")
    results["seconds"]["all"] = round(sum(results["seconds"].values()), 1)
    print(json.dumps(results, indent=1))
    keep(args.output, args.shape, results)


def keep(file: Path | None, name: str, results: dict) -> None:
    if file:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {name: results}, indent=1) + "\n")


def by_files(folder: Path, scratch: Path) -> dict:
    """Score and cut without loading, and copy the same bytes, in turn."""
    command = [
        sys.executable,
        "-m",
        "llm_pruner",
        "prune",
        "--base_model",
        str(folder),
        "--stream",
        "--pruner_type",
        "l2",
    ]
    command += ["--pruning_ratio", "0.25", "--eval_datasets", "", "--save_model", "--output_root", str(scratch)]
    command += ["--block_mlp_layer_start", "0", "--block_attention_layer_start", "0"]
    layers = str(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    command += ["--block_mlp_layer_end", layers, "--block_attention_layer_end", layers, "--save_ckpt_log_name", "cut"]
    subprocess.run(command, check=True)
    told = json.loads((scratch / "cut" / "metrics.json").read_text())
    shutil.rmtree(scratch / "cut")
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with (scratch / "copy").open("wb") as out, file.open("rb") as source:
            shutil.copyfileobj(source, out, 2**24)
            out.flush()
            os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    (scratch / "copy").unlink()
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return {
        "gib": round(sum(files) / 2**30, 2),
        "largest_shard_gib": round(max(files) / 2**30, 2),
        "seconds": told["seconds"],
        "seconds_to_copy": round(seconds, 1),
        "speed_of_copying": round(seconds / told["seconds"]["save"], 3),
        "peak_rss_gib": told["peak_rss_gib"],
        "parameters": round(told["parameters_ratio"], 4),
    }


def graph_sizes(graph: lp.CouplingGraph) -> list[int]:
    return [torch.Size(shape).numel() for shape in graph.shapes.values()]


if __name__ == "__main__":
    main()
