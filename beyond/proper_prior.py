"""What r is under a proper prior, and under the log-uniform count once its places are paid.

    python -m beyond.proper_prior --scale demo     # synthetic images, 2 minutes on 2 cores
    python -m beyond.proper_prior --scale cpu      # CIFAR-10, 1/4 width, 3 hours on 2 cores

r is label nats saved per nat counted; memorising pays while beta < r. Fig. 1 counts with the
log-uniform prior, which is improper. Here its nets on random labels are trained with
cross-entropy + beta/N * KL(q || p) for proper priors p, whose parameters are counted too:
  "mixture":   per layer a mixture of three Gaussians of mean zero, learned; its KL is counted by an
               upper bound, which lowers r. In pilots over 95% of a layer's weights end in one
               of the three or in equal ones, even if they are kept apart;
  "gaussian":  per layer one Gaussian around the initial weights, its variance learned.
N * cross-entropy + KL is the length of a code for the labels, whatever beta a net was trained with,
so that on average over labels no more nats are saved than counted: r is at most 1 (Hinton & van
Camp 1993; Blier & Ollivier 2018). The priors' parameters, 250 and 55 nats in eight layers, lower r
at small N: the mixture's are 2.5 nats per sample at N = 100, 0.08 at 3,000.

Third, nets with the count of Fig. 1:
  "log-uniform": r as counted, and with the places of the surviving weights (alpha < 1) paid, the
                 entropy of a Bernoulli variable per layer, less the logarithm of the number of
                 orders of the hidden units that have any, as their order does not matter.
For weights of small alpha that count is the KL from a log-uniform density over both signs and a
factor of 50 in size, so that with the places it is nearly a code: of the net whose other weights
are zero, not of the one measured, in which their noise, of any size, is free. The parameters of the
Bernoulli variables are not paid either. Both raise its r. The mixture gets no credit for the order
of units, though its count does not depend on it: at 1/4 width at most 547 nats.

With a proper prior beta is raised from 0 without Fig. 1's peak, at which these nets forget.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn as nn

import fig1_phase_transition as fig1
from common import (cell_table, check, complete_curves, group_by, ok_rows, parse_args, plot_points,
                    run_grid, save_panels, save_tables, summarise, weight_information)

SETTINGS = {scale: s | {"peak_proper": 0.0} for scale, s in fig1.SETTINGS.items()}
BETAS = (0.05, 0.1, 0.2, 0.3, 0.5)
SIZES = (100, 300, 1000, 3000)
GRID = {
    "demo": dict(sizes=(100,), betas={"mixture": (0.05, 0.2), "log-uniform": (0.2,)}),
    "cpu": dict(sizes=SIZES, betas={"mixture": BETAS, "gaussian": (0.1, 0.2, 0.3),
                                    "log-uniform": BETAS}),
    "paper": dict(sizes=(*SIZES, 10_000), betas={"mixture": BETAS, "gaussian": BETAS,
                                                 "log-uniform": BETAS}),
}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}


def train_cell(cell, device, args, progress):
    """Train one of Fig. 1's nets with this prior; for log-uniform, count the places too."""
    s = SETTINGS[args.scale]
    proper = s | {"peak": s["peak_proper"]}
    if cell["prior"] == "mixture":
        mixture = Mixture()
        row = fig1.train_cell(cell, device, args, progress, mixture, **proper)
        return row | {"mixtures": {name: [values.tolist() for values in mixture.used(name)]
                                   for name in mixture.parameters}}
    if cell["prior"] == "gaussian":
        return fig1.train_cell(cell, device, args, progress, around_start(), **proper)
    trained = []  # the net, which only the penalty sees

    def information(model):
        trained[:] = [model]
        return weight_information(model)

    row = fig1.train_cell(cell, device, args, progress, information, **s)
    layers = [m for m in trained[0].modules() if hasattr(m, "log_sigma2")]
    hidden = [m for m in trained[0].children() if hasattr(m, "log_sigma2")][:-1]
    survives = {layer: layer.log_alpha < 0 for layer in layers}
    return row | {"survivors": sum(weights.sum().item() for weights in survives.values()),
                  "places": sum(place_entropy(weights) for weights in survives.values()),
                  "permutations": sum(log_orders(survives[layer]) for layer in hidden)}


