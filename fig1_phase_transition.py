"""Fig. 1: a network memorises random labels while beta < 1, and stops at once when the price of information is higher.

    python fig1_phase_transition.py --scale demo     # synthetic images, 1.5 to 2.3 minutes on 2 cores
    python fig1_phase_transition.py --scale cpu      # CIFAR-10, 1/4 width, about 2 hours on 2 cores
    python fig1_phase_transition.py --gpu 0          # CIFAR-10, the paper's network and N up to 50,000
    python fig1_phase_transition.py --scale cpu --certificates --seeds 0    # PAC-Bayes bounds, 6 minutes; also mnist

A Small AlexNet is trained on N images with L = cross-entropy + beta/N * I(w;D), for a grid of N and beta, with random
and with real labels. Expected (paper, Fig. 1): on random labels train accuracy falls from 100% to 10% around beta = 1,
whatever N is; the information that memorising takes grows linearly with N. Measured at cpu scale: the fall through 55%
at beta = 0.71 (N = 100) to 0.34 (N = 3,000). The demo trains so briefly that it comes at 0.2, and says so.

Protocol, the same for every cell, chosen on pilot runs of N = 300 and 3,000 before the grid was run: Adam; 100 epochs,
or `steps` if that is more; learning rate held from 10% to 80% of the steps, then brought to 0 by a cosine; beta raised
linearly from 0 over the first 40% and held for the rest. Memorising and chance are two states that coexist over a range
of beta, and a net tends to leave the worse one, if slowly near the edge. Two more kinds of runs measure that range:
  start = "memorised": memorise at the smallest beta, then raise beta rung by rung until the memory is lost;
  start = "chance":    begin at the largest beta, then lower it rung by rung until something is learned.
Accuracy and cross-entropy are those of sampled weights on the train set, unless the name says mean.
"""
import copy
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from matplotlib.tri import Triangulation

from common import (StochasticConv2d, StochasticLinear, accuracy, annealed, claim, complete_seeds, corrupt_labels,
                    crossing, draw_subset, evaluate, ib_loss, label_information, load_objects, minibatches, new_figure,
                    pac_bayes_bound, parse_args, per_seed, plot_points, predict, print_claims, prior_divergence,
                    run_grid, sample_weights, save_figure, summarise, weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. `hysteresis` lists the N whose two ends are measured, `ladder` the beta they step over with `rung` steps at
# each; the way down from chance goes on through those `below`. --certificates: N, steps for the prior and for the rest,
# draws of the weights that measure the loss.
# ----------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "demo": dict(width=1 / 8, sizes=(100, 300), betas=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), steps=300, batch=100,
                 hysteresis=(100,), ladder=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2), below=(0.003, 0.001),
                 rung=80, test=1000, certificates=(300, 100, 100, 2000)),
    "cpu": dict(width=1 / 4, sizes=(100, 300, 1000, 3000), betas=(0.03, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.2, 3.0),
                steps=1500, batch=100, hysteresis=(300, 1000),
                ladder=(0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3),
                below=(0.01, 0.003, 0.001), rung=300, test=5000, certificates=(50_000, 3000, 2500, 2000)),
    "paper": dict(width=1, sizes=(100, 300, 1000, 3000, 10_000, 30_000, 50_000),
                  betas=(0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.2, 3.0, 10.0), steps=6000, batch=500,
                  hysteresis=(1000, 10_000),
                  ladder=(0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3),
                  below=(0.01, 0.003, 0.001), rung=2000, test=10_000, certificates=(50_000, 10_000, 10_000, 2000)),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "mnist", "synthetic"],
            "paper": ["cifar10", "mnist", "synthetic"]}
STARTS = ("memorised", "chance")  # the two ends that a ladder of beta is climbed from
LR, LR_NOISE = 3e-3, 0.04  # Adam's learning rates of the means and of log sigma^2


# ----------------------------------------------------------------------------------------------------------------------
# Data and model
# ----------------------------------------------------------------------------------------------------------------------
def load_data(args):
    s = SETTINGS[args.scale]
    largest = s["certificates"][0] if args.certificates else max(s["sizes"])
    return load_objects(args.dataset, args.data_dir, largest, s["test"])


