"""Vocabulary pruning: which tokens stay, and the tokenizer that knows only them."""
