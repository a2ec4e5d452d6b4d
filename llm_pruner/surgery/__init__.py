"""Surgery: carrying out a plan."""

from ..heterogeneous import install
from .apply import EquivalenceReport, Place, apply, in_memory, verify
from .biases import with_biases
from .compensate import METHODS, MIN_SAMPLES, CompensationReport, compensate
from .layers import skeleton
from .rescale import rescale_norms
from .target import SHAPE, fitting, layer_counts, nearest, shapes_for, target_config
from .tokens import ids_in
from .uniform import to_uniform, uniform_config

__all__ = [
    "METHODS",
    "MIN_SAMPLES",
    "SHAPE",
    "CompensationReport",
    "EquivalenceReport",
    "Place",
    "apply",
    "compensate",
    "fitting",
    "ids_in",
    "in_memory",
    "install",
    "layer_counts",
    "nearest",
    "rescale_norms",
    "shapes_for",
    "skeleton",
    "target_config",
    "to_uniform",
    "uniform_config",
    "verify",
    "with_biases",
]
