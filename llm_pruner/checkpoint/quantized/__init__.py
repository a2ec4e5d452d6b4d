"""Formats of quantized checkpoints: their values, and cuts that change none of them."""
