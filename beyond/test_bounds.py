"""Sec. 5 and eq. 7 as tests: what layers tell of their inputs, PAC-Bayes bounds. pytest beyond."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fig4_cluttered_mnist as fig4
from beyond.proper_prior import prior_divergence
from common import (LAMBDAS, StochasticConv2d, StochasticLinear, alpha_from_information,
                    g, layer_information, layer_information_bound, pac_bayes_bound)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# === Sec. 5: duality ==============================================================================

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
    gaussian = noise == "gaussian"

    def sample(x):  # new weights for every row of x
        eps = alpha.sqrt() * torch.randn(len(x), 3, 60)
        eps = 1 + eps if gaussian else torch.exp(eps - alpha / 2)
        return torch.einsum("noi,oi,ni->no", eps, weight, x)

    alpha_of_eps = torch.log1p(alpha) if gaussian else alpha
    variance = x**2 @ (torch.expm1(alpha_of_eps) * weight**2).T
    control = 0.5 * torch.log(2 * math.pi * math.e * variance)  # h(z|x) of a Gaussian z
    # h(z|x) of 100 inputs, with the Gaussian's as control variate
    given = torch.stack([spacing_entropy(sample(row.expand(1000, -1))) for row in x[:100]])
    given = control.mean(0) + (given - control[:100]).mean(0)
    sampled = (spacing_entropy(sample(x)) - given).sum().item()
    assert layer_information(weight, alpha_of_eps, x).item() == pytest.approx(sampled, abs=0.1)


def white_inputs(n, dim):
    """Gaussian inputs (n, dim) of which mean and covariance are exactly 0 and 1."""
    x = torch.randn(n, dim, dtype=torch.double)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / n)
    return torch.linalg.solve_triangular(root, x.T, upper=False).T


@pytest.mark.parametrize("dim_x", [1, 2, 5, 20, 100])
def test_proposition_5_2_holds_for_random_layers_and_falls_strictly_with_alpha(dim_x):
    alphas = 10.0 ** torch.arange(-5, 2, dtype=torch.double)
    x, weight = white_inputs(20_000, dim_x), torch.randn(4, dim_x, dtype=torch.double)
    information = torch.stack([layer_information(weight, alpha, x) for alpha in alphas])
    bound = torch.stack([layer_information_bound(4, alpha) for alpha in alphas])
    assert torch.equal(bound, 4 * g(alphas) + 4) and (information < bound).all()
    excess = information / 4 - g(alphas)
    assert (excess > -1e-9).all()
    assert excess.max() < min(0.65, 2 / dim_x)  # c = O(1/dim x): 0.635 of a single input
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
    # data processing, within the error of held
    assert 0.2 < held < layer_information(weights[0], 0.3, x) + 0.1
    bounds = [layer_information_bound(width, alpha) for width, alpha in zip(widths[1:], alphas)]
    assert held < min(bounds) == bounds[0]
    assert layer_information(weights[2], 0.001, torch.randn(1000, 8)) > min(bounds)


def test_proposition_5_2_asks_for_centred_and_uncorrelated_inputs():
    weight, x = torch.rand(3, 100), torch.randn(2000, 1)
    alike = x.expand(-1, 100)
    assert layer_information(weight, 0.1, alike) > layer_information_bound(3, 0.1)
    off_centre = torch.randn(2000, 100) + 9
    assert layer_information(torch.randn(3, 100), 0.1, off_centre) < 3 * g(0.1)
    with_zeros = F.pad(alike, (0, 0, 0, 1))  # one x = 0: no noise
    assert layer_information(weight, 0.1, with_zeros) == math.inf
    mixed = torch.rand(3, 100)  # the alpha of a unit whose weights differ in theirs
    unit = torch.log1p((torch.expm1(mixed) * weight**2).sum(1) / (weight**2).sum(1))
    information = layer_information(weight, mixed, white_inputs(5000, 100).float())
    assert 3 * g(unit).mean() <= information <= layer_information_bound(3, unit)


def test_proposition_5_2_needs_twice_the_information_that_is_printed():
    alpha = math.exp(-6)
    layer = StochasticLinear(50, 30, noise="lognormal", log_alpha=-6.0, max_log_alpha=0.0)  # C = 0
    weight, x = layer.weight.detach().double(), white_inputs(5000, 50)
    per_unit = layer_information(weight, alpha, x) / 30
    information = layer.information().item()
    corrected, printed = alpha_from_information(information, 1500), math.exp(-information / 1500)
    assert g(corrected) <= per_unit <= g(corrected) + 1
    assert per_unit > g(printed) + 1


def test_fig4_bounds_a_layer_by_the_capacity_of_its_gaussian_units():
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


def test_fig4_counts_no_pruned_unit():
    pair, x = StochasticConv2d(8, 2, 1), torch.randn(99, 8, 2, 2).sign()
    with torch.no_grad():
        pair.weight[1] = 0
    single = StochasticConv2d(8, 1, 1)
    single.load_state_dict({key: value[:1] for key, value in pair.state_dict().items()})
    for measure in (lambda layer: fig4.disentanglement(layer.eval(), x)["i_xz"],
                    lambda layer: fig4.layer_bounds([layer])["conv1"]["capacity"]):
        assert measure(pair) == pytest.approx(measure(single))


# === Eq. 7: PAC-Bayes =============================================================================

def test_pac_bayes_bound_holds_over_every_training_set_of_a_toy_world():
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


def test_pac_bayes_bound_is_no_better_than_inverting_the_binary_divergence():
    def inverse(loss, budget):  # the largest p whose coin's divergence is within the budget
        low, high = loss, 1 - 1e-12
        for _ in range(60):
            p = (low + high) / 2
            pairs = (loss, p), (1 - loss, 1 - p)
            divergence = sum(a * math.log(a / b) for a, b in pairs if a > 0)
            low, high = (p, high) if divergence < budget else (low, p)
        return low

    for loss, divergence, n in itertools.product((0.0, 0.02, 0.3, 0.9), (0.0, 30.0, 3000.0),
                                                 (300, 50_000)):
        bound = pac_bayes_bound(loss, divergence, n, max_loss=1)
        tight = inverse(loss, (divergence + math.log(len(LAMBDAS) / 0.05)) / n)
        assert loss < tight <= bound
        # twice it for no loss
        assert bound > 1 or loss > 0.5 or bound < loss + 2.3 * (tight - loss)


def test_pac_bayes_bound_is_its_formula_and_refuses_what_it_does_not_hold_for():
    penalty = math.log(10) * (100 + math.log(21 / 0.05)) / 1000
    expected = min((0.2 + lam * penalty) / (1 - 0.5 / lam) for lam in LAMBDAS)
    assert pac_bayes_bound(0.2, 100, 1000) == pytest.approx(expected)
    for loss, divergence, lambdas in ((2.4, 1.0, [1]), (0.5, -1.0, [1]), (0.5, 1.0, [0.5]),
                                      (math.nan, 1.0, [1])):
        with pytest.raises(ValueError):
            pac_bayes_bound(loss, divergence, 100, lambdas=lambdas)


def test_prior_divergence_is_that_of_torch_distributions_and_refuses_what_is_not_counted():
    model = nn.Sequential(StochasticLinear(20, 30), nn.BatchNorm1d(30),
                          StochasticLinear(30, 4, bias=False)).double()
    prior = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer, scale in ((model[0], 0.3), (model[2], 0.01)):
            layer.weight.add_(scale * torch.randn_like(layer.weight))
            layer.log_sigma2.copy_(math.log(scale) * 2 + torch.randn_like(layer.weight))
    normal, exact = torch.distributions.Normal, 0
    for name, layer in (("0", model[0]), ("2", model[2])):
        q = normal(layer.weight, torch.exp(layer.log_sigma2 / 2))
        of_s = [torch.distributions.kl_divergence(
                    q, normal(prior[name + ".weight"], math.exp(k / 40))).sum()
                for k in range(-799, 201)]  # log s^2 in steps of 1/20
        exact = exact + min(of_s) + math.log(len(of_s))
    divergence = prior_divergence(model, prior)
    assert divergence.item() == pytest.approx(exact.item(), rel=1e-9)
    alone = prior_divergence(model[2], {k[2:]: v for k, v in prior.items() if k.startswith("2.")})
    assert 0 < alone < divergence
    divergence.backward()
    assert all(parameter.grad.abs().sum() > 0 for layer in model[::2]
               for parameter in (layer.weight, layer.log_sigma2))
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
