"""Fig. 1: random labels are memorised below a critical beta and not above; real ones are learned.

    python fig1_phase_transition.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, 10 to 20 h on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's width, N to 50,000

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D), with random or
with real labels. The paper: on random labels it overfits for beta < 1 and underfits for beta > 1,
whatever N is; on real labels, information that suffices to fit without overfitting hardly grows
with N, so that the transition lies at a constant beta/N. You will see accuracy on random labels
fall to chance within a factor of two in beta, and real labels learned far beyond.

Every weight has noise of a learned variance, and its nats (1.44 bits each) count in I(w;D).
Protocol (results/protocols.md): Adam, the rates held for 60% of the steps; beta is raised from 0,
as nets that start at beta = 0.3 stay at chance; one below a peak passes it and comes down again.
Accuracy and cross-entropy are those of one sampled network, the mean over draws; test accuracy is
that of the mean network.
"""
import math
from functools import partial
from operator import itemgetter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (beta_at, cell_table, check, complete_curves, corrupt_labels, crossing,
                    draw_subset, evaluate, group_by, load_images, lr_factor, minibatches, normalise,
                    ok_rows, param_groups, parse_args, plot_points, run_grid, save_panels,
                    save_tables, summarise, to_stochastic, values_by, weight_information,
                    with_information)

# How a cell, one training run, is trained; stored in its row. It takes steps * max(1,
# N/300)^growth[labels]: a net needs more epochs to memorise many random labels than to learn real
# ones. lr: of the means of the weights, lr_noise: of the logarithm of their noise's variance.
# peak: a value that beta passes on the way to its own; the weights then end with less information.
# synthetic: training and test images of the set drawn by code; test: test images measured.
SHARED = dict(
    hold=0.6,  # until then the rates are held, as the noise has to follow a beta that moves
    draws=8,  # sampled networks that are measured
)
SETTINGS = {
    "demo": dict(width=1 / 8, steps=900, batch=100, lr=0.024, lr_noise=0.16, peak=0.3,
                 growth={"random": 0.6, "real": 0.3}, synthetic=(1000, 1000), test=1000, **SHARED),
    "cpu": dict(width=1 / 4, steps=5000, batch=100, lr=0.024, lr_noise=0.16, peak=0.7,
                growth={"random": 0.6, "real": 0.3}, synthetic=(50_000, 5000), test=5000,
                **SHARED),
    "paper": dict(width=1, steps=10_000, batch=100, lr=0.012, lr_noise=0.04, peak=0.5,
                  growth={"random": 0.4, "real": 0.4}, synthetic=(50_000, 10_000), test=10_000,
                  **SHARED),
}
SIZES, LARGE = (100, 300, 1000, 3000), (10_000, 30_000, 50_000)
RANDOM = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0)
REAL = (0.1, 0.3, 0.5, 0.9, 1.2, 2.0, 4.0, 10.0)
REAL_LARGE = (0.1, 0.5, 1.2, 4.0, 10.0, 20.0, 40.0, 80.0, 150.0)
LONGER = {"seed": 0, "longer": True}  # twice the steps: would more training change the result?
# curves: (labels, N, beta, what else their cells say). Cells without a seed are trained with all of
# --seeds; those of N >= 10,000 take hours at scale cpu. With fewer steps random labels stay at
# chance there.
GRID = {
    "demo": dict(curves=[("real", (1000,), (0.1, 1.0, 10.0), {}),
                         ("random", (100,), (0.1, 0.3, 0.5, 0.8, 1.2), {})]),
    "cpu": dict(curves=[
        ("real", SIZES, REAL, {}), ("random", SIZES, RANDOM, {}),
        ("real", LARGE, REAL_LARGE, {"seed": 0}), ("real", LARGE, REAL_LARGE, {"seed": 1}),
        ("random", (10_000,), (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.1),
         {"seed": 0, "steps_factor": 1.5}),
        ("random", (10_000,), (0.7,), LONGER | {"steps_factor": 3.0}),
        ("real", (10_000,), (4.0,), LONGER | {"steps_factor": 2}),
        ("real", (30_000, 50_000), (4.0, 40.0), LONGER | {"steps_factor": 2})]),
    "paper": dict(curves=[("real", SIZES, REAL, {}), ("real", LARGE, REAL_LARGE, {}),
                          ("random", SIZES + LARGE, RANDOM, {})]),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
REAL_DATA = ["cifar10", "mnist", "synthetic"]
DATASETS = {"demo": ["synthetic", "cifar10", "mnist"], "cpu": REAL_DATA, "paper": REAL_DATA}


class Shift(nn.Module):
    """x + a bias per channel, of a linear layer, so that it has noise and is counted."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Linear(1, channels, bias=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def small_alexnet(width=1.0, channels=3):
    """The paper's Small AlexNet, (n, channels, 28, 28) -> (n, 10)."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        # pooled before ReLU: the same, and cheaper
        nn.Conv2d(channels, conv, 5, padding=2, bias=False), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(conv, conv, 5, padding=2, bias=False),
        nn.BatchNorm2d(conv, affine=False), Shift(conv), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(conv * 49, fc1, bias=False),
        nn.BatchNorm1d(fc1, affine=False), Shift(fc1), nn.ReLU(),
        nn.Linear(fc1, fc2, bias=False),
        nn.BatchNorm1d(fc2, affine=False), Shift(fc2), nn.ReLU(),
        nn.Linear(fc2, 10, bias=False),
    )


