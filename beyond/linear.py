"""beta = 1 is exact for a proper prior and the best posterior; the log-uniform count passes it.

    python -m beyond.linear --scale demo     # no data needed, under a minute
    python -m beyond.linear --scale cpu      # CIFAR-10 for the log-uniform part, 20 minutes

Models that are linear in their weights learn random labels, with L = cross-entropy + beta/N * KL.

Proper prior: Bayesian logistic regression on N random binary labels, w ~ N(0, S^2), so that the
logits are f ~ N(0, S^2 K), K the kernel: the identity (a look-up table, one weight a sample), 1,000
features of +-1, or an RBF kernel. The posterior is the best Gaussian with a full covariance, S the
best of SCALES for the mean over draws of labels. Beside it is the minimum over all posteriors,
-beta log E_prior exp(-CE/beta): at beta = 1 it is -log p(labels), on average at least N log 2.

Log-uniform: one StochasticLinear with ten outputs on d fixed random ReLU features of N images with
random labels, trained with Adam and counted as in Fig. 1.

r is label nats saved per nat counted; memorising pays while beta < r. You will see r come to 1 for
the proper prior, and not pass it but for the error of 20 draws of labels. The log-uniform count
leaves unpaid which weights survive: there r depends on d, and from d = 1,000 on most labels are
fitted at beta = 2.
"""
import math
from functools import partial
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F

from common import (StochasticLinear, check, complete_curves, corrupt_labels, draw_subset, evaluate,
                    fmt, group_by, load_images, lr_factor, normalise, ok_rows, param_groups,
                    parse_args, per_seed, plot_points, run_grid, save_panels, save_tables,
                    summarise)
from fig1_phase_transition import MEMORISED

# draws: of labels. signs, inputs: dimensions. networks: sampled ones. The rest of the first line is
# of annealed importance sampling.
SHARED = dict(draws=20, signs=1000, inputs=20, chains=10, leaps=4, leap=0.25,
              lr=0.03, lr_noise=0.1, hold=0.6, networks=32)
SETTINGS = {
    "demo": dict(temperatures=16, steps=500, **SHARED),
    "cpu": dict(temperatures=64, steps=2000, **SHARED),
    "paper": dict(temperatures=256, steps=10_000, **SHARED),
}
SCALES = (*np.exp2(np.arange(-5.0, -1)), *np.exp2(np.arange(-1, 4.1, 0.5)))  # S of the prior
KERNELS = {"table": "look-up table", "signs": "features of ±1", "rbf": "RBF kernel"}
BETAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.05, 1.1, 1.2)
GRID = {
    "demo": dict(proper={30: (0.5, 0.9, 0.95, 1.0, 1.1)}, n=100, features=(100, 300),
                 betas=(0.5, 1.0, 2.0)),
    "cpu": dict(proper={100: BETAS, 30: BETAS, 300: (0.3, 0.7, 0.9, 0.95, 0.98, 1.0, 1.05)},
                n=100, features=(100, 300, 1000, 3000, 10_000), betas=(0.5, 1.0, 2.0, 4.0)),
    "paper": dict(proper=dict.fromkeys((100, 30, 300), BETAS), n=100,
                  features=(100, 300, 1000, 3000, 10_000), betas=(0.5, 1.0, 2.0, 4.0)),
}
SEEDS = {"demo": [0], "cpu": [0], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["cifar10", "synthetic"],
            "paper": ["cifar10", "synthetic"]}


def load_data(args):
    return load_images(args.dataset, args.data_dir, 1000, 10)


def train_cell(cell, device, args, progress):
    fit = fit_proper if cell["prior"] == "proper" else fit_log_uniform
    return fit(cell, SETTINGS[args.scale], args, progress)


