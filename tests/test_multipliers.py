"""Tests of multipliers.py, in the order of that file: layers, merge, kernel, placement, law.

Each test states one property in its docstring. A tolerance stands beside the error measured with
torch 2.13 on a CPU. A mutant is the code with a small slip. `assert_mutant_fails` runs a check on
the right code, then makes the slip, and expects the same check to fail.

    python -m pytest -m multipliers
"""
import copy
import math
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernel
import multipliers
from conftest import assert_mutant_fails
from model import GPT, GPTConfig
from multipliers import (MultiplierEmbedding, MultiplierLinear, equilibrium_rms, is_multiplier,
                         relaxation_steps)
from muon import Muon

pytestmark = pytest.mark.multipliers

# All sets of multipliers that a layer accepts
CHOICES = [(), ("scalar",), ("row",), ("column",), ("row", "column")]
PLAIN = {MultiplierLinear: nn.Linear, MultiplierEmbedding: nn.Embedding}
EACH_LAYER = pytest.mark.parametrize("Layer, choice", list(product(PLAIN, CHOICES)))

def make(Layer, choice=(), rows=7, columns=4, **options):
    """A layer whose weight is [rows, columns], with the chosen multipliers at 1."""
    torch.manual_seed(0)
    sizes = (columns, rows) if issubclass(Layer, nn.Linear) else (rows, columns)
    return Layer(*sizes, **dict.fromkeys(choice, True), **options)

def tiny(**settings):
    return GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=8,
                         **dict(multipliers="vector") | settings))

def randomise(module):
    """The module in float64, with random numbers as multipliers, gains and biases."""
    generator = torch.Generator().manual_seed(1)
    for name, p in module.double().named_parameters():
        if not name.endswith("weight"):
            p.data.copy_((0.5 * torch.randn(p.shape, generator=generator)).exp())
    return module

def inputs(module, columns=4, dtype=torch.float64):
    """Five tokens, one of them twice, for an embedding or a GPT; three vectors for the others."""
    if isinstance(module, (nn.Embedding, GPT)):
        return torch.tensor([[0, 3, 1, 3, 2]])
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(2), dtype=dtype)

def close(got, want, tolerance=1e-14):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

# ---------------------------------------------------------------- the layers
def check_layer(Layer, choice=("row", "column"), rows=5, columns=5):
    layer = randomise(make(Layer, choice, rows, columns))
    W, x, sizes = layer.weight, inputs(layer, columns), dict(scalar=(), row=rows, column=columns)
    # A multiplier that the layer does not have counts as 1.
    s, r, c = (getattr(layer, name) if name in choice else W.new_ones(size)
               for name, size in sizes.items())
    W_eff = s * torch.diag(r) @ W @ torch.diag(c)
    y = F.embedding(x, W_eff) if Layer is MultiplierEmbedding else x @ W_eff.T + layer.bias
    close(layer.effective_weight(), W_eff)                             # measured: 0
    close(layer(x), y)                                                 # measured: 0
    # a loss with a different derivative for each output; G = dL/dW_eff
    loss = lambda y: (y.tanh() * torch.arange(y.numel()).view_as(y)).sum()
    G, = torch.autograd.grad(loss(y), W_eff)
    loss(layer(x)).backward()
    want = {"weight": s * torch.einsum("i,j,ij->ij", r, c, G),
            "scalar": torch.einsum("ij,ij->", W, G),
            "row": torch.einsum("ij,j,ij->i", W, c, G),
            "column": torch.einsum("i,ij,ij->j", r, W, G)}
    for name in ("weight", *choice):
        close(getattr(layer, name).grad, want[name], 1e-13)            # measured: 7e-15

@EACH_LAYER
def test_layer_is_equations_2_to_4(Layer, choice):
    """A layer computes with s W or diag(r) W diag(c), and autograd gives the sums of eq. 4."""
    for rows, columns in ((5, 5), (4, 7), (7, 4)):
        check_layer(Layer, choice, rows, columns)

