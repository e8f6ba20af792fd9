"""Secs. 2, 3 and 7 as tests, on toy worlds whose distributions are known, and what test_common.py
leaves of Secs. 4 and 5: pytest beyond.

Quantities of toy worlds are exact sums over finite joint distributions, in nats.
"""
import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from beyond.proper_prior import prior_divergence
from common import (LAMBDAS, StochasticLinear, flat_minimum_bound, g, layer_information,
                    layer_information_bound, pac_bayes_bound)
from test_common import optimal_information, printed_flat_minimum_bound, white_inputs

LOG2 = math.log(2)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def entropy(joint, names, of):
    """H of the variables `of`; names: one letter for each axis of the joint distribution."""
    return torch.special.entr(torch.einsum(f"{names}->{of}", joint)).sum().item()


def mutual(joint, names, a, b, given=""):
    """I(a;b|given)."""
    both = "".join(dict.fromkeys(a + b + given))
    return (entropy(joint, names, a + given) + entropy(joint, names, b + given)
            - entropy(joint, names, both) - entropy(joint, names, given))


def channel(*shape):
    """A random conditional distribution of the last index given the others, rather sharp."""
    return torch.softmax(3 * torch.randn(*shape, dtype=torch.double), -1)


# === Sec. 2: decomposition of the cross-entropy; Sec. 7: random labels ============================

def toy_world(priors, inputs, temperature):
    """p(t,x,y,w) of a task t, two inputs x, their two labels y and learned weights w; and q(y|x,w).

    priors: of the three tasks; the last one's labels are random. Index x runs over the four values
    of two binary inputs, whose distribution is `inputs`, and index y over those of two labels.
    w, one of five, is drawn from the Bayesian posterior at this temperature.
    """
    task = torch.tensor([[0.9, 0.2], [0.3, 0.6], [0.5, 0.5]]).double()  # p(y=1|x,t)
    net = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.9, 0.9], [0.1, 0.1], [0.5, 0.5]]).double()
    bits = torch.tensor(list(itertools.product((0, 1), repeat=2)))

    def likelihood(p):  # of both labels given both inputs: (tasks or weights, x, y)
        ones = p[:, bits][:, :, None]
        return torch.where(bits[None, None].bool(), ones, 1 - ones).prod(-1)

    q = likelihood(net)
    learned = torch.softmax(q.log() / temperature, 0)  # p(w|x,y)
    priors = torch.tensor(priors).double()
    data = torch.einsum("t,x,txy->txy", priors, inputs, likelihood(task))
    return torch.einsum("txy,wxy->txyw", data, learned), torch.einsum("wxy->xyw", q)


def expected_cross_entropy(joint, q):
    return -(joint.sum(0) * q.log()).sum().item()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_terms_of_the_decomposition_are_the_cross_entropy(temperature):
    joint, q = toy_world((0.5, 0.3, 0.2), channel(4), temperature)
    intrinsic = entropy(joint, "txyw", "txy") - entropy(joint, "txyw", "tx")  # H(y|x,t)
    sufficiency = mutual(joint, "txyw", "t", "y", "xw")
    posterior = joint.sum(0) / joint.sum((0, 2))[:, None]  # p(y|x,w)
    efficiency = (joint.sum(0) * (posterior / q).log()).sum().item()
    overfitting = mutual(joint, "txyw", "y", "w", "tx")
    total = intrinsic + sufficiency + efficiency - overfitting
    assert expected_cross_entropy(joint, q) == pytest.approx(total, abs=1e-9)
    assert min(intrinsic, sufficiency, efficiency, overfitting) > 1e-3
    information = mutual(joint, "txyw", "xy", "w")
    assert overfitting <= information <= mutual(joint, "txyw", "xyt", "w") + 1e-9


def test_random_labels_are_overfitted_by_the_information():
    fixed = torch.tensor([0, 1, 0, 0]).double()  # the inputs are given: 0 and 1
    for temperature in (0.02, 0.3, 1, 3, 30):
        joint, q = toy_world((0, 0, 1), fixed, temperature)
        information = mutual(joint, "txyw", "xy", "w")
        assert information > 1e-4
        assert mutual(joint, "txyw", "y", "w", "tx") == pytest.approx(information)
        # two random labels, less what was memorised
        assert expected_cross_entropy(joint, q) >= 2 * LOG2 - information - 1e-9


