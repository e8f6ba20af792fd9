"""PAC-Bayes certificates: what eq. 7 guarantees of nets that are trained for it.

    python -m beyond.certificates --scale demo     # synthetic digits, 15 seconds on 2 cores
    python -m beyond.certificates --scale cpu      # CIFAR-10, 1/4 width, 4 minutes on 2 cores
    python -m beyond.certificates --scale cpu --dataset mnist --out mine     # the same time

Eq. 7 bounds the test loss by the training loss and KL(q(w|D) || p(w)), for a prior p that has not
seen the samples. The information of Fig. 1 comes from an improper prior and bounds nothing. Here
a Small AlexNet is trained on real labels with L = cross-entropy + beta/N * KL, from a Gaussian
prior. Its means are those of the net at its start ("seen" = 0), or of one trained without noise on
half of the samples ("seen" = 0.5), which the bound then does without. Batch normalisation keeps
the prior's statistics, at the start those of images of noise. The learning rates are lower than in
Fig. 1, which lowers the bounds, and KL is warmed up over 40% of the steps. Nothing else depends on
the samples: images are normalised by fixed numbers.

All certificates of a table hold at once with probability 95%: the choice of lambda, of the prior's
variances and of beta is paid for, and so is estimating the training loss from sampled networks.
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from beyond.proper_prior import prior_divergence
from common import (check, complete_seeds, draw_subset, fmt, group_by, load_images, lr_factor,
                    minibatches, normalise, ok_rows, pac_bayes_bound, param_groups, parse_args,
                    per_seed, recalibrate_bn, run_grid, sample_weights, sampled_network,
                    save_panels, save_tables, to_stochastic)
from fig1_phase_transition import DATASETS, small_alexnet

# prior_steps: of the prior that has seen half of the samples. draws: of a network and 100 samples.
SETTINGS = {
    "demo": dict(width=1 / 8, batch=50, lr=0.003, lr_noise=0.04, hold=0.6, prior_steps=400,
                 steps=800, draws=500, test=1000),
    "cpu": dict(width=1 / 4, batch=100, lr=0.003, lr_noise=0.04, hold=0.6, prior_steps=3000,
                steps=4000, draws=2000, test=5000),
    "paper": dict(width=1, batch=100, lr=0.003, lr_noise=0.04, hold=0.6, prior_steps=10_000,
                  steps=10_000, draws=2000, test=10_000),
}
GRID = {  # nets: (the fraction of the samples that the prior has seen, beta)
    "demo": dict(n=10_000, nets=((0, 3.0), (0.5, 3.0))),
    "cpu": dict(n=50_000, nets=((0, 3.0), (0, 10.0), (0.5, 3.0))),
    "paper": dict(n=50_000, nets=((0, 3.0), (0, 10.0), (0.5, 3.0))),
}
SEEDS = {"demo": [0], "cpu": [0], "paper": [0, 1, 2]}
MAX_LOSS = {"cross_entropy": math.log(10), "error": 1.0}  # clipped at these, of each sample
CHANCE = {"cross_entropy": math.log(10), "error": 0.9}


def load_data(args):
    dataset = "digits" if args.dataset == "synthetic" else args.dataset
    return load_images(dataset, args.data_dir, GRID[args.scale]["n"], SETTINGS[args.scale]["test"])


def train_cell(cell, device, args, progress):
    """Train one net for the bound, and measure both sides of it."""
    s, n = SETTINGS[args.scale], cell["n"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, _, _ = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, x_test = (normalise(images, 127.5, 64.0, size=28).to(device) for images in (x, x_test))
    y, y_test = y.to(device), y_test.to(device)

    # the prior
    model = small_alexnet(s["width"], x.shape[1]).to(device, memory_format=torch.channels_last)
    seen = round(cell["seen"] * n)
    if seen:
        means = [{"params": list(model.parameters()), "lr": s["lr"]}]
        train(model, means, x[:seen], y[:seen], s["prior_steps"], s, progress)
    to_stochastic(model)
    for layer in model.modules():
        if hasattr(layer, "log_sigma2"):  # one noise per layer, as the prior has one variance
            layer.log_sigma2.data.fill_(layer.weight.square().mean().log() - 6)
    if not seen:
        recalibrate_bn(model.eval(), torch.randn(500, *x.shape[1:], device=device))
    prior = copy.deepcopy(model.eval().state_dict())  # its means; the variance is chosen later

    # the posterior, from the samples that the prior has not seen; batch norm stays in eval()
    x, y = x[seen:], y[seen:]

    def penalty(t):
        return cell["beta"] * min(1, t / 0.4) / len(x) * prior_divergence(model, prior)

    with sample_weights(model):
        train(model, param_groups(model, s["lr"], s["lr_noise"]), x, y, s["steps"], s, progress,
              penalty)

    # a network for every 100 samples, so that the draws are independent
    row = {"divergence": prior_divergence(model, prior).item(), "bound_n": len(x)}
    drawn = [clipped_losses(sampled_network(model), x[index], y[index])
             for index in torch.randint(len(x), (s["draws"], 100), device=device)]
    test = [clipped_losses(sampled_network(model), *batch)
            for batch in zip(x_test.split(100), y_test.split(100))]
    for i, loss in enumerate(MAX_LOSS):
        row[loss] = torch.stack(drawn)[:, i].mean().item()
        row[f"{loss}_std"] = torch.stack(drawn)[:, i].std().item()
        row[f"test_{loss}"] = torch.stack(test)[:, i].mean().item()
    return row


def train(model, groups, x, y, steps, s, progress, penalty=lambda t: 0):
    """Minimise the cross-entropy + penalty(fraction of the steps), in the model's mode."""
    optimizer = torch.optim.Adam(groups, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step, index in zip(range(steps), minibatches(len(x), s["batch"], x.device)):
        loss = F.cross_entropy(model(x[index]), y[index]) + penalty(step / steps)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())


