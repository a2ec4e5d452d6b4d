"""Plans for mixtures: counts by layer, super experts that stay, and fewer experts per token."""

import json

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build
from test_experts import ROUTERS, mixture
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.importance.super_experts import find_super_experts
from llm_pruner.pruning.measurements import before_and_after
from llm_pruner.surgery.per_token import EXPERTS_PER_TOKEN, experts_per_token, with_experts_per_token

IDS = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
QUICK = {"calib_dataset": "general", "num_examples": 4, "calib_seq_len": 16, "compensate": "none", "eval_datasets": ""}


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A checkpoint of a mixture of four layers with eight experts, two of which a token is sent to."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    lp.save(MixtralForCausalLM(config).eval(), tokenizer, tmp_path / "mixture")
    return tmp_path / "mixture"


def counts(plan, kind="experts"):
    return {name: len(choice.kept) for name, choice in plan.units.items() if choice.kind == kind}


def test_experts_are_ranked_globally_beside_local_neurons(folder):
    flags = {"kinds": "experts,neurons", "pruning_ratio": 0.5, "pruner_type": "l2"} | QUICK
    uniform = lp.prune(str(folder), **flags)
    ranked = lp.prune(str(folder), experts_per_layer="global", **flags)
    assert set(counts(uniform.plan).values()) == {4}
    assert len(set(counts(ranked.plan).values())) > 1 and min(counts(ranked.plan).values()) >= 2
    removed = sum(8 - count for count in counts(ranked.plan).values())
    assert 15 <= removed <= 16  # of 16: a layer keeps at least the two experts of a token
    assert counts(ranked.plan, "neurons") == counts(uniform.plan, "neurons")
    assert ranked.plan.settings["scope"] == {"experts": "global"}
    assert ranked.plan.settings["normalize"] == {"experts": "mean"}


def test_experts_stay_uniform_beside_global_neurons(folder):
    flags = {"kinds": "experts,neurons", "pruning_ratio": 0.5, "pruner_type": "random", "global_pruning": True} | QUICK
    plan = lp.prune(str(folder), experts_per_layer="uniform", **flags).plan
    assert set(counts(plan).values()) == {4}
    assert len(set(counts(lp.prune(str(folder), **flags).plan).values())) > 1


def test_the_mean_of_a_layer_divides_its_scores():
    model = mixture("mixtral")
    graph = lp.trace(model)
    first, second = (unit.name for unit in graph.of_kind("experts"))
    values = {first: torch.tensor([1.0, 2, 3, 4]).double(), second: torch.tensor([100.0, 100, 100, 101]).double()}
    for normalize, lost in (("none", [2, 0]), ({"experts": "mean"}, [2, 0]), ({"neurons": "mean"}, [2, 0])):
        plan = lp.select(
            graph, lp.Scores(values), 0.25, kinds=["experts"], scope={"experts": "global"}, normalize=normalize
        )
        assert [4 - len(plan.units[name].kept) if name in plan.units else 0 for name in (first, second)] == lost
    values[second] = torch.tensor([1.0, 100, 100, 199]).double()
    plan = lp.select(graph, lp.Scores(values), 0.25, kinds=["experts"], scope={"experts": "global"}, normalize="mean")
    assert counts(plan) == {first: 3, second: 3}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scope": {"experts": "worldwide"}}, "scope 'worldwide' is not valid"),
        ({"scope": {"expert": "global"}}, "scope is given for kind 'expert', not valid"),
        ({"normalize": {"experts": "max"}}, "normalize 'max' is not valid"),
        ({"scope": {"experts": "global"}, "uniform": True}, "leave out layers and scope"),
    ],
)
def test_scopes_by_kind_are_checked(setting, message):
    model = mixture("mixtral")
    graph = lp.trace(model)
    scores = lp.score(model, graph, None, "l2", kinds=["experts"])
    with pytest.raises(lp.PrunerError, match=message):
        lp.select(graph, scores, 0.25, kinds=["experts"], **setting)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"experts_per_layer": "global"}, "--experts_per_layer is about the experts that go: add --kinds experts"),
        ({"protect_super_experts": True}, "--protect_super_experts is about the experts that go"),
        ({"kinds": "experts", "experts_per_layer": "global", "uniform": True}, "exclude each other"),
        ({"kinds": "experts", "experts_per_layer": "uniform", "normalize": "mean"}, "add --experts_per_layer global"),
        ({"kinds": "experts", "experts_per_layer": "some"}, "'some' is not valid: choose from uniform, global"),
        ({"experts_per_token": 1, "pruning_ratio": 0.2}, "says not of what: add --kinds experts"),
        ({"experts_per_token": 0}, "--experts_per_token 0 is out of range: give 1 or more"),
        ({"experts_per_token": 3}, "sends a token to 2 experts; give 1 to 2"),
        ({"experts_per_token": 2}, "--experts_per_token 2: the model has that number already"),
    ],
)
def test_flags_of_experts_are_checked(flags, message, folder):
    with pytest.raises(lp.PrunerError, match=message):
        lp.prune(str(folder), **flags)


