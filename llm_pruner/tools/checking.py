"""Refuse models, ports and folders that ``chat`` and ``demo`` cannot use, before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

from ..checkpoint.checking import check_language_model, check_model
from ..errors import PrunerError
from ..files import check_folder
from ..inputs import InputCheck
from .arguments import ChatArguments, DemoArguments

DEMO_PARTS = {"pruned", "recovered", "evaluation", "report.html"}  # what a demo writes


def check_chat_inputs(arguments: ChatArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner chat`` cannot use."""
    for name in arguments.models_to_serve():
        with check.flag("model", name):
            check_language_model(check_model(name, arguments.trust_remote_code, tokenizer=True), name, "chat")
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    with check.flag("port", arguments.port), socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((arguments.host, arguments.port))
        except OSError as error:
            raise PrunerError(f"cannot serve on {arguments.host}: {error.strerror}; give another --port") from error


def check_demo_inputs(arguments: DemoArguments, check: InputCheck) -> None:
    """Refuse a folder that ``llm-pruner demo`` cannot write; its own of an earlier demo is written again."""
    folder = Path(arguments.output or Path(arguments.output_root) / "demo")
    with check.flag("output", folder):
        inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if foreign := inside - DEMO_PARTS:
            raise PrunerError(f"the folder {folder} is not ours to replace (it holds {min(foreign)}); give another")
        check_folder(folder / "pruned", "config.json")
