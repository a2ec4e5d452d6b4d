"""Flags of ``llm-pruner inspect``, ``chat`` and ``demo``, and of ``generate.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checkpoint.locate import base_of, folder_of
from ..choices import DEFAULT_MODEL, Dtype, Kind, Tower
from ..errors import PrunerError
from ..files import same_folder
from ..flags import Arguments, Share, check_at_least, flag


@dataclass(kw_only=True)
class ChatArguments(Arguments):
    """Flags of ``llm-pruner chat``."""

    model: list[str] = flag(
        [], "up to three models: aliases, hub ids, folders (adapters too) or .gguf files", aliases=("models",)
    )
    device: str = flag("auto", "device: auto, cpu, cuda, cuda:1, mps, ...")
    dtype: Dtype = flag("auto", "dtype of the weights")
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")
    host: str = flag("127.0.0.1", "address to serve on; 0.0.0.0 serves everybody who can reach this machine")
    port: int = flag(7860, "port to serve on")
    share_gradio: bool = flag(False, "also serve on a public address through gradio's servers")

    def check(self) -> None:
        """Refuse what :meth:`models_to_serve` refuses."""
        self.models_to_serve()

    def models_to_serve(self) -> list[str]:
        """Return the models to load.

        Raises:
            PrunerError: no model, more than three, or one model twice.
        """
        return self._check(self.model)

    def _check(self, models: list[str]) -> list[str]:
        if len(models) > 3:
            raise PrunerError(f"{len(models)} models given; at most 3")
        if not models or len(set(models)) < len(models):
            raise PrunerError("name one to three different models: llm-pruner chat MODEL [MODEL [MODEL]]")
        if not 0 < self.port < 65536:
            raise PrunerError(f"--port {self.port} is out of range: give 1 to 65535")
        return list(models)


@dataclass(kw_only=True)
class GenerateArguments(ChatArguments):
    """Flags of ``generate.py``."""

    base_model: str = flag(DEFAULT_MODEL, "model of --model_type pretrain")
    model_type: Literal["pretrain", "pruneLLM", "tune_prune_LLM"] = flag("pretrain", "model to serve")
    ckpt: str | None = flag(
        None, "folder of the pruned model for --model_type pruneLLM, or of the adapter's base for tune_prune_LLM"
    )
    lora_ckpt: str | None = flag(None, "folder of the adapter for --model_type tune_prune_LLM")

    def models_to_serve(self) -> list[str]:
        """Return the models to load; without ``--model``, the one that ``--model_type`` names.

        Raises:
            PrunerError: the flag that belongs to ``--model_type`` is missing, or adapter and ``--ckpt`` do not match.
        """
        return self._check(self.model or [self._model_of_type()])

    def _model_of_type(self) -> str:
        """Return the model that ``--model_type`` names."""
        flags = {"pretrain": "base_model", "pruneLLM": "ckpt", "tune_prune_LLM": "lora_ckpt"}
        name = getattr(self, flags[self.model_type])
        if name is None:
            raise PrunerError(f"--model_type {self.model_type} needs --{flags[self.model_type]}")
        folder = folder_of(name)
        if self.model_type == "tune_prune_LLM" and self.ckpt is not None:
            base = base_of(folder)
            if not same_folder(base, folder_of(self.ckpt)):
                raise PrunerError(f"the adapter {folder} was trained on {base}, not on --ckpt {self.ckpt}")
        return folder


@dataclass(kw_only=True)
class InspectArguments(Arguments):
    """Flags of ``llm-pruner inspect``."""

    model: str = flag(
        DEFAULT_MODEL,
        "alias, hub id, folder or .gguf file of a model, config.json (no weights needed), or pruning_plan.json",
    )
    layer: int | None = flag(
        None,
        "show the units of this layer and of the whole model; -1: of all layers (default: 0; for a plan: -1)",
    )
    verify: bool = flag(False, "load the weights and test every unit by permutation; for a plan, check its hash")
    json: bool = flag(False, "print JSON")
    super_experts: str | None = flag(
        None, "load the weights and list super experts, found on this text: general, c4, ... or a file (default: none)"
    )
    trust_remote_code: bool = flag(False, "run modelling code that comes with the checkpoint")
    task: str | None = flag(None, "load the class of this task, such as text-generation, instead of the declared class")
    towers: Tower = flag("language", "parts to show of a model that reads images or sounds and writes text")


@dataclass(kw_only=True)
class DemoArguments(Arguments):
    """Flags of ``llm-pruner demo``."""

    output: str | None = flag(None, "folder of the run (default: OUTPUT_ROOT/demo)")
    output_root: str = flag("prune_log", "parent folder of the run")
    kinds: list[Kind] = flag(["neurons"], "kinds of units to prune")
    target_params: str = flag("0.9", "share of the parameters that stays")
    pruning_ratio: Share | None = flag(None, "share of every unit's indices to remove, instead of --target_params")
    steps: int = flag(8, "training steps of the recovery")

    def check(self) -> None:
        """Refuse a ratio that leaves nothing to compare, and a recovery without steps.

        Raises:
            PrunerError: the ratio is not between 0 and 1, or there are no training steps.
        """
        check_at_least(self, 1, "steps")
        if self.pruning_ratio is not None and not 0 < self.pruning_ratio < 1:
            raise PrunerError(
                f"--pruning_ratio {self.pruning_ratio} is out of range: give a share between 0 and 1 (0.2 or 20%)"
            )
