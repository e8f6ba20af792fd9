"""Is r <= 1 a theorem? With a proper prior it is; the log-uniform one leaves a constant free.

    python -m beyond.proper_prior --scale demo     # synthetic images, under a minute on 2 cores
    python -m beyond.proper_prior --scale cpu      # CIFAR-10, 15 minutes on 2 cores

Fig. 1 counts label nats per nat in the weights, r, with an improper prior, whose constant is a
choice. Here the same nets are trained with a proper Gaussian prior around their initialisation, of
one variance per layer, the choice of which is paid for: cross-entropy + beta/N * KL(q || p). At
beta = 1 that is the length of a code, and r <= 1 is Kraft's inequality (Hinton & van Camp 1993;
Blier & Ollivier 2018). beta is raised from 0 without Fig. 1's detour, at which these nets forget.
"""
import math

import torch
import torch.nn as nn

import fig1_phase_transition as fig1
from beyond.hysteresis import add_derived
from common import (claim, complete_seeds, fmt, new_figure, parse_args, plot_points, run_grid,
                    save_figure, save_tables, summarise)

SETTINGS = {scale: s | {"peak": 0.0} for scale, s in fig1.SETTINGS.items()}
GRID = {
    "demo": dict(sizes=(100,), betas=(0.03, 0.1)),
    "cpu": dict(sizes=(100, 300, 1000, 3000), betas=(0.02, 0.05, 0.1, 0.2)),
    "paper": dict(sizes=(100, 1000, 10_000), betas=(0.02, 0.05, 0.1, 0.2)),
}
SEEDS = {"demo": [0], "cpu": [0], "paper": [0, 1, 2]}


def prior_divergence(model, prior):
    """KL(q(w|D) || p(w)) of Gaussian noise from a proper Gaussian prior: 0-d tensor, nats.

    prior: a state_dict of the model that has not seen the samples. p(w) = N(prior weight, s^2),
    s^2 the best of 1,000 values for each layer, at a cost of log 1000 nats. ValueError for
    log-normal noise, or if anything without noise differs from the prior.
    """
    noisy = {f"{name}.".lstrip("."): m for name, m in model.named_modules()
             if isinstance(getattr(m, "log_sigma2", None), nn.Parameter)}
    if not noisy or any(m.noise != "gaussian" for m in noisy.values()):
        raise ValueError("the model has no stochastic layer, or one with log-normal noise")
    counted = {name + part for name in noisy for part in ("weight", "log_sigma2")}
    if moved := [key for key, value in model.state_dict().items()
                 if key not in counted and not torch.equal(value, prior[key])]:
        raise ValueError(f"{', '.join(moved)}: without noise, and not as in the prior")
    total = 0
    for name, m in noisy.items():
        square = torch.exp(m.log_sigma2) + (m.weight - prior[name + "weight"]) ** 2
        log_s2 = (square.detach().mean().log() * 20).round().clamp(-799, 200) / 20
        kl = 0.5 * (log_s2 - m.log_sigma2 + square / torch.exp(log_s2) - 1).sum()
        total = total + math.log(1000) + kl
    return total


def around_start():
    """A function of a model: its divergence from the prior around the weights of the first call."""
    start = {}

    def information(model):
        if not start:
            start.update({f"{name}.weight": m.weight.detach().clone()
                          for name, m in model.named_modules() if hasattr(m, "log_sigma2")})
        return prior_divergence(model, model.state_dict() | start)
    return information


def train_cell(cell, device, args, progress):
    peak = SETTINGS[args.scale]["peak"]
    return fig1.train_cell(cell, device, args, progress, around_start(), peak=peak)


def make_cells(scale):
    grid = GRID[scale]
    return [{"labels": "random", "n": n, "beta": b} for n in grid["sizes"] for b in grid["betas"]]


def main():
    from matplotlib import colormaps
    args = parse_args(__doc__, fig1.DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], fig1.load_data)
    ok, sizes = add_derived(rows), GRID[args.scale]["sizes"]
    fig, axes = new_figure(1, 1, f"Proper Gaussian prior, {args.dataset}, scale {args.scale}")
    for n, colour in zip(sizes, colormaps["viridis"]([i / len(sizes) for i in range(len(sizes))])):
        memorised = [row for row in ok if row["n"] == n and row["r"] > 0]
        plot_points(axes[0, 0], summarise(memorised, "beta", "r"), color=colour, label=f"N = {n:,}")
    axes[0, 0].set(xlabel="β", ylabel="r, label nats per nat in the weights", ylim=(0, 1.05))
    axes[0, 0].axhline(1, color="0.5", ls=":", label="r = 1: an ideal code")
    axes[0, 0].legend()
    save_figure(fig, args)
    table, rows = [], complete_seeds(ok, make_cells(args.scale))
    if rows:
        largest = {n: max(row["r"] for row in rows if row["n"] == n) for n in sizes}
        ours = "; ".join(f"N={n:,} {fmt(r)}" for n, r in largest.items())
        table = [claim("r ≤ 1 in every cell (shown: largest)", "theory", ours,
                       all(r <= 1 for r in largest.values())),
                 claim("random labels are memorised under a proper prior (r > 0) at some β", "–",
                       ours, all(r > 0 for r in largest.values()))]
    save_tables(args, claims=table, measured=fig1.cell_table(ok))


if __name__ == "__main__":
    main()
