"""Fig. 5: the higher the price of information, the less a representation remembers of a face beyond its attributes.

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 1.8 to 2.3 minutes on 2 cores
    python fig5_celeba_vae.py --scale cpu      # the CelebA that data/ holds, about 40 minutes a seed on 2 cores
    python fig5_celeba_vae.py --gpu 0          # CelebA, all of it (written for it, not yet run on one)

A convolutional classifier of a face's attributes is trained with L = cross-entropy + beta/N * I(w;D); z, its last map
before the read-out, is drawn from p(z|x) with the noise on. With the classifier frozen, a conditional VAE p(x^|z,u),
q(u|x,z), u ~ N(0, I) learns to paint the face; the paper has a GAN with a reconstruction term. On held-out faces u is
drawn anew from the prior: what z does not hold is invented. Expected (paper, Fig. 5, pictures without numbers): at
small beta x^ is the face with its background; at large beta the attributes stay, background, hair style and the rest
are new. Measured at cpu scale, two seeds: from beta = 0.03 to 0.7 the error of the background grows by 61% and 39%
(that of the face no less), agreement on the attributes falls from 88.0% to 86.8%. The demo shows it in z, read by a
probe; its VAE trains too briefly to show it in x^, and the claims say so.

What is measured, on held-out faces: errors and spreads of x^ in pixels from -1 to 1, the background being what lies
outside a centred ellipse; attribute agreement: whether a judge, a classifier without noise and trained on other faces,
sees in x^ the attributes of x; the nats that u has to carry, and the evidence bound on log p(x|z), whose fall from one
beta to the next is that of I(x;z) if the bound is equally tight at both. beta = 0 is the reference: noise without a
price. On synthetic faces every factor is known, and a linear probe reads each of them, labelled or nuisance, from z.

The picture shows held-out faces above the curves. Real faces do not go into it but into <out>/*-faces.png, .pdf and
.npz, which git ignores.
"""
import copy
import functools
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (FACE_ATTRIBUTES, FACE_ELLIPSE, FACE_FACTORS, annealed, claim, complete_seeds, ib_loss, load_celeba,
                    minibatches, new_figure, parse_args, per_seed, plot_points, predict, print_claims, run_grid,
                    sample_weights, save_figure, summarise, synthetic_faces, to_stochastic, weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. `channels` are those of the maps of 32x32 to 4x4, the last one z; `synthetic` the numbers of faces drawn for
# training and for testing where the data are synthetic; `test` the most held-out faces to measure on.
# ----------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "demo": dict(betas=(0.03, 0.3, 1.0), channels=(12, 24, 48, 32), dim_u=32, synthetic=(3000, 1000), test=1000,
                 judge_steps=200, classifier_steps=500, vae_steps=450, batch=32),
    "cpu": dict(betas=(0.0, 0.03, 0.1, 0.3, 0.5, 0.7), channels=(24, 48, 96, 64), dim_u=128, synthetic=(10_000, 2000),
                test=2000, judge_steps=1000, classifier_steps=1500, vae_steps=3000, batch=64),
    "paper": dict(betas=(0.0, 0.03, 0.1, 0.3, 0.5, 0.7), channels=(64, 128, 256, 128), dim_u=256,
                  synthetic=(20_000, 4000), test=4000, judge_steps=10_000, classifier_steps=20_000, vae_steps=60_000,
                  batch=128),
}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["celeba", "synthetic"], "paper": ["celeba", "synthetic"]}
LR, LR_NOISE = 2e-3, 0.04  # Adam's learning rates of the means and of log sigma^2
# The VAE first learns to read z, which is free: for the first BLIND of its steps u knows nothing of x, then a nat of u
# costs PRICE, which falls to the 1 of the evidence bound by FULL of the steps. Else u says again what z holds.
BLIND, PRICE, FULL = 0.4, 100, 0.8
DRAWS, SHOWN = 4, 6  # draws of u for each held-out face, and held-out faces in the picture
NUISANCES = ("hair_style", "background", "pose")  # factors of the synthetic faces that no attribute tells
# Attributes in two panels of the plot; the rows have all 40.
FACE_LIKE = ("Male", "Smiling", "Eyeglasses", "Blond_Hair", "Black_Hair", "Wearing_Lipstick")
OTHERS = ("Wavy_Hair", "Wearing_Hat", "Wearing_Necktie", "Wearing_Earrings", "Blurry")


