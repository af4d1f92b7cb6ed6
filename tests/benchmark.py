"""What the multipliers, Muon and the training loop cost on this machine, beside what they replace.

    python tests/benchmark.py [--json]       # a CPU: 5 minutes on two cores; CUDA: GPT-2's size

  step       forward, backward and optimizer on one fixed batch. "vector on activations" is the same
             function as y = r * (W (c * x)), which scales tokens * (in + out) numbers where we
             scale in * out: this row is why we do.
  optimizer  one step of our Muon and of torch.optim's on the matrices inside the blocks.
  loop       train.train() as it is; the bare step of the same model; and a plain nanoGPT-style
             loop of the same size, of PyTorch's own modules and AdamW.
  start-up   train.Corpus opened and one batch drawn, over 10^7 and over 10^10 tokens.

Every row of a part is measured once in each round, in random order, and a ratio is taken within a
round, so that what slows the whole machine cancels. Its median is printed with the interval that
holds the true median in about 95 % of such runs (by ranks, rounds taken as independent): 1.01
[1.00, 1.02] is no difference. Ratios are of times, below 1 is faster than the base; in the loop
part of speeds, above 1 is faster. MFU, model FLOPs utilisation: FLOPs per token (6 per matrix entry
+ 12 L T C) times tokens per second, over the peak of the device: the data sheet's or, where we know
none, the rate of a large matmul here. The table says which.

Peak memory is that of a fresh process for each row, all included from the weights on. CUDA:
max_memory_allocated. Otherwise the growth of the resident set, true to a few MB in the first two
parts and to 10 % in the loop. A missed target is printed as MISSED, and nothing fails; the verdict
looks at the median, and "within noise" says that the interval reaches the target.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))       # where train.py is

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import muon
import train
from multipliers import MultiplierLinear

# The rows; the first one is the base of the ratios
STEP = ["none", "scalar", "vector", "vector, kernel", "vector on activations"]
COMPILED = ["none, compiled", "vector, compiled", "vector, kernel, compiled"]      # CUDA only
OPTIMIZER = ["torch.optim.Muon, bf16", "Muon, bf16", "Muon, fp32", "torch.optim.AdamW"]
LOOP = ["bare step", "train.train()", "plain loop"]
# FLOP/s in bf16 without sparsity, from the data sheets; the first name that fits counts
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass
class Setup:
    """What is measured; it travels to the processes that measure memory."""
    config: train.Config           # resolved; data is a folder of shards
    device: torch.device
    vocab_size: int
    calls: int                     # steps of the loop in a round; a multiple of 4

    @property
    def passes(self) -> int:
        """Forward passes in a step."""
        return self.config.tokens_per_step // (self.config.batch_size * self.config.block_size)


# ---------------------------------------------------------------- a step

class ActivationLinear(MultiplierLinear):
    """The same function of row and column, with a copy of x [..., in] and one of y [..., out]."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x * self.column.to(x.dtype), self.weight)
        return y * self.row.to(y.dtype)


def build(name: str, setup: Setup) -> nn.Module:
    """The model of a row, whose name says what to do. The bare step has that of train.train()."""
    config = setup.config
    if name != "bare step":
        config = replace(config, multipliers=re.match(r"\w+", name)[0],
                         scale_kernel="kernel" in name, compile="compiled" in name)
    model = train.build(config, setup.vocab_size).to(setup.device)
    if config.scale_kernel:
        train.attach_kernel(model, setup.device)
    for module in model.blocks.modules():
        if "activations" in name and isinstance(module, MultiplierLinear):
            module.__class__ = ActivationLinear
    if config.compile:
        model.compile()
    return model


def training_step(name: str, setup: Setup):
    """No data, no clipping, no schedule, no log."""
    config, device, model = setup.config, setup.device, build(name, setup)
    optimizers = train.make_optimizers(train.parameter_groups(model, config), device)
    x, y = torch.randint(setup.vocab_size, (2, config.batch_size, config.block_size), device=device)

    def step():
        for _ in range(setup.passes):
            with train.autocast(device):
                loss = model(x, y)[1]
            (loss / setup.passes).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step


# ---------------------------------------------------------------- an optimizer

def optimizer_step(name: str, setup: Setup):
    model = build("none", setup)
    matrices = [p for key, p in model.named_parameters() if re.match("blocks.*weight$", key)]
    for p in matrices:
        p.grad = torch.randn_like(p)
    if name == "torch.optim.AdamW":
        return torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step
    library = torch.optim.Muon if name.startswith("torch") else muon.Muon
    optimizer = library(matrices, adjust_lr_fn="match_rms_adamw")
    dtype = torch.float32 if "fp32" in name else torch.bfloat16       # torch's is always bf16

    def step():
        with mock.patch.object(muon, "ns_dtype", lambda device: dtype):
            optimizer.step()
    return step


