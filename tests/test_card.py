"""The model card, and the way to the hub."""

import pytest
from helpers.models import build, pruned_by
from huggingface_hub import ModelCard

import llm_pruner as lp
from llm_pruner.checkpoint import card as cards
from llm_pruner.checkpoint.card import hub_id
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError


def test_a_run_writes_a_card(home, tmp_path):
    (home / "base" / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    flags = ["--base_model", str(home / "base"), "--pruner_type", "l2", "--pruning_ratio", "0.4", "--save_model"]
    flags += ["--output_root", str(tmp_path), "--max_seq_len", "16", "--max_windows", "2", "--compensate", "none"]
    try:
        assert main(["prune", *flags, "--save_ckpt_log_name", "small"]) == 0
    finally:
        (home / "base" / "README.md").unlink()
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity" and result.metric_value > 1 and card.data.model_name == "small"
    assert "base_model" not in card.data.to_dict(), "a folder here means nothing to the hub"
    for part in ("| parameters |", "neurons: ", "from_pretrained", "```bash"):
        assert part in card.content, part
    assert main(["prune", *flags, "--save_ckpt_log_name", "small"]) == 0, "a run may take its own place again"


def test_the_card_says_how_to_load(tmp_path):
    plan, pruned = pruned_by(build("llama"))
    plan.settings["base_model"] = "smollm2-135m"
    lp.save(pruned, None, tmp_path / "plain", plan)
    plain = ModelCard.load(tmp_path / "plain" / "README.md")
    assert "import llm_pruner" not in plain.content and "trust_remote_code" not in plain.content
    assert plain.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and plain.data.license == "apache-2.0"
    plan, pruned = pruned_by(build("llama"), layers=[1])
    lp.save(pruned, None, tmp_path / "differing", plan, standalone=True)
    text = ModelCard.load(tmp_path / "differing" / "README.md").content
    assert "import llm_pruner" in text and "modeling_pruned.py" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/some/folder", None),
        ("./here", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_models_have_ids_on_the_hub(name, expected):
    assert hub_id(name) == expected


def test_pushing(tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, exist_ok):
            calls.append(("create", name))
            return type("Address", (str,), {"repo_id": name})(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(cards, "HfApi", Api)
    plan, pruned = pruned_by(build("llama"))
    lp.save(pruned, None, tmp_path / "a", plan, push_to_hub="me/small", token="secret")
    assert calls[:2] == [("token", "secret"), ("create", "me/small")]
    assert {"config.json", "model.safetensors", "README.md", "pruning_plan.json"} <= set(calls[2][2])
    assert not any("secret" in file.read_text(errors="ignore") for file in (tmp_path / "a").iterdir())


def test_pushing_fails_in_one_line_and_keeps_the_folder(tmp_path, capsys):
    plan, pruned = pruned_by(build("llama"))
    with pytest.raises(PrunerError, match=r"cannot push to not a name .*the checkpoint is in"):
        lp.save(pruned, None, tmp_path / "a", plan, push_to_hub="not a name")
    assert (tmp_path / "a" / "config.json").is_file()
    assert main(["prune", "--push_to_hub", "me/x", "--no_save"]) == 2
    assert "--push_to_hub and --no_save" in capsys.readouterr().err
