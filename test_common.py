"""Tests of common.py and of the figure scripts: pytest test_common.py. They need neither network nor data/."""
import copy
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
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
from common import (DataError, StochasticConv2d, StochasticLinear, add_clutter, alpha_from_information, calibrated,
                    channel_statistics, corrupt_labels, density_ratio_information, draw_subset, flat_minimum_bound, g,
                    hessian_trace, ib_loss, label_information, layer_information, layer_information_bound, load_celeba,
                    load_cifar10, load_mnist, minibatches, pac_bayes_bound, prior_divergence, sample_weights,
                    synthetic_digits, synthetic_faces, synthetic_objects, to_stochastic, total_correlation,
                    weight_information)

HERE = Path(__file__).resolve().parent
NOISES = list(itertools.product(("gaussian", "lognormal"), (True, False)))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(kind, **options):
    if kind == "linear":
        return StochasticLinear(6, 4, **options), torch.randn(3, 6)
    layer = StochasticConv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular", **options)
    return layer, torch.randn(3, 4, 5, 5)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Stochastic layers
# ----------------------------------------------------------------------------------------------------------------------
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
    return (k1 - k1 * torch.sigmoid(k2 + k3 * log_alpha) + 0.5 * torch.log1p(torch.exp(-log_alpha))).sum()


def test_gaussian_information_is_the_formula_of_molchanov_with_its_gradient():
    layer = StochasticLinear(20, 30, log_alpha=0.0).double()
    layer.log_alpha = 4 * torch.randn(30, 20, dtype=torch.double)
    layer.information().backward()
    weight, log_sigma2 = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.log_sigma2))
    naive = naive_kl(weight, log_sigma2)
    naive.backward()
    assert layer.information().item() == pytest.approx(naive.item(), rel=1e-6)
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-6)
    assert torch.allclose(layer.log_sigma2.grad, log_sigma2.grad, rtol=1e-6)
    assert torch.autograd.gradcheck(common._GaussianKL.apply, (torch.randn(5, dtype=torch.double, requires_grad=True),
                                                               torch.randn(5, dtype=torch.double, requires_grad=True)))


def gaussian_divergence(log_alpha):
    """KL of N(w, alpha w^2) from the log-uniform prior, 0 at alpha = infinity: E log|eps| - log(alpha)/2 + const."""
    step = 5e-5
    normal = torch.arange(-10, 10, step, dtype=torch.double) + step / 2
    density = torch.exp(-normal**2 / 2) * step / math.sqrt(2 * math.pi)
    mean = [(density * torch.log((1 + math.exp(a / 2) * normal).abs())).sum() for a in log_alpha.tolist()]
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
    assert above.min() > -1e-4 and above.max() < 0.636 and above[0] > 0.635 and (above[log_alpha == 4] < 1e-3).all()


@pytest.mark.parametrize("mean", [-3.0, 0.01, 20.0])
def test_proposition_4_1_is_the_divergence_from_a_log_uniform_prior_whatever_the_mean(mean):
    alpha, low, high = 0.04, -12.0, 8.0  # the prior: log|w| uniform from low to high
    posterior = torch.distributions.LogNormal(math.log(abs(mean)) - alpha / 2, math.sqrt(alpha))  # of |w|
    sample = posterior.sample((100_000,))
    assert low < sample.min().log() and sample.max().log() < high
    divergence = (posterior.log_prob(sample) + sample.log() + math.log(high - low)).mean()
    constant = math.log(high - low) - 0.5 * math.log(2 * math.pi * math.e)
    assert divergence.item() == pytest.approx(-0.5 * math.log(alpha) + constant, abs=0.01)
    layer = StochasticLinear(10, 5, noise="lognormal", log_alpha=math.log(alpha), max_log_alpha=2 * constant)
    assert layer.information().item() / 50 == pytest.approx(divergence.item(), abs=0.01)  # the cap is the constant


def test_the_constant_of_proposition_4_1_is_the_log_of_the_range_and_truncation_ends_the_fall():
    # a posterior that is cut off at the ends of the prior's range, in closed form
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.double), 1.0)

    def divergence(alpha, length):
        end = torch.tensor(length / 2 / math.sqrt(alpha), dtype=torch.double)  # in standard deviations from the middle
        mass = normal.cdf(end) - normal.cdf(-end)
        entropy = 0.5 * math.log(2 * math.pi * math.e * alpha) + mass.log() - end * normal.log_prob(end).exp() / mass
        return (math.log(length) - entropy).item()

    grid = torch.linspace(-5, 5, 1_000_001, dtype=torch.double)
    for alpha in (0.1, 4.0, 100.0):  # the closed form by numerical integration
        density = torch.exp(-grid**2 / 2 / alpha)
        density = density / (density.mean() * 10)
        numeric = 10 * (density * torch.log(10 * density)).mean().item()
        assert divergence(alpha, 10.0) == pytest.approx(numeric, abs=1e-5)
    constants = [divergence(1e-4, length) + 0.5 * math.log(1e-4) for length in (10.0, 20.0, 176.0)]
    assert constants == pytest.approx([math.log(r) - 0.5 * math.log(2 * math.pi * math.e) for r in (10, 20, 176)])
    assert constants[1] - constants[0] == pytest.approx(math.log(2))
    assert 0 <= divergence(1e6, 10.0) < 1e-6 and -0.5 * math.log(1e6) + constants[0] < -6  # not truncated: falls on


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
        values = [StochasticLinear(3, 3, noise=noise, log_alpha=a).information().item() for a in (-20, -5, -1, 0, 0.9)]
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


