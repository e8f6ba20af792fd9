"""Estimators where the answer is known, synthetic digits, in part by training. pytest beyond."""
import argparse
import copy
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (_ratio_estimates, accuracy, bn_recalibrated, density_ratio_information,
                    label_information, predict, synthetic_digits, to_stochastic, total_correlation)

torch.set_num_threads(1)


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


def gaussian_pairs(information, dim, count):
    """(z, n), each (count, dim), of known I(z;n): dim pairs of Gaussians of one correlation."""
    square = -math.expm1(-2 * information / dim)  # I = -dim/2 log(1 - correlation^2)
    z = torch.randn(count, dim)
    return z, square**0.5 * z + (1 - square) ** 0.5 * torch.randn(count, dim)


@pytest.mark.parametrize("information, dim, within", [(0, 20, 0.05), (0.5, 1, 0.1),
                                                      (5, 20, 0.75)])
def test_density_ratio_information_of_correlated_gaussians(information, dim, within):
    z, n = gaussian_pairs(information, dim, 60_000)
    ours = density_ratio_information(PairCritic(dim), z, n, lr=5e-3, steps=800, patience=200)
    assert ours["plug_in"] == pytest.approx(information, abs=within)
    for bound in ("donsker_varadhan", "info_nce"):
        assert information - 2 * within < ours[bound] < information + within / 2


def test_density_ratio_information_measures_what_it_was_given():
    z, n = gaussian_pairs(2, 5, 3000)
    z.requires_grad_()
    critic, parts = PairCritic(5), dict(validation=500, held_out=500)

    def estimate(n):
        torch.manual_seed(0)
        net = copy.deepcopy(critic)
        return density_ratio_information(net, z, n, **parts, steps=60, batch=64)

    ours = estimate(n)
    assert z.grad is None and estimate(n) == ours
    # what was learned does not hold of the held-out pairs
    shuffled = torch.cat([n[:-500], n[-500:].roll(1, 0)])
    assert estimate(shuffled)["info_nce"] < 0 < ours["info_nce"]
    for arguments in ((z[:-1], n), (z[:900], n[:900])):
        with pytest.raises(ValueError, match="pairs"):
            density_ratio_information(critic, *arguments)
    with pytest.raises(ValueError, match="every pair"):
        density_ratio_information(nn.Bilinear(5, 5, 1), z, n, **parts)
    with pytest.raises(FloatingPointError):
        density_ratio_information(critic, z * math.nan, n, **parts, steps=1)


def test_density_ratio_information_keeps_the_best_state_and_stops():
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
    assert net.seen in (50, 100) and ours["info_nce"] > 0.5


def test_synthetic_digits_are_worth_training_on():
    (x, y), (x_test, y_test) = synthetic_digits(2500, seed=0), synthetic_digits(1000, seed=1)
    x, x_test, right = x.float() / 255, x_test.float() / 255, []
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10))
    for model in (cnn, nn.Sequential(nn.Flatten(), nn.Linear(784, 10))):
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for index in (part for _ in range(4) for part in torch.randperm(2500).split(50)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        right.append(accuracy(model.eval()(x_test), y_test))
    assert right[0] > 0.9 and right[1] < right[0] - 0.2


def test_label_information():
    labels, two = torch.arange(10).repeat(20), torch.tensor([0, 0, 0, 1])
    for y, nats in ((labels, math.log(10)), (two, 0.5623)):  # H(y) is theirs, not log 2
        assert label_information(F.one_hot(y) * 50.0, y).item() == pytest.approx(nats, abs=1e-4)
    assert label_information(torch.zeros(200, 10), labels).item() == pytest.approx(0, abs=1e-6)
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
    normal = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    z = F.pad(normal.sample((100_000,)), (0, 1), value=3.0)
    z = z.view(-1, 5, 1) * 7 + 2  # scale, shift, constants do not matter
    assert total_correlation(z).item() == pytest.approx(exact.item(), abs=0.01)
    assert total_correlation(torch.randn(100_000, 3)).item() == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="samples"):
        total_correlation(torch.randn(4, 5))


def test_ratio_estimates_of_scores_written_by_hand():
    scores = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 0.5], [-2.0, 0.0, 1.0]])
    ours = _ratio_estimates(scores)
    wrong = [0.0, -1.0, 1.0, 0.5, -2.0, 0.0]
    assert ours["plug_in"] == pytest.approx(2.0)
    assert ours["donsker_varadhan"] == pytest.approx(2 - math.log(sum(map(math.exp, wrong)) / 6))
    info_nce = scores.log_softmax(1).diagonal().mean().item() + math.log(3)
    assert ours["info_nce"] == pytest.approx(info_nce)


