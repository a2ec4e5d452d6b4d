"""Pruning runs: flags, presets, planning, and the files of a run's folder."""
