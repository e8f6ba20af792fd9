"""Tests of common.py and of the figure scripts: pytest test_common.py. No network, no data."""
import argparse
import copy
import importlib
import itertools
import json
import math
import multiprocessing.connection
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from common import (DataError, StochasticConv2d, StochasticLinear, add_clutter,
                    alpha_from_information, beta_at, channel_statistics,
                    corrupt_labels, draw_subset, g, ib_loss, load_celeba, load_cifar10,
                    load_images, load_mnist, minibatches, sample_weights, synthetic_digits,
                    synthetic_faces, synthetic_objects, to_stochastic, weight_information,
                    with_information)

HERE = Path(__file__).resolve().parent
NOISES = pytest.mark.parametrize(
    "noise, local", [*itertools.product(("gaussian", "lognormal"), (True, False))])
KINDS = pytest.mark.parametrize("kind", ["linear", "conv"])
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(kind, **options):
    if kind == "linear":
        return StochasticLinear(6, 4, **options), torch.randn(3, 6)
    layer = StochasticConv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular",
                             **options)
    return layer, torch.randn(3, 4, 5, 5)


# === 1. Stochastic layers

@KINDS
@NOISES
def test_outputs_have_the_mean_and_variance_of_the_noise(kind, noise, local):
    layer, x = make_layer(kind, noise=noise, local=local, log_alpha=-1.5)
    draws = torch.stack([layer(x) for _ in range(4000)]).detach()
    alpha = math.exp(-1.5)
    variance_of_eps = alpha if noise == "gaussian" else math.expm1(alpha)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(variance_of_eps * layer.weight**2)
        plain.bias.zero_()
        variance = plain.eval()(x**2)
        error = (draws.mean(0) - layer.eval()(x)) / (variance / len(draws)).sqrt()
    assert error.abs().max() < 5
    ratio = draws.var(0) / variance
    assert (ratio - 1).abs().max() < 0.25 and ratio.mean().sub(1).abs() < 0.02


@KINDS
@pytest.mark.parametrize("noise", ["gaussian", "lognormal"])
def test_local_noise_is_independent_across_the_batch_and_sampled_weights_are_shared(kind, noise):
    layer, x = make_layer(kind, noise=noise, local=True, log_alpha=-1.0)
    x = x[:1].repeat(2, *[1] * (x.dim() - 1))
    draws = torch.stack([layer(x) for _ in range(3000)]).detach()
    first, second = (draws - draws.mean(0)).unbind(1)
    correlation = (first * second).mean(0) / (first.var(0) * second.var(0)).sqrt()
    assert correlation.abs().max() < 5 / math.sqrt(3000)
    layer.local = False
    first, second = layer(x)
    assert torch.allclose(first, second, atol=1e-6)


def naive_kl(weight, log_sigma2):
    """The formula as it is printed in Molchanov et al. 2017, left to autograd."""
    log_alpha = log_sigma2 - torch.log(weight**2)
    sigmoid = torch.sigmoid(1.87320 + 1.48695 * log_alpha)
    return (0.63576 * (1 - sigmoid) + 0.5 * torch.log1p(torch.exp(-log_alpha))).sum()


def test_gaussian_information_is_the_formula_of_molchanov_with_its_gradient():
    layer = StochasticLinear(20, 30, dtype=torch.double)
    layer.log_alpha = 4 * torch.randn(30, 20, dtype=torch.double)
    layer.information().backward()
    weight, log_sigma2 = (p.detach().clone().requires_grad_()
                          for p in (layer.weight, layer.log_sigma2))
    naive = naive_kl(weight, log_sigma2)
    naive.backward()
    assert layer.information().item() == pytest.approx(naive.item(), rel=1e-6)
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-6)
    assert torch.allclose(layer.log_sigma2.grad, log_sigma2.grad, rtol=1e-6)


def test_gradients_of_the_noise_are_those_of_the_formulas():
    mean, variance = (torch.rand(6, dtype=torch.double).requires_grad_() for _ in range(2))

    def noisy(mean, variance):
        torch.manual_seed(3)
        return common._GaussianNoise.apply(mean, variance)

    assert torch.autograd.gradcheck(noisy, (mean, variance))
    x = torch.linspace(-3, 3, 6, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: common._CappedExp.apply(x, 0.5), x)
    beyond = torch.tensor(30.0, requires_grad=True)
    common._CappedExp.apply(beyond, 0.5).backward()
    assert beyond.grad.item() == pytest.approx(0.5 * math.exp(0.5 * common.MAX_LOG_SIGMA2))


@NOISES
def test_a_cap_on_alpha_holds_in_value_and_lets_the_gradient_pass(noise, local):
    layer = StochasticLinear(5, 3, noise=noise, local=local, log_alpha=4.0, max_log_alpha=0.5)
    capped = StochasticLinear(5, 3, noise=noise, local=local, max_log_alpha=0.5)
    capped.load_state_dict(layer.state_dict())
    capped.log_alpha = 0.5
    x, grads = torch.randn(7, 5), []
    assert (layer.log_alpha == 0.5).all() and layer.information().abs() < 1e-4
    for some in (layer, capped):
        torch.manual_seed(1)
        nats = some.information() if noise == "gaussian" else 0
        (some(x).square().sum() + nats).backward()
        grads.append(some.log_sigma2.grad)
    assert torch.allclose(*grads, rtol=1e-3) and grads[0].abs().min() > 0


@NOISES
def test_under_the_cap_the_gradient_of_the_means_is_the_slope(noise, local):
    """There alpha is constant: the noise grows with the weight, the information does not change."""
    layer = StochasticLinear(4, 2, noise=noise, local=local, log_alpha=4.0, max_log_alpha=0.5)
    layer.double()
    x, step = torch.randn(3, 4, dtype=torch.double), 1e-5

    def loss():
        torch.manual_seed(1)
        return layer(x).square().sum() + 10 * layer.information()

    loss().backward()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.weight[1, 2] += sign * step
            ends.append(loss().item())
            layer.weight[1, 2] -= sign * step
    slope = (ends[0] - ends[1]) / (2 * step)
    assert layer.weight.grad[1, 2].item() == pytest.approx(slope, rel=1e-4)


@NOISES
def test_a_layer_with_too_much_noise_learns_less_of_it(noise, local):
    layer = StochasticLinear(20, 1, noise=noise, local=local, log_alpha=0.0)
    optimizer = torch.optim.Adam([layer.log_sigma2], 0.05)
    x = torch.randn(200, 20)
    with torch.no_grad():
        y = F.linear(x, layer.weight, layer.bias)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
    assert layer.log_alpha.mean() < -0.5


@KINDS
@NOISES
@pytest.mark.parametrize("log_alpha", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_values_and_gradients_are_finite_at_extremes(kind, noise, local, log_alpha, scale):
    layer, x = make_layer(kind, noise=noise, local=local, log_alpha=log_alpha)
    with torch.no_grad():
        layer.weight.view(-1)[0] = 0
    x = (scale * x).requires_grad_()
    (layer(x).square().mean() + layer.information()).backward()
    assert layer.information().isfinite()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()


def test_noise_is_drawn_in_train_mode_and_within_sample_weights():
    model = nn.Sequential(StochasticLinear(6, 6), nn.BatchNorm1d(6), StochasticLinear(6, 2)).eval()
    x = torch.randn(8, 6)
    assert torch.equal(model(x), model(x))
    running = model[1].running_mean.clone()
    with sample_weights(model) as same:
        assert same is model and not torch.equal(model(x), model(x))
        with sample_weights(model, draw=False):
            assert torch.equal(model(x), model(x))
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model(x), model(x)) and torch.equal(model[1].running_mean, running)
    model.train()
    assert not torch.equal(model(x), model(x))
    with sample_weights(model, draw=False):
        assert torch.equal(model(x), model(x))


