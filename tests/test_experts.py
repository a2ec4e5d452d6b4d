"""Criteria of experts against what blocks compute without them, routers with groups, and the masked original."""

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build
from torch.nn.functional import cosine_similarity, silu
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.graph.places import common_path
from llm_pruner.selection.plan import PruningPlan

GROUPED = {"n_routed_experts": 16, "num_local_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
# Softmax before the top-k, renormalised and not; after it, with biases; sigmoid with a correction bias, in groups; one
# expert per token, whose input is scaled; a shared expert beside them.
ROUTERS = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe")


def mixture(name):
    model = tiny_model(name)
    if name == "deepseek_v3":
        for field, value in GROUPED.items():
            setattr(model.config, field, value)
        model = AutoModelForCausalLM.from_config(model.config)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "experts" in key or "gate" in key or "router" in key:
                tensor.normal_(std=0.3)
    return model.eval()


@pytest.fixture(params=ROUTERS)
def case(request):
    """A model, the first unit of experts, its block, what this reads and returns for 4 x 16 tokens, and the tokens."""
    model = mixture(request.param)
    unit = lp.trace(model).of_kind("experts")[0]
    block = model.get_submodule(common_path(unit.parameters))
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append((args[0], first(output))))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return model, unit, block, seen[0], ids


def first(output):
    return (output[0] if isinstance(output, tuple) else output).detach().clone()


def contributions(block, unit, states, output):
    """Return what each expert adds to the output, as the difference without it: ``[experts, tokens, hidden]``."""
    names = ("down_proj", "down_proj_bias", "mlp.w2")
    stacks = {n: p.view(unit.size, -1) for n, p in block.experts.named_parameters() if n in names}
    out = []
    for j in range(unit.size):
        saved = {name: stack.data[j].clone() for name, stack in stacks.items()}
        for stack in stacks.values():
            stack.data[j] = 0
        with torch.no_grad():
            out.append((output - first(block(states))).reshape(-1, output.shape[-1]))
        for name, stack in stacks.items():
            stack.data[j] = saved[name]
    return torch.stack(out).double()


def score(case, criterion):
    model, unit, *_, ids = case
    return lp.score(model, lp.trace(model), ids, criterion, kinds=["experts"]).values[unit.name]


def routed(added):
    return added.norm(dim=-1) > 1e-5


def test_reap_and_frequency(case):
    _, unit, block, (states, output), _ = case
    added = contributions(block, unit, states, output)
    mask = routed(added)
    assert mask.any(1).sum() > 2
    assert score(case, "frequency") == pytest.approx(mask.double().mean(1), abs=1e-9)
    expected = added.norm(dim=-1).sum(1) / mask.sum(1).clamp_min(1)
    assert score(case, "reap") == pytest.approx(expected, rel=2e-3, abs=1e-6)


def outputs_of(block, states, j):
    """The output of an expert for every token, by its weights."""
    experts, x = block.experts, states.reshape(-1, states.shape[-1])
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss
        gate, up = (x @ experts.gate_up_proj[j] + experts.gate_up_proj_bias[j]).view(len(x), -1, 2).unbind(-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[j] + experts.down_proj_bias[j]
    if hasattr(experts, "mlp"):  # DBRX
        w1, v1, w2 = (w.view(-1, experts.ffn_hidden_size, x.shape[1])[j] for w in experts.mlp.parameters())
        return (silu(x @ w1.T) * (x @ v1.T)) @ w2
    gate, up = (x @ experts.gate_up_proj[j].T).chunk(2, -1)
    return (silu(gate) * up) @ experts.down_proj[j].T


def test_ean_and_mone(case):
    model, unit, block, (states, output), _ = case
    added = contributions(block, unit, states, output)
    mask = routed(added)
    for criterion in ("ean", "mone"):
        expected = []
        for j in range(unit.size):
            gated_inputs = model.config.model_type == "llama4_text"  # its experts' outputs have no other gate
            alone = (added[j] if gated_inputs else outputs_of(block, states, j).detach().double())[mask[j]]
            if criterion == "ean":
                expected.append(alone.norm(dim=-1).sum())
            else:
                expected.append(mask[j].double().mean() * (alone.std(0).norm() if len(alone) > 1 else torch.zeros(())))
        assert score(case, criterion) == pytest.approx(torch.stack(expected).double(), rel=2e-3, abs=1e-6)


def without(model, unit, j):
    plan = PruningPlan()
    kept = torch.tensor([i for i in range(unit.size) if i != j])
    plan.keep(unit, kept, lp.trace(model).shapes)
    return lp.apply(model, plan)


def test_the_loss_of_an_expert(case):
    model, unit, block, (states, output), _ = case
    if unit.groups > 1:
        pytest.skip("one expert of a group cannot go alone")
    path, mask = common_path(unit.parameters), routed(contributions(block, unit, states, output))
    before = output.reshape(-1, output.shape[-1]).double()
    losses, cosines = [], []
    for j in range(unit.size):
        with torch.no_grad():
            after = first(without(model, unit, j).get_submodule(path)(states)).reshape(before.shape).double()
        losses.append((before - after).square().sum(1)[mask[j]].sum() / len(before))
        cosines.append((1 - cosine_similarity(before, after, dim=1))[mask[j]].sum() / len(before))
    assert score(case, "expert_loss") == pytest.approx(torch.stack(losses), rel=1e-3, abs=1e-9)
    assert score(case, "expert_cosine") == pytest.approx(torch.stack(cosines), rel=1e-3, abs=1e-7)


def test_scoring_changes_nothing(case):
    model, _, _, _, ids = case
    with torch.no_grad():
        before = model(ids).logits
        score(case, "reap"), score(case, "expert_loss")
        assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.get_submodule(common_path(case[1].parameters)).experts)


