"""Fig. 2: every architecture memorises random labels at small beta, at a cost in nats.

    python fig2_corrupted_labels.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig2_corrupted_labels.py --scale cpu      # CIFAR-10, small networks, 3 hours on 2 cores
    python fig2_corrupted_labels.py --gpu 0          # CIFAR-10, the paper's N = 10,000 and 30,000

Panel "models": three architectures learn random labels with L = cross-entropy + beta/N * I(w;D).
Panel "corruption": Small AlexNet at a small beta, with a share of the labels corrupted: "uniform",
resampled over all classes, or "pair", the next class. An ideal code stores the entropy of the
corrupted labels given the true ones: less for pair flips than for as much uniform noise.

Protocol and measures as in Fig. 1, with lower peaks of beta, chosen by objectives on another seed.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (beta_at, claim, complete_seeds, corrupt_labels, crossing, draw_subset,
                    evaluate, evaluate_as_trained, fmt, load_images, lr_factor,
                    minibatches, new_figure, normalise, ok_rows, param_groups, parse_args, per_seed,
                    plot_points, run_grid, save_figure, save_tables, summarise, to_stochastic,
                    weight_information, with_information)

# How a cell is trained, stored in its row. It takes steps * max(1, N/300)^0.4.
SHARED = dict(batch=100, hold=0.6, peak=0.3)
SETTINGS = {
    "demo": dict(widths={"Small AlexNet": 1 / 8, "All-CNN": 1 / 16, "ResNet": 1 / 2}, blocks=1,
                 steps=1000, batch=50, lr=0.012, lr_noise=0.06, hold=0.6, peak=0, test=1000),
    "cpu": dict(widths={"Small AlexNet": 1 / 4, "All-CNN": 1 / 8, "ResNet": 1 / 2}, blocks=1,
                steps=5000, lr=0.024, lr_noise=0.16, test=5000, **SHARED),
    "paper": dict(widths={"Small AlexNet": 1, "All-CNN": 1, "ResNet": 4}, blocks=3,
                  steps=10_000, lr=0.012, lr_noise=0.04, test=10_000, **SHARED),
}
UNIFORM = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
# The cells: models at n_models and betas; corruptions at n and beta; real and random at other_n.
# Pair flips: as many wrong labels as 0.1, 0.3 and 0.5 resampled. peak: of Small AlexNet.
# longer: betas trained for twice the steps too, seed 0.
FULL = dict(betas=(0.158, 0.398, 0.6, 0.8, 1.0, 2.51), longer=(0.398, 0.6), beta=0.1, peak=0.5,
            uniform=UNIFORM, pair=(0.09, 0.27, 0.45))
GRID = {
    "demo": dict(n_models=100, betas=(0.03, 0.3, 3.0), longer=(), n=200, beta=0.03, peak=0,
                 uniform=(0.0, 1.0), pair=(), other_n=()),
    "cpu": FULL | dict(n_models=1000, n=3000, other_n=(300, 1000)),
    "paper": FULL | dict(n_models=10_000, n=30_000, other_n=(3000, 10_000)),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


def load_data(args):
    largest = max(cell["n"] for cell in make_cells(args.scale))
    return load_images(args.dataset, args.data_dir, largest, SETTINGS[args.scale]["test"])


class Shift(nn.Module):
    """x + a bias per channel, of a linear layer, so that it gets noise too."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Linear(1, channels, bias=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def norm(channels, kind=nn.BatchNorm2d):
    return nn.Sequential(kind(channels, affine=False), Shift(channels))


