"""Learnable multipliers (arXiv 2601.04890): the layers, where they go, and the law they answer.

The problem. An optimizer step shrinks a matrix W by weight decay and adds gradient noise to W.
After some time both effects balance, and the size of W no longer changes:

    RMS(W) = sqrt(lr / (2 * weight_decay))               (paper, eq. 1; the 2 is Kosson's)

RMS(W) is the root of the mean of W_ij^2: 0.14 for lr = 0.004 and weight_decay = 0.1. The settings
of the optimizer choose this number; the data have no say in it. (Derivation: end of this file.)

The cure. Give the scale its own parameters, which weight decay hardly touches:

    W_eff = s W                 one number for the matrix: "scalar"                  (eq. 2)
    W_eff = diag(r) W diag(c)   one number for each row and each column: "vector"    (eq. 3)

The layer computes with W_eff. W stays near the size above; s, r and c learn the size of W_eff.
After training, `merge` writes W_eff into an ordinary layer, so inference costs nothing extra.
The gradients follow from the chain rule, with G = dL/dW_eff (eq. 4):

    dL/dW_ij = r_i c_j G_ij         dL/dr_i = sum over j of W_ij c_j G_ij
    dL/ds = sum of all W_ij G_ij    dL/dc_j = sum over i of r_i W_ij G_ij

A multiplier's gradient sums over many entries, in which noise averages out. If G has a component
along W, the signal-to-noise ratio is sqrt(in) times that of one entry for r_i, sqrt(out) times for
c_j, and sqrt(in * out) times for s.

    in the code    weight         scalar, row [out], column [in]    lr     weight_decay
    in the paper   W [out, in]    s, r, c                           eta    lambda
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- the layers
# A parameter with one of these names is a multiplier. All are 0-D or 1-D: Muon takes only 2-D.
MULTIPLIERS = ("scalar", "row", "column")

def is_multiplier(name: str) -> bool:
    """Is this name from `named_parameters()` the name of a multiplier?"""
    return name.rsplit(".", 1)[-1] in MULTIPLIERS

class _Multipliers:
    """What both layers below add to the PyTorch layer that they inherit from."""
    kernel = False                 # use_kernel sets this to True

    def create_multipliers(self, scalar: bool, row: bool, column: bool) -> None:
        """The chosen multipliers, all 1, so that W_eff = W at the start. They are float32 beside
        any W: in bfloat16, 1 + 0.0004 is 1."""
        if scalar and (row or column):
            raise ValueError("choose a scalar (eq. 2) or row/column multipliers (eq. 3), not both")
        rows, columns = self.weight.shape
        for name, chosen, shape in (("scalar", scalar, ()), ("row", row, rows),
                                    ("column", column, columns)):
            ones = torch.ones(shape, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(ones) if chosen else None)

    def learned(self) -> list[str]:
        """Names of the multipliers that this layer has, e.g. ["row", "column"]."""
        return [name for name in MULTIPLIERS if getattr(self, name) is not None]

    def effective_weight(self) -> Tensor:  # exercise 1
        """W_eff [out, in] = s W or diag(r) W diag(c), in the dtype of W."""
        W = self.weight
        if self.scalar is not None:
            W = self.scalar * W
        if self.row is not None:
            W = self.row[:, None] * W      # (out, 1) * (out, in)
        if self.column is not None:
            W = W * self.column            # (out, in) * (in,)
        return W.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multipliers={'+'.join(self.learned()) or 'none'}"

    def _apply(self, fn, *rest):
        # the multipliers stay float32 in model.bfloat16()
        kept = {name: getattr(self, name).data for name in self.learned()}
        super()._apply(fn, *rest)
        for name, data in kept.items():
            if getattr(self, name).dtype in (torch.bfloat16, torch.float16):
                getattr(self, name).data = data.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state, prefix, *rest):
        # the state of a plain layer has no multipliers: they are 1
        for name in self.learned():
            state.setdefault(prefix + name, torch.ones_like(getattr(self, name)))
        super()._load_from_state_dict(state, prefix, *rest)

class MultiplierLinear(_Multipliers, nn.Linear):
    """nn.Linear with W_eff in place of W: y [..., out] = x [..., in] W_eff^T (+ bias).

    The layer scales the weight, not the activations. W has in * out entries; x and y together have
    tokens * (in + out): 16 times more in train.py's default run, 85 times in its gpt2 preset.
    """
    plain = nn.Linear

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 scalar=False, row=False, column=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.create_multipliers(scalar, row, column)

    def forward(self, x: Tensor) -> Tensor:
        W_eff = self.fused_weight(x.device.type) if self.kernel else self.effective_weight()
        return F.linear(x, W_eff, self.bias)

    def fused_weight(self, device: str) -> Tensor:
        """W_eff by kernel.py, which also casts W_eff to the dtype of the matrix product."""
        from kernel import scale
        # the kernel takes float32, the dtype of the multipliers
        W = self.weight.to(getattr(self, self.learned()[0]).dtype)
        row = W.new_ones(W.shape[0]) if self.row is None else self.row
        column = W.new_ones(W.shape[1]) if self.column is None else self.column
        if self.scalar is not None:
            row = self.scalar * row
        # autocast is PyTorch's mixed precision: it runs matrix products in bfloat16
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        return scale(W, row, column, dtype)

class MultiplierEmbedding(_Multipliers, nn.Embedding):
    """nn.Embedding with W_eff in place of W: tokens [...] -> rows of W_eff [..., dim].

    W is [vocabulary, dim]: `row` has one number for each token, `column` one for each dimension.
    A batch reads few rows of the table, so this layer scales the rows that it has read.
    """
    plain = nn.Embedding

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *,
                 scalar=False, row=False, column=False, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.create_multipliers(scalar, row, column)

    def forward(self, tokens: Tensor) -> Tensor:
        y = super().forward(tokens)
        if self.scalar is not None:
            y = self.scalar * y
        if self.row is not None:
            # r of each token, looked up like the token's row: (..., 1) * (..., dim)
            y = F.embedding(tokens, self.row[:, None], self.padding_idx) * y
        if self.column is not None:
            y = y * self.column
        return y.to(self.weight.dtype)

def merge(model: nn.Module) -> nn.Module:  # exercise 2
    """A copy of the model with plain layers and the same function, up to rounding. ValueError if a
    weight with multipliers is tied to another layer's: after merging the two would differ."""
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, _Multipliers)]
    owners = {layer.weight: layer for layer in layers if layer.learned()}
    for name, module in model.named_modules():
        if owners.get(getattr(module, "weight", None), module) is not module:
            raise ValueError(f"{name}.weight is tied to a weight with multipliers: untie the two")
    for layer in layers:
        # a multiplier layer without multipliers, and with W_eff as its weight, is a plain one
        layer.weight.data = layer.effective_weight().detach().clone()
        for name in MULTIPLIERS:
            delattr(layer, name)
        layer.__class__ = layer.plain
    return model

