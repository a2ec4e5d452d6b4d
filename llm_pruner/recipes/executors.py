"""Where the runs of a sweep take place: processes of this machine, or jobs of a cluster.

An executor does one thing: it starts workers, which take points nobody is at until there are none, and waits. What is
done and by whom is in the output folder alone, so any number of workers, here or elsewhere, share it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import PrunerError
from ..logs import log

POLL = 0.2  # seconds
LOG_FOLDER = "jobs"


def local(
    command: Sequence[str], settings: dict[str, Any], points: int, output: Path, died: Callable[[int], bool]
) -> None:
    """Processes on this machine: ``jobs`` at a time, each with ``gpus`` GPUs of its own.

    Args:
        died: told the id of a worker that was killed, notes that its point has failed; says whether work is left.
    """
    jobs = min(int(settings.get("jobs", 1)), points)
    share = int(settings.get("gpus", 1 if torch.cuda.is_available() else 0))
    there = torch.cuda.device_count()
    if share * jobs > there and "gpus" in settings:
        raise PrunerError(f"{jobs} jobs with {share} GPUs each need {share * jobs}, and there are {there}: lower jobs")
    logs = output / LOG_FOLDER
    logs.mkdir(parents=True, exist_ok=True)

    def start(slot: int) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if share and there:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str((slot * share + i) % there) for i in range(share))
        with (logs / f"worker-{slot}.log").open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    workers = {slot: start(slot) for slot in range(jobs)}
    try:
        while workers:
            time.sleep(POLL)
            for slot, worker in list(workers.items()):
                code = worker.poll()
                if code is None:
                    continue
                del workers[slot]
                if code and died(worker.pid):
                    log.info("worker %d ended with %d; another goes on", slot, code)
                    workers[slot] = start(slot)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.wait()


def submitted(
    command: Sequence[str], settings: dict[str, Any], points: int, output: Path, died: Callable[[int], bool]
) -> None:
    """Jobs of a cluster, through submitit: an array of ``jobs`` of them, put back in the queue when they are pre-empted
    or run out of time."""
    executor = submitit_executor(settings, output)
    jobs = min(int(settings.get("jobs", points)), points)
    try:
        with executor.batch():
            handles = [executor.submit(Again(list(command))) for _ in range(jobs)]
    except FileNotFoundError as error:
        raise PrunerError(f"there is no Slurm here ({error}): run this where sbatch is, or --executor local") from error
    log.info("submitted %d jobs: %s", jobs, ", ".join(handle.job_id for handle in handles))
    for handle in handles:
        if handle.exception() is not None:
            log.info("job %s failed: its log is in %s", handle.job_id, output / LOG_FOLDER)
            died(0)


class Again:
    """A command that is simply run again when its job is requeued: what is done is in the output folder."""

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self) -> int:
        return subprocess.run(self.command, check=True).returncode

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submitit_executor(settings: dict[str, Any], output: Path) -> Any:
    """submitit's executor for Slurm, or for this machine (``kind: submitit``) to try things out.

    Raises:
        PrunerError: submitit is not installed, or there is no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise PrunerError("this executor needs submitit: pip install submitit") from error
    slurm = settings["kind"] == "slurm"
    folder = output / LOG_FOLDER
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster="slurm" if slurm else "local")
    except RuntimeError as error:
        raise PrunerError(f"there is no Slurm here ({error}): run this where sbatch is, or --executor local") from error
    executor.update_parameters(**parameters(settings, slurm))
    return executor


def parameters(settings: dict[str, Any], slurm: bool) -> dict[str, Any]:
    """What submitit is told, by its names."""
    nodes = int(settings.get("nodes", 1))
    out: dict[str, Any] = {
        "name": "llm-pruner",
        "timeout_min": int(settings.get("minutes", 24 * 60)),
        "nodes": nodes,
        "tasks_per_node": 1,
        "gpus_per_node": int(settings.get("gpus", 0)),
        "cpus_per_task": int(settings.get("cpus", 8)),
    }
    if slurm:
        out["slurm_use_srun"] = nodes == 1  # else one worker on the first machine, which takes the others to train
        out["slurm_array_parallelism"] = int(settings.get("jobs", 256))
        out["slurm_additional_parameters"] = {"requeue": True, "open-mode": "append"} | settings.get("parameters", {})
        for name, key in (("partition", "slurm_partition"), ("memory", "slurm_mem"), ("setup", "slurm_setup")):
            if name in settings:
                out[key] = settings[name]
    return out


EXECUTORS: dict[str, Callable[..., None]] = {"local": local, "slurm": submitted, "submitit": submitted}


def run_command(arguments: Sequence[str], *more: str) -> list[str]:
    """What a job runs."""
    return [sys.executable, "-m", "llm_pruner", "run", *arguments, *more]
