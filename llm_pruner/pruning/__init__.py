"""Pruning as a run: arguments, presets, planning, and what the run's folder holds."""
