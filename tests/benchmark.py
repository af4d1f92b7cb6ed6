"""What multipliers, Muon, the training loop and the kernel cost, each beside what it replaces.

    python tests/benchmark.py                          # all parts but kernel: minutes
    python tests/benchmark.py --only kernel            # one part; this one needs CUDA
    CUDA_VISIBLE_DEVICES= python tests/benchmark.py    # the CPU of a machine with a GPU

On CUDA the model has the preset "gpt2" of train.py and reads random tokens. Elsewhere the model has
the preset "cpu" and reads Python's standard library. The parts are:

  step       forward, backward and optimizer on one fixed batch, for each kind of multipliers.
             "vector on activations" computes the same function as y = r * (W (c * x)). That row
             scales tokens * (in + out) numbers; multipliers.py scales in * out numbers.
  compiled   the same with torch.compile (on CUDA, or with --only compiled).
  optimizer  one step of muon.py and of torch.optim, on the matrices inside the blocks.
  loop       train.train(); the bare step of the same model, on one fixed batch; and a plain loop
             in nanoGPT's style, with a model of the same size from PyTorch's own modules.
  start-up   open train.Corpus and draw one batch, from 10^7 and from 10^10 tokens.
  kernel     kernel.py beside PyTorch's formula, eager and compiled, in a table of its own.

A ratio is the time of a row over the time of the first row of its part: below 1 is faster. Every
round measures each row once, in random order. A ratio compares two times of one round, so a slow
phase of the machine cancels. The table shows the median over the rounds, and the interval that
holds the true median in about 95 % of such runs. [0.99, 1.02] holds 1: no difference is shown.

Peak memory is that of a fresh process: of PyTorch on CUDA, else the growth of the resident set, to
some MB. MFU, model FLOPs utilisation: flops_per_token * tokens per second / peak of the device.
Targets follow, missed ones too. The median decides; "within noise": the target is in the interval.
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
from functools import partial
from pathlib import Path
from unittest import mock

# train.py and the other modules are in the folder above
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import kernel
import muon
import train
from model import GPT
from multipliers import MultiplierLinear, use_kernel
from train import Config

# The rows of each part. The first row is the base of the ratios.
PARTS = {
    "step": ["none", "scalar", "vector", "vector, kernel", "vector on activations"],
    "compiled": ["none, compiled", "vector, compiled", "vector, kernel, compiled"],
    "optimizer": ["torch.optim.Muon, bf16", "Muon, bf16", "Muon, fp32", "torch.optim.AdamW"],
    "loop": ["bare step", "train.train()", "plain loop"]}

# ---------------------------------------------------------------- step
class ActivationLinear(MultiplierLinear):
    """MultiplierLinear that scales a copy of x [..., in] and a copy of y [..., out] instead."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x * self.column.to(x.dtype), self.weight)
        return y * self.row.to(y.dtype)

def build(name: str, config: Config) -> nn.Module:
    """The model of a row, on its device."""
    # A row of the parts step and compiled names its settings. The loop uses config as it is.
    if name not in PARTS["loop"]:
        config = replace(config, multipliers=re.match(r"\w+", name)[0],
                         scale_kernel="kernel" in name, compile="compiled" in name)
    model = PlainGPT(config) if name == "plain loop" else GPT(config, config.seed)
    if config.scale_kernel:
        use_kernel(model)
    for module in model.blocks.modules():
        if "activations" in name and isinstance(module, MultiplierLinear):
            module.__class__ = ActivationLinear
    if config.compile:
        model.compile()
    return model.to(config.device)

def training_step(model: nn.Module, batch, clip, optimizers: list, config: Config):
    """A function that makes one step: batch() gives inputs and targets, clip() the gradients."""
    def step():
        for _ in range(config.accumulate):
            x, y = batch()
            with train.autocast(x.device):
                loss = model(x, y)[1] / config.accumulate
            loss.backward()
        clip()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step