def test_calibrated_estimates_batch_norm_for_the_weights_measured_and_puts_it_back():
    layer = StochasticLinear(3, 4, local=False, log_alpha=0.0)
    model = nn.Sequential(layer, nn.BatchNorm1d(4)).train()
    x = 2 + torch.randn(400, 3)
    model(x)
    before = copy.deepcopy(model.state_dict())
    with calibrated(model, [x], draw=False):
        assert not model.training and layer.sampling is False
        assert torch.allclose(model[1].running_mean, F.linear(x, layer.weight, layer.bias).mean(0), atol=1e-5)
        assert torch.allclose(model(x).mean(0), torch.zeros(4), atol=1e-5)
    with pytest.raises(RuntimeError), calibrated(model, x.split(1 + len(x) // 2) * 200, draw=True):
        assert layer.sampling is True and not torch.equal(model(x), model(x))
        variance = (layer.weight * x.mean(0)).square().sum(1)  # of the mean over x of x @ w, between weight samples
        outputs = F.linear(x, layer.weight, layer.bias).mean(0)
        assert ((model[1].running_mean - outputs).abs() < 5 * (variance / 400).sqrt()).all()
        raise RuntimeError
    assert layer.sampling is None and all(torch.equal(before[k], v) for k, v in model.state_dict().items()
                                          if "running" in k)


def test_noise_must_have_a_known_name():
    with pytest.raises(ValueError, match="uniform"):
        StochasticLinear(2, 2, noise="uniform")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_to_stochastic_keeps_the_function_of_torchvision_models(name):
    model = getattr(torchvision.models, name)(weights=None).eval().to(memory_format=torch.channels_last)
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
    assert weight_information(model).item() == pytest.approx(sum(m.information().item() for m in twins), rel=1e-5)
    model.train()
    loss, _, _ = ib_loss(model(x), torch.tensor([1, 2]), model, 1.0, 100)
    loss.backward()
    assert all(m.log_sigma2.grad.isfinite().all() and m.log_sigma2.grad.abs().sum() > 0 for m in twins)


def test_to_stochastic_keeps_every_option_of_a_layer():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False, padding_mode="reflect")
    conv.double().eval()
    x = torch.randn(1, 4, 9, 9, dtype=torch.double)
    expected, weight = conv(x), conv.weight
    twin = to_stochastic(conv, noise="lognormal", local=True, log_alpha=-3.0)
    assert type(twin) is StochasticConv2d and twin.weight is weight and twin.log_sigma2.dtype == torch.double
    assert torch.equal(twin(x), expected)
    assert torch.allclose(twin.log_alpha, torch.tensor(-3.0, dtype=torch.double))
    assert to_stochastic(twin) is twin and torch.allclose(twin.log_alpha, torch.tensor(-3.0, dtype=torch.double))
    shared = nn.Linear(3, 3)
    model = to_stochastic(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] and len(list(model.parameters())) == 3


def test_to_stochastic_skips_named_layers_and_blocks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    to_stochastic(model, skip=["0", "1"])
    assert [type(m) for m in (model[0], model[1][0], model[1][1], model[2])] == [nn.Linear] * 3 + [StochasticLinear]
    with pytest.raises(ValueError, match="classifier"):
        to_stochastic(model, skip="classifier")


def test_checkpoints_copies_and_dtypes(tmp_path):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    model = to_stochastic(copy.deepcopy(plain), log_alpha=-2.0).eval()
    x = torch.randn(2, 1, 6, 6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = to_stochastic(copy.deepcopy(plain))
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(twin(x), plain(x)) and torch.allclose(twin[0].log_alpha, torch.tensor(-2.0), atol=1e-4)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    twin.load_state_dict(other.state_dict())  # a checkpoint of the plain model keeps alpha, not sigma
    assert torch.equal(twin(x), other(x)) and torch.allclose(twin[3].log_alpha, torch.tensor(-2.0), atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).bfloat16()
    assert half[0].information().dtype == torch.float32
    assert half[0].information().item() == pytest.approx(model[0].information().item(), rel=0.05)


@pytest.mark.parametrize("noise, local", NOISES)
def test_training_step_compiles_and_runs_under_bf16_autocast(noise, local):
    model = to_stochastic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)), noise=noise,
                          local=local).to(memory_format=torch.channels_last)
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
    gradient, = torch.autograd.grad(layer.information(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert weight_information(to_stochastic(model)).item() == pytest.approx(model[0].information().item())


def test_denormals_are_flushed():
    assert (torch.tensor([1e-39]) * torch.tensor([0.5])).item() == 0


# ----------------------------------------------------------------------------------------------------------------------
# 2. Weight-IB loss
# ----------------------------------------------------------------------------------------------------------------------
def test_ib_loss_is_mean_cross_entropy_plus_beta_over_n_times_nats():
    model = to_stochastic(nn.Linear(5, 4))
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    loss, cross_entropy, information = ib_loss(logits, labels, model, 0.5, 50)
    expected = -logits.log_softmax(1)[torch.arange(7), labels].mean()
    assert cross_entropy.item() == pytest.approx(expected.item())
    assert information.item() == pytest.approx(naive_kl(model.weight, model.log_sigma2).item(), rel=1e-4)
    assert loss.item() == pytest.approx((expected + 0.5 * information / 50).item())


def test_ib_loss_sums_over_attributes():
    model, logits, attributes = to_stochastic(nn.Linear(5, 4)), torch.randn(7, 4), torch.randint(2, (7, 4))
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(attributes.float()).sum(1).mean()
    assert ib_loss(logits, attributes, model, 0.0, 7)[0].item() == pytest.approx(expected.item())


def test_loss_refuses_what_makes_no_sense():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no stochastic layer"):
        weight_information(nn.Linear(3, 3))
    for beta, n in ((-1.0, 10), (1.0, 0)):
        with pytest.raises(ValueError):
            ib_loss(logits, labels, to_stochastic(nn.Linear(3, 3)), beta, n)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Information estimators
# ----------------------------------------------------------------------------------------------------------------------
def test_g_is_the_capacity_of_proposition_5_2():
    alpha = torch.tensor([1e-6, 0.1, 1.0, 5.0, 40.0], dtype=torch.double)
    expected = [-0.5 * math.log(-math.expm1(-a)) for a in alpha.tolist()]
    assert g(alpha).tolist() == pytest.approx(expected, rel=1e-9)
    assert g(1e-9).item() == pytest.approx(-0.5 * math.log(1e-9), rel=1e-6)  # -log(alpha)/2 for small alpha
    assert (g(alpha).diff() < 0).all() and g(0.0) == math.inf
    with pytest.raises(ValueError):
        g(-0.1)


def test_alpha_from_information_inverts_the_information_of_a_layer():
    layer = StochasticLinear(30, 20, noise="lognormal", log_alpha=-2.5, max_log_alpha=0.0)  # C = 0
    assert alpha_from_information(layer.information(), 600).item() == pytest.approx(math.exp(-2.5), rel=1e-5)


def spacing_entropy(samples):
    """Entropy of each column of samples (n, d) by Vasicek's spacings, nats: no shape of the distribution is assumed."""
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
        eps = 1 + alpha.sqrt() * eps if noise == "gaussian" else torch.exp(alpha.sqrt() * eps - alpha / 2)
        return torch.einsum("noi,oi,ni->no", eps, weight, x)

    alpha_of_eps = torch.log1p(alpha) if noise == "gaussian" else alpha
    gaussian = 0.5 * torch.log(2 * math.pi * math.e * x**2 @ (torch.expm1(alpha_of_eps) * weight**2).T)  # h(z|x)
    given = torch.stack([spacing_entropy(sample(row.expand(1000, -1))) for row in x[:100]])
    given = gaussian.mean(0) + (given - gaussian[:100]).mean(0)  # 100 inputs, with the Gaussian as control variate
    sampled = (spacing_entropy(sample(x)) - given).sum()
    assert layer_information(weight, alpha_of_eps, x).item() == pytest.approx(sampled.item(), abs=0.1)


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
    assert (excess > -1e-9).all() and (information < bound).all() and torch.equal(bound, 4 * g(alphas) + 4)
    assert excess.max() < min(0.65, 2 / dim_x)  # c = O(1/dim x): at most the 0.635 of a single input
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
    assert 0.2 < held < layer_information(weights[0], 0.3, x) + 0.1  # data processing, within the error of held
    bounds = [layer_information_bound(width, alpha) for width, alpha in zip(widths[1:], alphas)]
    assert held < min(bounds) == bounds[0] and layer_information(weights[2], 0.001, torch.randn(1000, 8)) > min(bounds)


def test_proposition_5_2_needs_twice_the_information_that_is_printed():
    alpha = math.exp(-6)
    layer = StochasticLinear(50, 30, noise="lognormal", log_alpha=-6.0, max_log_alpha=0.0)  # C = 0
    held = layer_information(layer.weight.detach().double(), alpha, white_inputs(5000, 50)) / 30
    information = layer.information().item()
    printed, corrected = math.exp(-information / 1500), alpha_from_information(information, 1500)
    assert g(corrected) <= held <= g(corrected) + 1
    assert held > g(printed) + 1


def test_proposition_5_2_asks_for_centred_and_uncorrelated_inputs():
    weight, x = torch.rand(3, 100), torch.randn(2000, 1)
    assert layer_information(weight, 0.1, x.expand(-1, 100)) > layer_information_bound(3, 0.1)  # inputs all alike
    assert layer_information(torch.randn(3, 100), 0.1, torch.randn(2000, 100) + 9) < 3 * g(0.1)  # far off centre
    assert layer_information(weight, 0.1, F.pad(x.expand(-1, 100), (0, 0, 0, 1))) == math.inf  # one x = 0: no noise
    mixed = torch.rand(3, 100)  # the alpha of a unit whose weights differ in theirs
    unit = torch.log1p((torch.expm1(mixed) * weight**2).sum(1) / (weight**2).sum(1))
    x = white_inputs(5000, 100).float()
    assert 3 * g(unit).mean() <= layer_information(weight, mixed, x) <= layer_information_bound(3, unit)


def test_noise_of_one_variance_has_one_capacity():
    a = torch.tensor([0.01, 1.0, 30.0], dtype=torch.double)
    assert torch.allclose(g(torch.log1p(a)), 0.5 * torch.log1p(1 / a))  # that of a Gaussian channel


def random_hessian(k):
    root = torch.randn(k, k, dtype=torch.double)
    return root @ root.T


def optimal_information(weight, hessian, beta):
    """-1/2 * sum of log alpha at the minimum over alpha of Taylor's cross-entropy - beta/2 * sum of log alpha."""
    alpha = (beta / (weight**2 * hessian.diagonal())).requires_grad_()
    lagrangian = 0.5 * (alpha * weight**2 * hessian.diagonal()).sum() - 0.5 * beta * alpha.log().sum()
    gradient, = torch.autograd.grad(lagrangian, alpha)
    assert torch.allclose(alpha * gradient, torch.zeros_like(alpha), atol=1e-9)  # convex in log alpha: the minimum
    return -0.5 * alpha.detach().log().sum()


def printed_flat_minimum_bound(weight, trace, beta):
    k = len(weight)
    return 0.5 * k * (torch.log((weight**2).sum()) + torch.log(trace) - k * math.log(k**2 * beta / 2))


@pytest.mark.parametrize("k", [2, 5, 40])
@pytest.mark.parametrize("taylor", [1.0, 0.5])  # beta/2 for beta: as in the paper, without Taylor's 1/2
def test_proposition_4_3_holds_as_in_its_proof_and_fails_as_printed(k, taylor):
    for beta in (0.6, 1.0, 10.0):
        weight, hessian = torch.randn(k, dtype=torch.double), random_hessian(k)
        information = optimal_information(weight, hessian, taylor * beta)
        assert information <= flat_minimum_bound(weight, hessian.trace(), taylor * beta)
        assert k == 2 or information > printed_flat_minimum_bound(weight, hessian.trace(), beta)
    ones, alike = torch.ones(k, dtype=torch.double), 7 * torch.eye(k, dtype=torch.double)
    information = optimal_information(ones, alike, taylor)
    assert information.item() == pytest.approx(flat_minimum_bound(ones, alike.trace(), taylor).item())  # no slack
    assert information > printed_flat_minimum_bound(ones, alike.trace(), 1.0)


def test_second_order_cross_entropy_under_noise_is_that_of_proposition_4_3():
    weight, hessian, alpha = torch.randn(6), random_hessian(6).float(), 0.3 * torch.rand(6)
    step = weight * alpha.sqrt() * torch.randn(400_000, 6)
    sampled = 0.5 * torch.einsum("ni,ij,nj->n", step, hessian, step).mean()
    assert sampled.item() == pytest.approx((0.5 * alpha * weight**2 * hessian.diagonal()).sum().item(), rel=0.02)


def test_flat_minimum_bound_holds_on_a_trained_network_with_hutchinsons_trace():
    x = torch.randn(300, 4, dtype=torch.double)
    flat = torch.randn(4 * 3 + 3 * 2, dtype=torch.double).requires_grad_()

    def logits(flat):
        return torch.tanh(x @ flat[:12].view(4, 3)) @ flat[12:].view(3, 2)

    def cross_entropy(flat):
        return F.cross_entropy(logits(flat), y, reduction="sum")

    y = torch.distributions.Categorical(logits=logits(flat)).sample()  # of a net like it: the minimum is finite
    optimizer = torch.optim.Adam([flat], lr=0.03)
    for _ in range(500):
        optimizer.zero_grad()
        cross_entropy(flat).backward()
        optimizer.step()
    hessian = torch.autograd.functional.hessian(cross_entropy, flat.detach())
    assert torch.linalg.eigvalsh(hessian).min() > -1e-6 * hessian.trace()  # a minimum
    trace, error = hessian_trace(cross_entropy(flat), [flat], probes=200)
    assert abs(trace - hessian.trace().item()) < 4 * error and error < 0.1 * trace
    weight = flat.detach()
    for beta in (0.1, 1.0):
        information = optimal_information(weight, hessian, beta)
        assert information <= flat_minimum_bound(weight, trace, beta) <= information + 2.5 * len(weight)
        assert information > printed_flat_minimum_bound(weight, hessian.trace(), beta)


def entropy(joint, names, of):
    """H of the variables `of`, letters out of names, one for each axis of the joint distribution; nats."""
    return torch.special.entr(torch.einsum(f"{names}->{of}", joint)).sum().item()


def mutual(joint, names, a, b, given=""):
    """I(a;b|given), exact; nats."""
    both = "".join(dict.fromkeys(a + b + given))
    return (entropy(joint, names, a + given) + entropy(joint, names, b + given) - entropy(joint, names, both)
            - entropy(joint, names, given))


def channel(*shape):
    """A random conditional distribution of the last index given the others; some of it rather sharp."""
    return torch.softmax(3 * torch.randn(*shape, dtype=torch.double), -1)


def toy_world(priors, inputs, temperature):
    """p(t,x,y,w) of a task t drawn by priors, two inputs x, binary labels y of each and learned weights w; q(y|x,w).

    Every axis holds all values of a data set: x two binary inputs (inputs: a distribution over the four), y two labels.
    The last task is labels at random. w, one of five, is a sample of the Bayesian posterior at this temperature.
    """
    task = torch.tensor([[0.9, 0.2], [0.3, 0.6], [0.5, 0.5]], dtype=torch.double)  # p(y=1|x,t)
    net = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.9, 0.9], [0.1, 0.1], [0.5, 0.5]], dtype=torch.double)
    bits = torch.tensor(list(itertools.product((0, 1), repeat=2)))

    def likelihood(p):  # of both labels given both inputs: (tasks or weights, x, y)
        ones = p[:, bits][:, :, None]
        return torch.where(bits[None, None].bool(), ones, 1 - ones).prod(-1)

    q = likelihood(net)
    learned = torch.softmax(q.log() / temperature, 0)  # p(w|x,y)
    data = torch.tensor(priors, dtype=torch.double)[:, None, None] * inputs[None, :, None] * likelihood(task)
    return torch.einsum("txy,wxy->txyw", data, learned), q


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_four_terms_of_the_decomposition_add_up_to_the_cross_entropy(temperature):
    joint, q = toy_world((0.5, 0.3, 0.2), channel(4), temperature)
    cross_entropy = -(joint.sum(0) * torch.einsum("wxy->xyw", q).log()).sum().item()
    intrinsic = entropy(joint, "txyw", "txy") - entropy(joint, "txyw", "tx")  # H(y|x,t)
    sufficiency = mutual(joint, "txyw", "t", "y", "xw")
    posterior = joint.sum(0) / joint.sum((0, 2))[:, None]  # p(y|x,w)
    efficiency = (joint.sum(0) * (posterior / torch.einsum("wxy->xyw", q)).log()).sum().item()
    overfitting = mutual(joint, "txyw", "y", "w", "tx")
    assert cross_entropy == pytest.approx(intrinsic + sufficiency + efficiency - overfitting, abs=1e-9)
    assert min(intrinsic, sufficiency, efficiency, overfitting) > 1e-3
    held = mutual(joint, "txyw", "xy", "w")
    assert overfitting <= held <= mutual(joint, "txyw", "xyt", "w") + 1e-9


def test_random_labels_overfit_by_the_information_in_the_weights_and_no_more_pays_from_beta_1_on():
    worlds = [toy_world((0, 0, 1), torch.tensor([0, 1, 0, 0], dtype=torch.double), t) for t in (0.02, 0.3, 1, 3, 30)]
    gain = []
    for joint, q in worlds:  # the inputs are given: 0 and 1
        overfitting, held = mutual(joint, "txyw", "y", "w", "tx"), mutual(joint, "txyw", "xy", "w")
        assert overfitting == pytest.approx(mutual(joint, "txyw", "y", "w")) == pytest.approx(held)
        cross_entropy = -(joint.sum(0) * torch.einsum("wxy->xyw", q).log()).sum().item()
        assert cross_entropy >= 2 * math.log(2) - held - 1e-9  # two labels at random, less what was memorised
        gain.append([2 * math.log(2) - cross_entropy - beta * held for beta in (0.5, 1.0, 2.0)])
    assert max(g[0] for g in gain) > 0.1 and max(g[1] for g in gain) <= 1e-9 and max(g[2] for g in gain) < 0
    joint, _ = toy_world((0, 0, 1), channel(4), 1.0)  # with inputs at random the weights know which label goes where
    overfitting, alone = mutual(joint, "txyw", "y", "w", "tx"), mutual(joint, "txyw", "y", "w")
    assert alone + 1e-3 < overfitting == pytest.approx(alone + mutual(joint, "txyw", "x", "y", "w"))
    assert overfitting <= mutual(joint, "txyw", "xy", "w")


