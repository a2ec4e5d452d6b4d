"""Changes that importing the package makes in transformers, and their lifetime."""

import gc
import subprocess
import sys

import pytest
import torch
from helpers.models import build, pruned_by
from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.models.llama import modeling_llama

import llm_pruner as lp
from llm_pruner.models import per_layer
from llm_pruner.models.constructors import constructor_arguments
from llm_pruner.models.per_layer import rebuild
from llm_pruner.models.skeleton import skeleton


def constructors():
    """The constructors of all module classes of torch and of Llama's modelling file."""
    classes = [value for file in (nn, modeling_llama) for value in vars(file).values() if isinstance(value, type)]
    return {c: c.__dict__.get("__init__") for c in classes if issubclass(c, nn.Module)}


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    before = constructors()
    yield
    gc.collect()
    assert constructors() == before
    assert not per_layer._recorders


def test_no_class_stays_patched_after_a_trace_and_a_per_layer_build(tmp_path):
    model = build("llama_grouped")
    _, pruned = pruned_by(model, layers=[1])
    lp.save(pruned, None, tmp_path / "m")
    type(pruned).from_pretrained(tmp_path / "m")
    skeleton(type(model), model.config)
    assert not hasattr(nn.LayerNorm.__init__, "__wrapped__") and not hasattr(
        nn.CrossEntropyLoss.__init__, "__wrapped__"
    )


def test_no_class_of_torch_is_patched_while_a_model_is_built(monkeypatch):
    before, seen = constructors(), []
    init = modeling_llama.LlamaMLP.__init__

    def looking(self, *args, **kwargs):
        seen.append(constructors())
        init(self, *args, **kwargs)

    model = build("llama")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "__init__", looking)
        twin = skeleton(type(model), model.config)
    during = seen[0]
    assert {c for c in before if during[c] is not before[c]} >= {modeling_llama.LlamaAttention}
    assert not [c for c in before if during[c] is not before[c] and c.__module__.startswith("torch")]
    assert constructor_arguments(twin.model.layers[1])["layer_idx"] == 1


def test_a_failed_build_leaves_no_class_patched():
    _, pruned = pruned_by(build("llama_grouped"), layers=[1])
    pruned.config.hidden_act = "none such"
    with pytest.raises(KeyError):
        type(pruned)(pruned.config)


def test_a_rebuilt_layer_can_be_rebuilt_in_turn():
    twin = skeleton(type(build("llama")), build("llama").config)
    layer = rebuild(twin.model.layers[1], {"intermediate_size": 20})
    assert rebuild(layer.mlp, {"intermediate_size": 12}).up_proj.weight.shape == (12, 32)


def test_layers_are_left_to_a_transformers_that_builds_them(monkeypatch):
    """A stand-in for transformers' own half builds all layers; ours must not build any again."""
    _, pruned = pruned_by(build("llama_grouped"), layers=[1])
    config, state = pruned.config, pruned.state_dict()
    assert not per_layer.transformers_builds_layers()

    class OwnLayer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    monkeypatch.setattr(modeling_utils, "apply_heterogeneous_modeling", lambda model: None, raising=False)
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnLayer)
    monkeypatch.setattr(per_layer, "rebuild", lambda *_: pytest.fail("a layer was built twice"))
    assert per_layer.transformers_builds_layers()
    model = type(pruned)(config)
    assert all(type(layer) is OwnLayer for layer in model.model.layers)
    model.load_state_dict(state)


def test_blocks_that_transformers_leaves_out_are_left_to_it(monkeypatch, tmp_path):
    """A stand-in for transformers' own half builds layers from their configs and puts nothing in place of skipped
    blocks."""
    plan, _ = pruned_by(build("llama_grouped"), kinds=("neurons",), layers=[2])
    graph = lp.trace(build("llama_grouped"))
    plan.drop_block("model.layers.1.self_attn", graph.shapes)
    pruned = lp.apply(build("llama_grouped"), plan)
    lp.save(pruned, None, tmp_path / "m")

    class Nothing(nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    class OwnLayer(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config.per_layer_config[layer_idx], layer_idx)
            if "attention" in config.per_layer_config[layer_idx].skip:
                self.self_attn = Nothing()

    monkeypatch.setattr(modeling_utils, "apply_heterogeneous_modeling", lambda model: None, raising=False)
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnLayer)
    monkeypatch.setattr(per_layer, "rebuild", lambda *_: pytest.fail("a layer was built twice"))
    model = type(pruned).from_pretrained(tmp_path / "m").eval()
    assert type(model.model.layers[1].self_attn) is Nothing and type(model.model.layers[2]) is OwnLayer
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, pruned(ids).logits)


def test_layers_that_transformers_does_not_build_are_built_here(monkeypatch):
    """Its own half may know some architectures only."""
    _, pruned = pruned_by(build("llama_grouped"), layers=[1])
    monkeypatch.setattr(modeling_utils, "apply_heterogeneous_modeling", lambda model: None, raising=False)
    assert per_layer.transformers_builds_layers()
    type(pruned)(pruned.config).load_state_dict(pruned.state_dict())


def test_a_model_class_that_names_heterogeneous_configs_builds_its_layers(monkeypatch):
    def post_init(self):
        return self.config.is_heterogeneous

    monkeypatch.setattr(PreTrainedModel, "post_init", post_init)
    assert per_layer.transformers_builds_layers()


def test_installing_twice_changes_nothing():
    methods = dict(vars(PreTrainedModel))
    per_layer.install()
    assert dict(vars(PreTrainedModel)) == methods


def test_per_layer_models_compute_the_same_whoever_builds_them():
    _, pruned = pruned_by(build("llama_grouped"), layers=[1])
    again = type(pruned)(pruned.config).eval()
    again.load_state_dict(pruned.state_dict())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pruned(ids).logits)


def test_the_package_may_import_models_before_its_user_does():
    code = (
        "import llm_pruner; llm_pruner.trace; import transformers as t; assert t.PreTrainedModel._llm_pruner_installed"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
