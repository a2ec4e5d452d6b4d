"""Run models in other engines, each in a process of its own, and measure how fast they answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from ..checkpoint.load import load, no_tokenizer
from ..checkpoint.locate import is_adapter, locate
from ..checkpoint.save import save
from ..choices import EngineName
from ..errors import PrunerError
from ..logs import log
from ..optional import VLLM_ENVIRONMENT, require_engine
from ..progress import track
from ..turns import relative_spread
from .gguf_writer import write_gguf

WORKER = "llm_pruner.serving.worker"
BATCHES = (1, 8, 32)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 32, 3


class Engine:
    """A model in an engine's process.

    Raises:
        PrunerError: the engine refuses the model, or its process ends; with its last error.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], model: str):
        self._process, self._errors, self._model = process, errors, model
        self._read()

    def ask(self, **request: Any) -> Any:
        """Return the worker's answer to one request (:mod:`llm_pruner.serving.worker`)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def next_log_probabilities(self, ids: list[int]) -> dict[int, float]:
        """Return the log-probabilities of the most probable next tokens, by their ids."""
        return {int(token): value for token, value in self.ask(next=ids).items()}

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        messages = [line.strip() for line in self._errors if "Error: " in line]
        raise PrunerError(f"{self._model} does not run: {(messages or ['the engine ended without a message'])[-1]}")


@contextmanager
def running(
    engine: EngineName, model: Path | str, *, sequences: int = 1, tokens: int = 512, trust_remote_code: bool = False
) -> Iterator[Engine]:
    """Yield a model in an engine; its process ends with the block.

    Args:
        model: folder for vLLM, GGUF file for llama.cpp.
        sequences: most sequences at once.
        tokens: most tokens of a sequence.

    Raises:
        PrunerError: the engine is not installed or refuses the model.
    """
    require_engine(engine)
    command = [sys.executable, "-m", WORKER, engine, str(model), str(sequences), str(tokens)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*command, *["trust"] * trust_remote_code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=VLLM_ENVIRONMENT | os.environ,
        )
        try:
            yield Engine(process, errors, str(model))
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End an engine with the processes that it started, which would keep its memory and its pipes otherwise."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    with process:  # closes the pipes and waits
        pass


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """Speed of a model in an engine.

    Attributes:
        tokens_per_second: generated in all sequences together, reading the prompt excluded, by sequences at once;
            median over rounds.
        spread: interquartile range of these as a share of the median.
        first_token_seconds: from a prompt of 32 tokens to its first new token; median.
        bytes: memory of the engine's process on the CPU.
    """

    engine: str
    tokens_per_second: dict[int, float]
    spread: dict[int, float]
    first_token_seconds: float
    bytes: int


def measure_engines(engine: EngineName, models: Sequence[str], *, trust_remote_code: bool = False) -> list[EngineSpeed]:
    """Measure models in an engine, in turns: round after round, each model in each.

    Args:
        models: names of models; written to temporary files in the engine's format where they are not in it.

    Raises:
        PrunerError: the engine is not installed, or refuses a model.
    """
    require_engine(engine)
    with ExitStack() as stack:
        sizes = {"sequences": max(BATCHES), "tokens": PROMPT_TOKENS + NEW_TOKENS + 16}
        engines = []
        for name in models:
            file = stack.enter_context(in_format(engine, name, trust_remote_code))
            engines.append(stack.enter_context(running(engine, file, trust_remote_code=trust_remote_code, **sizes)))
        rows = [_Rounds() for _ in engines]
        for number in track(range(-1, ROUNDS), f"timing in {engine}"):  # the first round warms up
            for one, row in zip(engines, rows, strict=True):
                row.add(one, number)
        return [row.summary(engine, one) for one, row in zip(engines, rows, strict=True)]


class _Rounds:
    """Speeds of one model, round by round."""

    def __init__(self) -> None:
        self.speeds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        self.first: list[float] = []

    def add(self, engine: Engine, number: int) -> None:
        for batch in BATCHES:
            request = {"batch": batch, "prompt": PROMPT_TOKENS, "seed": 1000 * (number + 1) + batch}
            first = engine.ask(**request, new_tokens=1)
            whole = engine.ask(**request | {"seed": request["seed"] + 500}, new_tokens=1 + NEW_TOKENS)
            if number < 0:
                continue
            self.speeds[batch].append(batch * NEW_TOKENS / max(whole - first, 1e-6))
            if batch == 1:
                self.first.append(first)

    def summary(self, name: str, engine: Engine) -> EngineSpeed:
        return EngineSpeed(
            engine=name,
            tokens_per_second={batch: statistics.median(values) for batch, values in self.speeds.items()},
            spread={batch: relative_spread(values) for batch, values in self.speeds.items()},
            first_token_seconds=statistics.median(self.first),
            bytes=engine.ask(bytes=True),
        )


@contextmanager
def in_format(engine: EngineName, name: str, trust_remote_code: bool = False) -> Iterator[Path]:
    """Yield a model's file or folder in an engine's format; written for the block where it has none.

    Raises:
        PrunerError: the model cannot be loaded or written.
    """
    folder, file = locate(name)
    if engine == "vllm" and Path(folder).is_dir() and file is None and not is_adapter(folder):
        yield Path(folder)
        return
    if engine == "llama.cpp" and name.endswith(".gguf"):
        yield Path(name)
        return
    log.info("writing %s in the format of %s", name, engine)
    model, tokenizer = load(name, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "model.gguf"
        if engine == "vllm":
            save(model, tokenizer, temporary)
        elif tokenizer is None:
            raise no_tokenizer(name)
        else:
            write_gguf(model, tokenizer, place, "f16", name=Path(name).name)
        del model
        yield Path(temporary) if engine == "vllm" else place
