"""Distillation: learn from a teacher's next-token probabilities, usually those of the unpruned model.

With p the teacher's and q the student's probabilities of the next token, p' and q' the same at temperature T, and h the
last hidden states, the loss of a token is

    (1 - a) CE(label, q)  +  a T^2 KL(p' || q')  +  b |h_p - h_q|^2 / |h_p|^2

(Hinton et al., arXiv 1503.02531, section 2; hidden states as in TinyBERT, arXiv 1909.10351, equation 8, here relative
to the teacher's, so that b means the same for every model). The loss of a batch is the mean over tokens with labels.

A teacher can also run once, before training: the k most probable tokens of every position are kept on disk, and all
other tokens count as one more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.loss import IGNORED
from ..refit.distill import divergence, relative_distance
from ..refit.tokens import KeptTokens
from .resplit import ALIGNED, OriginalSplit, at_positions

CACHED = ("teacher_tokens", "teacher_log_probabilities")  # columns of the teacher's outputs
OF_TEACHER = (*CACHED, *ALIGNED)  # columns of a batch that the student does not read
EXAMPLES_PER_PASS = 8


@dataclass
class Teacher:
    """Teacher and the weights of its losses.

    Attributes:
        model: the teacher, frozen, on any device; None if its outputs come with the data.
        weight: a, between 0 (labels alone) and 1 (the teacher alone).
        temperature: T, above 0.
        hidden: b, the weight of the hidden states; 0 leaves them out.
        tokens: tokens of the teacher that the student kept; None if it kept all.
        split: how the teacher's tokenizer splits the text; None if the teacher reads the student's tokens.
    """

    model: PreTrainedModel | None
    weight: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0
    tokens: KeptTokens | None = None
    split: OriginalSplit | None = None

    def check(self, student: PreTrainedModel) -> None:
        """Refuse a teacher that the student cannot be compared with.

        Raises:
            PrunerError: the widths of the hidden states differ, and these are learnt.
        """
        if self.model is None:
            return
        theirs, ours = (m.config.get_text_config().hidden_size for m in (self.model, student))
        if self.hidden and theirs != ours:
            raise PrunerError(
                f"the teacher's hidden states have {theirs} channels and the model's {ours}: give --distill_hidden 0"
            )

    def loss(self, model: Any, inputs: dict[str, Any], count: Any = None) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch and the student's outputs.

        Args:
            count: number of labels to divide by; by default those of this batch.
        """
        mask, targets = labelled_positions(inputs)
        outputs = model(**forward_inputs(inputs), output_hidden_states=bool(self.hidden), use_cache=False)
        logits = outputs.logits[mask].float()
        log_q = logits.log_softmax(-1)
        total = (1 - self.weight) * nll_loss(log_q, targets, reduction="sum")
        if self.temperature != 1:
            log_q = (logits / self.temperature).log_softmax(-1)
        if self.model is None:
            tokens, log_p = (inputs[name][mask] for name in CACHED)
            distance = divergence(_top_and_rest(log_q, tokens), log_p.float())
        else:
            theirs = self.run(inputs)
            teacher_logits = theirs.logits[mask.to(theirs.logits.device)].float() / self.temperature
            distance = divergence(log_q, teacher_logits.log_softmax(-1).to(log_q.device))
            if self.hidden:
                learnt = mask & (inputs[ALIGNED[2]] >= 0) if self.split else mask
                total = total + self.hidden * _hidden_distance(theirs, outputs, learnt)
        total = total + self.weight * self.temperature**2 * distance
        return total / (len(targets) if count is None else count), outputs

    @torch.no_grad()
    def run(self, inputs: dict[str, Any]) -> Any:
        """Return the teacher's outputs at the student's positions, with logits of the student's tokens.

        Where the teacher reads its own tokens, hidden states at positions that it does not have are without meaning.
        """
        assert self.model is not None
        if self.split is not None:
            tensors = dict(zip(("input_ids", "attention_mask"), (inputs[name] for name in ALIGNED), strict=False))
        else:
            tensors = forward_inputs(inputs)
            tensors = tensors if self.tokens is None else self.tokens.original_tensors(tensors)
        tensors = {key: value.to(self.model.device) for key, value in tensors.items()}
        outputs = self.model(**tensors, output_hidden_states=bool(self.hidden), use_cache=False)
        if self.split is not None:
            outputs.logits = self.split.logits(outputs.logits, inputs, align_labels(inputs))
            if self.hidden:
                positions = inputs[ALIGNED[2]].to(outputs.logits.device)
                outputs.hidden_states = (at_positions(outputs.hidden_states[-1], positions),)
        elif self.tokens is not None:
            outputs.logits = self.tokens.kept_logits(outputs.logits)
        return outputs


