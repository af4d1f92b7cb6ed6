"""Train a small GPT with learnable multipliers, and see what they learn.

    python train.py                            # text: Python's standard library, no download
    python train.py --multipliers none         # the baseline: same batches, same initial weights
    python train.py --optimizer muon           # Muon for the matrices inside the blocks
    python train.py --data my_book.txt         # a text file, a folder of them, or token shards
    python train.py --resume runs/scalar-adamw-s0
    python train.py --sample runs/scalar-adamw-s0 --prompt "def main("

A run is saved in runs/ beside train.py, or in the folder runs/ of $LRM_HOME.
The paper's recipe is in "which parameter is trained how". Read "text to tokens to batches" last.
"""
import csv
import io
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Event
from typing import Literal

import filelock
import numpy as np
import tiktoken
import torch
import tyro
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kernel import use_kernel
from model import GPT, BadInput, GPTConfig, RMSNorm
from multipliers import is_multiplier, law_rms, merge, multipliers_of, raw_weight
from muon import Muon, matmul_dtype

RUNS = Path(os.environ.get("LRM_HOME", Path(__file__).resolve().parent), "runs")
# torchrun starts several processes and numbers them. Without torchrun there is one, rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- settings
MAY_BE_0 = ("seed", "weight_decay", "multiplier_weight_decay", "grad_clip", "warmup_steps",
            "decay_fraction", "clip_multipliers", "scale_kernel", "compile")


@dataclass
class Config(GPTConfig):
    """Every setting of a run; GPTConfig has those of the model. n_layer is the flag --n-layer."""
    preset: Literal["auto", "tiny", "small", "gpu", "gpt2"] = "auto"     # auto: gpu on CUDA or tiny
    data: str = "stdlib"                    # stdlib, a text file, a folder, or token shards
    tokenizer: Literal["bytes", "gpt2"] = "bytes"   # what a token is; shards have gpt2's
    vocab_size: tyro.conf.Suppress[int] = 257       # no flag: the tokenizer decides
    device: str = "auto"                    # auto, cpu, cuda, cuda:1, mps
    seed: int = 0                           # of the initial weights, the batches and the sample
    out: str = ""                           # folder of the run, instead of a new one in runs/
    optimizer: Literal["adamw", "muon"] = "adamw"            # of the matrices inside the blocks
    steps: int = 2000                       # optimizer steps
    batch_size: int = 4                     # windows in a forward pass; halve it to save memory
    accumulate: int = 1                     # forward passes in a step; double it then
    lr: float = 4e-3                        # peak lr of the matrices and the gains
    weight_decay: float = 0.3               # of all matrices but the embedding
    embedding_lr: float = 0.06              # peak lr of the embedding
    multiplier_lr: float = 4e-3             # peak lr of the multipliers; "both": vectors a quarter
    multiplier_weight_decay: float = 2e-3   # only against drift (paper, 4.1)
    norm_scale: float = 1.0                 # S for the blocks' matrices: see parameter_groups
    head_norm_scale: float = 1.0            # S for the head (paper, 3)
    grad_clip: float = 1.0                  # largest gradient norm; 0: no limit
    clip_multipliers: bool = False          # count the multipliers in that norm (paper, 4.3)
    warmup_steps: int = 50                  # steps in which the lr rises
    decay_fraction: float = 0.2             # last part of the run, in which the lr falls to 0
    scale_kernel: bool = False              # compute W_eff by kernel.py; on CUDA this needs nvcc
    compile: bool = False                   # torch.compile: a minute at first, then faster steps
    eval_interval: int = 250                # steps between evaluations, each with a checkpoint
    eval_windows: int = 512                 # windows of validation text, the same every time
    log_interval: int = 10                  # steps between rows of log.csv and of norms.csv
    resume: str = ""                        # go on with the run in this folder
    sample: str = ""                        # only write text with the model in this folder
    prompt: str = ""                        # how the text begins

    def check(self):
        """Raises BadInput with the name of a setting that has a value without meaning."""
        super().check()
        for name, value in asdict(self).items():
            if isinstance(value, str) or (value == 0 and name in MAY_BE_0):
                continue
            # "not" refuses NaN, too, which is neither smaller nor larger than 0.
            if not 0 < value < 2 ** 63:
                raise BadInput(f"{name} is out of range: {value}")
        if self.decay_fraction > 1:
            raise BadInput("decay_fraction is at most 1: it is a part of the run")
        if self.batch_size * self.accumulate % WORLD:
            raise BadInput(f"batch_size * accumulate must be a multiple of {WORLD} processes")