def test_memorising_random_labels_pays_below_beta_1_only():
    fixed = torch.tensor([0, 1, 0, 0]).double()

    def largest_gain(beta):  # over weights of every temperature, against knowing nothing
        gains = []
        for temperature in (0.02, 0.3, 1, 3, 30):
            joint, q = toy_world((0, 0, 1), fixed, temperature)
            objective = expected_cross_entropy(joint, q) + beta * mutual(joint, "txyw", "xy", "w")
            gains.append(2 * LOG2 - objective)
        return max(gains)

    assert largest_gain(0.5) > 0.1
    assert largest_gain(1.0) <= 1e-9
    assert largest_gain(2.0) < 0


def test_with_random_inputs_overfitting_is_more_than_i_y_w():
    # Sec. 7.1 has I(y;w|x,t) = I(y;w); weights that store which label goes where break it
    joint, _ = toy_world((0, 0, 1), channel(4), 1.0)
    overfitting, alone = mutual(joint, "txyw", "y", "w", "tx"), mutual(joint, "txyw", "y", "w")
    assert overfitting > alone + 1e-3
    assert overfitting == pytest.approx(alone + mutual(joint, "txyw", "x", "y", "w"))
    assert overfitting <= mutual(joint, "txyw", "xy", "w")


# === Sec. 3: nuisances, invariance, stacking ======================================================

# p(y|x) of six inputs: labels that are a function of x, and labels that are not
DETERMINISTIC = torch.eye(2, dtype=torch.double)[[0, 0, 0, 1, 1, 1]]
NOISY = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8], [0.5, 0.5]],
                     dtype=torch.double)
BOTH = pytest.mark.parametrize("y_given_x", [DETERMINISTIC, NOISY])


def with_nuisance(y_given_x):
    """p(y,n,x) of a nuisance n, independent of y, such that x = f(y,n): the construction of Sec. 3.

    y_given_x: (x, y), x uniform. n is a uniform number, cut where P(x' <= x|y) steps for some y.
    """
    size, classes = y_given_x.shape
    joint = y_given_x / size
    cumulative = (joint / joint.sum(0)).cumsum(0)
    edges = torch.cat([torch.zeros(1), cumulative.flatten()]).unique()
    edges = edges[torch.cat([edges.diff() > 1e-12, torch.tensor([True])])]
    middle = (edges[1:] + edges[:-1]) / 2
    x = [torch.searchsorted(cumulative[:, y].contiguous(), middle) for y in range(classes)]
    y_and_n = joint.sum(0)[:, None] * edges.diff() / edges.diff().sum()
    return torch.einsum("yn,ynx->ynx", y_and_n, F.one_hot(torch.stack(x), size).double())


@BOTH
def test_every_task_has_a_nuisance_that_explains_the_rest(y_given_x):
    joint = with_nuisance(y_given_x)
    assert torch.allclose(torch.einsum("ynx->xy", joint) * 6, y_given_x)
    assert mutual(joint, "ynx", "y", "n") == pytest.approx(0, abs=1e-12)
    x_given_both = entropy(joint, "ynx", "ynx") - entropy(joint, "ynx", "yn")
    assert x_given_both == pytest.approx(0, abs=1e-12)
    assert mutual(joint, "ynx", "n", "x") > 0.5


@BOTH
def test_sufficient_and_minimal_is_invariant(y_given_x):
    joint = with_nuisance(y_given_x)
    labels_noise = entropy(joint, "ynx", "xy") - entropy(joint, "ynx", "x")  # H(y|x)
    # the minimal sufficient statistic: which p(y|x) an input has
    kind = (y_given_x[:, None] == y_given_x.unique(dim=0)).all(-1).double()
    totals, nuisances = [], []
    for sharpness in (0.0, 0.3, 1.0, 3.0, 50.0):  # z holds the kind, and more and more of x
        within = torch.softmax(sharpness * torch.eye(6, dtype=torch.double), -1)
        world = torch.einsum("ynx,xk,xz->ynxkz", joint, kind, within).flatten(3)
        task, total, nuisance = (mutual(world, "ynxz", a, "z") for a in "yxn")
        assert task == pytest.approx(mutual(world, "ynxz", "x", "y"))  # sufficient
        # I(z;n) <= I(z;x) - I(x;y), an equality up to H(y|x)
        assert -1e-9 <= total - task - nuisance <= labels_noise + 1e-9
        totals.append(total)
        nuisances.append(nuisance)
    assert totals == sorted(totals)
    assert nuisances == sorted(nuisances)
    assert nuisances[-1] > nuisances[0] + 0.5
    if y_given_x is DETERMINISTIC:  # minimal is invariant
        assert (totals[0], nuisances[0]) == pytest.approx((LOG2, 0))
        assert nuisances[-1] == pytest.approx(math.log(3))


