"""The theory as tests, piece by piece, then the scripts: pytest test_common.py.

No network, no data. Formulas are compared with independent ones: sampling, integration,
torch.distributions, finite differences.
"""
import builtins
import copy
import dis
import importlib
import inspect
import io
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import (LAMBDAS, StochasticConv1d, StochasticConv2d, StochasticConv3d,
                    StochasticLinear, accuracy, add_clutter, alpha_from_information, beta_at,
                    check, corrupt_labels, draw_outputs, draw_weight, evaluate, flat_minimum_bound,
                    g, ib_loss, layer_information, layer_information_bound, load_cifar10,
                    load_images, lr_factor, mean_network, minibatches, pac_bayes_bound,
                    param_groups, recalibrate_bn, sample_weights, sampled_network, to_stochastic,
                    weight_information, with_information)

HERE = Path(__file__).resolve().parent
KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
BOTH = pytest.mark.parametrize("noise", ["gaussian", "lognormal"])
LOCAL = pytest.mark.parametrize("local", [True, False])
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain_layer(kind):
    """A plain layer with many options, and inputs of it."""
    if kind == "linear":
        return nn.Linear(6, 4), torch.randn(3, 6)
    convolution = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[kind]
    layer = convolution(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular")
    return layer, torch.randn(3, 4, *[5] * int(kind[4]))


# === 1. Stochastic layers: noise

@KINDS
@BOTH
@LOCAL
def test_outputs_have_the_moments_of_the_noise(kind, noise, local):
    plain, x = plain_layer(kind)
    layer = to_stochastic(copy.deepcopy(plain), noise=noise, local=local, log_alpha=-1.5)
    with torch.no_grad():
        mean = plain(x)
        if local:
            draws = layer(x.repeat(1500, *[1] * (x.dim() - 1))).unflatten(0, (1500, 3))
        else:
            draws = torch.stack([layer(x) for _ in range(1500)])
        alpha = math.exp(-1.5)
        plain.weight.copy_(plain.weight**2 * (alpha if noise == "gaussian" else math.expm1(alpha)))
        plain.bias.zero_()
        variance = plain(x**2)
    error = (draws.mean(0) - mean) / (variance / 1500).sqrt()
    ratio = draws.var(0) / variance
    assert error.abs().max() < 5
    assert (ratio - 1).abs().max() < 0.4
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)


@BOTH
def test_local_noise_is_independent_across_the_batch(noise):
    layer = StochasticLinear(6, 4, noise=noise, local=True, log_alpha=-1.0)
    draws = layer(torch.ones(6000, 6)).detach()
    first, second = (draws - draws.mean(0)).view(3000, 2, 4).unbind(1)
    correlation = (first * second).mean(0) / (first.var(0) * second.var(0)).sqrt()
    assert correlation.abs().max() < 5 / math.sqrt(3000)


@KINDS
def test_a_weight_sample_is_shared_by_the_batch(kind):
    plain, x = plain_layer(kind)
    layer = to_stochastic(plain, local=False, log_alpha=-1.0)
    first, second, _ = layer(x[:1].expand_as(x))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("source", ["layer", "sampled_network"])
@pytest.mark.parametrize("log_alpha, cap", [(-0.7, None), (2.0, -0.7)])
@BOTH
def test_weights_follow_torch_distributions(source, log_alpha, cap, noise):
    layer = StochasticLinear(1, 20_000, False, noise=noise, local=source != "layer",
                             log_alpha=log_alpha, max_log_alpha=cap)
    if source == "layer":
        sample = layer(torch.ones(1, 1))[0].detach()
    else:
        sample = sampled_network(layer).weight[:, 0].detach()
    weight, alpha = layer.weight[:, 0].detach(), torch.tensor(math.exp(-0.7))
    if noise == "gaussian":
        uniform = torch.distributions.Normal(weight, alpha.sqrt() * weight.abs()).cdf(sample)
    else:
        uniform = torch.distributions.LogNormal(-alpha / 2, alpha.sqrt()).cdf(sample / weight)
    distance = (uniform.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max()
    assert distance < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov, 0.1% level


def test_noise_is_drawn_in_train_and_within_sample_weights():
    model = nn.Sequential(StochasticLinear(6, 6), nn.BatchNorm1d(6), StochasticLinear(6, 2)).eval()
    x, running = torch.randn(8, 6), model[1].running_mean.clone()
    assert torch.equal(model(x), model(x))
    with pytest.raises(KeyError), sample_weights(model) as same:
        assert same is model
        assert not torch.equal(model(x), model(x))
        with sample_weights(model):
            pass
        assert not torch.equal(model(x), model(x))
        raise KeyError
    assert torch.equal(model(x), model(x))
    assert torch.equal(model[1].running_mean, running)
    assert not torch.equal(model.train()(x), model(x))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, saved_and_loaded,
                                       lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_within_sample_weights_start_clean(make_copy):
    model, x = StochasticLinear(4, 3).eval(), torch.randn(2, 4)
    with sample_weights(model):
        twin = make_copy(model)
        assert torch.equal(twin(x), twin(x))
    assert torch.equal(twin(x), model(x))
    assert not torch.equal(twin.train()(x), twin(x))


# === 1. Stochastic layers: information (Prop. 4.1)

def gaussian_divergence(log_alpha):
    """KL of N(w, alpha w^2) from the log-uniform prior, 0 at alpha = infinity, by integration."""
    step = 1e-4
    normal = torch.arange(-10, 10, step, dtype=torch.double) + step / 2
    density = torch.exp(-(normal**2) / 2) * step / math.sqrt(2 * math.pi)
    log_eps = torch.log((1 + math.exp(log_alpha / 2) * normal).abs())
    return (density * log_eps).sum() - log_alpha / 2 + (np.euler_gamma + math.log(2)) / 2


def test_gaussian_information_is_the_integral_to_0_0095_nats():
    layer, errors, shares = StochasticLinear(50, 40, dtype=torch.double), [], []
    for log_alpha in np.arange(-10, 10.1, 0.5):
        layer.log_alpha = log_alpha
        exact, ours = gaussian_divergence(log_alpha).item(), layer.information().item() / 2000
        errors.append(abs(ours - exact))
        if log_alpha < 5:  # beyond, the integral is not exact enough
            shares.append(abs(ours / exact - 1))
    assert 0.0090 < max(errors) < 0.0095
    assert 0.030 < max(shares) < 0.035


def naive_kl(weight, log_sigma2):
    """The formula as it is printed in Molchanov et al. 2017, left to autograd."""
    log_alpha = log_sigma2 - torch.log(weight**2)
    sigmoid = torch.sigmoid(1.87320 + 1.48695 * log_alpha)
    return (0.63576 * (1 - sigmoid) + 0.5 * torch.log1p(torch.exp(-log_alpha))).sum()


def test_gaussian_information_is_molchanovs_formula():
    layer = StochasticLinear(20, 30, dtype=torch.double)
    layer.log_alpha = 4 * torch.randn(30, 20, dtype=torch.double)
    layer.information().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    log_sigma2 = layer.log_sigma2.detach().clone().requires_grad_()
    naive = naive_kl(weight, log_sigma2)
    naive.backward()
    assert layer.information().item() == pytest.approx(naive.item(), rel=1e-9)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.log_sigma2.grad, log_sigma2.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [-3.0, 0.01, 20.0])
