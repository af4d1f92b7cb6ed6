"""What multipliers, Muon, the training loop and the kernel cost, each beside what it replaces.

    python tests/benchmark.py                          # all parts: minutes
    python tests/benchmark.py --only step              # one part; kernel needs CUDA
    CUDA_VISIBLE_DEVICES= python tests/benchmark.py    # the CPU of a machine with a GPU

On CUDA the model has the preset "gpt2" of train.py, compiled, and reads random tokens. Elsewhere
the model has the preset "cpu" and reads Python's standard library. The parts are:

  step       forward, backward and optimizer on one fixed batch, for each kind of multipliers.
  optimizer  one step of muon.py and of torch.optim.Muon, on the matrices inside the blocks.
  loop       train.train(), beside the step of the same model on one fixed batch.
  kernel     forward and backward of W_eff by kernel.py and by PyTorch's formula, for the matrices
             inside the blocks, beside a plain copy that moves as many bytes.
  start-up   open train.Corpus and draw one batch, from 10^7 and from 10^10 tokens.

A ratio is the time of a row over the time of the first row of its part: below 1 is faster. Every
round measures each row once, in random order. A ratio compares two times of one round, so a slow
phase of the machine cancels. The table shows the median over the rounds, and the interval that
holds the true median in about 95 % of such runs. Peak memory is that of a fresh process: of PyTorch
on CUDA, else the growth of the resident set, to some MB. Targets follow, missed ones too.
"""
import argparse
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

# train.py and the other modules are in the folder above
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

import kernel
import muon
import train
from model import GPT
from multipliers import use_kernel
from train import Config

# The rows of each part. The first row is the base of the ratios.
PARTS = {
    "step": ["none", "scalar", "vector", "vector, kernel"],
    "optimizer": ["torch.optim.Muon, bf16", "Muon, bf16", "Muon, fp32"],
    "loop": ["bare step", "train.train()"],
    "kernel": ["copy", "formula", "formula, compiled", "kernel.scale"]}

# ---------------------------------------------------------------- step
def build(name: str, config: Config) -> GPT:
    """The model of a row, on its device. A row of the part step names its multipliers."""
    if name in PARTS["step"]:
        config = replace(config, multipliers=re.match(r"\w+", name)[0])
    model = GPT(config, config.seed)
    if "kernel" in name:
        use_kernel(model)
    if config.compile:
        model.compile()
    return model.to(config.device)

