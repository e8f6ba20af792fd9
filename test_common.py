"""Tests of common.py and of the figure scripts: pytest test_common.py. No network, no data."""

import argparse
import copy
import importlib
import itertools
import json
import math
import multiprocessing
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

import common
from common import (
    DataError,
    StochasticConv2d,
    StochasticLinear,
    add_clutter,
    alpha_from_information,
    bn_recalibrated,
    channel_statistics,
    corrupt_labels,
    density_ratio_information,
    draw_subset,
    g,
    ib_loss,
    label_information,
    layer_information,
    layer_information_bound,
    load_celeba,
    load_cifar10,
    load_images,
    load_mnist,
    minibatches,
    pac_bayes_bound,
    prior_divergence,
    sample_weights,
    synthetic_digits,
    synthetic_faces,
    synthetic_objects,
    to_stochastic,
    total_correlation,
    weight_information,
)

HERE = Path(__file__).resolve().parent
NOISES = list(itertools.product(("gaussian", "lognormal"), (True, False)))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(kind, **options):
    if kind == "linear":
        return StochasticLinear(6, 4, **options), torch.randn(3, 6)
    layer = StochasticConv2d(
        4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular", **options
    )
    return layer, torch.randn(3, 4, 5, 5)


# === 1. Stochastic layers ======================================================================


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("noise, local", NOISES)
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
    assert (draws.var(0) / variance - 1).abs().max() < 0.25
    assert (draws.var(0) / variance).mean().sub(1).abs() < 0.02


@pytest.mark.parametrize("noise", ["gaussian", "lognormal"])
def test_weight_samples_follow_torch_distributions(noise):
    layer = StochasticLinear(1, 20_000, bias=False, noise=noise, local=False, log_alpha=-0.7)
    sample = layer(torch.ones(1, 1))[0].detach()
    weight, alpha = layer.weight[:, 0].detach(), torch.tensor(math.exp(-0.7))
    if noise == "gaussian":
        uniform = torch.distributions.Normal(weight, alpha.sqrt() * weight.abs()).cdf(sample)
    else:
        uniform = torch.distributions.LogNormal(-alpha / 2, alpha.sqrt()).cdf(sample / weight)
    distance = (uniform.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert distance < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov, 0.1% level


@pytest.mark.parametrize("kind", ["linear", "conv"])
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
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return (
        k1 - k1 * torch.sigmoid(k2 + k3 * log_alpha) + 0.5 * torch.log1p(torch.exp(-log_alpha))
    ).sum()


def test_gaussian_information_is_the_formula_of_molchanov_with_its_gradient():
    layer = StochasticLinear(20, 30, log_alpha=0.0).double()
    layer.log_alpha = 4 * torch.randn(30, 20, dtype=torch.double)
    layer.information().backward()
    weight, log_sigma2 = (
        p.detach().clone().requires_grad_() for p in (layer.weight, layer.log_sigma2)
    )
    naive = naive_kl(weight, log_sigma2)
    naive.backward()
    assert layer.information().item() == pytest.approx(naive.item(), rel=1e-6)
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-6)
    assert torch.allclose(layer.log_sigma2.grad, log_sigma2.grad, rtol=1e-6)
    assert torch.autograd.gradcheck(
        common._GaussianKL.apply,
        (
            torch.randn(5, dtype=torch.double, requires_grad=True),
            torch.randn(5, dtype=torch.double, requires_grad=True),
        ),
    )


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


@pytest.mark.parametrize("noise, local", NOISES)
def test_a_cap_on_alpha_holds_in_value_and_lets_the_gradient_pass(noise, local):
    layer = StochasticLinear(5, 3, noise=noise, local=local, log_alpha=4.0, max_log_alpha=0.5)
    capped = StochasticLinear(5, 3, noise=noise, local=local, max_log_alpha=0.5)
    capped.load_state_dict(layer.state_dict())
    capped.log_alpha = 0.5
    x, grads = torch.randn(7, 5), []
    assert layer.log_alpha.max() <= 0.5 and layer.information().abs() < 1e-4
    for some in (layer, capped):
        torch.manual_seed(1)
        (some(x).square().sum() + some.information()).backward()
        grads.append(some.log_sigma2.grad)
    assert torch.allclose(*grads, rtol=1e-3) and grads[0].abs().min() > 0


@pytest.mark.parametrize("noise, local", NOISES)
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


def gaussian_divergence(log_alpha):
    """KL of N(w, alpha w^2) from the log-uniform prior, 0 at alpha = infinity, by integration."""
    step = 5e-5
    normal = torch.arange(-10, 10, step, dtype=torch.double) + step / 2
    density = torch.exp(-(normal**2) / 2) * step / math.sqrt(2 * math.pi)
    mean = [
        (density * torch.log((1 + math.exp(a / 2) * normal).abs())).sum()
        for a in log_alpha.tolist()
    ]
    return torch.stack(mean) - log_alpha / 2 + (np.euler_gamma + math.log(2)) / 2


def test_gaussian_information_is_the_divergence_to_0_0095_nats_and_nearly_the_capacity():
    log_alpha = torch.arange(-10, 10.01, 0.5, dtype=torch.double)
    exact, capacity = gaussian_divergence(log_alpha), 0.5 * torch.log1p(torch.exp(-log_alpha))
    approximate = torch.stack([naive_kl(torch.ones(1), a) for a in log_alpha])
    assert 0.0090 < (approximate - exact).abs().max() < 0.0095
    layer = StochasticLinear(50, 40)
    for a, value in zip(log_alpha.tolist(), approximate):
        layer.log_alpha = a
        assert layer.information().item() / 2000 == pytest.approx(value.item(), abs=1e-4)
    above = exact - capacity
    assert (
        above.min() > -1e-4
        and above.max() < 0.636
        and above[0] > 0.635
        and (above[log_alpha == 4] < 1e-3).all()
    )


@pytest.mark.parametrize("mean", [-3.0, 0.01, 20.0])
def test_proposition_4_1_is_the_divergence_from_a_log_uniform_prior_whatever_the_mean(mean):
    alpha, low, high = 0.04, -12.0, 8.0  # the prior: log|w| uniform from low to high
    posterior = torch.distributions.LogNormal(
        math.log(abs(mean)) - alpha / 2, math.sqrt(alpha)
    )  # of |w|
    sample = posterior.sample((100_000,))
    assert low < sample.min().log() and sample.max().log() < high
    divergence = (posterior.log_prob(sample) + sample.log() + math.log(high - low)).mean()
    constant = math.log(high - low) - 0.5 * math.log(2 * math.pi * math.e)
    assert divergence.item() == pytest.approx(-0.5 * math.log(alpha) + constant, abs=0.01)
    layer = StochasticLinear(
        10, 5, noise="lognormal", log_alpha=math.log(alpha), max_log_alpha=2 * constant
    )
    assert layer.information().item() / 50 == pytest.approx(
        divergence.item(), abs=0.01
    )  # the cap is the constant


def test_lognormal_noise_at_the_cap_holds_nothing():
    at_the_cap = StochasticLinear(10, 5, noise="lognormal", log_alpha=7.0, max_log_alpha=2.0)
    assert at_the_cap.information().item() == 0
    assert torch.equal(at_the_cap.log_alpha, torch.full((5, 10), 2.0))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("noise, local", NOISES)
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