def test_the_default_criterion_scores_experts(folder):
    run = lp.prune(str(folder), kinds="experts", pruning_ratio=0.25, **QUICK)
    assert run.plan.settings["criterion"] == "taylor" and set(counts(run.plan).values()) == {6}
    assert run.model.config.num_local_experts == 6 and run.model.config.num_experts_per_tok == 2


def make_super(model, layer, expert):
    """Let an expert write a massive activation into one channel."""
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert, 7] *= 1e6
    return f"model.layers.{layer}.mlp.experts"


def with_super_expert():
    model = build("mixtral")
    # The least of its layer by weights, where it does not write.
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2] *= 0.1
    return model, make_super(model, 1, 2)


def test_super_experts_are_found_by_their_outputs():
    plain = build("mixtral")
    assert find_super_experts(plain, lp.trace(plain), IDS) == {}
    model, name = with_super_expert()
    assert find_super_experts(model, lp.trace(model), IDS) == {name: [2]}


@pytest.mark.parametrize("criterion", ["reap", "frequency", "expert_loss", "random"])
def test_super_experts_stay(criterion):
    model, name = with_super_expert()
    graph = lp.trace(model)
    plain = lp.score(model, graph, IDS, criterion, kinds=["experts"])
    scores = lp.score(model, graph, IDS, criterion, kinds=["experts"], protect_super_experts=True)
    assert scores.settings["super_experts"] == {name: [2]}
    others = [0, 1, 3]
    assert torch.equal(scores.values[name][others], plain.values[name][others])
    low = lp.Scores({**plain.values, name: torch.tensor([3.0, 2, 1, 4]).double()})
    low.values[name][2] = scores.values[name][2]
    assert 2 in lp.select(graph, low, 0.5, kinds=["experts"]).units[name].kept.tolist()


def test_super_experts_without_scores_are_left_alone():
    """Activations do not score experts, and a score of other kinds has none."""
    model, _ = with_super_expert()
    graph = lp.trace(model)
    for options in ({"criterion": "wanda"}, {"criterion": "l2", "kinds": ["neurons"]}):
        scores = lp.score(model, graph, IDS, protect_super_experts=True, **options)
        assert "super_experts" not in scores.settings and not any(v.isinf().any() for v in scores.values.values())


def test_runs_protect_super_experts_by_criterion(folder, caplog):
    model, tokenizer = lp.load(str(folder))
    name = make_super(model, 1, 5)
    lp.save(model, tokenizer, folder.parent / "super")
    flags = {"kinds": "experts", "pruning_ratio": 0.25} | QUICK
    for more, protected in (
        ({"pruner_type": "reap"}, True),
        ({"pruner_type": "reap", "protect_super_experts": False}, False),
        ({"pruner_type": "l1"}, False),
        ({"pruner_type": "l1", "protect_super_experts": True}, True),
    ):
        with caplog.at_level("INFO"):
            plan = lp.prune(str(folder.parent / "super"), **flags, **more).plan
        assert (plan.settings.get("super_experts") == {name: [5]}) == protected
        assert (f"super experts of {name} stay: 5" in caplog.text) == protected
        caplog.clear()


