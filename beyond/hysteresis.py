"""Hysteresis: memorising and chance coexist over a range of beta, and a net stays where it is.

    python -m beyond.hysteresis --scale demo     # synthetic images, half a minute on 2 cores
    python -m beyond.hysteresis --scale cpu      # CIFAR-10, 1/4 width, about 2 hours on 2 cores

Fig. 1 trains every net from the start. Here nets on random labels begin in one of two states:
  start = "memorised": memorise at the smallest beta; then raise beta in steps;
  start = "chance":    forget at the largest beta; then set beta to each smaller value, from that
                       same state (in small steps the net would drift at chance on the way).
At each beta a net is trained for a fixed number of steps, with the whole learning-rate schedule,
and measured with sampled weights and batch statistics, as in training. From this
  beta_up    upper edge: where train accuracy falls through 55% as beta is raised;
  beta*      the largest r of nets that have memorised: above it, memory costs more than chance;
  beta_down  lower edge: below it, the net at chance learns (train accuracy above 55%).
Between beta_down and beta* chance is not the minimum of the objective, only hard to leave. If time
is what lacks there, beta_down rises with the steps per beta.
"""
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F

from common import (claim, complete_seeds, corrupt_labels, crossing, draw_subset,
                    evaluate, fmt, load_images, lr_factor, minibatches, new_figure,
                    normalise, ok_rows, param_groups, parse_args, per_seed, plot_points,
                    run_grid, save_figure, save_tables, summarise, to_stochastic,
                    weight_information)
from fig1_phase_transition import DATASETS, small_alexnet

# first: steps at the first beta of a branch. below: smaller betas, for the branch at chance only.
BRANCH = dict(betas=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2),
              below=(0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001))