def test_information_falls_as_alpha_grows():
    for noise in ("gaussian", "lognormal"):
        values = [
            StochasticLinear(3, 3, noise=noise, log_alpha=a).information().item()
            for a in (-20, -5, -1, 0, 0.9)
        ]
        assert values == sorted(values, reverse=True) and values[-1] >= 0


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
    with bn_recalibrated(model, [x], draw=False):
        assert not model.training and layer.sampling is False
        assert torch.allclose(
            model[1].running_mean, F.linear(x, layer.weight, layer.bias).mean(0), atol=1e-5
        )
        assert torch.allclose(model(x).mean(0), torch.zeros(4), atol=1e-5)
    with (
        pytest.raises(RuntimeError),
        bn_recalibrated(model, x.split(1 + len(x) // 2) * 200, draw=True),
    ):
        assert layer.sampling is True and not torch.equal(model(x), model(x))
        variance = (
            (layer.weight * x.mean(0)).square().sum(1)
        )  # of the mean over x of x @ w, between weight samples
        outputs = F.linear(x, layer.weight, layer.bias).mean(0)
        assert ((model[1].running_mean - outputs).abs() < 5 * (variance / 400).sqrt()).all()
        raise RuntimeError
    assert layer.sampling is None and all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if "running" in k
    )


def test_noise_must_have_a_known_name():
    with pytest.raises(ValueError, match="uniform"):
        StochasticLinear(2, 2, noise="uniform")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_to_stochastic_keeps_the_function_of_torchvision_models(name):
    model = (
        getattr(torchvision.models, name)(weights=None).eval().to(memory_format=torch.channels_last)
    )
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
    assert weight_information(model).item() == pytest.approx(
        sum(m.information().item() for m in twins), rel=1e-5
    )
    model.train()
    loss, _, _ = ib_loss(model(x), torch.tensor([1, 2]), model, 1.0, 100)
    loss.backward()
    assert all(
        m.log_sigma2.grad.isfinite().all() and m.log_sigma2.grad.abs().sum() > 0 for m in twins
    )


def test_to_stochastic_keeps_every_option_of_a_layer():
    conv = nn.Conv2d(
        4, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False, padding_mode="reflect"
    )
    conv.double().eval()
    x = torch.randn(1, 4, 9, 9, dtype=torch.double)
    expected, weight = conv(x), conv.weight
    twin = to_stochastic(conv, noise="lognormal", local=True, log_alpha=-3.0)
    assert (
        type(twin) is StochasticConv2d
        and twin.weight is weight
        and twin.log_sigma2.dtype == torch.double
    )
    assert torch.equal(twin(x), expected)
    assert torch.allclose(twin.log_alpha, torch.tensor(-3.0, dtype=torch.double))
    assert to_stochastic(twin) is twin and torch.allclose(
        twin.log_alpha, torch.tensor(-3.0, dtype=torch.double)
    )
    shared = nn.Linear(3, 3)
    model = to_stochastic(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and len(list(model.parameters())) == 3


def test_to_stochastic_skips_named_layers_and_blocks():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    )
    to_stochastic(model, skip=["0", "1"])
    assert [type(m) for m in (model[0], model[1][0], model[1][1], model[2])] == [nn.Linear] * 3 + [
        StochasticLinear
    ]
    with pytest.raises(ValueError, match="classifier"):
        to_stochastic(model, skip="classifier")


def test_checkpoints_copies_and_dtypes(tmp_path):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    model = to_stochastic(copy.deepcopy(plain), log_alpha=-2.0).eval()
    x = torch.randn(2, 1, 6, 6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = to_stochastic(copy.deepcopy(plain))
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(twin(x), plain(x)) and torch.allclose(
        twin[0].log_alpha, torch.tensor(-2.0), atol=1e-4
    )
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    twin.load_state_dict(
        other.state_dict()
    )  # a checkpoint of the plain model keeps alpha, not sigma
    assert torch.equal(twin(x), other(x)) and torch.allclose(
        twin[3].log_alpha, torch.tensor(-2.0), atol=1e-4
    )
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).bfloat16()
    assert half[0].information().dtype == torch.float32
    assert half[0].information().item() == pytest.approx(model[0].information().item(), rel=0.05)


@pytest.mark.parametrize("noise, local", NOISES)
def test_training_step_compiles_and_runs_under_bf16_autocast(noise, local):
    model = to_stochastic(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)),
        noise=noise,
        local=local,
    ).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = torch.arange(4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y):
        return ib_loss(model(x), y, model, 1.0, 100)

    loss, cross_entropy, information = compiled(x, y)
    loss.backward()
    assert information.item() == pytest.approx(weight_information(model).item(), rel=1e-5)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss, cross_entropy, half_information = ib_loss(logits, y, model, 1.0, 100)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and half_information.dtype == torch.float32
    assert half_information.item() == pytest.approx(information.item(), rel=1e-6)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_second_derivatives_are_refused_rather_than_wrong():
    layer = StochasticLinear(3, 2)
    (gradient,) = torch.autograd.grad(layer.information(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert weight_information(to_stochastic(model)).item() == pytest.approx(
        model[0].information().item()
    )


def test_denormals_are_flushed():
    assert (torch.tensor([1e-39]) * torch.tensor([0.5])).item() == 0


# === 2. Weight-IB loss =========================================================================


def test_ib_loss_is_mean_cross_entropy_plus_beta_over_n_times_nats():
    model = to_stochastic(nn.Linear(5, 4))
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    loss, cross_entropy, information = ib_loss(logits, labels, model, 0.5, 50)
    expected = -logits.log_softmax(1)[torch.arange(7), labels].mean()
    assert cross_entropy.item() == pytest.approx(expected.item())
    assert information.item() == pytest.approx(
        naive_kl(model.weight, model.log_sigma2).item(), rel=1e-4
    )
    assert loss.item() == pytest.approx((expected + 0.5 * information / 50).item())


def test_ib_loss_sums_over_attributes():
    model, logits, attributes = (
        to_stochastic(nn.Linear(5, 4)),
        torch.randn(7, 4),
        torch.randint(2, (7, 4)),
    )
    expected = (
        -torch.distributions.Bernoulli(logits=logits).log_prob(attributes.float()).sum(1).mean()
    )
    assert ib_loss(logits, attributes, model, 0.0, 7)[0].item() == pytest.approx(expected.item())


def test_loss_refuses_what_makes_no_sense():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no stochastic layer"):
        weight_information(nn.Linear(3, 3))
    for beta, n in ((-1.0, 10), (1.0, 0)):
        with pytest.raises(ValueError):
            ib_loss(logits, labels, to_stochastic(nn.Linear(3, 3)), beta, n)


# === 3. Information estimators =================================================================


def test_g_is_the_capacity_of_proposition_5_2():
    alpha = torch.tensor([1e-6, 0.1, 1.0, 5.0, 40.0], dtype=torch.double)
    expected = [-0.5 * math.log(-math.expm1(-a)) for a in alpha.tolist()]
    assert g(alpha).tolist() == pytest.approx(expected, rel=1e-9)
    assert g(1e-9).item() == pytest.approx(
        -0.5 * math.log(1e-9), rel=1e-6
    )  # -log(alpha)/2 for small alpha
    assert (g(alpha).diff() < 0).all() and g(0.0) == math.inf
    with pytest.raises(ValueError):
        g(-0.1)


def test_alpha_from_information_inverts_the_information_of_a_layer():
    layer = StochasticLinear(30, 20, noise="lognormal", log_alpha=-2.5, max_log_alpha=0.0)  # C = 0
    assert alpha_from_information(layer.information(), 600).item() == pytest.approx(
        math.exp(-2.5), rel=1e-5
    )


def spacing_entropy(samples):
    """Entropy of each column of samples (n, d) by Vasicek's spacings, nats."""
    i, m = torch.arange(len(samples)), int(len(samples) ** 0.5)
    above, below = (i + m).clamp(max=len(i) - 1), (i - m).clamp(min=0)
    ordered = samples.sort(0).values
    return torch.log((ordered[above] - ordered[below]) * len(i) / (above - below)[:, None]).mean(0)


@pytest.mark.parametrize("noise, alpha", [("lognormal", 0.2), ("gaussian", 4.0)])
def test_proposition_5_1_is_what_sampled_units_tell_of_correlated_inputs(noise, alpha):
    x = torch.randn(10_000, 60) @ (torch.randn(60, 60) / 8 + torch.eye(60)) + 0.3
    weight, alpha = torch.randn(3, 60), alpha * torch.rand(3, 60)

    def sample(x):  # new weights for every row of x
        eps = torch.randn(len(x), 3, 60)
        eps = (
            1 + alpha.sqrt() * eps
            if noise == "gaussian"
            else torch.exp(alpha.sqrt() * eps - alpha / 2)
        )
        return torch.einsum("noi,oi,ni->no", eps, weight, x)

    alpha_of_eps = torch.log1p(alpha) if noise == "gaussian" else alpha
    gaussian = 0.5 * torch.log(
        2 * math.pi * math.e * x**2 @ (torch.expm1(alpha_of_eps) * weight**2).T
    )  # h(z|x)
    given = torch.stack([spacing_entropy(sample(row.expand(1000, -1))) for row in x[:100]])
    given = gaussian.mean(0) + (given - gaussian[:100]).mean(
        0
    )  # 100 inputs, with the Gaussian as control variate
    sampled = (spacing_entropy(sample(x)) - given).sum()
    assert layer_information(weight, alpha_of_eps, x).item() == pytest.approx(
        sampled.item(), abs=0.1
    )


def white_inputs(n, dim):
    """Gaussian inputs (n, dim) of which mean and covariance are exactly 0 and 1."""
    x = torch.randn(n, dim, dtype=torch.double)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / n), x.T, upper=False).T


@pytest.mark.parametrize("dim_x", [1, 2, 5, 20, 100])
def test_proposition_5_2_holds_for_random_layers_and_falls_strictly_with_alpha(dim_x):
    alphas = 10.0 ** torch.arange(-5, 2, dtype=torch.double)
    x, weight = white_inputs(20_000, dim_x), torch.randn(4, dim_x, dtype=torch.double)
    information = torch.stack([layer_information(weight, alpha, x) for alpha in alphas])
    bound = torch.stack([layer_information_bound(4, alpha) for alpha in alphas])
    excess = information / 4 - g(alphas)
    assert (
        (excess > -1e-9).all()
        and (information < bound).all()
        and torch.equal(bound, 4 * g(alphas) + 4)
    )
    assert excess.max() < min(
        0.65, 2 / dim_x
    )  # c = O(1/dim x): at most the 0.635 of a single input
    assert (information.diff() < 0).all() and (bound.diff() < 0).all()


