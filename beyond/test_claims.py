"""What follows from rows, by small rows; the rows that are published. pytest beyond."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import fig1_phase_transition as fig1
import fig2_corrupted_labels as fig2
import fig3_width_beta as fig3
import fig4_cluttered_mnist as fig4
import fig5_celeba_vae as fig5
from common import corrupt_labels

HERE = Path(common.__file__).resolve().parent


def test_rows_are_summarised_over_seeds():
    rows = [{"status": "ok", "seed": s, "x": x, "y": float(x + s)} for s in (0, 1) for x in (1, 2)]
    rows += [{"status": "diverged", "seed": 2, "x": 1}]
    assert common.summarise(rows, "x", "y", seed=0) == [(1, 1.0, 0.0, 1), (2, 2.0, 0.0, 1)]
    assert common.summarise(rows, "x", "y")[0] == (1, 1.5, pytest.approx(0.5**0.5), 2)
    assert common.per_seed(len, rows).tolist() == [2, 2]
    assert [len(common.ok_rows(rows, **where)) for where in ({"x": 1}, {"z": None})] == [2, 4]
    assert common.fmt([1.0, 3.0]) == "2.00 ± 1.41"


@pytest.mark.parametrize("level, x", [(0.3, 10**1.5), (0.9, 1), (0.5, 10), (0.95, math.nan),
                                      (0.1, math.nan)])
def test_crossing_is_linear_in_log_x(level, x):
    points = [(1, 0.9), (10, 0.5), (100, 0.1)]
    assert common.crossing(points, level) == pytest.approx(x, nan_ok=True)


def fig1_row(beta, acc, nats=1.0, n=100, seed=0, test_acc=0.1):
    return dict(status="ok", n=n, beta=beta, seed=seed, train_acc=acc, information=nats,
                test_acc=test_acc, test_acc_sampled=acc - 0.05)


FALLING = [fig1_row(0.1, 0.9, 100.0), fig1_row(1.0, 0.5, 10.0), fig1_row(10.0, 0.1, 1.0)]
BY_N = FALLING + [row | {"n": 100 * factor, "information": factor * row["information"]}
                  for factor in (10, 100) for row in FALLING]
CURVE, = fig1.curves_of(FALLING)
TESTED = [fig1_row(beta, 0.9, test_acc=beta / 10) for beta in (1.0, 2.0, 3.0, 4.0, 5.0)]
TESTED += [fig1_row(beta, 0.9, seed=1, test_acc=0.0) for beta in (4.0, 5.0)]
CORRUPTED = [dict(status="ok", seed=0, kind=kind, corruption=fraction, wrong=wrong, rise=rise,
                  entropy=entropy) for kind, fraction, wrong, rise, entropy in (
    ("uniform", 0.0, 0.0, 0.0, 0.0), ("uniform", 0.1, 0.09, 0.5, 0.25),
    ("uniform", 1.0, 0.9, 2.0, 2.0), ("pair", 0.09, 0.09, 0.2, 0.3))]
FALL = [CORRUPTED[1] | {"rise": -0.5}, CORRUPTED[2]]
SIZES = [dict(status="ok", seed=seed, n=n, rise=rise)
         for n, seed, rise in ((300, 0, 1.0), (300, 1, 2.0), (1000, 0, 3.0), (3000, 1, 2.0))]
# test error of two seeds: the best beta is 1 by the first, 10 by the second
ERRORS = [dict(status="ok", seed=seed, beta=beta, test_error=error)
          for seed, errors in ((0, (50, 30, 40)), (1, (60, 45, 35)))
          for beta, error in zip((0.1, 1.0, 10.0), errors)]
STATES = [dict(beta=beta, cross_entropy=ce, nats=nats, objective=ce + beta * nats)
          for beta, ce, nats in ((0.1, 0.8, 4.0), (1.0, 0.9, 1.5))]
CLUTTER = [dict(status="ok", seed=0, beta=beta, i_zn_nce=nats, bound=bound)
           for beta, nats, bound in ((0.1, 8.0, 64.0), (1.0, 4.0, 16.0), (10.0, 2.0, 4.0))]
UNDER_NOISE = [row | {"i_zn_nce": row["i_zn_nce"] + 1.5, "noise": 0.5} for row in CLUTTER[1:]]
HARDLY_NOISE = [row | {"noise": 0.001} for row in UNDER_NOISE]  # the least that is tried
SHARES = [dict(beta=0.0, pixels=8.0, share_pixels=1.0, noise_pixels=1.0),
          dict(beta=2.0, pixels=2.0, share_pixels=0.25, noise_pixels=0.5)]
BASE = dict(attribute_nats=4.0, pixels=10.0, noise=[dict(attribute_nats=2.0, pixels=1.0)])
QUANTITIES = {
    "fig1: beta at an accuracy": (lambda: fig1.at_accuracy(FALLING, 0.3), 10**0.5),
    "fig1: beta at an accuracy on a step": (lambda: fig1.at_accuracy(FALLING, 0.5), 1.0),
    "fig1: beta at an accuracy, of two": (lambda: fig1.at_accuracy(FALLING[:2], 0.7), math.nan),
    "fig1: beta at an accuracy not reached": (lambda: fig1.at_accuracy(FALLING, 0.05), math.nan),
    "fig1: information at an accuracy": (
        lambda: fig1.at_accuracy(FALLING, 0.7, "information"), 10**1.5),
    "fig1: curves_of": (lambda: [curve["n"] for curve in fig1.curves_of(BY_N)],
                        [100, 1000, 10_000]),
    "fig1: edge": (lambda: CURVE["edge"], 10**-0.125),
    "fig1: fall_factor": (lambda: CURVE["fall_factor"], 10**1.5),
    "fig1: test accuracy of a curve": (lambda: CURVE["test_acc"], 0.1),
    "fig1: beta at 30%": (lambda: CURVE["beta_0.3"], 10**0.5),
    "fig1: information at 30%": (lambda: CURVE["information_0.3"], 10**0.5),
    "fig1: log_line": (lambda: CURVE["log_line"], 0.25 - 2),  # 40%
    "fig1: over_n": (lambda: fig1.over_n(BY_N, "information"), {
        100: [37], 1000: [370], 10_000: [3700]}),
    "fig1: over_n of nan": (lambda: fig1.over_n([CURVE | {"edge": math.nan}], "edge"), {}),
    "fig1: exponents": (lambda: fig1.exponents(BY_N, "information"), [1.0]),
    "fig1: exponents of two N": (lambda: fig1.exponents(BY_N[:6], "information"), []),
    "fig1: best_betas": (lambda: fig1.best_betas(TESTED), {"N = 100:": [3.0]}),
    "fig1: best_betas of few": (lambda: fig1.best_betas(TESTED[:4]), {}),
    "fig1: by_size": (lambda: fig1.by_size(BY_N[:5], "train_acc"), {
        "N = 100:": [0.9, 0.5, 0.1], "N = 1,000:": [0.9, 0.5]}),
    "fig1: from_size": (lambda: [row["n"] for row in fig1.from_size(BY_N, 10_000)], 3 * [10_000]),
    "fig1: overfitting": (lambda: fig1.add_derived(FALLING)[0]["overfitting"], 0.05),
    "fig2: transition": (lambda: fig2.transition(FALLING), 10 ** (0.35 / 0.4 - 1)),
    "fig2: steps_of_rise": (lambda: fig2.steps_of_rise(CORRUPTED[:3]), {
        "0 to 0.1:": [0.5], "0.1 to 1:": [1.5]}),
    "fig2: growth_of_rise": (lambda: fig2.growth_of_rise(SIZES), {
        "to N = 1,000:": [1.5], "to N = 3,000:": [-1.0]}),
    "fig2: pair_ratios": (lambda: fig2.pair_ratios(CORRUPTED), {"9% wrong:": [0.4]}),
    "fig2: entropy_spread": (lambda: fig2.entropy_spread(CORRUPTED[1:3]), [2.0]),
    "fig2: entropy_spread of a fall": (lambda: fig2.entropy_spread(FALL), [math.inf]),
    "fig3: caps by name": (lambda: list(map(fig3.cap_name, (-0.71, 0.0, 0.5, fig3.NO_CAP))), [
        "log α ≤ −0.71", "log α ≤ 0", "log α ≤ 0.5", "no cap"]),
    # each seed at the best beta of the other
    "fig3: rise_from_best": (lambda: fig3.rise_from_best(ERRORS, "test_error", 0.1), [10, 15]),
    "fig3: rise_from_best of one seed": (
        lambda: fig3.rise_from_best(ERRORS[:3], "test_error", 0.1), [20]),
    "fig3: gap_to_converged": (lambda: fig3.gap_to_converged(STATES), 1.2 - 1.05),
    "fig4: largest_rise": (lambda: fig4.largest_rise(CLUTTER, "i_zn_nce"), {"to β = 10:": [-2.0]}),
    "fig4: largest_rise of one β": (lambda: fig4.largest_rise(CLUTTER[:1], "i_zn_nce"), {}),
    "fig4: noise_excess": (lambda: fig4.noise_excess(CLUTTER, UNDER_NOISE, "i_zn_nce"), {
        "β = 1:": [1.5], "β = 10:": [1.5]}),
    "fig4: noise_excess of hardly any noise": (
        lambda: fig4.noise_excess(CLUTTER, HARDLY_NOISE, "i_zn_nce"), {
            "β = 1:": [math.nan], "β = 10:": [math.nan]}),
    "fig4: rank_correlation": (lambda: fig4.rank_correlation(CLUTTER, "bound", "i_zn_nce"), 1.0),
    "fig4: log_slope": (lambda: fig4.log_slope(CLUTTER, "bound", "i_zn_nce"), 0.5),
    "fig4: log_slope without information": (
        lambda: fig4.log_slope([row | {"i_zn_nce": 0.0} for row in CLUTTER], "bound", "i_zn_nce"),
        math.nan),
    "fig5: under_noise": (lambda: fig5.under_noise(BASE, 3.0, "pixels"), 5.5),
    "fig5: named": (lambda: fig5.named(dict(drawn_attributes=0.8, drawn_chance=0.6)), 0.5),
    "fig5: share of hardly anything": (lambda: fig5.ratio(0.05, 0.1), math.nan),
    "fig5: beyond_noise": (lambda: fig5.beyond_noise(SHARES, "pixels"), {"β = 2:": [0.25]}),
    "fig5: under_noise beyond all noise": (lambda: fig5.under_noise(BASE, 1.0, "pixels"), math.nan),
}


def lists(values):
    if isinstance(values, dict):
        return {name: np.atleast_1d(value).tolist() for name, value in values.items()}
    return values


@pytest.mark.parametrize("name", QUANTITIES)
def test_quantities_by_small_rows(name):
    quantity, expected = QUANTITIES[name]
    ours = lists(quantity())
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        ours, expected = sum(ours.values(), []), sum(expected.values(), [])
    assert ours == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("kind, fraction", [("uniform", 0.3), ("uniform", 1.0), ("pair", 0.45)])
def test_fig2_entropy_of_labels_is_that_of_corrupt_labels(kind, fraction):
    labels, generator = torch.zeros(200_000, dtype=torch.long), torch.Generator().manual_seed(0)
    noisy = corrupt_labels(labels, fraction, 10, generator, kind)
    entropy = torch.distributions.Categorical(noisy.bincount(minlength=10)).entropy().item()
    assert fig2.label_entropy(fraction, kind) == pytest.approx(entropy, abs=5e-3)


def edge(errors):
    """The beta at which the paper's train accuracy falls through 55%."""
    return common.crossing([(b, 100 - e) for b, e in zip(fig2.PAPER_BETAS, errors)], 55)


