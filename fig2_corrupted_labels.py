"""Fig. 2: random labels are memorised while beta < 1 whatever the network, and each costs its nats of information.

    python fig2_corrupted_labels.py --scale demo     # synthetic images, 1.5 to 2 minutes on 2 cores
    python fig2_corrupted_labels.py --scale cpu      # CIFAR-10, small networks, about an hour on 2 cores
    python fig2_corrupted_labels.py --gpu 0          # CIFAR-10, the paper's N = 10,000 and 30,000

Two experiments. "models": Small AlexNet, All-CNN and a ResNet are trained on random labels with L = cross-entropy +
beta/N * I(w;D), for beta from 0.025 up; train error goes from nothing to chance. "corruption": Small AlexNet is trained
at one small beta, at which it fits everything, with a share of the labels drawn anew; the information in its weights
grows with the share. The paper expects the whole rise to be about log 10 = 2.30 nats a sample, what a random label
holds, and shows 3.1. Measured at cpu scale: the rise is 3.17 nats at N = 3,000, and depends on N and beta (1.7 at
N = 300; 5.9 at beta = 0.03, N = 1,000); error rises through 55% at beta = 0.27 for Small AlexNet and 0.12 for the two
others.

The protocol is that of Fig. 1, the same for every cell and network: Adam; 100 epochs, or `steps` if that is more;
learning rate held from 10% to 80% of the steps, then brought to 0 by a cosine; beta raised linearly from 0 over the
first 40% and held for the rest. Accuracy and cross-entropy are those of sampled weights on the train set.
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn

from common import (StochasticConv2d, StochasticLinear, annealed, claim, complete_seeds, corrupt_labels, crossing,
                    draw_subset, evaluate, ib_loss, label_information, load_objects, minibatches, new_figure,
                    parse_args, per_seed, plot_points, print_claims, run_grid, save_figure, summarise,
                    weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. `widths` are those of each network; the `shares` of corrupted labels are measured at `n` and `beta`, their
# two ends at the pairs (n, beta) of `elsewhere`, the last of them at one n, to see what the rise depends on.
# ----------------------------------------------------------------------------------------------------------------------
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
SETTINGS = {
    "demo": dict(widths={"Small AlexNet": 1 / 8, "All-CNN": 1 / 16, "ResNet": 1 / 2}, blocks=1, n_models=100,
                 betas=(0.0025, 0.025, 0.25, 2.5), n=200, beta=0.1, shares=(0.0, 0.5, 1.0), elsewhere=(), steps=400,
                 batch=50, test=1000),
    "cpu": dict(widths={"Small AlexNet": 1 / 4, "All-CNN": 1 / 8, "ResNet": 1 / 2}, blocks=1, n_models=1000,
                betas=(0.025, 0.063, 0.158, 0.398, 1.0, 2.51), n=3000, beta=0.1, shares=SHARES,
                elsewhere=((300, 0.1), (1000, 0.03), (1000, 0.1), (1000, 0.2)), steps=1000, batch=100, test=5000),
    "paper": dict(widths={"Small AlexNet": 1, "All-CNN": 1, "ResNet": 4}, blocks=3, n_models=10_000,
                  betas=(0.025, 0.063, 0.158, 0.398, 1.0, 2.51, 6.31, 15.8, 39.8), n=30_000, beta=0.1, shares=SHARES,
                  elsewhere=((10_000, 0.03), (10_000, 0.1), (10_000, 0.3)), steps=6000, batch=500, test=10_000),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"], "paper": ["cifar10", "synthetic"]}
LR, LR_NOISE = 3e-3, 0.04  # Adam's learning rates of the means and of log sigma^2


# ----------------------------------------------------------------------------------------------------------------------
# Data and models
# ----------------------------------------------------------------------------------------------------------------------
def load_data(args):
    s = SETTINGS[args.scale]
    return load_objects(args.dataset, args.data_dir, max(s["n"], s["n_models"]), s["test"])


def make_cell_data(cell, test, device, args):
    """N training images, a share of their labels drawn anew, and the test set, by the seed: x, y, x_test, y_test."""
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, cell["n"], generator)
    y = corrupt_labels(y, cell.get("corruption", 1.0), 10, generator)
    x_test, y_test = draw_subset(x_test, y_test, test, generator)
    x, x_test = (((v[:, :, 2:30, 2:30].float() - mean) / std).contiguous(memory_format=torch.channels_last)
                 for v in (x, x_test))
    return [t.to(device) for t in (x, y, x_test, y_test)]


def small_alexnet(width, blocks):
    """The paper's Small AlexNet. Pooling and ReLU commute: pooled first is cheaper."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        StochasticConv2d(3, conv, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        StochasticConv2d(conv, conv, 5, padding=2), nn.BatchNorm2d(conv), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(),
        StochasticLinear(conv * 49, fc1), nn.BatchNorm1d(fc1), nn.ReLU(),
        StochasticLinear(fc1, fc2), nn.BatchNorm1d(fc2), nn.ReLU(),
        StochasticLinear(fc2, 10),
    )


