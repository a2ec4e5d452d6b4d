"""Train a stage on several processes: all GPUs of a job, on all of its machines, through torchrun."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from ..errors import PrunerError
from ..flags import default_of
from ..logs import is_quiet, log
from .schema import Executor

FIRST_PORT, PORTS = 29500, 1000
TAIL_LENGTH = 2**16  # characters of the output in which the reason of a failure is looked for


@dataclass(frozen=True)
class Launch:
    """Processes that train: ``processes`` on each of ``nodes`` machines."""

    processes: int = 1
    nodes: int = 1

    @classmethod
    def of(cls, executor: Executor) -> Launch:
        """Return one process for each GPU of a job, unless the executor's settings say otherwise."""
        return cls(executor.processes or max(1, executor.gpus or 1), executor.nodes)

    @property
    def several(self) -> bool:
        return self.processes * self.nodes > 1

    def command(self, arguments: Any) -> list[str]:
        """Return the command line of ``llm-pruner recover`` with ``arguments`` on all processes."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        recover = ["-m", "llm_pruner", "recover", *flags_of(arguments)]
        if self.nodes == 1:
            return [*torchrun, "--standalone", *recover]
        nodes = str(self.nodes)
        srun = ["srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1"]
        return [*srun, *torchrun, "--nnodes", nodes, *_rendezvous(), *recover]

    def run(self, arguments: Any) -> None:
        """Train, and wait for the end; pass on what the processes write.

        Raises:
            PrunerError: training failed, or there is no srun.
        """
        log.info("training on %d processes of %d machines each", self.processes, self.nodes)
        try:
            command = self.command(replace(arguments, quiet=is_quiet()))
            process = subprocess.Popen(command, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise PrunerError(f"training on {self.nodes} machines needs Slurm's srun: {error}") from error
        tail = _pass_on(process)
        if process.returncode:
            errors = [line for line in tail.splitlines() if line.startswith("error: ")]
            reason = errors[0].removeprefix("error: ") if errors else "see its output above"
            raise PrunerError(f"training on {self.processes * self.nodes} processes failed: {reason}")


def _rendezvous() -> list[str]:
    """Return the flags by which machines meet at the first one of the job.

    Every machine has to know the port before torchrun starts, so torchrun cannot choose a free one. It follows from the
    job's number, so that jobs that share a machine do not meet each other.
    """
    job = os.environ.get("SLURM_JOB_ID", "0")
    port = FIRST_PORT + (int(job) % PORTS if job.isdecimal() else 0)
    host = os.environ.get("SLURMD_NODENAME") or platform.node()
    return ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{host}:{port}", "--rdzv_id", job]


def _pass_on(process: subprocess.Popen[bytes]) -> str:
    """Write a process's stderr to ours as it comes, which may take days; return the end of it."""
    tail = ""
    with process:
        for chunk in iter(lambda: cast(Any, process.stderr).read1(), b""):
            text = chunk.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-TAIL_LENGTH:]
    return tail


def flags_of(arguments: Any) -> list[str]:
    """Return the flags that give these arguments; those at their defaults are left out."""
    flags: list[str] = []
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if value != default_of(field):
            flags += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return flags