def test_corollary_5_3_bounds_what_the_last_layer_tells_of_the_input_by_the_narrowest():
    widths, alphas = (30, 1, 8, 1), (0.3, 0.001, 0.001)
    weights = [torch.randn(m, n) / n**0.5 for n, m in zip(widths, widths[1:])]

    def sample(z):
        for weight, alpha in zip(weights, alphas):
            eps = torch.exp(alpha**0.5 * torch.randn(len(z), *weight.shape) - alpha / 2)
            z = torch.einsum("noi,oi,ni->no", eps, weight, z)
        return z

    x = torch.randn(5000, 30)
    given = torch.stack([spacing_entropy(sample(row.expand(500, -1))) for row in x[:100]]).mean()
    held = spacing_entropy(sample(x)) - given  # I(z3;x)
    assert (
        0.2 < held < layer_information(weights[0], 0.3, x) + 0.1
    )  # data processing, within the error of held
    bounds = [layer_information_bound(width, alpha) for width, alpha in zip(widths[1:], alphas)]
    assert held < min(bounds) == bounds[0] and layer_information(
        weights[2], 0.001, torch.randn(1000, 8)
    ) > min(bounds)


def test_proposition_5_2_asks_for_centred_and_uncorrelated_inputs():
    weight, x = torch.rand(3, 100), torch.randn(2000, 1)
    assert layer_information(weight, 0.1, x.expand(-1, 100)) > layer_information_bound(
        3, 0.1
    )  # inputs all alike
    assert layer_information(torch.randn(3, 100), 0.1, torch.randn(2000, 100) + 9) < 3 * g(
        0.1
    )  # far off centre
    assert (
        layer_information(weight, 0.1, F.pad(x.expand(-1, 100), (0, 0, 0, 1))) == math.inf
    )  # one x = 0: no noise
    mixed = torch.rand(3, 100)  # the alpha of a unit whose weights differ in theirs
    unit = torch.log1p((torch.expm1(mixed) * weight**2).sum(1) / (weight**2).sum(1))
    x = white_inputs(5000, 100).float()
    assert (
        3 * g(unit).mean()
        <= layer_information(weight, mixed, x)
        <= layer_information_bound(3, unit)
    )


def test_noise_of_one_variance_has_one_capacity():
    a = torch.tensor([0.01, 1.0, 30.0], dtype=torch.double)
    assert torch.allclose(g(torch.log1p(a)), 0.5 * torch.log1p(1 / a))  # that of a Gaussian channel


def test_pac_bayes_bound_is_no_better_than_inverting_the_binary_divergence():
    def inverse(
        loss, budget
    ):  # the largest p of which the coins' divergence from loss is within the budget
        low, high = loss, 1 - 1e-12
        for _ in range(60):
            p = (low + high) / 2
            divergence = sum(
                a * math.log(a / b) for a, b in ((loss, p), (1 - loss, 1 - p)) if a > 0
            )
            low, high = (p, high) if divergence < budget else (low, p)
        return low

    for loss, divergence, n in itertools.product(
        (0.0, 0.02, 0.3, 0.9), (0.0, 30.0, 3000.0), (300, 50_000)
    ):
        bound = pac_bayes_bound(loss, divergence, n, max_loss=1)
        tight = inverse(loss, (divergence + math.log(len(common.LAMBDAS) / 0.05)) / n)
        assert loss < tight <= bound
        assert (
            bound > 1 or loss > 0.5 or bound < loss + 2.3 * (tight - loss)
        )  # twice it for no loss
    assert pac_bayes_bound(0.2, 100, 1000) == pytest.approx(
        min(
            (0.2 + lam * math.log(10) * (100 + math.log(21 / 0.05)) / 1000) / (1 - 0.5 / lam)
            for lam in common.LAMBDAS
        )
    )


def test_pac_bayes_bound_refuses_what_it_does_not_hold_for():
    for arguments in (
        dict(loss=2.4, divergence=1.0),
        dict(loss=0.5, divergence=-1.0),
        dict(loss=0.5, divergence=1.0, lambdas=[0.5]),
        dict(loss=math.nan, divergence=1.0),
    ):
        with pytest.raises(ValueError):
            pac_bayes_bound(n=100, **arguments)


def test_prior_divergence_is_that_of_torch_distributions_and_refuses_what_is_not_counted():
    model = nn.Sequential(
        StochasticLinear(20, 30), nn.BatchNorm1d(30), StochasticLinear(30, 4, bias=False)
    ).double()
    prior = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer, scale in ((model[0], 0.3), (model[2], 0.01)):
            layer.weight.add_(scale * torch.randn_like(layer.weight))
            layer.log_sigma2.copy_(math.log(scale) * 2 + torch.randn_like(layer.weight))
    exact = 0
    for name, layer in (("0", model[0]), ("2", model[2])):
        q = torch.distributions.Normal(layer.weight, torch.exp(layer.log_sigma2 / 2))
        p = torch.distributions.Normal(prior[name + ".weight"], 1.0)
        of_s = [
            torch.distributions.kl_divergence(
                q, torch.distributions.Normal(p.loc, math.exp(k / 40))
            ).sum()
            for k in range(-799, 201)
        ]  # log s^2 in steps of 1/20
        exact = exact + min(of_s) + math.log(len(of_s))
    divergence = prior_divergence(model, prior)
    alone = prior_divergence(model[2], {k[2:]: v for k, v in prior.items() if k.startswith("2.")})
    assert 0 < alone < divergence
    assert divergence.item() == pytest.approx(exact.item(), rel=1e-9)
    divergence.backward()
    assert all(
        layer.weight.grad.abs().sum() > 0 and layer.log_sigma2.grad.abs().sum() > 0
        for layer in model[::2]
    )
    model(torch.randn(8, 20).double())  # running statistics move
    with pytest.raises(ValueError, match="1.running_mean, 1.running_var, 1.num_batches_tracked"):
        prior_divergence(model, prior)
    model.load_state_dict({k: v for k, v in prior.items() if k.startswith("1.")}, strict=False)
    with torch.no_grad():
        model[0].bias[3] += 1
    with pytest.raises(ValueError, match="0.bias"):
        prior_divergence(model, prior)
    with pytest.raises(ValueError, match="log-normal"):
        prior_divergence(StochasticLinear(2, 2, noise="lognormal"), {})


def test_label_information():
    labels = torch.arange(10).repeat(20)
    assert label_information(F.one_hot(labels).float() * 50, labels).item() == pytest.approx(
        math.log(10), abs=1e-6
    )
    assert label_information(torch.zeros(200, 10), labels).item() == pytest.approx(0, abs=1e-6)
    two = torch.tensor([0, 0, 0, 1])  # H(y) is theirs, not log 2
    assert label_information(F.one_hot(two).float() * 50, two).item() == pytest.approx(
        0.5623, abs=1e-4
    )
    # a noisy channel: right with probability p, else uniform over the rest
    p, n = 0.7, 200_000
    x = torch.randint(10, (n,))
    y = torch.where(torch.rand(n) < p, x, (x + torch.randint(1, 10, (n,))) % 10)
    channel = torch.full((10, 10), (1 - p) / 9).fill_diagonal_(p)
    exact = math.log(10) + p * math.log(p) + (1 - p) * math.log((1 - p) / 9)
    assert label_information(channel.log()[x], y).item() == pytest.approx(exact, abs=0.01)


def test_total_correlation_of_a_gaussian():
    a = torch.randn(4, 4, dtype=torch.double)
    covariance = a @ a.T + torch.eye(4)
    exact = 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance))
    z = torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=torch.double), covariance
    ).sample((100_000,))
    z = (
        torch.cat([z, torch.full((len(z), 1), 3.0)], 1).view(-1, 5, 1) * 7 + 2
    )  # scale, shift, constants do not matter
    assert total_correlation(z).item() == pytest.approx(exact.item(), abs=0.01)
    assert total_correlation(torch.randn(100_000, 3)).item() == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="samples"):
        total_correlation(torch.randn(4, 5))


