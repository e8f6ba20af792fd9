"""Fig. 2: every architecture memorises random labels at small beta; noisier labels cost more nats.

    python fig2_corrupted_labels.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig2_corrupted_labels.py --scale cpu      # CIFAR-10, small networks, 5 to 8 h on 2 cores
    python fig2_corrupted_labels.py --gpu 0          # CIFAR-10, the paper's N = 10,000 and 30,000

Nets are trained with L = cross-entropy + beta/N * I(w;D). Panel "models": three architectures on
random labels; the paper says that each underfits before beta = 1 (in its plot one at 1.6).
Panel "corruption": Small AlexNet at a small beta with part of the labels corrupted: "uniform",
resampled over all classes, or "pair", replaced by the next class. In the paper information rises
with corruption, by 3.1 nats per sample from real to random labels (log 10 = 2.3). Pair flips carry
less entropy than as many uniformly wrong labels, so they should cost less.

Protocol and measures as in Fig. 1, with a peak of beta for each architecture
(results/protocols.md). Errors are of one sampled network, the mean over draws.
"""
import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (beta_at, cell_table, check, complete_curves, corrupt_labels, crossing,
                    draw_subset, evaluate, group_by, load_images, lr_factor, minibatches, normalise,
                    ok_rows, param_groups, parse_args, per_seed, plot_points, run_grid,
                    save_panels, save_tables, summarise, to_stochastic, values_by,
                    weight_information, with_information)

