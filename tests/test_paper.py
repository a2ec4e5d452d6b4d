"""The recipes of LLM-Pruner's tables, on the shapes of its models: sizes, costs, published beside measured numbers."""

import json
from math import prod

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.evaluation.cost import macs
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.pruning.ungrouped import join_units, split_units
from llm_pruner.recipes import dry_run
from llm_pruner.recipes.dry_run import Predictor
from llm_pruner.recipes.published import PUBLISHED, UNMEASURED, compare
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.source import LIBRARY
from llm_pruner.recipes.sweep import check_point, points_of

MIB = 2**20
TABLES = {name: rows for name, rows in json.loads(PUBLISHED.read_text()).items() if isinstance(rows, list)}
RECIPES = sorted(path.stem for path in (LIBRARY / "paper").glob("*.yaml"))
LLAMA_3 = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
TINY_LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
PREPRINT_MACS = [323.79, 367.52, 178.22, 277.99]
FIELDS = {  # of the models' public configs, beside LlamaConfig's defaults, which are LLaMA-7B's
    "baffo32/decapoda-research-llama-7B-hf": {},
    "lmsys/vicuna-7b-v1.1": {},
    "huggyllama/llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "meta-llama/Meta-Llama-3-8B": LLAMA_3,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3,
    "meta-llama/Llama-3.1-8B": LLAMA_3,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3,
    "TinyLlama/TinyLlama_v1.1": TINY_LLAMA,
}


class SharedPredictor(Predictor):
    """Predictions of models by their fields: models and recipes that are alike are predicted once."""

    def _original(self, name, trust):
        return super()._original(json.dumps(FIELDS[name], sort_keys=True), trust)


@pytest.fixture(scope="module")
def predictor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "load_config", lambda fields, trust: LlamaConfig(**json.loads(fields)))
        yield SharedPredictor()


def predicted(predictor, name, only=slice(None)):
    """Return the models of a recipe's points, in order, each after the original."""
    models = []
    for point in points_of(read(f"paper/{name}"))[only]:
        original, *after = predictor.stages(point.recipe, point.steps)
        models.append((original.model, [stage for stage in after if stage][-1].model))
    return models


