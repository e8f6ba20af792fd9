"""Fig. 3: more weights do not overfit, more information does: a U against beta, not against width.

    python fig3_width_beta.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig3_width_beta.py --scale cpu      # 5,000 images of CIFAR-10, 50 minutes on 2 cores
    python fig3_width_beta.py --gpu 0          # CIFAR-10, the paper's widths and 11 values of beta

An All-CNN is trained on real labels without augmentation. Panel "width": plain weights with weight
decay. Panel "beta": one width, no weight decay, L = cross-entropy + beta/N * I(w;D). The paper:
against the number of weights test error falls, then hardly rises; against beta it is a U (9.16% at
0.001, 8.06% at 0.03, 9.64% at 100). Measured: from 50% to 34% with width, short of the plateau;
against beta 44.9%, 40.1% at its best (0.1), and collapse at 100.

Protocol, the same for every cell of a panel: learning rates rise over the first 10% of the steps,
are held to 80%, then a cosine to 0. Width: SGD with Nesterov momentum. Beta: Adam, all layers
stochastic, beta raised from 0 over the first 40%. Test error is that of the mean weights, with
batch normalisation re-estimated for them; that of sampled weights is recorded beside it.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (accuracy, bn_recalibrated, claim, complete_seeds, draw_subset, fmt, ib_loss,
                    load_images, lr_factor, minibatches, new_figure, normalise, ok_rows,
                    param_groups, parse_args, plot_points, predict, run_grid, save_figure,
                    save_tables, summarise, to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row. lr_sgd and weight_decay (that of the
# All-CNN's authors): panel "width"; lr and lr_noise of Adam: panel "beta".
RATES = dict(lr_sgd=0.05, weight_decay=0.001, lr=0.003, lr_noise=0.04)
SETTINGS = {
    "demo": dict(n=800, test=1000, batch=50, width_steps=300, beta_steps=600, **RATES),
    "cpu": dict(n=5000, test=10_000, batch=100, width_steps=500, beta_steps=1500, **RATES),
    "paper": dict(n=50_000, test=10_000, batch=250, width_steps=30_000, beta_steps=30_000, **RATES),
}
GRID = {
    "demo": dict(widths=(1 / 32, 1 / 16, 1 / 8), beta_width=1 / 8,
                 betas=(0.001, 0.01, 0.03, 0.1, 1.0)),
    "cpu": dict(widths=(1 / 16, 1 / 8, 1 / 4, 1 / 2), beta_width=1 / 8,
                betas=tuple(10**k for k in (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0))),
    "paper": dict(widths=(1 / 4, 1 / 2, 1, 2, 3), beta_width=1,
                  betas=tuple(10 ** (k / 2 - 3) for k in range(11))),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


def load_data(args):
    s = SETTINGS[args.scale]
    return load_images(args.dataset, args.data_dir, s["n"], s["test"])


def all_cnn(width=1.0):
    """The All-CNN, (n, 3, h, w) -> (n, 10): eight convolutions with ReLU, a ninth, an average."""
    layers, inputs = [], 3
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                   nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train_cell(cell, device, args, progress):
    """Train one net, with plain weights (panel "width") or stochastic ones (panel "beta")."""
    s, beta = SETTINGS[args.scale], cell.get("beta")
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (normalise(images, mean, std, size=32).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = all_cnn(cell["width"])
    params = sum(p.numel() for p in model.parameters())
    if beta is None:
        optimizer = torch.optim.SGD(model.parameters(), s["lr_sgd"], momentum=0.9, nesterov=True,
                                    weight_decay=s["weight_decay"])
    else:
        to_stochastic(model)
        optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    model.to(device, memory_format=torch.channels_last)  # several times faster on a CPU
    steps = s[cell["panel"] + "_steps"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    batches = minibatches(len(x), s["batch"], device)
    for step in range(steps):
        index = next(batches)
        if beta is None:
            loss = F.cross_entropy(model(x[index]), y[index])
        else:
            warm_up = min(1, step / steps / 0.4)
            loss, _, _ = ib_loss(model(x[index]), y[index], model, beta * warm_up, len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return {"params": params, "n": len(x)} | measure(model, beta, x, y, x_test, y_test)


@torch.no_grad()
def measure(model, beta, x, y, x_test, y_test):
    """What a row holds. beta None: plain weights, which are their own sample and hold no noise."""
    with bn_recalibrated(model, x.split(100), draw=False):
        logits = predict(model, x)
        train_mean, test_mean = accuracy(logits, y), accuracy(predict(model, x_test), y_test)
    test_sampled, information, objective = test_mean, None, None
    if beta is not None:
        with bn_recalibrated(model, x.split(100), draw=True):
            logits, test_sampled = predict(model, x), accuracy(predict(model, x_test), y_test)
        information = weight_information(model).item()
        objective = F.cross_entropy(logits, y).item() + beta * information / len(x)
    return {"objective": objective, "train_acc": accuracy(logits, y), "train_acc_mean": train_mean,
            "test_acc": test_mean, "test_acc_sampled": test_sampled,
            "cross_entropy": F.cross_entropy(logits, y).item(), "information": information}


# The paper's Fig. 3, digitised: test error in % against the number of weights, and against beta
PAPER_WIDTH = {102_610: 12.75, 406_810: 10.13, 1_620_010: 8.45, 6_465_610: 8.90, 14_536_810: 9.45}
PAPER_BETA = dict(zip((10 ** (k / 2 - 3) for k in range(11)),
                      (9.16, 9.10, 8.42, 8.06, 8.24, 8.49, 8.75, 8.93, 9.30, 9.41, 9.64)))
CHANCE = 90.0  # test error in % of a net that learned nothing


def add_derived(rows):
    """The rows that did not diverge, with test errors in %, nats per sample, and collapse."""
    rows = ok_rows(rows)
    for row in rows:
        row["error"] = 100 * (1 - row["test_acc"])
        row["sampled_error"] = 100 * (1 - row["test_acc_sampled"])
        row["nats"] = (row["information"] or 0) / row["n"]
        row["collapsed"] = row["panel"] == "beta" and row["nats"] < 1e-3
    return rows


def errors_by(rows, key):
    """{value of the key: test errors of the seeds, %}, in the order of the values."""
    return {value: np.array([row["error"] for row in rows if row[key] == value])
            for value in sorted({row[key] for row in rows})}


def claims(ok, scale):
    """The claims table, over the seeds of which no cell is missing."""
    width, beta = (complete_seeds(ok, cells) for cells in make_cells(scale))
    table = width_claims(errors_by(width, "width")) if width else []
    return table + (beta_claims(errors_by(beta, "beta")) if beta else [])


def width_claims(errors):
    table, text = [], {width: f"×{width:g} {fmt(v, '{:.1f}%')}" for width, v in errors.items()}
    means = {width: v.mean() for width, v in errors.items()}
    best, widest = min(means, key=means.get), max(means)
    steps = np.diff(list(means.values()))
    if best != widest or steps[-1] > -0.5:  # else error still falls: no plateau was reached
        table.append(claim(
            "width, weight decay only: the widest net is within 1.5 points of the best",
            "best 8.45%, widest 9.45%", f"best {text[best]}; widest {text[widest]}",
            means[widest] - means[best] <= 1.5))
    table.append(claim(
        "width: test error falls by more than 0.5 points with every doubling measured",
        "to half a million weights", "; ".join(text.values()), all(steps < -0.5)))
    return table


def beta_claims(errors):
    table, text = [], {beta: f"β = {beta:.3g} {fmt(v, '{:.1f}%')}" for beta, v in errors.items()}
    means = {beta: v.mean() for beta, v in errors.items()}
    spread = {beta: np.std(v, ddof=1) if len(v) > 1 else 0.0 for beta, v in errors.items()}
    low, best, high = min(means), min(means, key=means.get), max(means)
    for end, name, points, paper in ((low, "left", 0.5, 9.16), (high, "right", 2.0, 9.64)):
        table.append(claim(
            f"β, mean weights: the {name} end is worse than the best by over {points:g} points "
            "and the seeds' spread", f"best 8.06%, {name} end {paper:g}%",
            f"best {text[best]}; {text[end]}",
            means[end] - means[best] > max(points, spread[best], spread[end])))
    table.append(claim("β, mean weights: the best lies strictly inside the range (a U)",
                       "β = 0.03", f"β = {best:.2g}", low < best < high))
    return table


def plot(ok, args):
    grid, s = GRID[args.scale], SETTINGS[args.scale]
    width, beta = ok_rows(ok, panel="width"), ok_rows(ok, panel="beta")
    fig, axes = new_figure(2, 2, f"Fig. 3: All-CNN, {s['n']:,} images, {args.dataset}, scale "
                           f"{args.scale}, up to {len({row['seed'] for row in ok})} seeds per cell")
    width_ax, relative_ax, beta_ax, nats_ax = axes.flat
    plot_relative(width_ax, width, "params", PAPER_WIDTH, "C0")
    plot_relative(relative_ax, beta, "beta", PAPER_BETA, "C3")
    penalty = f"β, width ×{grid['beta_width']:g}, no weight decay"
    width_ax.set(xlabel="weights", title="width, weight decay only")
    relative_ax.set(xlabel="β", title=f"{penalty}, mean weights")
    for key, name, colour, form in (("error", "mean weights", "C3", "o-"),
                                    ("sampled_error", "sampled weights", "C1", "s--")):
        plot_points(beta_ax, summarise(beta, "beta", key), form, color=colour, label=name)
        if beta:
            nats = [max(row["nats"], 1e-3) for row in beta]
            nats_ax.plot(nats, [row[key] for row in beta], form[0], color=colour, ms=4, label=name)
    for ax in (beta_ax, nats_ax):
        ax.axhline(CHANCE, color="0.5", ls=":", label="chance")
    collapsed = ok_rows(beta, collapsed=True)
    mark_collapsed(beta_ax, [(row["beta"], row["error"]) for row in collapsed])
    mark_collapsed(nats_ax, [(1e-3, row["error"]) for row in collapsed])
    beta_ax.set(xlabel="β", ylabel="test error, %", title=penalty)
    nats_ax.set(xlabel="I(w;D)/N, nats per sample (drawn as 0.001 if less)",
                ylabel="test error, %", title="the same runs against information")
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.legend()
    nats_ax.legend(loc="lower left")
    save_figure(fig, args)


def plot_relative(ax, rows, x, paper, colour):
    """Test error divided by its best, ours (mean weights) and the paper's: the shapes compare."""
    best = min(paper.values())
    ax.plot(list(paper), [error / best for error in paper.values()], "s-", color="0.75", ms=4,
            label=f"paper, 50,000 images, best {best:g}%")
    if rows:
        best = min(mean for _, mean, *_ in summarise(rows, x, "error"))
        rows = [row | {"relative": row["error"] / best} for row in rows]
        points = summarise(rows, x, "relative")
        plot_points(ax, points, color=colour, label=f"ours, best {best:.1f}%")
        mark_collapsed(ax, [(row[x], row["relative"]) for row in ok_rows(rows, collapsed=True)])
        if x == "params":
            names = {row["params"]: row["width"] for row in rows}
            for params, relative, *_ in points:
                ax.annotate(f"×{names[params]:.3g}", (params, relative), (5, 5), fontsize=7,
                            textcoords="offset points")
    ax.set(ylabel="test error, divided by its best")


def mark_collapsed(ax, points):
    if points:
        ax.plot(*zip(*points), "kx", ms=9, label="collapsed: no information")


def make_cells(scale):
    """The cells of the two panels: (width, beta)."""
    grid = GRID[scale]
    return ([{"panel": "width", "width": width} for width in grid["widths"][::-1]],
            [{"panel": "beta", "width": grid["beta_width"], "beta": b} for b in grid["betas"]])


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    width, beta = make_cells(args.scale)
    rows = run_grid(beta + width, train_cell, args, SETTINGS[args.scale], load_data)
    ok = add_derived(rows)
    plot(ok, args)
    save_tables(args, claims=claims(ok, args.scale))


if __name__ == "__main__":
    main()
