"""A decoder in the manner of models that bring their own code: fused projections, rotary on half of each head."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_compact import CompactConfig


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def rotate(x, positions):
    """Turn pairs of the first half of each head's channels; the second half stays."""
    size = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = positions[:, None, :, None] * frequency
    turned, still = x.split([size, x.shape[-1] - size], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1)
    return torch.cat([turned.flatten(-2).to(still.dtype), still], dim=-1)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.head = config.kv_channels
        self.query_size = config.attention_heads * self.head
        self.group_size = config.multi_query_group_num * self.head
        self.query_key_value = nn.Linear(config.width, self.query_size + 2 * self.group_size, bias=True)
        self.dense = nn.Linear(self.query_size, config.width, bias=False)

    def forward(self, x, positions, cache):
        parts = self.query_key_value(x).split([self.query_size, self.group_size, self.group_size], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts)
        query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        times = self.query_size // self.group_size
        key, value = (t.repeat_interleave(times, dim=1) for t in (key, value))
        rows = torch.arange(key.shape[2], device=x.device)
        visible = rows[None, None, None, :] <= positions[:, None, :, None]
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.dense(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.width, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.width, bias=False)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.self_attention = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, positions, cache):
        x = x + self.self_attention(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class CompactForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CompactConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.width)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.depth)])
        self.final_layernorm = RMSNorm(config.width)
        self.output_layer = nn.Linear(config.width, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output_layer

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        positions = positions[None].expand_as(input_ids)
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, positions, past_key_values)
        logits = self.output_layer(self.final_layernorm(x))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