def small_alexnet(width=1.0):
    """The paper's Small AlexNet, pooled before ReLU: the same, cheaper."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        nn.Conv2d(3, conv, 5, padding=2, bias=False), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(conv, conv, 5, padding=2, bias=False), norm(conv), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(conv * 49, fc1, bias=False), norm(fc1, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(fc1, fc2, bias=False), norm(fc2, nn.BatchNorm1d), nn.ReLU(),
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
        # a slice: strided 1x1 convolutions corrupt memory (oneDNN issue 6035)
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


MODELS = {
    "Small AlexNet": lambda width, blocks: small_alexnet(width),
    "All-CNN": lambda width, blocks: all_cnn(width),
    "ResNet": resnet,
}


def train_cell(cell, device, args, progress):
    s, n, name = SETTINGS[args.scale] | cell, cell["n"], cell.get("model", "Small AlexNet")
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    y = corrupt_labels(y, cell.get("corruption", 1.0), 10, generator, cell.get("kind", "uniform"))
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (normalise(images, mean, std, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = to_stochastic(MODELS[name](s["widths"][name], s["blocks"]))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    steps = round(s["steps"] * max(1, n / 300) ** 0.4 * cell.get("budget", 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    batches, forward = minibatches(n, s["batch"], device), with_information(model, x[:s["batch"]])
    for step in range(steps):
        index, beta = next(batches), beta_at(step / steps, cell["beta"], s["peak"])
        logits, nats = forward(x[index])
        loss = F.cross_entropy(logits, y[index]) + beta / n * nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    measured = evaluate_as_trained(model, s["batch"], x, y) | evaluate(model, x, y, x_test, y_test)
    nats = weight_information(model).item()
    objective = measured["cross_entropy_batch"] + cell["beta"] * nats / n
    return {"steps": steps, "objective": objective, "information": nats} | measured


# The paper's Fig. 2, digitised: train error in % by beta; nats per sample, up to a constant.
PAPER_BETAS = (0.025, 0.063, 0.158, 0.398, 1.0, 2.51, 6.31, 15.8, 39.8)
PAPER_ERROR = {"Small AlexNet": (1.4, 3.8, 7.3, 10.2, 17.6, 74.2, 87.8, 89.3, 89.4),
               "All-CNN": (4.7, 16.9, 31, 55.4, 79, 85, 88),
               "ResNet": (1.5, 3.3, 6, 15.5, 81.7, 87.6, 88.5)}
PAPER_NATS = (-0.22, 0.53, 1.54, 2.21, 2.62, 2.81, 2.87)  # at UNIFORM
LOG10 = math.log(10)


def label_entropy(fraction, kind):
    """H(corrupted label | true label) of corrupt_labels with 10 classes, nats."""
    others = [fraction] if kind == "pair" else 9 * [fraction / 10]
    return -sum(p * math.log(p) for p in (1 - sum(others), *others) if p > 0)


def add_derived(rows):
    """The ok rows, with what follows; r: 0 below 55% accuracy."""
    rows = ok_rows(rows)
    for row in rows:
        row["error"] = 100 * (1 - row["train_acc_batch"])
        row["nats"] = row["information"] / row["n"]
        row["r"] = (LOG10 - row["cross_entropy_batch"]) / row["nats"] if row["error"] < 45 else 0.0
    for row in ok_rows(rows, panel="corruption"):
        row["entropy"] = label_entropy(row["corruption"], row["kind"])
        row["wrong"] = row["corruption"] * (0.9 if row["kind"] == "uniform" else 1)
        for real in ok_rows(rows, corruption=0.0, seed=row["seed"], n=row["n"]):
            row["rise"] = row["nats"] - real["nats"]
    return rows


def claims(ok, scale):
    """The claims table, over complete seeds."""
    grid, table = GRID[scale], []
    low, *_, high = grid["betas"]
    rows = complete_seeds(ok_rows(ok, budget=None), model_cells(grid))
    for model in MODELS if rows else ():
        net, paper = ok_rows(rows, model=model), dict(zip(PAPER_BETAS, PAPER_ERROR[model]))
        error = {b: [row["error"] for row in ok_rows(net, beta=b)] for b in (low, high)}
        table.append(claim(
            f"{model}: train error on random labels goes from under 15% to over 80%",
            "; ".join(f"{paper[b]:g}%" for b in error if b in paper),
            "; ".join(f"β = {b:g}: {fmt(v, '{:.1f}%')}" for b, v in error.items()),
            max(error[low]) < 15 and min(error[high]) > 80))
        if len(grid["betas"]) > 3:  # the demo is too short
            edge = per_seed(lambda rows: crossing(summarise(rows, "beta", "train_acc_batch"), 0.45),
                            net)
            paper = crossing([(beta, -v) for beta, v in paper.items()], -55)
            table.append(claim(f"{model}: it passes 55% at a β from 0.3 to 1.05", f"{paper:.2g}",
                               fmt(edge), 0.3 <= min(edge) and max(edge) <= 1.05))
    if rows:
        largest = max(row["r"] for row in rows)
        table.append(claim("random labels: r ≤ 1, as for any code", "–",
                           f"largest {largest:.2f}", largest <= 1))
    rows = complete_seeds(ok, corruption_cells(grid))
    return table + (corruption_claims(rows, grid) if rows else [])


def corruption_claims(rows, grid):
    n, beta = grid["n"], grid["beta"]
    main = ok_rows(rows, n=n)
    least = min(row["train_acc_batch"] for row in main)
    rise = {kind: np.array([[row["rise"] for row in ok_rows(main, kind=kind, corruption=c)]
                            for c in grid[kind]]) for kind in ("uniform", "pair")}
    growth = np.diff(rise["uniform"], axis=0)
    table = [
        claim(f"N = {n:,}, β = {beta:g}: train accuracy over 85% at every corruption",
              "fits all", f"≥ {least:.1%}", least > 0.85),
        claim("information grows with every step of uniform corruption",
              "yes", "; ".join(map(fmt, growth)), all(growth.mean(1) > 0))]
    if grid["pair"]:
        total, sizes = rise["uniform"][-1], sorted({row["n"] for row in rows})
        by_n = [[row["rise"] for row in ok_rows(rows, corruption=1.0, n=size)] for size in sizes]
        share, as_wrong = grid["pair"][-1], round(grid["pair"][-1] / 0.9, 6)
        ratio = rise["pair"][-1] / rise["uniform"][grid["uniform"].index(as_wrong)]
        expected = label_entropy(share, "pair") / label_entropy(as_wrong, "uniform")
        means = np.array([v.mean() / label_entropy(c, kind)
                          for kind in rise for c, v in zip(grid[kind], rise[kind]) if c])
        table += [
            claim("from real to random labels it rises by log 10 = 2.30 ± 0.3 nats per sample",
                  "3.1 (first version 2.2)", fmt(total), abs(total.mean() - LOG10) < 0.3),
            claim("this rise grows with N", "not shown",
                  "; ".join(f"{size:,}: {fmt(v)}" for size, v in zip(sizes, by_n)),
                  all(np.diff(np.mean(by_n, 1)) > 0)),
            claim(f"pair flips of {share:.0%} raise it less than half as much as uniform noise "
                  "with as many wrong labels", f"{expected:.2f} by entropy",
                  fmt(ratio, "{:.3f}"), ratio.mean() < 0.5),
            claim("rise / entropy of the noise is constant within a factor 1.5",
                  "theory", f"from {means.min():.2f} to {means.max():.2f}",
                  means.min() > 0 and means.max() < 1.5 * means.min())]
    return table


def plot(ok, args):
    grid = GRID[args.scale]
    main = ok_rows(ok, panel="corruption", n=grid["n"])
    fig, axes = new_figure(2, 2, f"Fig. 2: {args.dataset}, scale {args.scale}, up to "
                           f"{len({row['seed'] for row in ok})} seeds")
    error_ax, r_ax, nats_ax, entropy_ax = axes.flat
    for model, marker in zip(MODELS, ("oC0", "sC1", "^C2")):
        error_ax.plot(PAPER_BETAS[:len(PAPER_ERROR[model])], PAPER_ERROR[model], marker[0] + "-",
                      color="0.75", ms=4, label=f"paper, {model}")
        for budget, style in ((None, dict(label=model)), (2, dict(mfc="w"))):
            rows = ok_rows(ok, panel="models", model=model, budget=budget)
            memorised = [row for row in rows if row["r"]]
            plot_points(error_ax, summarise(rows, "beta", "error"), marker + "-", **style)
            plot_points(r_ax, summarise(memorised, "beta", "r"), marker + "-", **style)
    error_ax.axvline(1, ls="--", c="k", lw=1, label="β = 1")
    error_ax.set(xscale="log", xlabel="β", ylabel="train error, %",
                 title=f"random labels, N = {grid['n_models']:,} (paper: 10,000)")
    r_ax.plot([0, 1], [0, 1], "k", lw=1, label="r = β: memory pays above")
    r_ax.set(xlabel="β", ylabel="r, label nats per nat in the weights", xlim=(0, 1.05),
             ylim=(0, 1.05), title="efficiency (hollow: twice the steps)")

    for kind in ("uniform", "pair"):
        rows = ok_rows(main, kind=kind)
        plot_points(nats_ax, summarise(rows, "wrong", "rise"), label=f"{kind} noise")
        plot_points(entropy_ax, summarise(rows, "entropy", "rise"), "o", label=f"{kind} noise")
    entropies = [label_entropy(c, "uniform") for c in UNIFORM]
    for ax, paper_x in ((nats_ax, np.multiply(0.9, UNIFORM)), (entropy_ax, entropies)):
        ax.plot(paper_x, np.subtract(PAPER_NATS, PAPER_NATS[0]), "o-", color="0.75", ms=4,
                zorder=0, label="paper, uniform (N = 30,000?)")
        ax.set(ylabel="rise of I(w;D)/N over real labels, nats")
    nats_ax.set(xlabel="fraction of wrong labels",
                title=f"Small AlexNet, N = {grid['n']:,}, β = {grid['beta']:g}")
    entropy_ax.plot([0, LOG10], [0, LOG10], "k--", lw=1, label="one nat per nat")
    entropy_ax.set(xlabel="H(corrupted label | true label), nats", title="against entropy")
    for ax in axes.flat:
        ax.legend()
    save_figure(fig, args)


def model_cells(grid):
    return [{"panel": "models", "model": model, "n": grid["n_models"], "beta": beta}
            | ({"peak": grid["peak"]} if model == "Small AlexNet" else {})
            for model in MODELS for beta in grid["betas"]]


def corruption_cells(grid):
    cells = [(kind, c, grid["n"]) for kind in ("uniform", "pair") for c in grid[kind]]
    cells += [("uniform", c, n) for n in grid["other_n"] for c in (0.0, 1.0)]
    return [{"panel": "corruption", "corruption": c, "kind": kind, "n": n,
             "beta": grid["beta"], "peak": grid["peak"]} for kind, c, n in cells]


def make_cells(scale):
    grid = GRID[scale]
    longer = model_cells(grid | {"betas": grid["longer"]})
    return (corruption_cells(grid) + model_cells(grid)
            + [cell | {"budget": 2, "seed": 0} for cell in longer])


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    s, cells = SETTINGS[args.scale], make_cells(args.scale)
    ok = add_derived(run_grid(cells, train_cell, args, s, load_data))
    plot(ok, args)
    save_tables(args, claims=claims(ok, args.scale))


if __name__ == "__main__":
    main()
