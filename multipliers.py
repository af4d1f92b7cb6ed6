"""Learnable multipliers (arXiv 2601.04890): the law of the norm, and the layer that escapes it.

The problem. Each step of an optimizer shrinks a matrix W by weight decay and adds gradient noise.
After some time the two effects balance. From then on the size of W stays the same:

    RMS(W) = sqrt(lr / (2 * weight_decay))               (paper, eq. 1; the 2 is Kosson's)

RMS(W) is the root of the mean of W_ij^2: 0.14 for lr = 0.004 and weight_decay = 0.1. The settings
of the optimizer choose this number. As long as noise leads W, the data have no say in it.

The cure. Multipliers do not free the norm of W. They are learned numbers that take over the size
of the matrix with which the layer computes. Weight decay hardly touches them:

    W_eff = s W                 one number for the matrix: "scalar"                  (eq. 2)
    W_eff = diag(r) W diag(c)   one number for each row and each column: "vector"    (eq. 3)
    W_eff = s diag(r) W diag(c)                                  "both", our addition

W stays near the size above; s, r and c learn the size of W_eff. After training, `merge` writes
W_eff into an ordinary layer, so inference costs nothing extra.

The gradients follow from the chain rule, with G = dL/dW_eff (eq. 4):

    dL/dW_ij = r_i c_j G_ij         dL/dr_i = sum over j of W_ij c_j G_ij
    dL/ds = sum of all W_ij G_ij    dL/dc_j = sum over i of r_i W_ij G_ij

("Both": W and the vectors get a factor s more, and the sum of s has r_i W_ij c_j for W_ij.)

A multiplier's gradient sums over many entries, in which noise averages out. If G has a component
along W, the signal-to-noise ratio is sqrt(in) times that of one entry for r_i, sqrt(out) times for
c_j, and sqrt(in * out) times for s.

    in the code    W [out, in]    scalar, row [out], column [in]    lr     weight_decay
    in the paper   W              s, r, c                           eta    lambda
"""
import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

# ---------------------------------------------------------------- the law
# One step of an optimizer with decoupled weight decay is
#     W' = a W - lr u,    a = 1 - lr * weight_decay,    u: the update, U = RMS(u).
# So the mean square of W becomes
#     E[W'^2] = a^2 RMS(W)^2 - 2 a lr E[u W] + lr^2 U^2.
# If the gradient is noise, the mean of u is 0, but u is not independent of W: momentum makes two
# updates that lie k steps apart correlated, with the correlation beta^k. W is the sum of all old
# updates, W = -lr (u_1 + a u_2 + a^2 u_3 + ...), where u_k is k steps old. So
#     E[u W] = -lr U^2 (beta + a beta^2 + a^2 beta^3 + ...) = -lr beta U^2 / (1 - a beta),
#     E[W'^2] = a^2 RMS(W)^2 + lr^2 U^2 (1 + a beta) / (1 - a beta).                    (*)
# RMS(W) settles where E[W'^2] = RMS(W)^2. For AdamW on pure noise u is a running mean of numbers
# of variance 1, so U^2 = (1 - beta) / (1 + beta). This cancels the last factor of (*). For small
# lr * weight_decay there remains RMS(W) = sqrt(lr / (2 weight_decay)).
# A real gradient is signal plus noise. The law holds for it as long as the signal pushes W neither
# outwards nor inwards on average over 1 / (lr * weight_decay) steps.


def equilibrium_rms(
    lr: float, weight_decay: float, *, beta: float = 0.9, update_rms: float | None = None
) -> float:  # exercise 1
    """RMS(W) at which weight decay balances pure gradient noise: the fixed point of (*).

    beta is the momentum; update_rms is U, the RMS of an entry of the update u:
      AdamW   beta1      None: sqrt((1 - beta) / (1 + beta)). RMS(W) is 1 to 2 % smaller for
                         beta2 = 0.95, which is far from 1
      SGD     momentum   sigma / sqrt(1 - beta^2); sigma is the RMS of the gradient noise
      Muon    momentum   0.17 (measured). The true RMS(W) is up to a quarter smaller, since Muon's
                         updates decorrelate faster than beta^k
    Source: (*), after Kosson et al., arXiv 2305.17212, and Wen et al., arXiv 2606.16899.
    """
    if update_rms is None:
        update_rms = math.sqrt((1 - beta) / (1 + beta))
    a = 1 - lr * weight_decay
    # What one step adds to the mean square of W, by (*) ...
    added = (lr * update_rms) ** 2 * (1 + a * beta) / (1 - a * beta)
    # ... is what decay removes from it, (1 - a^2) RMS(W)^2.
    return math.sqrt(added / (1 - a * a))


