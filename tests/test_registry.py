"""Every decoder that transformers registers: right, or refused with a reason. Never silently wrong."""

import pytest
import torch
from conftest import tokens
from registry import model_types, tiny_model
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.graph import TraceError
from llm_pruner.graph.verify import TOLERANCE, check_permutation, relative_difference

# Families beside those of conftest.py, each with something of its own.
QUICK = (
    "bart",
    "bloom",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "glm4",
    "gpt_bigcode",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "mamba",
)
EVERY = [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in model_types()]


@pytest.mark.parametrize("model_type", EVERY)
def test_right_or_refused(model_type, tmp_path):
    try:
        model = tiny_model(model_type)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {type(error).__name__}: {str(error)[:120]}")
    try:
        graph = lp.trace(model)
    except TraceError as error:
        assert model_type not in QUICK
        pytest.skip(f"refused: {error}")
    units = [u for u in graph.units if u.kind not in ("layers", "vocabulary")]
    wrong = [r for r in map(lambda u: check_permutation(model, u), units) if r.difference > TOLERANCE]
    assert not [(r.unit.name, r.difference) for r in wrong]
    for kind in ("neurons", "heads"):
        chosen = graph.of_kind(kind)
        if not chosen:
            continue
        try:
            plan = lp.select(graph, lp.score(model, graph, criterion="random"), 0.5, kinds=[kind])
            pruned = lp.apply(model, plan)
        except lp.PrunerError as error:
            assert model_type not in QUICK, error
            continue
        if not any("norm" in u.flags for u in chosen):
            assert lp.verify(model, pruned, plan).equivalent
        if changed_by_reloading(pruned, tmp_path / kind) > 1e-5:
            assert changed_by_reloading(model, tmp_path / "original") > 1e-5
            pytest.skip("the unpruned model does not survive saving and loading either")


def changed_by_reloading(model, folder):
    lp.save(model, None, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        live, reloaded = (m(tokens(), use_cache=False).logits for m in (model, loaded))
    return relative_difference(reloaded, live)
