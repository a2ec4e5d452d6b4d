"""Faults of the environment: killed processes, full disks, little memory, two writers. No half checkpoint stays."""

import gc
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.commands import FEW, RECIPE, Case, Forks, cases, rubbish, whole
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llm_pruner as lp
from llm_pruner.cli import main

COMMANDS = ("prune", "apply", "to-uniform", "vocab", "recover", "run", "export")
LONG = ("lora", "blocks", "search")  # runs of prune that go on with what a killed one had done


def some(*quick):
    """All commands, of which only some are tested by default: they write their folders by the same few functions."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def case(request, home, home_text, tmp_path) -> Case:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(home=home))
    return cases(home, recipe)[request.param]


def kill(forks, case, folder, kills, seed):
    """Kill a command at so many random moments; what is there must be whole, and what is finished the same.

    Commands keep all that they have done.
    """
    reference = folder / "reference"
    reference.mkdir()
    code, said, seconds = forks.run(reference, case.argv)
    assert code == 0, said
    expected = whole(reference, case)
    assert None not in expected.values()
    moments, done, finished = random.Random(seed), 0, 0
    work = folder / "work"
    work.mkdir()
    while done < kills:
        code, said, _ = forks.run(work, case.argv, {"INTERVAL": 0}, kill_after=moments.uniform(0, 1.05 * seconds))
        done += code == -9
        assert code in (0, -9), said
        for pattern, found in whole(work, case).items():
            assert found in (None, expected[pattern]), f"kill {done}: {pattern} is neither whole nor absent"
        if code == 0 or done % 5 == 0 or done == kills:  # the same command finishes, and clears away what is left
            code, said, _ = forks.run(work, case.argv)
            finished += 1
            assert code == 0, said
            assert whole(work, case) == expected
            assert rubbish(work) == []
            shutil.rmtree(work)
            work.mkdir()
    return done, finished


@pytest.mark.parametrize("case", some("apply", "recover"), indirect=True)
@pytest.mark.slow
def test_killed_at_some_moments(case, forks, tmp_path):
    kill(forks, case, tmp_path, 3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMANDS + LONG, indirect=True)
def test_killed_at_many_moments(case, forks, tmp_path, request):
    """50 of every command."""
    start = time.perf_counter()
    done, finished = kill(forks, case, tmp_path, 50, seed=2)
    print(f"{request.node.callspec.id}: {done} kills, {finished} times finished, {time.perf_counter() - start:.0f} s")


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refused(forks, case, folder, limits, *signs, home=None):
    """The command ends with one line that says what is wrong, leaves nothing, and its inputs as they were."""
    before = hashes(home)
    code, said, _ = forks.run(folder, case.argv, limits)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert any(sign in errors[0] for sign in signs), errors
    assert [found for found in whole(folder, case).values() if found] == [] and rubbish(folder) == []
    assert hashes(home) == before


@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_a_file_that_cannot_grow(case, forks, home, tmp_path):
    """As on a full disk: the system refuses to write more than so much."""
    refused(forks, case, tmp_path, {"RLIMIT_FSIZE": 20_000}, "cannot write", "disk", "File too large", home=home)
    assert forks.run(tmp_path, case.argv)[0] == 0


@pytest.mark.parametrize("options", ["size=64k", "ro"])
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_a_disk_that_is_full_or_read_only(case, options, forks, home, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        refused(forks, case, disk, {}, "cannot write", home=home)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_a_folder_that_cannot_be_written(case, forks, home, tmp_path):
    (tmp_path / "out").write_text("a file, where a folder is to be")
    code, said, _ = forks.run(tmp_path, case.argv)
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said, said
    assert (tmp_path / "out").read_text().startswith("a file")


@pytest.fixture(scope="module")
def large(home, tmp_path_factory):
    """A model of 100 MB, with the tiny one's tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.from_pretrained(home / "base")
    config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers = 512, 128, 2048, 6
    lp.save(AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(home / "base"), folder / "base")
    return folder


@pytest.mark.parametrize("more", [20, 60, 120, 180])
def test_too_little_memory(more, forks, large, home, home_text, tmp_path):
    """With any memory limit, the run finishes or ends in one line that says what to do."""
    argv = ["prune", "--base_model", large / "base", "--pruning_ratio", 0.5, "--num_examples", 16, "--save_model"]
    argv += ["--calib_dataset", home_text, "--eval_datasets", "", "--output_root", "out", "--compensate", "none"]
    case = Case([*argv, "--save_ckpt_log_name", "run", "--calib_seq_len", 64], ["out/run"])
    refused(forks, case, tmp_path, {"RLIMIT_AS": more << 20}, "memory", home=large)