def markov_chain(y_given_x):
    """p(y,n,x,z,v) of y and a nuisance n that make x, and representations z of x and v of z, v a coarser z.

    y_given_x: (x, y), x uniform. n is what is left of x when y is known: independent of y, x = f(y,n) (Sec. 3).
    """
    size, classes = y_given_x.shape
    joint = y_given_x / size
    cumulative = (joint / joint.sum(0)).cumsum(0)  # P(x' <= x|y): n is the place on it
    edges = torch.cat([torch.zeros(1), cumulative.flatten()]).unique()
    edges = edges[torch.cat([edges.diff() > 1e-12, torch.tensor([True])])]
    middle = (edges[1:] + edges[:-1]) / 2
    x = torch.stack([torch.searchsorted(cumulative[:, y].contiguous(), middle) for y in range(classes)])
    source = joint.sum(0)[:, None] * edges.diff() / edges.diff().sum()
    return torch.einsum("yn,ynx->ynx", source, F.one_hot(x, size).double())


DETERMINISTIC = torch.eye(2, dtype=torch.double)[[0, 0, 0, 1, 1, 1]]
NOISY = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8], [0.5, 0.5]], dtype=torch.double)


@pytest.mark.parametrize("y_given_x", [DETERMINISTIC, NOISY])
def test_every_task_has_a_nuisance_that_explains_the_rest_of_the_input(y_given_x):
    joint = markov_chain(y_given_x)
    assert torch.allclose(torch.einsum("ynx->xy", joint) * 6, y_given_x)
    assert mutual(joint, "ynx", "y", "n") == pytest.approx(0, abs=1e-12)
    assert entropy(joint, "ynx", "ynx") == pytest.approx(entropy(joint, "ynx", "yn"))  # x = f(y,n)


@pytest.mark.parametrize("y_given_x", [DETERMINISTIC, NOISY])
def test_sufficient_representations_are_invariant_as_far_as_they_are_minimal(y_given_x):
    joint = markov_chain(y_given_x)
    kind = (y_given_x[:, None] == y_given_x.unique(dim=0)).all(-1).double()  # the minimal sufficient statistic
    given_y = entropy(joint, "ynx", "xy") - entropy(joint, "ynx", "x")  # H(y|x)
    informations = []
    for sharpness in (0.0, 0.3, 1.0, 3.0, 50.0):  # z tells the kind, and the input within it the more, the sharper
        within = torch.softmax(sharpness * torch.eye(6, dtype=torch.double), -1)
        world = torch.einsum("ynx,xk,xz->ynxkz", joint, kind, within).flatten(3)
        task, total, nuisance = (mutual(world, "ynxz", a, "z") for a in "yxn")
        assert task == pytest.approx(mutual(world, "ynxz", "x", "y"))  # sufficient
        residual = total - task - nuisance
        assert -1e-9 <= residual <= given_y + 1e-9  # I(z;n) <= I(z;x) - I(x;y), and equal up to H(y|x)
        assert residual == pytest.approx(mutual(world, "ynxz", "z", "y", "n") - task, abs=1e-9)
        informations.append((total, nuisance))
    assert informations == sorted(informations) and [n for _, n in informations] == sorted(n for _, n in informations)
    if not given_y:  # y is a function of x: minimal is invariant
        assert informations[0] == pytest.approx((math.log(2), 0)) and informations[-1][1] == pytest.approx(math.log(3))


@pytest.mark.parametrize("y_given_x", [DETERMINISTIC, NOISY])
def test_any_representation_obeys_the_invariance_bound_and_stacking_adds_invariance(y_given_x):
    joint = markov_chain(y_given_x)
    for _ in range(20):
        world = torch.einsum("ynx,xz,zv,vw->ynxzvw", joint, channel(6, 5), channel(5, 4), channel(4, 4))
        names = "ynxzvw"
        nuisance = [mutual(world, names, layer, "n") for layer in "xzvw"]
        assert nuisance == sorted(nuisance, reverse=True)
        for below, layer in zip("xzv", "zvw"):  # the bottleneck: what passes from the layer below and is not the task
            assert mutual(world, names, layer, "n") <= (mutual(world, names, below, layer)
                                                        - mutual(world, names, layer, "y") + 1e-9)


def test_pac_bayes_bound_holds_over_every_training_set_of_a_toy_world():
    # four equally likely values of a sample, 30 hypotheses, all 4^5 training sets: all is exact
    n, values, hypotheses, max_loss = 5, 4, 30, 2.0
    loss = max_loss * torch.rand(hypotheses, values, dtype=torch.double).round()  # all or nothing: overfits most
    prior = torch.softmax(torch.randn(hypotheses).double(), 0)
    samples, times = torch.unique(torch.tensor(list(itertools.product(range(values), repeat=n))).sort(1).values, dim=0,
                                  return_counts=True)
    probability = times.double() / values**n
    train, test = loss[:, samples].mean(2).T, loss.mean(1)
    for temperature in (10.0, 1.0, 0.1, 0.01):  # the last all but picks the best on the training set
        posterior = torch.softmax(prior.log() - train / temperature, 1)
        divergence = torch.special.xlogy(posterior, posterior / prior).sum(1)
        train_loss, test_loss = (posterior * train).sum(1), posterior @ test
        for lam in (0.6, 1.0, 3.0):  # eq. 7 as printed, with the expectation over training sets on either side
            bounds = [pac_bayes_bound(t, d, n, max_loss=max_loss, delta=1, lambdas=[lam])
                      for t, d in zip(train_loss, divergence)]
            assert probability @ test_loss <= probability @ torch.stack(bounds)
        bounds = [pac_bayes_bound(t, d, n, max_loss=max_loss) for t, d in zip(train_loss, divergence)]
        assert probability[test_loss > torch.stack(bounds)].sum() <= 0.05
    assert probability @ train_loss < 0.5 * (probability @ test_loss)  # there is something to bound


def test_pac_bayes_bound_is_no_better_than_inverting_the_binary_divergence():
    def inverse(loss, budget):  # the largest p of which the coins' divergence from loss is within the budget
        low, high = loss, 1 - 1e-12
        for _ in range(60):
            p = (low + high) / 2
            divergence = sum(a * math.log(a / b) for a, b in ((loss, p), (1 - loss, 1 - p)) if a > 0)
            low, high = (p, high) if divergence < budget else (low, p)
        return low

    for loss, divergence, n in itertools.product((0.0, 0.02, 0.3, 0.9), (0.0, 30.0, 3000.0), (300, 50_000)):
        bound = pac_bayes_bound(loss, divergence, n, max_loss=1)
        tight = inverse(loss, (divergence + math.log(len(common.LAMBDAS) / 0.05)) / n)
        assert loss < tight <= bound
        assert bound > 1 or loss > 0.5 or bound < loss + 2.3 * (tight - loss)  # twice it for no loss
    assert pac_bayes_bound(0.2, 100, 1000) == pytest.approx(min(
        (0.2 + lam * math.log(10) * (100 + math.log(21 / 0.05)) / 1000) / (1 - 0.5 / lam) for lam in common.LAMBDAS))


def test_pac_bayes_bound_refuses_what_it_does_not_hold_for():
    for arguments in (dict(loss=2.4, divergence=1.0), dict(loss=0.5, divergence=-1.0),
                      dict(loss=0.5, divergence=1.0, lambdas=[0.5]), dict(loss=math.nan, divergence=1.0)):
        with pytest.raises(ValueError):
            pac_bayes_bound(n=100, **arguments)


def test_prior_divergence_is_that_of_torch_distributions_and_refuses_what_is_not_charged():
    model = nn.Sequential(StochasticLinear(20, 30), nn.BatchNorm1d(30), StochasticLinear(30, 4, bias=False)).double()
    prior = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer, scale in ((model[0], 0.3), (model[2], 0.01)):
            layer.weight.add_(scale * torch.randn_like(layer.weight))
            layer.log_sigma2.copy_(math.log(scale) * 2 + torch.randn_like(layer.weight))
    exact = 0
    for name, layer in (("0", model[0]), ("2", model[2])):
        q = torch.distributions.Normal(layer.weight, torch.exp(layer.log_sigma2 / 2))
        p = torch.distributions.Normal(prior[name + ".weight"], 1.0)
        of_s = [torch.distributions.kl_divergence(q, torch.distributions.Normal(p.loc, math.exp(k / 40))).sum()
                for k in range(-799, 201)]  # log s^2 in steps of 1/20
        exact = exact + min(of_s) + math.log(len(of_s))
    divergence = prior_divergence(model, prior)
    alone = prior_divergence(model[2], {k[2:]: v for k, v in prior.items() if k.startswith("2.")})
    assert 0 < alone < divergence
    assert divergence.item() == pytest.approx(exact.item(), rel=1e-9)
    divergence.backward()
    assert all(layer.weight.grad.abs().sum() > 0 and layer.log_sigma2.grad.abs().sum() > 0 for layer in model[::2])
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
    assert label_information(F.one_hot(labels).float() * 50, labels).item() == pytest.approx(math.log(10), abs=1e-6)
    assert label_information(torch.zeros(200, 10), labels).item() == pytest.approx(0, abs=1e-6)
    # a noisy channel: right with probability p, else uniform over the rest; the exact mutual information is known
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
    z = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.double), covariance).sample((100_000,))
    z = torch.cat([z, torch.full((len(z), 1), 3.0)], 1).view(-1, 5, 1) * 7 + 2  # scale, shift, constants do not matter
    assert total_correlation(z).item() == pytest.approx(exact.item(), abs=0.01)
    assert total_correlation(torch.randn(100_000, 3)).item() == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="samples"):
        total_correlation(torch.randn(4, 5))


class PairCritic(nn.Module):
    """Scores all pairs of rows of z and n: a bilinear form and inner products of two embeddings."""

    def __init__(self, dim):
        super().__init__()
        self.z, self.n = (nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.product = nn.Linear(dim, dim)
        nn.init.zeros_(self.product.weight)

    def forward(self, z, n):
        return self.product(z) @ n.T + self.z(z) @ self.n(n).T


def gaussian_pairs(information, dim, count):
    """(z, n), each (count, dim), of which I(z;n) is known: dim pairs of Gaussians of one correlation."""
    square = -math.expm1(-2 * information / dim)  # I = -dim/2 log(1 - correlation^2)
    z = torch.randn(count, dim)
    return z, square**0.5 * z + (1 - square) ** 0.5 * torch.randn(count, dim)


@pytest.mark.parametrize("information, dim", [(0, 1), (0, 20), (0.5, 1), (0.5, 20), (2, 5), (2, 20), (5, 20)])
def test_density_ratio_information_of_correlated_gaussians(information, dim):
    z, n = gaussian_pairs(information, dim, 60_000)
    ours = density_ratio_information(PairCritic(dim), z, n, lr=5e-3, steps=800, patience=200)
    within = 0.05 if information == 0 else max(0.1, (0.15 if information == 5 else 0.1) * information)
    assert ours["plug_in"] == pytest.approx(information, abs=within)
    for bound in ("donsker_varadhan", "info_nce"):
        assert ours[bound] < information + within / 2 and ours[bound] == pytest.approx(information, abs=2 * within)
    assert ours["calibration_error"] < 0.03


def test_density_ratio_information_measures_what_it_was_given():
    z, n = gaussian_pairs(2, 5, 3000)
    z.requires_grad_()
    critic = PairCritic(5)

    def estimate(n):
        torch.manual_seed(0)
        return density_ratio_information(copy.deepcopy(critic), z, n, validation=500, held_out=500, steps=60, batch=64)

    ours = estimate(n)
    assert z.grad is None and estimate(n) == ours
    shuffled = torch.cat([n[:-500], n[-500:].roll(1, 0)])  # what was learned does not hold of the held-out pairs
    assert estimate(shuffled)["info_nce"] < 0 < ours["info_nce"]
    for arguments in ((z[:-1], n), (z[:900], n[:900])):
        with pytest.raises(ValueError, match="as many of each"):
            density_ratio_information(critic, *arguments)
    with pytest.raises(ValueError, match="a score for each"):
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
        scores.log_softmax(1).diagonal().mean().item() + math.log(3))
    chances = [(2.0, 1), (3.0, 1), (1.0, 1), (-2.0, 0), (0.0, 0), (0.5, 0)]  # each alone in its bin, or nearly
    bins = {}
    for score, true in chances:
        chance = 1 / (1 + math.exp(-score))
        bins.setdefault(int(10 * chance), []).append(chance - true)
    assert ours["calibration_error"] == pytest.approx(sum(abs(sum(some)) for some in bins.values()) / 6)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Data
