"""Is what the task does not name forgotten? The same attributes, once named and once not.

    python -m beyond.named --scale demo     # synthetic faces, a minute on 2 cores
    python -m beyond.named --scale cpu      # CelebA, 15 minutes per seed on 2 cores

The paper says of Fig. 5 that a larger beta forgets what the task does not need. Here its classifier
is trained on half of the attributes, A or B, and each attribute a is read from z by a logistic
probe, in nats on held-out faces beyond what the half without a tells: H(a|other half) -
H(a|z, other half). If a is not named, the other half is the one that is: I(z;a|named). If a is
named, the measure is the same, so that only the training differs.

Any loss of signal takes the larger share from what is faint in z, as attributes not named are. So
white noise, which knows no task, is added to z at the least beta: where it costs the named nats as
much as the penalty does, what does it leave of the others?
"""
import numpy as np
import torch
import torch.nn.functional as F

import fig5_celeba_vae as fig5
from common import (claim, complete_seeds, fmt, new_figure, ok_rows, parse_args, per_seed,
                    plot_points, run_grid, save_figure, save_tables, summarise, weight_information)

SHARED = ("channels", "synthetic", "batch", "lr", "lr_noise")
PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of the probes' squared weights of z
NOISE = (0.7, 1.4, 2.1, 2.8)  # its standard deviation over that of each unit of z
SETTINGS = {
    scale: {name: fig5.SETTINGS[scale][name] for name in SHARED}
    | dict(classifier_steps=steps, components=components, penalties=PENALTIES, noise=NOISE)
    for scale, steps, components in (("demo", 500, 50), ("cpu", 1500, 200), ("paper", 20_000, 500))}
GRID = {"demo": (0.03, 0.3), "cpu": (0.03, 0.1, 0.3, 0.7, 2.0),
        "paper": (0.03, 0.1, 0.3, 0.7, 2.0)}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
# Half A, by place in the data set's list, B is the rest: of all halves found by swapping, the one
# with the least sum of |correlation| across, on the training labels. In CelebA, A has hair colour
# and form, smile, cheeks, jewellery; B has sex, make-up, beard, age, weight. In the synthetic
# faces, A has hair colours and beard; B has skin, glasses and smile.
HALF_A = {"celeba": (0, 5, 6, 8, 9, 10, 11, 12, 19, 21, 23, 25, 26, 29, 31, 32, 33, 34, 35, 37),
          "synthetic": (0, 1, 5)}


def halves(dataset, count, device):
    """{half: places of its attributes}."""
    in_a = torch.tensor([place in HALF_A[dataset] for place in range(count)])
    return {"A": in_a.nonzero().flatten().to(device), "B": (~in_a).nonzero().flatten().to(device)}


def train_cell(cell, device, args, progress):
    """Train a classifier of the named half; read all attributes from its z."""
    s, beta = SETTINGS[args.scale], cell["beta"]
    torch.manual_seed(cell["seed"])
    images, labels, parts = fig5.load_data(args, device)
    train, held_out = parts["train"], torch.cat([parts["validation"], parts["test"]])
    half = halves(args.dataset, labels.shape[1], device)
    named = labels[:, half[cell["named"]]]
    classifier = fig5.train_classifier(images, named, train, beta, s, progress)
    (z, _), (z_test, logits) = (fig5.draw_z(classifier, images, rows, len(rows))
                                for rows in (train, held_out))
    z, z_test = z.flatten(1).float(), z_test.flatten(1).float()

    def read(noise=0):
        noisy = [part + noise * z.std(0) * torch.randn_like(part) for part in (z, z_test)]
        return read_attributes(*noisy, labels[train], labels[held_out], half, s)
    row = {"information": weight_information(classifier).item(),
           "attribute_acc": fig5.agreement(logits, named[held_out])} | read()
    if beta == GRID[args.scale][0]:
        row["under_noise"] = [read(noise) for noise in s["noise"]]
    return row


def read_attributes(z, z_test, y, y_test, half, s):
    """beyond_A, beyond_B: sums over a half of I(z;a|the other half)."""
    z, z_test = principal_components(z, z_test, s["components"])
    y, y_test, row = y.float(), y_test.float(), {}
    for name, other in (("A", "B"), ("B", "A")):
        told, told_test = 2 * y[:, half[other]] - 1, 2 * y_test[:, half[other]] - 1
        target, target_test = y[:, half[name]], y_test[:, half[name]]

        def unread(z, z_test, penalties):
            return cross_entropy(z, told, target, z_test, told_test, target_test, penalties)
        beyond = unread(z[:, :0], z_test[:, :0], s["penalties"][:1]) - unread(z, z_test,
                                                                              s["penalties"])
        row[f"beyond_{name}"] = beyond.sum().item()
    return row


def principal_components(z, z_test, count):
    """Leading components of the standardised z (n, d), and of z_test, scaled to variance 1."""
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, z_test = (z - mean) / std, (z_test - mean) / std
    values, vectors = torch.linalg.eigh(z.double().T @ z.double() / len(z))
    basis = vectors[:, -count:].float() / values[-count:].mean().sqrt().float()
    return z @ basis, z_test @ basis