def test_proposition_4_1_whatever_the_mean(mean):
    alpha, low, high = 0.04, -12.0, 8.0  # the prior: log|w| uniform from low to high
    posterior = torch.distributions.LogNormal(math.log(abs(mean)) - alpha / 2, alpha**0.5)  # |w|
    sample = posterior.sample((100_000,))
    divergence = (posterior.log_prob(sample) + sample.log() + math.log(high - low)).mean().item()
    constant = math.log(high - low) - 0.5 * math.log(2 * math.pi * math.e)
    assert divergence == pytest.approx(-0.5 * math.log(alpha) + constant, abs=0.01)
    layer = StochasticLinear(10, 5, noise="lognormal", log_alpha=math.log(alpha),
                             max_log_alpha=2 * constant)  # the cap is the constant
    assert layer.information().item() / 50 == pytest.approx(divergence, abs=0.01)


@BOTH
def test_a_weight_at_the_cap_holds_no_information(noise):
    layer = StochasticLinear(5, 3, noise=noise, log_alpha=4.0, max_log_alpha=0.5)
    assert layer.log_alpha.unique().tolist() == [0.5]
    assert layer.information().item() == pytest.approx(0, abs=1e-5)
    layer.log_alpha = 0.4
    assert layer.information() > 0


# === 1. Stochastic layers: gradients

INPUTS = torch.linspace(-2, 2, 15, dtype=torch.double).view(5, 3)
FORMULAS = {
    "weights": draw_weight,
    "log-normal weights": lambda w, s: draw_weight(w, s, "lognormal"),
    "outputs": lambda w, s: draw_outputs(F.linear, INPUTS, w, None, s),
    "log-normal outputs": lambda w, s: draw_outputs(F.linear, INPUTS, w, None, s, "lognormal"),
    "information": common._GaussianKL.apply,
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("derivative", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_first_and_second_derivatives(formula, derivative):
    weight = torch.tensor([[0.7, -1.2, 0.4], [-0.5, 0.9, 1.5]]).double().requires_grad_()
    log_sigma2 = (torch.randn(2, 3).double() - 1.5).requires_grad_()

    def same_noise(*parameters):
        torch.manual_seed(3)
        return FORMULAS[formula](*parameters)

    assert derivative(same_noise, (weight, log_sigma2))


@BOTH
@LOCAL
def test_hessian_of_a_layer_by_finite_differences(noise, local):
    layer = StochasticLinear(4, 3, noise=noise, local=local, log_alpha=-1.0, dtype=torch.double)
    parameters, x = (layer.weight, layer.log_sigma2), torch.randn(5, 4, dtype=torch.double)
    directions, step = [torch.randn_like(p) for p in parameters], 1e-5

    def gradients(**options):
        torch.manual_seed(1)
        loss = layer(x).square().sum() + layer.information()
        return torch.autograd.grad(loss, parameters, **options)

    along = sum((grad * direction).sum() for grad, direction in
                zip(gradients(create_graph=True), directions))
    ours, ends = torch.autograd.grad(along, parameters), []
    for move in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=move)
        ends.append(gradients())
    for second, above, below in zip(ours, *ends):
        torch.testing.assert_close(second, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)


@BOTH
@LOCAL
def test_the_gradient_of_log_sigma2_passes_the_cap(noise, local):
    beyond = StochasticLinear(5, 3, noise=noise, local=local, log_alpha=4.0, max_log_alpha=0.5)
    x, grads = torch.randn(7, 5), []
    at_cap = copy.deepcopy(beyond)
    at_cap.log_alpha = 0.5
    for layer in (beyond, at_cap):
        torch.manual_seed(1)
        nats = layer.information() if noise == "gaussian" else 0
        (layer(x).square().sum() + nats).backward()
        grads.append(layer.log_sigma2.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=0)
    assert grads[0].abs().min() > 0


@BOTH
@LOCAL
def test_under_the_cap_the_gradient_of_means_is_the_slope(noise, local):
    """There alpha is constant: the noise grows with the weight, the information does not change."""
    layer = StochasticLinear(4, 2, noise=noise, local=local, log_alpha=4.0, max_log_alpha=0.5)
    layer.double()
    x, step = torch.randn(3, 4, dtype=torch.double), 1e-5

    def loss():
        torch.manual_seed(1)
        return layer(x).square().sum() + 10 * layer.information()

    loss().backward()
    ends = []
    for move in (step, -2 * step):
        with torch.no_grad():
            layer.weight[1, 2] += move
        ends.append(loss().item())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert layer.weight.grad[1, 2].item() == pytest.approx(slope, rel=1e-4)


# === 1. Plain copies: sampled_network, mean_network

def noisy_net(**options):
    return to_stochastic(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(),
                                       nn.Linear(8, 3)), log_alpha=-1.0, **options)


@pytest.mark.parametrize("make", [sampled_network, mean_network])
def test_copies_are_plain_and_leave_the_model_as_it_was(make):
    model = noisy_net()
    before, plain = copy.deepcopy(model.state_dict()), nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net = make(model)
    assert [type(m) for m in net] == [type(m) for m in plain]
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert vars(net[0]).keys() == vars(plain[0]).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(model[0]) is StochasticLinear


@KINDS
def test_the_mean_network_is_the_model_in_eval(kind):
    plain, x = plain_layer(kind)
    model = to_stochastic(plain, log_alpha=-1.0)
    assert torch.equal(mean_network(model)(x), model.eval()(x))


@KINDS
@BOTH
@LOCAL
def test_a_sampled_network_is_one_draw_of_the_weights(kind, noise, local):
    plain, x = plain_layer(kind)
    model = to_stochastic(plain, noise=noise, local=local, log_alpha=-1.0)
    torch.manual_seed(1)
    net = sampled_network(model)
    torch.manual_seed(1)
    model.local = False
    torch.testing.assert_close(net(x), model(x))
    assert not torch.equal(sampled_network(model).weight, net.weight)


