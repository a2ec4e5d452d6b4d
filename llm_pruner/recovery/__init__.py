"""Recovery: training a pruned model so that it gets its quality back."""
