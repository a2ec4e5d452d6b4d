"""Recovery: training a pruned model so that it gets its quality back."""

from .arguments import RecoverArguments
from .run import recover
from .trainer import RecoveryTrainer

__all__ = ["RecoverArguments", "RecoveryTrainer", "recover"]