def test_tied_weights_are_drawn_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    to_stochastic(model, log_alpha=0.0)
    torch.manual_seed(1)
    net = sampled_network(model)
    torch.manual_seed(1)
    assert torch.equal(net[0].weight, model[0].sample_weight())
    assert net[1].weight is net[0].weight


# === 1. Plain copies: recalibrate_bn, evaluate

@pytest.mark.parametrize("n", [2, 101, 102, 501, 1001])
def test_batch_norm_statistics_in_closed_form(n):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
    net.double()
    x = 2 + torch.randn(n, 3, dtype=torch.double) @ torch.randn(3, 3, dtype=torch.double)
    assert recalibrate_bn(net, x) is net
    first, norm, second, last = net
    covariance = first.weight @ torch.cov(x.T) @ first.weight.T
    within = 1e-9 if n <= 500 else 0.01  # in parts: of each its own
    torch.testing.assert_close(norm.running_mean, first(x.mean(0)), rtol=1e-9, atol=0)
    torch.testing.assert_close(norm.running_var, covariance.diagonal(), rtol=within, atol=0)
    # the second layer sees inputs of mean 0 and, but for eps, of variance 1
    std = (covariance.diagonal() * (n - 1) / n + norm.eps).sqrt()
    covariance = second.weight @ (covariance / std / std[:, None]) @ second.weight.T
    torch.testing.assert_close(last.running_mean, second.bias.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(last.running_var, covariance.diagonal(), rtol=within, atol=0)


def test_frozen_batch_norm_is_left():
    net, x = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train(), 2 + torch.randn(50, 3)
    net[0].eval()
    recalibrate_bn(net, x)
    assert net[0].running_mean.tolist() == [0, 0, 0]
    torch.testing.assert_close(net[1].running_mean, x.mean(0), rtol=1e-4, atol=1e-4)


def test_in_a_net_in_eval_no_batch_norm_is_frozen():
    net, x = nn.Sequential(nn.BatchNorm1d(3)).eval(), 2 + torch.randn(50, 3)
    recalibrate_bn(net, x)
    torch.testing.assert_close(net[0].running_mean, x.mean(0))


def test_dropout_is_off_while_statistics_are_estimated():
    net, x = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train(), torch.randn(400, 3)
    recalibrate_bn(net, x)
    torch.testing.assert_close(net[1].running_var, x.var(0))


@pytest.mark.parametrize("inputs", [torch.randn(400, 3), torch.randn(400, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_modes_and_momentum_are_restored(inputs, training):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=0.2), nn.Dropout(),
                        nn.BatchNorm1d(2, momentum=None)).train(training)
    net[2].train()
    if inputs.shape[1] == 3:
        recalibrate_bn(net, inputs)
    else:
        with pytest.raises(RuntimeError):
            recalibrate_bn(net, inputs)
    assert [m.training for m in net] == [training, training, True, training]
    assert (net[1].momentum, net[3].momentum) == (0.2, None)
    assert not any(m._forward_pre_hooks for m in net)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        recalibrate_bn(nn.BatchNorm1d(3), torch.zeros(0, 3))


@pytest.mark.parametrize("n", [101, 102])
@LOCAL
def test_evaluate_is_a_loop_by_hand(n, local):
    model, draws = noisy_net(local=local), 4
    x, y = torch.randn(n, 5), torch.randint(3, (n,))
    x_test, y_test = torch.randn(130, 5), torch.randint(3, (130,))

    def measure(w0, w1):
        """Train accuracy, cross-entropy and test accuracy of the net with these weights."""
        before, measured = x @ w0.T + model[0].bias, []
        for inputs, labels in ((x, y), (x_test, y_test)):
            hidden = inputs @ w0.T + model[0].bias
            hidden = (hidden - before.mean(0)) / (before.var(0) + 1e-5).sqrt()
            log_p = (hidden.relu() @ w1.T + model[3].bias).log_softmax(1)
            measured.append((log_p.argmax(1) == labels).double().mean().item())
            measured.append(-log_p[range(len(labels)), labels].mean().item())
        return measured[:3]

    torch.manual_seed(7)
    ours = evaluate(model, x, y, x_test, y_test, draws)
    torch.manual_seed(7)
    sampled = []
    for _ in range(draws):
        sampled.append(measure(*(m.weight + torch.exp(m.log_sigma2 / 2) * torch.randn_like(m.weight)
                                 for m in (model[0], model[3]))))
    train_acc, cross_entropy, test_acc = np.mean(sampled, 0)
    train_acc_mean, _, test_acc_mean = measure(model[0].weight, model[3].weight)
    assert ours == pytest.approx({
        "train_acc": train_acc, "cross_entropy": cross_entropy, "test_acc_sampled": test_acc,
        "train_acc_mean": train_acc_mean, "test_acc": test_acc_mean}, rel=1e-4)


def test_at_least_four_networks_are_sampled():
    assert inspect.signature(evaluate).parameters["draws"].default >= 4
    with pytest.raises(ValueError, match="draws=0"):
        evaluate(noisy_net(), *[None] * 4, draws=0)


def test_accuracy_is_a_fraction_and_nan_of_nan():
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(logits, labels) == 0.75
    assert accuracy(torch.zeros(1, 300), torch.zeros(1, dtype=torch.uint8)) == 1
    assert math.isnan(accuracy(torch.full((4, 4), math.nan), labels))


@pytest.mark.parametrize("logits, labels", [
    (torch.eye(4), torch.arange(4)[:, None]), (torch.eye(4)[:, :, None], torch.arange(4)),
    (torch.zeros(4, 1), torch.tensor([0, 1, 1, 1])), (torch.eye(4), torch.arange(4) - 1),
    (torch.eye(4), torch.tensor([0.0, 0.5, 2.0, 3.0]))],
    ids=["would broadcast", "pixels", "of one logit", "negative", "fractions"])
def test_accuracy_refuses_what_are_no_labels_of_its_logits(logits, labels):
    with pytest.raises(ValueError, match="labels"):
        accuracy(logits, labels)


# === 1. Conversion: to_stochastic

@KINDS
def test_every_option_of_a_layer_is_kept(kind):
    layer, x = plain_layer(kind)
    layer.double().eval()
    expected, weight = layer(x.double()), layer.weight
    twin = to_stochastic(layer, noise="lognormal", local=True, log_alpha=-3.0)
    assert type(twin) in (StochasticLinear, StochasticConv1d, StochasticConv2d, StochasticConv3d)
    assert twin.weight is weight
    assert torch.equal(twin(x.double()), expected)
    torch.testing.assert_close(twin.log_alpha, torch.full_like(weight, -3))


@KINDS
def test_layers_are_called_by_keyword_too(kind):
    plain, x = plain_layer(kind)
    layer = to_stochastic(plain).eval()
    assert torch.equal(layer(input=x), layer(x))


def test_tied_weights_share_their_noise_and_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    to_stochastic(model)
    assert model[0].log_sigma2 is model[1].log_sigma2
    nats = model[0].information().item()
    assert weight_information(model).item() == pytest.approx(nats)


def test_zero_initialised_weights_start_with_noise_of_the_scale():
    layer = nn.Linear(50, 40, bias=False)
    nn.init.zeros_(layer.weight)
    to_stochastic(layer, log_alpha=-6.0)
    usual = -6 + math.log(1 / 150)  # of torch's own initialisation
    torch.testing.assert_close(layer.log_sigma2, torch.full_like(layer.log_sigma2, usual))
    layer(torch.randn(8, 50)).sum().backward()
    with torch.no_grad():
        layer.weight.sub_(1e-3 * layer.weight.grad.sign())  # Adam's first step
    assert layer.information() / 2000 < 0.1  # 16 where the noise started at that of 0


# === 1. Conversion: checkpoints

def small_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpoint_of_the_plain_net_keeps_alpha(device):
    net, x = small_net(), torch.randn(2, 1, 6, 6)
    with torch.device(device):
        model = to_stochastic(small_net(), log_alpha=-2.0)
    model.load_state_dict(net.state_dict(), assign=device == "meta")
    assert torch.equal(model(x), net(x))
    torch.testing.assert_close(model[3].log_alpha, torch.full((3, 64), -2.0))


@pytest.mark.parametrize("options", [dict(max_log_alpha=0.0), dict(noise="lognormal"),
                                     dict(noise="lognormal", max_log_alpha=-1.0), {}])
@pytest.mark.parametrize("other", [{}, dict(max_log_alpha=-2.0), dict(noise="lognormal")])
def test_a_checkpoint_holds_as_many_nats_as_were_saved(options, other):
    saved = StochasticLinear(30, 20, log_alpha=-3.0, **options)
    loaded = StochasticLinear(30, 20, **other)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.information().item() == saved.information().item()
    assert (loaded.noise, loaded.max_log_alpha) == (saved.noise, saved.max_log_alpha)


# === 2. Weight-IB loss

def test_a_model_without_stochastic_layers_is_refused():
    with pytest.raises(ValueError, match="no stochastic layer"):
        weight_information(nn.Linear(3, 3))


def test_ib_loss_is_equation_3_per_sample():
    model = to_stochastic(nn.Linear(5, 4))
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    expected = -logits.log_softmax(1)[torch.arange(7), labels].mean().item()
    nats = naive_kl(model.weight, model.log_sigma2).item()
    loss, cross_entropy, information = ib_loss(logits, labels, model, 0.5, 50)
    assert cross_entropy.item() == pytest.approx(expected)
    assert information.item() == pytest.approx(nats, rel=1e-4)
    assert loss.item() == pytest.approx(expected + 0.5 * nats / 50, rel=1e-5)


def test_ib_loss_of_attributes_sums_their_nats():
    model, logits = to_stochastic(nn.Linear(5, 4)), torch.randn(7, 4)
    attributes = torch.randint(2, (7, 4))
    bernoulli = torch.distributions.Bernoulli(logits=logits)
    expected = -bernoulli.log_prob(attributes.float()).sum(1).mean().item()
    for target in (attributes, attributes.float(), attributes.bool()):
        loss, _, _ = ib_loss(logits, target, model, 0.0, 7, attributes=True)
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("target", [
    F.one_hot(torch.arange(4)), torch.eye(4), torch.full((4, 4), 0.25), torch.rand(4),
    torch.arange(4)[:, None], torch.ones(4).bool(), torch.arange(3)])
def test_ib_loss_refuses_what_are_no_classes_by_name(target):
    model = to_stochastic(nn.Linear(5, 4))
    shape = re.escape(f"{target.dtype} {tuple(target.shape)} should be classes, integers (4,)")
    with pytest.raises(ValueError, match=shape + ".*attributes=True"):
        ib_loss(torch.zeros(4, 4), target, model, 1.0, 4)


@pytest.mark.parametrize("target", [2 * torch.eye(4) - 1, torch.full((4, 4), 0.5), torch.arange(4),
                                    torch.ones(4, 3), math.nan * torch.eye(4)])
def test_ib_loss_refuses_attributes_that_are_not_0_or_1(target):
    model = to_stochastic(nn.Linear(5, 4))
    with pytest.raises(ValueError, match=re.escape(str(tuple(target.shape)))):
        ib_loss(torch.zeros(4, 4), target, model, 1.0, 4, attributes=True)


@pytest.mark.parametrize("beta, n", [(-1.0, 10), (1.0, 0), (math.nan, 1)])
def test_ib_loss_refuses_impossible_beta_and_n(beta, n):
    with pytest.raises(ValueError, match="beta"):
        ib_loss(torch.zeros(2, 3), torch.tensor([0, 1]), to_stochastic(nn.Linear(2, 3)), beta, n)


def test_ib_loss_takes_another_penalty():
    model = nn.Linear(2, 3)
    loss, cross_entropy, nats = ib_loss(torch.zeros(2, 3), torch.tensor([0, 1]), model, 2.0, 10,
                                        information=lambda m: m.weight.square().sum())
    assert nats.item() == model.weight.square().sum().item()
    assert loss.item() == pytest.approx(math.log(3) + 0.2 * nats.item())


def test_with_information_trains_as_ib_loss_does():
    net = to_stochastic(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 4)))
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8) % 4
    torch.manual_seed(1)
    logits, information = with_information(net, x)(x)
    (F.cross_entropy(logits, y) + 0.5 / 8 * information).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.manual_seed(1)
    ib_loss(net(x), y, net, beta=0.5, n=8)[0].backward()
    for ours, parameter in zip(gradients, net.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad)


