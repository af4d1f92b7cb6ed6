"""Muon: an optimizer that moves a weight matrix equally far in all of its directions.

AdamW treats W[out, in] as a list of numbers. Muon treats W as a linear map. Muon asks which step D
lowers the loss most if the spectral norm of D (its largest singular value) is at most 1. Let the
gradient G have the SVD U S V^T with singular values s_i. Every such D has

    <G, D> = sum_i s_i u_i^T D v_i >= -sum_i s_i,      with equality at D = -U V^T.

Steepest descent under the spectral norm thus sets every singular value of G to 1 (Bernstein and
Newhouse, arXiv 2409.20325). Newton–Schulz does this with matrix products alone. It starts from
X = G / ||G||_F. Each step X <- a X + b (X X^T) X + c (X X^T)^2 X keeps U and V and sends a singular
value s to a s + b s^3 + c s^5. Five steps bring nearly all of them close to 1.

    in the code       ns_coefficients   momentum   lr    weight_decay
    in the sources    a, b, c           mu         eta   lambda

Step length (adjust_lr_fn). U V^T has min(out, in) singular values, all 1, so the RMS of its entries
is 1 / sqrt(max(out, in)), less for a wider matrix. There are two corrections:
  "match_rms_adamw"  lr * 0.2 sqrt(max(out, in)): an update of RMS 0.2 lr in every shape, as AdamW's
                     (Moonlight, section 2.2), so AdamW's lr and weight decay fit. The default.
  "original"         lr * sqrt(max(1, out / in)): Jordan's, for lr near 0.02. torch's default.
For a 384 x 384 matrix, lr = 1e-3 with the first is the same step as lr = 3.9e-3 with the second.

Equilibrium. Decay is p *= 1 - lr * weight_decay with the lr BEFORE adjustment, as in AdamW. Under
gradient noise RMS(W) settles near sqrt(eta / 2 lambda) times u sqrt((1 + mu) / (1 - mu)), where u
is the RMS of an update before lr (multipliers.py). The second factor is 1 for AdamW and 1.06 for
Muon (0.17 * 6.2). Muon's true RMS(W) is 0.8 to 1 times AdamW's, more for wide matrices. A
multiplier takes over the size of W_eff under Muon, too.

Sources: Keller Jordan et al., "Muon", kellerjordan.github.io/posts/muon (iteration, momentum);
Liu et al., "Muon is Scalable for LLM Training" (Moonlight), arXiv 2502.16982 (decay, RMS matching).
"""
import math

import torch


def newton_schulz(G, coefficients, steps, eps):  # exercise 7
    """About U V^T of a matrix G[out, in], in the dtype of G.

    Jordan's (3.4445, -4.7750, 2.0315) are fast, not exact: after 5 steps every singular value that
    was above 0.01 ||G||_F is in [0.68, 1.14]. (2, -1.5, 0.5) bring those to 1, but need 8 steps.
    """
    a, b, c = coefficients
    tall = G.size(0) > G.size(1)
    # A tall matrix is transposed, so that A = X X^T is small.
    X = G.T if tall else G
    # No singular value exceeds the Frobenius norm, so all of them start in [0, 1].
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.T
        # addmm(M, P, Q) is beta M + alpha P Q in one call. The first line is B = b A + c A A, the
        # second one X <- a X + B X. With * and + a step of Muon takes a fifth longer on a CPU.
        B = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, B, X, beta=a)
    return X.T if tall else X


def matmul_dtype(device):
    """bf16 on a GPU with bf16 tensor cores (Ampere or newer), fp32 on every other device. train.py
    asks this function, too: the matrix products of the model follow the same rule."""
    # The rounding error of bf16, about 1 %, is small beside the singular values' distance from 1.
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def adjusted_lr(lr, name, shape):
    """Step length for a matrix of shape (out, in); raises ValueError for an unknown name."""
    rows, columns = shape
    if name == "match_rms_adamw":
        return lr * (0.2 * math.sqrt(max(rows, columns)))
    if name in ("original", None):
        return lr * math.sqrt(max(1, rows / columns))
    raise ValueError(f"adjust_lr_fn is 'match_rms_adamw' or 'original', not {name!r}")


def check_group(group):
    """Raises ValueError if Muon cannot train this parameter group."""
    if not (group["lr"] >= 0 and group["weight_decay"] >= 0):
        raise ValueError("Muon needs lr >= 0 and weight_decay >= 0, not "
                         f"{group['lr']} and {group['weight_decay']}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"Muon needs 0 <= momentum < 1, not {group['momentum']}")
    for p in group["params"]:
        # A (d, 1) gradient would become a unit vector.
        if p.ndim != 2 or min(p.shape) < 2:
            raise ValueError("Muon takes matrices with both sides > 1, not a parameter of shape "
                             f"{tuple(p.shape)}: give that one to torch.optim.AdamW")
        # This call raises the error for an unknown name.
        adjusted_lr(group["lr"], group["adjust_lr_fn"], p.shape)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's signature, update and state dict; only adjust_lr_fn's default differs.

    Leave the embedding and the head out: Muon cannot tell them from other matrices. AdamW trains
    both, and biases, gains, multipliers and convolutions. Raises ValueError for a bad setting, and
    for a parameter that is not a matrix with both sides > 1.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
                 ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5,
                 adjust_lr_fn="match_rms_adamw"):
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn))

    def add_param_group(self, param_group):
        """Check a group, then add it. Optimizer.__init__ calls this method too."""
        super().add_param_group(param_group)
        # The parent class has filled in the defaults. A group that fails a check stays out.
        group = self.param_groups.pop()
        check_group(group)
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):  # exercise 8
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = group["lr"]
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                # The mean mu * buffer + (1 - mu) * grad; Moonlight's sum mu * buffer + grad has the
                # same direction.
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                # Nesterov momentum counts the newest gradient once more: it looks one step ahead.
                mean = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                direction = newton_schulz(
                    mean.to(matmul_dtype(p.device)), group["ns_coefficients"],
                    steps=group["ns_steps"], eps=group["eps"])
                # The decay uses the lr before adjustment.
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-adjusted_lr(lr, group["adjust_lr_fn"], p.shape))
        return loss