def _hidden_distance(teacher: Any, student: Any, mask: torch.Tensor) -> torch.Tensor:
    """Sum the squared distances of last hidden states over positions, relative to the teacher's."""
    h_p, h_q = (_last_hidden(outputs)[mask.to(outputs.logits.device)].float() for outputs in (teacher, student))
    return relative_distance(h_p.to(h_q.device), h_q)


def _last_hidden(outputs: Any) -> torch.Tensor:
    """Return the last layer's hidden states, those of the decoder where there is an encoder too."""
    states = outputs.decoder_hidden_states if "decoder_hidden_states" in outputs else outputs.hidden_states
    return cast(torch.Tensor, states[-1])


def forward_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a batch that a model's forward pass reads: without labels and a teacher's outputs."""
    return {key: value for key, value in inputs.items() if key not in (*OF_TEACHER, "labels")}


def align_labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the labels ``[samples, tokens]`` at the logits that predict them: shifted by one for a decoder."""
    labels = inputs["labels"]
    if "decoder_input_ids" in inputs:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def labelled_positions(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask ``[samples, tokens]`` of the logits that have a label, and these labels."""
    labels = align_labels(inputs)
    return labels != IGNORED, labels[labels != IGNORED]


def _top_and_rest(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of some tokens of each position, and last that of all others together."""
    top = log_p.gather(-1, tokens.long())
    rest = (1 - top.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([top, rest], -1)


@torch.no_grad()
def cache_teacher(data: Any, teacher: Teacher, collate: Callable[[list[Any]], Any], file: Path, *, top: int) -> Any:
    """Return the data set with the teacher's ``top`` most probable tokens of every position, kept in an Arrow file.

    Args:
        collate: makes a batch of examples.
        file: read if it exists, so its name must depend on everything that its content does.
    """
    import datasets

    def run_teacher(batch: dict[str, list[Any]]) -> dict[str, Any]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        logits = teacher.run(collate(examples)).logits
        tokens, log_probabilities = [], []
        for example, row in zip(examples, logits, strict=True):
            log_p = (row[: len(example["labels"])].float() / teacher.temperature).log_softmax(-1)
            best = log_p.topk(min(top, log_p.shape[-1]), -1).indices
            tokens.append(best.cpu().numpy().astype("int32"))
            log_probabilities.append(_top_and_rest(log_p, best).cpu().numpy().astype("float16"))
        return {**batch, CACHED[0]: tokens, CACHED[1]: log_probabilities}

    nested = [datasets.List(datasets.List(datasets.Value(dtype))) for dtype in ("int32", "float16")]
    file.parent.mkdir(parents=True, exist_ok=True)
    return data.map(
        run_teacher,
        batched=True,
        batch_size=EXAMPLES_PER_PASS,
        features=datasets.Features({**data.features, **dict(zip(CACHED, nested, strict=True))}),
        cache_file_name=str(file),
        load_from_cache_file=True,
        desc="running the teacher",
    )


class DistillationCollator:
    """Pad examples to a batch, with the teacher's outputs where they come with the data.

    Attributes:
        collate: makes a batch of the student's examples.
        split: adds the teacher's own tokens, if it reads these.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate
        self.split: OriginalSplit | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch of tensors ``[examples, tokens, ...]``."""
        batch = dict(self.collate([{k: v for k, v in example.items() if k not in CACHED} for example in examples]))
        for name in CACHED:
            if name in examples[0]:
                rows = [torch.as_tensor(example[name]) for example in examples]
                padded = torch.zeros(len(rows), batch["labels"].shape[1], rows[0].shape[1], dtype=rows[0].dtype)
                for i, row in enumerate(rows):
                    padded[i, : len(row)] = row
                batch[name] = padded
        if self.split is not None and CACHED[0] not in examples[0]:
            batch |= self.split.columns([example["input_ids"] for example in examples], batch["labels"].shape[1])
        return batch