@pytest.mark.parametrize("text, of_errors", [
    (fig2.PAPER_LOW, lambda errors: f"{errors[0]:g}%"),
    (fig2.PAPER_HIGH, lambda errors: f"{max(errors):g}%"),
    (fig2.PAPER_EDGE, lambda errors: f"{edge(errors):.2g}")])
def test_fig2_numbers_of_the_paper_are_those_of_its_curves(text, of_errors):
    found = [f"{model} {of_errors(errors)}" for model, errors in fig2.PAPER_ERROR.items()]
    assert text == "; ".join(found)


def test_fig2_derives_what_the_rise_over_real_labels_is():
    cell = dict(status="ok", panel="corruption", n=100, kind="uniform", seed=0, train_acc=0.9)
    rows = fig2.add_derived([cell | {"corruption": 0.0, "information": 150.0},
                             cell | {"corruption": 1.0, "information": 390.0},
                             cell | {"corruption": 1.0, "information": 1.0, "seed": 1}])
    assert rows[1]["rise"] == pytest.approx(2.4)
    assert (rows[1]["error"], rows[1]["wrong"]) == (pytest.approx(10), 0.9)
    assert "rise" not in rows[2]  # of a seed without its real labels


def ideal_row(cell):
    """What the paper's claims expect of a cell of Fig. 1."""
    random, beta, n = cell["labels"] == "random", cell["beta"], cell["n"]
    memorised = beta < 0.9 if random else beta < 10 ** -2.8 * n
    acc = 0.95 if memorised else 0.1
    nats = 2.0 * n if random else 100.0 / beta**0.5
    return cell | dict(status="ok", seed=0, train_acc=acc, information=nats, steps=1,
                       test_acc=0.1 if random else 0.6 - 0.01 * abs(math.log(beta)),
                       test_acc_sampled=acc if memorised else 0.1)