def fit_proper(cell, s, args, progress):
    """The best Gaussian posterior at the best S: means over draws of labels, and every draw."""
    n, beta = cell["n"], cell["beta"]
    generator = torch.Generator().manual_seed(cell["seed"])
    kernel = kernel_matrix(cell["kernel"], n, s, generator)
    labels = random_signs(s["draws"], n, generator)

    # One S for all draws: chosen for each, S would hold label nats that nobody pays.
    lowest = math.inf
    for step, scale in enumerate(SCALES):
        posterior = best_gaussian(scale**2 * kernel, labels, beta)
        objective = posterior["cross_entropy"] + beta / n * posterior["divergence"]
        mean = objective.mean().item()
        if mean < lowest:
            lowest, best = mean, (scale, objective, posterior)
        progress(step, len(SCALES), mean)
        if mean > lowest + 0.05:  # larger S only costs more, and takes the most iterations
            break

    scale, objective, posterior = best
    if cell["kernel"] == "table":
        exact = torch.full_like(objective, table_minimum(scale, beta))
    else:
        exact = exact_minimum(posterior, labels, beta, s, generator)
    cross_entropy, nats = posterior["cross_entropy"], posterior["divergence"]
    measured = {"objective": objective, "exact": exact, "train_acc": posterior["accuracy"],
                "cross_entropy": cross_entropy, "information": nats,
                "r": (math.log(2) - cross_entropy) * n / nats}
    row = {"scale_prior": scale, "draws": {}}
    for name, values in measured.items():
        row[name] = values.mean().item()
        row["draws"][name] = values.tolist()
    return row


def fit_log_uniform(cell, s, args, progress):
    """One stochastic layer on random features, trained with Adam, measured as one sampled layer."""
    n, beta, steps = cell["n"], cell["beta"], s["steps"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, _, _, mean, std = load_data(args)
    x, y = draw_subset(x, y, n, generator)
    y = corrupt_labels(y, 1.0, 10, generator)
    x = normalise(x, mean, std, size=28).flatten(1)
    projection = torch.randn(x.shape[1], cell["features"], generator=generator)
    features = F.relu(x @ projection / math.sqrt(x.shape[1]))

    model = StochasticLinear(cell["features"], 10, bias=False)
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, s["hold"]))
    for step in range(steps):
        cross_entropy = F.cross_entropy(model(features), y)
        beta_now = beta * min(1, step / steps / 0.4)
        loss = cross_entropy + beta_now / n * model.information()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())

    measured = evaluate(model, features, y, features, y, s["networks"])
    cross_entropy, nats = measured["cross_entropy"], model.information().item()
    return {"train_acc": measured["train_acc"], "cross_entropy": cross_entropy,
            "information": nats, "objective": cross_entropy + beta / n * nats,
            "r": (math.log(10) - cross_entropy) * n / nats}


def random_signs(rows, columns, generator):
    return torch.randint(2, (rows, columns), generator=generator).double() * 2 - 1


def kernel_matrix(name, n, s, generator):
    """K (n, n) of n random inputs, with ones on its diagonal."""
    if name == "table":
        return torch.eye(n, dtype=torch.double)
    if name == "signs":
        x = random_signs(n, s["signs"], generator)
        return x @ x.T / s["signs"]
    x = torch.randn(n, s["inputs"], generator=generator, dtype=torch.double)
    # squared distances are about twice the number of inputs: K is about 1/e^2 off its diagonal
    return torch.exp(-torch.cdist(x, x) ** 2 / s["inputs"])