def bare_step(name: str, config: Config):
    """The step of train.train(), without data, schedule and log."""
    model, shape = build(name, config), (2, config.batch_size, config.block_size)
    groups = train.parameter_groups(model, config)
    optimizers = train.make_optimizers(groups, torch.device(config.device))
    batch = torch.randint(config.vocab_size, shape, device=config.device)
    clip = partial(train.clip_gradients, groups, config.grad_clip)
    return training_step(model, lambda: batch, clip, optimizers, config)

# ---------------------------------------------------------------- optimizer
def optimizer_step(name: str, config: Config):
    """A function that makes one step of an optimizer, with gradients that stay the same."""
    matrices = [p for key, p in build("none", config).named_parameters()
                if re.match("blocks.*weight$", key)]
    for p in matrices:
        p.grad = torch.randn_like(p)
    if name == "torch.optim.AdamW":
        return torch.optim.AdamW(matrices, fused=True).step
    library = torch.optim.Muon if name.startswith("torch") else muon.Muon
    optimizer = library(matrices, adjust_lr_fn="match_rms_adamw")
    # PyTorch's Muon always computes in bf16. muon.py chooses by the device, so choose for muon.py.
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    def step():
        with mock.patch.object(muon, "matmul_dtype", lambda device: dtype):
            optimizer.step()
    return step

# ---------------------------------------------------------------- loop
def our_loop(config: Config) -> float:
    """Seconds per step of train.train(), with all its work but evaluation and checkpoints."""
    # The log gets two rows: first the warm-up, then the measurement, before the evaluation begins.
    steps = 2 * config.log_interval
    result = train.train(replace(config, steps=steps, eval_interval=steps,
                                 eval_windows=config.batch_size), quiet=True)
    tokens = config.batch_size * config.accumulate * config.block_size
    return tokens / result["log"][-1]["tokens_per_second"]

class PlainGPT(nn.Module):
    """tokens, targets [B, T] -> (logits [B, T, V], loss): nanoGPT's model in PyTorch's modules."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, C, T = config, config.n_embd, config.block_size
        self.embedding, self.positions = nn.Embedding(config.vocab_size, C), nn.Embedding(T, C)
        block = nn.TransformerEncoderLayer(C, config.n_head, 4 * C, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True, bias=False)
        self.blocks = nn.TransformerEncoder(block, config.n_layer, nn.LayerNorm(C),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens) + self.positions.weight
        # is_causal permits attention to use a fast method in place of the mask
        logits = self.head(self.blocks(x, mask=self.mask, is_causal=True))
        return logits.detach(), F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def plain_step(config: Config):
    """A step of nanoGPT's loop: windows of memory-mapped tokens, clipping, AdamW."""
    model, T = build("plain loop", config), config.block_size
    tokens = train.read_shard(Path(config.data, "train.bin"))
    def batch():
        starts = torch.randint(len(tokens) - T, (config.batch_size,)).tolist()
        windows = np.stack([tokens[i:i + T + 1] for i in starts]).astype(np.int64)
        windows = torch.from_numpy(windows).to(config.device)         # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clip = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()), config.grad_clip)
    return training_step(model, batch, clip, [optimizer], config)

def flops_per_token(model: nn.Module) -> int:
    """FLOPs of training per token (PaLM, Appendix B): 2 forward and 4 backward for each entry of a
    matrix, except an embedding, which is a look-up; and 12 T C per layer for the two products of
    attention. By custom, the masked tokens count, too."""
    c = model.config
    entries = sum(p.numel() for name, p in model.named_parameters()
                  if p.ndim == 2 and not name.startswith(("embedding", "positions")))
    return 6 * entries + 12 * c.n_layer * c.block_size * c.n_embd

