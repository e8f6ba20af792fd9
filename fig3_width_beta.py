"""Fig. 3: more weights do not overfit, more information does: the U of the bias-variance trade-off is against beta.

    python fig3_width_beta.py --scale demo     # synthetic images, 1.5 to 2.4 minutes on 2 cores
    python fig3_width_beta.py --scale cpu      # 5,000 images of CIFAR-10, 1/16 to 1/2 width, 50 minutes on 2 cores
    python fig3_width_beta.py --gpu 0          # CIFAR-10, the paper's widths 1/4 to 3 and 11 values of beta

An All-CNN is trained on real labels, without augmentation, in two ways. Left: plain weights, weight decay, a range of
widths. Right: one width, no weight decay, L = cross-entropy + beta/N * I(w;D), a range of beta. Expected (paper,
Fig. 3): against the number of weights test error falls, then hardly rises (12.75, 10.13, 8.45, 8.90, 9.45%), against
beta it is a U (9.16% at beta = 0.001, 8.06% at 0.03, 9.64% at 100). Measured at cpu scale:
error falls from 50% to 34% with width, short of the plateau; against beta it is 44.9%, 40.1% at its best (0.1), 90%.

Protocol, the same for every cell of a panel: learning rates rise over the first 10% of the steps, are held to 80% and
brought to 0 by a cosine. Width: SGD with Nesterov momentum. Beta: Adam, all layers stochastic, one weight sample a
batch, beta raised linearly from 0 over the first 40% and held for the rest. Nothing is chosen by test error, which is
that of the mean weights, with batch normalisation re-estimated for them; that of sampled weights is recorded beside it.
A stochastic step costs 1.02 to 1.1 times a plain one (1/16 to 1/2 width, batch 100, one CPU core).
"""
import math

import numpy as np
import torch
import torch.nn as nn

from common import (accuracy, annealed, calibrated, claim, complete_seeds, draw_subset, ib_loss, load_objects,
                    minibatches, new_figure, parse_args, plot_points, predict, print_claims, run_grid, save_figure,
                    summarise, to_stochastic, weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings: training and test images; widths and steps of the width panel; width, betas and steps of the beta panel
# ----------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "demo": dict(n=800, test=1000, batch=50, widths=(1 / 32, 1 / 16, 1 / 8), width_steps=300,
                 beta_width=1 / 8, betas=(0.001, 0.01, 0.03, 0.1, 1.0), beta_steps=600),
    "cpu": dict(n=5000, test=10_000, batch=100, widths=(1 / 16, 1 / 8, 1 / 4, 1 / 2), width_steps=500,
                beta_width=1 / 8, betas=tuple(10**k for k in (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)),
                beta_steps=1500),
    "paper": dict(n=50_000, test=10_000, batch=250, widths=(1 / 4, 1 / 2, 1, 2, 3), width_steps=30_000,
                  beta_width=1, betas=tuple(10 ** (k / 2 - 3) for k in range(11)), beta_steps=30_000),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"], "paper": ["cifar10", "synthetic"]}
LR_SGD, WEIGHT_DECAY = 0.05, 1e-3  # width panel; the weight decay is that of the All-CNN's authors
LR, LR_NOISE = 3e-3, 0.04  # beta panel: Adam's learning rates of the means and of log sigma^2


# ----------------------------------------------------------------------------------------------------------------------
# Data and model
# ----------------------------------------------------------------------------------------------------------------------
def load_data(args):
    s = SETTINGS[args.scale]
    return load_objects(args.dataset, args.data_dir, s["n"], s["test"])


def make_cell_data(cell, device, args):
    """Training images drawn by the seed and the test set, normalised by channel: x, y, x_test, y_test."""
    s, generator = SETTINGS[args.scale], torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (((v.float() - mean) / std).contiguous(memory_format=torch.channels_last) for v in (x, x_test))
    return [t.to(device) for t in (x, y, x_test, y_test)]