class PairCritic(nn.Module):
    """Scores all pairs of rows of z and n: a bilinear form and inner products of two embeddings."""

    def __init__(self, dim):
        super().__init__()
        self.z, self.n = (
            nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.product = nn.Linear(dim, dim)
        nn.init.zeros_(self.product.weight)

    def forward(self, z, n):
        return self.product(z) @ n.T + self.z(z) @ self.n(n).T


def gaussian_pairs(information, dim, count):
    """(z, n), each (count, dim), of known I(z;n): dim pairs of Gaussians of one correlation."""
    square = -math.expm1(-2 * information / dim)  # I = -dim/2 log(1 - correlation^2)
    z = torch.randn(count, dim)
    return z, square**0.5 * z + (1 - square) ** 0.5 * torch.randn(count, dim)


@pytest.mark.parametrize(
    "information, dim", [(0, 1), (0, 20), (0.5, 1), (0.5, 20), (2, 5), (2, 20), (5, 20)]
)
def test_density_ratio_information_of_correlated_gaussians(information, dim):
    z, n = gaussian_pairs(information, dim, 60_000)
    ours = density_ratio_information(PairCritic(dim), z, n, lr=5e-3, steps=800, patience=200)
    within = (
        0.05 if information == 0 else max(0.1, (0.15 if information == 5 else 0.1) * information)
    )
    assert ours["plug_in"] == pytest.approx(information, abs=within)
    for bound in ("donsker_varadhan", "info_nce"):
        assert ours[bound] < information + within / 2 and ours[bound] == pytest.approx(
            information, abs=2 * within
        )


def test_density_ratio_information_measures_what_it_was_given():
    z, n = gaussian_pairs(2, 5, 3000)
    z.requires_grad_()
    critic = PairCritic(5)

    def estimate(n):
        torch.manual_seed(0)
        return density_ratio_information(
            copy.deepcopy(critic), z, n, validation=500, held_out=500, steps=60, batch=64
        )

    ours = estimate(n)
    assert z.grad is None and estimate(n) == ours
    shuffled = torch.cat(
        [n[:-500], n[-500:].roll(1, 0)]
    )  # what was learned does not hold of the held-out pairs
    assert estimate(shuffled)["info_nce"] < 0 < ours["info_nce"]
    for arguments in ((z[:-1], n), (z[:900], n[:900])):
        with pytest.raises(ValueError, match="pairs"):
            density_ratio_information(critic, *arguments)
    with pytest.raises(ValueError, match="every pair"):
        density_ratio_information(nn.Bilinear(5, 5, 1), z, n, validation=500, held_out=500)
    with pytest.raises(FloatingPointError):
        density_ratio_information(critic, z * math.nan, n, validation=500, held_out=500, steps=1)


def test_ratio_estimates_of_scores_written_by_hand():
    scores = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 0.5], [-2.0, 0.0, 1.0]])
    ours = common._ratio_estimates(scores)
    wrong = [0.0, -1.0, 1.0, 0.5, -2.0, 0.0]
    assert ours["plug_in"] == pytest.approx(2.0)
    assert ours["donsker_varadhan"] == pytest.approx(2 - math.log(sum(map(math.exp, wrong)) / 6))
    assert ours["info_nce"] == pytest.approx(
        scores.log_softmax(1).diagonal().mean().item() + math.log(3)
    )


# === 4. Data ===================================================================================


def cifar_arrays(n=4):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, (n, 1), np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}


def test_loaders_read_npz_files(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    x, y, x_test, y_test = load_cifar10(tmp_path)
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.uint8 and x_test.shape == (2, 3, 32, 32)
    assert y.dtype == torch.int64 and y.tolist() == arrays["y_train"].ravel().tolist()
    assert x[1, 2, 3, 4] == arrays["x_train"][1, 3, 4, 2]
    digits = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    np.savez(
        tmp_path / "mnist.npz",
        x_train=digits,
        y_train=np.arange(3),
        x_test=digits,
        y_test=np.arange(3),
    )
    x, y, *_ = load_mnist(tmp_path)
    assert (
        x.shape == (3, 1, 28, 28) and (x[:, 0].numpy() == digits).all() and y.tolist() == [0, 1, 2]
    )
    faces = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.savez(
        tmp_path / "celeba64.npz",
        images=faces,
        attrs=np.eye(3, 40, dtype=np.uint8),
        attr_names=np.array([f"a{i}" for i in range(40)]),
        partition=np.array([0, 1, 2], np.uint8),
    )
    images, attrs, names, partition = load_celeba(tmp_path)
    assert images.shape == (3, 3, 64, 64) and images[2, 1, 5, 6] == faces[2, 5, 6, 1]
    assert attrs.shape == (3, 40) and names[39] == "a39" and partition.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "garbage",
        "empty",
        "missing",
        "shape",
        "pickle",
        "short",
        "one-hot",
        "pairs",
        "0-d",
        "label",
        "test label",
        "negative",
    ],
)
def test_damaged_npz_files_are_named_in_one_line(tmp_path, damage):
    path = tmp_path / "cifar10.npz"
    arrays = cifar_arrays()
    if damage == "missing":
        del arrays["y_test"]
    if damage == "shape":
        arrays["x_train"] = arrays["x_train"].astype(np.float32)
    changes = {
        "one-hot": ("y_train", np.eye(10, dtype=np.uint8)[[0, 1, 2, 3]]),
        "0-d": ("y_test", np.uint8(3)),
        "pairs": ("y_train", np.zeros((4, 2), int)),
        "label": ("y_train", np.array([0, 1, 2, 10])),
        "test label": ("y_test", np.array([0, 255])),
        "negative": ("y_train", np.array([0, 1, 2, -1])),
    }
    if damage in changes:
        arrays.update([changes[damage]])
    if damage == "short":
        arrays["y_train"] = arrays["y_train"][:-1]
    if damage == "pickle":
        arrays["y_train"] = np.array([{}, 1], dtype=object)
    np.savez(path, **arrays)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "garbage": b"no npz", "empty": b""}
    path.write_bytes(damaged.get(damage, content))
    with pytest.raises(DataError) as error:
        load_cifar10(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert damage not in changes or changes[damage][0] in str(error.value)
    assert path.exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("partition", np.array([0, 1, 3])),
        ("attr_names", np.array(["a"] * 39)),
        ("attrs", 2 * np.ones((3, 40), int)),
        ("images", np.zeros((3, 64, 64), int)),
    ],
)
def test_damaged_faces_are_named_in_one_line(tmp_path, name, value):
    arrays = dict(
        images=np.zeros((3, 64, 64, 3), np.uint8),
        attrs=np.zeros((3, 40), int),
        partition=np.array([0, 1, 2]),
        attr_names=np.array([f"a{i}" for i in range(40)]),
    )
    np.savez(tmp_path / "celeba64.npz", **arrays)
    assert load_celeba(tmp_path)[0].shape == (3, 3, 64, 64)
    np.savez(tmp_path / "celeba64.npz", **arrays | {name: value})
    with pytest.raises(DataError, match=name):
        load_celeba(tmp_path)


def test_big_endian_labels_are_read(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays | {"y_train": arrays["y_train"].astype(">i4")})
    assert load_cifar10(tmp_path)[1].tolist() == arrays["y_train"].ravel().tolist()