def law_rms(lr: float, weight_decay: float) -> float:
    """The law: equilibrium_rms of AdamW for small lr * weight_decay (paper, eq. 1)."""
    return math.sqrt(lr / (2 * weight_decay))


def relaxation_steps(lr: float, weight_decay: float) -> float:
    """Steps in which RMS(W)^2 comes e times closer to its equilibrium: 1250 for 0.004 and 0.1."""
    return 1 / (2 * lr * weight_decay)


# ---------------------------------------------------------------- the layer
class Multipliers(nn.Module):
    """W [out, in] -> W_eff [out, in] = s diag(r) W diag(c), with those of s, r, c that are learned.

    This is a parametrization (torch.nn.utils.parametrize): once it is attached to an nn.Linear or
    an nn.Embedding, PyTorch computes `layer.weight` by this `forward` whenever anybody reads it.
    So the layer, and all other code that uses the weight, works with W_eff. All multipliers start
    at 1, where W_eff = W. They are 0-D or 1-D: AdamW trains them, never Muon.

    We scale W and not the activations x and y, since W has fewer entries: in * out of them, where
    x and y have tokens * (in + out). In train.py's gpt2 preset that is 85 times more.
    """

    def __init__(self, W: Tensor, scalar: bool = False, row: bool = False, column: bool = False):
        """W gives the shape and the device."""
        super().__init__()
        rows, columns = W.shape
        # They are float32 even if W is bfloat16: there 1 + 0.0004 is rounded to 1.
        options = dict(device=W.device, dtype=torch.float32)
        self.scalar = nn.Parameter(torch.empty((), **options)) if scalar else None
        self.row = nn.Parameter(torch.empty(rows, **options)) if row else None
        self.column = nn.Parameter(torch.empty(columns, **options)) if column else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All multipliers become 1, so that W_eff = W."""
        for multiplier in self.parameters():
            nn.init.ones_(multiplier)

    def forward(self, W: Tensor) -> Tensor:  # exercise 2
        """W_eff [out, in], in the dtype of W (eq. 2, 3, or both)."""
        # The products are made in float32 at least. Beside a W in bfloat16 PyTorch would round s.
        W_eff = W.to(torch.promote_types(W.dtype, torch.float32))
        if self.scalar is not None:
            W_eff = self.scalar * W_eff
        if self.row is not None:
            W_eff = self.row[:, None] * W_eff      # (out, 1) * (out, in)
        if self.column is not None:
            W_eff = W_eff * self.column            # (out, in) * (in,)
        return W_eff.to(W.dtype)

    def _apply(self, fn, recurse=True):
        # model.bfloat16(), model.to("cuda") and the like call this method with a function that
        # converts one tensor. The multipliers move with W, but they stay float32.
        def convert(tensor):
            converted = fn(tensor)
            if converted.dtype in (torch.bfloat16, torch.float16):
                converted = tensor.to(converted.device, torch.float32)
            return converted
        return super()._apply(convert, recurse)

    def extra_repr(self) -> str:
        return ", ".join(name for name, _ in self.named_parameters())


def attach_multipliers(layer: nn.Module, scalar=False, row=False, column=False) -> None:
    """Give `layer`, an nn.Linear or an nn.Embedding, these multipliers. In an embedding W is
    [vocabulary, dim], so that `row` has one number for each token. Without any, nothing changes.

    From now on `layer.weight` is computed anew whenever it is read. Code that writes into it, such
    as nn.init or `layer.reset_parameters()`, changes nothing: write into `raw_weight(layer)`.
    """
    if scalar or row or column:
        multipliers = Multipliers(layer.weight, scalar, row, column)
        parametrize.register_parametrization(layer, "weight", multipliers)


def raw_weight(layer: nn.Module) -> nn.Parameter:
    """W itself, which the optimizer trains. `layer.weight` is W_eff."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


