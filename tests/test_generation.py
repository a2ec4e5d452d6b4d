"""Generating tokens, and errors for models that cannot."""

import pytest
import torch
from helpers.models import build, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import llm_pruner as lp
from llm_pruner.data import self_calibration
from llm_pruner.models.generate import Sampling, continue_text, generate, seeded


class NanoConfig(PreTrainedConfig):
    """Fields as nanoGPT names them: transformers finds no ``num_hidden_layers`` to make a cache from."""

    model_type = "nano"

    def __init__(self, n_layer=2, n_embd=16, n_head=2, n_inner=32, vocab_size=96, **options):
        self.n_layer, self.n_embd, self.n_head, self.n_inner, self.vocab_size = (
            n_layer,
            n_embd,
            n_head,
            n_inner,
            vocab_size,
        )
        super().__init__(**options)


class NanoBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.n_embd)
        self.up = nn.Linear(config.n_embd, config.n_inner)
        self.down = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, hidden_states):
        mixed = hidden_states.cumsum(1) / 4
        return hidden_states + self.down(torch.relu(self.up(self.norm(mixed))))


class NanoModel(PreTrainedModel, GenerationMixin):
    config_class = NanoConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(NanoBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None, **options):
        hidden_states = self.wte(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return CausalLMOutput(logits=self.head(hidden_states))


@pytest.fixture
def nano(tokenizer):
    torch.manual_seed(0)
    return NanoModel(NanoConfig(vocab_size=len(tokenizer))).eval()


def test_a_model_without_a_cache_cannot_write_its_own_samples(nano):
    with pytest.raises(lp.PrunerError, match=r"NanoModel cannot generate: AttributeError.*num_hidden_layers"):
        self_calibration(nano, tokens(2, 8), 2)


def test_a_model_without_a_cache_is_pruned_without_self_written_samples(nano, tokenizer, tmp_path):
    AutoConfig.register("nano", NanoConfig, exist_ok=True)
    AutoModelForCausalLM.register(NanoConfig, NanoModel, exist_ok=True)
    lp.save(nano, tokenizer, tmp_path / "nano")
    run = lp.prune(
        str(tmp_path / "nano"),
        kinds=["neurons"],
        pruning_ratio=0.5,
        refit="ridge",
        num_examples=32,
        calib_seq_len=16,
        eval_datasets=[],
        output=str(tmp_path / "out"),
        device="cpu",
    )
    log = next((tmp_path / "out").glob("*.log")).read_text()
    assert "compensating without self-written samples: NanoModel cannot generate" in log
    assert run.model.num_parameters() < nano.num_parameters()


def test_greedy_and_exact():
    model, prompts = build("llama"), tokens(3, 5)
    greedy = generate(model, prompts, new_tokens=6, exact=True)
    assert greedy.shape == (3, 6)
    with torch.no_grad():
        logits = model(torch.cat([prompts, greedy], 1)).logits[:, 4:-1]
    logits[..., 1] = float("-inf")  # no end-of-sequence token
    assert torch.equal(logits.argmax(-1), greedy)


def test_a_seed_draws_alike_and_leaves_the_global_state():
    model, prompts, state = build("llama"), tokens(2, 4), torch.random.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed, model.device):
            drawn.append(generate(model, prompts, new_tokens=8, exact=True, sampling=Sampling()))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_can_be_part_of_its_continuation(home):
    model, tokenizer = lp.load(str(home / "base"))
    alone = continue_text(model, tokenizer, "This is", 8)
    assert continue_text(model, tokenizer, "This is", 8, include_prompt=True) == "This is" + alone
