"""Rules for ATen operators: how each operator maps the axes of its inputs to those of its outputs.

Each family of operators has a file, each rule is a function.

A rule takes a :class:`llm_pruner.graph.call.Call` and sets the dims of its outputs. An operator with neither a
rule nor the ``pointwise`` tag freezes every axis that enters it, so a missing rule costs prunable axes, never
correctness. To add one, write a function in the file it belongs to and decorate it with its names.
"""

from . import creation, fused, indexing, layout, matmul, pointwise, reduction

__all__ = ["creation", "fused", "indexing", "layout", "matmul", "pointwise", "reduction"]