def best_gaussian(prior, labels, beta, tolerance=1e-4):
    """The Gaussian q(f) that minimises CE + beta * KL(q || N(0, prior)), in nats.

    prior: (n, n), the covariance of the logits f. labels: (draws, n) of +-1. q is the prior times
    one site a sample, exp(linear * f - precision * f^2 / 2). At the minimum
        precision = E CE''(f) / beta        linear = precision * mean - E CE'(f) / beta
    which is iterated, damped (Khan & Lin 2017). Returns tensors for each draw of labels: mean,
    covariance, sites, log_evidence of the sites; cross_entropy, accuracy per sample; divergence.
    """
    n = labels.shape[1]
    linear, precision = labels / (4 * beta), labels**2 / (8 * beta)
    for _ in range(100):
        # covariance = prior - half' half, by Woodbury, as the prior may have no inverse
        root = precision.sqrt()[..., None]
        cholesky = torch.linalg.cholesky(torch.eye(n) + root * prior * root.mT)
        half = torch.linalg.solve_triangular(cholesky, root * prior, upper=False)
        variance = prior.diagonal() - half.square().sum(1)
        mean = linear @ prior - (half.mT @ (half @ linear[..., None])).squeeze(-1)

        cross_entropy, slope, curvature = expectations(labels, mean, variance)
        change_precision = curvature / beta - precision
        change_linear = (curvature * mean - slope) / beta - linear
        if max(change_precision.abs().max(), change_linear.abs().max()) < tolerance:
            break
        precision = precision + 0.7 * change_precision
        linear = linear + 0.7 * change_linear

    log_det = 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)  # of prior / covariance
    squares = (linear - precision * mean) * mean  # their sum: mean' prior^-1 mean
    accuracy = torch.special.ndtr(labels * mean / variance.sqrt())
    return {"mean": mean, "covariance": prior - half.mT @ half,
            "linear": linear, "precision": precision,
            "log_evidence": 0.5 * ((linear * mean).sum(1) - log_det),
            "divergence": 0.5 * ((squares - precision * variance).sum(1) + log_det),
            "cross_entropy": cross_entropy.mean(1), "accuracy": accuracy.mean(1)}


NODES, WEIGHTS = map(torch.tensor, np.polynomial.hermite_e.hermegauss(64))
WEIGHTS /= WEIGHTS.sum()


def expectations(labels, mean, variance):
    """E of CE(f) = log(1 + exp(-label * f)), of CE' and of CE'' under f ~ N(mean, variance)."""
    f = mean[..., None] + variance.sqrt()[..., None] * NODES
    margin = labels[..., None] * f
    wrong = torch.sigmoid(-margin)  # the probability of the other label
    cross_entropy = F.softplus(-margin) @ WEIGHTS
    slope = -labels * (wrong @ WEIGHTS)
    curvature = (wrong * (1 - wrong)) @ WEIGHTS
    return cross_entropy, slope, curvature


def table_minimum(scale, beta):
    """min over all q of CE + beta * KL per sample, of a look-up table, by quadrature: nats."""
    z = torch.linspace(-12, 12, 10_001, dtype=torch.double)
    log_density = -0.5 * z**2 - torch.logsumexp(-0.5 * z**2, 0)
    return -beta * torch.logsumexp(log_density - F.softplus(-scale * z) / beta, 0).item()


def exact_minimum(posterior, labels, beta, s, generator):
    """-beta/n * log E_prior exp(-CE/beta) for each draw of labels, nats per sample.

    By annealed importance sampling (Neal 2001) from the Gaussian posterior to the exact one, with
    Hamiltonian moves of z, f = mean + root z. It is too high, by half the variance of log E.
    """
    draws, n = labels.shape
    y, mean = labels[:, None], posterior["mean"][:, None]
    linear, precision = posterior["linear"][:, None], posterior["precision"][:, None]
    root = torch.linalg.cholesky(posterior["covariance"])

    def log_ratio(z):
        """log of prior * exp(-CE/beta) over the Gaussian, and its gradient."""
        f = mean + z @ root.mT
        sites = (linear * f - 0.5 * precision * f**2).sum(-1) - posterior["log_evidence"][:, None]
        gradient = y * torch.sigmoid(-y * f) / beta - linear + precision * f
        return -F.softplus(-y * f).sum(-1) / beta - sites, gradient @ root

    def normal():
        shape = draws, s["chains"], n
        return torch.randn(shape, generator=generator, dtype=torch.double)

    z, log_weight = normal(), 0
    ratio, gradient = log_ratio(z)
    for step in range(s["temperatures"]):
        log_weight = log_weight + ratio / s["temperatures"]
        t = (step + 1) / s["temperatures"]

        # one Hamiltonian trajectory at temperature t, by the leapfrog scheme
        momentum = normal()
        before = t * ratio - 0.5 * (z**2 + momentum**2).sum(-1)
        z_new, ratio_new, gradient_new = z, ratio, gradient
        for _ in range(s["leaps"]):
            momentum = momentum + s["leap"] / 2 * (t * gradient_new - z_new)
            z_new = z_new + s["leap"] * momentum
            ratio_new, gradient_new = log_ratio(z_new)
            momentum = momentum + s["leap"] / 2 * (t * gradient_new - z_new)
        after = t * ratio_new - 0.5 * (z_new**2 + momentum**2).sum(-1)

        uniform = torch.rand(after.shape, generator=generator, dtype=torch.double)
        accepted = uniform.log() < after - before
        ratio = torch.where(accepted, ratio_new, ratio)
        z = torch.where(accepted[..., None], z_new, z)
        gradient = torch.where(accepted[..., None], gradient_new, gradient)
    return -beta / n * (torch.logsumexp(log_weight, 1) - math.log(s["chains"]))


