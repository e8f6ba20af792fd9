"""Fig. 1: random labels are memorised while beta is below a threshold near 1, and not above it.

    python fig1_phase_transition.py --scale demo     # synthetic images, DEMO_COST on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, CPU_COST on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's width, N to 50,000

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D), on random and on
real labels.
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.tri import Triangulation

from common import (StochasticConv2d, StochasticLinear, accuracy, bn_recalibrated, claim,
                    complete_seeds, corrupt_labels, crossing, draw_subset, fmt, ib_loss, load_images, lr_factor, minibatches, new_figure,
                    normalise, ok_rows, param_groups, parse_args, per_seed, plot_points, predict,
                    prior_divergence, run_grid, save_figure, save_tables, summarise,
                    weight_information)

# What a cell is trained and measured with; stored in its row. All N take steps * max(1, N/300)^0.4.
SETTINGS = {
    "demo": dict(width=1 / 8, steps=2000, batch=50, lr=0.012, lr_noise=0.16, hold=0.6, warm_up=0.4,
                 test=1000),
    "cpu": dict(width=1 / 4, steps=5000, batch=100, lr=0.024, lr_noise=0.16, hold=0.6, warm_up=0.4,
                test=5000),
    "paper": dict(width=1, steps=10_000, batch=100, lr=0.012, lr_noise=0.16, hold=0.6, warm_up=0.4,
                  test=10_000),
}
BETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 2.0, 3.0)
REAL_BETAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0, 4.0, 10.0)
# The cells. `extra`, of seed 0: a largest N; "budget", a multiple of the steps; another prior.
GRID = {
    "demo": dict(sizes=(100,), random=(0.1, 0.4, 0.7, 1.0, 1.3, 2.0), real=(0.1, 1.3), extra=[]),
    "cpu": dict(sizes=(100, 300, 1000, 3000), random=BETAS, real=REAL_BETAS, extra=[
        *({"labels": "random", "n": n, "beta": beta, "budget": budget, "seed": 0}
          for n in (100, 300, 1000, 3000) for budget in (0.25, 0.5, 2) for beta in (0.5, 0.7, 0.8)),
        *({"labels": "random", "n": n, "beta": beta, "prior": "gaussian", "seed": 0}
          for n in (100, 300, 1000) for beta in (0.05, 0.1, 0.2)),
        *({"labels": labels, "n": 10_000, "beta": beta, "seed": 0}
          for labels, betas in (("random", BETAS), ("real", REAL_BETAS)) for beta in betas)]),
    "paper": dict(sizes=(100, 300, 1000, 3000, 10_000, 30_000, 50_000), random=BETAS,
                  real=REAL_BETAS, extra=[]),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "mnist", "synthetic"],
            "paper": ["cifar10", "mnist", "synthetic"]}


class Shift(nn.Module):
    """A bias per channel with noise on it, so that what it learns is counted: x + shift."""

    def __init__(self, channels):
        super().__init__()
        self.shift = StochasticLinear(1, channels, bias=False, local=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)
        self.shift.log_alpha = -6.0

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def small_alexnet(width=1.0, channels=3):
    """The paper's Small AlexNet, (n, channels, 28, 28) -> (n, 10). Every parameter has noise."""
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
    ).to(memory_format=torch.channels_last)  # several times faster on a CPU for these shapes


def load_data(args):
    s = SETTINGS[args.scale]
    dataset = "objects" if args.dataset == "synthetic" else args.dataset
    largest = max(cell["n"] for cell in make_cells(args.scale))
    return load_images(dataset, args.data_dir, largest, s["test"])


