"""Sweeps run many points of one recipe; points share stages, and a failed or killed one is run again."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.evaluation.tabular import latex
from llm_pruner.flags import parse_flags
from llm_pruner.recipes import run as run_module
from llm_pruner.recipes.arguments import RunArguments
from llm_pruner.recipes.executors import RequeuedCommand, _environment_of, submitit_parameters
from llm_pruner.recipes.recipe import read
from llm_pruner.recipes.results import summarize
from llm_pruner.recipes.run import run_recipe as run
from llm_pruner.recipes.run_point import read_record, run_point
from llm_pruner.recipes.schema import Executor
from llm_pruner.recipes.sweep import points_of
from llm_pruner.recipes.torchrun import Launch, flags_of
from llm_pruner.recovery.arguments import RecoverArguments

SWEEP = """model: {home}/base
output: {out}
evaluate: {{datasets: {home}/text.txt, seq_len: 32, max_windows: 4}}
stages:
  - prune:
      pruner_type: taylor
      num_examples: 8
      calib_seq_len: 16
      preset: paper
      hardware_align: false
sweep:
  grid:
    prune.pruner_type: [taylor, random]
    prune.pruning_ratio: [0.25, 0.5]
seeds: [0, 1]
"""


@pytest.fixture
def sweep(home, home_text, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(home=home, out=tmp_path / "out"))
    return path


def results(folder):
    rows = json.loads((folder / "results.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["point"]]


def test_points_are_all_combinations(sweep):
    points = points_of(read(sweep))
    assert [tuple(p.values.values()) for p in points] == [
        (kind, ratio, seed) for kind in ("taylor", "random") for ratio in (0.25, 0.5) for seed in (0, 1)
    ]
    assert points[5].recipe.stages[0].arguments["pruner_type"] == "random"
    assert points[5].recipe.stages[0].arguments["seed"] == 1
    text = sweep.read_text()
    beside = "  zip:\n    prune.taylor: [vectorize, param_mix]\n    prune.num_examples: [4, 8]\nseeds"
    sweep.write_text(text.replace("seeds", beside))
    points = points_of(read(sweep))
    assert len(points) == 16
    assert {(p.values["prune.taylor"], p.values["prune.num_examples"]) for p in points} == {
        ("vectorize", 4),
        ("param_mix", 8),
    }
    listed = "  points:\n    - {prune.taylor: vectorize}\n    - {prune.pruner_type: l1, prune.grouping_strategy: max}\n"
    sweep.write_text(text.partition("sweep:")[0] + "sweep:\n" + listed)
    points = points_of(read(sweep))
    assert [p.values for p in points] == [
        {"prune.taylor": "vectorize"},
        {"prune.pruner_type": "l1", "prune.grouping_strategy": "max"},
    ]


def test_arguments_of_one_name_in_two_stages_are_other_values(tmp_path):
    recipe = "model: m\noutput: o\nstages: [prune: {name: a}, prune: {name: b}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "sweep: {points: [{a.floor: 0.1}, {b.floor: 0.1}]}\n")
    assert len({point.steps[-1].key for point in points_of(read(tmp_path / "recipe.yaml"))}) == 2


def test_a_sweep_is_a_table(sweep, tmp_path, capsys):
    out = run(RunArguments(recipe=str(sweep)))
    rows = json.loads((out / "results.json").read_text())
    assert [row["point"] for row in rows] == list(range(9))
    assert rows.pop(0)["parameters"] > rows[0]["parameters"]  # the original
    by = {(row["prune.pruner_type"], row["prune.pruning_ratio"], row["seed"]): row for row in rows}
    for kind in ("taylor", "random"):  # a seed draws the calibration samples too
        assert by[kind, 0.5, 0]["perplexity text"] != by[kind, 0.5, 1]["perplexity text"]
    assert by["taylor", 0.5, 0]["parameters"] < by["taylor", 0.25, 0]["parameters"]
    assert len(list((out / "cache").glob("*.safetensors"))) == 2  # scored once a seed for all ratios
    assert not list(out.glob("0*/*.safetensors")) and len(list(out.glob("0*/pruning_plan.json"))) == 8
    assert len(list((out / "evaluations").iterdir())) == 9
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    assert parquet.read_table(out / "results.parquet").num_rows == 9
    table = (out / "results.md").read_text()
    assert table.count("\n") == 7 and table.count("**") == 4 and "| original |" in table and "±" in table
    assert r"\textbf{" in (out / "results.tex").read_text()
    times = {p: p.stat().st_mtime_ns for p in (out / "points").glob("*.json")}
    run(RunArguments(recipe=str(sweep)))
    assert {p: p.stat().st_mtime_ns for p in (out / "points").glob("*.json")} == times


def test_means_and_deviations_over_seeds_are_those_by_hand():
    rows = [
        {"prune.a": a, "seed": s, "parameters": 10, "perplexity x": p, "y acc": q}
        for a, s, p, q in ((1, 0, 10.0, 0.5), (1, 1, 14.0, 0.7), (2, 0, 9.0, 0.1), (2, 1, 9.0, 0.2))
    ]
    summary = summarize(rows, ["prune.a", "seed"])
    assert list(summary.mean["perplexity x"]) == [12.0, 9.0]
    assert list(summary.deviation["perplexity x"]) == [pytest.approx(8**0.5), 0.0]
    head, one, two = summary.cells(("<", ">"))
    assert head == ["a", "seeds", "params", "ppl x", "y acc"]
    assert one[3] == "12 ± 2.828" and two[3] == "<9 ± 0>" and one[4].startswith("<0.6")
    assert r"a & seeds & params" in latex([head, one]) and r"$\pm$" in latex([head, one])


def test_the_original_is_not_one_of_the_seeds():
    rows = [{"point": 0, "perplexity x": 50.0}]
    rows += [{"point": i + 1, "seed": i, "perplexity x": p} for i, p in enumerate((80.0, 82.0, 84.0))]
    assert summarize(rows, ["seed"]).cells(("", "")) == [
        ["run", "seeds", "ppl x"],
        ["original", "", "50"],
        ["", "3", "82 ± 2"],
    ]


def test_every_finished_model_of_a_sweep_has_its_original(tmp_path, monkeypatch):
    recipe = tmp_path / "models.yaml"
    recipe.write_text(
        f"model: a\noutput: {tmp_path}/out\nevaluate: {{datasets: general}}\nstages:\n  - prune: {{preset: paper}}\n"
        "sweep:\n  grid: {model: [a, b, c], prune.pruner_type: [l1, l2]}\n"
    )
    points = points_of(read(recipe))
    loss = {"a": 50.0, "b": 40.0}
    monkeypatch.setattr(run_module, "measure_original", lambda recipe: {"perplexity x": loss[recipe.model]})
    rows = [{"point": p.number, **p.values, "perplexity x": 60.0 + p.number} for p in points[:3]]  # c is not there
    run_module._write_table(points, rows)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["point"], row["model"], row["perplexity x"]) for row in written] == [
        (0, "a", 50.0),
        (0, "b", 40.0),
        (1, "a", 61.0),
        (2, "a", 62.0),
        (3, "b", 63.0),
    ]
    assert summarize(written, ["model", "prune.pruner_type"]).cells(("", ""))[:4] == [
        ["model", "pruner_type", "ppl x"],
        ["a", "original", "50"],
        ["b", "original", "40"],
        ["a", "l1", "61"],
    ]


def test_a_seed_without_a_finite_perplexity_is_not_left_out_of_the_mean():
    values = {(1, 0): 10.0, (1, 1): None, (2, 0): 12.0, (2, 1): 14.0}
    rows = [{"point": 1, "prune.a": a, "seed": seed, "perplexity x": value} for (a, seed), value in values.items()]
    assert summarize(rows, ["prune.a", "seed"]).cells(("<", ">"))[1:] == [["1", "2", ""], ["2", "2", "<13 ± 1.414>"]]


def test_values_of_any_type_can_be_varied():
    rows = [
        {"point": i, "prune.a": value, "perplexity x": 1.0 + i} for i, value in enumerate(([16, 20], "0.9", 1, None), 1)
    ]
    cells = summarize(rows, ["prune.a"]).cells(("<", ">"))
    assert [row[0] for row in cells] == ["a", "[16, 20]", "0.9", "1", ""]


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(sweep, capsys, monkeypatch):
    """A criterion that cannot score: noted with the error, the others done; the same command tries again."""
    (sweep.parent / "failing_criterion.py").write_text(
        "from llm_pruner import PrunerError\n\n\ndef fail(request):\n    raise PrunerError('nothing to score by')\n"
    )
    monkeypatch.chdir(sweep.parent)
    sweep.write_text(sweep.read_text().replace("[taylor, random]", "['failing_criterion:fail', random]"))
    assert main(["run", str(sweep)]) == 2
    error = capsys.readouterr().err
    assert "4 of 8 runs failed" in error
    recipe = read(sweep)
    out = sweep.parent / "out"
    records = [read_record(point) for point in points_of(recipe)]
    errors = [record["error"] for record in records if "error" in record]
    assert len(errors) == 4 and all("nothing to score by" in error for error in errors)
    assert len(results(out)) == 4
    assert main(["run", str(sweep), "--status"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("failed") == 4 and shown.count("done") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("prune.pruner_type: [", "prune.pruner_typ: ["), ":13: prune has no argument 'pruner_typ'; did you mean"),
        (
            ("prune.pruner_type: [", "prune.base_model: ["),
            ":13: prune has no argument 'base_model': the recipe sets it",
        ),
        (("prune.pruner_type: [", "prun.pruner_type: ["), ":13: 'prun.pruner_type' is varied, and no stage is called"),
        (("[0.25, 0.5]", "[0.25, half]"), ":14: 1 'half' is not valid: input should be a valid number"),
        (("[0.25, 0.5]", "[]"), ":14: "),
        (("[taylor, random]", "[taylor, best]"), ":5: criterion 'best' is not valid"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), ":15: seeds"),
        (("[0.25, 0.5]", "[0.25, 0.5]\n    model: [a, 7]"), ":15: model 7 is not valid: give the name of a model"),
        (("seeds: [0, 1]", "executor: cloud"), ":15: kind 'cloud' is not valid: input should be 'local'"),
        (("seeds: [0, 1]", "executor: {kind: local, job: 2}"), ":15: unknown key 'job'; did you mean 'jobs'"),
        (("  grid:", "  zip:\n    prune.taylor: [vectorize]\n    prune.num_examples: [1, 2]\n  grid:"), "one length"),
    ],
)
def test_mistakes_in_sweeps(sweep, change, message, capsys):
    assert change[0] in sweep.read_text()
    sweep.write_text(sweep.read_text().replace(*change, 1))
    assert main(["run", str(sweep)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (sweep.parent / "out").exists()


def test_more_than_200_runs_need_yes(sweep, capsys):
    sweep.write_text(sweep.read_text().replace("seeds: [0, 1]", f"seeds: {list(range(60))}"))
    assert main(["run", str(sweep)]) == 2
    assert "makes 240 runs: add --yes" in capsys.readouterr().err


def test_another_sweep_in_one_folder_is_refused(sweep, capsys):
    short = sweep.read_text().replace("[taylor, random]", "[l2]").replace("[0.25, 0.5]", "[0.5]")
    sweep.write_text(short)
    assert main(["run", str(sweep)]) == 0
    sweep.write_text(short.replace("prune.pruner_type", "prune.grouping_strategy").replace("[l2]", "[max]"))
    assert main(["run", str(sweep)]) == 2
    assert "holds another sweep" in capsys.readouterr().err


def test_slurm_is_refused_on_a_machine_without_it(sweep, capsys):
    assert main(["run", str(sweep), "--executor", "slurm"]) == 2
    assert "there is no Slurm on this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_of_submitit_share_the_points(sweep):
    """submitit's executor for this machine: two jobs that share the points between them."""
    sweep.write_text(sweep.read_text() + "executor: {kind: submitit, jobs: 2, cpus: 1}\n")
    out = run(RunArguments(recipe=str(sweep)))
    assert len(results(out)) == 8
    assert len(list((out / "jobs").glob("*_submitted.pkl"))) >= 2