def test_fig1_claims_hold_on_ideal_rows_and_fail_on_chance():
    rows = [ideal_row(cell) for cell in fig1.make_cells("cpu")]
    for row in rows:  # real labels are learned, not overfitted
        if row["labels"] == "real":
            row["train_acc"] = 0.6 if row["beta"] < 4 else 0.1
            row["test_acc_sampled"] = row["train_acc"]
    chance = [row | {"train_acc": 0.1} for row in rows]

    def verdicts(rows):
        derived = fig1.add_derived(rows)
        split = [[row for row in derived if row["labels"] == labels]
                 for labels in ("random", "real")]
        return {row["claim"]: row["holds"] for row in fig1.claims(*split) if row}

    ideal, none = verdicts(rows), verdicts(chance)
    for claim, holds in ideal.items():
        assert holds == "yes" or not claim.startswith("random labels"), claim
    for part, holds in (("memorised", "NO"), ("not learned", "yes"), ("through 55%", "undecided")):
        assert [v for claim, v in none.items() if part in claim and "random" in claim] == [holds]


@pytest.mark.parametrize("log_p, nats", [
    (torch.full((3, 625), -math.log(625)), 0),
    (torch.full((3, 625), -math.inf).index_fill(1, torch.tensor([7]), 0), 10 * math.log(625))])