def load_data(args):
    return load_images(args.dataset, args.data_dir, *SETTINGS[args.scale]["synthetic"])


def train_cell(cell, device, args, progress, information=weight_information, **changes):
    """Train and measure one net.

    For beyond/proper_prior.py: information, the penalty in nats; changes of the settings.
    """
    s, n, beta = SETTINGS[args.scale] | changes, cell["n"], cell["beta"]
    torch.manual_seed(cell["seed"])  # of the net and its noise; generator: of data and labels
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    if cell["labels"] == "random":
        y = corrupt_labels(y, 1.0, 10, generator)
    x, x_test = (normalise(images, mean, std, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = to_stochastic(small_alexnet(s["width"], x.shape[1]))
    model.to(device, memory_format=torch.channels_last)  # faster on a CPU
    forward = with_information(model, x[:s["batch"]], information)  # on a GPU a CUDA graph
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = s["steps"] * max(1, n / 300) ** s["growth"][cell["labels"]]
    steps = round(steps * cell.get("steps_factor", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step, index in zip(range(steps), minibatches(n, s["batch"], device)):
        logits, nats = forward(x[index])
        cross_entropy = F.cross_entropy(logits, y[index])
        beta_now = beta_at(step / steps, beta, s["peak"])
        loss = cross_entropy + beta_now / n * nats  # eq. 3, per sample, as ib_loss has it

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())  # ends the cell if it is not finite

    measured = evaluate(model, x, y, x_test, y_test, s["draws"])
    nats = information(model).item()
    objective = measured["cross_entropy"] + beta / n * nats
    return {"steps": steps, "objective": objective, "information": nats} | measured


# The paper's, digitised: the beta at which train accuracy on random labels falls through 55%, by
# N, and the log10 beta/N of its line on real labels.
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33,
                  48_000: 0.29}
PAPER_LINE = -2.8
MEMORISED = 0.55  # train accuracy on random labels: half of the way from chance to all
# Train accuracies on real labels at which nets of different N compare; claims name the last two.
FITS = (0.3, 0.4, 0.5)


# What follows from rows

def add_derived(rows):
    """The ok rows, with nats per sample, and train minus test accuracy of sampled networks."""
    rows = ok_rows(rows)
    for row in rows:
        row["nats"] = row["information"] / row["n"]
        row["overfitting"] = row["train_acc"] - row["test_acc_sampled"]
    return rows


def at_accuracy(rows, level, key="beta"):
    """The value of key where train accuracy falls through level as beta grows, or nan.

    nan of two beta, as they do not tell where.
    """
    points = [np.mean([(row[key], row["train_acc"]) for row in own], 0)
              for own in group_by(rows, "beta").values()]
    # linear in the logarithm of the value: while accuracy falls, beta and nats span decades
    return crossing(points, level) if len(points) > 2 else math.nan


def curves_of(rows):
    """A row for each curve over beta, of one N and seed; nan for accuracies that it does not pass.

    edge, beta_*, information_*: where train accuracy falls through 55%, or through each of FITS.
    """
    curves = []
    for (n, seed), own in group_by(rows, "n", "seed").items():
        curve = {"status": "ok", "n": n, "seed": seed, "edge": at_accuracy(own, MEMORISED),
                 "fall_factor": at_accuracy(own, 0.2) / at_accuracy(own, 0.8),
                 "test_acc": np.mean([row["test_acc"] for row in own])}
        for level in FITS:
            curve[f"beta_{level}"] = at_accuracy(own, level)
            curve[f"information_{level}"] = at_accuracy(own, level, "information")
        curve["log_line"] = math.log10(curve["beta_0.4"] / n)
        curves.append(curve)
    return curves


def from_size(rows, n):
    return [row for row in rows if row["n"] >= n]


def by_size(rows, key):
    """{"N = 100:": the value of each seed, ...}, as claims need it."""
    return {f"N = {n:,}:": values for n, values in values_by(rows, "n", key).items()}


def over_n(curves, key):
    """{N: mean over seeds}, without the N where it is nan."""
    return {n: mean for n, mean, *_ in summarise(curves, "n", key) if math.isfinite(mean)}


def best_betas(rows):
    """{"N = 100:": [the beta at which test accuracy, the mean over seeds, is best], ...}."""
    best = {}
    for (n,), own in group_by(rows, "n").items():
        curve = summarise(own, "beta", "test_acc")
        if len(curve) > 4:  # of fewer beta, the best says little
            beta, *_ = max(curve, key=itemgetter(1))
            best[f"N = {n:,}:"] = [beta]
    return best


def exponents(rows, key):
    """k of a fit of the value of key ~ N^k, of each seed that has three N or more."""
    slopes = []
    for own in group_by(rows, "seed").values():
        curve = over_n(own, key)
        if len(curve) > 2:  # through two points there is always a line
            slope, _ = np.polyfit(np.log(list(curve)), np.log(list(curve.values())), 1)
            slopes.append(slope)
    return slopes


def accuracy_map(ax, rows, key, title):
    """A panel of the paper: accuracy over log10 N and log10 beta/N."""
    from matplotlib.tri import Triangulation
    cells = group_by(rows, "n", "beta")
    x, y = np.log10([[n, beta / n] for n, beta in cells]).T
    accuracies = [np.mean([row[key] for row in own]) for own in cells.values()]
    # Triangles of neighbouring cells in log N and log beta = x + y, where the cells are a grid: in
    # the sheared axes of this panel, those of different beta would be joined.
    triangles = Triangulation(x, x + y).triangles
    colours = ax.tricontourf(Triangulation(x, y, triangles), accuracies,
                             np.linspace(0.12, 0.98, 44), cmap="coolwarm", extend="both")
    ax.figure.colorbar(colours, ax=ax, ticks=[0.2, 0.4, 0.6, 0.8])
    ax.plot(x, y, "k.", ms=2)
    ax.autoscale(False)  # the paper's line goes on to larger N than there may be here
    draw_line(ax, {n: 1 for n, _ in cells}, color="k", ls="--", lw=1, label="β = 1")
    ax.set(xlabel="log₁₀ N (dots: cells)", ylabel="log₁₀(β/N)", title=title)
    ax.invert_yaxis()  # small beta, where labels are memorised, at the top


def draw_line(ax, beta_by_n, name=None, **style):
    """A line over the map through {N: beta}; name: stands at its end."""
    if beta_by_n:
        x, y = np.log10([[n, beta / n] for n, beta in beta_by_n.items()]).T
        ax.plot(x, y, **style)
        if name:
            ax.annotate(name, (x[-1], y[-1]), xytext=(-3, 5), textcoords="offset points",
                        ha="right", bbox=dict(fc="w", ec="none", alpha=0.6, pad=0.5))


def legend_of_map(ax):
    ax.legend(loc="upper left", fontsize=8)  # where there are no cells


def random_map(ax, rows):
    accuracy_map(ax, rows, "train_acc", "train accuracy, random labels")
    draw_line(ax, PAPER_CROSSING, color="0.5", lw=2, label="55%, paper")
    draw_line(ax, over_n(curves_of(rows), "edge"), color="k", lw=2, label="55%, here")
    legend_of_map(ax)


def real_map(ax, rows):
    accuracy_map(ax, rows, "train_acc", "train accuracy, real labels")
    curves = curves_of(rows)
    for level in FITS:
        draw_line(ax, over_n(curves, f"beta_{level}"), f"{level:.0%}", color="k", lw=1)
    paper = {n: n * 10**PAPER_LINE for (n,) in group_by(rows, "n")}
    draw_line(ax, paper, color="0.5", lw=2, label="paper")
    legend_of_map(ax)


def test_map(ax, rows):
    accuracy_map(ax, rows, "test_acc", "test accuracy, real labels")
    legend_of_map(ax)


def accuracy_panel(ax, rows, key, title):
    """Accuracy against beta, a curve for each N."""
    from matplotlib import colormaps
    groups = group_by(rows, "n")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(groups)))
    for (n,), colour in zip(groups, colours):
        plot_points(ax, summarise(rows, "beta", key, n=n), color=colour, label=f"N = {n:,}")
    ax.axvline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", xlabel="β", title=title, ylim=(0, 1.02))
    ax.legend()


