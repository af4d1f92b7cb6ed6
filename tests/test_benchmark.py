"""Tests of benchmark.py: all rows are there, and what it compares is comparable. No test looks at a
time. Each tolerance stands beside the error that was measured with torch 2.13 on a CPU."""
import numpy as np
import pytest

import benchmark
import train

@pytest.fixture
def config(tmp_path):
    """A model with one small block, a shard of random bytes, and two steps in a round."""
    train.write_shard(tmp_path / "train.bin", np.random.default_rng(0).integers(256, size=4000))
    (tmp_path / "tokenizer.tiktoken").write_text(train.train_tokenizer(["bytes"], 257), "utf-8")
    return train.Config(data=str(tmp_path), device="cpu", vocab_size=257, n_layer=1, n_head=2,
                        n_embd=96, block_size=16, batch_size=2, log_interval=2)

def test_every_row_and_target_is_shown(config, monkeypatch, capsys):
    """A run on a CPU prints all rows, with positive numbers, and its four targets, also a missed
    one."""
    # Measure memory in this process. That is quick, but a peak that does not grow gives 0.
    monkeypatch.setattr(benchmark, "fresh", lambda function, *arguments: function(*arguments) or 1)
    rows = benchmark.benchmark(config, rounds=1)
    names = [n for part in ("step", "optimizer", "loop") for n in benchmark.PARTS[part]]
    assert [row["name"] for row in rows] == [*names, "1e+07 tokens", "1e+10 tokens"]
    assert all(row[key] > 0 for row in rows for key in row.keys() - {"part", "name", "mb"})
    rows[names.index("vector")]["ratio"], rows[names.index("Muon, bf16")]["ratio"] = 1.04, 0.9
    benchmark.show(rows, cuda=False)
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in rows) and shown.count("target") == 4
    assert "vector: ratio 1.040, target 1.030: MISSED" in shown
    assert "Muon, bf16: ratio 0.900, target 1.000: ok" in shown

def test_memory_of_a_fresh_process(config):
    """A peak holds at least weights, gradients and two moments, all in float32."""
    config.n_embd = 512
    weights = sum(p.numel() for p in benchmark.build("none", config).parameters())
    # a system that tells no peak gives nan, which is not smaller than any number
    assert not benchmark.fresh(benchmark.memory, "none", config) < 0.9 * 4 * 4 * weights / 1e6

def test_the_interval_holds_the_median():
    """Of 400 series, the interval holds the true ratio in about 95 %; a drift of both cancels."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        drift, noise = rng.lognormal(0, 0.5, 20), rng.lognormal(0, 0.1, 20)
        got = benchmark.compare(1.02 * drift * noise, drift)
        held += got["low"] <= 1.02 <= got["high"]
    assert 0.90 < held / 400 < 0.99                                   # measured: 0.94