def test_inspect_lists_super_experts(folder, capsys):
    assert main(["inspect", str(folder), "--super_experts", "general"]) == 0
    assert "no super experts on general" in capsys.readouterr().out
    model, tokenizer = lp.load(str(folder))
    name = make_super(model, 1, 5)
    lp.save(model, tokenizer, folder.parent / "super")
    assert main(["inspect", str(folder.parent / "super"), "--super_experts", "general", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["super_experts"] == {name: [5]}
    assert main(["inspect", str(folder.parent / "super"), "--super_experts", "general"]) == 0
    assert "super experts on general" in capsys.readouterr().out


def test_inspect_refuses_super_experts_of_dense_models(home, capsys):
    assert main(["inspect", str(home / "base"), "--super_experts", "general"]) == 2
    assert "super experts are stacked experts, and this model has none" in capsys.readouterr().err
    assert main(["inspect", str(home / "uniform" / "pruning_plan.json"), "--super_experts", "general"]) == 2
    assert "--super_experts general is for a model" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*ROUTERS, "hunyuan_v1_moe", "ernie4_5_moe"])
def test_fewer_experts_per_token(name):
    model = mixture(name)
    now = experts_per_token(model)
    if now == 1:  # Llama 4
        assert with_experts_per_token(model, 1) is model
        return
    routed = with_experts_per_token(model, now - 1)
    assert experts_per_token(routed) == now - 1 and experts_per_token(model) == now
    before, after = model.config.to_dict(), routed.config.to_dict()
    assert [field for field in before if before[field] != after[field] and "dtype" not in field] in (
        ["num_experts_per_tok"],
        ["moe_topk"],
        ["moe_k"],
    )
    stock = AutoModelForCausalLM.from_config(routed.config).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = routed(IDS).logits
        assert torch.equal(logits, stock(IDS).logits) and not torch.allclose(logits, model(IDS).logits)
    assert all(routed.get_parameter(key) is not None for key, _ in model.named_parameters())
    plan = lp.PruningPlan(settings={EXPERTS_PER_TOKEN: now - 1})
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent
    with pytest.raises(lp.PrunerError, match=f"give 1 to {now}"):
        with_experts_per_token(model, now + 1)


def test_models_without_routers_have_no_experts_per_token():
    with pytest.raises(lp.PrunerError, match="has no experts that a router chooses"):
        with_experts_per_token(build("llama"), 1)


def test_a_run_sends_tokens_to_fewer_experts(folder):
    flags = QUICK | {"eval_datasets": "general", "max_windows": 2, "max_seq_len": 32}
    only = lp.prune(str(folder), experts_per_token=1, **flags)
    assert only.model.config.num_experts_per_tok == 1 and not only.plan.units
    measured = only.metrics[EXPERTS_PER_TOKEN]
    assert (measured["before"], measured["after"]) == (2, 1)
    perplexity = [part["perplexity"]["general"]["perplexity"] for part in (measured, only.metrics["after"])]
    assert perplexity[0] == pytest.approx(perplexity[1])
    assert perplexity[0] != only.metrics["before"]["perplexity"]["general"]["perplexity"]
    assert before_and_after(only.metrics)[0] == ["", "before", "1 of 2 experts per token", "after"]
    output = folder.parent / "one"
    flags = {"experts_per_token": 1, "kinds": "experts", "pruning_ratio": 0.875, "pruner_type": "reap"} | QUICK
    run = lp.prune(str(folder), output=str(output), **flags)
    assert set(counts(run.plan).values()) == {1}  # fewer than a token of the original is sent to
    assert run.metrics["mask_equivalence"]["relative"] < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(output)
    assert (stock.config.num_local_experts, stock.config.num_experts_per_tok) == (1, 1)
    again = folder.parent / "again"
    assert main(["apply", str(output / "pruning_plan.json"), str(folder), str(again)]) == 0
    applied = AutoModelForCausalLM.from_pretrained(again)
    assert applied.config.num_experts_per_tok == 1
    assert all(torch.equal(a, b) for a, b in zip(applied.parameters(), stock.parameters(), strict=True))


