"""Fig. 1: random labels are memorised while beta is below a threshold, and not above it.

    python fig1_phase_transition.py --scale demo     # synthetic images, 1.5 minutes on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, 8 hours on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's width, N to 50,000

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D). A net that
memorises random labels ends with cross-entropy CE and information I. Its L is below log 10,
that of guessing, exactly while

    beta < r,   r = (log 10 - CE) * N / I,   label nats memorised per nat of weights,

so beta* = max r is where memory ceases to pay. If I is the length of a code, r <= 1, and
beta* -> 1 means that training finds an ideal code. Every parameter has noise and is counted.

Protocol, chosen by the objective at N = 1,000, beta = 0.4 (--scale paper: 10,000, 0.5) on another
seed: Adam; rates held for 60% of the steps; beta as in beta_at. Cross-entropy and accuracy on the
training set: sampled weights, batch statistics.
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.tri import Triangulation

from common import (StochasticConv2d, StochasticLinear, beta_at, claim, complete_seeds,
                    corrupt_labels, crossing, draw_subset, evaluate, evaluate_as_trained, fmt,
                    group_by, load_images, lr_factor, minibatches, new_figure, normalise, ok_rows,
                    param_groups, parse_args, per_seed, plot_points, run_grid, save_figure,
                    save_tables, summarise, weight_information, with_information)

# How a cell is trained, stored in its row. It takes steps * max(1, N/300)^0.4.
SHARED = dict(lr_noise=0.16, hold=0.6, peak=0.5)
SETTINGS = {
    "demo": SHARED | dict(width=1 / 8, steps=3000, batch=50, lr=0.012, test=1000),
    "cpu": SHARED | dict(width=1 / 4, steps=5000, batch=100, lr=0.024, test=5000, peak=0.7),
    "paper": SHARED | dict(width=1, steps=10_000, batch=100, lr=0.012, lr_noise=0.04, test=10_000),
}
BETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 2.0, 3.0)
REAL_BETAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0, 4.0, 10.0)
SIZES = (100, 300, 1000, 3000)
# Cells. `extra`: seed 0, with a budget, a multiple of the steps.
GRID = {
    "demo": dict(sizes=(100,), random=(0.1, 0.3, 0.5, 0.8, 1.3), real=(), extra=[]),
    "cpu": dict(sizes=SIZES, random=BETAS, real=REAL_BETAS, extra=[
        *({"labels": "random", "n": n, "beta": beta, "seed": 0, "budget": budget} for n in SIZES
          for beta in (0.7, 0.8, 0.9, 1.0) for budget in (0.5, 2, 4)),
        *({"labels": labels, "n": 10_000, "beta": beta, "seed": 0, "budget": 2, "peak": 0.5}
          for labels, betas in (("random", (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)),
                                ("real", (0.1, 0.5, 0.9, 1.2, 2.0))) for beta in betas)]),
    "paper": dict(sizes=(*SIZES, 10_000, 30_000, 50_000), random=BETAS, real=REAL_BETAS, extra=[]),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
REAL_DATA = ["cifar10", "mnist", "synthetic"]
DATASETS = {"demo": ["synthetic"], "cpu": REAL_DATA, "paper": REAL_DATA}


class Shift(nn.Module):
    """x + a bias per channel with noise, so that it is counted."""

    def __init__(self, channels):
        super().__init__()
        self.shift = StochasticLinear(1, channels, bias=False, local=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)
        self.shift.log_alpha = -6.0

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def small_alexnet(width=1.0, channels=3):
    """The paper's Small AlexNet, (n, channels, 28, 28) -> (n, 10)."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        StochasticConv2d(channels, conv, 5, padding=2, bias=False), nn.MaxPool2d(2), nn.ReLU(),
        StochasticConv2d(conv, conv, 5, padding=2, bias=False),
        nn.BatchNorm2d(conv, affine=False), Shift(conv), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        StochasticLinear(conv * 49, fc1, bias=False),
        nn.BatchNorm1d(fc1, affine=False), Shift(fc1), nn.ReLU(),
        StochasticLinear(fc1, fc2, bias=False),
        nn.BatchNorm1d(fc2, affine=False), Shift(fc2), nn.ReLU(),
        StochasticLinear(fc2, 10, bias=False),
    ).to(memory_format=torch.channels_last)  # faster on a CPU


