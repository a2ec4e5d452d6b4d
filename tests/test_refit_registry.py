"""The refit of every architecture and class gains something or is refused: none ends in a traceback."""

import pytest
from helpers.architectures import media_types, model_types, other_types, tiny_model

import llm_pruner as lp
from llm_pruner.models.inputs import ModelInputs, example_inputs

# One of each sort; the others are slow only because they are many.
QUICK = (
    *("flex_olmo", "gemma2", "gpt2", "granite", "mixtral", "openai-gpt", "reformer", "t5:seq2seq", "xlm", "zamba2"),
    *("albert:text-classification", "mistral:question-answering"),
    *("swin:image-classification", "wav2vec2-conformer:audio-classification"),
)
NAMES = (*model_types(), *other_types(), *media_types())
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", EVERY)
def test_a_refit_ends_well_or_is_refused(name):
    try:
        model = tiny_model(name)
        graph = lp.trace(model)
        plan = lp.select(graph, lp.score(model, graph, criterion="l2", kinds=("neurons",)), 0.5, kinds=("neurons",))
        pruned, inputs = lp.apply(model, plan), example_inputs(model, rows=32)
    except Exception as error:  # it is not built small, is refused, or has no neurons
        assert name not in QUICK, error
        pytest.skip(f"{type(error).__name__}: {error}")
    inputs = inputs if len(inputs) == 32 else ModelInputs(*inputs.parts * 32)
    try:
        report = lp.refit(model, pruned, inputs, "lora", plan=plan, tokens=128)
    except lp.PrunerError as error:
        assert "bfloat16" in str(error) or name not in QUICK, error
        return
    assert report.no_compensation or all(refit.after <= refit.before for refit in report.compensation.layers)
