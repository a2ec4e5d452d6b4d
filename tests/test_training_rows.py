"""Training rows: every kind is read, and malformed rows are refused in one line that names the source and the row."""

import json
from dataclasses import replace

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_pruner as lp
from llm_pruner.recovery.rows import read_rows
from llm_pruner.recovery.tokenize import ExampleFormat, tokenize
from llm_pruner.row_kinds import read_messages, read_text, row_kind

FORM = ExampleFormat(cutoff_len=48)
TURN = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Good day"}


def stream(rows):
    """Return rows with the values that they have, not with types that their columns share."""
    return datasets.IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": tuple(rows)})


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("suffix", (".json", ".parquet", ".csv", ".txt"))
def test_files_of_every_format_are_read(tmp_path, suffix):
    data = datasets.Dataset.from_dict({"text": ["some words", "and more"]})
    file = tmp_path / f"d{suffix}"
    if suffix == ".txt":
        file.write_text("some words\nand more")
    else:
        getattr(data, f"to_{suffix[1:]}")(str(file))
    assert " ".join(r["text"] for r in read_rows(str(file))).split() == ["some", "words", "and", "more"]


@pytest.mark.parametrize("streaming", (False, True))
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'null\n{"text": "a"}\n', "row 1: the row is null: give an object"),
        ("a.json", b' [ null, {"text": "a"}]', "row 1: the row is null: give an object"),
        ("a.json", b'[Infinity, {"text": "a"}]', "row 1: the row is Infinity: give an object"),
        ("a.json", b'[1e999, {"text": "a"}]', "row 1: the row is 1e999: give an object"),
        ("a.jsonl", b'3\n{"text": "a"}\n', "cannot read the data set"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "cannot read the data set .*surrogate"),
        ("a.jsonl", b'{"text": "a"\n', "cannot read the data set"),
        ("a.jsonl", b"", "the data set .* is empty"),
        ("a.json", b'{"text": ["a", "b"]}', "row 1: text is a list"),
        ("a.csv", b'text\n"a\n', "cannot read the data set"),
        ("a.csv", b"\xff\xfe", "cannot read the data set"),
        ("a.parquet", b"PAR1", "cannot read the data set"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, tokenizer, capfd, streaming, name, content, problem):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(lp.PrunerError, match=problem) as refused:
        list(tokenize(read_rows(str(file), streaming), tokenizer, FORM, str(file)))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert "Failed to" not in capfd.readouterr().err


def test_columns_tell_the_kind_of_rows():
    with pytest.raises(lp.PrunerError, match="has the columns id, title"):
        row_kind(["title", "id"], "d")
    columns = {
        "chat": ["messages"],
        "pair": ["prompt", "completion"],
        "instruction": ["instruction", "response"],
        "text": ["text"],
    }
    assert {kind: row_kind(names, "d") for kind, names in columns.items()} == {kind: kind for kind in columns}


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [("four", "four"), (4, "4"), (0, "0"), (0.5, "0.5"), (None, ""), ("", "")])
def test_texts_and_numbers_are_read_as_text(value, text):
    assert read_text({"output": value}, "output") == text


@pytest.mark.parametrize("value", ({"a": 1}, ["a"], [], {}, True, b"a"))
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"instruction": "Say", "output": ...}, "output"),
        ({"instruction": ..., "output": "x"}, "instruction"),
        ({"instruction": "Say", "input": ..., "output": "x"}, "input"),
        ({"prompt": ..., "completion": "x"}, "prompt"),
        ({"question": "Why", "answer": ...}, "answer"),
        ({"text": ...}, "text"),
    ],
)
def test_other_values_are_refused(tokenizer, row, column, value):
    row = {name: value if given is ... else given for name, given in row.items()}
    with pytest.raises(lp.PrunerError, match=rf"^d, row 1: {column} is .*: give a text or a number$"):
        list(tokenize(stream([row]), tokenizer, FORM, "d"))


def test_the_first_column_that_holds_a_value_is_read():
    assert read_text({"output": None, "response": "fine"}, "output", "response") == "fine"


def test_answers_that_are_zero_are_learnt(tmp_path, tokenizer):
    file = write_rows(tmp_path / "d.jsonl", {"instruction": "1 - 1", "output": 0})
    (example,) = tokenize(read_rows(file), tokenizer, FORM, "d")
    assert tokenizer.decode(example["input_ids"]).endswith("0</s>")


