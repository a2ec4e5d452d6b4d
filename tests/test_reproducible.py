"""Equal seeds give equal results, to the bit, and no change of the code moves a number unnoticed.

``python tests/test_reproducible.py`` rewrites golden.json, where a change is intended.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import RECIPE, Forks, cases, whole
from helpers.models import build

import llm_pruner as lp
from llm_pruner.data import calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.inputs import example_inputs
from llm_pruner.models.skeleton import parameter_count

GOLDEN = Path(__file__).with_name("golden.json")
TIMES = ("seconds", "gib", "time", "per_second", "date", "version", "git", "host", "machine", "arguments", "cpu")


def numbers(content):
    """Keep measured numbers, without times, memory and the machine, which may differ."""
    if isinstance(content, dict):
        return {k: numbers(v) for k, v in content.items() if not any(t in k.lower() for t in TIMES)}
    if isinstance(content, list):
        return [numbers(v) for v in content]
    return content if isinstance(content, (int, float)) else None


def measured(folder):
    names = ("metrics.json", "recovery.json", "vocabulary.json", "results.json", "curves.json")
    files = sorted(p for name in names for p in folder.rglob(name))
    return {str(p.relative_to(folder)): numbers(json.loads(p.read_text())) for p in files}


@pytest.fixture(scope="module")
def servers():
    """Two servers with different hash seeds, so that sets are ordered differently."""
    both = Forks(seed=1), Forks(seed=2)
    yield both
    for server in both:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune", "apply", "to-uniform", "vocab", "recover", "run"])
def test_every_command_to_the_bit(name, servers, home, home_text, tmp_path):
    """In fresh processes, with one thread and with two."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(home=home))
    case, found = cases(home, recipe)[name], []
    for threads, server in enumerate(servers, 1):
        folder = tmp_path / str(threads)
        folder.mkdir()
        code, said, _ = server.run(folder, case.argv, {"THREADS": threads})
        assert code == 0, said
        found.append((whole(folder, case), measured(folder)))
    assert None not in found[0][0].values() and bool(found[0][1]) == (name not in ("apply", "to-uniform"))
    assert found[0] == found[1]


@pytest.mark.slow
def test_measuring_and_reporting_to_the_bit(servers, home, home_text, tmp_path):
    """The same tables, page and lists in fresh processes, with one thread and with two."""
    evaluate = ["evaluate", home / "base", home / "pruned", "--datasets", home_text, "--seq_len", 16, "--tokens", 0]
    perplexity = ["evaluate", home / "base", "--datasets", home_text, "--tokens", 0, "--stride", 8, "--seq_len", 16]
    commands = [
        [*evaluate, "--samples", "--new_tokens", 8, "--output", "measured"],
        [*perplexity, "--output", "strided"],
    ]
    commands += [["inspect", home / "base", "--json", "--layer", -1], ["inspect", home / "pruned/pruning_plan.json"]]
    commands += [["report", "measured", "strided", "--figures", "figures"]]
    found = []
    for threads, server in enumerate(servers, 1):
        folder = tmp_path / str(threads)
        folder.mkdir()
        said = []
        for argv in commands:
            code, text, _ = server.run(folder, argv, {"THREADS": threads})
            assert code == 0, text
            said += [text] if argv[0] == "inspect" else []  # the others show their pace
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        assert {"measured/table.csv", "strided/evaluation.json", "report.html"} <= files.keys()
        page = files.pop("report.html").read_text().replace(f"{threads} threads", "threads")
        parts = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items() if p.suffix != ".json"}
        numeric = {name: numbers(json.loads(p.read_text())) for name, p in files.items() if p.suffix == ".json"}
        found.append((said, page, parts, numeric))
    assert found[0] == found[1]


def rounded(number: float) -> float:
    """Round to five digits: further ones depend on the processor."""
    return float(f"{number:.5g}")


def plan_hash(plan: lp.PruningPlan) -> str:
    """Hash everything that a plan keeps."""
    kept = {name: choice.kept.tolist() for name, choice in sorted(plan.units.items())}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


ARCHITECTURES = ("llama_grouped", "gpt2", "mixtral", "gemma3_text")
WAYS = (
    ("l1", "", "mean"),
    ("l2", "", "max"),
    ("random", "", "sum"),
    ("activation", "", "sum"),
    ("wanda", "", "sum"),
    ("taylor", "vectorize", "sum"),
    ("taylor", "param_first", "prod"),
    ("taylor", "param_second", "last"),
    ("taylor", "param_mix", "first"),
)


def tiny(architecture: str) -> dict[str, object]:
    """Prune a tiny model by every criterion, with one aggregation each."""
    kinds, results = ("heads", "neurons"), {}
    model = build(architecture)
    graph, ids = lp.trace(model), example_inputs(model, 4, 16, seed=3)
    for criterion, variant, aggregation in WAYS:
        options = {"taylor": variant} if variant else {}
        scores = lp.score(model, graph, ids, criterion, aggregation=aggregation, kinds=kinds, **options)
        plan = lp.select(graph, scores, ratio=0.4, kinds=kinds)
        pruned = lp.apply(model, plan)
        name = " ".join(filter(None, (architecture, criterion, variant, aggregation)))
        results[name] = [plan_hash(plan), parameter_count(pruned), rounded(perplexity(pruned, ids).perplexity)]
    return results


def embedded(model, tokenizer) -> dict[str, object]:
    """SmolLM2: the paper's way, and the width that a budget leaves, compensated."""
    held_out = windows(tokenizer, text("python-docs"), 128, 8)
    out: dict[str, object] = {"smollm2": [parameter_count(model), rounded(perplexity(model, held_out).perplexity)]}
    graph, ids = lp.trace(model), calibration("python-docs", tokenizer, 32, 64)
    kinds = ("heads", "neurons")
    scores = lp.score(model, graph, ids[:10], kinds=kinds)
    for scope in ("local", "global"):
        plan = lp.select(graph, scores, 0.3, kinds=kinds, scope=scope, layers=range(4, 28))
        pruned = lp.apply(model, plan)
        loss = perplexity(pruned, held_out).perplexity
        out[f"smollm2 {scope}"] = [plan_hash(plan), parameter_count(pruned), rounded(loss)]
    lp.compensate(model, pruned, ids)
    out["smollm2 compensated"] = float(f"{perplexity(pruned, held_out).perplexity:.4g}")
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_golden_numbers_of_tiny_models(architecture):
    golden = json.loads(GOLDEN.read_text())
    assert tiny(architecture) == {name: v for name, v in golden.items() if name.split()[0] == architecture}


@pytest.mark.slow
def test_golden_numbers_of_the_embedded_model(smollm2):
    """On the two threads that the numbers were written with: another count rounds otherwise."""
    golden, threads = json.loads(GOLDEN.read_text()), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        numbers = embedded(*smollm2)
    finally:
        torch.set_num_threads(threads)
    assert numbers == {name: v for name, v in golden.items() if name.split()[0] == "smollm2"}


if __name__ == "__main__":
    torch.set_num_threads(2)
    numbers_of_tiny_models = {name: v for architecture in ARCHITECTURES for name, v in tiny(architecture).items()}
    GOLDEN.write_text(json.dumps(numbers_of_tiny_models | embedded(*lp.load("smollm2-135m")), indent=1) + "\n")
    sys.exit(print(f"written: {GOLDEN}"))
