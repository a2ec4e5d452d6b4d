"""Run pruned models in other engines."""
