"""A small GPT whose matrices carry learnable multipliers.

The file builds a GPT from the bottom up: RMSNorm, rotary positions, causal attention, SwiGLU,
block, GPT. There are no biases, no dropout and no tied weights: with multipliers="none" this is a
Llama-type model, and `multipliers.merge` turns every other trained model into one. [LRM] marks the
places of multipliers: the matrices of a block (function `linear`), the embedding, RMSNorm's gain.

    B, T    sequences in a batch, tokens in a sequence
    C       n_embd, the width of the residual stream (d in the paper)
    H, D    n_head, the number of attention heads, and C / H, their width
    V       vocab_size, the number of different tokens
    gain    the column multiplier c of the matrices that read an RMSNorm (paper, section 2)
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipliers import attach_multipliers, raw_weight


class BadInput(ValueError):
    """A setting that the user can mend. train.py shows its sentence instead of a traceback."""


@dataclass
class GPTConfig:
    """The shape of a GPT."""
    vocab_size: int = 257          # different tokens: the 256 bytes, and one that begins a document
    block_size: int = 64           # longest context, in tokens
    n_layer: int = 2               # blocks
    n_head: int = 2                # attention heads in a block
    n_embd: int = 64               # width of the residual stream
    # What a matrix carries, and which matrices carry it (see `placement_of`)
    multipliers: Literal["none", "scalar", "vector", "both"] = "scalar"
    placement: Literal["all", "hidden", "symmetry_free", "mlp"] = "all"
    # The gain of the RMSNorm before the head, and those in the blocks (see `RMSNorm`)
    final_gain: Literal["vector", "scalar", "frozen"] = "vector"
    block_gains: Literal["vector", "frozen"] = "vector"

    def check(self) -> None:
        """Raises BadInput for a shape that no GPT can have."""
        if min(self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise BadInput("vocab_size, block_size, n_layer, n_head and n_embd are at least 1")
        if self.n_embd % (2 * self.n_head):
            raise BadInput(f"n_embd {self.n_embd} must be divisible by 2 * n_head = "
                           f"{2 * self.n_head}: rotary positions turn pairs of a head's entries")


# ---------------------------------------------------------------- which matrix gets which
# Some multipliers are redundant: the model depends only on the product of two of them, so one can
# grow while the other shrinks. The pairs are: row of q and row of k (for each rotary pair), row of
# up and column of down, row of v and column of out, an RMSNorm's gain and the columns of the
# matrices that read its output. This placement keeps one of each pair (paper, Appendix C). Two
# redundancies stay: a number can move from the row to the column of one matrix, and RMSNorm ignores
# the scale of the whole residual stream. The paper found a lower loss with all multipliers; there a
# weight decay of 0.002 limits the drift.
SYMMETRY_FREE = {
    "q": ("row",), "k": (), "v": (), "out": ("row", "column"),
    "gate": ("row",), "up": (), "down": ("row", "column"), "embedding": ("row", "column")}


def placement_of(matrix: str, multipliers: str, placement: str) -> dict[str, bool]:  # exercise 4
    """The keyword arguments scalar, row, column for a matrix (a key of SYMMETRY_FREE, or "head").

    multipliers: "none", "scalar", "vector" or "both". placement: "all" matrices but the head (as in
    the paper), the "hidden" ones (inside the blocks), "symmetry_free" (above), or those of the
    "mlp" (the paper's Appendix B). ValueError for another word.
    """
    if multipliers not in ("none", "scalar", "vector", "both"):
        raise ValueError(f"multipliers is none, scalar, vector or both, not {multipliers!r}")
    if placement not in ("all", "hidden", "symmetry_free", "mlp"):
        raise ValueError(f"placement is all, hidden, symmetry_free or mlp, not {placement!r}")
    # The head never has any. The gain of the final RMSNorm is its column multiplier already. A row
    # multiplier would let the model fit the frequency of each token directly, before it learns
    # features; the paper found a higher loss with it (section 4.4).
    if matrix == "head":
        vector = ()
    elif placement == "all":
        vector = ("row", "column")
    elif placement == "hidden":
        vector = () if matrix == "embedding" else ("row", "column")
    elif placement == "symmetry_free":
        vector = SYMMETRY_FREE[matrix]
    else:
        vector = ("row", "column") if matrix in ("gate", "up", "down") else ()
    # One scalar stands for the row and column multipliers of a matrix, or beside them.
    scalar = ("scalar",) if vector else ()
    kinds = {"none": (), "scalar": scalar, "vector": vector, "both": scalar + vector}
    chosen = kinds[multipliers]
    return {name: name in chosen for name in ("scalar", "row", "column")}


def linear(name: str, n_in: int, n_out: int, config: GPTConfig) -> nn.Linear:
    """[LRM] A layer with W[n_out, n_in], and the multipliers that this matrix gets."""
    layer = nn.Linear(n_in, n_out, bias=False)
    attach_multipliers(layer, **placement_of(name, config.multipliers, config.placement))
    return layer


# ---------------------------------------------------------------- the parts of a block
class RMSNorm(nn.Module):
    """x [..., C] -> x / RMS(x) * gain, with the RMS over the last dimension."""
    # [LRM] The gain is a vector [C] as in any Llama, one number [] ("scalar"), or no parameter
    # ("frozen", at 1). The last two serve the paper's experiments (section 3, Appendix B).

    def __init__(self, dim: int, gain: str = "vector"):
        super().__init__()
        self.dim = dim
        shape = {"vector": (dim,), "scalar": (), "frozen": None}[gain]
        self.gain = None if shape is None else nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (self.dim,), eps=1e-6)
        return y if self.gain is None else y * self.gain


def rotary_table(block_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of the angles t * 10000^(-2i/D); columns i and i + D/2 are equal."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)           # (D/2,)
    angle = torch.outer(torch.arange(block_size), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # exercise 5
    """Turn the pairs (x_i, x_{i + D/2}) of x [B, H, T, D] by the angles of their positions."""
    # The product of a turned query and a turned key depends on their distance alone.
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """x [B, T, C] -> [B, T, C]: softmax(q k^T / sqrt(D)) v in each of H heads, where q and k are
    rotated and the causal mask leaves out later tokens; then the matrix `out`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        # q, k and v are separate, so that each has multipliers and a Muon step of its own.
        self.q = linear("q", config.n_embd, config.n_embd, config)
        self.k = linear("k", config.n_embd, config.n_embd, config)
        self.v = linear("v", config.n_embd, config.n_embd, config)
        self.out = linear("out", config.n_embd, config.n_embd, config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # exercise 6
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, -1).transpose(1, 2)     # (B, H, T, D)
        k = self.k(x).view(B, T, self.n_head, -1).transpose(1, 2)
        v = self.v(x).view(B, T, self.n_head, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU, x [B, T, C] -> [B, T, C]: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # About 8/3 C hidden units: as many weights as in GPT-2's MLP. GPUs favour multiples of 32.
        hidden = 32 * math.ceil(8 * config.n_embd / 3 / 32)
        self.gate = linear("gate", config.n_embd, hidden, config)
        self.up = linear("up", config.n_embd, hidden, config)
        self.down = linear("down", hidden, config.n_embd, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP. Each reads the normed residual stream x [B, T, C] and adds to x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.block_gains)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.block_gains)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


# ---------------------------------------------------------------- the model
class GPT(nn.Module):
    """tokens [B, T] -> logits [B, T, V]. `seed` alone fixes the weights; multipliers start at 1."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        config.check()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        chosen = placement_of("embedding", config.multipliers, config.placement)
        attach_multipliers(self.embedding, **chosen)                  # [LRM]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # [LRM] The final gain is the column multiplier of the head.
        self.final_norm = RMSNorm(config.n_embd, config.final_gain)
        self.head = linear("head", config.n_embd, config.vocab_size, config)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal weights; a matrix W[out, in] with std in^-1/2 keeps the RMS of its input."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            W = raw_weight(module)
            if name == "embedding":
                std = 1.0
            elif name == "head":
                # A small head makes the first prediction nearly uniform.
                std = 0.02
            elif name.endswith(("attn.out", "mlp.down")):
                # 2 n_layer matrices add to the residual stream, so each of them starts smaller.
                std = W.shape[1] ** -0.5 / math.sqrt(2 * self.config.n_layer)
            else:
                std = W.shape[1] ** -0.5
            W.normal_(0, std, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens, targets [B, T] -> (logits [B, T, V], mean cross-entropy in nats, or None)."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}")
        x = self.embedding(tokens)                                    # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.final_norm(x))                        # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        # A training loop differentiates the loss. `detach` tells torch.compile that no gradient
        # flows through these logits, so the compiled code allocates no gradient of their size.
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, tokens: Tensor, new_tokens: int, *, temperature: float = 0.8,
                 top_k: int | None = 50, generator: torch.Generator | None = None) -> Tensor:
        """tokens [B, T] -> [B, T + new_tokens]. Temperature 0 always takes the likeliest token."""
        for _ in range(new_tokens):
            logits, _ = self(tokens[:, -self.config.block_size:])
            logits = logits[:, -1].float()                            # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                # Only the top_k likeliest tokens keep a probability above 0.
                if top_k is not None and top_k < logits.shape[-1]:
                    smallest = logits.topk(top_k).values[:, -1:]
                    logits[logits < smallest] = -math.inf
                probabilities = (logits / temperature).softmax(-1)
                new = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens
