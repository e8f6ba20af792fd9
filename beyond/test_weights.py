"""Sec. 4 as tests: information in the weights against integrals, flat minima. pytest beyond."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import StochasticLinear, flat_minimum_bound

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# === Prop. 4.1: divergence from a log-uniform prior ===============================================

def gaussian_divergence(log_alpha):
    """KL of N(w, alpha w^2) from the log-uniform prior, 0 at alpha = infinity, by integration."""
    step = 5e-5
    normal = torch.arange(-10, 10, step, dtype=torch.double) + step / 2
    density = torch.exp(-(normal**2) / 2) * step / math.sqrt(2 * math.pi)
    mean = [(density * torch.log((1 + math.exp(a / 2) * normal).abs())).sum()
            for a in log_alpha.tolist()]
    return torch.stack(mean) - log_alpha / 2 + (np.euler_gamma + math.log(2)) / 2


def test_gaussian_information_is_the_divergence_to_0_0095_nats_or_3_5_percent():
    log_alpha = torch.arange(-10, 10.01, 0.5, dtype=torch.double)
    exact, capacity = gaussian_divergence(log_alpha), 0.5 * torch.log1p(torch.exp(-log_alpha))
    layer, ours = StochasticLinear(50, 40, dtype=torch.double), []
    for a in log_alpha.tolist():
        layer.log_alpha = a
        ours.append(layer.information().detach() / 2000)
    assert 0.0090 < (torch.stack(ours) - exact).abs().max() < 0.0095
    share = (torch.stack(ours) / exact)[log_alpha < 5]  # beyond, the integral is not exact enough
    assert 0.030 < (share - 1).abs().max() < 0.035
    above = exact - capacity
    assert above.min() > -1e-4 and above.max() < 0.636
    assert above[0] > 0.635 and (above[log_alpha == 4] < 1e-3).all()


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


@pytest.mark.parametrize("mean", [-3.0, 0.01, 20.0])
def test_proposition_4_1_is_the_divergence_from_a_log_uniform_prior_whatever_the_mean(mean):
    alpha, low, high = 0.04, -12.0, 8.0  # the prior: log|w| uniform from low to high
    posterior = torch.distributions.LogNormal(  # of |w|
        math.log(abs(mean)) - alpha / 2, math.sqrt(alpha))
    sample = posterior.sample((100_000,))
    assert low < sample.min().log() and sample.max().log() < high
    divergence = (posterior.log_prob(sample) + sample.log() + math.log(high - low)).mean().item()
    constant = math.log(high - low) - 0.5 * math.log(2 * math.pi * math.e)
    assert divergence == pytest.approx(-0.5 * math.log(alpha) + constant, abs=0.01)
    layer = StochasticLinear(10, 5, noise="lognormal", log_alpha=math.log(alpha),
                             max_log_alpha=2 * constant)  # the cap is the constant
    assert layer.information().item() / 50 == pytest.approx(divergence, abs=0.01)


def test_the_constant_of_proposition_4_1_is_the_log_of_the_range_and_truncation_ends_the_fall():
    # log w has a prior that is uniform over a range, and a normal posterior cut off at its ends
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.double), 1.0)

    def divergence(alpha, length):  # closed form
        end = torch.tensor(length / 2 / math.sqrt(alpha)).double()  # in standard deviations
        mass = normal.cdf(end) - normal.cdf(-end)
        posterior_entropy = 0.5 * math.log(2 * math.pi * math.e * alpha) + mass.log()
        posterior_entropy = posterior_entropy - end * normal.log_prob(end).exp() / mass
        return (math.log(length) - posterior_entropy).item()

    grid = torch.linspace(-5, 5, 1_000_001, dtype=torch.double)
    for alpha in (0.1, 4.0, 100.0):  # the closed form against numerical integration
        density = torch.exp(-(grid**2) / 2 / alpha)
        density = density / (density.mean() * 10)
        numeric = 10 * (density * torch.log(10 * density)).mean().item()
        assert divergence(alpha, 10.0) == pytest.approx(numeric, abs=1e-5)
    for length in (10.0, 20.0, 176.0):
        constant = divergence(1e-4, length) + 0.5 * math.log(1e-4)
        assert constant == pytest.approx(math.log(length) - 0.5 * math.log(2 * math.pi * math.e))
    assert 0 <= divergence(1e6, 10.0) < 1e-6  # -log(alpha)/2 would fall on, below zero
    assert divergence(1e6, 10.0) > -0.5 * math.log(1e6) + math.log(10)


def test_second_derivatives_are_refused_and_denormals_flushed():
    layer = StochasticLinear(3, 2)
    (gradient,) = torch.autograd.grad(layer.information(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()
    assert (torch.tensor([1e-39]) * torch.tensor([0.5])).item() == 0


# === Prop. 4.3: flat minima =======================================================================

def random_hessian(k):
    root = torch.randn(k, k, dtype=torch.double)
    return root @ root.T


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


@pytest.mark.parametrize("k", [2, 5, 40])
@pytest.mark.parametrize("taylor", [1.0, 0.5])  # 0.5: without Taylor's 1/2, as in the paper
def test_proposition_4_3_holds_as_in_its_proof_and_fails_as_printed(k, taylor):
    for beta in (0.6, 1.0, 10.0):
        weight, hessian = torch.randn(k, dtype=torch.double), random_hessian(k)
        information = optimal_information(weight, hessian, taylor * beta)
        assert information <= flat_minimum_bound(weight, hessian.trace(), taylor * beta)
        if k > 2:
            assert information > printed_flat_minimum_bound(weight, hessian.trace(), beta)
    ones, trace = torch.ones(k, dtype=torch.double), torch.tensor(7.0 * k).double()
    information = optimal_information(ones, 7 * torch.eye(k, dtype=torch.double), taylor)
    assert information.item() == pytest.approx(flat_minimum_bound(ones, trace, taylor).item())
    assert information > printed_flat_minimum_bound(ones, trace, 1.0)


def test_second_order_cross_entropy_under_noise_is_that_of_proposition_4_3():
    weight, hessian, alpha = torch.randn(6), random_hessian(6).float(), 0.3 * torch.rand(6)
    step = weight * alpha.sqrt() * torch.randn(400_000, 6)
    sampled = 0.5 * torch.einsum("ni,ij,nj->n", step, hessian, step).mean().item()
    exact = 0.5 * (alpha * weight**2 * hessian.diagonal()).sum().item()
    assert sampled == pytest.approx(exact, rel=0.02)


def test_flat_minimum_bound_holds_on_a_trained_network():
    x = torch.randn(300, 6, dtype=torch.double)
    flat = torch.randn(6 * 3, dtype=torch.double).requires_grad_()

    def logits(flat):  # of one layer: convex, so that training ends at the minimum
        return x @ flat.view(6, 3)

    def cross_entropy(flat):
        return F.cross_entropy(logits(flat), y, reduction="sum")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(flat)
        loss.backward()
        return loss

    # labels of such a net: the minimum is at finite weights
    y = torch.distributions.Categorical(logits=logits(flat)).sample()
    optimizer = torch.optim.LBFGS([flat], max_iter=500, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    weight = flat.detach()
    hessian = torch.autograd.functional.hessian(cross_entropy, weight)
    trace = hessian.trace()
    assert torch.linalg.eigvalsh(hessian).min() > -1e-6 * trace  # a minimum
    for beta in (0.1, 1.0):
        information = optimal_information(weight, hessian, beta)
        bound = flat_minimum_bound(weight, trace, beta)
        assert information <= bound <= information + 2.5 * len(weight)
        assert information > printed_flat_minimum_bound(weight, trace, beta)
