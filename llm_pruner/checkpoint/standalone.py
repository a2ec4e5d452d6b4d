"""Write a modelling file into a checkpoint, so that it loads without llm_pruner."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..files import read_json
from ..models import per_layer
from ..models.tasks import task_of_config

FILE = "modeling_pruned.py"
TAIL = '''

class {name}(transformers.{name}):
    """The model of this checkpoint; reading it needs this file, and trust_remote_code=True."""
'''


def check_standalone(name: str | None) -> None:
    """Refuse a modelling file for a class that comes with a checkpoint's own code.

    Raises:
        PrunerError: transformers has no class of this name.
    """
    if name is not None and not hasattr(transformers, name):
        raise PrunerError(
            f"--standalone writes a class of transformers, and {name} comes with code of its own: leave it out, and "
            "import llm_pruner before the checkpoint is loaded"
        )


def write_modelling(model: PreTrainedModel, folder: Path) -> None:
    """Write the modelling file, and name it in the folder's config for ``trust_remote_code=True``.

    Raises:
        PrunerError: as :func:`check_standalone`.
    """
    name = type(model).__name__
    check_standalone(name)
    source = inspect.getsource(per_layer).replace("import torch\n", "import torch\nimport transformers\n", 1)
    (folder / FILE).write_text(source + TAIL.format(name=name), encoding="utf-8")
    file = folder / "config.json"
    config = read_json(file)
    config["auto_map"] = {task_of_config(model.config).auto_class: f"{Path(FILE).stem}.{name}"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def forget_modelling(model: PreTrainedModel) -> None:
    """Remove the modelling file from a loaded model's config, so that saving the model does not name it again."""
    mapping = getattr(model.config, "auto_map", None) or {}
    if any(str(reference).startswith(f"{Path(FILE).stem}.") for reference in mapping.values()):
        del model.config.auto_map
