"""Vocabulary pruning: choose the tokens that stay, and cut model and tokenizer to them."""