def information_panel(ax, random, real):
    """Information in the weights against N: where all is memorised (β = 0.1), and at equal fit."""
    for rows, style, labels in ((random, "C3o-", "random"), (real, "C0o-", "real")):
        plot_points(ax, summarise(rows, "n", "information", beta=0.1), style,
                    label=f"{labels} labels, β = 0.1")
    curves = curves_of(from_size(real, 1000))  # below, all is forgotten in one step
    for level, marker in zip(FITS, "vs^"):
        key = f"information_{level}"
        reached = [curve for curve in curves if math.isfinite(curve[key])]
        plot_points(ax, summarise(reached, "n", key), f"C0{marker}:",
                    label=f"real labels, {level:.0%} fitted")
    ax.set(xscale="log", yscale="log", xlabel="N", ylabel="I(w;D), nats",
           title="information in the weights")
    ax.legend()


def for_map(rows):
    """The rows of those N that have two beta or more; none of one N alone."""
    found = []
    for own in group_by([row for row in rows if row["beta"] > 0], "n").values():
        if len(group_by(own, "beta")) > 1:
            found += own
    return found if len(group_by(found, "n")) > 1 else []


def plot(random, real, complete, args):
    """complete: rows of complete curves, as a map of others would show what nobody measured."""
    panels = []
    if rows := for_map(ok_rows(complete, labels="random")):
        panels.append(partial(random_map, rows=rows))
    if rows := for_map(ok_rows(complete, labels="real")):
        panels.append(partial(real_map, rows=rows))
        panels.append(partial(test_map, rows=rows))
    if random:
        panels.append(partial(accuracy_panel, rows=random, key="train_acc",
                              title="train accuracy, random labels"))
    if len(group_by(ok_rows(random + real, beta=0.1), "n")) > 1:
        panels.append(partial(information_panel, random=random, real=real))
    if real:
        panels.append(partial(accuracy_panel, rows=real, key="test_acc",
                              title="test accuracy, real labels"))
    save_panels(panels, f"Fig. 1: Small AlexNet, {args.dataset}, scale {args.scale}", args)


