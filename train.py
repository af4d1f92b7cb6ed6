"""Train a small GPT with learnable multipliers, and see what they learn.

    python train.py                            # text: Python's standard library, no download
    python train.py --multipliers none         # the baseline: same batches, same initial weights
    python train.py --optimizer muon           # Muon for the matrices inside the blocks
    python train.py --data my_book.txt         # a text file, a folder of them, or token shards
    python train.py --resume runs/scalar-adamw-s0
    python train.py --sample runs/scalar-adamw-s0 --prompt "def main("

The paper's recipe is in "which parameter is trained how". Read "text to tokens to batches" last.
"""
import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np
import rustbpe
import tiktoken
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig
from multipliers import is_multiplier, merge, optimizer_groups, small_step_rms, use_kernel
from muon import Muon, matmul_dtype

HOME = Path(os.environ.get("LRM_HOME", Path(__file__).parent))      # the place of data/ and runs/
DATA, RUNS = HOME / "data", HOME / "runs"
# torchrun starts several processes and numbers them; without torchrun there is one, rank 0 of 1
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---------------------------------------------------------------- settings
@dataclass
class Config(GPTConfig):
    """Every setting of a run; GPTConfig has those of the model. n_layer is the flag --n-layer."""
    preset: Literal["auto", "cpu", "gpu", "tiny", "gpt2"] = "auto"   # auto: gpu if there is one
    data: str = "stdlib"                    # stdlib, a text file, a folder, or token shards
    device: str = "auto"                    # auto, cpu, cuda, cuda:1, mps
    seed: int = 0                           # of the initial weights, the batches and the sample
    out: str = ""                           # folder of the run, instead of a new one in runs/
    optimizer: Literal["adamw", "muon"] = "adamw"            # of the matrices inside the blocks
    steps: int = 1500                       # optimizer steps
    batch_size: int = 8                     # windows in a forward pass; halve it to save memory
    accumulate: int = 1                     # forward passes in a step; double it then
    lr: float = 4e-3                        # peak lr of the matrices and the gains
    weight_decay: float = 0.1               # of all matrices but the embedding
    embedding_lr: float = 0.2               # peak lr of the embedding
    multiplier_lr: float = 4e-3             # peak lr of the multipliers
    multiplier_weight_decay: float = 2e-3   # only against drift (paper, 4.1)
    norm_scale: float = 1.0                 # S: lr * S and weight decay / S, in the blocks (App. B)
    head_norm_scale: float = 1.0            # S: the same for the head (paper, 3)
    grad_clip: float = 1.0                  # largest gradient norm; 0: no limit
    clip_multipliers: bool = False          # count the multipliers in that norm (paper, 4.3)
    warmup_steps: int = 100                 # steps in which the lr rises
    decay_fraction: float = 0.2             # last part of the run, in which the lr falls to 0
    scale_kernel: bool = False              # compute W_eff by kernel.py; on CUDA this needs nvcc
    compile: bool = False                   # torch.compile: a minute at first, then faster steps
    eval_interval: int = 250                # steps between evaluations, each with a checkpoint
    eval_windows: int = 256                 # windows of validation text, the same every time
    log_interval: int = 10                  # steps between rows of log.csv and of norms.csv
    resume: str = ""                        # go on with the run in this folder
    sample: str = ""                        # only write text with the model in this folder
    prompt: str = ""                        # how the text begins

    def check(self) -> None:
        super().check()
        may_be_0 = ("seed", "weight_decay", "multiplier_weight_decay", "grad_clip", "warmup_steps",
                    "decay_fraction")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and not (
                    0 < value < 2 ** 63 or value == 0 and f.name in may_be_0):
                raise ValueError(f"{f.name} is out of range: {value}")

PRESETS = {
    "cpu": {},                              # the defaults above
    # the notebook's model: single bytes, 0.13 million parameters, 10 seconds on a CPU core
    "tiny": dict(vocab_size=257, n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=4,
                 steps=2000, weight_decay=0.3, warmup_steps=50, eval_windows=512),
    "gpu": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=32, steps=1200),
    # GPT-2's blocks, 85 million parameters, 524,288 tokens in a step: see figures/README.md
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, accumulate=16,
                 steps=4000, optimizer="muon", weight_decay=0.3, decay_fraction=0.7,
                 eval_windows=10240, compile=True)}

# ---------------------------------------------------------------- which parameter is trained how
def parameter_groups(model: GPT, config: Config) -> list[dict]:  # exercise 7
    """One group for each kind: attn, mlp, head, embedding, gain, multiplier. Keys: kind, optimizer,
    lr, initial_lr (= lr), weight_decay, clip, params. Each parameter is in exactly one group.
    [LRM] Multipliers are vectors and numbers: AdamW trains them, never Muon. Their weight decay of
    0.002 only keeps redundant multipliers from drifting apart (paper, 4.1).
    S, for the paper's norm experiments (section 3, App. B), multiplies an lr and divides the weight
    decay. The equilibrium norm sqrt(lr / 2 wd) becomes S times as large; lr * wd, and so the
    relative size of an update, stays the same."""
    lr, wd, S_mlp = config.lr, config.weight_decay, config.norm_scale
    S_attn = 1.0 if config.placement == "mlp" else S_mlp
    def settings(optimizer, lr, weight_decay, clip=True):
        return dict(optimizer=optimizer, lr=lr, initial_lr=lr, weight_decay=weight_decay, clip=clip)
    kinds = {
        "attn": settings(config.optimizer, lr * S_attn, wd / S_attn),
        "mlp": settings(config.optimizer, lr * S_mlp, wd / S_mlp),
        "head": settings("adamw", lr * config.head_norm_scale, wd / config.head_norm_scale),
        # weight decay would only shrink the rows of rare tokens
        "embedding": settings("adamw", config.embedding_lr, 0.0),
        "gain": settings("adamw", lr, 0.0),
        "multiplier": settings("adamw", config.multiplier_lr, config.multiplier_weight_decay,
                               clip=config.clip_multipliers)}
    def kind_of(name):
        # e.g. blocks.0.attn.q.weight, blocks.0.mlp_norm.gain, head.weight, embedding.row
        parts = name.split(".")
        return ("multiplier" if is_multiplier(name) else "gain" if parts[-1] == "gain" else
                parts[2] if parts[0] == "blocks" else parts[0])
    return optimizer_groups(model, kinds, kind_of)

def make_optimizers(groups: list[dict], device: torch.device) -> list[torch.optim.Optimizer]:
    adamw, muon = ([g for g in groups if g["optimizer"] == name] for name in ("adamw", "muon"))
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=device.type != "mps")]
    return optimizers + [Muon(muon)] if muon else optimizers

def clip_gradients(groups: list[dict], max_norm: float) -> tuple[Tensor, Tensor]:  # exercise 8
    """Shrink the gradients of the groups that count to a norm of max_norm, if it is larger. Return
    this norm and that of all groups, both as they were before.

    [LRM] The gradient of a multiplier is a sum over a row, a column or all of W. In the paper these
    sums made up most of the norm at the start, so that clipping made all other steps far too small
    (4.3). Multipliers therefore do not count, and clipping leaves their gradients alone.
    """
    everyone = [(p, g["clip"]) for g in groups for p in g["params"] if p.grad is not None]
    counted = [p for p, counts in everyone if counts]
    norm = torch.nn.utils.get_total_norm([p.grad for p in counted])
    norm_of_all = torch.nn.utils.get_total_norm([p.grad for p, _ in everyone])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(counted, max_norm, norm)
    return norm, norm_of_all

def schedule(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Factor on the lr of every group: rises to 1, stays at 1, falls to 0 at the end."""
    left = (steps - step) / max(1, round(steps * decay_fraction))
    return min(1.0, (step + 1) / (warmup_steps + 1), left)

# ---------------------------------------------------------------- measuring
def autocast(device: torch.device):
    """Matrix products in bfloat16 where the GPU is made for it, in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, matmul_dtype(device) == torch.bfloat16)

