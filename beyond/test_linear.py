"""What is counted, against oracles, and verdicts: linear, proper_prior, hysteresis, log_normal,
certificates. pytest beyond.
"""
import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fig1_phase_transition as fig1
from beyond import certificates, hysteresis, linear, log_normal, proper_prior
from common import StochasticLinear, gaussian_kl, pac_bayes_bound

torch.set_num_threads(1)
ANNEALING = dict(chains=20, temperatures=48, leaps=4, leap=0.25)
SIZES = dict(signs=40, inputs=3)


# === linear.py ====================================================================================

@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_expectations_are_those_of_samples(generator):
    labels, mean, variance = (torch.tensor([[value]], dtype=torch.double)
                              for value in (-1.0, 0.7, 4.0))
    f = (mean + 2 * torch.randn(1_000_000, generator=generator, dtype=torch.double))
    f.requires_grad_()
    loss = F.softplus(-labels * f)
    slope, = torch.autograd.grad(loss.sum(), f, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), f)
    found = linear.expectations(labels, mean, variance)
    for ours, samples in zip(found, (loss, slope, curvature)):
        assert ours.item() == pytest.approx(samples.mean().item(), abs=4e-3)


@pytest.mark.parametrize("kernel", linear.KERNELS)
def test_best_gaussian_is_what_gradient_descent_finds(kernel, generator):
    n, beta = 6, 0.6
    prior = 9 * linear.kernel_matrix(kernel, n, SIZES, generator)
    labels = linear.random_signs(1, n, generator)
    mean = torch.zeros(n, dtype=torch.double, requires_grad=True)
    root = torch.eye(n, dtype=torch.double, requires_grad=True)
    p = torch.distributions.MultivariateNormal(torch.zeros(n).double(), prior)
    optimizer = torch.optim.LBFGS([mean, root], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        covariance = root @ root.T
        q = torch.distributions.MultivariateNormal(mean, covariance)
        cross_entropy = linear.expectations(labels, mean[None], covariance.diagonal()[None])[0]
        return cross_entropy.sum() + beta * torch.distributions.kl_divergence(q, p)

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = linear.best_gaussian(prior, labels, beta, tolerance=1e-7)
    total = n * ours["cross_entropy"] + beta * ours["divergence"]
    assert total.item() == pytest.approx(objective().item(), abs=1e-6)
    assert torch.allclose(ours["covariance"][0], root @ root.T, atol=1e-3)


def test_accuracy_is_that_of_sampled_logits(generator):
    prior = 4 * linear.kernel_matrix("rbf", 5, SIZES, generator)
    labels = linear.random_signs(1, 5, generator)
    q = linear.best_gaussian(prior, labels, 0.5)
    root = torch.linalg.cholesky(q["covariance"][0])
    f = q["mean"] + torch.randn(100_000, 5, generator=generator, dtype=torch.double) @ root.T
    assert q["accuracy"].item() == pytest.approx((f * labels > 0).double().mean().item(), abs=3e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.2])
def test_table_minimum_is_that_of_samples_of_the_prior(beta, generator):
    f = 3 * torch.randn(1_000_000, generator=generator, dtype=torch.double)
    likelihood = torch.exp(-F.softplus(-f) / beta)
    assert linear.table_minimum(3, beta) == pytest.approx(
        -beta * likelihood.mean().log().item(), abs=2e-3)


@pytest.mark.parametrize("beta, error", [(0.3, 5e-3), (0.9, 1e-3)])
def test_annealing_finds_the_minimum_of_the_look_up_table(beta, error, generator):
    labels = linear.random_signs(4, 30, generator)
    prior = 36 * torch.eye(30, dtype=torch.double)
    posterior = linear.best_gaussian(prior, labels, beta)
    found = linear.exact_minimum(posterior, labels, beta, ANNEALING, generator)
    assert found.mean().item() == pytest.approx(linear.table_minimum(6, beta), abs=error)