@pytest.mark.parametrize("Layer, method, mutant", [
    # r and c swapped; c forgotten; c without a gradient; r along the dimensions of an embedding
    (MultiplierLinear, "effective_weight", lambda m: m.column[:, None] * m.weight * m.row),
    (MultiplierLinear, "effective_weight", lambda m: m.row[:, None] * m.weight),
    (MultiplierLinear, "effective_weight", lambda m: m.row[:, None] * m.weight * m.column.detach()),
    (MultiplierEmbedding, "forward", lambda m, x: F.embedding(x, m.weight) * m.row * m.column)])
def test_mutants_of_the_layers_fail(Layer, method, mutant, monkeypatch):
    """A slip fails on a square matrix too, where all shapes fit."""
    assert_mutant_fails(lambda: check_layer(Layer), monkeypatch, Layer, method, mutant)

@EACH_LAYER
def test_new_layer(Layer, choice):
    """Multipliers start at 1, so a layer gives the bits of PyTorch's layer. is_multiplier finds
    them by the last word of their names."""
    layer, shapes = make(Layer, choice), {"scalar": (), "row": (7,), "column": (4,)}
    x = inputs(layer, dtype=torch.float32)
    assert torch.equal(layer(x), make(PLAIN[Layer])(x))
    found = {name: p for name, p in layer.named_parameters() if is_multiplier(name)}
    assert tuple(found) == tuple(layer.learned()) == choice
    assert all(torch.equal(p, torch.ones(shapes[name])) for name, p in found.items())
    assert is_multiplier("blocks.0.attn.q.row") and not is_multiplier("row.weight")

# ---------------------------------------------------------------- stand-ins for PyTorch's layers
def test_arguments_of_the_plain_layers():
    """The layers are an nn.Linear and an nn.Embedding; bias, device and dtype mean the same."""
    linear = MultiplierLinear(4, 7, False, row=True, device="meta", dtype=torch.bfloat16)
    table = MultiplierEmbedding(7, 4, column=True, device="meta", dtype=torch.bfloat16)
    assert isinstance(linear, nn.Linear) and isinstance(table, nn.Embedding)
    assert linear.bias is None and MultiplierLinear(4, 7).bias.shape == (7,)
    assert linear.weight.dtype == table.weight.dtype == torch.bfloat16
    assert all(p.is_meta for layer in (linear, table) for p in layer.parameters())
    assert "in_features=4, out_features=7" in str(linear) and "multipliers=row" in str(linear)

def test_padding_token():
    """The padding token gets no gradient, neither in W nor in the row multipliers, also where its
    row of W is not 0. merge keeps padding_idx."""
    table = MultiplierEmbedding(7, 4, 3, row=True, column=True)
    assert not table(torch.tensor(3)).any()
    table.weight.data[3] = 1
    table(torch.arange(7)).sum().backward()
    for grad in (table.weight.grad.any(dim=1), table.row.grad != 0):
        assert grad.tolist() == [token != 3 for token in range(7)]
    assert multipliers.merge(table).padding_idx == 3

def test_scalar_and_vector_together_are_an_error():
    """The paper does not combine eq. 2 and eq. 3: a layer with both is a ValueError."""
    for Layer, vector in product(PLAIN, CHOICES[2:]):
        with pytest.raises(ValueError, match="not both"):
            make(Layer, ("scalar", *vector))

@EACH_LAYER
def test_multipliers_stay_in_float32(Layer, choice):
    """Beside a weight in bfloat16 or float16, made or converted, the multipliers are float32. The
    bfloat16 numbers next to 1 are 0.996 and 1.008, so a step of 1e-3 would be lost."""
    for dtype in (torch.bfloat16, torch.float16):
        made, converted = make(Layer, choice, dtype=dtype), make(Layer, choice)
        for p in map(converted.get_parameter, choice):
            p.data += 1e-3
        for layer, start in (made, 1), (converted.to(dtype), 1 + 1e-3):
            y = layer(inputs(layer, dtype=dtype))
            assert y.dtype == layer.effective_weight().dtype == layer.weight.dtype == dtype
            for p in map(layer.get_parameter, choice):
                assert p.dtype == torch.float32 and torch.equal(p, torch.full(p.shape, start))

