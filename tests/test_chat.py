"""The page to try models on."""

import json
import os
import time
from contextlib import contextmanager

import pytest
from helpers.browser import browser_page

import llm_pruner as lp
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.tools import chat
from llm_pruner.tools.arguments import ChatArguments, GenerateArguments
from llm_pruner.tools.chat import AnswerSettings, answer, page_of, titles_of


def test_an_answer_is_the_text_of_generate(home):
    model, tokenizer = lp.load(str(home / "pruned"))
    ids = tokenizer("This is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    *parts, last = answer(model, tokenizer, "This is", AnswerSettings(max_new_tokens=12))
    assert last.text == expected and last.tokens == out.shape[1] - ids["input_ids"].shape[1]
    assert len(parts) > 1 and all(last.text.startswith(part.text) for part in parts)
    assert "tokens/s" in last.speed


def test_closing_an_answer_stops_the_model(home):
    model, tokenizer = lp.load(str(home / "base"))
    model.generation_config.eos_token_id = None
    written = answer(model, tokenizer, "This is", AnswerSettings(max_new_tokens=100))
    next(written)
    clock = written.gi_frame.f_locals["writer"].clock
    written.close()  # returns only when the thread that writes has ended
    assert 0 < clock.tokens < 100


def test_an_answer_ends_at_the_context_length(home):
    model, tokenizer = lp.load(str(home / "base"))
    model.generation_config.eos_token_id, model.generation_config.num_beams = None, 4
    prompt = "a b c " * 20
    room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
    assert (
        0 < room < 100 and list(answer(model, tokenizer, prompt, AnswerSettings(max_new_tokens=100)))[-1].tokens == room
    )


def test_the_chat_template_is_used(home):
    model, tokenizer = lp.load(str(home / "base"))
    plain = list(answer(model, tokenizer, "hello", AnswerSettings(max_new_tokens=5)))[-1]
    message = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    settings = AnswerSettings(max_new_tokens=5, use_chat_template=True)
    templated = list(answer(model, tokenizer, "hello", settings))[-1]
    same = list(answer(model, tokenizer, message, AnswerSettings(max_new_tokens=5)))[-1]
    assert templated.text == same.text != plain.text


@pytest.mark.parametrize(
    ("prompt", "message"), [(" ", "write a prompt"), ("x" * 20_001, "at most 20,000"), ("a b " * 300, "reads at most")]
)
def test_bad_prompts(prompt, message, home):
    model, tokenizer = lp.load(str(home / "base"))
    with pytest.raises(PrunerError, match=message):
        next(answer(model, tokenizer, prompt))


def test_an_error_of_the_model_reaches_the_reader(home, monkeypatch):
    model, tokenizer = lp.load(str(home / "base"))
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(PrunerError, match="the model stopped"):
        list(answer(model, tokenizer, "hello"))


@contextmanager
def open_page(models, width=1280):
    """The page of models in a browser tab, and what went wrong in it."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    theme, page = page_of(models)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=theme, footer_links=[]
        )
        assert address.startswith("http://127.0.0.1:")
        with browser_page() as (tab, faults):
            tab.set_viewport_size({"width": width, "height": 844})
            tab.goto(address)
            yield tab, faults
    finally:
        page.close()


def wait_for_answer(tab, i):
    tab.wait_for_function(f"document.querySelector('#answer{i} textarea')?.value.length > 0", timeout=30_000)
    tab.wait_for_function(f"document.querySelector('#speed{i}')?.innerText.includes('tokens/s')")


def test_the_page_in_a_browser(home):
    with open_page({name: lp.load(str(home / name)) for name in ("base", "pruned")}) as (tab, faults):
        prompt = tab.locator("#prompt textarea")
        prompt.fill("This is")
        prompt.press("Shift+Enter")
        assert prompt.input_value() == "This is\n" and not tab.locator("#answer0 textarea").input_value()
        prompt.press("Backspace")
        tab.locator("#generate").click()
        for i in range(2):
            wait_for_answer(tab, i)
        first = tab.locator("#answer1 textarea").input_value()
        # The page closes its stream of answers itself when they are there, which the browser calls a failure.
        assert [fault for fault in faults if "/queue/data" not in fault] == []
        prompt.fill("Say 3 times")
        prompt.press("Enter")
        tab.wait_for_function(f"!['', {json.dumps(first)}].includes(document.querySelector('#answer1 textarea').value)")
        assert prompt.input_value() == "Say 3 times"


def test_the_page_names_the_models_and_their_sizes(home):
    models = {name: lp.load(str(home / name)) for name in ("base", "pruned")}
    before, after = (sum(p.numel() for p in model.parameters()) for model, _ in models.values())
    titles = [
        f"base - {before / 1e3:.1f} k parameters",
        f"pruned - {after / 1e3:.1f} k parameters, {after / before:.2f} of base",
    ]
    assert titles_of(models) == titles
    with open_page(models, width=390) as (tab, _):
        tab.wait_for_selector("#answer1")
        assert "llm-pruner chat" in tab.locator("#title").inner_text()
        boxes = [tab.locator(f"#answer{i}").bounding_box() for i in range(2)]
        assert [tab.locator(f"#answer{i} label").inner_text().split("\n")[0] for i in range(2)] == titles
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"] and boxes[0]["x"] == boxes[1]["x"]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.set_viewport_size({"width": 1280, "height": 844})
        tab.wait_for_function(
            "document.querySelector('#answer0').getBoundingClientRect().y === "
            "document.querySelector('#answer1').getBoundingClientRect().y"
        )


def test_the_stop_button_stops_the_model(home, monkeypatch):
    model, tokenizer = lp.load(str(home / "base"))
    model.generation_config.eos_token_id = None
    forward, calls = model.forward, []

    def slow(*args, **kwargs):
        calls.append(time.monotonic())
        time.sleep(0.2)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    with open_page({"base": (model, tokenizer)}) as (tab, _):
        tab.locator("#prompt textarea").fill("This is")
        tab.locator("#generate").click()
        wait_for_answer(tab, 0)
        tab.locator("#stop").click()
        deadline = time.monotonic() + 10
        while time.monotonic() - calls[-1] < 2:  # ten times what a token takes
            assert time.monotonic() < deadline and len(calls) < 100
            time.sleep(0.1)
        assert tab.locator("#answer0 textarea").input_value()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chat"], "name one to three"),
        (["chat", "a", "b", "c", "d"], "4 models given; at most 3"),
        (["chat", "/nowhere"], "there is no model folder"),
        (["chat", "smollm2-135m", "--port", "0"], "--port 0"),
    ],
)
def test_bad_input_of_the_command(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_command_names_its_models_before_it_loads_them(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")

    def stop(name, *_):
        raise PrunerError(capsys.readouterr().out)

    monkeypatch.setattr(chat, "load_with_tokenizer", stop)
    with pytest.raises(PrunerError, match=r"^loading smollm2-135m, a \.\.\.\n$"):
        chat.serve_chat(ChatArguments(model=["smollm2-135m", "a"]))


def test_generate_leaves_its_flags_alone():
    arguments = GenerateArguments()
    assert arguments.models_to_serve() == arguments.models_to_serve() == ["smollm2-135m"] and arguments.model == []


def test_the_page_sets_no_environment_variable(home, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    _, page = page_of({"base": lp.load(str(home / "base"))})
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ and not page.analytics_enabled


def test_generate_takes_the_flags_of_llm_pruner(home, tmp_path):
    assert GenerateArguments().models_to_serve() == ["smollm2-135m"]
    pickle = str(home / "pruned" / "pytorch_model.bin")
    assert GenerateArguments(model_type="pruneLLM", ckpt=pickle).models_to_serve() == [str(home / "pruned")]
    adapter = str(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(home / "pruned")}))
    assert GenerateArguments(model_type="tune_prune_LLM", ckpt=pickle, lora_ckpt=adapter).models_to_serve() == [adapter]
    with pytest.raises(PrunerError, match="was trained on"):
        GenerateArguments(model_type="tune_prune_LLM", ckpt=str(home / "base"), lora_ckpt=adapter).models_to_serve()
    with pytest.raises(PrunerError, match="needs --ckpt"):
        GenerateArguments(model_type="pruneLLM").models_to_serve()
    with pytest.raises(PrunerError, match="--model_type 'vicuna' is not valid"):
        GenerateArguments(model_type="vicuna").models_to_serve()
    assert ChatArguments().host == "127.0.0.1"


def test_names_and_errors_stay_text(home):
    """Show a model's name and an error of its chat template, neither as HTML of the page."""
    hostile = "<img src=x onerror=window.pwned=1>"
    model, tokenizer = lp.load(str(home / "base"))
    tokenizer.chat_template = f"{{{{ raise_exception('{hostile}') }}}}"
    with open_page({hostile: (model, tokenizer)}) as (tab, faults):
        tab.locator("#prompt textarea").fill(hostile)
        tab.locator("#generate").click()
        tab.get_by_text("the chat template refuses").first.wait_for()
        assert hostile in tab.locator("#answer0").inner_text()
        assert tab.evaluate("window.pwned ?? 0") == 0
        assert [fault for fault in faults if "/queue/data" not in fault and "/x" not in fault] == []
        assert tab.locator("img[src=x]").count() == 0