def test_load_images_draws_different_test_images_and_takes_statistics_of_the_training_set(tmp_path):
    x, y, x_test, y_test, mean, std = load_images("objects", tmp_path, 30, 30)
    assert not torch.equal(x, x_test) and not torch.equal(y, y_test)
    assert torch.equal(mean, channel_statistics(x)[0]) and torch.equal(
        std, channel_statistics(x)[1]
    )
    images = common.normalise(x, mean, std, 28)
    assert images.shape == (30, 3, 28, 28) and images.is_contiguous(
        memory_format=torch.channels_last
    )
    assert torch.allclose(images, ((x.float() - mean) / std)[:, :, 2:30, 2:30])
    arrays = cifar_arrays() | {"x_test": np.zeros((2, 32, 32, 3), np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    x, _, x_test, *_ = load_images("cifar10", tmp_path, 0, 0)
    assert len(x) == 4 and (x_test == 0).all() and (x != 0).any()


def test_look_up_goes_from_npz_to_torchvisions_copy_to_download(tmp_path, monkeypatch):
    calls = []

    class FakeCIFAR10:
        def __init__(self, root, train, download):
            calls.append((train, download))
            if not download and not (tmp_path / "copy").exists():
                raise RuntimeError(
                    "Dataset not found or corrupted. You can use download=True to download it"
                )
            arrays = cifar_arrays()
            self.data, self.targets = arrays["x_train"], arrays["y_train"].ravel().tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    x, *_ = load_cifar10(tmp_path)
    assert calls == [(True, False), (True, True), (False, True)]
    assert os.listdir(tmp_path) == ["cifar10.npz"]  # written in one step, nothing left over
    again, *_ = load_cifar10(tmp_path)
    assert torch.equal(x, again) and len(calls) == 3
    (tmp_path / "cifar10.npz").unlink()
    (tmp_path / "copy").touch()
    load_cifar10(tmp_path)
    assert calls[3:] == [(True, False), (False, False)]


def test_celeba_is_cropped_and_cached(tmp_path, monkeypatch):
    from PIL import Image

    class FakeCelebA:
        attr_names = [f"a{i}" for i in range(40)] + [
            ""
        ]  # torchvision's header ends in an empty name
        attr = torch.eye(2, 40, dtype=torch.long)

        def __init__(self, root, split, transform, download):
            assert split == "all"
            (Path(root) / "celeba").mkdir(exist_ok=True)
            (Path(root) / "celeba" / "list_eval_partition.txt").write_text(
                "000001.jpg 0\n000002.jpg 2\n"
            )
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
    assert (
        len(names) == 40 and partition.tolist() == [0, 2] and (tmp_path / "celeba64.npz").exists()
    )


@pytest.mark.parametrize(
    "load, name, hints",
    [
        (load_cifar10, "CIFAR10", ["cifar10.npz"]),
        (load_mnist, "MNIST", ["mnist.npz"]),
        (load_celeba, "CelebA", ["gdown", "img_align_celeba", "quota"]),
    ],
)
def test_failed_downloads_say_what_to_do(tmp_path, monkeypatch, load, name, hints):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset not found" if not kwargs["download"] else "no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, name, fail)
    with pytest.raises(DataError) as error:
        load(tmp_path / "data")
    message = str(error.value)
    assert (
        "\n" not in message
        and "no network" in message
        and "--scale demo" in message
        and str(tmp_path) in message
    )
    assert all(hint in message for hint in hints) and not (tmp_path / "data").exists()


def test_channel_statistics_and_subsets():
    x = torch.randint(256, (50, 3, 6, 5), dtype=torch.uint8)
    mean, std = channel_statistics(x)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert torch.allclose(mean.flatten(), x.float().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(std.flatten(), x.float().std((0, 2, 3), correction=0), rtol=1e-5)
    x, y = torch.arange(50), torch.arange(50) + 100
    few, labels = draw_subset(x, y, 20, torch.Generator().manual_seed(1))
    assert (
        len(set(few.tolist())) == 20
        and torch.equal(labels, few + 100)
        and not torch.equal(few, x[:20])
    )
    assert torch.equal(few, draw_subset(x, y, 20, torch.Generator().manual_seed(1))[0])
    with pytest.raises(DataError, match="51 .* 50"):
        draw_subset(x, y, 51, torch.Generator())


def test_corrupt_labels_corrupts_exactly_that_fraction():
    labels = torch.full((1000,), -1)
    for fraction in (0, 0.1, 0.25, 0.9995, 1):
        new = corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(3))
        assert (new >= 0).sum() == round(1000 * fraction) and new.max() < 10
        assert torch.equal(
            new, corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(3))
        )
    assert (labels == -1).all()
    new = corrupt_labels(
        torch.zeros(100_000, dtype=torch.long), 1.0, 10, torch.Generator().manual_seed(0)
    )
    assert (torch.bincount(new) - 10_000).abs().max() < 500  # uniform, the old label included
    one, two = (
        corrupt_labels(labels, 0.5, 10, torch.Generator().manual_seed(s)) >= 0 for s in (1, 2)
    )
    assert 400 < (one ^ two).sum() < 600 and 200 < one[:500].sum() < 300  # at random positions
    digits = torch.arange(1000) % 10
    pairs = corrupt_labels(digits, 0.3, 10, torch.Generator().manual_seed(0), kind="pair")
    assert set((pairs - digits).remainder(10).tolist()) == {0, 1} and (pairs != digits).sum() == 300
    for fraction, kind in ((1.5, "uniform"), (-0.1, "uniform"), (0.5, "flip")):
        with pytest.raises(ValueError):
            corrupt_labels(labels, fraction, 10, torch.Generator(), kind)


def test_add_clutter_pastes_squares_and_returns_their_mask():
    images = torch.full((500, 1, 28, 28), 7, dtype=torch.uint8)
    cluttered, mask = add_clutter(images, torch.Generator().manual_seed(0), squares=1, size=4)
    assert mask.shape == (500, 1, 28, 28) and mask.dtype == torch.bool
    assert (
        (mask.sum((1, 2, 3)) == 16).all()
        and (cluttered[mask] == 255).all()
        and (cluttered[~mask] == 7).all()
    )
    rows, columns = mask.any(3)[:, 0], mask.any(2)[:, 0]
    assert (rows.sum(1) == 4).all() and (columns.sum(1) == 4).all()
    assert (
        set(rows.int().argmax(1).tolist())
        == set(range(25))
        == set(columns.int().argmax(1).tolist())
    )
    assert (images == 7).all()
    cluttered, mask = add_clutter(torch.zeros(50, 3, 28, 28), torch.Generator().manual_seed(0))
    assert (
        cluttered.shape == (50, 3, 28, 28)
        and cluttered.max() == 1
        and mask.shape == (50, 1, 28, 28)
    )
    assert 120 < mask.float().sum((1, 2, 3)).mean() < 160  # ten squares of 16, less what overlaps


@pytest.mark.parametrize(
    "make, shape", [(synthetic_objects, (3, 32, 32)), (synthetic_digits, (1, 28, 28))]
)
def test_synthetic_images_are_seeded_and_balanced(make, shape):
    images, labels = make(600, seed=1)
    assert (
        images.shape == (600, *shape)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    assert torch.equal(images, make(600, seed=1)[0]) and not torch.equal(
        images, make(600, seed=2)[0]
    )
    assert torch.bincount(labels, minlength=10).min() > 30
    assert len(images.flatten(1).unique(dim=0)) == 600


def test_synthetic_faces_know_their_factors():
    images, attributes, factors = synthetic_faces(600, seed=1)
    assert images.shape == (600, 3, 64, 64) and attributes.shape == (
        600,
        len(common.FACE_ATTRIBUTES),
    )
    assert attributes.dtype == torch.uint8 and attributes.max() == 1
    assert torch.equal(
        factors["glasses"], attributes[:, common.FACE_ATTRIBUTES.index("glasses")].long()
    )
    assert {name: len(values.unique()) for name, values in factors.items()} == common.FACE_FACTORS
    assert torch.equal(images, synthetic_faces(600, seed=1)[0])


def test_synthetic_digits_are_worth_training_on():
    (x, y), (x_test, y_test) = synthetic_digits(2500, seed=0), synthetic_digits(1000, seed=1)
    x, x_test = x.float() / 255, x_test.float() / 255
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    accuracy = []
    for model in (cnn, linear):
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for epoch in range(4):
            for index in torch.randperm(2500).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
        accuracy.append((model.eval()(x_test).argmax(1) == y_test).float().mean().item())
    assert accuracy[0] > 0.9 and accuracy[1] < accuracy[0] - 0.2


# === 5. Running a grid, in real processes =====================================================

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
# Most of a short run is imports: on Linux it is forked from a process that has done them.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["test_common", "matplotlib.pyplot"])


class Run:
    """python <script> <arguments> in a process of its own; changes: what its module is to hold."""

    def __init__(self, script, *arguments, changes=None):
        self.command, self.folder = [script, *arguments], tempfile.TemporaryDirectory()
        target = (self.command, self.folder.name, changes)
        self.process = CONTEXT.Process(target=run_script, args=target)
        self.process.start()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=240):
        """CompletedProcess with what it printed."""
        self.process.join(timeout)
        if self.process.is_alive():
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
            setattr(figure, name, {"demo": value})
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


