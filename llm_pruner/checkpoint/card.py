"""Write the model card of a pruned checkpoint, and upload it to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..errors import PrunerError, in_one_line
from ..files import CARD
from ..models.per_layer import has_per_layer_widths
from ..models.tasks import TEXT_GENERATION, task_of_config
from ..selection.plan import PruningPlan
from ..version import __version__
from .companions import PROCESSORS
from .engines import serving_lines
from .locate import EMBEDDED, HUB_IDS, locate
from .standalone import FILE
from .unread import UNREAD

PLAIN = """```python
from transformers import AUTO_CLASS, READER_CLASS

model = AUTO_CLASS.from_pretrained(FOLDER_OR_ID)
READER = READER_CLASS.from_pretrained(FOLDER_OR_ID)
```"""
DIFFERING = """Its layers have different widths (`per_layer_config`), so llm-pruner has to be imported first:

```python
import llm_pruner  # pip install llm_pruner
from transformers import AUTO_CLASS, READER_CLASS

model = AUTO_CLASS.from_pretrained(FOLDER_OR_ID)
READER = READER_CLASS.from_pretrained(FOLDER_OR_ID)
```"""
WITHOUT_REFIT = """**Without the refit of the original run** ({refit}): its quality differs from that run's.
`llm-pruner apply --refit` does it again. The plan was made by this command:"""
LEFT_OUT = "**Left out**: {count} tensors of the original's files that its class does not read, such as `{first}`."
STANDALONE = "Without llm_pruner, `trust_remote_code=True` reads it by the `{file}` that it carries."


def write_card(
    config: PreTrainedConfig, folder: Path, plan: PruningPlan, name: str, *, metrics: dict[str, Any] | None = None
) -> None:
    """Write ``README.md``, with the metadata that the hub reads.

    Args:
        name: name of the model.
        metrics: metrics of the run, if it measured any: parameters and perplexities before and after.
    """
    base = str(plan.settings.get("base_model", ""))
    metrics = metrics or {}
    perplexities: dict[str, Any] = metrics.get("after", {}).get("perplexity", {})
    card: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["pruning", "structural-pruning", "llm-pruner"],
        "pipeline_tag": task_of_config(config).pipeline,
    }
    if (base_id := hub_id(base)) is not None:
        card["base_model"] = base_id
    if (license_name := _license(base)) is not None:
        card["license"] = license_name
    if perplexities:
        card["model_name"] = name
        card["eval_results"] = [
            EvalResult("text-generation", text, Path(text).name, "perplexity", round(float(entry["perplexity"]), 4))
            for text, entry in perplexities.items()
        ]
    lines = ["---", ModelCardData(**card).to_yaml(), "---", "", f"# {name}", ""]
    lines += [f"{base_id or base or type(config).__name__}, structurally pruned by llm-pruner {__version__}:", ""]
    lines += [f"* {line}" for line in plan.summary().splitlines()]
    lines += _table(metrics, perplexities)
    left_out = plan.settings.get(UNREAD)
    if isinstance(left_out, list) and left_out:
        lines += ["", LEFT_OUT.format(count=len(left_out), first=left_out[0])]
    if plan.settings.get("without_refit"):
        lines += ["", WITHOUT_REFIT.format(refit=_refit_of(plan))]
    if "command" in plan.settings:
        lines += ["", "```bash", str(plan.settings["command"]), "```"]
    lines += [
        "",
        "## Use",
        "",
        _use(config, folder),
    ]
    if task_of_config(config).name == TEXT_GENERATION:
        lines += ["", "## Serve", "", *serving_lines(config, name)]
    if (folder / FILE).is_file():
        lines += ["", STANDALONE.format(file=FILE)]
    lines += ["", "`pruning_plan.json` says which indices of which weights stayed.", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _use(config: PreTrainedConfig, folder: Path) -> str:
    """Return the lines of Python that load the model, and its processor or tokenizer."""
    reader, reader_class = "tokenizer", "AutoTokenizer"
    if any((folder / name).is_file() for name in PROCESSORS):
        reader, reader_class = "processor", "AutoProcessor"
    lines = DIFFERING if has_per_layer_widths(config) else PLAIN
    lines = lines.replace("READER_CLASS", reader_class).replace("READER", reader)
    return lines.replace("AUTO_CLASS", task_of_config(config).auto_class)


def _refit_of(plan: PruningPlan) -> str:
    """Return the recorded refit of a plan's run in words, such as ``least_squares on wikitext2``."""
    refit = plan.settings.get("refit")
    refit = refit if isinstance(refit, dict) else {}
    compensation = str(refit.get("compensation", "none"))
    training = str(refit.get("training", "none"))
    steps = [one for one in (compensation, training) if one != "none"] + ["rescaled norms"] * bool(
        refit.get("rescale_norms")
    )
    calibration = refit.get("calibration")
    text = calibration.get("dataset", "") if isinstance(calibration, dict) else ""
    return f"{' and '.join(steps)} on {Path(str(text)).name}"


def _table(metrics: dict[str, Any], perplexities: dict[str, Any]) -> list[str]:
    if "parameters_before" not in metrics:
        return []
    rows = ["", "| | before | after |", "|---|---|---|"]
    rows.append(f"| parameters | {metrics['parameters_before']:,} | {metrics['parameters_after']:,} |")
    for text, entry in perplexities.items():
        before = metrics["before"]["perplexity"][text]["perplexity"]
        rows.append(
            f"| perplexity, {Path(text).name} ({entry['tokens']:,} tokens) | {before:.2f} | {entry['perplexity']:.2f} |"
        )
    return rows


def hub_id(name: str) -> str | None:
    """Return a model's id on the hub, for an alias or an id; None for a folder or a file."""
    if name in EMBEDDED:
        return HUB_IDS[name][0]
    if not name or Path(name).exists() or name.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _license(base: str) -> str | None:
    """Return a model's licence, from its card here or on the hub; None if it cannot be found."""
    if base in EMBEDDED:
        return HUB_IDS[base][1]
    try:
        folder = Path(locate(base)[0]) if base else Path()
        source = folder / CARD if (folder / CARD).is_file() and base else hub_id(base)
        license_name = ModelCard.load(source).data.license if source is not None else None
    except Exception:  # no network, no card, or one that nobody can read: the licence stays unsaid
        return None
    return str(license_name) if license_name else None


def check_repository(name: str) -> None:
    """Refuse a name that no repository of the hub can have.

    Raises:
        PrunerError: as above.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PrunerError(f"--push_to_hub {name!r} is not valid: give user/name") from error


def upload(folder: Path, repository: str, token: str | None = None) -> str:
    """Upload a folder to the hub; return its address.

    Raises:
        PrunerError: the repository's name is not valid, or the hub refuses or cannot be reached.
    """
    try:
        validate_repo_id(repository)
        api = HfApi(token=token)
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"llm-pruner {__version__}")
    except Exception as error:  # whatever the network does
        raise PrunerError(
            f"cannot push to {repository} ({in_one_line(error, 300)}); the checkpoint is in {folder}"
        ) from error
    return str(address)