def test_named_reads_what_a_half_tells_beyond_the_other():
    from beyond import named
    y = torch.randint(2, (6000, 6))
    y[:, 2] = y[:, 0]  # of half B, told by half A
    half = named.halves("synthetic", 6, "cpu")
    assert half["A"].tolist() == [0, 1, 5] and half["B"].tolist() == [2, 3, 4]
    z = torch.cat([8.0 * y[:, [2, 3]] - 4, torch.randn(6000, 6)], 1) + torch.randn(6000, 8)
    s = dict(components=8, penalties=(0.001, 0.1))
    row = named.read_attributes(z[:4000], z[4000:], y[:4000], y[4000:], half, s)
    for key, value in ("beyond_A", 0), ("beyond_B", 1):  # times log 2
        assert row[key] == pytest.approx(value * 0.693, abs=0.05), key


def test_fig4_position_information_is_known_for_all_and_for_nothing():
    """A square's place shown on 25x25 of the 28x28 pixels is all of log 625; noise is nothing."""
    import fig4_cluttered_mnist as fig4
    s = dict(decoder_steps=80, test=400)
    places = torch.randint(625, (9000, 1))
    corner = torch.zeros(9000, 25, 25).flatten(1).scatter(1, places, 1.0).view(-1, 1, 25, 25)
    z = F.pixel_unshuffle(F.pad(corner, (0, 3, 0, 3)), 4)
    known, curve = fig4.position_information(z, places, s)
    nothing, _ = fig4.position_information(z, places.roll(1, 0), s | {"decoder_steps": 24})
    assert 0.9 * math.log(625) < known < math.log(625) and -0.1 < nothing < 0.05
    assert [step for step, _ in curve] == list(range(0, 81, 10))


def test_fig5_ridge_reads_the_nats_of_a_gaussian_channel_and_none_from_what_is_independent():
    import fig5_celeba_vae as fig5
    r2 = torch.tensor([0.9, 0.5, 0.1, 0.0])
    z, noise = torch.randn(8000, 30), torch.randn(8000, 4)
    target = 7 * (r2.sqrt() * z[:, :4] + (1 - r2).sqrt() * noise)

    def nats(z, n):
        return fig5.gaussian_nats(target[4000:], fig5.ridge(z[:n], target[:n], z[4000:]))
    assert nats(3 * z + 5, n=4000) == pytest.approx(-0.5 * (1 - r2).log().sum().item(), abs=0.06)
    assert abs(nats(torch.zeros(8000, 30), n=4000)) < 0.01
    unpenalised = -2 * np.log(300 / 180)  # expected of z that tells nothing, 120 columns, n = 300
    assert 0.1 * unpenalised < nats(torch.randn(8000, 120), n=300) < 0.05


def test_fig3_samples_one_net_for_all_images_and_averages_probabilities(monkeypatch):
    import fig3_width_beta as fig3
    seen = []
    monkeypatch.setattr(fig3, "predict", lambda *inputs: seen.append(predict(*inputs)) or seen[-1])
    torch.manual_seed(0)
    model = to_stochastic(fig3.all_cnn(1 / 32), log_alpha=0.0)
    x, label = torch.randn(20, 3, 32, 32), 3
    test = torch.randn(1, 3, 32, 32).expand(150, -1, -1, -1)  # one image, in two batches
    row = fig3.evaluate_draws(model, x, test, torch.full((150,), label), draws=3)
    for logits in seen:
        torch.testing.assert_close(logits, logits[:1].expand(150, -1))
    mean, *draws = (logits[0].softmax(0)[label] for logits in seen)
    assert len({probability.item() for probability in (mean, *draws)}) == 4
    draws = torch.stack(draws)
    assert row["test_nll"] == pytest.approx(-mean.log().item(), rel=1e-4)
    assert row["test_nll_sampled"] == pytest.approx(-draws.log().mean().item(), rel=1e-4)
    assert row["test_nll_average"] == pytest.approx(-draws.mean().log().item(), rel=1e-4)
    right = [float(logits[0].argmax() == label) for logits in seen]
    assert row["test_acc"] == right[0] and row["test_acc_sampled"] == np.mean(right[1:])
    average = torch.stack(seen[1:]).softmax(-1).mean(0)
    assert row["test_acc_average"] == float(average[0].argmax() == label)
    with bn_recalibrated(model, x.split(100), draw=False):
        torch.testing.assert_close(seen[0], predict(model, test))


@pytest.mark.parametrize("script, cell, width", [
    ("fig1_phase_transition", {"labels": "random"}, {"width": 1 / 16}),
    ("fig2_corrupted_labels", {"panel": "models"}, {"widths": {"Small AlexNet": 1 / 16}})])
def test_a_cell_may_have_a_peak_of_its_own(monkeypatch, script, cell, width):
    figure = importlib.import_module(script)
    peaks, args = [], argparse.Namespace(scale="demo", dataset="synthetic", data_dir="")
    tiny = figure.SETTINGS["demo"] | width | dict(steps=3, test=20, peak=0.7)
    monkeypatch.setitem(figure.SETTINGS, "demo", tiny)
    monkeypatch.setattr(figure, "beta_at", lambda t, beta, peak: peaks.append(peak) or beta)
    for own in ({}, {"peak": 0.5}):
        figure.train_cell(cell | {"n": 100, "beta": 0.1, "seed": 0} | own,
                          torch.device("cpu"), args, lambda *_: None)
    assert peaks == 3 * [0.7] + 3 * [0.5]
