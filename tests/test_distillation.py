"""Distillation: the teacher's loss by hand, and teachers that run once before training."""

import shutil

import pytest
from helpers.recovery import arguments, read_losses
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.recovery.distill import DistillationCollator, Teacher, labelled_positions
from llm_pruner.recovery.run import recover
from llm_pruner.recovery.tokenize import IGNORED


def make_batch(tokenizer):
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8]}, {"input_ids": [9, 4], "labels": [9, 4]}]
    padding = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<unk>")
    return DistillationCollator(DataCollatorForSeq2Seq(padding, return_tensors="pt"))(examples)


def test_the_loss_of_a_teacher_is_that_by_hand(home, tokenizer):
    teacher, student = (lp.load(str(home / name))[0] for name in ("base", "pruned"))
    inputs = make_batch(tokenizer)
    mask, targets = labelled_positions(inputs)
    assert targets.tolist() == [6, 7, 8, 4] and mask.tolist()[1] == [True, False, False, False]
    loss, _ = Teacher(teacher, weight=0.3, temperature=2.0, hidden=0.1).loss(student, inputs)
    total = 0.0
    for i, t, label in ((0, 0, 6), (0, 1, 7), (0, 2, 8), (1, 0, 4)):
        theirs, ours = (
            m(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
            for m in (teacher, student)
        )
        q, p = ours.logits[i, t], theirs.logits[i, t]
        total = total - 0.7 * q.log_softmax(-1)[label]
        divergence = (p / 2).softmax(-1) @ ((p / 2).log_softmax(-1) - (q / 2).log_softmax(-1))
        total = total + 0.3 * 4 * divergence
        h, g = theirs.hidden_states[-1][i, t], ours.hidden_states[-1][i, t]
        total = total + 0.1 * (h - g).square().sum() / h.square().sum()
    assert loss.item() == pytest.approx(total.item() / 4, rel=1e-5)


@pytest.mark.parametrize("method", ("distill", "lora"))
def test_a_cached_teacher_teaches_like_a_live_one(home, tmp_path, method):
    options = {"method": method, "teacher": "auto", "distill_weight": 1.0, "lora_dropout": 0.0, "learning_rate": 1e-3}
    options |= {"val_set_size": 0}
    recover(arguments(home, tmp_path / "live", **options))
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top": 500}
    recover(arguments(home, tmp_path / "cached", **options, **cache))
    for (step, a), (_, b) in zip(read_losses(tmp_path / "live"), read_losses(tmp_path / "cached"), strict=True):
        assert a == pytest.approx(b, abs=5e-3), step
    (file,) = (tmp_path / "cache").glob("*.arrow")
    written = file.stat().st_mtime_ns
    if method == "distill":
        recover(arguments(home, tmp_path / "again", **options, **cache))
        assert file.stat().st_mtime_ns == written
        assert read_losses(tmp_path / "again") == read_losses(tmp_path / "cached")
    assert read_losses(tmp_path / "live")[-1][1] < read_losses(tmp_path / "live")[0][1]


def test_another_teacher_has_another_cache(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "other")
    cache = {"teacher_cache": str(tmp_path / "cache"), "method": "distill", "max_steps": 1, "val_set_size": 0}
    for i, teacher in enumerate((home / "base", tmp_path / "other", home / "base")):
        recover(arguments(home, tmp_path / str(i), teacher=str(teacher), **cache))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
