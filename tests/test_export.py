"""Exports for other engines: written files, log-probabilities of the engines, and refusals."""

import copy
import json
import math
import shutil

import pytest
import torch
from gguf import GGUFReader
from helpers.architectures import tiny_model
from helpers.models import build, pruned_by
from helpers.models import made as made_model
from test_serving import NEW_TOKENS, continued_by_vllm, expected_of, made, vllm_python  # noqa: F401 - a fixture
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.checkpoint.apply_files import apply_to_files
from llm_pruner.cli import main
from llm_pruner.serving.engines import Engine, in_format, running
from llm_pruner.serving.export import _log_probabilities
from llm_pruner.serving.gguf_tokenizer import LETTERS_AND_DIGITS, check_tokenizer, split_name
from llm_pruner.serving.gguf_writer import _llama3_factors, write_gguf
from llm_pruner.serving.llama_cpp import QUANTIZER

WIDE = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Save a pruned model with a tokenizer; return the folder."""

    def save(model, plan=None):
        lp.save(model, tokenizer, tmp_path / "model", plan)
        return str(tmp_path / "model")

    return save


def widths(file):
    reader = GGUFReader(file)
    arch = reader.get_field("general.architecture").contents()
    return arch, reader.get_field(f"{arch}.feed_forward_length").contents()


def assert_llama_cpp_computes(model, tokenizer, file):
    """The log-probabilities of the next token in a file are the model's."""
    prompts = torch.randint(3, len(tokenizer), (5, 20), generator=torch.Generator().manual_seed(1)).tolist()
    with running("llama.cpp", file) as engine:
        answers = [engine.next_log_probabilities(prompt) for prompt in prompts]
    for prompt, found in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert max(found, key=found.get) == int(expected.argmax())
        assert found == pytest.approx({token: float(expected[token]) for token in found}, abs=0.05)


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2"])
def test_llama_cpp_computes_the_same_from_layers_that_differ(tokenizer, saved, tmp_path, capsys, name):
    """Heads, key-value heads and widths of layer 1, the MLP of layer 2 and the attention of layer 3."""
    pytest.importorskip("xllamacpp")
    model = build(name, **WIDE, vocab_size=len(tokenizer), num_hidden_layers=4, initializer_range=0.2)
    pruned, plan = made(name, ("heads", "neurons"), {2: "neurons", 3: "heads"}, model=model)
    assert main(["export", saved(pruned, plan), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 0
    assert "llama.cpp agrees" in capsys.readouterr().err
    arch, neurons = widths(tmp_path / "out.gguf")
    assert arch == "deci" and neurons == [96, 48, 32, 96]
    assert_llama_cpp_computes(pruned, tokenizer, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_layers_of_one_width_keep_their_architecture(tokenizer, saved, tmp_path, name):
    model = build(name, **WIDE | {"num_key_value_heads": 4}, vocab_size=len(tokenizer), initializer_range=0.2)
    _, pruned = pruned_by(model, kinds=("neurons",))
    target = tmp_path / "new" / "out.gguf"  # in a folder that export makes, as other commands do
    assert main(["export", saved(pruned), str(target), "--format", "gguf", "--type", "f32"]) == 0
    assert widths(target) == (name, 48)


MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "num_key_value_heads": 2, "head_dim": 32},
}


def mixture(tokenizer, name, **fields):
    """A random mixture of eight experts per layer, three of which read a token."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"num_experts_per_tok": 3, "max_position_embeddings": 256, "initializer_range": 0.2}
    return made_model(name, **sizes | MIXTURES[name] | fields)


@pytest.mark.parametrize("name", MIXTURES)
def test_llama_cpp_computes_the_same_from_fewer_experts(tokenizer, tmp_path, name):
    pytest.importorskip("xllamacpp")
    _, pruned = pruned_by(mixture(tokenizer, name), 0.25, kinds=("experts", "neurons"))
    target = tmp_path / "out.gguf"
    arch, reader = write_gguf(pruned, tokenizer, target, "f32"), GGUFReader(target)
    counts = [reader.get_field(f"{arch}.expert_{key}").contents() for key in ("count", "used_count")]
    assert counts == [6, 3]
    assert_llama_cpp_computes(pruned, tokenizer, target)


def test_mixtures_that_llama_cpp_does_not_have_are_refused(tokenizer, saved, tmp_path, capsys):
    def refused(model):
        assert main(["export", saved(model), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
        return capsys.readouterr().err

    assert "no qwen3_moe with norm_topk_prob=False, only with True" in refused(
        mixture(tokenizer, "qwen3_moe", norm_topk_prob=False)
    )
    assert "no olmoe with clip_qkv=1.0, only with None" in refused(mixture(tokenizer, "olmoe", clip_qkv=1.0))
    assert "no qwen3_moe whose layers have 0 and 8 experts" in refused(
        mixture(tokenizer, "qwen3_moe", mlp_only_layers=[0])
    )
    _, pruned = pruned_by(mixture(tokenizer, "mixtral"), kinds=("experts",), layers=[1])
    assert "no mixtral with layers of different widths" in refused(pruned)


def test_quantized_files_are_smaller(tokenizer, saved, tmp_path):
    model = build("llama", **WIDE | {"num_key_value_heads": 4}, vocab_size=len(tokenizer))
    folder = saved(model)
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        assert main(["export", folder, str(tmp_path / f"{kind}.gguf"), "--format", "gguf", "--type", kind]) == 0
        sizes.append((tmp_path / f"{kind}.gguf").stat().st_size)
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(QUANTIZER) is None, reason=f"llama.cpp's {QUANTIZER} is not on the PATH")
def test_llama_cpp_quantizes(tokenizer, saved, tmp_path):
    model = build("llama", **WIDE | {"num_key_value_heads": 4, "hidden_size": 256}, vocab_size=len(tokenizer))
    target = tmp_path / "out.gguf"
    assert main(["export", saved(model), str(target), "--format", "gguf", "--type", "q4_k_m"]) == 0
    assert any("Q4_K" in str(tensor.tensor_type) for tensor in GGUFReader(target).tensors)


def test_an_export_that_computes_something_else_is_not_kept(tokenizer, saved, tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    model = build("llama", **WIDE | {"num_key_value_heads": 4}, vocab_size=len(tokenizer), initializer_range=0.2)
    monkeypatch.setattr(Engine, "next_log_probabilities", lambda self, ids: {5: 3.0})
    assert main(["export", saved(model), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    assert "llama.cpp computes something else from the export" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_block_configs(saved, tmp_path, capsys):
    pruned, plan = made("llama_grouped", ("neurons",), {2: "neurons"})
    assert main(["export", saved(pruned, plan), str(tmp_path / "nas"), "--format", "nemotron-nas"]) == 0
    assert "vllm serve" in capsys.readouterr().err
    config = json.loads((tmp_path / "nas" / "config.json").read_text())
    blocks = config["block_configs"]
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [96, 48, None]
    assert blocks[2]["ffn"]["no_op"] and not blocks[2]["attention"]["no_op"]
    assert blocks[0]["attention"]["n_heads_in_group"] == 2 and not config.keys() & {
        "per_layer_config",
        "experts_implementation",
    }


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["heads", "neurons"])
def test_vllm_reads_block_configs(vllm_python, saved, tmp_path, gone):  # noqa: F811
    pruned, plan = made("llama_grouped", ("neurons",), {2: gone})
    assert main(["export", saved(pruned, plan), str(tmp_path / "nas"), "--format", "nemotron-nas"]) == 0
    prompts = [[5, 6, 7, 8, 9], list(range(20, 50))]
    found = continued_by_vllm(vllm_python, tmp_path / "nas", prompts, tmp_path / "found.json", trust_remote_code=True)
    for (tokens, values), (expected_tokens, expected) in zip(found, expected_of(pruned, prompts), strict=True):
        assert tokens == expected_tokens and len(tokens) == NEW_TOKENS
        assert values == pytest.approx(expected, abs=1e-3)


def test_plain_folders(home, tmp_path, capsys):
    """``--format hf`` pads as to-uniform does, or keeps the widths and writes a modelling file."""
    pruned = str(home / "pruned")
    assert main(["export", pruned, str(tmp_path / "plain")]) == 2
    assert "padding would add back" in capsys.readouterr().err
    assert main(["export", pruned, str(tmp_path / "plain"), "--allow_padding"]) == 0
    assert lp.load(str(tmp_path / "plain"))[0].config.intermediate_size == 64
    assert "per_layer" not in (tmp_path / "plain" / "config.json").read_text()
    assert main(["export", pruned, str(tmp_path / "own"), "--standalone"]) == 0
    assert (tmp_path / "own" / "modeling_pruned.py").is_file() and (tmp_path / "own" / "pruning_plan.json").is_file()


def test_models_that_a_format_cannot_express_are_refused(tokenizer, saved, tmp_path, capsys):
    def refused(folder, *flags):
        assert main(["export", folder, str(tmp_path / "out.gguf"), *flags]) == 2
        assert not (tmp_path / "out.gguf").exists()
        return capsys.readouterr().err

    gpt2 = saved(build("gpt2", vocab_size=len(tokenizer)))
    assert "and this is gpt2: export it with --format hf" in refused(gpt2, "--format", "gguf")
    assert "is for llama, mistral, qwen2, and this is gpt2" in refused(gpt2, "--format", "nemotron-nas")
    assert "--type q8_0 has no effect with --format hf" in refused(gpt2, "--type", "q8_0")
    assert "--standalone has no effect with --format gguf" in refused(gpt2, "--format", "gguf", "--standalone")
    model = build("qwen3", **WIDE | {"num_key_value_heads": 4}, vocab_size=len(tokenizer))
    _, pruned = pruned_by(model, kinds=("neurons",), layers=[1])
    assert "llama.cpp has no qwen3 with layers of different widths" in refused(saved(pruned), "--format", "gguf")
    pruned, plan = made("llama_grouped", ("heads",))
    assert "one number of query heads for all layers, and these have [2, 4]" in refused(
        saved(pruned, plan), "--format", "nemotron-nas"
    )
    folder = saved(build("llama", vocab_size=len(tokenizer)))
    assert main(["export", folder, str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "give one that ends in .gguf" in capsys.readouterr().err


def test_ways_to_split_text_have_names():
    def named(*steps, model="BPE"):
        return split_name(
            {"model": {"type": model}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}
        )

    level, digits = {"type": "ByteLevel"}, {"type": "Digits", "individual_digits": True}
    assert named(level) == "gpt-2" and named(digits, level) == "smollm"
    split = {"type": "Split", "pattern": {"Regex": LETTERS_AND_DIGITS.replace("DIGITS", "{1,3}")}}
    assert named(split, level) == "llama-bpe"
    for wrong in ((split,), ({"type": "Metaspace"},), ({**split, "pattern": {"Regex": "x"}}, level)):
        with pytest.raises(lp.PrunerError, match="has no name for this tokenizer"):
            named(*wrong)


def test_scaled_rotary_frequencies():
    """As transformers scales them: its frequency divided by the factor is the unscaled one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = tiny_model("llama").config
    config.rope_parameters, config.head_dim = rope, 64
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / torch.from_numpy(_llama3_factors(config)), scaled, rtol=1e-4)
    assert math.isclose(float(_llama3_factors(config)[0]), 1.0)


