"""Fig. 5: the larger beta, the less a representation keeps of a face beyond its attributes.

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 2 minutes on 2 cores
    python fig5_celeba_vae.py --scale cpu      # the CelebA in data/, 45 minutes per seed on 2 cores
    python fig5_celeba_vae.py --gpu 0          # CelebA, all of it (not yet run on a GPU)

A classifier of a face's attributes is trained with L = cross-entropy + beta/N * I(w;D). From its
last map z, drawn from p(z|x) with noise, a conditional VAE learns to decode the face (the paper: a
GAN); u ~ N(0, I) stands for what z does not hold. The paper, in pictures: at small beta the decoded
x^ is the face with its background; at large beta the attributes stay, the rest is new. Measured on
held-out faces of CelebA: from beta = 0.03 to 0.7 the error of the background grows by half, that of
the face no less; an evaluation classifier, without noise and trained on other faces, sees 88.0%,
then 86.8% of the attributes in x^. Pictures: <out>/*-faces.png.
"""
import functools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image

from common import (FACE_ELLIPSE, accuracy, claim, complete_seeds, fmt, ib_loss, load_celeba,
                    lr_factor, minibatches, new_figure, ok_rows, param_groups, parse_args, per_seed,
                    plot_points, run_grid, sample_weights, save_figure, save_tables, summarise,
                    synthetic_faces, to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row. `channels`: of the maps from 32x32
# to 4x4, the last one z; `synthetic`: training and test faces drawn by code; `draws` of u per face.
# KL warm-up: u is drawn from the prior for kl_warm_up of the steps, then a nat of u costs
# kl_weight, falling to 1 at kl_end. Without it the decoder ignores z.
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
BETAS = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7)  # 0: no penalty, the reference
GRID = {"demo": (0.03, 0.3, 1.0), "cpu": BETAS, "paper": BETAS}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}
REAL = ["celeba", "synthetic"]
DATASETS = {"demo": ["synthetic"], "cpu": REAL, "paper": REAL}
PROBED = {"probe_labelled": ("hair_colour", "skin", "glasses", "smile", "beard"),
          "probe_nuisances": ("hair_style", "background", "pose")}
axis = (torch.arange(64) + 0.5) / 32 - 1
BACKGROUND = torch.hypot(axis / FACE_ELLIPSE[0], axis[:, None] / FACE_ELLIPSE[1]) > 1  # (64, 64)


def load_data(args, device=torch.device("cpu")):
    return load_faces(args.scale, args.dataset, args.data_dir, device)


@functools.lru_cache(maxsize=1)
def load_faces(scale, dataset, data_dir, device):
    """Images uint8 (n, 3, 64, 64), attributes (n, a), factors {name: (n,)}, rows {part: (m,)}."""
    if dataset == "synthetic":
        n_train, n_test = SETTINGS[scale]["synthetic"]
        images, attributes, factors = synthetic_faces(n_train + n_test, seed=0)
        partition = 2 * (torch.arange(len(images)) >= n_train)
    else:
        (images, attributes, _, partition), factors = load_celeba(data_dir), {}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part].to(device) for part in range(3))
    third = len(train) // 3
    return images.to(device), attributes.to(device), factors, {
        "train": train, "evaluation": torch.cat([train[:third], validation]),
        "classifier": train[third:], "test": test}


