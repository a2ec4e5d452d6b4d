"""The rows of the comparison, and the command that makes each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from environments import python_of

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tool's method; calibration names the set of tokens, None if the method reads no text."""

    tool: str
    method: str
    calibration: str | None

    @property
    def name(self) -> str:
        """Name for the command line and the table."""
        return f"{self.tool} {self.method}"


OURS, REFERENCE = "llm-pruner", "LLM-Pruner param_first"
SCRIPTS = {
    "LLM-Pruner": ("llmpruner", "run_llmpruner.py"),
    "OptiPFair": ("optipfair", "run_optipfair.py"),
    "Torch-Pruning": ("torch_pruning", "run_torch_pruning.py"),
}
ROWS = (
    Row(tool="LLM-Pruner", method="param_first", calibration="small"),
    Row(tool=OURS, method="paper", calibration="small"),
    Row(tool="LLM-Pruner", method="param_second", calibration="small"),
    Row(tool="OptiPFair", method="static", calibration=None),
    Row(tool="OptiPFair", method="data", calibration="large"),
    Row(tool="Torch-Pruning", method="width", calibration=None),
    Row(tool="Torch-Pruning", method="neurons", calibration="large"),
    Row(tool=OURS, method="fast", calibration="large"),
    Row(tool=OURS, method="best", calibration="large"),
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A set of calibration tokens: the text, how many samples of how many tokens, and the file that holds them."""

    text: Path
    samples: int
    tokens: int
    file: Path


def command(row: Row, model: Path, calibration: Calibration, output: Path, *, target: float) -> list[str]:
    """Return the command of a row, without the interpreter."""
    words = ["--model", model, "--target", target, "--method", row.method, "--output", output]
    if row.tool == OURS:
        text = ["--text", calibration.text, "--samples", calibration.samples, "--tokens", calibration.tokens]
        return [str(word) for word in (HERE / "run_ours.py", *words, *text)]
    return [str(word) for word in (HERE / SCRIPTS[row.tool][1], *words, "--calibration", calibration.file)]


def interpreter(row: Row, environments: Path) -> str:
    """Return the interpreter that a row runs in."""
    return sys.executable if row.tool == OURS else str(python_of(environments, SCRIPTS[row.tool][0]))