def train_cell(cell, device, args, progress):
    """Train one net on random or real labels, and measure it."""
    s, n, beta = SETTINGS[args.scale], cell["n"], cell["beta"]
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
    start = {f"{name}.weight": m.weight.detach().clone() for name, m in model.named_modules()
             if hasattr(m, "log_sigma2")}
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = round(s["steps"] * max(1, n / 300) ** 0.4 * cell.get("budget", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    batches = minibatches(n, s["batch"], device)
    for step in range(steps):
        index = next(batches)
        now = beta * min(1, step / (s["warm_up"] * steps))
        if cell.get("prior") == "gaussian":
            divergence = prior_divergence(model, model.state_dict() | start)
            loss = F.cross_entropy(model(x[index]), y[index]) + now / n * divergence
        else:
            loss, _, _ = ib_loss(model(x[index]), y[index], model, now, n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    information = weight_information(model)
    if cell.get("prior") == "gaussian":
        information = prior_divergence(model, model.state_dict() | start)
    measured = measure(model, information.item(), beta, s["batch"], x, y, x_test, y_test)
    return {"steps": steps} | measured


@torch.no_grad()
def measure(model, information, beta, batch, x, y, x_test, y_test):
    """What a row holds. Accuracies and cross-entropies of sampled weights unless named mean."""
    n, batch, nats, right = len(x), min(batch, len(x)), [], []
    model.train()
    for _ in range(max(1, 4000 // n)):  # batch statistics and a new sample per batch, as in training
        for index in torch.randperm(n, device=x.device)[:n - n % batch].split(batch):
            logits = model(x[index])
            nats.append(F.cross_entropy(logits, y[index]).item())
            right.append(accuracy(logits, y[index]))
    passes = max(1, 2000 // n)
    with bn_recalibrated(model, x.split(100) * passes, draw=True):
        logits = torch.cat([predict(model, x) for _ in range(passes)])
        test_sampled = accuracy(predict(model, x_test), y_test)
    with bn_recalibrated(model, x.split(100), draw=False):
        train_mean = accuracy(predict(model, x), y)
        test_mean = accuracy(predict(model, x_test), y_test)
    labels = y.repeat(passes)
    cross_entropy_batch = float(np.mean(nats))
    return {"objective": cross_entropy_batch + beta * information / n,
            "train_acc": accuracy(logits, labels),
            "train_acc_batch": float(np.mean(right)), "train_acc_mean": train_mean,
            "test_acc": test_mean, "test_acc_sampled": test_sampled,
            "cross_entropy": F.cross_entropy(logits, labels).item(),
            "cross_entropy_batch": cross_entropy_batch, "information": information}


# The paper's Fig. 1, digitised: beta at which train accuracy on random labels falls through 55%.
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33,
                  48_000: 0.29}
LOG10 = math.log(10)  # nats of a random label; cross-entropy of a net that knows nothing


def code_efficiency(row):
    """r: label nats memorised per nat in the weights; nan for a net that memorised next to none.

    Memory lowers the objective exactly while beta < r: cross-entropy + beta * I/N < log 10.
    """
    if row["train_acc"] < 0.3:
        return math.nan
    return (LOG10 - row["cross_entropy_batch"]) * row["n"] / row["information"]


def equilibrium(rows):
    """beta*: the largest r that any of these states reaches. Above it no memory pays."""
    return max((r["r"] for r in rows if math.isfinite(r["r"])), default=math.nan)


def repricing_gap(rows):
    """Nats per sample by which a row's objective exceeds that of another row's final state, priced
    at its beta: the largest over rows with beta <= beta*. rows: one N, one seed."""
    beta = np.array([r["beta"] for r in rows])
    loss = np.array([r["cross_entropy_batch"] for r in rows])
    nats = np.array([r["information"] / r["n"] for r in rows])
    repriced = loss + beta[:, None] * nats  # [row, state]
    gap = repriced.diagonal() - repriced.min(1)
    return float(gap[beta <= equilibrium(rows)].max(initial=0))


def listed(values, form="{:.2f}"):
    """{N: one value per seed} as text."""
    return "; ".join(f"N={n:,} {fmt(v, form)}" for n, v in values.items())


def slope(rows, sizes):
    """Exponent of information ~ N^exponent between the smallest and the largest of these N."""
    nats = {r["n"]: r["information"] for r in rows}
    low, high = sizes[0], sizes[-1]
    return math.log(nats[high] / nats[low]) / math.log(high / low)


def claims(random, real, everything, s):
    """The claims table. random, real: main cells of complete seeds; everything: all ok rows."""
    grid, table = GRID[s], []
    sizes, low = grid["sizes"], min(grid["random"])

    def by_size(function, rows):  # {N: value per seed}
        return {n: per_seed(function, ok_rows(rows, n=n)) for n in sizes}

    def add(sentence, paper, values, holds, form="{:.2f}"):
        table.append(claim(sentence, paper, listed(values, form), holds))

    if random:
        star = by_size(equilibrium, random)
        mean_star = {n: np.mean(v) for n, v in star.items()}
        add("random labels: train accuracy is at least 85% wherever β ≤ β*/2", "yes",
            by_size(lambda rows: min(r["train_acc"] for r in rows if r["beta"] <= mean_star[rows[0]["n"]] / 2), random),
            all(r["train_acc"] >= 0.85 for r in random if r["beta"] <= mean_star[r["n"]] / 2), "{:.1%}")
        add("random labels: β*, where memory ceases to pay, is between 0.7 and 1 for every N",
            "1 (theory)", star, all(0.7 <= v <= 1 for v in mean_star.values()))
        below = max(b for b in grid["random"] if b < 1)
        add(f"memorising pays for every β < 1 measured, that is β* > {below:g} (Sec. 7.1)", "yes",
            star, all(v > below for v in mean_star.values()))
        ratios = [r["r"] for r in everything if r["labels"] == "random" and math.isfinite(r["r"])]
        table.append(claim("no code is shorter than random labels: r ≤ 1 in every cell",
                           "theory", f"largest {max(ratios):.3f} of {len(ratios)}", max(ratios) <= 1))
        gaps = by_size(repricing_gap, random)
        add("converged: no state is beaten at its β by another cell's final state, by more than "
            "0.03 nats per sample (largest gap)", "–", gaps, all(max(v) <= 0.03 for v in gaps.values()))
        exponents = per_seed(lambda rows: slope(ok_rows(rows, beta=low), sizes), random)
        table.append(claim(f"random labels, β = {low:g}: information grows linearly with N "
                           "(exponent 0.9 to 1.1)", "linear", fmt(exponents),
                           0.9 <= np.mean(exponents) <= 1.1))
    if real:
        exponents = per_seed(lambda rows: slope(ok_rows(rows, beta=low), sizes[-2:]), real)
        table.append(claim(f"real labels, β = {low:g}: information saturates (exponent below 0.5 "
                           f"from N = {sizes[-2]:,} to {sizes[-1]:,})", "saturates", fmt(exponents),
                           np.mean(exponents) < 0.5))
        best = {n: max(summarise(real, "beta", "test_acc", n=n), key=lambda p: p[1])[0] for n in sizes}
        add("real labels: test accuracy is best at a β from 0.5 to 2, for every N", "near 1",
            best, all(0.5 <= b <= 2 for b in best.values()), "{:g}")
    above = min((b for b in set(grid["random"]) & set(grid["real"]) if b > 1), default=None)
    if random and real and above:
        gap = by_size(lambda rows: rows[0]["train_acc"] - rows[0]["test_acc_sampled"],
                      ok_rows(real, beta=above))
        learned = by_size(lambda rows: rows[0]["train_acc"], ok_rows(real, beta=above))
        chance = by_size(lambda rows: rows[0]["train_acc"], ok_rows(random, beta=above))
        table.append(claim(
            f"β = {above:g}: real labels are learned (over 20%) without overfitting (train within 10 points of "
            "test), random ones are not (under 20%)", "yes",
            f"real {listed(learned, '{:.0%}')}; gap {listed(gap, '{:.0%}')}; random {listed(chance, '{:.0%}')}",
            all(np.mean(learned[n]) > 0.2 > np.mean(chance[n]) and np.mean(gap[n]) < 0.1 for n in sizes)))
    return table


def plot(rows, args):
    s = args.scale
    ok = ok_rows(rows)
    main = [r for r in ok if "budget" not in r and "prior" not in r]
    random, real = ok_rows(main, labels="random"), ok_rows(main, labels="real")
    sizes = sorted({r["n"] for r in ok})
    colours = dict(zip(sizes, plt.cm.viridis(np.linspace(0, 0.85, len(sizes)))))
    title = (f"Fig. 1: Small AlexNet, width ×{SETTINGS[s]['width']:g}, {args.dataset}, scale {s}, "
             f"up to {len({r['seed'] for r in ok})} seeds per cell, {len(rows) - len(ok)} diverged")
    fig, axes = new_figure(2, 4, title)
    panels = [(random, "train_acc"), (real, "train_acc"), (random, "test_acc"), (real, "test_acc")]
    for ax, (some, key) in zip(axes[0], panels):
        plot_map(ax, some, key)
    colour_scale = plt.cm.ScalarMappable(plt.Normalize(0.12, 0.98), "coolwarm")
    fig.colorbar(colour_scale, ax=axes[0, -1], label="accuracy; interpolated between the dots")

    ax = axes[1, 0]
    for n in sizes:
        plot_points(ax, summarise(random, "beta", "train_acc", n=n), color=colours[n], label=f"N = {n:,}")
        ax.plot(PAPER_CROSSING.get(n, math.nan), 0.55, "D", mfc="0.8", mec=colours[n], ms=8)
    ax.plot([], [], "D", mfc="0.8", mec="0.4", ms=8, label="paper's 55%, same N")
    ax.set(xlabel="β", ylabel="train accuracy, sampled weights", title="random labels: the transition")

    ax = axes[1, 1]
    for n in sizes:
        plot_points(ax, summarise([r for r in random if math.isfinite(r["r"])], "beta", "r", n=n),
                    color=colours[n], label=f"N = {n:,}")
    proper = [r for r in ok if r.get("prior") == "gaussian" and math.isfinite(r["r"])]
    for r in proper:
        ax.plot(r["beta"], r["r"], "x", color=colours[r["n"]], ms=5)
    ax.plot([], [], "x", color="0.4", label="proper Gaussian prior")
    line = np.array([0.05, 1.0])
    ax.plot(line, line, "k-", lw=1, label="r = β: right of it memory does not pay")
    ax.axhline(1, color="0.5", ls=":", label="r = 1: an ideal code")
    ax.set(xlabel="β", ylabel="r, label nats per nat in the weights", title="random labels: efficiency of the code")

    ax = axes[1, 2]
    for n in sizes:
        some = [r for r in ok_rows(ok, labels="random", n=n) if "prior" not in r]
        star = []
        for budget in sorted({r.get("budget", 1) for r in some}):
            of = [r for r in some if r.get("budget", 1) == budget]
            star += [{"status": "ok", "steps": of[0]["steps"], "star": v}
                     for v in per_seed(equilibrium, of) if math.isfinite(v)]
        plot_points(ax, summarise(star, "steps", "star"), color=colours[n], label=f"N = {n:,}")
    ax.axhline(1, color="0.5", ls=":")
    ax.set(xscale="log", xlabel="training steps", ylabel="β*, the largest r reached",
           title="the equilibrium against training")

    ax, low = axes[1, 3], min(GRID[s]["random"])
    for labels, colour in (("random", "C3"), ("real", "C0")):
        plot_points(ax, summarise(main, "n", "per_sample", labels=labels, beta=low), color=colour,
                    label=f"{labels} labels")
    ax.axhline(LOG10, color="0.6", ls="--", label="log 10: a random label")
    ax.set(xscale="log", xlabel="N", ylabel="I(w;D)/N, nats per sample",
           title=f"information, β = {low:g}")
    ax.set_ylim(bottom=0)
    for ax in axes[1]:
        ax.legend()
    save_figure(fig, args)


def plot_map(ax, rows, key):
    """One of the paper's panels: accuracy over log10 N and log10(beta/N), between the cells."""
    cells = sorted({(r["n"], r["beta"]) for r in rows})
    labels = rows[0]["labels"] if rows else ""
    value = [np.mean([r[key] for r in rows if (r["n"], r["beta"]) == cell]) for cell in cells]
    x, y = np.log10([[n, beta / n] for n, beta in cells]).reshape(-1, 2).T
    if np.linalg.matrix_rank(np.stack([x, y, np.ones(len(x))])) == 3:
        # triangulated over (log N, log beta), where the cells form a rectangle
        triangles = Triangulation(x, x + y).triangles
        ax.tricontourf(Triangulation(x, y, triangles), value, np.linspace(0.12, 0.98, 44),
                       cmap="coolwarm", extend="both")
    ax.plot(x, y, "k.", ms=2)
    sizes = np.array(sorted({n for n, _ in cells}))
    ax.plot(np.log10(sizes), -np.log10(sizes), "k--", lw=1, label="β = 1")
    if (labels, key) == ("random", "train_acc"):
        paper = [(n, b) for n, b in PAPER_CROSSING.items() if n <= sizes.max(initial=0)]
        ours = [(n, crossing(summarise(rows, "beta", "train_acc", n=n), 0.55)) for n in sizes]
        for contour, colour, name in ((paper, "0.35", "paper's 55%"), (ours, "w", "our 55%")):
            path = np.log10([(n, b / n) for n, b in contour]).reshape(-1, 2)
            ax.plot(*path.T, color=colour, lw=2, label=name)
    if (labels, key) == ("real", "train_acc"):
        ax.axhline(-2.8, color="0.35", ls=":", lw=2, label="paper's second line")
    ax.invert_yaxis()
    ax.set(xlabel="log₁₀ N", ylabel="log₁₀(β/N)",
           title=f"{key.split('_')[0]} accuracy, {labels} labels")
    ax.legend(loc="upper right", facecolor="0.85")


def main_cells(scale):
    """The cells of the paper's figure: (random labels, real labels)."""
    grid = GRID[scale]
    return [[{"labels": labels, "n": n, "beta": beta} for n in grid["sizes"] for beta in grid[labels]]
            for labels in ("random", "real")]


def make_cells(scale):
    random, real = main_cells(scale)
    return random + real + GRID[scale]["extra"]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    print(len(rows))


if __name__ == "__main__":
    main()