def add_up(*numbers: float) -> list[float]:
    """The sum of each number over all processes, which wait for each other here."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        torch.distributed.all_reduce(sums)
    return sums.tolist()

@torch.no_grad()
def evaluate(model: GPT, corpus: "Corpus", config: Config, device: torch.device) -> dict:
    """On the fixed validation windows: the loss in nats per token, and in bits per byte of text,
    which can be compared between vocabularies."""
    sums = np.zeros(3)
    for x, y in corpus.val_batches(config.batch_size, config.eval_windows):
        with autocast(device):
            # model.forward is not compiled: compiling it would take longer than it saves
            loss = model.forward(x.to(device), y.to(device))[1]
        sums += [loss.item() * y.numel(), y.numel(), corpus.token_bytes[y.numpy()].sum()]
    nats, tokens, n_bytes = add_up(*sums)
    return {"val_loss": nats / tokens,
            "val_bits": nats / math.log(2) / n_bytes if n_bytes else math.nan}

# ---------------------------------------------------------------- the loop
def pick_device(name: str) -> torch.device:
    """Raises ValueError if there is no such device here."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        # of several processes on a machine, each takes a GPU of its own
        name = f"cuda:{RANK % torch.cuda.device_count()}" if name == "cuda" and WORLD > 1 else name
        torch.ones(1, device=name).item()
        return torch.ones(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} cannot be used here: {str(error).splitlines()[0]}")