PRESETS = {
    # The defaults above: 0.14 million parameters, 15 seconds on a CPU core.
    "tiny": {},
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, steps=1500,
                  weight_decay=0.1, warmup_steps=100, eval_windows=256),
    "gpu": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=32, steps=1200,
                weight_decay=0.1, warmup_steps=100, eval_windows=256),
    # GPT-2's blocks, 85 million parameters, 524,288 tokens in a step: see figures/README.md
    "gpt2": dict(tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024,
                 batch_size=32, accumulate=16, steps=4000, optimizer="muon", warmup_steps=100,
                 decay_fraction=0.7, eval_windows=10240, compile=True)}


# ---------------------------------------------------------------- which parameter is trained how
def kind_of(name):
    """The kind of a parameter: attn, mlp, head, embedding, gain or multiplier."""
    if is_multiplier(name):
        return "multiplier"
    # e.g. blocks.0.attn_norm.gain, blocks.0.attn.q.weight, head.weight
    for kind in ("gain", "attn", "mlp", "head", "embedding"):
        if kind in name:
            return kind


def parameter_groups(model, config):  # exercise 9
    """One group for each kind of parameter. Keys: kind, params, optimizer, lr, initial_lr (= lr),
    weight_decay, clip (does it count in the clip norm?), S.

    [LRM] Multipliers are vectors and numbers: AdamW trains them, never Muon. Their weight decay of
    0.002 only keeps redundant multipliers from drifting apart (paper, 4.1).

    S serves the paper's norm experiments (section 3, App. B). A constant multiplier S on W is the
    same as training S * W with S times the lr and weight_decay / S. The law then asks for S times
    the norm, while lr * weight_decay, and so the relative size of an update, stays the same. With
    placement "mlp" the matrices of the MLPs alone have this S.
    """
    own = config.optimizer
    lr, decay = config.lr, config.weight_decay
    S_mlp, S_head = config.norm_scale, config.head_norm_scale
    S_attn = 1.0 if config.placement == "mlp" else S_mlp
    # kind: optimizer, lr, weight decay, S
    settings = {
        "attn": (own, lr, decay, S_attn),
        "mlp": (own, lr, decay, S_mlp),
        "head": ("adamw", lr, decay, S_head),
        # Weight decay would only shrink the rows of rare tokens.
        "embedding": ("adamw", config.embedding_lr, 0.0, 1.0),
        "gain": ("adamw", lr, 0.0, 1.0),
        "multiplier": ("adamw", config.multiplier_lr, config.multiplier_weight_decay, 1.0)}
    groups = []
    for kind, (optimizer, lr, decay, S) in settings.items():
        params = [p for name, p in model.named_parameters() if kind_of(name) == kind]
        lr *= S
        decay /= S
        clip = kind != "multiplier" or config.clip_multipliers
        if params:
            groups.append(dict(kind=kind, params=params, optimizer=optimizer, lr=lr,
                               initial_lr=lr, weight_decay=decay, clip=clip, S=S))
    if config.multipliers == "both":
        # Noise leads a vector more than a scalar. Beside one it gets a quarter of its lr.
        group = groups.pop()
        scalars = [p for p in group["params"] if p.ndim == 0]
        vectors = [p for p in group["params"] if p.ndim == 1]
        slow = group["lr"] / 4
        groups.append(group | dict(params=scalars))
        groups.append(group | dict(params=vectors, lr=slow, initial_lr=slow))
    # A parameter has one kind, so it is in one group at most. Now each one is in exactly one.
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return groups


def make_optimizers(groups):
    """AdamW, and Muon if any group asks for it."""
    adamw = [group for group in groups if group["optimizer"] == "adamw"]
    muon = [group for group in groups if group["optimizer"] == "muon"]
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True)]
    if muon:
        optimizers.append(Muon(muon))
    return optimizers


def clip_gradients(groups, max_norm):  # exercise 10
    """If the joint norm of the gradients in groups with clip=True exceeds max_norm, scale them down
    to it; max_norm 0 is no limit. Return this norm and that of all groups, as they were before.

    [LRM] The gradient of a multiplier is a sum over a row, a column or all of W. In the paper these
    sums made up most of the norm at the start, so that clipping made all other steps far too small
    (4.3). Multipliers therefore do not count, and clipping leaves their gradients alone.
    """
    counted, gradients = [], []
    for group in groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
        if group["clip"]:
            counted += group["params"]
    norm_of_all = torch.nn.utils.get_total_norm(gradients)
    norm = torch.nn.utils.clip_grad_norm_(counted, max_norm or math.inf)
    return norm, norm_of_all