def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s that the device can reach, and where this number comes from."""
    # data sheets, bf16 without sparsity; the first name that fits counts
    sheets = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
    for name in sheets:
        if name in device_name(device):
            return sheets[name], f"data sheet of the {name}, bf16"
    n, dtype = 8192 if device.type == "cuda" else 2048, muon.matmul_dtype(device)
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = min(timed(lambda: a @ a, device) for _ in range(8))
    return 2 * n ** 3 / seconds, f"matmul of {n} x {n} in {str(dtype)[6:]}, best of 8, measured now"

# ---------------------------------------------------------------- kernel
# Shapes of a 124M model with the number of its matrices, and three larger shapes outside it
KERNEL_SHAPES = {(768, 768): 48, (2048, 768): 24, (768, 2048): 12,
                 (50304, 768): 0, (4096, 4096): 0, (16384, 4096): 0}
# Bytes per weight that must move: W 4, W_eff 2 forward; G 2, W 4, dW 4 backward
KERNEL_BYTES = {"forward": 6, "backward": 10, "both": 16}

def milliseconds(way, sets: list[list[Tensor]], median) -> Tensor:
    """[forward, backward, both]: time of W_eff = way(W, r, c) on CUDA. A set is W, r, c, G.

    A CUDA graph records the launches for all sets once and replays them without gaps. The sets
    together exceed the GPU's cache (L2), so every W comes from memory. median(call): a call's ms.
    """
    stream, graphs = torch.cuda.Stream(), [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first call compiles. A graph cannot record a compilation.
        torch.autograd.grad(way(*sets[0][:3]), sets[0][:3], sets[0][3])
    with torch.cuda.graph(graphs[0], stream=stream):
        outs = [way(W, r, c) for W, r, c, _ in sets]
    # The list keeps all gradients alive, so each has memory of its own.
    with torch.cuda.graph(graphs[1], stream=stream, pool=graphs[0].pool()):
        grads = [torch.autograd.grad(out, s[:3], s[3]) for out, s in zip(outs, sets)]
    times = [median(graph.replay) / len(sets) for graph in graphs]
    return torch.tensor([*times, sum(times)])

def kernel_table(device: torch.device) -> None:
    """For each shape and for a 124M model, print the time of kernel.scale, its rate as a part of a
    plain copy's rate, and how many times longer PyTorch's formula takes, eager and compiled."""
    from triton.testing import do_bench
    median = partial(do_bench, return_mode="median")
    ways = [lambda W, r, c, f=f: f(W, r, c, torch.bfloat16) for f in (kernel.scale, kernel.formula)]
    ways.append(torch.compile(ways[1]))
    # A copy reads 1 GiB and writes 1 GiB. Bytes / ms / 1e6 are GB/s.
    big = torch.randn(2, 2 ** 28, device=device)
    copy = big.nbytes / median(lambda: big[0].copy_(big[1])) / 1e6
    # name -> ms [kernel, eager, torch.compile] x [forward, backward, both], number of weights
    results, model_ms, model_weights = {}, torch.zeros(3, 3), 0
    for (rows, cols), count in KERNEL_SHAPES.items():
        # torch.compile is at its best with code for one shape only
        torch.compiler.reset()
        shapes, number = ((rows, cols), (rows,), (cols,)), max(2, 2 ** 27 // (rows * cols))
        sets = [[*(torch.rand(shape, device=device, requires_grad=True) for shape in shapes),
                 torch.randn(rows, cols, device=device).bfloat16()] for _ in range(number)]
        ms = torch.stack([milliseconds(way, sets, median) for way in ways])
        results[f"{rows} x {cols}"] = ms, rows * cols
        model_ms, model_weights = model_ms + count * ms, model_weights + count * rows * cols
    results["124M model"] = model_ms, model_weights
    print(f"{device_name(device)}, torch {torch.__version__}, copy {copy:.0f} GB/s\n"
          "         shape pass            us   GB/s  of copy  x eager  x compile")
    for name, (ms, weights) in results.items():
        for (part, size), (ours, eager, compiled) in zip(KERNEL_BYTES.items(), ms.T.tolist()):
            rate = size * weights / ours / 1e6
            print(f"{name:>14} {part:9}{ours * 1e3:9.2f}{rate:7.0f}{rate / copy:9.0%}"
                  f"{eager / ours:9.2f}{compiled / ours:11.2f}")

# ---------------------------------------------------------------- start-up
def start_up(tokens: int) -> tuple[float, float]:
    """Seconds and MB of opening 100 shards and drawing a batch. Call this in a fresh process."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        lines = train.train_tokenizer(["only single bytes"], 257)
        Path(folder, "tokenizer.tiktoken").write_text(lines, encoding="utf-8")
        for i in range(100):
            path, count = Path(folder, f"train_{i:02}.bin"), tokens // 100
            path.write_bytes(np.array([train.MAGIC, train.VERSION, count], "<i4").tobytes())
            # A sparse file: it has the length of its tokens, but takes no space on the disk.
            os.truncate(path, train.HEADER + 2 * count)
        before = peak_bytes(cpu)
        seconds = timed(lambda: train.Corpus(folder, 128).train_batch(8, torch.Generator()), cpu, 5)
        return seconds, (peak_bytes(cpu) - before) / 1e6