def test_a_repeated_refit_reads_text_of_as_many_experts_per_token(folder, tmp_path):
    flags = {"calib_dataset": "self", "num_examples": 32, "calib_seq_len": 16, "eval_datasets": "", "self_examples": 0}
    flags |= {"kinds": "neurons", "pruner_type": "l2", "refit": "ridge", "experts_per_token": 1}
    run = lp.prune(str(folder), output=str(tmp_path / "run"), **flags)
    plan, again = str(tmp_path / "run" / "pruning_plan.json"), tmp_path / "again"
    assert main(["apply", plan, str(folder), str(again), "--refit"]) == 0
    repeated = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(repeated.parameters(), run.model.parameters(), strict=True))


def test_cached_scores_are_those_of_as_many_experts_per_token(folder, tmp_path):
    flags = QUICK | {"kinds": "neurons", "pruning_ratio": 0.5, "pruner_type": "wanda", "experts_per_token": 1}
    cache = str(tmp_path / "scores")
    two, cached = (
        lp.prune(str(folder), **flags | {"experts_per_token": count}, score_cache=cache).plan for count in (None, 1)
    )
    plan = lp.prune(str(folder), **flags).plan
    assert cached.key == plan.key != two.key


def test_choices_that_are_joined_point_into_one_axis():
    model = tiny_model("phimoe")  # takes the largest score, and then the largest of the others
    unit = lp.trace(model).of_kind("experts")[0]
    assert (unit.size, unit.minimum) == (4, 2)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, IDS, "reap", kinds=["experts"]), 0.5, kinds=["experts"])
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


@pytest.mark.parametrize(
    ("name", "ratio", "note"),
    [
        ("mixtral", 0.75, "2 layers keep 2 of 4 experts, not 1: a token is sent to as many"),
        ("deepseek_v3", 0.9, "1 layers keep 8 of 16 experts, not 1: a token is sent to as many"),
        ("deepseek_v3", 0.1, "1 layers keep 16 of 16 experts, not 14: as many in each of 4 groups"),
        ("mixtral", 0.25, ""),
    ],
)
def test_plans_note_experts_that_stay(name, ratio, note):
    model = mixture(name)
    graph = lp.trace(model)
    scores = lp.score(model, graph, None, "random", kinds=["experts"])
    try:
        notes = lp.select(graph, scores, ratio, kinds=["experts"]).notes
    except lp.PrunerError as error:
        notes = [str(error)]
    assert note in notes or (not note and not notes) or (ratio == 0.1 and "removes nothing" in notes[0])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_the_balancing_loss_follows(name):
    model = mixture(name)
    graph = lp.trace(model)
    model.config.output_router_logits = True
    first, *_ = units = [unit.name for unit in graph.of_kind("experts")]
    scores = lp.score(model, graph, None, "l2", kinds=["experts"])
    uniform = lp.apply(model, lp.select(graph, scores, counts={"experts": 3}))
    assert uniform.config.output_router_logits
    assert uniform(IDS, labels=IDS).aux_loss.isfinite()
    differing = lp.apply(model, lp.select(graph, scores, counts={first: 3}))
    assert len(units) > 1 and not differing.config.output_router_logits
    assert differing(IDS, labels=IDS).loss.isfinite()


@pytest.mark.parametrize("name", ROUTERS)
def test_fields_of_routers_follow(name, tmp_path):
    model = mixture(name)
    graph = lp.trace(model)
    unit = graph.of_kind("experts")[0]
    kept = max(unit.size // 2, unit.minimum)
    plan = lp.select(graph, lp.score(model, graph, None, "l2", kinds=["experts"]), counts={"experts": kept})
    lp.save(lp.apply(model, plan), None, tmp_path / "fewer", plan=plan)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    before, after = model.config.to_dict(), stock.config.to_dict()
    changed = {field for field in before if before[field] != after[field] and "dtype" not in field}
    assert changed <= {"num_experts", "num_local_experts", "n_routed_experts", "architectures", "_name_or_path"}
    assert {after[field] for field in changed if "experts" in field} == {kept}
    assert stock(IDS).logits.isfinite().all()
