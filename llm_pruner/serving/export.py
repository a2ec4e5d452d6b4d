"""``llm-pruner export``: write a model for another engine, and compare that engine's log-probabilities."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint.arguments import UniformArguments
from ..checkpoint.load import load
from ..checkpoint.locate import PLAN_FILE
from ..checkpoint.run import write_uniform
from ..checkpoint.save import save
from ..choices import EngineName
from ..errors import PrunerError
from ..files import check_file, complete_folder
from ..inputs import InputCheck
from ..logs import log, logging_to
from ..models.blockwise import computing
from ..models.inputs import example_inputs
from ..models.per_layer import has_per_layer_widths
from ..optional import ENGINES, is_installed
from ..selection.plan import PruningPlan
from .arguments import ExportArguments
from .engines import running
from .gguf_writer import TYPES, write_gguf
from .llama_cpp import find_quantizer, quantize
from .nemotron_nas import write_nemotron_nas

PROMPT_TOKENS = 32
# Most that a log-probability may differ from ours, since llama.cpp keeps caches in float16 and activations in 8 bits.
TOLERANCE = {"f32": 0.1, "f16": 0.1, "q8_0": 2.0}


def run_export(arguments: ExportArguments) -> Path:
    """Run ``llm-pruner export``; print and return what was written.

    Raises:
        PrunerError: the format cannot express the model, the file or folder cannot be written, or an installed engine
            computes other log-probabilities from it; the output is then removed.
    """
    arguments.check()
    if arguments.format == "hf":
        return _export_hf(arguments)
    with logging_to(None):
        target = _export_gguf(arguments) if arguments.format == "gguf" else _export_nemotron_nas(arguments)
    print(target)
    return target


def check_export_inputs(arguments: ExportArguments, check: InputCheck) -> None:
    """Refuse files that ``llm-pruner export`` cannot write, and a quantizer that is missing."""
    if arguments.format == "gguf":
        with check.flag("output", arguments.output):
            _check_gguf_file(arguments)
        if arguments.type is not None and arguments.type not in TYPES:
            with check.flag("type", arguments.type):
                find_quantizer()


def _check_gguf_file(arguments: ExportArguments) -> None:
    file = Path(arguments.output)
    if file.suffix != ".gguf":
        raise PrunerError(f"{file} is not the name of a GGUF file: give one that ends in .gguf")
    if file.exists():
        raise PrunerError(f"{file} exists already: give another name, or remove it")
    check_file(file)


def _export_hf(arguments: ExportArguments) -> Path:
    """Write a plain checkpoint, padded, or with a modelling file of its own."""
    if not arguments.standalone:
        flags = {name: getattr(arguments, name) for name in ("model", "output", "allow_padding", "trust_remote_code")}
        return write_uniform(UniformArguments(**flags))
    folder = Path(arguments.output)
    plan = Path(arguments.model) / PLAN_FILE
    with logging_to(None):
        model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
        if not has_per_layer_widths(model.config):
            raise PrunerError(
                f"--standalone: the layers of {arguments.model} have the same widths: it is plain already"
            )
        save(model, tokenizer, folder, PruningPlan.load(plan) if plan.is_file() else None, standalone=True)
    print(folder)
    return folder


def _export_gguf(arguments: ExportArguments) -> Path:
    _check_gguf_file(arguments)
    kind, target = arguments.type or "f16", Path(arguments.output)
    model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if kind not in TYPES:
        find_quantizer()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        file = Path(folder) / "model.gguf"
        arch = write_gguf(model, tokenizer, file, kind if kind in TYPES else "f16", name=Path(arguments.model).name)
        if kind not in TYPES:
            file, source = Path(folder) / "quantized.gguf", file
            quantize(source, file, kind)
        log.info("gguf: architecture %s, %s, %s bytes", arch, kind, f"{file.stat().st_size:,}")
        _compare(model, "llama.cpp", file, TOLERANCE.get(kind))
        file.replace(target)
    return target


def _export_nemotron_nas(arguments: ExportArguments) -> Path:
    target = Path(arguments.output)
    model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
    with complete_folder(target, owned_if="config.json", reads=arguments.model) as folder:
        write_nemotron_nas(model, tokenizer, folder)
        _compare(model, "vllm", folder, TOLERANCE["f32"])
    log.info("serve: vllm serve %s --trust-remote-code", shlex.quote(str(target)))
    return target


def _compare(model: PreTrainedModel, engine: EngineName, written: Path, tolerance: float | None) -> None:
    """Compare what an engine computes from what was written with the model, where the engine is installed."""
    module, _ = ENGINES[engine]
    if not is_installed(module):
        log.info("not compared with %s: %s is not installed", engine, module)
        return
    ids = _prompt(model)
    expected = _log_probabilities(model, ids)
    with running(engine, written, trust_remote_code=True) as process:  # code of ours
        computed = process.next_log_probabilities(ids)
    _judge(engine, computed, expected, tolerance)


def _prompt(model: PreTrainedModel) -> list[int]:
    ids = example_inputs(model, 1, PROMPT_TOKENS)
    assert isinstance(ids, torch.Tensor)
    return [int(token) for token in ids[0]]


def _log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), computing(model):  # logits in 16 bits are rounded by more than the engines differ
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
    return logits.cpu().double().log_softmax(-1)


def _judge(engine: str, computed: dict[int, float], expected: torch.Tensor, tolerance: float | None) -> None:
    """Log how far an engine's log-probabilities are from ours.

    Args:
        computed: those of the engine's most probable next tokens.
        expected: ours of all tokens.
        tolerance: most that they may differ; None if quantization sets no bound.

    Raises:
        PrunerError: they differ by more.
    """
    distance = max(abs(value - float(expected[token])) for token, value in computed.items())
    if tolerance is not None and distance > tolerance:
        raise PrunerError(
            f"{engine} computes something else from the export (a log-probability differs by {distance:.2f}): "
            "nothing is written"
        )
    log.info("%s agrees: log-probabilities of the next token differ by at most %.4f", engine, distance)