def test_bn_recalibrated_estimates_batch_norm_for_the_weights_measured_and_puts_it_back():
    layer = StochasticLinear(3, 4, local=False, log_alpha=0.0)
    model = nn.Sequential(layer, nn.BatchNorm1d(4)).train()
    x = 2 + torch.randn(400, 3)
    model(x)
    before = copy.deepcopy(model.state_dict())
    outputs = F.linear(x, layer.weight, layer.bias).mean(0)
    with bn_recalibrated(model, [x], draw=False):
        assert not model.training and layer.sampling is False
        assert torch.allclose(model[1].running_mean, outputs, atol=1e-5)
        assert torch.allclose(model(x).mean(0), torch.zeros(4), atol=1e-5)
    with pytest.raises(RuntimeError):
        with bn_recalibrated(model, x.split(200) * 200, draw=True):
            assert layer.sampling is True and not torch.equal(model(x), model(x))
            # variance, between weight samples, of the mean over x of x @ w
            variance = (layer.weight * x.mean(0)).square().sum(1)
            error = (model[1].running_mean - outputs).abs()
            assert (error < 5 * (variance / 400).sqrt()).all()
            raise RuntimeError
    assert layer.sampling is None and model.training and model[1].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_to_stochastic_keeps_the_function_of_torchvision_models(name):
    model = getattr(torchvision.models, name)(weights=None).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before, keys = model(x), set(model.state_dict())
        layers = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
        assert to_stochastic(model) is model
        assert torch.equal(model(x), before)
        with sample_weights(model):
            assert not torch.equal(model(x), before)
    twins = [m for m in model.modules() if isinstance(m, (StochasticLinear, StochasticConv2d))]
    assert len(twins) == layers and keys < set(model.state_dict())
    total = sum(m.information().item() for m in twins)
    assert weight_information(model).item() == pytest.approx(total, rel=1e-5)
    ib_loss(model.train()(x), torch.tensor([1, 2]), model, 1.0, 100)[0].backward()
    for m in twins:
        assert m.log_sigma2.grad.isfinite().all() and m.log_sigma2.grad.abs().sum() > 0


def test_to_stochastic_keeps_every_option_of_a_layer():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False,
                     padding_mode="reflect").double().eval()
    x = torch.randn(1, 4, 9, 9, dtype=torch.double)
    expected, weight = conv(x), conv.weight
    twin = to_stochastic(conv, noise="lognormal", local=True, log_alpha=-3.0)
    assert type(twin) is StochasticConv2d and twin.weight is weight
    assert torch.equal(twin(x), expected) and to_stochastic(twin) is twin
    assert torch.allclose(twin.log_alpha, torch.tensor(-3.0, dtype=torch.double))
    shared = nn.Linear(3, 3)
    model = to_stochastic(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and len(list(model.parameters())) == 3
    assert model[0].local and not to_stochastic(nn.Conv2d(1, 1, 1)).local
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight  # counted once
    once = to_stochastic(tied)[0].information().item()
    assert tied[0].log_sigma2 is tied[1].log_sigma2
    assert weight_information(tied).item() == pytest.approx(once)


def test_to_stochastic_skips_named_layers_and_blocks():
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), block, nn.Linear(2, 2))
    to_stochastic(model, skip=["0", "1"])
    assert [type(m) for m in (model[0], *block)] == [nn.Linear] * 3
    assert type(model[2]) is StochasticLinear
    with pytest.raises(ValueError, match="classifier"):
        to_stochastic(model, skip="classifier")
    with pytest.raises(ValueError, match="uniform"):
        to_stochastic(model, noise="uniform")


def test_checkpoints_copies_and_dtypes(tmp_path):
    def plain():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()

    net, x = plain(), torch.randn(2, 1, 6, 6)
    model = to_stochastic(copy.deepcopy(net), log_alpha=-2.0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin, other = to_stochastic(plain()), plain()
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(twin(x), net(x))
    assert torch.allclose(twin[0].log_alpha, torch.tensor(-2.0), atol=1e-4)
    twin.load_state_dict(other.state_dict())  # of the plain model: keeps alpha, not sigma
    assert torch.equal(twin(x), other(x))
    assert torch.allclose(twin[3].log_alpha, torch.tensor(-2.0), atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).bfloat16()[0].information()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(model[0].information().item(), rel=0.05)


@NOISES
def test_training_step_compiles_and_runs_under_bf16_autocast(noise, local):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    to_stochastic(model, noise=noise, local=local).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = torch.arange(4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y):
        return ib_loss(model(x), y, model, 1.0, 100)

    loss, _, information = compiled(x, y)
    loss.backward()
    assert information.item() == pytest.approx(weight_information(model).item(), rel=1e-5)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss, _, half_information = ib_loss(logits, y, model, 1.0, 100)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and half_information.dtype == torch.float32
    assert half_information.item() == pytest.approx(information.item(), rel=1e-6)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


# === 2. Weight-IB loss

def test_ib_loss_is_mean_cross_entropy_plus_beta_over_n_times_nats():
    model = to_stochastic(nn.Linear(5, 4))
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    loss, cross_entropy, information = ib_loss(logits, labels, model, 0.5, 50)
    expected = -logits.log_softmax(1)[torch.arange(7), labels].mean()
    assert cross_entropy.item() == pytest.approx(expected.item())
    nats = naive_kl(model.weight, model.log_sigma2).item()
    assert information.item() == pytest.approx(nats, rel=1e-4)
    assert loss.item() == pytest.approx((expected + 0.5 * information / 50).item())
    attributes = torch.randint(2, (7, 4))  # summed over
    bernoulli = torch.distributions.Bernoulli(logits=logits)
    expected = -bernoulli.log_prob(attributes.float()).sum(1).mean()
    assert ib_loss(logits, attributes, model, 0.0, 7)[0].item() == pytest.approx(expected.item())
    for beta, n in ((-1.0, 10), (1.0, 0), (math.nan, 1)):
        with pytest.raises(ValueError):
            ib_loss(logits, labels, model, beta, n)
    with pytest.raises(ValueError, match="no stochastic layer"):
        weight_information(nn.Linear(3, 3))


def test_with_information_trains_as_ib_loss_does():
    net = to_stochastic(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 4)))
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8) % 4
    gradients = []
    for together in (True, False):
        torch.manual_seed(1)
        if together:
            logits, information = with_information(net, x)(x)
            loss = F.cross_entropy(logits, y) + 0.5 / 8 * information
        else:
            loss, _, _ = ib_loss(net(x), y, net, beta=0.5, n=8)
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_on_a_gpu_with_information_is_a_graph_over_a_copy_of_the_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda both, args: (both, args))
    batch = argparse.Namespace(device=torch.device("cuda"), clone=lambda: "copy")
    both, args = with_information(net := to_stochastic(nn.Linear(2, 2)), batch)
    assert args == ("copy",)  # a graph overwrites its input
    assert {id(p) for p in both.parameters()} == {id(p) for p in net.parameters()}
    assert isinstance(with_information(net, batch, lambda net: 0), nn.Module)  # may be no graph


# === 3. Information estimators: most are tested in beyond

def test_capacity_and_alpha():
    alpha = torch.tensor([1e-6, 0.1, 1.0, 5.0, 40.0], dtype=torch.double)
    expected = [-0.5 * math.log(-math.expm1(-a)) for a in alpha.tolist()]
    assert g(alpha).tolist() == pytest.approx(expected, rel=1e-9)
    assert g(1e-9).item() == pytest.approx(-0.5 * math.log(1e-9), rel=1e-6) and g(0.0) == math.inf
    channel = 0.5 * torch.log1p(1 / alpha)  # of Gaussian noise of this variance
    assert torch.allclose(g(torch.log1p(alpha)), channel)
    with pytest.raises(ValueError):
        g(-0.1)
    layer = StochasticLinear(30, 20, noise="lognormal", log_alpha=-2.5, max_log_alpha=0.0)  # C = 0
    alpha = alpha_from_information(layer.information(), 600).item()
    assert alpha == pytest.approx(math.exp(-2.5), rel=1e-5)
    weight, x = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    information = common.layer_information(weight, math.log(2), x)  # signal 4, noise 4
    assert information.item() == pytest.approx(0.5 * math.log(2))
    assert common.layer_information_bound(3, 0.1).item() == pytest.approx(3 * (g(0.1).item() + 1))
    flat = common.flat_minimum_bound(torch.tensor([1.0, 1.0]), 8.0, 1.0)
    assert flat.item() == pytest.approx(math.log(16) - math.log(4))


# === 4. Data

def cifar_arrays(n=4):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, (n, 1), np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}


def celeba_arrays():
    return {"images": np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8),
            "attrs": np.eye(3, 40, dtype=np.uint8), "partition": np.array([0, 1, 2]),
            "attr_names": np.array([f"a{i}" for i in range(40)])}


def test_loaders_read_npz_files(tmp_path):
    arrays = cifar_arrays()
    labels = arrays["y_train"].ravel().tolist()
    for y in (arrays["y_train"], arrays["y_train"].astype(">i4")):  # big-endian
        np.savez(tmp_path / "cifar10.npz", **arrays | {"y_train": y})
        x, y, x_test, _ = load_cifar10(tmp_path)
        assert x.shape == (4, 3, 32, 32) and x.dtype == torch.uint8 and len(x_test) == 2
        assert y.dtype == torch.int64 and y.tolist() == labels
        assert x[1, 2, 3, 4] == arrays["x_train"][1, 3, 4, 2]
    digits = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    parts = dict(x_train=digits, y_train=np.arange(3), x_test=digits, y_test=np.arange(3))
    np.savez(tmp_path / "mnist.npz", **parts)
    x, y, *_ = load_mnist(tmp_path)
    assert x.shape == (3, 1, 28, 28) and (x[:, 0].numpy() == digits).all()
    assert y.tolist() == [0, 1, 2]
    arrays = celeba_arrays()
    np.savez(tmp_path / "celeba64.npz", **arrays)
    images, attrs, names, partition = load_celeba(tmp_path)
    assert images.shape == (3, 3, 64, 64) and images[2, 1, 5, 6] == arrays["images"][2, 5, 6, 1]
    assert attrs.shape == (3, 40) and names[39] == "a39" and partition.tolist() == [0, 1, 2]