def test_numbers_are_the_same_with_jobs(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    toys = [Toy(tmp_path / name) for name in "ab"]
    runs = side_by_side(lambda toy, jobs: toy.run("--jobs", jobs), toys, "12")
    assert [run.returncode for run in runs] == [0, 0]
    values = [{r["beta"]: r["value"] for r in toy.rows()} for toy in toys]
    assert values[0] == values[1] and len(values[0]) == 4


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_kill_and_torn_line_lose_nothing_finished_and_repeat_nothing(tmp_path, jobs):
    toy = Toy(tmp_path, sleep=0.4, betas="1, 2, 3, 4, 5, 7, 8, 9")
    run = toy.start("--jobs", jobs)
    toy.wait_for_rows(2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(1.5)  # workers notice that their parent is gone
    saved, logged = toy.rows(), toy.log.read_text().split()
    time.sleep(0.6)
    assert toy.log.read_text().split() == logged  # no orphan goes on
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


def test_shards_run_side_by_side_and_are_read_together(tmp_path):
    toy = Toy(tmp_path, sleep=0.2, betas="1, 2, 3, 4, 5")
    runs = [toy.start("--jobs", "1", "--shard", shard) for shard in ("1/2", "2/2")]
    assert [run.wait(timeout=60).returncode for run in runs] == [0, 0]
    first, second = (toy.rows(f"toy-demo.{i}-of-2.jsonl") for i in (1, 2))
    assert [r["beta"] for r in first] == [1, 3, 5] and [r["beta"] for r in second] == [2, 4]
    assert not toy.path.exists()
    result = toy.run("--plot-only")
    assert "5 cells, 5 done" in result.stdout and "rows 5" in result.stdout


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
    assert common.fmt([1.0, 3.0]) == "2.00 ± 1.41" and common.fmt([0.5], "{:.0%}") == "50%"
    assert len(common.ok_rows(rows, x=1)) == 2 and len(common.ok_rows(rows, z=None)) == 5


def test_learning_rates_and_minibatches():
    model = to_stochastic(nn.Linear(2, 2))
    rest, noise = common.param_groups(model, 0.1, 0.5)
    assert [p.shape for p in noise["params"]] == [(2, 2)] and len(rest["params"]) == 2
    assert (rest["lr"], noise["lr"]) == (0.1, 0.5)
    assert common.lr_factor(0) < 0.01 and common.lr_factor(0.05) == pytest.approx(0.501)
    assert common.lr_factor(0.1) == common.lr_factor(0.79) == common.lr_factor(0.59, 0.6) == 1
    assert common.lr_factor(0.9) == pytest.approx(0.5) == common.lr_factor(0.8, 0.6)
    assert common.lr_factor(0.999) < 0.001
    batches = minibatches(10, 3, "cpu")
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert len(epoch.unique()) == 9 and epoch.max() < 10
    assert len(next(minibatches(2, 5, "cpu"))) == 2


# === The sections alone, the scripts, the README ===============================================

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
        "load_images('objects', '', 4, 4)",
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
                         blocks=1, steps=3, batch=2000, lr=0.003, lr_noise=0.04, test=100),
        "GRID": dict(n_models=100, betas=(0.01, 10.0), n=100, beta=0.1,
                     corruptions=(0.0, 0.5, 1.0), elsewhere=((50, 0.1),))}
FIG3 = {"SETTINGS": dict(n=20, test=20, batch=20, width_steps=6, beta_steps=6, lr_sgd=0.05,
                         weight_decay=0.001, lr=0.003, lr_noise=0.04),
        "GRID": dict(widths=(1 / 96, 1 / 32), beta_width=1 / 32, betas=(0.01, 1.0, 100.0))}
FIG4 = {"SETTINGS": dict(n=60, steps=3, batch=20, passes=1, discriminator_steps=3, decoder_steps=8,
                         validation=20, test=30, lr=0.003, lr_noise=0.05),
        "GRID": {1 / 32: (None, 0.001, 1.0), 1 / 16: (1.0,)}}
FIG5 = {"SETTINGS": dict(channels=(4, 4, 8, 4), dim_u=3, synthetic=(60, 40), test=40, batch=16,
                         evaluation_steps=2, classifier_steps=3, vae_steps=3, kl_warm_up=0.4,
                         kl_weight=100, kl_end=0.8, draws=2, lr=0.002, lr_noise=0.04),
        "GRID": (0.0, 0.1, 10.0)}
TINY = {"fig1_phase_transition": FIG1, "fig2_corrupted_labels": FIG2, "fig3_width_beta": FIG3,
        "fig4_cluttered_mnist": FIG4, "fig5_celeba_vae": FIG5}
MEASURED = {
    "fig1_phase_transition": "objective train_acc train_acc_batch train_acc_mean test_acc "
                             "cross_entropy cross_entropy_batch information labels n beta",
    "fig2_corrupted_labels": "objective train_acc train_acc_mean test_acc cross_entropy "
                             "information panel n beta",
    "fig3_width_beta": "params train_acc test_acc information panel width",
    "fig4_cluttered_mnist": "test_acc i_zn_positions i_zn_nce i_zn_dv i_zy bound information "
                            "total_correlation i_xz tc_share layers curve",
    "fig5_celeba_vae": "attribute_acc reconstruction_mse background_mse attribute_agreement "
                       "majority_acc information",
}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """{script: (folder, first run, a run that only redraws, rows)}, the scripts two at a time."""
    def carry_out(script):
        folder = tmp_path_factory.mktemp("run")
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
        assert set(MEASURED[script].split()) <= row.keys()
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
    for path in (HERE / "results").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert not json.loads(line)["git"].endswith("-dirty"), path
    assert "*-faces.*" in (HERE / ".gitignore").read_text().split()


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


def arguments_of(monkeypatch, script, tmp_path):
    """What train_cell gets as args, at the demo scale with TINY settings."""
    figure = importlib.import_module(script)
    for name, value in TINY[script].items():
        monkeypatch.setattr(figure, name, {"demo": value})
    args = argparse.Namespace(figure=script, scale="demo", dataset="synthetic", data_dir=tmp_path,
                              out=tmp_path, device=torch.device("cpu"))
    return figure, args


def spy(monkeypatch, figure, name, record, result=None):
    """Let figure.name record what it is called with; result: what it returns, if not its own."""
    original = getattr(figure, name)

    def recorded(*arguments, **keywords):
        record.append(arguments)
        return original(*arguments, **keywords) if result is None else result
    monkeypatch.setattr(figure, name, recorded)


@pytest.mark.parametrize("script, cell, agree", [
    ("fig1_phase_transition", {"labels": "random", "n": 200, "beta": 0.1}, (0.02, 0.2)),
    ("fig1_phase_transition", {"labels": "real", "n": 200, "beta": 0.1}, (1, 1)),
    ("fig2_corrupted_labels", {"panel": "models", "model": "ResNet", "n": 200, "beta": 0.1},
     (0.02, 0.2)),
    ("fig2_corrupted_labels", {"panel": "corruption", "corruption": 0.0, "n": 200, "beta": 0.1},
     (1, 1)),
    ("fig2_corrupted_labels", {"panel": "corruption", "corruption": 0.5, "n": 200, "beta": 0.1},
     (0.45, 0.65)),
    ("fig3_width_beta", {"panel": "beta", "width": 1 / 32, "beta": 0.1}, (1, 1))])
def test_what_the_nets_are_trained_and_measured_on(monkeypatch, tmp_path, script, cell, agree):
    figure, args = arguments_of(monkeypatch, script, tmp_path)
    monkeypatch.setattr(figure, "make_cells", lambda scale: [{"n": 200}])
    measured, drawn, losses = [], [], []
    spy(monkeypatch, figure, "measure", measured, {"cross_entropy_batch": 0.0})
    spy(monkeypatch, figure, "draw_subset", drawn)
    if script != "fig1_phase_transition":
        spy(monkeypatch, figure, "ib_loss", losses)
    figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
    model, *_, x, y, x_test, y_test = measured[0]
    true_x, true_y, *_ = drawn[0]
    assert len(x) == len(y) == len(true_x) and len(x_test) == len(drawn[1][0])
    pixels = {image.numpy().tobytes() for image in x}
    assert len(pixels) == len(x)
    assert not pixels & {image.numpy().tobytes() for image in x_test}
    images, labels = common.load_images("objects", tmp_path, len(true_x), len(x_test))[:2]
    size = x.shape[-1]
    everything = common.normalise(images, *common.channel_statistics(images), size)
    at = {image.numpy().tobytes(): label for image, label in zip(everything, labels.tolist())}
    own = torch.tensor([at[image.numpy().tobytes()] for image in x])
    assert agree[0] <= (own == y).float().mean() <= agree[1]
    if losses:  # beta is raised from 0, and n is the number of training images
        assert losses[0][3] == 0 and losses[-1][3] == cell["beta"] and losses[0][4] == len(x)
    assert type(model).__name__ == "Sequential"
    assert any("Block" in type(m).__name__ for m in model) == (cell.get("model") == "ResNet")


class Oracle(nn.Module):
    """Says the label that an image has in its first pixel, if right; sampled: only with noise."""

    def __init__(self, right, sampled=None):
        super().__init__()
        self.right, self.noise = right, StochasticLinear(1, 1, bias=False, log_alpha=0.0)
        self.norm, self.sampled = nn.BatchNorm2d(1), sampled

    def forward(self, x):
        noisy = self.noise.sampling is not False and (self.training or bool(self.noise.sampling))
        self.norm(x), self.noise(x.flatten(1)[:, :1])
        label = x.flatten(1)[:, 0].round().long() % 10
        right = self.right if self.sampled is None else noisy == self.sampled
        return 20.0 * F.one_hot(label if right else (label + 1) % 10, 10).float()


@pytest.mark.parametrize("script", ["fig1_phase_transition", "fig2_corrupted_labels",
                                    "fig3_width_beta"])
