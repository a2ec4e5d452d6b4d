"""Training of a stage on several processes: all GPUs of a job, on all of its machines, through torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, cast

from ..errors import PrunerError
from ..logs import log

PORT = 29500
TAIL = 2**16  # characters of what was said that the reason of a failure is looked for in


@dataclass(frozen=True)
class Launch:
    """How many processes train: ``processes`` on each of ``nodes`` machines."""

    processes: int = 1
    nodes: int = 1

    @classmethod
    def of(cls, executor: Mapping[str, Any]) -> Launch:
        """By the settings of an executor: one process for each GPU of a job, unless they say otherwise."""
        processes = executor.get("processes", executor.get("gpus", 1))
        return cls(max(1, int(processes)), int(executor.get("nodes", 1)))

    @property
    def several(self) -> bool:
        return self.processes * self.nodes > 1

    def command(self, arguments: Any) -> list[str]:
        """``llm-pruner recover`` with ``arguments``, on all processes; machines meet at the first of the job."""
        out = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        if self.nodes > 1:
            nodes = ["--nodes", str(self.nodes), "--ntasks", str(self.nodes), "--ntasks-per-node", "1"]
            meeting = f"{os.environ.get('SLURMD_NODENAME') or os.uname().nodename}:{PORT}"
            job = os.environ.get("SLURM_JOB_ID", "recover")
            out = ["srun", *nodes, *out, "--nnodes", str(self.nodes)]
            out += ["--rdzv_backend", "c10d", "--rdzv_endpoint", meeting, "--rdzv_id", job]
        else:
            out.append("--standalone")
        return [*out, "-m", "llm_pruner", "recover", *flags(arguments)]

    def run(self, arguments: Any) -> None:
        """Train, and wait for it.

        Raises:
            PrunerError: it failed, or there is no srun.
        """
        command = self.command(arguments)
        log.info("training on %d processes of %d machines each", self.processes, self.nodes)
        try:
            process = subprocess.Popen(command, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise PrunerError(f"training on {self.nodes} machines needs Slurm's srun: {error}") from error
        tail = ""
        with process:
            for chunk in iter(lambda: cast(Any, process.stderr).read1(), b""):  # shown as it comes: it may be for days
                text = chunk.decode(errors="replace")
                sys.stderr.write(text)
                sys.stderr.flush()
                tail = (tail + text)[-TAIL:]
        if process.returncode:
            said = [line for line in tail.splitlines() if line.startswith("error: ")]
            reason = said[0].removeprefix("error: ") if said else "see what it wrote above"
            raise PrunerError(f"training on {self.processes * self.nodes} processes failed: {reason}")


def flags(arguments: Any) -> list[str]:
    """The flags that give these arguments; those left at their defaults are left out."""
    out: list[str] = []
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if value != _default(field):
            out += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return out


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
