"""Fig. 2: random labels are memorised at small beta in every architecture, at a cost in nats.

    python fig2_corrupted_labels.py --scale demo     # synthetic images, under 2 minutes on 2 cores
    python fig2_corrupted_labels.py --scale cpu      # CIFAR-10, small networks, an hour on 2 cores
    python fig2_corrupted_labels.py --gpu 0          # CIFAR-10, the paper's N = 10,000 and 30,000

Panel "models": Small AlexNet, All-CNN and a ResNet are trained on random labels with
L = cross-entropy + beta/N * I(w;D), beta from 0.025 up; train error rises from near 0 to chance.
Panel "corruption": Small AlexNet at one small beta, at which it fits everything, with a fraction of
the labels resampled; the information in the weights grows with it. The paper expects a rise of
log 10 = 2.30 nats per sample, what a random label holds, and shows 3.1. Measured: 3.17 at
N = 3,000, beta = 0.1; it depends on N and beta.

Protocol, the same for every cell: Adam; 100 epochs, or `steps` if that is more; learning rates
held from 10% to 80% of the steps, then a cosine to 0; beta raised from 0 over the first 40%.
Biases and batch normalisation are not counted, and the nets are short of their minimum: Fig. 1
shows what more steps do. Accuracy and cross-entropy are of sampled weights on the training set.
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (accuracy, bn_recalibrated, claim, complete_seeds,
                    corrupt_labels, crossing, draw_subset, fmt, ib_loss, load_images, lr_factor,
                    minibatches, new_figure, normalise, ok_rows, param_groups, parse_args, per_seed,
                    plot_points, predict, run_grid, save_figure, save_tables, summarise,
                    to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row.
SETTINGS = {
    "demo": dict(widths={"Small AlexNet": 1 / 8, "All-CNN": 1 / 16, "ResNet": 1 / 2}, blocks=1,
                 steps=400, batch=50, lr=0.003, lr_noise=0.04, test=1000),
    "cpu": dict(widths={"Small AlexNet": 1 / 4, "All-CNN": 1 / 8, "ResNet": 1 / 2}, blocks=1,
                steps=1000, batch=100, lr=0.003, lr_noise=0.04, test=5000),
    "paper": dict(widths={"Small AlexNet": 1, "All-CNN": 1, "ResNet": 4}, blocks=3, steps=6000,
                  batch=500, lr=0.003, lr_noise=0.04, test=10_000),
}
# The cells: n_models and betas of the first panel; corruptions at n and beta, and only the two ends
# of them at the pairs (n, beta) of `elsewhere`, the last of them at one n.
CORRUPTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
GRID = {
    "demo": dict(n_models=100, betas=(0.0025, 0.025, 0.25, 2.5), n=200, beta=0.1,
                 corruptions=(0.0, 0.5, 1.0), elsewhere=()),
    "cpu": dict(n_models=1000, betas=(0.025, 0.063, 0.158, 0.398, 1.0, 2.51), n=3000, beta=0.1,
                corruptions=CORRUPTIONS,
                elsewhere=((300, 0.1), (1000, 0.03), (1000, 0.1), (1000, 0.2))),
    "paper": dict(n_models=10_000,
                  betas=(0.025, 0.063, 0.158, 0.398, 1.0, 2.51, 6.31, 15.8, 39.8), n=30_000,
                  beta=0.1, corruptions=CORRUPTIONS,
                  elsewhere=((10_000, 0.03), (10_000, 0.1), (10_000, 0.3))),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


def load_data(args):
    s, dataset = SETTINGS[args.scale], "objects" if args.dataset == "synthetic" else args.dataset
    return load_images(dataset, args.data_dir, max(c["n"] for c in make_cells(args.scale)),
                       s["test"])


def small_alexnet(width, blocks):
    """The paper's Small AlexNet. Pooling and ReLU commute: pooled first is cheaper."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        nn.Conv2d(3, conv, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(conv, conv, 5, padding=2), nn.BatchNorm2d(conv), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(conv * 49, fc1), nn.BatchNorm1d(fc1), nn.ReLU(),
        nn.Linear(fc1, fc2), nn.BatchNorm1d(fc2), nn.ReLU(),
        nn.Linear(fc2, 10),
    )