def test_annealing_agrees_with_samples_of_a_correlated_prior(generator):
    labels, beta = linear.random_signs(2, 3, generator), 0.7
    prior = 9 * linear.kernel_matrix("rbf", 3, SIZES, generator)
    f = torch.randn(400_000, 3, generator=generator, dtype=torch.double)
    f = f @ torch.linalg.cholesky(prior).T
    loss = F.softplus(-labels[:, None] * f).sum(-1)
    samples = -beta / 3 * torch.exp(-loss / beta).mean(1).log()
    posterior = linear.best_gaussian(prior, labels, beta)
    found = linear.exact_minimum(posterior, labels, beta, ANNEALING, generator)
    assert torch.allclose(found, samples, atol=5e-3)


def test_no_gaussian_is_below_the_minimum_of_all_posteriors():
    labels = torch.ones(1, 1, dtype=torch.double)
    for scale in (0.5, 2.0, 8.0):
        for beta in (0.3, 0.9, 1.2):
            q = linear.best_gaussian(scale**2 * torch.eye(1).double(), labels, beta)
            objective = (q["cross_entropy"] + beta * q["divergence"]).item()
            assert objective > linear.table_minimum(scale, beta)


def test_at_beta_1_all_labellings_share_a_probability_of_one(generator):
    prior = 16 * linear.kernel_matrix("rbf", 4, SIZES, generator)
    labels = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.double)] * 4)
    posterior = linear.best_gaussian(prior, labels, 1.0)
    found = linear.exact_minimum(posterior, labels, 1.0, ANNEALING, generator)
    assert torch.exp(-4 * found).sum().item() == pytest.approx(1, abs=0.02)
    # Kraft: so the mean over labels is at least log 2, for the Gaussian too
    objective = posterior["cross_entropy"] + posterior["divergence"] / 4
    assert math.log(2) <= found.mean() < objective.mean()


def made_rows(objective, r=(0.9, 0.9), beta=(0.9, 0.95, 1.0, 1.05)):
    """Rows of the look-up table with two draws: objective of each beta, r at the largest."""
    rows = []
    for at, value in zip(beta, objective):
        draws = {"objective": [value, value + 0.001], "r": r if at == beta[-1] else (0.5, 0.5)}
        rows.append(dict(status="ok", seed=0, prior="proper", kernel="table", n=30, beta=at,
                         objective=value + 0.0005, draws=draws))
    return rows


def verdicts(proper, log_uniform):
    return [row["holds"] for row in linear.claims(proper, log_uniform) if row]


LOG2 = math.log(2)
CHANCE = (LOG2 - 0.1, LOG2 - 0.01, LOG2, LOG2)  # of beta .9, .95, 1, 1.05


def test_claims_of_the_proper_prior_hold():
    assert verdicts(made_rows(CHANCE), []) == ["yes"] * 3


@pytest.mark.parametrize("objective", [
    (LOG2 - 0.1, LOG2 - 0.0009, LOG2, LOG2),  # within the standard error of log 2
    (LOG2 + 0.1,) * 4])
def test_memorising_that_ends_below_0_95_is_a_no(objective):
    assert verdicts(made_rows(objective), [])[0] == "NO"


def test_memorising_beyond_1_05_is_a_no():
    beta = (0.95, 1.0, 1.05, 1.1)
    assert verdicts(made_rows((LOG2 - 0.1,) * 4, beta=beta), []) == ["NO", "yes", "NO"]


def test_mean_r_may_exceed_1_by_its_standard_error():
    assert verdicts(made_rows(CHANCE, r=(0.9, 1.12)), [])[1] == "yes"  # 1.01, error 0.11
    assert verdicts(made_rows(CHANCE, r=(1.01, 1.02)), [])[1] == "NO"


@pytest.mark.parametrize("objective, r, expected", [
    (2.2, 1.5, ["yes", "yes"]), (2.31, 1.1, ["NO", "yes"]), (2.31, 0.99, ["NO", "NO"])])
