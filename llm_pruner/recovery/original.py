"""Find the original of a pruned model: its plan, the name of the original, and the tokens kept of it."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..checkpoint.locate import PLAN_FILE, is_adapter, locate
from ..errors import PrunerError, in_one_line
from ..refit.tokens import KeptTokens
from ..selection.plan import PruningPlan


def load_plan(model: str) -> PruningPlan:
    """Load the plan of a pruned model from its folder or its repository on the hub; an empty one for another model."""
    path, _ = locate(model)
    file = Path(path) / PLAN_FILE
    if Path(path).is_dir():
        if is_adapter(path):
            raise PrunerError(f"--model {path} holds an adapter: give the folder that pruning wrote")
        return PruningPlan.load(file) if file.is_file() else PruningPlan()
    try:
        return PruningPlan.load(hf_hub_download(path, PLAN_FILE))
    except RemoteEntryNotFoundError:
        return PruningPlan()
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise PrunerError(
            f"there is no model {model}: no such folder exists, and on the hub no {PLAN_FILE} of that name "
            f"({in_one_line(error, 160)})"
        ) from error


def teacher_name(given: str | None, plan: PruningPlan) -> str:
    """Return the name of the teacher: the given one, or the model that the plan was made for.

    Raises:
        PrunerError: neither is known.
    """
    name = given or str(plan.settings.get("base_model", ""))
    if not name:
        raise PrunerError("no plan names the unpruned model, which is the teacher: give it as --teacher")
    return name


def original_name(given: str | None, plan: PruningPlan, model: str) -> str:
    """Return the name of the model that writes the data: as :func:`teacher_name`, or an unpruned model itself.

    Raises:
        PrunerError: the model is pruned, and its original unknown.
    """
    if given is None and not plan.units and not plan.blocks and "base_model" not in plan.settings:
        return model
    return teacher_name(given, plan)


def kept_tokens(plan: PruningPlan, teacher: int, student: int) -> KeptTokens | None:
    """Return the teacher's tokens that a pruned model kept; None if it has all of them.

    Args:
        plan: plan of the pruned model. Where it was not the first, earlier ones are read from the folders it names.
        teacher: size of the teacher's vocabulary.
        student: size of the pruned model's.

    Raises:
        PrunerError: the vocabularies differ, and no plan leads from one to the other.
    """
    if teacher == student:
        return None
    kept, size = torch.arange(student), student  # ids and number of tokens before the plans read so far
    read: set[Path] = set()
    while True:
        choice = plan.vocabulary
        if choice is not None and len(choice.kept) == size:
            kept, size = choice.kept[kept], choice.size
            if size == teacher:
                return KeptTokens(kept)
        file = Path(str(plan.settings.get("base_model", ""))) / PLAN_FILE
        if file in read or not file.is_file():
            break
        read.add(file)
        plan = PruningPlan.load(file)
    raise PrunerError(
        f"--teacher has {teacher} tokens in its vocabulary and the model {student}, and no plan cuts one to the other: "
        "give the model that llm-pruner vocab cut, or one with the model's tokens"
    )
