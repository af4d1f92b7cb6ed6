"""A small GPT whose matrices carry learnable multipliers.

The file builds a GPT from the bottom up: RMSNorm, rotary positions, causal attention, SwiGLU,
block, GPT. There are no biases, no dropout and no tied weights: with multipliers="none" this is a
Llama-type model, and `multipliers.merge` turns every other trained model into one. [LRM] marks the
places of multipliers: the matrices of a block (function `matrix`), the embedding, RMSNorm's gain.

    B, T    sequences in a batch, tokens in a sequence
    C       n_embd, the width of the residual stream (d in the paper)
    H, D    n_head, the number of attention heads, and C / H, their width
    V       vocab_size, the number of different tokens
    gain    the column multiplier c of the matrices that read an RMSNorm (paper, section 2)
"""
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipliers import MULTIPLIERS, MultiplierEmbedding, MultiplierLinear, placement_of

@dataclass
class GPTConfig:
    """The shape of a GPT."""
    vocab_size: int = 4096         # different tokens; 257: single bytes and an end
    block_size: int = 128          # longest context, in tokens
    n_layer: int = 4               # blocks
    n_head: int = 4                # attention heads in a block
    n_embd: int = 128              # width of the residual stream
    multipliers: Literal["none", "scalar", "vector"] = "scalar"     # what a matrix carries
    placement: Literal["all", "symmetry_free", "mlp"] = "all"       # which matrices carry it
    final_gain: Literal["vector", "scalar", "frozen"] = "vector"    # RMSNorm gain before the head
    block_gains: Literal["vector", "frozen"] = "vector"             # RMSNorm gains in the blocks

    def check(self) -> None:
        """Raises ValueError with the name of a field that has a value without meaning."""
        # type(self) can be a class that inherits from GPTConfig and adds fields.
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be divisible by 2 * n_head = "
                             f"{2 * self.n_head}: rotary positions turn pairs of a head's entries")

def matrix(name: str, n_in: int, n_out: int, config: GPTConfig) -> MultiplierLinear:
    """[LRM] One matrix W[n_out, n_in] with the multipliers that its name gets in this placement."""
    return MultiplierLinear(n_in, n_out, bias=False,
                            **placement_of(name, config.multipliers, config.placement))

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

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # exercise 9
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
        self.q = matrix("q", config.n_embd, config.n_embd, config)
        self.k = matrix("k", config.n_embd, config.n_embd, config)
        self.v = matrix("v", config.n_embd, config.n_embd, config)
        self.out = matrix("out", config.n_embd, config.n_embd, config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # exercise 10
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1).transpose(1, 2)   # (B, H, T, D)
                   for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """SwiGLU, x [B, T, C] -> [B, T, C]: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # About 8/3 C hidden units: as many weights as in GPT-2's MLP. GPUs favour multiples of 32.
        hidden = 32 * math.ceil(8 * config.n_embd / 3 / 32)
        self.gate = matrix("gate", config.n_embd, hidden, config)
        self.up = matrix("up", config.n_embd, hidden, config)
        self.down = matrix("down", hidden, config.n_embd, config)

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

class GPT(nn.Module):
    """tokens [B, T] -> logits [B, T, V]. `seed` alone fixes the weights; multipliers start at 1."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        config.check()
        self.config = config
        self.embedding = MultiplierEmbedding(                         # [LRM]
            config.vocab_size, config.n_embd,
            **placement_of("embedding", config.multipliers, config.placement))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.n_embd, config.final_gain)
        # placement_of gives the head no multiplier; the final gain is its column multiplier.
        self.head = matrix("head", config.n_embd, config.vocab_size, config)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal weights; a matrix W[out, in] with std in^-1/2 keeps the RMS of its input."""
        for name, p in self.named_parameters():
            if not name.endswith("weight"):
                continue                                              # gains, multipliers: 1
            std = p.shape[1] ** -0.5
            if name.startswith("embedding"):
                std = 1.0
            # A small head makes the first prediction nearly uniform.
            elif name.startswith("head"):
                std = 0.02
            # 2 n_layer matrices add to the residual stream, so each of them starts smaller.
            elif name.endswith(("attn.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            p.normal_(0, std, generator=generator)

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
            logits = self(tokens[:, -self.config.block_size:])[0][:, -1].float()      # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                # Only the top_k likeliest tokens keep a probability above 0.
                if top_k is not None and top_k < logits.shape[-1]:
                    logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
                probabilities = (logits / temperature).softmax(-1)
                new = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    @torch.no_grad()
    def norms(self, step: int) -> list[dict]:
        """A row for each matrix: RMS of W, W_eff and its multipliers. A row for each RMSNorm."""
        rows = []
        for name, module in self.named_modules():
            tensors = {key: getattr(module, key, None) for key in (*MULTIPLIERS, "gain")}
            if hasattr(module, "effective_weight"):
                tensors = {"W": module.weight, "W_eff": module.effective_weight()} | tensors
            found = {key: x.float().square().mean().sqrt().item()
                     for key, x in tensors.items() if x is not None}
            if found:
                rows.append({"step": step, "name": name} | found)
        return rows