def test_measures_of_nets_whose_answers_are_known(script):
    figure = importlib.import_module(script)
    y = torch.arange(200) % 10
    x = y.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()

    def measure(model):
        second = 50 if script == "fig1_phase_transition" else 0.5
        return figure.measure(model, second, x, y, x[:100], (y[:100] + (y[:100] >= 5)) % 10)

    for right in (True, False):
        row = measure(Oracle(right))
        assert row["train_acc"] == row["train_acc_mean"] == right
        assert row["test_acc"] == row["test_acc_sampled"] == 0.5
        assert row["cross_entropy"] == pytest.approx(0 if right else 20, abs=1e-4)
    row = measure(Oracle(True, sampled=True))  # right with noise, wrong without
    assert row["train_acc"] == 1 and row["train_acc_mean"] == 0
    if script == "fig1_phase_transition":
        assert row["train_acc_batch"] == 1 and row["cross_entropy_batch"] < 1e-4
    else:
        information = row["information"]
        assert row["objective"] == pytest.approx(row["cross_entropy"] + 0.5 * information / 200)


def fig1_row(n, beta, ce, nats, seed=0, labels="random", **more):
    acc = 0.95 if ce < 2 else 0.1
    return dict(status="ok", seed=seed, labels=labels, n=n, beta=beta, steps=5, train_acc=acc,
                train_acc_batch=acc, test_acc=0.5 - abs(math.log(beta)) / 10, information=nats * n,
                test_acc_sampled=acc - 0.05, cross_entropy_batch=ce, objective=ce + beta * nats,
                ) | more


def fig1_verdicts(change=lambda row: row):
    import fig1_phase_transition as fig1
    grid = dict(sizes=(100, 1000), random=(0.1, 0.4, 0.7, 1.2), real=(0.1, 0.7, 1.2))
    state = {0.1: (0.05, 2.6), 0.4: (0.05, 2.6), 0.7: (0.05, 2.6), 1.2: (2.31, 0.0)}
    rows = [fig1_row(n, beta, *state[beta]) for n in grid["sizes"] for beta in grid["random"]]
    rows += [fig1_row(n, beta, 0.3, (1.0 if n == 100 else 0.2), labels="real")
             for n in grid["sizes"] for beta in grid["real"]]
    ok = fig1.add_derived([change(row) for row in rows])
    random, real = (common.complete_seeds(ok, cells) for cells in fig1.main_cells(grid))
    table = fig1.claims(random, real, ok, grid)
    return {row["claim"]: row["holds"] for row in table}


def test_fig1_claims_can_hold_and_fail_and_stay_undecided():
    verdicts = fig1_verdicts()
    assert len(verdicts) == 12 and set(verdicts.values()) == {"yes"}

    def when(**values):  # rows of this beta and labels get these values
        where = {key: values.pop(key) for key in ("beta", "labels", "n") if key in values}
        return fig1_verdicts(lambda row: row | (values if where.items() <= row.items() else {}))

    for part, changed in (
            ("at least 85%", when(beta=0.1, train_acc_batch=0.84, labels="random")),
            ("between 0.7 and 1", when(n=100, labels="random", information=350.0)),
            ("falls through 55%", when(beta=1.2, train_acc_batch=0.9, information=300.0,
                                        labels="random")),
            ("memory pays", when(n=100, labels="random", information=350.0)),
            ("converged", when(beta=0.4, labels="random", objective=1.2)),
            ("r ≤ 1", when(n=100, beta=0.1, information=200.0, labels="random")),
            ("linearly", when(n=1000, beta=0.1, information=6000.0, labels="random")),
            ("saturates", when(n=1000, beta=0.1, information=1000.0, labels="real")),
            ("is best at", when(beta=0.1, test_acc=0.9, labels="real")),
            ("random labels are not learned", when(beta=1.2, train_acc=0.3, labels="random")),
            ("real labels are learned", when(beta=1.2, train_acc=0.15, labels="real")),
            ("overfitted", when(beta=1.2, test_acc_sampled=0.8, labels="real"))):
        failed = [sentence for sentence, holds in changed.items() if holds == "NO"]
        assert any(part in sentence for sentence in failed), part
    only_real = fig1_verdicts(lambda row: row | (
        {"status": "diverged"} if row["labels"] == "random" and row["beta"] == 0.4 else {}))
    assert len(only_real) == 2


def test_fig1_beta_passes_its_peak():
    import fig1_phase_transition as fig1
    assert fig1.beta_at(0, 0.1, 0.5) == 0 and fig1.beta_at(0.2, 0.1, 0.5) == pytest.approx(0.25)
    assert fig1.beta_at(0.45, 0.1, 0.5) == 0.5 and fig1.beta_at(0.6, 0.1, 0.5) == pytest.approx(0.3)
    for t in (0.7, 0.85, 1):
        assert fig1.beta_at(t, 0.1, 0.5) == pytest.approx(0.1)
    assert fig1.beta_at(0.4, 0.9, 0.5) == fig1.beta_at(1, 0.9, 0.5) == 0.9


def test_fig1_counts_every_parameter():
    import fig1_phase_transition as fig1
    model = fig1.small_alexnet(1 / 16)
    noisy = sum(m.weight.numel() for m in model.modules() if hasattr(m, "log_sigma2"))
    assert sum(p.numel() for p in model.parameters()) == 2 * noisy
    model = fig1.small_alexnet()
    paper = sum(p.numel() for name, p in model.named_parameters() if "sigma" not in name)
    assert paper == 1_387_786 - 64 - 64 - 384 - 192 - 10 + 64 + 384 + 192  # shifts for biases


@pytest.mark.parametrize("width, count", [(1 / 4, 102_610), (1 / 2, 406_810), (1, 1_620_010)])
def test_all_cnn_has_the_parameter_counts_of_the_paper(width, count):
    import fig2_corrupted_labels as fig2
    import fig3_width_beta as fig3
    for model in (fig3.all_cnn(width), fig2.all_cnn(width)):
        assert sum(p.numel() for p in model.parameters()) == count
    assert fig3.all_cnn(1 / 16)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("model", ["Small AlexNet", "All-CNN", "ResNet"])
def test_fig2_networks_have_the_shapes_they_claim(model):
    import fig2_corrupted_labels as fig2
    net = fig2.MODELS[model](1 / 8, 2)
    assert net(torch.randn(2, 3, 28, 28)).shape == (2, 10)
    if model == "ResNet":
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert len([m for m in convolutions if m.kernel_size == (3, 3)]) == 6 * 2 + 1


def fig2_verdicts(change=lambda row: row, scale="demo"):
    import fig2_corrupted_labels as fig2
    rows = []
    for cell in fig2.make_cells(scale):
        error = 0.0 if cell["beta"] < 0.05 else (0.5 if cell["beta"] < 1 else 0.9)
        nats = 1 + 3 * cell.get("corruption", 0) * cell["n"] ** 0.1 / cell["n"] ** 0.1
        if cell["panel"] == "corruption":
            error = 0.05
        rows.append(change(cell | dict(status="ok", seed=0, train_acc=1 - error,
                                       information=nats * cell["n"])))
    return {row["claim"]: row["holds"] for row in fig2.claims(fig2.add_derived(rows), scale)}


def test_fig2_claims_can_hold_and_fail_and_stay_undecided(monkeypatch):
    import fig2_corrupted_labels as fig2
    monkeypatch.setattr(fig2, "GRID", {"demo": dict(
        n_models=100, betas=(0.01, 0.1, 10.0), n=1000, beta=0.1, corruptions=(0.0, 0.5, 1.0),
        elsewhere=())})
    verdicts = fig2_verdicts()
    assert len(verdicts) == 9 and set(verdicts.values()) == {"yes"}
    for part, change in (
            ("goes from", lambda row: row | ({"train_acc": 0.5} if row["beta"] == 0.01 else {})),
            ("passes 55%", lambda row: row | ({"train_acc": 0.95} if row["beta"] == 0.1 else {})),
            ("over 85%", lambda row: row | ({"train_acc": 0.8} if "corruption" in row else {})),
            ("1.9 to 3.5", lambda row: row | ({"information": 1500.0} if row.get("corruption") == 1
                                              else {})),
            ("every step", lambda row: row | ({"information": 900.0} if row.get("corruption") == 0.5
                                              else {}))):
        assert any(part in sentence and holds == "NO"
                   for sentence, holds in fig2_verdicts(change).items()), part
    assert fig2_verdicts(lambda row: row | {"status": "diverged"}) == {}


def fig3_verdicts(errors, by_width=None):
    import fig3_width_beta as fig3
    cells = sum(fig3.make_cells("demo"), [])
    rows = [cell | dict(status="ok", seed=0, n=10, information=1.0, test_acc_sampled=0.5,
                        test_acc=1 - (errors[cell["beta"]] if "beta" in cell else
                                      by_width[cell["width"]]) / 100) for cell in cells]
    return [row["holds"] for row in fig3.claims(fig3.add_derived(rows), "demo")]