def all_cnn(width, blocks=None):
    """The All-CNN, (n, 3, h, w) -> (n, 10): eight convolutions with ReLU, a ninth, an average."""
    layers, inputs = [], 3
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                   nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False) if stride > 1 else None

    def forward(self, x):
        h = self.norm1(x).relu()
        # strided by a slice: torch 2.14's CPU convolution with kernel 1, stride 2 corrupts memory
        shortcut = self.shortcut(h[:, :, ::2, ::2]) if self.shortcut else x
        return shortcut + self.conv2(self.norm2(self.conv1(h)).relu())


def resnet(width, blocks):
    """Pre-activation ResNet, 6*blocks + 2 layers deep, 16, 32 and 64 channels times width."""
    channels = int(16 * width)
    layers = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(channels, channels * stride, stride))
            channels *= stride
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(channels, 10))


MODELS = {"Small AlexNet": small_alexnet, "All-CNN": all_cnn, "ResNet": resnet}


def train_cell(cell, device, args, progress):
    s, n, name = SETTINGS[args.scale], cell["n"], cell.get("model", "Small AlexNet")
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    y = corrupt_labels(y, cell.get("corruption", 1.0), 10, generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (normalise(images, mean, std, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = to_stochastic(MODELS[name](s["widths"][name], s["blocks"]))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = max(s["steps"], 100 * n // s["batch"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    batches = minibatches(n, s["batch"], device)
    for step in range(steps):
        index, beta = next(batches), cell["beta"] * min(1, step / steps / 0.4)
        loss, _, _ = ib_loss(model(x[index]), y[index], model, beta, n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return measure(model, cell["beta"], x, y, x_test, y_test)


@torch.no_grad()
def measure(model, beta, x, y, x_test, y_test):
    """What a row holds. Sampled weights are resampled over at least 2,000 training images."""
    passes = max(1, 2000 // len(x))
    with bn_recalibrated(model, x.split(100) * passes, draw=True):
        logits = torch.cat([predict(model, x) for _ in range(passes)])
        test_sampled = accuracy(predict(model, x_test), y_test)
    with bn_recalibrated(model, x.split(100), draw=False):
        train_mean = accuracy(predict(model, x), y)
        test_mean = accuracy(predict(model, x_test), y_test)
    labels = y.repeat(passes)
    cross_entropy = F.cross_entropy(logits, labels).item()
    layers = [m for m in model.modules() if hasattr(m, "information")]
    by_layer = {f"{'conv' if isinstance(m, nn.Conv2d) else 'fc'}{i}": m.information().item()
                for i, m in enumerate(layers, 1)}
    information = weight_information(model).item()
    return {"train_acc": accuracy(logits, labels), "train_acc_mean": train_mean,
            "test_acc": test_mean, "test_acc_sampled": test_sampled,
            "cross_entropy": cross_entropy, "information": information,
            "objective": cross_entropy + beta * information / len(x),
            "information_by_layer": by_layer}


# The paper's Fig. 2, digitised. Left, N = 10,000: train error in % at each beta. Right: nats per
# sample, up to a constant, at each corruption.
PAPER_BETAS = (0.025, 0.063, 0.158, 0.398, 1, 2.51, 6.31, 15.8, 39.8)
PAPER_ERROR = {"Small AlexNet": (1.4, 3.8, 7.3, 10.2, 17.6, 74.2, 87.8, 89.3, 89.4),
               "All-CNN": (4.7, 16.9, 31, 55.4, 79, 85, 88),
               "ResNet": (1.5, 3.3, 6, 15.5, 81.7, 87.6, 88.5)}
PAPER_INFORMATION = dict(zip(CORRUPTIONS, (-0.22, 0.53, 1.54, 2.21, 2.62, 2.81, 2.87)))
LOG10 = math.log(10)  # nats in a random label


def add_derived(rows):
    """The rows that did not diverge, with nats per sample and train error in %."""
    return [row | {"nats": row["information"] / row["n"],
                   "error": 100 * (1 - row["train_acc"])} for row in ok_rows(rows)]


def rises(ok, n, beta):
    """Information of random less that of real labels, nats per sample, for each complete seed."""
    rows = complete_seeds(ok, [{"panel": "corruption", "corruption": c, "n": n, "beta": beta}
                               for c in (0.0, 1.0)])
    return per_seed(lambda rows: rows[-1]["nats"] - rows[0]["nats"], rows)


def claims(ok, scale):
    """The claims table, over the seeds of which no cell is missing."""
    grid, table = GRID[scale], []
    low, high = min(grid["betas"]), max(grid["betas"])
    models, corruption = ([c for c in make_cells(scale) if c["panel"] == panel]
                          for panel in ("models", "corruption"))
    rows = complete_seeds(ok, models)
    for model in MODELS if rows else ():
        some, paper = ok_rows(rows, model=model), dict(zip(PAPER_BETAS, PAPER_ERROR[model]))
        error = {beta: [row["error"] for row in ok_rows(some, beta=beta)] for beta in (low, high)}
        table.append(claim(
            f"{model}, random labels: train error goes from under 15% to over 80%",
            "; ".join(f"{paper[beta]:g}%" for beta in (low, high) if beta in paper),
            "; ".join(f"β = {beta:g}: {fmt(v, '{:.1f}%')}" for beta, v in error.items()),
            max(error[low]) < 15 and min(error[high]) > 80))
        edge = per_seed(lambda rows: crossing(summarise(rows, "beta", "train_acc"), 0.45), some)
        paper = crossing([(beta, -v) for beta, v in paper.items()], -55)
        table.append(claim(f"{model}, random labels: train error passes 55% at β below 1.05",
                           f"{paper:.2g}", fmt(edge), max(edge) < 1.05))
    rows, n, beta = complete_seeds(ok, corruption), grid["n"], grid["beta"]
    if not rows:
        return table
    at = {c: ok_rows(rows, corruption=c, n=n, beta=beta) for c in grid["corruptions"]}
    where = f"N = {n:,}, β = {beta:g}"
    train = {c: [row["train_acc"] for row in some] for c, some in at.items()}
    table.append(claim(f"{where}: train accuracy over 85% at every corruption", "fits everything",
                       "; ".join(f"{c:g}: {fmt(v, '{:.1%}')}" for c, v in train.items()),
                       min(map(min, train.values())) > 0.85))
    rise = rises(rows, n, beta)
    table.append(claim(f"{where}: from real to random labels information rises by 1.9 to 3.5 nats "
                       "per sample", "3.1 (first version 2.2)", fmt(rise),
                       1.9 <= np.mean(rise) <= 3.5))
    nats = [np.array([row["nats"] for row in some]) for some in at.values()]
    steps = [after - before for before, after in zip(nats, nats[1:])]
    table.append(claim(f"{where}: information grows with every step of corruption (mean over "
                       "seeds)", "0.75; 1.01; 0.67; 0.41; 0.19; 0.06", "; ".join(map(fmt, steps)),
                       all(np.mean(v) > 0 for v in steps)))
    pairs = sorted({*grid["elsewhere"], (n, beta)})
    for name, sign, some in (("grows with N", 1, [p for p in pairs if p[1] == beta]),
                             ("shrinks as β grows", -1, [p for p in pairs if p[0] == pairs[1][0]]
                              if len(pairs) > 1 else [])):
        if len(some) > 1:
            values = {pair: rises(rows, *pair) for pair in some}
            table.append(claim(
                f"the rise from real to random labels {name}", "not shown",
                "; ".join(f"N = {n:,}, β = {b:g}: {fmt(v)}" for (n, b), v in values.items()),
                all(sign * np.diff([np.mean(v) for v in values.values()]) > 0)))
    return table


def plot(ok, args):
    s, grid = SETTINGS[args.scale], GRID[args.scale]
    main = ok_rows(ok, panel="corruption", n=grid["n"], beta=grid["beta"])
    fig, axes = new_figure(2, 2, f"Fig. 2: {args.dataset}, scale {args.scale}, up to "
                           f"{len({row['seed'] for row in ok})} seeds per cell")
    ax = axes[0, 0]
    for (model, width), marker, colour in zip(s["widths"].items(), "os^", ("C0", "C1", "C2")):
        error = PAPER_ERROR[model]
        ax.plot(PAPER_BETAS[:len(error)], error, marker=marker, color="0.75", ms=4,
                label=f"paper, {model}")
        plot_points(ax, summarise(ok, "beta", "error", panel="models", model=model),
                    fmt=marker + "-", color=colour, label=f"{model}, width ×{width:g}")
    ax.axvline(1, ls="--", color="k", lw=1)
    ax.set(xscale="log", xlabel="β", ylabel="train error, %, sampled weights", xlim=(3e-4, None),
           title=f"random labels, N = {grid['n_models']:,} (paper: 10,000)")

    ax, points = axes[0, 1], summarise(main, "corruption", "nats")
    start = points[0][1] if points else 0
    ax.plot(CORRUPTIONS, [v + 0.22 + start for v in PAPER_INFORMATION.values()], "o-", color="0.75",
            ms=4, label="paper, up to a constant: moved to begin where ours does")
    plot_points(ax, points, color="C3", label="Small AlexNet")
    ax.axhspan(start, start + LOG10, color="C0", alpha=0.08, lw=0, label="log 10: a random label")
    ax.set(xlabel="fraction of corrupted labels", ylabel="I(w;D)/N, nats per sample",
           title=f"information in the weights, N = {grid['n']:,}, β = {grid['beta']:g}")

    ax, names = axes[1, 0], list(main[0]["information_by_layer"]) if main else []
    corruptions = sorted({row["corruption"] for row in main})
    nats = [[np.mean([row["information_by_layer"][name] / row["n"]
                      for row in ok_rows(main, corruption=c)]) for c in corruptions]
            for name in names]
    colours = plt.cm.viridis(np.linspace(0.2, 0.95, max(1, len(names))))
    ax.stackplot(corruptions, nats, labels=names, colors=colours)
    ax.set(xlabel="fraction of corrupted labels", ylabel="nats per sample, mean over seeds",
           title="the same by layer")

    ax, pairs = axes[1, 1], sorted({(grid["n"], grid["beta"]), *grid["elsewhere"]})
    for beta, colour in zip(sorted({b for _, b in pairs}), ("C2", "C3", "C4", "C5")):
        points = [{"status": "ok", "n": n, "rise": v} for n, b in pairs if b == beta
                  for v in rises(ok, n, b)]
        plot_points(ax, summarise(points, "n", "rise"), color=colour, label=f"β = {beta:g}")
    ax.plot(30_000, 3.1, "D", color="0.75", label="paper (its N is likely 30,000)")
    ax.axhline(LOG10, color="0.6", ls="--", label="log 10")
    ax.set(xscale="log", xlabel="N", ylabel="nats per sample", ylim=(0, None),
           title="rise from real to random labels")
    for ax, place in zip(axes.flat, ("upper left", "lower right", "lower right", "best")):
        ax.legend(loc=place)
    save_figure(fig, args)


def make_cells(scale):
    """The cells of both panels."""
    grid = GRID[scale]
    cells = [{"panel": "corruption", "corruption": c, "n": grid["n"], "beta": grid["beta"]}
             for c in grid["corruptions"]]
    cells += [{"panel": "corruption", "corruption": c, "n": n, "beta": beta}
              for n, beta in grid["elsewhere"] for c in (0.0, 1.0)]
    return cells + [{"panel": "models", "model": model, "n": grid["n_models"], "beta": beta}
                    for model in MODELS for beta in grid["betas"]]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    ok = add_derived(rows)
    plot(ok, args)
    save_tables(args, claims=claims(ok, args.scale))


if __name__ == "__main__":
    main()