# --- Chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("Hello", r"messages is a text \('Hello'\): give a list of turns"),
        (5, r"messages is a number \(5\): give a list"),
        ({"role": "user"}, "messages is an object .*: give a list"),
        (["Hello"], r"turn 1 of messages is a text \('Hello'\): give an object"),
        ([TURN, None], "turn 2 of messages is missing: give an object"),
        ([[TURN]], "turn 1 of messages is a list .*: give an object"),
        ([TURN, {"content": "x"}], "the role of turn 2 of messages is missing"),
        ([{"role": "", "content": "x"}], "the role of turn 1 of messages is empty"),
        ([{"role": 3, "content": "x"}], r"the role of turn 1 of messages is a number \(3\)"),
        ([{"role": ["user"], "content": "x"}], "the role of turn 1 of messages is a list"),
        ([{"role": "user"}], "the content of turn 1 of messages is missing: give a text, or a list of text parts"),
        ([{"role": "user", "content": None}], "the content of turn 1 of messages is missing"),
        ([{"role": "user", "content": {"text": "x"}}], "the content of turn 1 of messages is an object"),
        ([{"role": "user", "content": True}], r"the content of turn 1 of messages is a boolean \(True\)"),
        ([{"role": "user", "content": ["x"]}], r"part 1 of turn 1 of messages is a text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part 1 of turn 1 of messages is an object"),
    ],
)
def test_malformed_chats_are_refused(tokenizer, messages, problem):
    rows = [{"messages": [TURN, ANSWER]}, {"messages": messages}]
    with pytest.raises(lp.PrunerError, match=f"^d, row 2: {problem}"):
        list(tokenize(stream(rows), tokenizer, FORM, "d"))


def test_content_in_parts_becomes_one_text():
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day", "image": None}]
    assert read_messages({"messages": [{"role": "user", "content": parts}]}) == [
        {"role": "user", "content": "Good day"}
    ]


def test_roles_of_sharegpt_become_those_of_templates():
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": 4}]
    expected = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "4"}]
    assert read_messages({"conversations": turns, "messages": None}) == expected


@pytest.mark.parametrize("messages", (None, [], [TURN]))
def test_chats_without_an_answer_are_left_out(tmp_path, tokenizer, messages):
    file = write_rows(tmp_path / "d.jsonl", {"messages": [TURN, ANSWER]}, {"messages": messages})
    assert len(tokenize(read_rows(file), tokenizer, FORM, "d")) == 1
    file = write_rows(tmp_path / "e.jsonl", {"messages": messages})
    with pytest.raises(lp.PrunerError, match=r"no row of e has an answer|has the columns"):
        tokenize(read_rows(file), tokenizer, FORM, "e")


# --- Arbitrary rows -------------------------------------------------------------------------------------------------


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={name: VALUES for name in ("role", "from", "content", "value")}) | VALUES,
    max_size=3,
)
ROWS = st.one_of(
    st.lists(row, min_size=1, max_size=3)
    for row in (
        st.fixed_dictionaries({"text": VALUES}),
        st.fixed_dictionaries({"instruction": VALUES, "output": VALUES}, optional={"input": VALUES}),
        st.fixed_dictionaries({"prompt": VALUES, "completion": VALUES}),
        st.fixed_dictionaries({"messages": TURNS | VALUES}),
        st.fixed_dictionaries({"conversations": TURNS | VALUES}),
    )
)


def check_rows(rows, tokenizer, source, read):
    """Tokenize rows, packed and not; any error is one line that names the source."""
    for form in (FORM, replace(FORM, packing=True)):
        try:
            for example in tokenize(read(), tokenizer, form, source):
                assert all(isinstance(i, int) for i in example["input_ids"])
                assert len(example["input_ids"]) == len(example["labels"]) <= form.cutoff_len
        except lp.PrunerError as error:
            assert source in str(error) and "\n" not in str(error)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_arbitrary_rows_are_learnt_or_refused_in_one_line(tokenizer, rows):
    check_rows(rows, tokenizer, "d.jsonl", lambda: stream(rows))


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_arbitrary_files_are_learnt_or_refused_in_one_line(tokenizer, tmp_path, rows):
    file = write_rows(tmp_path / "d.jsonl", *rows)
    check_rows(rows, tokenizer, "d.jsonl", lambda: read_rows(file))