def test_the_script_for_slurm_holds_the_executor_s_settings(tmp_path):
    settings = Executor(
        kind="slurm",
        jobs=16,
        gpus=2,
        minutes=90,
        memory="64GB",
        partition="a100",
        setup=["module load cuda"],
        parameters={"account": "lab"},
    )
    script = sbatch(settings, tmp_path)
    for line in (
        "#SBATCH --array=0-15%16",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=64GB",
        "#SBATCH --partition=a100",
        "#SBATCH --time=90",
        "#SBATCH --account=lab",
        "#SBATCH --requeue",
        "module load cuda",
        "srun ",
    ):
        assert line in script, line
    several = sbatch(
        settings.model_copy(update={"nodes": 2}), tmp_path
    )  # one worker, which takes the other machine to train
    assert "#SBATCH --nodes=2" in several and "srun " not in several


def sbatch(settings, folder):
    from submitit.slurm import slurm

    given = submitit_parameters(settings)
    return slurm._make_sbatch_string(
        command="python -m llm_pruner run sweep.yaml --worker",
        folder=str(folder),
        job_name=given["name"],
        time=given["timeout_min"],
        nodes=given["nodes"],
        ntasks_per_node=given["tasks_per_node"],
        gpus_per_node=given["gpus_per_node"],
        cpus_per_task=given["cpus_per_task"],
        mem=given["slurm_mem"],
        partition=given["slurm_partition"],
        setup=given["slurm_setup"],
        map_count=16,
        array_parallelism=given["slurm_array_parallelism"],
        additional_parameters=given["slurm_additional_parameters"],
        use_srun=given["slurm_use_srun"],
    )


