"""Compare criteria of experts on a trained mixture: the loss after removing a share of every layer's experts.

    python benchmarks/experts.py --texts c4.jsonl alpaca.json zh.json wikitext2_valid.txt --other wikitext2_test.txt \
        --minutes 60 --output results/experts.json

There is no small mixture to download in one piece, so the script makes one: SmolLM2-135M with eight experts in every
layer, copies of its MLP with noise, two of which each token is sent to. They and the router are trained on the texts
for the given minutes, so that experts specialise. Of each text the last fifth is held out. Calibration reads held-out
windows, the loss is measured on others; ``--other`` is a text of which nothing was trained on. No experts are trained
after pruning.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.evaluation.perplexity import windows
from llm_pruner.importance.activation import SAMPLES_PER_PASS
from llm_pruner.provenance import provenance

EXPERTS, PER_TOKEN, NOISE = 8, 2, 0.3  # noise: share of each weight's standard deviation
LENGTH, BATCH, RATE = 256, 32, 3e-4  # tokens of a window, windows of a step, largest learning rate
WINDOWS = 64  # per text: for calibration, and as many for each measurement
CRITERIA = ("random", "reap", "frequency", "ean", "mone", "l2", "expert_loss")
RATIOS = (0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True, help="files to train on")
    parser.add_argument("--other", nargs="+", default=[], help="files to measure on only")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="of random, and of calibration")
    parser.add_argument("--layers", type=int, help="of the model, to try the script out")
    parser.add_argument("--save", help="folder for the trained mixture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    dense, tokenizer = lp.load("smollm2-135m", "float32", options.device)
    rows = {Path(file).stem: windows(tokenizer, text(file), LENGTH, None) for file in [*options.texts, *options.other]}
    train = {name: rows[name][: len(rows[name]) * 4 // 5] for name in (Path(file).stem for file in options.texts)}
    held_out = {name: part[len(train.get(name, ())) :] for name, part in rows.items()}
    model = upcycled(dense, options.layers)
    record: dict[str, Any] = {"before": losses(model, held_out, options)}
    record |= trained(model, torch.cat(list(train.values())), options)
    record["after"] = losses(model, held_out, options)
    print(json.dumps(record), flush=True)
    if options.save:
        lp.save(model, tokenizer, options.save)
    record["rows"] = compared(model, held_out, list(train), options)
    if options.output:
        options.output.write_text(json.dumps(record | provenance(), indent=1) + "\n")


def upcycled(dense: PreTrainedModel, layers: int | None) -> PreTrainedModel:
    """Return a mixture whose experts are copies of a Llama's MLPs with noise."""
    config = dense.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id")
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in names},
            num_hidden_layers=layers or config.num_hidden_layers,
            tie_word_embeddings=True,
            num_local_experts=EXPERTS,
            num_experts_per_tok=PER_TOKEN,
            router_aux_loss_coef=0.01,
        )
    ).to(dense.device)
    torch.manual_seed(0)
    source = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if "gate_up_proj" in name:
                at = name.replace("experts.gate_up_proj", "{}.weight")
                copied = torch.cat([source[at.format(part)] for part in ("gate_proj", "up_proj")])
            elif "experts.down_proj" in name:
                copied = source[name.replace("experts.down_proj", "down_proj.weight")]
            elif "mlp.gate" in name:
                parameter.normal_(std=0.02)
                continue
            else:
                parameter.copy_(source[name])
                continue
            parameter.copy_(copied + NOISE * copied.std() * torch.randn_like(parameter))
    return mixture


def trained(model: PreTrainedModel, rows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Train all weights with the balancing loss for the given minutes; return what was done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    model.train()
    began, steps, share = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - began) / (60 * options.minutes)) < 1:
        rate = RATE * min(1, share * 20) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draw)].to(model.device)
        loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
    model.eval()
    return {"steps": steps, "tokens": steps * BATCH * LENGTH, "minutes": options.minutes, "last_loss": loss.item()}


@torch.no_grad()
def losses(model: PreTrainedModel, held_out: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, float]:
    """Return the loss per token on the last held-out windows of each text."""
    out = {}
    for name, rows in held_out.items():
        total = tokens = 0.0
        for ids in rows[-WINDOWS:].to(options.device).split(8):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            tokens += ids[:, 1:].numel()
        out[name] = round(total / tokens, 4)
    return out


@torch.no_grad()
def forward_passes(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Run the model on calibration samples, as many in a pass as a scoring takes."""
    for batch in ids.to(model.device).split(SAMPLES_PER_PASS):
        model(input_ids=batch, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], None]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


def compared(
    model: PreTrainedModel, held_out: dict[str, torch.Tensor], names: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per criterion, ratio and seed: losses after pruning, and the seconds of a scoring."""
    graph, rows = lp.trace(model), []
    for criterion in CRITERIA:
        for seed in options.seeds:
            draw = torch.Generator().manual_seed(seed)
            pools = [held_out[name][:-WINDOWS] for name in names]
            ids = torch.cat([pool[torch.randperm(len(pool), generator=draw)[: WINDOWS // 2]] for pool in pools])
            forward = seconds_of(lambda ids=ids: forward_passes(model, ids))
            began = time.monotonic()
            scores = lp.score(model, graph, ids, criterion, kinds=["experts"], seed=seed)
            seconds = time.monotonic() - began
            for ratio in RATIOS:
                pruned = lp.apply(model, lp.select(graph, scores, ratio, kinds=["experts"]))
                row = {"criterion": criterion, "ratio": ratio, "seed": seed, "seconds": round(seconds, 2)}
                row["times_a_forward_pass"] = round(seconds / forward, 3)
                rows.append(row | {"losses": losses(pruned, held_out, options), "calibration": list(ids.shape)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
