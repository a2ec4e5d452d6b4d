"""Refit a pruned model with calibration data and no labels."""