@BOTH
def test_stacking_layers_adds_invariance_within_the_bound(y_given_x):
    joint, names = with_nuisance(y_given_x), "ynxzvw"
    for _ in range(20):
        layers = channel(6, 5), channel(5, 4), channel(4, 4)
        world = torch.einsum("ynx,xz,zv,vw->ynxzvw", joint, *layers)
        nuisance = {layer: mutual(world, names, layer, "n") for layer in "xzvw"}
        assert nuisance["x"] > nuisance["z"] > nuisance["v"] > nuisance["w"] > 0
        for below, layer in zip("xzv", "zvw"):  # what passes from below and is not the task
            passes = mutual(world, names, below, layer)
            assert nuisance[layer] <= passes - mutual(world, names, layer, "y") + 1e-9


# === Sec. 4: the constant of Prop. 4.1, flat minima; eq. 7 ========================================

def test_gaussian_information_is_above_the_capacity():
    log_alpha = torch.arange(-10, 10.1, 0.5).double()
    above = common.gaussian_kl(log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha))
    assert (above >= 0).all()
    assert above[0].item() == pytest.approx(0.636, abs=1e-3)  # of little noise; 0 of much
    assert above[log_alpha == 4] < 1e-3


def test_the_constant_of_proposition_4_1_and_its_truncation():
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


def test_second_order_cross_entropy_is_that_of_proposition_4_3():
    weight, root, alpha = torch.randn(6), torch.randn(6, 6), 0.3 * torch.rand(6)
    hessian = root @ root.T
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


def test_proposition_5_2_of_weights_that_differ_in_alpha():
    weight, mixed = torch.rand(3, 100), torch.rand(3, 100)
    unit = torch.log1p((torch.expm1(mixed) * weight**2).sum(1) / (weight**2).sum(1))
    information = layer_information(weight, mixed, white_inputs(5000, 100).float())
    assert 3 * g(unit).mean() <= information <= layer_information_bound(3, unit)


def test_pac_bayes_bound_is_at_least_the_inverse_divergence():
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


class TwoLayers:
    """A net of two stochastic layers, a prior from which it moved away."""

    def __init__(self):
        self.model = nn.Sequential(StochasticLinear(20, 30), nn.BatchNorm1d(30),
                                   StochasticLinear(30, 4, bias=False)).double()
        self.prior = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for layer, scale in ((self.model[0], 0.3), (self.model[2], 0.01)):
                layer.weight.add_(scale * torch.randn_like(layer.weight))
                layer.log_sigma2.copy_(math.log(scale) * 2 + torch.randn_like(layer.weight))


def test_prior_divergence_is_that_of_torch_distributions():
    nets, exact = TwoLayers(), 0
    for name, layer in (("0", nets.model[0]), ("2", nets.model[2])):
        q = torch.distributions.Normal(layer.weight, torch.exp(layer.log_sigma2 / 2))
        of_s = []
        for k in range(-799, 201):  # log s^2 in steps of 1/20
            p = torch.distributions.Normal(nets.prior[name + ".weight"], math.exp(k / 40))
            of_s.append(torch.distributions.kl_divergence(q, p).sum())
        exact = exact + min(of_s) + math.log(len(of_s))
    divergence = prior_divergence(nets.model, nets.prior)
    assert divergence.item() == pytest.approx(exact.item(), rel=1e-9)
    divergence.backward()
    for layer in nets.model[::2]:
        assert layer.weight.grad.abs().sum() > 0
        assert layer.log_sigma2.grad.abs().sum() > 0


def test_prior_divergence_refuses_what_is_not_counted():
    nets = TwoLayers()
    nets.model(torch.randn(8, 20).double())  # running statistics move
    with pytest.raises(ValueError, match="1.running_mean, 1.running_var, 1.num_batches_tracked"):
        prior_divergence(nets.model, nets.prior)
    with torch.no_grad():
        nets.model[0].bias[3] += 1
    with pytest.raises(ValueError, match="0.bias"):
        prior_divergence(nets.model, nets.prior)
    with pytest.raises(ValueError, match="log-normal"):
        prior_divergence(StochasticLinear(2, 2, noise="lognormal"), {})
