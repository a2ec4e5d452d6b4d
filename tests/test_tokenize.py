"""Examples: answers are learnt and prompts are not, cut, packed and streamed alike."""

import copy
import json

import pytest
from tokenizers import processors

import llm_pruner as lp
from llm_pruner.models.loss import IGNORED
from llm_pruner.recovery.prompts import plain_prompt, prompt_template
from llm_pruner.recovery.rows import read_rows
from llm_pruner.recovery.tokenize import ExampleFormat, fingerprint, tokenize


def decode_learnt(example, tokenizer):
    return tokenizer.decode([i for i, label in zip(*example.values(), strict=True) if label != IGNORED])


@pytest.mark.parametrize("template", ("alpaca", None))
def test_answers_are_learnt_and_prompts_are_not(home, tokenizer, template):
    data = tokenize(
        read_rows(str(home / "data.jsonl")), tokenizer, ExampleFormat(cutoff_len=96, template=template), "data"
    )
    assert len(data) == 60 and set(data.column_names) == {"input_ids", "labels"}
    for i, example in enumerate(data):
        answer = decode_learnt(example, tokenizer)
        assert answer.strip() == f"This is {i} times {i % 7}.</s>"
        assert all(label in (IGNORED, token) for token, label in zip(*example.values(), strict=True))
        assert tokenizer.decode(example["input_ids"]).count(f"Say {i}") == 1
    whole = tokenize(
        read_rows(str(home / "data.jsonl")),
        tokenizer,
        ExampleFormat(cutoff_len=96, template=template, train_on_inputs=True),
        "data",
    )
    assert all(example["input_ids"] == example["labels"] for example in whole)


def test_instructions_become_prompts():
    ask = prompt_template("alpaca")
    assert ask("Do {input} it", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo {input} it\n\n### Response:\n"
    )
    assert "### Input:\nthis\n\n### Response:\n" in ask("Do it", "this")
    assert (plain_prompt("Do it.", ""), plain_prompt("Why?", "that")) == ("Do it: ", "Why? that.")
    with pytest.raises(lp.PrunerError, match="no prompt template"):
        prompt_template("vicuna")


def test_a_template_is_read_from_a_file(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"prompt_input": "{instruction}|{input}|", "prompt_no_input": "{instruction}|"}))
    assert prompt_template(str(file))("a", "b") == "a|b|"
    file.write_text(json.dumps({"prompt_input": "{instruction}|"}))
    with pytest.raises(lp.PrunerError, match="prompt_no_input"):
        prompt_template(str(file))


def test_long_answers_are_cut_and_rows_without_any_left_out(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    cases = [("a", "long " * 200), ("question " * 200, "x"), ("b", ""), ("c", "fine")]
    file.write_text("\n".join(json.dumps({"instruction": a, "output": b}) for a, b in cases))
    data = tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=64, template=None), "d")
    assert len(data[0]["input_ids"]) == 64 and len(data) == 2
    assert data[0]["labels"][-1] != tokenizer.eos_token_id and data[1]["labels"][-1] == tokenizer.eos_token_id


def test_only_the_assistant_of_a_chat_is_learnt(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    turns = [("user", "Hello"), ("assistant", "Good day"), ("user", "And now"), ("assistant", "Farewell")]
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    (example,) = tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=96), "d")
    assert decode_learnt(example, tokenizer) == "Good day</s>Farewell</s>"
    shared = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    file.write_text(json.dumps({"conversations": shared}))
    (example,) = tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=96), "d")
    assert decode_learnt(example, tokenizer) == "Good day</s>"


def test_an_assistant_turn_without_a_question_is_not_learnt(tmp_path, tokenizer):
    turns = [{"from": who, "value": f"{who} says {i}"} for i, who in enumerate(("gpt", "human", "gpt"))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    (row,) = tokenize(read_rows(str(tmp_path / "a.jsonl")), tokenizer, ExampleFormat(cutoff_len=96), "a")
    learnt = tokenizer.decode([i for i in row["labels"] if i != IGNORED])
    assert "gpt says 2" in learnt and "gpt says 0" not in learnt


def test_text_is_packed_without_loss(tmp_path, tokenizer):
    file = tmp_path / "d.jsonl"
    texts = ["one two three " * n for n in (1, 9, 4, 30)]
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    data = tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=16), "d")
    assert {len(e["input_ids"]) for e in data} == {16} and all(e["labels"] == e["input_ids"] for e in data)
    stream = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    packed = [i for e in data for i in e["input_ids"]]
    assert packed == stream[: len(packed)] and len(stream) - len(packed) < 16
    streamed = list(tokenize(read_rows(str(file), streaming=True), tokenizer, ExampleFormat(cutoff_len=16), "d"))
    assert streamed == list(data)


