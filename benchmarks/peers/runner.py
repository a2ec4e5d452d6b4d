"""Frame of the script of one tool: load a folder, time the pruning, save safetensors, report cost.

Runs in the tool's own environment, so it imports nothing but torch, transformers and safetensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

RATIOS = [step / 1000 for step in range(1, 1000)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pruning: folders, calibration tokens, share of the parameters that stays, the tool's method."""

    model: Path
    ids: torch.Tensor
    target: float
    method: str
    output: Path
    source: Path | None


def run(prune: Callable[[PreTrainedModel, Job], None]) -> None:
    """Run a pruning in place on the model that the command line names; write the checkpoint and its cost."""
    parser = argparse.ArgumentParser(description=prune.__doc__)
    for name in ("model", "calibration", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--source", type=Path, help="clone of the tool, if no package holds it")
    flags = vars(parser.parse_args())
    job = Job(ids=load_file(flags.pop("calibration"))["ids"], **flags)
    model = AutoModelForCausalLM.from_pretrained(job.model).float().eval()
    start = time.process_time()
    prune(model, job)
    seconds = time.process_time() - start
    save(model, job)
    write_cost(job.output, seconds)


def save(model: PreTrainedModel, job: Job) -> None:
    """Write the weights beside the original's config and tokenizer, whatever the shapes."""
    shutil.copytree(job.model, job.output, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    save_file(weights, job.output / "model.safetensors", metadata={"format": "pt"})


def write_cost(folder: Path, seconds: float) -> None:
    """Write the CPU seconds of the pruning and of the process, and the process's peak of resident memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    cost = {"step_seconds": seconds, "process_seconds": time.process_time(), "peak_gib": peak / 2**20}
    (folder / "cost.json").write_text(json.dumps(cost))


def closest_ratio(parameters_at: Callable[[float], int], target: float, parameters: int) -> float:
    """Return the ratio whose size is closest to a share of all parameters."""
    return min(RATIOS, key=lambda ratio: abs(parameters_at(ratio) - target * parameters))


def parameter_count(model: PreTrainedModel) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
