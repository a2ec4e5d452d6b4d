"""Write a modelling file into a checkpoint, so that it loads without llm_pruner."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from transformers import PreTrainedModel

from ..files import read_json
from ..models import per_layer
from ..models.tasks import task_of_config

FILE = "modeling_pruned.py"
TAIL = '''

class {name}(transformers.{name}):
    """The model of this checkpoint; reading it needs this file, and trust_remote_code=True."""
'''


def write_modelling(model: PreTrainedModel, folder: Path) -> None:
    """Write the modelling file, and name it in the folder's config for ``trust_remote_code=True``."""
    name = type(model).__name__
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