def test_claims_of_the_log_uniform_count(objective, r, expected):
    row = dict(status="ok", seed=0, prior="log-uniform", features=100, n=100, beta=2.0, r=r,
               objective=objective, train_acc=0.6)
    assert verdicts([], [row]) == expected


def test_r_of_nets_that_have_not_memorised_does_not_count():
    rows = [dict(r=2.5, train_acc=0.6), dict(r=5.1, train_acc=0.3)]
    assert linear.largest_counted_r(rows) == 2.5
    assert math.isnan(linear.largest_counted_r(rows[1:]))


# === proper_prior.py ==============================================================================

def test_mixture_kl_of_one_component_is_that_of_two_gaussians():
    mean, log_sigma2, log_s2 = torch.randn(5), torch.randn(5), torch.tensor([0.3])
    q = torch.distributions.Normal(mean, (log_sigma2 / 2).exp())
    p = torch.distributions.Normal(0, (log_s2 / 2).exp())
    square = mean**2 + log_sigma2.exp()
    kl, shares = proper_prior.mixture_kl(square, log_sigma2, torch.zeros(1), log_s2)
    assert torch.allclose(kl, torch.distributions.kl_divergence(q, p), atol=1e-5)
    assert torch.equal(shares, torch.ones(1, 5))


def test_mixture_kl_is_the_least_over_shares():
    odds, log_s2 = torch.tensor([2.0, 0.5, 0.0]), torch.tensor([-6.0, -2.0, 1.0])
    square, log_sigma2 = torch.tensor([0.2]), torch.tensor([-3.0])
    components = [proper_prior.mixture_kl(square, log_sigma2, torch.zeros(1), s2[None])[0]
                  for s2 in log_s2]
    bound, best = proper_prior.mixture_kl(square, log_sigma2, odds, log_s2)
    shares = torch.distributions.Dirichlet(torch.ones(3)).sample((1000,))
    shares = torch.cat([shares, best.T])
    kl = (shares * (torch.stack(components, 1) + shares.log() - odds.log_softmax(0))).sum(1)
    assert kl[-1].item() == pytest.approx(bound.item(), abs=1e-5)
    assert (kl >= bound - 1e-5).all()


@pytest.mark.parametrize("mean, sigma", [(0.0, 0.05), (0.1, 0.3), (1.0, 0.01), (0.5, 1.0)])
def test_mixture_kl_bounds_the_kl_of_samples(mean, sigma):
    torch.manual_seed(0)
    odds, log_s2 = torch.tensor([2.0, 0.5, 0.0]), torch.tensor([-6.0, -2.0, 1.0])
    components = torch.distributions.Normal(torch.zeros(3), (log_s2 / 2).exp())
    p = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=odds),
                                              components)
    q = torch.distributions.Normal(mean, sigma)
    w = q.sample((400_000,))
    samples = (q.log_prob(w) - p.log_prob(w)).mean().item()
    square, log_sigma2 = torch.tensor([mean**2 + sigma**2]), torch.tensor([2 * math.log(sigma)])
    bound = proper_prior.mixture_kl(square, log_sigma2, odds, log_s2)[0].item()
    assert samples - 0.01 < bound < samples + 1.2


def layer_of_two_scales():
    """A layer, most of whose weights are small: log s^2 = -12 and -1, noise of a tenth of them."""
    torch.manual_seed(0)
    layer = StochasticLinear(100, 50, bias=False)
    scale = torch.where(torch.rand(50, 100) < 0.9, math.exp(-6), math.exp(-0.5))
    layer.weight.data = scale * torch.randn(50, 100)
    layer.log_sigma2.data = 2 * scale.log() - 4.6
    return layer


def test_mixture_finds_the_scales_of_the_weights():
    layer, mixture = layer_of_two_scales(), proper_prior.Mixture()
    first = mixture(layer).item()
    for _ in range(500):
        last = mixture(layer).item()
    assert last < first
    (log_odds, log_s2), = mixture.parameters.values()
    assert log_odds[2] == 0  # two odds are paid
    assert (log_s2 + 12).abs().min() < 0.6 and (log_s2 + 1).abs().min() < 0.6