def make_cell_data(cell, test, device, args):
    """N training images with their own or random labels, and the test set, drawn by the seed: x, y, x_test, y_test.

    Images are central 28x28 crops, normalised by the global channel statistics. Rows may be sorted by class.
    """
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, cell["n"], generator)
    if cell["labels"] == "random":
        y = corrupt_labels(y, 1.0, 10, generator)
    x_test, y_test = draw_subset(x_test, y_test, test, generator)
    crop = slice((x.shape[-1] - 28) // 2, (x.shape[-1] + 28) // 2)
    x, x_test = (((v[:, :, crop, crop].float() - mean) / std).contiguous(memory_format=torch.channels_last)
                 for v in (x, x_test))
    return [t.to(device) for t in (x, y, x_test, y_test)]


def small_alexnet(width=1.0, channels=3, **noise):
    """The paper's Small AlexNet; noise: options of its layers. Pooling and ReLU commute: pooled first is cheaper."""
    conv, fc1, fc2 = int(64 * width), int(384 * width), int(192 * width)
    return nn.Sequential(
        StochasticConv2d(channels, conv, 5, padding=2, **noise), nn.MaxPool2d(2), nn.ReLU(),
        StochasticConv2d(conv, conv, 5, padding=2, **noise), nn.BatchNorm2d(conv), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(),
        StochasticLinear(conv * 49, fc1, **noise), nn.BatchNorm1d(fc1), nn.ReLU(),
        StochasticLinear(fc1, fc2, **noise), nn.BatchNorm1d(fc2), nn.ReLU(),
        StochasticLinear(fc2, 10, **noise),
    ).to(memory_format=torch.channels_last)  # several times faster on a CPU for these shapes


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train_cell(cell, device, args, progress):
    """Train one net and measure it; a cell whose beta is a list walks along it and is measured on every rung."""
    s = SETTINGS[args.scale]
    torch.manual_seed(cell["seed"])
    n = cell["n"]
    x, y, x_test, y_test = make_cell_data(cell, s["test"], device, args)
    noise = {"noise": "lognormal", "max_log_alpha": cell["cap"]} if "cap" in cell else {}
    model = small_alexnet(s["width"], x.shape[1], **noise).to(device)
    variances = [p for name, p in model.named_parameters() if name.endswith("log_sigma2")]
    others = [p for name, p in model.named_parameters() if not name.endswith("log_sigma2")]
    optimizer = torch.optim.Adam([{"params": others, "lr": LR}, {"params": variances, "lr": LR_NOISE}], fused=True)
    batches = minibatches(n, s["batch"], device)

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
            loss = train_step(cell["beta"] * min(1, t / 0.4), annealed(t))
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


def measure(model, beta, x, y, x_test, y_test):
    """What a row holds."""
    logits, labels, results = evaluate(model, x, y, x_test, y_test)
    information = weight_information(model).item()
    return results | {"objective": results["cross_entropy"] + beta * information / len(x), "information": information,
                      "label_information": label_information(logits, labels).item()}


def certify_cell(cell, device, args, progress):
    """Train the weights for the PAC-Bayes bound itself (eq. 7), and measure the two sides of it.

    The prior is centred on the net at its start, or trained without noise on the share cell["seen"] of the samples,
    which the bound then does without. Biases and batch normalisation stay as in the prior: all that is learned is
    charged.
    """
    s = SETTINGS[args.scale]
    torch.manual_seed(cell["seed"])
    x, y, x_test, y_test = make_cell_data(cell, s["test"], device, args)
    model = small_alexnet(s["width"], x.shape[1]).to(device)
    layers = [m for m in model.modules() if isinstance(m, (StochasticConv2d, StochasticLinear))]
    _, prior_steps, steps, count = s["certificates"]
    seen = round(cell["seen"] * cell["n"])

    def train(groups, x, y, steps, price):
        optimizer = torch.optim.Adam([{"params": p} for p in groups], fused=True)
        batches = minibatches(len(x), s["batch"], device)
        for step in range(steps):
            t = step / steps
            for group, lr in zip(optimizer.param_groups, (LR, LR_NOISE)):
                group["lr"] = lr * (min(1, t / 0.1 + 0.001) if t < 0.6 else
                                    0.5 + 0.5 * math.cos(math.pi * (t - 0.6) / 0.4))
            index = next(batches)
            loss = nn.functional.cross_entropy(model(x[index]), y[index]) + price(min(1, t / 0.4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0 or step == steps - 1:
                progress(step, steps, loss.item())

    if seen:
        with sample_weights(model, draw=False):
            train([[p for name, p in model.named_parameters() if not name.endswith("log_sigma2")]], x[:seen], y[:seen],
                  prior_steps, lambda ramp: 0)
    for layer in layers:
        layer.log_sigma2.data.fill_(layer.weight.square().mean().log() - 6)
    prior, x, y = copy.deepcopy(model.eval().state_dict()), x[seen:], y[seen:]
    with sample_weights(model):
        train([[m.weight for m in layers], [m.log_sigma2 for m in layers]], x, y, steps,
              lambda ramp: cell["beta"] * ramp / len(x) * prior_divergence(model, prior))
        result = {"divergence": prior_divergence(model, prior).item(), "bound_n": len(x)}
        draws = [clipped_losses(model, x[i], y[i]) for i in torch.randint(len(x), (count, 100), device=device)]
        test = torch.stack([clipped_losses(model, *pair) for pair in zip(x_test.split(100), y_test.split(100))])
    mean, std = (f(torch.stack(draws), 0).tolist() for f in (torch.mean, torch.std))
    for i, loss in enumerate(MAX_LOSS):
        result |= {loss: mean[i], f"{loss}_std": std[i], f"test_{loss}": test.mean(0)[i].item()}
    return result | {"draws": len(draws), "test_acc": accuracy(predict(model, x_test), y_test)}


@torch.no_grad()
def clipped_losses(model, x, y):
    """Mean of each loss in MAX_LOSS over a batch: (2,)."""
    logits = model(x)
    cross_entropy = nn.functional.cross_entropy(logits, y, reduction="none").clamp(max=LOG10)
    return torch.stack([cross_entropy.mean(), (logits.argmax(1) != y).float().mean()])


# ----------------------------------------------------------------------------------------------------------------------
# What the rows say
# ----------------------------------------------------------------------------------------------------------------------
# The paper's Fig. 1, digitised: beta at which train accuracy on random labels falls through 55%, for each N
PAPER_CROSSING = {100: 1.3, 300: 0.49, 1000: 0.63, 3000: 0.74, 10_000: 0.60, 30_000: 0.33, 48_000: 0.29}
LOG10 = math.log(10)  # nats in a random label, and the loss of a net that knows nothing
MAX_LOSS = {"cross_entropy": LOG10, "error": 1.0}  # what PAC-Bayes bounds: of each sample at most this


def transition(rows):
    """Beta at which the annealed runs' train accuracy falls through 55%."""
    return crossing(summarise(rows, "beta", "train_acc", labels="random", start="anneal"), 0.55)


def hysteresis(rows):
    """(lower, equal, upper): beta where memory is born, where the two states have one objective, where memory dies.

    Born and dead mean an accuracy of 55% on the way down and on the way up. The objectives are compared where the net
    that began with memory remembers and the one that began at chance does not.
    """
    up, down = (summarise(rows, "beta", "train_acc", start=start) for start in STARTS)
    knows, ignores = ({beta for beta, accuracy, *_ in some if (accuracy > 0.55) == has}
                      for some, has in ((up, True), (down, False)))
    memory, chance = (dict(p[:2] for p in summarise(rows, "beta", "objective", start=start)) for start in STARTS)
    gap = [(beta, chance[beta] - memory[beta]) for beta in sorted(knows & ignores)]
    return crossing(down, 0.55), crossing(gap, 0.0), crossing(up, 0.55)


def claims(rows, args):
    """The claims table of the figure; a claim of which cells are missing is not decided."""
    s = SETTINGS[args.scale]
    low, wall = information_beta(s), [beta for beta in s["betas"] if beta >= 1.2]
    good = [r for r in rows if r["status"] == "ok"]
    random, real = (complete_seeds(rows, [{"labels": labels, "start": "anneal", "n": n, "beta": beta}
                                          for n in s["sizes"] for beta in s["betas"]]) for labels in ("random", "real"))
    table = []

    def by_size(measure, some):
        return {f"N={n:,}": [measure(r) for r in some if r["n"] == n] for n in s["sizes"]}

    accuracy = by_size(lambda r: r["train_acc"], [r for r in random if r["beta"] == min(s["betas"])])
    table.append(claim(f"random labels: over 85% memorised at β = {min(s['betas']):g}, for every N", "98%", accuracy,
                       lambda v: v.min() > 0.85, "{:.1%}"))
    cross = {f"N={n:,}": per_seed(transition, [r for r in random if r["n"] == n]) for n in s["sizes"]}
    paper = "; ".join(f"N={n:,} {PAPER_CROSSING[n]:g}" for n in s["sizes"] if n in PAPER_CROSSING)
    table.append(claim("random labels: train accuracy falls through 55% at β between 0.3 and 1.05, for every N", paper,
                       cross, lambda v: v.min() >= 0.3 and v.max() <= 1.05, "{:.2f}"))
    accuracy = by_size(lambda r: r["train_acc"], [r for r in random if r["beta"] in wall])
    table.append(claim(f"random labels: chance (under 20%) at β = {', '.join(f'{b:g}' for b in wall)}, for every N",
                       "20% at β = 1.1 to 1.9", accuracy, lambda v: v.max() < 0.2, "{:.1%}"))
    for n in s["hysteresis"]:
        ladders = complete_seeds(rows, [{"start": start, "n": n, "beta": beta} for start in STARTS
                                        for beta in s["ladder"] + s["below"] * (start == "chance")])
        ends = per_seed(hysteresis, ladders).reshape(-1, 3).T
        table.append(claim(f"N = {n:,}, {s['rung']} steps a rung: memory is born at one β, ties with chance at a "
                           "higher one and dies at a still higher one, below 1.05", "not shown",
                           dict(zip(("born", "ties", "dies"), ends)),
                           lambda v: (np.diff(ends, axis=0) > 0).all() and v.max() < 1.05, "{:.2g}"))
    n, information, r2, exponent = fit_information([r for r in random if r["beta"] == low and r["train_acc"] > 0.85])
    real_exponent = fit_information([r for r in real if r["beta"] == low])[3]
    table.append(claim(f"random labels: information grows linearly with N (β = {low:g}, {len(n)} memorised runs: R² "
                       "of I = slope·N over 0.95; exponent of I ~ N^exponent 0.85 to 1.15)", "linear",
                       {"slope, nats a sample": [n @ information / (n @ n)], "R²": [r2], "exponent": [exponent]},
                       lambda v: r2 > 0.95 and 0.85 < exponent < 1.15, "{:.3g}", bool(random)))
    table.append(claim("real labels: information grows with a smaller exponent than that of random labels", "saturates",
                       {"exponent": [real_exponent]}, lambda v: v[0] < exponent, "{:.2f}", bool(random and real)))
    charged = [r for r in good if r["labels"] == "random" and r["information"] > 0.05 * r["n"]]  # ladders too
    ratio = by_size(lambda r: r["label_information"] / r["information"] * r["n"], charged)
    table.append(claim("random labels: label nats memorised per weight nat never exceed 1 (where weights hold over "
                       "0.05 nats a sample; biases and batch normalisation are not charged)", "at most 1 (theory)",
                       {name: [max(v, default=math.nan)] for name, v in ratio.items()}, lambda v: v.max() <= 1,
                       "at most {:.2f}", bool(random)))
    tests = [p[1] for n in s["sizes"] for p in summarise(random, "beta", "test_acc", n=n)] or [math.nan]
    table.append(claim("random labels: test accuracy is 10% throughout (± 3%, each cell's mean over seeds)", "10%",
                       {"least": [min(tests)], "most": [max(tests)]}, lambda v: abs(v - 0.1).max() < 0.03, "{:.1%}",
                       bool(random)))
    tests = by_size(lambda r: r["test_acc"], [r for r in real if r["beta"] == low])
    table.append(claim(f"real labels: test accuracy grows with N (β = {low:g})", "grows", tests,
                       lambda v: (np.diff([np.mean(t) for t in tests.values()]) > 0).all(), "{:.1%}", bool(real)))
    least = {f"N={n:,}": [min((p[1] for p in mean_bounds(real, n)), default=math.nan)] for n in s["sizes"]}
    table.append(claim("real labels: PAC-Bayes (eq. 7) bounds some net's test error below 90% (shown: the least bound "
                       "over β, with I(w;D) in the place of a divergence from a proper prior)",
                       "not shown", least, lambda v: v.min() < 0.9, "{:.0%}", bool(real)))
    return table


def mean_bounds(rows, n):
    """[(beta, bound, ...)]: eq. 7 for the error of nets on n real labels; not a certificate, see certify()."""
    some = [r | {"bound": pac_bayes_bound(1 - r["train_acc"], max(r["information"], 0), n, max_loss=1)}
            for r in rows if r["n"] == n and r["labels"] == "real" and r["status"] == "ok"]
    return summarise(some, "beta", "bound")


def fit_information(rows):
    """(N, information, R² of information = slope * N, exponent of information ~ N^exponent) of these runs."""
    n, information = np.array([(r["n"], r["information"]) for r in rows] or [(1, math.nan)], float).T
    residual = information - (n @ information) / (n @ n) * n
    r2 = 1 - (residual**2).sum() / max(((information - information.mean()) ** 2).sum(), 1e-9)
    return n, information, r2, np.polyfit(np.log(n), np.log(information), 1)[0] if len(set(n)) > 1 else math.nan


def best_beta(rows, n):
    """Beta of the best test accuracy on real labels: for the record only, it is chosen on the test set."""
    return max(summarise(rows, "beta", "test_acc", labels="real", n=n), key=lambda p: p[1])[0]


def information_beta(settings):
    """The beta at which information is compared over N: the largest up to 0.1, where everything is memorised."""
    return max(beta for beta in settings["betas"] if beta <= 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Plot
# ----------------------------------------------------------------------------------------------------------------------
def plot(rows, args):
    s = SETTINGS[args.scale]
    good = [r for r in rows if r["status"] == "ok"]
    random = [r for r in good if r["labels"] == "random"]
    sizes = sorted({r["n"] for r in good})
    for r in good:
        r["per_sample"] = r["information"] / r["n"]
    colours = dict(zip(sizes, plt.cm.viridis(np.linspace(0, 0.85, len(sizes)))))
    fig, axes = new_figure(2, 4, f"Fig. 1: Small AlexNet, width ×{s['width']:g}, {args.dataset}, scale {args.scale}, "
                           f"up to {len({r['seed'] for r in good})} seeds a cell, {len(rows) - len(good)} diverged")
    panels = [("random", "train_acc"), ("real", "train_acc"), ("random", "test_acc"), ("real", "test_acc")]
    for ax, (labels, key) in zip(axes[0], panels):
        plot_map(ax, [r for r in good if r["labels"] == labels and r["start"] == "anneal"], labels, key)
    scale = plt.cm.ScalarMappable(plt.Normalize(0.12, 0.98), "coolwarm")
    fig.colorbar(scale, ax=axes[0, -1], label="accuracy (a fraction)")

    ax = axes[1, 0]
    for n in sizes:
        points = summarise(random, "beta", "train_acc", start="anneal", n=n)
        plot_points(ax, points, color=colours[n], label=f"N = {n:,}")
        ax.plot(PAPER_CROSSING.get(n, math.nan), 0.55, "D", mfc="0.8", mec=colours[n], ms=9)
    ax.plot([], [], "D", mfc="0.8", mec="0.4", ms=9, label="the paper's 55%, same N")
    ax.set(xscale="log", xlabel="β", ylabel="train accuracy, sampled weights", title="random labels: the transition")

    ax = axes[1, 1]
    for n in s["hysteresis"]:
        for start, arrow, name in (("memorised", ">-", "raised from memory"), ("chance", "<:", "lowered from chance")):
            plot_points(ax, summarise(random, "beta", "train_acc", start=start, n=n), fmt=arrow, color=colours.get(n),
                        label=f"N = {n:,}, β {name}")
        lower, equal, upper = hysteresis([r for r in random if r["n"] == n])
        if lower < upper:
            ax.axvspan(lower, upper, color=colours[n], alpha=0.12, lw=0)
        ax.axvline(equal, color=colours.get(n), lw=1.5, ls="-.")
    ax.plot([], [], "-.", color="0.4", label="equal objective")
    ax.set(xscale="log", xlabel="β", ylabel="train accuracy, sampled weights", title="hysteresis: two states coexist")

    ax, beta = axes[1, 2], information_beta(s)
    for labels, colour in (("random", "C3"), ("real", "C0")):
        plot_points(ax, summarise(good, "n", "per_sample", labels=labels, start="anneal", beta=beta), color=colour,
                    label=f"{labels} labels")
    ax.axhline(LOG10, color="0.6", ls="--", label="log 10: a random label")
    ax.set(xscale="log", xlabel="N", ylabel="I(w;D)/N, nats per sample", title=f"information, β = {beta:g}")
    ax.set_ylim(bottom=0)

    ax = axes[1, 3]
    for n in sizes:
        some = [r for r in random if r["n"] == n and r["per_sample"] > 0.05]
        ax.plot([r["per_sample"] for r in some], [r["label_information"] for r in some], ".", color=colours[n],
                label=f"N = {n:,}")
    nats = np.geomspace(0.05, 50)
    ax.plot(nats, np.minimum(nats, LOG10), "k--", lw=1, label="what theory allows: one to one, up to log 10")
    ax.set(xscale="log", xlabel="I(w;D)/N, nats per sample", ylabel="label nats memorised per sample",
           title="random labels: what a weight nat buys")
    for ax in axes[1]:
        if ax.get_xlabel() == "β":
            ax.axvline(1, ls="--", color="k", lw=1)
        ax.legend()
    save_figure(fig, args)


def plot_map(ax, rows, labels, key):
    """One of the paper's four panels: accuracy over log10 N and log10(beta/N), interpolated on a triangulation."""
    cells = sorted({(r["n"], r["beta"]) for r in rows})
    value = [np.mean([r[key] for r in rows if (r["n"], r["beta"]) == cell]) for cell in cells]
    x, y = np.log10([[n, beta / n] for n, beta in cells]).reshape(-1, 2).T
    if np.linalg.matrix_rank(np.stack([x, y, np.ones(len(x))])) == 3:  # three points that are not on one line
        # triangulated over (log N, log beta), where the cells form a rectangle, and sheared to the paper's axes
        triangles, levels = Triangulation(x, x + y).triangles, np.linspace(0.12, 0.98, 44)
        ax.tricontourf(Triangulation(x, y, triangles), value, levels, cmap="coolwarm", extend="both")
    ax.plot(x, y, "k.", ms=2)
    sizes = np.array(sorted({n for n, _ in cells}))
    ax.plot(np.log10(sizes), -np.log10(sizes), "k--", lw=1, label="β = 1")
    if (labels, key) == ("random", "train_acc"):
        ours = {n: transition([r for r in rows if r["n"] == n]) for n in sizes}
        paper = {n: beta for n, beta in PAPER_CROSSING.items() if n <= sizes.max(initial=0)}
        for contour, colour, name in ((paper, "0.35", "the paper's 55%"), (ours, "w", "our 55%")):
            path = np.log10([(n, b / n) for n, b in contour.items()]).reshape(-1, 2)
            ax.plot(*path.T, color=colour, lw=2, label=name)
    if (labels, key) == ("real", "train_acc") and max(sizes, default=0) >= 1000:
        ax.plot([2.9, max(x)], [-2.8, -2.8], color="0.35", ls=":", lw=2, label="second line of the paper")
    ax.invert_yaxis()
    ax.set(xlabel="log₁₀ N", ylabel="log₁₀(β/N)", title=f"{key.split('_')[0]} accuracy, {labels} labels")
    ax.legend(loc="upper right", facecolor="0.85")


# ----------------------------------------------------------------------------------------------------------------------
def main():
    args = parse_args(__doc__, DATASETS, SEEDS, {"--caps": dict(type=finite, nargs="+", metavar="C", help=(
        "instead of the figure: one N with log-normal noise, its log alpha capped at each of these values")),
        "--certificates": dict(action="store_true", help=(
            "instead of the figure: nets trained for a PAC-Bayes bound, and what it guarantees"))})
    s = SETTINGS[args.scale]
    if args.caps:
        return compare_caps(args, s)
    if args.certificates:
        return certify(args, s)
    random, real = ([{"labels": labels, "n": n, "beta": beta, "start": "anneal"}
                     for n in s["sizes"][::-1] for beta in s["betas"]] for labels in ("random", "real"))
    ladders = [{"labels": "random", "n": n, "beta": list(betas), "start": start} for n in s["hysteresis"]
               for start, betas in zip(STARTS, (s["ladder"], s["ladder"][::-1] + s["below"]))]
    rows = run_grid(random + ladders + real, train_cell, args, load_data)
    plot(rows, args)
    print_claims(claims(rows, args))
    sizes = sorted({r["n"] for r in rows if r["labels"] == "real" and r["status"] == "ok"})
    if not sizes:
        return
    print("\nfor the record, chosen on the test set: β of the best test accuracy on real labels:",
          "; ".join(f"N={n:,} {best_beta(rows, n):g}" for n in sizes))
    print("\nreal labels, error of sampled weights, at β: train set / test set / what eq. 7 would bound it by")
    for n in sizes:
        errors = [[1 - p[1] for p in summarise(rows, "beta", key, labels="real", n=n)]
                  for key in ("train_acc", "test_acc_sampled")]
        print(f"N = {n:,} |", "; ".join(f"{beta:g}: {train:.0%} / {test:.0%} / {bound:.0%}" for train, test, (
            beta, bound, *_) in zip(*errors, mean_bounds(rows, n))))


def finite(text):
    """A number of the command line; argparse reports the ValueError."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def compare_caps(args, s):
    """How the choice of what holds zero nats, a weight at the cap, moves the transition; rows go to their own file."""
    args.figure += "-caps"
    rows = run_grid([{"labels": "random", "n": s["sizes"][1], "beta": beta, "start": "anneal", "cap": cap}
                     for cap in args.caps for beta in s["betas"][::2]], train_cell, args, load_data)
    print("\ncap on log α | β: train accuracy at information, nats/sample")
    for cap in args.caps:
        accuracy, information = (summarise(rows, "beta", key, cap=cap) for key in ("train_acc", "information"))
        print(f"{cap:g} | " + "; ".join(f"{p[0]:g}: {p[1]:.2f} at {i[1] / s['sizes'][1]:.2f}"
                                        for p, i in zip(accuracy, information)))


def certificate(row, loss, count):
    """Eq. 7 for a row, in nats or as a fraction: all of count certificates hold at once, with 95%.

    A fifth of the 5% is for the mean over draws of weights and samples (empirical Bernstein, Maurer & Pontil 2009).
    """
    largest, draws, delta = MAX_LOSS[loss], row["draws"], 0.05 / count
    log_term = math.log(10 / delta)
    upper = row[loss] + row[f"{loss}_std"] * math.sqrt(2 * log_term / draws)
    upper += 7 * largest * log_term / (3 * (draws - 1))
    return pac_bayes_bound(min(upper, largest), row["divergence"], row["bound_n"], max_loss=largest, delta=0.8 * delta)


def certify(args, s):
    """Train nets for the PAC-Bayes bound and print what it guarantees of them; rows go to their own file."""
    args.figure += "-certificates"
    cells = [{"labels": "real", "n": s["certificates"][0], "seen": seen, "beta": beta}
             for seen, beta in ((0, 3.0), (0, 10.0), (0.5, 3.0))]
    rows = [r for r in run_grid(cells, certify_cell, args, load_data) if r["status"] == "ok"]
    table = []
    for cell, loss in itertools.product(cells, MAX_LOSS):
        some = [r for r in rows if all(r[key] == value for key, value in cell.items())]
        values = {"on its samples": [r[loss] for r in some], "certificate": [
            certificate(r, loss, len(rows) * len(MAX_LOSS)) for r in some], "test": [r[f"test_{loss}"] for r in some]}
        chance = LOG10 if loss == "cross_entropy" else 0.9
        prior = f"trained on {cell['seen']:.0%} of N" if cell["seen"] else "as initialised"
        table.append(claim(f"{loss}, prior {prior}, β = {cell['beta']:g}: certificate over the test's, below chance",
                           "not shown", values, lambda v: (v.reshape(3, -1)[2] <= v.reshape(3, -1)[1]).all()
                           and v.reshape(3, -1)[1].max() < chance))
    print_claims(table)


if __name__ == "__main__":
    main()
