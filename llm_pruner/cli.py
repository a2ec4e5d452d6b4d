"""The command ``llm-pruner`` and the scripts at the root: thin doors to the same functions."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from .arguments import (
    ApplyArguments,
    ChatArguments,
    DemoArguments,
    EvaluateArguments,
    InspectArguments,
    PerplexityArguments,
    ReportArguments,
    RunArguments,
    UniformArguments,
    VocabArguments,
    device_of,
)
from .checkpoint import load
from .demo import demo
from .errors import PrunerError
from .files import same, write_text
from .inspect import inspect
from .pruning import PruneArguments, prune
from .recovery import RecoverArguments, recover

T = TypeVar("T")


def parse(arguments_class: type[T], argv: Sequence[str], program: str) -> T:
    """Flags as a dataclass. An unknown flag is refused with the nearest known one."""
    parser = HfArgumentParser(arguments_class, prog=program, description=arguments_class.__doc__, allow_abbrev=False)  # type: ignore[arg-type]
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        raise PrunerError(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return arguments_class(**vars(known))


def run(
    arguments_class: type[T], action: Callable[[T], Any], argv: Sequence[str] | None = None, program: str = ""
) -> int:
    """Parse, run, and turn what the user can mend into one line on stderr and exit code 2."""
    transformers_logging.set_verbosity_error()
    try:
        action(parse(arguments_class, sys.argv[1:] if argv is None else argv, program or Path(sys.argv[0]).name))
    except PrunerError as error:
        return _failed(str(error))
    except MemoryError as error:
        return _failed(_out_of_memory(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(f"{error.filename or 'the system'}: {error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
            traceback.print_exc()
            return 1
        return _failed(_out_of_memory(str(error)))
    return 0


def _failed(why: str) -> int:
    """One line on stderr, below the bars of progress that are open; returns the exit code."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return 2


def _out_of_memory(message: str) -> str:
    """One line: how much was asked for, as far as the allocator says, and what lowers it."""
    found = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", message)
    asked = ""
    if found:
        asked = f" by {found[2] or f'{int(found[1]) / 2**30:.2f} GiB'}"
    where = " on the GPU" if "CUDA" in message else ""
    return (
        f"out of memory{where}{asked}: add --stream, which needs one block of the model at a time, or lower "
        "--num_examples or --calib_seq_len"
    )


def evaluate_perplexity(args: PerplexityArguments) -> None:
    """Print perplexity, and write it to ``--output``."""
    from .data import text
    from .evaluation import perplexity, windows

    if args.batch_size < 0 or args.max_windows < 0:
        raise PrunerError("--batch_size and --max_windows are at least 0")
    content = text(args.dataset, "test")
    device = device_of("device", args.device)
    model, tokenizer = load(args.model, args.dtype, device, args.trust_remote_code, verify=args.verify)
    stride = args.stride or None
    ids = windows(tokenizer, content, args.seq_len, args.max_windows or None, stride)
    result = perplexity(model, ids, args.batch_size or None, stride=stride)
    record = {"model": args.model, "dataset": args.dataset, **asdict(result)}
    print(f"{args.model} on {args.dataset}: perplexity {result.perplexity:.4f} ({result.tokens} tokens)")
    if args.output:
        write_text(Path(args.output), json.dumps(record, indent=1) + "\n")


def chat(args: ChatArguments) -> None:
    """Serve a page to try models on."""
    from .chat import chat as serve

    serve(args)


def apply(args: ApplyArguments) -> None:
    """Carry out a plan on a checkpoint of files."""
    from .checkpoint import apply_to_files, check
    from .selection import PruningPlan

    args.check()
    plan = PruningPlan.load(args.plan, args.verify)
    out = apply_to_files(plan, args.checkpoint, args.out, args.trust_remote_code, args.standalone)
    if args.verify:
        check(out, args.trust_remote_code)
    print(out)


def vocab(args: VocabArguments) -> None:
    """Cut a vocabulary."""
    from .vocabulary.run import vocab as cut

    cut(args)


def to_uniform(args: UniformArguments) -> None:
    """Write a plain checkpoint of one whose layers differ."""
    from .checkpoint import PLAN_FILE, save
    from .selection import PruningPlan
    from .surgery import to_uniform as padded

    args.check()
    if same(args.out, args.checkpoint):
        raise PrunerError(f"{args.out} is the model that is read: give another folder to write to")
    model, tokenizer = load(args.checkpoint, trust_remote_code=args.trust_remote_code)
    plan = Path(args.checkpoint) / PLAN_FILE
    out = save(padded(model), tokenizer, args.out, PruningPlan.load(plan) if plan.is_file() else None)
    print(out)


def report(args: ReportArguments) -> None:
    """Write a page, and say where it is."""
    from .report import report as write

    print(write(args))


def evaluate(args: EvaluateArguments) -> None:
    """Measure models side by side; print one table, and write it in all forms to ``--output``."""
    from rich.console import Console

    from .evaluation import shown, table
    from .evaluation.run import measured, write

    found = measured(args)
    result = table(found)
    console = Console()
    console.print(shown(result.cells()))
    for note in result.notes:
        console.print(note)
    if args.output:
        write(found, result, Path(args.output))


def run_recipe(args: RunArguments) -> None:
    """Run a recipe, or say what it would give."""
    from .recipes import run as go

    go(args)


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "prune": (PruneArguments, prune),
    "recover": (RecoverArguments, recover),
    "evaluate": (EvaluateArguments, evaluate),
    "vocab": (VocabArguments, vocab),
    "apply": (ApplyArguments, apply),
    "to-uniform": (UniformArguments, to_uniform),
    "run": (RunArguments, run_recipe),
    "report": (ReportArguments, report),
    "chat": (ChatArguments, chat),
    "inspect": (InspectArguments, inspect),
    "demo": (DemoArguments, demo),
}
# The flags that a command's first arguments belong to; more of them belong to the last.
POSITIONAL = {
    "inspect": ["--model"],
    "evaluate": ["--models"],
    "chat": ["--models"],
    "report": ["--runs"],
    "run": ["--recipe"],
    "vocab": ["--model"],
    "apply": ["--plan", "--checkpoint", "--out"],
    "to-uniform": ["--checkpoint", "--out"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``llm-pruner`` and ``python -m llm_pruner``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: llm-pruner COMMAND [flags]\n")
        for name, (arguments_class, _) in COMMANDS.items():
            print(f"  {name:<10} {arguments_class.__doc__}")
        print("\nllm-pruner COMMAND --help lists the flags of a command.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from .version import __version__

        print(__version__)
        return 0
    flags, first = POSITIONAL.get(argv[0], []), list(takewhile(lambda a: not a.startswith("-"), argv[1:]))
    if flags:
        named = [part for pair in zip(flags, first, strict=False) for part in pair]
        argv[1 : 1 + len(first)] = named + first[len(flags) :]
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        print(
            f"error: unknown command {argv[0]!r}"
            + (f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(COMMANDS)}"),
            file=sys.stderr,
        )
        return 2
    arguments_class, action = COMMANDS[argv[0]]
    return run(arguments_class, action, argv[1:], f"llm-pruner {argv[0]}")
