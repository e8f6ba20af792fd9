"""Hysteresis: memorising and chance coexist over a range of beta, and a net stays where it is.

    python -m beyond.hysteresis --scale demo     # synthetic images, under a minute on 2 cores
    python -m beyond.hysteresis --scale cpu      # CIFAR-10, 1/4 width, about 40 minutes on 2 cores

Fig. 1 trains every net from the start. Here one net is taken along beta in steps, on random labels:
  start = "memorised": it memorises at the smallest beta, then beta is raised;
  start = "chance":    it forgets at the largest beta, then beta is lowered, also to those `below`.
At each beta it is trained for a fixed number of steps, with the whole schedule of the learning rate,
and measured with batch statistics and sampled weights. Three values of beta describe the walks:
  beta_up     upper edge: where train accuracy falls through 55% when beta is raised;
  beta_equal  where both branches have the same objective, cross-entropy + beta/N * I(w;D);
  beta_down   lower edge: the beta below which accuracy is above 55% when beta is lowered.
Between beta_down and beta_equal chance is not the minimum of the objective, only hard to leave. So
more steps per beta should move beta_down up: it is a number about time, not about information.
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from fig1_phase_transition import DATASETS, small_alexnet
from common import (accuracy, claim, complete_seeds, corrupt_labels, crossing, draw_subset, fmt,
                    load_images, lr_factor, minibatches, new_figure, normalise, ok_rows,
                    param_groups, parse_args, per_seed, plot_points, run_grid, save_figure,
                    save_tables, summarise, weight_information)

# first: steps at the first beta of a walk. below: where the way down goes on.
WALK = dict(betas=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3),
            below=(0.03, 0.01, 0.003, 0.001))
SETTINGS = {
    "demo": dict(width=1 / 8, batch=50, lr=0.012, lr_noise=0.16, hold=0.6, first=1500,
                 betas=(0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3), below=(0.02, 0.005, 0.001)),
    "cpu": dict(width=1 / 4, batch=100, lr=0.024, lr_noise=0.16, hold=0.6, first=3000, **WALK),
    "paper": dict(width=1, batch=100, lr=0.012, lr_noise=0.16, hold=0.6, first=10_000, **WALK),
}
GRID = {  # steps: at each beta after the first
    "demo": dict(sizes=(100,), steps=(50, 300)),
    "cpu": dict(sizes=(300, 1000), steps=(300, 1000)),
    "paper": dict(sizes=(1000, 10_000), steps=(1000, 4000)),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
STARTS = ("memorised", "chance")


def load_data(args):
    dataset = "objects" if args.dataset == "synthetic" else args.dataset
    return load_images(dataset, args.data_dir, max(GRID[args.scale]["sizes"]), 10)


def train_cell(cell, device, args, progress):
    """Take one net along beta; what is measured are lists, one value for each beta."""
    s, n = SETTINGS[args.scale], cell["n"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, _, _, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    x = normalise(x, mean, std, size=28).to(device)
    y = corrupt_labels(y, 1.0, 10, generator).to(device)
    model = small_alexnet(s["width"], x.shape[1]).to(device)

    memorised = cell["start"] == "memorised"
    betas = s["betas"] if memorised else s["betas"][::-1] + s["below"]
    measured = []
    for beta in betas:
        first = beta == betas[0]
        steps = s["first"] if first else cell["steps"]
        optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step / steps, s["hold"]))
        batches = minibatches(n, s["batch"], device)
        model.train()
        for step in range(steps):
            index = next(batches)
            warm_up = min(1, step / steps / 0.4) if first and memorised else 1
            loss = F.cross_entropy(model(x[index]), y[index])
            loss = loss + beta * warm_up / n * weight_information(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 100 == 0 or step == steps - 1:
                progress(step, steps, loss.item())
        measured.append(measure(model, s["batch"], x, y))
    return {"betas": betas} | {name: [m[name] for m in measured] for name in measured[0]}


@torch.no_grad()
def measure(model, batch, x, y):
    """Accuracy and cross-entropy on the train set as in training, and nats per sample."""
    n, batch, cross_entropy, right = len(x), min(batch, len(x)), [], []
    model.train()
    for _ in range(max(1, 4000 // n)):
        for index in torch.randperm(n, device=x.device)[:n - n % batch].split(batch):
            logits = model(x[index])
            cross_entropy.append(F.cross_entropy(logits, y[index]).item())
            right.append(accuracy(logits, y[index]))
    return {"train_acc_batch": float(np.mean(right)),
            "cross_entropy_batch": float(np.mean(cross_entropy)),
            "nats": weight_information(model).item() / n}
