"""Measurements of quality and cost: perplexity, tasks, size, compute, time and memory."""
