"""Learnable multipliers: first the problem, then the cure (arXiv 2601.04890).

THE PROBLEM. Let eta be the learning rate, lambda the weight decay, and RMS(W) the root of the mean
of W_ij^2. Write an optimizer step with decoupled weight decay as

    W <- a W - eta u,    a = 1 - eta lambda,    u = the update, U = RMS(u).

If the gradient is mostly noise, u has no lasting direction: E[u] = 0, and momentum makes two
updates k steps apart correlated as beta^k. W is then a sum of old updates, W = -eta sum_k a^k
u_{t-1-k}, so E[u W] = -eta beta U^2 / (1 - a beta) for each entry, and one step takes RMS(W)^2 to

    a^2 RMS(W)^2 - 2 a eta E[u W] + eta^2 U^2
        = a^2 RMS(W)^2 + eta^2 U^2 (1 + a beta) / (1 - a beta).                               (*)

Noise adds a constant, decay removes a fraction: they balance at the fixed point of (*). On pure
noise Adam's u is a running mean of numbers of variance 1, so that U^2 = (1 - beta) / (1 + beta):
this cancels momentum's factor, and for small eta lambda what is left is

    RMS(W) = sqrt(eta / (2 lambda))                       (paper, eq. 1, up to the constant)

whatever the data, the layer and its initial scale, as long as noise outweighs signal. The paper
calls this a harmful artifact: the network cannot choose the scale of its own matrices.

THE CURE. Give the scale its own parameters, which weight decay hardly touches (paper, eq. 2, 3):

    W_eff = s W    (scalar)    or    W_eff = diag(r) W diag(c)    (vector; r per row, c per column).

W [out, in] stays at its equilibrium; s, r [out], c [in] are free. Their gradients are sums over
many entries of G = dL/dW_eff [out, in] (paper, eq. 4):

    dW_ij = r_i c_j G_ij    dr_i = sum_j W_ij c_j G_ij    dc_j = sum_i r_i W_ij G_ij    ds = <W, G>

If G has a component along W, a row's signal-to-noise ratio is sqrt(in) times that of one entry, and
a scalar's sqrt(in out) times. (A multiplier without any signal would still walk at random in Adam.)

After training W_eff is an ordinary matrix: `merge` writes it down, and inference costs nothing.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernel

# ---------------------------------------------------------------- the law


def equilibrium_rms(lr: float, weight_decay: float, *, beta: float = 0.9,
                    update_rms: float | None = None) -> float:
    """RMS(W) at which weight decay balances pure gradient noise: the fixed point of (*), exactly.

    beta is the momentum and update_rms the RMS of one entry of u (before lr):
      AdamW              beta = beta1     None: sqrt((1 - beta) / (1 + beta)); with beta2 = 0.95 it
                         and RMS(W) are 1 to 1.5 % less
      SGD                beta = 0         sigma, the RMS of the gradient noise
      SGD with momentum  beta             sigma / sqrt(1 - beta^2), with decoupled decay
      Muon               beta = momentum  0.17 as measured (Newton–Schulz stops short of 0.2). Its
                         updates decorrelate faster than beta^k, so that the truth is up to a
                         quarter lower: 0.8 to 0.95 of small_step_rms, depending on the shape
    Source: (*), after Kosson et al. 2305.17212 and Wen et al. 2606.16899.
    """
    if update_rms is None:
        update_rms = math.sqrt((1 - beta) / (1 + beta))
    a = 1 - lr * weight_decay
    return lr * update_rms * math.sqrt((1 + a * beta) / ((1 - a * a) * (1 - a * beta)))


def small_step_rms(lr: float, weight_decay: float) -> float:
    """Its limit for AdamW as eta lambda -> 0: sqrt(eta / 2 lambda). The paper's eq. 1 is the same
    without the 2; the constant is Kosson's. SGD with sigma = 1 has the same limit."""
    return math.sqrt(lr / (2 * weight_decay))


def relaxation_steps(lr: float, weight_decay: float) -> float:
    """Steps in which RMS(W)^2 comes e times closer to equilibrium: a^(2t) ~ exp(-t / this)."""
    return 1 / (2 * lr * weight_decay)