def test_fig3_claims_can_hold_and_fail(monkeypatch):
    import fig3_width_beta as fig3
    monkeypatch.setattr(fig3, "GRID", {"demo": dict(widths=(1, 2, 4), beta_width=1,
                                                    betas=(0.01, 0.1, 1.0))})
    falling, plateau = {1: 30, 2: 20, 4: 10}, {1: 30, 2: 20, 4: 21}
    u, flat = {0.01: 31, 0.1: 30, 1.0: 33}, {0.01: 30.2, 0.1: 30, 1.0: 31}
    assert fig3_verdicts(u, falling) == ["yes"] * 4  # the plateau is not decided
    assert fig3_verdicts(u, plateau) == ["yes", "NO", "yes", "yes", "yes"]
    assert fig3_verdicts(u, {1: 30, 2: 20, 4: 22})[0] == "NO"
    assert fig3_verdicts(flat, falling) == ["yes", "NO", "NO", "yes"]
    assert fig3_verdicts({0.01: 29, 0.1: 30, 1.0: 33}, falling)[-1] == "NO"


def test_fig4_claims_can_hold_and_fail(monkeypatch):
    import fig4_cluttered_mnist as fig4
    monkeypatch.setattr(fig4, "GRID", {"cpu": {1 / 8: (None, 0.001, 1.0, 10.0)}})

    def verdicts(low={}, high={}, **others):
        rows = [dict(status="ok", seed=0, width=1 / 8, beta=None, i_zn_picture=39, i_zn_shuffled=0)
                | others]
        for beta, nats, changes in ((0.001, 3.0, low), (1.0, 1.0, high), (10.0, 0.5, {})):
            rows.append(dict(status="ok", seed=0, width=1 / 8, beta=beta, i_zn_positions=nats,
                             i_zn_nce=nats - 0.1, i_zn_dv=nats, i_zy=2.2,
                             curve=[[1, nats, nats]] * 8, total_correlation=nats, tc_share=nats)
                        | changes)
        return [row["holds"] for row in fig4.claims(rows, "cpu")]

    assert verdicts() == ["yes"] * 8
    for position, changes in enumerate((
            dict(high={"i_zn_positions": 1.6}), dict(i_zn_shuffled=0.2),
            dict(high={"i_zn_nce": 1.1}), dict(low={"curve": [[1, 2.5, 2.5]] * 8}),
            dict(high={"i_zy": 2.0}), dict(high={"i_zn_positions": 0.4}),
            dict(high={"total_correlation": 3.1}),
            dict(high={"tc_share": 3.1}))):
        assert verdicts(**changes)[position] == "NO", changes
    assert verdicts(high={"status": "diverged"}) == []


def test_fig4_position_information_is_known_for_all_and_for_nothing():
    """A square's place shown on 25x25 of the 28x28 pixels is all of log 625; noise is nothing."""
    import fig4_cluttered_mnist as fig4
    torch.manual_seed(0)
    s = dict(decoder_steps=80, validation=200, test=400)
    places = torch.randint(625, (2500, 1))
    corner = torch.zeros(2500, 25, 25).flatten(1).scatter(1, places, 1.0).view(-1, 1, 25, 25)
    z = F.pixel_unshuffle(F.pad(corner, (0, 3, 0, 3)), 4)
    known, curve = fig4.position_information(z, places, s, hidden=16)
    nothing, _ = fig4.position_information(z, places.roll(1, 0), s, hidden=16)
    assert 0.9 * math.log(625) < known < math.log(625) and -0.1 < nothing < 0.05
    assert [step for step, *_ in curve] == list(range(0, 81, 10))


def test_fig4_masks_noise_and_clutter(monkeypatch, tmp_path):
    fig4, args = arguments_of(monkeypatch, "fig4_cluttered_mnist", tmp_path)
    estimated, trained, drawn, decoded = [], [], [], []
    result = {"plug_in": 0.0, "donsker_varadhan": 0.0, "info_nce": 0.0}
    spy(monkeypatch, fig4, "density_ratio_information", estimated, result)
    spy(monkeypatch, fig4, "measure", trained)
    spy(monkeypatch, fig4, "add_clutter", drawn)
    spy(monkeypatch, fig4, "position_information", decoded)
    fig4.train_cell({"beta": 0.1, "width": 1 / 32, "seed": 0}, args.device, args, lambda *_: None)
    _, z, masks = estimated[0]
    assert torch.equal(z, decoded[0][0])
    corners = decoded[0][1].unsqueeze(2) // torch.tensor([25, 1]) % 25  # row and column
    squares = torch.arange(28).view(1, 1, 1, 28) - corners.unsqueeze(3)
    rows, columns = ((squares >= 0) & (squares < 4)).unbind(2)
    assert torch.equal((rows.unsqueeze(3) & columns.unsqueeze(2)).any(1, keepdim=True), masks)
    model, draw, x, x_test, *_ = trained[0]
    assert len(z) == len(masks) == 60 + 30 and masks.dtype == torch.bool
    assert len(drawn) >= 3 + 3  # new clutter for every batch, then for what is measured
    images, mask, _ = draw(x_test)
    assert (images[mask] == images.max()).all() and 80 < mask.sum((1, 2, 3)).float().mean() < 161
    assert not torch.equal(mask, draw(x_test)[1])
    model.eval()
    assert torch.equal(model[0](images), model[0](images))
    with sample_weights(model):
        assert not torch.equal(model[0](images), model[0](images))
    train, test = ({image.numpy().tobytes() for image in some} for some in (x, x_test))
    assert not train & test


def test_fig4_bounds_a_layer_by_the_capacity_of_its_gaussian_units():
    import fig4_cluttered_mnist as fig4
    features = fig4.all_cnn(1 / 32)[0]
    for layer in features:
        if isinstance(layer, StochasticConv2d):
            layer.log_alpha = 0.0
    bounds = fig4.layer_bounds(features)
    capacity = math.log(2) / 2  # log(1 + 1/alpha)/2 at alpha = 1
    for name, units in (("conv2", 3 * 28**2), ("conv8", 6 * 7**2)):
        assert bounds[name]["bound"] == pytest.approx(units * (capacity + 1), rel=1e-4)
        assert bounds[name]["capacity"] == pytest.approx(units * capacity, rel=1e-4)
    assert "conv1" not in bounds


def test_fig5_parts_do_not_overlap_and_test_faces_are_not_trained_on(monkeypatch, tmp_path):
    fig5, args = arguments_of(monkeypatch, "fig5_celeba_vae", tmp_path)
    fig5.load_faces.cache_clear(), fig5.evaluation_classifier.cache_clear()
    images, attributes, factors, parts = fig5.load_data(args)
    assert not set(parts["train"].tolist()) & set(parts["test"].tolist())
    assert not set(parts["evaluation"].tolist()) & set(parts["classifier"].tolist())
    taken = []
    spy(monkeypatch, fig5, "take", taken)
    fig5.train_cell({"beta": 0.1, "seed": 0}, args.device, args, lambda *_: None)
    used = [set(rows.tolist()) for _, rows, _ in taken]
    test = set(parts["test"].tolist())
    assert len(used) > 8
    assert all(not rows & test for rows in used[:5])  # the two classifiers
    measured = [rows for rows in used if rows & test]
    assert measured and all(rows == test for rows in measured)
    x = fig5.take(images, parts["test"], torch.tensor([3, 43]))
    assert torch.equal(x[0].flip(2), x[1])


def test_fig5_probe_reads_what_is_there_and_nothing_else():
    import fig5_celeba_vae as fig5
    factor = torch.randint(3, (900,))
    z = torch.randn(900, 4, 2, 2)
    assert abs(fig5.probe(z, factor)) < 0.1
    z.view(900, -1)[:, :3] += 6 * F.one_hot(factor)
    assert fig5.probe(z, factor) > 0.9


def test_fig5_claims_can_hold_and_fail(monkeypatch):
    import fig5_celeba_vae as fig5
    monkeypatch.setattr(fig5, "GRID", {"cpu": (0.0, 0.1, 0.7)})
    args = argparse.Namespace(scale="cpu", dataset="celeba")

    def verdicts(outside=2.0, inside=1.5, agreement=0.9):
        rows = [dict(status="ok", seed=0, beta=0.1, background_mse=1.0, inside_mse=1.0,
                     attribute_agreement=0.9, majority_acc=0.8)]
        rows.append(rows[0] | dict(beta=0.7, background_mse=outside, inside_mse=inside,
                                   attribute_agreement=agreement))
        return [row["holds"] for row in fig5.claims(rows, args)]

    assert verdicts() == ["yes"] * 4
    assert verdicts(outside=1.4)[0] == verdicts(inside=2.1)[1] == "NO"
    assert verdicts(agreement=0.79)[2:] == ["NO", "NO"] and verdicts(agreement=0.88)[3] == "NO"