def train(config: Config, stop: Event | None = None, quiet: bool = False) -> dict:
    """Train; return {"config", "step", "log", "norms"}: the last two are lists of rows. With a
    folder config.out every evaluation is followed by a checkpoint. Once `stop` is set, the run
    saves after this step, without evaluating, and ends. Raises ValueError or OSError."""
    config.check()
    if config.batch_size * config.accumulate % WORLD:
        raise ValueError(f"batch_size * accumulate must be a multiple of {WORLD} processes")
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tokens_per_step = config.batch_size * config.accumulate * config.block_size
    corpus = Corpus(config.data, config.block_size, config.vocab_size)
    # a text may have fewer tokens than asked for, and shards have the tokens that they have
    config = replace(config, vocab_size=corpus.vocab_size)
    model = GPT(config, config.seed).to(device)
    if config.scale_kernel:
        use_kernel(model)
    if config.compile:
        model.compile()
    # Every process has the whole model and takes a share of each batch. DistributedDataParallel
    # averages the gradients, so that all processes take the same step and their weights stay equal.
    parallel = DistributedDataParallel(model) if WORLD > 1 else model
    groups = parameter_groups(model, config)
    optimizers = make_optimizers(groups, device)
    # only the training batches draw from this generator
    generator = torch.Generator().manual_seed(config.seed)
    step, log, norm_log = 0, [], model.norms(0)
    if config.resume:
        step, log, norm_log = restore(config, corpus, model, optimizers, generator)
    if not quiet:
        say(corpus.about)
        passes = config.steps * tokens_per_step / int(corpus.ends["train"][-1])
        if passes > 2:
            say(f"reading the text {passes:.1f} times, {config.steps / passes:.0f} steps each")
        print_groups(groups)
    # disable=None: the bar appears only on a terminal
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=quiet or None)
    clock, clock_step = time.perf_counter(), step
    while step < config.steps:
        factor = schedule(step, config.steps, config.warmup_steps, config.decay_fraction)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            # each group has a peak lr of its own
            group["lr"] = group["initial_lr"] * factor
        X, Y = corpus.train_batch(config.batch_size * config.accumulate, generator)
        train_loss = 0.0
        for x, y in zip(X.split(config.batch_size), Y.split(config.batch_size)):
            with autocast(device):
                loss = parallel(x.to(device), y.to(device))[1] * (len(x) / len(X))
            loss.backward()
            train_loss += loss.detach()
        norm, norm_of_all = clip_gradients(groups, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update()

        # if one process has to stop, all stop
        stopping = add_up(stop is not None and stop.is_set())[0] > 0
        evaluating = step == config.steps or not stopping and step % config.eval_interval == 0
        measuring = evaluating or step % config.log_interval == 0
        if not (measuring or stopping):
            continue
        # float() waits until the GPU has finished: read the clock after that
        row = {"step": step, "loss": add_up(float(train_loss))[0] / WORLD, "lr": config.lr * factor,
               "grad_norm": float(norm), "grad_norm_with_multipliers": float(norm_of_all)}
        seconds = time.perf_counter() - clock
        row["tokens_per_second"] = (step - clock_step) * tokens_per_step / seconds
        if evaluating:
            row |= evaluate(model, corpus, config, device)
        if not math.isfinite(row["loss"] + row["grad_norm"] + row.get("val_loss", 0)):
            raise ValueError(f"loss or gradient not finite at step {step}: try a smaller lr")
        if measuring:
            log.append(row)
            norm_log += model.norms(step)
        if (evaluating or stopping) and config.out:
            save(config, corpus, model, optimizers, generator, step, log, norm_log)
            if evaluating and row["val_loss"] == min(r.get("val_loss", math.inf) for r in log):
                write_whole(Path(config.out, "best.pt"), lambda file: file.write(
                    Path(config.out, "checkpoint.pt").read_bytes()))
        bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_second']:,.0f}")
        if evaluating and not quiet:
            bar.clear()
            say(f"step {step:>6}: val loss {row['val_loss']:.4f} nats/token, "
                f"{row['val_bits']:.4f} bits/byte")
        if stopping:
            break
        clock, clock_step = time.perf_counter(), step
    bar.close()
    return {"config": asdict(config), "step": step, "log": log, "norms": norm_log}

# ---------------------------------------------------------------- checkpoints
def write_whole(path: Path, write) -> None:
    """write(file), then rename: a crash or a full disk leaves the old file or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def save(config, corpus, model, optimizers, generator, step, log, norm_log) -> None:
    """checkpoint.pt, config.json, log.csv and norms.csv, in the folder of the run."""
    out, settings = Path(config.out), asdict(config) | {"resume": "", "out": ""}
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = {"config": settings, "step": step, "log": log, "norms": norm_log,
                  "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                  "batches": generator.get_state(), "tokenizer": corpus.lines,
                  "text": corpus.fingerprint}
    write_whole(out / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    texts = {"config.json": json.dumps(settings, indent=1)}
    for name, rows in (("log.csv", log), ("norms.csv", norm_log)):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines = [keys, *([str(row.get(key, "")) for key in keys] for row in rows)]
        texts[name] = "\n".join(map(",".join, lines)) + "\n"
    for name, text in texts.items():
        write_whole(out / name, lambda file: file.write(text.encode("utf-8")))

def load(run: str) -> tuple[GPT, dict]:
    """The model of a run (a folder, or one .pt file in it), and all that its checkpoint holds.
    Raises OSError or ValueError."""
    with open(run if Path(run).is_file() else Path(run, "checkpoint.pt"), "rb") as f:
        try:
            saved = torch.load(f, map_location="cpu", weights_only=True)
            model = GPT(Config(**saved["config"]))
            model.load_state_dict(saved["model"])
        except Exception:
            raise ValueError(f"{f.name} is damaged, or of another version of this program")
    return model, saved

def restore(config, corpus, model, optimizers, generator) -> tuple[int, list, list]:
    """Bring everything back to where config.resume was saved; return step, log and norms."""
    folder, saved = config.resume, load(config.resume)[1]
    if saved["text"] != corpus.fingerprint:
        raise ValueError(f"{folder} was trained on another text (other files, or another Python)")
    shape = ["optimizer", "seed", *(f.name for f in fields(GPTConfig))]
    if any(saved["config"][name] != getattr(config, name) for name in shape):
        raise ValueError(f"{folder} has another shape: another model, optimizer or seed")
    if saved["step"] >= config.steps:
        raise ValueError(f"{folder} is complete at step {saved['step']}: ask for more --steps")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        # the lr and the weight decay are those asked for now
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    generator.set_state(saved["batches"])
    return saved["step"], saved["log"], saved["norms"]

# ---------------------------------------------------------------- what a run shows
def say(text: str) -> None:
    """print, but a reader that has gone (`| head`, a closed terminal) does not end the run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

def print_groups(groups: list[dict]) -> None:
    say("parameters  tensors     numbers  optimizer       lr    decay  in clip norm")
    for g in groups:
        numbers, counts = sum(p.numel() for p in g["params"]), "yes" if g["clip"] else "no"
        say(f"{g['kind']:<11}{len(g['params']):>8}{numbers:>12,}  {g['optimizer']:<9}"
            f"{g['lr']:>9.2g}{g['weight_decay']:>9.2g}  {counts}")

def draw(result: dict, file) -> str:
    """run.png. Left: the losses. Right: where the norms of the matrices went, and the law. Returns
    in words whether they have reached the norm that lr and weight decay dictate."""
    c, figure = Config(**result["config"]), Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        rows = [row for row in result["log"] if key in row]
        left.plot([r["step"] for r in rows], [r[key] for r in rows], style, lw=1, ms=4, label=key)
    left.set(xlabel="step", ylabel="nats per token", title=f"{c.multipliers}, {c.optimizer}")
    # the hidden matrices to which norm_scale applies: RMS [steps, matrices]
    where = ".mlp." if c.placement == "mlp" else "blocks."
    rows = [row for row in result["norms"] if where in row["name"] and "W" in row]
    steps = sorted({row["step"] for row in rows})
    W, W_eff = (np.array([r[key] for r in rows]).reshape(len(steps), -1) for key in ("W", "W_eff"))
    curves = [("W", W, "tab:blue")] + [("W_eff", W_eff, "tab:orange")] * (c.multipliers != "none")
    for name, rms, color in curves:
        right.fill_between(steps, rms.min(1), rms.max(1), color=color, alpha=0.2, lw=0)
        right.plot(steps, np.median(rms, 1), color=color, label=f"hidden {name}\nmedian and range")
    for name, color in (("head", "tab:green"), ("embedding", "tab:gray")):
        right.plot(steps, [row["W_eff"] for row in result["norms"] if row["name"] == name],
                   color=color, label=f"{name} W_eff")
    law = c.norm_scale * small_step_rms(c.lr, c.weight_decay) if c.weight_decay else math.inf
    if c.weight_decay:
        right.axhline(law, color="black", ls="--", label="law: S sqrt(lr / 2 decay)")
    # in the last part of the run the lr falls, and the norms with it: compare before that
    stable = np.searchsorted(steps, c.steps * (1 - c.decay_fraction), "right") - 1
    rms, turns = np.median(W[stable]), c.lr * c.weight_decay * c.steps
    there = "there" if turns > 1 and 2 / 3 < rms / law < 3 / 2 else "not there yet"
    verdict = f"{there}: hidden RMS(W) {rms:.3f}, law {law:.3f}; lr * decay * steps = {turns:.1f}"
    right.set(xlabel="step", ylabel="RMS", yscale="log", xlim=(0, c.steps), title=verdict)
    left.legend(), right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(file, dpi=120, format="png")
    ends = [row for row in result["norms"] if row["step"] == steps[-1] and "W" in row]
    scales = [row["W_eff"] / row["W"] for row in ends]
    return f"{verdict}; learned RMS(W_eff) / RMS(W): {min(scales):.2f} to {max(scales):.2f}"

def sample(folder: str, config: Config) -> str:
    """Text by the model of the run in the folder; the text begins with config.prompt."""
    (model, saved), device = load(folder), pick_device(config.device)
    tokenizer = load_tokenizer(saved["tokenizer"])
    if tokenizer is None:
        return "(no sample without GPT-2's vocabulary)"
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary(config.prompt)]
    generator = torch.Generator(device).manual_seed(config.seed)
    tokens = merge(model).to(device).generate(torch.tensor([prompt], device=device), 120,
                                              generator=generator)[0, 1:].tolist()
    # GPT-2's vocabulary is rounded up, and tokens from n_vocab on stand for nothing
    return tokenizer.decode([t for t in tokens if t < tokenizer.n_vocab])

