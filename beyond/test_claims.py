"""The verdicts of Figs. 3 to 5 and of hysteresis, on both sides of each threshold."""
import argparse
import math

import pytest


def fig3_verdicts(monkeypatch, by_width, by_beta, capped=33.0, gap=0.0):
    import fig3_width_beta as fig3
    monkeypatch.setattr(fig3, "GRID", {"cpu": dict(
        widths=(0.5, 1, 2), decays=(0.0,), beta_width=1, betas=tuple(by_beta),
        capped=((0.1, 0.0), (1.0, 0.0)))})
    rows = []
    for cell in sum(fig3.make_cells("cpu"), []):
        error = capped if "max_log_alpha" in cell and cell["beta"] == 1 else (
            by_beta[cell["beta"]] if "beta" in cell else by_width[cell["width"]])
        beta, right = cell.get("beta", 0), 1 - error / 100
        rows.append(cell | dict(
            status="ok", seed=0, n=10, information=10.0, train_acc=1.0, test_acc=right,
            test_acc_sampled=right, test_acc_average=right, cross_entropy_batch=1.0,
            objective=1 + beta + gap * (beta == 0.1)))
    assert not fig3.claims(fig3.add_derived(rows[-1:]), "cpu")
    return fig3.claims(fig3.add_derived(rows), "cpu")


def test_fig3_claims_can_hold_and_fail(monkeypatch):
    u, falling = {0.01: 30.51, 0.1: 30, 1.0: 30.51}, {0.5: 30, 1: 20, 2: 19.49}

    def verdicts(widths={}, betas={}, **more):
        table = fig3_verdicts(monkeypatch, falling | widths, u | betas, **more)
        return [row["holds"] for row in table]

    assert fig3_verdicts(monkeypatch, falling, u)[5]["ours"] == "33.0%, best 30.0%"  # one seed
    for widest, plateau in ((19.49, "undecided"), (19.51, "yes"), (21.49, "yes"), (21.51, "NO")):
        assert verdicts({2: widest}, capped=32.9) == [plateau] + ["yes"] * 6
    assert verdicts({1: 29.51}, capped=32.9)[1] == "NO"
    for betas in ({0.01: 30.49}, {1.0: 30.49}, {0.1: 30.52}):
        assert verdicts(betas=betas)[2:5] == ["NO"] * 3
    assert verdicts(capped=33.1)[5] == "NO"
    assert verdicts(gap=0.029)[6] == "yes" and verdicts(gap=0.031)[6] == "NO"


@pytest.mark.parametrize("kind", ["", "_sampled", "_average"])
def test_fig3_judges_each_prediction_by_its_own_errors(monkeypatch, kind):
    import fig3_width_beta as fig3
    monkeypatch.setattr(fig3, "GRID", {"cpu": dict(widths=(), decays=(), beta_width=1,
                                                   betas=(0.1, 1.0, 10.0), capped=((10.0, 0.0),))})
    rows = [dict(cell, status="ok", seed=0, n=1, information=1.0, objective=1.0, train_acc=1.0,
                 cross_entropy_batch=1.0, test_acc=0.5, test_acc_sampled=0.5, test_acc_average=0.5)
            | {"test_acc" + kind: 0.6 if cell["beta"] == 1 else 0.5}
            for cell in sum(fig3.make_cells("cpu")[:2], [])]
    table = fig3.claims(fig3.add_derived(rows), "cpu")[:3]
    assert [row["holds"] == "yes" for row in table] == [k == kind for k in fig3.KINDS]


def test_fig3_chooses_the_beta_of_a_seed_on_the_other_seeds(monkeypatch):
    import fig3_width_beta as fig3
    monkeypatch.setattr(fig3, "GRID", {"demo": dict(widths=(), decays=(), beta_width=1,
                                                    betas=(0.01, 0.1, 0.3, 1.0), capped=())})

    def verdict(*errors):
        rows = [cell | dict(status="ok", seed=seed, n=1, information=1.0, train_acc=1.0,
                            test_acc=1 - error / 100)
                for seed, own in enumerate(errors)
                for cell, error in zip(fig3.make_cells("demo")[0], own)]
        return fig3.claims(fig3.add_derived(rows), "demo")[0]["holds"]

    assert verdict((30, 29, 30, 40), (30, 30, 29, 40)) == "NO"  # no beta is best in both
    assert verdict((30, 29, 30, 40), (30, 29, 30, 40)) == "yes"


