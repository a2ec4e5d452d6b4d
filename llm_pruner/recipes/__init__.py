"""Recipes: stages one after the other, each of which reads what the last one wrote, in one YAML file."""

from .recipe import Recipe, read
from .run import RunArguments, run

__all__ = ["Recipe", "RunArguments", "read", "run"]