def place_entropy(survives):
    """Nats that tell which weights survive: their number times the entropy of a Bernoulli.

    The fraction that survives is taken as known; of n weights it is at most log(n + 1) nats.
    """
    fraction = survives.double().mean()
    return survives.numel() * (torch.special.entr(fraction)
                               + torch.special.entr(1 - fraction)).item()


def log_orders(survives):
    """log of the number of orders of the units, the first dimension, that have survivors: nats."""
    units, used = len(survives), survives.flatten(1).any(1).sum().item()
    return math.lgamma(units + 1) - math.lgamma(units - used + 1)


# The mixture's parameters: values in steps of 1/16 from the least one, log 512 nats paid for each.
# In steps of 1/2 the nats of one net vary by a third, as EM goes from one level to the next.
LEVELS, STEP, LEAST_ODDS, LEAST_LOG_S2 = 512, 1 / 16, -16, -24
APART = (-8.0, -4.0, 0.0)  # log s^2 at the start, less that of the layer's weights


def on_grid(parameter, least):
    steps = ((parameter - least) / STEP).round().clamp(0, LEVELS - 1)
    return least + steps * STEP


def mixture_kl(square, log_sigma2, log_odds, log_s2):
    """Upper bound on KL(N(w, sigma^2) || mixture of N(0, s_k^2)) of each weight, and shares.

    -log sum_k pi_k exp(-KL_k), nats: by Jensen, for shares c_k that add up to 1,
        KL <= sum_k c_k * (KL_k + log c_k - log pi_k)
    which is least for c_k ~ pi_k exp(-KL_k) (Hershey & Olsen 2007). square: w^2 + sigma^2 (n,).
    log_odds, log_s2: (components,). shares: c_k, (components, n).
    """
    log_s2 = log_s2[:, None]
    kl = 0.5 * (log_s2 - log_sigma2 + square / torch.exp(log_s2) - 1)
    joint = log_odds.log_softmax(0)[:, None] - kl
    return -joint.logsumexp(0), joint.detach().softmax(0)


class Mixture:
    """A function of a model: nats in its weights, from a mixture that is learned for each layer.

    Two odds (the third is 1) and three variances per layer are paid. Every call ends with a step
    of EM, whose parameters are those of the next call.
    """

    def __init__(self):
        self.parameters = {}  # {layer: (log odds, log s^2)}, before they are put on the grid

    def __call__(self, model):
        total = 0
        for name, layer in model.named_modules():
            if hasattr(layer, "log_sigma2"):
                total = total + self.divergence(name, layer) + 5 * math.log(LEVELS)
        return total

    def divergence(self, name, layer):
        log_sigma2 = layer.log_sigma2.flatten()
        square = layer.weight.flatten() ** 2 + log_sigma2.exp()
        if name not in self.parameters:
            scale = square.detach().mean().log()
            # apart, as EM cannot separate equal components
            self.parameters[name] = scale.new_zeros(3), scale + scale.new_tensor(APART)
        log_odds, log_s2 = self.parameters[name]
        odds_used, s2_used = self.used(name)
        kl, shares = mixture_kl(square, log_sigma2, odds_used, s2_used)

        # EM's step from the values on the grid is added to those off it, so that small steps add up
        weights = shares.sum(1) + 1e-6
        best_odds = (weights / weights[2]).log()
        best_s2 = ((shares @ square.detach() + 1e-12) / weights).log()
        log_odds = log_odds + best_odds - odds_used
        log_s2 = log_s2 + best_s2 - s2_used
        self.parameters[name] = (log_odds.clamp(LEAST_ODDS, LEAST_ODDS + LEVELS * STEP),
                                 log_s2.clamp(LEAST_LOG_S2, LEAST_LOG_S2 + LEVELS * STEP))
        return kl.sum()

    def used(self, name):
        """The log odds and log s^2 of this layer's prior: those of the next call."""
        log_odds, log_s2 = self.parameters[name]
        return on_grid(log_odds, LEAST_ODDS), on_grid(log_s2, LEAST_LOG_S2)


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
        # the mean square is the best s^2; on a grid, as what is chosen has to be paid
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