def claims(random, real):
    """The paper's claims, the main ones first, of rows of complete curves over beta.

    Thresholds were set before these rows were trained.
    """
    random_curves, real_curves = curves_of(random), curves_of(real)
    random_01, random_12 = ok_rows(random, beta=0.1), ok_rows(random, beta=1.2)
    real_12, real_4 = ok_rows(real, beta=1.2), ok_rows(real, beta=4.0)
    from_1000 = from_size(real_curves, 1000)
    edges = over_n(random_curves, "edge").values()
    spread = [max(edges) / min(edges)] if len(edges) > 2 else []
    paper_edges = "; ".join(f"N = {n:,}: {beta:g}" for n, beta in PAPER_CROSSING.items())
    return [
        check("random labels, β = 0.1: memorised (train accuracy at least 90%)", "yes",
              by_size(random_01, "train_acc"), (0.9, 1)),
        check("random labels, β = 1.2: not learned (train accuracy at most 20%)", "yes",
              by_size(random_12, "train_acc"), (0, 0.2)),
        check("random labels: through 55% at a β from 0.5 to 1.1", paper_edges,
              by_size(random_curves, "edge"), (0.5, 1.1)),
        check("real labels, 40% fitted, N from 1,000: information ~ N^k, k below 0.5",
              "saturates", {"": exponents(from_1000, "information_0.4")}, (-math.inf, 0.5)),
        check("real labels, 40% fitted, N from 3,000: at log₁₀ β/N from −3.1 to −2.5",
              f"{PAPER_LINE}", by_size(from_size(real_curves, 3000), "log_line"), (-3.1, -2.5)),
        check("real labels, β = 1.2: sampled networks have train within 10 points of test", "yes",
              by_size(real_12, "overfitting"), (-math.inf, 0.1)),
        check("random labels: from 80% to 20% within a factor 2.5 in β", "about 10",
              by_size(random_curves, "fall_factor"), (1, 2.5)),
        check("random labels: the β at 55% changes with N by less than a factor 2", "4.5",
              {"": spread}, (1, 2)),
        check("random labels: test accuracy is chance (5 to 15%)", "yes",
              by_size(random_curves, "test_acc"), (0.05, 0.15), "{:.1%}"),
        check("random labels, β = 0.1: information ~ N^k, k from 0.9 to 1.1", "1",
              {"": exponents(random_01, "information")}, (0.9, 1.1)),
        check("real labels, 50% fitted, N from 1,000: information ~ N^k, k below 0.5",
              "saturates", {"": exponents(from_1000, "information_0.5")}, (-math.inf, 0.5)),
        check("real labels, β = 1.2, N from 1,000: learned (train accuracy over 40%)", "yes",
              by_size(from_size(real_12, 1000), "train_acc"), (0.4, 1)),
        check("real labels: test accuracy is best at a β from 0.5 to 2", "near 1",
              best_betas(real), (0.5, 2), "{:g}"),
        check("real labels, β = 4, N from 3,000: not overfitted", "yes",
              by_size(from_size(real_4, 3000), "overfitting"), (-math.inf, 0.1)),
    ]