# ----------------------------------------------------------------------------------------------------------------------
# Data. Images stay uint8 and are normalised batch by batch: the 202,599 of CelebA take 2.5 GB, in every process (use
# --jobs 1 where that is too much), the z of those for training 1.3.
# ----------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def load_faces(dataset, data_dir, n_train, n_test):
    """All faces, read once a process: (images uint8 [n, 3, 64, 64], attributes uint8 [n, a], names, factors, parts).

    dataset: "celeba", or "synthetic", n_train + n_test faces drawn by code with their factors (None for CelebA). parts:
    rows of "train" (the official part), of "judge" (a third of it and the validation part), of "classifier" (the rest
    of "train") and of "test", in an order that is always the same.
    """
    if dataset == "synthetic":
        images, attributes, factors = synthetic_faces(n_train + n_test, seed=0)
        names, partition = list(FACE_ATTRIBUTES), 2 * (torch.arange(len(images)) >= n_train)
    else:
        (images, attributes, names, partition), factors = load_celeba(data_dir), None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part] for part in range(3))
    third = len(train) // 3
    parts = {"train": train, "judge": torch.cat([train[:third], validation]), "classifier": train[third:], "test": test}
    return images, attributes, names, factors, parts


def load_data(args):
    return load_faces(args.dataset, args.data_dir, *SETTINGS[args.scale]["synthetic"])


def take(images, rows, index):
    """Float batch from -1 to 1 of the images in these rows; index: places in rows, and beyond len(rows) their mirror
    images."""
    x = images[rows[index % len(rows)]]
    x = torch.where((index < len(rows)).view(-1, 1, 1, 1), x, x.flip(3))
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------
def encoder(channels, norm):
    """Convolutions with stride 2: (n, 3, 64, 64) -> (n, channels[-1], 4, 4)."""
    layers = []
    for before, after in zip((3, *channels), channels):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), norm(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def face_classifier(channels, attributes):
    """Two parts: x -> z (n, channels[-1], 4, 4), and the read-out z -> logits (n, attributes).

    Group normalisation treats each face by itself: noise on the weights acts alike in training and when z is drawn.
    """
    read_out = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels[-1], attributes))
    model = nn.Sequential(encoder(channels, lambda c: nn.GroupNorm(4, c)), read_out)
    return model.to(memory_format=torch.channels_last)