def use_kernel(model: nn.Module) -> None:
    """From now on every linear layer with multipliers computes W_eff by kernel.py."""
    for module in model.modules():
        if isinstance(module, MultiplierLinear) and module.learned():
            module.kernel = True

# ---------------------------------------------------------------- any model
def add_multipliers(model: nn.Module, kind: str = "vector", where=None) -> nn.Module:
    """Turn the nn.Linear and nn.Embedding layers of any model into multiplier layers, in place. The
    weights and the function stay the same. kind: "vector" or "scalar". where(name) says whether a
    layer gets multipliers; by default all do except heads, known by name (why: below)."""
    for name, module in model.named_modules():
        layer = {c.plain: c for c in (MultiplierLinear, MultiplierEmbedding)}.get(type(module))
        head = name.rsplit(".", 1)[-1] in ("head", "lm_head", "output", "embed_out", "classifier")
        if layer and (where(name) if where else not head):
            # the module stays the same object, with the same weight; only its class changes
            module.__class__ = layer
            module.create_multipliers(kind == "scalar", kind == "vector", kind == "vector")
    return model

def optimizer_groups(model: nn.Module, kinds: dict[str, dict], kind_of) -> list[dict]:
    """Parameter groups for an optimizer: a parameter with this name gets the settings
    kinds[kind_of(name)]. Frozen parameters are left out; each other one is in exactly one group."""
    members = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[kind_of(name)].append(parameter)
    listed = [p for parameters in members.values() for p in parameters]
    assert len(set(listed)) == len(listed) == sum(p.requires_grad for p in model.parameters())
    return [dict(kinds[kind], kind=kind, params=members[kind]) for kind in kinds if members[kind]]

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
# The head, the last matrix, has no entry. The gain of the final RMSNorm is already its column
# multiplier. A row multiplier would let the model fit the frequency of each token directly, before
# it learns features; the paper found a higher loss with it (section 4.4).