# ---------------------------------------------------------------- the loop

def our_loop(setup: Setup) -> float:
    """Seconds per step of train.train(), between its first row of the log (warm-up) and its last
    (the end of a run, with the norms of all matrices). The rows are of equally many steps: their
    harmonic mean is the speed of the whole, and a slow row counts, which a median would hide."""
    every = setup.calls // 4
    steps = setup.calls + 2 * every
    result = train.train(replace(
        setup.config, steps=steps, log_interval=every, eval_interval=steps, out=None,
        eval_windows=setup.config.batch_size), quiet=True)
    speeds = [row["tokens_per_second"] for row in result["log"][1:-1]]
    return setup.config.tokens_per_step / statistics.harmonic_mean(speeds)


class PlainGPT(nn.Module):
    """nanoGPT's model (LayerNorm, learned positions, GELU, a hidden width of 4 C), of PyTorch's
    parts. tokens, targets [B, T] -> logits [B, T, V] and loss, as model.GPT."""

    def __init__(self, vocab_size: int, config: train.Config):
        super().__init__()
        C, T = config.n_embd, config.block_size
        self.embedding, self.positions = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            C, config.n_head, 4 * C, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True, bias=False) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(C, bias=False), nn.Linear(C, vocab_size, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor):
        T = tokens.shape[1]
        x = self.embedding(tokens) + self.positions.weight[:T]
        for block in self.blocks:            # is_causal: attention may drop the mask and be fast
            x = block(x, src_mask=self.mask[:T, :T], is_causal=True)
        logits = self.head(self.norm(x))
        return logits.detach(), F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> int:
        """Counted as model.GPT counts them."""
        entries = sum(p.numel() for name, p in self.named_parameters()
                      if p.ndim == 2 and not name.startswith(("embedding", "positions")))
        return 6 * entries + 12 * len(self.blocks) * self.positions.weight.numel()


def plain_step(setup: Setup):
    """nanoGPT's loop around it: memory-mapped tokens, the next batch while the GPU computes."""
    config, device, T = setup.config, setup.device, setup.config.block_size
    model = PlainGPT(setup.vocab_size, config).to(device)
    if config.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = train.Corpus(config.data, T).shards["train"][0]

    def get_batch():
        starts = torch.randint(len(tokens) - T, (config.batch_size,)).tolist()
        pair = [torch.stack([torch.from_numpy(tokens[i + shift:i + shift + T].astype(np.int64))
                             for i in starts]) for shift in (0, 1)]
        if device.type == "cuda":
            pair = [t.pin_memory() for t in pair]
        return [t.to(device, non_blocking=True) for t in pair]
    batch = get_batch()

    def step():
        nonlocal batch
        for _ in range(setup.passes):
            with train.autocast(device):
                loss = model(*batch)[1]
            batch = get_batch()
            (loss / setup.passes).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


# ---------------------------------------------------------------- start-up