def multipliers_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The multipliers of a layer, e.g. {"row": ..., "column": ...}; {} for a plain layer."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrization = layer.parametrizations.weight[0]
        if isinstance(parametrization, Multipliers):
            return dict(parametrization.named_parameters())
    return {}


def is_multiplier(name: str) -> bool:
    """Is this a multiplier's name, among those of `model.named_parameters()`?"""
    # e.g. blocks.0.attn.q.parametrizations.weight.0.row
    return name.endswith((".scalar", ".row", ".column")) and "parametrizations." in name


def merge(model: nn.Module) -> nn.Module:  # exercise 3
    """A copy of the model with plain layers and the same function, up to rounding: W_eff replaces
    W, and the multipliers are gone. The model itself does not change."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if multipliers_of(layer):
            W_eff = layer.weight.detach()
            trained = raw_weight(layer).requires_grad
            # PyTorch has made a subclass of the layer's class, which computes `weight`. We go back
            # to the layer's class. (parametrize.remove_parametrizations would take `weight` out of
            # the subclass, which the copied model shares with the original.)
            layer.__class__ = type(layer).__base__
            del layer.parametrizations
            layer.weight = nn.Parameter(W_eff, requires_grad=trained)
    return model


# ---------------------------------------------------------------- other people's models
def last_linear(model: nn.Module) -> str | None:
    """Name of the linear layer that was defined last. In nearly all models it is the head."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def check_layer(name: str, layer: nn.Module, model: nn.Module) -> None:
    """ValueError if multipliers on this layer would be ignored, or would act on two layers."""
    own = dict(layer.named_parameters(recurse=False))
    is_plain = "weight" in own and not parametrize.is_parametrized(layer)
    if not is_plain or not own["weight"].is_floating_point():
        raise ValueError(f"{name} is computed from other tensors (multipliers, weight_norm, "
                         "pruning, quantization ...): choose other layers with `where`")
    for other, p in model.named_parameters(remove_duplicate=False):
        if p is own["weight"] and model.get_submodule(other.rpartition(".")[0]) is not layer:
            raise ValueError(f"{name} is tied to {other}: untie the two, so that each has "
                             "a W of its own, or leave both out with `where`")


def add_multipliers(model: nn.Module, kind: str = "vector", where=None) -> str:
    """Attach multipliers to the nn.Linear and nn.Embedding layers of any model, in place. The
    function that the model computes stays the same. Returns a sentence that says which matrices
    have multipliers now, and which have none.

    kind: "vector", "scalar" or "both" (then give the vectors a quarter of the scalars' lr).
    where(name) says whether a layer gets multipliers. By default all get them except the head: a
    row multiplier would let the head fit the frequency of each token before the model learns
    features (paper, section 4.4). There is no sure sign of a head. We take the linear layer that
    was defined last, and name it in the sentence, so that you can correct it.

    Call this before DistributedDataParallel and before the optimizer, and after the weights of a
    plain model were loaded. ValueError if a chosen layer cannot have multipliers.
    """
    if kind not in ("vector", "scalar", "both"):
        raise ValueError(f"kind is 'vector', 'scalar' or 'both', not {kind!r}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("add multipliers first, then wrap the model by DistributedDataParallel")
    head = last_linear(model)
    chosen = {}
    for name, module in model.named_modules():
        wanted = where(name) if where else name != head
        if isinstance(module, (nn.Linear, nn.Embedding)) and wanted:
            weight_name = f"{name}.weight".removeprefix(".")
            check_layer(weight_name, module, model)
            chosen[weight_name] = module
    # All layers are checked before the first one changes.
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2]
    for layer in chosen.values():
        attach_multipliers(layer, kind != "vector", kind != "scalar", kind != "scalar")
    others = ", ".join(name for name in matrices if name not in chosen) or "none"
    return f"multipliers on {len(chosen)} of {len(matrices)} matrices; left out: {others}"
