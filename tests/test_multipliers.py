"""Tests of multipliers.py, in the order of that file: law, layer, merge, other people's models.

Each test states one property in its docstring. A mutant is the code with a small slip:
`assert_mutant_fails` runs a check with the right code and expects it to fail with the mutant.

    python -m pytest -m multipliers
"""
import copy
import math
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import multipliers
from conftest import assert_mutant_fails
from multipliers import (Multipliers, add_multipliers, attach_multipliers, equilibrium_rms,
                         is_multiplier, law_rms, merge, multipliers_of, raw_weight,
                         relaxation_steps)
from muon import Muon

pytestmark = pytest.mark.multipliers

# An operation in float64 rounds by at most 2^-53 = 1.1e-16 of its result. No number here goes
# through more than 1000 operations, and none is larger than 1000: 1000 * 1000 * 1.1e-16 = 1.1e-10.
ROUNDING = 2e-10


def close(got, want, what):
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING, msg=what)


# ---------------------------------------------------------------- the law
# We simulate a matrix whose gradients are pure noise. RMS(W)^2 comes e times closer to its
# equilibrium in 1 / (2 * LR * WEIGHT_DECAY) = 25 steps.
LR = 0.01
WEIGHT_DECAY = 2.0
# An optimizer, what equilibrium_rms has to know of it, and the lowest RMS(W) / law. AdamW's beta2
# takes 1 to 2 %, and Muon a quarter, as the docstring of equilibrium_rms says. (torch's SGD adds
# the decay to the gradient. Without momentum this is the same as decay of W.)
OPTIMIZERS = {
    "SGD": (SGD, {"beta": 0.0, "update_rms": 1.0}, 1.0),
    "AdamW": (partial(AdamW, betas=(0.9, 0.95)), {"beta": 0.9}, 0.98),
    "Muon": (Muon, {"beta": 0.95, "update_rms": 0.17}, 0.75),
}
EACH_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


def mean_squares(name, start, steps):
    """RMS(W)^2 after each step, for W [96, 96] that begins with all entries equal to `start`."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.full((96, 96), start))
    optimizer = OPTIMIZERS[name][0]([W], lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        W.grad = torch.randn(96, 96)
        optimizer.step()
        yield W.detach().square().mean().item()


def check_law(name):
    # W comes to rest in 8 relaxation times. Its RMS is measured over the next 8.
    squares = list(mean_squares(name, 0.0, 400))[200:]
    _, settings, lowest = OPTIMIZERS[name]
    law = multipliers.equilibrium_rms(LR, WEIGHT_DECAY, **settings)
    ratio = math.sqrt(sum(squares) / 200) / law
    # In 8 relaxation times each entry takes 4 independent values. Those of 96^2 entries give the
    # RMS with a standard error of 1 / sqrt(2 * 4 * 96^2) = 0.4 %. We allow 3 of them.
    assert lowest - 0.012 < ratio < 1.012, f"RMS(W) / law = {ratio}"


@EACH_OPTIMIZER
def test_noise_and_decay_settle_at_the_law(name):
    """On pure noise RMS(W) goes from 0 to equilibrium_rms; with Muon, to at most a quarter less."""
    check_law(name)


def without_the_2(lr, weight_decay, beta):
    return math.sqrt(2) * equilibrium_rms(lr, weight_decay, beta=beta)


def without_memory(lr, weight_decay, beta):
    # U = sqrt((1 - beta) / (1 + beta)) = 0.229
    return equilibrium_rms(lr, weight_decay, beta=0, update_rms=0.229)


@pytest.mark.parametrize("mutant", [without_the_2, without_memory])
def test_mutants_of_the_law_fail(mutant, monkeypatch):
    """sqrt(lr / weight_decay) fails, and so does a law that takes the updates of momentum for
    independent of each other."""
    assert_mutant_fails(
        partial(check_law, "AdamW"), monkeypatch, multipliers, "equilibrium_rms", mutant, "RMS")


def test_special_cases_of_the_law():
    """Decay by lr * weight_decay = 1 leaves nothing but the last update, of size lr U. For AdamW
    and small lr * weight_decay, the law is sqrt(lr / (2 weight_decay))."""
    U = 3.0
    assert equilibrium_rms(0.5, 2.0, beta=0.9, update_rms=U) == pytest.approx(0.5 * U)
    # The next term of the series is 4.5 * lr * weight_decay.
    assert equilibrium_rms(1e-4, 1e-2) == pytest.approx(law_rms(1e-4, 1e-2), rel=5e-6)


@EACH_OPTIMIZER
def test_relaxation_time(name):
    """A much too large RMS(W)^2 shrinks by exp(-steps / relaxation_steps)."""
    squares = list(mean_squares(name, 100.0, 25))
    # With x = lr * weight_decay it is (1 - x)^(2 * 25) = exp(-1 - x / 2 ...). The noise adds
    # about (RMS at rest / 100)^2, less than 1e-5.
    want = math.exp(-25 / relaxation_steps(LR, WEIGHT_DECAY))
    assert squares[-1] / 100.0**2 == pytest.approx(want, rel=LR * WEIGHT_DECAY)


# ---------------------------------------------------------------- the layer
VECTOR = {"row": True, "column": True}
CHOICES = [{}, {"scalar": True}, {"row": True}, {"column": True}, VECTOR, VECTOR | {"scalar": True}]


def randomise(module):
    """The module in float64, with random numbers between 0.5 and 1.5 as multipliers."""
    torch.manual_seed(1)
    for name, p in module.double().named_parameters():
        if is_multiplier(name):
            nn.init.uniform_(p, 0.5, 1.5)
    return module


def linear(chosen):
    """A layer with random multipliers. W is square, so that wrong formulas fit, too."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    attach_multipliers(layer, **chosen)
    return randomise(layer)


