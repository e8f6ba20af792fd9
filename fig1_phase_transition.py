"""Fig. 1: a network memorises random labels while beta < 1, and stops at once when the price of information is higher.

    python fig1_phase_transition.py --scale demo     # synthetic images, about 1.5 minutes on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, about 80 minutes on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's network and N up to 50,000

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D), for a grid of N and beta, with random
and with real labels. Expected (paper, Fig. 1): on random labels train accuracy falls from 100% to 10% around beta = 1,
whatever N is; the information that memorising takes grows linearly with N; on real labels there is no such wall.

Protocol, the same for every cell and fixed beforehand: Adam; 100 epochs, or `steps` if that is more; learning rate held
from 10% to 80% of the steps, then brought to 0 by a cosine; beta raised linearly from 0 over the first 40% and held
for the rest. Memorising and chance are two minima that coexist over a range of beta: at full learning rate a net
leaves a state that is no minimum, but it does not cross a barrier. Two more kinds of runs measure that range:
  start = "memorised": memorise at the smallest beta, then raise beta rung by rung until the memory is lost;
  start = "chance":    begin at the largest beta, then lower it rung by rung until something is learned.
Accuracy and cross-entropy are those of sampled weights on the train set, unless the name says mean.
"""
import functools
import math

import numpy as np
import torch
import torch.nn as nn
from matplotlib.tri import LinearTriInterpolator, Triangulation
from torch.optim.swa_utils import update_bn

from common import (StochasticConv2d, StochasticLinear, corrupt_labels, ib_loss, label_information, load_cifar10,
                    parse_args, print_claims, run_grid, sample_weights, save_figure, summarise, synthetic_objects,
                    weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. `hysteresis` lists the N for which the two ends of the range are measured, `ladder` the beta they step over.
# ----------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "demo": dict(width=1 / 8, sizes=(100, 300), betas=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), steps=600, batch=100,
                 hysteresis=(100,), ladder=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5), rung=150, test=1000),
    "cpu": dict(width=1 / 4, sizes=(100, 300, 1000, 3000), betas=(0.03, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.2, 3.0),
                steps=1500, batch=100, hysteresis=(300, 1000),
                ladder=(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0), rung=300, test=5000),
    "paper": dict(width=1, sizes=(100, 300, 1000, 3000, 10_000, 30_000, 50_000),
                  betas=(0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.2, 3.0, 10.0), steps=6000, batch=500,
                  hysteresis=(1000, 10_000),
                  ladder=(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2), rung=2000, test=10_000),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"], "paper": ["cifar10", "synthetic"]}
LR, LR_NOISE = 3e-3, 0.04  # Adam's learning rates of the means and of log sigma^2


# ----------------------------------------------------------------------------------------------------------------------
# Data and model
# ----------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def load_data(dataset, data_dir):
    """(x_train, y_train, x_test, y_test): central 28x28 crops, float, normalised by the global channel statistics."""
    if dataset == "synthetic":
        x_train, y_train = synthetic_objects(2000, seed=0)
        x_test, y_test = synthetic_objects(2000, seed=1)
    else:
        x_train, y_train, x_test, y_test = load_cifar10(data_dir)
    mean = x_train.double().mean((0, 2, 3), keepdim=True).float()
    std = x_train.double().std((0, 2, 3), keepdim=True).float()
    return tuple(((x[:, :, 2:30, 2:30].float() - mean) / std).contiguous(memory_format=torch.channels_last)
                 if x.dim() == 4 else x for x in (x_train, y_train, x_test, y_test))


