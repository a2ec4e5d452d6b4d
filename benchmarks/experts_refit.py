"""Measure criteria of experts, their refit, counts by layer and fewer experts per token on a small trained mixture.

    python benchmarks/experts_refit.py --texts c4.jsonl alpaca.json zh.json wikitext2_valid.txt --mixture FOLDER

The mixture reads bytes: four layers with eight experts, two per token, trained from scratch on the texts, whose last
fifth is held out. Calibration reads held-out windows, the loss is measured on others. A mixture that lies in the folder
already is not trained again. With `--print`, the tables of docs/how-to/mixtures-of-experts.md are printed from the
results, and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.evaluation.tabular import markdown
from llm_pruner.provenance import provenance, versions
from llm_pruner.surgery.per_token import with_experts_per_token

RESULTS = Path(__file__).parent / "results" / "experts_refit.json"
LENGTH, BATCH, RATE = 256, 16, 2e-3  # bytes of a window, windows of a step, largest learning rate
MEASURED, CALIBRATED = 32, 24  # windows of each text
EXPERTS, RATIOS = 8, (0.25, 0.5)
CRITERIA = ("reap", "frequency", "random")
NORMALIZATIONS = ("mean", "sqrt", "none")  # of scores that are ranked across layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+")
    parser.add_argument("--mixture", type=Path, help="folder of the trained mixture; trained if it is not there")
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of the calibration set")
    parser.add_argument("--draws", type=int, default=10, help="of random experts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the tables of the results")
    options = parser.parse_args()
    if options.print:
        print("\n".join(tables(json.loads(options.output.read_text()))))
        return
    rows = [windows(text(file)) for file in options.texts]
    held_out = [part[len(part) * 4 // 5 :] for part in rows]
    if not options.mixture.is_dir():
        train = torch.cat([part[: len(part) * 4 // 5] for part in rows])
        trained(train, options.steps).save_pretrained(options.mixture)
    model = Qwen3MoeForCausalLM.from_pretrained(options.mixture, experts_implementation="eager").eval()
    measured = torch.cat([part[-MEASURED:] for part in held_out])
    record: dict[str, Any] = {"parameters": model.num_parameters(), "steps": options.steps}
    record |= {"bytes": sum(part.numel() for part in rows), "loss": loss(model, measured), "rows": []}
    for row in results(model, [part[:-MEASURED] for part in held_out], measured, options):
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
    record |= {"machine": provenance()["machine"], "versions": versions()}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def windows(content: str) -> torch.Tensor:
    """Return the bytes of a text in windows, LongTensor ``[windows, LENGTH]``."""
    values = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8).long()
    return values[: len(values) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(rows: torch.Tensor, steps: int) -> PreTrainedModel:
    """Return a mixture that was trained for so many steps."""
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
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        experts_implementation="eager",  # half the time of the default on a CPU
    )
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, share * 20) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draw)]
        found = model(input_ids=batch, labels=batch, use_cache=False).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step}: loss {found.item():.3f}", flush=True)
    return model.eval()


def results(
    model: PreTrainedModel, pools: list[torch.Tensor], measured: torch.Tensor, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the results.

    Args:
        pools: windows of each text to draw calibration sets from.
        measured: windows that the loss is measured on.
    """
    graph = lp.trace(model)
    for seed in options.seeds:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.cat([pool[torch.randperm(len(pool), generator=draw)[:CALIBRATED]] for pool in pools])
        for criterion in CRITERIA:
            if criterion == "random" and seed != options.seeds[0]:
                continue  # reads no calibration set
            for number in range(options.draws if criterion == "random" else 1):
                scores = lp.score(model, graph, ids, criterion, kinds=["experts"], seed=number)
                for ratio in RATIOS:
                    pruned = lp.apply(model, lp.select(graph, scores, ratio, kinds=["experts"]))
                    row = {"part": "criteria", "variant": criterion, "ratio": ratio, "seed": seed, "draw": number}
                    yield row | {"loss": loss(pruned, measured)}
        for name, ratio, pruned in variants(model, graph, ids):
            row = {"part": "refit", "variant": name, "ratio": ratio, "seed": seed, "loss": loss(pruned, measured)}
            with mock.patch("llm_pruner.refit.compensate._refit_experts", return_value=[]):
                without = lp.apply(pruned, lp.PruningPlan())
                lp.compensate(model, without, ids)
            lp.compensate(model, pruned, ids)
            yield row | {"without_experts": loss(without, measured), "refitted": loss(pruned, measured)}


def variants(
    model: PreTrainedModel, graph: lp.CouplingGraph, ids: torch.Tensor
) -> Iterator[tuple[str, float, PreTrainedModel]]:
    """Yield pruned models with names and ratios."""
    scores = lp.score(model, graph, ids, "reap", kinds=["experts"])
    for ratio in RATIOS:
        yield "uniform", ratio, lp.apply(model, lp.select(graph, scores, ratio, kinds=["experts"]))
        for normalize in NORMALIZATIONS:
            plan = lp.select(graph, scores, ratio, kinds=["experts"], scope="global", normalize=normalize)
            yield f"global, {normalize}", ratio, lp.apply(model, plan)
    yield "1 of 2 experts per token", 0.0, lp.apply(with_experts_per_token(model, 1), lp.PruningPlan())


@torch.no_grad()
def loss(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Return the loss per byte."""
    total = 0.0
    for ids in rows.split(16):
        logits = model(input_ids=ids, use_cache=False, output_router_logits=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return round(total / rows[:, 1:].numel(), 4)


def tables(record: dict[str, Any]) -> Iterator[str]:
    """Yield the table of criteria and that of the refit, in Markdown: means, with the range of losses in brackets."""

    def cell(part: str, variant: str, ratio: float, column: str = "loss", *, bounds: bool = False) -> str:
        rows = [row for row in record["rows"] if (row["part"], row["variant"], row["ratio"]) == (part, variant, ratio)]
        values = [row[column] for row in rows]
        return f"{statistics.mean(values):.3f}" + f" ({min(values):.3f} to {max(values):.3f})" * bounds

    cells = [["experts kept", *(f"`{criterion}`" for criterion in CRITERIA)]]
    cells.append([f"{EXPERTS} of {EXPERTS}", *[f"{record['loss']:.3f}"] * len(CRITERIA)])
    for ratio in RATIOS:
        kept = f"{round(EXPERTS * (1 - ratio))} of {EXPERTS}"
        cells.append([kept, *(cell("criteria", name, ratio, bounds=True) for name in CRITERIA)])
    yield markdown(cells)
    cells = [["experts kept", "counts", "no refit", "attention alone refitted", "experts too"]]
    for variant, ratio in dict.fromkeys(
        (row["variant"], row["ratio"]) for row in record["rows"] if row["part"] == "refit"
    ):
        kept = f"{round(EXPERTS * (1 - ratio))} of {EXPERTS}"
        columns = ("loss", "without_experts", "refitted")
        cells.append([kept, variant, *(cell("refit", variant, ratio, column) for column in columns)])
    yield markdown(cells)


if __name__ == "__main__":
    main()