# ---------------------------------------------------------------- measuring
def timed(call, device: torch.device, calls: int = 1) -> float:
    """Seconds per call."""
    # a call only queues the work of a GPU
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
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
    step = (plain_step(config) if name == "plain loop" else
            optimizer_step(name, config) if name in PARTS["optimizer"] else
            bare_step(name, config))
    calls = config.log_interval if name in PARTS["loop"] else 1
    return lambda: timed(step, torch.device(config.device), calls)

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

def peak_bytes(device: torch.device) -> float:
    """The largest memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's resource.getrusage would count the parent process, too; other systems get nan
    if not (status := Path("/proc/self/status")).exists():
        return math.nan
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1])

def memory(name: str, config: Config) -> float:
    """MB that one row needs. Call this in a fresh process, because a peak never falls."""
    config, device = replace(config, log_interval=2), torch.device(config.device)
    if device.type == "cpu":
        # A small model first: then the code of the libraries is in memory, and does not count.
        small = replace(config, n_layer=1, n_head=2, n_embd=32, batch_size=1, accumulate=1)
        prepare(name, small)()
    before = peak_bytes(device)
    measure = prepare(name, config)
    # the moments of the optimizer exist from the end of the first step on
    measure(), measure()
    return (peak_bytes(device) - before) / 1e6

def fresh(function, *arguments):
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()

# ---------------------------------------------------------------- the table
def benchmark(config: Config, repeats: int, peak: float, only: str | None = None) -> list[dict]:
    """The rows of all parts but kernel, or of one. `peak` is the FLOP/s of the device."""
    cuda, parts, rows = config.device.startswith("cuda"), dict(PARTS), []
    tokens = config.batch_size * config.accumulate * config.block_size
    if cuda:
        # every call of train.train() compiles a model of its own
        torch._dynamo.config.recompile_limit = 64
        try:
            kernel.library(torch.bfloat16)
        except RuntimeError as reason:
            print(f"no rows with the kernel: {reason}")
            parts = {part: [n for n in PARTS[part] if "kernel" not in n] for part in PARTS}
    parts = {part: names for part, names in parts.items()
             if part == only or (only is None and (cuda or part != "compiled"))}
    # memory comes first, while this process holds no memory of the GPU
    mb = {name: fresh(memory, name, config) for name in tqdm(
        [name for names in parts.values() for name in names], "memory", leave=False, unit="row")}
    for part, names in parts.items():
        # a round of the loop makes log_interval steps, and a round of the other parts one step
        seconds = interleave(names, config, repeats if part == "loop" else 3 * repeats)
        for name, s in seconds.items():
            row = {"part": part, "name": name, "ms": 1e3 * float(np.median(s)),
                   "mb": mb[name], "memory": mb[name] / mb[names[0]],
                   **compare(s, seconds[names[0]])}
            if part == "loop":
                speed = 1e3 * tokens / row["ms"]
                flops = flops_per_token(build(name, config))
                row |= {"tokens_per_second": speed, "mfu": speed * flops / peak}
            rows.append(row)
    for size in (10 ** 7, 10 ** 10) if only in (None, "start-up") else ():
        s, growth = fresh(start_up, size)
        rows.append(
            {"part": "start-up", "name": f"{size:.0e} tokens", "ms": 1e3 * s, "mb": growth})
    return rows

def verdict(row: dict, key: str, limit: float) -> str:
    """One line: a number of a row, its target, and whether the number reaches the target."""
    number, low, high = row[key], row["low"], row["high"]
    # MFU should be high, time and memory should be low; only the ratio of times has an interval
    reached = number >= limit if key == "mfu" else number <= limit
    noise = ", within noise" if key == "ratio" and low <= limit <= high else ""
    return (f"{row['name']:<27}{key:<7}{number:6.3f}  target {limit:.3f}  "
            f"{'ok' if reached else 'MISSED' + noise}")

def targets(rows: list[dict], device: torch.device) -> list[str]:
    """A verdict for every target that the project sets for this device."""
    # 1 / 0.97: train.train() shall have at least 97 % of the speed of the bare step
    limits = [("Muon, bf16", "ratio", 1), ("Muon, bf16", "memory", 1),
              ("train.train()", "ratio", 1 / 0.97)]
    if device.type == "cpu":
        limits.append(("vector", "ratio", 1.03))
    if device.type == "cuda":
        limits += [(name, "ratio", 1.005) for name in ("vector, kernel", *PARTS["compiled"][1:])]
        limits += [("train.train()", "mfu", 0.45)] * ("H200" in device_name(device))
    found = {row["name"]: row for row in rows}
    return [verdict(found[name], key, limit) for name, key, limit in limits if name in found]

def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"

def show(rows: list[dict], config: Config, peak: float, source: str) -> None:
    """Print the machine, the table and the targets."""
    device = torch.device(config.device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"preset {config.preset}\nMFU is a part of {peak / 1e12:.3g} TFLOP/s: {source}\n"
          f"{'part':<11}{'row':<27}{'ms':>9}  {'ratio [95 % interval]':<24}{'peak MB':>8}"
          f"{'tokens/s':>11}{'MFU':>7}")
    for r in rows:
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if "ratio" in r else ""
        speed = f"{r['tokens_per_second']:>11,.0f}{r['mfu']:>7.1%}" if "mfu" in r else ""
        print(f"{r['part']:<11}{r['name']:<27}{r['ms']:>9.2f}  {ratio:<24}{r['mb']:>8.1f}{speed}")
    print("", *targets(rows, device), sep="\n")

def make_config(device: torch.device, folder: str) -> Config:
    """A preset with the path of its shards in `data` and their vocabulary in `vocab_size`."""
    preset = "gpt2" if device.type == "cuda" else "cpu"
    config = Config(**train.PRESETS[preset] | {"preset": preset, "device": str(device)})
    if device.type == "cuda":
        tokens = np.random.default_rng(0).integers(50257, size=10 ** 7)
        train.write_shard(Path(folder, "train.bin"), tokens)
    else:
        folder = str(train.prepare(config.data, config.vocab_size))
    return replace(config, data=folder, vocab_size=train.Corpus(folder, 1).vocab_size)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=(*PARTS, "start-up", "kernel"), help="one part")
    parser.add_argument("--repeats", type=int, help="rounds of the loop (default: CUDA 4, else 20)")
    options, device = parser.parse_args(), train.pick_device("auto")
    cuda = device.type == "cuda"
    if options.only == "kernel":
        return kernel_table(device) if cuda else parser.error("the part kernel needs CUDA")
    peak, source = peak_flops(device)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(device, folder)
        rows = benchmark(config, options.repeats or (4 if cuda else 20), peak, options.only)
    show(rows, config, peak, source)

if __name__ == "__main__":
    main()
