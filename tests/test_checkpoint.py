"""Loading and saving: checkpoints are complete or absent, pickles are never read, and errors are one line."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from helpers.models import build, tokens
from transformers import AutoTokenizer

import llm_pruner as lp
from llm_pruner.checkpoint.bounds import weight_file_bytes
from llm_pruner.checkpoint.config import load_config
from llm_pruner.checkpoint.locate import identity, locate
from llm_pruner.files import complete_folder
from llm_pruner.surgery.tokenizer import Subwords, cut_tokenizer, save_tokenizer


def test_saved_models_are_loaded_bit_identically(tmp_path):
    model = build("llama_grouped")
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.5, layers=[0])
    pruned = lp.apply(model, plan)
    lp.save(pruned, None, tmp_path / "a", plan=plan)
    assert (tmp_path / "a" / "pruning_plan.json").is_file()
    assert not [f for f in (tmp_path / "a").iterdir() if f.suffix in (".bin", ".pt")]
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "model.safetensors").st_mode) & stat.S_IROTH
    again = lp.apply(model, lp.PruningPlan.load(tmp_path / "a" / "pruning_plan.json"))
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pruned(ids).logits)


def test_a_checkpoint_is_replaced_and_other_folders_are_not(tmp_path):
    model = build("llama")
    lp.save(model, None, tmp_path / "a")
    lp.save(model, None, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(lp.PrunerError, match="not ours to replace"):
        lp.save(model, None, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(lp.PrunerError, match="is a file"):
        lp.save(model, None, tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_checkpoint_with_something_foreign_in_it_is_left_alone(tmp_path):
    lp.save(build("llama"), None, tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(lp.PrunerError, match=r"thesis\.tex"):
        lp.save(build("llama"), None, tmp_path / "a")
    assert (tmp_path / "a" / "thesis.tex").exists()


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    lp.save(build("llama"), None, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    lp.save(build("llama"), None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    lp.save(build("llama"), None, tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lp.PrunerError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        lp.load(str(tmp_path / "a"))


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="crash"), complete_folder(tmp_path / "a", "x") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("crash")
    with pytest.raises(lp.PrunerError, match="cannot write"), complete_folder(tmp_path / "a", "x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(lp.PrunerError, match="cannot write"):
        lp.save(build("llama"), None, "/proc/nowhere/a")
    assert list(tmp_path.iterdir()) == []


def test_the_original_survives_a_failed_replacement(tmp_path):
    model = build("llama")
    lp.save(model, None, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(lp.PrunerError), complete_folder(tmp_path / "a", "config.json"):
        raise OSError("disk")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_models_that_cannot_be_loaded_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"")
    cases = {
        str(tmp_path / "none"): "no model folder",
        str(tmp_path / "empty"): "no config.json",
        str(pickle): "pickle",
        str(tmp_path / "x.gguf"): "no file",
        "no-such-model-here": "not an alias",
    }
    for name, message in cases.items():
        with pytest.raises(lp.PrunerError, match=message):
            lp.load(name)
    lp.save(build("llama"), None, tmp_path / "mute")
    for option, message in (
        ({"device": "gpu"}, "give cpu"),
        ({"dtype": "int3"}, "choose"),
        ({"device": "cuda:99"}, "give device cpu"),
    ):
        with pytest.raises(lp.PrunerError, match=message):
            lp.load(str(tmp_path / "mute"), **option)


def test_paths_that_do_not_exist_are_refused_as_names_are():
    with pytest.raises(lp.PrunerError, match="no model folder no/where/at_all"):
        lp.load(Path("no/where/at_all"))


def test_the_name_of_a_gguf_file_is_no_pattern(tmp_path):
    file = tmp_path / "model[Q4_1].gguf"
    file.write_bytes(bytes(100))
    assert weight_file_bytes(*locate(str(file)), "main") == 100
    assert [size for _, size, _ in identity(str(file))[1]] == [100]


def test_weights_in_pickles_are_never_read(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(lp.PrunerError, match="safetensors"):
        lp.load(str(tmp_path))


def test_quantized_models_are_refused(tmp_path):
    config = build("llama").config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(lp.PrunerError, match="quantized"):
        lp.load(str(tmp_path))


def test_a_config_alone_is_enough_to_look(tmp_path):
    config = build("llama").config
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path / "config.json")).hidden_size == 32
    assert locate("org/model") == ("org/model", None)


def test_the_embedded_model_is_pruned_saved_and_loaded(smollm2, tmp_path):
    """The whole line on a real model: uniform and per-layer, logits equal to the bit after loading."""
    model, tokenizer = smollm2
    graph = lp.trace(model)
    assert len(graph.of_kind("heads")) == 30 and graph.of_kind("heads")[0].size == 3
    scores = lp.score(model, graph, criterion="l2", kinds=("heads", "neurons"))
    ids = tokenizer("The quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    for ratio, layers in ((0.34, None), (0.34, range(4, 28))):
        plan = lp.select(graph, scores, ratio, layers=layers)
        pruned = lp.apply(model, plan)
        assert lp.verify(model, pruned, plan).equivalent
        lp.save(pruned, tokenizer, tmp_path / "a", plan=plan)
        loaded, again = lp.load(str(tmp_path / "a"))
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, pruned(ids).logits)
        assert again("hello").input_ids == tokenizer("hello").input_ids
        assert again.chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_mask_equivalence_of_the_embedded_model(smollm2, ratio):
    model, _ = smollm2
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(graph, scores, ratio, kinds=("heads", "query_heads", "neurons"))
    assert lp.verify(model, lp.apply(model, plan), plan).equivalent


def test_an_adapter_with_more_tokens_than_its_base(home, tmp_path):
    """Training with new tokens resizes the embeddings, which the adapter then holds as a whole."""
    peft = pytest.importorskip("peft")
    model, tokenizer = lp.load(str(home / "base"))
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer) + 3)
    settings = peft.LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    trained = peft.get_peft_model(model, settings)
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(home / "base")}))
    merged, own = lp.load(str(tmp_path / "adapter"))
    assert len(own) == len(tokenizer) and merged.config.vocab_size == len(tokenizer) + 3
    ids = torch.tensor([own("This is <new>")["input_ids"]])
    torch.testing.assert_close(merged(ids).logits, trained.eval()(ids).logits)


@pytest.mark.parametrize("length", [None, 7])
def test_a_tokenizer_is_saved_as_it_was_before_its_use(length, home, tmp_path):
    """Encoding with a limit leaves the limit in the tokenizer; other programs would cut every text by it."""
    source = shutil.copytree(home / "base", tmp_path / "source")
    document = json.loads((source / "tokenizer.json").read_text())
    if length is not None:
        shape = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
        document["truncation"] = shape
    (source / "tokenizer.json").write_text(json.dumps(document))
    model, tokenizer = lp.load(str(source))
    tokenizer("This is", truncation=True, max_length=3)
    lp.save(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] == document["truncation"]


def test_a_tokenizer_of_the_hub_keeps_its_limits(home, tmp_path, monkeypatch):
    """Its own file is in the cache that its download has filled."""
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "0123abcd"
    shutil.copytree(home / "base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    document = json.loads((snapshot / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    (snapshot / "tokenizer.json").write_text(json.dumps(document))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    tokenizer.name_or_path = "org/base"
    tokenizer("This is", truncation=True, max_length=3)
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] == document["truncation"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_saved_tokenizer_says_nothing_of_its_loading(cut, home, tmp_path):
    """Arguments of from_pretrained and the limits of the latest use are no properties of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(home / "base", local_files_only=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["This is", "This"], truncation=True, padding=True, max_length=3)
    if cut:
        cut_tokenizer(tokenizer, sorted(Subwords(tokenizer).required), tmp_path)
    else:
        save_tokenizer(tokenizer, tmp_path)
    assert not {"is_local", "local_files_only"} & json.loads((tmp_path / "tokenizer_config.json").read_text()).keys()
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    assert document["truncation"] is None and document["padding"] is None


def test_weights_that_share_memory_are_refused_in_one_line(home, tmp_path):
    model, tokenizer = lp.load(str(home / "base"))
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    first.weight = second.weight
    with pytest.raises(lp.PrunerError, match=r"share their memory.*give each its own"):
        lp.save(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