def test_fig4_claims_can_hold_and_fail(monkeypatch):
    import fig4_cluttered_mnist as fig4
    monkeypatch.setattr(fig4, "GRID", {"cpu": (0.001, 1.0, 10.0)})

    def verdicts(low={}, high={}, longer=(), wider=()):
        rows = [dict(status="ok", seed=0, beta=beta, i_zn_positions=nats, i_zn_nce=nats - 0.1,
                     i_zy=2.2, total_correlation=nats, tc_share=nats, i_xz=nats)
                | changes for beta, nats, changes in (
                    (0.001, 3.0, {"decoder_steps": 16_000} | low), (1.0, 1.0, high),
                    (10.0, 0.5, {}))]
        first, middle, last = rows
        rows += [first | {"decoder_steps": 8000, "i_zn_positions": 99.0}]  # not twice as many
        rows += [row | {"decoder_steps": 2 * row.get("decoder_steps", 4000),
                        "i_zn_positions": nats} for row, nats in zip((first, last), longer)]
        rows += [row | {"width": 0.25, "i_zn_positions": nats}
                 for row, nats in zip((first, middle), wider)]
        return [row["holds"] for row in fig4.claims(rows, "cpu")]

    assert verdicts() == verdicts(longer=[99], wider=[99]) == ["yes"] * 7
    assert verdicts(longer=(3.1, 0.52), wider=(3.2, 1.06)) == ["yes"] * 9
    assert verdicts(longer=(3.1, 0.53), wider=(3.2, 1.04))[4:6] == ["NO", "NO"]
    assert verdicts(longer=(3.2, 0.52), wider=(3.1, 1.06))[4:6] == ["NO", "NO"]
    for position, (row, key, fails, holds) in enumerate((
            ("high", "i_zn_positions", 1.51, 1.49), ("high", "i_zn_positions", 0.49, 0.51),
            ("high", "i_zn_nce", 1.46, 1.44), ("high", "i_zn_nce", 0.39, 0.41),
            ("high", "i_zy", 2.04, 2.06), ("high", "i_xz", 5.01, 4.99),
            ("high", "tc_share", 3.01, 2.99))):
        assert verdicts(**{row: {key: fails}})[position] == "NO", key
        assert verdicts(**{row: {key: holds}})[position] == "yes", key
    assert verdicts(high={"status": "diverged"}) == []


def test_fig5_claims_can_hold_and_fail(monkeypatch):
    import fig5_celeba_vae as fig5
    monkeypatch.setattr(fig5, "GRID", {"cpu": (0.0, 0.1, 0.7)})
    args = argparse.Namespace(scale="cpu", dataset="celeba")

    def verdicts(outside=0.4, inside=0.5, picture=0.6, attributes=0.8, agreement=0.9):
        first = dict(status="ok", seed=0, beta=0.1, picture_nats=1.0, picture_nats_outside=1.0,
                     picture_nats_inside=1.0, attribute_nats=1.0, attribute_agreement=0.9,
                     majority_acc=0.8)
        last = first | dict(beta=0.7, picture_nats=picture, picture_nats_outside=outside,
                            picture_nats_inside=inside, attribute_nats=attributes,
                            attribute_agreement=agreement)
        return [row["holds"] for row in fig5.claims([first, last], args)]

    assert verdicts() == ["yes"] * 4
    assert verdicts(picture=0.66, attributes=0.67, inside=0.41, agreement=0.881) == ["yes"] * 4
    assert verdicts(picture=0.67) == ["NO", "yes", "yes", "yes"]
    assert verdicts(attributes=0.59)[1] == verdicts(inside=0.39)[2] == "NO"
    assert verdicts(agreement=0.879)[3] == "NO"


def test_hysteresis_claims_can_hold_and_fail():
    from beyond import hysteresis

    def rows(cell, seed, down, star, up):  # where the branches cross 55%, and the largest r
        betas = (0.01, 0.3, 0.4, 1.2)
        edge = up if cell["start"] == "memorised" else down
        acc = [0.55 + 0.45 * (1 if beta < edge else -1) for beta in betas]
        return cell | dict(status="ok", seed=seed, betas=betas, train_acc_batch=acc,
                           cross_entropy_batch=[1.0] * 4, nats=[(math.log(10) - 1) / star] * 4)

    def verdicts(*edges):
        grid = dict(sizes=(300,), steps=(300, 1000, 3000)[:len(edges)])
        of_steps = dict(zip(grid["steps"], edges))
        made = [rows(cell, seed, *of_steps[cell["steps"]])
                for cell in hysteresis.make_cells(grid) for seed in (0, 1)]
        return [row["holds"] for row in hysteresis.claims(made, grid)]

    assert verdicts((0.02, 0.5, 0.6), (0.35, 0.54, 0.6)) == ["yes"] * 4
    assert verdicts((0.02, 0.5, 0.6), (0.35, 0.56, 0.6)) == ["yes", "yes", "NO", "yes"]
    assert verdicts((0.02, 0.5, 0.6), (0.02, 0.5, 0.35)) == ["yes", "NO", "NO", "NO"]
    assert verdicts((0.02, 0.5, 0.6), (0.02, 0.5, 1.3))[1:3] == ["NO", "NO"]  # memory never ends
    for last, holds in ((0.69, "yes"), (0.71, "NO")):  # of three, the last two decide
        assert verdicts((0.02, 0.5, 0.6), (0.2, 0.65, 0.7), (0.25, last, 0.72))[3] == holds
    assert verdicts((0.001, 0.5, 0.6), (0.001, 0.5, 1.3)) == ["yes", "NO", "NO"]
    assert hysteresis.claims([], dict(sizes=(300,), steps=(300, 1000))) == []
