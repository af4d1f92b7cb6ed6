"""A small GPT whose matrices carry learnable multipliers.

A decoder-only transformer, bottom up: RMSNorm, rotary positions, causal attention, SwiGLU, block,
GPT. There are no biases, no dropout and no tied weights, so with multipliers="none" it is a
Llama-type model, and so is every trained model after `multipliers.merge`.

Multipliers enter at three places, each marked with [LRM]: the seven matrices of a block (through
`matrix` below), the embedding, and the RMSNorm gain, a column multiplier that was always there.

Shapes: B batch, T tokens, C = n_embd, H heads, D = C / H, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipliers import MultiplierEmbedding, MultiplierLinear, placement_of


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128          # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    multipliers: str = "vector"    # none | scalar | vector
    placement: str = "all"         # all | symmetry_free | mlp (multipliers.placement_of)
    final_gain: str = "vector"     # vector | scalar | frozen: the head's multiplier (paper, 3)
    block_gains: str = "vector"    # vector | frozen: the RMSNorm gains inside the blocks (App. B)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, "
                                 f"not {getattr(self, name)!r}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be divisible by n_head {self.n_head} into "
                             "heads of even width (rotary positions turn pairs)")


CHOICES = {"multipliers": ("none", "scalar", "vector"),
           "placement": ("all", "symmetry_free", "mlp"),
           "final_gain": ("vector", "scalar", "frozen"),
           "block_gains": ("vector", "frozen")}


def matrix(name: str, n_in: int, n_out: int, config: GPTConfig) -> MultiplierLinear:
    """[LRM] One matrix W[n_out, n_in] with the multipliers that its name gets in this placement."""
    return MultiplierLinear(n_in, n_out,
                            **placement_of(name, config.multipliers, config.placement))


class RMSNorm(nn.Module):
    """x / RMS(x) * gain over the last dimension.

    [LRM] The gain is a column multiplier of every matrix that reads the output: a vector [C] as in
    any Llama, or one number [], or frozen at 1, for the paper's experiments."""

    def __init__(self, dim: int, gain: str = "vector"):
        super().__init__()
        self.dim = dim
        shape = {"vector": (dim,), "scalar": ()}.get(gain)
        self.gain = None if shape is None else nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (self.dim,), eps=1e-6)
        return y if self.gain is None else y * self.gain


def rotary_table(block_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of position t times frequency 10000^(-2i/D), halves repeated."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)           # (D/2,)
    angle = torch.outer(torch.arange(block_size), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of x [B, H, T, D] by the angles of their positions, so that
    the product of a query and a key depends on their distance alone."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        # q, k and v are three matrices, not one: each has its own scale, and Muon
        # orthogonalises each by itself
        self.q = matrix("q", config.n_embd, config.n_embd, config)
        self.k = matrix("k", config.n_embd, config.n_embd, config)
        self.v = matrix("v", config.n_embd, config.n_embd, config)
        self.out = matrix("out", config.n_embd, config.n_embd, config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1).transpose(1, 2)    # (B, H, T, D)
                   for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)    # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with 8/3 C hidden units: about as many weights as
    the two matrices C x 4C of GPT-2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = 32 * math.ceil(8 * config.n_embd / 3 / 32)            # 32: sizes that GPUs like
        self.gate = matrix("gate", config.n_embd, hidden, config)
        self.up = matrix("up", config.n_embd, hidden, config)
        self.down = matrix("down", hidden, config.n_embd, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
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
    """tokens [B, T] -> logits [B, T, V]. `seed` draws the weights: the same ones whatever the
    multipliers, which all start at 1, so that two models differ in nothing but the multipliers."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = MultiplierEmbedding(
            config.vocab_size, config.n_embd,
            **placement_of("embedding", config.multipliers, config.placement))      # [LRM]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.n_embd, config.final_gain)
        # a plain matrix: its only multiplier is the final gain (see multipliers.SYMMETRY_FREE)
        self.head = matrix("head", config.n_embd, config.vocab_size, config)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal weights that keep an activation's RMS: std 1 for the embedding, fan-in^-1/2 for a
        matrix, less where it adds to the residual stream (2 n_layer do); and a small head, so that
        the first prediction is nearly uniform."""
        for name, p in self.named_parameters():
            if not name.endswith("weight"):
                continue                                               # gains and multipliers: 1
            std = p.shape[1] ** -0.5
            if name.startswith("embedding"):
                std = 1.0
            elif name.startswith("head"):
                std = 0.02
            elif name.endswith(("attn.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            p.normal_(0, std, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens, targets [B, T] -> (logits [B, T, V], mean cross-entropy in nats, or None)."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}")
        x = self.embedding(tokens)                                     # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.final_norm(x))                         # (B, T, V)
        if targets is None:
            return logits, None
        # The loss is what one differentiates: these logits are for looking at, and detached, or a
        # compiled backward pass would read a gradient of zeros for them, as large as they are
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits.detach(), loss

    @torch.no_grad()
    def generate(self, tokens: Tensor, new_tokens: int, *, temperature: float = 0.8,
                 top_k: int | None = 50, generator: torch.Generator | None = None) -> Tensor:
        """tokens [B, T] -> [B, T + new_tokens], one drawn token at a time; temperature 0 takes the
        likeliest. Only the last block_size tokens are seen."""
        for _ in range(new_tokens):
            logits = self(tokens[:, -self.config.block_size:])[0][:, -1].float()      # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None and top_k < logits.shape[-1]:
                    logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
                probabilities = (logits / temperature).softmax(-1)
                new = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matrix entry (2 forward, 4 backward; the embedding is a
        look-up), and 12 T C per layer for the two products of attention (PaLM, Appendix B; the
        causal half is counted too, as is the custom)."""
        c = self.config
        entries = sum(p.numel() for name, p in self.named_parameters()
                      if name.endswith("weight") and not name.startswith("embedding"))
        return 6 * entries + 12 * c.n_layer * c.block_size * c.n_embd
