"""Special cases of architectures: ALiBi, two stacks, latent attention, remote code, half precision, meta."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import made, pruned_by, tokens
from helpers.survey import masked_copy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.checkpoint.config import meta_model
from llm_pruner.cli import main
from llm_pruner.graph.permutation import check_permutation
from llm_pruner.models.inputs import example_inputs
from llm_pruner.models.running import relative_difference
from llm_pruner.selection.plan import PruningPlan

REMOTE = Path(__file__).parent / "fixtures" / "remote_code"


def reloaded(model, folder):
    lp.save(model, None, folder)
    return type(model).from_pretrained(folder).eval()


ALIBI = {
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6},
    "falcon": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "alibi": True,
        "multi_query": False,
    },
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 64, "expansion_ratio": 2},
}


@pytest.mark.parametrize("family", ALIBI)
def test_alibi_heads_keep_their_own_slopes(family, tmp_path):
    """Each layer keeps other heads; six heads have slopes of the uneven kind, which no three heads would get."""
    model = made(family, **ALIBI[family])
    graph = lp.trace(model)
    units = graph.of_kind("heads")
    assert [u.layer for u in units] == [0, 1, 2]
    assert all(u.constants and check_permutation(model, u).passed for u in units)
    plan = PruningPlan()
    for unit, kept in zip(units, ([1, 4, 5], [0, 3], [5])):
        plan.keep(unit, torch.tensor(kept), graph.shapes)
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    loaded = reloaded(pruned, tmp_path / "once")
    reference = masked_copy(model, plan)
    for padded in (False, True):
        ids = tokens()
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :5] = 0
        options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **options), reference.generate(ids, **options))
    again, twice = pruned_by(loaded, 0.5, kinds=["heads"])
    assert lp.verify(loaded, twice, again).equivalent
    ids = tokens()
    with torch.no_grad():
        assert relative_difference(reloaded(twice, tmp_path / "twice")(ids).logits, twice(ids).logits) < 1e-6


@pytest.mark.parametrize("heads", (3, 5, 7))
def test_alibi_of_any_number_of_heads(heads):
    model = made("mpt", d_model=8 * heads, n_heads=heads, n_layers=2, max_seq_len=64, expansion_ratio=2)
    units = lp.trace(model).of_kind("heads")
    assert [u.size for u in units] == [heads, heads]
    assert all(check_permutation(model, u).passed for u in units)


def test_a_constant_that_is_cut_in_pieces_stays_frozen():
    model = made("bloom", hidden_size=96, n_layer=2, n_head=12, slow_but_exact=True, pretraining_tp=2)
    graph = lp.trace(model)
    assert not graph.of_kind("heads")
    assert {u.frozen for u in graph.frozen if u.kind == "heads"} == {"combined with a constant"}


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_tracing_leaves_no_trace():
    """Rotary embeddings of dynamic length note the longest input on themselves."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = made("llama", **SMALL, max_position_embeddings=20, rope_parameters=rope)
    ids = tokens(length=24)
    with torch.no_grad():
        before = model(ids).logits
        graph = lp.trace(model)
        assert torch.equal(model(ids).logits, before)
    plan, pruned = pruned_by(model)
    assert lp.verify(model, pruned, plan).equivalent
    assert all(check_permutation(model, u).passed for u in graph.of_kind("heads", "neurons"))


def test_experts_without_a_prunable_router_run_too():
    for kinds in (["neurons"], ["hidden"]):
        _, pruned = pruned_by(tiny_model("phimoe"), 0.34, kinds=kinds)
        with torch.no_grad():
            assert pruned(tokens()).logits.isfinite().all()


HIDDEN = [
    ("gemma", SMALL | {"head_dim": 8, "num_key_value_heads": 4}),
    ("gemma3_text", SMALL | {"head_dim": 8, "num_key_value_heads": 2}),
    ("olmo", SMALL),
    ("pegasus", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "scale_embedding": True}),
    ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("family, fields", HIDDEN, ids=[family for family, _ in HIDDEN])