BAD_ARRAYS = {
    "shape": ("x_train", np.zeros((4, 32, 32, 3), np.float32)),
    "short": ("y_train", np.zeros(3, int)),
    "pickle": ("y_train", np.array([{}, 1], dtype=object)),
    "one-hot": ("y_train", np.eye(10, dtype=np.uint8)[[0, 1, 2, 3]]),
    "0-d": ("y_test", np.uint8(3)),
    "pairs": ("y_train", np.zeros((4, 2), int)),
    "label": ("y_train", np.array([0, 1, 2, 10])),
    "test label": ("y_test", np.array([0, 255])),
    "negative": ("y_train", np.array([0, 1, 2, -1])),
    "partition": ("partition", np.array([0, 1, 3])),
    "39 names": ("attr_names", np.array(["a"] * 39)),
    "attributes": ("attrs", 2 * np.ones((3, 40), int)),
    "faces": ("images", np.zeros((3, 64, 64), int)),
}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", *BAD_ARRAYS])
def test_damaged_npz_files_are_named_in_one_line(tmp_path, damage):
    key, value = BAD_ARRAYS.get(damage, ("", None))
    name, arrays, load = "cifar10", cifar_arrays(), load_cifar10
    if value is not None and key not in arrays:
        name, arrays, load = "celeba64", celeba_arrays(), load_celeba
    if value is not None:
        arrays[key] = value
    if damage == "missing":
        del arrays["y_test"]
    path = tmp_path / f"{name}.npz"
    np.savez(path, **arrays)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "garbage": b"no npz", "empty": b""}
    path.write_bytes(damaged.get(damage, content))
    with pytest.raises(DataError) as error:
        load(tmp_path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and path.exists()
    assert key in message or damage == "pickle"


def test_load_images_draws_different_test_images_and_takes_statistics_of_the_training_set(tmp_path):
    x, y, x_test, y_test, mean, std = load_images("synthetic", tmp_path, 30, 30)
    assert not torch.equal(x, x_test) and not torch.equal(y, y_test)
    assert all(map(torch.equal, (mean, std), channel_statistics(x)))
    images = common.normalise(x, mean, std, 28)
    assert images.shape == (30, 3, 28, 28)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(images, ((x.float() - mean) / std)[:, :, 2:30, 2:30])
    arrays = cifar_arrays() | {"x_test": np.zeros((2, 32, 32, 3), np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    x, _, x_test, *_ = load_images("cifar10", tmp_path, 0, 0)
    assert len(x) == 4 and (x_test == 0).all() and (x != 0).any()


def test_look_up_goes_from_npz_to_torchvision_which_downloads_if_it_has_no_copy(
    tmp_path, monkeypatch
):
    calls = []

    class FakeCIFAR10:
        def __init__(self, root, train, download):
            calls.append((train, download))
            arrays = cifar_arrays()
            self.data, self.targets = arrays["x_train"], arrays["y_train"].ravel().tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    x, *_ = load_cifar10(tmp_path)
    assert calls == [(True, True), (False, True)]
    assert os.listdir(tmp_path) == ["cifar10.npz"]  # in one step
    again, *_ = load_cifar10(tmp_path)
    assert torch.equal(x, again) and len(calls) == 2


def test_celeba_is_cropped_and_cached(tmp_path, monkeypatch):
    from PIL import Image

    class FakeCelebA:
        attr_names = [f"a{i}" for i in range(40)] + [""]  # the header ends in an empty name
        attr = torch.eye(2, 40, dtype=torch.long)

        def __init__(self, root, split, transform, download):
            assert split == "all"
            (Path(root) / "celeba").mkdir(exist_ok=True)
            partition = Path(root) / "celeba" / "list_eval_partition.txt"
            partition.write_text("000001.jpg 0\n000002.jpg 2\n")
            self.transform = transform

        def __len__(self):
            return 2

        def __getitem__(self, index):
            picture = np.zeros((218, 178, 3), np.uint8)
            picture[35:183, 15:163] = 100 + index  # the centre 148 x 148
            return self.transform(Image.fromarray(picture)), self.attr[index]

    monkeypatch.setattr(torchvision.datasets, "CelebA", FakeCelebA)
    images, attrs, names, partition = load_celeba(tmp_path)
    assert images.shape == (2, 3, 64, 64) and (images[0] == 100).all() and (images[1] == 101).all()
    assert len(names) == 40 and attrs.tolist() == FakeCelebA.attr.tolist()
    assert partition.tolist() == [0, 2] and (tmp_path / "celeba64.npz").exists()


@pytest.mark.parametrize("load, name, hints", [
    (load_cifar10, "CIFAR10", ["cifar10.npz"]), (load_mnist, "MNIST", ["mnist.npz"]),
    (load_celeba, "CelebA", ["gdown", "img_align_celeba", "quota"])])
def test_failed_downloads_say_what_to_do(tmp_path, monkeypatch, load, name, hints):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset not found" if not kwargs["download"] else "no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, name, fail)
    with pytest.raises(DataError) as error:
        load(tmp_path / "data")
    message = str(error.value)
    hints = [*hints, "no network", "--scale demo", str(tmp_path)]
    assert "\n" not in message and all(hint in message for hint in hints)
    assert not (tmp_path / "data").exists()


def test_channel_statistics_and_subsets():
    x = torch.randint(256, (50, 3, 6, 5), dtype=torch.uint8)
    mean, std = channel_statistics(x)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert torch.allclose(mean.flatten(), x.float().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(std.flatten(), x.float().std((0, 2, 3), correction=0), rtol=1e-5)
    x, y = torch.arange(50), torch.arange(50) + 100
    few, labels = draw_subset(x, y, 20, torch.Generator().manual_seed(1))
    assert len(set(few.tolist())) == 20 and torch.equal(labels, few + 100)
    assert not torch.equal(few, x[:20])
    assert torch.equal(few, draw_subset(x, y, 20, torch.Generator().manual_seed(1))[0])
    with pytest.raises(DataError, match="51 .* 50"):
        draw_subset(x, y, 51, torch.Generator())


def test_corrupt_labels_corrupts_exactly_that_fraction():
    def corrupt(labels, fraction, seed=3, **kind):
        return corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(seed), **kind)

    labels = torch.full((1000,), -1)
    for fraction in (0, 0.1, 0.25, 0.9995, 1):
        new = corrupt(labels, fraction)
        assert (new >= 0).sum() == round(1000 * fraction) and new.max() < 10
        assert torch.equal(new, corrupt(labels, fraction))
    assert (labels == -1).all()
    new = corrupt(torch.zeros(100_000).long(), 1.0)
    assert (torch.bincount(new) - 10_000).abs().max() < 500  # uniform, the old label included
    one, two = (corrupt(labels, 0.5, seed) >= 0 for seed in (1, 2))
    assert 400 < (one ^ two).sum() < 600 and 200 < one[:500].sum() < 300  # at random positions
    digits = torch.arange(1000) % 10
    pairs = corrupt(digits, 0.3, kind="pair")
    assert set((pairs - digits).remainder(10).tolist()) == {0, 1} and (pairs != digits).sum() == 300
    for fraction, kind in ((1.5, "uniform"), (-0.1, "uniform"), (0.5, "flip")):
        with pytest.raises(ValueError):
            corrupt(labels, fraction, kind=kind)


def test_add_clutter_pastes_squares_and_returns_their_mask():
    images = torch.full((500, 1, 28, 28), 7, dtype=torch.uint8)
    cluttered, mask = add_clutter(images, torch.Generator().manual_seed(0), squares=1, size=4)
    assert mask.shape == (500, 1, 28, 28) and mask.dtype == torch.bool
    assert (cluttered[mask] == 255).all() and (cluttered[~mask] == 7).all()
    assert (mask.sum((1, 2, 3)) == 16).all() and (images == 7).all()
    for dim in (2, 3):
        lines = mask.any(dim)[:, 0]
        assert (lines.sum(1) == 4).all() and set(lines.int().argmax(1).tolist()) == set(range(25))
    cluttered, mask = add_clutter(torch.zeros(50, 3, 28, 28), torch.Generator().manual_seed(0))
    assert cluttered.shape == (50, 3, 28, 28) and mask.shape == (50, 1, 28, 28)
    assert cluttered.max() == 1
    assert 120 < mask.float().sum((1, 2, 3)).mean() < 160  # ten squares of 16, less what overlaps


@pytest.mark.parametrize("make, shape", [(synthetic_objects, (3, 32, 32)),
                                         (synthetic_digits, (1, 28, 28))])
def test_synthetic_images_are_seeded_and_balanced(make, shape):
    images, labels = make(600, seed=1)
    assert images.shape == (600, *shape) and images.dtype == torch.uint8
    assert torch.equal(images, make(600, seed=1)[0])
    assert not torch.equal(images, make(600, seed=2)[0])
    assert labels.dtype == torch.int64 and torch.bincount(labels, minlength=10).min() > 30
    assert len(images.flatten(1).unique(dim=0)) == 600


def test_synthetic_faces_know_their_factors():
    images, attributes, factors = synthetic_faces(600, seed=1)
    assert images.shape == (600, 3, 64, 64) and torch.equal(images, synthetic_faces(600, seed=1)[0])
    assert attributes.dtype == torch.uint8 and attributes.max() == 1
    assert {name: len(values.unique()) for name, values in factors.items()} == common.FACE_FACTORS
    told = [factors["hair_colour"] == 0, factors["hair_colour"] == 2, factors["skin"] >= 2,
            factors["glasses"] == 1, factors["smile"] == 2, factors["beard"] == 1]
    assert torch.equal(attributes.bool(), torch.stack(told, 1))


# === 5. Running a grid, in real processes

TOY = '''
"""A toy figure."""
import sys, time
sys.path.insert(0, {here!r})
import torch
from common import claim, parse_args, run_grid, save_tables

SETTINGS = {{"steps": (3, 4)}}

def train_cell(cell, device, args, progress):
    torch.manual_seed(cell["seed"])
    time.sleep({sleep})
    if cell["beta"] == 6:
        progress(1, 2, float("nan"))
    with open({log!r}, "a") as file:
        file.write(f"{{cell['seed']}}-{{cell['beta']}}\\n")
    return {{"value": torch.randn(300, 300).svd().S.sum().item() * cell["beta"]}}

def prepare(args):
    print("loaded")

def main():
    args = parse_args(__doc__, {{"demo": ["synthetic", "other"], "cpu": ["synthetic"]}},
                      {{"demo": [0], "cpu": [0]}})
    cells = [{{"beta": b}} for b in ({betas})] + [{{"beta": 99, "seed": 4}}]
    rows = run_grid(cells, train_cell, args, SETTINGS, prepare)
    save_tables(args, claims=[claim("c", "p", f"rows {{len(rows)}}", True)])

if __name__ == "__main__":
    main()
'''
# Imports take most of a short run: on Linux they are done once.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["test_common", "matplotlib.pyplot"])
LOCK = CONTEXT.Lock()  # start() reads exit codes of other threads' processes


class Run:
    """python <script> <arguments>; changes: what its module is to hold."""

    def __init__(self, script, *arguments, changes=None):
        self.command, self.folder = [script, *arguments], tempfile.TemporaryDirectory()
        target = (self.command, self.folder.name, changes)
        self.process = CONTEXT.Process(target=run_script, args=target)
        with LOCK:
            self.process.start()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=240):
        """CompletedProcess with its output."""
        multiprocessing.connection.wait([self.process.sentinel], timeout)
        with LOCK:
            alive = self.process.is_alive()
        if alive:
            self.process.kill()
            raise TimeoutError(f"{self.command} has not ended in {timeout} s")
        printed = [Path(self.folder.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *printed)


def run_script(command, folder, changes):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if we run in the background
    os.chdir(HERE)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = command
    if changes is None:
        runpy.run_path(command[0], run_name="__main__")
    else:
        figure = importlib.import_module(Path(command[0]).stem)
        for name, value in changes.items():
            setattr(figure, name, getattr(figure, name) | {"demo": value})
        figure.main()


def side_by_side(run, *items):
    """[run(item), ...] for runs that wait for processes of their own, two at a time."""
    with futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, *items))


