"""Log-normal noise: the cap that it needs moves the transition of Fig. 1.

    python -m beyond.log_normal --scale demo     # synthetic images, half a minute on 2 cores
    python -m beyond.log_normal --scale cpu      # CIFAR-10, 1/4 width, about 30 minutes on 2 cores

With log-normal noise a weight holds (cap - log alpha)/2 nats: the paper's -log(alpha)/2 + C, with
the constant C such that a weight at the largest alpha allowed, the cap, holds zero (Prop. 4.1).
C alone changes no gradient, only the objective, and so where memorising ceases to pay; the cap
limits the noise too, and so moves where accuracy falls. The paper fixes neither. With a low cap a
weight at the cap is free and yet tells something, so a net can memorise more label nats than are
counted; with a high cap it memorises fewer.
The transition is the beta at which train accuracy falls through 55%. The net and, at scale cpu, the
rates are Fig. 1's, with fewer steps; beta is only raised, as at Fig. 1's peak these nets forget. In
training the outputs of linear layers are Gaussian of the same mean and variance; accuracy and
cross-entropy are those of one sampled network with log-normal weights, the mean over draws.
"""
import math
from functools import partial

import numpy as np

from beyond.hysteresis import measure, random_labels, train
from common import (cell_table, check, complete_seeds, group_by, load_images, ok_rows,
                    parse_args, per_seed, plot_points, run_grid, save_panels, save_tables,
                    summarise)
from fig1_phase_transition import DATASETS, MEMORISED, at_accuracy

SHARED = dict(lr_noise=0.16, hold=0.6, draws=8)
SETTINGS = {
    "demo": dict(width=1 / 8, batch=50, lr=0.012, steps=600, **SHARED),
    "cpu": dict(width=1 / 4, batch=100, lr=0.024, steps=3000, **SHARED),
    "paper": dict(width=1, batch=100, lr=0.012, steps=10_000, **SHARED),
}
BETAS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 10.0)
GRID = {  # caps: on log alpha
    "demo": dict(n=100, caps=(0.0, 1.0, 2.0), betas=(0.01, 0.1, 1.0, 10.0)),
    "cpu": dict(n=300, caps=(0.0, 1.0, 2.0), betas=BETAS),
    "paper": dict(n=3000, caps=(0.0, 1.0, 2.0), betas=BETAS),
}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}


def load_data(args):
    return load_images(args.dataset, args.data_dir, GRID[args.scale]["n"], 10)


def train_cell(cell, device, args, progress):
    """Train one net with log-normal noise on random labels and measure one sampled network."""
    s, beta = SETTINGS[args.scale], cell["beta"]
    x, y, model = random_labels(cell, s["width"], device, load_data(args))
    for layer in model.modules():
        if hasattr(layer, "log_sigma2"):  # the net is Fig. 1's, with another noise
            layer.noise, layer.max_log_alpha = "lognormal", cell["cap"]

    def beta_at(t):
        return beta * min(1, t / 0.4)

    train(model, x, y, beta_at, s["steps"], s, progress)
    return measure(model, x, y, s["draws"])


def transition(rows):
    """The beta at which train accuracy falls through 55%; nan if it does not, or of two beta."""
    return at_accuracy(rows, MEMORISED)


def transition_ratio(rows, cap, higher):
    """By which factor in beta the transition of the higher cap comes before that of this one."""
    return transition(ok_rows(rows, cap=cap)) / transition(ok_rows(rows, cap=higher))


def uncounted(rows):
    """Label nats memorised per sample, less the nats counted in the weights: the largest.

    Of nets with over 55% train accuracy; nan without any.
    """
    return max((math.log(10) - row["cross_entropy"] - row["nats"] for row in rows
                if row["train_acc"] > MEMORISED), default=math.nan)


def claims(rows, grid):
    """rows: of complete seeds."""
    low, *higher = caps = sorted(grid["caps"])
    ratios, excess = {}, {}
    for cap, next_cap in zip(caps, higher):
        ratio = partial(transition_ratio, cap=cap, higher=next_cap)
        ratios[f"cap {cap:g} to {next_cap:g}:"] = per_seed(ratio, rows)
    for cap in higher:
        excess[f"cap {cap:g}:"] = per_seed(uncounted, ok_rows(rows, cap=cap))
    excess_low = {f"cap {low:g}:": per_seed(uncounted, ok_rows(rows, cap=low))}
    return [
        check("the higher the cap on log α, the smaller the β of the transition (shown: ratios)",
              "–", ratios, (1, math.inf)),
        check(f"cap {low:g} counts too little: some net has memorised over 0.1 nats per sample "
              "more than are counted (shown: largest excess)", "–", excess_low, (0.1, math.inf)),
        check("with a higher cap no net has", "–", excess, (-math.inf, 0.1)),
    ]


def accuracy_panel(ax, rows):
    for (cap,), own in group_by(rows, "cap").items():
        plot_points(ax, summarise(own, "beta", "train_acc"), label=f"log α at most {cap:g}")
    ax.axvline(1, color="k", ls="--", lw=1)  # where the paper's Fig. 1 has it
    ax.set(xscale="log", xlabel="β", ylabel="train accuracy", title="the transition")
    ax.legend()


def nats_panel(ax, rows):
    """Label nats memorised against nats counted; above the line more than are counted."""
    for (cap,), own in group_by(rows, "cap").items():
        saved = [math.log(10) - row["cross_entropy"] for row in own]
        ax.plot([row["nats"] for row in own], saved, "o", ms=4, label=f"log α at most {cap:g}")
    nats = np.geomspace(0.01, 100)
    ax.plot(nats, np.minimum(nats, math.log(10)), "k--", lw=1, label="as many as are counted")
    ax.set_xscale("symlog", linthresh=0.01)  # all weights at the cap: zero nats
    ax.set(xlabel="I(w;D)/N, nats per sample", ylabel="log 10 − cross-entropy, nats per sample",
           title="what is counted, and what is memorised")
    ax.legend()


def plot(rows, grid, args):
    panels = [partial(panel, rows=rows) for panel in (accuracy_panel, nats_panel)]
    title = f"Log-normal noise, random labels, N = {grid['n']:,}, {args.dataset}, {args.scale}"
    save_panels(panels, title, args)


KEYS = {"cap on log α": "cap", "β": "beta"}
COLUMNS = {"train": "train_acc", "cross-entropy": "cross_entropy", "I/N": "nats"}


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    grid = GRID[args.scale]
    cells = []
    for cap in grid["caps"]:
        cells += [{"n": grid["n"], "cap": cap, "beta": beta} for beta in grid["betas"]]
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data)
    rows = ok_rows(rows)
    plot(rows, grid, args)
    complete = complete_seeds(rows, cells)
    save_tables(args, claims=claims(complete, grid) if complete else [],
                cells=cell_table(rows, KEYS, COLUMNS))


if __name__ == "__main__":
    main()