def test_factors_made_of_the_hidden_size_stay(family, fields, tmp_path):
    if family == "pegasus":
        fields = fields | {f"{s}_attention_heads": 4 for s in ("encoder", "decoder")}
        fields |= {f"{s}_ffn_dim": 48 for s in ("encoder", "decoder")}
    seq2seq = family in ("pegasus", "t5")
    model = made(family, seq2seq=seq2seq, **fields)
    plan, pruned = pruned_by(model, kinds=["hidden"])
    assert lp.verify(model, pruned, plan).equivalent
    loaded = reloaded(pruned, tmp_path / "m")
    assert lp.verify(model, loaded, plan).equivalent
    again, twice = pruned_by(loaded, kinds=["hidden", "neurons"])
    assert lp.verify(loaded, twice, again).equivalent


def test_a_factor_that_no_config_keeps_is_refused():
    model = tiny_model("minicpm3")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, kinds=["hidden"])
    with pytest.raises(lp.PrunerError, match="computes something from the hidden size"):
        lp.apply(model, plan)
    (unit,) = graph.of_kind("vocabulary")
    plan.keep(unit, torch.arange(unit.size - 2), graph.shapes)  # and not with other kinds beside it either
    with pytest.raises(lp.PrunerError, match="computes something from the hidden size"):
        lp.apply(model, plan)


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [(0.25, "no FalconConfig makes"), (0.5, "no config of FalconConfig carries"), (0.75, "no FalconConfig makes")],
)
def test_falcon_takes_one_cut_of_its_hidden_size_and_refuses_a_second(ratio, reason):
    fields = {"hidden_size": 48, "num_attention_heads": 4, "num_kv_heads": 2, "num_hidden_layers": 2}
    model = made("falcon", **fields, new_decoder_architecture=True)
    plan, once = pruned_by(model, ratio, kinds=["hidden"])
    assert once.config.hidden_size == 48 * (1 - ratio)
    assert lp.verify(model, once, plan).equivalent
    with pytest.raises(lp.PrunerError, match=reason):
        pruned_by(once, 0.5, kinds=["hidden"])


def test_self_and_cross_attention_may_lose_different_heads():
    fields = {"d_model": 40, "num_heads": 6, "d_kv": 8, "d_ff": 30, "num_layers": 2, "num_decoder_layers": 2}
    model = made("t5", seq2seq=True, **fields)
    graph = lp.trace(model)
    for name, kept in (("decoder.block.heads.0", 3), ("decoder.block.heads.1", 2)):
        plan = PruningPlan()
        plan.keep(graph.unit(name), torch.arange(kept), graph.shapes)
        assert lp.verify(model, lp.apply(model, plan), plan).equivalent


SEQ2SEQ = ("bart:seq2seq", "t5:seq2seq", "mbart:seq2seq", "t5gemma:seq2seq")


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders_cut_both_sides(name, tmp_path):
    model = tiny_model(name)
    graph = lp.trace(model)
    for side in ("encoder", "decoder"):
        for kind in ("heads", "neurons"):
            assert [u for u in graph.of_kind(kind) if side in u.name], f"no {kind} in the {side}"
    plan, pruned = pruned_by(model)
    assert lp.verify(model, pruned, plan).equivalent
    ids = tokens()
    loaded, reference = reloaded(pruned, tmp_path / "both"), masked_copy(model, plan)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.parametrize("name", ("bart:seq2seq", "t5gemma:seq2seq"))
def test_one_side_or_one_layer_of_an_encoder_decoder(name, tmp_path):
    """Two stacks may share a config, so layers that differ are told apart by their paths."""
    model = tiny_model(name)
    graph = lp.trace(model)
    for number, chosen in enumerate(("encoder", "decoder", "decoder.layers.1")):
        plan = PruningPlan()
        for unit in graph.of_kind("neurons", "heads"):
            if chosen in unit.name:
                plan.keep(unit, torch.arange(unit.size // 2), graph.shapes)
        pruned = lp.apply(model, plan)
        assert lp.verify(model, pruned, plan).equivalent
        ids = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=2)}
        with torch.no_grad():
            loaded = reloaded(pruned, tmp_path / str(number))
            assert relative_difference(loaded(**ids).logits, pruned(**ids).logits) < 1e-6


def test_latent_attention_needs_no_loader():
    """Key-value heads show in no shape of latent attention, yet a config that forgets them cannot run."""
    _, pruned = pruned_by(tiny_model("deepseek_v3"), kinds=["heads"])
    assert pruned.config.num_key_value_heads == pruned.config.num_attention_heads == 2
    assert "submodule_overrides" not in pruned.config.to_dict()