# ----------------------------------------------------------------------------------------------------------------------
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
    np.savez(tmp_path / "mnist.npz", x_train=digits, y_train=np.arange(3), x_test=digits, y_test=np.arange(3))
    x, y, *_ = load_mnist(tmp_path)
    assert x.shape == (3, 1, 28, 28) and (x[:, 0].numpy() == digits).all() and y.tolist() == [0, 1, 2]
    faces = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "celeba64.npz", images=faces, attrs=np.eye(3, 40, dtype=np.uint8),
             attr_names=np.array([f"a{i}" for i in range(40)]), partition=np.array([0, 1, 2], np.uint8))
    images, attrs, names, partition = load_celeba(tmp_path)
    assert images.shape == (3, 3, 64, 64) and images[2, 1, 5, 6] == faces[2, 5, 6, 1]
    assert attrs.shape == (3, 40) and names[39] == "a39" and partition.tolist() == [0, 1, 2]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "shape", "pickle", "short"])
def test_damaged_npz_files_are_named_in_one_line(tmp_path, damage):
    path = tmp_path / "cifar10.npz"
    arrays = cifar_arrays()
    if damage == "missing":
        del arrays["y_test"]
    if damage == "shape":
        arrays["x_train"] = arrays["x_train"].astype(np.float32)
    if damage == "short":
        arrays["y_train"] = arrays["y_train"][:-1]
    if damage == "pickle":
        arrays["y_train"] = np.array([{}, 1], dtype=object)
    np.savez(path, **arrays)
    content = path.read_bytes()
    damaged = {"truncated": content[:len(content) // 2], "garbage": b"no npz", "empty": b""}
    path.write_bytes(damaged.get(damage, content))
    with pytest.raises(DataError) as error:
        load_cifar10(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.exists()


def test_look_up_goes_from_npz_to_torchvisions_copy_to_download(tmp_path, monkeypatch):
    calls = []

    class FakeCIFAR10:
        def __init__(self, root, train, download):
            calls.append((train, download))
            if not download and not (tmp_path / "copy").exists():
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
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
        attr_names = [f"a{i}" for i in range(40)] + [""]  # torchvision's header ends in an empty name
        attr = torch.eye(2, 40, dtype=torch.long)

        def __init__(self, root, split, transform, download):
            assert split == "all"
            (Path(root) / "celeba").mkdir(exist_ok=True)
            (Path(root) / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n")
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
    assert len(names) == 40 and partition.tolist() == [0, 2] and (tmp_path / "celeba64.npz").exists()


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
    assert "\n" not in message and "no network" in message and "--scale demo" in message and str(tmp_path) in message
    assert all(hint in message for hint in hints) and not (tmp_path / "data").exists()


def test_channel_statistics_and_subsets():
    x = torch.randint(256, (50, 3, 6, 5), dtype=torch.uint8)
    mean, std = channel_statistics(x)
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert torch.allclose(mean.flatten(), x.float().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(std.flatten(), x.float().std((0, 2, 3), correction=0), rtol=1e-5)
    x, y = torch.arange(50), torch.arange(50) + 100
    few, labels = draw_subset(x, y, 20, torch.Generator().manual_seed(1))
    assert len(set(few.tolist())) == 20 and torch.equal(labels, few + 100) and not torch.equal(few, x[:20])
    assert torch.equal(few, draw_subset(x, y, 20, torch.Generator().manual_seed(1))[0])
    with pytest.raises(DataError, match="51 .* 50"):
        draw_subset(x, y, 51, torch.Generator())


def test_corrupt_labels_draws_exactly_the_share_anew():
    labels = torch.full((1000,), -1)
    for fraction in (0, 0.1, 0.25, 0.9995, 1):
        new = corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(3))
        assert (new >= 0).sum() == round(1000 * fraction) and new.max() < 10
        assert torch.equal(new, corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(3)))
    assert (labels == -1).all()
    new = corrupt_labels(torch.zeros(100_000, dtype=torch.long), 1.0, 10, torch.Generator().manual_seed(0))
    assert (torch.bincount(new) - 10_000).abs().max() < 500  # uniform, the old label included
    with pytest.raises(ValueError):
        corrupt_labels(labels, 1.5, 10, torch.Generator())


def test_add_clutter_pastes_squares_and_returns_their_mask():
    images = torch.full((500, 1, 28, 28), 7, dtype=torch.uint8)
    cluttered, mask = add_clutter(images, torch.Generator().manual_seed(0), squares=1, size=4)
    assert mask.shape == (500, 1, 28, 28) and mask.dtype == torch.bool
    assert (mask.sum((1, 2, 3)) == 16).all() and (cluttered[mask] == 255).all() and (cluttered[~mask] == 7).all()
    rows, columns = mask.any(3)[:, 0], mask.any(2)[:, 0]
    assert (rows.sum(1) == 4).all() and (columns.sum(1) == 4).all()
    assert set(rows.int().argmax(1).tolist()) == set(range(25)) == set(columns.int().argmax(1).tolist())
    assert (images == 7).all()
    cluttered, mask = add_clutter(torch.zeros(50, 3, 28, 28), torch.Generator().manual_seed(0))
    assert cluttered.shape == (50, 3, 28, 28) and cluttered.max() == 1 and mask.shape == (50, 1, 28, 28)
    assert 120 < mask.float().sum((1, 2, 3)).mean() < 160  # ten squares of 16, less what overlaps


@pytest.mark.parametrize("make, shape", [(synthetic_objects, (3, 32, 32)), (synthetic_digits, (1, 28, 28))])
def test_synthetic_images_are_seeded_and_balanced(make, shape):
    images, labels = make(600, seed=1)
    assert images.shape == (600, *shape) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, make(600, seed=1)[0]) and not torch.equal(images, make(600, seed=2)[0])
    assert torch.bincount(labels, minlength=10).min() > 30
    assert len(images.flatten(1).unique(dim=0)) == 600


def test_synthetic_faces_know_their_factors():
    images, attributes, factors = synthetic_faces(600, seed=1)
    assert images.shape == (600, 3, 64, 64) and attributes.shape == (600, len(common.FACE_ATTRIBUTES))
    assert attributes.dtype == torch.uint8 and attributes.max() == 1
    assert torch.equal(factors["glasses"], attributes[:, common.FACE_ATTRIBUTES.index("glasses")].long())
    assert {name: len(values.unique()) for name, values in factors.items()} == common.FACE_FACTORS
    assert torch.equal(images, synthetic_faces(600, seed=1)[0])


def test_synthetic_digits_are_worth_training_on():
    (x, y), (x_test, y_test) = synthetic_digits(2500, seed=0), synthetic_digits(1000, seed=1)
    x, x_test = x.float() / 255, x_test.float() / 255
    cnn = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(32 * 49, 10))
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


# ----------------------------------------------------------------------------------------------------------------------
# 5. Running a grid, in real processes
# ----------------------------------------------------------------------------------------------------------------------
TOY = '''
"""A toy figure."""
import sys, time
sys.path.insert(0, {here!r})
import torch
from common import parse_args, run_grid

def train_cell(cell, device, args, progress):
    torch.manual_seed(cell["seed"])
    if isinstance(cell["beta"], list):
        return [{{"value": b * 2}} for b in cell["beta"]]
    time.sleep({sleep})
    if cell["beta"] == 6:
        progress(1, 2, float("nan"))
    with open({log!r}, "a") as file:
        file.write(f"{{cell['seed']}}-{{cell['beta']}}\\n")
    return {{"value": torch.randn(300, 300).svd().S.sum().item() * cell["beta"]}}

def main():
    args = parse_args(__doc__, {{"demo": ["synthetic", "other"], "cpu": ["synthetic"]}}, {{"demo": [0], "cpu": [0]}})
    rows = run_grid([{{"beta": b}} for b in ({betas})], train_cell, args)
    print("rows", len(rows))

if __name__ == "__main__":
    main()
'''


# Every run has a process of its own. Most of a short one is imports: on Linux it is forked from a process that has done
# them and nothing else.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["test_common", "matplotlib.pyplot"])


class Run:
    """python <script> <arguments> in a process of its own, its SETTINGS updated first: {scale: {name: value}}."""

    def __init__(self, script, *arguments, settings=None):
        self.command, self.folder = [script, *arguments], tempfile.TemporaryDirectory()
        self.process = CONTEXT.Process(target=run_script, args=(self.command, self.folder.name, settings))
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


def run_script(command, folder, settings):
    os.chdir(HERE)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = command
    if settings is None:
        runpy.run_path(command[0], run_name="__main__")
    else:
        figure = importlib.import_module(Path(command[0]).stem)
        for scale, values in settings.items():
            figure.SETTINGS[scale].update(values)
        figure.main()


def side_by_side(run, *items):
    """[run(item), ...] for runs that wait for processes of their own, two at a time."""
    with futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, *items))


