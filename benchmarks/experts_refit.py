"""Measure the refit of experts, counts that differ by layer and fewer experts per token on a small trained mixture.

    python benchmarks/experts_refit.py --texts c4.jsonl alpaca.json zh.json wikitext2_valid.txt --minutes 22 \
        --output results/experts_refit.json

The mixture reads bytes: four layers with eight experts, two per token, trained from scratch on the texts, whose last
fifth is held out. Calibration reads held-out windows, the loss is measured on others.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.provenance import provenance
from llm_pruner.surgery.per_token import with_experts_per_token

LENGTH, BATCH, RATE = 256, 16, 2e-3  # bytes of a window, windows of a step, largest learning rate
MEASURED, CALIBRATED = 32, 24  # windows of each text
RATIOS = (0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=22)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of the calibration set")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [windows(text(file)) for file in options.texts]
    held_out = [part[len(part) * 4 // 5 :] for part in rows]
    model = trained(torch.cat([part[: len(part) * 4 // 5] for part in rows]), options.minutes)
    measured = torch.cat([part[-MEASURED:] for part in held_out])
    record: dict = {"loss": loss(model, measured), "rows": []}
    for seed in options.seeds:
        draw = torch.Generator().manual_seed(seed)
        pools = [part[:-MEASURED] for part in held_out]
        ids = torch.cat([pool[torch.randperm(len(pool), generator=draw)[:CALIBRATED]] for pool in pools])
        for name, pruned in variants(model, ids):
            row = {"seed": seed, "variant": name, "loss": loss(pruned, measured)}
            lp.compensate(model, pruned, ids)
            record["rows"].append(row | {"refitted": loss(pruned, measured)})
            print(json.dumps(record["rows"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(record | provenance(), indent=1) + "\n")


def windows(content: str) -> torch.Tensor:
    """Return the bytes of a text in windows, LongTensor ``[windows, LENGTH]``."""
    values = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8).long()
    return values[: len(values) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(rows: torch.Tensor, minutes: float) -> PreTrainedModel:
    """Return a mixture that was trained for so many minutes."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    draw, began = torch.Generator().manual_seed(0), time.monotonic()
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, share * 20) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draw)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def variants(model: PreTrainedModel, ids: torch.Tensor):
    """Yield pruned models by name."""
    graph = lp.trace(model)
    scores = lp.score(model, graph, ids, "reap", kinds=["experts"])
    for ratio in RATIOS:
        yield f"uniform, {ratio} removed", lp.apply(model, lp.select(graph, scores, ratio, kinds=["experts"]))
        for normalize in ("none", "mean", "sqrt"):
            plan = lp.select(graph, scores, ratio, kinds=["experts"], scope="global", normalize=normalize)
            yield f"global, {normalize}, {ratio} removed", lp.apply(model, plan)
    yield "1 of 2 experts per token", lp.apply(with_experts_per_token(model, 1), lp.PruningPlan())


@torch.no_grad()
def loss(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Return the loss per byte."""
    total = 0.0
    for ids in rows.split(16):
        logits = model(input_ids=ids, use_cache=False, output_router_logits=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return round(total / rows[:, 1:].numel(), 4)


if __name__ == "__main__":
    main()