class ConditionalVAE(nn.Module):
    """p(x^|z,u) and q(u|x,z) with u ~ N(0, I), (n, dim_u): u says what z (n, channels[-1], 4, 4) does not.

    The likelihood is Gaussian with one learned variance a colour, which weighs errors in pixels against nats of u. q
    has one variance a dimension, and means normalised so that over all faces u has the prior's mean and variance: else
    draws from the prior are not what the decoder was trained on.
    """

    def __init__(self, channels, dim_u):
        super().__init__()
        c1, c2, c3, c4 = channels
        self.look = encoder(channels, nn.BatchNorm2d)
        self.posterior = nn.Sequential(nn.Linear(32 * c4, dim_u, bias=False), nn.BatchNorm1d(dim_u, affine=False))
        self.logit_sigma2 = nn.Parameter(torch.zeros(dim_u))
        self.lay_out = nn.Sequential(nn.Linear(dim_u, 16 * c4), nn.Unflatten(1, (c4, 4, 4)))
        layers = [nn.Conv2d(2 * c4, c3, 3, padding=1, bias=False), nn.BatchNorm2d(c3), nn.LeakyReLU(0.2)]
        for before, after in ((c3, c3), (c3, c2), (c2, c1)):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.paint = nn.Sequential(*layers, nn.ConvTranspose2d(c1, 3, 4, 2, 1))
        self.log_sigma2 = nn.Parameter(torch.full((3, 1, 1), -2.0))
        self.to(memory_format=torch.channels_last)

    def decode(self, z, u):
        """Mean of p(x|z,u): (n, 3, 64, 64)."""
        return self.paint(torch.cat([z, self.lay_out(u)], 1))

    def nll(self, x, z, u):
        """-log p(x|z,u) of each face: (n,), nats."""
        error = (x - self.decode(z, u)) ** 2
        return 0.5 * (error / self.log_sigma2.exp() + self.log_sigma2 + np.log(2 * np.pi)).sum((1, 2, 3))

    def forward(self, x, z):
        """(-log p(x|z,u), KL(q(u|x,z) || N(0, I))) of each face, u drawn from q: two (n,) tensors, nats."""
        sigma2 = self.logit_sigma2.sigmoid()
        mean = (1 - sigma2).sqrt() * self.posterior(torch.cat([self.look(x), z], 1).flatten(1))
        u = mean + sigma2.sqrt() * torch.randn_like(mean)
        return self.nll(x, z, u), 0.5 * (mean**2 + sigma2 - sigma2.log() - 1).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def fit(model, loss_at, steps, progress):
    """Adam; loss_at(t) is the loss on the next minibatch, t the share of the steps gone. Learning rate held from 10% to
    80% of the steps, then brought to 0 by a cosine."""
    log_variances = [p for name, p in model.named_parameters() if name.endswith("sigma2")]
    others = [p for name, p in model.named_parameters() if not name.endswith("sigma2")]
    optimizer = torch.optim.Adam([{"params": others, "lr": LR}, {"params": log_variances, "lr": LR_NOISE}], fused=True)
    model.train()
    for step in range(steps):
        t = step / steps
        for group, lr in zip(optimizer.param_groups, (LR, LR_NOISE)):
            group["lr"] = lr * annealed(t)
        loss = loss_at(t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    model.eval()


def fit_classifier(model, images, attributes, rows, steps, batch, progress, beta=None):
    """Train on these rows and their mirror images; beta=None: a plain network, no noise and no price. beta is raised
    linearly from 0 over the first 40% of the steps."""
    batches = minibatches(2 * len(rows), batch, images.device)

    def loss_at(t):
        index = next(batches)
        logits, target = model(take(images, rows, index)), attributes[rows[index % len(rows)]]
        if beta is None:
            return F.binary_cross_entropy_with_logits(logits, target.float(), reduction="sum") / len(index)
        return ib_loss(logits, target, model, beta * min(1, t / 0.4), len(rows))[0]
    fit(model, loss_at, steps, progress)


@functools.lru_cache(maxsize=1)
def train_judge(scale, dataset, data_dir, seed, device):
    """A classifier without noise, on other faces and from another seed than z's classifier; once a process and seed."""
    s = SETTINGS[scale]
    torch.manual_seed(seed + 1_000_000)
    images, attributes, names, _, parts = load_faces(dataset, data_dir, *s["synthetic"])
    judge = face_classifier(s["channels"], len(names)).to(device)
    fit_classifier(judge, images.to(device), attributes.to(device), parts["judge"].to(device), s["judge_steps"],
                   s["batch"], progress=lambda *_: None)
    return judge


@torch.no_grad()
def draw_z(classifier, images, rows, mirrored=True):
    """z ~ p(z|x) and the logits read from it, of every row, then of the mirror images: half [(2)n, c, 4, 4], [(2)n, a].

    Each is an exact draw: weights are sampled anew for every eight faces, which are thrown together at random.
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
    """Train the classifier, draw z, train the VAE, and measure on held-out faces; a sample of them goes to a file."""
    s = SETTINGS[args.scale]
    judge = train_judge(args.scale, args.dataset, args.data_dir, cell["seed"], device)
    torch.manual_seed(cell["seed"])  # after the judge, which not every cell has to train
    images, attributes, names, factors, parts = load_data(args)
    images, attributes = images.to(device), attributes.to(device)
    parts = {name: rows.to(device) for name, rows in parts.items()}
    test = parts["test"][:s["test"]]

    classifier = to_stochastic(face_classifier(s["channels"], len(names)).to(device))
    fit_classifier(classifier, images, attributes, parts["classifier"], s["classifier_steps"], s["batch"], progress,
                   cell["beta"])
    z = draw_z(classifier, images, parts["train"])[0]
    vae = ConditionalVAE(s["channels"], s["dim_u"]).to(device)
    batches = minibatches(len(z), s["batch"], device)

    def loss_at(t):
        index = next(batches)
        x, known = take(images, parts["train"], index), z[index].float()
        if t < BLIND:
            return vae.nll(x, known, torch.randn(len(x), s["dim_u"], device=device)).mean() / 64**2
        nll, kl = vae(x, known)
        return (nll + PRICE ** max(0, (FULL - t) / (FULL - BLIND)) * kl).mean() / 64**2
    fit(vae, loss_at, s["vae_steps"], progress)

    z, logits = draw_z(classifier, images, test, mirrored=False)
    y, majority = attributes[test], attributes[parts["classifier"]].float().mean(0).round()
    row = {"n": len(parts["classifier"]), "information": weight_information(classifier).item(),
           "attribute_acc": hits(logits, y).mean().item(), "balanced_acc": balanced(hits(logits, y), y).mean().item(),
           "majority_acc": (y == majority).float().mean().item()}
    measured, pictures = measure(vae, judge, take(images, test, torch.arange(len(test), device=device)), z, y, names)
    if factors:
        measured["probe"] = {name: probe(z, code[test.cpu()].to(device)) for name, code in factors.items()}
    save_pictures(picture_path(args, cell), pictures)
    return row | measured


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------
def hits(logits, y):
    """1 where the sign of a logit is that of the 0/1 attribute, else 0: float (..., n, a)."""
    return ((logits > 0) == y.bool()).float()


def balanced(hit, y):
    """Balanced accuracy of each attribute, (a,): the mean of those of its two classes, whichever of them occur in y."""
    hit = hit.reshape(-1, *y.shape).mean(0)
    return torch.stack([(hit * of).sum(0) / of.sum(0) for of in (y.float(), 1 - y.float())]).nanmean(0)


def outside_ellipse(size=64):
    """Bool mask (size, size): outside the centred ellipse of FACE_ELLIPSE."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.hypot(axis / FACE_ELLIPSE[0], axis[:, None] / FACE_ELLIPSE[1]) > 1


@torch.no_grad()
def measure(vae, judge, x, z, y, names):
    """What a row holds of the pictures x^ for held-out x (n, 3, 64, 64), and the first faces with two draws, uint8."""
    error, variance, votes, nats, pictures = 0, 0, [], [], None
    for x_part, z_part in zip(x.split(100), z.float().split(100)):
        u = torch.randn(DRAWS, len(x_part), vae.lay_out[0].in_features, device=x.device)
        draws = torch.stack([vae.decode(z_part, some).clamp(-1, 1) for some in u])
        error += (draws - x_part).square().mean((0, 2)).sum(0) / len(x)
        variance += draws.var(0).mean(1).sum(0) / len(x)
        votes.append(torch.stack([judge(some.contiguous(memory_format=torch.channels_last)) for some in draws]))
        nats.append(torch.stack(vae(x_part, z_part)))
        if pictures is None:
            pictures = torch.stack([x_part, *draws[:2]])[:, :SHOWN].add(1).mul(127.5).round().byte()
    agree, outside = hits(torch.cat(votes, 1), y), outside_ellipse().to(x.device)
    nll, kl = torch.cat(nats, 1).mean(1)
    by_attribute, by_class = agree.mean((0, 1)), balanced(agree, y)
    return {"reconstruction_mse": error.mean().item(), "background_mse": error[outside].mean().item(),
            "sample_spread": variance.mean().sqrt().item(), "spread_inside": variance[~outside].mean().sqrt().item(),
            "spread_outside": variance[outside].mean().sqrt().item(), "kl_u": kl.item(), "elbo": -(nll + kl).item(),
            "judge_acc": hits(predict(judge, x), y).mean().item(), "attribute_agreement": agree.mean().item(),
            "balanced_agreement": by_class.mean().item(), "agreement": dict(zip(names, by_attribute.tolist())),
            "agreement_balanced": dict(zip(names, by_class.tolist()))}, pictures.cpu().numpy()


def probe(z, factor, folds=5):
    """How well a linear probe reads a factor, classes (n,), from z (n, ...): 0 at chance, 1 where it is never wrong.

    Accuracy of ridge regression on the one-hot classes, cross-validated, less that of naming the most frequent class,
    as a share of what is possible. Linear: z may hold more.
    """
    z = z.flatten(1).double()
    z = F.pad((z - z.mean(0)) / (z.std(0) + 1e-6), (0, 1), value=1.0)
    target, fold = F.one_hot(factor).double(), torch.arange(len(z), device=z.device) % folds
    penalty, right = 0.1 * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device), 0
    for k in range(folds):
        known, asked = z[fold != k], z[fold == k]
        weights = torch.linalg.solve(known.T @ known + penalty, known.T @ target[fold != k])
        right += ((asked @ weights).argmax(1) == factor[fold == k]).sum().item()
    chance = target.mean(0).max().item()
    return (right / len(z) - chance) / (1 - chance)