class Toy:
    def __init__(self, folder, sleep=0.0, betas="1, 2, 3, 4"):
        self.script, self.log, self.out = folder / "toy.py", folder / "log", folder / "out"
        self.script.write_text(TOY.format(here=str(HERE), sleep=sleep, log=str(self.log), betas=betas))
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
    first = toy.run("--jobs", "1", "--seeds", "0", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("toy: device cpu, scale demo, data synthetic, 8 cells, 0 done")
    rows = toy.rows()
    assert len(rows) == 8 and {(r["seed"], r["beta"]) for r in rows} == set(itertools.product((0, 5), (1, 2, 3, 4)))
    for row in rows:
        assert {"figure", "scale", "dataset", "seed", "status", "seconds", "device", "torch", "git", "value"} <= {*row}
        assert (row["figure"], row["scale"], row["dataset"], row["status"]) == ("toy", "demo", "synthetic", "ok")
    assert "rows 8" in toy.run("--jobs", "1", "--shard", "31/40", "--seeds", "0", "5").stdout  # an empty shard
    again = toy.run("--jobs", "1", "--seeds", "0", "5")
    assert "8 cells, 8 done" in again.stdout and "--out elsewhere" in again.stdout and toy.rows() == rows
    other = toy.run("--jobs", "1", "--dataset", "other")
    assert "4 cells, 0 done" in other.stdout and "rows 4" in other.stdout and len(toy.rows()) == 12


def test_numbers_are_the_same_with_jobs(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = Toy(tmp_path / "a"), Toy(tmp_path / "b")
    assert [run.returncode for run in side_by_side(lambda toy, n: toy.run("--jobs", n), (one, two), "12")] == [0, 0]
    values = [{r["beta"]: r["value"] for r in toy.rows()} for toy in (one, two)]
    assert values[0] == values[1]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_kill_and_torn_line_lose_nothing_finished_and_repeat_nothing(tmp_path, jobs):
    toy = Toy(tmp_path, sleep=0.4, betas="1, 2, 3, 4, 5")
    run = toy.start("--jobs", jobs)
    toy.wait_for_rows(2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(1.5)  # workers notice that their parent is gone
    saved, logged = toy.rows(), toy.log.read_text().split()
    with open(toy.path, "a") as file:
        file.write('{"figure": "toy", "beta": 3, "se')
    result = toy.run("--jobs", jobs)
    assert result.returncode == 0 and "torn" in result.stderr and f"5 cells, {len(saved)} done" in result.stdout
    rows = toy.rows()  # every line parses again
    assert rows[:len(saved)] == saved and sorted(r["beta"] for r in rows) == [1, 2, 3, 4, 5]
    done_again = toy.log.read_text().split()[len(logged):]
    assert len(done_again) == 5 - len(saved)


def test_two_runs_do_not_write_one_file(tmp_path):
    toy = Toy(tmp_path, sleep=1.0, betas=", ".join(map(str, range(100, 160))))
    first = toy.start("--jobs", "1")
    toy.wait_for_rows(1)
    second = toy.run("--jobs", "1")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.returncode == 2 and "another run" in second.stderr and second.stderr.count("\n") == 1
    assert len({r["beta"] for r in toy.rows()}) == len(toy.rows())


def test_ctrl_c_ends_with_130_and_says_what_is_saved(tmp_path):
    for jobs in ("1", "2"):
        toy = Toy(tmp_path, sleep=0.3, betas="1, 2, 3, 4, 5, 7, 8, 9")
        run = toy.start("--jobs", jobs)
        toy.wait_for_rows(1)
        run.send_signal(signal.SIGINT)
        result = run.wait(timeout=30)
        assert result.returncode == 130 and str(toy.out) in result.stderr and "Traceback" not in result.stderr
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


def test_a_cell_with_a_list_yields_a_row_for_each_element(tmp_path):
    toy = Toy(tmp_path, betas="[1, 2, 3], 4")
    assert toy.run("--jobs", "1").returncode == 0
    assert [(r["beta"], r["value"]) for r in toy.rows()][:3] == [(1, 2), (2, 4), (3, 6)]
    lines = toy.path.read_text().splitlines(keepends=True)
    toy.path.write_text("".join(lines[:2] + lines[3:]))  # a rung is lost: the walk is run again
    result = toy.run("--jobs", "1")
    assert "2 cells, 1 done" in result.stdout and len(toy.rows()) == 6
    assert "rows 4" in result.stdout  # of rows that stand twice, one counts


def test_a_diverged_cell_is_recorded_and_the_rest_goes_on(tmp_path):
    toy = Toy(tmp_path, betas="5, 6, 7")
    assert toy.run("--jobs", "2").returncode == 0
    assert {r["beta"]: r["status"] for r in toy.rows()} == {5: "ok", 6: "diverged", 7: "ok"}
    assert "NaN" not in toy.path.read_text() and "3 done" in toy.run().stdout


BAD_VALUES = ["--gpu x", "--gpu -1", "--gpu 0,", "--jobs 0", "--jobs two", "--shard 3/2", "--shard 1", "--shard a/b",
              "--shard 1/0", "--seeds -1", "--seeds one", "--scale huge", "--dataset imagenet", "--nonsense",
              "--plot-only"]


@pytest.fixture(scope="module")
def bad_runs(tmp_path_factory):
    toys = [Toy(tmp_path_factory.mktemp("toy")) for _ in BAD_VALUES]
    results = side_by_side(lambda toy, arguments: toy.run(*arguments.split()), toys, BAD_VALUES)
    return dict(zip(BAD_VALUES, zip(toys, results)))


@pytest.mark.parametrize("arguments", BAD_VALUES)
def test_bad_values_give_one_line_status_2_and_write_nothing(bad_runs, arguments):
    toy, result = bad_runs[arguments]
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    value = arguments.split()[-1]
    assert value in result.stderr and not toy.out.exists()


def test_gpu_that_is_not_there_gives_a_warning(tmp_path):
    result = Toy(tmp_path).run("--gpu", "7", "--jobs", "1")
    assert result.returncode == 0 and result.stderr.count("\n") == 1 and result.stderr.startswith("warning: ")
    assert "7" in result.stderr and "device cpu" in result.stdout


def test_unwritable_folder_and_full_disk_end_in_one_line(tmp_path):
    toy = Toy(tmp_path)
    toy.out.write_text("a file, not a folder")
    result = toy.run("--jobs", "1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and str(toy.out) in result.stderr
    toy.out.unlink()
    limit = 400  # bytes that a file may have: the second row does not fit
    result = subprocess.run([sys.executable, *toy.command, "--jobs", "1"], capture_output=True, text=True, timeout=120,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    result = toy.run("--jobs", "1")
    assert result.returncode == 0 and sorted(r["beta"] for r in toy.rows()) == [1, 2, 3, 4]
    if Path("/dev/full").exists():
        toy.path.unlink()
        toy.path.symlink_to("/dev/full")
        result = toy.run("--jobs", "1")
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "space" in result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The sections alone, the scripts, the README
# ----------------------------------------------------------------------------------------------------------------------
def test_sections_run_alone_under_the_import_block():
    source = (HERE / "common.py").read_text()
    imports, *sections = re.split(r"(?m)^# =+\n# (?=\d\. )", source)
    assert len(sections) == 5
    uses = ["layer = to_stochastic(nn.Linear(3, 2)); layer(torch.ones(1, 3)); layer.information().backward()",
            "",
            "assert g(1.0) > 0 and total_correlation(torch.randn(50, 3)) >= 0 and alpha_from_information(1.0, 2) < 1; "
            "layer_information(torch.ones(2, 3), 0.1, torch.randn(9, 3)); layer_information_bound(2, 0.1); "
            "w = nn.Linear(2, 1); hessian_trace(w(torch.ones(1, 2)).square().sum(), [w.weight]); "
            "flat_minimum_bound(w.weight, 1.0, 1); pac_bayes_bound(0.1, 1.0, 100)",
            "synthetic_objects(2); synthetic_digits(2); synthetic_faces(2); "
            "add_clutter(torch.zeros(2, 1, 28, 28), torch.Generator()); corrupt_labels(torch.zeros(4).long(), 0.5, 10, "
            "torch.Generator())",
            "assert summarise([{'status': 'ok', 'x': 1, 'y': 2.0}], 'x', 'y') == [(1, 2.0, 0.0, 1)]"]
    for section, use in zip(sections, uses):
        exec(compile(f"{imports}\n# {section}\n{use}", "section", "exec"), {"__name__": "pasted"})
    exec(f"{imports}\n# {sections[0]}\n# {sections[1]}\nmodel = to_stochastic(nn.Linear(3, 2))\n"
         "ib_loss(model(torch.ones(4, 3)), torch.ones(4).long(), model, 1.0, 4)[0].backward()", {"__name__": "pasted"})


# The demo settings of the figure scripts, cut down
FIG1 = dict(width=1 / 16, sizes=(100, 200), betas=(0.01, 0.3, 10.0), steps=5, ladder=(0.1, 0.5, 1.0), rung=5,
            hysteresis=(100,), below=(0.05,), test=100, batch=2000)
FIG2 = dict(widths={"Small AlexNet": 1 / 16, "All-CNN": 1 / 32, "ResNet": 1 / 8}, n_models=100, betas=(0.01, 10.0),
            n=100, shares=(0.0, 0.5, 1.0), elsewhere=((50, 0.1),), steps=3, batch=2000, test=100)
FIG3 = dict(n=20, test=20, batch=20, widths=(1 / 96, 1 / 32), width_steps=6, beta_width=1 / 32, beta_steps=6,
            betas=(0.01, 1.0, 100.0))
FIG4 = dict(width=1 / 32, betas=(0.001, 10.0), n=60, steps=3, batch=20, pairs=60, discriminator_steps=3, validation=20,
            test=30)
FIG5 = dict(betas=(0.0, 0.1, 10.0), channels=(4, 4, 8, 4), dim_u=3, synthetic=(60, 40), test=40, judge_steps=2,
            classifier_steps=3, vae_steps=3, batch=16)
RUNS = {  # what the tests whose names begin so look at: runs of a script, one after the other, in a folder of their own
    "fig1_runs": (("fig1_phase_transition", FIG1), ("fig1_phase_transition", FIG1, "--plot-only")),
    "fig1_draws": (("fig1_phase_transition", FIG1, "--shard", "1/9"),),
    "fig1_compares": (("fig1_phase_transition", FIG1, "--caps", "0", "1.5"),),
    "fig1_certifies": (("fig1_phase_transition", FIG1 | dict(certificates=(60, 5, 5, 50)), "--certificates"),),
    "fig2_runs": (("fig2_corrupted_labels", FIG2), ("fig2_corrupted_labels", FIG2, "--plot-only")),
    "fig2_runs shard": (("fig2_corrupted_labels", FIG2, "--shard", "1/11"),),
    "fig3_runs": (("fig3_width_beta", FIG3, "--seeds", "0", "1"),
                  ("fig3_width_beta", FIG3, "--seeds", "0", "1", "--plot-only")),
    "fig3_draws beta": (("fig3_width_beta", FIG3, "--shard", "1/5"),),
    "fig3_draws width": (("fig3_width_beta", FIG3, "--shard", "4/5"),),
    "fig4_runs": (("fig4_cluttered_mnist", FIG4), ("fig4_cluttered_mnist", FIG4, "--plot-only")),
    "fig5_runs": (("fig5_celeba_vae", FIG5),),
    "fig5_runs alone": (("fig5_celeba_vae", FIG5 | {"betas": (0.1,)}),),
}


def run_tiny(script, settings, out, *arguments):
    """Run a figure script in a process of its own with its demo settings cut down."""
    return Run(f"{script}.py", "--scale", "demo", "--jobs", "1", "--out", str(out), *arguments,
               settings={"demo": settings}).wait()


def looks_at(test, name):
    return test.name.startswith(f"test_{name.split()[0]}")


@pytest.fixture(scope="module")
def all_runs(request, tmp_path_factory):
    """{name: future of (folder, results)} of those RUNS that the selected tests look at, two processes at a time."""
    def carry_out(name, folder):
        return folder, [run_tiny(script, settings, folder, *arguments) for script, settings, *arguments in RUNS[name]]

    with futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(carry_out, name, tmp_path_factory.mktemp("run")) for name in RUNS
               if any(looks_at(test, name) for test in request.session.items)}


@pytest.fixture
def runs(request, all_runs):
    """[(folder, results), ...] of the RUNS that this test looks at; results: CompletedProcess of each run."""
    return [future.result() for name, future in all_runs.items() if looks_at(request.node, name)]


def test_fig1_runs_and_its_rows_keep_the_contract(runs):
    (folder, (result, again)), = runs
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "fig1_phase_transition-demo.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3 + 3 + 4
    assert {r["start"] for r in rows} == {"anneal", "memorised", "chance"}
    assert {r["labels"] for r in rows} == {"random", "real"}
    for r in rows:
        assert {"labels", "n", "beta", "start", "objective", "train_acc", "train_acc_mean", "test_acc", "cross_entropy",
                "information"} <= set(r)
        assert r["objective"] == pytest.approx(r["cross_entropy"] + r["beta"] * r["information"] / r["n"], rel=1e-5)
        assert all(0 <= r[key] <= 1 for key in ("train_acc", "train_acc_mean", "test_acc"))
    for ending in ("png", "pdf"):
        assert (folder / f"fig1_phase_transition-demo.{ending}").stat().st_size > 10_000
    assert "| claim | paper | ours | holds? |" in result.stdout
    table = result.stdout[result.stdout.index("| claim |"):]
    assert again.returncode == 0 and again.stdout.endswith(table)


def test_fig1_draws_whatever_rows_there_are(runs):
    (folder, (result,)), = runs
    assert result.returncode == 0, result.stderr
    rows = (folder / "fig1_phase_transition-demo.1-of-9.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 6
    row = json.loads(rows[0])
    row["status"] = "diverged"
    (folder / "fig1_phase_transition-demo.1-of-9.jsonl").write_text(json.dumps(row) + "\n")
    result = run_tiny("fig1_phase_transition", FIG1, folder, "--plot-only")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "diverged" in result.stderr


def test_fig1_says_what_is_missing_without_data(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"broken")
    command = [sys.executable, "fig1_phase_transition.py", "--scale", "cpu", "--out", str(tmp_path / "out"),
               "--data-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cifar10.npz" in result.stderr
    assert not (tmp_path / "out").exists()


def test_fig1_compares_caps_of_lognormal_noise(runs):
    (folder, (result,)), = runs
    rows = [json.loads(line) for line in (folder / "fig1_phase_transition-caps-demo.jsonl").read_text().splitlines()]
    assert result.returncode == 0, result.stderr
    assert {(r["cap"], r["beta"]) for r in rows} == {*itertools.product((0, 1.5), (0.01, 10))}
    assert "cap on log" in result.stdout and not list(folder.glob("fig1_phase_transition-demo*"))


def test_fig1_certifies_nets_and_charges_all_that_they_learned(runs):
    (folder, (result,)), = runs
    assert result.returncode == 0, result.stderr
    path = folder / "fig1_phase_transition-certificates-demo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["seen"], r["beta"], r["bound_n"]) for r in rows] == [(0, 3, 60), (0, 10, 60), (0.5, 3, 30)]
    assert all(0 < r["divergence"] and 0 < r["cross_entropy"] <= math.log(10) and 0 < r["error"] <= 1 for r in rows)
    assert result.stdout.count("certificate over the test's") == 6 and not list(folder.glob("*transition-demo*"))

    import fig1_phase_transition as figure
    for r, loss in itertools.product(rows, figure.MAX_LOSS):
        one, many = figure.certificate(r, loss, 1), figure.certificate(r, loss, 100)
        assert r[loss] < one < many  # holding at once with others costs
        assert one > common.pac_bayes_bound(r[loss], r["divergence"], r["bound_n"], max_loss=figure.MAX_LOSS[loss])


def fabricated(labels, start, n, beta, accuracy, seed=0):
    label_nats = math.log(10) * max(0, accuracy - 0.1)
    information = n * (8 if accuracy > 0.5 else 0.001)
    return dict(status="ok", labels=labels, start=start, n=n, beta=beta, seed=seed, train_acc=accuracy, test_acc=0.1,
                cross_entropy=math.log(10) - label_nats, label_information=label_nats, information=information,
                objective=math.log(10) - label_nats + beta * information / n)


def test_fig1_claims_can_hold_and_fail_and_stay_undecided():
    import types

    import fig1_phase_transition as figure
    s, args = figure.SETTINGS["cpu"], types.SimpleNamespace(scale="cpu")

    def verdicts(dies):
        rows = [fabricated("random", "anneal", n, b, 0.99 if b < dies else 0.1) for n in s["sizes"] for b in s["betas"]]
        for n in s["hysteresis"]:
            rows += [fabricated("random", "memorised", n, b, 0.9 if b < dies else 0.1) for b in s["ladder"]]
            rows += [fabricated("random", "chance", n, b, 0.9 if b < 0.02 else 0.1) for b in s["ladder"] + s["below"]]
        return [row[3] for row in figure.claims(rows, args)], rows

    good, rows = verdicts(0.5)
    assert good == ["yes"] * 6 + ["not measured", "yes", "yes", "not measured", "not measured"]
    assert verdicts(0.25)[0][:2] == ["yes", "NO"]  # falls too early
    assert verdicts(99.0)[0][1:5] == ["NO"] * 4  # never falls: no crossing, no chance, memory does not die
    assert verdicts(0.001)[0][0] == "NO"  # never memorised
    assert {row[3] for row in figure.claims(rows[1:9], args)} == {"not measured"}
    for nats, verdict in ((0.01, "yes"), (1.0, "NO")):  # a sample
        real = [fabricated("real", "anneal", n, b, 0.99) | {"information": nats * n}
                for n in s["sizes"] for b in s["betas"]]
        assert figure.claims(real, args)[-1][3] == verdict
        bound = figure.mean_bounds(real, 3000)[0][1]
        assert bound == pytest.approx(pac_bayes_bound(0.01, nats * 3000, 3000, max_loss=1))
    lower, equal, upper = figure.hysteresis([r for r in rows if r["n"] == 300 and r["start"] != "anneal"])
    assert 0.01 < lower < 0.03 < equal < upper < 0.5
    # memory: log 10 - 0.8 log 10 + 8 beta against chance: log 10 + 0.001 beta
    assert equal == pytest.approx(0.8 * math.log(10) / 7.999, rel=0.1)


@pytest.mark.parametrize("cells", [[(20, 0.1)], [(20, 0.1), (40, 1.0)], [(20, 0.1), (40, 0.1), (80, 0.1)], []])
def test_fig1_map_takes_few_and_collinear_cells(cells):
    import fig1_phase_transition as figure
    fig, axes = common.new_figure(1, 1, "")
    figure.plot_map(axes[0, 0], [fabricated("random", "anneal", n, b, 0.5) for n, b in cells], "random", "train_acc")


def test_minibatches_go_through_every_sample_once_an_epoch():
    batches = list(itertools.islice(minibatches(10, 3, "cpu"), 6))
    assert all(len(batch) == 3 for batch in batches)
    for epoch in (batches[:3], batches[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))
    assert len(next(minibatches(10, 100, "cpu"))) == 10


def test_annealed_rises_holds_and_ends_at_zero():
    assert [common.annealed(t) for t in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9)] == pytest.approx([0.001, 0.501, 1, 1, 1, 0.5])
    assert common.annealed(1.0) == pytest.approx(0, abs=1e-12)


def test_crossing_is_where_a_curve_falls_through_a_level():
    assert common.crossing([(0.1, 0.9), (10, 0.1), (100, 0.9), (1000, 0)], 0.5) == pytest.approx(1.0)
    assert math.isnan(common.crossing([(0.1, 0.4), (1, 0.6)], 0.5)) and math.isnan(common.crossing([], 0.5))


def test_only_seeds_with_all_cells_are_complete():
    rows = [{"seed": s, "beta": b, "n": n, "status": "ok"} for s in (0, 1, 2) for b in (1, 2, 3) for n in (5, 6)]
    rows[0]["status"] = "diverged"  # seed 0, beta 1, n 5
    del rows[-2]  # seed 2, beta 3, n 5
    cells = [{"n": 5, "beta": b} for b in (1, 3)]
    kept = common.complete_seeds(rows, cells)
    assert [(r["seed"], r["beta"], r["n"]) for r in kept] == [(1, 1, 5), (1, 3, 5)]
    assert common.per_seed(len, rows).tolist() == [6, 6, 5] and common.per_seed(len, []).size == 0


def test_fig2_runs_and_its_rows_keep_the_contract(runs):
    (folder, (result, again)), (_, (shard,)) = runs
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "fig2_corrupted_labels-demo.jsonl").read_text().splitlines()]
    assert [r["panel"] for r in rows] == ["corruption"] * 5 + ["models"] * 6
    for r in rows:
        assert {"model", "n", "beta"} <= set(r) if r["panel"] == "models" else {"corruption", "n", "beta"} <= set(r)
        assert r["information"] == pytest.approx(sum(r["information_by_layer"].values()), rel=1e-5)
        assert r["objective"] == pytest.approx(r["cross_entropy"] + r["beta"] * r["information"] / r["n"], rel=1e-5)
        assert all(0 <= r[key] <= 1 for key in ("train_acc", "train_acc_mean", "test_acc", "test_acc_sampled"))
    assert list(rows[0]["information_by_layer"]) == ["conv1", "conv2", "fc3", "fc4", "fc5"]
    assert again.returncode == 0 and again.stdout.endswith(result.stdout[result.stdout.index("| claim |"):])
    assert shard.returncode == 0 and "not measured" in shard.stdout, shard.stderr


def test_fig2_networks_have_the_size_and_the_shapes_they_claim():
    import fig2_corrupted_labels as figure
    with torch.device("meta"):
        for width, count in ((1 / 4, 102_610), (1, 1_620_010)):
            means = [p for name, p in figure.all_cnn(width, 1).named_parameters() if not name.endswith("log_sigma2")]
            assert sum(p.numel() for p in means) == count
        weights = [m.weight for m in figure.small_alexnet(1, 1) if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert sum(w.numel() for w in weights) + 64 + 64 + 384 + 192 + 10 == 1_387_786
        for blocks in (1, 3):
            convolutions = [m for m in figure.resnet(1, blocks).modules() if getattr(m, "kernel_size", 0) == (3, 3)]
            assert len(convolutions) + 1 == 6 * blocks + 2
    for model in figure.MODELS.values():
        x = torch.randn(3, 3, 28, 28)
        assert model(1 / 2, 1)(x).shape == (3, 10)
    block = figure.Block(4, 8, 2).eval()  # against the convolution with stride 2 that the slice stands for
    x = torch.randn(2, 4, 8, 8)
    h = block.norm1(x).relu()
    wanted = F.conv2d(h, block.shortcut.weight, stride=2) + block.conv2(block.norm2(block.conv1(h)).relu())
    assert torch.allclose(block(x), wanted, atol=1e-5)


def test_fig2_claims_can_hold_and_fail_and_stay_undecided():
    import types

    import fig2_corrupted_labels as figure
    s = figure.SETTINGS["cpu"]
    models, corruption = figure.make_cells(s)

    def verdicts(error=lambda beta: 5 if beta < 0.1 else 90, rise=2.5, accuracy=0.95, bend=0.0, drop=0):
        rows = []
        for seed, cell in itertools.product((0, 1), (models + corruption)[drop:]):
            nats = 6 - cell["beta"] + rise * cell.get("corruption", 0) * (1 + math.log(cell["n"] / 3000) / 10)
            nats += (cell.get("corruption") == 0.9) * bend - 4 * cell["beta"] * cell.get("corruption", 0)
            wrong = error(cell["beta"]) / 100 if cell["panel"] == "models" else 1 - accuracy
            rows.append(dict(cell, status="ok", seed=seed, train_acc=1 - wrong, information=nats * cell["n"],
                             information_by_layer={"conv1": nats * cell["n"]}))
        return [row[3] for row in figure.claims(figure.add_derived(rows), types.SimpleNamespace(scale="cpu"))]

    assert verdicts(rise=3) == ["yes"] * 11
    assert verdicts(error=lambda beta: 16 if beta < 0.1 else 90, rise=3)[:6] == ["NO", "yes"] * 3
    assert verdicts(error=lambda beta: 5 if beta < 0.1 else 79, rise=3)[:6] == ["NO", "yes"] * 3
    assert verdicts(error=lambda beta: 5 if beta < 2 else 90, rise=3)[:6] == ["yes", "NO"] * 3
    assert verdicts(accuracy=0.8, rise=3)[6:] == ["NO", "yes", "yes", "yes", "yes"]
    assert verdicts(rise=1)[6:9] == ["yes", "NO", "yes"] and verdicts(rise=5)[7] == "NO"
    assert verdicts(rise=3, bend=1.0)[6:9] == ["yes", "yes", "NO"]
    assert verdicts(rise=-3)[8:] == ["NO", "NO", "yes"]
    assert verdicts(rise=3, drop=1)[:3] == ["not measured", "not measured", "yes"]
    assert verdicts(rise=3, drop=len(models) + 1)[6:] == ["not measured"] * 4 + ["yes"]
    assert verdicts(error=lambda beta: math.nan, rise=math.nan, accuracy=math.nan) == ["NO"] * 11


@pytest.mark.parametrize("width, count", [(1 / 4, 102_610), (1 / 2, 406_810), (1, 1_620_010), (2, 6_465_610),
                                          (3, 14_536_810)])
def test_all_cnn_has_the_parameter_counts_of_the_paper(width, count):
    import fig3_width_beta as figure
    with torch.device("meta"):
        model = figure.all_cnn(width)
    assert sum(p.numel() for p in model.parameters()) == count
    assert count in figure.PAPER_WIDTH


def test_all_cnn_is_one_net_with_plain_and_with_stochastic_weights():
    import fig3_width_beta as figure
    shapes = []
    plain = figure.all_cnn(1 / 16)
    stochastic = figure.all_cnn(1 / 16, noise="gaussian")
    assert not stochastic.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    for layer in plain:
        layer.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape)))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), stochastic.eval()(x))
    assert [s[2] for s in shapes if len(s) == 4][::3] == [32, 32, 16, 16, 16, 8, 8, 8, 8]
    layers = [m for m in stochastic if isinstance(m, nn.Conv2d)]
    assert len(layers) == 9 and all(type(m) is StochasticConv2d and not m.local for m in layers)