# ---------------------------------------------------------------- text to tokens to batches
# A text becomes a folder in data/ with tokenizer.tiktoken, train.bin and val.bin. A .bin file, a
# "shard", is a header of 1024 bytes and one uint16 for each token, as in llm.c. A batch is windows
# of block_size + 1 tokens at random places of these files.
END = "<|endoftext|>"             # a token that stands before every document
MAGIC, VERSION, HEADER = 20240520, 1, 1024
# How a text is cut into words, in which bytes are then merged: GPT-2's rule, in tiktoken's spelling
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Names that are left out; in the standard library also tables, tests, and what some Pythons lack
HIDDEN = r"\..*"
NOT_STDLIB = HIDDEN + (r"|(site|dist)-packages|tests?|idle_test|encodings|lib2to3|idlelib|"
                       r"turtledemo|pydoc_data|ensurepip|config-.*|_sysconfigdata.*")

def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(HEADER // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())

def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: only the parts in use are read from the disk."""
    header = np.fromfile(path, dtype="<i4", count=3)
    if tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(f"{path} is not a token shard: llm.c's shards begin with {MAGIC}, 1")
    if path.stat().st_size != HEADER + 2 * int(header[2]):
        raise ValueError(f"{path} is cut short: its header promises {header[2]} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER, shape=(int(header[2]),))

def train_tokenizer(texts: list[str], vocab_size: int) -> str:
    """Learn byte-pair merges. One line for each token: its bytes in base64, and its number."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return "".join(f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks)

def load_tokenizer(lines: str) -> tiktoken.Encoding | None:
    """lines from train_tokenizer, or "gpt2" (None if its vocabulary cannot be downloaded)."""
    if lines == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError:
            return None
    pairs = (line.split() for line in lines.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})