@pytest.mark.parametrize("streaming", (False, True))
def test_answers_are_packed_without_padding(tmp_path, tokenizer, streaming):
    file = tmp_path / "d.jsonl"
    cases = [(f"question {i}", "word " * n) for i, n in enumerate((3, 0, 40, 1, 9, 30))]
    file.write_text("\n".join(json.dumps({"instruction": a, "output": b}) for a, b in cases))
    one_by_one = tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=500, template="question"), "d")
    assert len(one_by_one) == 5, "the empty answer teaches nothing"
    stream = {name: [i for e in one_by_one for i in e[name]] for name in ("input_ids", "labels")}
    packed = list(
        tokenize(
            read_rows(str(file), streaming),
            tokenizer,
            ExampleFormat(cutoff_len=16, template="question", packing=True),
            "d",
        )
    )
    expected = [
        {name: ids[i : i + 16] for name, ids in stream.items()} for i in range(0, len(stream["labels"]) - 15, 16)
    ]
    assert packed == [e for e in expected if any(label != IGNORED for label in e["labels"])]
    assert len(packed) > 4 and any(IGNORED in e["labels"] for e in packed)
    with pytest.raises(lp.PrunerError, match="--packing is for decoders"):
        tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=16, packing=True, encoder_decoder=True), "d")
    with pytest.raises(lp.PrunerError, match="does not fill one window"):
        tokenize(read_rows(str(file)), tokenizer, ExampleFormat(cutoff_len=5000, packing=True), "d")


def test_the_blank_before_an_answer_is_learnt_with_it(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "Say", "input": "so", "output": "fine words"}))
    (example,) = tokenize(
        read_rows(str(tmp_path / "d.jsonl")), tokenizer, ExampleFormat(cutoff_len=96, template="question"), "d"
    )
    assert tokenizer.decode(example["input_ids"]) == "Question: Say\nso\nAnswer: fine words</s>"
    assert decode_learnt(example, tokenizer) == " fine words</s>"


def ended_by_itself(tokenizer):
    """Return a copy of a tokenizer that puts the end-of-text token behind every text."""
    words = copy.deepcopy(tokenizer)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return words


@pytest.mark.parametrize("add_eos_token", (False, True))
@pytest.mark.parametrize("end", ("</s>", ""))
def test_a_whole_answer_is_learnt_whatever_ends_a_text(home, tokenizer, add_eos_token, end):
    words = ended_by_itself(tokenizer) if end else copy.deepcopy(tokenizer)
    words.eos_token = end or None
    form = ExampleFormat(cutoff_len=96, add_eos_token=add_eos_token)
    (example, *_) = tokenize(read_rows(str(home / "data.jsonl")), words, form, "data")
    assert decode_learnt(example, words) == f"This is 0 times 0.{end}"


def test_blank_documents_leave_no_end_behind(tmp_path, tokenizer):
    words = copy.deepcopy(tokenizer)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    texts = ["The first text is short.", "", "The second has more words.", " \n", "The third ends the file."] * 2
    windows = []
    for kept in (texts, [text for text in texts if text.strip()]):
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in kept))
        data = tokenize(read_rows(str(tmp_path / "rows.jsonl")), words, ExampleFormat(cutoff_len=8), "rows")
        windows.append(list(data["input_ids"]))
    assert windows[0] == windows[1]


def test_the_key_of_cached_data_holds_all_that_they_depend_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    other_end, template = copy.deepcopy(tokenizer), tmp_path / "template.json"
    other_end.eos_token = "<s>"
    keys = [fingerprint("general", words, ExampleFormat()) for words in (tokenizer, tokenizer, other_end)]
    tokenizer("Say this.", truncation=True, max_length=2)
    keys.append(fingerprint("general", tokenizer, ExampleFormat()))
    assert (
        keys[0] == keys[1] == keys[3] != keys[2] != fingerprint("general", ended_by_itself(tokenizer), ExampleFormat())
    )
    for place in ("{instruction}", "Q: {instruction}"):
        template.write_text(json.dumps({"prompt_input": place + "{input}", "prompt_no_input": place}))
        keys.append(fingerprint("general", tokenizer, ExampleFormat(template="~/template.json")))
    assert keys[4] != keys[5]
