"""Fig. 3: test error against the number of weights and, a U, against beta.

    python fig3_width_beta.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig3_width_beta.py --scale cpu      # 5,000 images of CIFAR-10, 12 hours on 2 cores
    python fig3_width_beta.py --gpu 0          # CIFAR-10, the paper's widths and 11 values of beta

An All-CNN is trained on real labels without augmentation. Panel "width": plain weights, with and
without weight decay. Panel "beta": one width, no decay, L = cross-entropy + beta/N * I(w;D). In
the paper test error falls with width, then hardly rises; against beta it is a U with mild arms:
9.16, 8.06, 9.64% at beta 0.001, 0.03, 100.

How mild the right arm is depends on a cap on alpha, the variance of a weight's noise over its
squared mean. Without one a large penalty drowns every weight, and error ends at chance. The cap
log alpha <= -0.71 (noise of at most 0.7 times the weight) is the one in the authors' code of
Information Dropout, github.com/ucla-vision/information-dropout; the paper names none.
A weight at the cap holds zero nats, so nats under different caps do not compare.

Protocols (results/protocols.md): SGD with Nesterov momentum for plain weights; for stochastic ones
Adam, every parameter with noise, beta raised from 0. Errors are of the mean network, of one sampled
network (the mean over draws) and of the draws' average prediction.
"""
import math
from functools import partial
from operator import itemgetter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (accuracy, beta_at, cell_table, check, complete_seeds, draw_subset, group_by,
                    load_images, lr_factor, mean_network, minibatches, normalise, ok_rows,
                    param_groups, parse_args, per_seed, plot_points, predict, recalibrate_bn,
                    run_grid, sampled_network, save_panels, save_tables, summarise, to_stochastic,
                    values_by, weight_information, with_information)

# How a cell is trained, stored in its row. draws: networks sampled and averaged.
SHARED = dict(draws=20, lr_sgd=0.05, lr=0.024, lr_noise=0.01, hold=0.6)
SETTINGS = {
    "demo": dict(n=500, test=1000, batch=50, width_steps=400, beta_steps=500, draws=4,
                 lr_sgd=0.05, lr=0.003, lr_noise=0.04, hold=0.8),
    "cpu": dict(n=5000, test=10_000, batch=100, width_steps=1000, beta_steps=8000, **SHARED),
    "paper": dict(n=50_000, test=10_000, batch=100, width_steps=50_000, beta_steps=50_000,
                  **SHARED),
}
PAPER_BETAS = tuple(10 ** (k / 2 - 3) for k in range(11))
DECAYS = (0.001, 0.0)  # that of the All-CNN's authors, and none
MAIN_CAP = -0.71  # 2 log 0.7
CAPS = (MAIN_CAP, -2.0, None)
# The cells: widths and weight decays; beta, at one width, and caps on log alpha. A demo ends at
# beta = 1, as a larger penalty leaves too few steps to learn under the noise.
GRID = {
    "demo": dict(widths=(1 / 64, 1 / 32, 1 / 16), decays=(0.001,), beta_width=1 / 8,
                 betas=(0.001, 0.05, 1.0), caps=(MAIN_CAP,)),
    "cpu": dict(widths=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2), decays=DECAYS, beta_width=1 / 8,
                betas=(0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0), caps=CAPS),
    "paper": dict(widths=(1 / 4, 1 / 2, 1, 2, 3), decays=DECAYS, beta_width=1,
                  betas=PAPER_BETAS, caps=CAPS),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic", "cifar10"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


