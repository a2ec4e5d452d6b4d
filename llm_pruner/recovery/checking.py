"""Refuse models, data and folders that a recovery cannot use, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from ..checkpoint.checking import check_language_model, check_later_language_model, check_model
from ..checkpoint.config import meta_model
from ..checkpoint.locate import folder_of
from ..corpora import check_text
from ..errors import PrunerError
from ..evaluation.perplexity import check_length
from ..files import check_file
from ..inputs import InputCheck
from .arguments import DEFAULT_OUTPUT, RecoverArguments
from .original import load_plan, original_name, teacher_name
from .prompts import prompt_template
from .rows import check_rows
from .run import LOG_FILE, check_output, find_checkpoint


def check_recovery_inputs(arguments: RecoverArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner recover`` cannot use."""
    model, original = folder_of(arguments.model), ""
    if check.skips(model):
        check_later_language_model(check, "recover", arguments.trust_remote_code)
    else:
        with check.flag("model", model):
            plan = load_plan(model)
            original = str(plan.settings.get("base_model", ""))
            if arguments.distills and arguments.teacher in (None, "auto"):
                teacher_name(None, plan)
            elif arguments.self_data:
                original = original_name(arguments.teacher, plan, model)
            _check_config(check_model(model, arguments.trust_remote_code, tokenizer=True), arguments, check)
    _check_teacher(arguments, original, check)
    for source in arguments.data_path:
        with check.flag("data_path", source):
            check_rows(source, arguments.streaming)
    for name in arguments.extra_val_dataset:
        with check.flag("extra_val_dataset", name):
            check_text(name, "test")
    if not arguments.no_instruction:
        with check.flag("prompt_template_name", arguments.prompt_template_name):
            prompt_template(arguments.prompt_template_name)
    folder = Path(arguments.output)
    finds_a_free_folder = arguments.output == DEFAULT_OUTPUT and arguments.resume_from_checkpoint is None
    if not check.skips(arguments.output) and not finds_a_free_folder:
        find_checkpoint(folder, arguments.resume_from_checkpoint)
    with check.flag("output", arguments.output):
        check_output(folder, model)
        check_file(folder / LOG_FILE)
    if arguments.teacher_cache:
        with check.flag("teacher_cache", arguments.teacher_cache):
            check_file(Path(arguments.teacher_cache) / "cache")


def _check_config(config: PreTrainedConfig, arguments: RecoverArguments, check: InputCheck) -> None:
    """Refuse examples and layers to adapt that the model cannot have."""
    check_language_model(config, arguments.model, "recover")
    if arguments.objective != "causal" and not config.is_encoder_decoder:
        raise PrunerError(
            f"--objective {arguments.objective} is for encoder-decoders, and this is a decoder: give causal"
        )
    if arguments.self_data and config.is_encoder_decoder:
        raise PrunerError("--self_data is for decoders, and this is an encoder-decoder: leave it out")
    model = meta_model(config, arguments.trust_remote_code)
    if arguments.cutoff_len is not None:
        with check.flag("cutoff_len", arguments.cutoff_len):
            check_length(model, arguments.cutoff_len)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in arguments.lora_target_modules or ():
        if name not in modules:
            known = ", ".join(sorted(one for one in modules if one.endswith(("proj", "fc1", "fc2"))))
            raise PrunerError(f"--lora_target_modules {name} is in no layer of the model; it has {known or 'others'}")


def _check_teacher(arguments: RecoverArguments, original: str, check: InputCheck) -> None:
    """Refuse a teacher that does not exist; ``original`` is the model that the plan was made for, if known."""
    if not arguments.distills and not arguments.self_data:
        return
    name = original if arguments.teacher in (None, "auto") else str(arguments.teacher)
    if name and not check.skips(name):
        with check.flag("teacher", name):
            check_model(name, arguments.trust_remote_code)
