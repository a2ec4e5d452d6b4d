"""Executors of sweeps: processes of this machine, or jobs of a cluster.

An executor only starts workers and waits for them. A worker takes points that no other worker holds until none is left.
The output folder alone says what is done and by whom, so any number of workers on any machines share it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PrunerError
from ..logs import log
from ..optional import require
from .schema import Executor

POLL_SECONDS = 0.2
LOG_FOLDER = "jobs"
MAX_JOBS = 256  # of a Slurm array, unless the recipe says otherwise


@dataclass(frozen=True, kw_only=True)
class Work:
    """Processes or jobs that an executor starts.

    Attributes:
        command: command line of a worker.
        points: number of points to run.
        output: folder that the workers share.
        replace_worker: called with the process id of a worker that failed (0: unknown), records the failure of its
            point; returns True if another worker is needed.
    """

    command: Sequence[str]
    points: int
    output: Path
    replace_worker: Callable[[int], bool]


def check_executor(settings: Executor) -> None:
    """Refuse an executor whose package is missing.

    Raises:
        PrunerError: jobs are to go through submitit, which is not installed.
    """
    if settings.kind != "local":
        require("submitit", "slurm", f"the executor {settings.kind} needs")


def run_local_workers(work: Work, settings: Executor) -> None:
    """Run ``jobs`` workers at a time on this machine, each with ``gpus`` GPUs of its own and its share of the cores.

    Raises:
        PrunerError: the machine has too few GPUs.
    """
    jobs = min(settings.jobs or 1, work.points)
    environments = [_environment_of(slot, jobs, settings) for slot in range(jobs)]
    logs = work.output / LOG_FOLDER
    logs.mkdir(parents=True, exist_ok=True)

    def start(slot: int) -> subprocess.Popen[bytes]:
        with (logs / f"worker-{slot}.log").open("ab") as file:
            return subprocess.Popen(work.command, stdout=file, stderr=file, env=environments[slot])

    workers = {slot: start(slot) for slot in range(jobs)}
    try:
        while workers:
            time.sleep(POLL_SECONDS)
            for slot, worker in list(workers.items()):
                code = worker.poll()
                if code is None:
                    continue
                del workers[slot]
                if code and work.replace_worker(worker.pid):
                    log.info("worker %d ended with %d; another one takes over", slot, code)
                    workers[slot] = start(slot)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.wait()


def _environment_of(slot: int, jobs: int, settings: Executor) -> dict[str, str]:
    """Return the environment of one of several workers: its GPUs, and its share of the cores."""
    present = torch.cuda.device_count()
    # This process may see some GPUs of the machine only, under other numbers than the machine's.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(i) for i in range(present)]
    gpus = min(1, present) if settings.gpus is None else settings.gpus
    if settings.gpus is not None and gpus * jobs > present:
        raise PrunerError(f"{jobs} jobs with {gpus} GPUs each need {gpus * jobs}, and there are {present}: lower jobs")
    environment = {"OMP_NUM_THREADS": str(max(1, _usable_cores() // jobs)), **os.environ}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[(slot * gpus + i) % present] for i in range(gpus))
    return environment


def _usable_cores() -> int:
    """Return how many cores this process may run on: a job of a cluster is bound to some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def submit_jobs(work: Work, settings: Executor) -> None:
    """Submit an array of jobs to a cluster through submitit, which requeues jobs that are pre-empted or time out.

    Raises:
        PrunerError: there is no Slurm on this machine.
    """
    executor = _submitit_executor(settings, work.output)
    jobs = min(settings.jobs or work.points, work.points)
    try:
        with executor.batch():
            handles = [executor.submit(RequeuedCommand(list(work.command), settings.cpus)) for _ in range(jobs)]
    except FileNotFoundError as error:
        raise _no_slurm(error) from error
    log.info("submitted %d jobs: %s", jobs, ", ".join(handle.job_id for handle in handles))
    for handle in handles:
        if handle.exception() is not None:
            log.info("job %s failed: its log is in %s", handle.job_id, work.output / LOG_FOLDER)
            work.replace_worker(0)


class RequeuedCommand:
    """A command that runs again from the start when its job is requeued: finished work is in the output folder."""

    def __init__(self, command: list[str], threads: int):
        self.command, self.threads = command, threads

    def __call__(self) -> int:
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
        return subprocess.run(self.command, check=True, env=environment).returncode

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _submitit_executor(settings: Executor, output: Path) -> Any:
    import submitit

    slurm = settings.kind == "slurm"
    try:
        executor = submitit.AutoExecutor(folder=str(output / LOG_FOLDER), cluster="slurm" if slurm else "local")
    except RuntimeError as error:
        raise _no_slurm(error) from error
    executor.update_parameters(**submitit_parameters(settings))
    return executor


def _no_slurm(error: Exception) -> PrunerError:
    return PrunerError(f"there is no Slurm on this machine ({error}): run this where sbatch is, or --executor local")


def submitit_parameters(settings: Executor) -> dict[str, Any]:
    """Return the settings of an executor under submitit's names."""
    parameters: dict[str, Any] = {
        "name": "llm-pruner",
        "timeout_min": settings.minutes,
        "nodes": settings.nodes,
        "tasks_per_node": 1,
        "gpus_per_node": settings.gpus or 0,
        "cpus_per_task": settings.cpus,
    }
    if settings.kind != "slurm":
        return parameters
    slurm = {
        # With several nodes, one worker runs on the first and starts training on all of them.
        "slurm_use_srun": settings.nodes == 1,
        "slurm_array_parallelism": settings.jobs or MAX_JOBS,
        "slurm_additional_parameters": {"requeue": True, "open-mode": "append"} | settings.parameters,
        "slurm_partition": settings.partition,
        "slurm_mem": settings.memory,
        "slurm_setup": settings.setup,
    }
    return parameters | {name: value for name, value in slurm.items() if value is not None}


EXECUTORS: dict[str, Callable[[Work, Executor], None]] = {
    "local": run_local_workers,
    "slurm": submit_jobs,
    "submitit": submit_jobs,
}


def worker_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of a job that runs a recipe with these arguments."""
    return [sys.executable, "-m", "llm_pruner", "run", *arguments]