def start_up(tokens: int) -> tuple[float, float]:
    """Seconds and MB, in a fresh process, of opening 100 shards and drawing a batch. The files are
    all hole: they have their length, but next to no blocks on the disk."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, offline():
        for i in range(100):
            path, count = Path(folder, f"train_{i:02}.bin"), tokens // 100
            path.write_bytes(np.array([train.MAGIC, train.VERSION, count], "<i4").tobytes())
            os.truncate(path, train.HEADER + 2 * count)
        before = peak_bytes(cpu)
        seconds = timed(lambda: train.Corpus(folder, 128).train_batch(8, torch.Generator()), cpu, 5)
        return seconds, (peak_bytes(cpu) - before) / 1e6


# ---------------------------------------------------------------- measuring

def timed(call, device: torch.device, calls: int = 1) -> float:
    """Seconds per call."""
    def wait():                              # a GPU's work is only queued by a call
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - began) / calls


def prepare(name: str, setup: Setup):
    """The measurement of one row: a function that returns seconds per step."""
    train.keep_freed_memory()                # as train.train() does: the others have it too
    if name == "train.train()":
        return lambda: our_loop(setup)
    step = (optimizer_step(name, setup) if name in OPTIMIZER else
            plain_step(setup) if name == "plain loop" else training_step(name, setup))
    return lambda: timed(step, setup.device, setup.calls if name in LOOP else 1)


def interleave(names: list[str], setup: Setup, rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step of every row in every round. A first round, the warm-up, is left out."""
    measures = {name: prepare(name, setup) for name in names}
    seconds = {name: [] for name in names}
    for _ in tqdm(range(rounds + 1), f"time of {names[0]}, ...", leave=False, unit="round"):
        for name in random.sample(names, len(names)):
            seconds[name].append(measures[name]())
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def compare(numbers: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """The median of the ratio and its 95 % interval: ranks n/2 -+ 0.98 sqrt(n) of n rounds, since
    how many of them lie below the true median is binomial (n, 1/2)."""
    around = 0.98 / math.sqrt(len(base))
    quantiles = np.clip((0.5, 0.5 - around, 0.5 + around), 0, 1)
    return dict(zip(("ratio", "low", "high"), np.quantile(numbers / base, quantiles).tolist()))


def offline():
    """Shards without a tokenizer make Corpus fetch GPT-2's: not here, where nobody needs it."""
    load = train.load_tokenizer
    return mock.patch.object(train, "load_tokenizer",
                             lambda lines: None if lines == "gpt2" else load(lines))


def peak_bytes(device: torch.device) -> float:
    """The most that this process has held so far; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():                      # Linux, where ru_maxrss begins with the parent's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text("utf-8"))[1])
    return 1e9 * train.peak_memory(device)


def memory(name: str, setup: Setup) -> float:
    """MB that a few steps need, in a fresh process: a peak never falls."""
    setup = replace(setup, calls=4)
    with offline():
        if setup.device.type == "cpu":       # a small one first: the libraries' code is not counted
            small = replace(setup.config, n_layer=1, n_head=2, n_embd=32, batch_size=1,
                            tokens_per_step=None)
            prepare(name, replace(setup, config=train.resolve(small)))()
        before = peak_bytes(setup.device)
        measure = prepare(name, setup)
        measure(), measure()
    return (peak_bytes(setup.device) - before) / 1e6


def fresh(function, *arguments):
    """What the function returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(function, *arguments).result()


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s, and where the number is from."""
    dtype = train.matmul_dtype(device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, peak in PEAKS.items():
            if name in torch.cuda.get_device_name(device):
                return peak, f"data sheet of the {name}, bf16"
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = min(timed(lambda: a @ a, device) for _ in range(8))
    return 2 * n ** 3 / seconds, f"matmul of {n} x {n} in {str(dtype)[6:]}, best of 8, here"


# ---------------------------------------------------------------- the table

def benchmark(setup: Setup, repeats: int, only: str | None = None) -> dict:
    """All parts; memory first, while this process has taken nothing of the GPU for itself."""
    parts, notes = [("step", STEP), ("optimizer", OPTIMIZER), ("loop", LOOP)], []
    if setup.device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64          # every train() is a new model
        parts.insert(1, ("step", COMPILED))
        try:
            train.attach_kernel(nn.Module(), setup.device)
        except train.UserError as reason:
            notes.append(f"no kernel rows: {reason}")
            parts = [(part, [n for n in names if "kernel" not in n]) for part, names in parts]
    parts = [(part, names) for part, names in parts if only in (None, part)]
    peak_mb = {name: fresh(memory, name, setup) for name in tqdm(
        [name for _, names in parts for name in names], "memory", leave=False, unit="row")}
    flops, source = peak_flops(setup.device)
    ours = train.build(setup.config, setup.vocab_size).flops_per_token()
    plain = PlainGPT(setup.vocab_size, setup.config).flops_per_token()
    rows = []
    for part, names in parts:
        # a round of the loop is `calls` steps, of the other parts one: they take more rounds
        rounds = repeats if part == "loop" else repeats * setup.calls // 5 + 1
        seconds = interleave(names, setup, rounds)
        for name, s in seconds.items():
            base, tokens = seconds[names[0]], setup.config.tokens_per_step
            row = {"part": part, "name": name, "ms": 1e3 * float(np.median(s)),
                   "peak_mb": peak_mb[name]}
            if part == "loop":
                speed = tokens / float(np.median(s))
                row |= {**compare(base, s), "tokens_per_second": speed,
                        "mfu": speed * (plain if name == "plain loop" else ours) / flops}
            else:
                row |= compare(s, base)
            rows.append(row)
    for tokens in (10 ** 7, 10 ** 10) if only in (None, "start-up") else ():
        seconds, mb = fresh(start_up, tokens)
        rows.append({"part": "start-up", "name": f"{tokens:.0e} tokens", "ms": 1e3 * seconds,
                     "peak_mb": mb})
    for row in rows:
        row["peak_mb"] = None if math.isnan(row["peak_mb"]) else row["peak_mb"]
    return {"machine": machine(setup), "peak_tflops": flops / 1e12, "peak_source": source,
            "notes": notes, "rows": rows,
            "targets": targets({row["name"]: row for row in rows}, setup)}


def targets(row: dict[str, dict], setup: Setup) -> list[dict]:
    """What the project has promised for such a machine, and what came of it."""
    found, config, device = [], setup.config, machine(setup)["device"]

    def check(what, sign, limit, ratio, low=None, high=None, **_):
        ok = ratio <= limit if sign == "<=" else ratio >= limit
        near = low is not None and low <= limit <= high
        found.append({"what": what, "measured": ratio, "low": low, "high": high,
                      "target": f"{sign} {limit}",
                      "verdict": "ok" if ok else "MISSED, within noise" if near else "MISSED"})
    if "vector" in row and setup.device.type == "cpu" and config.preset == "cpu":
        check("vector / none, time", "<=", 1.03, **row["vector"])
    if "vector" in row and setup.device.type == "cuda" and config.preset == "gpt2":
        best = min((row[name] for name in ("vector, kernel", *COMPILED[1:]) if name in row),
                   key=lambda r: r["ratio"])
        check(f"{best['name']} / none, time", "<=", 1.005, **best)
    if "Muon, bf16" in row:
        ours, theirs = row["Muon, bf16"], row["torch.optim.Muon, bf16"]
        check("Muon / torch.optim.Muon, time", "<=", 1.0, **ours)
        if theirs["peak_mb"]:
            check("Muon / torch.optim.Muon, memory", "<=", 1.0, ours["peak_mb"] / theirs["peak_mb"])
    if "train.train()" in row:
        check("train.train() / bare step, speed", ">=", 0.97, **row["train.train()"])
        if "H200" in device and config.preset == "gpt2":
            check("train.train(), MFU", ">=", 0.45, row["train.train()"]["mfu"])
    return found


def machine(setup: Setup) -> dict:
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
    elif info.exists() and (model := re.search("model name\\s*: (.*)", info.read_text("utf-8"))):
        name = model[1]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "preset": setup.config.preset, "date": time.strftime("%Y-%m-%d")}


def show(result: dict) -> None:
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"MFU is of {result['peak_tflops']:.3g} TFLOP/s: {result['peak_source']}")
    print("\n".join(result["notes"]))
    print(f"{'part':<11}{'row':<27}{'ms':>9}  {'ratio [95 % interval]':<24}{'peak MB':>8}"
          f"{'tokens/s':>11}{'MFU':>7}")
    for r in result["rows"]:
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if "ratio" in r else ""
        mb = "?" if r["peak_mb"] is None else f"{r['peak_mb']:.1f}"
        speed = f"{r['tokens_per_second']:>11,.0f}{r['mfu']:>7.1%}" if "mfu" in r else ""
        print(f"{r['part']:<11}{r['name']:<27}{r['ms']:>9.2f}  {ratio:<24}{mb:>8}{speed}")
    print()
    for t in result["targets"]:
        interval = "" if t["low"] is None else f" [{t['low']:.3f}, {t['high']:.3f}]"
        print(f"{t['what']:<40}{t['measured']:.3f}{interval:<18}{t['target']:>9}  {t['verdict']}")


def make_setup(preset: str, device: torch.device, folder: Path) -> Setup:
    """On CUDA the text is random shards in the folder; elsewhere the standard library."""
    config = train.Config(**train.PRESETS[preset], preset=preset, device=str(device))
    if device.type == "cuda":
        config.data = str(folder)
        for part, tokens in {"train": 10 ** 7, "val": 10 ** 6}.items():
            train.write_shard(folder / f"{part}.bin",
                              np.random.default_rng(0).integers(50257, size=tokens))
    else:
        with contextlib.redirect_stdout(sys.stderr):
            config.data = str(train.locate(config.data, config.vocabulary))
    vocab_size = train.Corpus(config.data, config.block_size).vocab_size
    return Setup(train.resolve(config), device, vocab_size, 8 if device.type == "cuda" else 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, help="rounds of the loop (default: CUDA 4, else 20)")
    parser.add_argument("--only", choices=("step", "optimizer", "loop", "start-up"),
                        help="one part (default: all)")
    parser.add_argument("--preset", choices=train.PRESETS, help="default: gpt2 on CUDA, else cpu")
    parser.add_argument("--device", default="auto", help="as for train.py")
    options = parser.parse_args()
    try:
        device = train.pick_device(options.device)
    except train.UserError as reason:
        parser.error(str(reason))
    preset = options.preset or ("gpt2" if device.type == "cuda" else "cpu")
    with tempfile.TemporaryDirectory() as folder, offline():
        result = benchmark(make_setup(preset, device, Path(folder)),
                           options.repeats or (4 if device.type == "cuda" else 20), options.only)
    print(json.dumps(result, indent=1)) if options.json else show(result)


if __name__ == "__main__":
    main()
