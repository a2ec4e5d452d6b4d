"""Discovery: the units of the main families, each put to the permutation oracle."""

import resource

import pytest
import torch
import transformers
from helpers.architectures import tiny_model
from helpers.media import TEXT, VISION, model_of
from helpers.models import ARCHITECTURES, BASE, build
from torch import nn
from transformers import AutoConfig

import llm_pruner as lp
from llm_pruner.checkpoint.config import meta_model
from llm_pruner.graph.permutation import check_permutation, verify_units
from llm_pruner.graph.tracer import TraceError
from llm_pruner.graph.units import trace
from llm_pruner.models.per_layer import has_per_layer_widths


def test_every_unit_passes_the_permutation_oracle(architecture):
    model = build(architecture)
    graph = trace(model)
    reports = verify_units(model, graph)
    assert not [(r.unit.name, r.difference, r.effect) for r in reports if not r.passed]
    assert {"heads", "neurons", "hidden"} <= {r.unit.kind for r in reports}
    assert len(graph.of_kind("heads")) == len(graph.of_kind("neurons")) == 3
    assert len(graph.of_kind("layers")) == len(graph.of_kind("vocabulary")) == 1


def test_the_oracle_can_fail():
    """A graph that forgets a slice, or couples the wrong rows, is found out."""
    model = build("llama")
    unit = trace(model).of_kind("neurons")[0]
    key = next(k for k in unit.dims if k[0].endswith("down_proj.weight"))
    forgotten = unit.dims.pop(key)
    assert not check_permutation(model, unit).passed
    unit.dims[key] = forgotten.flip(0)
    assert not check_permutation(model, unit).passed
    unit.dims[key] = forgotten
    assert check_permutation(model, unit).passed


def test_tracing_leaves_the_model_as_it_was():
    model = build("llama_grouped").train()
    model.set_attn_implementation("sdpa")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trace(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], p) and p.device.type == "cpu" for name, p in model.named_parameters())


def test_a_real_and_a_meta_model_have_the_same_units(architecture):
    real = build(architecture)
    meta = meta_model(real.config)
    assert [(u.name, u.size, list(u.dims)) for u in trace(real).units] == [
        (u.name, u.size, list(u.dims)) for u in trace(meta).units
    ]


def test_heads_are_groups_where_attention_is_grouped():
    graph = trace(build("llama_grouped"))
    heads = graph.unit("model.layers.0.self_attn.heads")
    members = graph.unit("model.layers.0.self_attn.query_heads")
    assert (heads.size, members.size, heads.width) == (2, 2, 8)
    occupied = heads.slices(1)
    assert occupied["model.layers.0.self_attn.q_proj.weight"][0].tolist() == list(range(16, 32))
    assert occupied["model.layers.0.self_attn.k_proj.weight"][0].tolist() == list(range(8, 16))
    assert occupied["model.layers.0.self_attn.o_proj.weight"][1].tolist() == list(range(16, 32))
    assert members.slices(0)["model.layers.0.self_attn.q_proj.weight"][0].tolist() == [*range(8), *range(16, 24)]


def test_fused_projections_are_seen_through():
    neurons = trace(build("phi3")).unit("model.layers.0.mlp.neurons")
    assert neurons.slices(5)["model.layers.0.mlp.gate_up_proj.weight"][0].tolist() == [5, 53]
    heads = trace(build("gpt_neox")).unit("gpt_neox.layers.0.attention.heads")
    assert heads.slices(1)["gpt_neox.layers.0.attention.query_key_value.weight"][0].tolist() == list(range(24, 48))


def test_experts_and_their_neurons():
    graph = trace(build("mixtral"))
    experts = graph.unit("model.layers.0.mlp.experts")
    assert experts.size == 4 and experts.minimum == 2 and "norm" in experts.flags
    assert set(experts.parameters) == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


def test_rotary_freezes_the_head_dim_and_says_so():
    graph = trace(build("llama"))
    assert any("constant" in u.frozen and any("q_proj" in n for n in u.parameters) for u in graph.frozen)
    assert not any("q_proj.weight" in u.parameters[0] and u.kind == "channels" for u in graph.units)


def test_unknown_units_name_the_nearest():
    with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.neurons"):
        trace(build("llama")).unit("model.layers.0.mlp.neuron")
    with pytest.raises(IndexError):
        trace(build("llama")).units[0].slices(99)


class Odd(nn.Module):
    """A block with an operator that no rule knows."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + torch.linalg.qr(x)[0].mean() * 0


def test_an_unknown_operator_freezes_what_enters_it():
    model = build("llama")
    model.model.layers[1].mlp = Odd(model.model.layers[1].mlp)
    graph = trace(model)
    assert list(graph.unknown_operators) == ["linalg_qr"]
    assert not graph.of_kind("hidden")
    hidden = next(u for u in graph.frozen if u.kind == "hidden")
    assert "linalg_qr" in hidden.frozen and "layers.1.mlp" in hidden.frozen
    assert len(graph.of_kind("neurons")) == 3


class Writing(nn.Module):
    """A block that writes its output between its inputs where a mask is set, as images are written between tokens."""

    def __init__(self, inner: nn.Module, mask):
        super().__init__()
        self.inner, self.mask = inner, mask

    def forward(self, x):
        return x.masked_scatter(self.mask(x), self.inner(x).flatten())


@pytest.mark.parametrize(
    "mask, whole",
    (
        (lambda x: x.mean(-1, keepdim=True) > 0, True),
        (lambda x: (x.mean(-1, keepdim=True) > 0).expand_as(x), True),
        (lambda x: x > 0, False),
    ),
)
def test_rows_that_are_written_as_a_whole_keep_their_axis(mask, whole):
    model = build("llama")
    model.model.layers[1].mlp = Writing(model.model.layers[1].mlp, mask)
    graph = trace(model)
    assert not graph.unknown_operators and bool(graph.of_kind("hidden")) == whole
    if whole:
        assert ("model.layers.1.mlp.inner.down_proj.weight", 0) in graph.of_kind("hidden")[0].dims
        assert check_permutation(model, graph.of_kind("hidden")[0]).passed
    else:
        assert "selected by a mask" in {unit.frozen for unit in graph.frozen if unit.kind == "hidden"}


def test_a_module_behind_the_layers_keeps_as_many_as_its_twins_in_them():
    """One field of Qwen4's config is the width of its mixers in the layers and of the last: what stays is equal."""
    model = tiny_model("qwen4_exp_text")
    graph = lp.trace(model)
    mixers = [unit for unit in graph.units if "hyper_connection" in unit.name]
    assert {unit.layer for unit in mixers} == {0, 1, None}
    assert len({(unit.kind, unit.size, unit.multiple) for unit in mixers}) == 1
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=["neurons"])
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