def mean_and_error(rows, key):
    """Mean and standard error over the draws of labels of these rows."""
    values = np.concatenate([row["draws"][key] for row in rows])
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


def largest_beta(rows):
    """The largest beta whose mean objective is a standard error below log 2; 0 if none."""
    largest = 0.0
    for row in rows:  # by ascending beta
        if sum(mean_and_error([row], "objective")) < math.log(2):
            largest = row["beta"]
    return largest


def largest_r(rows):
    """The largest mean r, less its error, over beta."""
    largest = -math.inf
    for row in rows:
        mean, error = mean_and_error([row], "r")
        largest = max(largest, mean - error)
    return largest


def lowest_objective(rows, chance):
    """Objective minus that of chance, the lowest of these rows."""
    return min(row["objective"] for row in rows) - chance


def largest_counted_r(rows):
    """Of nets that have memorised: of chance r would be a ratio of two small numbers."""
    return max((row["r"] for row in rows if row["train_acc"] > MEMORISED), default=math.nan)


def by_kernel(rows, function):
    """{kernel: function of each seed's rows, of all N}."""
    values = {}
    for (kernel,), own in group_by(rows, "kernel").items():
        values[KERNELS[kernel]] = per_seed(function, own)
    return values


def claims(proper, log_uniform):
    """The thresholds were set before these rows were trained."""
    table = by_kernel(ok_rows(proper, kernel="table"), largest_beta)
    beyond = [row for row in proper if row["beta"] >= 1.05]
    excess = by_kernel(beyond, partial(lowest_objective, chance=math.log(2)))
    excess_at_two = per_seed(partial(lowest_objective, chance=math.log(10)),
                             ok_rows(log_uniform, beta=2.0))
    r_counted = per_seed(largest_counted_r, log_uniform)
    return [
        check("proper prior: the largest β at which memorising pays is 1 ± 0.05", "1", table,
              (0.95, 1.05)),
        check("proper prior: mean r, less its standard error, is at most 1 at every β (shown: "
              "the largest, of all N)", "theory",
              by_kernel(proper, largest_r), (-math.inf, 1), "{:.3f}"),
        check("proper prior: at β ≥ 1.05 the mean objective is never below log 2 (shown: the "
              "lowest less log 2, of all N)", "theory", excess, (0, math.inf), "{:.5f}"),
        check("log-uniform: memorising pays at β = 2 for some d (shown: lowest objective less "
              "log 10)", "no", {"": excess_at_two}, (-math.inf, 0)),
        check("log-uniform: the largest r of nets that memorise exceeds 1", "no",
              {"": r_counted}, (1, math.inf)),
    ]


LABELS = {"train_acc": "train accuracy, one draw of the weights",
          "r": "r, label nats saved per nat counted", "objective": "objective, nats per sample"}
STYLES = {30: ":", 100: "o-", 300: "--"}
COLOURS = {"table": "k", "signs": "C0", "rbf": "C3"}


def finish_panel(ax, rows, key, title, classes):
    beta = np.linspace(min(row["beta"] for row in rows), max(row["beta"] for row in rows))
    ax.axvline(1, color="0.5", ls="--", lw=1)
    if key == "r":
        ax.plot(beta, beta, color="0.5", lw=2)
        ax.annotate("r = β", (beta[-1], beta[-1]), color="0.4", ha="right", va="bottom")
    if key == "objective":
        chance = math.log(classes)
        ax.axhline(chance, color="0.5", lw=2)
        ax.annotate(f"log {classes}, chance", (beta[0], chance), color="0.4", va="bottom")
    ax.set(xlabel="β", ylabel=LABELS[key], title=title)
    ax.legend()