def rotation_per_step(lr: float, weight_decay: float, *, beta: float = 0.9) -> float:
    """Sine of the angle by which W turns per step at equilibrium: lr U / RMS(W), less momentum's
    part along W. It is the effective learning rate: for small steps the angle itself (radians), and
    sqrt(2 eta lambda (1 - beta) / (1 + beta)). Muon turns 15 to 30 % faster, for the reason above.
    Source: Kosson et al. 2305.17212; Wen et al. 2606.16899 (exact in eta lambda)."""
    a = 1 - lr * weight_decay
    return math.sqrt((1 - a * a) * (1 - beta * beta)) / (1 + a * beta)


def width_factors(recipe: str, kind: str, width: int, base_width: int) -> tuple[float, ...]:
    """(lr factor, weight-decay factor, forward scale) that carry settings from base_width to width.

    muP (maximal update parametrization) is the theory of such rules. The output of y = s W x, x in
    R^d, has RMS |y| ~ s d RMS(W) if W and x stay equally aligned at every width (without alignment,
    sqrt(d)), and RMS(W) ~ sqrt(eta / lambda): so
    s d sqrt(eta / lambda) and the relative update sqrt(eta lambda) must not depend on d. kind:
    embedding, hidden or head. Source: paper, Table 1.
    """
    m = width / base_width
    recipes = {"lr": (1 / m, 1.0, 1.0),            # most descriptions of muP: |y| grows as sqrt(d)
               "lr_wd": (1 / m, m, 1.0),           # independent weight decay: both stay constant
               "multiplier": (1.0, 1.0, 1 / m)}    # Falcon-H1, and what a learned scale can find
    if recipe not in recipes or kind not in ("embedding", "hidden", "head"):
        raise ValueError("recipe must be lr, lr_wd or multiplier and kind embedding, hidden or "
                         f"head, not {recipe!r} and {kind!r}")
    # An embedding is a look-up: its fan-in, the vocabulary, does not grow with the width
    return (1.0, 1.0, 1.0) if kind == "embedding" else recipes[recipe]


# ---------------------------------------------------------------- the layers

MULTIPLIERS = ("scalar", "row", "column")  # a parameter with one of these names is a multiplier


class _Multipliers(nn.Module):
    """What both layers share: weight [n, m], scalar [], row [n], column [m], all of them optional
    but the weight. Multipliers are 0-D or 1-D, which keeps them out of Muon's reach."""

    def __init__(self, rows: int, columns: int, scalar: bool, row: bool, column: bool,
                 scale: float):
        super().__init__()
        if scalar and (row or column):
            raise ValueError("scalar and row/column multipliers are alternatives (paper, eq. 2 "
                             "and 3): choose one")
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(rows, columns) * columns ** -0.5)
        self.scalar = nn.Parameter(torch.tensor(float(scale))) if scalar else None
        self.row = nn.Parameter(torch.ones(rows)) if row else None
        self.column = nn.Parameter(torch.ones(columns)) if column else None

    def factor(self) -> Tensor | float:
        """The one number in front of W: learned, or muP's fixed forward multiplier."""
        return self.scale if self.scalar is None else self.scalar

    def effective_weight(self) -> Tensor:
        """W_eff [n, m] = s W, or s diag(r) W diag(c) with s fixed (paper, eq. 2 and 3)."""
        W = self.weight
        if self.scalar is not None or self.scale != 1:       # a product with 1 has a price too
            W = self.factor() * W
        if self.row is not None:
            W = self.row[:, None] * W
        return W if self.column is None else W * self.column

    def extra_repr(self) -> str:
        learned = [name for name in MULTIPLIERS if getattr(self, name) is not None]
        return f"{tuple(self.weight.shape)}, learned={'+'.join(learned) or 'none'}"


class MultiplierLinear(_Multipliers):
    """y [..., out] = x [..., in] W_eff^T, without a bias.

    The weight is scaled, not the activations: W has in * out entries, while x and y have
    tokens * (in + out): 16 times as many in train.py's default run, 1000 times in a large one.
    scale: the fixed forward multiplier of muP, or where the learned scalar starts.
    After `use_kernel` the product and the cast to the matmul's dtype (bf16 under autocast) are one
    pass over W (kernel.py).
    Raises ValueError if both a scalar and row/column multipliers are asked for.
    """

    def __init__(self, in_features: int, out_features: int, *, scalar: bool = False,
                 row: bool = False, column: bool = False, scale: float = 1.0):
        super().__init__(out_features, in_features, scalar, row, column, scale)
        self.kernel = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.kernel:
            return F.linear(x, self.effective_weight())
        device, rows, columns = x.device.type, *self.weight.shape
        row = self.weight.new_ones(rows) if self.row is None else self.row
        column = self.weight.new_ones(columns) if self.column is None else self.column
        dtype = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device)
                 else self.weight.dtype)                   # what the matmul will want
        return F.linear(x, kernel.scale(self.weight, self.factor() * row, column, dtype))

    def merge(self) -> nn.Linear:
        """A plain layer with W_eff as its weight."""
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.effective_weight().detach().clone())
        return plain


