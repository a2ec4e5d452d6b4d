"""Speed and latency: they follow the model's size, and decoding is timed by itself."""

import gc
import threading
import time

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.models import build

import llm_pruner as lp
from llm_pruner.evaluation.latency import LatencyTable, latency, latency_budget
from llm_pruner.evaluation.speed import speed
from llm_pruner.models.generate import TokenClock, generate
from llm_pruner.peak_memory import PeakMemory, gpu_peak, reset_gpu_peaks

WIDE = {"hidden_size": 128, "intermediate_size": 512}


def test_speed_follows_the_number_of_layers():
    shallow, deep = (speed(build("llama", num_hidden_layers=n, **WIDE), 32, 2, new_tokens=8) for n in (2, 20))
    assert shallow.prefill > 2 * deep.prefill > 0
    assert shallow.decode > 2 * deep.decode > 0


def test_decode_speed_is_that_of_the_decoding_steps_alone(monkeypatch):
    """With a clock that forward passes advance: a slow and noisy prefill does not count."""
    model, now, prefills = build("llama"), [1.0], iter(range(10**6))
    forward = model.forward

    def timed(*args, **kwargs):
        tokens = kwargs["input_ids"].shape[1]
        now[0] += 0.5 if tokens == 1 else 100.0 / (1 + next(prefills))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert speed(model, 8, batch=3, new_tokens=5).decode == pytest.approx(3 / 0.5)


def test_a_context_that_is_full_leaves_no_decode_speed():
    model = build("llama", max_position_embeddings=16)
    assert speed(model, 16, new_tokens=8).decode is None
    assert speed(model, 12, new_tokens=8).decode > 0


def test_an_encoder_decoder_has_no_decode_speed():
    assert speed(tiny_model("t5:seq2seq"), 8, new_tokens=2).decode is None


def test_peak_memory_is_that_of_the_measurement(monkeypatch):
    model, size = build("llama"), 256 * 2**20
    forward = model.forward
    gc.collect()  # what other tests left must not be freed meanwhile

    sampled, samples, seen, resident = threading.Condition(), [], [], PeakMemory._resident

    def noted(memory):
        with sampled:
            samples.append(resident(memory))
            sampled.notify_all()
        return samples[-1]

    def hungry(*args, **kwargs):
        if seen:  # one pass is enough
            return forward(*args, **kwargs)
        block = torch.ones(size // 4)
        with sampled:  # until both have seen the block, however busy the machine is
            samples.clear()
            seen.append(sampled.wait_for(lambda: len(samples) >= 8))
        return forward(*args, **kwargs) if block.numel() else None

    monkeypatch.setattr(PeakMemory, "_resident", noted)
    monkeypatch.setattr(model, "forward", hungry)
    with PeakMemory() as outer:
        peak = speed(model, 8, new_tokens=2).peak_bytes
    assert peak is not None and 0.8 * size < peak < 4 * size
    assert outer.peak >= outer.before + 0.8 * size  # a measurement inside another does not disturb it


def test_the_peak_on_gpus_is_that_of_all_of_them_since_the_last_reset(monkeypatch):
    assert gpu_peak() is None or torch.cuda.is_available()
    peaks = {0: 5, 1: 7}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device: 0}))
    assert gpu_peak() == 12
    reset_gpu_peaks()
    assert gpu_peak() == 0


def test_the_clock_counts_and_stops():
    model, ids, clock = build("llama"), torch.tensor([[5, 6, 7]]), TokenClock()
    assert generate(model, ids, new_tokens=6, exact=True, clock=clock).shape == (1, 6)
    assert clock.tokens == 6 and clock.seconds > 0
    stopped = TokenClock()
    stopped.stopped = True
    assert generate(model, ids, new_tokens=6, exact=True, clock=stopped).shape == (1, 1)


# --- Latency --------------------------------------------------------------------------------------------------------


def latency_table(model, kinds=("heads", "neurons"), tokens=16):
    return LatencyTable(model, lp.trace(model), kinds=kinds, tokens=tokens)


def test_a_plan_is_predicted_from_the_table(monkeypatch):
    """With times that are counted instead of measured, the table predicts the cost of a plan exactly."""

    def count(model, tokens, batch):
        layers = {("model.layers", i): sum(p.numel() for p in m.parameters()) for i, m in enumerate(model.model.layers)}
        return float(sum(p.numel() for p in model.parameters())), {k: float(v) for k, v in layers.items()}

    monkeypatch.setattr("llm_pruner.evaluation.latency.time_layers", count)
    model = build("llama_grouped")
    graph = lp.trace(model)
    table = latency_table(model)
    scores = lp.score(model, graph, criterion="random")
    choices = ({"ratio": 0.3}, {"ratio": 0.9, "layers": [1, 2]}, {"ratio": 0.5, "kinds": ("layers",)})
    for choice in choices:
        plan = lp.select(graph, scores, **choice)
        assert table.predict(plan) == pytest.approx(sum(p.numel() for p in lp.apply(model, plan).parameters()))
    budget = latency_budget(model, graph, 0.69)
    plan = lp.select(graph, scores, kinds=("neurons", "heads"), budget=budget)
    remaining = sum(p.numel() for p in lp.apply(model, plan).parameters())
    assert 0.995 * 0.69 <= remaining / count(model, 0, 0)[0] <= 0.69


def test_latency_follows_the_width_of_layers():
    """A fifth of the neurons takes clearly less time, and the model is left as it was."""
    model = build("llama", hidden_size=256, intermediate_size=8192, num_hidden_layers=2)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    table = latency_table(model, ("neurons",), tokens=64)
    assert len(table.layers) == 2 and table.whole > 0.8 * sum(table.layers.values()) > 0
    curve = table.widths[("model.layers", 1), "neurons"]
    assert [round(share, 1) for share, _ in curve] == [0.2, 0.4, 0.6, 0.8, 1.0]
    times = [microseconds for _, microseconds in curve]
    assert times == sorted(times) and times[0] < 0.6 * times[-1]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_latency_follows_the_number_of_layers():
    shallow, deep = (latency(build("llama", num_hidden_layers=n, **WIDE), 32) for n in (2, 20))
    assert deep > 2 * shallow > 0


def test_latency_of_hidden_channels_is_refused():
    model = build("llama_grouped")
    with pytest.raises(lp.PrunerError, match="give target_macs"):
        latency_budget(model, lp.trace(model), 0.8, kinds=("hidden",))