def test_noise_has_a_rate_of_its_own_and_no_weight_decay():
    rest, noise = param_groups(to_stochastic(nn.Linear(2, 2)), 0.1, 0.5)
    assert [tuple(p.shape) for p in noise["params"]] == [(2, 2)]
    assert [tuple(p.shape) for p in rest["params"]] == [(2, 2), (2,)]
    assert (rest["lr"], noise["lr"], noise["weight_decay"]) == (0.1, 0.5, 0)


@pytest.mark.parametrize("t, hold, factor", [
    (-1, 0.8, 0.001), (0, 0.8, 0.001), (0.05, 0.8, 0.501), (0.1, 0.8, 1), (0.79, 0.8, 1),
    (0.9, 0.8, 0.5), (0.8, 0.6, 0.5), (1, 0.8, 0), (1, 1, 1), (1.2, 0.8, 0)])
def test_learning_rate_warms_up_holds_and_falls(t, hold, factor):
    assert lr_factor(t, hold) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize("t, beta, peak, now", [
    (0, 0.1, 0.5, 0), (0.2, 0.1, 0.5, 0.25), (0.45, 0.1, 0.5, 0.5), (0.6, 0.1, 0.5, 0.3),
    (0.7, 0.1, 0.5, 0.1), (1, 0.1, 0.5, 0.1), (0.4, 0.9, 0.5, 0.9), (1, 0.9, 0.5, 0.9)])