def make_cell_data(n, labels, seed, settings, device, dataset, data_dir):
    """N training images, their labels or random ones, and the test set, all drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    x_train, y_train, x_test, y_test = load_data(dataset, data_dir)
    pick = torch.randperm(len(x_train), generator=generator)[:n]  # rows may be sorted by class
    x, y = x_train[pick], y_train[pick]
    if labels == "random":
        y = corrupt_labels(y, 1.0, 10, generator)
    pick = torch.randperm(len(x_test), generator=generator)[:settings["test"]]
    return [t.to(device) for t in (x, y, x_test[pick], y_test[pick])]


def small_alexnet(width=1.0):
    """The paper's Small AlexNet. Max-pooling and ReLU commute: pooling first leaves fewer ReLUs."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        StochasticConv2d(3, conv, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        StochasticConv2d(conv, conv, 5, padding=2), nn.BatchNorm2d(conv), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        StochasticLinear(conv * 49, fc1), nn.BatchNorm1d(fc1), nn.ReLU(),
        StochasticLinear(fc1, fc2), nn.BatchNorm1d(fc2), nn.ReLU(),
        StochasticLinear(fc2, 10),
    ).to(memory_format=torch.channels_last)  # several times faster on a CPU for these shapes


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train_cell(cell, device, args, progress):
    """Train one net and measure it; a cell whose beta is a list walks along it and is measured on every rung."""
    s = SETTINGS[args.scale]
    torch.manual_seed(cell["seed"])
    n = cell["n"]
    x, y, x_test, y_test = make_cell_data(n, cell["labels"], cell["seed"], s, device, args.dataset, args.data_dir)
    model = small_alexnet(s["width"]).to(device)
    noise = [p for name, p in model.named_parameters() if name.endswith("log_sigma2")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("log_sigma2")]
    optimizer = torch.optim.Adam([{"params": rest, "lr": LR}, {"params": noise, "lr": LR_NOISE}], fused=True)
    batches = endless_batches(n, s["batch"], device)

    def train_step(beta, lr_scale):
        for group, lr in zip(optimizer.param_groups, (LR, LR_NOISE)):
            group["lr"] = lr * lr_scale
        model.train()
        index = next(batches)
        loss, _, _ = ib_loss(model(x[index]), y[index], model, beta, n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    if cell["start"] == "anneal":
        steps = max(s["steps"], 100 * n // s["batch"])
        for step in range(steps):
            t = step / steps
            lr_scale = min(1, t / 0.1 + 0.001) if t < 0.8 else 0.5 + 0.5 * math.cos(math.pi * (t - 0.8) / 0.2)
            loss = train_step(cell["beta"] * min(1, t / 0.4), lr_scale)
            if step % 100 == 0 or step == steps - 1:
                progress(step, steps, loss.item())
        return measure(model, cell["beta"], x, y, x_test, y_test)

    results = []
    for rung, beta in enumerate(cell["beta"]):
        warm_up = s["steps"] // 2 if rung == 0 else 0  # time to memorise, or to forget the initial weights
        for step in range(warm_up + s["rung"]):
            ramp = step / warm_up if cell["start"] == "memorised" and step < warm_up else 1
            loss = train_step(beta * ramp, min(1, step / 100 + 0.001) if rung == 0 else 1)
            if step % 100 == 0:
                progress(step, warm_up + s["rung"], loss.item())
        results.append(measure(model, beta, x, y, x_test, y_test))
    return results


def endless_batches(n, batch, device):
    """Indices of shuffled epochs without end; the tail of an epoch too short for a batch is dropped."""
    batch = min(n, batch)
    while True:
        yield from torch.randperm(n, device=device)[:n - n % batch].split(batch)


@torch.no_grad()
def measure(model, beta, x, y, x_test, y_test):
    """What a row holds. Batch normalisation is re-estimated for the weights that are measured: sampled, then mean.

    Sampled weights are drawn anew for every batch of 100, over at least 2,000 images in all.
    """
    running = [(m, m.running_mean.clone(), m.running_var.clone()) for m in model if hasattr(m, "running_mean")]
    passes = max(1, 2000 // len(x))
    update_bn(x.split(100) * passes, model)
    model.eval()
    with sample_weights(model):
        logits = torch.cat([torch.cat([model(batch) for batch in x.split(100)]) for _ in range(passes)])
        test_sampled = accuracy(torch.cat([model(batch) for batch in x_test.split(100)]), y_test)
    y_all = y.repeat(passes)
    with sample_weights(model, draw=False):
        update_bn(x.split(100), model)
        model.eval()
        train_mean = accuracy(torch.cat([model(batch) for batch in x.split(100)]), y)
        test_mean = accuracy(torch.cat([model(batch) for batch in x_test.split(500)]), y_test)
    for module, mean, var in running:
        module.running_mean.copy_(mean), module.running_var.copy_(var)
    cross_entropy = nn.functional.cross_entropy(logits, y_all).item()
    information = weight_information(model).item()
    return {"objective": cross_entropy + beta * information / len(x), "train_acc": accuracy(logits, y_all),
            "train_acc_mean": train_mean, "test_acc": test_mean, "test_acc_sampled": test_sampled,
            "cross_entropy": cross_entropy, "information": information,
            "label_information": label_information(logits, y_all).item()}


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Plot and claims
# ----------------------------------------------------------------------------------------------------------------------
# The paper's Fig. 1, digitised: beta at which train accuracy on random labels falls through 55%, for each N
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33, 48_000: 0.29}
LOG10 = math.log(10)  # nats in a random label, and the loss of a net that knows nothing


def crossing(betas, values, level):
    """First beta at which a falling curve passes the level, linear in log beta; nan if it does not."""
    for (b0, v0), (b1, v1) in zip(zip(betas, values), zip(betas[1:], values[1:])):
        if v0 >= level > v1:
            return math.exp(math.log(b0) + (v0 - level) / (v0 - v1) * (math.log(b1) - math.log(b0)))
    return math.nan


def curve(rows, key, **where):
    """Betas and means over seeds of one measured key, for the rows that fit."""
    points = summarise(rows, "beta", key, **where)
    return [p[0] for p in points], [p[1] for p in points]


def crossings(rows, n, level=0.55):
    """The 55% crossing of every seed's curve at this N."""
    fit = [r for r in rows if r["labels"] == "random" and r["start"] == "anneal" and r["n"] == n]
    return [crossing(*curve([r for r in fit if r["seed"] == seed], "train_acc"), level)
            for seed in sorted({r["seed"] for r in fit})]


def hysteresis(rows, n):
    """(lower, equal, upper): beta where memory is born, where both states have one objective, where memory dies.

    Born and dead mean an accuracy of 55% on the way down and up. The objective of chance is log 10, of memory that of
    the runs that start memorised, up to where it dies. Means over seeds.
    """
    rows = [r for r in rows if r["labels"] == "random" and r["n"] == n]
    up, down = (curve(rows, "train_acc", start=start) for start in ("memorised", "chance"))
    betas, objective = curve(rows, "objective", start="memorised")
    alive = [acc > 0.55 for acc in up[1]]
    betas, objective = [b for b, ok in zip(betas, alive) if ok], [o for o, ok in zip(objective, alive) if ok]
    equal = crossing(betas, [-o for o in objective], -LOG10)
    return crossing(*down, 0.55), equal, crossing(*up, 0.55)


def plot(rows, args):
    import matplotlib.pyplot as plt
    good = [r for r in rows if r["status"] == "ok"]
    fig, axes = plt.subplots(2, 4, figsize=(16, 8), constrained_layout=True)
    fig.suptitle(f"Fig. 1: Small AlexNet, width {SETTINGS[args.scale]['width']:g}, {args.dataset}, scale {args.scale}, "
                 f"{len({r['seed'] for r in good})} seeds")
    panels = [("random", "train_acc"), ("real", "train_acc"), ("random", "test_acc"), ("real", "test_acc")]
    for ax, (labels, key) in zip(axes[0], panels):
        mesh = plot_map(ax, good, labels, key)
    fig.colorbar(mesh, ax=axes[0, -1], label="accuracy")
    sizes = sorted({r["n"] for r in good})
    colours = dict(zip(sizes, plt.cm.viridis(np.linspace(0, 0.85, len(sizes)))))

    ax = axes[1, 0]  # the transition, curve by curve
    for n in sizes:
        points = summarise(good, "beta", "train_acc", labels="random", start="anneal", n=n)
        beta, mean, spread = np.array(points).T[:3]
        ax.errorbar(beta, mean, spread, color=colours[n], marker="o", ms=3, capsize=2, label=f"N = {n:,}")
    for n, beta in PAPER_CROSSING.items():
        ax.plot(beta, 0.55, "D", color="0.6", ms=4, label="paper, its N" if n == 100 else None)
    ax.axvline(1, ls="--", color="k", lw=1)
    ax.set(xscale="log", xlabel=r"$\beta$", ylabel="train accuracy", title="random labels, β raised while training")
    ax.legend(fontsize=7)

    ax = axes[1, 1]  # hysteresis
    for n in SETTINGS[args.scale]["hysteresis"]:
        for start, marker in (("memorised", ">"), ("chance", "<")):
            points = summarise(good, "beta", "train_acc", labels="random", start=start, n=n)
            if points:
                beta, mean, spread = np.array(points).T[:3]
                ax.errorbar(beta, mean, spread, color=colours[n], marker=marker, ms=4, capsize=2,
                            ls="-" if start == "memorised" else ":", label=f"N = {n:,}, starts at {start}"
                            if start == "chance" else f"N = {n:,}, starts memorised")
        lower, equal, upper = hysteresis(good, n)
        ax.axvspan(lower, upper, color=colours[n], alpha=0.12, lw=0)
        ax.axvline(equal, color=colours[n], lw=1)
    ax.axvline(1, ls="--", color="k", lw=1)
    ax.set(xscale="log", xlabel=r"$\beta$", title="hysteresis: band, and line of equal objective")
    ax.legend(fontsize=7)

    ax = axes[1, 2]  # information against N
    beta = information_beta(good)
    for labels, colour in (("random", "C3"), ("real", "C0")):
        points = summarise(good, "n", "information", labels=labels, start="anneal", beta=beta)
        n, mean, spread = np.array(points).T[:3]
        ax.errorbar(n, mean, spread, color=colour, marker="o", ms=4, capsize=2, label=f"{labels} labels")
    ax.plot(n, n * LOG10, color="0.6", ls="--", label="log 10 nats a label")
    ax.set(xscale="log", yscale="log", xlabel="N", ylabel="I(w;D), nats", title=f"information, β = {beta:g}")
    ax.legend(fontsize=7)

    ax = axes[1, 3]  # accounting
    for n in sizes:
        fit = [r for r in good if r["labels"] == "random" and r["n"] == n and r["information"] / n > 0.05]
        ax.plot([r["information"] / n for r in fit], [LOG10 - r["cross_entropy"] for r in fit], ".", color=colours[n],
                label=f"N = {n:,}")
    ax.plot([0.05, LOG10], [0.05, LOG10], "k--", lw=1, label="one to one")
    ax.axhline(LOG10, color="0.6", lw=1)
    ax.set(xscale="log", xlabel="I(w;D)/N, nats per sample", ylabel="label nats memorised per sample",
           title="label nats never exceed weight nats")
    ax.legend(fontsize=7)
    save_figure(fig, args)


def plot_map(ax, rows, labels, key):
    """One of the paper's four panels: accuracy over log10 N and log10(beta/N), interpolated on a triangulation."""
    cells = sorted({(r["n"], r["beta"]) for r in rows if r["labels"] == labels and r["start"] == "anneal"})
    mean = [np.mean([r[key] for r in rows if (r["labels"], r["start"], r["n"], r["beta"]) == (labels, "anneal", *cell)])
            for cell in cells]
    n, beta = np.array(cells).T
    x, y = np.log10(n), np.log10(beta / n)
    ranges = (x.min(), x.max()), np.log10([beta.min(), beta.max()])
    grid_x, grid_b = np.meshgrid(*(np.linspace(*r, 200) for r in ranges))
    # triangulated in (log N, log beta), where the cells form a rectangle, and shown in the paper's (log N, log beta/N)
    value = LinearTriInterpolator(Triangulation(x, np.log10(beta)), mean)(grid_x, grid_b)
    mesh = ax.pcolormesh(grid_x, grid_b - grid_x, value, cmap="coolwarm", vmin=0.12, vmax=0.98, shading="auto",
                         rasterized=True)
    ax.plot(x, y, "k.", ms=2)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, -ends, "k--", lw=1, label="β = 1")
    if (labels, key) == ("random", "train_acc"):
        paper = {k: b for k, b in PAPER_CROSSING.items() if k <= n.max()}
        ours = {k: np.mean(crossings(rows, k)) for k in sorted(set(n))}
        for contour, colour, name in ((paper, "0.35", "paper"), (ours, "w", "ours")):
            ax.plot(*np.log10([(k, b / k) for k, b in contour.items()]).reshape(-1, 2).T, color=colour, lw=2,
                    label=f"55%, {name}")
    if (labels, key) == ("real", "train_acc") and n.max() > 800:
        ax.plot([2.9, x.max()], [-2.8, -2.8], color="0.35", ls="--", lw=1, label="paper's second line")
    ax.invert_yaxis()
    ax.set(xlabel=r"$\log_{10} N$", ylabel=r"$\log_{10}(\beta/N)$",
           title=f"{key.split('_')[0]} accuracy, {labels} labels")
    ax.legend(fontsize=7, loc="upper right")
    return mesh


def information_beta(rows):
    """The beta of the information panel: the largest up to 0.1."""
    return max(r["beta"] for r in rows if r["beta"] <= 0.1 and r["start"] == "anneal")


def claims(rows, args):
    """The claims of the figure: (sentence, the paper's value, ours, holds)."""
    s = SETTINGS[args.scale]
    good = [r for r in rows if r["status"] == "ok"]
    random = [r for r in good if r["labels"] == "random"]
    annealed = [r for r in random if r["start"] == "anneal"]
    sizes = sorted({r["n"] for r in annealed})
    table = []

    def add(sentence, paper, ours, holds):
        table.append((sentence, paper, ours, holds))

    lowest = {n: curve(annealed, "train_acc", n=n)[1][0] for n in sizes}
    add(f"random labels: at β = {min(s['betas']):g} every N is memorised (train accuracy over 85%)", "98% and more",
        each(lowest, "{:.1%}"), min(lowest.values()) > 0.85)
    cross = {n: crossings(good, n) for n in sizes}
    add("random labels: train accuracy falls through 55% at β between 0.3 and 1.05, whatever N",
        each({n: PAPER_CROSSING[n] for n in sizes if n in PAPER_CROSSING}, "{:g}"),
        "; ".join(f"N={n:,}: {spread(values)}" for n, values in cross.items()),
        all(0.3 <= v <= 1.05 for values in cross.values() for v in values))
    high = [p for n in sizes for p in summarise(annealed, "beta", "train_acc", n=n) if p[0] >= 1.2]
    add("random labels: at chance (under 20%) for every N and β ≥ 1.2", "20% at β = 1.1–1.9",
        f"at most {max(p[1] for p in high):.1%}" if high else "-", max(p[1] for p in high) < 0.2 if high else None)
    for n in s["hysteresis"]:
        ends = hysteresis(good, n)
        add(f"N = {n:,}: memorising and chance coexist between a lower and an upper β, both below 1.05", "not shown",
            "lower {:.2f}, equal objective {:.2f}, upper {:.2f}".format(*ends),
            ends[0] < ends[1] < ends[2] <= 1.05 if not any(map(math.isnan, ends)) else None)
    beta = information_beta(good)
    memorised = [r for r in annealed if r["beta"] == beta and r["train_acc"] > 0.85]
    slope, r2 = fit_line([r["n"] for r in memorised], [r["information"] for r in memorised])
    add(f"random labels: the information that memorising takes grows linearly with N (β = {beta:g}; R² over 0.95)",
        "linear", f"{slope:.2f} nats a sample, R² = {r2:.4f}, {len(memorised)} runs", r2 > 0.95)
    ratio = [((LOG10 - r["cross_entropy"]) / r["information"] * r["n"], r["beta"], r["n"]) for r in random
             if r["information"] / r["n"] > 0.05]
    best = max(ratio)
    add("random labels: label nats memorised per weight nat never exceed 1", "at most 1 (theory)",
        f"at most {best[0]:.2f} (β = {best[1]:g}, N = {best[2]:,})", best[0] <= 1)
    test = [mean for n in sizes for _, mean, *_ in summarise(annealed, "beta", "test_acc", n=n)]
    add("random labels: test accuracy is 10% throughout (8% to 12% in the mean over seeds)", "10%",
        f"{min(test):.1%} to {max(test):.1%}", 0.08 <= min(test) and max(test) <= 0.12)
    real = {n: summarise(good, "beta", "test_acc", labels="real", start="anneal", n=n) for n in sizes}
    tops = {n: max(points, key=lambda p: p[1]) for n, points in real.items() if points}
    means = [top[1] for top in tops.values()]
    add("real labels: test accuracy grows with N", "yes",
        "; ".join(f"N={n:,}: {top[1]:.1%} ± {top[2]:.1%} at β = {top[0]:g}" for n, top in tops.items()),
        means == sorted(means) if len(means) > 1 else None)
    diverged = sum(r["status"] == "diverged" for r in rows)
    add("no run diverged", "-", f"{diverged} of {len(rows)} rows", diverged == 0)
    return table


def each(values, form):
    return "; ".join(f"N={n:,}: {form.format(value)}" for n, value in values.items())


def spread(values):
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def fit_line(x, y):
    """Slope and R² of y = slope * x, a line through the origin."""
    x, y = np.array(x, float), np.array(y, float)
    slope = (x @ y) / (x @ x)
    return slope, 1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()


# ----------------------------------------------------------------------------------------------------------------------
def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    s = SETTINGS[args.scale]
    cells = [{"labels": labels, "n": n, "beta": beta, "start": "anneal"}
             for labels in ("random", "real") for n in reversed(s["sizes"]) for beta in s["betas"]]
    for n in s["hysteresis"]:
        cells += [{"labels": "random", "n": n, "beta": list(s["ladder"]), "start": "memorised"},
                  {"labels": "random", "n": n, "beta": list(s["ladder"])[::-1], "start": "chance"}]
    rows = run_grid(cells, train_cell, args, prepare=lambda args: load_data(args.dataset, args.data_dir))
    plot(rows, args)
    print_claims(claims(rows, args))


if __name__ == "__main__":
    main()