def read_texts(root: Path, stdlib: bool) -> dict[str, str]:
    """Name -> text of the UTF-8 files below root, or of root; not of runs and prepared texts."""
    paths, seen, left_out = [root] * root.is_file(), set(), NOT_STDLIB if stdlib else HIDDEN
    def give_up(error):
        raise error
    walk = os.walk(root, onerror=give_up, followlinks=True)
    for folder, folders, names in walk if root.is_dir() else []:
        # a link can lead back to a folder that was read before
        place = os.path.realpath(folder)
        if place in seen or "checkpoint.pt" in names or "tokenizer.tiktoken" in names:
            folders[:], names = [], []
        seen.add(place)
        folders[:] = [name for name in sorted(folders) if not re.fullmatch(left_out, name)]
        paths += [Path(folder, name) for name in names if not re.fullmatch(left_out, name)
                  and (name.endswith(".py") or not stdlib)]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8-sig", "surrogateescape")
             for path in sorted(paths)}
    # a byte that is not UTF-8 has become one of the characters dc80 to dcff
    others = {name for name, text in texts.items() if re.search("[\0\udc80-\udcff]", text)}
    if others:
        say(f"left out, not UTF-8 text: {len(others)} files, {', '.join(sorted(others)[:5])}")
    return {name: text for name, text in texts.items() if name not in others}