def test_fig3_runs_and_its_rows_keep_the_contract(runs):
    import fig3_width_beta as figure
    (folder, (result, again)), = runs
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "fig3_width_beta-demo.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["panel"]) for r in rows] == [(s, p) for s in (0, 1) for p in ["beta"] * 3 + ["width"] * 2]
    for r in rows:
        assert r["params"] == sum(p.numel() for p in figure.all_cnn(r["width"]).parameters()) and r["n"] == 20
        assert all(0 <= r[key] <= 1 for key in ("train_acc", "train_acc_mean", "test_acc", "test_acc_sampled"))
        if r["panel"] == "beta":
            assert r["objective"] == pytest.approx(r["cross_entropy"] + r["beta"] * r["information"] / 20, rel=1e-5)
        else:
            assert r["information"] is None and "beta" not in r
    for ending in ("png", "pdf"):
        assert (folder / f"fig3_width_beta-demo.{ending}").stat().st_size > 10_000
    assert again.returncode == 0 and again.stdout.endswith(result.stdout[result.stdout.index("| claim |"):])


def test_fig3_draws_whatever_rows_there_are(runs):
    for (folder, (result,)), panel in zip(runs, ("beta", "width"), strict=True):
        assert result.returncode == 0 and result.stdout.count("not measured") == 4, result.stderr
        path, = folder.glob("*.jsonl")
        assert [json.loads(line)["panel"] for line in path.read_text().splitlines()] == [panel]


