"""What multipliers, Muon, the training loop and the kernel cost, each beside what it replaces.

    python tests/benchmark.py                          # all parts: minutes
    python tests/benchmark.py --only step              # one part
    python tests/benchmark.py --preset small           # a preset of train.py
    CUDA_VISIBLE_DEVICES= python tests/benchmark.py    # the CPU of a machine with a GPU

Without --preset the model is train.py's gpt2 on CUDA (which needs nvcc), and tiny elsewhere. The
text is random. The parts are:

  step       forward, backward and optimizer on one fixed batch, for each kind of multipliers
  optimizer  one step of torch.optim.Muon and of muon.py, on the matrices inside the blocks
  loop       10 steps on one batch, and 10 steps of train.py, with data, schedule and log
  corpus     open token shards and draw one batch, from 10^5 and from 10^7 tokens
  kernel     on CUDA: W_eff, dW, dr and dc of a matrix by PyTorch's formula and by kernel.py, beside
             a plain copy of as many bytes: 1.07 GB, so GB/s are 1074 / ms

A ratio is the time of a row over the time of the first row of its part: below 1 is faster. Every
round measures each row once, in random order. A ratio compares two times of one round, so a slow
phase of the machine cancels. The table shows the median over the rounds, and the interval that
holds the true median in about 95 % of such runs.
"""
import argparse
import math
import random
import string
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

# train.py and the other modules are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import kernel
import muon
import train
from model import GPT


# ---------------------------------------------------------------- the rows of each part
def bare_step(run):
    """A function that makes one step of train.py, on a batch that stays the same."""
    config = run.config
    X, Y = run.corpus.train_batch(config.batch_size * config.accumulate, run.generator)
    X, Y = X.to(run.device), Y.to(run.device)

    def step():
        for x, y in zip(X.split(config.batch_size), Y.split(config.batch_size)):
            with train.autocast(run.device):
                _, loss = run.model(x, y)
            loss = loss / config.accumulate
            loss.backward()
        train.clip_gradients(run.groups, config.grad_clip)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step


def step_rows(config):
    """A part is {row: function}. The calls of the function are measured."""
    rows = {}
    for kind in ("none", "scalar", "vector"):
        rows[kind] = bare_step(train.Run(replace(config, multipliers=kind)))
    config = replace(config, multipliers="vector", scale_kernel=True)
    rows["vector, kernel"] = bare_step(train.Run(config))
    return rows


def block_matrices(config):
    """The matrices inside the blocks, each with a random gradient."""
    model = GPT(replace(config, multipliers="none")).to(config.device)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    for p in matrices:
        p.grad = torch.randn_like(p)
    return matrices


def muon_step(optimizer, dtype):
    """One step in this dtype. By itself muon.py chooses the dtype by the device."""
    with mock.patch.object(muon, "matmul_dtype", lambda device: dtype):
        optimizer.step()


def optimizer_rows(config):
    # PyTorch's Muon always computes in bf16.
    theirs = torch.optim.Muon(block_matrices(config), adjust_lr_fn="match_rms_adamw")
    ours = muon.Muon(block_matrices(config))
    return {"torch.optim.Muon": theirs.step,
            "Muon, bf16": partial(muon_step, ours, torch.bfloat16),
            "Muon, fp32": partial(muon_step, ours, torch.float32)}


def loop_rows(config):
    bare = bare_step(train.Run(config))
    # The run is so long that the lr never falls.
    run = train.Run(replace(config, steps=10 ** 9))

    def bare_steps():
        for _ in range(10):
            bare()

    def loop():
        for _ in range(10):
            row = train.train_step(run)
        # train.py writes a row of the log after every tenth step.
        train.measure(run, row)
    return {"bare steps": bare_steps, "train.py": loop}