def test_beta_passes_its_peak(t, beta, peak, now):
    assert beta_at(t, beta, peak) == pytest.approx(now)


def test_minibatches_are_shuffled_epochs():
    batches = minibatches(10, 3, "cpu")
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert [len(epoch.unique()) for epoch in epochs] == [9, 9]
    assert not torch.equal(*epochs)
    assert len(next(minibatches(2, 5, "cpu"))) == 2


# === 3. Information estimators: capacity, flat minima (Prop. 4.3)

def test_capacity_is_the_integral_of_its_slope_and_a_channel():
    alpha = torch.tensor([1e-9, 0.1, 1.0, 5.0, 40.0], dtype=torch.double)
    expected = [-0.5 * math.log(-math.expm1(-a)) for a in alpha.tolist()]
    assert g(alpha).tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(g(torch.log1p(alpha)), 0.5 * torch.log1p(1 / alpha))  # Gaussian
    assert g(0.0) == math.inf
    with pytest.raises(ValueError):
        g(-0.1)


def test_alpha_from_information_inverts_proposition_4_1():
    layer = StochasticLinear(30, 20, noise="lognormal", log_alpha=-2.5, max_log_alpha=0.0)  # C = 0
    alpha = alpha_from_information(layer.information(), 600).item()
    assert alpha == pytest.approx(math.exp(-2.5), rel=1e-5)


def optimal_information(weight, hessian, beta):
    """-1/2 * sum of log alpha at the alpha that minimise the Lagrangian to second order."""
    curvature = weight**2 * hessian.diagonal()
    alpha = (beta / curvature).requires_grad_()
    lagrangian = 0.5 * (alpha * curvature).sum() - 0.5 * beta * alpha.log().sum()
    gradient, = torch.autograd.grad(lagrangian, alpha)
    # with respect to log alpha, in which the Lagrangian is convex: 0 is the minimum
    assert torch.allclose(alpha * gradient, torch.zeros_like(alpha), atol=1e-9)
    return -0.5 * alpha.detach().log().sum()


def printed_flat_minimum_bound(weight, trace, beta):
    k = len(weight)
    return 0.5 * k * (torch.log((weight**2).sum() * trace) - k * math.log(k**2 * beta / 2))


@pytest.mark.parametrize("k", [3, 5, 40])
@pytest.mark.parametrize("beta", [0.6, 1.0, 10.0])
def test_proposition_4_3_holds_as_in_its_proof_not_as_printed(k, beta):
    weight, root = torch.randn(k, dtype=torch.double), torch.randn(k, k, dtype=torch.double)
    hessian = root @ root.T
    information = optimal_information(weight, hessian, beta)
    assert information <= flat_minimum_bound(weight, hessian.trace(), beta)
    assert information > printed_flat_minimum_bound(weight, hessian.trace(), beta)
    ones, equal = torch.ones(k, dtype=torch.double), 3 * torch.eye(k, dtype=torch.double)
    bound = flat_minimum_bound(ones, equal.trace(), beta)  # tight
    assert optimal_information(ones, equal, beta).item() == pytest.approx(bound.item())


# === 3. Information estimators: what a layer tells of its input (Sec. 5)

def spacing_entropy(samples):
    """Entropy of each column of samples (n, d) by Vasicek's spacings, nats."""
    i, m = torch.arange(len(samples)), int(len(samples) ** 0.5)
    above, below = (i + m).clamp(max=len(i) - 1), (i - m).clamp(min=0)
    ordered = samples.sort(0).values
    return torch.log((ordered[above] - ordered[below]) * len(i) / (above - below)[:, None]).mean(0)


def noisy_outputs(x, weight, alpha, noise="lognormal"):
    """Wx with new weights for every row of x, noise of variance alpha or of its logarithm's."""
    eps = torch.as_tensor(alpha) ** 0.5 * torch.randn(len(x), *weight.shape)
    eps = 1 + eps if noise == "gaussian" else torch.exp(eps - alpha / 2)
    return torch.einsum("noi,oi,ni->no", eps, weight, x)


@pytest.mark.parametrize("noise, alpha", [("lognormal", 0.2), ("gaussian", 4.0)])
def test_proposition_5_1_is_what_sampled_units_tell(noise, alpha):
    x = torch.randn(10_000, 60) @ (torch.randn(60, 60) / 8 + torch.eye(60)) + 0.3
    weight, alpha = torch.randn(3, 60), alpha * torch.rand(3, 60)
    alpha_of_eps = torch.log1p(alpha) if noise == "gaussian" else alpha
    variance = x**2 @ (torch.expm1(alpha_of_eps) * weight**2).T
    control = 0.5 * torch.log(2 * math.pi * math.e * variance)  # h(z|x) of a Gaussian z
    # h(z|x) of 100 inputs, with the Gaussian's as control variate
    given = torch.stack([spacing_entropy(noisy_outputs(row.expand(1000, -1), weight, alpha, noise))
                         for row in x[:100]])
    given = control.mean(0) + (given - control[:100]).mean(0)
    sampled = (spacing_entropy(noisy_outputs(x, weight, alpha, noise)) - given).sum().item()
    assert layer_information(weight, alpha_of_eps, x).item() == pytest.approx(sampled, abs=0.1)


def white_inputs(n, dim):
    """Gaussian inputs (n, dim) of which mean and covariance are exactly 0 and 1."""
    x = torch.randn(n, dim, dtype=torch.double)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / n)
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


@pytest.mark.parametrize("dim_x", [1, 2, 5, 100])
def test_proposition_5_2_holds_and_falls_with_alpha(dim_x):
    alphas = 10.0 ** torch.arange(-5, 2, dtype=torch.double)
    x, weight = white_inputs(10_000, dim_x), torch.randn(4, dim_x, dtype=torch.double)
    information = torch.stack([layer_information(weight, alpha, x) for alpha in alphas])
    bound = torch.stack([layer_information_bound(4, alpha) for alpha in alphas])
    torch.testing.assert_close(bound, 4 * g(alphas) + 4)
    assert (information < bound).all()
    excess = information / 4 - g(alphas)
    assert excess.min() > -1e-9
    assert excess.max() < min(0.65, 2 / dim_x)  # c = O(1/dim x): 0.635 of a single input
    assert (information.diff() < 0).all()