def take(images, rows, index):
    """Images rows[index], from -1 to 1; an index beyond len(rows) gives a mirror image."""
    x = images[rows[index % len(rows)]]
    x = torch.where((index < len(rows)).view(-1, 1, 1, 1), x, x.flip(3))
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def scaled(convolution, channels, norm):
    """Convolutions that halve the sides (nn.Conv2d) or double them (nn.ConvTranspose2d)."""
    layers = []
    for before, after in zip(channels, channels[1:]):
        layers += [convolution(before, after, 4, 2, 1, bias=False), norm(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class ConditionalVAE(nn.Module):
    """p(x^|z,u), with a variance per colour, and q(u|x,z), with a variance per dimension of u.

    The means of q are normalised: over all faces u has the prior's mean and variance.
    """

    def __init__(self, channels, dim_u):
        super().__init__()
        c1, c2, c3, c4 = channels
        self.encoder = scaled(nn.Conv2d, (3, *channels), nn.BatchNorm2d)
        self.posterior = nn.Sequential(nn.Linear(32 * c4, dim_u, bias=False),
                                       nn.BatchNorm1d(dim_u, affine=False))
        self.logit_sigma2 = nn.Parameter(torch.zeros(dim_u))
        self.projection = nn.Sequential(nn.Linear(dim_u, 16 * c4), nn.Unflatten(1, (c4, 4, 4)))
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * c4, c3, 3, padding=1, bias=False), nn.BatchNorm2d(c3), nn.LeakyReLU(0.2),
            scaled(nn.ConvTranspose2d, (c3, c3, c2, c1), nn.BatchNorm2d),
            nn.ConvTranspose2d(c1, 3, 4, 2, 1))
        self.log_sigma2 = nn.Parameter(torch.full((3, 1, 1), -2.0))
        self.to(memory_format=torch.channels_last)

    def decode(self, z, u):
        """Mean of p(x|z,u): (n, 3, 64, 64)."""
        return self.decoder(torch.cat([z, self.projection(u)], 1))

    def nll(self, x, z, u):
        """-log p(x|z,u): (n,), nats."""
        error = (x - self.decode(z, u)) ** 2 / self.log_sigma2.exp()
        return 0.5 * (error + self.log_sigma2 + np.log(2 * np.pi)).sum((1, 2, 3))

    def forward(self, x, z):
        """(-log p(x|z,u), KL(q(u|x,z) || N(0, I))), u from q: two (n,), nats."""
        sigma2 = self.logit_sigma2.sigmoid()
        mean = self.posterior(torch.cat([self.encoder(x), z], 1).flatten(1))
        mean = mean * (1 - sigma2).sqrt()
        u = mean + sigma2.sqrt() * torch.randn_like(mean)
        return self.nll(x, z, u), 0.5 * (mean**2 + sigma2 - sigma2.log() - 1).sum(1)


def fit(model, n, loss_at, steps, s, progress):
    """Minimise loss_at(minibatch of the indices below n, fraction of the steps done) by Adam."""
    model.train()
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    batches = minibatches(n, s["batch"], next(model.parameters()).device)
    for step in range(steps):
        loss = loss_at(next(batches), step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    model.eval()


def train_classifier(images, labels, rows, beta, steps, s, progress, noise=True):
    """A classifier of these rows and their mirror images: x -> z, then the head z -> logits.

    noise=False, beta 0: a plain network. z: (n, channels[-1], 4, 4).
    """
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * s["channels"][-1], labels.shape[1]))
    features = scaled(nn.Conv2d, (3, *s["channels"]), lambda c: nn.GroupNorm(4, c))
    model = nn.Sequential(features, head).to(images.device, memory_format=torch.channels_last)
    to_stochastic(model)

    def loss_at(index, t):
        logits, target = model(take(images, rows, index)), labels[rows[index % len(rows)]]
        return ib_loss(logits, target, model, beta * min(1, t / 0.4), len(rows))[0]
    with sample_weights(model, noise):
        fit(model, 2 * len(rows), loss_at, steps, s, progress)
    return model


@functools.lru_cache(maxsize=1)
def evaluation_classifier(seed, *data):
    """A plain classifier, of other faces and another seed; trained once per process and seed."""
    s = SETTINGS[data[0]]
    torch.manual_seed(seed + 1_000_000)
    images, labels, _, parts = load_faces(*data)
    return train_classifier(images, labels, parts["evaluation"], 0, s["evaluation_steps"], s,
                            progress=lambda *_: None, noise=False)