def placement_of(matrix: str, multipliers: str, placement: str) -> dict[str, bool]:  # exercise 3
    """The keyword arguments scalar, row, column for a matrix (a key of SYMMETRY_FREE, or "head").
    multipliers: "none", "scalar" or "vector". placement: "all" matrices but the head (as in the
    paper), "symmetry_free" (above), or only those of the "mlp" (the paper's Appendix B)."""
    both = ("row", "column")
    chosen = {"all": both if matrix in SYMMETRY_FREE else (),
              "symmetry_free": SYMMETRY_FREE.get(matrix, ()),
              "mlp": both if matrix in ("gate", "up", "down") else ()}[placement]
    # one scalar stands for the row and column multipliers of a matrix
    learned = {"none": (), "vector": chosen, "scalar": ("scalar",) if chosen else ()}[multipliers]
    return {name: name in learned for name in MULTIPLIERS}

# ---------------------------------------------------------------- the law
# One step of an optimizer with decoupled weight decay is
#     W <- a W - lr u,    a = 1 - lr * weight_decay,    u: the update, U = RMS(u).
# If the gradient is noise, the mean of u is 0. Momentum correlates updates: two of them, k steps
# apart, have the correlation beta^k. W is the sum of old updates, -lr * (u_1 + a u_2 + a^2 u_3 +
# ...), with u_k from k steps ago. So the mean of u W is -lr beta U^2 / (1 - a beta), and one step
# changes the mean square of W to
#     a^2 RMS(W)^2 + lr^2 U^2 (1 + a beta) / (1 - a beta).                          (*)
# RMS(W) settles where (*) equals RMS(W)^2. AdamW on pure noise has U^2 = (1 - beta) / (1 + beta),
# since u is a running mean of numbers of variance 1. This factor cancels that of momentum, and
# sqrt(lr / (2 weight_decay)) remains for small lr * weight_decay.
# A real gradient is signal plus noise. The law holds for it as long as the signal pushes W neither
# outwards nor inwards on average over 1 / (lr * weight_decay) steps. Hidden matrices come close;
# the head does not (analysis.ipynb).

def equilibrium_rms(lr: float, weight_decay: float, *, beta: float = 0.9,
                    update_rms: float | None = None) -> float:  # exercise 4
    """RMS(W) at which weight decay balances pure gradient noise: the fixed point of (*).

    beta is the momentum; update_rms is U, the RMS of an entry of u:
      AdamW   beta1      None: sqrt((1 - beta) / (1 + beta)); RMS(W) is 1 % smaller for beta2 = 0.95
      SGD     momentum   sigma / sqrt(1 - beta^2); sigma is the RMS of the gradient noise
      Muon    momentum   0.17 (measured); the true RMS(W) is up to a quarter smaller, since Muon's
                         updates decorrelate faster than beta^k
    Source: (*), after Kosson et al., arXiv 2305.17212, and Wen et al., arXiv 2606.16899.
    """
    if update_rms is None:
        update_rms = math.sqrt((1 - beta) / (1 + beta))
    a = 1 - lr * weight_decay
    return lr * update_rms * math.sqrt((1 + a * beta) / ((1 - a * a) * (1 - a * beta)))

def small_step_rms(lr: float, weight_decay: float) -> float:
    """equilibrium_rms of AdamW for small lr * weight_decay (paper, eq. 1; the 2 is Kosson's)."""
    return math.sqrt(lr / (2 * weight_decay))

def relaxation_steps(lr: float, weight_decay: float) -> float:
    """Steps in which RMS(W)^2 comes e times closer to its equilibrium: 1250 for 0.004 and 0.1."""
    return 1 / (2 * lr * weight_decay)
