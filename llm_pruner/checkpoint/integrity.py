"""Check a checkpoint by the hashes in its plan."""

from __future__ import annotations

from pathlib import Path

from ..errors import PrunerError
from ..selection.plan import PruningPlan
from .boxes import OtherForm
from .config import load_config, meta_model
from .locate import PLAN_FILE
from .quantized.registry import open_shards
from .shards import Shards, sha256
from .stored import stored_boxes


def check(folder: str | Path, trust_remote_code: bool = False) -> None:
    """Compare a pruned checkpoint with the hashes in its plan, and its weights with its config.

    Raises:
        PrunerError: the plan has no hashes, or a file or tensor differs from what was written; the message names it.
    """
    folder = Path(folder)
    plan = PruningPlan.load(folder / PLAN_FILE, verify=True)
    if not plan.weights:
        raise PrunerError(f"{folder / PLAN_FILE} has no hashes of weights: the folder was not written by this program")
    for name, expected in plan.weights.items():
        if Path(name).name != name:
            raise PrunerError(f"{folder / PLAN_FILE} names {name}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise PrunerError(f"{folder} lacks {name}, which its plan names: the checkpoint is incomplete")
        actual = sha256(folder / name)
        if actual != expected:
            raise PrunerError(
                f"{folder / name} is not the file that was written: its SHA-256 begins {actual[:12]}, the plan says "
                f"{expected[:12]}"
            )
    shards = open_shards(str(folder), folder) or Shards(folder)
    strangers = [file.name for file in shards.files if file.name not in plan.weights]
    if strangers:
        raise PrunerError(f"{folder / strangers[0]} is not part of the checkpoint that the plan describes")
    model = meta_model(load_config(str(folder), trust_remote_code), trust_remote_code)
    own = model.state_dict()
    try:
        boxes = stored_boxes(model, shards)
    except OtherForm:  # the hashes have to do
        return
    for stored, box in boxes.items():
        if box.is_whole and box.shape != tuple(own[box.parameter].shape):
            raise PrunerError(
                f"{stored} in {folder} is {list(box.shape)}; config.json makes it {list(own[box.parameter].shape)}"
            )
