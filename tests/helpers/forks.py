"""Commands as children of one process that has imported everything: each takes the time of its work and no more.

Reads requests from stdin, one JSON list a line: a folder to work in, a file for what the command says, limits of the
system by name, and the command's arguments. Writes the child's id, and when it has ended, its exit status.
"""

import json
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

from llm_pruner import unfinished
from llm_pruner.cli import main
from llm_pruner.commands import COMMANDS

for command in COMMANDS.values():  # imported once, for all children
    assert command.run and command.arguments_class


def child(folder: str, log: str, limits: dict[str, int], argv: list[str]) -> int:
    os.setsid()
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin.close()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # Python keeps a module's bytecode even where a limit cut it short
    for name, value in limits.items():
        if name == "CLOCK":
            clock_that_jumps(value)
            continue
        if name == "INTERVAL":  # how often unfinished steps are kept
            unfinished.INTERVAL = unfinished.SHARE = value
            continue
        if name == "THREADS":
            torch.set_num_threads(value)
            continue
        if name == "RLIMIT_AS":  # beyond what is taken already
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (value, value))
    return main(argv)


def clock_that_jumps(seed: int) -> None:
    """Days forward and back, at every look."""
    jumps, real = random.Random(seed), time.time
    time.time = lambda: real() + jumps.uniform(-1e6, 1e6)


for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = child(*request)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