def bare_step(name: str, config: Config):
    """The step of train.train(), without data, schedule and log."""
    model, shape = build(name, config), (2, config.batch_size, config.block_size)
    groups = train.parameter_groups(model, config)
    optimizers = train.make_optimizers(groups, torch.device(config.device))
    x, y = torch.randint(config.vocab_size, shape, device=config.device)
    def step():
        for _ in range(config.accumulate):
            with train.autocast(x.device):
                loss = model(x, y)[1] / config.accumulate
            loss.backward()
        train.clip_gradients(groups, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step

# ---------------------------------------------------------------- optimizer and loop
def optimizer_step(name: str, config: Config):
    """A function that makes one step of an optimizer, with gradients that stay the same."""
    matrices = [p for key, p in build("none", config).named_parameters()
                if re.match("blocks.*weight$", key)]
    for p in matrices:
        p.grad = torch.randn_like(p)
    library = torch.optim.Muon if name.startswith("torch") else muon.Muon
    optimizer = library(matrices, adjust_lr_fn="match_rms_adamw")
    # PyTorch's Muon always computes in bf16. muon.py chooses by the device, so choose for muon.py.
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    def step():
        with mock.patch.object(muon, "matmul_dtype", lambda device: dtype):
            optimizer.step()
    return step

def our_loop(config: Config) -> float:
    """Seconds per step of train.train(), with all its work but evaluation and checkpoints."""
    # The log gets two rows: first the warm-up, then the measurement, before the evaluation begins.
    steps = 2 * config.log_interval
    result = train.train(replace(config, steps=steps, eval_interval=steps,
                                 eval_windows=config.batch_size), quiet=True)
    tokens = config.batch_size * config.accumulate * config.block_size
    return tokens / result["log"][-1]["tokens_per_second"]

# ---------------------------------------------------------------- kernel and start-up
def kernel_step(name: str, config: Config):
    """A function that makes W_eff, dW, dr and dc of all matrices inside the blocks, on CUDA. The
    matrices together exceed the GPU's cache (L2), so every W comes from memory."""
    shapes = [p.shape for p in GPT(config).blocks.parameters() if p.ndim == 2]
    if name == "copy":
        # Bytes per weight: W 4, W_eff 2 forward; G 2, W 4, dW 4 backward. A copy reads half of
        # these 16 bytes and writes the other half.
        a, b = torch.rand(2, 2 * sum(map(math.prod, shapes)), device=config.device)
        return lambda: a.copy_(b)
    scale = kernel.scale if name == "kernel.scale" else kernel.formula
    if name == "formula, compiled":
        scale = torch.compile(scale, dynamic=False)
    inputs = [[torch.rand(size, device=config.device, requires_grad=True)
               for size in (shape, shape[:1], shape[1:])] for shape in shapes]
    G = [torch.randn(shape, device=config.device).bfloat16() for shape in shapes]
    def both():
        outs = [scale(*Wrc, torch.bfloat16) for Wrc in inputs]
        return list(map(torch.autograd.grad, outs, inputs, G))
    # A CUDA graph records the launches once and replays them without gaps.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first call compiles. A graph cannot record a compilation.
        both()
    with torch.cuda.graph(graph, stream=stream):
        both()
    return graph.replay

def start_up(tokens: int) -> tuple[float, float]:
    """Seconds and MB of opening 100 shards and drawing a batch. Call this in a fresh process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        lines = train.train_tokenizer(["only single bytes"], 257)
        Path(folder, "tokenizer.tiktoken").write_text(lines, encoding="utf-8")
        for i in range(100):
            path, count = Path(folder, f"train_{i:02}.bin"), tokens // 100
            path.write_bytes(np.array([train.MAGIC, train.VERSION, count], "<i4").tobytes())
            # A sparse file: it has the length of its tokens, but takes no space on the disk.
            os.truncate(path, train.HEADER + 2 * count)
        before = peak_bytes("cpu")
        first_batch = lambda: train.Corpus(folder, 128).train_batch(8, torch.Generator())
        return timed(first_batch, "cpu", 5), (peak_bytes("cpu") - before) / 1e6

# ---------------------------------------------------------------- measuring
def timed(call, device: str, calls: int = 1) -> float:
    """Seconds per call."""
    # a call only queues the work of a GPU
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - began) / calls

def prepare(name: str, config: Config):
    """The measurement of one row: a function that returns seconds per step."""
    if name == "train.train()":
        return lambda: our_loop(config)
    make = {"optimizer": optimizer_step, "kernel": kernel_step}
    part = next(part for part in PARTS if name in PARTS[part])
    step = make.get(part, bare_step)(name, config)
    calls = config.log_interval if part in ("loop", "kernel") else 1
    return lambda: timed(step, config.device, calls)

def interleave(names: list[str], config: Config, rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step of every row [rounds], after one round that does not count: the warm-up."""
    measures = {name: prepare(name, config) for name in names}
    seconds = {name: [] for name in names}
    for _ in tqdm(range(rounds + 1), f"time of {names[0]}, ...", leave=False, unit="round"):
        for name in random.sample(names, len(names)):
            seconds[name].append(measures[name]())
    return {name: np.array(values[1:]) for name, values in seconds.items()}

def compare(numbers: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Median of the ratios numbers / base, both [n], and its 95 % interval."""
    # How many ratios lie below the true median is binomial (n, 1/2), with standard deviation
    # sqrt(n) / 2. So the ranks n / 2 -+ 1.96 sqrt(n) / 2 enclose the true median in 95 %.
    around = 0.98 / math.sqrt(len(base))
    quantiles = np.clip((0.5, 0.5 - around, 0.5 + around), 0, 1)
    return dict(zip(("ratio", "low", "high"), np.quantile(numbers / base, quantiles).tolist()))

def peak_bytes(device: str) -> float:
    """The largest memory of this process so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    # Linux's resource.getrusage would count the parent process, too; other systems get nan
    if not (status := Path("/proc/self/status")).exists():
        return math.nan
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1])

