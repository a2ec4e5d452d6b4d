"""Discovery: which indices of which parameters belong together."""
