"""A checkpoint, plan or recipe of a stranger runs no code, stays in its folder and takes no memory without bound.

Each attack ends in an error that is raised before the memory is taken or the file is opened.
"""

import json
import shutil
import struct

import pytest
from helpers.models import build
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import llm_pruner as lp
from llm_pruner.checkpoint import bounds
from llm_pruner.checkpoint.bounds import bounded_construction
from llm_pruner.checkpoint.companions import copy_companions
from llm_pruner.cli import main
from llm_pruner.errors import PrunerError
from llm_pruner.recipes.source import parse
from llm_pruner.row_kinds import apply_template
from llm_pruner.selection.plan_file import MOST_POSITIONS

WEIGHTS, TENSOR = "model.safetensors", "model.embed_tokens.weight"
DEEP = "[" * 100_000


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger") / "model"
    build("llama").save_pretrained(folder)
    words = models.BPE(vocab={chr(i): i - 33 for i in range(33, 127)}, merges=[])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="!", eos_token='"').save_pretrained(folder)
    return folder


@pytest.fixture
def stranger(original, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(original, tmp_path / "model")


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write_header(folder, header, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)


def name_outside(folder):
    """Name the files of another folder by an index that the config names."""
    shutil.copytree(folder, folder.parent / "other")
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {TENSOR: f"../other/{WEIGHTS}"}}
    (folder / "own.safetensors.index.json").write_text(json.dumps(index))
    edit(folder / "config.json", transformers_weights="own.safetensors.index.json")


def lose_embeddings(folder):
    """Leave out tensors that the config makes huge: loaders fill them with random numbers."""
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "layers" in name}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit(folder / "config.json", vocab_size=10**9)


HUGE = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}
CHECKPOINTS = {
    "header of 2**63 bytes": (lambda f: write_header(f, b"{}", 2**63), "header too large"),
    "header beyond the file": (lambda f: write_header(f, b"{}", 10**8), "invalid header length"),
    "shape that overflows": (lambda f: write_header(f, {TENSOR: HUGE}), "overflow"),
    "offsets beyond the file": (
        lambda f: write_header(f, {TENSOR: {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}),
        "damaged",
    ),
    "nested header": (lambda f: write_header(f, b'{"a":' + DEEP.encode()), "recursion limit"),
    "nested index": (lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map":' + DEEP), "recursion"),
    "index outside": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {TENSOR: f"../m/{WEIGHTS}"}})),
        "not a safetensors file of the folder",
    ),
    "own index outside": (name_outside, "not a safetensors file of the folder"),
    "nested config": (lambda f: (f / "config.json").write_text('{"model_type":"llama","a":' + DEEP), "recursion"),
    "a billion layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "has num_hidden_layers 1e"),
    "a billion labels": (lambda f: edit(f / "config.json", num_labels=10**9), "has num_labels 1e"),
    "inner layers": (lambda f: edit(f / "config.json", vision_config={"depth": 10**9}), "has depth 1e"),
    "weights that are missing": (lose_embeddings, "far too small"),
    "a number of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"model_type":"llama","vocab_size":' + "9" * 5000 + "}"),
        "4300 digits",
    ),
    "code of a tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", tokenizer_class="No", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "trust_remote_code",
    ),
    "code of a model": (
        lambda f: edit(f / "config.json", model_type="no", auto_map={"AutoConfig": "evil.C"}),
        "trust_remote_code",
    ),
    "a tokenizer that panics": (
        lambda f: edit(f / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "cannot load",
    ),
}


@pytest.mark.parametrize("attack", CHECKPOINTS)
def test_attacks_by_a_checkpoint(attack, stranger, tmp_path):
    damage, message = CHECKPOINTS[attack]
    (stranger / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    damage(stranger)
    with pytest.raises(PrunerError, match=message):
        lp.load(str(stranger))
    assert not (tmp_path / "ran").exists()


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*entries, tensors=b"", counts=None):
    """Return the bytes of a GGUF file with these metadata."""
    architecture = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    counts = counts or (int(bool(tensors)), 1 + len(entries))
    return struct.pack("<IIQQ", 0x46554747, 3, *counts) + architecture + b"".join(entries) + tensors + bytes(64)