def memory(name: str, config: Config) -> float:
    """MB that one row needs. Call this in a fresh process, because a peak never falls."""
    config = replace(config, log_interval=2)
    if config.device == "cpu":
        # A small model first: then the code of the libraries is in memory, and does not count.
        prepare(name, replace(config, n_layer=1, n_head=2, n_embd=32, batch_size=1))()
    before = peak_bytes(config.device)
    measure = prepare(name, config)
    # the moments of the optimizer exist from the end of the first step on
    measure(), measure()
    return (peak_bytes(config.device) - before) / 1e6

def fresh(function, *arguments):
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()

# ---------------------------------------------------------------- the table
def benchmark(config: Config, rounds: int, only: str | None = None) -> list[dict]:
    """The rows of all parts, or of one."""
    parts, rows = {part: PARTS[part] for part in PARTS if only in (None, part)}, []
    if config.device == "cpu":
        parts.pop("kernel", None)
    else:
        # every call of train.train() compiles a model of its own
        torch._dynamo.config.recompile_limit = 64
        try:
            kernel.library(torch.bfloat16)
        except RuntimeError as reason:
            print(f"no rows with the kernel: {reason}")
            parts = {part: [n for n in parts[part] if "kernel" not in n] for part in parts}
    # memory comes first, while this process holds no memory of the GPU
    names = [name for part in parts.values() for name in part]
    mb = {name: fresh(memory, name, config) for name in tqdm(names, "memory", leave=False)}
    for part, names in parts.items():
        # a round of the loop makes log_interval steps, so fewer rounds are enough
        seconds = interleave(names, config, rounds if part == "loop" else 3 * rounds)
        for name, s in seconds.items():
            rows.append({"part": part, "name": name, "ms": 1e3 * float(np.median(s)),
                         "mb": mb[name], "memory": mb[name] / mb[names[0]],
                         **compare(s, seconds[names[0]])})
    for size in (10 ** 7, 10 ** 10) if only in (None, "start-up") else ():
        s, growth = fresh(start_up, size)
        rows.append({"part": "start-up", "name": f"{size:.0e} tokens", "ms": 1e3 * s, "mb": growth})
    return rows

def show(rows: list[dict], cuda: bool) -> None:
    """Print the table, then every target that the project sets, reached or missed."""
    print(f"{'part':<11}{'row':<23}{'ms':>9}  {'ratio [95 % interval]':<24}{'peak MB':>8}")
    for r in rows:
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if "ratio" in r else ""
        print(f"{r['part']:<11}{r['name']:<23}{r['ms']:>9.2f}  {ratio:<24}{r['mb']:>8.1f}")
    # 1 / 0.97: train.train() shall have at least 97 % of the speed of the bare step
    limits = [("vector", "ratio", 1.005 if cuda else 1.03), ("Muon, bf16", "ratio", 1),
              ("Muon, bf16", "memory", 1), ("train.train()", "ratio", 1 / 0.97)]
    limits += [("vector, kernel", "ratio", 1.005)] * cuda
    for row, (name, key, limit) in product(rows, limits):
        if row["name"] == name:
            verdict = "ok" if row[key] <= limit else "MISSED"
            print(f"{name}: {key} {row[key]:.3f}, target {limit:.3f}: {verdict}")

def make_config(device: str, folder: str) -> Config:
    """A preset with the path of its shards in `data` and their vocabulary in `vocab_size`."""
    config = Config(**train.PRESETS["cpu" if device == "cpu" else "gpt2"], device=device)
    if device == "cpu":
        folder = str(train.prepare(config.data, config.vocab_size))
    else:
        tokens = np.random.default_rng(0).integers(50257, size=10 ** 7)
        train.write_shard(Path(folder, "train.bin"), tokens)
    return replace(config, data=folder, vocab_size=train.Corpus(folder, 1).vocab_size)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=(*PARTS, "start-up"), help="one part")
    only, cuda = parser.parse_args().only, torch.cuda.is_available()
    if only == "kernel" and not cuda:
        parser.error("the part kernel needs CUDA")
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("cuda" if cuda else "cpu", folder)
        show(benchmark(config, 4 if cuda else 20, only), cuda)

if __name__ == "__main__":
    main()
