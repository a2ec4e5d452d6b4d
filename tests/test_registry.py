"""Every architecture that transformers registers: neurons and heads are pruned correctly, or refused with a reason."""

import pytest
import torch
from helpers.architectures import media_types, model_types, other_types, tiny_model
from helpers.survey import CLASS_KINDS, survey

from llm_pruner.models.running import model_inputs, relative_difference
from llm_pruner.recovery.adapters import make_trainable
from llm_pruner.recovery.settings import AdapterSettings

# One of each sort; the others are slow only because they are many.
QUICK = (
    "bart:seq2seq",
    "bloom",
    "cohere2",
    "dbrx",
    "deepseek_v3",
    "falcon",
    "fuyu",
    "gemma2",
    "gemma3",
    "gemma4_text",
    "glm4",
    "gpt_bigcode",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "jetmoe",
    "mamba",
    "mpt",
    "qwen3_next",
    "t5:seq2seq",
    "xlm",
    "zamba2",
)
EVERY = [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in model_types()]

NO_NEURONS = {
    "falcon_mamba": "no feed-forward: its inner channels are channels",
    "mamba": "no feed-forward: its inner channels are channels",
    "mamba2": "no feed-forward: its inner channels are channels",
    "rwkv": "transformers' cache has the hidden size wherever it should have the attention's",
}
NO_HEADS = {
    "codegen": "its projections come in four parts, whatever the config says",
    "falcon_mamba": "no attention",
    "fsmt:seq2seq": "its attention assumes that heads fill the hidden size",
    "led:seq2seq": "its attention assumes that heads fill the hidden size",
    "mamba": "no attention",
    "mamba2": "no attention",
    "pegasus_x:seq2seq": "its attention assumes that heads fill the hidden size",
    "prophetnet": "its attention assumes that heads fill the hidden size",
    "prophetnet:seq2seq": "its attention assumes that heads fill the hidden size",
    "reformer": "its heads meet hash buckets",
    "rwkv": "no attention",
    "trocr": "its attention assumes that heads fill the hidden size",
    "xlnet": "its segment biases do not run without segments, so nothing ties them to the heads",
    "xlstm": "no attention",
    "zaya": "its heads meet a grouped convolution",
}
NO_EFFECT = {
    "blt": "its patcher only places boundaries between patches",
    "deepseek_v4": "its indexer chooses among more tokens than are run",
    "zamba": "its time steps hardly matter with random weights",
}
NOT_TRACED = {"voxtral_realtime:seq2seq": "it needs speech"}
NOT_BUILT = {
    "dots3_note": "its parts contradict each other when small",
    "gemma3n": "it needs timm",
    "gemma4_assistant": "it needs another model's hidden states",
    "gemma4_unified_assistant": "it needs another model's hidden states",
    "granite_speech:seq2seq": "its speech encoder does not get small",
    "granite_speech_plus:seq2seq": "its speech encoder does not get small",
    "musicgen": "its causal class wants another config than the registry says",
    "musicgen_melody": "its causal class wants another config than the registry says",
    "nemo_speechlm:seq2seq": "its speech encoder does not get small",
    "vibevoice_asr:seq2seq": "its speech encoder does not get small",
}


@pytest.mark.parametrize("name", EVERY)
def test_pruning_is_correct_or_refused(name):
    row = survey(name)
    assert bool(row.unbuilt) == (name in NOT_BUILT), row.unbuilt
    assert bool(row.refused) == (name in NOT_TRACED), row.refused
    if row.unbuilt or row.refused:
        return
    for kind, outcome in row.kinds.items():
        assert not outcome.wrong, kind
        assert not outcome.failed, kind
        assert not outcome.without_effect or name in NO_EFFECT, kind
    if name in NO_EFFECT:
        return
    assert row.works("neurons") == (name not in NO_NEURONS), row.kinds.get("neurons")
    assert row.works("heads") == (name not in NO_HEADS), row.kinds.get("heads")


@pytest.mark.parametrize("name", EVERY)
def test_merged_adapters_give_the_trained_logits(name):
    if name in NOT_BUILT | NOT_TRACED or name == "reformer":  # reformer trains on windows of one length alone
        pytest.skip("no tiny model of this type can be trained")
    model = tiny_model(name)
    inputs = model_inputs(model, torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
    student = make_trainable(model, AdapterSettings(rank=1))
    student.train()(**inputs, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    with torch.no_grad():
        for path, parameter in student.named_parameters():
            if "lora_B" in path and parameter.grad is not None:  # the others stay zero
                torch.nn.init.normal_(parameter, std=0.05)
        expected = student.eval()(**inputs, use_cache=False).logits
        merged = student.merge_and_unload(safe_merge=True)(**inputs, use_cache=False).logits
    assert relative_difference(merged, expected) < 1e-4 < relative_difference(expected, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*other_types(), *media_types()])
def test_other_classes_are_correct_or_refused(name):
    row = survey(name, CLASS_KINDS)
    for kind, outcome in row.kinds.items():
        if name in media_types():  # deep in a tiny model of images, heads can change next to nothing
            assert not (outcome.wrong or outcome.failed), kind
            continue
        if name.startswith("funnel:"):  # the command refuses what its own comparison finds
            assert outcome.works or "not mask-equivalent" in outcome.failed or outcome.wrong or outcome.without_effect
            continue
        assert not (outcome.wrong or outcome.without_effect or outcome.failed), kind