def test_proposition_5_2_needs_centred_and_uncorrelated_inputs():
    weight, x = torch.rand(3, 100), torch.randn(2000, 1).expand(-1, 100)
    assert layer_information(weight, 0.1, x) > layer_information_bound(3, 0.1)
    off_centre = torch.randn(2000, 100) + 9
    assert layer_information(torch.randn(3, 100), 0.1, off_centre) < 3 * g(0.1)
    with_zeros = F.pad(x, (0, 0, 0, 1))  # one x = 0: no noise
    assert layer_information(weight, 0.1, with_zeros) == math.inf


def test_proposition_5_2_needs_twice_the_information_printed():
    layer = StochasticLinear(50, 30, noise="lognormal", log_alpha=-6.0, max_log_alpha=0.0)  # C = 0
    x, information = white_inputs(5000, 50), layer.information().item()
    per_unit = layer_information(layer.weight.detach().double(), math.exp(-6), x) / 30
    corrected, printed = alpha_from_information(information, 1500), math.exp(-information / 1500)
    assert g(corrected) <= per_unit <= g(corrected) + 1
    assert per_unit > g(printed) + 1


def test_corollary_5_3_bounds_the_last_layer_by_the_narrowest():
    widths, alphas = (30, 1, 8, 1), (0.3, 0.001, 0.001)
    weights = [torch.randn(m, n) / n**0.5 for n, m in zip(widths, widths[1:])]

    def sample(z):
        for weight, alpha in zip(weights, alphas):
            z = noisy_outputs(z, weight, alpha)
        return z

    x = torch.randn(5000, 30)
    given = torch.stack([spacing_entropy(sample(row.expand(500, -1))) for row in x[:100]]).mean()
    held = spacing_entropy(sample(x)) - given  # I(z3;x)
    bounds = [layer_information_bound(width, alpha) for width, alpha in zip(widths[1:], alphas)]
    assert 0.2 < held < layer_information(weights[0], 0.3, x) + 0.1  # data processing
    assert held < min(bounds) == bounds[0]
    assert layer_information(weights[2], 0.001, torch.randn(1000, 8)) > min(bounds)


# === 3. Information estimators: PAC-Bayes (eq. 7)

def test_equation_7_holds_over_every_training_set_of_a_toy_world():
    # four equally likely values of a sample, 30 hypotheses, all 4^5 training sets
    n, values, hypotheses, max_loss = 5, 4, 30, 2.0
    # all or nothing: such losses are overfitted most
    loss = max_loss * torch.rand(hypotheses, values, dtype=torch.double).round()
    prior = torch.softmax(torch.randn(hypotheses).double(), 0)
    every = torch.tensor(list(itertools.product(range(values), repeat=n))).sort(1).values
    samples, times = torch.unique(every, dim=0, return_counts=True)
    probability = times.double() / values**n
    train, test = loss[:, samples].mean(2).T, loss.mean(1)
    for temperature in (10.0, 1.0, 0.1, 0.01):  # the last nearly picks the best on the training set
        posterior = torch.softmax(prior.log() - train / temperature, 1)
        divergence = torch.special.xlogy(posterior, posterior / prior).sum(1)
        train_loss, test_loss = (posterior * train).sum(1), posterior @ test
        pairs = list(zip(train_loss, divergence))
        for lam in (0.6, 1.0, 3.0):  # eq. 7 as printed, both sides in expectation
            bounds = torch.stack([pac_bayes_bound(t, d, n, max_loss=max_loss, delta=1,
                                                  lambdas=[lam]) for t, d in pairs])
            assert probability @ test_loss <= probability @ bounds
        bounds = torch.stack([pac_bayes_bound(t, d, n, max_loss=max_loss) for t, d in pairs])
        assert probability[test_loss > bounds].sum() <= 0.05
    assert probability @ train_loss < 0.5 * (probability @ test_loss)  # it was overfitted


def test_pac_bayes_bound_is_the_least_over_lambda():
    penalty = math.log(10) * (100 + math.log(21 / 0.05)) / 1000
    expected = min((0.2 + lam * penalty) / (1 - 0.5 / lam) for lam in LAMBDAS)
    assert pac_bayes_bound(0.2, 100, 1000) == pytest.approx(expected)


@pytest.mark.parametrize("change", [dict(loss=2.4), dict(loss=math.nan), dict(divergence=-1.0),
                                    dict(divergence=math.inf), dict(max_loss=math.inf),
                                    dict(lambdas=[0.5]), dict(lambdas=[1.0, math.nan]), dict(n=0),
                                    dict(delta=0.0), dict(delta=2.0)])
def test_pac_bayes_bound_refuses_impossible_values(change):
    with pytest.raises(ValueError):
        pac_bayes_bound(**dict(loss=0.5, divergence=1.0, n=100) | change)


# === 4. Data

def cifar_arrays(n=4):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, (n, 1), np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}


def test_cifar10_is_read_from_its_npz(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    x, y, x_test, y_test = load_cifar10(tmp_path)
    assert (x.dtype, x.shape, x_test.shape) == (torch.uint8, (4, 3, 32, 32), (2, 3, 32, 32))
    assert x[1, 2, 3, 4] == arrays["x_train"][1, 3, 4, 2]
    assert y.tolist() == arrays["y_train"].ravel().tolist()


def test_images_are_normalised_by_the_training_set(tmp_path):
    x, y, x_test, y_test, mean, std = load_images("synthetic", tmp_path, 30, 40)
    pixels = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten().double(), pixels.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(std.flatten().double(), pixels.std(1, correction=0), rtol=1e-5,
                               atol=0)
    images = common.normalise(x_test, mean, std, 28)
    torch.testing.assert_close(images, ((x_test.float() - mean) / std)[:, :, 2:30, 2:30])
    assert not torch.equal(x, x_test[:30])


def corrupt(labels, fraction, kind="uniform", seed=3):
    return corrupt_labels(labels, fraction, 10, torch.Generator().manual_seed(seed), kind)


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.9995, 1])
def test_exactly_a_fraction_of_labels_is_corrupted(fraction):
    labels = torch.full((1000,), -1)
    assert (corrupt(labels, fraction) >= 0).sum() == round(1000 * fraction)
    assert (labels == -1).all()
    assert torch.equal(corrupt(labels, fraction), corrupt(labels, fraction))