def number(field, value):
    return text(f"llama.{field}") + struct.pack("<II", 4, value)


SIZES = {"context_length": 32, "embedding_length": 16, "feed_forward_length": 32}
SIZES |= {"block_count": 1, "vocab_size": 32, "attention.head_count": 2, "attention.head_count_kv": 2}
ARRAY = text("a") + struct.pack("<I", 9)
DIMS = text("token_embd.weight") + struct.pack("<I", 2)
GGUFS = {
    "2**63 entries": gguf(counts=(0, 2**63)),
    "2**63 tensors": gguf(counts=(2**63, 1)),
    "string of 2**63 bytes": gguf(struct.pack("<Q", 2**63)),
    "string whose end overflows": gguf(struct.pack("<Q", 2**64 - 8)),
    "array of 2**62 bytes": gguf(ARRAY + struct.pack("<IQ", 0, 2**62)),
    "array of 2**62 strings": gguf(ARRAY + struct.pack("<IQ", 8, 2**62)),
    "array of 2**62 arrays": gguf(ARRAY + struct.pack("<IQ", 9, 2**62)),
    "arrays in arrays": gguf(ARRAY + struct.pack("<IQ", 9, 1) * 5000),
    "dims that overflow": gguf(tensors=DIMS + struct.pack("<QQIQ", 2**32, 2**32, 0, 0)),
    "dims beyond the file": gguf(tensors=DIMS + struct.pack("<QQIQ", 2**20, 2**20, 0, 0)),
    "a tensor beyond the file": gguf(tensors=DIMS + struct.pack("<QQIQ", 2, 2, 0, 2**62)),
    "no tensors, two billion tokens": gguf(*(number(k, v) for k, v in (SIZES | {"vocab_size": 2**31 - 1}).items())),
}


@pytest.mark.parametrize("attack", GGUFS)
def test_attacks_by_a_gguf_file(attack, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUFS[attack])
    with pytest.raises(PrunerError):
        lp.load(str(file))


def plan_file(path, positions, **unit):
    unit = {"kind": "neurons", "layer": 0, "size": 4, "kept": "0"} | unit
    document = {"format": "llm-pruner plan", "version": 1, "settings": {}, "notes": [], "positions": positions}
    path.write_text(json.dumps(document | {"parameters": {}, "units": {"a": unit}}))
    return path


@pytest.mark.parametrize(
    ("positions", "unit", "message"),
    [
        ([f"0-{2**40}"], {}, "states more than"),
        ([f"0-{MOST_POSITIONS // 2}"] * 4, {}, "states more than"),
        ([f"0-{'9' * 30}"], {}, "damaged"),
        (["5-3"], {}, "is empty"),
        (["3,3"], {}, "out of order"),
        ([], {"kept": f"0-{2**40}", "size": 2**41}, "states more than"),
        ([], {"kind": "layers", "size": 10**9}, "more than 100,000 layers"),
        ([], {"layer": 10**9}, "more than 100,000 layers"),
    ],
)
def test_a_plan_of_a_few_bytes_takes_no_memory(positions, unit, message, tmp_path):
    with pytest.raises(PrunerError, match=message):
        lp.PruningPlan.load(plan_file(tmp_path / "plan.json", positions, **unit))