class Shift(nn.Module):
    """x + a bias per channel, of a linear layer, so that it has noise and is counted."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Linear(1, channels, bias=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def norm(channels):
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), Shift(channels))


def all_cnn(width=1.0):
    """The All-CNN, (n, 3, h, w) -> (n, 10): eight convolutions with ReLU, a ninth, an average."""
    layers, inputs = [], 3
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                   norm(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())


def load_data(args):
    s = SETTINGS[args.scale]
    return load_images(args.dataset, args.data_dir, s["n"], s["test"])


def train_cell(cell, device, args, progress):
    """Train and measure one net: plain weights in the panel "width", else stochastic ones."""
    s, plain, beta = SETTINGS[args.scale], cell["panel"] == "width", cell.get("beta", 0.0)
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (normalise(images, mean, std, size=32).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    model = all_cnn(cell["width"])
    params = sum(p.numel() for p in model.parameters())
    if not plain:
        to_stochastic(model, max_log_alpha=cell.get("max_log_alpha"))
    model.to(device, memory_format=torch.channels_last)  # faster on a CPU
    if plain:
        optimizer = torch.optim.SGD(model.parameters(), s["lr_sgd"], momentum=0.9, nesterov=True,
                                    weight_decay=cell["weight_decay"])
        # weights without noise would hold infinitely many nats: theirs are not counted
        information, steps, draws = no_information, s["width_steps"], 1
    else:
        optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
        information, steps, draws = weight_information, s["beta_steps"], s["draws"]
    forward = with_information(model, x[:s["batch"]], information)
    # half precision for plain nets, of which some are wide, where it is fast: a CPU with AVX2
    # alone emulates it
    fast = device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    half = plain and fast and args.scale != "demo"
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=half)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step, index in zip(range(steps), minibatches(s["n"], s["batch"], device)):
        with bfloat16:
            logits, nats = forward(x[index])
        cross_entropy = F.cross_entropy(logits.float(), y[index])
        beta_now = beta_at(step / steps, beta, 0)  # no peak, unlike Fig. 1
        loss = cross_entropy + beta_now / s["n"] * nats  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())

    measured = measure(model, x, y, x_test, y_test, draws)
    measured |= {"params": params, "n": s["n"], "bfloat16": half, "information": None}
    if not plain:
        nats = weight_information(model).item()
        objective = measured["cross_entropy"] + beta / s["n"] * nats
        measured |= {"objective": objective, "information": nats}
    return measured


def no_information(model):
    return 0.0


@torch.no_grad()
def measure(model, x, y, x_test, y_test, draws):
    """Accuracies, and nats per image, of networks with batch norm of their own: floats.

    train_acc, cross_entropy and what ends in _sampled: of one sampled network, the mean over draws;
    test_acc, test_nll: of the mean network; _average: of the draws' average prediction.
    """
    def log_probabilities(net):
        recalibrate_bn(net, x).eval()
        return predict(net, x).log_softmax(1), predict(net, x_test).log_softmax(1)

    def score(networks, labels):
        log_p, labels = torch.cat(networks), labels.repeat(len(networks))
        return accuracy(log_p, labels), F.nll_loss(log_p, labels).item()

    # all draws are kept, as their average is a prediction of its own
    _, mean = log_probabilities(mean_network(model))
    train, test = zip(*(log_probabilities(sampled_network(model)) for _ in range(draws)))
    average = torch.stack(test).logsumexp(0) - math.log(draws)
    measured = {}
    measured["train_acc"], measured["cross_entropy"] = score(train, y)
    for kind, networks in (("", [mean]), ("_sampled", test), ("_average", [average])):
        measured[f"test_acc{kind}"], measured[f"test_nll{kind}"] = score(networks, y_test)
    return measured


# The paper's Fig. 3: test error in %, digitised, by the number of weights, as counted, and by beta.
PAPER_WIDTH = {102_610: 12.75, 406_810: 10.13, 1_620_010: 8.45, 6_465_610: 8.90, 14_536_810: 9.45}
PAPER_ERROR = (9.16, 9.10, 8.42, 8.06, 8.24, 8.49, 8.75, 8.93, 9.30, 9.41, 9.64)
PAPER_STYLE = dict(color="0.6", marker="s", ms=4)
KINDS = {"": "mean network", "_sampled": "one sampled network", "_average": "average of draws"}
NO_CAP = math.inf  # stands for the None of a cell, so that caps can be sorted
STYLES = {MAIN_CAP: "C0o-", -2.0: "C1D--", NO_CAP: "C3v:"}  # of curves, by cap


def add_derived(rows):
    """The ok rows, with errors in %, nats per sample, and the cap as a number."""
    rows = ok_rows(rows)
    for row in rows:
        row["train_error"] = 100 * (1 - row["train_acc"])
        row["test_error"] = 100 * (1 - row["test_acc"])
        if row["panel"] == "beta":
            row["test_error_sampled"] = 100 * (1 - row["test_acc_sampled"])
            row["test_error_average"] = 100 * (1 - row["test_acc_average"])
            row["nats"] = row["information"] / row["n"]
            cap = row.get("max_log_alpha")
            row["cap"] = NO_CAP if cap is None else cap
    return rows


def cap_name(cap):
    return "no cap" if cap == NO_CAP else f"log α ≤ {cap:g}".replace("-", "−")


def cap_style(cap):
    return STYLES.get(cap, "C4x-.")


def gain_by_doubling(rows):
    """{width: by how much test error falls to it from half of it, per seed}, up to the paper's."""
    error = values_by(rows, "width", "test_error")
    return {f"to ×{width:g}:": error[width / 2] - error[width]
            for width in error if width <= 1 and width / 2 in error}


def above_best(rows):
    """Test error of the widest net minus the least, of one seed."""
    error = {row["width"]: row["test_error"] for row in rows}
    return error[max(error)] - min(error.values())


def best_beta(rows, key="test_error"):
    """The beta of the least mean error."""
    return min(summarise(rows, "beta", key), key=itemgetter(1))[0]


