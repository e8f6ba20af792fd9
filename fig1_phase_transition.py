"""Fig. 1: random labels are memorised below a critical beta and not above it; real ones are learned.

    python fig1_phase_transition.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, 15 hours on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's width, N to 50,000

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D), with random or
with real labels. The paper: on random labels it overfits for beta < 1 and underfits for beta > 1,
whatever N is; on real labels, information that suffices to fit without overfitting hardly grows
with N, so that the transition lies at a constant beta/N. You will see accuracy on random labels
fall to chance within a factor of two in beta, and real labels learned far beyond.

Every weight has noise and is counted. Protocol (results/protocols.md): Adam, the rates held for
60% of the steps; beta is raised from 0 to a peak and then lowered to its value, as nets that start
at full beta stay at chance. Accuracy and cross-entropy are those of one sampled network, the mean
over draws; test accuracy is that of the mean network. alpha: variance of a weight's noise over its
squared mean; a nat is 1.44 bits.
"""
import math
from functools import partial
from operator import itemgetter

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.tri import Triangulation

from common import (beta_at, check, corrupt_labels, draw_subset, evaluate, fmt, group_by,
                    load_images, lr_factor, minibatches, normalise, ok_rows, param_groups,
                    parse_args, per_seed, plot_points, run_grid, save_panels, save_tables,
                    summarise, to_stochastic, weight_information, with_information)

