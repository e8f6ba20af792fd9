"""linear.py against oracles: quadrature, a plain optimiser, Monte Carlo, Kraft. pytest beyond."""
import math

import pytest
import torch
import torch.nn.functional as F

from beyond import linear

torch.set_num_threads(1)
ANNEALING = dict(chains=20, temperatures=48, leaps=4, leap=0.25)
SIZES = dict(signs=40, inputs=3)


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
    ours = linear.best_gaussian(prior, labels, beta)
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
               objective=objective)
    assert verdicts([], [row]) == expected
