"""Config of a model that no release of transformers knows, with field names of its own."""

from transformers import PreTrainedConfig


class CompactConfig(PreTrainedConfig):
    model_type = "compact"
    attribute_map = {  # noqa: RUF012
        "vocab_size": "padded_vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "attention_heads",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 96
    width: int = 32
    depth: int = 3
    attention_heads: int = 4
    multi_query_group_num: int = 2
    kv_channels: int = 8
    ffn_hidden_size: int = 48
    seq_length: int = 64
