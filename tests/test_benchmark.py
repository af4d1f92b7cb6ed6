"""Tests of benchmark.py: all rows are there, and what it compares is comparable. No test looks at a
time. Each tolerance stands beside the error that was measured with torch 2.13 on a CPU."""
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import train
from multipliers import is_multiplier

TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))

@pytest.fixture
def config(tmp_path):
    """A model with one small block, a shard of random bytes, and two steps in a round."""
    train.write_shard(tmp_path / "train.bin", np.random.default_rng(0).integers(256, size=4000))
    (tmp_path / "tokenizer.tiktoken").write_text(train.train_tokenizer(["bytes"], 257), "utf-8")
    return train.Config(data=str(tmp_path), device="cpu", vocab_size=257, n_layer=1, n_head=2,
                        n_embd=96, block_size=16, batch_size=2, log_interval=2)

def test_every_row_and_target_is_shown(config, monkeypatch, capsys):
    """A run on a CPU prints all rows, with positive numbers, and its four targets."""
    # Measure memory in this process. That is quick, but a peak that does not grow gives 0.
    monkeypatch.setattr(benchmark, "fresh", lambda function, *arguments: function(*arguments) or 1)
    rows = benchmark.benchmark(config, repeats=1, peak=1e9)
    names = [n for part in ("step", "optimizer", "loop") for n in benchmark.PARTS[part]]
    assert [row["name"] for row in rows] == [*names, "1e+07 tokens", "1e+10 tokens"]
    assert [row["name"] for row in rows if "mfu" in row] == benchmark.PARTS["loop"]
    assert all(row[key] > 0 for row in rows for key in row.keys() - {"part", "name", "mb"})
    benchmark.show(rows, config, 1e9, "made up")
    table, verdicts = capsys.readouterr().out.split("\n\n")
    assert all(row["name"] in table for row in rows) and len(verdicts.splitlines()) == 4

@pytest.mark.parametrize("key, number, word", [
    ("ratio", 1.0, "ok"), ("ratio", 1.02, "MISSED, within noise"), ("ratio", 1.04, "MISSED"),
    ("memory", 1.0, "ok"), ("memory", 1.02, "MISSED"), ("mfu", 1.0, "ok"), ("mfu", 0.9, "MISSED")])
def test_verdict(key, number, word):
    """MFU has to be at least the target, and the others at most. A ratio has an interval."""
    row = {"name": "a row", key: number, "low": number - 0.03, "high": number + 0.01}
    assert benchmark.verdict(row, key, 1).endswith(f"target 1.000  {word}")

def test_memory_of_a_fresh_process(config):
    """A peak holds at least weights, gradients and two moments, all in float32."""
    config.n_embd = 512
    weights = sum(p.numel() for p in benchmark.build("none", config).parameters())
    # a system that tells no peak gives nan, which is not smaller than any number
    assert not benchmark.fresh(benchmark.memory, "none", config) < 0.9 * 4 * 4 * weights / 1e6

def run(model, tokens=TOKENS):
    """Logits and gradients in float64, where the multipliers are between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(2)
    for key, p in model.double().named_parameters():
        if is_multiplier(key):
            p.data = 0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype)
    logits, loss = model(tokens, tokens)
    loss.backward()
    return {"logits": logits.detach(), **{key: p.grad for key, p in model.named_parameters()}}

def test_activation_scaling_is_the_same_function(config, monkeypatch):
    """Scaled activations give the logits and gradients of scaled weights. Without r they do not."""
    def error():
        a, b = (run(benchmark.build(name, config)) for name in ("vector on activations", "vector"))
        return max((a[key] - b[key]).norm() / b[key].norm() for key in b)
    assert 0 < error() < 2e-14                                        # measured: 2e-15
    mutant = lambda self, x: (x * self.column) @ self.weight.T + 0 * self.row
    monkeypatch.setattr(benchmark.ActivationLinear, "forward", mutant)
    assert error() > 0.01

def test_the_plain_model_is_causal(config, monkeypatch):
    """A later token changes no earlier logit. In the mutant without the mask it does."""
    def moved():
        a, b = (run(model, tokens)["logits"] for tokens in (TOKENS, other))
        return (a != b).any(-1).any(0).tolist()
    model, other = benchmark.build("plain loop", config), TOKENS.clone()
    other[:, -1] = 63 - other[:, -1]
    assert moved() == 15 * [False] + [True]
    blocks = model.blocks.forward
    monkeypatch.setattr(model.blocks, "forward", lambda x, **_: blocks(x))
    assert moved() == 16 * [True]

@pytest.mark.parametrize("name", ["none", "scalar", "vector", "plain loop"])
def test_flops_are_those_of_torchs_counter(name, config):
    """By torch's count a token costs flops_per_token. The plain model costs as much as ours."""
    model, ours = (benchmark.build(n, config) for n in (name, "none"))
    # torch's table of FLOPs has no entry for the fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(TOKENS, TOKENS)[1].backward()
    assert counter.get_total_flops() == benchmark.flops_per_token(model) * TOKENS.numel()
    assert benchmark.flops_per_token(model) == benchmark.flops_per_token(ours)

def test_the_interval_holds_the_median():
    """Of 400 series, the interval holds the true ratio in about 95 %; a drift of both cancels."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        drift, noise = rng.lognormal(0, 0.5, 20), rng.lognormal(0, 0.1, 20)
        got = benchmark.compare(1.02 * drift * noise, drift)
        held += got["low"] <= 1.02 <= got["high"]
    assert 0.90 < held / 400 < 0.99                                   # measured: 0.94
