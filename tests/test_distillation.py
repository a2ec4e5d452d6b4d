"""Distillation: the teacher's loss by hand, cut vocabularies, and teachers that run once before training."""

import shutil

import pytest
import torch
from helpers.recovery import arguments, read_losses, read_record
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.models.loss import IGNORED
from llm_pruner.recovery import settings
from llm_pruner.recovery.datasets import padding_collator
from llm_pruner.recovery.distill import DistillationCollator, Teacher, labelled_positions
from llm_pruner.recovery.original import kept_tokens
from llm_pruner.recovery.prompts import ALPACA
from llm_pruner.recovery.resplit import OriginalSplit
from llm_pruner.recovery.run import recover


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


def test_a_teacher_in_another_precision_has_another_cache(home, tmp_path, monkeypatch):
    cache = {"teacher_cache": str(tmp_path / "cache"), "method": "distill", "max_steps": 1, "val_set_size": 0}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(settings, "_original", lambda *_, dtype=dtype: (None, "cpu", dtype))
        recover(arguments(home, tmp_path / str(dtype), **cache))
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


@pytest.fixture(scope="module")
def cut(home, home_text, tmp_path_factory):
    """The model ``base`` with 400 of its 500 tokens."""
    folder = tmp_path_factory.mktemp("cut") / "cut"
    texts = ["--corpus", str(home_text), "--eval_dataset", str(home_text), "--max_windows", "2"]
    assert main(["vocab", str(home / "base"), str(folder), "--keep", "400", *texts]) == 0
    return folder


def test_a_cut_vocabulary_learns_the_originals_probabilities_of_its_tokens(home, home_text, cut):
    (teacher, words), (student, fewer) = lp.load(str(home / "base")), lp.load(str(cut))
    ids = torch.tensor([fewer(home_text.read_text())["input_ids"][:40]])
    names = fewer.convert_ids_to_tokens(ids[0])
    assert len(fewer) == 400 and words.convert_tokens_to_ids(names) != ids[0].tolist()
    tokens = kept_tokens(lp.PruningPlan.load(cut / "pruning_plan.json"), 500, 400)
    inputs = {"input_ids": ids, "labels": ids}
    distill = Teacher(teacher, weight=1.0, tokens=tokens)
    assert distill.loss(student, inputs)[0].item() == pytest.approx(0, abs=1e-6)  # the kept rows are the original's
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(0.5)
        loss = distill.loss(student, inputs)[0].item()
        p = teacher(torch.tensor([words.convert_tokens_to_ids(names)])).logits[0, :-1].softmax(-1)
        p = p[:, words.convert_tokens_to_ids(fewer.convert_ids_to_tokens(range(400)))]
        p = p / p.sum(-1, keepdim=True)
        q = student(ids).logits[0, :-1].log_softmax(-1)
    assert p.shape == (39, 400) and loss > 1e-3
    assert loss == pytest.approx((p * (p.log() - q)).sum(-1).mean().item(), rel=1e-4)


def test_the_original_reads_its_own_tokens(home, cut):
    (teacher, words), (student, fewer) = lp.load(str(home / "base")), lp.load(str(cut))
    ids = fewer(ALPACA["prompt_input"])["input_ids"][:60]  # not the text that was counted
    theirs = words(fewer.decode(ids))["input_ids"]
    split = OriginalSplit(words, fewer, 400)
    assert split.align(ids)[0] == theirs and len(theirs) < 60
    batch = DistillationCollator(padding_collator(fewer, student))
    batch.split = split
    inputs = batch([{"input_ids": one, "labels": one} for one in (ids[:20], ids)])
    with torch.no_grad():
        logits = Teacher(teacher, split=split).run(inputs).logits
        p = teacher(torch.tensor([theirs])).logits[0].softmax(-1)
    first = [fewer(words.decode([t]))["input_ids"][:1] for t in range(500)]
    boundaries = {len(words.decode(theirs[: j + 1])): j for j in range(len(theirs))}
    own = 0
    for i in range(59):
        got = logits[1, i].softmax(-1)
        j = boundaries.get(len(fewer.decode(ids[: i + 1])))
        if j is None:
            assert got[ids[i + 1]] == 1  # inside a word of the teacher's: the label
            own += 1
            continue
        for s in (ids[i + 1], 5, 77):
            assert got[s].item() == pytest.approx(
                p[j, [t for t in range(500) if first[t] == [s]]].sum().item(), rel=1e-3
            )
    assert own == 60 - len(theirs)
    assert torch.equal(logits[0, :10].argmax(-1), logits[1, :10].argmax(-1))  # padding changes nothing


def test_a_text_that_is_not_given_back_stays_split(home, cut):
    words, fewer = lp.load(str(home / "base"))[1], lp.load(str(cut))[1]
    names = ["\u00c3", "a"]  # the first byte of a character alone
    ids = [i for i in fewer.convert_tokens_to_ids(names) if i != fewer.unk_token_id]
    assert OriginalSplit(words, fewer, 400).align(ids) == (
        words.convert_tokens_to_ids(names[-len(ids) :]),
        [*range(len(ids))],
    )
    with pytest.raises(lp.PrunerError, match="without 100 of the model's tokens"):
        OriginalSplit(fewer, words, 500)


@pytest.mark.parametrize("cached", (False, True))
def test_a_run_distils_a_cut_vocabulary(home, home_text, cut, tmp_path, cached):
    """Also after a further step, whose plan names the cut model: the plans lead back to the teacher's tokens."""
    model, tokenizer = lp.load(str(cut))
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, kinds=("neurons",))
    plan.settings["base_model"] = str(cut)
    lp.save(lp.apply(model, plan), tokenizer, tmp_path / "smaller", plan=plan)
    options = {"prune_model": str(tmp_path / "smaller"), "teacher": str(home / "base"), "method": "distill"}
    options |= {"data_path": str(home_text), "extra_val_dataset": str(home_text), "distill_weight": 1.0}
    options |= {"learning_rate": 3e-3}
    options |= {"teacher_cache": str(tmp_path / "cache"), "teacher_top": 500} if cached else {}
    recover(
        arguments(home, tmp_path / "out", **options | {"distill_hidden": 0.0 if cached else 0.1, "learning_rate": 3e-3})
    )
    losses = read_losses(tmp_path / "out")
    assert losses[-1][1] < losses[0][1]
    (before, after) = read_record(tmp_path / "out")["losses"][str(home_text)]
    assert after < before


def test_a_vocabulary_that_no_plan_cuts_is_refused(home, cut, tmp_path):
    plan = lp.PruningPlan.load(cut / "pruning_plan.json")
    assert kept_tokens(plan, 400, 400) is None
    plan.settings["base_model"] = str(cut)  # a name that leads back to the model itself
    with pytest.raises(lp.PrunerError, match="--teacher has 490 tokens in its vocabulary and the model 400"):
        kept_tokens(plan, 490, 400)
    with pytest.raises(lp.PrunerError, match="no plan cuts one to the other"):
        recover(arguments(home, tmp_path / "out", teacher=str(cut)))