def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """For validation a tenth of the files, by a hash of the name, so that a new file moves no other
    one; of fewer than ten files, the last tenth of each."""
    val = {name for name in texts if zlib.crc32(name.encode("utf-8", "surrogateescape")) % 10 == 0}
    if len(texts) >= 10 and 0 < len(val) < len(texts):
        return {"train": [text for name, text in texts.items() if name not in val],
                "val": [text for name, text in texts.items() if name in val]}
    return {"train": [text[:len(text) * 9 // 10] for text in texts.values()],
            "val": [text[len(text) * 9 // 10:] for text in texts.values()]}

def prepare(data: str, vocab_size: int) -> Path:
    """The folder with the tokenizer and the tokens of a text. The same text is prepared once."""
    stdlib = data == "stdlib"
    root = Path(os.__file__).parent if stdlib else Path(data or "(no name)").resolve(strict=True)
    texts, digest = read_texts(root, stdlib), hashlib.sha256(str(vocab_size).encode("utf-8"))
    if not any(map(str.strip, texts.values())):
        raise ValueError(f"{data} holds no UTF-8 text to train on")
    if not 257 <= vocab_size <= 65536:
        raise ValueError(f"vocab_size must be 257 (the bytes and {END}) to 65536, not {vocab_size}")
    for name, text in texts.items():
        digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogateescape"))
    folder = DATA / f"{'stdlib' if stdlib else root.stem}-{digest.hexdigest()[:10]}"
    def sizes(folder):
        return str(sorted((path.name, path.stat().st_size) for path in folder.glob("*.*")))
    # after a crash of the machine, files can be missing or cut short
    marker = folder / "sizes"
    if marker.exists() and marker.read_text(encoding="utf-8") == sizes(folder):
        return folder
    # remove such a folder, and what processes that died left a day ago
    for old in (folder, *DATA.glob(".partial-*")):
        if old == folder or time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    label = f"standard library of Python {sys.version.split()[0]}" if stdlib else data
    say(f"preparing {label}")
    parts, about = split(texts), f"text: {label}, {len(texts)} files"
    lines = train_tokenizer(parts["train"], vocab_size)
    tokenizer = load_tokenizer(lines)
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, prefix=".partial-") as partial:
        made = Path(partial, "made")
        made.mkdir()
        for part, documents in parts.items():
            tokens = np.concatenate([ids for text in documents for ids in (
                [tokenizer.eot_token], tokenizer.encode_to_numpy(text, disallowed_special=()))])
            write_shard(made / f"{part}.bin", tokens)
            about += f", {len(tokens):,} tokens ({part})"
        (made / "tokenizer.tiktoken").write_text(lines, encoding="utf-8")
        (made / "about.txt").write_text(about, encoding="utf-8")
        (made / "sizes").write_text(sizes(made), encoding="utf-8")
        # another process may have been faster
        with suppress(OSError):
            made.rename(folder)
    return folder

class Corpus:
    """The shards of a text, and batches of windows from them."""

    def __init__(self, data: str, block_size: int, vocab_size: int = 4096):
        self.block_size, place = block_size, Path(data)
        paths = [place] if place.suffix == ".bin" else (
            sorted(place.glob("*.bin")) or sorted(prepare(data, vocab_size).glob("*.bin")))
        # "val" must be a word of the name: interval_1.bin is for training
        val = [read_shard(p) for p in paths if "val" in re.split("[^a-z]+", p.stem)]
        train = [read_shard(p) for p in paths if "val" not in re.split("[^a-z]+", p.stem)]
        if train and not val:
            cut = len(train[-1]) * 9 // 10
            train[-1], val = train[-1][:cut], [train[-1][cut:]]
        self.shards, self.ends = {"train": train, "val": val}, {}
        for part, shards in self.shards.items():
            windows = [len(shard) - block_size for shard in shards] or [0]
            if min(windows) < 1:
                raise ValueError(f"{data} is too short: its {part} part has fewer than the "
                                 f"{block_size + 1} tokens of one window (block_size + 1)")
            # entry i: how many windows begin in the shards 0 to i
            self.ends[part] = np.cumsum(windows)
        own, about = (paths[0].with_name(name) for name in ("tokenizer.tiktoken", "about.txt"))
        self.lines = own.read_text(encoding="utf-8") if own.exists() else "gpt2"
        self.about = about.read_text(encoding="utf-8") if about.exists() else f"shards: {data}"
        tokenizer = load_tokenizer(self.lines)
        # GPT-2's 50257 tokens, rounded up to a multiple of 64: sizes that suit a GPU
        self.vocab_size = 50304 if self.lines == "gpt2" else tokenizer.n_vocab
        # bytes of text behind each token, 0 for END
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for t in range(tokenizer.eot_token if tokenizer else 0):
            self.token_bytes[t] = len(tokenizer.decode_single_token_bytes(t))
        # lengths, beginnings and ends tell this text from others: `restore` compares them
        parts = [(len(s), s[:1000].tolist(), s[-1000:].tolist()) for s in (train[0], *val)]
        self.fingerprint = hashlib.sha256(repr((self.lines, parts)).encode("utf-8")).hexdigest()

    def windows(self, part: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets [windows, block_size], int64: targets are one token later."""
        rows = []
        for start in starts.tolist():
            i = int(np.searchsorted(self.ends[part], start, side="right"))
            first = start - (int(self.ends[part][i - 1]) if i else 0)
            rows.append(self.shards[part][i][first:first + self.block_size + 1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"a shard holds token {tokens.max()}, the vocabulary has "
                             f"{self.vocab_size}: put its tokenizer.tiktoken beside it")
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def train_batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` windows at random places; of several processes, each takes its share of them."""
        starts = torch.randint(int(self.ends["train"][-1]), (size,), generator=generator)
        return self.windows("train", starts.numpy()[RANK::WORLD])

    def val_batches(self, batch_size: int, count: int):
        """Evenly spaced windows, the same at every call: `count`, or as many as do not overlap."""
        last = int(self.ends["val"][-1]) - 1
        count = min(count, last // self.block_size + 1)
        starts = np.arange(count) * (last // max(1, count - 1))
        for i in range(0, count, batch_size)[RANK::WORLD]:
            yield self.windows("val", starts[i:i + batch_size])

# ---------------------------------------------------------------- the command line
def parse(arguments: list[str] | None = None) -> Config:
    """The settings: flags override the preset, or the settings of the run that is resumed."""
    given = tyro.cli(Config, args=arguments, description=__doc__)
    auto = "gpu" if pick_device(given.device).type == "cuda" else "cpu"
    preset = auto if given.preset == "auto" else given.preset
    known = load(given.resume)[1]["config"] if given.resume else PRESETS[preset]
    return tyro.cli(Config, args=arguments, default=Config(**known))

def new_folder(config: Config) -> str:
    """The folder of the run: resumed, or new (--out, or the first name in runs/ that is free)."""
    if config.out or config.resume:
        Path(config.out or config.resume).mkdir(parents=True, exist_ok=not config.out)
        # a folder that cannot be written to is an error now, not after an hour
        tempfile.TemporaryFile(dir=config.out or config.resume).close()
        return config.out or config.resume
    for i in count(1):
        name = f"{config.multipliers}-{config.optimizer}-s{config.seed}{f'-{i}' * (i > 1)}"
        with suppress(FileExistsError):
            (RUNS / name).mkdir(parents=True)
            return str(RUNS / name)

def stop_at_signals() -> Event:
    """An event that is set by Ctrl-C, or by a cluster that ends the job."""
    stop = Event()
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:
            # a second signal ends at once; but torchrun sends every signal twice
            signal.signal(number, lambda *_: (
                sys.exit(130) if stop.is_set() and WORLD == 1 else stop.set()))
    return stop

def show(config: Config, result: dict) -> None:
    """What a run prints at its end, and run.png."""
    if result["step"] < config.steps:
        say(f"stopped after step {result['step']} of {config.steps} and saved; to go on: "
            f"python train.py --resume {config.out}")
        return
    final, bar = result["log"][-1], "-" * 60
    say(f"a sample:\n{bar}\n{sample(config.out, config)}\n{bar}")
    write_whole(Path(config.out, "run.png"), lambda file: say(draw(result, file)))
    say(f"saved in {config.out}: run.png, checkpoint.pt, config.json, log.csv, norms.csv")
    best = min((row for row in result["log"] if "val_loss" in row), key=lambda r: r["val_loss"])
    if best is not final:
        say(f"the val loss was lowest, {best['val_loss']:.4f}, at step {best['step']}: "
            f"python train.py --sample {config.out}/best.pt")
    say(f"final: val loss {final['val_loss']:.4f} nats/token, {final['val_bits']:.4f} bits/byte")

def main(arguments: list[str] | None = None) -> int:
    """Train, or sample. An error that the user can mend is one sentence, and the exit code is 2."""
    made = ""
    try:
        config = parse(arguments)
        if config.sample:
            say(sample(config.sample, config))
            return 0
        config.check()
        made = config.out = new_folder(config) if RANK == 0 else ""
        if WORLD > 1:
            torch.distributed.init_process_group()
        result = train(config, stop_at_signals(), quiet=RANK > 0)
        if WORLD > 1:
            torch.distributed.destroy_process_group()
        if RANK == 0:
            show(config, result)
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        # the user can mend files, memory, and what a `raise` says; show other faults
        raised = traceback.extract_tb(error.__traceback__)[-1].line.startswith("raise")
        memory = re.search("out of memory|can't allocate memory", str(error))
        if not (raised or memory or isinstance(error, OSError)):
            raise
        hint = "; half the --batch-size and twice the --accumulate need less" if memory else ""
        print(f"error: {' '.join(str(error).splitlines()[:2])}{hint}", file=sys.stderr)
        return 2
    finally:
        # a run that saved nothing leaves no folder
        with suppress(OSError):
            os.rmdir(made)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")      # for terminals without Unicode
    sys.exit(main())
