"""Tasks of lm-eval: accuracies, sets of tasks, single questions, limits, prompts and batches."""

import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from lm_eval.models.huggingface import HFLM

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.evaluation import task_sets
from llm_pruner.evaluation.evaluate import Measurements, evaluate_models
from llm_pruner.evaluation.harness import LARGEST, requests_that_fit
from llm_pruner.evaluation.paired import compare_questions
from llm_pruner.evaluation.questions import Questions
from llm_pruner.evaluation.table import table
from llm_pruner.evaluation.task_sets import PAPER_TASKS, TASK_SETS, expand_tasks
from llm_pruner.evaluation.zero_shot import Prompting, check_tasks, run_lm_eval, zero_shot


@pytest.fixture(scope="module")
def base(home):
    return lp.load(str(home / "base"))


def by_hand(model, tokenizer, folder):
    """Accuracies by the likelihood of every choice, plain and by the length of its text."""
    right = {"acc": 0, "acc_norm": 0}
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for row in rows:
        found = []
        for choice in row["choices"]:
            context, whole = tokenizer(row["q"])["input_ids"], tokenizer(f"{row['q']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            found.append(sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        lengths = [len(choice) for choice in row["choices"]]
        right["acc"] += max(range(3), key=found.__getitem__) == row["label"]
        right["acc_norm"] += max(range(3), key=lambda i: found[i] / lengths[i]) == row["label"]
    return {name: count / len(rows) for name, count in right.items()}


@pytest.mark.parametrize("name", ("base", "uniform", "pruned"))
def test_accuracy_is_that_of_a_computation_by_hand(home, tasks, name):
    model, tokenizer = lp.load(str(home / name))
    level = logging.getLogger("lm_eval").level
    found = zero_shot(model, tokenizer, ["ours"], include_path=str(tasks))
    assert logging.getLogger("lm_eval").level == level
    expected = by_hand(model, tokenizer, tasks)
    assert {key: found.tasks["ours"][key] for key in expected} == pytest.approx(expected)
    assert found.tasks["ours"]["acc_norm"] == expected["acc_norm"]
    assert found.results["n-samples"]["ours"]["effective"] == 20
    few = zero_shot(model, tokenizer, ["ours"], include_path=str(tasks), limit=5)
    assert few.results["n-samples"]["ours"]["effective"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "pruned"])
def test_stock_lm_eval_agrees(name, home, tasks, tmp_path):
    """Without any of ours in the process: on a plain checkpoint, and where layers differ on a standalone one."""
    model, tokenizer = lp.load(str(home / name))
    lp.save(model, tokenizer, tmp_path / "model", standalone=name == "pruned")
    arguments = f"pretrained={tmp_path / 'model'}" + (",trust_remote_code=True" if name == "pruned" else "")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", "ours", "--include_path", str(tasks), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("*.json")
    stock = json.loads(file.read_text())["results"]["ours"]
    found = zero_shot(model, tokenizer, ["ours"], include_path=str(tasks)).tasks["ours"]
    assert (found["acc"], found["acc_norm"]) == (stock["acc,none"], stock["acc_norm,none"])


@pytest.mark.slow
def test_the_program_of_lm_eval_gives_the_same_questions(home, base, tasks, monkeypatch):
    """Run the program that vLLM is run by, with transformers in its place."""
    monkeypatch.setitem(TASK_SETS, "mine", {"ours": 2, "ours_generated": None})
    flags = {"include_path": str(tasks), "limit": 7, "device": "cpu"}
    told = run_lm_eval("hf", f"pretrained={home / 'base'}", ["mine"], flags=flags)
    found = zero_shot(*base, ["mine"], include_path=str(tasks), limit=7)
    assert told.questions == found.questions and told.questions["ours"].examples == 2
    assert told.tasks.keys() == found.tasks.keys() == told.results["results"].keys()
    assert all(told.tasks[task] == pytest.approx(metrics) for task, metrics in found.tasks.items())


def test_unknown_tasks(home, tasks):
    model, tokenizer = lp.load(str(home / "base"))
    with pytest.raises(PrunerError, match=r"no task 'piqua'; the nearest are piqa"):
        zero_shot(model, tokenizer, ["piqua"], include_path=str(tasks))


# --- Standard errors, single questions, limits ------------------------------------------------------------------------


