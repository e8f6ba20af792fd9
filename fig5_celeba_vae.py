"""Fig. 5: the larger beta, the less a representation keeps of a face beyond its attributes.

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 2 minutes on 2 cores
    python fig5_celeba_vae.py --scale cpu      # the CelebA in data/, 40 minutes a seed on 2 cores
    python fig5_celeba_vae.py --gpu 0          # CelebA, all of it (not yet run on a GPU)

A convolutional classifier of a face's attributes is trained with L = cross-entropy + beta/N *
I(w;D). Its last map before the head is the representation z, drawn from p(z|x) with noise. With the
classifier frozen, a conditional VAE p(x^|z,u), q(u|x,z), u ~ N(0, I) learns to decode the face; the
paper has a GAN with a reconstruction term. On held-out faces u is drawn from the prior: what z does
not hold is made up. The paper, in pictures: at small beta x^ is the face with its background; at
large beta the attributes stay, background and hair style are new. Measured on CelebA: from
beta = 0.03 to 0.7 the error of the background grows by half, that of the face no less; agreement on
the attributes falls from 88.0% to 86.8%.

Measured on held-out faces: errors of x^ in pixels from -1 to 1, the background being what lies
outside a centred ellipse; attribute agreement: whether an evaluation classifier, without noise and
trained on other faces, sees in x^ the attributes of x. On synthetic faces every factor is known,
and a linear probe reads each of them from z. beta = 0 is the reference: noise without a penalty.
Pictures of faces go to <out>/*-faces.npz and .png, which git ignores.
"""
import functools
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (FACE_ATTRIBUTES, FACE_ELLIPSE, FACE_FACTORS, claim, complete_seeds, fmt,
                    ib_loss, load_celeba, lr_factor, minibatches, new_figure, ok_rows,
                    param_groups, parse_args, plot_points, predict, run_grid, sample_weights,
                    save_figure, save_tables, summarise, synthetic_faces, to_stochastic,
                    weight_information)

# What a cell is trained and measured with, stored in its row. `channels` are those of the maps from
# 32x32 to 4x4, the last one z; `synthetic` the numbers of training and test faces drawn by code;
# `draws` of u per face. KL warm-up, without which the decoder ignores z: for the first kl_warm_up
# of the steps u is drawn from the prior, then a nat of u costs kl_weight, falling to 1 at kl_end.
VAE = dict(kl_warm_up=0.4, kl_weight=100, kl_end=0.8, draws=4, lr=0.002, lr_noise=0.04)
SETTINGS = {
    "demo": dict(channels=(12, 24, 48, 32), dim_u=32, synthetic=(3000, 1000), test=1000, batch=32,
                 evaluation_steps=200, classifier_steps=500, vae_steps=450, **VAE),
    "cpu": dict(channels=(24, 48, 96, 64), dim_u=128, synthetic=(10_000, 2000), test=2000, batch=64,
                evaluation_steps=1000, classifier_steps=1500, vae_steps=3000, **VAE),
    "paper": dict(channels=(64, 128, 256, 128), dim_u=256, synthetic=(20_000, 4000), test=4000,
                  batch=128, evaluation_steps=10_000, classifier_steps=20_000, vae_steps=60_000,
                  **VAE),
}
BETAS = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7)
GRID = {"demo": (0.03, 0.3, 1.0), "cpu": BETAS, "paper": BETAS}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["celeba", "synthetic"],
            "paper": ["celeba", "synthetic"]}
NUISANCES = ("hair_style", "background", "pose")  # factors that no attribute tells
SHOWN = 6  # held-out faces in the picture


@functools.lru_cache(maxsize=1)
def load_faces(dataset, data_dir, n_train, n_test):
    """Images uint8 (n, 3, 64, 64), attributes (n, a), factors (None for CelebA), rows of each part.

    Parts: "train" (the official one), "evaluation" (a third of it and the validation part),
    "classifier" (the rest of "train") and "test", in a fixed order. Read once per process.
    """
    if dataset == "synthetic":
        images, attributes, factors = synthetic_faces(n_train + n_test, seed=0)
        partition = 2 * (torch.arange(len(images)) >= n_train)
    else:
        (images, attributes, _, partition), factors = load_celeba(data_dir), None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part] for part in range(3))
    third = len(train) // 3
    evaluation = torch.cat([train[:third], validation])
    return images, attributes, factors, {"train": train, "evaluation": evaluation,
                                         "classifier": train[third:], "test": test}


