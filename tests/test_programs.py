"""Random programs of tensor operators: whatever units the tracer finds in them, the real computation agrees."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llm_pruner.graph.permutation import verify_units
from llm_pruner.graph.units import trace

WIDTH, TOKENS = 12, 16


class ProgramConfig(PreTrainedConfig):
    model_type = "random_program"
    hidden_size = WIDTH
    vocab_size = 20


class Step(nn.Module):
    """One step of a program: a function of the residual stream with weights of its own, added to it."""

    def __init__(self, kind: str, inner: int, groups: int):
        super().__init__()
        self.kind, self.groups, self.inner = kind, groups, inner
        wide = inner * groups
        self.up = nn.Linear(WIDTH, 2 * wide if kind in ("chunk", "slice", "unflatten") else wide, bias=kind != "stack")
        self.down = nn.Linear(2 * wide if kind == "cat" else wide, WIDTH)
        self.other = nn.Linear(WIDTH, wide)
        self.scale = nn.Parameter(torch.randn(wide))
        self.bank = nn.Parameter(torch.randn(groups, inner, inner) / inner**0.5)
        self.norm = nn.LayerNorm(wide)

    def forward(self, x):
        up, wide = self.up(x), self.inner * self.groups
        rows, tokens = x.shape[:2]
        match self.kind:
            case "relu":
                y = torch.relu(up) * self.scale
            case "gate":
                y = torch.sigmoid(up) * self.other(x)
            case "chunk":
                a, b = up.chunk(2, dim=-1)
                y = torch.tanh(a) * b
            case "slice":
                y = up[..., :wide] + torch.tanh(up[..., wide:])
            case "unflatten":
                a, b = up.unflatten(-1, (2, wide)).unbind(-2)
                y = a * torch.sigmoid(b)
            case "cat":
                y = torch.cat([torch.relu(up), self.other(x)], dim=-1)
            case "attention":
                q = up.view(rows, tokens, self.groups, self.inner).transpose(1, 2)
                k = self.other(x).view(rows, tokens, self.groups, self.inner).transpose(1, 2)
                weights = (q @ k.transpose(-1, -2) / self.inner**0.5).softmax(-1)
                y = (weights @ k).transpose(1, 2).reshape(rows, tokens, wide)
            case "einsum":
                y = up.view(rows, tokens, self.groups, self.inner)
                y = torch.einsum("btgi,gij->btgj", y, self.bank).flatten(2)
            case "bank":
                y = up.view(rows * tokens, self.groups, self.inner).permute(1, 0, 2)
                y = torch.bmm(y, self.bank).permute(1, 0, 2).reshape(rows, tokens, wide)
            case "norm":
                y = self.norm(up)
            case "softmax":
                y = up.softmax(-1) * self.other(x)
            case "mean":
                y = up - up.mean(-1, keepdim=True)
            case "stack":
                y = torch.stack([up, self.other(x)]).sum(0)
            case "where":
                y = torch.where(up > 0, up, self.scale * up)
            case "roll":
                y = torch.cat([up[:, 1:], up[:, :1]], dim=1) * self.scale
            case "flip":  # no order of its channels but one
                y = up.flip(-1) + self.other(x)
            case "cumsum":
                y = up.cumsum(-1)
        return self.down(y)


KINDS = ("relu", "gate", "chunk", "slice", "unflatten", "cat", "attention", "einsum", "bank", "norm", "softmax", "mean")
KINDS += ("stack", "where", "roll", "flip", "cumsum")
STEP = st.tuples(st.sampled_from(KINDS), st.integers(2, 5), st.integers(1, 3))


class Program(PreTrainedModel):
    config_class = ProgramConfig

    def __init__(self, config, steps):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.steps = nn.ModuleList(Step(*step) for step in steps)
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for step in self.steps:
            x = x + step(x)
        return CausalLMOutput(logits=self.head(x))


def program(steps, seed=0):
    torch.manual_seed(seed)
    model = Program(ProgramConfig(), steps).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero, nothing alike
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5 + 0.05)
    return model


def sound(steps, seed):
    model = program(steps, seed)
    graph = trace(model)
    wrong = [
        (r.unit.name, sorted(r.unit.dims), r.difference) for r in verify_units(model, graph) if r.difference > 1e-4
    ]
    assert not wrong
    return graph


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, min_size=1, max_size=4), st.integers(0, 9))
def test_units_of_random_programs_hold(steps, seed):
    """Permuting a unit in all its slices changes nothing that comes out."""
    sound(steps, seed)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, min_size=1, max_size=6), st.integers(0, 99))
def test_units_of_many_random_programs_hold(steps, seed):
    sound(steps, seed)


def test_programs_have_the_units_that_they_should():
    """The property is not empty: each kind of step by itself has a free unit, or none where none is right."""
    for kind in KINDS:
        graph = sound([(kind, 4, 2)], 0)
        inside = [
            u for u in graph.units if any(name.startswith("steps.0.up") for name, _ in u.dims) and u.kind != "hidden"
        ]
        assert bool(inside) == (kind not in ("flip", "cumsum")), kind
