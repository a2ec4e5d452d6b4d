"""The command ``llm-pruner`` and the scripts at the root: argv -> command -> exit code."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from .commands import COMMANDS, SCRIPTS, Command
from .errors import PrunerError, in_one_line, is_panic
from .flags import canonical_flags, parse_flags
from .inputs import InputCheck
from .progress import showing
from .version import __version__

USAGE = """usage: llm-pruner COMMAND [flags]

{commands}

llm-pruner COMMAND --help lists the flags of a command."""
# Ways to need less memory, for commands that have the flag; the first that fits is named.
LESS_MEMORY = {
    "stream": "add --stream, which needs one block of the model at a time, or lower --num_examples or --calib_seq_len",
    "micro_batch_size": "lower --micro_batch_size or --cutoff_len, or add --gradient_checkpointing",
    "seq_len": "give --dtype bfloat16, or lower --batch_size or --seq_len",
    "dtype": "give --dtype bfloat16",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``llm-pruner``; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<11}{c.summary}" for name, c in COMMANDS.items())))
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}; {hint}")
    return run_command(COMMANDS[name], rest, f"llm-pruner {name}")


def run_script(name: str) -> int:
    """Run a script of the repository, such as ``hf_prune.py``; return the exit code."""
    return run_command(SCRIPTS[name], sys.argv[1:], name)


def run_command(command: Command, argv: Sequence[str], program: str) -> int:
    """Parse and run a command; print errors that the user can mend as one line on stderr, with exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _print_any_letter()
    try:
        arguments: Any = parse_flags(
            command.arguments_class,
            _name_positionals(command, argv),
            program,
            command.summary,
            positionals=() if program in SCRIPTS else command.positionals,
        )
        with showing(quiet=getattr(arguments, "quiet", False)), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # of libraries, which a user of a command cannot mend
            command.check_arguments(arguments)
            command.check_inputs(arguments, InputCheck())
            command.run(arguments)
    except PrunerError as error:
        return _fail(_without_unwritten_flag(command, argv, str(error)))
    except MemoryError as error:
        return _fail(_explain_out_of_memory(command, str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except RuntimeError as error:
        if "home directory" in str(error):  # of pathlib
            return _fail("a path begins with ~ and a user that this machine does not have: write the whole path")
        if not re.search("out of memory|can(no|')t allocate memory", str(error).lower()):
            traceback.print_exc()
            return 1
        return _fail(_explain_out_of_memory(command, str(error)))
    except BaseException as error:
        if not is_panic(error):
            raise
        return _fail(f"the tokenizer cannot read the text, or its files are damaged: {in_one_line(error)}")
    return 0


def _print_any_letter() -> None:
    """Write ? for letters that the terminal's encoding lacks, as Windows' and LC_ALL=C do, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _name_positionals(command: Command, argv: Sequence[str]) -> list[str]:
    """Put flags before the leading words of a command line; further words belong to the last flag."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not command.positionals:
        return list(argv)
    named = [part for name, word in zip(command.positionals, words, strict=False) for part in (f"--{name}", word)]
    return [*named, *words[len(command.positionals) :], *argv[len(words) :]]


def _without_unwritten_flag(command: Command, argv: Sequence[str], message: str) -> str:
    """Remove from an error the flag of a value that the user wrote as a leading word, and a repetition of the value."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    for i, word in enumerate(words if command.positionals else ()):
        flag = f"--{command.positionals[min(i, len(command.positionals) - 1)]} {word}"
        if message == flag or message.startswith((f"{flag}:", f"{flag} ")):
            reason = message.removeprefix(f"{flag}: ")
            named = reason.startswith(f"{word} ") or f" {word}: " in reason or reason.endswith(f" {word}")
            return reason if named else message.removeprefix(flag.removesuffix(word))
    return message


def _fail(message: str) -> int:
    """Print an error as one line on stderr, below open progress bars; return the exit code."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _explain_out_of_memory(command: Command, message: str) -> str:
    """Say how much memory was asked for, where the allocator tells, and which flags of the command lower it."""
    match = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", message)
    amount = f" by {match[2] or f'{int(match[1]) / 2**30:.2f} GiB'}" if match else ""
    where = " on the GPU" if "CUDA" in message else ""
    flags = canonical_flags(command.arguments_class)
    advice = next((text for flag, text in LESS_MEMORY.items() if flag in flags), "use a machine that has more")
    return f"out of memory{where}{amount}: {advice}"