def all_cnn(width, blocks):
    """The All-CNN of Fig. 3: nine convolutions, two of them with stride 2, and an average over the places."""
    narrow, wide = int(96 * width), int(192 * width)
    layers, channels = [], 3
    for out, kernel, stride in [(narrow, 3, 1), (narrow, 3, 1), (wide, 3, 2), (wide, 3, 1), (wide, 3, 1), (wide, 3, 2),
                                (wide, 3, 1), (wide, 1, 1)]:
        layers += [StochasticConv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out),
                   nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, StochasticConv2d(wide, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027); a 1x1 convolution where the shape changes."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = StochasticConv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = StochasticConv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = StochasticConv2d(channels, out, 1, bias=False) if stride > 1 else None

    def forward(self, x):
        h = self.norm1(x).relu()
        # every second place by a slice: torch 2.14's CPU convolution with kernel 1 and stride 2 can corrupt memory
        shortcut = self.shortcut(h[:, :, ::2, ::2]) if self.shortcut else x
        return shortcut + self.conv2(self.norm2(self.conv1(h)).relu())


def resnet(width, blocks):
    """Pre-activation ResNet for CIFAR, 6*blocks + 2 layers deep, 16, 32 and 64 channels times width."""
    channels = int(16 * width)
    layers = [StochasticConv2d(3, channels, 3, padding=1, bias=False)]
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(channels, channels * stride, stride))
            channels *= stride
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         StochasticLinear(channels, 10))