@pytest.mark.slow
def test_models_are_timed_in_an_engine(tokenizer, tmp_path, capsys):
    """Original and pruned, side by side in the table and in the records."""
    pytest.importorskip("xllamacpp")
    model = build("llama", **WIDE | {"num_key_value_heads": 4}, vocab_size=len(tokenizer), max_position_embeddings=256)
    lp.save(model, tokenizer, tmp_path / "base")
    lp.save(pruned_by(model, kinds=("neurons",), layers=[1])[1], tokenizer, tmp_path / "pruned")
    argv = ["evaluate", str(tmp_path / "base"), str(tmp_path / "pruned"), "--datasets", "", "--tokens", "0"]
    assert main([*argv, "--engine", "llama.cpp", "--output", str(tmp_path / "out")]) == 0
    assert "llama.cpp: xN is N sequences at once" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for entry in record["models"]:
        engine = entry["engine"]
        assert engine["tokens_per_second"].keys() == {"1", "8", "32"} and engine["bytes"] > 1e6
        assert all(speed > 0 for speed in engine["tokens_per_second"].values())


def test_an_engine_that_is_not_installed_is_named(home, monkeypatch, capsys):
    monkeypatch.setattr("llm_pruner.optional.is_installed", lambda module: module != "vllm")
    assert main(["evaluate", str(home / "base"), "--datasets", "", "--engine", "vllm"]) == 2
    assert 'pip install "llm_pruner[vllm]"' in capsys.readouterr().err


