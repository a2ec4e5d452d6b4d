"""Learning from a teacher, usually the unpruned model: its probabilities of the next token say more than the token.

With p the teacher's and q the student's probabilities of the next token, p' and q' the same at temperature T, and h the
last hidden states, the loss of a token is

    (1 - a) CE(label, q)  +  a T^2 KL(p' || q')  +  b |h_p - h_q|^2 / |h_p|^2

(Hinton et al., arXiv 1503.02531, section 2; hidden states as in TinyBERT, arXiv 1909.10351, equation 8, here relative
to the teacher's, so that b means the same for every model), and that of a batch the mean over tokens with labels.

A teacher can also be asked once and for all: the k most probable tokens of every position are kept on disk, and what is
left counts as one more token.
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
from .tokenize import IGNORED

CACHED = ("teacher_tokens", "teacher_log_probabilities")


@dataclass
class Teacher:
    """What a student learns beside labels.

    Attributes:
        model: the teacher, frozen, on whatever device; None where its answers come with the data.
        weight: a, between 0 (labels alone) and 1 (the teacher alone).
        temperature: T, above 0.
        hidden: b, the weight of the hidden states; 0 leaves them out.
    """

    model: PreTrainedModel | None
    weight: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0

    def check(self, student: PreTrainedModel) -> None:
        """Refuse a teacher that the student cannot be compared with.

        Raises:
            PrunerError: other vocabularies, or hidden states of other widths where these are to be learnt.
        """
        if self.model is None:
            return
        theirs, ours = (m.config.get_text_config().vocab_size for m in (self.model, student))
        if theirs != ours:
            raise PrunerError(f"the teacher has {theirs} tokens in its vocabulary and the model {ours}: give another")
        theirs, ours = (m.config.get_text_config().hidden_size for m in (self.model, student))
        if self.hidden and theirs != ours:
            raise PrunerError(
                f"the teacher's hidden states have {theirs} channels and the model's {ours}: give --distill_hidden 0"
            )

    def loss(self, model: Any, inputs: dict[str, Any], count: Any = None) -> tuple[torch.Tensor, Any]:
        """The loss of a batch and the student's outputs.

        Args:
            count: by how many labels to divide; by default those of this batch.
        """
        asked = read(inputs)
        here, targets = labelled(inputs)
        outputs = model(**asked, output_hidden_states=bool(self.hidden), use_cache=False)
        logits = outputs.logits[here].float()
        log_q = logits.log_softmax(-1)
        total = (1 - self.weight) * nll_loss(log_q, targets, reduction="sum")
        if self.temperature != 1:
            log_q = (logits / self.temperature).log_softmax(-1)
        if self.model is None:
            tokens_known, log_p = (inputs[name][here] for name in CACHED)
            divergence = _divergence(_grouped(log_q, tokens_known), log_p.float())
        else:
            with torch.no_grad():
                there = {key: value.to(self.model.device) for key, value in asked.items()}
                theirs = self.model(**there, output_hidden_states=bool(self.hidden), use_cache=False)
            known = theirs.logits[here.to(theirs.logits.device)].float() / self.temperature
            divergence = _divergence(log_q, known.log_softmax(-1).to(log_q.device))
            if self.hidden:
                known, found = (_last_hidden(o)[here.to(o.logits.device)].float() for o in (theirs, outputs))
                known = known.to(found.device)
                total = total + self.hidden * ((known - found).square().sum(-1) / known.square().sum(-1)).sum()
        total = total + self.weight * self.temperature**2 * divergence
        return total / (len(targets) if count is None else count), outputs


def _last_hidden(outputs: Any) -> torch.Tensor:
    """Behind the last layer, of the decoder where there is an encoder too."""
    states = outputs.decoder_hidden_states if "decoder_hidden_states" in outputs else outputs.hidden_states
    return cast(torch.Tensor, states[-1])


def read(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch a model reads: no labels, no answers of a teacher."""
    return {key: value for key, value in inputs.items() if key not in (*CACHED, "labels")}


def shifted(inputs: dict[str, Any]) -> torch.Tensor:
    """The labels ``[samples, tokens]`` as logits are about them: a decoder's tell the next token."""
    labels = inputs["labels"]
    if "decoder_input_ids" in inputs:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def labelled(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of the logits have a label, as a mask ``[samples, tokens]``, and these labels."""
    labels = shifted(inputs)
    return labels != IGNORED, labels[labels != IGNORED]


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(p || q), summed over positions."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _grouped(logs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a few tokens of each position, and last of all others together."""
    chosen = logs.gather(-1, tokens.long())
    rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([chosen, rest], -1)


@torch.no_grad()
def answers(
    data: Any,
    model: PreTrainedModel,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    top: int,
    temperature: float,
    file: Path,
    batch_size: int = 8,
) -> Any:
    """The data set with the teacher's ``top`` most probable tokens of every position, kept in an Arrow file.

    A file that is there already is read, not made again; the caller names it after all that it depends on.
    """
    import datasets

    def ask(batch: dict[str, list[Any]]) -> dict[str, Any]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        inputs = {key: value.to(model.device) for key, value in read(collate(examples)).items()}
        logits = model(**inputs, use_cache=False).logits
        tokens, logs = [], []
        for example, row in zip(examples, logits, strict=True):
            length = len(example["labels"])
            found = (row[:length].float() / temperature).log_softmax(-1)
            best = found.topk(min(top, found.shape[-1]), -1).indices
            tokens.append(best.cpu().numpy().astype("int32"))
            logs.append(_grouped(found, best).cpu().numpy().astype("float16"))
        return {**batch, CACHED[0]: tokens, CACHED[1]: logs}

    lists = datasets.List
    features = datasets.Features(
        {
            **data.features,
            CACHED[0]: lists(lists(datasets.Value("int32"))),
            CACHED[1]: lists(lists(datasets.Value("float16"))),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    return data.map(
        ask,
        batched=True,
        batch_size=batch_size,
        features=features,
        cache_file_name=str(file),
        load_from_cache_file=True,
        desc="asking the teacher",
    )


class Collator:
    """Pads examples to a batch; what the teacher said of them too."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, torch.Tensor]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        plain = [{k: v for k, v in e.items() if k not in CACHED} for e in examples]
        batch = dict(self.collate(plain))
        for name in CACHED:
            if name in examples[0]:
                rows = [torch.as_tensor(e[name]) for e in examples]
                out = torch.zeros(len(rows), batch["labels"].shape[1], rows[0].shape[1], dtype=rows[0].dtype)
                for i, row in enumerate(rows):
                    out[i, : len(row)] = row
                batch[name] = out
        return batch
