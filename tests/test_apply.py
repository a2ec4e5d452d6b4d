"""``llm-pruner apply``: plans of refitted runs, checkpoints with code of their own, missing tokenizers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import build, pruned_by
from transformers import AutoConfig, AutoModelForCausalLM

import llm_pruner as lp
from llm_pruner.checkpoint import on_disk as files_of_tensors
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.checkpoint.load import load_with_tokenizer
from llm_pruner.cli import main
from llm_pruner.models.inputs import example_inputs

REMOTE = Path(__file__).parent / "fixtures" / "remote_code"


def equal_weights(one, other, **tolerance) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], **tolerance) for n in one)


@pytest.fixture(scope="module", params=["least_squares", "bias"])
def refitted(request, home, home_text, tmp_path_factory):
    """The folder of a compensated run, on 32 samples and 4 of the model's own."""
    output = tmp_path_factory.mktemp(request.param)
    flags = ["--num_examples", "32", "--calib_seq_len", "16", "--calib_dataset", str(home_text), "--eval_datasets", ""]
    flags += ["--pruner_type", "l2", "--pruning_ratio", "0.4", "--compensate", request.param, "--self_examples", "4"]
    argv = ["prune", "--base_model", str(home / "base"), "--output_root", str(output), "--save_ckpt_log_name", "run"]
    assert main([*argv, *flags, "--save_model"]) == 0
    return output / "run"


def apply(refitted, home, folder, *flags):
    return main(["apply", str(refitted / "pruning_plan.json"), str(home / "base"), str(folder), *flags])


def test_apply_refits_again(refitted, home, tmp_path):
    assert apply(refitted, home, tmp_path / "again", "--refit", "--verify") == 0
    again, tokenizer = lp.load(str(tmp_path / "again"))
    assert tokenizer is not None and equal_weights(again, lp.load(str(refitted))[0], rtol=1e-4, atol=1e-5)
    assert "Without the refit" not in (tmp_path / "again" / "README.md").read_text()


def test_apply_says_that_a_refit_is_missing(refitted, home, tmp_path, capsys):
    assert apply(refitted, home, tmp_path / "plain") == 0

    assert "this checkpoint is not: --refit does it again" in capsys.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    run = AutoModelForCausalLM.from_pretrained(refitted)
    assert not equal_weights(plain, run, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "plain" / "README.md").read_text()
    method = lp.PruningPlan.load(refitted / "pruning_plan.json").settings["refit"]["compensation"]
    assert f"**Without the refit of the original run** ({method} on text.txt)" in card
    assert lp.PruningPlan.load(tmp_path / "plain" / "pruning_plan.json").settings["without_refit"] is True
    assert "Without the refit" not in (refitted / "README.md").read_text()