def test_modules_that_do_nothing_are_pruned_as_their_twins():
    """The last layers of SigLIP, and the MLP of its head outside of layers, which one field of the config describes."""
    config = AutoConfig.for_model(
        "llava",
        text_config=AutoConfig.for_model("llama", **TEXT, num_key_value_heads=2),
        vision_config=AutoConfig.for_model("siglip_vision_model", **VISION | {"num_hidden_layers": 3}),
        image_token_index=98,
        vision_feature_layer=-3,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.arange(32).view(2, 16)
    ids[:, 2:6] = 98
    graph = trace(model, inputs={"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)})
    idle = [unit.name.removeprefix("model.vision_tower.") for unit in graph.of_kind("neurons") if unit.idle]
    assert idle == ["encoder.layers.1.mlp.neurons", "encoder.layers.2.mlp.neurons", "head.mlp.neurons"]
    frozen = [unit.name for unit in graph.frozen if unit.frozen == "the output does not depend on it"]
    assert "model.vision_tower.head.attention.heads" in frozen, "torch's attention is like no layer's"
    assert all(report.passed for report in verify_units(model, graph) if report.unit.kind == "neurons")
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, kinds=["neurons"])
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    assert not has_per_layer_widths(pruned.config.vision_config) and pruned.config.vision_config.intermediate_size == 36


def test_a_model_that_cannot_run_says_where():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(7, 32)
    with pytest.raises(TraceError, match=r"layers\.1\.mlp\.down_proj"):
        trace(model)


def test_an_adapter_that_is_not_merged_is_named():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    with pytest.raises(TraceError, match=r"layers\.0\.self_attn\.q_proj holds an adapter that is not merged"):
        lp.trace(model)


def test_inputs_that_a_model_cannot_read_are_forgotten():
    model = model_of("ViTForImageClassification")
    with pytest.raises(TraceError, match="doesn't match model"):
        lp.trace(model, inputs={"pixel_values": torch.rand(2, 3, 30, 30)})
    assert lp.trace(model).of_kind("heads", "neurons")


def test_inference_mode_hides_no_units():
    with torch.inference_mode():
        units = lp.trace(build("llama")).units
    assert [unit.name for unit in units] == [unit.name for unit in lp.trace(build("llama")).units]


def test_a_70b_shape_traces_without_weights():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = AutoConfig.for_model(
        "llama",
        **BASE
        | {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    )
    graph = trace(meta_model(config))
    assert len(graph.of_kind("heads")) == len(graph.of_kind("neurons")) == 80
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GiB


TORCH_PRUNING = [  # family, module to cut, its unit, positions of index 1
    ("llama", "model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.neurons", [1]),
    ("llama", "model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.heads", list(range(8, 16))),
    ("opt", "model.decoder.layers.{}.fc1", "model.decoder.layers.{}.neurons", [1]),
    ("opt", "model.decoder.layers.{}.self_attn.v_proj", "model.decoder.layers.{}.self_attn.heads", list(range(8, 16))),
    ("gpt_neox", "gpt_neox.layers.{}.mlp.dense_h_to_4h", "gpt_neox.layers.{}.mlp.neurons", [1]),
    ("stablelm", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.neurons", [1]),
    ("qwen2", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.neurons", [1]),
]


@pytest.mark.parametrize("family, root, unit, indices", TORCH_PRUNING)
def test_torch_pruning_finds_the_same_groups(family, root, unit, indices):
    """An independent tracer, on multi-head attention (on grouped attention it does not return)."""
    tp = pytest.importorskip("torch_pruning")
    heads = {"num_key_value_heads": 4} if "num_key_value_heads" in ARCHITECTURES[family][1] else {}
    model = build(family, **heads)
    names = {id(p): n for n, p in model.named_parameters()}
    graph = trace(model)
    model.config.use_cache = False
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    built = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    for layer in range(3):
        module = model.get_submodule(root.format(layer))
        theirs = set()
        for dependency, positions in built.get_pruning_group(module, tp.prune_linear_out_channels, idxs=indices):
            target = dependency.target.module
            if isinstance(target, nn.Linear):
                dim = 0 if dependency.handler.__name__.endswith("out_channels") else 1
                theirs.add((names[id(target.weight)], dim, tuple(sorted(positions))))
        ours = graph.unit(unit.format(layer)).slices(1)
        mine = {(n, d, tuple(p.tolist())) for n, dims in ours.items() for d, p in dims.items()}
        assert theirs == {item for item in mine if item[0].endswith("weight")}