@torch.no_grad()
def draw_z(classifier, images, rows, n):
    """z ~ p(z|x), half (n, c, 4, 4), and logits (n, a), weights resampled for every eight faces.

    n: len(rows), or twice that, with the mirror images.
    """
    order, z, logits = torch.randperm(n, device=images.device), [], []
    with sample_weights(classifier.eval()):
        for index in order.split(8):
            part = classifier[0](take(images, rows, index))
            z.append(part.half())
            logits.append(classifier[1](part))
    return [torch.cat(parts)[order.argsort()].contiguous() for parts in (z, logits)]


def train_cell(cell, device, args, progress):
    """Train the classifier, draw z, train the VAE, and measure both on held-out faces."""
    s, beta, seed = SETTINGS[args.scale], cell["beta"], cell["seed"]
    evaluator = evaluation_classifier(seed, args.scale, args.dataset, args.data_dir, device)
    torch.manual_seed(seed)  # the above is cached
    images, labels, factors, parts = load_data(args, device)
    rows, train, test = parts["classifier"], parts["train"], parts["test"][:s["test"]]

    classifier = train_classifier(images, labels, rows, beta, s["classifier_steps"], s, progress)
    z, _ = draw_z(classifier, images, train, 2 * len(train))
    vae = ConditionalVAE(s["channels"], s["dim_u"]).to(device)

    def vae_loss(index, t):
        x, known = take(images, train, index), z[index].float()
        if t < s["kl_warm_up"]:
            u = torch.randn(len(x), s["dim_u"], device=device)
            return vae.nll(x, known, u).mean() / 64**2
        nll, kl = vae(x, known)
        left = max(0, (s["kl_end"] - t) / (s["kl_end"] - s["kl_warm_up"]))
        return (nll + s["kl_weight"] ** left * kl).mean() / 64**2
    fit(vae, len(z), vae_loss, s["vae_steps"], s, progress)

    z_test, logits = draw_z(classifier, images, test, len(test))
    x, y = take(images, test, torch.arange(len(test), device=device)), labels[test]
    measured, shown = measure(vae, evaluator, x, z_test, y, s)
    name = f"{args.figure}-{args.scale}-{args.dataset}-beta{beta:g}-seed{seed}-faces.png"
    save_image(shown.cpu(), args.out / name, nrow=3, normalize=True, value_range=(-1, 1))
    for kind, names in PROBED.items() if factors else ():
        measured[kind] = np.mean([probe(z_test, factors[k].to(device)[test]) for k in names])
    frequency = labels[rows].float().mean(0)
    return {"n": len(rows), "information": weight_information(classifier).item(),
            "attribute_acc": agreement(logits, y), "majority_acc": agreement(frequency - 0.5, y),
            } | measured


def agreement(logits, y):
    """Fraction of logits (..., n, a) whose sign is that of the 0/1 attributes y (n, a)."""
    return ((logits > 0) == y.bool()).float().mean().item()


@torch.no_grad()
def measure(vae, evaluator, x, z, y, s):
    """What a row holds of x^ for held-out x, and six x, each with two draws of x^."""
    error, logits, nats = 0, [], []
    for x_part, z_part in zip(x.split(100), z.float().split(100)):
        u = torch.randn(s["draws"], len(x_part), s["dim_u"], device=x.device)
        decoded = [vae.decode(z_part, draw).clamp(-1, 1) for draw in u]
        logits.append(torch.stack([evaluator(draw) for draw in decoded]))
        error += (torch.stack(decoded) - x_part).square().mean((0, 2)).sum(0) / len(x)
        nats.append(vae(x_part, z_part)[1])
    return {"reconstruction_mse": error.mean().item(),
            "background_mse": error[BACKGROUND.to(x.device)].mean().item(),
            "kl_u": torch.cat(nats).mean().item(),
            "attribute_agreement": agreement(torch.cat(logits, 1), y),
            }, torch.stack([x_part, *decoded[:2]], 1)[:6].flatten(0, 1)