class MultiplierEmbedding(_Multipliers):
    """x [...] (token ids) -> [..., dim] rows of W_eff; row = one number per token, column = one per
    dimension. Here the looked-up rows are scaled, since a batch touches few rows of the table."""

    def __init__(self, num_embeddings: int, dim: int, *, scalar: bool = False,
                 row: bool = False, column: bool = False, scale: float = 1.0):
        super().__init__(num_embeddings, dim, scalar, row, column, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        y = F.embedding(tokens, self.weight)
        if self.scalar is not None or self.scale != 1:
            y = self.factor() * y
        if self.row is not None:
            y = F.embedding(tokens, self.row[:, None]) * y   # [..., 1]: a look-up as well
        return y if self.column is None else y * self.column

    def merge(self) -> nn.Embedding:
        """A plain embedding with W_eff as its table."""
        return nn.Embedding.from_pretrained(self.effective_weight().detach().clone(), freeze=False)


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model with plain layers and the same function (up to rounding).

    RMSNorm gains stay where they are: a gain is already a column multiplier of the matrices that
    read it, and every Llama-type model has it. A GPT's config is copied as it is.
    """
    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, _Multipliers):
            return module.merge()
        for name, child in module.named_children():
            setattr(module, name, plain(child))
        return module
    return plain(copy.deepcopy(model))


def use_kernel(model: nn.Module) -> None:
    """Let every linear layer that has multipliers compute W_eff by kernel.py from now on."""
    for module in model.modules():
        if isinstance(module, MultiplierLinear):
            module.kernel = any(getattr(module, name) is not None for name in MULTIPLIERS)


def is_multiplier(parameter_name: str) -> bool:
    """Is this entry of named_parameters() a multiplier?"""
    return parameter_name.rsplit(".", 1)[-1] in MULTIPLIERS


# ---------------------------------------------------------------- which matrix gets which

# Some multipliers are redundant: only a product of two matters, so the two can drift apart. Row of
# q and row of k (each rotary pair as a whole), row of up and column of down, row of v and column of
# out, an RMSNorm gain and the columns of the matrices behind it. The symmetry-free placement keeps
# one of each (paper, Appendix C). Two redundancies remain even there: one number between the row
# and the column of the same matrix, and the scale of the whole residual stream, which RMSNorm
# ignores. The paper itself trains the full set, for its lower loss, and holds the drift by a weight
# decay of 2e-3.
SYMMETRY_FREE = {
    "q": ("row",), "k": (), "v": (), "out": ("row", "column"),
    "gate": ("row",), "up": (), "down": ("row", "column"),
    "embedding": ("row", "column"),
}
# There is no entry for the head. Its columns have a multiplier already, the final RMSNorm gain. A
# row multiplier would scale the logit of each token directly: a short cut to the token frequencies
# that is learned instead of features, and the paper found the loss worse with it (section 4.4).


def placement_of(matrix: str, multipliers: str, placement: str) -> dict[str, bool]:
    """The keyword arguments scalar, row, column for one matrix.

    matrix: a key of SYMMETRY_FREE or "head"; multipliers: none | scalar | vector;
    placement: all | symmetry_free | mlp (gate, up and down only: the paper's MLP experiment).
    """
    both = ("row", "column")
    chosen = {"all": both if matrix in SYMMETRY_FREE else (),
              "symmetry_free": SYMMETRY_FREE.get(matrix, ()),
              "mlp": both if matrix in ("gate", "up", "down") else ()}[placement]
    learned = {"none": (), "vector": chosen,
               "scalar": ("scalar",) if chosen else ()}[multipliers]   # one for row and column
    return {name: name in learned for name in MULTIPLIERS}