@pytest.mark.slow
def test_training_on_the_processes_of_a_job(home, home_text, tmp_path, capfd):
    """A recipe's recovery on two processes learns what one learns."""
    losses = {}
    for processes in (1, 2):
        recipe = tmp_path / f"{processes}.yaml"
        recipe.write_text(
            f"""model: {home}/base
output: {tmp_path}/{processes}
executor: {{processes: {processes}}}
stages:
  - prune: {{pruning_ratio: 0.25, num_examples: 4, calib_seq_len: 16, preset: paper, hardware_align: false}}
  - recover: {{data_path: {home}/text.txt, no_instruction: true, max_steps: 3, batch_size: 4, micro_batch_size: 2,
      cutoff_len: 16, val_set_size: 0, lora_dropout: 0.0, logging_steps: 1}}
"""
        )
        assert main(["run", str(recipe)]) == 0, capfd.readouterr().err
        (found,) = (tmp_path / str(processes)).glob("02-recover-*/curves.json")
        losses[processes] = [loss for _, loss in json.loads(found.read_text())["loss"]]
    assert len(losses[1]) == 3 and losses[2] == pytest.approx(losses[1], abs=1e-3)


def test_machines_of_a_job_meet_at_the_first_on_a_port_of_their_own(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4321")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    arguments = RecoverArguments.of(prune_model="model", output_dir="out", merge=True, learning_rate=1e-3)
    command = " ".join(Launch.of(Executor(gpus=8, nodes=2)).command(arguments))
    assert command.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1 ")
    assert "--nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint node7:29821 --rdzv_id 4321" in command
    assert parse_flags(RecoverArguments, flags_of(arguments)) == arguments
    assert not Launch.of(Executor(gpus=0)).several


@pytest.mark.slow
def test_training_that_fails_says_why(home, home_text, tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {home}/pruned\noutput: {tmp_path}/out\nexecutor: {{processes: 2}}\nstages:\n"
        f"  - recover: {{data_path: {home}/text.txt, no_instruction: true, cutoff_len: 32, max_steps: 1,\n"
        f"             val_set_size: 100000}}\n"
    )
    assert main(["run", str(recipe)]) == 2
    assert "training on 2 processes failed:" in (said := capfd.readouterr().err) and "leaves nothing" in said


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_point(sweep, tmp_path, monkeypatch):
    """The process dies at one point, which is recorded as failed; another worker runs the others."""
    recipe = read(sweep)
    third = points_of(recipe)[2]
    code = f"""
import os, sys
from llm_pruner.recipes import run_point
before = run_point.run_and_measure
def die(point):
    if point.number == {third.number}:
        os.kill(os.getpid(), 9)
    return before(point)
run_point.run_and_measure = die
from llm_pruner.cli import main
sys.exit(main(["run", {str(sweep)!r}, "--worker"]))
"""
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "worker_command", lambda arguments: [sys.executable, "-c", code])
        with pytest.raises(lp.PrunerError, match="1 of 8 runs failed"):
            run(RunArguments(recipe=str(sweep)))
    out = tmp_path / "out"
    assert "killed" in read_record(third)["error"] and len(results(out)) == 7
    assert len(results(run(RunArguments(recipe=str(sweep))))) == 8