def all_cnn(width=1.0, noise=None):
    """The All-CNN with batch normalisation, (n, 3, h, w) -> (n, 10); noise: None for plain weights, or its kind."""
    channels, kernels, strides = (96, 96, *[192] * 6), (3,) * 7 + (1,), (1, 1, 2, 1, 1, 2, 1, 1)
    layers, inputs = [], 3
    for outputs, kernel, stride in zip((int(width * c) for c in channels), kernels, strides):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs),
                   nn.ReLU()]
        inputs = outputs
    model = nn.Sequential(*layers, nn.Conv2d(inputs, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.to(memory_format=torch.channels_last)  # several times faster on a CPU for these shapes
    return to_stochastic(model, noise=noise) if noise else model


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train_cell(cell, device, args, progress):
    """Train one net, with plain weights (panel "width") or stochastic ones (panel "beta"), and measure it."""
    s = SETTINGS[args.scale]
    torch.manual_seed(cell["seed"])
    x, y, x_test, y_test = make_cell_data(cell, device, args)
    beta, steps = cell.get("beta"), s[cell["panel"] + "_steps"]
    model = all_cnn(cell["width"], noise=None if beta is None else "gaussian").to(device)
    variances = [p for name, p in model.named_parameters() if name.endswith("log_sigma2")]
    means = [p for name, p in model.named_parameters() if not name.endswith("log_sigma2")]
    if beta is None:
        optimizer = torch.optim.SGD(means, LR_SGD, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.Adam([{"params": means, "lr": LR}, {"params": variances, "lr": LR_NOISE}], fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = minibatches(len(x), s["batch"], device)
    for step in range(steps):
        t = step / steps
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * annealed(t)
        index = next(batches)
        if beta is None:
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
        else:
            loss, _, _ = ib_loss(model(x[index]), y[index], model, beta * min(1, t / 0.4), len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return {"params": sum(p.numel() for p in means), "n": len(x)} | measure(model, beta, x, y, x_test, y_test)


def measure(model, beta, x, y, x_test, y_test):
    """What a row holds beside its sizes; beta None: plain weights, which are their own sample and carry no noise."""
    def evaluate(draw):
        with calibrated(model, x.split(100), draw):
            return predict(model, x), accuracy(predict(model, x_test), y_test)

    mean_logits, mean_test = evaluate(draw=False)
    logits, sampled_test = (mean_logits, mean_test) if beta is None else evaluate(draw=True)
    cross_entropy = nn.functional.cross_entropy(logits, y).item()
    information = None if beta is None else weight_information(model).item()
    return {"objective": None if beta is None else cross_entropy + beta * information / len(x),
            "train_acc": accuracy(logits, y), "train_acc_mean": accuracy(mean_logits, y), "test_acc": mean_test,
            "test_acc_sampled": sampled_test, "cross_entropy": cross_entropy, "information": information}


# ----------------------------------------------------------------------------------------------------------------------
# What the rows say
# ----------------------------------------------------------------------------------------------------------------------
# The paper's Fig. 3, digitised: test error in % against the number of weights, and against beta
PAPER_WIDTH = {102_610: 12.75, 406_810: 10.13, 1_620_010: 8.45, 6_465_610: 8.90, 14_536_810: 9.45}
PAPER_BETA = dict(zip((10 ** (k / 2 - 3) for k in range(11)),
                      (9.16, 9.10, 8.42, 8.06, 8.24, 8.49, 8.75, 8.93, 9.30, 9.41, 9.64)))


def errors(rows, key, value):
    """Test error in % of each seed, of mean weights, in the rows where this key has this value."""
    return [100 * (1 - r["test_acc"]) for r in sorted(rows, key=lambda r: r["seed"]) if r[key] == value]


def lowest(rows, key, accuracy="test_acc"):
    """Value of the key at which test error, averaged over the seeds, is lowest; nan without rows."""
    return max(summarise(rows, key, accuracy), key=lambda p: p[1], default=[math.nan])[0]


def is_worse(end, best, points):
    """Is error on average higher by more than this many points, and by more than either cell's spread over seeds?"""
    spread = [np.std(v, ddof=1) for v in (end, best) if len(v) > 1]
    return np.mean(end) - np.mean(best) > max(points, *spread, 0)


def claims(rows, args):
    """The claims table of the figure; a claim of which cells are missing is not decided."""
    s = SETTINGS[args.scale]
    width, beta = (complete_seeds(rows, cells) for cells in make_cells(s))
    table = []

    best = lowest(width, "width")
    wider = [w for w in s["widths"] if w >= best]
    worst = max(wider, key=lambda w: np.mean(errors(width, "width", w)), default=math.nan)
    values = [errors(width, "width", w) for w in (best, worst)]
    table.append(claim("width, weight decay only: nets wider than the best are worse by no more than 1.5 points (a "
                       "plateau)", "best 8.45%, widest 9.45%",
                       {f"best, ×{best:.3g}": values[0], f"worst from there on, ×{worst:.3g}": values[1]},
                       lambda v: np.mean(values[1]) - np.mean(values[0]) <= 1.5, "{:.1f}%"))
    best = lowest(beta, "beta")
    bottom = errors(beta, "beta", best)
    for end, name, points, paper in ((min(s["betas"]), "left", 0.5, 9.16), (max(s["betas"]), "right", 2.0, 9.64)):
        values = errors(beta, "beta", end)
        table.append(claim(f"β, no weight decay: the {name} end is worse than the best by more than {points:g} points "
                           "and than the seeds' spread", f"best 8.06%, {name} end {paper:g}%",
                           {f"best, β = {best:.2g}": bottom, f"β = {end:g}": values},
                           lambda v: is_worse(values, bottom, points), "{:.1f}%"))
    table.append(claim("β: the best lies strictly inside the range (a U)", "β = 0.03", {"β": [best]},
                       lambda v: min(s["betas"]) < best < max(s["betas"]), "{:.2g}", bool(beta)))
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Plot
# ----------------------------------------------------------------------------------------------------------------------
def plot(rows, args):
    s = SETTINGS[args.scale]
    good = [r for r in rows if r["status"] == "ok"]
    for r in good:
        r["error"], r["sampled_error"] = (100 * (1 - r[key]) for key in ("test_acc", "test_acc_sampled"))
    width, beta = ([r for r in good if r["panel"] == panel] for panel in ("width", "beta"))
    fig, axes = new_figure(1, 3, f"Fig. 3: All-CNN, {s['n']:,} images, {args.dataset}, scale {args.scale}, up to "
                           f"{len({r['seed'] for r in good})} seeds a cell, {len(rows) - len(good)} diverged")

    ax = axes[0, 0]
    plot_paper(ax, PAPER_WIDTH, args)
    points = summarise(width, "params", "error")
    plot_points(ax, points, color="C0", label="ours")
    names = {r["params"]: r["width"] for r in width}
    for params, error, *_ in points:
        ax.annotate(f"×{names[params]:.3g}", (params, error), (4, 5), textcoords="offset points", fontsize=7)
    ax.set(xlabel="weights", ylabel="test error, %", title="width, weight decay only")

    ax = axes[0, 1]
    plot_paper(ax, PAPER_BETA, args)
    plot_points(ax, summarise(beta, "beta", "error"), color="C3", label="ours, mean weights")
    plot_points(ax, summarise(beta, "beta", "sampled_error"), "o--", color="C1", mfc="w", label="ours, sampled weights")
    ax.set(xlabel="β", ylabel="test error, %", title=f"β, width ×{s['beta_width']:g}, no weight decay")

    ax = axes[0, 2]
    nats, error, colour = np.array([(r["information"] / r["n"], r["error"], math.log10(r["beta"]))
                                    for r in beta]).reshape(-1, 3).T
    dots = ax.scatter(nats, error, c=colour, cmap="viridis", s=22, label="ours, mean weights, each run")
    fig.colorbar(dots, ax=ax, label="log₁₀ β")
    ax.set(xlabel="I(w;D)/N, nats per sample", ylabel="test error, %", title="the same runs against information")
    for ax in axes[0]:
        ax.set_xscale("log")
        ax.legend()
    save_figure(fig, args)


def plot_paper(ax, numbers, args):
    """The paper's curve behind ours, in grey: on an axis of its own where fewer images make all our errors larger."""
    style = dict(color="0.6", marker="s", ms=4, lw=1.2)
    grey = ax
    if args.scale != "paper":
        grey = ax.twinx()
        grey.set_ylabel("the paper's test error, 50,000 images, %", color="0.5")
        grey.tick_params(axis="y", colors="0.5")
        grey.grid(False)
        ax.set_zorder(grey.get_zorder() + 1)
        ax.patch.set_visible(False)
    grey.plot(*zip(*numbers.items()), **style)
    ax.plot([], [], label="the paper" + (", right axis" if grey is not ax else ""), **style)


# ----------------------------------------------------------------------------------------------------------------------
def make_cells(s):
    """The cells of the two panels: (width, beta)."""
    return ([{"panel": "width", "width": width} for width in s["widths"][::-1]],
            [{"panel": "beta", "width": s["beta_width"], "beta": beta} for beta in s["betas"]])


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    width, beta = make_cells(SETTINGS[args.scale])
    rows = run_grid(beta + width, train_cell, args, load_data)
    plot(rows, args)
    print_claims(claims(rows, args))
    best, best_sampled = (lowest(complete_seeds(rows, beta), "beta", key) for key in ("test_acc", "test_acc_sampled"))
    if math.isfinite(best):
        print(f"\nfor the record, on the test set: test error is lowest at β = {best:.2g} with mean weights, "
              f"at {best_sampled:.2g} with sampled ones")


if __name__ == "__main__":
    main()
