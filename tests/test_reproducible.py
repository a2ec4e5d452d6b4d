"""Equal seeds give equal results, to the bit, and no change of the code moves a number unseen.

``python tests/test_reproducible.py`` writes golden.json anew, where a change is meant.
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
from llm_pruner.models.running import random_tokens
from llm_pruner.models.skeleton import parameter_count

GOLDEN = Path(__file__).with_name("golden.json")
TIMES = ("seconds", "gib", "time", "per_second", "date", "version", "git", "host", "machine", "arguments", "cpu")


def numbers(content):
    """What was measured, without what may differ: times, memory, the machine."""
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
    """Two, in which sets have other orders."""
    both = Forks(seed=1), Forks(seed=2)
    yield both
    for server in both:
        server.close()


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


def test_what_only_looks_to_the_bit(servers, home, home_text, tmp_path):
    """Measuring and telling: the same tables, page and lists in fresh processes, with one thread and with two."""
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
    """To five digits: the last ones are the processor's."""
    return float(f"{number:.5g}")


def of(plan: lp.PruningPlan) -> str:
    """All that a plan keeps, as a hash."""
    kept = {name: choice.kept.tolist() for name, choice in sorted(plan.units.items())}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def tiny() -> dict[str, object]:
    """Criteria, aggregations and scopes on tiny models of several architectures."""
    out: dict[str, object] = {}
    kinds = ("heads", "neurons")
    for architecture in ("llama_grouped", "gpt2", "mixtral", "gemma3_text"):
        model = build(architecture)
        graph, ids = lp.trace(model), random_tokens(model, 4, 16, seed=3)
        ways = [("l1", "", "mean"), ("l2", "", "max"), ("random", "", "sum"), ("activation", "", "sum")]
        ways += [("wanda", "", "sum"), ("taylor", "vectorize", "sum"), ("taylor", "param_first", "prod")]
        ways += [("taylor", "param_second", "last"), ("taylor", "param_mix", "first")]
        for criterion, variant, aggregation in ways:
            given = {"taylor": variant} if variant else {}
            scores = lp.score(model, graph, ids, criterion, aggregation=aggregation, kinds=kinds, **given)
            plan = lp.select(graph, scores, 0.4, kinds=kinds)
            pruned = lp.apply(model, plan)
            loss = perplexity(pruned, ids).perplexity
            out[" ".join(filter(None, (architecture, criterion, variant, aggregation)))] = [
                of(plan),
                parameter_count(pruned),
                rounded(loss),
            ]
    return out


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
        out[f"smollm2 {scope}"] = [of(plan), parameter_count(pruned), rounded(loss)]
    lp.compensate(model, pruned, ids)
    out["smollm2 compensated"] = float(f"{perplexity(pruned, held_out).perplexity:.4g}")
    return out


def test_golden_numbers_of_tiny_models():
    golden = json.loads(GOLDEN.read_text())
    found = tiny()
    assert found == {name: golden[name] for name in found}


def test_golden_numbers_of_the_embedded_model(smollm2):
    golden = json.loads(GOLDEN.read_text())
    found = embedded(*smollm2)
    assert found == {name: golden[name] for name in found}


if __name__ == "__main__":
    torch.set_num_threads(2)
    GOLDEN.write_text(json.dumps(tiny() | embedded(*lp.load("smollm2-135m")), indent=1) + "\n")
    sys.exit(print(f"written: {GOLDEN}"))
