"""Muon: an optimizer that moves a weight matrix equally far in all of its directions.

AdamW sees W[out, in] as a bag of numbers. Muon sees a linear map and asks which step D lowers the
loss most while changing the map by at most 1, that is with spectral norm (largest singular value)
at most 1. With the SVD of the gradient, G = U S V^T, every such D has

    <G, D> = sum_i s_i u_i^T D v_i >= -sum_i s_i,      with equality at D = -U V^T,

so steepest descent under the spectral norm sets every singular value of the gradient to 1
(Bernstein & Newhouse, arXiv 2409.20325). A Newton–Schulz step, X <- aX + b(XX^T)X + c(XX^T)^2 X,
leaves U and V alone and sends each singular value s to as + bs^3 + cs^5: a few such steps bring
them all close to 1 with matrix products only, no SVD.

How far to step: `adjust_lr_fn`. U V^T has min(out, in) singular values, all 1, and the squares of
its entries sum to that number: its RMS is 1/sqrt(max(out, in)), falling with width. Two remedies:
  "match_rms_adamw"  lr * 0.2 sqrt(max(out, in)): update RMS of about 0.2 in every shape, as AdamW's
                     (Moonlight, section 2.2), so AdamW's lr and weight decay carry over. Default.
  "original"         lr * sqrt(max(1, out/in)): Jordan's, for lr near 0.02. torch's default (None).
For a 384x384 matrix, lr = 1e-3 with the first is lr = 3.9e-3 with the second.

Equilibrium. Decay is p *= 1 - lr*wd with the lr BEFORE adjustment, as AdamW's. The norm at which
noise then holds W goes as U sqrt((1 + momentum) / (1 - momentum)), U the RMS of an update
(multipliers.py): 1 for AdamW, and for Muon 0.17 * 6.2 = 1.06, since its longer memory makes up for
its smaller update. Measured on pure noise: 0.86 and 0.96 of AdamW's norm (tests/test_muon.py). Muon
changes the direction of the step, not the fact that the optimizer sets the norm of W; a learnable
multiplier frees it under either.

Not for embeddings and the head (2-D too, so no check can stop you), biases, gains, multipliers and
convolutions: AdamW trains those. Split a fused QKV matrix first: it is three maps, not one.

Sources: Keller Jordan et al., "Muon", kellerjordan.github.io/posts/muon (iteration, momentum);
Liu et al., "Muon is Scalable for LLM Training" (Moonlight), arXiv 2502.16982 (decay, RMS matching).
"""
import math

import torch


def newton_schulz(G, coefficients, steps, eps):
    """About U V^T of a matrix G[out, in], or of each in a batch G[n, out, in], in the dtype of G.

    Jordan's (3.4445, -4.7750, 2.0315) buy speed with exactness: after 5 steps every singular value
    that was above 0.01 ||G||_F is in [0.68, 1.14]. (2, -1.5, 0.5) brings those to 1, but takes 12.
    """
    a, b, c = coefficients
    addmm = torch.addmm if G.ndim == 2 else torch.baddbmm  # beta*M + alpha*(P @ Q) in one call
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G  # the same result either way, but now XX^T is the small Gram matrix
    # No singular value exceeds the Frobenius norm, so they all start in [0, 1].
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = addmm(X, addmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cA^2) X
    return X.mT if tall else X


def ns_dtype(device):
    """bf16 on a GPU with bf16 tensor cores (Ampere or newer), fp32 everywhere else.

    These products are nearly all of Muon's cost and tensor cores do them many times faster in bf16;
    the rounding (about 1%) is small beside the singular values' own distance from 1. Elsewhere bf16
    may be emulated, hence slow.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def muon_direction(grad, buffer, momentum, nesterov, coefficients, steps, eps):
    """Orthogonalized momentum [out, in]; `buffer` is the running mean, `grad` included."""
    # Nesterov counts the newest gradient once more, looking one step ahead.
    mean = grad.lerp(buffer, momentum) if nesterov else buffer
    return newton_schulz(mean.to(ns_dtype(mean.device)), coefficients, steps, eps)


def adjusted_lr(lr, name, shape):
    """Step length for a matrix of shape (out, in); the two names are explained at the top."""
    rows, columns = shape
    if name == "match_rms_adamw":
        return lr * (0.2 * math.sqrt(max(rows, columns)))
    if name in ("original", None):
        return lr * math.sqrt(max(1, rows / columns))
    raise ValueError(f"adjust_lr_fn is 'match_rms_adamw' or 'original', not {name!r}")


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's signature, update and state dict; only adjust_lr_fn's default differs.

    Raises ValueError for a bad setting and for anything but a matrix with both sides > 1: the
    gradient of a (d, 1) multiplier would become a unit vector, however small it was.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
                 ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5,
                 adjust_lr_fn="match_rms_adamw"):
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn))

    def add_param_group(self, param_group):  # __init__ comes through here too
        super().add_param_group(param_group)  # fills in the defaults
        group = self.param_groups.pop()  # out again until it has passed
        lr, wd, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if not (lr >= 0 and wd >= 0 and 0 <= momentum < 1):
            raise ValueError("Muon needs lr >= 0, weight_decay >= 0 and 0 <= momentum < 1, "
                             f"not {lr}, {wd} and {momentum}")
        for p in group["params"]:
            if p.ndim != 2 or min(p.shape) < 2:
                raise ValueError("Muon takes matrices with both sides > 1, not a parameter of "
                                 f"shape {tuple(p.shape)}: give that one to torch.optim.AdamW")
            adjusted_lr(lr, group["adjust_lr_fn"], p.shape)  # raises on an unknown name
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            newton_schulz_settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                # A mean, not Moonlight's sum mu*buffer + grad: 1 - mu times it, the same direction.
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                direction = muon_direction(p.grad, buffer, momentum, group["nesterov"],
                                           *newton_schulz_settings)
                p.mul_(1 - lr * group["weight_decay"])  # decoupled, by the lr before adjustment
                p.add_(direction, alpha=-adjusted_lr(lr, group["adjust_lr_fn"], p.shape))
        return loss