def load_data(args):
    return load_faces(args.dataset, args.data_dir, *SETTINGS[args.scale]["synthetic"])


def take(images, rows, index):
    """Float images in [-1, 1] of rows[index]; an index beyond len(rows) gives a mirror image."""
    x = images[rows[index % len(rows)]]
    x = torch.where((index < len(rows)).view(-1, 1, 1, 1), x, x.flip(3))
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def encoder(channels, norm):
    """Convolutions with stride 2: (n, 3, 64, 64) -> (n, channels[-1], 4, 4)."""
    layers = []
    for before, after in zip((3, *channels), channels):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), norm(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def face_classifier(channels, attributes):
    """Two parts: x -> z (n, channels[-1], 4, 4), and the head z -> logits (n, attributes).

    Group normalisation treats each face by itself, in training as when z is drawn.
    """
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels[-1], attributes))
    model = nn.Sequential(encoder(channels, lambda c: nn.GroupNorm(4, c)), head)
    return model.to(memory_format=torch.channels_last)


class ConditionalVAE(nn.Module):
    """p(x^|z,u) and q(u|x,z), u ~ N(0, I) (n, dim_u); z (n, channels[-1], 4, 4).

    Gaussian likelihood with one learned variance per colour. q has one variance per dimension and
    normalised means, so that over all faces u has the prior's mean and variance.
    """

    def __init__(self, channels, dim_u):
        super().__init__()
        c1, c2, c3, c4 = channels
        self.encoder = encoder(channels, nn.BatchNorm2d)
        self.posterior = nn.Sequential(nn.Linear(32 * c4, dim_u, bias=False),
                                       nn.BatchNorm1d(dim_u, affine=False))
        self.logit_sigma2 = nn.Parameter(torch.zeros(dim_u))
        self.projection = nn.Sequential(nn.Linear(dim_u, 16 * c4), nn.Unflatten(1, (c4, 4, 4)))
        layers = [nn.Conv2d(2 * c4, c3, 3, padding=1, bias=False), nn.BatchNorm2d(c3),
                  nn.LeakyReLU(0.2)]
        for before, after in ((c3, c3), (c3, c2), (c2, c1)):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                       nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(c1, 3, 4, 2, 1))
        self.log_sigma2 = nn.Parameter(torch.full((3, 1, 1), -2.0))
        self.to(memory_format=torch.channels_last)

    def decode(self, z, u):
        """Mean of p(x|z,u): (n, 3, 64, 64)."""
        return self.decoder(torch.cat([z, self.projection(u)], 1))

    def nll(self, x, z, u):
        """-log p(x|z,u) of each face: (n,), nats."""
        error = (x - self.decode(z, u)) ** 2 / self.log_sigma2.exp()
        return 0.5 * (error + self.log_sigma2 + np.log(2 * np.pi)).sum((1, 2, 3))

    def forward(self, x, z):
        """(-log p(x|z,u), KL(q(u|x,z) || N(0, I))) of each face, u from q: two (n,), nats."""
        sigma2 = self.logit_sigma2.sigmoid()
        mean = self.posterior(torch.cat([self.encoder(x), z], 1).flatten(1))
        mean = (1 - sigma2).sqrt() * mean
        u = mean + sigma2.sqrt() * torch.randn_like(mean)
        return self.nll(x, z, u), 0.5 * (mean**2 + sigma2 - sigma2.log() - 1).sum(1)


def fit(model, loss_at, steps, s, progress):
    """Minimise loss_at(t), the loss on the next minibatch at fraction t of the steps, by Adam."""
    model.train()
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    for step in range(steps):
        loss = loss_at(step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    model.eval()


def fit_classifier(model, images, attributes, rows, steps, s, progress, beta=None):
    """Train on these rows and their mirror images; beta=None: a plain network without penalty."""
    batches = minibatches(2 * len(rows), s["batch"], images.device)

    def loss_at(t):
        index = next(batches)
        logits, target = model(take(images, rows, index)), attributes[rows[index % len(rows)]]
        if beta is None:
            nats = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="sum")
            return nats / len(index)
        return ib_loss(logits, target, model, beta * min(1, t / 0.4), len(rows))[0]
    fit(model, loss_at, steps, s, progress)


