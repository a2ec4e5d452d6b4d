"""Measuring: what a model is worth, and what it costs."""

from .perplexity import Perplexity, check_length, parameter_count, perplexity, windows

__all__ = ["Perplexity", "check_length", "parameter_count", "perplexity", "windows"]