def schedule(step, steps, warmup_steps, decay_fraction):
    """Factor on the lr of every group: rises to 1, stays at 1, falls to 0 at the end."""
    rising = (step + 1) / (warmup_steps + 1)
    falling = (steps - step) / max(1, round(steps * decay_fraction))
    return min(1.0, rising, falling)


# ---------------------------------------------------------------- measuring
def autocast(device):
    """Matrix products in bfloat16 where the GPU is made for it, in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, matmul_dtype(device) == torch.bfloat16)


def sum_over_processes(number):
    """The sum of `number` over all processes. They wait for each other here."""
    total = torch.tensor(float(number), dtype=torch.float64)
    if WORLD > 1:
        torch.distributed.all_reduce(total)
    return total.item()


@torch.no_grad()
def evaluate(run):
    """The loss on the fixed validation windows, in nats per token."""
    total, windows = 0.0, 0
    for x, y in run.corpus.val_batches(run.config.batch_size, run.config.eval_windows):
        with autocast(run.device):
            # model.forward is not compiled: compiling it would take longer than it saves.
            _, loss = run.model.forward(x.to(run.device), y.to(run.device))
        total += loss.item() * len(x)
        windows += len(x)
    return sum_over_processes(total) / sum_over_processes(windows)


def rms(x):
    return x.detach().float().square().mean().sqrt().item()


def norm_rows(model, step):
    """A row for each matrix: RMS of W, of W_eff and of its multipliers. A row for each RMSNorm."""
    rows = []
    for name, module in model.named_modules():
        tensors = {}
        if isinstance(module, (nn.Linear, nn.Embedding)):
            tensors = {"W": raw_weight(module), "W_eff": module.weight}
            tensors |= multipliers_of(module)
        elif isinstance(module, RMSNorm) and module.gain is not None:
            tensors = {"gain": module.gain}
        if tensors:
            norms = {key: rms(tensor) for key, tensor in tensors.items()}
            rows.append({"step": step, "name": name} | norms)
    return rows


# ---------------------------------------------------------------- the loop
def pick_device(name):
    """auto: the GPU if there is one, or the CPU. Raises BadInput for a device that is not here."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and WORLD > 1:
            # Of several processes on a machine, each takes a GPU of its own.
            device = torch.device("cuda", RANK % torch.cuda.device_count())
        torch.ones(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name} cannot be used here: {error}") from error


class Run:
    """All that a run consists of. A checkpoint holds the part that changes from step to step."""

    def __init__(self, config):
        config.check()
        self.device = pick_device(config.device)
        self.corpus = Corpus(config.data, config.block_size, config.tokenizer)
        # Token shards have GPT-2's tokens, whatever the settings say.
        tokenizer = self.corpus.tokenizer
        vocab_size = VOCAB_SIZES[tokenizer]
        self.config = replace(config, tokenizer=tokenizer, vocab_size=vocab_size)
        self.model = GPT(self.config, config.seed).to(self.device)
        self.groups = parameter_groups(self.model, self.config)
        for group in self.groups:
            for parameter in group["params"]:
                # S is 1 outside of the norm experiments.
                parameter.data *= group["S"]
        self.optimizers = make_optimizers(self.groups)
        if config.scale_kernel:
            use_kernel(self.model)
        if config.compile:
            self.model.compile()
        self.parallel = self.model
        if WORLD > 1:
            # Every process has the whole model and takes a share of each batch. This averages the
            # gradients, so that all processes take the same step and their weights stay equal.
            self.parallel = DistributedDataParallel(self.model)
        # Only the training batches draw from this generator.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.log = []
        self.norms = norm_rows(self.model, 0)

    def result(self):
        """What `train` returns. The log and the norms are lists of rows."""
        return dict(config=asdict(self.config), step=self.step, log=self.log, norms=self.norms)


