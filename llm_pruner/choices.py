"""Values that flags and functions accept, for modules that must not load torch."""

from __future__ import annotations

from typing import Literal

DEFAULT_MODEL = "smollm2-135m"
GENERAL, PYTHON_DOCS = EMBEDDED_TEXTS = ("general", "python-docs")  # texts that the package brings
SELF = "self"  # calibration text that the model writes itself
SYNTHETIC = "synthetic"  # random images or sounds
ADAPTER_METHODS = ("lora", "dora")  # methods of recovery that train an adapter

Kind = Literal["heads", "query_heads", "neurons", "experts", "hidden", "channels", "layers", "vocabulary"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TaylorVariant = Literal["vectorize", "param_first", "param_second", "param_mix"]
UNGROUPED = "none"  # aggregation that ranks every weight alone
Aggregation = Literal["sum", "mean", "max", "prod", "first", "last", "none"]
LayerCriterion = Literal["last", "spaced_middle", "block_influence", "cosine", "loss_change", "loss", "contiguous"]
Normalizer = Literal["none", "mean", "sqrt"]
Allocation = Literal["uniform", "global", "search"]
ExpertsPerLayer = Literal["uniform", "global"]
Compensation = Literal["none", "least_squares", "bias"]
Refit = Literal["none", "bias", "ridge", "blocks", "distill", "lora"]
Preset = Literal["best", "fast", "paper"]
EngineName = Literal["vllm", "llama.cpp"]
Tower = Literal["language", "vision", "audio", "all"]

# Refits in closed form, and the method of compensation that each is.
CLOSED_FORM: dict[str, Compensation] = {"bias": "bias", "ridge": "least_squares"}
TRAINED = ("blocks", "distill", "lora")  # refits by training, behind ridge

# Flags that name a shape whatever an architecture calls its fields, and the kind of unit that each counts.
SHAPE: dict[str, Kind] = {
    "hidden_size": "hidden",
    "intermediate_size": "neurons",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "num_hidden_layers": "layers",
    "num_decoder_layers": "layers",
}