@pytest.mark.slow
def test_stages_added_after_a_sweep_restore_removed_weights(sweep):
    text = sweep.read_text().replace("[taylor, random]", "[l2]").replace("[0.25, 0.5]", "[0.5]")
    sweep.write_text(text.replace("seeds: [0, 1]", ""))
    run_all(sweep)
    (before,) = (read_record(point)["row"] for point in points_of(read(sweep)))
    more = "  - prune: {name: again, pruner_type: l1, pruning_ratio: 0.25, preset: paper}\nsweep:"
    sweep.write_text(sweep.read_text().replace("sweep:", more))
    for point in points_of(read(sweep)):
        run_point(point)
        assert read_record(point)["row"]["parameters"] < before["parameters"]


def run_all(sweep):
    """Run the points of a sweep in this process, as a worker does."""
    return run(RunArguments(recipe=str(sweep), worker=True))


@pytest.mark.slow
def test_kinds_and_own_criteria_can_be_varied(sweep, monkeypatch):
    (sweep.parent / "own_criterion.py").write_text(
        "from llm_pruner.importance.criteria import CRITERIA\n\n\n"
        "def like_l2(request):\n    return CRITERIA['l2'].function(request)\n"
    )
    monkeypatch.syspath_prepend(sweep.parent)
    text = sweep.read_text().replace("[taylor, random]", "[l2, 'own_criterion:like_l2']").replace("seeds: [0, 1]", "")
    sweep.write_text(text.replace("prune.pruning_ratio: [0.25, 0.5]", "prune.kinds: [[neurons], 'heads,neurons']"))
    run_all(sweep)
    rows = [read_record(point)["row"] for point in points_of(read(sweep))]
    sizes = [row["parameters"] for row in rows]
    assert sizes[0] == sizes[2] > sizes[1] == sizes[3]
    assert rows[0]["perplexity text"] == rows[2]["perplexity text"]