def test_fig3_claims_can_hold_and_fail_and_stay_undecided():
    import types

    import fig3_width_beta as figure
    s, args = figure.SETTINGS["cpu"], types.SimpleNamespace(scale="cpu")

    def verdicts(widths, betas, noise=0.0, drop=0):
        """From errors in % at the widths and the betas; noise: added to both ends for seed 0; drop: cells left out."""
        cells = list(zip(sum(figure.make_cells(s), []), widths[::-1] + betas))
        rows = []
        for seed, (cell, error) in itertools.product((0, 1), cells[drop:]):
            error += noise * (seed == 0 and cell.get("beta") in ends)
            rows.append(dict(cell, status="ok", seed=seed, test_acc=1 - error / 100))
        return [row[3] for row in figure.claims(rows, args)]

    ends = s["betas"][0], s["betas"][-1]
    u, plateau = [46, 45, 44, 41, 41.5, 43, 50, 60, 90], [50, 42, 41, 42]
    assert verdicts(plateau, u) == ["yes"] * 4
    assert verdicts([50, 41, 42, 43], u)[0] == "NO"  # a U against width
    assert verdicts([50, 46, 43, 41], u)[0] == "yes"  # the widest is the best
    assert verdicts(plateau, [41.3, *u[1:]]) == ["yes", "NO", "yes", "yes"]  # by 0.3 points only
    assert verdicts(plateau, [*u[:8], 42.5]) == ["yes", "yes", "NO", "yes"]
    assert verdicts(plateau, sorted(u)) == ["yes", "NO", "yes", "NO"]  # no U: the least penalty is the best
    assert verdicts(plateau, sorted(u)[::-1]) == ["yes", "yes", "NO", "NO"]
    assert verdicts(plateau, [42, *u[1:8], 44], noise=40)[1:3] == ["NO", "NO"]  # within the spread of the seeds
    assert verdicts([math.nan] * 4, [math.nan] * 9) == ["NO"] * 4
    assert verdicts(plateau, u, drop=1) == ["not measured", "yes", "yes", "yes"]
    assert verdicts(plateau, u, drop=5) == ["not measured"] * 4


def test_fig4_runs_and_its_rows_keep_the_contract(runs):
    (folder, (result, again)), = runs
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "fig4_cluttered_mnist-demo.jsonl").read_text().splitlines()]
    assert [r["beta"] for r in rows] == [0.001, 10.0]
    for r in rows:
        assert {"test_acc", "i_zn", "i_zn_dv", "i_zn_nce", "i_zy", "bound", "information",
                "total_correlation"} <= set(r)
        assert r["layer_lower"] < r["layer_upper"] == pytest.approx(r["layer_lower"] + r["layer_dim"])
        assert r["bottleneck"] in [f"conv{i}" for i in range(2, 9)] and r["total_correlation"] >= 0
    assert rows[0]["information"] > rows[1]["information"] > 0 and rows[0]["bound"] > rows[1]["bound"] > 0
    assert again.returncode == 0 and again.stdout.endswith(result.stdout[result.stdout.index("| claim |"):])
    for ending in ("png", "pdf"):
        assert (folder / f"fig4_cluttered_mnist-demo.{ending}").stat().st_size > 10_000


def test_fig4_bounds_a_layer_by_the_capacity_of_its_gaussian_units():
    import fig4_cluttered_mnist as figure
    features, readout = figure.all_cnn(1 / 32)
    noisy = [m for m in features if isinstance(m, StochasticConv2d)]
    assert len(noisy) == 7 and not any(isinstance(m, StochasticConv2d) for m in readout)
    with torch.no_grad():
        for layer in noisy:  # the same variance a of the noise for each weight
            layer.log_sigma2.copy_(layer.weight.square().log() + math.log(0.2))
    bounds = figure.layer_bounds(features)
    places = [784, 196, 196, 196, 49, 49, 49]
    for (name, bound), layer, place in zip(bounds.items(), noisy, places, strict=True):
        nats, capacity = layer.information().item() / layer.weight.numel(), 0.5 * math.log(6)
        assert bound == pytest.approx(place * layer.out_channels * (nats + 1), rel=1e-3)  # g + 1 a unit
        assert capacity < nats < capacity + 0.64  # where all alphas are alike the bound errs upwards
    full = figure.all_cnn()
    assert sum(p.numel() for m in (*full[0], *full[1]) if isinstance(m, nn.Conv2d) for name, p in m.named_parameters()
               if name != "log_sigma2") == 960 + 83_040 + 166_080 + 4 * 331_968 + 37_056 + 1930
    assert full[0](torch.zeros(2, 1, 28, 28)).shape == (2, 192, 7, 7)


def test_fig4_disentanglement_leaves_dead_places_out():
    import fig4_cluttered_mnist as figure
    layer = StochasticConv2d(6, 4, 1, bias=False, local=True, log_alpha=-3.0)
    inputs = torch.randn(3000, 6, 1, 1)
    row = figure.disentanglement(layer, inputs, units := layer(inputs).detach())
    dead = torch.cat([inputs, torch.zeros(500, 6, 1, 1)])
    assert figure.disentanglement(layer, dead, torch.cat([units, torch.zeros(500, 4, 1, 1)])) == row
    assert row["total_correlation"] == pytest.approx(total_correlation(units.flatten(1)).item())
    capacity = 4 * 0.5 * math.log1p(math.exp(3))
    assert row["layer_lower"] == pytest.approx(capacity, rel=0.01) and row["layer_upper"] == row["layer_lower"] + 4
    assert row["layer_lower"] < row["layer_information"] < row["layer_upper"]


def test_fig4_discriminator_sees_which_mask_belongs_to_a_code():
    import fig4_cluttered_mnist as figure
    images, masks = add_clutter(torch.zeros(1200, 1, 28, 28), torch.Generator().manual_seed(0))
    codes = F.avg_pool2d(images.float() / 255, 4)
    model = figure.Discriminator(1, hidden=16, features=8)
    scores = model(codes[:5], masks[:3])
    assert scores.shape == (5, 3) and torch.allclose(scores[3:4, 1:2], model(codes[3:4], masks[1:2]), atol=1e-5)
    ours = density_ratio_information(model, codes, masks, validation=100, held_out=200, steps=300, batch=64, lr=1e-2)
    assert 1.5 < ours["info_nce"] <= math.log(200)


def test_fig4_claims_can_hold_and_fail_and_stay_undecided():
    import types

    import fig4_cluttered_mnist as figure
    s, args = figure.SETTINGS["cpu"], types.SimpleNamespace(scale="cpu")

    def verdicts(i_zn=(8, 6, 4, 3, 2, 1, 0.5), i_zy=(2.2,) * 5 + (1.8, 0.1), bound=1000, tc=(9, 8, 7, 6, 5, 4, 3),
                 drop=0):
        rows = [dict(beta=beta, seed=seed, status="ok", i_zn=zn, i_zn_dv=zn, i_zn_nce=zn, i_zy=zy, bound=bound,
                     total_correlation=t)
                for seed in (0, 1) for beta, zn, zy, t in zip(s["betas"], i_zn, i_zy, tc)]
        return [row[3] for row in figure.claims(rows[drop:], args)]

    assert verdicts() == ["yes"] * 4 == verdicts(drop=1)  # the seed that is complete
    assert verdicts(i_zn=(8, 6, 6.05, 3, 2, 1, 0.5))[0] == "yes" and verdicts(i_zn=(8, 5, 5.2, 3, 2, 1, 0.5))[0] == "NO"
    assert verdicts(i_zn=(8, 7, 6, 5, 4.2, 1, 0))[0] == "NO"  # by less than half where the label stays
    assert verdicts(i_zy=(2.2,) * 4 + (2.0, 1, 1))[1] == "NO" == verdicts(i_zy=(1.9,) * 7)[1]
    assert verdicts(bound=7)[2] == "NO" and verdicts(tc=(9, 8, 7, 6, 6.5, 4, 3))[3] == "NO"
    assert verdicts(i_zn=(math.nan,) * 7, i_zy=(math.nan,) * 7, bound=math.nan, tc=(math.nan,) * 7) == ["NO"] * 4
    assert verdicts(drop=8) == ["not measured"] * 4


def test_fig5_runs_and_its_rows_keep_the_contract(runs):
    (folder, (result,)), (of_one, (alone,)) = runs
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "fig5_celeba_vae-demo.jsonl").read_text().splitlines()]
    assert [r["beta"] for r in rows] == [0.0, 0.1, 10.0]
    for r in rows:
        assert {"attribute_acc", "balanced_acc", "majority_acc", "reconstruction_mse", "background_mse", "information",
                "attribute_agreement", "sample_spread", "spread_inside", "spread_outside", "kl_u"} <= set(r)
        assert r["probe"].keys() == common.FACE_FACTORS.keys() and list(r["agreement"]) == list(common.FACE_ATTRIBUTES)
        assert r["attribute_agreement"] == pytest.approx(np.mean(list(r["agreement"].values())), rel=1e-5)
        inside, outside = sorted((r["spread_inside"], r["spread_outside"]))
        assert 0 < inside <= r["sample_spread"] <= outside and r["kl_u"] > 0 and r["n"] == 40
    assert alone.returncode == 0, alone.stderr  # one cell, not after another
    row = json.loads((of_one / "fig5_celeba_vae-demo.jsonl").read_text())
    assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in rows[1].items() if k != "seconds"}
    with_faces = (folder / "fig5_celeba_vae-demo.png").stat().st_size
    for path in folder.glob("*-faces.npz"):
        path.unlink()
    again = run_tiny("fig5_celeba_vae", FIG5, folder, "--plot-only")
    assert again.returncode == 0 and again.stdout.endswith(result.stdout[result.stdout.index("| claim |"):])
    assert with_faces > (folder / "fig5_celeba_vae-demo.png").stat().st_size > 10_000


