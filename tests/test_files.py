"""Plans applied to files, and damaged checkpoints."""

import json
import shutil

import pytest
import torch
from helpers.models import build, pruned_by
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.integrity import check
from llm_pruner.checkpoint.shards import Shards
from llm_pruner.checkpoint.stored import weights_in
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_files_are_cut_as_the_model_is(architecture, tmp_path):
    model = build(architecture)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    plan, pruned = pruned_by(model)
    plan.save(tmp_path / "plan.json")
    argv = [str(tmp_path / name) for name in ("plan.json", "model", "out")]
    assert main(["apply", *argv, "--verify"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(pruned, again) and again.config.dtype == torch.float32
    told = lp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json", verify=True)
    assert told.settings["base_model"] == argv[1] and told.weights


@pytest.mark.parametrize("kinds", [("hidden",), ("layers",)])
def test_whole_model_cuts_too(kinds, tmp_path):
    model = build("llama_grouped")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    plan, pruned = pruned_by(model, 0.5, kinds=kinds)
    apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")
    assert same(pruned, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_the_generation_config_stays(tmp_path):
    """Its generation config, and not the folder that is read."""
    model = build("llama_grouped")
    model.generation_config.eos_token_id, model.generation_config.temperature = [1, 5], 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model")
    plan, _ = pruned_by(model)
    apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert found.eos_token_id == [1, 5] and found.temperature == 0.6 and found.do_sample
    with pytest.raises(PrunerError, match="is the model that is read"):
        apply_to_files(plan, str(tmp_path / "model"), tmp_path / "model")
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


def test_magnitudes_are_read_from_files(architecture, tmp_path):
    model = build(architecture)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    graph = lp.trace(model)
    expected = lp.score(model, graph, criterion="l2")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    found = lp.score(empty, graph, criterion="l2", weights=weights_in(str(tmp_path / "model")))
    assert expected.values.keys() == found.values.keys()
    for name, value in expected.values.items():
        assert torch.equal(value, found.values[name])


def test_the_command_prunes_files_without_loading_them(home, tmp_path, monkeypatch):
    flags = ["--base_model", str(home / "base"), "--pruner_type", "l2", "--pruning_ratio", "0.4", "--save_model"]
    flags += ["--output_root", str(tmp_path), "--eval_datasets", "", "--compensate", "none"]
    assert main(["prune", *flags, "--save_ckpt_log_name", "loaded"]) == 0
    monkeypatch.setattr("llm_pruner.pruning.loading.load", None)
    assert main(["prune", *flags, "--save_ckpt_log_name", "files", "--stream"]) == 0
    a, b = (lp.load(str(tmp_path / name))[0] for name in ("loaded", "files"))
    assert same(a, b)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("loaded", "files"))
    assert a["parameters_after"] == b["parameters_after"]
    check(tmp_path / "files")


@pytest.fixture
def pruned_folder(tmp_path):
    """A pruned checkpoint of several files."""
    model = build("llama_grouped")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    plan, _ = pruned_by(model)
    return apply_to_files(plan, str(tmp_path / "model"), tmp_path / "pruned")


def test_an_unchanged_checkpoint_passes(pruned_folder):
    check(pruned_folder)


def flip(folder):
    file = max(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return f"{file.name} is not the file that was written"


def cut_short(folder):
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    return "is not the file that was written"


def lose(folder):
    file = max(folder.glob("*.safetensors"))
    file.unlink()
    return f"lacks .*{file.name}"


def alter_plan(folder):
    file = folder / "pruning_plan.json"
    file.write_text(file.read_text().replace('"base_model": ', '"base_model": "x", "was": '))
    return "was changed after it was written"


def alter_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    return r"model.embed_tokens.weight in .* is \[96, 32\]; config.json makes it \[97, 32\]"


def slip_in(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"extra": torch.zeros(1)}, folder / "zz.safetensors")
    index["weight_map"]["extra"] = "zz.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "zz.safetensors is not part of the checkpoint"


@pytest.mark.parametrize("harm", [flip, cut_short, lose, alter_plan, alter_config, slip_in])
def test_a_changed_checkpoint_is_refused(harm, pruned_folder):
    message = harm(pruned_folder)
    with pytest.raises(PrunerError, match=message):
        check(pruned_folder)
    with pytest.raises(PrunerError, match=message):
        lp.load(str(pruned_folder), verify=True)


def test_a_truncated_shard_is_named(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    plan, _ = pruned_by(model)
    cut_short(tmp_path / "model")
    with pytest.raises(PrunerError, match=r"model-00\S+ is damaged"):
        apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_config_and_weights_that_do_not_belong_together(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    plan, _ = pruned_by(model, kinds=("neurons",))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(PrunerError, match=r"lm_head.weight .* do not belong together"):
        apply_to_files(plan, str(tmp_path / "model"), tmp_path / "out")


def test_a_plan_for_another_model(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    plan, _ = pruned_by(build("llama", intermediate_size=64))
    plan.save(tmp_path / "plan.json")
    assert main(["apply", *(str(tmp_path / name) for name in ("plan.json", "model", "out"))]) == 2
    assert "made for another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x.safetensors", "model.bin", ".."]
)
def test_an_index_cannot_leave_its_folder(name, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = name
    file.write_text(json.dumps(index))
    for reading in (lambda: Shards(tmp_path / "model"), lambda: lp.load(str(tmp_path / "model"))):
        with pytest.raises(PrunerError, match="not a safetensors file of the folder"):
            reading()


def test_index_and_files_must_agree(tmp_path):
    build("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    file = tmp_path / "model" / "model.safetensors.index.json"
    good = json.loads(file.read_text())
    first, second = sorted(set(good["weight_map"].values()))[:2]
    for change, message in (
        ({"weight_map": {**good["weight_map"], "nowhere": first}}, "looks for nowhere"),
        ({"weight_map": []}, "is damaged"),
        ({"weight_map": {}}, "names no tensors"),
        ({}, "is damaged"),
    ):
        file.write_text(json.dumps(change))
        with pytest.raises(PrunerError, match=message):
            Shards(tmp_path / "model")
    file.write_text("{")
    with pytest.raises(PrunerError, match="cannot read"):
        Shards(tmp_path / "model")
    file.write_text(json.dumps(good))
    shutil.copy(tmp_path / "model" / first, tmp_path / "model" / second)
    with pytest.raises(PrunerError, match=r"is in .* and in"):
        Shards(tmp_path / "model")


def test_files_are_standard_safetensors(pruned_folder):
    for file in pruned_folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, Shards(pruned_folder).read(name))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a plan, a checkpoint and a folder"),
        (["/no/plan.json", "x", "y"], "cannot read"),
        (["--plam", "x"], "did you mean --plan?"),
        (["/dev/null", "x", "y"], "cannot read /dev/null"),
    ],
)
def test_bad_input_of_the_command(argv, message, capsys):
    assert main(["apply", *argv]) == 2
    assert message in capsys.readouterr().err


def test_stored_names_stay(tmp_path):
    """The files keep names that transformers reads as others, since other engines know these alone."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    plan, pruned = pruned_by(model, kinds=("neurons",))
    lp.save(pruned, None, tmp_path / "saved", plan)
    apply_to_files(plan, str(tmp_path / "model"), tmp_path / "applied")
    names = Shards(tmp_path / "applied").tensors.keys()
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert names == Shards(tmp_path / "saved").tensors.keys()


def test_all_files_of_a_tokenizer_are_copied(tmp_path):
    """Also those that few classes of transformers have, and further chat templates."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    files = ["normalizer.json", "target_vocab.json", "bpe.codes", "additional_chat_templates/tool_use.jinja"]
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for file in files:
        (tmp_path / "model" / file).write_text("{}")
    apply_to_files(pruned_by(model, kinds=("neurons",))[0], str(tmp_path / "model"), tmp_path / "out")
    assert all((tmp_path / "out" / file).is_file() for file in files)