def train_step(run):
    """One step of the optimizers. Returns the beginning of a row of the log, with tensors in it:
    to read their numbers means to wait for the GPU, so that is done only when they are needed."""
    config = run.config
    size = config.batch_size
    X, Y = run.corpus.train_batch(size * config.accumulate, run.generator)
    mean_loss = 0.0
    for x, y in zip(X.split(size), Y.split(size)):
        with autocast(run.device):
            _, loss = run.parallel(x.to(run.device), y.to(run.device))
            loss = loss * (len(x) / len(X))
        loss.backward()
        mean_loss += loss.detach()
    norm, norm_of_all = clip_gradients(run.groups, config.grad_clip)
    factor = schedule(run.step, config.steps, config.warmup_steps, config.decay_fraction)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            # Each group has a peak lr of its own.
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    return {"step": run.step, "loss": mean_loss, "lr": config.lr * factor, "grad_norm": norm,
            "grad_norm_with_multipliers": norm_of_all}


def measure(run, row):
    """Turn the tensors in the row of this step into numbers, and log it and the norms."""
    for key in ("loss", "grad_norm", "grad_norm_with_multipliers"):
        # Each process has the loss of its share of the batch. The gradients are the same in all.
        row[key] = sum_over_processes(row[key]) / WORLD
    run.log.append(row)
    run.norms += norm_rows(run.model, run.step)


def train(config, stop=None, quiet=False):
    """Train; return Run.result(). In a folder config.out each evaluation leaves a checkpoint. Once
    `stop` is set, the run saves after this step, and ends. Raises BadInput or OSError."""
    run = Run(config)
    if config.resume:
        restore(run)
    if not quiet:
        introduce(run)
    # disable=None: the bar appears only on a terminal.
    bar = tqdm(range(run.step, config.steps), initial=run.step, total=config.steps, unit="step",
               disable=quiet or None)
    for _ in bar:
        row = train_step(run)
        # If one process has to stop, all stop.
        stopping = sum_over_processes(stop is not None and stop.is_set()) > 0
        at_interval = run.step % config.eval_interval == 0 and not stopping
        evaluating = at_interval or run.step == config.steps
        logging = evaluating or run.step % config.log_interval == 0
        if evaluating:
            row["val_loss"] = evaluate(run)
        if logging:
            measure(run, row)
        # A run with a NaN saves nothing, so that the last good checkpoint stays.
        if (logging or stopping) and not all(map(math.isfinite, row.values())):
            raise BadInput(f"loss or gradient not finite at step {run.step}: try a smaller lr")
        if config.out and (evaluating or stopping):
            save(run)
        if evaluating and not quiet:
            bar.clear()
            say(f"step {run.step:>6}: val loss {row['val_loss']:.4f} nats per token")
        if stopping:
            break
    return run.result()


# ---------------------------------------------------------------- checkpoints
LOG_COLUMNS = ("step", "loss", "val_loss", "lr", "grad_norm", "grad_norm_with_multipliers")
NORM_COLUMNS = ("step", "name", "W", "W_eff", "scalar", "row", "column", "gain")
# A run cannot go on with another value of one of these settings.
FIXED = ("seed", "optimizer", *(field.name for field in fields(GPTConfig)))


def write_atomically(path, write):
    """write(file), then rename: a crash or a full disk leaves the old file or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with open(partial, "wb") as file:
            write(file)
            # The bytes have to be on the disk before the new name is.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:
        # torch.save turns the OSError of a full disk into a RuntimeError.
        raise OSError(f"{path} could not be written: {error.__context__ or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_table(path, columns, rows):
    """A csv file. A cell is empty if its row has no such key."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(table.getvalue().encode("utf-8")))


