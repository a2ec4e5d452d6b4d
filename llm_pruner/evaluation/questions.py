"""Results of single questions: what paired statistics of two models, or of two saved runs, are computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DECIMALS = 6  # of scores, in files too: statistics of saved runs are those of the runs themselves
ID_DIGITS = 8  # of a hash: two of 10,000 questions share one with a probability of 1%
UNLIKELY = -1e3  # log-likelihood of the choices that a guess does not take
# Metrics that are a share of the questions, in the order in which the headline of a task is chosen.
ACCURACIES = ("acc_norm", "acc", "pass@1", "pass_at_1", "exact_match", "math_verify")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Results of a model on the questions of a task, one entry per question, in the task's order.

    Attributes:
        metric: metric that the scores are of, with lm-eval's filter if it has one.
        total: questions that the task has; fewer are asked with ``--limit``.
        examples: worked examples before each question.
        ids: beginning of the hash of each question.
        scores: score of each answer, 0 to 1.
        chance: expected score of a guess at each question; 0 where no choices are given.
        answers: index of the chosen answer; without choices, the beginning of the hash of the extracted answer.
        members: names of the tasks and groups within a group of tasks, whose questions are pooled.
    """

    metric: str
    total: int
    examples: int
    ids: tuple[str, ...]
    scores: tuple[float, ...]
    chance: tuple[float, ...]
    answers: tuple[str, ...]
    members: tuple[str, ...] = ()

    def encode(self) -> dict[str, Any]:
        """Return the results as JSON values, each list as one line of words."""
        return {
            "metric": self.metric,
            "total": self.total,
            "examples": self.examples,
            "members": list(self.members),
            "ids": " ".join(self.ids),
            "scores": _numbers(self.scores),
            "chance": _numbers(self.chance),
            "answers": " ".join(self.answers),
        }

    @classmethod
    def decode(cls, record: Mapping[str, Any]) -> Questions:
        """Return the results that :meth:`encode` wrote.

        Raises:
            ValueError: the lists differ in length.
        """
        scores, chance = (tuple(map(float, record[name].split())) for name in ("scores", "chance"))
        ids, answers = (tuple(record[name].split()) for name in ("ids", "answers"))
        if not len(ids) == len(scores) == len(chance) == len(answers):
            raise ValueError("the results of questions differ in number")
        return cls(
            metric=record["metric"],
            total=record["total"],
            examples=record["examples"],
            ids=ids,
            scores=scores,
            chance=chance,
            answers=answers,
            members=tuple(record["members"]),
        )


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def is_accuracy(metric: str) -> bool:
    """Return True for a metric that is a share of the questions, whatever its filter.

    >>> [is_accuracy(name) for name in ("acc", "exact_match,strict-match", "bleu", "acc_stderr")]
    [True, True, False, False]
    """
    return metric.partition(",")[0] in ACCURACIES


def headline(metrics: Iterable[str]) -> str | None:
    """Return the metric that stands for a task: accuracy by the length of the answers where the task defines it.

    >>> headline(["acc", "acc_stderr", "acc_norm"]), headline(["exact_match,strict-match"]), headline(["bleu"])
    ('acc_norm', 'exact_match,strict-match', None)
    """
    names = [name for name in metrics if is_accuracy(name)]
    return min(names, key=lambda name: ACCURACIES.index(name.partition(",")[0]), default=None)


def questions_of(
    tasks: Sequence[Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    examples: int = 0,
    names: Iterable[str] = (),
) -> Questions | None:
    """Return the results of a task, or of the tasks of a group pooled.

    Args:
        tasks: lm-eval's task objects.
        samples: lm-eval's records of single documents by task.
        examples: worked examples before each question.
        names: names of the tasks and groups within a group.

    Returns:
        None if the tasks have no accuracy in common.
    """
    records = {task.task_name: samples.get(task.task_name, ()) for task in tasks}
    metrics = [
        dict.fromkeys(_name(metric, one["filter"]) for one in of_task for metric in one["metrics"])
        for of_task in records.values()
    ]
    metric = headline(name for name in metrics[0] if all(name in others for others in metrics))
    if metric is None:
        return None
    pooled = [_result(task, one, metric) for task in tasks for one in records[task.task_name] if _is_of(one, metric)]
    ids, scores, chance, answers = zip(*pooled, strict=True)
    return Questions(
        metric=metric,
        total=sum(len(task.eval_docs) for task in tasks),
        examples=examples,
        ids=ids,
        scores=scores,
        chance=chance,
        answers=answers,
        members=tuple(names),
    )


def _name(metric: str, filter_key: str) -> str:
    return metric if filter_key == "none" else f"{metric},{filter_key}"


def _is_of(record: Mapping[str, Any], metric: str) -> bool:
    return (metric.partition(",")[2] or "none") == record["filter"]


def _result(task: Any, record: Mapping[str, Any], metric: str) -> tuple[str, float, float, str]:
    """Return id, score, chance and answer of a question."""
    name, responses = metric.partition(",")[0], record["filtered_resps"]
    identity, score = str(record["doc_hash"])[:ID_DIGITS], round(float(record[name]), DECIMALS)
    if task.OUTPUT_TYPE != "multiple_choice":
        return identity, score, 0.0, hashlib.sha256(json.dumps(responses).encode()).hexdigest()[:ID_DIGITS]
    choices = task.doc_to_choice(record["doc"])
    guesses = [_score_of_guess(task, record["doc"], i, len(responses), name) for i in range(len(choices))]
    lengths = [len(choice) or 1 if name == "acc_norm" else 1 for choice in choices]
    likelihoods = [float(one[0]) / length for one, length in zip(responses, lengths, strict=False)]
    answer = max(range(len(choices)), key=likelihoods.__getitem__)
    return identity, score, round(sum(guesses) / len(guesses), DECIMALS), str(answer)


def _score_of_guess(task: Any, document: Any, choice: int, responses: int, metric: str) -> float:
    """Return the score of a model to which one choice alone is likely, as the task itself counts."""
    answers = [(0.0 if i == choice else UNLIKELY, i == choice) for i in range(responses)]
    return float(task.process_results(document, answers)[metric])