def proper_panel(ax, rows, key):
    """A measure against beta, a curve for each kernel and N; error bars: standard errors."""
    table_sizes = {row["n"] for row in rows if row["kernel"] == "table"}
    for (kernel, n), own in group_by(rows, "kernel", "n").items():
        style = dict(fmt=STYLES.get(n, "-"), color=COLOURS[kernel], ms=3, lw=1)
        draw_means(ax, own, key, label=f"{KERNELS[kernel]}, N = {n}", **style)
        if key == "objective" and n in table_sizes:
            draw_means(ax, own, "exact", label="the same, all posteriors", **style | {"fmt": "x"})
    finish_panel(ax, rows, key, "proper Gaussian prior, binary labels", 2)


def draw_means(ax, rows, key, **style):
    cells = group_by(rows, "beta")
    mean, error = np.array([mean_and_error(own, key) for own in cells.values()]).T
    ax.errorbar([beta for beta, in cells], mean, error, **style)


def log_uniform_panel(ax, rows, key):
    """A measure against beta, a curve for each number of features."""
    for (d,), own in group_by(rows, "features").items():
        plot_points(ax, summarise(own, "beta", key), label=f"d = {d:,}")
    ax.set_xscale("log")
    betas = sorted({row["beta"] for row in rows})
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
    ax.minorticks_off()
    finish_panel(ax, rows, key, "log-uniform count, ten classes", 10)


def plot(proper, log_uniform, args):
    panels = []
    for rows, panel in ((proper, proper_panel), (log_uniform, log_uniform_panel)):
        if rows:
            panels += [partial(panel, rows=rows, key=key) for key in LABELS]
    title = f"Random labels, models linear in their weights, {args.dataset}, scale {args.scale}"
    save_panels(panels, title, args)


def cell_table(rows, *keys):
    columns = {"S": "scale_prior", "accuracy": "train_acc", "cross-entropy": "cross_entropy",
               "I/N": "nats", "objective": "objective", "all posteriors": "exact", "r": "r"}
    table = []
    for cell, own in group_by(rows, *keys).items():
        table.append(dict(zip(keys, cell)))
        for name, key in columns.items():
            if key in own[0]:
                table[-1][name] = fmt([row[key] for row in own], "{:.3f}")
    return table


def make_cells(scale):
    grid, cells = GRID[scale], []
    for n, betas in grid["proper"].items():
        for kernel in KERNELS:
            # per sample, a look-up table is the same for every N
            if kernel == "table" and n != 100 and scale != "demo":
                continue
            for beta in betas:
                cells.append({"prior": "proper", "kernel": kernel, "n": n, "beta": beta})
    for features in grid["features"]:
        for beta in grid["betas"]:
            cells.append({"prior": "log-uniform", "features": features, "n": grid["n"],
                          "beta": beta})
    return sorted(cells, key=cost)


def cost(cell):
    """For the order of the cells, the cheap ones first."""
    return cell["n"] ** 2 if cell["prior"] == "proper" else 10 * cell["features"]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    args.device = torch.device("cpu")  # small matrices in double precision
    cells = make_cells(args.scale)
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data)
    rows = sorted(ok_rows(rows), key=itemgetter("beta"))
    for row in rows:
        row["nats"] = row["information"] / row["n"]
    proper, log_uniform = (ok_rows(rows, prior=prior) for prior in ("proper", "log-uniform"))
    plot(proper, log_uniform, args)
    whole = sorted(complete_curves(rows, cells, "prior"), key=itemgetter("beta"))
    save_tables(args, claims=claims(ok_rows(whole, prior="proper"),
                                    ok_rows(whole, prior="log-uniform")),
                proper_prior=cell_table(proper, "kernel", "n", "beta"),
                log_uniform=cell_table(log_uniform, "features", "beta"))


if __name__ == "__main__":
    main()