ALONE = """
import importlib.util, multipliers, torch
assert importlib.util.find_spec("kernel") is None
layer, x = multipliers.MultiplierLinear(4, 7, row=True, column=True), torch.randn(3, 4)
layer(x).sum().backward()
assert layer.row.grad.shape == (7,) and torch.allclose(multipliers.merge(layer)(x), layer(x))
"""

def test_the_file_works_alone(tmp_path):
    """A copy of multipliers.py runs forward, backward and merge where there is no kernel.py."""
    shutil.copy(multipliers.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": ""})

# ---------------------------------------------------------------- merge
MODULES = {(Layer, *choice): partial(make, Layer, choice) for Layer in PLAIN for choice in CHOICES}
MODULES |= {(GPT, kind): partial(tiny, multipliers=kind) for kind in ("none", "scalar", "vector")}
MODULES["twice",] = lambda: nn.Sequential(*[make(MultiplierLinear, ("row",), 4, 4)] * 2)

def check_merge(key):
    module = randomise(MODULES[key]()).eval()
    next(module.parameters()).requires_grad_(False)
    x = inputs(module)
    y = module(x)
    merged = multipliers.merge(module)
    assert {type(m) for m in merged.modules()}.isdisjoint(PLAIN) and not merged.training
    frozen, *others = (not p.requires_grad for p in merged.parameters())
    assert frozen and not any(others)
    close(merged(x), y)                                                # measured: 0
    # Changes of the merged module do not reach the module.
    for p in merged.parameters():
        p.data.add_(1)
    close(module(x), y, 0)

@pytest.mark.parametrize("key", MODULES)
def test_merge(key):
    """merge gives plain layers, bias included, that compute the same and share no memory with the
    original. A frozen weight stays frozen. A layer on its own can be merged, and a layer in two
    places is merged in both."""
    check_merge(key)

def without_column(module, right=multipliers.merge):
    module = copy.deepcopy(module)
    module.column = None
    return right(module)

@pytest.mark.parametrize("key, place, name, mutant", [
    # forgotten: c, the copy of the model, the second place
    ((MultiplierLinear, "column"), multipliers, "merge", without_column),
    ((GPT, "vector"), multipliers, "copy", mock.Mock(deepcopy=lambda model: model)),
    (("twice",), multipliers, "merge",
     lambda m, right=multipliers.merge: nn.Sequential(right(m[0]), m[1]))])
def test_mutants_of_merge_fail(key, place, name, mutant, monkeypatch):
    """A merge that forgets one of its duties fails."""
    assert_mutant_fails(lambda: check_merge(key), monkeypatch, place, name, mutant)

def test_tied_weights():
    """Two plain layers with one weight stay tied. A weight that is tied to a weight with
    multipliers is a ValueError: W_eff and W would need one memory."""
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    merged = multipliers.merge(model)
    assert merged["head"].weight is merged["embedding"].weight
    multipliers.add_multipliers(model)
    with pytest.raises(ValueError, match="head.weight is tied"):
        multipliers.merge(model)

# ---------------------------------------------------------------- any model
def plain_model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    return nn.ModuleDict({"table": nn.Embedding(7, 4), "body": body, "lm_head": nn.Linear(4, 7)})

def run(model, tokens=torch.tensor([0, 3, 3, 6])):
    return model["lm_head"](model["body"](model["table"](tokens)))

@pytest.mark.parametrize("kind, shapes", [("vector", [(7,), (4,), (6,), (4,), (4,), (6,)]),
                                          ("scalar", [()] * 3)])
def test_add_multipliers(kind, shapes):
    """add_multipliers keeps the weights, as objects, and the function. All layers but the head get
    multipliers, or those that `where` picks."""
    model = plain_model()
    weights, y = list(model.parameters()), run(model)
    assert multipliers.add_multipliers(model, kind) is model
    assert {id(p) for p in weights} <= {id(p) for p in model.parameters()}
    assert torch.equal(run(model), y) and type(model["lm_head"]) is nn.Linear
    found = {name: p.shape for name, p in model.named_parameters() if is_multiplier(name)}
    assert sorted(found.values()) == sorted(torch.Size(shape) for shape in shapes)
    chosen = multipliers.add_multipliers(plain_model(), kind, where=lambda name: name == "body.0")
    assert {name.rsplit(".", 1)[0] for name in chosen.state_dict() if is_multiplier(name)} == {
        "body.0"}

def test_state_of_a_plain_model_loads():
    """The state of a plain model loads into a multiplier model, whose multipliers become 1."""
    plain, model = plain_model(), randomise(multipliers.add_multipliers(plain_model())).float()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(run(model), run(plain))

def test_optimizer_groups_of_a_frozen_model():
    """Only the multipliers of a frozen model are in a group, with the settings of their kind."""
    model = multipliers.add_multipliers(plain_model().requires_grad_(False))
    kind_of = lambda name: "multiplier" if is_multiplier(name) else "other"
    kinds = {"multiplier": {"lr": 1e-2}, "other": {"lr": 1e-3}}
    learned = [p for name, p in model.named_parameters() if is_multiplier(name)]
    (group,) = multipliers.optimizer_groups(model, kinds, kind_of)
    assert group == {"lr": 1e-2, "kind": "multiplier", "params": learned}

def test_transformers_llama(tmp_path):
    """Llama of the library transformers: multipliers keep the logits. After merge, save and load, a
    plain Llama has the logits of the model with multipliers."""
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
                                      num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, tie_word_embeddings=False)
    plain, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(12)[None] % 5
    model = multipliers.add_multipliers(copy.deepcopy(plain))
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    randomise(model).float()
    multipliers.merge(model).save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(plain(tokens).logits, model(tokens).logits, atol=1e-5)   # measured: 1e-6