BOMB = "a: &a [x]\n" + "".join(f"b{i}: &b{i} [{', '.join(['*b' + str(i - 1) if i else '*a'] * 9)}]\n" for i in range(9))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"b{i}: &b{i}\n  <<: [{', '.join(['*b' + str(i - 1) if i else '*a'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 100,000 entries"),
        (MERGES, "more than 100,000 entries"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_attacks_by_a_recipe(content, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(PrunerError, match=message):
        parse(file)


def test_links_out_of_a_checkpoint_are_not_copied(stranger, tmp_path):
    """Whoever publishes a pruned model must not publish own files with it that the original linked to."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    for name in ("LICENSE", "vocab.txt", "own.py"):
        (stranger / name).symlink_to(secret / "key")
    (stranger / "1_Pooling").symlink_to(secret)
    (stranger / "2_Dense").mkdir()
    (stranger / "2_Dense" / "config.json").symlink_to(secret / "key")
    (stranger / "2_Dense" / "kept.json").write_text("{}")
    (stranger / "NOTICE").symlink_to(stranger / "config.json")
    (stranger / "modules.json").write_text(json.dumps([{"path": p} for p in ("1_Pooling", "2_Dense", "..", "")]))
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own.Config"}}))
    copy_companions(stranger, copies)
    assert {"NOTICE", "2_Dense/kept.json", "tokenizer.json"} <= {
        file.relative_to(copies).as_posix() for file in copies.rglob("*")
    }
    assert not [file for file in copies.rglob("*") if file.is_file() and "SECRET" in file.read_text()]


def test_links_of_the_hubs_cache_are_copied(original, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("a licence")
    (snapshot / "LICENSE").symlink_to(blobs / "1")
    (tmp_path / "copies").mkdir()
    copy_companions(snapshot, tmp_path / "copies")
    assert (tmp_path / "copies" / "LICENSE").read_text() == "a licence"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ nowhere.at.all }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(template, original):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(original)
    tokenizer.chat_template = template
    with pytest.raises(PrunerError, match="the chat template refuses"):
        apply_template(tokenizer, [{"role": "user", "content": "a"}], tokenize=False)


def test_names_of_chat_templates_stay_in_the_folder(stranger, tmp_path):
    templates = [{"name": "default", "template": "a"}, {"name": "../../out", "template": "b"}]
    edit(stranger / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(PrunerError, match="cannot be written"):
        lp.save(*lp.load(str(stranger)), tmp_path / "saved")
    assert not list(tmp_path.rglob("out.jinja")) and not (tmp_path / "saved").exists()


@pytest.fixture(scope="session")
def trained(original, tmp_path_factory):
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(lp.load(str(original))[0], settings).save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(original))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**7}, "far too small"),
        ({"layer_replication": [[0, 3]] * 10**4}, "more than 1,000 layers"),
        ({"base_model_name_or_path": 5}, "does not say which model"),
    ],
)
def test_attacks_by_an_adapter(values, message, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "adapter")
    assert lp.load(str(folder))[0].num_parameters() > 0
    edit(folder / "adapter_config.json", **values)
    with pytest.raises(PrunerError, match=message):
        lp.load(str(folder))


def test_a_tokenizer_of_an_adapter_runs_no_code(trained, tmp_path, monkeypatch):
    """A person at a terminal is not asked either, as transformers does by default."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(trained, tmp_path / "adapter")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"tokenizer_class": "No", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PrunerError, match="trust_remote_code"):
        lp.load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_config_of_too_many_modules_is_refused(monkeypatch):
    monkeypatch.setattr(bounds, "MOST_MODULES", 10)
    with pytest.raises(PrunerError, match="more than 10 modules"), bounded_construction("model"):
        build("llama")
    build("llama")


def test_pruned_models_are_not_taken_for_damaged(original, tmp_path, monkeypatch):
    """Layers are built in their full widths before they are cut."""
    model = lp.load(str(original))[0]
    graph = lp.trace(model)
    scores = lp.score(model, graph, criterion="random")
    plan = lp.select(graph, scores, ratio=0.9, kinds=("neurons", "heads"), scope="global")
    lp.save(lp.apply(model, plan), None, tmp_path / "pruned", plan)
    monkeypatch.setattr(bounds, "SPARE_PARAMETERS", 0)
    lp.load(str(tmp_path / "pruned"))


def test_a_panic_of_a_tokenizer_is_one_line(stranger, tmp_path, capfd):
    """A regular expression that gives up raises no Exception."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(stranger / "tokenizer.json", pre_tokenizer=pattern)
    (tmp_path / "text.txt").write_text("a" * 60 + "b\n")
    words = ["evaluate", str(stranger), "--datasets", str(tmp_path / "text.txt")]
    assert main(words) == 2
    assert "error: the tokenizer cannot read the text" in capfd.readouterr().err
