"""Estimation: what each index of each unit is worth."""