def cross_entropy(z, told, y, z_test, told_test, y_test, penalties):
    """Of logistic regression of y (n, a) on z (n, d) and told (n, k), on test data: (a,), nats.

    The weights of z have the L2 penalty, of those given, that is best on a fifth of the n for each
    column of y, those of told the least of them.
    """
    fit_on = len(z) * 4 // 5
    x, x_test = torch.cat([z, told], 1), torch.cat([z_test, told_test], 1)
    of_told = torch.arange(x.shape[1], device=x.device)[:, None] >= z.shape[1]
    chosen, held_out = [], []
    for penalty in penalties:
        weight = torch.zeros(x.shape[1], y.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(y.shape[1], device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def losses(rows, target):
            logits = rows @ weight + bias
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0)

        strength = torch.where(of_told, penalties[0], penalty)

        def objective():
            optimizer.zero_grad()
            loss = losses(x[:fit_on], y[:fit_on]).sum() + (strength * weight.square()).sum()
            loss.backward()
            return loss
        optimizer.step(objective)
        with torch.no_grad():
            chosen.append(losses(x[fit_on:], y[fit_on:]))
            held_out.append(losses(x_test, y_test))
    best = torch.stack(chosen).argmin(0)
    return torch.stack(held_out).gather(0, best[None])[0]


def kept(rows, betas):
    """{(half, role, of): share of the nats at the least beta that is left: (seeds, 1 + losses)}.

    half: "A", "B" or "both", their sum; role: "named" or "not named"; of: "beta" or, at the least
    beta, "noise".
    """
    found = {}
    for half in "AB":
        for named in "AB":
            def by_beta(rows):
                return [row for beta in betas for row in ok_rows(rows, beta=beta, named=named)]

            def by_noise(rows):
                least, *_ = by_beta(rows)
                return [least, *least["under_noise"]]
            role = "named" if half == named else "not named"
            for of, states in ("beta", by_beta), ("noise", by_noise):
                found[half, role, of] = per_seed(
                    lambda rows: [state[f"beyond_{half}"] for state in states(rows)], rows)
    for role in "named", "not named":
        for of in "beta", "noise":
            found["both", role, of] = found["A", role, of] + found["B", role, of]
    return {key: nats / nats[:, :1] for key, nats in found.items()}


def make_cells(scale):
    return [{"beta": beta, "named": named} for beta in GRID[scale] for named in "AB"]


def claims(ok, args):
    """The claims table, over the seeds of which no cell is missing."""
    betas, table = GRID[args.scale], []
    rows = complete_seeds(ok, make_cells(args.scale))
    if not rows:
        return table
    share, large = kept(rows, betas), [i for i, beta in enumerate(betas) if beta >= 0.3]

    def add(sentence, paper, places, first, second, holds):
        ours = "; ".join(f"β={betas[i]:g}: {fmt(first[:, i], '{:.0%}')}, "
                         f"{fmt(second[:, i], '{:.0%}')}" for i in places)
        table.append(claim(sentence, paper, ours, holds))

    for half in "AB":
        own, other = share[half, "named", "beta"], share[half, "not named", "beta"]
        gap = (own - other)[:, large]
        spread = gap.std(0, ddof=1) if len(gap) > 1 else 0
        add(f"half {half} keeps a larger share of its nats named than not named, in every seed at "
            f"every β from {betas[large[0]]:g}, by more than the seeds' spread", "implied", large,
            own, other, (gap > 0).all() and (gap.mean(0) > spread).all())
    if args.scale == "demo":  # whose classifier is trained too briefly to decide the next
        return table
    own, other = share["both", "named", "beta"], share["both", "not named", "beta"]
    if held := [i for i in range(1, len(betas)) if own[:, i].mean() >= 0.8][-1:]:
        add("at the largest β where named attributes keep 80% of their nats, others keep 60% or "
            "less", "attributes stay, the rest goes", held, own, other,
            other[:, held].mean() <= 0.6)
    noisy = np.array([np.interp(x, named[::-1], rest[::-1]) for x, named, rest in zip(
        own, share["both", "named", "noise"], share["both", "not named", "noise"])])
    add("attributes not named keep less (first) than under noise that leaves the named as much "
        f"(second), in every seed at every β from {betas[large[0]]:g}", "implied", large, other,
        noisy, (other < noisy)[:, large].all())
    return table


def measured(ok):
    """A table of nats read from z, by beta and half."""
    table = []
    for beta in sorted({row["beta"] for row in ok}):
        line = {"β": f"{beta:g}"}
        for half in "AB":
            for named in "AB":
                values = [row[f"beyond_{half}"] for row in ok_rows(ok, beta=beta, named=named)]
                role = "named" if half == named else "not named"
                line[f"{half}, {role}"] = fmt(values)
        table.append(line)
    return table


def plot(ok, args):
    fig, axes = new_figure(1, 3, f"Named or not: {args.dataset}, scale {args.scale}, "
                           f"{len({row['seed'] for row in ok})} seeds")
    for ax, half in zip(axes[0], "AB"):
        for named in "AB":
            role = "named" if half == named else "not named"
            plot_points(ax, summarise(ok, "beta", f"beyond_{half}", named=named), label=role,
                        color="C0" if half == named else "C1")
        ax.set(xscale="log", xlabel="β", title=f"half {half} of the attributes, read from z",
               ylabel="nats beyond what the other half tells", ylim=(0, None))
        ax.legend()
    if rows := complete_seeds(ok, make_cells(args.scale)):
        share = kept(rows, GRID[args.scale])
        for of, label in ("beta", "larger β"), ("noise", "noise in z at the least β"):
            axes[0, 2].plot(*(share["both", role, of].mean(0) for role in ("named", "not named")),
                            "o-", label=label)
        axes[0, 2].plot([0, 1], [0, 1], "k", lw=1, label="alike")
        axes[0, 2].set(xlabel="share kept of what is named", ylabel="of what is not named",
                       title="both halves", xlim=(0.4, 1.02), ylim=(0.4, 1.02))
        axes[0, 2].legend()
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, fig5.DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], fig5.load_data)
    ok = ok_rows(rows)
    plot(ok, args)
    save_tables(args, claims=claims(ok, args), nats_beyond_the_other_half=measured(ok))


if __name__ == "__main__":
    main()