def test_a_refit_may_use_another_text(refitted, home, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(f"Line {i} of another text. " * 20 for i in range(60)))
    assert apply(refitted, home, tmp_path / "other", "--refit", "--calib_dataset", str(tmp_path / "other.txt")) == 0
    plan = lp.PruningPlan.load(tmp_path / "other" / "pruning_plan.json")
    assert plan.settings["refit"]["calibration"]["dataset"] == str(tmp_path / "other.txt")
    assert not equal_weights(lp.load(str(tmp_path / "other"))[0], lp.load(str(refitted))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("record", "flags", "message"),
    [
        (None, ["--refit"], "the plan's run was not refitted: leave out --refit"),
        ({"compensation": "bias"}, ["--refit"], "record of its refit is damaged"),
        (
            {"calibration": {"dataset": "c4", "samples": "x", "tokens": 8}},
            ["--refit"],
            "record of its refit is damaged",
        ),
        (None, ["--calib_dataset", "c4"], "--calib_dataset c4 has no effect without --refit"),
    ],
)
def test_a_refit_that_cannot_be_repeated_is_refused(record, flags, message, home, tmp_path, capsys):
    plan = lp.PruningPlan.load(home / "pruned" / "pruning_plan.json")
    if record is not None:
        plan.settings["refit"] = record
    plan.save(tmp_path / "plan.json")
    argv = [str(tmp_path / "plan.json"), str(home / "base"), str(tmp_path / "out")]
    assert main(["apply", *argv, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A checkpoint with code of its own in two layers of modules, and companion files."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = shutil.copytree(REMOTE, tmp_path / "remote", ignore=shutil.ignore_patterns("__pycache__"))
    code = (folder / "modeling_compact.py").read_text()
    (folder / "modeling_compact.py").write_text(f"from .helpers_compact import NOTHING  # noqa: F401\n{code}")
    (folder / "helpers_compact.py").write_text("NOTHING = None\n")
    (folder / "LICENSE").write_text("mine")
    (folder / "unrelated.py").write_text("raise SystemExit\n")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kinds", [("neurons",), ("hidden",)], ids="".join)
def test_code_and_companions_of_a_checkpoint_go_with_it(kinds, remote, tmp_path):
    model = lp.load(str(remote), trust_remote_code=True)[0]
    plan, pruned = pruned_by(model, kinds=kinds)
    folder = apply_to_files(plan, str(remote), tmp_path / "out", trust_remote_code=True)
    assert sorted(file.stem for file in folder.glob("*.py")) == [
        "configuration_compact",
        "helpers_compact",
        "modeling_compact",
    ]
    assert (folder / "LICENSE").read_text() == "mine"
    loaded = lp.load(str(folder), trust_remote_code=True)[0]
    ids = example_inputs(pruned)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    apply_to_files(plan, str(remote), folder, trust_remote_code=True)  # a checkpoint of ours, and so replaced


def test_code_of_a_model_that_transformers_knows_goes_with_it(tmp_path):
    """Its config names modules that nothing here imports, and others would miss."""
    build("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["../escape.Own", None]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "modeling_own.py").write_text("raise SystemExit\n")
    (tmp_path / "escape.py").touch()
    model, _ = lp.load(str(tmp_path / "model"))
    plan, pruned = pruned_by(model)
    lp.save(pruned, None, tmp_path / "saved", plan)
    apply_to_files(plan, str(tmp_path / "model"), tmp_path / "applied")
    for name in ("saved", "applied"):
        assert [file.name for file in (tmp_path / name).glob("*.py")] == ["modeling_own.py"]


def test_a_folder_without_a_tokenizer_is_loaded(tmp_path, capsys):
    lp.save(build("llama"), None, tmp_path / "mute")
    model, tokenizer = lp.load(str(tmp_path / "mute"))
    assert tokenizer is None and model.config.hidden_size == 32
    lp.save(model, tokenizer, tmp_path / "again")
    with pytest.raises(lp.PrunerError, match="mute has no tokenizer"):
        load_with_tokenizer(str(tmp_path / "mute"))
    output = str(tmp_path / "out")
    for argv in (
        ["prune", "--base_model", str(tmp_path / "mute"), "--output", output, "--pruner_type", "l2"],
        ["evaluate", str(tmp_path / "mute"), "--datasets", "python-docs"],
        ["vocab", str(tmp_path / "mute"), "--corpus", "python-docs", "--keep", "0.5", "--output_dir", output],
        ["recover", "--prune_model", str(tmp_path / "mute"), "--output_dir", output],
    ):
        assert main(argv) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and ("no tokenizer" in errors[0] or argv[0] == "recover"), (argv, errors)


def test_tensors_in_files_keep_their_names_where_the_system_wants_it(tmp_path, monkeypatch):
    """As on Windows (a mapped file cannot lose its name) and macOS (space cannot be reserved)."""
    monkeypatch.setattr(files_of_tensors, "CAN_UNLINK_OPEN", False)
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = torch.arange(3_000_000, dtype=torch.float32).view(3, -1)
    placed = files_of_tensors.on_disk("/proc/nowhere")(tensor)
    assert torch.equal(placed, tensor) and len(list(tmp_path.iterdir())) == 1
    del placed
    assert list(tmp_path.iterdir()) == []


def test_a_modelling_file_of_other_code_is_refused(remote, tmp_path, capsys):
    """A file that names a class that transformers lacks, in place of the checkpoint's own, would not load."""
    plan, pruned = pruned_by(lp.load(str(remote), trust_remote_code=True)[0], kinds=("neurons",), layers=[1])
    plan.save(tmp_path / "plan.json")
    (remote / "tokenizer.json").write_text("{}")  # which prune asks for before it reads any
    folders = [str(remote), str(tmp_path / "out"), "--trust_remote_code", "--standalone"]
    for argv in (["apply", str(tmp_path / "plan.json"), *folders], ["prune", *folders]):
        assert main(argv) == 2
        assert "--standalone writes a class of transformers, and CompactForCausalLM" in capsys.readouterr().err
    with pytest.raises(lp.PrunerError, match="comes with code of its own"):
        lp.save(pruned, None, tmp_path / "out", plan, standalone=True)
    assert not (tmp_path / "out").exists()