# ---------------------------------------------------------------- the kernel
def check_kernel():
    for choice, autocast in product(CHOICES, (False, True)):
        layer = randomise(make(MultiplierLinear, choice)).float()
        x = inputs(layer, dtype=torch.float32)
        with (torch.autocast("cpu", torch.bfloat16, enabled=autocast),
              mock.patch.object(kernel, "scale", wraps=kernel.scale) as op):
            y = layer(x)
            assert not op.called
            multipliers.use_kernel(layer)
            assert torch.equal(layer(x), y)
        dtype = torch.bfloat16 if autocast else torch.float32
        assert [call.args[3] for call in op.call_args_list] == ([dtype] if choice else [])

def test_kernel_gives_the_same_bits(monkeypatch, right=MultiplierLinear.fused_weight):
    """use_kernel changes no bit of the output on a CPU. Under autocast the op casts to bfloat16. A
    layer without multipliers does not call the op."""
    def without_autocast(layer, device):
        with torch.autocast(device, enabled=False):
            return right(layer, device)
    without_scalar = lambda m, device: right(m, device) / (1 if m.scalar is None else m.scalar)
    for mutant in (without_autocast, without_scalar):
        assert_mutant_fails(check_kernel, monkeypatch, MultiplierLinear, "fused_weight", mutant)

# ---------------------------------------------------------------- placement

@pytest.mark.parametrize("first, second, period, redundant", [
    # A head has 4 rows, of which (0, 2) and (1, 3) are rotary pairs. SiLU follows the gate.
    ("attn.q.row", "attn.k.row", 2, True), ("attn.q.row", "attn.k.row", 8, False),
    ("attn.v.row", "attn.out.column", 8, True), ("mlp.up.row", "mlp.down.column", 32, True),
    ("mlp.gate.row", "mlp.down.column", 32, False),
    ("mlp_norm.gain", "mlp.gate.column mlp.up.column", 8, True),
    ("attn_norm.gain", "attn.q.column attn.k.column attn.v.column", 8, True),
    ("attn_norm.gain", "attn.q.column attn.k.column", 8, False)])
