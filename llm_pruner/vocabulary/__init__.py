"""Vocabulary pruning: which tokens stay, and the tokenizer that knows only them."""

from .choosing import choose
from .counting import Counts, count
from .tokenizer import Subwords, cut_tokenizer

__all__ = ["Counts", "Subwords", "choose", "count", "cut_tokenizer"]