def save(run):
    """checkpoint.pt, log.csv and norms.csv, in the folder of the run."""
    out = Path(run.config.out)
    out.mkdir(parents=True, exist_ok=True)
    states = [optimizer.state_dict() for optimizer in run.optimizers]
    checkpoint = run.result() | dict(
        windows=run.corpus.counts, batches=run.generator.get_state(),
        model=run.model.state_dict(), optimizers=states)
    write_atomically(out / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    write_table(out / "log.csv", LOG_COLUMNS, run.log)
    write_table(out / "norms.csv", NORM_COLUMNS, run.norms)


def checkpoint_file(run):
    """The checkpoint of a run: `run` is a folder, or a .pt file in it."""
    path = Path(run).expanduser()
    return path if path.is_file() else path / "checkpoint.pt"


def load(run):
    """The model of a run, and all that its checkpoint holds. Raises OSError or BadInput."""
    file = checkpoint_file(run)
    # Errors of the disk happen here, and say so. After that, only the content can be wrong.
    content = io.BytesIO(file.read_bytes())
    try:
        # weights_only: a checkpoint from a stranger cannot run code.
        saved = torch.load(content, map_location="cpu", weights_only=True)
        model = GPT(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
        return model, saved
    except MemoryError:
        raise
    except Exception as error:
        # The bytes of a damaged file can cause an error of any class.
        raise BadInput(f"{file} is damaged, or of another version: {error}") from error


def restore(run):
    """Bring everything back to where config.resume was saved. Raises OSError or BadInput."""
    _, saved = load(run.config.resume)
    if saved["windows"] != run.corpus.counts:
        raise BadInput("the run was trained on another text (other files, or another Python)")
    for name in FIXED:
        if saved["config"][name] != getattr(run.config, name):
            raise BadInput(f"the run has {name} {saved['config'][name]}, and that cannot change")
    if saved["step"] >= run.config.steps:
        raise BadInput(f"the run is complete at step {saved['step']}: ask for more --steps")
    run.model.load_state_dict(saved["model"])
    for optimizer, state in zip(run.optimizers, saved["optimizers"]):
        # The lr and the weight decay are those asked for now.
        state["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state)
    run.generator.set_state(saved["batches"])
    run.step = saved["step"]
    run.log = saved["log"]
    run.norms = saved["norms"]


# ---------------------------------------------------------------- what a run shows
def say(text):
    """print, but a reader that has gone (`| head`, a closed terminal) does not end the run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


LINE = "-" * 60
VERDICT = "{}: hidden RMS(W) {:.3f}, law {:.3f}; lr * decay * {} steps = {:.1f}"
GROUP = "{kind:<11}{tensors:>8}{numbers:>12,}  {optimizer:<9}{lr:>9.2g}{weight_decay:>9.2g}  {clip}"


def introduce(run):
    """What a run prints before its first step: the text, and which parameter is trained how."""
    if run.config.resume:
        say(f"going on from {checkpoint_file(run.config.resume)}, after step {run.step}")
    say(f"text: {run.config.data}, tokens: {run.config.tokenizer}")
    for part, arrays in run.corpus.parts.items():
        say(f"{part}: {sum(map(len, arrays)):,} tokens, shards: {len(arrays)}")
    say("parameters  tensors     numbers  optimizer       lr    decay  in clip norm")
    for group in run.groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        say(GROUP.format(tensors=len(sizes), numbers=sum(sizes), **group))


def curve(rows, key):
    """The steps and the numbers of all rows that have this key."""
    rows = [row for row in rows if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def norm_curves(result, key):
    """Steps, and "W" or "W_eff" [steps, matrices] of the hidden matrices that have norm_scale."""
    part = ".mlp." if result["config"]["placement"] == "mlp" else "blocks."
    rows = [row for row in result["norms"] if part in row["name"]]
    steps, norms = curve(rows, key)
    steps = sorted(set(steps))
    return steps, np.reshape(norms, (len(steps), -1))


def law_of(config):
    """RMS(W) that lr and weight decay dictate to these matrices. No decay lets W grow for ever."""
    if config.weight_decay == 0:
        return math.inf
    return config.norm_scale * law_rms(config.lr, config.weight_decay)


def verdict(result):
    """Are the hidden matrices on the law? Compared before the lr falls: norms fall with it."""
    config = Config(**result["config"])
    steps, W = norm_curves(result, "W")
    plateau = round(config.steps * (1 - config.decay_fraction))
    measured = np.median(W[np.searchsorted(steps, plateau, "right") - 1])
    law = law_of(config)
    # Decay and noise need about 1 / (lr * decay) steps to balance.
    strength = config.lr * config.weight_decay * plateau
    is_there = strength > 1 and 2 / 3 < measured / law < 3 / 2
    answer = "there" if is_there else "not there yet"
    return VERDICT.format(answer, measured, law, plateau, strength)


def draw(result, file):
    """run.png. Left: the losses. Right: the norms of the hidden matrices, and the law."""
    config = Config(**result["config"])
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key in ("loss", "val_loss"):
        left.plot(*curve(result["log"], key), label=key)
    left.set(xlabel="step", ylabel="nats per token", title=config.multipliers)
    for key in ("W_eff", "W"):
        steps, norms = norm_curves(result, key)
        right.plot(steps, np.median(norms, 1), label=f"{key} of hidden matrices: median, range")
        right.fill_between(steps, norms.min(1), norms.max(1), alpha=0.2)
    right.axhline(law_of(config), color="black", ls="--", label="law: S sqrt(lr / 2 decay)")
    right.set(xlabel="step", ylabel="RMS", yscale="log")
    right.set_title(verdict(result), fontsize=10)
    left.legend()
    right.legend()
    figure.savefig(file, dpi=120, format="png")


def sample(run, config):
    """Text by the model of a run, after config.prompt. Raises OSError or BadInput."""
    model, saved = load(run)
    tokenizer = get_tokenizer(saved["config"]["tokenizer"])
    device = pick_device(config.device)
    generator = torch.Generator(device).manual_seed(config.seed)
    prompt = encode([config.prompt], tokenizer).tolist()
    start = torch.tensor([prompt], device=device)
    tokens = merge(model).to(device).generate(start, 300, generator=generator)[0, 1:]
    # GPT-2's vocabulary is rounded up: tokens from n_vocab on stand for nothing.
    return tokenizer.decode(tokens[tokens < tokenizer.n_vocab].tolist())


def show(result, config):
    """What a run prints at its end, and run.png."""
    out = config.out
    if result["step"] < config.steps:
        say(f"stopped after step {result['step']} of {config.steps} and saved; to go on: "
            f"python train.py --resume {out}")
        return
    try:
        text = sample(out, config)
    except BadInput as error:
        # Token shards need no vocabulary, a sample does.
        text = f"(no sample: {error})"
    say(f"a sample:\n{LINE}\n{text}\n{LINE}")
    write_atomically(Path(out, "run.png"), lambda file: draw(result, file))
    say(f"saved in {out}: run.png, checkpoint.pt, log.csv, norms.csv")
    say(verdict(result))
    if config.multipliers != "none":
        _, W = norm_curves(result, "W")
        _, W_eff = norm_curves(result, "W_eff")
        scales = (W_eff / W)[-1]
        say(f"learned RMS(W_eff) / RMS(W): {min(scales):.2f} to {max(scales):.2f}")
    _, losses = curve(result["log"], "val_loss")
    if min(losses) < losses[-1]:
        say(f"the val loss was lower once: {min(losses):.4f}")
    say(f"final: val loss {losses[-1]:.4f} nats per token")


# ---------------------------------------------------------------- text to tokens to batches
# A text becomes an array of tokens, in memory. A token is a byte, or a piece of GPT-2's vocabulary.
# A .bin file, a "shard", has tokens already: a header of 1024 bytes and one uint16 for each token,
# as in llm.c. A batch is windows of block_size + 1 tokens at random places of these arrays.
# GPT-2's 50257 tokens, rounded up to a multiple of 64, suit a GPU.
VOCAB_SIZES = {"bytes": 257, "gpt2": 50304}
SHARD_HEADER = 1024
SHARD_MAGIC = [20240520, 1]
VAL_WORD = "(?<![a-z])(val|valid|validation|dev|test)(?![a-z])"
# Names that are left out; in the standard library also tables, tests, and what some Pythons lack
HIDDEN = r"\..*"
NOT_STDLIB = HIDDEN + (r"|(site|dist)-packages|tests?|idle_test|encodings|lib2to3|idlelib|"
                       r"turtledemo|pydoc_data|ensurepip|config-.*|_sysconfigdata.*")


def get_tokenizer(name):
    """bytes: tokens 0 to 255 are the bytes, 256 is <|endoftext|>. gpt2: downloaded once."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,128}", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise BadInput("GPT-2's vocabulary, which turns text into tokens and back, could not be "
                       "downloaded") from error


def text_files(folder, left_out, ending=""):
    """The files below a folder, without those of runs and without names like left_out."""
    paths = []
    names = sorted(os.listdir(folder))
    if "checkpoint.pt" in names:
        return paths
    for name in names:
        path = folder / name
        if re.fullmatch(left_out, name):
            continue
        # A link to a folder could lead round in a circle.
        if path.is_dir() and not path.is_symlink():
            paths += text_files(path, left_out, ending)
        elif name.endswith(ending):
            paths.append(path)
    return paths


def read_text(path):
    """The text of a file. None if it is no UTF-8 text, or no ordinary file: a pipe would hang."""
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8-sig") as file:
            # The beginning tells a film from a text, before all of it is read.
            text = file.read(4096)
            if "\0" not in text:
                text += file.read()
            return None if "\0" in text else text
    except UnicodeDecodeError:
        return None


def encode(texts, tokenizer):
    """The tokens of some documents, uint16. A token <|endoftext|> stands before each of them."""
    pieces = []
    for text in texts:
        pieces.append([tokenizer.eot_token])
        pieces.append(tokenizer.encode_to_numpy(text, disallowed_special=()))
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe")


def read_documents(data, tokenizer):
    """{"train": [tokens], "val": [tokens]} of the standard library, of a file, or of a folder."""
    root = Path(data)
    if data == "stdlib":
        root = Path(os.__file__).parent
        paths = text_files(root, NOT_STDLIB, ".py")
    else:
        paths = [root] if root.is_file() else text_files(root, HIDDEN)
    texts, others = {}, []
    for path in paths:
        name = path.relative_to(root).as_posix()
        text = read_text(path)
        if text is None:
            others.append(name)
        else:
            texts[name] = text
    if others:
        say(f"left out, not UTF-8 text: {len(others)} files, {', '.join(others[:5])}")
    if not any(map(str.strip, texts.values())):
        raise BadInput(f"{data} holds no UTF-8 text (token shards, .bin files, are not looked for "
                       "in its subfolders)")

    train, val = [], []
    for name, text in texts.items():
        if len(texts) < 100:
            # Of few files the last tenth of each is for validation.
            cut = len(text) * 9 // 10
            train.append(text[:cut])
            val.append(text[cut:])
        elif zlib.crc32(os.fsencode(name)) % 10 == 0:
            # Of many, a tenth of the files. The name decides: a new file moves no other one.
            val.append(text)
        else:
            train.append(text)
    return {"train": [encode(train, tokenizer)], "val": [encode(val, tokenizer)]}


def read_shards(paths):
    """The tokens of shards, memory-mapped: only the parts in use are read from the disk."""
    parts = {"train": [], "val": []}
    for path in paths:
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
        if header[:2] != SHARD_MAGIC:
            raise BadInput(f"{path} is not a token shard: llm.c's begin with {SHARD_MAGIC} "
                           "(nanoGPT's .bin files have no such header)")
        if path.stat().st_size != SHARD_HEADER + 2 * header[2]:
            raise BadInput(f"{path} is cut short: its header promises {header[2]} tokens")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER)
        # A word of the name says what a shard is for. interval_1.bin is for training.
        is_val = re.search(VAL_WORD, path.stem.lower())
        parts["val" if is_val else "train"].append(tokens)
    return parts


class Corpus:
    """The tokens of a text, {"train": [array, ...], "val": [...]}, and batches of windows."""

    def __init__(self, data, block_size, tokenizer="bytes"):
        """Raises OSError or BadInput."""
        self.block_size = block_size
        paths = [Path(data)] if data.endswith(".bin") else sorted(Path(data).glob("*.bin"))
        if paths:
            self.tokenizer = "gpt2"
            self.parts = read_shards(paths)
        else:
            self.tokenizer = tokenizer
            self.parts = read_documents(data, get_tokenizer(tokenizer))
        # How many windows each part has. No window reaches from one array into the next.
        self.counts = {}
        for part, arrays in self.parts.items():
            if not arrays:
                raise BadInput(f"{data} has no shards for {part}: those for validation have the "
                               "word val in their names")
            if min(map(len, arrays)) <= block_size:
                raise BadInput(f"{data} is too short: its {part} part has fewer than the "
                               f"{block_size + 1} tokens of one window (block_size + 1)")
            self.counts[part] = sum(len(tokens) - block_size for tokens in arrays)

    def window(self, part, number):
        """The window with this number, from 0 on: block_size + 1 tokens."""
        for tokens in self.parts[part]:
            count = len(tokens) - self.block_size
            if number < count:
                return tokens[number:number + self.block_size + 1]
            number -= count

    def batch(self, part, numbers):
        """Inputs and targets [windows, block_size], int64: targets are one token later."""
        rows = np.stack([self.window(part, number) for number in numbers])
        tokens = torch.from_numpy(rows.astype(np.int64))
        if tokens.max() >= VOCAB_SIZES[self.tokenizer]:
            raise BadInput(f"a shard holds token {tokens.max()}, which is not one of GPT-2's")
        return tokens[:, :-1], tokens[:, 1:]

    def train_batch(self, size, generator):
        """`size` windows at random places; of several processes, each takes its share of them."""
        numbers = torch.randint(self.counts["train"], (size,), generator=generator).tolist()
        return self.batch("train", numbers[RANK::WORLD])

    def val_batches(self, batch_size, count):
        """Evenly spaced windows, the same at every call: `count`, or as many as do not overlap."""
        last = self.counts["val"] - 1
        count = min(count, last // self.block_size + 1)
        stride = last // max(1, count - 1)
        numbers = [i * stride for i in range(count)]
        for i in range(0, count, batch_size)[RANK::WORLD]:
            yield self.batch("val", numbers[i:i + batch_size])


# ---------------------------------------------------------------- the command line
def parse(arguments=None):
    """The settings: flags override the preset, or the settings of the run that is resumed."""
    given = tyro.cli(Config, args=arguments, description=__doc__)
    preset = given.preset
    if given.resume and preset != "auto":
        raise BadInput("--preset does nothing beside --resume: a run has its settings already")
    if given.resume:
        known = load(given.resume)[1]["config"] | {"out": ""}
    else:
        if preset == "auto":
            preset = "gpu" if pick_device(given.device).type == "cuda" else "tiny"
        known = PRESETS[preset] | {"preset": preset}
    config = tyro.cli(Config, args=arguments, default=Config(**known))
    # The full path, so that --resume finds the text from another folder.
    if config.data != "stdlib":
        config.data = str(Path(config.data).expanduser().resolve())
    config.check()
    return config


def open_folder(config):
    """The folder of the run: --out, the resumed one, or the first free name in runs/."""
    if config.out:
        folder = Path(config.out).expanduser()
    elif config.resume:
        return checkpoint_file(config.resume).parent
    else:
        name = "{c.multipliers}-{c.optimizer}-s{c.seed}".format(c=config)
        folder = RUNS / name
        number = 1
        while folder.exists():
            number += 1
            folder = RUNS / f"{name}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: name another --out, or go on with --resume")
    return folder


def stop_at_signals():
    """An event that is set by Ctrl-C, or by a cluster that ends the job. Clusters send several
    signals in a row. So only a second Ctrl-C, later than a second after the first, ends at once."""
    stop = Event()
    asked_at = []

    def ask_to_stop(number, frame):
        now = time.monotonic()
        if not stop.is_set():
            asked_at.append(now)
            stop.set()
            if RANK == 0:
                # print() must not be called here: the signal may have interrupted a print().
                with suppress(OSError):
                    os.write(2, b"\nsaving after this step; a second Ctrl-C ends now, unsaved\n")
        elif number == signal.SIGINT and now > asked_at[0] + 1:
            sys.exit(130)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"):
        # Windows lacks some of them. `nohup` ignores SIGHUP, and that stays so.
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ask_to_stop)
    return stop


def train_in_folder(config):
    """Train, save and show. Of several processes, the one with rank 0 alone saves and shows."""
    stop = stop_at_signals()
    if RANK > 0:
        train(replace(config, out=""), stop, quiet=True)
        return
    folder = open_folder(config)
    config.out = str(folder)
    lock = folder / ".lock"
    try:
        # One process at a time may write into the folder.
        with filelock.FileLock(lock, timeout=0):
            try:
                show(train(config, stop), config)
            finally:
                # Windows does not remove a file that is open.
                with suppress(OSError):
                    lock.unlink()
    except filelock.Timeout:
        raise BadInput(f"another process is training in {folder}") from None
    finally:
        # A run that saved nothing leaves no folder.
        with suppress(OSError):
            folder.rmdir()


def main(arguments=None):
    """Train, or sample. An error that the user can mend is one sentence, and the exit code is 2."""
    try:
        config = parse(arguments)
        if config.sample:
            say(sample(config.sample, config))
        elif WORLD > 1:
            torch.distributed.init_process_group()
            train_in_folder(config)
            torch.distributed.destroy_process_group()
        else:
            train_in_folder(config)
        return 0
    except (BadInput, OSError, MemoryError, RuntimeError) as error:
        sentence = " ".join(str(error).splitlines()[:2])
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # PyTorch has no class of its own for a CPU without memory.
        if no_memory or "can't allocate memory" in sentence:
            sentence = (f"out of memory ({sentence}); half the --batch-size and twice the "
                        "--accumulate need less")
        elif isinstance(error, RuntimeError):
            # A fault of the program
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # A stream that is closed at the start is None.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    # For terminals without Unicode.
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