def probe(z, factor):
    """How well a linear probe reads a factor (n,) from z (n, ...): 0 at chance, 1 if always right.

    Leave-one-out accuracy of ridge regression on one-hot classes, above that of the largest class.
    """
    z = z.flatten(1).double()
    z = F.pad((z - z.mean(0)) / (z.std(0) + 1e-6), (0, 1), value=1.0)
    target = F.one_hot(factor).double()
    gram = z.T @ z
    gram.diagonal().add_(0.1 * len(z))
    hat = z @ torch.linalg.solve(gram, z.T)
    left_out = target - (target - hat @ target) / (1 - hat.diagonal()[:, None])
    chance = target.mean(0).max().item()
    return (accuracy(left_out, factor) - chance) / (1 - chance)


def add_derived(rows):
    """The rows that did not diverge, with the error inside the ellipse."""
    rows, outside = ok_rows(rows), BACKGROUND.float().mean().item()
    for row in rows:
        inside = row["reconstruction_mse"] - outside * row["background_mse"]
        row["inside_mse"] = inside / (1 - outside)
    return rows


def claims(ok, args):
    """The claims table, over the seeds of which no beta but the reference is missing."""
    betas, table = [beta for beta in GRID[args.scale] if beta > 0], []
    rows = complete_seeds(ok, [{"beta": beta} for beta in betas])
    span = f"from β = {betas[0]:g} to {betas[-1]:g}"

    def ratio(key):
        return per_seed(lambda rows: rows[-1][key] / rows[0][key], rows)

    def add(sentence, paper, holds, form, **ours):
        ours = "; ".join(f"{name} {fmt(v, form)}" for name, v in ours.items())
        table.append(claim(sentence, paper, ours, holds))

    if rows and args.dataset == "synthetic":
        labelled, nuisances = ratio("probe_labelled"), ratio("probe_nuisances")
        add(f"labelled factors keep more of what a probe reads from z than nuisances, {span}",
            "attributes stay", all(labelled > nuisances), "{:.0%}", labelled=labelled,
            nuisances=nuisances)
    if rows and args.scale != "demo":  # whose decoder is trained too briefly to decide these
        outside, inside = ratio("background_mse"), ratio("inside_mse")
        add(f"in every seed the error of the background grows by half or more, {span}", "grows",
            outside.min() >= 1.5, "{:.2f}", ratio=outside)
        add("and by more than the error inside the ellipse", "grows more", all(outside > inside),
            "{:.2f}", outside=outside, inside=inside)
        excess = per_seed(lambda rows: [row["attribute_agreement"] - row["majority_acc"]
                                        for row in rows], rows)
        add("attribute agreement exceeds naming each attribute's majority at every β", "not shown",
            excess.min() > 0, "{:.1%}", least=excess.min(1))
        add(f"and keeps 90% of this excess, {span}", "attributes stay",
            all(excess[:, -1] >= 0.9 * excess[:, 0]), "{:.0%}", kept=excess[:, -1] / excess[:, 0])
    return table


def plot(ok, args):
    panels = {
        "accuracy on the attributes": {
            "attribute_acc": "read from z",
            "attribute_agreement": "seen in x̂ by the evaluation classifier",
            "majority_acc": "naming each attribute's majority"},
        "mean (x̂ − x)², pixels in [−1, 1], u from the prior": {
            "background_mse": "outside the ellipse", "inside_mse": "inside"}}
    if args.dataset == "synthetic":
        panels["read from z by a probe (0: chance, 1: always right)"] = {
            "probe_labelled": "factors that attributes tell", "probe_nuisances": "nuisances"}
    fig, axes = new_figure(1, len(panels), f"Fig. 5: {args.dataset}, scale {args.scale}, "
                           f"{len({row['seed'] for row in ok})} seeds")
    betas = sorted({row["beta"] for row in ok})
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for key, label in curves.items():
            plot_points(ax, summarise(ok, "beta", key), label=label)
        ax.set_xscale("symlog", linthresh=0.03, linscale=0.3)  # shows β = 0
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
        ax.set(xlabel="β", title=title)
        ax.legend()
    axes[0, 1].set_ylim(0)
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = [{"beta": beta} for beta in GRID[args.scale]]
    ok = add_derived(run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data))
    plot(ok, args)
    save_tables(args, claims=claims(ok, args))


if __name__ == "__main__":
    main()
