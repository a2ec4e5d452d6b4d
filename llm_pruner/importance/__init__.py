"""Estimation: the importance of each index of each unit."""