# ----------------------------------------------------------------------------------------------------------------------
# What the rows say
# ----------------------------------------------------------------------------------------------------------------------
def claims(rows, args):
    """The claims table, over seeds of which no beta but the reference is missing; real and synthetic faces differ."""
    betas = sorted(beta for beta in SETTINGS[args.scale]["betas"] if beta > 0)
    some = complete_seeds(rows, [{"beta": beta} for beta in betas])
    span = f"from β = {betas[0]:g} to {betas[-1]:g}"

    def curves(value):  # (seeds, betas)
        return per_seed(lambda rows: [value({r["beta"]: r for r in rows}[beta]) for beta in betas],
                        some).reshape(-1, len(betas))

    background, spread, agreement = (curves(lambda r: r[key]) for key in ("background_mse", "spread_outside",
                                                                          "attribute_agreement"))
    share = outside_ellipse().float().mean().item()
    inside = curves(lambda r: (r["reconstruction_mse"] - share * r["background_mse"]) / (1 - share))
    table = [claim(f"the error of the background grows by half or more {span}", "grows",
                   {"ratio": background[:, -1] / background[:, 0]}, lambda v: v.min() >= 1.5, "{:.2f}"),
             claim("and by more than the error inside the ellipse", "grows more",
                   {"outside": background[:, -1] / background[:, 0], "inside": inside[:, -1] / inside[:, 0]},
                   lambda v: (background[:, -1] / background[:, 0] > inside[:, -1] / inside[:, 0]).all(), "{:.2f}"),
             claim(f"draws of u spread more outside the ellipse {span}", "more",
                   {f"β = {beta:g}": spread[:, place] for place, beta in ((0, betas[0]), (-1, betas[-1]))},
                   lambda v: (spread[:, -1] > spread[:, 0]).all())]
    if args.dataset == "synthetic":
        labelled = [name for name in FACE_FACTORS if name not in NUISANCES]
        read = [curves(lambda r: np.mean([r["probe"][name] for name in names])) for names in (labelled, NUISANCES)]
        stay, fade = (np.where(c[:, 0] > 0.05, c[:, -1] / c[:, 0], np.nan) for c in read)  # nan: nothing to lose
        return table + [
            claim(f"labelled factors keep a larger share of what a probe reads from z, {span}, than nuisances "
                  f"({', '.join(NUISANCES)})", "attributes stay, the rest fades", {"labelled": stay, "nuisances": fade},
                  lambda v: (stay > fade).all(), "{:.0%}"),
            claim("and nuisances lose half or more of it", "fade", {"nuisances": fade}, lambda v: v.max() <= 0.5,
                  "{:.0%}")]
    fall = agreement[:, 0] - agreement.min(1)
    majority = curves(lambda r: r["majority_acc"])
    against = {name: [against_trend(sign * values)] for name, sign, values in (
        ("background error", 1, background), ("spread outside", 1, spread), ("agreement", -1, agreement)) if len(some)}
    return table + [
        claim("attribute agreement stays over 80% and falls by less than 5 points", "attributes stay",
              {"least": agreement.min(1), "fall": fall}, lambda v: agreement.min() > 0.8 and fall.max() < 0.05,
              "{:.1%}"),
        claim("attribute agreement is over naming each attribute's majority, at every β", "not shown",
              {"least": agreement.min(1), "majority": majority[:, 0]}, lambda v: (agreement > majority).all(),
              "{:.1%}"),
        claim("the curves rise (agreement: falls) monotonely within the seeds' spread; largest step against that, less "
              "the spread", "not shown", against, lambda v: v.max() <= 0, "{:.2g}")]