def add_derived(rows):
    """Add nats per sample, r, and r_paid with the places paid; 0 below 55% train accuracy."""
    for row in rows:
        memorised, n = row["train_acc"] > fig1.MEMORISED, row["n"]
        saved = math.log(10) - row["cross_entropy"]
        row["nats"] = row["information"] / n
        row["r"] = saved / row["nats"] if memorised else 0.0
        if "places" in row:
            row["nats_paid"] = row["nats"] + max(0, row["places"] - row["permutations"]) / n
            row["r_paid"] = saved / row["nats_paid"] if memorised else 0.0
    return rows


def largest(rows, key="r"):
    """The largest r over the beta of the grid; nan if none of them memorises."""
    return max((row[key] for row in rows if row[key] > 0), default=math.nan)


def largest_by_size(rows, key="r"):
    """{"N = 100:": the largest r of each seed, ...}."""
    found = [{"n": n, "largest": largest(own, key)}
             for (n, _), own in group_by(rows, "n", "seed").items()]
    return fig1.by_size(found, "largest")


def claims(rows):
    """The thresholds were set before the grid was trained."""
    table = []
    for prior, key, name, threshold, words in (
            ("mixture", "r", "mixture of Gaussians", (0, 0.6), "below 0.6"),
            ("mixture", "r", "mixture of Gaussians", (0.25, 0.4), "from 0.25 to 0.4"),
            ("gaussian", "r", "one Gaussian around the initial weights", (0, 0.25), "below 0.25"),
            ("log-uniform", "r", "log-uniform as counted", (0.45, 1), "from 0.45 to 1"),
            ("log-uniform", "r_paid", "log-uniform, places paid", (0, 0.4), "below 0.4")):
        own = ok_rows(rows, prior=prior)
        end = max((row["beta"] for row in own), default=0)
        table.append(check(f"{name}: the largest r of β to {end:g} is {words}", "–",
                           largest_by_size(own, key), threshold))
    return table


PANELS = (("mixture", "r", "proper prior, mixture of three Gaussians"),
          ("gaussian", "r", "proper prior, one Gaussian"),
          ("log-uniform", "r", "log-uniform, as counted"),
          ("log-uniform", "r_paid", "log-uniform, places of weights paid"))


def r_panel(ax, rows, key, title):
    """r against beta, a curve for each N."""
    from matplotlib import colormaps
    groups = group_by(rows, "n")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(groups)))
    for ((n,), own), colour in zip(groups.items(), colours):
        memorised = [row for row in own if row[key] > 0]
        plot_points(ax, summarise(memorised, "beta", key), color=colour, label=f"N = {n:,}")
    betas = [row["beta"] for row in rows]
    ends = [min(betas), max(betas)]
    # memorising pays above this line
    ax.plot(ends, ends, color="0.5", lw=2, label="r = β")
    ax.set(xlabel="β", ylabel="r, label nats saved per nat counted", title=title,
           xlim=(0, None), ylim=(0, 1.05))
    ax.legend()


def plot(rows, args):
    panels = []
    for prior, key, title in PANELS:
        own = ok_rows(rows, prior=prior)
        if any(row.get(key, 0) > 0 for row in own):  # some net has memorised
            panels.append(partial(r_panel, rows=own, key=key, title=title))
    title = f"Nets of Fig. 1 on random labels, {args.dataset}, scale {args.scale}"
    save_panels(panels, title, args, columns=2)


def make_cells(scale):
    grid, cells = GRID[scale], []
    for n in grid["sizes"]:
        for prior, betas in grid["betas"].items():
            for beta in betas:
                cells.append({"prior": prior, "labels": "random", "n": n, "beta": beta})
    return cells


KEYS = {"prior": "prior", "N": "n", "β": "beta"}
COLUMNS = {"train": "train_acc", "cross-entropy": "cross_entropy", "objective": "objective",
           "I/N": "nats", "with places": "nats_paid", "r": "r", "r, places paid": "r_paid",
           "weights that survive": ("survivors", "{:.0f}")}


def main():
    args = parse_args(__doc__, fig1.DATASETS, SEEDS)
    cells = make_cells(args.scale)
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], fig1.load_data)
    rows = add_derived(ok_rows(rows))
    plot(rows, args)
    whole = complete_curves(rows, cells, "prior", "n")
    save_tables(args, claims=claims(whole), cells=cell_table(rows, KEYS, COLUMNS))


if __name__ == "__main__":
    main()