def check_gradients(given, WG):
    """Eq. 4, multiplied by the multiplier: r_i dL/dr_i is the sum over j of W_eff_ij G_ij, and the
    same for s and c_j. WG [out, in] has the numbers W_eff_ij G_ij."""
    sums = {"scalar": WG.sum(), "row": WG.sum(1), "column": WG.sum(0)}
    for name, p in given.items():
        assert p.grad is not None, f"no gradient for {name}"
        close(p * p.grad, sums[name], f"gradient of {name}")


def check_equations(chosen):
    layer = linear(chosen)
    given = multipliers_of(layer)
    W = raw_weight(layer)
    # A multiplier that the layer does not have counts as 1.
    ones = W.new_ones(5)
    r = given.get("row", ones)
    c = given.get("column", ones)
    W_eff = given.get("scalar", 1.0) * torch.diag(r) @ W @ torch.diag(c)
    close(layer.weight, W_eff, "W_eff")
    # This loss has the gradient dL/dW_eff = G.
    G = torch.randn_like(W)
    (layer.weight * G).sum().backward()
    WG = W_eff * G
    close(W * W.grad, WG, "gradient of W")
    check_gradients(given, WG)


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_layer_is_equations_2_to_4(chosen):
    """layer.weight is s diag(r) W diag(c), or a part of it. Autograd gives the sums of eq. 4."""
    check_equations(chosen)


def swapped(self, W):
    return self.column[:, None] * W * self.row


def without_column(self, W):
    return self.row[:, None] * W


def with_fixed_column(self, W):
    return self.row[:, None] * W * self.column.detach()


@pytest.mark.parametrize("mutant, words", [
    (swapped, "W_eff"), (without_column, "W_eff"), (with_fixed_column, "no gradient for column")])
def test_mutants_of_the_layer_fail(mutant, words, monkeypatch):
    """r and c exchanged, c forgotten and c without a gradient fail."""
    assert_mutant_fails(
        partial(check_equations, VECTOR), monkeypatch, Multipliers, "forward", mutant, words)