def make_cells(scale):
    """The cheap ones first: small N."""
    cells = []
    for labels, sizes, betas, more in GRID[scale]["curves"]:
        cells += [{"labels": labels, "n": n, "beta": beta} | more for n in sizes for beta in betas]
    return sorted(cells, key=itemgetter("n"))


KEYS = {"labels": "labels", "N": "n", "β": "beta", "steps": "steps"}
COLUMNS = {"train": "train_acc", "cross-entropy": "cross_entropy", "I/N": "nats",
           "objective": "objective", "test, mean network": "test_acc",
           "test, sampled": "test_acc_sampled"}


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = make_cells(args.scale)
    rows = add_derived(run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data))
    random = ok_rows(rows, labels="random", longer=None)
    real = ok_rows(rows, labels="real", longer=None)
    longer = ok_rows(rows, longer=True)
    which = group_by(longer, "labels", "n", "beta", "seed")
    usual = [row for row in random + real
             if (row["labels"], row["n"], row["beta"], row["seed"]) in which]
    cells_of_curves = [cell for cell in cells if "longer" not in cell]
    complete = complete_curves(random + real, cells_of_curves, "labels", "n")
    plot(random, real, complete, args)
    save_tables(args, claims=claims(ok_rows(complete, labels="random"),
                                    ok_rows(complete, labels="real")),
                usual_and_twice_the_steps=cell_table(usual + longer, KEYS, COLUMNS),
                cells=cell_table(random + real, KEYS, COLUMNS))


if __name__ == "__main__":
    main()
