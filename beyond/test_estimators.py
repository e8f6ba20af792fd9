"""Estimators where the answer is known, and input that they refuse. pytest beyond."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (_ratio_estimates, alpha_from_information, density_ratio_information,
                    flat_minimum_bound, g, label_information, layer_information,
                    layer_information_bound, pac_bayes_bound, total_correlation)

torch.set_num_threads(1)
PARTS = dict(validation=500, held_out=500)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class PairCritic(nn.Module):
    """Scores all pairs of rows of z and n: a bilinear form and inner products of two embeddings."""

    def __init__(self, dim):
        super().__init__()
        self.z, self.n = (nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16))
                          for _ in range(2))
        self.product = nn.Linear(dim, dim)
        nn.init.zeros_(self.product.weight)

    def forward(self, z, n):
        return self.product(z) @ n.T + self.z(z) @ self.n(n).T


class Recorder(PairCritic):
    """Keeps the z that it has seen, in training and not; its copy is itself."""

    def __init__(self, dim):
        super().__init__(dim)
        self.seen = {True: [], False: []}

    def forward(self, z, n):
        self.seen[self.training].append(z)
        return super().forward(z, n)

    def __deepcopy__(self, memo):
        return self


def gaussian_pairs(information, dim, count):
    """(z, n), each (count, dim), of known I(z;n): dim pairs of Gaussians of one correlation."""
    square = -math.expm1(-2 * information / dim)  # I = -dim/2 log(1 - correlation^2)
    z = torch.randn(count, dim)
    return z, square**0.5 * z + (1 - square) ** 0.5 * torch.randn(count, dim)


# === Density ratio

@pytest.mark.parametrize("information, dim, within", [(0, 20, 0.05), (0.5, 1, 0.1),
                                                      (5, 20, 0.75)])
def test_information_of_correlated_gaussians(information, dim, within):
    z, n = gaussian_pairs(information, dim, 60_000)
    ours = density_ratio_information(PairCritic(dim), z, n, lr=5e-3, steps=600, patience=200)
    assert ours["plug_in"] == pytest.approx(information, abs=within)
    for bound in ("donsker_varadhan", "info_nce"):
        assert information - 2 * within < ours[bound] < information + within / 2


@pytest.mark.parametrize("scale, shift", [(100, 0), (1e-6, 0), (1, 10), (1, 100)])
def test_information_does_not_depend_on_units(scale, shift):
    z, n = gaussian_pairs(0.511, 1, 4000)
    ours = []
    for pairs in ((z, n), (scale * z + shift, scale * n + shift)):
        torch.manual_seed(0)
        ours.append(density_ratio_information(PairCritic(1), *pairs, **PARTS, steps=50, lr=5e-3))
    assert ours[0]["info_nce"] > 0.3
    assert ours[1]["info_nce"] == pytest.approx(ours[0]["info_nce"], abs=1e-3)


def test_information_of_rows_sorted_by_class():
    labels = torch.arange(5).repeat_interleave(800)
    one_hot = F.one_hot(labels).float()
    ours = density_ratio_information(PairCritic(5), one_hot, one_hot, **PARTS, steps=100)
    assert ours["info_nce"] == pytest.approx(math.log(5), abs=0.05)


def test_held_out_pairs_are_seen_in_no_training_step():
    z, n = gaussian_pairs(2, 5, 2000)
    critic = Recorder(5)
    density_ratio_information(critic, z, n, **PARTS, steps=2, batch=1000)
    trained = set(torch.cat(critic.seen[True]).unique(dim=0)[:, 0].tolist())
    held_out = set(critic.seen[False][-1][:, 0].tolist())
    assert len(held_out) == 500
    assert len(trained) == 1000
    assert not trained & held_out


def test_no_dependence_is_no_information():
    z, n = gaussian_pairs(2, 5, 3000)
    ours = density_ratio_information(PairCritic(5), z, n.roll(1, 0), **PARTS, steps=100)
    assert ours["info_nce"] <= 0.02


def test_the_input_gets_no_gradient():
    z, n = gaussian_pairs(2, 5, 1500)
    z.requires_grad_()
    density_ratio_information(PairCritic(5), z, n, **PARTS, steps=2)
    assert z.grad is None


def test_without_shuffle_the_last_pairs_are_held_out():
    z, n = gaussian_pairs(2, 5, 4000)
    n[-500:] = torch.randn(500, 5)  # independent of their z
    found = {shuffle: density_ratio_information(PairCritic(5), z, n, steps=300, shuffle=shuffle,
                                                **PARTS)["info_nce"] for shuffle in (True, False)}
    assert found[True] > 0.7
    assert found[False] < 0.1


def test_the_best_state_is_kept_and_the_training_stops():
    class Spoiled(nn.Module):  # good until its 100th training step
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, z, n):
            self.seen += self.training
            return (self.scale if self.seen <= 100 else -self.scale) * (z @ n.T)

    z, n = gaussian_pairs(2, 5, 1000)
    net = Spoiled()
    ours = density_ratio_information(net, z, n, validation=300, held_out=300, patience=200)
    assert net.seen in (50, 100)
    assert ours["info_nce"] > 0.5


@pytest.mark.parametrize("training", [True, False])
def test_the_critic_is_trained_in_train_and_its_mode_kept(training):
    z, n = gaussian_pairs(2, 5, 1500)
    critic, modes = PairCritic(5).train(training), []
    critic.z.eval()
    critic.register_forward_pre_hook(lambda module, _: modes.append(module.z.training))
    density_ratio_information(critic, z, n, **PARTS, steps=60)
    assert modes[:49] == [True] * 49
    assert (critic.training, critic.z.training) == (training, False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch": 1}, {"patience": 0}, {"lr": 0},
                                     {"held_out": 1}, {"validation": 1}, {"held_out": 2000}])
def test_impossible_options_are_refused(options):
    z, n = gaussian_pairs(2, 5, 1500)
    with pytest.raises(ValueError):
        density_ratio_information(PairCritic(5), z, n, **PARTS | options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_pairs_that_are_not_finite_are_refused(which, value):
    pairs = gaussian_pairs(2, 5, 1500)
    pairs[which][-1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        density_ratio_information(PairCritic(5), *pairs, **PARTS)


def test_scores_that_are_not_finite_end_the_training():
    class Broken(PairCritic):
        def forward(self, z, n):
            return super().forward(z, n) * math.nan

    with pytest.raises(FloatingPointError):
        density_ratio_information(Broken(5), *gaussian_pairs(2, 5, 1500), **PARTS, steps=1)


@pytest.mark.parametrize("few", [slice(1, None), slice(900)])
def test_too_few_pairs_are_refused(few):
    z, n = gaussian_pairs(2, 5, 1500)
    with pytest.raises(ValueError, match="pairs"):
        density_ratio_information(PairCritic(5), z[few], n if few.start else n[few], **PARTS)


def test_scores_of_single_pairs_are_refused():
    z, n = gaussian_pairs(2, 5, 1500)
    with pytest.raises(ValueError, match="every pair"):
        density_ratio_information(nn.Bilinear(5, 5, 1), z, n, **PARTS)


def test_estimates_of_scores_written_by_hand():
    scores = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 0.5], [-2.0, 0.0, 1.0]])
    ours = _ratio_estimates(scores)
    wrong = [0.0, -1.0, 1.0, 0.5, -2.0, 0.0]
    assert ours["plug_in"] == pytest.approx(2.0)
    assert ours["donsker_varadhan"] == pytest.approx(2 - math.log(sum(map(math.exp, wrong)) / 6))
    info_nce = scores.log_softmax(1).diagonal().mean().item() + math.log(3)
    assert ours["info_nce"] == pytest.approx(info_nce)


# === Total correlation

def gaussian(count=100_000):
    """(samples (count, 4), their exact total correlation)."""
    a = torch.randn(4, 4, dtype=torch.double)
    covariance = a @ a.T + torch.eye(4)
    exact = 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance))
    normal = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    return normal.sample((count,)), exact.item()


def test_total_correlation_of_a_gaussian():
    z, exact = gaussian()
    assert total_correlation(z).item() == pytest.approx(exact, abs=0.01)


def test_independent_columns_have_no_total_correlation():
    assert total_correlation(torch.randn(100_000, 3)).item() == pytest.approx(0, abs=1e-3)


def test_total_correlation_does_not_depend_on_units():
    z, _ = gaussian(1000)
    units = torch.tensor([1e-200, 1e150, 1.0, -7.0], dtype=torch.double)
    ours = total_correlation(units * (z + 2)).item()
    assert ours == pytest.approx(total_correlation(z).item(), rel=1e-9)


@pytest.mark.parametrize("constant", [3.0, 0.1])
def test_constant_columns_do_not_count(constant):
    z, _ = gaussian(1000)
    padded = F.pad(z, (0, 1), value=constant).view(-1, 5, 1)
    assert total_correlation(padded).item() == pytest.approx(total_correlation(z).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 30])
@pytest.mark.parametrize("shift", [1, 100, 1000])
def test_a_linear_combination_of_columns_is_infinite(dtype, dim, shift):
    z = torch.randn(1000, dim, dtype=dtype)
    combined = torch.cat([z, z @ torch.randn(dim, 1, dtype=dtype) + shift], 1)
    assert total_correlation(combined).item() == math.inf


@pytest.mark.parametrize("rest", [1e-2, 1e-5])
def test_nearly_a_combination_is_finite(rest):
    z = torch.randn(100_000, 1)
    pair = torch.cat([z, z + rest * torch.randn(100_000, 1)], 1)
    assert total_correlation(pair).item() == pytest.approx(-math.log(rest), abs=0.02)


@pytest.mark.parametrize("shift", [0, 1000])
def test_a_shift_changes_no_total_correlation(shift):
    z, exact = gaussian()
    assert total_correlation((z + shift).float()).item() == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_columns_that_are_not_finite_are_refused(value):
    z = torch.randn(100, 3)
    z[5, 1] = value
    with pytest.raises(ValueError, match="finite"):
        total_correlation(z)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples"):
        total_correlation(torch.randn(4, 5))


# === Layers and labels

def test_a_dead_unit_holds_no_information():
    weight, x = torch.randn(3, 4), torch.randn(50, 4)
    alive = layer_information(weight[[0, 2]], 0.1, x)
    weight[1] = 0
    assert layer_information(weight, 0.1, x).item() == pytest.approx(alive.item())


def test_a_unit_without_noise_holds_infinite_information():
    alpha = torch.tensor([[0.1, 0.1], [0.0, 0.0]])
    assert layer_information(torch.ones(2, 2), alpha, torch.randn(50, 2)).item() == math.inf


def test_layer_information_does_not_depend_on_units():
    weight, x = torch.randn(3, 4), torch.randn(50, 4)
    ours = layer_information(1e-15 * weight, 0.1, 1e-20 * x).item()
    assert ours == pytest.approx(layer_information(weight, 0.1, x).item())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_layers_that_are_not_finite_are_refused(which):
    arguments = [torch.randn(3, 4), torch.full((3, 4), 0.1), torch.randn(50, 4)]
    arguments[which][1, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        layer_information(*arguments)


def test_layer_information_by_hand():
    x, alpha = torch.tensor([[1.0], [3.0]]), math.log(2)  # noise 1 and 9, variance 1
    ours = layer_information(torch.ones(1, 1), alpha, x).item()
    assert ours == pytest.approx(0.5 * (math.log(1 + 5) - math.log(9) / 2))


WEIGHT, X = torch.randn(3, 4), torch.randn(50, 4)
REFUSED = {
    "a logarithm as alpha": lambda: layer_information(WEIGHT, -6.0, X + 3),
    "infinite noise": lambda: layer_information(WEIGHT, 800.0, X),
    "no samples": lambda: layer_information(WEIGHT, 0.1, X[:0]),
    "tokens": lambda: layer_information(WEIGHT, 0.1, X.view(10, 5, 4)),
    "weights of a convolution": lambda: layer_information(WEIGHT[:, :, None, None], 0.1,
                                                          X[:, :, None, None]),
    "a vector of weights": lambda: layer_information(WEIGHT[0], 0.1, X[0]),
    "an alpha for each unit": lambda: layer_information(WEIGHT, torch.full((3,), 0.1), X),
    "alpha of each weight": lambda: layer_information_bound(3, torch.full((3, 4), 0.1)),
    "seven alphas of three units": lambda: layer_information_bound(3, torch.full((7,), 0.1)),
    "a negative number of units": lambda: layer_information_bound(-3, 0.1),
    "no alpha": lambda: layer_information_bound(3, torch.zeros(0)),
    "alpha nan": lambda: g(math.nan),
    "no weights": lambda: alpha_from_information(5.0, 0),
    "infinite information": lambda: alpha_from_information(-math.inf, 10),
    "a number of weights that is nan": lambda: alpha_from_information(5.0, math.nan),
    "infinite beta": lambda: flat_minimum_bound(WEIGHT, 1.0, math.inf),
    "a weight that is nan": lambda: flat_minimum_bound(WEIGHT * math.nan, 1.0, 1.0),
    "weights that are all 0": lambda: flat_minimum_bound(0 * WEIGHT, 1.0, 1.0),
    "no labels": lambda: label_information(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    "no samples of z": lambda: total_correlation(torch.ones(0, 3)),
    "infinitely many samples": lambda: pac_bayes_bound(0.1, 5.0, math.inf),
    "no curvature": lambda: flat_minimum_bound(WEIGHT, 0.0, 1.0),
    "no beta": lambda: flat_minimum_bound(WEIGHT, 1.0, 0.0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_impossible_inputs_are_refused(what):
    with pytest.raises(ValueError):
        REFUSED[what]()


def test_the_bound_is_a_sum_over_units():
    ours = layer_information_bound(2, torch.tensor([0.1, 2.0])).item()
    assert ours == pytest.approx((g(0.1) + g(2.0) + 2).item())


def test_a_channel_has_one_alpha_at_all_its_positions():
    alpha = torch.tensor([0.1, 2.0])
    ours = layer_information_bound(6, alpha).item()
    assert ours == pytest.approx(3 * layer_information_bound(2, alpha).item())


def test_flat_minimum_bound_of_half_precision():
    weight = torch.full((300,), 30.0)
    ours = flat_minimum_bound(weight.half(), 1.0, 1.0).item()
    assert ours == pytest.approx(flat_minimum_bound(weight, 1.0, 1.0).item())


@pytest.mark.parametrize("labels, nats", [(torch.arange(10).repeat(20), math.log(10)),
                                          (torch.tensor([0, 0, 0, 1]), 0.5623)])
def test_certain_logits_tell_the_entropy_of_the_labels(labels, nats):
    ours = label_information(F.one_hot(labels) * 50.0, labels).item()
    assert ours == pytest.approx(nats, abs=1e-4)


def test_uniform_logits_tell_nothing():
    labels = torch.arange(10).repeat(20)
    assert label_information(torch.zeros(200, 10), labels).item() == pytest.approx(0, abs=1e-6)


def test_label_information_of_a_noisy_channel():
    p, n = 0.7, 200_000  # right with probability p, else uniform over the rest
    x = torch.randint(10, (n,))
    y = torch.where(torch.rand(n) < p, x, (x + torch.randint(1, 10, (n,))) % 10)
    channel = torch.full((10, 10), (1 - p) / 9).fill_diagonal_(p)
    exact = math.log(10) + p * math.log(p) + (1 - p) * math.log((1 - p) / 9)
    assert label_information(channel.log()[x], y).item() == pytest.approx(exact, abs=0.01)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        label_information(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1]))


@torch.no_grad()
def test_a_discriminator_is_trained_without_gradients_outside():
    z, n = gaussian_pairs(1.0, 1, 3000)
    assert density_ratio_information(PairCritic(1), z, n, steps=300, **PARTS)["info_nce"] > 0.5


def test_a_column_far_from_0_does_not_hide_the_correlation_of_others():
    z = torch.randn(5000, 1, dtype=torch.double) + 0.005 * torch.randn(5000, 9, dtype=torch.double)
    far = 20_000 + 0.1 * torch.randn(5000, 1, dtype=torch.double)
    both = torch.cat([z, far], 1).float()
    assert total_correlation(both).item() == pytest.approx(total_correlation(z).item(), abs=0.01)


def test_columns_of_one_dimension_and_small_integers_are_taken():
    assert total_correlation(torch.randn(50)).item() == 0
    labels = torch.arange(4)
    nats = label_information(torch.eye(4) * 50, labels.int())
    assert nats == label_information(torch.eye(4) * 50, labels)
