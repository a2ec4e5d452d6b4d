"""Recipes: stages one after the other, each of which reads what the last one wrote, in one YAML file."""