def test_mixture_pays_for_five_parameters_per_layer():
    layer, mixture = layer_of_two_scales(), proper_prior.Mixture()
    free = mixture.divergence("", layer).item()
    paid = proper_prior.Mixture()(layer).item()
    assert paid - free == pytest.approx(5 * math.log(512), rel=1e-3)


def test_mixture_uses_parameters_on_their_grid():
    parameters = torch.tensor([-99.0, -1.26, 0.2, 99.0])
    assert proper_prior.on_grid(parameters, -16).tolist() == [-16.0, -1.25, 0.1875, 15.9375]


def test_nats_of_a_net_that_rests_hardly_vary():
    layer, mixture = layer_of_two_scales(), proper_prior.Mixture()
    layer.weight.data = 0.01 * torch.randn(50, 100)
    layer.log_sigma2.data.fill_(-3.4)  # noise, so that few nats are counted
    nats = [mixture(layer).item() for _ in range(600)][500:]
    assert max(nats) < 1.2 * min(nats)
    again = proper_prior.Mixture()
    again.parameters[""] = mixture.used("")
    assert again(layer).item() == pytest.approx(nats[-1], rel=0.2)


def test_the_order_of_units_without_survivors_is_not_credited():
    survives = torch.tensor([[[True, False]], [[False, False]], [[True, True]], [[False, False]]])
    assert proper_prior.log_orders(survives) == pytest.approx(math.log(4 * 3))
    assert proper_prior.log_orders(survives | True) == pytest.approx(math.log(24))


def test_log_uniform_count_is_that_of_a_density_over_a_factor_of_50():
    alpha = 1e-6  # log w of the posterior is then Gaussian, of variance alpha
    log_volume = math.log(2 * math.log(50))  # both signs
    entropy = 0.5 * math.log(2 * math.pi * math.e * alpha)
    counted = gaussian_kl(torch.tensor(alpha).log()).item()
    assert counted == pytest.approx(log_volume - entropy, abs=0.01)


@pytest.mark.parametrize("survivors", [0, 1, 30, 500])
def test_place_entropy_is_nearly_the_log_of_the_number_of_choices(survivors):
    survives = torch.arange(1000) < survivors
    choices = math.lgamma(1001) - math.lgamma(survivors + 1) - math.lgamma(1001 - survivors)
    assert choices <= proper_prior.place_entropy(survives) + 1e-6 <= choices + 4


def test_log_uniform_cell_counts_places_and_permutations(monkeypatch):
    small = dict(synthetic=(60, 20), test=20, draws=1)
    monkeypatch.setitem(fig1.SETTINGS, "demo", fig1.SETTINGS["demo"] | small)
    own = proper_prior.SETTINGS["demo"] | small | {"steps": 3}
    monkeypatch.setitem(proper_prior.SETTINGS, "demo", own)
    args = argparse.Namespace(scale="demo", dataset="synthetic", data_dir="data")
    cell = {"prior": "log-uniform", "labels": "random", "n": 50, "beta": 0.1, "seed": 0}
    row = proper_prior.train_cell(cell, torch.device("cpu"), args, lambda *_: None)
    assert row["steps"] == 3
    units = (8, 8, 48, 24)  # of the four hidden layers at width 1/8
    # after three steps all units have survivors
    assert row["permutations"] == pytest.approx(sum(math.lgamma(k + 1) for k in units))
    weights = 3 * 25 * 8 + 8 * 25 * 8 + 392 * 48 + 48 * 24 + 24 * 10 + 8 + 48 + 24
    assert 0 < row["survivors"] <= weights
    assert 0 <= row["places"] < weights * LOG2


def prior_row(prior="mixture", beta=0.1, **changes):
    row = dict(status="ok", seed=0, prior=prior, n=100, beta=beta, train_acc=0.9,
               cross_entropy=math.log(10) - 1, information=200.0) | changes
    return proper_prior.add_derived([row])[0]