def against_trend(curves):
    """The largest step down of the mean of rising curves (seeds, betas), less the spread of its two ends."""
    mean, spread = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1])
    return (mean[:-1] - mean[1:] - np.hypot(spread[:-1], spread[1:])).max()


# ----------------------------------------------------------------------------------------------------------------------
# Plot
# ----------------------------------------------------------------------------------------------------------------------
def picture_path(args, cell):
    stem = f"{args.figure}-{args.scale}-{args.dataset}"
    return args.out / f"{stem}-beta{cell['beta']:g}-seed{cell['seed']}-faces.npz"


def save_pictures(path, pictures):
    """Write (x, first draw, second draw), uint8 [3, faces, 3, 64, 64], in one step."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez(temporary, pictures=pictures)
    os.replace(temporary, path)


def plot(rows, args):
    good = [r for r in rows if r["status"] == "ok"]
    pictures = read_pictures(good, args)
    with_faces = bool(pictures) and args.dataset == "synthetic"
    title = f"Fig. 5: {args.dataset}, scale {args.scale}, seeds {sorted({r['seed'] for r in good})}"
    fig, axes = new_figure(2, 3 + 2 * with_faces, title)
    plot_curves(list(axes[:, -3:].flat), good)
    if with_faces:
        for ax in axes[:, :2].flat:
            ax.remove()
        plot_faces(fig.add_subplot(axes[0, 0].get_gridspec()[:, :2]), pictures)
    save_figure(fig, args)
    if pictures and not with_faces:
        fig, axes = new_figure(1, 1, title)
        fig.set_size_inches(16, 8)
        plot_faces(axes[0, 0], pictures)
        apart = copy.copy(args)
        apart.scale += "-faces"
        print("real faces, drawn apart and not for git:")
        save_figure(fig, apart)


def read_pictures(rows, args):
    """{beta: what save_pictures wrote} of the first seed, for the cells whose file is there."""
    seed = min(r["seed"] for r in rows)
    paths = {r["beta"]: picture_path(args, r) for r in sorted(rows, key=lambda r: r["beta"]) if r["seed"] == seed}
    return {beta: np.load(path)["pictures"] for beta, path in paths.items() if path.exists()}


def plot_faces(ax, pictures):
    """Held-out faces in rows: the original, then for each beta two draws of u."""
    columns = [next(iter(pictures.values()))[0], *(draw for some in pictures.values() for draw in some[1:])]
    ax.imshow(rearrange(np.stack(columns), "column row c h w -> (row h) (column w) c"))
    ax.set_xticks([32, *(128 + 128 * i for i in range(len(pictures)))], ["x", *(f"β = {b:g}" for b in pictures)])
    ax.set_yticks([])
    ax.grid(False)
    ax.set_title("held-out faces, and two draws of u for each β")


def plot_curves(axes, rows):
    """Six panels over beta; the dotted lines are the reference, beta = 0."""
    attributes, error, spread, nats, *survivors = axes
    synthetic = "probe" in rows[0]
    best = {seed: max(r["elbo"] for r in rows if r["seed"] == seed) for seed in {r["seed"] for r in rows}}

    def curve(ax, value, label, colour, fmt="o-"):
        points = summarise([dict(r, value=value(r)) for r in rows], "beta", "value")
        plot_points(ax, [p for p in points if p[0] > 0], fmt=fmt, color=colour, label=label)
        if points[0][0] == 0:
            ax.axhline(points[0][1], color=colour, lw=0.8, ls=":")

    for ax, key, label, colour, fmt in (
            (attributes, "attribute_acc", "read from z", "C0", "o-"),
            (attributes, "balanced_acc", "read from z, balanced", "C0", "s--"),
            (attributes, "attribute_agreement", "seen in x̂ by the judge", "C1", "o-"),
            (attributes, "balanced_agreement", "seen in x̂, balanced", "C1", "s--"),
            (error, "background_mse", "outside the ellipse", "C3", "o-"),
            (error, "reconstruction_mse", "whole picture", "C7", "o-"),
            (spread, "spread_outside", "outside the ellipse", "C3", "o-"),
            (spread, "spread_inside", "inside", "C0", "o-"),
            (nats, "kl_u", "KL of u: what u has to say", "C2", "o-")):
        curve(ax, lambda r: r[key], label, colour, fmt)
    for key, label, colour in (("majority_acc", "each attribute's majority", "0.6"),
                               ("judge_acc", "seen in x by the judge", "0.3")):
        attributes.axhline(np.mean([r[key] for r in rows]), color=colour, ls="-.", label=label)
    curve(nats, lambda r: best[r["seed"]] - r["elbo"], "−log p(x|z) ≤ this + a constant", "C4")
    curve(nats, lambda r: r["information"] / r["n"], "information in the weights, per face", "C0")
    attributes.set(ylabel="accuracy (a fraction)", title="attributes")
    error.set(ylabel="mean (x̂ − x)², pixels in [−1, 1]", title="error of x̂, u from the prior")
    spread.set(ylabel="standard deviation over draws of u", title="spread of x̂")
    nats.set(yscale="symlog", ylabel="nats a face", title="nats: u says what z does not")
    nats.set_ylim(bottom=0)
    if synthetic:
        panels = [(n for n in FACE_FACTORS if n not in NUISANCES), NUISANCES]
        titles = ["factors that attributes tell, read from z", "nuisances, read from z"]
    else:
        panels, titles = (FACE_LIKE, OTHERS), ["which attributes survive in x̂", "and which of these"]
    for ax, names, title in zip(survivors, panels, titles):
        for i, name in enumerate(name for name in names if synthetic or name in rows[0]["agreement"]):
            curve(ax, lambda r: r["probe" if synthetic else "agreement_balanced"][name], name.replace("_", " "),
                  f"C{i}")
        ax.set(ylabel="accuracy above chance, 1: always right" if synthetic else "balanced agreement of x̂ with x",
               title=title)
    betas = sorted({r["beta"] for r in rows} - {0})
    for ax in axes:
        ax.set(xscale="log", xlabel="β (dotted: β = 0)" if any(r["beta"] == 0 for r in rows) else "β")
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
        if ax.get_legend_handles_labels()[0]:
            ax.legend()


# ----------------------------------------------------------------------------------------------------------------------
def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid([{"beta": beta} for beta in SETTINGS[args.scale]["betas"]], train_cell, args, load_data)
    plot(rows, args)
    print_claims(claims(rows, args))


if __name__ == "__main__":
    main()