# How a cell is trained, stored in its row. It takes steps * max(1, N/300)^growth.
SHARED = dict(growth=0.3, hold=0.6, draws=8)
SETTINGS = {
    "demo": dict(width=1 / 8, steps=2000, batch=50, lr=0.012, lr_noise=0.16, peak=0.5,
                 synthetic=(1000, 1000), test=1000, **SHARED),
    "cpu": dict(width=1 / 4, steps=5000, batch=100, lr=0.024, lr_noise=0.16, peak=0.7,
                synthetic=(50_000, 5000), test=5000, **SHARED),
    "paper": dict(width=1, steps=10_000, batch=100, lr=0.012, lr_noise=0.04, peak=0.5,
                  synthetic=(50_000, 10_000), test=10_000, **SHARED),
}
SIZES, LARGE = (100, 300, 1000, 3000), (10_000, 30_000, 50_000)
RANDOM = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0)
REAL = (0.1, 0.3, 0.5, 0.9, 1.2, 2.0, 4.0, 10.0)
REAL_LARGE = (0.1, 0.5, 1.2, 4.0, 10.0, 20.0, 40.0, 80.0, 150.0)
GRID = {  # {labels: {N: beta}}; longer: cells trained for twice the steps too, seed 0
    "demo": {"random": {100: (0.1, 0.3, 0.5, 0.8, 1.3)}, "real": {100: (0.1, 1.3, 10.0)},
             "longer": []},
    "cpu": {"random": dict.fromkeys(SIZES, RANDOM) | {10_000: (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.1)},
            "real": dict.fromkeys(SIZES, REAL) | dict.fromkeys(LARGE, REAL_LARGE),
            "longer": [("random", 10_000, 0.7), ("real", 10_000, 4.0), ("real", 30_000, 4.0),
                       ("real", 30_000, 40.0), ("real", 50_000, 4.0), ("real", 50_000, 40.0)]},
    "paper": {"random": dict.fromkeys(SIZES + LARGE, RANDOM),
              "real": dict.fromkeys(SIZES, REAL) | dict.fromkeys(LARGE, REAL_LARGE),
              "longer": []},
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
SEEDS_LARGE = {"random": [0], "real": [0, 1]}  # of the cells at scale cpu with N >= 10,000
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
    """Train and measure one net. information: the penalty, nats; changes: other settings."""
    s, n, beta = SETTINGS[args.scale] | changes, cell["n"], cell["beta"]
    torch.manual_seed(cell["seed"])
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
    forward = with_information(model, x[:s["batch"]], information)
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = round(s["steps"] * max(1, n / 300) ** s["growth"] * cell.get("steps_factor", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step, index in zip(range(steps), minibatches(n, s["batch"], device)):
        logits, nats = forward(x[index])
        cross_entropy = F.cross_entropy(logits, y[index])
        beta_now = beta_at(step / steps, beta, s["peak"])
        loss = cross_entropy + beta_now / n * nats  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())

    measured = evaluate(model, x, y, x_test, y_test, s["draws"])
    nats = information(model).item()
    objective = measured["cross_entropy"] + beta / n * nats
    return {"steps": steps, "objective": objective, "information": nats} | measured


# The paper's, digitised: beta where train accuracy on random labels falls through 55%, and its
# line at a constant beta/N on real labels.
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33,
                  48_000: 0.29}
PAPER_LINE = -2.8  # log10 beta/N
LEVELS = (0.3, 0.4, 0.5)  # train accuracies of equal fit on real labels
MAP_LABEL = {"train_acc": "train accuracy", "test_acc": "test accuracy"}


def beta_at_accuracy(rows, level):
    """The beta at which train accuracy first falls through level, linear in log beta; or nan."""
    return at_accuracy(rows, level, "beta")


def at_accuracy(rows, level, key):
    """The value of key there, its logarithm interpolated linearly in accuracy; or nan."""
    curve = [(group[0]["beta"], np.mean([row["train_acc"] for row in group]),
              np.mean([math.log(row[key]) for row in group]))
             for group in group_by(rows, "beta").values()]
    for (_, above, start), (_, below, end) in zip(curve, curve[1:]):
        if above >= level > below:
            return math.exp(start + (end - start) * (above - level) / (above - below))
    return math.nan


def fall_factor(rows):
    """By which factor in beta train accuracy falls from 80% to 20%."""
    return beta_at_accuracy(rows, 0.2) / beta_at_accuracy(rows, 0.8)


def growth_exponent(nats):
    """k of a fit of I ~ N^k to {N: I}; nan for fewer than two."""
    nats = {n: value for n, value in nats.items() if value > 0}
    if len(nats) < 2:
        return math.nan
    return float(np.polyfit(np.log(list(nats)), np.log(list(nats.values())), 1)[0])


def information_at_beta(rows, beta):
    """{N: nats} of one seed at this beta."""
    return {row["n"]: row["information"] for row in ok_rows(rows, beta=beta)}


def information_at_fit(rows, level):
    """{N: nats} of one seed where train accuracy falls through level."""
    return {n: at_accuracy(own, level, "information") for (n,), own in group_by(rows, "n").items()}


def overfitting(rows):
    """Train minus test accuracy of one sampled network."""
    return rows[0]["train_acc"] - rows[0]["test_acc_sampled"]


def by_size(rows, function, n_from=0):
    """{"N = 100": function of each seed's rows, ...}, for N from n_from on."""
    return {f"N = {n:,}": per_seed(function, own) for (n,), own in group_by(rows, "n").items()
            if n >= n_from}


def exponents(rows, nats_by_size):
    """{"": growth_exponent of each seed with two or more N}."""
    values = per_seed(lambda own: growth_exponent(nats_by_size(own)), rows)
    return {"": values[np.isfinite(values)]}


def accuracy_map(ax, rows, key):
    """A panel of the paper: accuracy over log10 N and log10 beta/N."""
    cells = group_by(rows, "n", "beta")
    x, y = np.log10([[n, beta / n] for n, beta in cells]).T
    value = [np.mean([row[key] for row in own]) for own in cells.values()]
    triangles = Triangulation(x, x + y).triangles  # of N and beta, whose cells are a grid
    colours = ax.tricontourf(Triangulation(x, y, triangles), value, np.linspace(0.12, 0.98, 44),
                             cmap="coolwarm", extend="both")
    ax.figure.colorbar(colours, ax=ax, ticks=[0.2, 0.4, 0.6, 0.8])
    ax.plot(x, y, "k.", ms=2)
    ends = np.array([2, max(x)])
    ax.plot(ends, -ends, "k--", lw=1)
    ax.annotate("β = 1", (ends[0], -ends[0]), xytext=(3, 3), textcoords="offset points")
    labels = rows[0]["labels"]
    ax.set(xlabel="log₁₀ N", ylabel="log₁₀(β/N)", title=f"{MAP_LABEL[key]}, {labels} labels")
    ax.invert_yaxis()


def random_map(ax, rows):
    accuracy_map(ax, rows, "train_acc")
    largest = max(row["n"] for row in rows)
    ours = {n: beta_at_accuracy(own, 0.55) for (n,), own in group_by(rows, "n").items()}
    paper = {n: beta for n, beta in PAPER_CROSSING.items() if n <= largest}
    for points, colour, name in ((paper, "0.45", "55%, paper"), (ours, "k", "55%, here")):
        x, y = np.log10([[n, beta / n] for n, beta in points.items()]).T
        ax.plot(x, y, color=colour, lw=2)
        ax.annotate(name, (x[-1], y[-1]), color=colour, ha="right", va="bottom")


def real_map(ax, rows):
    accuracy_map(ax, rows, "train_acc")
    for level in LEVELS:
        points = {n: beta_at_accuracy(own, level) for (n,), own in group_by(rows, "n").items()}
        x, y = np.log10([[n, beta / n] for n, beta in points.items()]).T
        ax.plot(x, y, "k", lw=1)
        if np.isfinite(y).any():
            last = np.flatnonzero(np.isfinite(y))[-1]
            ax.annotate(f"{level:.0%}", (x[last], y[last]))
    ax.axhline(PAPER_LINE, color="0.45", lw=2)
    ax.annotate("paper", (2, PAPER_LINE), color="0.45", va="bottom")


def accuracy_panel(ax, rows, key, title):
    """Accuracy against beta, a curve for each N."""
    groups = group_by(rows, "n")
    for (n,), colour in zip(groups, plt.cm.viridis(np.linspace(0, 0.9, len(groups)))):
        plot_points(ax, summarise(rows, "beta", key, n=n), color=colour, label=f"N = {n:,}")
    ax.axvline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", xlabel="β", title=title, ylim=(0, 1.02))
    ax.legend()


def information_panel(ax, random, real):
    """Information in the weights against N: all memorised, and at equal fit."""
    curves = [(random, partial(information_at_beta, beta=0.1), "C3o-", "random labels, β = 0.1"),
              (real, partial(information_at_beta, beta=0.1), "C0o-", "real labels, β = 0.1")]
    curves += [(real, partial(information_at_fit, level=level), f"C0{marker}:",
                f"real labels, {level:.0%} train accuracy")
               for level, marker in zip(LEVELS, "vs^")]
    for rows, nats_by_size, style, label in curves:
        points = [{"status": "ok", "n": n, "nats": nats}
                  for own in group_by(rows, "seed").values()
                  for n, nats in nats_by_size(own).items() if nats > 0]
        plot_points(ax, summarise(points, "n", "nats"), style, label=label)
    ax.set(xscale="log", yscale="log", xlabel="N", ylabel="I(w;D), nats",
           title="information in the weights")
    ax.legend()


def plot(random, real, args):
    panels = []
    for rows, key, panel in ((random, "train_acc", random_map), (real, "train_acc", real_map),
                             (real, "test_acc", partial(accuracy_map, key="test_acc"))):
        grid = group_by(rows, "n", "beta")
        if min(len({n for n, _ in grid}), len({beta for _, beta in grid})) > 1:
            panels.append(partial(panel, rows=rows))
    if random:
        panels.append(partial(accuracy_panel, rows=random, key="train_acc",
                              title="train accuracy, random labels"))
    if len({row["n"] for row in random + real if row["beta"] == 0.1}) > 1:
        panels.append(partial(information_panel, random=random, real=real))
    if real:
        panels.append(partial(accuracy_panel, rows=real, key="test_acc",
                              title="test accuracy, real labels"))
    title = f"Fig. 1: Small AlexNet, {args.dataset}, scale {args.scale}; dots on maps: cells"
    save_panels(panels, title, args)


def first_train_acc(rows):
    return rows[0]["train_acc"]


def claims(random, real):
    """The paper's claims; their thresholds were set before the grid was trained."""
    edge = by_size(random, partial(beta_at_accuracy, level=0.55))
    means = [values.mean() for values in edge.values()]
    paper_edge = "; ".join(f"{beta:g}" for beta in PAPER_CROSSING.values())
    exponent_at_fit = {level: exponents([row for row in real if row["n"] >= 1000],
                                        partial(information_at_fit, level=level))
                       for level in LEVELS}
    line = by_size(real, lambda own: math.log10(beta_at_accuracy(own, 0.4) / own[0]["n"]), 3000)
    best = {f"N = {n:,}": [max(summarise(own, "beta", "test_acc"), key=itemgetter(1))[0]]
            for (n,), own in group_by(real, "n").items()}
    return [
        check("random labels, β = 0.1: memorised (train accuracy at least 90%)", "yes",
              by_size(ok_rows(random, beta=0.1), first_train_acc), (0.9, 1)),
        check("random labels, β = 1.2: not learned (train accuracy at most 20%)", "yes",
              by_size(ok_rows(random, beta=1.2), first_train_acc), (0, 0.2)),
        check("random labels: from 80% to 20% within a factor 2.5 in β", "about 10",
              by_size(random, fall_factor), (1, 2.5)),
        check("random labels: through 55% at a β from 0.5 to 1.1", paper_edge, edge, (0.5, 1.1)),
        check("random labels: this β changes with N by less than a factor 2", "4.5",
              {"": [max(means) / min(means)]} if len(means) > 1 else {}, (1, 2)),
        check("random labels: test accuracy is chance (8 to 12%)", "yes",
              by_size(random, lambda own: np.mean([row["test_acc"] for row in own])),
              (0.08, 0.12), "{:.1%}"),
        check("random labels, β = 0.1: information ~ N^k, k from 0.9 to 1.1", "1",
              exponents(random, partial(information_at_beta, beta=0.1)), (0.9, 1.1)),
        *(check(f"real labels, {level:.0%} train accuracy, N from 1,000: information ~ N^k, k "
                "below 0.5", "saturates", exponent_at_fit[level], (-math.inf, 0.5))
          for level in LEVELS[1:]),
        check("real labels, 40% train accuracy: at log₁₀ β/N from −3.1 to −2.5", f"{PAPER_LINE}",
              line, (-3.1, -2.5)),
        check("real labels, β = 1.2, N from 1,000: learned (train accuracy over 40%)", "yes",
              by_size(ok_rows(real, beta=1.2), first_train_acc, 1000), (0.4, 1)),
        check("real labels: test accuracy is best at a β from 0.5 to 2", "near 1", best, (0.5, 2),
              "{:g}"),
        check("real labels, β = 1.2: not overfitted (train within 10 points of test)", "yes",
              by_size(ok_rows(real, beta=1.2), overfitting), (-math.inf, 0.1)),
        check("real labels, β = 4, N from 3,000: not overfitted", "yes",
              by_size(ok_rows(real, beta=4.0), overfitting, 3000), (-math.inf, 0.1)),
    ]


def cell_table(rows):
    """Means over seeds of what was measured, for each kind of cell."""
    columns = {"train": "train_acc", "cross-entropy": "cross_entropy", "I/N": "nats",
               "objective": "objective", "test, mean network": "test_acc",
               "test, sampled": "test_acc_sampled"}
    table = []
    for cell, own in group_by(rows, "labels", "n", "beta", "steps").items():
        table.append(dict(zip(("labels", "N", "β", "steps"), cell)) | {"seeds": len(own)})
        for name, key in columns.items():
            table[-1][name] = fmt([row[key] for row in own])
    return table


def make_cells(scale):
    grid, cells = GRID[scale], []
    for labels in ("random", "real"):
        for n, betas in grid[labels].items():
            one = [{"labels": labels, "n": n, "beta": beta} for beta in betas]
            if scale == "cpu" and n in LARGE:  # hours: these seeds, not those of --seeds
                one = [cell | {"seed": seed} for seed in SEEDS_LARGE[labels] for cell in one]
            cells += one
    longer = [{"labels": labels, "n": n, "beta": beta, "seed": 0, "steps_factor": 2}
              for labels, n, beta in grid["longer"]]
    return cells + longer


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    rows = ok_rows(rows)
    for row in rows:
        row["nats"] = row["information"] / row["n"]
    random, real = (ok_rows(rows, labels=labels, steps_factor=None)
                    for labels in ("random", "real"))
    plot(random, real, args)
    longer = [row for row in rows if row.get("steps_factor")]
    save_tables(args, claims=claims(random, real), twice_the_steps=cell_table(longer),
                cells=cell_table(random + real))


if __name__ == "__main__":
    main()
