"""Log-normal noise: the cap that it needs moves the transition of Fig. 1.

    python -m beyond.log_normal --scale demo     # synthetic images, half a minute on 2 cores
    python -m beyond.log_normal --scale cpu      # CIFAR-10, 1/4 width, about 25 minutes on 2 cores

With log-normal noise a weight holds (cap - log alpha)/2 nats: the paper's -log(alpha)/2 + C, with
the constant C such that a weight at the largest alpha allowed, the cap, holds zero (Prop. 4.1).
C alone changes no gradient, only the objective, and so where memory ceases to pay; the cap limits
the noise too, and so moves where accuracy falls. The paper fixes neither. A low cap counts too
little: a weight at the cap is free and yet tells something, so a net can memorise more label nats
than are counted, which no code can. A high cap counts too much.
The transition is the beta at which train accuracy falls through 55%. The protocol is Fig. 1's, but
beta is raised from 0 without the detour over larger beta, on which these nets forget.
"""
import math

import numpy as np

from beyond.hysteresis import measure, random_labels, train
from common import (claim, complete_seeds, crossing, fmt, load_images, new_figure, ok_rows,
                    parse_args, per_seed, plot_points, run_grid, save_figure, save_tables,
                    summarise)
from fig1_phase_transition import DATASETS

SETTINGS = {
    "demo": dict(width=1 / 8, batch=50, lr=0.012, lr_noise=0.16, hold=0.6, steps=600),
    "cpu": dict(width=1 / 4, batch=100, lr=0.024, lr_noise=0.16, hold=0.6, steps=3000),
    "paper": dict(width=1, batch=100, lr=0.012, lr_noise=0.16, hold=0.6, steps=10_000),
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
    """Train one net with log-normal noise on random labels and measure it as in training."""
    s, beta = SETTINGS[args.scale], cell["beta"]
    x, y, model = random_labels(cell, s["width"], device, load_data(args))
    for layer in model.modules():
        if hasattr(layer, "log_sigma2"):
            layer.noise, layer.max_log_alpha = "lognormal", cell["cap"]
    train(model, x, y, lambda t: beta * min(1, t / 0.4), s["steps"], s, progress)
    return measure(model, x, y)


def transition(rows):
    """The beta at which train accuracy falls through 55%; nan if it does not."""
    return crossing(summarise(rows, "beta", "train_acc"), 0.55)


def uncounted(row):
    """Label nats memorised per sample, less the nats counted in the weights."""
    return math.log(10) - row["cross_entropy"] - row["nats"]


def claims(rows, grid):
    """The claims table. rows: of complete seeds."""
    beta = {cap: per_seed(transition, ok_rows(rows, cap=cap)) for cap in grid["caps"]}
    most = {cap: per_seed(lambda rows: max(uncounted(row) for row in rows), ok_rows(rows, cap=cap))
            for cap in grid["caps"]}

    def ours(values):
        return "; ".join(f"cap {cap:g}: {fmt(v)}" for cap, v in values.items())

    low, *rest = grid["caps"]
    return [
        claim("the higher the cap on log α, the smaller the β of the transition", "–",
              ours(beta), (np.diff([values.mean() for values in beta.values()]) < 0).all()),
        claim(f"cap {low:g} counts too little: some net has memorised over 0.1 nats per sample "
              "more than are counted (shown: largest excess)", "–", ours({low: most[low]}),
              most[low].mean() > 0.1),
        claim("with a higher cap no net has", "–", ours({cap: most[cap] for cap in rest}),
              all(most[cap].max() <= 0.1 for cap in rest)),
    ]


def measured(ok):
    """Accuracy, cross-entropy and nats for each cap and beta; means over the seeds."""
    table = []
    for cap, beta in sorted({(row["cap"], row["beta"]) for row in ok}):
        rows = ok_rows(ok, cap=cap, beta=beta)
        columns = {"train": "train_acc", "cross-entropy": "cross_entropy",
                   "I/N": "nats"}
        table.append({"cap on log α": cap, "β": beta, "seeds": len(rows)} | {
            name: fmt([row[key] for row in rows]) for name, key in columns.items()})
    return table


def plot(ok, grid, args):
    fig, axes = new_figure(1, 2, f"Log-normal noise, random labels, N = {grid['n']:,}, "
                           f"{args.dataset}, scale {args.scale}")
    accuracy_ax, nats_ax = axes[0]
    for cap in grid["caps"]:
        rows = ok_rows(ok, cap=cap)
        points = summarise(rows, "beta", "train_acc")
        plot_points(accuracy_ax, points, label=f"log α at most {cap:g}")
        nats_ax.plot([row["nats"] for row in rows],
                     [math.log(10) - row["cross_entropy"] for row in rows], "o", ms=4,
                     label=f"log α at most {cap:g}")
    accuracy_ax.set(xscale="log", xlabel="β", ylabel="train accuracy", title="the transition")
    nats = np.geomspace(0.01, 100)
    nats_ax.plot(nats, np.minimum(nats, math.log(10)), "k--", lw=1, label="no code tells more")
    nats_ax.set(xlabel="I(w;D)/N, nats per sample",
                ylabel="log 10 − cross-entropy, nats per sample",
                title="what is counted, and what is memorised")
    nats_ax.set_xscale("symlog", linthresh=0.01)
    for ax in axes[0]:
        ax.legend()
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    grid = GRID[args.scale]
    cells = [{"n": grid["n"], "cap": cap, "beta": beta} for cap in grid["caps"]
             for beta in grid["betas"]]
    ok = ok_rows(run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data))
    plot(ok, grid, args)
    rows = complete_seeds(ok, cells)
    save_tables(args, claims=claims(rows, grid) if rows else [], measured=measured(ok))


if __name__ == "__main__":
    main()
