"""Measuring: what a model is worth, and what it costs."""

from .perplexity import Perplexity, parameter_count, perplexity, windows

__all__ = ["Perplexity", "parameter_count", "perplexity", "windows"]