def test_corrupted_labels_are_at_random_places_and_uniform():
    one, two = (corrupt(torch.full((1000,), -1), 0.5, seed=seed) >= 0 for seed in (1, 2))
    assert 400 < (one ^ two).sum() < 600
    assert 200 < one[:500].sum() < 300
    counts = torch.bincount(corrupt(torch.zeros(100_000).long(), 1.0))  # the old label included
    assert (counts - 10_000).abs().max() < 500


def test_pair_corruption_gives_the_next_class():
    digits = torch.arange(1000) % 10
    change = (corrupt(digits, 0.3, "pair") - digits).remainder(10)
    assert torch.bincount(change).tolist() == [700, 300]


def test_clutter_is_white_squares_and_their_mask():
    images = torch.full((500, 1, 28, 28), 7, dtype=torch.uint8)
    cluttered, mask, places = add_clutter(images, torch.Generator().manual_seed(0), squares=1,
                                          positions=True)
    assert torch.equal(cluttered, torch.where(mask, 255, images))
    assert (images == 7).all()
    assert mask.sum((1, 2, 3)).unique().tolist() == [16]
    for axis in (2, 3):
        covered = mask.any(5 - axis)[:, 0]  # rows, then columns
        assert covered.sum(1).unique().tolist() == [4]
        assert torch.equal(covered.int().argmax(1), places[:, 0, axis - 2])
        assert places[:, 0, axis - 2].unique().tolist() == list(range(25))
    _, mask = add_clutter(torch.zeros(50, 3, 28, 28), torch.Generator().manual_seed(0))
    assert 120 < mask.float().sum((1, 2, 3)).mean() < 160  # ten squares, less what overlaps


# === 5. Rows, and what follows from them

@pytest.mark.parametrize("values, threshold, holds, ours", [
    ({"": [0.5]}, (0.5, 1), "yes", "0.50"),
    ({"": [0.49]}, (0.5, 1), "NO", "0.49"),
    ({"": [0.0, 1.0]}, (0, 0.5), "yes", "0.50 ± 0.71"),  # the mean decides
    ({"": [0.0, 1.01]}, (0, 0.5), "NO", "0.51 ± 0.71"),
    ({"N = 1": [1], "N = 2": [2, 2]}, (1, 2), "yes", "N = 1 1.00; N = 2 2.00 ± 0.00"),
    ({"N = 1": [1], "N = 2": [2.1]}, (1, 2), "NO", "N = 1 1.00; N = 2 2.10"),  # every one does
    ({"N = 1": [], "N = 2": [1]}, (1, 2), "yes", "N = 2 1.00"),
    ({"": [math.nan]}, (-math.inf, math.inf), "undecided", "–"),
    ({"a": [math.nan], "b": [3.0]}, (0, 1), "NO", "a –; b 3.00")])
def test_a_claim_holds_if_each_mean_is_within_its_threshold(values, threshold, holds, ours):
    row = check("sentence", "paper", values, threshold)
    assert row == {"claim": "sentence", "paper": "paper", "ours": ours, "holds": holds}


@pytest.mark.parametrize("values", [{}, {"": []}, {"N = 1": [], "N = 2": []}])
def test_a_claim_without_values_is_not_made(values):
    assert check("sentence", "paper", values, (0, 1)) is None


# === Sections alone, scripts, README

SECTIONS = [
    "layer = to_stochastic(nn.Linear(3, 2))\nlayer(torch.ones(1, 3)).sum().backward()\n"
    "layer.information().backward()\nparam_groups(layer, 1, 1)\n"
    "recalibrate_bn(sampled_network(layer), torch.ones(2, 3))",
    "class Toy(nn.Module):\n    log_sigma2 = weight = torch.ones(1)\n"
    "    information = lambda self: self.log_sigma2.sum()\n"
    "ib_loss(torch.ones(2, 3), torch.tensor([0, 1]), Toy(), 1.0, 4)",
    "g(1.0), total_correlation(torch.randn(50, 3)), pac_bayes_bound(0.1, 1.0, 100)\n"
    "layer_information(torch.ones(2, 3), 0.1, torch.randn(9, 3)), layer_information_bound(2, 0.1)\n"
    "flat_minimum_bound(torch.ones(2), 1.0, 1)\n"
    "label_information(torch.ones(2, 3), torch.ones(2).long())",
    "synthetic_objects(2), synthetic_digits(2), synthetic_faces(2)\n"
    "add_clutter(torch.zeros(2, 1, 28, 28), torch.Generator())\n"
    "corrupt_labels(torch.zeros(4).long(), 0.5, 10, torch.Generator())\n"
    "load_images('synthetic', '', 4, 4)",
    "assert summarise([{'status': 'ok', 'x': 1, 'y': 2.0}], 'x', 'y') == [(1, 2.0, 0.0, 1)]",
]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_section_runs_alone_under_the_import_block(number):
    imports, *sections = re.split(r"(?m)^# === (?=\d\. )", (HERE / "common.py").read_text())
    text = f"{imports}\n# {sections[number - 1]}\n{SECTIONS[number - 1]}"
    code, pasted = compile(text, f"section {number}", "exec"), {"__name__": "pasted"}
    assert len(sections) == 5
    exec(code, pasted)
    assert global_names(code) <= pasted.keys() | vars(builtins).keys()


def global_names(code):
    """The names that code, and what it defines, looks up in its module."""
    names = {line.argval for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
    return names.union(*(global_names(part) for part in code.co_consts if hasattr(part, "co_code")))


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        subprocess.run([sys.executable, "-c", snippet], cwd=HERE, check=True, timeout=120)


def test_missing_data_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, "fig1_phase_transition.py", "--scale", "cpu", "--jobs",
                             "1", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path)],
                            cwd=HERE, capture_output=True, text=True, timeout=240)
    error, = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert re.match("error: .*cifar10.npz.*--scale demo", error)