def test_16_bit_weights_are_compared_in_float32():
    """Logits in bfloat16 are rounded by more than llama.cpp's differ, which refused whole models."""
    model = build("llama", initializer_range=0.5).to(torch.bfloat16)
    with torch.no_grad():
        expected = model.float()(torch.tensor([[5, 6, 7]])).logits[0, -1].double().log_softmax(-1)
    found = _log_probabilities(model.to(torch.bfloat16), [5, 6, 7])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "field", "value", "needed"),
    [("llama", "hidden_act", "gelu", "silu"), ("qwen3", "attention_bias", True, False)],
)
def test_fields_that_llama_cpp_does_not_have_are_refused(name, field, value, needed, tokenizer, tmp_path):
    """Its library would compute something else, or not read the file."""
    model = build(name, **WIDE, vocab_size=len(tokenizer), **{field: value})
    with pytest.raises(lp.PrunerError, match=f"no {name} with {field}={value}, only with {needed}"):
        write_gguf(model, tokenizer, tmp_path / "out.gguf")


def test_a_vocabulary_without_merges_is_refused(tokenizer):
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    check_tokenizer(tokenizer)
    with pytest.raises(lp.PrunerError, match="no merge of two tokens is left in the vocabulary"):
        check_tokenizer(bare)


def test_several_chat_templates_and_tokens_for_whole_words(tokenizer, tmp_path, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    model = build("llama", **WIDE, vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, tmp_path / "out.gguf")
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == "plain"
    assert reader.get_field("tokenizer.chat_template.tool_use").contents() == "tools"
    assert "ignore_merges" not in caplog.text
    tokenizer.backend_tokenizer.model.ignore_merges = True
    write_gguf(model, tokenizer, tmp_path / "words.gguf")
    assert "tokens for whole words alone (ignore_merges), and llama.cpp splits these words" in caplog.text


@pytest.mark.parametrize("form", ["gguf", "nemotron-nas"])
def test_a_lost_sliding_window_is_named(form, tokenizer, saved, tmp_path, capsys):
    def errors(name, window):
        model = build("mistral", **WIDE, vocab_size=len(tokenizer), sliding_window=window)
        assert main(["export", saved(model), str(tmp_path / name), "--format", form]) == 0
        return capsys.readouterr().err

    assert "sliding window" not in errors("whole.gguf", 64)
    assert f"--format {form} has no sliding window of 48 tokens: longer texts" in errors("window.gguf", 48)


def test_adapters_are_merged_for_vllm_and_refused_by_apply(home, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = lp.load(str(home / "base"))
    plan, _ = pruned_by(model, kinds=("neurons",))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with in_format("vllm", str(tmp_path / "adapter")) as folder:
        assert folder != tmp_path / "adapter" and (folder / "config.json").is_file()
    with pytest.raises(lp.PrunerError, match="is an adapter, and apply cuts the files of a model: save it merged"):
        apply_to_files(plan, str(tmp_path / "adapter"), tmp_path / "out")