def test_workers_get_their_share_of_the_cores_and_leave_this_process_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert _environment_of(0, 4, Executor(jobs=4))["OMP_NUM_THREADS"] == "2"
    printed = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '3')"
    assert RequeuedCommand([sys.executable, "-c", printed], 3)() == 0
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("visible, expected", [("", ["0,1", "2,3"]), ("4,GPU-5a,6,7", ["4,GPU-5a", "6,7"])])
def test_workers_share_the_gpus_that_this_process_may_use(visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    environments = [_environment_of(slot, 2, Executor(jobs=2, gpus=2)) for slot in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == expected
    assert _environment_of(0, 2, Executor(jobs=2, gpus=0))["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_a_sweep_that_is_killed_twenty_times_ends_with_the_same_table(sweep, tmp_path):
    """SIGKILL to all processes after a random line of the log, 20 times."""
    whole = run(RunArguments(recipe=str(sweep), output=str(tmp_path / "whole")))
    command = [sys.executable, "-u", "-m", "llm_pruner", "run", str(sweep)]
    random.seed(0)
    for _ in range(20):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for_log_lines(tmp_path / "out" / "points", process, random.randint(1, 6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert results(run(RunArguments(recipe=str(sweep)))) == results(whole)


def wait_for_log_lines(folder: Path, process: subprocess.Popen, count: int) -> None:
    """Return when the logs of a sweep's points have grown by ``count`` lines, or the process has ended."""
    before = count_lines(folder)
    while process.poll() is None and count_lines(folder) < before + count:
        pass


def count_lines(folder: Path) -> int:
    return sum(path.read_text(errors="replace").count("\n") for path in folder.glob("*.log"))