MODELS = {"Small AlexNet": small_alexnet, "All-CNN": all_cnn, "ResNet": resnet}


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train_cell(cell, device, args, progress):
    s = SETTINGS[args.scale]
    torch.manual_seed(cell["seed"])
    n, name = cell["n"], cell.get("model", "Small AlexNet")
    x, y, x_test, y_test = make_cell_data(cell, s["test"], device, args)
    model = MODELS[name](s["widths"][name], s["blocks"]).to(device, memory_format=torch.channels_last)
    variances = [p for key, p in model.named_parameters() if key.endswith("log_sigma2")]
    others = [p for key, p in model.named_parameters() if not key.endswith("log_sigma2")]
    optimizer = torch.optim.Adam([{"params": others, "lr": LR}, {"params": variances, "lr": LR_NOISE}], fused=True)
    batches = minibatches(n, s["batch"], device)
    steps = max(s["steps"], 100 * n // s["batch"])
    for step in range(steps):
        t = step / steps
        for group, lr in zip(optimizer.param_groups, (LR, LR_NOISE)):
            group["lr"] = lr * annealed(t)
        index = next(batches)
        loss, _, _ = ib_loss(model(x[index]), y[index], model, cell["beta"] * min(1, t / 0.4), n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return measure(model, cell["beta"], x, y, x_test, y_test)


def measure(model, beta, x, y, x_test, y_test):
    """What a row holds."""
    logits, labels, results = evaluate(model, x, y, x_test, y_test)
    layers = [m for m in model.modules() if hasattr(m, "information")]
    by_layer = {f"{'conv' if isinstance(m, nn.Conv2d) else 'fc'}{i}": m.information().item()
                for i, m in enumerate(layers, 1)}
    information = weight_information(model).item()
    return results | {"objective": results["cross_entropy"] + beta * information / len(x), "information": information,
                      "information_by_layer": by_layer,
                      "label_information": label_information(logits, labels).item()}


# ----------------------------------------------------------------------------------------------------------------------
# What the rows say
# ----------------------------------------------------------------------------------------------------------------------
# The paper's Fig. 2, digitised. Left, N = 10,000: train error in % at each beta. Right: information, nats a sample up
# to a constant, at each share of corrupted labels.
PAPER_BETAS = (0.025, 0.063, 0.158, 0.398, 1, 2.51, 6.31, 15.8, 39.8)
PAPER_ERROR = {"Small AlexNet": (1.4, 3.8, 7.3, 10.2, 17.6, 74.2, 87.8, 89.3, 89.4),
               "All-CNN": (4.7, 16.9, 31, 55.4, 79, 85, 88), "ResNet": (1.5, 3.3, 6, 15.5, 81.7, 87.6, 88.5)}
PAPER_INFORMATION = dict(zip(SHARES, (-0.22, 0.53, 1.54, 2.21, 2.62, 2.81, 2.87)))
LOG10 = math.log(10)  # nats in a random label


def transition(rows):
    """Beta at which train error rises through 55%."""
    return crossing(summarise(rows, "beta", "train_acc"), 0.45)


def rise(rows):
    """Information of random labels less that of real labels, nats a sample."""
    information = dict(p[:2] for p in summarise(rows, "corruption", "per_sample"))
    return information[1.0] - information[0.0]


def add_derived(rows):
    """Rows with nats per sample, of all the weights and of each layer, and train error, added."""
    return [row if row["status"] != "ok" else row | {
        "per_sample": row["information"] / row["n"], "train_error": 100 * (1 - row["train_acc"]),
        "layers": {name: nats / row["n"] for name, nats in row["information_by_layer"].items()}} for row in rows]


def ends(rows, n, beta):
    """The rows with real and with random labels at this n and beta, of the seeds that have both."""
    return complete_seeds(rows, [{"panel": "corruption", "corruption": c, "n": n, "beta": beta} for c in (0.0, 1.0)])


def claims(rows, args):
    """The claims table of the figure; a claim of which cells are missing is not decided."""
    s = SETTINGS[args.scale]
    low, high = min(s["betas"]), max(s["betas"])
    table = []
    for model in s["widths"]:
        some = complete_seeds(rows, [{"panel": "models", "model": model, "beta": beta} for beta in s["betas"]])
        paper = dict(zip(PAPER_BETAS, PAPER_ERROR[model]))
        error = {f"β = {beta:g}": [r["train_error"] for r in some if r["beta"] == beta] for beta in (low, high)}
        table.append(claim(f"{model}, random labels: train error goes from under 15% to over 80%",
                           "; ".join(f"{paper[b]:g}%" for b in (low, high) if b in paper), error,
                           lambda v: v.reshape(2, -1)[0].max() < 15 and v.reshape(2, -1)[1].min() > 80, "{:.1f}%"))
        beta = crossing([(b, -e) for b, e in paper.items()], -55)
        table.append(claim(f"{model}, random labels: train error rises through 55% at β below 1.05", f"{beta:.2g}",
                           {"β": per_seed(transition, some)}, lambda v: v.max() < 1.05, "{:.2f}"))
    n, beta = s["n"], s["beta"]
    some = complete_seeds(rows, [{"panel": "corruption", "corruption": share, "n": n, "beta": beta}
                                 for share in s["shares"]])
    at = {share: [r for r in some if r["corruption"] == share] for share in s["shares"]}
    where = f"N = {n:,}, β = {beta:g}"
    table.append(claim(f"{where}: train accuracy over 85% at every share of corrupted labels", "fits everything",
                       {f"{share:g}": [100 * r["train_acc"] for r in some] for share, some in at.items()},
                       lambda v: v.min() > 85, "{:.1f}%"))
    table.append(claim(f"{where}: from real to random labels information rises by 1.9 to 3.5 nats a sample",
                       "3.1 (first version 2.2; a random label holds 2.30)", {"rise": per_seed(rise, some)},
                       lambda v: 1.9 <= v.mean() <= 3.5, "{:.2f}"))
    steps = {f"{a:g} to {b:g}": [y["per_sample"] - x["per_sample"] for x, y in zip(at[a], at[b])]
             for a, b in zip(s["shares"], s["shares"][1:])}
    table.append(claim(f"{where}: information grows with every step of corruption (mean over seeds)",
                       "; ".join(f"{PAPER_INFORMATION[b] - PAPER_INFORMATION[a]:.2f}"
                                 for a, b in zip(s["shares"], s["shares"][1:])), steps,
                       lambda v: (v.reshape(len(steps), -1).mean(1) > 0).all(), "{:.2f}"))
    elsewhere = s["elsewhere"]
    for name, sign, others in (("grows with N", 1, [(m, b) for m, b in elsewhere if b == beta] + [(n, beta)]),
                               ("shrinks as β grows", -1, [(m, b) for m, b in elsewhere if m == elsewhere[-1][0]])):
        if len(others) > 1:
            values = {f"N = {m:,}, β = {b:g}": per_seed(rise, ends(rows, m, b)) for m, b in sorted(others)}
            table.append(claim(f"the rise from real to random labels {name}", "not shown", values,
                               lambda v: (sign * np.diff([np.mean(x) for x in values.values()]) > 0).all(), "{:.2f}"))
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Plot
# ----------------------------------------------------------------------------------------------------------------------
def plot(rows, args):
    s = SETTINGS[args.scale]
    good = [r for r in rows if r["status"] == "ok"]
    models = [r for r in good if r["panel"] == "models"]
    main = [r for r in good if (r["panel"], r["n"], r["beta"]) == ("corruption", s["n"], s["beta"])]
    fig, axes = new_figure(2, 2, f"Fig. 2: {args.dataset}, scale {args.scale}, up to "
                           f"{len({r['seed'] for r in good})} seeds a cell, {len(rows) - len(good)} diverged")
    ax = axes[0, 0]
    for (model, width), marker, colour in zip(s["widths"].items(), "os^", ("C0", "C1", "C2")):
        error = PAPER_ERROR[model]
        ax.plot(PAPER_BETAS[:len(error)], error, marker=marker, color="0.75", ms=4,
                label=f"paper, {model}")
        plot_points(ax, summarise(models, "beta", "train_error", model=model), fmt=marker + "-", color=colour,
                    label=f"{model}, width ×{width:g}")
    ax.axvline(1, ls="--", color="k", lw=1)
    ax.set(xscale="log", xlabel="β", ylabel="train error, %, sampled weights",
           title=f"random labels, N = {s['n_models']:,} (paper: 10,000)")
    ax.set_xlim(left=3e-4)  # room for the legend
    ax.legend(loc="upper left")

    ax = axes[0, 1]
    points = summarise(main, "corruption", "per_sample")
    start = points[0][1] if points else 0
    ax.plot(SHARES, [v - PAPER_INFORMATION[0.0] + start for v in PAPER_INFORMATION.values()], "o-", color="0.75", ms=4,
            label="paper, up to a constant: moved to begin where ours does")
    plot_points(ax, points, color="C3", label=f"Small AlexNet, width ×{s['widths']['Small AlexNet']:g}")
    ax.axhspan(start, start + LOG10, color="C0", alpha=0.08, lw=0, label="log 10 = 2.30 nats: a random label")
    ax.set(xlabel="share of corrupted labels", ylabel="I(w;D)/N, nats per sample",
           title=f"information in the weights, N = {s['n']:,}, β = {s['beta']:g}")
    ax.legend(loc="lower right")

    ax = axes[1, 0]
    shares = sorted({r["corruption"] for r in main})
    names = list(main[0]["layers"]) if main else []
    nats = [[np.mean([r["layers"][name] for r in main if r["corruption"] == c]) for c in shares] for name in names]
    ax.stackplot(shares, nats, labels=names, colors=plt.cm.viridis(np.linspace(0.2, 0.95, max(1, len(names)))))
    ax.set(xlabel="share of corrupted labels", ylabel="nats per sample, mean over seeds", title="the same by layer")
    ax.legend(*(part[::-1] for part in ax.get_legend_handles_labels()), loc="lower right")

    ax = axes[1, 1]
    cells = sorted({(s["n"], s["beta"]), *s["elsewhere"]}, key=lambda c: c[::-1])
    for beta, colour in zip(sorted({b for _, b in cells}), ("C2", "C3", "C4", "C5")):
        rises = [{"status": "ok", "n": n, "rise": v} for n, b in cells if b == beta
                 for v in per_seed(rise, ends(good, n, beta))]
        plot_points(ax, summarise(rises, "n", "rise"), color=colour, label=f"β = {beta:g}")
    ax.plot(30_000, 3.1, "D", color="0.75", label="paper (its N is likely 30,000)")
    ax.axhline(LOG10, color="0.6", ls="--", label="log 10")
    ax.set(xscale="log", xlabel="N", ylabel="nats per sample", title="rise from real to random labels")
    ax.set_ylim(bottom=0)
    ax.legend()
    save_figure(fig, args)


# ----------------------------------------------------------------------------------------------------------------------
def make_cells(s):
    """The cells of the two panels: (models, corruption)."""
    models = [{"panel": "models", "model": model, "n": s["n_models"], "beta": beta}
              for model in s["widths"] for beta in s["betas"]]
    corruption = [{"panel": "corruption", "corruption": share, "n": s["n"], "beta": s["beta"]} for share in s["shares"]]
    corruption += [{"panel": "corruption", "corruption": share, "n": n, "beta": beta}
                   for n, beta in s["elsewhere"] for share in (0.0, 1.0)]
    return models, corruption


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    models, corruption = make_cells(SETTINGS[args.scale])
    rows = add_derived(run_grid(corruption + models, train_cell, args, load_data))
    plot(rows, args)
    print_claims(claims(rows, args))


if __name__ == "__main__":
    main()
