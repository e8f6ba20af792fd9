"""Hysteresis: memorising and chance coexist over a range of beta, and a net stays where it is.

    python -m beyond.hysteresis --scale demo     # synthetic images, a minute on 2 cores
    python -m beyond.hysteresis --scale cpu      # CIFAR-10, 1/4 width, 2 hours on 2 cores

Fig. 1 trains every net from the start. Here nets on random labels begin in one of two states:
  start = "memorised": memorise at the smallest beta; then raise beta in steps;
  start = "chance":    forget at the largest beta; then set beta to each smaller value, from that
                       same state (in small steps the net would drift at chance on the way).
At each beta a net is trained for a fixed number of steps, with the whole learning-rate schedule,
and one sampled network is measured, the mean over draws. From this
  lower edge:       below it, the net at chance learns (train accuracy above 55%);
  equal objective:  critical_beta, the largest r of nets that have memorised. r is label nats saved
                    per nat counted; above this beta the objective of memorising exceeds chance's;
  upper edge:       where train accuracy falls through 55% as beta is raised.
Between the lower edge and equal objective chance is not the minimum, only hard to leave. More steps
per beta raise equal objective and the upper edge; there is no sign of it in the lower edge.

Rows that say train_acc_batch and cross_entropy_batch were measured with batch statistics. The edges
are where accuracy falls, which is as steep in either measure. In two nets measured both ways r of
one sampled network was higher by 0.05, less than any distance between the edges.
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common import (check, complete_seeds, corrupt_labels, crossing, draw_subset, evaluate, fmt,
                    load_images, lr_factor, minibatches, normalise, ok_rows, param_groups,
                    parse_args, per_seed, plot_points, run_grid, save_panels, save_tables,
                    summarise, to_stochastic, weight_information)
from fig1_phase_transition import DATASETS, MEMORISED, small_alexnet

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
EDGES = ("lower edge", "equal objective", "upper edge")


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

    def first_beta(t):  # a net that is to memorise needs beta raised from 0
        return betas[0] * min(1, t / 0.4) if memorised else betas[0]

    train(model, x, y, first_beta, s["first"], s, progress)
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
    model.train()
    for step, index in zip(range(steps), minibatches(len(x), s["batch"], x.device)):
        cross_entropy = F.cross_entropy(model(x[index]), y[index])
        beta_now = beta_at(step / steps)
        loss = cross_entropy + beta_now / len(x) * weight_information(model)  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())


def measure(model, x, y, draws=8):
    """Accuracy and cross-entropy of one sampled network; nats of I(w;D) per sample."""
    measured = evaluate(model, x, y, x, y, draws)
    return {"train_acc": measured["train_acc"], "cross_entropy": measured["cross_entropy"],
            "nats": weight_information(model).item() / len(x)}


def by_beta(rows):
    """One row per beta, with objective and r, in place of one per branch."""
    points = []
    for row in rows:
        # older rows say in these names how they were measured
        kind = next(key for key in row if key.startswith("train_acc"))[len("train_acc"):]
        accuracies, cross_entropies = row["train_acc" + kind], row["cross_entropy" + kind]
        for i, beta in enumerate(row["betas"]):
            accuracy, cross_entropy, nats = accuracies[i], cross_entropies[i], row["nats"][i]
            point = {key: row[key] for key in ("status", "n", "seed", "start")}
            point["beta"] = beta
            point["train_acc"] = accuracy
            point["objective"] = cross_entropy + beta * nats
            # of chance, r would be a ratio of two small numbers
            point["r"] = (math.log(10) - cross_entropy) / nats if accuracy > MEMORISED else 0.0
            points.append(point)
    return points


def critical_beta(rows):
    """The beta of equal objective: the largest r. Above it memorising does not pay."""
    return max(row["r"] for row in rows)


def edges(rows):
    """(lower edge, equal objective, upper edge) of one seed's two branches.

    The lower edge is 0 if the net at chance learns at no beta measured, the upper edge the largest
    of them if none ends memorisation.
    """
    points = by_beta(rows)
    memorised, chance = ok_rows(points, start="memorised"), ok_rows(points, start="chance")
    upper = crossing(summarise(memorised, "beta", "train_acc"), MEMORISED)
    lower = crossing(summarise(chance, "beta", "train_acc"), MEMORISED)
    # crossing gives nan for an edge that is beyond all beta measured
    if max(point["train_acc"] for point in chance) < MEMORISED:
        lower = 0.0
    if min(point["train_acc"] for point in memorised) >= MEMORISED:
        upper = max(point["beta"] for point in memorised)
    return lower, critical_beta(memorised), upper


def make_cells(grid, **where):
    """The cells of a grid that have these values."""
    cells = []
    for n in grid["sizes"]:
        for steps in grid["steps"]:
            cells += [{"n": n, "start": start, "steps": steps} for start in STARTS]
    return [cell for cell in cells if where.items() <= cell.items()]


def edges_by_steps(rows, grid, n):
    """{steps per beta: edges (seeds, 3) of the seeds that have both branches}."""
    found = {}
    for steps in sorted(grid["steps"]):
        own = complete_seeds(rows, make_cells(grid, n=n, steps=steps))
        if own:
            found[steps] = per_seed(edges, own)
    return found


def claims(rows, grid):
    table = []
    for n in grid["sizes"]:
        for steps, values in edges_by_steps(rows, grid, n).items():
            lower, equal, upper = values.T
            table.append(check(
                f"N = {n:,}, {steps:,} steps per β: lower edge < equal objective < upper edge "
                "(shown: the two distances)", "–",
                {"": equal - lower, "and": upper - equal}, (1e-9, math.inf), "{:.3g}"))
        own = complete_seeds(rows, make_cells(grid, n=n))
        if len(grid["steps"]) > 1 and own:
            table += claims_over_steps(n, edges_by_steps(own, grid, n))
    return table


def claims_over_steps(n, found):
    """What more steps per beta change; found: of edges_by_steps, the same seeds for all steps."""
    *_, fewer, most = found
    moves = dict(zip(EDGES, (found[most] - found[fewer]).T))
    lower = moves.pop("lower edge")
    table = [check(f"N = {n:,}: stationary, {fewer:,} to {most:,} steps per β move equal "
                   "objective and upper edge by under 0.05", "–", moves, (-0.05, 0.05))]
    # without a spread of seeds, or with an edge below all beta measured, nothing can be said
    spread = lower.std(ddof=1) if len(lower) > 1 else 0
    if spread and found[most][:, 0].any():
        rise = lower.mean() / spread
        table.append(check(
            f"N = {n:,}: the lower edge rises from {fewer:,} to {most:,} steps per β (by over "
            "twice its spread; shown: rise over spread)", "–", {"": [rise]}, (2, math.inf)))
    return table


def shown(edge):
    """Seeds' values of an edge as text; one below all β measured is 0 in each."""
    return fmt(edge, "{:.3g}") if np.any(edge) else "none"


