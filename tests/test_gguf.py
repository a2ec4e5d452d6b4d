"""A pruned model in llama.cpp: converted by its own converter, it writes what it writes in transformers."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import llm_pruner as lp
from llm_pruner.data import calibration

SOURCES = "llama-cpp-python==0.3.36"  # its source package has llama.cpp, and the converter, in it


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """llama.cpp's folder: that of the variable LLAMA_CPP, or one from PyPI."""
    if "LLAMA_CPP" in os.environ:
        return Path(os.environ["LLAMA_CPP"])
    folder = tmp_path_factory.mktemp("llama.cpp")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    if subprocess.run([*command, SOURCES], capture_output=True).returncode:
        pytest.skip(f"llama.cpp could not be downloaded: set LLAMA_CPP to its folder, or pip download {SOURCES}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        converter_files = [
            m for m in tar if "/vendor/llama.cpp/" in m.name and m.name.endswith((".py", ".json", ".txt"))
        ]
        tar.extractall(folder, converter_files, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


@pytest.mark.slow
def test_llama_cpp_writes_the_same(smollm2, converter, tmp_path):
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp")
    model, tokenizer = smollm2
    graph = lp.trace(model)
    scores = lp.score(model, graph, calibration("python-docs", tokenizer, 8, 64), kinds=["neurons"])
    plan = lp.select(graph, scores, 0.05, kinds=["neurons"], round_to=32)
    pruned = lp.apply(model, plan)
    assert pruned.config.intermediate_size == 1472  # the same in every layer: a stock config
    lp.save(pruned, tokenizer, tmp_path / "pruned", plan=plan)
    file = tmp_path / "pruned.gguf"
    command = [sys.executable, converter / "convert_hf_to_gguf.py", tmp_path / "pruned", "--outfile", file]
    environment = os.environ | {"PYTHONPATH": str(converter / "gguf-py")}
    subprocess.run([*map(str, command), "--outtype", "f32"], check=True, env=environment, capture_output=True)

    settings = llama.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    server = llama.Server(settings)
    for prompt in ("The capital of France is", "def fibonacci(n):\n", "Once upon a time"):
        request = {"prompt": prompt, "n_predict": 24, "temperature": 0, "top_k": 1, "repeat_penalty": 1.0}
        written = server.handle_completions(request)["choices"][0]["text"]
        ids = tokenizer(prompt, return_tensors="pt")
        out = pruned.generate(**ids, do_sample=False, max_new_tokens=24, repetition_penalty=1.0, pad_token_id=0)
        expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert len(set(written)) > 5 and written == expected
