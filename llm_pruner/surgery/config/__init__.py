"""Find the config that builds the pruned model."""