def test_r_paid_adds_the_places_less_the_permutations():
    row = prior_row("log-uniform", places=500.0, permutations=200.0)
    assert row["r"] == pytest.approx(0.5)
    assert row["r_paid"] == pytest.approx(0.2)  # 1 nat of labels for 2 + 3 nats


def test_r_paid_is_r_if_permutations_exceed_the_places():
    assert prior_row("log-uniform", places=50.0, permutations=200.0)["r_paid"] == pytest.approx(0.5)


def test_r_of_a_net_at_chance_is_zero():
    assert prior_row(train_acc=0.54)["r"] == 0


@pytest.mark.parametrize("nats, expected", [(170.0, ["yes", "NO"]), (165.0, ["NO", "NO"]),
                                            (300.0, ["yes", "yes"]), (410.0, ["yes", "NO"])])
def test_claims_of_the_mixture(nats, expected):
    rows = [prior_row(information=nats), prior_row(beta=0.2, train_acc=0.1)]
    assert [row["holds"] for row in proper_prior.claims(rows) if row] == expected


def test_claims_of_nets_that_memorise_nothing_are_undecided():
    rows = [prior_row(train_acc=0.1), prior_row("log-uniform", train_acc=0.1, places=5.0,
                                                permutations=0.0)]
    assert {row["holds"] for row in proper_prior.claims(rows) if row} == {"undecided"}


def test_claims_of_the_log_uniform_net_read_r_paid():
    def verdicts(places):
        row = prior_row("log-uniform", places=places, permutations=0.0)
        return [row["holds"] for row in proper_prior.claims([row]) if row]

    assert verdicts(51.0) == ["yes", "yes"]
    assert verdicts(49.0) == ["yes", "NO"]


# === hysteresis.py ================================================================================

def branch(cell, seed, lower, equal, upper, kind=""):
    """A row of a net whose accuracy falls from 1 to .1 half way between two beta at the edge."""
    betas = (0.01, 0.3, 0.4, 1.2)
    edge = upper if cell["start"] == "memorised" else lower
    accuracy = [0.55 + 0.45 * (1 if beta < edge else -1) for beta in betas]
    nats = (math.log(10) - 1) / equal
    return cell | {"status": "ok", "seed": seed, "betas": betas, "train_acc" + kind: accuracy,
                   "cross_entropy" + kind: [1.0] * 4, "nats": [nats] * 4}


def hysteresis_verdicts(*edges, seeds=(0, 1), kind=""):
    """Verdicts for N = 300: (lower, equal, upper) for 300, 1,000 and 3,000 steps."""
    grid = dict(sizes=(300,), steps=(300, 1000, 3000)[:len(edges)])
    rows = []
    for steps, values in zip(grid["steps"], edges):
        for cell in hysteresis.make_cells(grid, steps=steps):
            rows += [branch(cell, seed, *values, kind) for seed in seeds]
    return [row["holds"] for row in hysteresis.claims(rows, grid) if row]


@pytest.mark.parametrize("kind", ["", "_older"])
def test_hysteresis_claims_can_hold(kind):
    edges = (0.02, 0.5, 0.6), (0.35, 0.54, 0.6)
    assert hysteresis_verdicts(*edges, kind=kind)[:3] == ["yes"] * 3


@pytest.mark.parametrize("lower, equal, upper", [(0.5, 0.4, 0.6), (0.02, 0.8, 0.6)])
def test_equal_objective_lies_between_the_edges(lower, equal, upper):
    # crossings of the made branches: 0.06 to 0.7, in the middle of a step of log beta
    assert hysteresis_verdicts((lower, equal, upper), (lower, equal, upper))[:2] == ["NO", "NO"]


