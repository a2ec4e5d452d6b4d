"""Recovery: train a pruned model to regain its quality."""