@functools.lru_cache(maxsize=1)
def evaluation_classifier(scale, dataset, data_dir, seed, device):
    """A classifier without noise, of other faces and another seed; once per process and seed."""
    s = SETTINGS[scale]
    torch.manual_seed(seed + 1_000_000)
    images, attributes, _, parts = load_faces(dataset, data_dir, *s["synthetic"])
    model = face_classifier(s["channels"], attributes.shape[1]).to(device)
    fit_classifier(model, images.to(device), attributes.to(device), parts["evaluation"].to(device),
                   s["evaluation_steps"], s, progress=lambda *_: None)
    return model


@torch.no_grad()
def draw_z(classifier, images, rows, mirrored=True):
    """z ~ p(z|x), half ((2)n, c, 4, 4), and its logits, of every row, then of the mirror images.

    Weights are sampled anew for every eight faces, which are put together at random.
    """
    n, linear = len(rows) * (1 + mirrored), classifier[1][1]
    z = torch.empty(n, linear.in_features // 16, 4, 4, dtype=torch.half, device=images.device)
    logits = torch.empty(n, linear.out_features, device=images.device)
    with sample_weights(classifier.eval()):
        for index in torch.randperm(n, device=images.device).split(8):
            part = classifier[0](take(images, rows, index))
            z[index], logits[index] = part.half(), classifier[1](part)
    return z, logits


def train_cell(cell, device, args, progress):
    """Train the classifier, draw z, train the VAE, and measure both on held-out faces."""
    s = SETTINGS[args.scale]
    judge = evaluation_classifier(args.scale, args.dataset, args.data_dir, cell["seed"], device)
    torch.manual_seed(cell["seed"])  # only now: not every cell has to train the above
    images, attributes, factors, parts = load_data(args)
    images, attributes = images.to(device), attributes.to(device)
    parts = {name: rows.to(device) for name, rows in parts.items()}
    test = parts["test"][:s["test"]]

    classifier = to_stochastic(face_classifier(s["channels"], attributes.shape[1]).to(device))
    fit_classifier(classifier, images, attributes, parts["classifier"], s["classifier_steps"], s,
                   progress, cell["beta"])
    z = draw_z(classifier, images, parts["train"])[0]
    vae = ConditionalVAE(s["channels"], s["dim_u"]).to(device)
    batches = minibatches(len(z), s["batch"], device)

    def loss_at(t):
        index = next(batches)
        x, known = take(images, parts["train"], index), z[index].float()
        if t < s["kl_warm_up"]:
            u = torch.randn(len(x), s["dim_u"], device=device)
            return vae.nll(x, known, u).mean() / 64**2
        nll, kl = vae(x, known)
        left = max(0, (s["kl_end"] - t) / (s["kl_end"] - s["kl_warm_up"]))
        return (nll + s["kl_weight"] ** left * kl).mean() / 64**2
    fit(vae, loss_at, s["vae_steps"], s, progress)

    z, logits = draw_z(classifier, images, test, mirrored=False)
    y = attributes[test]
    majority = attributes[parts["classifier"]].float().mean(0).round()
    x = take(images, test, torch.arange(len(test), device=device))
    measured, pictures = measure(vae, judge, x, z, y, s["draws"])
    if factors:
        measured["probe"] = {name: probe(z, factor[test.cpu()].to(device))
                             for name, factor in factors.items()}
    save_pictures(picture_path(args, cell), pictures)
    return {"n": len(parts["classifier"]), "information": weight_information(classifier).item(),
            "attribute_acc": hits(logits, y).mean().item(),
            "majority_acc": (y == majority).float().mean().item()} | measured


def hits(logits, y):
    """1 where the sign of a logit is that of the 0/1 attribute, else 0: float (..., n, a)."""
    return ((logits > 0) == y.bool()).float()


def outside_ellipse(size=64):
    """Bool mask (size, size): outside the centred ellipse of FACE_ELLIPSE."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.hypot(axis / FACE_ELLIPSE[0], axis[:, None] / FACE_ELLIPSE[1]) > 1


@torch.no_grad()
def measure(vae, judge, x, z, y, draws):
    """What a row holds of x^ for held-out x (n, 3, 64, 64), and the first faces with two draws."""
    error, votes, nats, pictures = 0, [], [], None
    for x_part, z_part in zip(x.split(100), z.float().split(100)):
        u = torch.randn(draws, len(x_part), vae.projection[0].in_features, device=x.device)
        decoded = torch.stack([vae.decode(z_part, some).clamp(-1, 1) for some in u])
        error += (decoded - x_part).square().mean((0, 2)).sum(0) / len(x)
        votes.append(torch.stack([judge(some.contiguous(memory_format=torch.channels_last))
                                  for some in decoded]))
        nats.append(vae(x_part, z_part)[1])
        if pictures is None:
            pictures = torch.stack([x_part, *decoded[:2]])[:, :SHOWN]
            pictures = pictures.add(1).mul(127.5).round().byte().cpu().numpy()
    return {"reconstruction_mse": error.mean().item(),
            "background_mse": error[outside_ellipse().to(x.device)].mean().item(),
            "kl_u": torch.cat(nats).mean().item(),
            "evaluation_acc": hits(predict(judge, x), y).mean().item(),
            "attribute_agreement": hits(torch.cat(votes, 1), y).mean().item()}, pictures


def probe(z, factor, folds=5):
    """How well a linear probe reads a factor (n,) from z (n, ...): 0 at chance, 1 if always right.

    Cross-validated accuracy of ridge regression on the one-hot classes, above naming the most
    frequent class, as a fraction of what is possible.
    """
    z = z.flatten(1).double()
    z = F.pad((z - z.mean(0)) / (z.std(0) + 1e-6), (0, 1), value=1.0)
    target, fold = F.one_hot(factor).double(), torch.arange(len(z), device=z.device) % folds
    penalty = 0.1 * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    right = 0
    for k in range(folds):
        known, asked = z[fold != k], z[fold == k]
        weights = torch.linalg.solve(known.T @ known + penalty, known.T @ target[fold != k])
        right += ((asked @ weights).argmax(1) == factor[fold == k]).sum().item()
    chance = target.mean(0).max().item()
    return (right / len(z) - chance) / (1 - chance)


def add_derived(rows):
    """The rows that did not diverge, with the error inside the ellipse and means of the probe."""
    outside = outside_ellipse().float().mean().item()
    rows = ok_rows(rows)
    for row in rows:
        inside = row["reconstruction_mse"] - outside * row["background_mse"]
        row["inside_mse"] = inside / (1 - outside)
        row["nats"] = row["information"] / row["n"]
        for kind in ("labelled", "nuisance") if "probe" in row else ():
            row[kind] = np.mean([row["probe"][name] for name in FACE_FACTORS
                                 if (name in NUISANCES) == (kind == "nuisance")])
    return rows


def claims(ok, args):
    """The claims table, over the seeds of which no beta but the reference is missing."""
    betas, table = sorted(beta for beta in GRID[args.scale] if beta > 0), []
    rows = complete_seeds(ok, [{"beta": beta} for beta in betas])
    if not rows:
        return table

    def at(key, beta):  # of each seed
        return np.array([row[key] for row in ok_rows(rows, beta=beta)])

    def ratio(key):
        return at(key, betas[-1]) / at(key, betas[0])

    span = f"from β = {betas[0]:g} to {betas[-1]:g}"
    if args.dataset == "synthetic":
        kept, left = ratio("labelled"), ratio("nuisance")
        table.append(claim(
            f"labelled factors keep more of what a probe reads from z, {span}, than nuisances",
            "attributes stay, the rest fades", f"labelled {fmt(kept, '{:.0%}')}; nuisances "
            f"{fmt(left, '{:.0%}')}", all(kept > left)))
    if args.scale == "demo":  # its decoder is trained too briefly to decide the rest
        return table
    outside, inside = ratio("background_mse"), ratio("inside_mse")
    table.append(claim(f"the error of the background grows by half or more {span}", "grows",
                       f"ratio {fmt(outside)}", outside.min() >= 1.5))
    table.append(claim("and by more than the error inside the ellipse", "grows more",
                       f"outside {fmt(outside)}; inside {fmt(inside)}", all(outside > inside)))
    agreement = np.array([at("attribute_agreement", beta) for beta in betas])
    majority = at("majority_acc", betas[0])
    table.append(claim("attribute agreement is above naming each attribute's majority at every β",
                       "not shown", f"least {fmt(agreement.min(0), '{:.1%}')}; majority "
                       f"{fmt(majority, '{:.1%}')}", (agreement > majority).all()))
    kept = (agreement[-1] - majority) / (agreement[0] - majority)
    table.append(claim(f"and keeps 90% of its excess over the majority {span}", "attributes stay",
                       fmt(kept, "{:.0%}"), kept.min() >= 0.9))
    return table


def picture_path(args, cell):
    stem = f"{args.figure}-{args.scale}-{args.dataset}"
    return args.out / f"{stem}-beta{cell['beta']:g}-seed{cell['seed']}-faces.npz"


def save_pictures(path, pictures):
    """Write (x, first draw, second draw), uint8 (3, faces, 3, 64, 64), in one step."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez(temporary, pictures=pictures)
    os.replace(temporary, path)


def plot_faces(ok, args):
    """Held-out faces in rows: the original, then for each beta two draws of u, of one seed."""
    cells = [row for row in ok if row["seed"] == ok[0]["seed"] and picture_path(args, row).exists()]
    cells.sort(key=lambda row: row["beta"])
    if not cells:
        return
    pictures = [np.load(picture_path(args, row))["pictures"] for row in cells]
    columns = [pictures[0][0], *(draw for some in pictures for draw in some[1:])]
    fig, axes = new_figure(1, 1, f"Held-out faces ({args.dataset}), two draws of u for each β")
    fig.set_size_inches(16, 8)
    ax = axes[0, 0]
    ax.imshow(rearrange(np.stack(columns), "column row c h w -> (row h) (column w) c"))
    ax.set_xticks([32, *(128 + 128 * i for i in range(len(cells)))],
                  ["x", *(f"β = {row['beta']:g}" for row in cells)])
    ax.set_yticks([])
    ax.grid(False)
    fig.savefig(args.out / f"{args.figure}-{args.scale}-faces.png", dpi=100)


def plot(ok, args):
    fig, axes = new_figure(1, 4 if "probe" in ok[0] else 3,
                           f"Fig. 5: {args.dataset}, scale {args.scale}, seeds "
                           f"{sorted({row['seed'] for row in ok})}; dotted: β = 0, no penalty")

    def curve(ax, key, label, colour):
        points = summarise(ok, "beta", key)
        plot_points(ax, [p for p in points if p[0] > 0], color=colour, label=label)
        if points[0][0] == 0:
            ax.axhline(points[0][1], color=colour, lw=0.8, ls=":")

    attribute_ax, error_ax, nats_ax, *probe_ax = axes[0]
    curve(attribute_ax, "attribute_acc", "read from z", "C0")
    curve(attribute_ax, "attribute_agreement", "seen in x̂ by the evaluation classifier", "C1")
    for key, label, colour in (("majority_acc", "each attribute's majority", "0.6"),
                               ("evaluation_acc", "seen in x by the same", "0.3")):
        attribute_ax.axhline(np.mean([row[key] for row in ok]), color=colour, ls="-.", label=label)
    curve(error_ax, "background_mse", "outside the ellipse", "C3")
    curve(error_ax, "inside_mse", "inside", "C0")
    curve(nats_ax, "kl_u", "KL of u: what u has to say", "C2")
    curve(nats_ax, "nats", "information in the weights, per face", "C0")
    attribute_ax.set(ylabel="accuracy", title="attributes")
    error_ax.set(ylabel="mean (x̂ − x)², pixels in [−1, 1]", ylim=(0, None),
                 title="error of x̂, u from the prior")
    nats_ax.set(yscale="log", ylabel="nats per face", title="nats: u says what z does not")
    for ax in probe_ax:
        curve(ax, "labelled", "factors that attributes tell", "C0")
        curve(ax, "nuisance", "nuisances", "C3")
        ax.set(ylabel="above chance, 1: always right", title="factors, read from z by a probe")
    betas = sorted({row["beta"] for row in ok} - {0})
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="β")
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
        ax.legend()
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = [{"beta": beta} for beta in GRID[args.scale]]
    rows = run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data)
    ok = add_derived(rows)
    plot(ok, args)
    plot_faces(ok, args)
    save_tables(args, claims=claims(ok, args))


if __name__ == "__main__":
    main()