def write_shards(folder, count):
    """Two shards of random tokens."""
    Path(folder).mkdir()
    header = np.zeros(train.SHARD_HEADER // 4, "<i4")
    header[:3] = [*train.SHARD_MAGIC, count]
    tokens = np.random.default_rng(0).integers(50257, size=count)
    for name in ("train.bin", "val.bin"):
        Path(folder, name).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def open_corpus(folder):
    return train.Corpus(folder, 128).train_batch(8, torch.Generator())


def corpus_rows(config):
    rows = {}
    for count in (10 ** 5, 10 ** 7):
        # beside the text
        folder = f"{config.data}-{count}"
        write_shards(folder, count)
        rows[f"{count:.0e} tokens"] = partial(open_corpus, folder)
    return rows


def make_all(scale, inputs, G):
    """W_eff, dW, dr and dc."""
    W_eff = scale(*inputs, torch.bfloat16)
    return torch.autograd.grad(W_eff, inputs, G)


def kernel_rows(config):
    # W is larger than the cache of a GPU (L2), so that it comes from memory.
    shape = (8192, 8192)
    sizes = (shape, shape[:1], shape[1:])
    inputs = [torch.rand(size, device="cuda", requires_grad=True) for size in sizes]
    G = torch.randn(shape, device="cuda").bfloat16()
    # Bytes per weight: W 4, W_eff 2 forward; G 2, W 4, dW 4 backward. A copy reads half of these
    # 16 bytes and writes the other half, so it takes 2 floats: the copy moves 1.07 GB.
    a = torch.rand(2, *shape, device="cuda")
    b = torch.empty_like(a)
    compiled = torch.compile(kernel.formula)
    return {"copy, 1.07 GB": partial(b.copy_, a),
            "formula": partial(make_all, kernel.formula, inputs, G),
            "formula, compiled": partial(make_all, compiled, inputs, G),
            "kernel.scale": partial(make_all, kernel.scale, inputs, G)}


PARTS = {"step": step_rows, "optimizer": optimizer_rows, "loop": loop_rows,
         "corpus": corpus_rows, "kernel": kernel_rows}


# ---------------------------------------------------------------- measuring
def timed(call):
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    # A call only queues the work of a GPU. We wait for its end.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(rows, rounds):
    """{row: seconds [rounds]}."""
    for call in rows.values():
        # The first call compiles and fills caches.
        call()
    seconds = {name: np.zeros(rounds) for name in rows}
    for i in range(rounds):
        for name in random.sample(list(rows), len(rows)):
            seconds[name][i] = timed(rows[name])
    return seconds


def compare(times, base):
    """Median of the ratios times / base, both [n], and its 95 % interval."""
    # How many ratios lie below the true median is binomial (n, 1/2), with standard deviation
    # sqrt(n) / 2. So the ranks n / 2 -+ 1.96 sqrt(n) / 2 enclose the true median in 95 %.
    around = 0.98 / math.sqrt(len(base))
    quantiles = np.clip([0.5, 0.5 - around, 0.5 + around], 0, 1)
    return np.quantile(times / base, quantiles)


def show(seconds):
    """The table of a part: median time, and the ratio to the first row with its interval."""
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio, low, high = compare(times, base)
        ms = 1000 * np.median(times)
        print(f"{name:<20}{ms:>10.3f} ms   {ratio:.3f} [{low:.3f}, {high:.3f}]")


# ---------------------------------------------------------------- the command line
def make_config(preset, device, folder):
    """The settings of a preset. Its text is random, in `folder`."""
    config = train.Config(**train.PRESETS[preset], device=device, data=f"{folder}/text")
    if config.tokenizer == "gpt2":
        write_shards(config.data, 10 ** 6)
    else:
        text = random.choices(string.printable, k=10 ** 6)
        Path(config.data).write_text("".join(text), encoding="utf-8")
    return config


def main():
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--preset", choices=train.PRESETS, default="gpt2" if cuda else "tiny")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else PARTS
    print(f"{arguments.preset}, {device}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = make_config(arguments.preset, device, folder)
        for part in parts:
            print(part)
            if part == "kernel" and not cuda:
                print("needs CUDA")
            else:
                show(measure(PARTS[part](config), rounds=40))


if __name__ == "__main__":
    main()