class Toy:
    def __init__(self, folder, sleep=0.0, betas="1, 2, 3, 4"):
        self.script, self.log, self.out = folder / "toy.py", folder / "log", folder / "out"
        toy = TOY.format(here=str(HERE), sleep=sleep, log=str(self.log), betas=betas)
        self.script.write_text(toy)
        self.path = self.out / "toy-demo.jsonl"
        self.command = [str(self.script), "--scale", "demo", "--out", str(self.out)]

    def start(self, *arguments):
        return Run(*self.command, *arguments)

    def run(self, *arguments):
        return self.start(*arguments).wait()

    def rows(self, name="toy-demo.jsonl"):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    def wait_for_rows(self, count):
        deadline = time.monotonic() + 60
        while not self.path.exists() or self.path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_rows_have_the_contract_fields_and_are_not_run_again(tmp_path):
    toy = Toy(tmp_path)
    first = toy.run("--jobs", "1", "--seeds", "0", "5", "0")
    assert first.returncode == 0, first.stderr
    start = "toy: device cpu, scale demo, data synthetic, 8 cells, 0 done"
    assert first.stdout.startswith(start)
    rows = toy.rows()
    assert sorted((r["seed"], r["beta"]) for r in rows) == [
        *itertools.product((0, 5), (1, 2, 3, 4))]  # 99 has a seed of its own
    for row in rows:
        assert {"seconds", "device", "torch", "git", "value"} <= {*row}
        assert row["settings"] == {"steps": [3, 4]}
        named = (row["figure"], row["scale"], row["dataset"], row["status"])
        assert named == ("toy", "demo", "synthetic", "ok")
    empty = toy.run("--jobs", "1", "--shard", "31/40", "--seeds", "0", "5")
    assert "rows 8" in empty.stdout and "loaded" not in empty.stdout
    again = toy.run("--jobs", "1", "--seeds", "0", "5")
    assert "8 cells, 8 done" in again.stdout and "--out elsewhere" in again.stdout
    assert toy.rows() == rows
    other = toy.run("--jobs", "1", "--dataset", "other")
    assert "4 cells, 0 done" in other.stdout and "rows 4" in other.stdout
    assert "5 cells, 0 done" in toy.run("--jobs", "1", "--seeds", "4").stdout