@torch.no_grad()
def clipped_losses(net, x, y):
    """Mean cross-entropy, clipped at log 10, and error over a batch: (2,)."""
    logits = net(x)
    cross_entropy = F.cross_entropy(logits, y, reduction="none")
    error = (logits.argmax(1) != y).float()
    return torch.stack([cross_entropy.clamp(max=MAX_LOSS["cross_entropy"]).mean(), error.mean()])


def add_certificates(rows):
    """Rows with eq. 7 for either loss, "bound_cross_entropy" and "bound_error", all at once at 95%.

    Of each bound's part of the 5% a fifth is for the mean over draws (empirical Bernstein, Maurer
    & Pontil 2009).
    """
    delta = 0.05 / max(1, len(rows) * len(MAX_LOSS))
    for row in rows:
        draws = row["settings"]["draws"]
        log_term = math.log(2 / (0.2 * delta))
        for loss, largest in MAX_LOSS.items():
            # the training loss is known from some sampled networks, each on 100 samples
            upper = row[loss] + row[f"{loss}_std"] * math.sqrt(2 * log_term / draws)
            upper += 7 * largest * log_term / (3 * (draws - 1))
            upper = min(upper, largest)
            row[f"bound_{loss}"] = pac_bayes_bound(upper, row["divergence"], row["bound_n"],
                                                   max_loss=largest, delta=0.8 * delta)
    return rows


def least_margin(rows):
    """Certificate minus test loss, the least of all rows and either loss."""
    margins = []
    for loss in MAX_LOSS:
        margins += [row[f"bound_{loss}"] - row[f"test_{loss}"] for row in rows]
    return min(margins)


def lowest_bound(rows, loss):
    return min(row[f"bound_{loss}"] for row in rows)


def claims(rows):
    """rows: of complete seeds, with certificates."""
    table = [check("no certificate is below the test loss (shown: least difference)", "yes",
                   {"": per_seed(least_margin, rows)}, (0, math.inf))]
    for (seen,), own in group_by(rows, "seen").items():
        prior = f"trained on {seen:.0%} of the samples" if seen else "as initialised"
        for loss, chance in CHANCE.items():
            name = loss.replace("_", "-")
            lowest = per_seed(partial(lowest_bound, loss=loss), own)
            table.append(check(f"{name}, prior {prior}: the certificate is below chance, "
                               f"{chance:.3g}", "–", {"": lowest}, (0, chance), "{:.3g}"))
    return table


def loss_table(rows):
    """Either loss on the bound's samples, its certificate and the test loss; means over seeds."""
    table = []
    for (seen, beta), own in group_by(rows, "seen", "beta").items():
        for loss in MAX_LOSS:
            line = {"loss": loss, "prior has seen": seen, "β": beta}
            line["KL, nats"] = fmt([row["divergence"] for row in own], "{:.0f}")
            for name, key in (("training", loss), ("certificate", f"bound_{loss}"),
                              ("test", f"test_{loss}")):
                line[name] = fmt([row[key] for row in own], "{:.3f}")
            table.append(line)
    return table


def loss_panel(ax, rows, cells, loss):
    """Training loss, certificate and test loss of every net."""
    for key, marker, name in ((loss, "s", "training, sampled networks"),
                              (f"test_{loss}", "o", "test, sampled networks"),
                              (f"bound_{loss}", "v", "certificate")):
        points = []
        for place, cell in enumerate(cells):
            points += [(place, row[key]) for row in ok_rows(rows, **cell)]
        ax.plot(*np.transpose(points), marker, label=name)
    ax.axhline(CHANCE[loss], color="0.5", ls=":", label="chance")
    names = [f"seen {cell['seen']:.0%}\nβ = {cell['beta']:g}" for cell in cells]
    ax.set_xticks(range(len(cells)), names)
    ax.set(title=loss.replace("_", "-"), ylim=(0, None))
    ax.legend()


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    grid = GRID[args.scale]
    cells = [{"n": grid["n"], "seen": seen, "beta": beta} for seen, beta in grid["nets"]]
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data)
    rows = add_certificates(ok_rows(rows))
    panels = [partial(loss_panel, rows=rows, cells=cells, loss=loss) for loss in MAX_LOSS]
    save_panels(panels, f"PAC-Bayes certificates, {args.dataset}, scale {args.scale}", args)
    complete = complete_seeds(rows, cells)
    save_tables(args, claims=claims(complete) if complete else [], cells=loss_table(rows))


if __name__ == "__main__":
    main()