# How a cell is trained, stored in its row; named as in Fig. 1. It takes steps * max(1,
# N/300)^growth; steps_factor of a cell: times as many. Each net has a peak of beta of its own: the
# larger, the less information it ends with, unless the peak brings it to chance, where it stays.
SHARED = dict(growth=0.6, hold=0.6, draws=8)
MODELS = ("Small AlexNet", "All-CNN", "ResNet")
PEAKS = {"Small AlexNet": 0.5, "All-CNN": 0.3, "ResNet": 0.3}
SETTINGS = {
    "demo": dict(widths={"Small AlexNet": 1 / 8, "All-CNN": 1 / 16, "ResNet": 1 / 2}, blocks=1,
                 steps=600, batch=50, lr=0.024, lr_noise=0.06, synthetic=(1000, 1000), test=200,
                 peaks=dict.fromkeys(MODELS, 0), **SHARED),
    "cpu": dict(widths={"Small AlexNet": 1 / 4, "All-CNN": 1 / 8, "ResNet": 1 / 2}, blocks=1,
                steps=4000, batch=100, lr=0.024, lr_noise=0.16, synthetic=(10_000, 5000), test=5000,
                peaks=PEAKS, **SHARED),
    "paper": dict(widths={"Small AlexNet": 1, "All-CNN": 1, "ResNet": 4}, blocks=3,
                  steps=10_000, batch=100, lr=0.012, lr_noise=0.04, synthetic=(50_000, 10_000),
                  test=10_000, peaks=PEAKS, **SHARED),
}
PAPER_BETAS = (0.025, 0.063, 0.158, 0.398, 1.0, 2.51, 6.31, 15.8, 39.8)  # 10^(0.4k - 2), k from 1
BETAS = tuple(sorted((*PAPER_BETAS, 0.6, 0.8)))  # two more where nets go to chance
UNIFORM = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
PAIR = (0.09, 0.27, 0.45)  # as many labels are wrong as of 0.1, 0.3, 0.5 resampled
# n_models, betas: of panel "models"; beta, {N: fractions}: of panel "corruption", n: its main N
GRID = {
    # of the two slower nets only the ends, as their transition takes more steps than a demo has
    "demo": dict(n_models=100, betas={"Small AlexNet": (0.025, 0.1, 0.3, 0.6, 1.0),
                                      "All-CNN": (0.025, 1.0), "ResNet": (0.025, 1.0)},
                 beta=0.1, n=200, uniform={200: (0.0, 1.0)}, pair={}),
    "cpu": dict(n_models=1000, betas=dict.fromkeys(MODELS, BETAS), beta=0.1, n=3000,
                uniform={300: (0.0, 1.0), 1000: (0.0, 1.0), 3000: UNIFORM,
                         10_000: (0.0, 0.3, 0.5, 1.0)}, pair={3000: PAIR}),
    "paper": dict(n_models=10_000, betas=dict.fromkeys(MODELS, BETAS), beta=0.1, n=30_000,
                  uniform={3000: (0.0, 1.0), 10_000: (0.0, 1.0), 30_000: UNIFORM},
                  pair={30_000: PAIR}),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
REAL_DATA = ["cifar10", "synthetic"]
DATASETS = {"demo": ["synthetic", "cifar10"], "cpu": REAL_DATA, "paper": REAL_DATA}


class Shift(nn.Module):
    """x + a bias per channel, of a linear layer, so that it has noise and is counted."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Linear(1, channels, bias=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def norm(channels):
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), Shift(channels))


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


def all_cnn(width=1.0):
    """The All-CNN, (n, 3, h, w) -> (n, 10): eight convolutions with ReLU, a ninth, an average."""
    layers, inputs = [], 3
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                   norm(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False) if stride > 1 else None

    def forward(self, x):
        h = self.norm1(x).relu()
        # a slice: strided 1x1 convolutions of few channels corrupt memory (oneDNN issue 6035)
        shortcut = self.shortcut(h[:, :, ::2, ::2]) if self.shortcut else x
        return shortcut + self.conv2(self.norm2(self.conv1(h)).relu())


def resnet(width, blocks):
    """Pre-activation ResNet, 6*blocks + 2 layers deep, 16 to 64 channels times width."""
    channels = int(16 * width)
    layers = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for i in range(3 * blocks):
        stride = 2 if i in (blocks, 2 * blocks) else 1
        layers.append(Block(channels, channels * stride, stride))
        channels *= stride
    return nn.Sequential(*layers, norm(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(channels, 10, bias=False))


def network(name, s):
    width = s["widths"][name]
    if name == "ResNet":
        return resnet(width, s["blocks"])
    return all_cnn(width) if name == "All-CNN" else small_alexnet(width)


def load_data(args):
    return load_images(args.dataset, args.data_dir, *SETTINGS[args.scale]["synthetic"])


def train_cell(cell, device, args, progress):
    """Train and measure one net, on random labels unless the cell says how many are corrupted."""
    s, n, beta = SETTINGS[args.scale], cell["n"], cell["beta"]
    name = cell.get("model", "Small AlexNet")
    torch.manual_seed(cell["seed"])  # of the net and its noise; generator: of data and labels
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    y = corrupt_labels(y, cell.get("corruption", 1.0), 10, generator, cell.get("kind", "uniform"))
    x, x_test = (normalise(images, mean, std, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = to_stochastic(network(name, s))
    model.to(device, memory_format=torch.channels_last)  # faster on a CPU
    forward = with_information(model, x[:s["batch"]])  # on a GPU a CUDA graph
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = s["steps"] * max(1, n / 300) ** s["growth"]
    steps = round(steps * cell.get("steps_factor", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step, index in zip(range(steps), minibatches(n, s["batch"], device)):
        logits, nats = forward(x[index])
        cross_entropy = F.cross_entropy(logits, y[index])
        beta_now = beta_at(step / steps, beta, s["peaks"][name])
        loss = cross_entropy + beta_now / n * nats  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())  # ends the cell if it is not finite

    measured = evaluate(model, x, y, x_test, y_test, s["draws"])
    nats = weight_information(model).item()
    objective = measured["cross_entropy"] + beta / n * nats
    return {"steps": steps, "objective": objective, "information": nats} | measured


# The paper's Fig. 2, digitised: train error in % by beta; nats per sample, up to a constant.
PAPER_ERROR = {"Small AlexNet": (1.4, 3.8, 7.3, 10.2, 17.6, 74.2, 87.8, 89.3, 89.4),
               "All-CNN": (4.7, 16.9, 31, 55.4, 79, 85, 88),
               "ResNet": (1.5, 3.3, 6, 15.5, 81.7, 87.6, 88.5)}
PAPER_LOW = "Small AlexNet 1.4%; All-CNN 4.7%; ResNet 1.5%"  # at its smallest beta
PAPER_HIGH = "Small AlexNet 89.4%; All-CNN 88%; ResNet 88.5%"  # at 39.8, 6.3 and 6.3
PAPER_EDGE = "Small AlexNet 1.6; All-CNN 0.27; ResNet 0.6"  # where accuracy falls through 55%
PAPER_NATS = (-0.22, 0.53, 1.54, 2.21, 2.62, 2.81, 2.87)  # at UNIFORM
LOG10 = math.log(10)


def label_entropy(fraction, kind):
    """H(corrupted label | true label) of corrupt_labels with 10 classes, nats."""
    if kind == "pair":
        probabilities = [1 - fraction, fraction]
    else:
        probabilities = [1 - 0.9 * fraction] + 9 * [fraction / 10]
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def add_derived(rows):
    """The ok rows, with train error in %, nats per sample and what follows from corruption.

    rise: of nats over the same seed and N with real labels, if there is such a row.
    """
    rows = ok_rows(rows)
    for row in rows:
        row["error"] = 100 * (1 - row["train_acc"])
        row["nats"] = row["information"] / row["n"]
    for own in group_by(ok_rows(rows, panel="corruption"), "n", "seed").values():
        real = ok_rows(own, corruption=0.0)
        for row in own:
            row["entropy"] = label_entropy(row["corruption"], row["kind"])
            # a tenth of the resampled labels stay as they were
            wrong = row["corruption"] * (0.9 if row["kind"] == "uniform" else 1)
            row["wrong"] = round(wrong, 6)  # so that 0.9 * 0.1 is the 0.09 of pair flips
            if real:
                row["rise"] = row["nats"] - real[0]["nats"]
    return rows


def transition(rows):
    """The beta at which train accuracy falls through 55%; nan if it does not."""
    return crossing(summarise(rows, "beta", "train_acc"), 0.55)


def steps_of_rise(rows):
    """{"0 to 0.1:": by how much more the information rises, per seed} of successive corruptions."""
    rise = values_by(rows, "corruption", "rise")
    return {f"{low:g} to {high:g}:": rise[high] - rise[low] for low, high in pairwise(rise)}


def rises(rows, **where):
    """{seed: rise} of the rows with these values."""
    return {row["seed"]: row["rise"] for row in ok_rows(rows, **where)}


def pair_ratios(rows):
    """{"9% wrong:": rise by pair flips over that by uniform noise with as many wrong, per seed}."""
    ratios = {}
    for (wrong,) in group_by(ok_rows(rows, kind="pair"), "wrong"):
        pair = rises(rows, kind="pair", wrong=wrong)
        uniform = rises(rows, kind="uniform", wrong=wrong)
        ratios[f"{wrong:.0%} wrong:"] = [pair[seed] / uniform[seed]
                                         for seed in pair if seed in uniform]
    return ratios


def growth_of_rise(rows):
    """{"to N = 300:": by how much more the mean rise is than at the N before}."""
    rise = {n: values.mean() for n, values in values_by(rows, "n", "rise").items()}
    return {f"to N = {n:,}:": [rise[n] - rise[before]] for before, n in pairwise(rise)}


def entropy_spread(rows):
    """Largest over smallest rise / entropy of the label noise, of the means over seeds."""
    ratios = []
    for own in group_by(rows, "kind", "corruption").values():
        ratios.append(np.mean([row["rise"] / row["entropy"] for row in own]))
    if len(ratios) < 2:
        return []
    return [max(ratios) / min(ratios) if min(ratios) > 0 else math.inf]


def error_panel(ax, rows, n):
    """Train error against beta, a curve for each network."""
    for model, marker in zip(MODELS, ("oC0", "sC1", "^C2")):
        paper = PAPER_ERROR[model]
        ax.plot(PAPER_BETAS[:len(paper)], paper, marker[0] + "-", color="0.75", ms=4)
        points = summarise(rows, "beta", "error", model=model)
        line = "-" if len(points) > 2 else ""  # two points do not tell where a curve rises
        plot_points(ax, points, marker + line, label=model)
    ax.axvline(1, ls="--", c="k", lw=1)
    ax.set(xscale="log", xlabel="β", ylabel="train error, %",
           title=f"random labels, N = {n:,} (grey: paper, 10,000)")
    ax.legend()


def draw_rise(ax, rows, x, colours):
    """Rise of information against x, a curve for each kind and N, in the colour of N."""
    for (n, kind), own in group_by(rows, "n", "kind").items():
        style = "^--" if kind == "pair" else "o-"
        plot_points(ax, summarise(own, x, "rise"), style, color=colours[n],
                    label=f"{kind}, N = {n:,}")
    ax.set(ylabel="rise of I(w;D)/N over real labels, nats")
    ax.legend()


def wrong_panel(ax, rows, colours):
    draw_rise(ax, rows, "wrong", colours)
    paper = np.subtract(PAPER_NATS, PAPER_NATS[0])
    ax.plot(np.multiply(0.9, UNIFORM), paper, "o-", color="0.75", ms=4, zorder=1)
    ax.axhline(LOG10, color="k", ls=":", lw=1)
    ax.annotate("log 10", (0.9, LOG10), ha="right", va="bottom")
    ax.set(xlabel="fraction of wrong labels",
           title="Small AlexNet (grey: paper, uniform, N = 30,000)")


def entropy_panel(ax, rows, colours):
    draw_rise(ax, rows, "entropy", colours)
    ax.plot([0, LOG10], [0, LOG10], "k--", lw=1)
    ax.annotate("one nat per nat", (LOG10, LOG10), ha="right")
    ax.set(xlabel="H(corrupted label | true label), nats", title="against the labels' entropy")


def plot(models, rising, args):
    grid, panels = GRID[args.scale], []
    if models:
        panels.append(partial(error_panel, rows=models, n=grid["n_models"]))
    colours = {n: f"C{place}" for place, (n,) in enumerate(group_by(rising, "n"))}
    if rising:
        panels.append(partial(wrong_panel, rows=rising, colours=colours))
    most = ok_rows(rising, n=grid["n"])  # the N that has most kinds of corruption
    if len(group_by(most, "corruption")) > 2:  # two would be the ends of a line
        panels.append(partial(entropy_panel, rows=most, colours=colours))
    save_panels(panels, f"Fig. 2: {args.dataset}, scale {args.scale}", args)


def model_claims(rows, betas_of):
    """The claims of the left panel; betas_of: {network: beta of the grid}."""
    at_low, at_high, edge = {}, {}, {}
    for model, betas in betas_of.items():
        own = ok_rows(rows, model=model)
        if betas:
            at_low[model] = [row["error"] for row in ok_rows(own, beta=min(betas))]
            at_high[model] = [row["error"] for row in ok_rows(own, beta=max(betas))]
        if len(betas) > 2:  # two points do not tell where a curve falls
            edge[model] = per_seed(transition, own)
    return [
        check("random labels, smallest β: under 15% error", PAPER_LOW, at_low, (0, 15), "{:.1f}%"),
        check("random labels, largest β: over 80% error", PAPER_HIGH, at_high, (80, 100),
              "{:.1f}%"),
        check("random labels: through 55% accuracy at a β from 0.3 to 1.1", PAPER_EDGE, edge,
              (0.3, 1.1)),
        check("random labels: through 55% accuracy before β = 1", PAPER_EDGE, edge, (0, 1)),
    ]


def claims(models, rising, grid):
    """The paper's claims, of complete curves; thresholds were set before its rows."""
    main = ok_rows(rising, n=grid["n"])
    noisy = [row for row in main if row["corruption"] > 0]
    random = ok_rows(rising, corruption=1.0)
    grows = check("information grows with every step of uniform corruption", "yes",
                  steps_of_rise(ok_rows(main, kind="uniform")), (0, math.inf))
    return [grows] + model_claims(models, grid["betas"]) + [
        check("the rise from real to random labels grows with N", "not shown",
              growth_of_rise(random), (0, math.inf)),
        check("at N = 10,000 it is log 10 ± 0.3 = 2.0 to 2.6 nats per sample",
              "3.1 (first version 2.2)",
              {"": [row["rise"] for row in ok_rows(random, n=10_000)]},
              (LOG10 - 0.3, LOG10 + 0.3)),
        check("pair flips raise information less than half as much as uniform noise with as many "
              "wrong labels", "0.60, 0.50, 0.41 by entropy", pair_ratios(noisy), (0, 0.5)),
        check("rise / entropy of the label noise is constant within a factor 1.5", "theory",
              {"": entropy_spread(noisy)}, (1, 1.5)),
    ]


def make_cells(scale):
    grid, cells = GRID[scale], []
    for kind in ("uniform", "pair"):
        for n, fractions in grid[kind].items():
            for fraction in fractions:
                cell = {"panel": "corruption", "corruption": fraction, "kind": kind, "n": n,
                        "beta": grid["beta"]}
                if scale == "cpu" and n == 10_000:
                    # one seed, not those of --seeds: hours; with fewer steps nets stay at chance
                    cell |= {"seed": 0, "steps_factor": 1.25}
                cells.append(cell)
    for model, betas in grid["betas"].items():
        for beta in betas:
            cells.append({"panel": "models", "model": model, "n": grid["n_models"], "beta": beta})
    return cells


CORRUPTION_KEYS = {"N": "n", "kind": "kind", "corrupted": "corruption", "steps": "steps"}
MEASURES = {"train error, %": "error", "cross-entropy": "cross_entropy", "I/N": "nats",
            "objective": "objective"}


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = make_cells(args.scale)
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data)
    rows = add_derived(rows)
    models, corrupted = ok_rows(rows, panel="models"), ok_rows(rows, panel="corruption")
    rising = [row for row in corrupted if "rise" in row]
    plot(models, rising, args)
    whole_models = complete_curves(
        models, [cell for cell in cells if cell["panel"] == "models"], "model")
    whole_rising = complete_curves(
        rising, [cell for cell in cells if cell["panel"] == "corruption"], "n")
    save_tables(args, claims=claims(whole_models, whole_rising, GRID[args.scale]),
                models=cell_table(models, {"net": "model", "β": "beta"}, MEASURES),
                corruption=cell_table(corrupted, CORRUPTION_KEYS, MEASURES | {"rise": "rise"}))


if __name__ == "__main__":
    main()
