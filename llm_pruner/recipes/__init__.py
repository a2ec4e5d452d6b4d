"""Recipes: a YAML file of stages, each of which reads the model that the previous stage wrote."""