def test_redundant_pairs(first, second, period, redundant):
    """Multipliers a and b are redundant if a * t and b / t give the same logits. The
    symmetry-free placement keeps one side of each redundant pair."""
    model = randomise(tiny())
    tokens, block = inputs(model), model.blocks[0]
    before, a = model(tokens)[0], block.get_parameter(first)
    t = torch.linspace(0.5, 2, period, dtype=torch.float64).repeat(len(a) // period)
    a.data.mul_(t)
    for name in second.split():
        block.get_parameter(name).data.div_(t)
    # measured, for logits of size 0.1: 2e-16 for the redundant pairs, at least 5e-3 for the others
    assert ((model(tokens)[0] - before).abs().max() < 1e-14) == redundant
    kept = tiny(placement="symmetry_free").blocks[0].state_dict()
    assert not redundant or (first in kept) != any(name in kept for name in second.split())

# ---------------------------------------------------------------- the law: simulated, then solved
# RMS(W)^2 comes e times closer to the equilibrium in 125 steps.
LR, WEIGHT_DECAY = 0.01, 0.4

def sgd(params, lr, weight_decay, momentum):
    """SGD whose weight decay acts on W. torch's SGD adds the decay to the gradient."""
    def decay(*_):
        params[0].data.mul_(1 - lr * weight_decay)
    optimizer = torch.optim.SGD(params, lr, momentum)
    optimizer.register_step_pre_hook(decay)
    return optimizer

# name: (the optimizer, the arguments beta and update_rms of equilibrium_rms)
OPTIMIZERS = {
    "sgd": (partial(sgd, momentum=0), dict(beta=0.0, update_rms=1.0)),
    "momentum": (partial(sgd, momentum=0.9), dict(beta=0.9, update_rms=(1 - 0.9 ** 2) ** -0.5)),
    "adamw": (partial(torch.optim.AdamW, betas=(0.9, 0.95)), dict(beta=0.9)),
}

@cache
def simulate(optimizer, lr=LR, weight_decay=WEIGHT_DECAY, steps=2000, start=0.0, shape=(96, 96)):
    """The means of W^2 and u^2 after each step on gradients of pure N(0, 1) noise: [steps, 2]."""
    W, means = nn.Parameter(torch.full(shape, start)), []
    optimizer = optimizer([W], lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        before, W.grad = W.detach().clone(), torch.randn(shape, generator=generator)
        optimizer.step()
        u = ((1 - lr * weight_decay) * before - W.detach()) / lr
        means.append([x.square().mean().item() for x in (W, u)])
    return np.array(means)

def check_law(name):
    optimizer, settings = OPTIMIZERS[name]
    law = multipliers.equilibrium_rms(LR, WEIGHT_DECAY, **settings)
    # measured / law - 1: sgd -0.0015, momentum -0.0014, adamw -0.011
    assert math.sqrt(simulate(optimizer)[1000:, 0].mean()) == pytest.approx(law, rel=0.015)

@pytest.mark.parametrize("name, mutant", [
    ("sgd", lambda lr, wd, **_: math.sqrt(lr / wd)),
    ("adamw", lambda lr, wd, **_: math.sqrt(lr / wd)),
    ("momentum", lambda lr, wd, beta, **U: equilibrium_rms(lr, wd, beta=0, **U))])
def test_noise_and_decay_settle_at_the_law(name, mutant, monkeypatch):
    """On pure noise, RMS(W) goes from 0 to equilibrium_rms. sqrt(lr / weight_decay) without the 2
    fails, and so does a law that takes the updates of momentum for uncorrelated."""
    check = partial(check_law, name)
    assert_mutant_fails(check, monkeypatch, multipliers, "equilibrium_rms", mutant)

@pytest.mark.parametrize("name", OPTIMIZERS)
def test_relaxation_time(name):
    """The distance of RMS(W)^2 from equilibrium shrinks as exp(-step / relaxation_steps)."""
    optimizer, settings = OPTIMIZERS[name]
    rest = equilibrium_rms(LR, WEIGHT_DECAY, **settings)
    excess = simulate(optimizer, steps=250, start=10 * rest)[:, 0] - rest ** 2
    slope = np.polyfit(np.arange(250), np.log(excess), 1)[0]
    # measured / formula - 1: at most 0.001. The formula is exact for small lr * weight_decay.
    assert -1 / slope == pytest.approx(relaxation_steps(LR, WEIGHT_DECAY), rel=0.01)

def test_update_rms_of_muon():
    """The RMS of an entry of Muon's update is U = 0.17 on pure noise."""
    U = simulate(Muon, shape=(32, 64))[1000:, 1].mean() ** 0.5
    assert U == pytest.approx(0.17, abs=0.005)                         # measured: 0.168
