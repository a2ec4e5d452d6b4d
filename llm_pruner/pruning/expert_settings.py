"""Settings of a pruning run that concern mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.units import KINDS
from ..importance.experts import OF_OUTPUT, OF_ROUTING
from ..selection.per_kind import PerKind
from .arguments import PruneArguments


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """Treatment of experts, beside that of other units.

    Attributes:
        per_token: experts that a router chooses per token; None: as many as in the original.
        protect: keep super experts; None: if the criterion reads what experts return.
    """

    per_token: int | None = None
    protect: bool | None = None

    def protects(self, criterion: str) -> bool:
        """Return True if super experts are kept."""
        return criterion in (*OF_ROUTING, *OF_OUTPUT) if self.protect is None else self.protect


def expert_settings(arguments: PruneArguments) -> ExpertSettings:
    """Return the settings of experts that flags give."""
    return ExpertSettings(per_token=arguments.experts_per_token, protect=arguments.protect_super_experts)


def scopes(arguments: PruneArguments) -> tuple[PerKind, PerKind]:
    """Return in what scope units are ranked and how their scores are normalised; of experts by a flag of their own."""
    scope = "global" if arguments.ranks_globally else "local"
    of_experts = {None: scope, "uniform": "local", "global": "global"}[arguments.experts_per_layer]
    by_kind: PerKind = {kind: scope for kind in KINDS if scope == "global"} | {"experts": of_experts}
    normalized = arguments.experts_per_layer == "global" and arguments.normalize == "none"
    return scope if of_experts == scope else by_kind, {"experts": "mean"} if normalized else arguments.normalize
