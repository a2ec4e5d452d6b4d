"""Names of other packages that may move without notice: a newer version that lacks one is told by the name."""

import argparse
import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from llm_pruner.checkpoint.boxes import _conversion

PACKAGE = Path(__file__).resolve().parents[1] / "llm_pruner"
FOREIGN = ("transformers", "peft", "lm_eval", "torch", "datasets", "accelerate", "tokenizers", "safetensors", "gguf")


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 8}


def _config() -> LlamaConfig:
    return LlamaConfig(**SIZES, per_layer_config={0: {"intermediate_size": 4}})


def _harness() -> type:
    return pytest.importorskip("lm_eval.models.huggingface").HFLM


def _rows() -> Any:
    return importlib.import_module("datasets").Dataset.from_list([{"text": "a"}])


# Where each private attribute lives that the package reads, sets, calls or overrides.
ATTRIBUTES: dict[str, Callable[[], Any]] = {
    "_actions": argparse.ArgumentParser,
    "_attn_implementation": _config,
    "_attn_implementation_internal": _config,
    "_buffers": torch.nn.Module,
    "_cdata": lambda: torch.ones(1).untyped_storage(),
    "_clip_grad_norm": lambda: Trainer,
    "_experts_implementation_internal": _config,
    "_fingerprint": _rows,
    "_format_action_invocation": lambda: argparse.HelpFormatter,
    "_format_args": lambda: argparse.HelpFormatter,
    "_from_config": lambda: PreTrainedModel,
    "_determine_best_metric": lambda: Trainer,
    "_get_output_dir": lambda: Trainer,
    "_heterogeneity_spec": _config,
    "_is_avx512_bf16_supported": lambda: torch.cpu,
    "_is_view": lambda: torch.Tensor,
    "_keys_to_ignore_on_load_unexpected": lambda: PreTrainedModel,
    "_keys_to_ignore_on_save": lambda: PreTrainedModel,
    "_loglikelihood_tokens": _harness,
    "_n_gpu": lambda: TrainingArguments(output_dir="unused", use_cpu=True, report_to=[]),
    "_non_persistent_buffers_set": torch.nn.Module,
    "_prepare_inputs": lambda: Trainer,
    "_load_from_checkpoint": lambda: Trainer,
    "_run_epoch": lambda: Trainer,
    "_save_checkpoint": lambda: Trainer,
    "_schema": lambda: torch.ops.aten.add.Tensor,
}


def _trees():
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def _imports():
    """List the modules below a package's top, and the names taken from them, with the file that does so."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in FOREIGN:
                for alias in node.names:
                    if "." in node.module or alias.name.startswith("_"):
                        yield node.module, alias.name, str(path.relative_to(PACKAGE.parent))


IMPORTS = sorted({(module, name): path for module, name, path in _imports()}.items())


@pytest.mark.parametrize(("source", "path"), IMPORTS, ids=lambda value: ".".join(value) if len(value) == 2 else "")
def test_imported_names_are_where_they_were(source, path):
    module, name = source
    pytest.importorskip(module.split(".")[0])
    found = importlib.import_module(module)
    assert hasattr(found, name), f"{module} has no {name} any more, which {path} imports"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_private_attributes_are_where_they_were(name):
    owner = ATTRIBUTES[name]()
    assert hasattr(owner, name), f"{owner!r} has no {name} any more: grep llm_pruner for its uses"


def test_every_private_attribute_is_listed():
    """An attribute that nothing in the package defines is somebody else's; one asked of super() is as well."""
    defined: set[str] = set()
    used: dict[str, str] = {}
    for node in (node for _, tree in _trees() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            else:
                used[node.attr] = ast.unparse(node)
    foreign = {name for name, code in used.items() if name not in defined or code.startswith("super()")}
    assert foreign <= set(ATTRIBUTES), f"add to ATTRIBUTES where these live: {sorted(foreign - set(ATTRIBUTES))}"


def test_conversions_of_stored_names_take_the_same_arguments():
    """The loader's functions that follow a stored tensor into a model have no public counterpart."""
    converters, place_of = _conversion(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert not converters
    assert place_of("model.norm.weight") == ("model.norm.weight", None, "")
