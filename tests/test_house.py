"""Rules of the house: start-up time, imports, sizes of files and functions, positional parameters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm_pruner as lp
from llm_pruner.choices import (
    CLOSED_FORM,
    TRAINED,
    Aggregation,
    Compensation,
    Dtype,
    Kind,
    LayerCriterion,
    Normalizer,
    Preset,
    Refit,
    TaylorVariant,
)
from llm_pruner.cli import main
from llm_pruner.commands import COMMANDS, SCRIPTS
from llm_pruner.flags import build_parser
from llm_pruner.graph.units import KINDS
from llm_pruner.importance.aggregate import AGGREGATIONS
from llm_pruner.importance.layers import STRATEGIES
from llm_pruner.importance.taylor import VARIANTS
from llm_pruner.provenance import command_line, provenance
from llm_pruner.pruning.presets import PRESETS
from llm_pruner.refit.compensate import METHODS
from llm_pruner.selection.ranking import NORMALIZERS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "llm_pruner").rglob("*.py"))
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in FILES}
FUNCTIONS = [
    (name, node)
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
]
# Packages that a part of the project needs and the rest does without.
OPTIONAL = {
    *("accelerate", "datasets", "gradio", "lm_eval", "matplotlib", "peft", "sentencepiece", "submitit"),
    "PIL",
    *("torch_pruning", "pydoc_data", "pyarrow", "wandb", "vllm", "xllamacpp"),
}


@pytest.mark.parametrize("name", [name for name in TREES if "/importance/" in name or "/refit/" in name])
def test_no_tensor_becomes_float64_before_it_leaves_its_device(name):
    """Apple's GPUs have no float64: ``tensor.double().cpu()`` fails there."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr in ("cpu", "to") and isinstance(node.value, ast.Call):
            inner = node.value.func
            assert not (isinstance(inner, ast.Attribute) and inner.attr == "double"), f"{name}:{node.lineno}"


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["prune", "--help"], ["recover", "--help"]])
def test_help_loads_neither_torch_nor_transformers(argv):
    code = f"""
import sys
from llm_pruner.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
heavy = [name for name in ("torch", "transformers", "numpy", "pandas") if name in sys.modules]
assert not heavy, heavy
"""
    done = in_a_new_process(code)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("first", ["llm_pruner", "transformers.modeling_utils"])
def test_per_layer_configs_are_installed_whichever_is_imported_first(first):
    done = in_a_new_process(
        f"import {first}, llm_pruner; from transformers import PreTrainedModel; "
        "assert PreTrainedModel._llm_pruner_installed"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_there():
    assert all(getattr(lp, name) is not None for name in lp.__all__)
    assert set(lp.__all__) <= set(dir(lp))
    with pytest.raises(AttributeError, match="no attribute 'pruen'"):
        lp.pruen  # noqa: B018


@pytest.mark.parametrize(
    ("choices", "registry"),
    [
        (Kind, KINDS),
        (Dtype, ("auto", "float32", "bfloat16", "float16")),
        (TaylorVariant, VARIANTS),
        (Aggregation, (*AGGREGATIONS, "none")),
        (LayerCriterion, STRATEGIES),
        (Normalizer, NORMALIZERS),
        (Compensation, ("none", *METHODS)),
        (Refit, ("none", *CLOSED_FORM, *TRAINED)),
        (Preset, PRESETS),
    ],
)
def test_choices_of_flags_are_those_of_the_registries(choices, registry):
    assert choices.__args__ == tuple(registry)


@pytest.mark.parametrize("name", [*COMMANDS, *SCRIPTS])
def test_commands_of_the_table_exist_and_show_each_flag_once(name):
    command = (COMMANDS | SCRIPTS)[name]
    assert callable(command.run)
    text = build_parser(command.arguments_class, name, command.summary).format_help()
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags)) > 0
    assert all(line.count("(default") <= 1 for line in text.split("\n  --"))


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("prune", "prune [MODEL [OUTPUT]] [flags]"),
        ("recover", "recover MODEL [OUTPUT] [flags]"),
        ("run", "run RECIPE [flags]"),
        ("evaluate", "evaluate MODEL [MODEL ...] [flags]"),
        ("report", "report RUN [RUN ...] [flags]"),
        ("demo", "demo [flags]"),
    ],
)
def test_help_shows_leading_words_and_one_group_of_options(name, usage, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"usage: llm-pruner {usage}\n" in text and text.count("\noptions:\n") == 1


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/opt/venv/bin/llm-pruner", "llm-pruner prune 'a b'"),
        ("/src/llm_pruner/__main__.py", "python -m llm_pruner prune 'a b'"),
    ],
)
def test_a_recorded_command_names_no_folder_of_this_machine(program, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "prune", "a b"])
    assert command_line() == provenance()["command"] == command


@pytest.mark.parametrize("name", TREES)
def test_files_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= 400


def test_functions_are_short():
    long = [f"{name}:{f.name} {f.end_lineno - f.lineno + 1}" for name, f in FUNCTIONS if _code_lines(f) > 50]
    assert not long


def _code_lines(function):
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    start = function.body[1].lineno if documented and len(function.body) > 1 else function.body[0].lineno
    return function.end_lineno - start + 1


INHERITED = {"evaluation_loop"}  # of transformers' Trainer


def test_functions_take_at_most_four_positional_parameters():
    many = [
        f"{name}:{f.name}"
        for name, f in FUNCTIONS
        if not f.name.startswith("_") and f.name not in INHERITED and _positional(f) > 4
    ]
    assert not many


def _positional(function):
    return len([a for a in function.args.args if a.arg not in ("self", "cls")])


def test_imports_inside_functions_are_of_optional_packages():
    inner = [
        f"{name}:{node.lineno}"
        for name, f in FUNCTIONS
        for node in ast.walk(f)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and _package(node) not in OPTIONAL
    ]
    assert not inner


def _package(node):
    if isinstance(node, ast.ImportFrom):
        return "llm_pruner" if node.level else node.module.partition(".")[0]
    return node.names[0].name.partition(".")[0]


def test_rooms_export_nothing():
    """A name comes from the module that defines it, so that no function hides a module; refit is both, and callable."""
    callable_rooms = ("llm_pruner/__init__.py", "llm_pruner/refit/__init__.py")
    packages = [name for name in TREES if name.endswith("/__init__.py") and name not in callable_rooms]
    busy = [name for name in packages if len(TREES[name].body) > 1 and "rules" not in name]
    assert not busy


def test_docstrings_say_what_is_done_first():
    """Begin with an imperative verb or a noun phrase, not with a question word or a pronoun."""
    files = [
        file for folder in ("llm_pruner", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")
    ]
    openings = ("What", "Whether", "How", "Where", "Which", "Whatever", "Of", "That", "It")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        (file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, documented)
    ]
    docstrings = [(file.relative_to(ROOT), ast.get_docstring(node) or "") for file, node in nodes]
    assert not [(str(file), text.splitlines()[0]) for file, text in docstrings if text.split(" ", 1)[0] in openings]
