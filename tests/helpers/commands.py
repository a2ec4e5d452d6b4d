"""Every command that writes, on the tiny model: what it is given, where it writes, and whether that is whole."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

TESTS = Path(__file__).parent


class Forks:
    """Runs commands, kills them if wanted (:mod:`helpers.forks`)."""

    def __init__(self, seed="random"):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        environment["PYTHONHASHSEED"] = str(seed)
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(TESTS.parents[1])},
        )

    def run(self, folder, argv, limits=None, kill_after=None, log="said.txt"):
        """The exit status (negative: the signal), what was said, and the seconds that it took."""
        log = Path(folder).parent / log
        request = [str(folder), str(log), limits or {}, [str(a) for a in argv]]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid, start = int(self.process.stdout.readline()), time.perf_counter()
        timer = threading.Timer(kill_after or 0, _kill, (pid,))
        if kill_after is not None:
            timer.start()
        status = int(self.process.stdout.readline())
        seconds = time.perf_counter() - start
        timer.cancel()
        said = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        return os.waitstatus_to_exitcode(status), said, seconds

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


def _kill(pid):
    for end in (os.killpg, os.kill):  # a child that has not come so far leads no group
        with suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


@dataclass
class Case:
    """A command.

    Attributes:
        argv: its arguments, run in a folder of its own.
        made: the folders that it leaves, each whole or not there.
    """

    argv: list
    made: list


FEW = ["--num_examples", 4, "--calib_seq_len", 16, "--preset", "paper", "--hardware_align", "false"]


def cases(home: Path, recipe: Path) -> dict[str, Case]:
    """By name; ``home`` holds ``base``, ``pruned`` (with its plan), ``text.txt``."""
    text = ["--calib_dataset", home / "text.txt", "--eval_datasets", home / "text.txt", "--max_seq_len", 16]
    run = ["--output_root", "out", "--save_ckpt_log_name", "run", "--save_model"]
    vocab = ["--corpus", home / "text.txt", "--keep", 0.8, "--eval_dataset", home / "text.txt", "--max_windows", 4]
    train = ["--data_path", home / "text.txt", "--no_instruction", "--cutoff_len", 16, "--val_set_size", 4]
    train += ["--max_steps", 12, "--save_steps", 2, "--eval_steps", 2, "--logging_steps", 2, "--batch_size", 4]
    train += ["--micro_batch_size", 2, "--lora_r", 4, "--merge", "--resume_from_checkpoint", "auto", "--device", "cpu"]
    refit = ["--num_examples", 48, "--calib_seq_len", 16, "--self_examples", 4]
    long = ["prune", "--base_model", home / "base", *refit, *text, *run, "--target_params", 0.8]
    long += ["--block_mlp_layer_start", 0, "--block_mlp_layer_end", 3]
    of_recipe = ["out/01-prune-*", "out/02-recover-*/merged", "out/03-vocab-*"]
    return {
        "prune": Case(["prune", "--base_model", home / "base", "--pruning_ratio", 0.5, *FEW, *text, *run], ["out/run"]),
        "apply": Case(["apply", home / "pruned/pruning_plan.json", home / "base", "out"], ["out"]),
        "to-uniform": Case(["to-uniform", home / "pruned", "out", "--allow_padding"], ["out"]),
        "vocab": Case(["vocab", home / "base", *vocab, "--output_dir", "out", "--save_counts", "counts.json"], ["out"]),
        "recover": Case(
            ["recover", "--prune_model", home / "pruned", "--output_dir", "out", *train], ["out", "out/merged"]
        ),
        "run": Case(["run", recipe], of_recipe),
        "export": Case(["export", home / "pruned", "out", "--format", "hf", "--allow_padding"], ["out"]),
        "lora": Case([*long, "--refit", "lora", "--refit_tokens", 1500], ["out/run"]),
        "blocks": Case([*long, "--refit", "blocks", "--refit_tokens", 1500], ["out/run"]),
        "search": Case([*long, "--refit", "ridge", "--allocate", "search", "--search_generations", 2], ["out/run"]),
    }


RECIPE = """model: {home}/base
output: out
evaluate: {{datasets: {home}/text.txt, seq_len: 16, max_windows: 4}}
stages:
  - prune: {{pruning_ratio: 0.5, num_examples: 4, calib_seq_len: 16, preset: paper, hardware_align: false,
      calib_dataset: {home}/text.txt}}
  - recover: {{data_path: {home}/text.txt, no_instruction: true, max_steps: 4, batch_size: 4, micro_batch_size: 2,
      cutoff_len: 16, val_set_size: 0, save_steps: 2, eval_steps: 2, lora_r: 4, device: cpu}}
  - vocab: {{corpus: {home}/text.txt, keep: 0.8, eval_dataset: {home}/text.txt, max_windows: 4}}
"""


def digest(folder: Path, pattern: str) -> str | None:
    """Hash the weights, configs and tokenizer of a folder, None if absent; assert that the checkpoint is whole."""
    found = list(folder.glob(pattern))
    assert len(found) <= 1, found
    if not found or not any(found[0].glob("*config.json")):
        return None
    out = hashlib.sha256()
    for file in sorted(found[0].iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:  # a torn file does not open
                for name in sorted(tensors.keys()):
                    out.update(name.encode() + tensors.get_tensor(name).contiguous().numpy().tobytes())
        elif file.name in ("config.json", "tokenizer.json", "adapter_config.json", "generation_config.json"):
            content = json.loads(file.read_text())
            out.update(json.dumps(without_places(content), sort_keys=True).encode())
    assert any(found[0].glob("*.safetensors")), list(found[0].iterdir())
    if (plan := found[0] / "pruning_plan.json").exists():
        said = json.loads(plan.read_text())
        out.update(json.dumps([said[k] for k in ("units", "positions", "parameters")], sort_keys=True).encode())
    return out.hexdigest()


def whole(folder: Path, case: Case) -> dict[str, str | None]:
    """The digests of all that a command leaves."""
    return {pattern: digest(folder, pattern) for pattern in case.made}


def without_places(content):
    return {k: v for k, v in content.items() if k not in ("base_model_name_or_path", "_name_or_path")}


def rubbish(folder: Path) -> list[str]:
    """Return files that only a killed process leaves behind."""
    signs = (".tmp", ".old", ".lock", ".unfinished")
    found = [p for p in folder.rglob(".*") if p.name.endswith(signs) or p.name.startswith((".partial-", ".final-"))]
    return sorted(str(p.relative_to(folder)) for p in found)