def test_standard_errors_are_those_of_a_mean(base, tasks):
    found = zero_shot(*base, ["ours", "ours_generated"], include_path=str(tasks))
    acc = found.tasks["ours"]["acc"]
    assert found.tasks["ours"]["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 19))
    assert "exact_match_stderr,first-word" in found.tasks["ours_generated"]
    assert "samples" not in found.results, "documents stay out of the record"


def test_single_questions_are_kept_with_chance_and_answers(base, tasks):
    model, tokenizer = base
    found = zero_shot(model, tokenizer, ["ours", "ours_generated"], include_path=str(tasks))
    asked = found.questions["ours"]
    assert (asked.metric, asked.total, len(asked.ids), asked.examples) == ("acc_norm", 20, 20, 0)
    assert sum(asked.scores) / 20 == found.tasks["ours"]["acc_norm"]
    assert asked.chance == (0.333333,) * 20
    assert [int(answer) == i % 3 for i, answer in enumerate(asked.answers)] == [bool(score) for score in asked.scores]
    generated = found.questions["ours_generated"]
    assert generated.metric == "exact_match,first-word" and set(generated.chance) == {0.0}
    assert generated.ids == asked.ids and all(len(answer) == 8 for answer in generated.answers)
    assert Questions.decode(json.loads(json.dumps(asked.encode()))) == asked
    assert len(json.dumps(asked.encode())) < 40 * 20 + 200, "bytes"
    with pytest.raises(ValueError, match="differ in number"):
        Questions.decode(asked.encode() | {"answers": "1 2"})


def test_a_guess_at_a_question_with_several_right_answers(base, tasks):
    """Chance is what the task itself counts: the share of right choices, of which some questions have two."""
    asked = zero_shot(*base, ["several"], include_path=str(tasks)).questions["several"]
    assert asked.chance == (0.5, 0.5)


def test_limits_are_named_and_runs_of_different_limits_pair(home, tasks):
    names = [str(home / "base"), str(home / "pruned")]
    settings = {"include_path": str(tasks), "tokens": 0}
    few = evaluate_models(names, lp.load, Measurements(tasks=("ours",), limit=5, **settings))
    whole = evaluate_models(names, lp.load, Measurements(tasks=("ours",), **settings))
    shown = table(few)
    assert "ours (first 5) acc_norm %" in shown.cells()[0] and "ours acc_norm %" in table(whole).cells()[0]
    assert "ours: only 5 of its 20 questions (--limit)" in "".join(shown.notes)
    assert "--limit" not in "".join(table(whole).notes)
    (compared,) = compare_questions(few[0].questions, whole[1].questions).values()
    assert compared.questions == 5 and compared == compare_questions(few[0].questions, few[1].questions)["ours"]


def test_a_group_of_tasks_counts_once(home, tasks):
    prompting = Prompting(confirm_run_unsafe_code=True)
    settings = Measurements(tasks=("ours_group",), include_path=str(tasks), tokens=0, prompting=prompting)
    evaluations = evaluate_models([str(home / "base"), str(home / "pruned")], lp.load, settings)
    questions = evaluations[0].questions
    assert list(questions) == ["ours_group"] and len(questions["ours_group"].ids) == 40
    assert set(questions["ours_group"].members) == {"ours", "ours_code"}
    heads = table(evaluations).cells()[0]
    assert "ours_group acc %" in heads and "ours acc %" not in heads and "ours_acc" in table(evaluations).csv()
    assert "acc_stderr" in evaluations[0].tasks["ours_group"]


# --- Sets of tasks ----------------------------------------------------------------------------------------------------


def test_sets_of_tasks(tasks):
    assert expand_tasks(["paper"]) == dict.fromkeys(PAPER_TASKS) and len(PAPER_TASKS) == 7
    assert expand_tasks(["openllm"]) == {
        "mmlu": 5,
        "arc_challenge": 25,
        "hellaswag": 10,
        "winogrande": 5,
        "truthfulqa_mc2": 0,
        "gsm8k": 5,
    }
    assert expand_tasks(["reasoning", "piqa", "reasoning"]) == {"gsm8k": None, "minerva_math500": None, "piqa": None}
    with pytest.raises(
        PrunerError, match="openllm: arc_challenge is also named with another number of worked examples"
    ):
        expand_tasks(["paper", "openllm"])
    for name in TASK_SETS:  # all are tasks of the lm-eval that is installed
        assert check_tasks([name], str(tasks), confirm_run_unsafe_code=True) == TASK_SETS[name]
    assert set(check_tasks(["ours_g*"], str(tasks), confirm_run_unsafe_code=True)) == {"ours_group", "ours_generated"}


def test_a_set_gives_worked_examples_and_a_flag_overrides_it(base, tasks, monkeypatch):
    monkeypatch.setitem(task_sets.TASK_SETS, "mine", {"ours": 2})
    found = [
        zero_shot(*base, ["mine"], include_path=str(tasks), num_fewshot=number).questions for number in (None, 1, 2)
    ]
    assert [one["ours"].examples for one in found] == [2, 1, 2]
    assert found[0] == found[2] and compare_questions(found[0], found[1]) == {}, "other prompts do not compare"


def test_code_runs_only_if_confirmed(home, base, tasks, capsys):
    with pytest.raises(PrunerError, match="ours_code runs code that the model writes, on this machine: give --confirm"):
        zero_shot(*base, ["ours_code"], include_path=str(tasks))
    argv = ["evaluate", str(home / "base"), "--tasks", "ours_group", "--include_path", str(tasks), "--tokens", "0"]
    argv += ["--datasets="]
    assert main(argv) == 2
    assert "give --confirm_run_unsafe_code" in capsys.readouterr().err
    assert main([*argv, "--confirm_run_unsafe_code"]) == 0


# --- Prompts and batches ----------------------------------------------------------------------------------------------


@pytest.fixture
def contexts(monkeypatch):
    """The contexts of all requests that reach the model."""
    seen = []
    for name in ("loglikelihood", "generate_until"):
        ask = getattr(HFLM, name)

        def record(self, requests, *args, _ask=ask, **kwargs):
            seen.extend(request.args[0] for request in requests)
            return _ask(self, requests, *args, **kwargs)

        monkeypatch.setattr(HFLM, name, record)
    return seen


def test_chat_template_and_system_instruction_reach_the_prompt(base, tasks, contexts):
    model, tokenizer = base
    prompting = Prompting(apply_chat_template=True, system_instruction="Be brief.")
    zero_shot(model, tokenizer, ["ours"], include_path=str(tasks), limit=1, num_fewshot=1, prompting=prompting)
    assert contexts[0].startswith("<s>system: Be brief.</s><s>user: Is ") and contexts[0].endswith("<s>assistant: ")
    assert contexts[0].count("<s>user: ") == 2, "worked examples are turns"
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(PrunerError, match=r"--apply_chat_template: the tokenizer of .* has no chat template"):
            zero_shot(model, tokenizer, ["ours"], include_path=str(tasks), prompting=prompting)
    finally:
        tokenizer.chat_template = template


def test_settings_of_generation_are_passed_on(home, tasks, monkeypatch):
    written = []
    generate = HFLM._model_generate

    def record(self, context, max_length, **kwargs):
        written.append((len(context), max_length - context.shape[1]))
        return generate(self, context, max_length, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", record)
    argv = ["evaluate", str(home / "base"), "--tasks", "ours_generated", "--include_path", str(tasks), "--tokens", "0"]
    assert main([*argv, "--datasets=", "--device", "cpu", "--gen_kwargs", "max_gen_toks=2"]) == 0
    assert {tokens for _, tokens in written} == {2} and max(rows for rows, _ in written) > 1, "in batches"


@pytest.mark.parametrize(("batch_size", "passes"), [(None, 4), (30, 2)])
def test_no_pass_is_run_to_find_a_batch_size(base, tasks, monkeypatch, batch_size, passes):
    model, tokenizer = base
    sizes: Counter[int] = Counter()
    forward = model.forward

    def count(*args, **kwargs):
        sizes[len(args[0] if args else kwargs["input_ids"])] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    zero_shot(model, tokenizer, ["ours"], include_path=str(tasks), batch_size=batch_size)
    assert sum(sizes.values()) == passes and max(sizes) == (batch_size or LARGEST)


def test_batches_fit_into_memory(base, monkeypatch):
    model, _ = base
    tokens = 1000
    free = 4 * 10 * tokens * 4 * (2 * model.config.vocab_size + 2 * 3 * model.config.hidden_size)
    monkeypatch.setattr("llm_pruner.evaluation.harness.free_bytes", lambda device: free)
    assert [requests_that_fit(model, n) for n in (1, tokens, 5 * tokens, 100 * tokens)] == [LARGEST, 10, 2, 1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("absent", "the data of absent is not available .* give its folder as --include_path"),
        (
            "needs_package",
            "--tasks needs_package needs a package that is not installed: No module named 'no_such_package'",
        ),
        ("needs_switch", "--tasks needs_switch runs code that the model writes: set HF_ALLOW_CODE_EVAL=1"),
    ],
)
def test_tasks_that_cannot_be_loaded_name_the_remedy(task, message, base, tasks):
    with pytest.raises(PrunerError, match=message):
        zero_shot(*base, [task], include_path=str(tasks))


@pytest.mark.parametrize(
    "flag", ["--apply_chat_template", "--system_instruction=x", "--gen_kwargs=a=1", "--num_fewshot=2"]
)
def test_flags_of_tasks_need_tasks(flag, home, capsys):
    assert main(["evaluate", str(home / "base"), "--datasets=", flag]) == 2
    assert f"{flag.partition('=')[0]} changes tasks only: name some with --tasks" in capsys.readouterr().err


def test_a_limit_needs_what_it_shortens(home, capsys):
    assert main(["evaluate", str(home / "base"), "--datasets=", "--limit=3"]) == 2
    assert "--limit shortens tasks and labelled examples: name some" in capsys.readouterr().err


def test_a_folder_of_tasks_must_exist(base):
    with pytest.raises(PrunerError, match="--include_path /nowhere is not a folder: give one that holds task files"):
        zero_shot(*base, ["ours"], include_path="/nowhere")


@pytest.mark.parametrize("task", ["local_arc_easy", "local_piqa"])
def test_answers_of_the_embedded_model_to_real_questions(task, shared, smollm2, tasks):
    """Far above chance on the first questions, and the same answers in batches of another size."""
    found, alone = (
        zero_shot(*smollm2, [task], include_path=str(tasks), limit=8, batch_size=size) for size in (None, 1)
    )
    assert found.questions[task].answers == alone.questions[task].answers
    assert found.questions[task].total > 1800 and found.tasks[task]["acc"] > 0.3
