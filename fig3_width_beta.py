"""Fig. 3: test error against the number of weights and, in the paper a U, against beta.

    python fig3_width_beta.py --scale demo     # synthetic images, 2 minutes on 2 cores
    python fig3_width_beta.py --scale cpu      # 5,000 images of CIFAR-10, 8 hours on 2 cores
    python fig3_width_beta.py --gpu 0          # CIFAR-10, the paper's widths and 11 values of beta

An All-CNN is trained on real labels without augmentation. Panel "width": plain weights. Panel
"beta": one width, no weight decay, L = cross-entropy + beta/N * I(w;D). In the paper test error
falls with width, then hardly rises; against beta it is a U (9.16% at 0.001, 8.06% at 0.03, 9.64% at
100). Here: 47 to 31% with width; 43.4, 41.2, 90% at beta 0.001, 1, 100, for one sampled net no U.

Protocols, chosen by training loss or objective on a seed not in the grid. Width: SGD with Nesterov
momentum, in bfloat16. Beta: Adam, every parameter with noise, beta raised from 0.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (accuracy, claim, complete_seeds, draw_subset, evaluate, fmt, group_by,
                    load_images, lr_factor, mean_network, minibatches, new_figure, normalise,
                    ok_rows, param_groups, parse_args, plot_points, predict, recalibrate_bn,
                    run_grid, sampled_network, save_figure, save_tables, summarise,
                    to_stochastic, weight_information, with_information)

# How a cell is trained, stored in its row. draws: nets sampled to be averaged.
SHARED = dict(draws=20, lr_sgd=0.05, lr=0.024, lr_noise=0.01, hold=0.6)
SETTINGS = {
    "demo": dict(n=800, test=1000, batch=50, width_steps=600, beta_steps=600, draws=5,
                 lr_sgd=0.05, lr=0.003, lr_noise=0.04, hold=0.8),
    "cpu": dict(n=5000, test=10_000, batch=100, width_steps=1000, beta_steps=8000, **SHARED),
    "paper": dict(n=50_000, test=10_000, batch=100, width_steps=50_000, beta_steps=50_000,
                  **SHARED),
}
DECAYS = (0.001, 0.0)  # that of the All-CNN's authors, and none
CAPPED = ((1.0, 0.0), (10.0, 0.0), (100.0, 0.0), (10.0, -2.0), (100.0, -2.0))  # beta, cap
# The cells: widths; beta at one width, and capped.
GRID = {
    "demo": dict(widths=(1 / 32, 1 / 16, 1 / 8), decays=(0.001,), beta_width=1 / 8,
                 betas=(0.001, 0.01, 0.03, 0.1, 1.0), capped=()),
    "cpu": dict(widths=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2), decays=DECAYS, beta_width=1 / 8,
                betas=(0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100), capped=CAPPED),
    "paper": dict(widths=(1 / 4, 1 / 2, 1, 2, 3), decays=DECAYS, beta_width=1,
                  betas=tuple(10 ** (k / 2 - 3) for k in range(11)), capped=CAPPED),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


def load_data(args):
    s = SETTINGS[args.scale]
    return load_images(args.dataset, args.data_dir, s["n"], s["test"])


class Shift(nn.Module):
    """x + a bias per channel, of a linear layer, so that it gets noise too."""

    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Linear(1, channels, bias=False)
        nn.init.uniform_(self.shift.weight, -0.1, 0.1)

    def forward(self, x):
        shift = self.shift(x.new_ones(1, 1))
        return x + (shift[:, :, None, None] if x.dim() == 4 else shift)


def norm(channels, kind=nn.BatchNorm2d):
    return nn.Sequential(kind(channels, affine=False), Shift(channels))


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


def train_cell(cell, device, args, progress):
    """Train one net, with plain weights (panel "width") or stochastic ones (panel "beta")."""
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
    if plain:
        optimizer = torch.optim.SGD(model.parameters(), s["lr_sgd"], momentum=0.9, nesterov=True,
                                    weight_decay=cell["weight_decay"])
    else:
        to_stochastic(model, max_log_alpha=cell.get("max_log_alpha"))
        optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    model.to(device, memory_format=torch.channels_last)  # faster on a CPU
    fast = plain and args.scale != "demo"  # slow on a CPU without bfloat16
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=fast)
    steps = s[cell["panel"] + "_steps"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    batches, losses = minibatches(len(x), s["batch"], device), []
    forward = None if plain else with_information(model, x[:s["batch"]])
    for step in range(steps):
        index = next(batches)
        if plain:
            with bfloat16:
                loss = F.cross_entropy(model(x[index]).float(), y[index])
        else:
            logits, nats = forward(x[index])
            penalty = beta * min(1, step / steps / 0.4) / len(x)
            loss = F.cross_entropy(logits, y[index]) + penalty * nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    quarters = np.array_split(torch.stack(losses).cpu().numpy(), 4)
    measured = {"params": params, "n": len(x), "information": None,
                "loss_third": float(quarters[2].mean()), "loss_last": float(quarters[3].mean())}
    with bfloat16:
        measured |= evaluate(model, x, y, x_test, y_test)
    if not plain:
        measured |= evaluate_draws(model, x, x_test, y_test, s["draws"])
        nats = weight_information(model).item()
        objective = measured["cross_entropy"] + beta * nats / len(x)
        measured |= {"objective": objective, "information": nats}
    return measured


@torch.no_grad()
def evaluate_draws(model, x, x_test, y_test, draws):
    """Test accuracy and NLL of mean weights, of one draw (mean over draws), of the draws' average.

    Batch norm is estimated anew for each net.
    """
    def predictions(net):
        return predict(recalibrate_bn(net, x).eval(), x_test).log_softmax(1)

    def nll(log_p):
        return F.nll_loss(log_p, y_test).item()

    mean = predictions(mean_network(model))
    sampled = [predictions(sampled_network(model)) for _ in range(draws)]
    average = torch.stack(sampled).logsumexp(0) - np.log(draws)
    return {"test_acc": accuracy(mean, y_test), "test_nll": nll(mean),
            "test_acc_sampled": float(np.mean([accuracy(log_p, y_test) for log_p in sampled])),
            "test_nll_sampled": float(np.mean([nll(log_p) for log_p in sampled])),
            "test_acc_average": accuracy(average, y_test), "test_nll_average": nll(average)}


# The paper's Fig. 3, digitised: test error in % against the number of weights, and against beta
PAPER_WIDTH = {102_610: 12.75, 406_810: 10.13, 1_620_010: 8.45, 6_465_610: 8.90, 14_536_810: 9.45}
PAPER_BETA = dict(zip((10 ** (k / 2 - 3) for k in range(11)),
                      (9.16, 9.10, 8.42, 8.06, 8.24, 8.49, 8.75, 8.93, 9.30, 9.41, 9.64)))
KINDS = {"": "mean weights", "_sampled": "one sampled net", "_average": "average of sampled nets"}


def add_derived(rows):
    """The ok rows, with what follows."""
    rows = ok_rows(rows)
    for row in rows:
        row["train_error"] = 100 * (1 - row["train_acc"])
        for kind in KINDS:
            row[f"test_error{kind}"] = 100 * (1 - row.get(f"test_acc{kind}", np.nan))
        row["nats"] = (row["information"] or 0) / row["n"]
        row["cap"] = row.get("max_log_alpha", np.inf)
    return rows


def by(rows, key, value):
    """{key: array of the seeds' values}."""
    return {x: np.array([row[value] for row in group])
            for (x,), group in group_by(rows, key).items()}


def claims(ok, scale):
    """The claims table, of each panel over its complete seeds."""
    grid, (*beta, width), table = GRID[scale], make_cells(scale), []
    for decay in grid["decays"]:
        cells = [{name: cell[name] for name in ("width", "weight_decay")} for cell in width
                 if cell["weight_decay"] == decay]
        if rows := complete_seeds(ok, cells):
            table += width_claims(rows, f"decay {decay:g}")
    free, capped = (complete_seeds(ok, [{"max_log_alpha": None} | cell for cell in cells])
                    for cells in beta)
    return table + (beta_claims(free, capped, scale) if free else [])


def width_claims(rows, name):
    error, table = by(rows, "width", "test_error"), []
    narrow = {width: v for width, v in error.items() if width <= 1}
    *others, last = [v.mean() for v in error.values()]
    decided = last > min(others) or others[-1] - last < 0.5

    def text(error):
        return "; ".join(f"×{width:g} {fmt(v, '{:.1f}%')}" for width, v in error.items())
    if max(error) > 1:  # wider than the paper's best
        table.append(claim(
            f"{name}: a plateau, the widest net within 1.5 points of the best (undecided if best "
            "by 0.5)", "best 8.45%, widest 9.45%", text(error),
            last - min(others) <= 1.5 if decided else None))
    return table + [claim(
        f"{name}: test error falls by over 0.5 points with every doubling to ×{max(narrow):g}",
        "12.75, 10.13, 8.45% from ×¼ to ×1", text(narrow),
        all(np.diff([v.mean() for v in narrow.values()]) < -0.5))]


def beta_claims(free, capped, scale):
    seeds, table = list(group_by(free, "seed").values()), []
    low, *_, high = betas = GRID[scale]["betas"]
    for kind, name in list(KINDS.items())[:1 if scale == "demo" else 3]:
        error = np.array([[row[f"test_error{kind}"] for row in own] for own in seeds])
        others = error.sum(0) - error if len(error) > 1 else error
        best = others.argmin(1)  # chosen on the others
        least = error[range(len(best)), best]
        rise = error[:, [0, -1]] - least[:, None]
        spread = rise.std(0, ddof=1) if len(rise) > 1 else 0
        table.append(claim(
            f"{name}: a U, both ends exceed the best by 0.5 points and their spread",
            "9.16, 8.06, 9.64% at β = 0.001, 0.03, 100", "; ".join(
                f"{fmt(v, '{:.1f}%')} at β = {b}" for v, b in (
                    (error[:, 0], low), (least, ", ".join(f"{betas[i]:g}" for i in best)),
                    (error[:, -1], high)))
            + f"; best at {fmt([own[i]['nats'] for own, i in zip(seeds, best)])} nats per sample",
            (rise.mean(0) > np.maximum(0.5, spread)).all()))
    if scale == "demo":
        return table
    for (cap,), rows in group_by(capped, "cap").items():
        error = by(rows, "beta", "test_error")
        best = min(v.mean() for v in error.values())
        table.append(claim(f"mean weights, log α ≤ {cap:g}: error at β = {high:g} is at most 3 "
                           f"points above the best of β = {', '.join(f'{b:g}' for b in error)}",
                           "9.64%, best 8.06%",
                           f"{fmt(error[high], '{:.1f}%')}, best {best:.1f}%",
                           error[high].mean() - best <= 3))
    gaps = [max(row["objective"] - other["cross_entropy"] - row["beta"] * other["nats"]
                for row in own for other in own) for own in seeds]
    return table + [claim("converged: no β is beaten by another's final state by over 0.03 nats",
                          "–", fmt(gaps, "{:.3f}"), max(gaps) <= 0.03)]


def means(rows, keys, columns):
    """A table. columns: {title: (field, form)}."""
    return [{**{key: f"{value:.4g}" for key, value in zip(keys, values)}, "seeds": len(group)}
            | {title: fmt([row[field] for row in group], form)
               for title, (field, form) in columns.items()}
            for values, group in group_by(rows, *keys).items()]


def plot(ok, args):
    n, seeds = SETTINGS[args.scale]["n"], len({row["seed"] for row in ok})
    width, beta = (ok_rows(ok, panel=panel) for panel in ("width", "beta"))
    free = ok_rows(beta, cap=np.inf)
    fig, axes = new_figure(2, 3, f"Fig. 3: All-CNN, {n:,} images, {args.dataset}, scale "
                           f"{args.scale}, up to {seeds} seeds")
    width_ax, width_paper, nats_ax, beta_ax, beta_paper, nll_ax = axes.flat
    for decay in GRID[args.scale]["decays"]:
        rows, colour = ok_rows(width, weight_decay=decay), "C0" if decay else "C2"
        for key, line in (("test_error", "o-"), ("train_error", "o:")):
            plot_points(width_ax, summarise(rows, "params", key), line, color=colour,
                        label=f"{key[:-6]}, weight decay {decay:g}")
    for (kind, name), marker in zip(KINDS.items(), "os^"):
        for ax, key in ((beta_ax, "test_error"), (nll_ax, "test_nll")):
            plot_points(ax, summarise(free, "beta", key + kind), marker + "-", label=name)
        nats_ax.plot([max(row["nats"], 1e-3) for row in free],
                     [row["test_error" + kind] for row in free], marker, ms=4, label=name)
    collapsed = [row["test_error"] for row in free if row["nats"] < 1e-3]
    nats_ax.plot([1e-3] * len(collapsed), collapsed, "ko", ms=14, mfc="none", label="collapsed")
    for cap, marker in ((0.0, "o--"), (-2.0, "D:")):
        plot_points(beta_ax, summarise(ok_rows(beta, cap=cap), "beta", "test_error"), marker,
                    color="C0", mfc="w", label=f"mean weights, log α ≤ {cap:g}")
    for ax, paper in ((width_paper, PAPER_WIDTH), (beta_paper, PAPER_BETA)):
        ax.plot(*zip(*paper.items()), "s-", color="0.6", ms=4, label="paper, 50,000 images")
    for ax, title, label in zip(axes.flat, (
            "by width", "the paper", "by information", "by β", "the paper",
            "test NLL"), ("weights", "weights", "nats per sample (at least 0.001)", *"βββ")):
        ax.set(xscale="log", xlabel=label, ylabel="error, %", title=title)
        ax.legend()
    nll_ax.set(ylabel="nats", ylim=(0.8, 4))
    beta_ax.set(yscale="log")
    beta_ax.yaxis.set_minor_formatter("{x:g}")
    save_figure(fig, args)


def make_cells(scale):
    """The cells: (beta, capped, width)."""
    grid = GRID[scale]
    width = [{"panel": "width", "width": w, "weight_decay": decay}
             for w in grid["widths"] for decay in grid["decays"]]
    net = {"panel": "beta", "width": grid["beta_width"]}
    free = [net | {"beta": beta} for beta in grid["betas"]]
    return free, [net | {"beta": beta, "max_log_alpha": cap} for beta, cap in grid["capped"]], width


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    s, cells = SETTINGS[args.scale], sum(make_cells(args.scale), [])
    ok = add_derived(run_grid(cells, train_cell, args, s, load_data))
    plot(ok, args)
    error = {"train error, %": ("train_error", "{:.1f}")}
    by_width = means(ok_rows(ok, panel="width"), ("weight_decay", "width"), error | {
        "test error, %": ("test_error", "{:.1f}"), "loss, third quarter": ("loss_third", "{:.3f}"),
        "last quarter": ("loss_last", "{:.3f}")})
    by_beta = means(ok_rows(ok, panel="beta"), ("cap", "beta"), error | {
        "nats per sample": ("nats", "{:.3f}")} | {
        f"{title}, {name}": (key + kind, form) for kind, name in KINDS.items()
        for title, key, form in (("error, %", "test_error", "{:.1f}"),
                                 ("NLL", "test_nll", "{:.2f}"))})
    save_tables(args, claims=claims(ok, args.scale), by_width=by_width, by_beta=by_beta)


if __name__ == "__main__":
    main()