def allocated(size):
    """Return the bytes that PyTorch's allocator for CUDA counts for a tensor: it splits no rest of up to 1 MiB off."""
    block = -(-size // (2 * MIB)) * 2 * MIB
    return block if size >= 10 * MIB and block - size <= MIB else -(-size // 512) * 512


def counted_as_published(model, tokens=64, hidden=None, *, square=False):
    """Return parameters, multiply-accumulates and MiB as the paper counts them.

    Rotary embeddings, softmax, norms and activations count as well. Memory is that of float16 weights, and of cosines
    and sines for 2,048 positions in every layer.

    Args:
        hidden: size to count with instead of the model's hidden size.
        square: count the projections of attention as square matrices of the hidden size, as the preprint does.
    """
    size = model.config.hidden_size
    hidden = hidden or size
    shapes = [[hidden if n == size else n for n in parameter.shape] for parameter in model.parameters()]
    weights = sum(prod(shape) for shape in shapes if len(shape) == 2) - model.config.vocab_size * hidden
    layers, products, others = model.model.layers, weights * tokens, 0
    for layer in layers:
        channels, head_dim = layer.self_attn.q_proj.out_features, layer.self_attn.head_dim
        products += 2 * tokens**2 * channels
        others += 4 * tokens * channels + tokens**2 * channels // head_dim  # rotary embeddings, softmax
        others += tokens * layer.mlp.gate_proj.out_features  # SiLU
        others += 4 * tokens * hidden * (hidden - channels) if square else 0
    others += (2 * len(layers) + 1) * 2 * tokens * hidden  # norms
    if hidden == size:
        assert macs(model, tokens) == products  # this project counts matrix products alone
    memory = sum(allocated(2 * prod(shape)) for shape in shapes) + len(layers) * 2 * allocated(2 * 2048 * head_dim)
    return sum(map(prod, shapes)), products + others, memory / MIB


def test_sizes_macs_and_memory_are_those_of_table_3(predictor):
    """To the last digit. Hidden sizes must be multiples of the number of heads in transformers, unlike LLM-Pruner's."""
    models = predicted(predictor, "llama7b_statistics")
    channels, blocks, half_channels, half_blocks, preprint = (pruned for _, pruned in models)
    assert channels.config.hidden_size == 3296 and parameter_count(channels) == 5_422_318_816
    assert parameter_count(blocks) == 5_422_977_024 and parameter_count(half_blocks) == 3_350_188_032
    ours = [counted_as_published(models[0][0]), counted_as_published(channels, hidden=3276)]
    ours += [counted_as_published(model) for model in (blocks, half_channels, half_blocks)]
    for row, (parameters, multiplications, memory) in zip(TABLES["llama7b_statistics"], ours, strict=False):
        assert (round(parameters / 1e9, 2), round(multiplications / 1e9, 2)) == (row["params_B"], row["macs_G"])
        assert abs(memory - row["memory_MiB"]) < 0.1  # the table has 6,533.9 for 6,533.98
    old = [preprint, blocks, half_channels, half_blocks]
    assert [round(counted_as_published(model, square=True)[1] / 1e9, 2) for model in old] == PREPRINT_MACS
    parameters, _, memory = counted_as_published(preprint)
    row = TABLES["llama7b_statistics"][-1]
    assert row["macs_G"] == PREPRINT_MACS[0] and preprint.config.hidden_size == 3328
    assert round(parameters / 1e9, 2) == row["params_B"] and abs(memory - row["memory_MiB"]) < 0.1


@pytest.mark.parametrize(
    ("name", "layers", "heads", "neurons"),
    [("llama7b_20", range(4, 30), 24, 8256), ("llama7b_50", range(3, 31), 13, 4403)],
)
def test_groups_are_pruned_as_by_llm_pruner(predictor, name, layers, heads, neurons):
    """A quarter of layers 4 to 29, counted from 0, is 20%; 60% of layers 3 to 30 is 50%."""
    ((original, pruned),) = predicted(predictor, name, slice(-1, None))
    for i, layer in enumerate(pruned.model.layers):
        full = original.config.num_attention_heads, original.config.intermediate_size
        sizes = layer.self_attn.q_proj.out_features // 128, layer.mlp.gate_proj.out_features
        assert sizes == ((heads, neurons) if i in layers else full)


def test_grouped_queries_are_pruned_as_by_llm_pruner(predictor):
    models = predicted(predictor, "more_results_128")
    sizes = [(parameter_count(original), parameter_count(pruned)) for original, pruned in models]
    assert set(sizes[:4] + sizes[5:9]) == {(8_030_261_248, 6_612_586_496)}
    assert {sizes[4], sizes[9]} == {(1_100_048_384, 945_907_712)}


SHARES = {  # of the parameters, after the points of a recipe; LLaMA-7B keeps 0.80 and 0.50 in every other one
    "llama13b_20": {0.8},
    "llama13b_20_tuned": {0.8},
    "llama7b_half_tuned": {0.5, 0.52},
    "llama7b_statistics": {0.5, 0.8, 0.81},
    "llama7b_to_3.6b_tuned": {0.53},
    "more_results_128": {0.82, 0.86},
    "more_results_2048": {0.82, 0.86},
    "llama7b_aggregation": {0.5, 0.8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "smollm2"])
def test_every_recipe_can_be_predicted_on_the_shapes_of_its_models(predictor, name):
    for point in points_of(read(f"paper/{name}")):
        check_point(point, unavailable=[])
    shares = {
        round(parameter_count(after) / parameter_count(before), 2) for before, after in predicted(predictor, name)
    }
    assert shares == SHARES.get(name, {0.5} if "_50" in name else {0.8})


def test_weights_ranked_alone_keep_as_many_indices_each_its_own():
    """The ablation of table 6: rows of gate_proj no longer meet their rows of up_proj, and biases stay with weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, mlp_bias=True)).eval()
    graph, kinds = lp.trace(model), ("heads", "neurons")
    split = split_units(graph, kinds)
    plan = join_units(lp.select(split, lp.score(model, split, criterion="l2", kinds=kinds), 0.5, kinds))
    grouped = lp.select(graph, lp.score(model, graph, criterion="l2", kinds=kinds), 0.5, kinds)
    pruned = lp.apply(model, plan)
    assert plan.units.keys() == grouped.units.keys() and plan.settings["aggregation"] == "none"
    assert parameter_count(pruned) == parameter_count(lp.apply(model, grouped))
    mlp, smaller = model.model.layers[1].mlp, pruned.model.layers[1].mlp
    kept = {}
    for name in ("gate_proj", "up_proj"):
        linear = mlp.get_submodule(name)
        kept[name] = linear.weight.square().sum(1).topk(24).indices.sort().values
        assert torch.equal(smaller.get_submodule(name).weight, linear.weight[kept[name]])
        assert torch.equal(smaller.get_submodule(name).bias, linear.bias[kept[name]])
    kept["down_proj"] = mlp.down_proj.weight.square().sum(0).topk(24).indices.sort().values
    assert torch.equal(smaller.down_proj.weight, mlp.down_proj.weight[:, kept["down_proj"]])
    assert len({tuple(indices.tolist()) for indices in kept.values()}) == 3
    assert torch.equal(plan.units["model.layers.1.mlp.neurons"].kept, kept["gate_proj"])


def measured_rows(name):
    """Return rows as a sweep of a recipe writes them, every measurement of them 1 beside that of costs."""
    recipe = read(f"paper/{name}")
    points = points_of(recipe)
    tasks = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    numbers = {"parameters": 5_422_977_024, "macs": 339_520_520_192, "weight bytes": 10_845_954_048}
    numbers |= {
        f"{kind} {text} without BOS": 1.0 for kind in ("perplexity", "seconds") for text in ("wikitext2", "ptb")
    }
    numbers |= {f"{task} acc": 0.5 for task in tasks}
    models = {point.values.get("model") for point in points}
    originals = [{"point": 0} | ({"model": model} if model else {}) for model in models]
    return [row | numbers for row in [*originals, *({"point": p.number, **p.values} for p in points)]]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_published_number_has_a_measured_one_beside_it(name, tmp_path):
    assert name in RECIPES
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(measured_rows(name)))
    head, *rows = compare(folder)
    assert len(rows) == len(TABLES[name])
    for row, published in zip(rows, TABLES[name], strict=True):
        for column, cell in zip(head[1:], row[1:], strict=True):
            measured, _, number = cell.partition(" / ")
            assert measured != "-" and number == str(published.get(column, "-"))
        assert {*published} - {*UNMEASURED} <= {*head}
    costs = dict(zip(head, rows[0], strict=True))
    if "memory_MiB" in costs:
        assert costs["params_B"] == "5.42 / 6.74" and costs["macs_G"] == "339.52 / 424.02"
        assert costs["memory_MiB"] == "10343.51 / 12884.5"