def test_fig4_nats_of_positions_from_no_and_full_knowledge(log_p, nats):
    positions = torch.full((3, 10), 7)
    assert fig4.position_nats(log_p, positions).item() == pytest.approx(nats, abs=1e-4)


def test_fig4_the_control_claim_asks_what_noise_leaves_more():
    leaves_more = fig4.control_claim(CLUTTER, UNDER_NOISE, "i_zn_nce")
    clearer = [row | {"noise": 0.5} for row in CLUTTER[1:]]
    leaves_less = fig4.control_claim(UNDER_NOISE, clearer, "i_zn_nce")
    assert (leaves_more["holds"], leaves_less["holds"]) == ("yes", "NO")


def test_fig5_draws_that_know_nothing_agree_by_chance():
    y, logits = (torch.rand(50_000, 3) < 0.2).int(), torch.rand(50_000, 3) - 0.7
    chance = fig5.chance_agreement(logits, y)
    assert chance == pytest.approx(0.2 * 0.3 + 0.8 * 0.7, abs=0.01)
    assert fig5.agreement(logits, y) == pytest.approx(chance, abs=0.01)


def test_fig5_attributes_with_a_rare_value_are_left_out():
    attributes = torch.zeros(20, 4)
    attributes[:1, 0], attributes[:2, 1], attributes[:19, 2] = 1, 1, 1
    assert torch.equal(fig5.without_rare(attributes, torch.arange(20), 0.1), attributes[:, 1:2])


def test_fig5_claims_on_factors_are_not_made_without_factors():
    kept = {f"kept_{part}_colour": 0.5 for part in ("outside", "hair", "skin")}
    rows = [dict(status="ok", seed=0, beta=beta, share_named=1.0, **kept)
            for beta in fig5.GRID["cpu"]]
    for factors in (False, True):
        found = [row["claim"] for row in fig5.claims(rows, "cpu") if row]
        assert any("not named" in claim for claim in found) == factors
        rows = [row | {"share_not_named": 0.5} for row in rows]


def test_fig5_share_kept_of_the_same_and_of_another_mean():
    x = torch.randn(20_000, 3)
    assert fig5.share_kept(x, x) == pytest.approx(1)
    assert fig5.share_kept(x, torch.randn(20_000, 3) + 2) == pytest.approx(0, abs=0.02)
    # half of the variance is known: E|x - x^|^2 = 1 of 2
    known = torch.randn(20_000, 3)
    x, drawn = (known + torch.randn(20_000, 3) for _ in range(2))
    assert fig5.share_kept(x, drawn) == pytest.approx(0.5, abs=0.02)


def test_fig5_ridge_chooses_by_the_error_of_samples_left_out():
    torch.manual_seed(0)
    z, target, z_test = torch.randn(20, 5), torch.randn(20, 1), torch.randn(9, 5)
    target += z[:, :1]
    ours = fig5.ridge(z, target, z_test)
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, z_test = (z - mean) / std, (z_test - mean) / std

    def predict(rows, penalty, x):  # by the definition, with a free intercept
        centre, inputs = target[rows].mean(0), z[rows].mean(0)
        a = z[rows] - inputs
        weight = torch.linalg.solve(a.T @ a + penalty * 20 * torch.eye(5),
                                    a.T @ (target[rows] - centre))
        return centre + (x - inputs) @ weight

    errors = {}
    for penalty in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10):
        left_out = [predict([j for j in range(20) if j != i], penalty, z[i]) for i in range(20)]
        errors[penalty] = (torch.stack(left_out) - target).square().mean().item()
    best = min(errors, key=errors.get)
    assert 0.001 < best < 10
    assert torch.allclose(ours, predict(list(range(20)), best, z_test), atol=1e-4)


def test_fig1_claims_without_rows_are_not_made():
    assert [row for row in fig1.claims([], []) if row] == []


def test_no_published_row_is_from_a_dirty_tree():
    for path in (HERE / "results").rglob("*.jsonl"):
        for line in path.open():
            assert not json.loads(line)["git"].endswith("-dirty"), path