def test_fig5_keeps_real_faces_out_of_what_is_committed(tmp_path):
    import fig5_celeba_vae as figure
    names, attributes = [*figure.FACE_LIKE, *figure.OTHERS], np.arange(70 * 11).reshape(70, 11) % 3 % 2
    np.savez(tmp_path / "celeba64.npz", images=np.full((70, 64, 64, 3), 9, np.uint8), attrs=attributes,
             attr_names=names, partition=np.repeat([0, 1, 2], [40, 10, 20]))
    result = Run("fig5_celeba_vae.py", "--scale", "cpu", "--jobs", "1", "--seeds", "0", "--out", str(tmp_path / "out"),
                 "--data-dir", str(tmp_path), settings={"cpu": FIG5 | {"betas": (0.1, 10.0)}}).wait()
    assert result.returncode == 0 and result.stderr == "", result.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    faces = {name for name in written if "faces" in name}
    assert faces == {f"fig5_celeba_vae-cpu-{name}" for name in (
        "celeba-beta0.1-seed0-faces.npz", "celeba-beta10-seed0-faces.npz", "faces.png", "faces.pdf")}
    assert written - faces == {f"fig5_celeba_vae-cpu.{ending}" for ending in ("jsonl", "png", "pdf")}
    ignored = subprocess.run(["git", "check-ignore", *(f"results/{name}" for name in written)], cwd=HERE, text=True,
                             capture_output=True).stdout.split()
    assert {Path(name).name for name in ignored} == faces
    row = json.loads((tmp_path / "out" / "fig5_celeba_vae-cpu.jsonl").read_text().splitlines()[0])
    assert row["dataset"] == "celeba" and list(row["agreement"]) == names and "probe" not in row


def test_fig5_parts_of_the_faces_are_disjoint_and_mirrored():
    import fig5_celeba_vae as figure
    images, attributes, _, factors, parts = figure.load_faces("synthetic", None, 30, 12)
    sizes = {name: len(rows) for name, rows in parts.items()}
    assert sizes == {"train": 30, "judge": 10, "classifier": 20, "test": 12}
    assert sorted(torch.cat([parts["judge"], parts["classifier"], parts["test"]]).tolist()) == list(range(42))
    assert sorted(parts["train"].tolist()) == list(range(30))
    x = figure.take(images, parts["test"], torch.tensor([3, 15]))
    assert torch.equal(x[0], images[parts["test"][3]].float() / 127.5 - 1) and torch.equal(x[1], x[0].flip(2))


def test_fig5_draws_z_in_order_with_noise_of_its_own():
    import fig5_celeba_vae as figure
    images = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8)
    rows = torch.randperm(40)[:24]
    classifier = to_stochastic(figure.face_classifier((4, 4, 8, 4), 5), log_alpha=-20.0)
    z, logits = figure.draw_z(classifier, images, rows)
    wanted = classifier.eval()[0](figure.take(images, rows, torch.arange(48)))
    assert z.shape == (48, 4, 4, 4) and torch.allclose(z.float(), wanted, atol=0.02)
    assert torch.allclose(logits, classifier[1](wanted), atol=0.02)
    assert not torch.allclose(wanted[:24], wanted[24:], atol=0.1)  # the mirror images differ
    classifier = to_stochastic(figure.face_classifier((4, 4, 8, 4), 5), log_alpha=0.0)
    z = figure.draw_z(classifier, images[:1].expand(80, -1, -1, -1), torch.arange(80), mirrored=False)[0]
    assert len(z.flatten(1).unique(dim=0)) == 10  # a weight sample for every eight


def test_fig5_vae_bounds_the_likelihood():
    import fig5_celeba_vae as figure
    vae = figure.ConditionalVAE((4, 4, 8, 4), 3).eval()
    x, z = torch.randn(5, 3, 64, 64), torch.randn(5, 4, 4, 4)
    with torch.no_grad():
        vae.log_sigma2.copy_(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1))
        vae.logit_sigma2.copy_(torch.tensor([-4.0, 0.0, 2.0]))
        mean = vae.posterior(torch.cat([vae.look(x), z], 1).flatten(1)) * torch.sigmoid(-vae.logit_sigma2).sqrt()
        q = torch.distributions.Normal(mean, torch.sigmoid(vae.logit_sigma2).sqrt())
        torch.manual_seed(1)
        nll, kl = vae(x, z)
        torch.manual_seed(1)
        u = mean + q.stddev * torch.randn(5, 3)
        likelihood = torch.distributions.Normal(vae.decode(z, u), (vae.log_sigma2 / 2).exp())
    assert torch.allclose(nll, -likelihood.log_prob(x).sum((1, 2, 3)), rtol=1e-5)
    wanted = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1)
    assert torch.allclose(kl, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # over all faces u has the prior's variance
        many = vae.train().posterior(torch.randn(500, 2 * 64)) * torch.sigmoid(-vae.logit_sigma2).sqrt()
    assert torch.allclose(many.var(0) + q.variance[0], torch.ones(3), atol=0.01)


def test_fig5_measures_errors_spreads_and_agreement_of_known_pictures():
    import fig5_celeba_vae as figure

    class Painter(nn.Module):  # x^ = x inside the ellipse, -x plus 0.1 times u outside; u of one dimension
        lay_out = [nn.Linear(1, 1)]

        def decode(self, z, u):
            noise = 0.1 * u.view(-1, 1, 1, 1).clamp(-2, 2)
            return torch.where(figure.outside_ellipse(), noise - z, z)

        def forward(self, x, z):
            return torch.full((len(x),), 2.0), torch.full((len(x),), 3.0)

    x = 0.5 * torch.rand(400, 1, 1, 1).expand(-1, 3, 64, 64) + 0.1
    y = torch.stack([x[:, 0, 32, 32] > 0.3, x[:, 0, 32, 32] < 0.35], 1).byte()
    judge = lambda x: torch.stack([x[:, 0, 32, 32] - 0.3, x[:, 0, 0, 0]], 1)  # the second reads the background
    row, pictures = figure.measure(Painter(), judge, x, x, y, ["inside", "outside"])
    outside = figure.outside_ellipse()
    assert 1 - outside.float().mean() == pytest.approx(math.pi / 4 * 0.75 * 0.9, rel=0.01)
    square = (0.2**2 + 0.2 * 1 + 1 / 3) * 1  # E (2x)^2 for x uniform from 0.1 to 0.6
    assert row["background_mse"] == pytest.approx(square + 0.01 * 0.92, rel=0.1)
    assert row["reconstruction_mse"] == pytest.approx(row["background_mse"] * outside.float().mean().item(), rel=1e-4)
    assert row["spread_inside"] < 1e-6 and row["spread_outside"] == pytest.approx(0.1 * 0.96, rel=0.05)
    assert (row["kl_u"], row["elbo"]) == (3, -5) and row["agreement"]["inside"] == 1
    assert row["attribute_agreement"] == pytest.approx((1 + row["agreement"]["outside"]) / 2)
    assert row["agreement_balanced"]["outside"] < 0.7 and row["judge_acc"] == pytest.approx((1 + 0.5) / 2, abs=0.05)
    assert pictures.shape == (3, 6, 3, 64, 64) and (pictures[0][..., 32, 32] == pictures[1][..., 32, 32]).all()
    hit, y = torch.tensor([[1.0, 1], [0, 1], [1, 0]]), torch.tensor([[1, 0], [0, 0], [0, 0]])
    assert figure.balanced(hit, y).tolist() == pytest.approx([0.75, 2 / 3])  # where one class is missing: the other's


def test_fig5_probe_reads_what_is_there_and_nothing_else():
    import fig5_celeba_vae as figure
    factor = torch.randint(4, (1500,))
    z = torch.randn(1500, 5, 4, 4)
    assert abs(figure.probe(z, factor)) < 0.06
    z[:, 0, 0] = F.one_hot(factor).float() * 10
    assert figure.probe(z, factor) == 1
    two, z = factor % 2, torch.randn(1500, 3)
    z[:, 0] += 2 * two.float()  # Bayes: right with probability Phi(1)
    chance = max((two == 0).float().mean().item(), (two == 1).float().mean().item())
    wanted = (torch.distributions.Normal(0, 1).cdf(torch.tensor(1.0)).item() - chance) / (1 - chance)
    assert figure.probe(z.half(), two) == pytest.approx(wanted, abs=0.06)


def test_fig5_claims_can_hold_and_fail_and_stay_undecided():
    import types

    import fig5_celeba_vae as figure
    betas, share = figure.SETTINGS["cpu"]["betas"], figure.outside_ellipse().float().mean().item()

    def verdicts(dataset="celeba", growth=0.6, spread=0.1, fall=0.04, least=0.85, dent=0.0, stay=0.8, fade=0.4,
                 inner=0.2, drop=0):
        rows = []
        for seed, (place, beta) in itertools.product((0, 1), list(enumerate(betas))[drop:]):
            t = (place - 1) / (len(betas) - 2)
            level = 0.1 * (seed + 1) * (1 + growth * t) - dent * (place == 3)
            probe = {name: 0.5 * (1 - t * (1 - (fade if name in figure.NUISANCES else stay)))
                     for name in common.FACE_FACTORS}
            whole = share * level + (1 - share) * 0.05 * (1 + inner * t)
            rows.append(dict(beta=beta, seed=seed, status="ok", background_mse=level, reconstruction_mse=whole,
                             spread_outside=0.2 + spread * t, attribute_agreement=least + 0.04 - fall * t,
                             majority_acc=0.82, probe=probe))
        args = types.SimpleNamespace(scale="cpu", dataset=dataset)
        return [row[3] for row in figure.claims(rows, args)]

    assert verdicts() == verdicts(drop=1) == ["yes"] * 6  # the reference may be missing
    assert verdicts(growth=0.45) == ["NO", "yes", "yes", "yes", "yes", "yes"]
    assert verdicts(inner=0.7) == ["yes", "NO", "yes", "yes", "yes", "yes"]
    assert verdicts(spread=-0.01) == ["yes", "yes", "NO", "yes", "yes", "NO"]
    assert verdicts(fall=0.051, least=0.9)[3:] == ["NO", "yes", "yes"]
    assert verdicts(least=0.81)[3:] == ["yes", "NO", "yes"] and verdicts(least=0.79)[3:] == ["NO", "NO", "yes"]
    assert verdicts(fall=-0.01)[3:] == ["yes", "yes", "NO"]
    assert verdicts(dent=0.2)[5] == "NO" and verdicts(dent=0.05)[5] == "yes"  # within the seeds' spread of 0.1
    assert verdicts(growth=math.nan, spread=math.nan, fall=math.nan, inner=math.nan) == ["NO"] * 6
    assert verdicts("synthetic") == ["yes"] * 5
    assert verdicts("synthetic", stay=0.4)[3:] == ["NO", "yes"] and verdicts("synthetic", fade=0.6)[3:] == ["yes", "NO"]
    assert verdicts("synthetic", stay=math.nan, fade=math.nan)[3:] == ["NO", "NO"]
    assert {*verdicts(drop=2), *verdicts("synthetic", drop=2)} == {"not measured"}


def test_claim_needs_finite_numbers_and_all_of_them():
    assert common.claim("c", "p", {"a": [1.0, 3.0]}, lambda v: v.mean() == 2) == ("c", "p", "a 2 ± 1.41", "yes")
    assert common.claim("c", "p", {"a": [1.0]}, lambda v: v[0] > 2)[2:] == ("a 1", "NO")
    assert common.claim("c", "p", {"a": [math.nan]}, lambda v: True)[3] == "NO"
    assert common.claim("c", "p", {"a": [1.0], "b": []}, lambda v: True)[3] == "not measured"
    assert common.claim("c", "p", {"a": [1.0]}, lambda v: True, complete=False)[3] == "not measured"


def test_committed_results_redraw(tmp_path):
    paths = sorted((HERE / "results").glob("fig?_*-cpu*.jsonl"))
    figures = sorted({path.name.split("-cpu")[0] for path in paths if path.name.count("-") == 1})
    for path in paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results = side_by_side(lambda figure: Run(
        f"{figure}.py", "--scale", "cpu", "--plot-only", "--out", str(tmp_path)).wait(), figures)
    for figure, result in zip(figures, results):
        assert result.returncode == 0 and result.stderr == "" and "| claim |" in result.stdout, (figure, result.stderr)
        assert (tmp_path / f"{figure}-cpu.png").stat().st_size > 10_000


def test_readme_snippets_run(tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        result = subprocess.run([sys.executable, "-c", snippet], cwd=HERE, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr


def test_readme_links_to_lines_that_hold_what_they_say():
    links = re.findall(r"\[`([^`]+)`\]\(([\w.]+)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) >= 5
    for text, path, number in links:
        assert text in (HERE / path).read_text().splitlines()[int(number) - 1], f"{path}#L{number} is not {text}"