TINY = {  # script: (changes of its demo's settings, of its grid)
    "fig1_phase_transition": (
        dict(width=1 / 16, steps=5, batch=40, peak=0.5, draws=2, synthetic=(300, 120), test=100),
        dict(curves=[("random", (100,), (0.1, 0.5, 1.2), {}), ("random", (200,), (0.1, 1.2), {}),
                     ("random", (100,), (0.5,), {"seed": 0, "longer": True, "steps_factor": 2}),
                     ("real", (100, 200), (0.1, 1.2), {})])),
    "fig2_corrupted_labels": (
        dict(widths={"Small AlexNet": 1 / 16, "All-CNN": 1 / 32, "ResNet": 1 / 8}, steps=5,
             batch=40, draws=2, synthetic=(300, 120), test=100),
        dict(n_models=100, betas={"Small AlexNet": (0.025, 0.3, 1.0), "All-CNN": (0.025, 1.0),
                                  "ResNet": (0.025, 1.0)},
             beta=0.1, n=100, pair={100: (0.45,)},
             uniform={100: (0.0, 0.5, 1.0), 50: (0.0, 1.0)})),
    "fig3_width_beta": (
        dict(n=100, test=20, batch=50, width_steps=6, beta_steps=6, draws=2),
        dict(widths=(1 / 96, 1 / 32), decays=(0.001, 0.0), beta_width=1 / 32)),
    "fig4_cluttered_mnist": (
        dict(width=1 / 32, n=60, steps=3, batch=20, passes=1, discriminator_steps=3,
             decoder_steps=8, decoder_channels=4, validation=20, test=30), {}),
    "fig5_celeba_vae": (
        dict(synthetic=(60, 40), batch=16, components=5, drawn=8, classifier_steps=3,
             evaluator_steps=3, vae_steps=3, prior_steps=3, draw_steps=2), {}),
}
OF_NETS = ("beta objective cross_entropy information train_acc train_acc_mean test_acc "
           "test_acc_sampled")
MEASURED = {  # script: the fields that others rely on
    "fig1_phase_transition": "labels n " + OF_NETS, "fig2_corrupted_labels": "panel n " + OF_NETS,
    "fig3_width_beta": "panel width params train_acc test_acc information",
    "fig4_cluttered_mnist": "beta test_acc i_zn_positions i_zn_nce i_zn_dv i_zy bound information "
                            "total_correlation",
    "fig5_celeba_vae": "beta attribute_acc picture_nats picture_nats_outside picture_nats_inside "
                       "attribute_nats majority_acc information",
}
CONTRACT = "figure scale dataset seed status seconds device torch git settings"


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """{script: (folder, what it printed, rows)}, of processes, two at a time."""
    folders = {script: tmp_path_factory.mktemp(script) for script in TINY}

    def run(script):
        settings, grid = TINY[script]
        code = (f"import sys, {script} as figure\nfigure.SETTINGS['demo'] |= {settings}\n"
                f"if {grid}:\n    figure.GRID['demo'] |= {grid}\n"
                f"sys.argv = ['{script}.py', '--scale', 'demo', '--jobs', '1', '--out', "
                f"{str(folders[script])!r}]\nfigure.main()")
        result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                                text=True, timeout=300)
        assert (result.returncode, result.stderr) == (0, "")
        lines = (folders[script] / f"{script}-demo.jsonl").read_text().splitlines()
        return folders[script], result.stdout, [json.loads(line) for line in lines]

    with futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(TINY, pool.map(run, TINY)))


@pytest.mark.parametrize("script", TINY)
def test_rows_of_a_script_keep_the_contract(tiny_runs, script):
    _, _, rows = tiny_runs[script]
    for row in rows:
        assert row["status"] == "ok"
        assert row.keys() >= set(CONTRACT.split())
        if "control" not in row:
            assert row.keys() >= set(MEASURED[script].split())
        assert all(0 <= value <= 1 for key, value in row.items() if key.endswith("acc"))
        if "objective" in row:
            expected = row["cross_entropy"] + row["beta"] * row["information"] / row["n"]
            assert row["objective"] == pytest.approx(expected)


@pytest.mark.parametrize("script", ["fig1_phase_transition", "fig2_corrupted_labels"])
def test_console_and_rows_show_the_same_accuracy(tiny_runs, script):
    _, printed, rows = tiny_runs[script]
    shown = re.findall(r"train_acc (\d\.\d+)", printed)
    assert shown == [f"{row['train_acc']:.3f}" for row in rows]


@pytest.mark.parametrize("script", TINY)
def test_a_script_leaves_a_plot_and_the_tables_it_printed(tiny_runs, script):
    folder, printed, _ = tiny_runs[script]
    table = (folder / f"{script}-demo.md").read_text()
    assert "| claim |" in table
    assert table in printed
    for ending in ("png", "pdf"):
        assert (folder / f"{script}-demo.{ending}").stat().st_size > 5000


def redraw(monkeypatch, script, out, scale, *options):
    """Run a script's main() in this process on the rows in a folder; pictures are not saved."""
    figure = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script + ".py", "--scale", scale, "--plot-only", "--jobs",
                                      "1", "--out", str(out), *options])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    figure.main()


@pytest.mark.parametrize("part", ["the first", "the second half", "half by chance"])
@pytest.mark.parametrize("script", TINY)
def test_plots_and_tables_are_made_of_any_rows(tiny_runs, monkeypatch, tmp_path, script, part):
    figure, (settings, grid) = importlib.import_module(script), TINY[script]
    _, _, rows = tiny_runs[script]
    monkeypatch.setitem(figure.SETTINGS, "demo", figure.SETTINGS["demo"] | settings)
    if grid:
        monkeypatch.setitem(figure.GRID, "demo", figure.GRID["demo"] | grid)
    chance = np.random.default_rng(0).permutation(len(rows))[:(len(rows) + 1) // 2]
    some = {"the first": rows[:1], "the second half": rows[len(rows) // 2:],
            "half by chance": [rows[i] for i in sorted(chance)]}[part]
    lines = "".join(json.dumps(row) + "\n" for row in some)
    (tmp_path / f"{script}-demo.jsonl").write_text(lines)
    redraw(monkeypatch, script, tmp_path, "demo")
    assert (tmp_path / f"{script}-demo.md").exists()


@pytest.mark.parametrize("script, folder, options", [
    *((script, "results", ()) for script in TINY),
    ("fig5_celeba_vae", "results/synthetic", ("--dataset", "synthetic"))])
def test_committed_tables_are_what_the_committed_rows_say(monkeypatch, tmp_path, script, folder,
                                                          options):
    results, name = HERE / folder, f"{script}-cpu"
    settings = json.loads(json.dumps(importlib.import_module(script).SETTINGS["cpu"]))
    lines = [line for path in results.glob(f"{name}*.jsonl") for line in path.open()]
    if not any(json.loads(line)["settings"] == settings for line in lines):
        pytest.skip("no committed rows with the present settings")
    (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "README.md").write_bytes((results / "README.md").read_bytes())
    redraw(monkeypatch, script, tmp_path, "cpu", *options)
    assert (tmp_path / f"{name}.md").read_text() == (results / f"{name}.md").read_text()
    assert (tmp_path / "README.md").read_text() == (results / "README.md").read_text()