@pytest.mark.parametrize("Layer", [nn.Linear, nn.Embedding])
def test_new_multipliers(Layer):
    """Multipliers start at 1, so W_eff has the bits of W. W stays the same parameter, under the
    name that PyTorch's parametrizations give it."""
    layer = Layer(4, 7)
    W = layer.weight
    assert raw_weight(layer) is W and multipliers_of(layer) == {}
    attach_multipliers(layer, **VECTOR)
    assert raw_weight(layer) is W and torch.equal(layer.weight, W)
    names = [name for name, _ in layer.named_parameters() if is_multiplier(name)]
    assert names == ["parametrizations.weight.0.row", "parametrizations.weight.0.column"]
    # A layer may be called "row".
    assert not is_multiplier("blocks.0.row.weight") and not is_multiplier("blocks.0.row")


def check_dtype(dtype):
    layer = nn.Linear(5, 5, dtype=dtype)
    attach_multipliers(layer, row=True)
    nn.init.constant_(multipliers_of(layer)["row"], 1.001)
    layer.to(dtype)
    row = multipliers_of(layer)["row"]
    assert torch.equal(row, torch.full((5,), 1.001)), "the multipliers were rounded"
    # PyTorch multiplies only matrices of one dtype.
    layer(torch.ones(3, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_multipliers_stay_in_float32(dtype, monkeypatch):
    """Beside W in bfloat16 or float16 the multipliers are float32: the bfloat16 numbers next to 1
    are 0.996 and 1.008, so that the small steps of training would be lost."""
    assert_mutant_fails(partial(check_dtype, dtype), monkeypatch,
                        Multipliers, "_apply", nn.Module._apply, "rounded")


def test_products_are_made_in_float32():
    """s * W with W in bfloat16 is rounded once, at its end. PyTorch alone would round s before."""
    layer = nn.Linear(50, 50, dtype=torch.bfloat16)
    attach_multipliers(layer, scalar=True)
    nn.init.constant_(multipliers_of(layer)["scalar"], 1.006)
    W = raw_weight(layer).detach().float()
    assert torch.equal(layer.weight, (1.006 * W).bfloat16())


def test_autocast():
    """Under autocast a layer computes in bfloat16, and the gradient reaches the multipliers."""
    layer = linear(VECTOR).float()
    x = torch.ones(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # y is the sum of 6 numbers, which are at most 1 in size. They and y are rounded by at most 2^-9
    # of their size.
    assert (y - layer(x)).abs().max() < (6 + 6) * 2**-9
    y.sum().backward()
    assert multipliers_of(layer)["row"].grad.any()


def test_meta_device():
    """A layer that is made without memory can get multipliers. After to_empty, reset_parameters
    sets them to 1."""
    layer = nn.Linear(4, 7, device="meta")
    attach_multipliers(layer, row=True)
    layer.to_empty(device="cpu")
    layer.parametrizations.weight[0].reset_parameters()
    assert torch.equal(multipliers_of(layer)["row"], torch.ones(7))


# ---------------------------------------------------------------- a model of somebody else
X = torch.linspace(-2, 3, 40).view(2, 5, 4).double()
TOKENS = torch.tensor([0, 3, 1, 3, 2])


def add_size(layer, args, y):
    """A hook that reads the weight."""
    return y + layer.weight.sum()


class Foreign(nn.Module):
    """Layers that read their weights in different ways. `mixer` belongs to no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4, padding_idx=3)
        self.mixer = nn.Parameter(torch.ones(4, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.register_forward_hook(add_size)
        self.double()


def with_multipliers():
    """A Foreign whose layers all have random multipliers."""
    model = Foreign()
    add_multipliers(model, where=lambda name: True)
    return randomise(model)


def weight_read_by_its_owner(model, x):
    return F.linear(x, model.body.weight)


def head_tied_by_a_function(model, x):
    return (x + model.table(TOKENS)) @ model.table.weight.T


def layer_used_twice(model, x):
    return model.body(model.body(x).tanh())


def layer_with_a_hook(model, x):
    return model.head(x)


def layer_checkpointed(model, x):
    # The backward pass computes the layer again.
    return checkpoint(model.body, x, use_reentrant=False)


def attention(model, x):
    # It hands out_proj.weight to a function.
    return model.block.self_attn(x, x, x)[0]


def encoder_layer(model, x):
    # In eval mode and without gradients this is one call, the "fast path".
    return model.block(x)


def check_way(read):
    model = with_multipliers()
    # The plain model has W_eff as its weights, and dL/dW_eff as their gradients.
    plain = merge(model)
    y = read(plain, X)
    y.square().sum().backward()
    close(read(model, X), y, "in training")
    read(model, X).square().sum().backward()
    for name, W_eff in plain.named_parameters():
        if W_eff.grad is not None and W_eff.ndim == 2:
            layer = model.get_submodule(name.rpartition(".")[0])
            check_gradients(multipliers_of(layer), W_eff * W_eff.grad)
    saved = with_multipliers()
    nn.init.zeros_(multipliers_of(saved.body)["row"])
    saved.load_state_dict(model.state_dict())
    close(read(saved, X), y, "loaded from a state dict")
    with torch.no_grad():
        close(read(copy.deepcopy(model), X), y, "a copy, without gradients")
        close(read(model.eval(), X), y, "in eval mode")


@pytest.mark.parametrize("read", [
    weight_read_by_its_owner, head_tied_by_a_function, layer_used_twice, layer_with_a_hook,
    layer_checkpointed, attention, encoder_layer])
def test_way_to_read_a_weight(read):
    """Whichever way a model reads its weights, it gets W_eff: in training, without gradients, as a
    copy, from a state dict and merged. The gradients reach the multipliers."""
    check_way(read)


def only_in_training(self, W, right=Multipliers.forward):
    return right(self, W) if self.training else W


def test_multipliers_that_act_only_in_training_fail(monkeypatch):
    """This mutant fails in nn.TransformerEncoderLayer, whose fast path is really taken."""
    check = partial(check_way, encoder_layer)
    assert_mutant_fails(check, monkeypatch, Multipliers, "forward", only_in_training, "in eval")
    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            check()


def test_compile():
    """torch.compile makes one graph of a model with multipliers; with fullgraph, it may not fall
    back to Python."""
    model = with_multipliers()
    compiled = torch.compile(layer_used_twice, backend="eager", fullgraph=True)
    close(compiled(model, X), layer_used_twice(model, X), "compiled")


# ---------------------------------------------------------------- merge
def check_merge():
    model = with_multipliers().eval()
    raw_weight(model.body).requires_grad_(False)
    y = layer_used_twice(model, X)
    merged = multipliers.merge(model)
    close(layer_used_twice(merged, X), y, "the function has changed")
    # The model itself is as before, also after a change of the merged one.
    for p in merged.parameters():
        p.data.add_(1)
    assert hasattr(model.body, "weight"), "the model has lost its weight"
    close(layer_used_twice(model, X), y, "memory is shared")
    # The merged model has plain layers, is in eval mode, and the same weight is frozen.
    assert str(merged) == str(Foreign()) and not merged.body.training
    frozen = [name for name, p in merged.named_parameters() if not p.requires_grad]
    assert frozen == ["body.weight"]
    # The model can be merged again, and what is merged can be, too.
    again = multipliers.merge(multipliers.merge(model))
    close(layer_used_twice(again, X), y, "the second merge differs")


def test_merge():
    """merge gives a copy with plain layers and the same function, which shares no memory with the
    model. A frozen weight stays frozen, and a model in eval mode stays in it."""
    check_merge()


def merge_without_column(model):
    model = copy.deepcopy(model)
    nn.init.ones_(multipliers_of(model.body)["column"])
    return merge(model)


def merge_with_shared_bias(model):
    merged = merge(model)
    merged.body.bias = model.body.bias
    return merged


def merge_by_pytorch(model):
    # It deletes `weight` from a class that the copied layer shares with the original.
    merged = copy.deepcopy(model)
    parametrize.remove_parametrizations(merged.body, "weight")
    return merged


@pytest.mark.parametrize("mutant, words", [
    (merge_without_column, "function"), (merge_with_shared_bias, "memory"),
    (merge_by_pytorch, "lost its weight")])
def test_mutants_of_merge_fail(mutant, words, monkeypatch):
    """A merge fails that forgets c, shares a bias, or breaks the model by PyTorch's own way to
    remove a parametrization."""
    assert_mutant_fails(check_merge, monkeypatch, multipliers, "merge", mutant, words)


def test_merge_without_a_copy_fails(monkeypatch):
    """A merge that changes the model itself fails."""
    assert_mutant_fails(check_merge, monkeypatch, copy, "deepcopy", lambda model: model, "memory")


# ---------------------------------------------------------------- add_multipliers
def test_add_multipliers():
    """All layers but the head, which is the linear layer defined last, get vector multipliers.
    The sentence names the matrices that have none, also those outside of layers."""
    model = Foreign()
    sentence = add_multipliers(model)
    assert sentence == ("multipliers on 5 of 8 matrices; left out: mixer, "
                        "block.self_attn.in_proj_weight, head.weight")
    assert list(multipliers_of(model.table)) == ["row", "column"]


def test_choices_of_add_multipliers():
    """`where` picks the layers, the head included. The kind "scalar" gives one number each, "both"
    adds the vectors."""
    model = Foreign()
    add_multipliers(model, "scalar", where=lambda name: name == "head")
    assert list(multipliers_of(model.head)) == ["scalar"] and not multipliers_of(model.body)
    add_multipliers(model, "both", where=lambda name: name == "body")
    assert list(multipliers_of(model.body)) == ["scalar", "row", "column"]


def test_add_multipliers_to_one_layer():
    """A model may be one layer. All of its matrices can have multipliers: none is left out."""
    table = nn.Embedding(5, 4)
    assert add_multipliers(table) == "multipliers on 1 of 1 matrices; left out: none"
    assert list(multipliers_of(table)) == ["row", "column"]


class Doubled(nn.Module):
    """Somebody else's parametrization."""

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.ones(5))

    def forward(self, W):
        return 2 * W


def test_other_parametrizations_are_left_alone():
    """The parameters of another parametrization are no multipliers, and merge keeps it."""
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert multipliers_of(layer) == {}
    assert parametrize.is_parametrized(merge(layer), "weight")


def integers(layer):
    layer.weight = nn.Parameter(torch.ones(4, 4).char(), requires_grad=False)


def parametrize_bias(layer):
    # merge would lose such a bias.
    parametrize.register_parametrization(layer, "bias", nn.Identity())


COMPUTED = [
    nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm,
    parametrize_bias, integers,
    partial(prune.l1_unstructured, name="weight", amount=0.5),
    partial(attach_multipliers, row=True)]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("spoil", COMPUTED)
def test_a_weight_that_is_computed_is_an_error(spoil):
    """A weight that is computed from other tensors (also by multipliers) or consists of integers is
    a ValueError with the name of the layer. No layer has changed then."""
    model = Foreign()
    spoil(model.body)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="^body.weight is computed from other tensors.*where"):
        add_multipliers(model)
    assert list(model.state_dict()) == before


def test_other_errors_of_add_multipliers():
    """Tied layers, an unknown kind and a model that is wrapped already are ValueErrors."""
    model = Foreign()
    model.head.weight = model.table.weight
    with pytest.raises(ValueError, match="^table.weight is tied to head.weight: untie.*where"):
        add_multipliers(model)
    with pytest.raises(ValueError, match="kind is 'vector', 'scalar' or 'both', not 'row'"):
        add_multipliers(model, "row")
    # Its constructor would want other processes.
    with pytest.raises(ValueError, match="add multipliers first"):
        add_multipliers(DistributedDataParallel.__new__(DistributedDataParallel))


def test_transformers_llama(tmp_path):
    """After merge, save and load, a plain Llama of the library transformers has the logits of the
    model with multipliers."""
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.arange(12)[None]
    add_multipliers(model)
    randomise(model).float()
    merge(model).save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    # float32 rounds by 6e-8. A logit, of size 1, depends on some 1000 numbers: 6e-8 * sqrt(1000).
    assert (plain(tokens).logits - model(tokens).logits).abs().max() < 1e-5