def test_stationary_needs_the_last_two_numbers_of_steps():
    assert hysteresis_verdicts((0.02, 0.3, 0.6), (0.02, 0.50, 0.6), (0.02, 0.54, 0.6))[3] == "yes"
    assert hysteresis_verdicts((0.02, 0.5, 0.6), (0.02, 0.50, 0.6), (0.02, 0.56, 0.6))[3] == "NO"


def test_a_lower_edge_below_all_beta_makes_no_claim():
    assert len(hysteresis_verdicts((0.001, 0.5, 0.6), (0.001, 0.5, 0.6))) == 3


@pytest.mark.parametrize("rise, expected", [(0.21, "yes"), (0.19, "NO"), (-0.5, "NO")])
def test_a_lower_edge_that_rises_by_twice_its_spread(rise, expected):
    before = np.array([[0.1, 0.5, 0.6]] * 3)
    after = before + np.array([[rise - 0.1, 0, 0], [rise, 0, 0], [rise + 0.1, 0, 0]])
    assert hysteresis.claims_over_steps(300, {300: before, 1000: after})[1]["holds"] == expected


def test_one_seed_makes_no_claim_of_the_lower_edge():
    assert len(hysteresis_verdicts((0.02, 0.5, 0.6), (0.35, 0.5, 0.6), seeds=(0,))) == 3


def test_memorising_that_never_ends_has_the_largest_beta_as_its_edge():
    grid = dict(sizes=(300,), steps=(300,))
    rows = [branch(cell, 0, 0.02, 0.5, 9.0) for cell in hysteresis.make_cells(grid)]
    assert hysteresis.edges(rows)[2] == 1.2


# === log_normal.py and certificates.py ============================================================

def log_normal_verdicts(transitions, excess):
    """Verdicts for caps 0 and 1: accuracy falls at these beta, label nats less nats counted."""
    rows = []
    for cap, edge, uncounted in zip((0.0, 1.0), transitions, excess):
        for beta in (0.1, 1.0, 10.0):
            memorised = beta < edge  # at chance a net may have no nats at all
            rows.append(dict(status="ok", seed=0, cap=cap, beta=beta,
                             train_acc=0.9 if memorised else 0.1,
                             cross_entropy=math.log(10) - 1,
                             nats=1 - uncounted if memorised else 0.0))
    grid = dict(caps=(0.0, 1.0))
    return [row["holds"] for row in log_normal.claims(rows, grid)]


@pytest.mark.parametrize("transitions, excess, expected", [
    ((5, 0.5), (0.11, 0.09), ["yes", "yes", "yes"]),
    ((0.5, 5), (0.09, 0.11), ["NO", "NO", "NO"]),
    ((0.01, 0.5), (0.11, 0.09), ["undecided", "undecided", "yes"])])  # none memorised at cap 0
def test_log_normal_claims(transitions, excess, expected):
    assert log_normal_verdicts(transitions, excess) == expected


def certificate_row(**changes):
    row = dict(status="ok", seed=0, seen=0, settings={"draws": 2000}, divergence=100.0,
               bound_n=50_000, cross_entropy=1.0, cross_entropy_std=0.1, test_cross_entropy=1.0,
               error=0.3, error_std=0.05, test_error=0.3)
    return certificates.add_certificates([row | changes])[0]


def test_certificate_pays_for_the_estimate_of_the_training_loss():
    exact = pac_bayes_bound(1.0, 100.0, 50_000, delta=0.8 * 0.05 / 2)
    bound = certificate_row()["bound_cross_entropy"]
    assert exact < bound < exact + 0.1
    assert certificate_row(cross_entropy_std=0.2)["bound_cross_entropy"] > bound


@pytest.mark.parametrize("changes, expected", [
    ({}, ["yes", "yes", "yes"]), ({"test_error": 0.5}, ["NO", "yes", "yes"]),
    ({"divergence": 20_000.0}, ["yes", "NO", "NO"])])
def test_certificate_claims(changes, expected):
    rows = [certificate_row(**changes)]
    assert [row["holds"] for row in certificates.claims(rows)] == expected