def load_data(args):
    largest = max(cell["n"] for cell in make_cells(args.scale))
    return load_images(args.dataset, args.data_dir, largest, SETTINGS[args.scale]["test"])


def train_cell(cell, device, args, progress, information=weight_information, **changed):
    """Train and measure one net. information: the penalty, nats."""
    s, n, beta = SETTINGS[args.scale] | cell | changed, cell["n"], cell["beta"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    if cell["labels"] == "random":
        y = corrupt_labels(y, 1.0, 10, generator)
    x, x_test = (normalise(images, mean, std, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = small_alexnet(s["width"], x.shape[1]).to(device)
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = round(s["steps"] * max(1, n / 300) ** 0.4 * cell.get("budget", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    batches = minibatches(n, s["batch"], device)
    forward = with_information(model, x[:s["batch"]], information)
    for step in range(steps):
        index = next(batches)
        logits, nats = forward(x[index])
        penalty = beta_at(step / steps, beta, s["peak"]) / n
        loss = F.cross_entropy(logits, y[index]) + penalty * nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    measured = evaluate_as_trained(model, s["batch"], x, y)
    measured |= evaluate(model, x, y, x_test, y_test)
    nats = information(model).item()
    objective = measured["cross_entropy_batch"] + beta * nats / n
    return {"steps": steps, "objective": objective, "information": nats} | measured


# The paper's, digitised: beta where train accuracy on random labels falls through 55%.
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33,
                  48_000: 0.29}
LOG10 = math.log(10)  # nats of a random label


def add_derived(rows):
    """The ok rows, with nats per sample and r of random labels, 0 below 55%."""
    rows = ok_rows(rows)
    for row in rows:
        row["nats"] = row["information"] / row["n"]
        memorised = row["labels"] == "random" and row["train_acc_batch"] > 0.55
        row["r"] = (LOG10 - row["cross_entropy_batch"]) / row["nats"] if memorised else 0.0
    return rows


def equilibrium(rows):
    """beta*: the largest r of these states. Above it no memory pays."""
    return max(row["r"] for row in rows)


def repricing_gap(rows):
    """Nats by which a cell with beta <= beta* is above another's state at its beta."""
    gaps = [row["objective"] - other["cross_entropy_batch"] - row["beta"] * other["nats"]
            for row in rows if row["beta"] <= equilibrium(rows) for other in rows]
    return max(gaps, default=0.0)


def claims(random, real, ok, grid):
    """The claims table. random, real: main cells of complete seeds; ok: all rows."""
    table, sizes, betas = [], grid["sizes"], grid["random"]

    def add(sentence, paper, values, holds, form="{:.2f}"):  # holds: of the mean over seeds
        ours = "; ".join(f"N={n:,} {fmt(v, form)}" for n, v in values.items())
        table.append(claim(sentence, paper, ours, all(holds(np.mean(v)) for v in values.values())))

    def by_size(function, rows):  # {N: value per seed}
        return {n: per_seed(function, ok_rows(rows, n=n)) for n in sizes if ok_rows(rows, n=n)}

    def first(key, rows):  # {N: value of each seed's only row}
        return by_size(lambda rows: rows[0][key], rows)

    def growth(rows, low, high):  # {high: exponents of I ~ N^exponent, beta = 0.1}
        nats = first("information", ok_rows(rows, beta=0.1))
        return {high: np.log(nats[high] / nats[low]) / math.log(high / low)}

    if random:
        star = by_size(equilibrium, random)
        half = [row for row in random if row["beta"] <= np.mean(star[row["n"]]) / 2]
        below = max(beta for beta in betas if beta < 1)
        largest = max(row["r"] for row in ok)
        if half:
            add("random labels: train accuracy is at least 85% wherever β ≤ β*/2", "–",
                by_size(lambda rows: min(row["train_acc_batch"] for row in rows), half),
                lambda v: v >= 0.85, "{:.1%}")
        edge = by_size(lambda rows: crossing(summarise(rows, "beta", "train_acc_batch"), 0.55),
                       random)
        paper = "; ".join(f"N={n:,} {PAPER_CROSSING[n]}" for n in sizes if n in PAPER_CROSSING)
        add("random labels: train accuracy falls through 55% at a β from 0.3 to 1.05", paper, edge,
            lambda v: 0.3 <= v <= 1.05)
        add("converged, random labels, β ≤ β*: no cell is beaten at its β by another's final "
            "state by over 0.03 nats", "–", by_size(repricing_gap, random), lambda v: v <= 0.03,
            "{:.3f}")
        table.append(claim("random labels: r ≤ 1, as for any code", "–",
                           f"largest {largest:.2f}", largest <= 1))
        if len(sizes) > 1:  # not in the demo
            add("random labels: β*, where memory ceases to pay, is between 0.7 and 1",
                "1 (theory)", star, lambda v: 0.7 <= v <= 1)
            add(f"random labels: memory pays at every β < 1 measured (Sec. 7.1): β* > {below:g}",
                "yes", star, lambda v: v > below)
            add("random labels, β = 0.1, all N: information ~ N (exponent 0.9 to 1.1)", "linear",
                growth(random, sizes[0], sizes[-1]), lambda v: 0.9 <= v <= 1.1)
    if real and len(sizes) > 1:
        add("real labels, β = 0.1, last two N: information saturates (exponent below 0.5)",
            "saturates", growth(real, *sizes[-2:]), lambda v: v < 0.5)
        best = {n: max(summarise(real, "beta", "test_acc", n=n), key=lambda p: p[1])[0]
                for n in sizes}
        add("real labels: test accuracy is best at a β from 0.5 to 2", "near 1", best,
            lambda v: 0.5 <= v <= 2, "{:g}")
    if random and real:
        beta = min(beta for beta in betas if beta > 1)
        real, random = ok_rows(real, beta=beta), ok_rows(random, beta=beta)
        add(f"β = {beta:g}: random labels are not learned (train accuracy below 20%)", "yes",
            first("train_acc_batch", random), lambda v: v < 0.2, "{:.0%}")
        add(f"β = {beta:g}: real labels are learned (train accuracy above 20%)", "yes",
            first("train_acc_batch", real), lambda v: v > 0.2, "{:.0%}")
        add(f"β = {beta:g}: not overfitted (train within 10 points of test, both sampled)", "yes",
            by_size(lambda rows: rows[0]["train_acc"] - rows[0]["test_acc_sampled"], real),
            lambda v: v < 0.1, "{:.0%}")
    return table


def measured(ok):
    """Means over seeds."""
    columns = {"train": "train_acc_batch", "test": "test_acc", "objective": "objective",
               "cross-entropy": "cross_entropy_batch", "I/N": "nats", "r": "r"}
    return [dict(zip(("labels", "N", "β", "steps"), cell)) | {"seeds": len(rows)}
            | {name: fmt([row[key] for row in rows if row[key] or name != "r"])
               for name, key in columns.items()}
            for cell, rows in group_by(ok, "labels", "n", "beta", "steps").items()]


def plot(ok, args):
    seeds = {row["seed"] for row in ok}
    main = [row for row in ok if "budget" not in row or row["n"] == 10_000]
    sizes = sorted({row["n"] for row in ok})
    random = ok_rows(main, labels="random")
    fig, axes = new_figure(2, 4, f"Fig. 1: Small AlexNet, {args.dataset}, scale {args.scale}, "
                           f"up to {len(seeds)} seeds")
    panels = [(part, labels) for part in ("train", "test") for labels in ("random", "real")]
    for ax, (part, labels) in zip(axes[0], panels):
        key = "train_acc_batch" if part == "train" else "test_acc"
        plot_map(ax, ok_rows(main, labels=labels), key, f"{part} accuracy, {labels} labels")
    bar = plt.cm.ScalarMappable(plt.Normalize(0.12, 0.98), "coolwarm")
    fig.colorbar(bar, ax=axes[0, 3], label="accuracy, interpolated")
    ours = {n: crossing(summarise(random, "beta", "train_acc_batch", n=n), 0.55) for n in sizes}
    for points, colour, name in ((PAPER_CROSSING, "0.35", "paper's"), (ours, "k", "our")):
        path = np.log10([[n, beta / n] for n, beta in points.items() if n <= sizes[-1]]).T
        axes[0, 0].plot(*path, color=colour, lw=2, label=f"{name} 55%")

    accuracy_ax, r_ax, steps_ax, nats_ax = axes[1]
    for n, colour in zip(sizes, plt.cm.viridis(np.linspace(0, 0.85, len(sizes)))):
        style = dict(color=colour, label=f"N = {n:,}")
        nets = [(row["beta"], row["train_acc_batch"]) for row in ok_rows(random, n=n)]
        accuracy_ax.plot(*zip(*nets), ".", color=colour)
        betas, mean, *_ = zip(*summarise(random, "beta", "train_acc_batch", n=n))
        accuracy_ax.plot(betas, mean, **style)
        memorised = [row for row in ok_rows(ok, n=n) if row["r"]]
        plot_points(r_ax, summarise([row for row in memorised if row in random], "beta", "r"),
                    **style)
        some = {(row["beta"], row["seed"]) for row in ok_rows(ok, n=n) if "budget" in row}
        star = [(steps, max(r)) for (steps,), rows in group_by(memorised, "steps").items()
                if (r := [row["r"] for row in rows if (row["beta"], row["seed"]) in some])]
        steps_ax.plot(*zip(*star), "o-", **style)
    accuracy_ax.set(xlabel="β", ylabel="train accuracy", ylim=(0, 1.02),
                    title="random labels (line: mean)")
    r_ax.plot([0, 1], [0, 1], "k", lw=1, label="r = β: memory pays above")
    r_ax.set(xlabel="β", ylabel="r, label nats per weight nat", xlim=(0, 1.05),
             ylim=(0, 1.05), title="efficiency of the code")
    steps_ax.set(xlabel="training steps", ylabel="largest r", xlim=(0, None), ylim=(0, 1.05),
                 title="r against training, seed 0")
    for ax in (r_ax, steps_ax):
        ax.axhline(1, color="0.5", ls=":", label="r = 1: an ideal code")
    for labels, colour in (("random", "C3"), ("real", "C0")):
        nats = summarise(main, "n", "nats", labels=labels, beta=0.1)
        plot_points(nats_ax, nats, color=colour, label=f"{labels} labels")
    nats_ax.axhline(LOG10, color="0.6", ls="--", label="log 10: a random label")
    nats_ax.set(xscale="log", xlabel="N", ylabel="I(w;D)/N, nats per sample",
                title="information, β = 0.1", ylim=(0, None))
    for ax in axes.flat:
        ax.legend(facecolor="0.9", loc="lower right" if ax is r_ax else "best")
    save_figure(fig, args)


def plot_map(ax, rows, key, title):
    """A panel of the paper."""
    ax.set(xlabel="log₁₀ N", ylabel="log₁₀(β/N)", title=title, visible=bool(rows))
    cells = sorted({(row["n"], row["beta"]) for row in rows})
    value = [np.mean([row[key] for row in ok_rows(rows, n=n, beta=beta)]) for n, beta in cells]
    x, y = np.log10([[n, beta / n] for n, beta in cells]).reshape(-1, 2).T
    if len(set(x)) > 1:
        triangles = Triangulation(x, x + y).triangles
        ax.tricontourf(Triangulation(x, y, triangles), value, np.linspace(0.12, 0.98, 44),
                       cmap="coolwarm", extend="both")
    ax.plot(x, y, "k.", ms=2)
    ax.plot(x, -x, "k--", lw=1, label="β = 1")
    ax.invert_yaxis()


def main_cells(grid):
    """The cells of (random labels, real labels)."""
    return [[{"labels": labels, "n": n, "beta": beta} for n in grid["sizes"]
             for beta in grid[labels]] for labels in ("random", "real")]


def make_cells(scale):
    random, real = main_cells(GRID[scale])
    return random + real + GRID[scale]["extra"]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    ok, grid = add_derived(rows), GRID[args.scale]
    random, real = (complete_seeds(ok_rows(ok, budget=None), cells) for cells in main_cells(grid))
    plot(ok, args)
    save_tables(args, claims=claims(random, real, ok, grid), measured=measured(ok))


if __name__ == "__main__":
    main()