def least_error(rows):
    """Of the mean network over beta."""
    return min(error for _, error, *_ in summarise(rows, "beta", "test_error"))


def rise_from_best(rows, key, beta):
    """Error at this beta minus that at the best one, a value per seed."""
    rises = []
    for (seed,), own in group_by(rows, "seed").items():
        # the best of a seed is chosen on the others, or its error would be least by luck too
        others = [row for row in rows if row["seed"] != seed]
        best = best_beta(others or own, key)
        error = {row["beta"]: row[key] for row in own}
        rises.append(error[beta] - error[best])
    return rises


def gap_to_converged(rows):
    """By how much, at most, another beta's final state beats the objective of one, of one seed."""
    gaps = []
    for row in rows:
        # every net's at the beta of this one
        objectives = [other["cross_entropy"] + row["beta"] * other["nats"] for other in rows]
        gaps.append(row["objective"] - min(objectives))
    return max(gaps)


def width_panel(ax, rows):
    ax.plot(*zip(*PAPER_WIDTH.items()), label="paper, test (50,000 images)", **PAPER_STYLE)
    for (decay,), own in group_by(rows, "weight_decay").items():
        colour = "C0" if decay else "C2"
        for name, line in (("test", "o-"), ("train", "o:")):
            plot_points(ax, summarise(own, "params", f"{name}_error"), line, color=colour,
                        label=f"{name}, weight decay {decay:g}")
    ax.set(xscale="log", xlabel="weights", ylabel="error, %", title="against the number of weights")
    ax.legend()


def beta_panel(ax, rows):
    """Test error of the mean network against beta; of sampled ones under the main cap."""
    ax.plot(PAPER_BETAS, PAPER_ERROR, label="paper", **PAPER_STYLE)
    for (cap,), own in group_by(rows, "cap").items():
        plot_points(ax, summarise(own, "beta", "test_error"), cap_style(cap), label=cap_name(cap))
    main = ok_rows(rows, cap=MAIN_CAP)
    for kind, style in (("_sampled", "C0s-"), ("_average", "C0^-")):
        plot_points(ax, summarise(main, "beta", "test_error" + kind), style, mfc="w", alpha=0.6,
                    label=f"{cap_name(MAIN_CAP)}, {KINDS[kind]}")
    ax.set(xscale="log", xlabel="β", ylabel="test error, %", ylim=(0, 100), title="against β")
    ax.legend()


def ratio_panel(ax, rows):
    """The mean network's error over the least of its curve: arms, whatever the error is."""
    ax.plot(PAPER_BETAS, np.divide(PAPER_ERROR, min(PAPER_ERROR)), label="paper", **PAPER_STYLE)
    for (cap,), own in group_by(rows, "cap").items():
        least = least_error(own) or math.nan
        ratios = [row | {"ratio": row["test_error"] / least} for row in own]
        plot_points(ax, summarise(ratios, "beta", "ratio"), cap_style(cap), label=cap_name(cap))
    ax.set(xscale="log", xlabel="β", title="test error over its least", ylim=(0.95, 1.6))
    ax.legend()


def information_panel(ax, rows):
    """Under another cap as many nats are another noise: three curves, not one."""
    fewest = 1e-3  # a logarithmic axis has no zero
    for (cap,), own in group_by(rows, "cap").items():
        nats = [max(fewest, mean) for _, mean, *_ in summarise(own, "beta", "nats")]
        error = [mean for _, mean, *_ in summarise(own, "beta", "test_error")]
        ax.plot(nats, error, cap_style(cap), ms=4, lw=1.2, label=cap_name(cap))
    ax.set(xscale="log", xlabel=f"I(w;D)/N, nats (at least {fewest:g})", ylabel="test error, %",
           title="against information")
    ax.legend()


def complete_by_cap(rows, grid):
    """{cap: rows of the seeds of which every beta is there}: half a curve does not tell its least.

    There is an entry for the main cap, whatever the grid.
    """
    by_cap = {MAIN_CAP: []}
    for cap in grid["caps"]:
        cells = [{"max_log_alpha": cap, "beta": beta} for beta in grid["betas"]]
        by_cap[NO_CAP if cap is None else cap] = complete_seeds(rows, cells)
    return by_cap


def plot(width, beta, args):
    panels = [partial(width_panel, rows=width)] if width else []
    if beta:
        panels.append(partial(beta_panel, rows=beta))
    if whole := sum(complete_by_cap(beta, GRID[args.scale]).values(), []):
        panels.append(partial(ratio_panel, rows=whole))
    if beta:
        panels.append(partial(information_panel, rows=beta))
    title = f"Fig. 3: All-CNN, {SETTINGS[args.scale]['n']:,} images, {args.dataset}, scale "
    save_panels(panels, title + args.scale, args, columns=2)