def edge_table(rows, grid):
    """The edges for each N and steps per beta, over the seeds that have both branches."""
    table = []
    for n in grid["sizes"]:
        for steps, values in edges_by_steps(rows, grid, n).items():
            row = {"N": n, "steps per β": steps, "seeds": len(values)}
            for name, column in zip(EDGES, values.T):
                row[name] = shown(column)
            table.append(row)
    return table


def branch_panel(ax, rows, n, key, label):
    """A measure against beta, a curve for each branch and number of steps."""
    all_steps = sorted({row["steps"] for row in rows})
    for number, steps in enumerate(all_steps):
        for start, marker in zip(STARTS, (">-", "<:")):
            points = by_beta(ok_rows(rows, steps=steps, start=start))
            plot_points(ax, summarise(points, "beta", key), marker, color=f"C{number}",
                        label=f"{start}, {steps:,}")
    ax.axvline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", xlabel="β", ylabel=label, title=f"random labels, N = {n:,}")
    if key == "train_acc":  # the other panels have the same curves
        ax.legend(title="start, steps per β", loc="center", bbox_to_anchor=(0.54, 0.5))


def edge_panel(ax, found, n):
    """The edges against the steps per beta; one below all beta measured is left out."""
    for column, (name, marker) in enumerate(zip(EDGES, ("<:", "o-", ">--"))):
        points = []
        for steps, values in found.items():
            for value in values[:, column]:
                if value:
                    points.append({"status": "ok", "steps": steps, "edge": value})
        plot_points(ax, summarise(points, "steps", "edge"), marker, color="k", label=name)
    ax.axhline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", xlabel="steps per β", ylabel="β", ylim=(0, 1.3),
           title=f"edges, N = {n:,}")
    ax.legend()


def plot(rows, grid, args):
    panels = []
    for n in grid["sizes"]:
        own, found = ok_rows(rows, n=n), edges_by_steps(rows, grid, n)
        if own:
            for key, label in (("train_acc", "train accuracy"),
                               ("objective", "objective, nats per sample")):
                panels.append(partial(branch_panel, rows=own, n=n, key=key, label=label))
        if found:
            panels.append(partial(edge_panel, found=found, n=n))
    save_panels(panels, f"Hysteresis, {args.dataset}, scale {args.scale}", args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    grid = GRID[args.scale]
    rows = run_grid(make_cells(grid), train_cell, args, SETTINGS[args.scale], load_data)
    plot(rows, grid, args)
    save_tables(args, claims=claims(rows, grid), edges=edge_table(rows, grid))


if __name__ == "__main__":
    main()