SETTINGS = {
    "demo": dict(width=1 / 8, batch=50, lr=0.012, lr_noise=0.16, hold=0.6, first=600,
                 betas=(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0), below=(0.05, 0.03, 0.01, 0.003, 0.001)),
    "cpu": dict(width=1 / 4, batch=100, lr=0.024, lr_noise=0.16, hold=0.6, first=4000, **BRANCH),
    "paper": dict(width=1, batch=100, lr=0.012, lr_noise=0.16, hold=0.6, first=10_000, **BRANCH),
}
GRID = {  # steps: at each beta after the first
    "demo": dict(sizes=(100,), steps=(100, 300)),
    "cpu": dict(sizes=(300, 1000), steps=(300, 1000, 3000)),
    "paper": dict(sizes=(1000, 10_000), steps=(1000, 4000)),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
STARTS = ("memorised", "chance")
EDGES = ("β_down", "β*", "β_up")


def load_data(args):
    return load_images(args.dataset, args.data_dir, max(GRID[args.scale]["sizes"]), 10)


def random_labels(cell, width, device, data):
    """The cell's images with random labels, and a new net: x (n, c, 28, 28), y (n,), model."""
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, _, _, mean, std = data
    x, y = draw_subset(x, y, cell["n"], generator)
    x = normalise(x, mean, std, size=28).to(device)
    y = corrupt_labels(y, 1.0, 10, generator).to(device)
    model = to_stochastic(small_alexnet(width, x.shape[1]))
    return x, y, model.to(device, memory_format=torch.channels_last)


def train_cell(cell, device, args, progress):
    """One branch: train at one beta after the other. What is measured are lists over beta."""
    s = SETTINGS[args.scale]
    x, y, model = random_labels(cell, s["width"], device, load_data(args))
    memorised = cell["start"] == "memorised"
    betas = s["betas"] if memorised else s["betas"][::-1] + s["below"]
    train(model, x, y, lambda t: betas[0] * (min(1, t / 0.4) if memorised else 1), s["first"], s,
          progress)
    measured = [measure(model, x, y)]
    chance = copy.deepcopy(model.state_dict())
    for beta in betas[1:]:
        if not memorised:
            model.load_state_dict(chance)
        train(model, x, y, lambda t: beta, cell["steps"], s, progress)
        measured.append(measure(model, x, y))
    return {"betas": betas} | {name: [m[name] for m in measured] for name in measured[0]}


def train(model, x, y, beta_at, steps, s, progress):
    """Train with beta_at(fraction of the steps) and the whole learning-rate schedule."""
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    batches = minibatches(len(x), s["batch"], x.device)
    model.train()
    for step in range(steps):
        index = next(batches)
        loss = F.cross_entropy(model(x[index]), y[index])
        loss = loss + beta_at(step / steps) / len(x) * weight_information(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())


def measure(model, x, y):
    """Accuracy and cross-entropy of one sampled network; nats of I(w;D) per sample."""
    nats = weight_information(model).item() / len(x)
    return evaluate(model, x, y, x, y) | {"nats": nats}


def add_derived(rows):
    """The ok rows, with nats per sample and r, label nats saved per nat; 0 below 55% accuracy."""
    rows = ok_rows(rows)
    for row in rows:
        row["nats"] = row["information"] / row["n"]
        memorised = row["train_acc"] > 0.55
        row["r"] = (math.log(10) - row["cross_entropy"]) / row["nats"] if memorised else 0.0
    return rows


def critical_beta(rows):
    """beta*: the largest r of these states. Above it memorising does not pay."""
    return max(row["r"] for row in rows)


def by_beta(rows):
    """One row per beta, with objective and Fig. 1's r, in place of one per branch."""
    points = []
    for row in rows:
        values = zip(row["betas"], row["train_acc"], row["cross_entropy"], row["nats"])
        for beta, acc, cross_entropy, nats in values:
            points.append({"status": "ok", "labels": "random", "n": row["n"], "beta": beta,
                           "start": row["start"], "train_acc": acc,
                           "cross_entropy": cross_entropy, "information": nats * row["n"],
                           "objective": cross_entropy + beta * nats})
    return add_derived(points)


def edges(rows):
    """(beta_down, beta*, beta_up) of one seed's two branches.

    beta_down is 0 if the net at chance learns at no beta measured, beta_up the largest of them if
    none ends memory.
    """
    branches = [ok_rows(by_beta(rows), start=start) for start in STARTS]
    up, down = (crossing(summarise(branch, "beta", "train_acc"), 0.55)
                for branch in branches)
    if max(p["train_acc"] for p in branches[1]) < 0.55:
        down = 0.0
    if min(p["train_acc"] for p in branches[0]) >= 0.55:
        up = max(p["beta"] for p in branches[0])
    return down, critical_beta(branches[0]), up


def make_cells(grid, **where):
    cells = [{"n": n, "start": start, "steps": steps} for n in grid["sizes"]
             for steps in grid["steps"] for start in STARTS]
    return [cell for cell in cells if where.items() <= cell.items()]


def all_edges(rows, grid):
    """{(N, steps per beta): edges of each complete seed (seeds, 3)}."""
    found = {(n, steps): complete_seeds(rows, make_cells(grid, n=n, steps=steps))
             for n in grid["sizes"] for steps in grid["steps"]}
    return {key: per_seed(edges, rows) for key, rows in found.items() if rows}


def shown(edge):
    """Seeds' values of an edge as text; one below all β measured is 0 in each."""
    return fmt(edge, "{:.3g}") if np.any(edge) else "none"


def claims(rows, grid):
    """The claims table; rows of all cells."""
    table, found = [], all_edges(rows, grid)
    for n in grid["sizes"]:
        for steps in grid["steps"]:
            if (n, steps) in found:
                values = found[n, steps]
                ours = " < ".join(map(shown, values.T))
                table.append(claim(
                    f"N = {n:,}, {steps:,} steps per β: β_down < β* < β_up < 1.05", "–", ours,
                    (np.diff(values) > 0).all() and values[:, 2].max() < 1.05))
        both = complete_seeds(rows, make_cells(grid, n=n))
        if not both:
            continue
        down, *others = np.array([per_seed(edges, ok_rows(both, steps=steps))
                                  for steps in grid["steps"]]).transpose(2, 0, 1)
        moves = [np.diff(values, axis=0) for values in others]
        table.append(claim(
            f"N = {n:,}: stationary, {' to '.join(f'{s:,}' for s in grid['steps'][-2:])} steps "
            "per β move β* and β_up by under 0.05", "–",
            "; ".join(f"{name} by {', '.join(fmt(v, '{:.2f}') for v in move)}"
                      for name, move in zip(EDGES[1:], moves)),
            all(abs(move[-1].mean()) < 0.05 for move in moves)))
        if down.any():  # else it lies below the betas measured
            rise = np.diff(down, axis=0)
            spread = rise.std(1, ddof=1) if rise.shape[1] > 1 else 0
            table.append(claim(
                f"N = {n:,}: β_down rises with the steps per β, by over twice the spread", "–",
                " → ".join(fmt(values, "{:.2g}") for values in down)
                + ", rise " + ", ".join(fmt(values, "{:.2g}") for values in rise),
                (rise.mean(1) > 2 * spread).all()))
    return table


def measured(rows, grid):
    """The edges for each N and steps per beta, over the seeds that have both branches."""
    return [{"N": n, "steps per β": steps, "seeds": len(values)}
            | {name: shown(column) for name, column in zip(EDGES, values.T)}
            for (n, steps), values in all_edges(rows, grid).items()]


def plot(rows, grid, args):
    found = all_edges(rows, grid)
    fig, axes = new_figure(3, len(grid["sizes"]), f"Hysteresis, {args.dataset}, {args.scale}")
    for n, (accuracy_ax, objective_ax, edges_ax) in zip(grid["sizes"], axes.T):
        for steps, colour in zip(grid["steps"], ("C0", "C3", "C2")):
            for start, marker in zip(STARTS, (">-", "<:")):
                points = by_beta(ok_rows(rows, n=n, steps=steps, start=start))
                style = dict(color=colour, label=f"{start}, {steps:,} steps per β")
                for ax, key in ((accuracy_ax, "train_acc"), (objective_ax, "objective")):
                    plot_points(ax, summarise(points, "beta", key), marker, **style)
        accuracy_ax.axvline(1, color="k", ls="--", lw=1)
        accuracy_ax.set(xscale="log", xlabel="β", ylabel="train accuracy",
                        title=f"random labels, N = {n:,} (dashed: β = 1)")
        objective_ax.set(xscale="log", xlabel="β", ylabel="objective, nats per sample")
        seeds = [dict(zip(EDGES, values), status="ok", steps=steps)
                 for steps in grid["steps"] for values in found.get((n, steps), ())]
        for edge, marker in zip(EDGES, ("<:", "o-", ">--")):
            points = [point for point in summarise(seeds, "steps", edge) if point[1]]
            plot_points(edges_ax, points, marker, color="k", label=edge)
        edges_ax.axhline(1, color="k", ls="--", lw=1)
        edges_ax.set(xscale="log", xlabel="steps per β", ylabel="β at the edges", ylim=(0, 1.3))
        edges_ax.legend()
    axes[0, -1].legend()
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    grid = GRID[args.scale]
    rows = run_grid(make_cells(grid), train_cell, args, SETTINGS[args.scale], load_data)
    plot(rows, grid, args)
    save_tables(args, claims=claims(rows, grid), measured=measured(rows, grid))


if __name__ == "__main__":
    main()