def width_claims(rows, decay):
    name = f"weight decay {decay:g}"
    return [
        check(f"{name}: test error falls by over 0.5 points with every doubling, to ×1",
              "2.6, 1.7 points", gain_by_doubling(rows), (0.5, math.inf), "{:.1f}"),
        check(f"{name}: wider nets do not overfit: the widest is at most 1.5 points above the best",
              "1.0", {"": per_seed(above_best, rows)}, (0, 1.5), "{:.1f}"),
    ]


def u_claim(rows, cap, betas, kind=""):
    rises, margin = {}, 0.5
    for beta in (min(betas), max(betas)):
        values = rise_from_best(rows, "test_error" + kind, beta)
        rises[f"β = {beta:g}:"] = values
        if len(values) > 1:  # what seeds differ by is no rise
            margin = max(margin, np.std(values, ddof=1))
    return check(f"{cap_name(cap)}, {KINDS[kind]}: a U, error at both ends is above the best by "
                 "0.5 points and the spread", "1.1, 1.6 points", rises, (margin, math.inf),
                 "{:.1f}")


def mild_claim(rows, cap, betas):
    right = rise_from_best(rows, "test_error", max(betas))
    return check(f"{cap_name(cap)}: its right arm is mild, within 12 points of the best",
                 "1.6 points", {"": right}, (-math.inf, 12), "{:.1f}")


def claims(width, beta, grid):
    """The paper's claims, the main ones first, of complete seeds; thresholds were set before these
    rows were trained.
    """
    betas, by_cap, name = grid["betas"], complete_by_cap(beta, grid), cap_name(MAIN_CAP)
    main = by_cap[MAIN_CAP]
    more = len(betas) > 3  # a demo's few steps show a U, no more
    table = [u_claim(main, MAIN_CAP, betas)] if betas else []
    if more:
        table.append(mild_claim(main, MAIN_CAP, betas))
    for decay in grid["decays"]:
        cells = [{"weight_decay": decay, "width": w} for w in grid["widths"]]
        table += width_claims(complete_seeds(width, cells), decay)
    if not more:
        return table

    table += [u_claim(main, MAIN_CAP, betas, kind) for kind in ("_sampled", "_average")]
    table += [
        check(f"{name}: error is least within a decade of β = 0.03", "0.03",
              {"": per_seed(best_beta, main)}, (0.003, 0.3), "{:g}"),
        check(f"{name}, converged: no net of another β has an objective lower by over 0.03 nats",
              "–", {"": per_seed(gap_to_converged, main)}, (-math.inf, 0.03), "{:.3f}"),
    ]
    for cap, rows in by_cap.items():
        if cap != MAIN_CAP:
            table += [u_claim(rows, cap, betas), mild_claim(rows, cap, betas)]
    if by_cap.get(NO_CAP) and main:
        gain = least_error(by_cap[NO_CAP]) - least_error(main)
        table.append(check(f"the least error is lower under {name} than without a cap, of "
                           "which nats tell nothing", "–", {"": gain}, (0, math.inf), "{:.1f}"))
    return table


WIDTH_KEYS = {"weight_decay": "weight_decay", "width": "width"}
BETA_KEYS = {"cap": "cap", "beta": "beta"}
WIDTH_COLUMNS = {"train error, %": ("train_error", "{:.1f}"),
                 "test error, %": ("test_error", "{:.1f}")}
BETA_COLUMNS = WIDTH_COLUMNS | {
    "one sampled": ("test_error_sampled", "{:.1f}"), "average": ("test_error_average", "{:.1f}"),
    "test NLL": "test_nll", "NLL, one sampled": "test_nll_sampled",
    "NLL, average": "test_nll_average",
    "I/N": ("nats", "{:.3f}"), "objective": ("objective", "{:.3f}")}


def make_cells(scale):
    """Capped nets first, whose U is the paper's; those without a cap last."""
    grid, capped, width, uncapped = GRID[scale], [], [], []
    for cap in grid["caps"]:
        for beta in grid["betas"]:
            cell = {"panel": "beta", "width": grid["beta_width"], "max_log_alpha": cap,
                    "beta": beta}
            (uncapped if cap is None else capped).append(cell)
    for w in grid["widths"]:
        for decay in grid["decays"]:
            width.append({"panel": "width", "width": w, "weight_decay": decay})
    return capped + width + uncapped


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    rows = add_derived(rows)
    width, beta = ok_rows(rows, panel="width"), ok_rows(rows, panel="beta")
    plot(width, beta, args)
    save_tables(args, claims=claims(width, beta, GRID[args.scale]),
                by_width=cell_table(width, WIDTH_KEYS, WIDTH_COLUMNS),
                by_beta=cell_table(beta, BETA_KEYS, BETA_COLUMNS))


if __name__ == "__main__":
    main()