@pytest.mark.parametrize("case", ["prune", "recover", pytest.param("run", marks=pytest.mark.slow)], indirect=True)
def test_a_clock_that_jumps(case, forks, tmp_path):
    for name, limits in (("steady", {}), ("jumping", {"CLOCK": 3})):
        (tmp_path / name).mkdir()
        code, said, _ = forks.run(tmp_path / name, case.argv, limits)
        assert code == 0, said
    assert whole(tmp_path / "steady", case) == whole(tmp_path / "jumping", case)


@pytest.mark.parametrize("case", some("apply"), indirect=True)
@pytest.mark.slow
def test_two_at_one_folder(case, forks, tmp_path):
    """Started at once, again and again: one waits or is refused, and what is there in the end is whole."""
    (tmp_path / "reference").mkdir()
    assert forks.run(tmp_path / "reference", case.argv)[0] == 0
    other, ended = Forks(), []
    try:
        for _ in range(3):
            (tmp_path / "work").mkdir()

            def go(server, log):
                ended.append(server.run(tmp_path / "work", case.argv, log=log))

            threads = [threading.Thread(target=go, args=one) for one in ((forks, "1.txt"), (other, "2.txt"))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert whole(tmp_path / "work", case) == whole(tmp_path / "reference", case), ended[-2:]
            assert rubbish(tmp_path / "work") == []
            shutil.rmtree(tmp_path / "work")
    finally:
        other.close()
    for code, said, _ in ended:
        assert code == 0 or "another process" in said, said
    assert sum(code == 0 for code, _, _ in ended) >= 3


@pytest.mark.slow
def test_two_at_one_score_cache(forks, home, home_text, tmp_path):
    """Both score, or one uses what the other found; each has the plan that it would have alone."""
    text = ["--calib_dataset", home_text, "--eval_datasets", "", "--output_root", "out", "--save_ckpt_log_name"]
    argv = ["prune", "--base_model", home / "base", *FEW, "--pruning_ratio", 0.5, *text]
    (tmp_path / "work").mkdir()
    assert forks.run(tmp_path / "work", [*argv, "alone"])[0] == 0
    other, ended = Forks(), []
    try:
        for turn in range(3):
            cache = ["--score_cache", f"cache{turn}"]

            def go(server, name, cache=cache):
                ended.append(server.run(tmp_path / "work", [*argv, name, *cache], log=f"{name}.txt"))

            names = (f"a{turn}", f"b{turn}")
            threads = [threading.Thread(target=go, args=x) for x in zip((forks, other), names, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [p.suffix for p in (tmp_path / "work" / f"cache{turn}").iterdir()] == [".safetensors"]
    finally:
        other.close()
    assert all(code == 0 for code, _, _ in ended), ended
    plans = [lp.PruningPlan.load(file) for file in sorted(tmp_path.glob("work/out/*/pruning_plan.json"))]
    kept = [{name: choice.kept.tolist() for name, choice in plan.units.items()} for plan in plans]
    assert len(kept) == 7 and all(one == kept[0] for one in kept)


HARMS = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "missing": lambda p: p.unlink(),
    "other": lambda p: p.write_bytes(b"\xff\xfe\x00 no such thing"),
    "list": lambda p: p.write_bytes(b"[]"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "pruning_plan.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_input(file, harm, home, tmp_path, capsys):
    """Damaged input is refused in one line, and nothing is written."""
    shutil.copytree(home / "pruned", tmp_path / "model")
    HARMS[harm](tmp_path / "model" / file)
    before = hashes(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    commands = {
        "pruning_plan.json": ["apply", f"{model}/pruning_plan.json", str(home / "base"), out],
        "tokenizer.json": ["vocab", model, "--corpus", "python-docs", "--keep", "0.5", "--output_dir", out],
    }
    few = ["--num_examples", "4", "--calib_seq_len", "16", "--eval_datasets", "", "--save_model", "--output_root", out]
    argv = commands.get(file, ["prune", "--base_model", model, *few])
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said, said
    assert hashes(tmp_path / "model") == before and not list(tmp_path.glob("out/*"))


def test_a_flipped_bit_is_found(home, tmp_path, capsys):
    """Any bit of the weights, where it is asked for: safetensors alone would not tell."""
    folder = shutil.copytree(home / "pruned", tmp_path / "model")
    assert main(["evaluate", str(folder), "--datasets", "", "--verify"]) == 0
    capsys.readouterr()
    content = bytearray((folder / "model.safetensors").read_bytes())
    flips = random.Random(5)
    for _ in range(3):
        changed = bytearray(content)
        changed[flips.randrange(len(content))] ^= 1 << 4
        (folder / "model.safetensors").write_bytes(changed)
        assert main(["evaluate", str(folder), "--datasets", "", "--verify"]) == 2
        assert "is not the file that was written" in capsys.readouterr().err


def held() -> tuple[int, int, int]:
    """Memory in bytes, open files, threads of this process."""
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return memory, len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


CYCLES = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_faults
test_faults.cycles(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
EVERY_COMMAND = (*COMMANDS, *LONG, "evaluate", "inspect", "report")


def cycles(home, folder, name, count):
    """Repeat a command in one process; print what the process holds after a fifth of the cycles, and in the end.

    Each cycle has a thread of its own: tokenizers 0.23 keeps about 0.5 MB for every tokenizer that has encoded a text,
    as long as the thread lives in which it did.
    """
    os.chdir(folder)
    Path("recipe.yaml").write_text(RECIPE.format(home=home))
    commands = {name: case.argv for name, case in cases(home, Path("recipe.yaml")).items()}
    texts = ["--datasets", home / "text.txt", "--seq_len", 16, "--max_windows", 4, "--samples"]
    commands["evaluate"] = ["evaluate", home / "base", home / "pruned", *texts, "--tokens", 16, "--new_tokens", 4]
    commands["inspect"] = ["inspect", home / "base", "--verify"]
    commands["report"] = ["report", "finished/run", "--figures", "out"]
    if name == "report":
        assert main([*map(str, commands["prune"]), "--output_root", "finished"]) == 0
    for i in range(count):
        ratio = ["--pruning_ratio", 0.2 + 0.1 * (i % 5)] if name == "prune" else []
        in_a_thread(main, list(map(str, [*commands[name], *ratio])))
        shutil.rmtree("out", ignore_errors=True)
        for file in ("counts.json", "report.html"):
            Path(file).unlink(missing_ok=True)
        if i + 1 in (count // 5, count):
            print("held", *held(), flush=True)


def in_a_thread(run, argv):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(argv)))
    thread.start()
    thread.join()
    assert done == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_many_cycles_hold_no_more(name, home, home_text, tmp_path):
    """200 cycles of a command in one process: memory grows by no more than a twentieth."""
    argv = [sys.executable, "-c", CYCLES, str(Path(__file__).parent), str(home), str(tmp_path), name, "200"]
    said = subprocess.run(argv, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert said.returncode == 0, said.stderr[-2000:]
    before, after = ([int(n) for n in x.split()[1:]] for x in said.stdout.splitlines() if x.startswith("held"))
    growth = after[0] / before[0]
    print(f"{name}: memory after 200 cycles: {growth:.4f} of that after 40; files, threads: {before[1:]}, {after[1:]}")
    assert after[1:] == before[1:]
    assert growth <= 1.05


def test_a_recipe_is_data(tmp_path, capsys):
    """A tag that would make an object, or run a command, makes nothing."""
    for bad in ("!!python/object/apply:os.system ['touch made']", "!!python/name:os.system", "!<tag:x> y"):
        (tmp_path / "recipe.yaml").write_text(f"model: {bad}\noutput: {tmp_path}/out\nstages: [prune]\n")
        assert main(["run", str(tmp_path / "recipe.yaml")]) == 2
        assert "recipe.yaml:1" in capsys.readouterr().err
    assert not Path("made").exists()


def test_the_lock_file_is_of_these_requirements():
    """requirements.lock pins what requirements.txt does, with hashes (``make lock`` writes it)."""
    here = Path(__file__).parents[1]
    pins = (here / "requirements.txt").read_text().splitlines()
    wanted = {line.split(";")[0].strip() for line in pins if "==" in line}
    lock = (here / "requirements.lock").read_text()
    locked = {line.split()[0] for line in lock.splitlines() if "==" in line and not line.startswith((" ", "#"))}
    assert not wanted - locked
    assert lock.count("--hash=sha256:") > len(locked) > 100