def test_rows_of_other_settings_and_foreign_lines_are_left_aside(tmp_path):
    toy = Toy(tmp_path, betas="1, 2")
    toy.run("--jobs", "1")
    row = toy.rows()[0]
    bad = [row | {"figure": "fig9"}, row | {"scale": "paper"}, row | {"seed": "0"}, {"beta": 1},
           row | {"settings": 3}, row | {"status": "fine"}]
    lines = [json.dumps(row | {"settings": {"steps": [3, 5]}}), *map(json.dumps, bad), "[1]", "{"]
    toy.path.write_text("\n".join(lines) + "\n" + json.dumps(row))  # the last line is torn
    result = toy.run("--jobs", "1")
    assert result.returncode == 0 and "2 cells, 0 done" in result.stdout
    assert re.search(r"(?m)^1 rows .* other settings", result.stdout)
    assert "rows 2" in result.stdout and "Traceback" not in result.stderr
    warned = set(re.findall(r"line (\d+)", result.stderr))
    assert warned == {str(number) for number in range(2, 11)}
    last = [json.loads(line) for line in toy.path.read_text().splitlines()[-2:]]
    assert [row.get("beta") for row in last] == [1, 2]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_kill_and_torn_line_lose_nothing_finished_and_repeat_nothing(tmp_path, jobs):
    toy = Toy(tmp_path, sleep=0.4, betas="1, 2, 3, 4, 5, 7, 8, 9")
    run = toy.start("--jobs", jobs)
    toy.wait_for_rows(2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    saved, logged = toy.rows(), toy.log.read_text().split()
    time.sleep(1.5)
    assert toy.log.read_text().split() == logged  # workers end when their parent is gone
    with open(toy.path, "a") as file:
        file.write('{"figure": "toy", "beta": 3, "se')
    result = toy.run("--jobs", jobs)
    assert result.returncode == 0 and f"8 cells, {len(saved)} done" in result.stdout
    assert "not counted" in result.stderr
    rows = [json.loads(line) for line in toy.path.read_text().splitlines() if line.endswith("}")]
    assert rows[:len(saved)] == saved
    assert sorted(r["beta"] for r in rows) == [1, 2, 3, 4, 5, 7, 8, 9]
    assert len(toy.log.read_text().split()) - len(logged) == 8 - len(saved)


def test_ctrl_c_ends_with_130_and_says_what_is_saved(tmp_path):
    for jobs in ("1", "2"):
        toy = Toy(tmp_path, sleep=0.3, betas="1, 2, 3, 4, 5, 7, 8, 9")
        run = toy.start("--jobs", jobs)
        toy.wait_for_rows(1)
        run.send_signal(signal.SIGINT)
        result = run.wait(timeout=30)
        assert result.returncode == 130 and str(toy.out) in result.stderr
        assert "Traceback" not in result.stderr
        toy.path.unlink()


def test_shards_run_side_by_side_and_numbers_are_the_same_with_jobs(tmp_path):
    toy = Toy(tmp_path, sleep=0.2, betas="1, 2, 3, 4, 5")
    runs = [toy.start("--jobs", "1", "--shard", shard) for shard in ("1/2", "2/2")]
    assert [run.wait(timeout=60).returncode for run in runs] == [0, 0]
    parts = [toy.rows(f"toy-demo.{i}-of-2.jsonl") for i in (1, 2)]
    assert [[row["beta"] for row in part] for part in parts] == [[1, 3, 5], [2, 4]]
    assert not toy.path.exists()
    result = toy.run("--plot-only")
    assert "5 cells, 5 done" in result.stdout and "rows 5" in result.stdout
    (tmp_path / "jobs").mkdir()
    whole = Toy(tmp_path / "jobs", betas="1, 2, 3, 4, 5")
    assert whole.run("--jobs", "2").returncode == 0
    apart, together = ({row["beta"]: row["value"] for row in rows}
                       for rows in (sum(parts, []), whole.rows()))
    assert apart == together


def test_a_diverged_cell_is_recorded_and_the_rest_goes_on(tmp_path):
    toy = Toy(tmp_path, betas="5, 6, 7")
    assert toy.run("--jobs", "2").returncode == 0
    assert {r["beta"]: r["status"] for r in toy.rows()} == {5: "ok", 6: "diverged", 7: "ok"}
    assert "NaN" not in toy.path.read_text() and "3 done" in toy.run().stdout
    (tmp_path / "all").mkdir()
    result = Toy(tmp_path / "all", betas="6,").run("--jobs", "1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


BAD_VALUES = ["--gpu x", "--gpu -1", "--gpu 0,1", "--jobs 0", "--jobs two", "--shard 3/2",
              "--shard 1", "--shard a/b", "--shard 1/0", "--seeds -1", "--seeds one",
              "--scale huge", "--dataset imagenet", "--nonsense", "--plot-only"]


@pytest.fixture(scope="module")
def bad_runs(tmp_path_factory):
    toys = [Toy(tmp_path_factory.mktemp("toy")) for _ in BAD_VALUES]
    results = side_by_side(lambda toy, value: toy.run(*value.split()), toys, BAD_VALUES)
    return dict(zip(BAD_VALUES, zip(toys, results)))


@pytest.mark.parametrize("arguments", BAD_VALUES)
def test_bad_values_give_one_line_status_2_and_write_nothing(bad_runs, arguments):
    toy, result = bad_runs[arguments]
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    named = str(toy.out) if arguments == "--plot-only" else arguments.split()[-1]
    assert result.stderr.startswith("error: ") and named in result.stderr
    assert not toy.out.exists()


def test_gpu_that_is_not_there_gives_a_warning(tmp_path):
    result = Toy(tmp_path).run("--gpu", "7", "--jobs", "1")
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("warning: ") and "7" in result.stderr
    assert "device cpu" in result.stdout


def test_unwritable_folder_and_full_disk_end_in_one_line(tmp_path):
    toy = Toy(tmp_path)
    toy.out.write_text("a file, not a folder")
    result = toy.run("--jobs", "1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert str(toy.out) in result.stderr and "loaded" not in result.stdout
    toy.out.unlink()
    if Path("/dev/full").exists():
        toy.out.mkdir()
        toy.path.symlink_to("/dev/full")
        result = toy.run("--jobs", "1")
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "space" in result.stderr
        toy.path.unlink()
    assert toy.run("--jobs", "1").returncode == 0 and len(toy.rows()) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes files")
def test_a_closed_standard_output_does_not_matter(tmp_path):
    toy = Toy(tmp_path, betas="6, 7")
    command = f'"{sys.executable}" "{toy.script}" --scale demo --jobs 2 --out "{toy.out}" >&-'
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "") and len(toy.rows()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_row_cut_short_is_an_error_and_is_run_again(tmp_path):
    import resource
    toy, limit = Toy(tmp_path), 400  # bytes that a file may have: the second row does not fit
    result = subprocess.run(
        [sys.executable, *toy.command, "--jobs", "1"], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert toy.run("--jobs", "1").returncode == 0
    whole = [line for line in toy.path.read_text().splitlines() if line.endswith("}")]
    assert sorted(json.loads(line)["beta"] for line in whole) == [1, 2, 3, 4]


def test_tables_are_written_and_put_into_the_page(tmp_path):
    toy = Toy(tmp_path, betas="1, 2")
    toy.out.mkdir()
    page = toy.out / "README.md"
    page.write_text("before\n<!-- toy-demo -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    result = toy.run("--jobs", "1")
    table = (toy.out / "toy-demo.md").read_text()
    assert "| claim | paper | ours | holds |\n" in table and "| c | p | rows 2 | yes |\n" in table
    assert table in result.stdout
    assert page.read_text() == (
        f"before\n<!-- toy-demo -->\n\n{table}<!-- end -->\nafter <!-- end -->\n")
    assert common.claim("c", "p", "o", False)["holds"] == "NO"


def test_statistics_of_rows():
    rows = [{"status": "ok", "seed": s, "x": x, "y": float(x + s)} for s in (0, 1) for x in (1, 2)]
    rows += [{"status": "diverged", "seed": 2, "x": 1},
             {"status": "ok", "seed": 2, "x": 2, "y": 9.0}]
    assert common.summarise(rows, "x", "y", seed=0) == [(1, 1.0, 0.0, 1), (2, 2.0, 0.0, 1)]
    assert common.summarise(rows, "x", "y")[0] == (1, 1.5, pytest.approx(0.5**0.5), 2)
    complete = common.complete_seeds(rows, [{"x": 1}, {"x": 2}])
    assert {row["seed"] for row in complete} == {0, 1} and len(complete) == 4
    assert common.complete_seeds(rows, [{"x": 3}]) == []
    assert common.per_seed(len, complete).tolist() == [2, 2]
    assert common.crossing([(1, 0.9), (10, 0.5), (100, 0.1)], 0.3) == pytest.approx(10**1.5)
    assert math.isnan(common.crossing([(1, 0.9), (10, 0.5)], 0.3))
    assert common.crossing([(1, 0.5), (10, 0.3)], 0.5) == 1
    assert math.isnan(common.crossing([(1, 0.9), (10, 0.5)], 0.5))
    assert common.fmt([1.0, 3.0]) == "2.00 ± 1.41" and common.fmt([0.5], "{:.0%}") == "50%"
    assert len(common.ok_rows(rows, x=1)) == 2 and len(common.ok_rows(rows, z=None)) == 5


def test_learning_rates_and_minibatches():
    model = to_stochastic(nn.Linear(2, 2))
    rest, noise = common.param_groups(model, 0.1, 0.5)
    assert [p.shape for p in noise["params"]] == [(2, 2)] and len(rest["params"]) == 2
    assert (rest["lr"], noise["lr"]) == (0.1, 0.5) and noise["weight_decay"] == 0
    assert common.lr_factor(0) < 0.01 and common.lr_factor(0.05) == pytest.approx(0.501)
    assert common.lr_factor(0.1) == common.lr_factor(0.79) == common.lr_factor(0.59, 0.6) == 1
    assert common.lr_factor(1, 1) == 1
    assert common.lr_factor(0.9) == pytest.approx(0.5) == common.lr_factor(0.8, 0.6)
    batches = minibatches(10, 3, "cpu")
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert len(epoch.unique()) == 9 and epoch.max() < 10
    assert len(next(minibatches(2, 5, "cpu"))) == 2


# === The sections alone, the scripts, the README

def test_sections_run_alone_under_the_import_block():
    imports, *sections = re.split(r"(?m)^# === (?=\d\. )", (HERE / "common.py").read_text())
    assert len(sections) == 5
    uses = [
        "layer = to_stochastic(nn.Linear(3, 2))\nlayer(torch.ones(1, 3)).sum().backward()\n"
        "layer.information().backward()\nparam_groups(layer, 1, 1)",
        "class Toy(nn.Module):\n    log_sigma2 = nn.Parameter(torch.ones(1))\n"
        "    weight = log_sigma2\n    information = lambda self: self.log_sigma2.sum()\n"
        "Toy.log_sigma2 = Toy.weight\n"
        "ib_loss(torch.ones(2, 3), torch.tensor([0, 1]), Toy(), 1.0, 4)",
        "assert g(1.0) > 0 and total_correlation(torch.randn(50, 3)) >= 0\n"
        "layer_information(torch.ones(2, 3), 0.1, torch.randn(9, 3))\n"
        "flat_minimum_bound(torch.ones(2), 1.0, 1)\npac_bayes_bound(0.1, 1.0, 100)\n"
        "layer_information_bound(2, 0.1)\n"
        "label_information(torch.ones(2, 3), torch.ones(2).long())",
        "synthetic_objects(2)\nsynthetic_digits(2)\nsynthetic_faces(2)\n"
        "add_clutter(torch.zeros(2, 1, 28, 28), torch.Generator())\n"
        "corrupt_labels(torch.zeros(4).long(), 0.5, 10, torch.Generator())\n"
        "load_images('synthetic', '', 4, 4)",
        "assert summarise([{'status': 'ok', 'x': 1, 'y': 2.0}], 'x', 'y') == [(1, 2.0, 0.0, 1)]",
    ]
    for section, use in zip(sections, uses):
        code = compile(f"{imports}\n# {section}\n{use}", f"section {section[:20]}", "exec")
        exec(code, {"__name__": "pasted"})


FIG1 = {"SETTINGS": dict(width=1 / 16, steps=5, batch=40, lr=0.01, lr_noise=0.1, hold=0.6, peak=0.5,
                         test=100),
        "GRID": dict(sizes=(100, 200), random=(0.1, 0.5, 1.2), real=(0.1, 1.2), extra=[
            {"labels": "random", "n": 100, "beta": 0.5, "budget": 2, "seed": 0}])}
FIG2 = {"SETTINGS": dict(widths={"Small AlexNet": 1 / 16, "All-CNN": 1 / 32, "ResNet": 1 / 8},
                         blocks=1, steps=6, batch=2000, lr=0.003, lr_noise=0.04, hold=0.6,
                         peak=0.5, test=100),
        "GRID": dict(n_models=100, betas=(0.01, 10), longer=(10,), n=100, beta=0.1, peak=0.5,
                     other_n=(50,), uniform=(0, 0.5, 1), pair=(0.45,))}
FIG3 = {"SETTINGS": dict(n=100, test=20, batch=50, width_steps=6, beta_steps=6, draws=2,
                         lr_sgd=0.05, lr=0.003, lr_noise=0.04, hold=0.6),
        "GRID": dict(widths=(1 / 96, 1 / 32, 1 / 24), decays=(0.001, 0.0), beta_width=1 / 32,
                     betas=(0.01, 1.0, 100.0), capped=((1.0, 0.0), (100.0, -2.0)))}
FIG4 = {"SETTINGS": dict(width=1 / 32, n=60, steps=3, batch=20, passes=1, discriminator_steps=3,
                         decoder_steps=8, validation=20, test=30, lr=0.003, lr_noise=0.05),
        "GRID": (0.001, 1.0)}
FIG5 = {"SETTINGS": dict(channels=(4, 4, 8, 4), maps=2, synthetic=(60, 40), batch=16, components=5,
                         classifier_steps=3, decoder_steps=3, vae_steps=3, kl_weight=100,
                         sigma2=0.05, lr=0.002, lr_noise=0.04),
        "GRID": (0.0, 0.1, 10.0)}
TINY = {"fig1_phase_transition": FIG1, "fig2_corrupted_labels": FIG2, "fig3_width_beta": FIG3,
        "fig4_cluttered_mnist": FIG4, "fig5_celeba_vae": FIG5}
MEASURED = {
    "fig1_phase_transition": "train_acc train_acc_batch train_acc_mean test_acc objective",
    "fig2_corrupted_labels": "train_acc train_acc_batch test_acc objective panel",
    "fig3_width_beta": "params train_acc test_acc information panel width",
    "fig4_cluttered_mnist": "test_acc i_zn_positions i_zn_nce i_zn_dv i_zy bound total_correlation",
    "fig5_celeba_vae": "picture_nats picture_nats_outside picture_nats_inside attribute_acc "
                       "reconstruction_mse background_mse attribute_agreement majority_acc",
}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """{script: (folder, first run, a run that only redraws, rows)}, the scripts two at a time."""
    folders = {script: tmp_path_factory.mktemp(script) for script in TINY}

    def carry_out(script):
        folder = folders[script]
        arguments = [f"{script}.py", "--scale", "demo", "--jobs", "1", "--out", str(folder)]
        runs = [Run(*arguments, *more, changes=TINY[script]).wait()
                for more in ((), ("--plot-only",))]
        text = (folder / f"{script}-demo.jsonl").read_text()
        return folder, *runs, [json.loads(line) for line in text.splitlines()]

    return dict(zip(TINY, side_by_side(carry_out, TINY)))


@pytest.mark.parametrize("script", TINY)
def test_scripts_run_and_their_rows_keep_the_contract(tiny_runs, script):
    folder, first, again, rows = tiny_runs[script]
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0 and "redrawing" in again.stdout and first.stderr == ""
    assert len(rows) > 1 and all(row["status"] == "ok" for row in rows)
    for row in rows:
        assert {"information", *MEASURED[script].split()} <= row.keys()
        for key, value in row.items():
            if key.endswith("acc") or key == "attribute_agreement":
                assert 0 <= value <= 1
        if row.get("objective") is not None:
            nats = row.get("cross_entropy_batch", row["cross_entropy"])
            expected = nats + row["beta"] * row["information"] / row["n"]
            assert row["objective"] == pytest.approx(expected)
    for ending in ("png", "pdf"):
        assert (folder / f"{script}-demo.{ending}").stat().st_size > 5000
    table = (folder / f"{script}-demo.md").read_text()
    assert "| claim |" in table and table in again.stdout


def test_committed_tables_are_what_the_committed_rows_say(tmp_path):
    figures = [path.stem for path in sorted((HERE / "results").glob("fig?_*-cpu.md"))]
    assert figures
    for path in (HERE / "results").glob("fig?_*-cpu*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results = side_by_side(lambda name: Run(
        f"{name[:-4]}.py", "--scale", "cpu", "--plot-only", "--out", str(tmp_path)).wait(), figures)
    page = (HERE / "results" / "README.md").read_text()
    for name, result in zip(figures, results):
        assert result.returncode == 0 and result.stderr == "", (name, result.stderr)
        table = (HERE / "results" / f"{name}.md").read_text()
        assert table == (tmp_path / f"{name}.md").read_text() and table in page, name


def test_no_published_row_is_from_a_dirty_tree_and_no_face_is_committed():
    for path in (HERE / "results").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert not json.loads(line)["git"].endswith("-dirty"), path
    _, ignored, allowed = (HERE / ".gitignore").read_text().rpartition("*-faces.*")
    assert ignored and allowed.split() == ["!results/synthetic/*-synthetic-faces.png"]


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        result = subprocess.run([sys.executable, "-c", snippet], cwd=HERE, capture_output=True,
                                text=True, timeout=120)
        assert result.returncode == 0, result.stderr


def test_missing_data_is_one_line(tmp_path):
    result = Run("fig1_phase_transition.py", "--scale", "cpu", "--jobs", "1", "--data-dir",
                 str(tmp_path / "none"), "--out", str(tmp_path / "out")).wait()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "cifar10.npz" in error and "--scale demo" in error


def demo(monkeypatch, script, tmp_path):
    """(its module at the demo scale with TINY settings, args, its cells, one of each kind)."""
    figure, grid = importlib.import_module(script), {}
    for name, value in TINY[script].items():
        monkeypatch.setattr(figure, name, {"demo": value})
    args = argparse.Namespace(figure=script, scale="demo", dataset="synthetic", data_dir=tmp_path,
                              out=tmp_path, device=torch.device("cpu"))

    def grid_instead(cells, *_):
        for cell in cells:  # of one kind: same keys, same words
            kind = *cell, *(value for value in cell.values() if isinstance(value, str))
            grid.setdefault(kind, cell | {"seed": 0})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(figure, "parse_args", lambda *_: args)
        patch.setattr(figure, "run_grid", grid_instead)
        figure.main()
    for cached in vars(figure).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    return figure, args, list(grid.values())


def names(images):
    """What tells images (n, ...) apart, as one key each."""
    return [image.numpy().tobytes() for image in images.detach().float().contiguous()]


class Oracle:
    """While it is active, nets whose images are known answer with the truth.

    when: of a net that draws noise (True) or does not (False), None: always; else they are wrong.
    """

    def __init__(self, truth, when=None):
        self.truth, self.when, self.seen, self.losses = truth, when, {True: set(), False: set()}, []

    def __enter__(self):
        self.hook = nn.modules.module.register_module_forward_hook(self.answer)
        backward = self.backward = torch.Tensor.backward
        torch.Tensor.backward = lambda loss: backward(self.record(loss))
        return self

    def __exit__(self, *_):
        self.hook.remove()
        torch.Tensor.backward = self.backward

    def answer(self, net, arguments, logits):
        known = names(arguments[0]) if arguments[0].dim() == 4 else []
        if (not known or known[0] not in self.truth or isinstance(logits, tuple)
                or logits.shape != (len(known), 10)):
            return None
        self.net, layer = net, next((m for m in net.modules() if hasattr(m, "sampling")), net)
        sampling = getattr(layer, "sampling", None)
        noisy = layer.training if sampling is None else sampling
        self.seen[torch.is_grad_enabled()].update(known)
        labels = torch.tensor([self.truth[name] for name in known])
        labels = labels if self.when in (None, noisy) else (labels + 1) % 10
        return 0 * logits + 50 * F.one_hot(labels, 10)

    def record(self, loss):
        information = [m.information().item() for m in self.net.modules()
                       if hasattr(m, "information")]
        self.losses.append(loss.item() / max(sum(information), 1))  # beta/n: cross-entropy is 0
        return loss


CELLS = [("fig1_phase_transition", {"labels": "random", "n": 200, "beta": 0.1, "budget": 2},
          (0.02, 0.2)),
         ("fig1_phase_transition", {"labels": "real", "n": 100, "beta": 0.1}, (1, 1))]
CELLS += [("fig2_corrupted_labels", cell | {"n": 100, "beta": 0.1}, share) for cell, share in (
    ({"panel": "models", "model": "ResNet", "budget": 2}, (0.02, 0.2)),
    ({"panel": "corruption", "corruption": 0.0}, (1, 1)),
    ({"panel": "corruption", "corruption": 0.5}, (0.4, 0.7)))]
CELLS += [("fig3_width_beta", cell | {"width": 1 / 32}, (1, 1)) for cell in (
    {"panel": "beta", "beta": 0.1, "max_log_alpha": 0.0}, {"panel": "width", "weight_decay": 0.1})]


@pytest.mark.parametrize("script, cell, true", CELLS)
def test_what_nets_are_trained_and_measured_on(monkeypatch, tmp_path, script, cell, true):
    figure, args, _ = demo(monkeypatch, script, tmp_path)
    s, rates, decays = figure.SETTINGS["demo"], [], set()
    x, y, x_test, y_test, mean, std = figure.load_data(args)
    shown = [common.normalise(images, mean, std, 32 if "fig3" in script else 28)
             for images in (x, x_test)]
    train, test = (dict(zip(names(some), labels.tolist())) for some, labels in
                   zip(shown, (y, y_test)))
    assert not train.keys() & test.keys()

    def note(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
        decays.update(group["weight_decay"] for group in optimizer.param_groups)
    hook = register_optimizer_step_pre_hook(note)
    with Oracle(train | test) as oracle:
        row = figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
    hook.remove()
    n = cell.get("n", len(x))
    trained, measured = oracle.seen[True], oracle.seen[False]
    assert not trained & test.keys() and len(trained) > 0.75 * n
    assert len(measured & train.keys()) == n and measured >= trained
    assert len(measured & test.keys()) == s["test"] and row["test_acc"] == 1
    assert true[0] <= row["train_acc"] <= true[1]
    assert row["train_acc"] == pytest.approx(row["train_acc_mean"], abs=1e-6)
    top = [s["lr_sgd"]] if "beta" not in cell else [s["lr"], s["lr_noise"]]
    assert rates[0] == pytest.approx([rate / 1000 for rate in top])
    assert len(rates) == s.get("steps", 6) * cell.get("budget", 1)
    assert np.max(rates, 0) == pytest.approx(top) and rates[-1][0] < top[0]
    if true == (1, 1) and "beta" in cell:  # beta/n rises from 0
        assert oracle.losses[0] < 1e-6 and len(oracle.losses) == row.get("steps", len(rates))
        assert oracle.losses[-1] == pytest.approx(cell["beta"] / n, rel=1e-3)
        nats = row.get("cross_entropy_batch", row["cross_entropy"])
        assert nats < 1e-6 and row["information"] > 1
    assert decays == {cell.get("weight_decay", 0)}
    caps = {m.max_log_alpha for m in oracle.net.modules() if hasattr(m, "log_sigma2")}
    assert caps == ({cell.get("max_log_alpha")} if "beta" in cell else set())
    if cell.get("model"):
        assert any("Block" in type(m).__name__ for m in oracle.net)
    if "beta" not in cell:
        return
    for when in (True, False):  # who says what, with noise and without
        with Oracle(train | test, when) as oracle:
            row = figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
        assert row["test_acc_sampled"] == when and row["test_acc"] == (not when)
        if true == (1, 1):
            assert row["train_acc"] == when == (row["cross_entropy"] < 1e-6)
            assert row["train_acc_mean"] == (not when)
            assert row.get("train_acc_batch", when) == when


def test_fig4_masks_noise_and_clutter(monkeypatch, tmp_path):
    fig4, args, _ = demo(monkeypatch, "fig4_cluttered_mnist", tmp_path)
    s, pairs, clutter, training, drawn, local = fig4.SETTINGS["demo"], [], [], [], [], []
    x, _, x_test, *_ = fig4.load_data(args)
    add_clutter, estimate = fig4.add_clutter, fig4.density_ratio_information

    def add(digits, *arguments, **options):
        clutter.append(names(digits))
        return add_clutter(digits, *arguments, **options)

    def estimated(*arguments, **options):
        pairs.append((*arguments[1:3], options["held_out"]))
        return estimate(*arguments, **options)

    def look(m, inputs):
        if pairs or not isinstance(m, nn.Conv2d):
            return
        if inputs[0].shape[1:] == (1, 28, 28):
            if m.training and torch.is_grad_enabled():
                training.append((inputs[0], set(clutter[-1])))
            elif not m.training:
                drawn.append(inputs[0])
        elif not m.training and getattr(m, "sampling", False):
            local.append(m.local)

    monkeypatch.setattr(fig4, "add_clutter", add)
    monkeypatch.setattr(fig4, "density_ratio_information", estimated)
    hook = nn.modules.module.register_module_forward_pre_hook(look)
    fig4.train_cell({"beta": 0.1, "seed": 0}, args.device, args, lambda *_: None)
    hook.remove()
    (z, masks, held_out), images = pairs[0], torch.cat(drawn)
    images, white = images[-len(z):], images.max()
    assert len(z) == len(masks) > s["test"] == held_out and masks.dtype == torch.bool
    assert (images[masks] == white).all() and 80 < masks.sum() / len(masks) < 161
    assert local and all(local)  # every example and position has noise of its own
    train, test = set(names(x)), set(names(x_test))
    assert not train & test and set(sum(clutter, [])) & test
    for shown, digits in training:  # training digits, under clutter
        assert digits <= train and (shown == white).sum((1, 2, 3)).min() > 60
    shown = sum((names(shown) for shown, _ in training), [])
    assert len(set(shown)) == s["steps"] * s["batch"]  # new in every batch


def test_fig5_parts_do_not_overlap_and_test_faces_are_not_trained_on(monkeypatch, tmp_path):
    fig5, args, _ = demo(monkeypatch, "fig5_celeba_vae", tmp_path)
    images, *_, parts = fig5.load_data(args)
    parts = {name: set(rows.tolist()) for name, rows in parts.items()}
    rows = dict(zip(names(images.flip(3)), range(len(images))))
    rows |= dict(zip(names(images), range(len(images))))
    assert not parts["train"] & parts["test"] and not parts["evaluation"] & parts["classifier"]
    trained, measured = {}, set()

    def look(m, inputs):
        if isinstance(m, nn.Conv2d) and inputs[0].shape[1:] == (3, 64, 64):
            pixels = ((inputs[0] + 1) * 127.5).round().to(torch.uint8)
            known = {rows[name] for name in names(pixels) if name in rows}
            if torch.is_grad_enabled() and m.training:
                trained.setdefault(m, set()).update(known)
            else:
                measured.update(known)

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    fig5.train_cell({"beta": 0.1, "seed": 0}, args.device, args, lambda *_: None)
    hook.remove()
    evaluator, classifier, *others = trained.values()
    assert others and len(evaluator) > 9 and len(classifier) > 9
    assert evaluator <= parts["evaluation"] and classifier <= parts["classifier"]
    assert not parts["test"] & set.union(*others) and parts["test"] <= measured


def fig1_row(n, beta, ce, nats, seed=0, labels="random", **more):
    acc = 0.95 if ce < 2 else 0.1
    return dict(status="ok", seed=seed, labels=labels, n=n, beta=beta, steps=5, train_acc=acc,
                train_acc_batch=acc, test_acc=0.5 - abs(math.log(beta)) / 10, information=nats * n,
                test_acc_sampled=acc - 0.05, cross_entropy_batch=ce, objective=ce + beta * nats,
                ) | more


def fig1_verdicts(**change):
    """{claim: verdict} where rows of this labels, n and beta get the other values."""
    import fig1_phase_transition as fig1
    where = {key: change.pop(key) for key in ("labels", "n", "beta") if key in change}
    grid = dict(sizes=(100, 1000), random=(0.1, 0.4, 0.7, 1.2), real=(0.1, 0.45, 0.5, 1.2, 2, 2.1))
    rows = [fig1_row(n, beta, *((0.05, 2.6) if beta < 1 else (2.31, 1e-3)))
            for n in grid["sizes"] for beta in grid["random"]]
    rows += [fig1_row(n, beta, 0.3, (1.0 if n == 100 else 0.2), labels="real")
             for n in grid["sizes"] for beta in grid["real"]]
    ok = fig1.add_derived([row | (change if where.items() <= row.items() else {}) for row in rows])
    random, real = (common.complete_seeds(ok, cells) for cells in fig1.main_cells(grid))
    return {row["claim"]: row["holds"] for row in fig1.claims(random, real, ok, grid)}


@pytest.mark.parametrize("part, where, key, holding, failing", [
    ("at least 85%", dict(labels="random", beta=0.1), "train_acc_batch", [0.85], [0.84]),
    ("falls through 55%", dict(labels="random", beta=1.2), "train_acc_batch", [0.4], [0.45]),
    ("falls through 55%", dict(labels="random", beta=0.4), "train_acc_batch", [0.5], [0.4]),
    ("converged", dict(labels="random", beta=0.4), "objective", [1.119], [1.121]),
    ("converged", dict(labels="random", beta=1.2), "objective", [9.0], []),  # memory does not pay
    ("r ≤ 1", dict(labels="random", n=100, beta=0.1), "information", [226], [225]),
    ("between 0.7 and 1", dict(labels="random", n=100), "information", [226, 321], [225, 322]),
    ("memory pays", dict(labels="random", n=100), "information", [321], [322]),
    ("information ~ N", dict(labels="random", n=1000), "information", [2070, 3270], [2060, 3280]),
    ("saturates", dict(labels="real", n=1000, beta=0.1), "information", [316], [317]),
    ("is best at", dict(labels="real", beta=0.5), "test_acc", [0.9], []),
    ("is best at", dict(labels="real", beta=0.45), "test_acc", [], [0.9]),
    ("is best at", dict(labels="real", beta=2), "test_acc", [0.9], []),
    ("is best at", dict(labels="real", beta=2.1), "test_acc", [], [0.9]),
    ("random labels are not learned", dict(labels="random"), "train_acc_batch", [0.19], [0.21]),
    ("real labels are learned", dict(labels="real"), "train_acc_batch", [0.21], [0.19]),
    ("overfitted", dict(labels="real"), "test_acc_sampled", [0.86], [0.84])])
def test_fig1_claims_at_both_sides_of_each_threshold(part, where, key, holding, failing):
    for verdict, values in (("yes", holding), ("NO", failing)):
        for value in values:
            verdicts = fig1_verdicts(**where, **{key: value})
            assert [holds for claim, holds in verdicts.items() if part in claim] == [verdict], value


def test_fig1_claims_that_a_run_cannot_decide_are_not_made():
    verdicts = fig1_verdicts()
    assert len(verdicts) == 12 and set(verdicts.values()) == {"yes"}
    assert len(fig1_verdicts(labels="random", beta=0.4, status="diverged")) == 2


def test_beta_passes_its_peak():
    assert beta_at(0, 0.1, 0.5) == 0 and beta_at(0.2, 0.1, 0.5) == pytest.approx(0.25)
    assert beta_at(0.45, 0.1, 0.5) == 0.5 and beta_at(0.6, 0.1, 0.5) == pytest.approx(0.3)
    for t in (0.7, 0.85, 1):
        assert beta_at(t, 0.1, 0.5) == pytest.approx(0.1)
    assert beta_at(0.4, 0.9, 0.5) == beta_at(1, 0.9, 0.5) == 0.9


def test_networks_have_the_sizes_they_claim():
    import fig1_phase_transition as fig1
    import fig2_corrupted_labels as fig2
    import fig3_width_beta as fig3

    def size(model):
        return sum(p.numel() for name, p in model.named_parameters() if "sigma" not in name)

    nets = [to_stochastic(net(1 / 16, 1)) for net in fig2.MODELS.values()]
    nets.append(to_stochastic(fig3.all_cnn(1 / 16)))
    for model in (fig1.small_alexnet(1 / 16), *nets):
        noisy = [m.weight.numel() for m in model.modules() if hasattr(m, "log_sigma2")]
        assert size(model) == sum(noisy)
    shifts = -64 - 64 - 384 - 192 - 10 + 64 + 384 + 192  # instead of biases
    assert size(fig1.small_alexnet()) == 1_387_786 + shifts
    for width, count in ((1 / 4, 102_610), (1 / 2, 406_810), (1, 1_620_010)):  # the paper's
        assert size(fig3.all_cnn(width)) == size(fig2.all_cnn(width)) == count - 1344 * width - 10
    convolutions = [m for m in fig2.MODELS["ResNet"](1 / 8, 2).modules()
                    if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 6 * 2 + 1


def test_fig2_entropy_of_labels_is_that_of_corrupt_labels():
    import fig2_corrupted_labels as fig2
    labels = torch.zeros(200_000, dtype=torch.long)
    for kind, fraction in (("uniform", 0.3), ("uniform", 1.0), ("pair", 0.45), ("pair", 1.0)):
        noisy = corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(0), kind)
        entropy = torch.distributions.Categorical(noisy.bincount(minlength=10)).entropy().item()
        assert fig2.label_entropy(fraction, kind) == pytest.approx(entropy, abs=5e-3)


def fig2_verdicts(change=lambda row: row, scale="cpu"):
    import fig2_corrupted_labels as fig2
    rows = []
    for cell in fig2.make_cells(scale):
        accuracy = 0.95 if cell["beta"] < 0.6 else 0.1
        nats = 2 + 0.001 * cell["n"] / 3000
        if cell["panel"] == "corruption":
            nats += fig2.label_entropy(cell["corruption"], cell["kind"]) * cell["n"] / 3000
        rows.append(change(cell | dict(
            status="ok", seed=0, train_acc_batch=accuracy, information=nats * cell["n"],
            cross_entropy_batch=0.4 if accuracy > 0.5 else math.log(10))))
    return {row["claim"]: row["holds"] for row in fig2.claims(fig2.add_derived(rows), scale)}


def test_fig2_claims_can_hold_and_fail_and_stay_undecided():
    def cell(**where):
        new = {key[4:]: where.pop(key) for key in list(where) if key.startswith("new_")}
        return lambda row: row | (new if where.items() <= row.items() else {})

    verdicts = fig2_verdicts()
    assert len(verdicts) == 13 and set(verdicts.values()) == {"yes"}
    assert fig2_verdicts(cell(budget=2, new_information=1.0)) == verdicts
    assert len(fig2_verdicts(scale="demo")) == 6
    for part, change in (
            ("All-CNN: train error",
             cell(model="All-CNN", beta=0.158, new_train_acc_batch=0.849)),
            ("ResNet: train error",
             cell(model="ResNet", beta=2.51, new_train_acc_batch=0.21)),
            ("ResNet: it passes",
             cell(model="ResNet", beta=0.398, new_train_acc_batch=0.1)),
            ("r ≤ 1", cell(model="ResNet", beta=0.158, new_information=1500.0)),
            ("over 85%", cell(corruption=0.3, new_train_acc_batch=0.84)),
            ("every step", cell(corruption=0.7, n=3000, new_information=6100.0)),
            ("log 10", cell(corruption=1.0, n=3000, new_information=15_000.0)),
            ("grows with N", cell(corruption=1.0, n=1000, new_information=1900.0)),
            ("less than half", cell(corruption=0.45, new_information=9000.0)),
            ("is constant", cell(corruption=0.09, new_information=8500.0))):
        failed = [sentence for sentence, holds in fig2_verdicts(change).items() if holds == "NO"]
        assert any(part in sentence for sentence in failed), part
    assert fig2_verdicts(lambda row: row | {"status": "diverged"}) == {}