def test_a_number_that_happens_to_equal_a_count_is_left_alone():
    """Two heads, two experts a token: only the heads may become one."""
    model = tiny_model("dots3_note_text")
    graph = lp.trace(model)
    (unit,) = [u for u in graph.of_kind("heads") if u.size == 2]
    plan = PruningPlan()
    plan.keep(unit, torch.tensor([0]), graph.shapes)
    pruned = lp.apply(model, plan)
    assert {layer.mlp.gate.top_k for layer in list(pruned.model.layers)[1:]} == {2}
    assert lp.verify(model, pruned, plan).equivalent


def test_axes_that_reach_no_output_are_frozen():
    graph = lp.trace(tiny_model("big_bird"))
    assert {u.frozen for u in graph.frozen if "pooler" in u.name} == {"the output does not depend on it"}


def test_models_that_read_values_are_run_on_their_weights():
    model = tiny_model("jetmoe")
    graph = lp.trace(model)
    assert not graph.on_meta
    assert all(check_permutation(model, u).passed for u in graph.of_kind("neurons", "heads", "experts", "hidden"))
    with pytest.raises(lp.PrunerError, match="a model with its weights may do better"):
        lp.trace(meta_model(model.config))


@pytest.mark.slow
def test_a_cache_that_does_not_take_the_new_sizes_is_refused():
    model = tiny_model("rwkv")
    with pytest.raises(lp.PrunerError):
        pruned_by(model, kinds=["neurons"])


@pytest.mark.parametrize("name", ("llama", "gpt_neox", "mixtral", "bloom", "deepseek_v3", "gemma2", "mamba"))
def test_units_on_meta_are_those_of_the_weights(name):
    def described(model):
        return [(u.name, u.kind, u.size, u.flags, list(u.dims)) for u in lp.trace(model).units]

    model = tiny_model(name)
    assert described(meta_model(model.config)) == described(model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("llama", "gpt_neox", "mixtral", "falcon", "t5:seq2seq", "mamba"))
def test_half_precision(name, dtype, tmp_path):
    model = tiny_model(name).to(dtype)
    kinds = ["channels"] if name == "mamba" else ["neurons", "heads"]
    plan, pruned = pruned_by(model, kinds=kinds)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    if name != "mamba":
        assert lp.verify(model, pruned, plan).equivalent
    lp.save(pruned, None, tmp_path / "m")
    loaded = type(pruned).from_pretrained(tmp_path / "m")
    for key, tensor in pruned.state_dict().items():  # transformers reads some of T5's weights as float32
        assert torch.equal(loaded.state_dict()[key].to(dtype), tensor)


@pytest.fixture
def remote_model(tmp_path, monkeypatch):
    """A folder with modelling code of its own, as ChatGLM's and Baichuan's are, and random weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    shutil.copytree(REMOTE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {chr(code): code - 32 for code in range(33, 127)} | {"<unk>": 0, "<eos>": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def test_remote_code_runs_only_when_trusted(remote_model, capsys):
    with pytest.raises(lp.PrunerError, match="--trust_remote_code"):
        lp.load(str(remote_model))
    assert main(["inspect", str(remote_model)]) == 2
    assert "add --trust_remote_code" in capsys.readouterr().err


def test_remote_code_is_pruned_and_saved_with_its_code(remote_model, tmp_path):
    model, tokenizer = lp.load(str(remote_model), trust_remote_code=True)
    graph = lp.trace(model)
    assert len(graph.of_kind("heads")) == len(graph.of_kind("neurons")) == 3
    assert len(graph.of_kind("query_heads")) == 3
    assert all(check_permutation(model, u).passed for u in graph.of_kind("heads", "neurons", "hidden"))
    ids = example_inputs(model)
    for number, options in enumerate(({}, {"layers": [1]}, {"kinds": ["hidden"]})):
        plan, pruned = pruned_by(model, **options)
        if "kinds" not in options:
            assert lp.verify(model, pruned, plan).equivalent
        folder = tmp_path / f"pruned{number}"
        lp.save(pruned, tokenizer, folder, plan=plan)
        assert "auto_map" in json.loads((folder / "config.json").read_text())
        assert list(folder.glob("modeling_*.py"))
        loaded, _ = lp.load(str(folder), trust_remote_code=True)
        with torch.no_grad():
            assert relative_difference(loaded(ids).logits, pruned(ids).logits) < 1e-6