@pytest.mark.parametrize("name", ROUTERS)
def test_fewer_experts_equal_the_masked_original(name):
    model = mixture(name)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, None, "random", kinds=["experts"]), 0.5, kinds=["experts"])
    pruned = lp.apply(model, plan)
    assert lp.verify(model, pruned, plan).equivalent
    unit = graph.of_kind("experts")[0]
    other = PruningPlan()  # as many experts, but others
    kept = plan.units[unit.name].kept
    groups = torch.arange(unit.size).view(unit.groups, -1)
    other.keep(unit, torch.cat([group[-len(kept) // unit.groups :] for group in groups]), graph.shapes)
    if not torch.equal(other.units[unit.name].kept, kept):
        assert not lp.verify(model, pruned, other).equivalent


def test_groups_keep_equally_many():
    model = mixture("deepseek_v3")
    graph = lp.trace(model)
    (unit,) = {unit.size: unit for unit in graph.of_kind("experts")}.values()
    assert (unit.size, unit.groups, unit.minimum) == (16, 4, 8)  # the best 2 of each group, and 2 groups hold 3 experts
    scores = lp.score(model, graph, None, "random", kinds=["experts"])
    for ratio, each in ((0.25, 3), (0.5, 2), (0.75, 2)):
        for scope in ("local", "global"):
            plan = lp.select(graph, scores, ratio, kinds=["experts"], scope=scope)
            for choice in plan.units.values():
                counts = torch.bincount(choice.kept // 4, minlength=4)
                assert len(set(counts.tolist())) == 1
                assert scope == "global" or counts[0] == each
    values = scores.values[unit.name].view(4, 4)
    kept = lp.select(graph, scores, 0.5, kinds=["experts"]).units[unit.name].kept
    assert kept.tolist() == sorted((values.argsort(1)[:, 2:] + 4 * torch.arange(4)[:, None]).flatten().tolist())
    with pytest.raises(lp.PrunerError, match="cannot keep 10: its router has 4 groups of equal size"):
        lp.select(graph, scores, counts={"experts": 10})
    with pytest.raises(lp.PrunerError, match="cannot keep 4: give 8 to 16"):
        lp.select(graph, scores, counts={"experts": 4})


def test_experts_without_tokens_are_named(caplog):
    model = mixture("mixtral")
    ids = torch.full((1, 2), 5)
    with caplog.at_level("WARNING"):
        scores = lp.score(model, lp.trace(model), ids, "reap", kinds=["experts"])
    assert "no calibration token is routed to" in caplog.text and "they score 0 and go first" in caplog.text
    assert all((values == 0).any() and (values > 0).any() for values in scores.values.values())


def test_criteria_of_experts_refuse_models_without():
    model = build("llama")
    with pytest.raises(lp.PrunerError, match="reap scores experts, and this model has none"):
        lp.score(model, lp.trace(model), torch.ones(1, 4).long(), "reap")


def test_experts_of_a_router_inside_are_not_watched():
    model = mixture("jetmoe")  # one expert after the other, all of them; its attention has experts too
    units = lp.trace(model).of_kind("experts")
    assert [unit.size for unit in units] == [4] * 4
    with pytest.raises(lp.PrunerError, match="not known how they are routed: use taylor, l2 or random"):
        lp.score(model, lp.trace(model), torch.ones(1, 4).long(), "reap", kinds=["experts"])


def test_other_units_are_refused_by_name():
    model = mixture("mixtral")
    with pytest.raises(lp.PrunerError, match=r"reap does not score model\.layers\.0"):
        lp.score(model, lp.trace(model), torch.ones(1, 4).long(), "reap", kinds=["experts", "neurons"])
