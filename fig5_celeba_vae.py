"""Fig. 5: the larger beta, the less a representation keeps of a face beyond its attributes.

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 2 minutes on 2 cores
    python fig5_celeba_vae.py --scale cpu      # CelebA, 7 hours on 2 cores
    python fig5_celeba_vae.py --scale cpu --dataset synthetic --out results/synthetic
    python fig5_celeba_vae.py --gpu 0          # all of CelebA

A classifier of a face's attributes is trained with L = cross-entropy + beta/N * I(w;D); z is its
last map, drawn with the noise of its weights. The paper draws faces x^ ~ p(x|z) by a GAN: at small
beta the face with its background, at large beta the attributes stay and the rest is new.

Here p(x|z) is a VAE of faces alone, whose code u has a prior p(u|z) learned by flow matching. The
picture, <out>/*-faces.png: x, then for each beta three draws of one z. What all share with x, z
holds. Measured on held-out faces: from draws, attributes (named in training), hair style, pose and
background (not named), by a classifier trained on other faces; from z, nats by ridge regression.
Control: white noise in z of the smallest beta, which knows no task, in the amount that costs the
attributes as many nats as the penalty does.
"""
import hashlib
import inspect
import os
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (FACE_ELLIPSE, FACE_FACTORS, check, fmt, group_by, ib_loss, load_celeba,
                    lr_factor, minibatches, ok_rows, param_groups, parse_args, per_seed,
                    plot_points, predict, run_grid, sample_weights, save_panels, save_tables,
                    summarise, synthetic_faces, to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row. channels: of the classifier's maps,
# the last one, 4x4, is z; vae, prior: channels, blocks; synthetic: training and test faces drawn
# by code; components: of the pixels, for ridge regression; drawn: test faces with a draw measured.
COMMON = dict(lr=0.002, lr_noise=0.04, lr_prior=0.0015, noise_steps=12)
SETTINGS = {
    "demo": dict(size=32, channels=(16, 32, 32), vae=(32, 48), prior=(48, 1),
                 synthetic=(6000, 1000), batch=32, components=50, drawn=300, classifier_steps=500,
                 evaluator_steps=1000, vae_steps=500, prior_steps=700, draw_steps=12, **COMMON),
    "cpu": dict(size=64, channels=(24, 48, 96, 64), vae=(48, 64), prior=(64, 1),
                synthetic=(15_000, 2000), batch=64, components=100, drawn=500,
                classifier_steps=1500, evaluator_steps=3000, vae_steps=1500, prior_steps=2000,
                draw_steps=20, **COMMON),
    "paper": dict(size=64, channels=(64, 128, 256, 128), vae=(96, 128), prior=(128, 2),
                  synthetic=(30_000, 4000), batch=128, components=200, drawn=4000,
                  classifier_steps=20_000, evaluator_steps=20_000, vae_steps=20_000,
                  prior_steps=60_000, draw_steps=30, **COMMON),
}
BETAS = (0.0, 0.03, 0.1, 0.3, 0.7, 2.0, 5.0, 10.0)  # 0: no penalty
GRID = {"demo": (0.0, 0.3, 5.0), "cpu": BETAS, "paper": BETAS}
CONTROLS = {"demo": (5.0,), "cpu": (0.1, 0.7, 2.0, 5.0), "paper": BETAS[1:]}  # betas of noise
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
REAL = ["celeba", "synthetic"]
DATASETS = {"demo": ["synthetic", "celeba"], "cpu": REAL, "paper": REAL}
NOT_NAMED = ("hair_style", "pose", "background")  # factors that no attribute tells
CODE = 4  # maps of the VAE's code u
SHOWN, DRAWS = 6, 3  # faces in the picture, and draws of each for each beta


class Residual(nn.Module):
    """x + two convolutions, between which a condition (n, c, 4, 4) is added."""

    def __init__(self, channels, condition=None):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.see = nn.Conv2d(condition, channels, 1) if condition else None

    def forward(self, x, condition=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.see:
            h = h + F.interpolate(self.see(condition), x.shape[2:])
        return x + self.conv2(F.silu(self.norm2(h)))


def attribute_classifier(channels, outputs):
    """x -> z (n, c, 4, 4), by layers that halve the sides, then a linear head z -> logits."""
    layers, inputs = [], 3
    for c in channels:
        layers += [nn.Conv2d(inputs, c, 4, 2, 1, bias=False), nn.GroupNorm(4, c),
                   nn.LeakyReLU(0.2)]
        inputs = c
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * inputs, outputs))
    return nn.Sequential(nn.Sequential(*layers), head)


class VAE(nn.Module):
    """Encoder q(u|x) and decoder of faces x (n, 3, s, s), with a code u (n, CODE, s/4, s/4)."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, narrow, 3, padding=1), nn.SiLU(),
            nn.Conv2d(narrow, wide, 3, 2, 1), Residual(wide), nn.Conv2d(wide, 2 * CODE, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE, wide, 3, padding=1), Residual(wide),
            nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(narrow, 12, 3, padding=1), nn.PixelShuffle(2))

    def encode(self, x):
        return self.encoder(x)[:, :CODE]

    def loss(self, x):
        mean, log_sigma2 = self.encoder(x).chunk(2, 1)
        error = self.decoder(mean + (log_sigma2 / 2).exp() * torch.randn_like(mean)) - x
        kl = (mean**2 + log_sigma2.exp() - log_sigma2 - 1).sum() / 2
        # the absolute error keeps edges sharp; a small KL suffices, as the prior of u is learned
        return error.square().mean() / 0.01 + error.abs().mean() / 0.05 + 0.3 * kl / x.numel()


class Prior(nn.Module):
    """p(u|z) by flow matching: the velocity of u_t = (1 - t) * noise + t * u, given z and t."""

    def __init__(self, width, blocks, side, z_channels):
        super().__init__()
        self.side = side
        self.see = nn.Conv2d(z_channels, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        self.input = nn.Conv2d(CODE, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.before, self.low, self.after = (
            nn.ModuleList(Residual(width, width) for _ in range(count))
            for count in (blocks, 2, blocks))
        self.output = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(),
                                    nn.Conv2d(width, CODE, 3, padding=1))

    def forward(self, u, t, z):
        waves = torch.cos(torch.pi * t[:, None] * torch.arange(16, device=u.device))
        z = self.see(z)
        condition = z + self.time(waves)[:, :, None, None]
        h = self.input(u) + self.positions + F.interpolate(z, u.shape[2:])
        for block in self.before:
            h = block(h, condition)
        low = self.down(h)
        for block in self.low:
            low = block(low, condition)
        h = h + self.up(low)
        for block in self.after:
            h = block(h, condition)
        return self.output(h)

    def loss(self, u, z):
        t = torch.randn(len(u), device=u.device).sigmoid()  # seldom near 0 and 1, which are easy
        noise, mix = torch.randn_like(u), t[:, None, None, None]
        velocity = self((1 - mix) * noise + mix * u, t, z)
        return (velocity - (u - noise)).square().mean()

    def draw(self, z, steps):
        """u ~ p(u|z) (n, CODE, side, side), by the midpoint rule from t = 0 to 1."""
        u = torch.randn(len(z), CODE, self.side, self.side, device=z.device)
        for step in range(steps):
            t = torch.full((len(z),), step / steps, device=z.device)
            middle = u + self(u, t, z) / (2 * steps)
            u = u + self(middle, t + 0.5 / steps, z) / steps
        return u


def load_data(args, device=torch.device("cpu")):
    return load_faces(args.scale, args.dataset, args.data_dir, device)


@lru_cache(maxsize=1)
def load_faces(scale, dataset, data_dir, device):
    """Images uint8, attributes 0/1 (n, a), factors one-hot (n, k), {part: indices of its images}.

    The synthetic FACE_FACTORS stand side by side; CelebA has none, k = 0.
    """
    s = SETTINGS[scale]
    if dataset == "synthetic":
        n_train, n_test = s["synthetic"]
        images, attributes, values = synthetic_faces(n_train + n_test, seed=0)
        factors = torch.cat([F.one_hot(values[k], FACE_FACTORS[k]) for k in FACE_FACTORS], 1)
        partition = 2 * (torch.arange(len(images)) >= n_train)
    else:
        images, attributes, _, partition = load_celeba(data_dir)
        factors = attributes[:, :0]
    if s["size"] < 64:
        small = [F.avg_pool2d(part.float(), 64 // s["size"]) for part in images.split(1000)]
        images = torch.cat(small).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part].to(device) for part in range(3))
    third = len(train) // 3  # for the evaluation classifier, which is to be independent
    return images.to(device), attributes.to(device), factors.to(device), {
        "train": train, "evaluation": torch.cat([train[:third], validation]),
        "classifier": train[third:], "test": test[:4000]}


def take(images, rows, index):
    """Images rows[index], from -1 to 1; an index beyond len(rows) gives a mirror image."""
    x = images[rows[index % len(rows)]]
    x = torch.where((index < len(rows)).view(-1, 1, 1, 1), x, x.flip(3))
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def minimise(model, loss_at, n, batch, steps, progress, lr, lr_noise=0, hold=0.8):
    """Minimise loss_at(minibatch of the indices below n, fraction of the steps done) by Adam."""
    optimizer = torch.optim.Adam(param_groups(model, lr, lr_noise), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, hold))
    model.train()
    for step, index in zip(range(steps), minibatches(n, batch, next(model.parameters()).device)):
        loss = loss_at(index, step / steps)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return model.eval()


def train_classifier(images, labels, rows, beta, s, progress):
    """A stochastic classifier of these rows and their mirror images."""
    model = to_stochastic(attribute_classifier(s["channels"], labels.shape[1]))
    model.to(images.device, memory_format=torch.channels_last)  # faster on a CPU

    def loss_at(index, t):
        logits, target = model(take(images, rows, index)), labels[rows[index % len(rows)]]
        beta_now = beta * min(1, t / 0.4)  # raised slowly, else a large beta stops all learning
        return ib_loss(logits, target, model, beta_now, len(rows), attributes=True)[0]  # eq. 3
    return minimise(model, loss_at, 2 * len(rows), s["batch"], s["classifier_steps"], progress,
                    s["lr"], s["lr_noise"])


@torch.no_grad()
def draw_z(classifier, images, rows, n):
    """z ~ p(z|x), half (n, c, 4, 4), and logits (n, a), weights resampled for every eight faces."""
    with sample_weights(classifier.eval()):
        drawn = []
        # eight, as a forward of one face costs nearly as much; in half, as all z are kept
        for index in torch.arange(n, device=images.device).split(8):
            z = classifier[0](take(images, rows, index))
            drawn.append((z.half(), classifier[1](z)))
    return [torch.cat(parts) for parts in zip(*drawn)]


def train_cell(cell, device, args, progress):
    """Train the classifier, then measure its z, and by draws of faces unless it is a control."""
    s, beta, seed = SETTINGS[args.scale], cell["beta"], cell["seed"]
    images, attributes, factors, parts = data = load_data(args, device)
    targets = ridge_targets(data, args.dataset, s["components"])

    def representation(beta):
        """Classifier, z of training faces and their mirror images, z and logits of test faces."""
        torch.manual_seed(seed)
        classifier = train_classifier(images, attributes, parts["classifier"], beta, s, progress)
        z, _ = draw_z(classifier, images, parts["train"], 2 * len(parts["train"]))
        return classifier, z, *draw_z(classifier, images, parts["test"], len(parts["test"]))
    classifier, z, z_test, logits = representation(beta)
    row = {"n": len(parts["classifier"])}
    if cell.get("control") == "noise":
        nats = measure_z(z, z_test, targets)["attribute_nats"]
        # the same network as in the cell of the smallest beta, by its seed
        classifier, z, z_test, _ = representation(min(BETAS))
        row["noise"] = noise_that_leaves(nats, z, z_test, targets, s["noise_steps"])
        z, z_test = add_noise(row["noise"], z, z_test)
        logits = predict(classifier[1], z_test)
    else:
        row |= measure_draws(z, z_test, data, beta, seed, args, progress)
    majority = attributes[parts["classifier"]].float().mean(0) - 0.5
    return row | measure_z(z, z_test, targets) | {
        "information": weight_information(classifier).item(),
        "attribute_acc": agreement(logits, attributes[parts["test"]]),
        "majority_acc": agreement(majority, attributes[parts["test"]])}


def measure_draws(z, z_test, data, beta, seed, args, progress):
    """Train p(u|z), draw faces given z_test, keep some for the picture; what they say."""
    s, (images, attributes, factors, parts) = SETTINGS[args.scale], data
    train, test, device = parts["train"], parts["test"][:s["drawn"]], images.device
    vae, evaluator = shared_networks(args, seed, data, progress)
    torch.manual_seed(seed)  # the networks may have been read from their file
    mirrored = torch.arange(2 * len(train), device=device)  # in the order of z
    with torch.no_grad():
        codes = [vae.encode(take(images, train, index)) for index in mirrored.split(100)]
    u = torch.cat(codes)
    # the flow starts from N(0, I): give u its scale
    mean, std = u.mean((0, 2, 3), keepdim=True), u.std((0, 2, 3), keepdim=True)
    u, centre, scale = (u - mean) / std, z.float().mean(0), z.float().std(0) + 1e-6
    prior = Prior(*s["prior"], s["size"] // 4, z.shape[1])
    prior.to(device, memory_format=torch.channels_last)

    def prior_loss(index, t):
        return prior.loss(u[index], (z[index].float() - centre) / scale)

    def draw(z):
        code = prior.draw((z.float() - centre) / scale, s["draw_steps"])
        return vae.decoder(code * std + mean).clamp(-1, 1)
    minimise(prior, prior_loss, len(u), s["batch"], s["prior_steps"], progress, s["lr_prior"],
             hold=0.5)
    x = take(images, test, torch.arange(len(test), device=device))
    drawn = predict(draw, z_test[:len(test)])
    with torch.no_grad():
        shown = torch.stack([x[:SHOWN]] + [draw(z_test[:SHOWN]) for _ in range(DRAWS)])
    pixels = (shown * 127.5 + 127.5).round().to(torch.uint8)
    save(pixels.cpu(), file_of(args, "faces", beta, seed))

    decoded = predict(vae.decoder, predict(vae.encode, x))
    row = {"reconstruction_mse": (decoded - x).square().mean().item()}
    labels = torch.cat([attributes, factors], 1)[test]
    for name, faces in (("original", x), ("decoded", decoded), ("drawn", drawn)):
        for key, value in read(predict(evaluator, faces), labels, attributes.shape[1]).items():
            row[f"{name}_{key}"] = value
    for name, mask in masks(args.dataset, s["size"], device).items():
        here, there = x[:, :, mask], drawn[:, :, mask]
        row[f"kept_{name}"] = share_kept(here.flatten(1), there.flatten(1))
        row[f"kept_{name}_colour"] = share_kept(here.mean(2), there.mean(2))
    return row


def shared_networks(args, seed, data, progress):
    """The VAE of all training faces, and a classifier of attributes and factors of other faces.

    Trained once per data set, scale and seed, and kept in --out for the other cells.
    """
    s, (images, attributes, factors, parts) = SETTINGS[args.scale], data
    labels, device = torch.cat([attributes, factors], 1), images.device
    torch.manual_seed(seed + 1_000_000)
    vae, evaluator = VAE(*s["vae"]), attribute_classifier(s["channels"], labels.shape[1])
    for net in (vae, evaluator):
        net.to(device, memory_format=torch.channels_last)
    code = [inspect.getsource(part) for part in (VAE, Residual, attribute_classifier, minimise)]
    # other code trains other networks: they are not to be mixed in one grid
    path = file_of(args, "networks", seed, device.type, code)
    if path.exists():
        for net, state in zip((vae, evaluator), torch.load(path, map_location="cpu")):
            net.load_state_dict(state)
        return vae.eval(), evaluator.eval()

    def label_loss(index, t):
        rows = parts["evaluation"]
        logits, target = evaluator(take(images, rows, index)), labels[rows[index % len(rows)]]
        return F.binary_cross_entropy_with_logits(logits, target.float())

    def vae_loss(index, t):
        return vae.loss(take(images, parts["train"], index))
    for net, loss, part, steps in ((evaluator, label_loss, "evaluation", s["evaluator_steps"]),
                                   (vae, vae_loss, "train", s["vae_steps"])):
        minimise(net, loss, 2 * len(parts[part]), s["batch"], steps, progress, s["lr"])
    states = [{name: v.cpu() for name, v in net.state_dict().items()} for net in (vae, evaluator)]
    save(states, path)
    return vae, evaluator


def file_of(args, name, *key):
    """A file in --out that belongs to these settings, data set and key."""
    text = repr((SETTINGS[args.scale], args.dataset, key))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return args.out / f"{args.figure}-{args.scale}-{name}-{digest}.pt"


def save(thing, path):
    """Write a file in one step: other processes find all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(thing, temporary)
    os.replace(temporary, path)


def agreement(logits, y):
    """Fraction of logits (n, a) whose sign is that of the 0/1 attributes y (n, a)."""
    return ((logits > 0) == y.bool()).float().mean().item()


def read(scores, labels, attributes):
    """Accuracy of the attributes, the first columns, and of each factor that follows."""
    found = {"attributes": agreement(scores[:, :attributes], labels[:, :attributes])}
    if labels.shape[1] > attributes:
        guesses, true = (part[:, attributes:].split(list(FACE_FACTORS.values()), 1)
                         for part in (scores, labels))
        for name, guess, value in zip(FACE_FACTORS, guesses, true):
            found[name] = (guess.argmax(1) == value.argmax(1)).float().mean().item()
    return found


def share_kept(x, drawn):
    """1 - E|x - x^|^2 / E|x' - x^|^2, x' another face (n, k): 1 if draws are x, 0 if any face.

    For exact draws of p(x|z) the share of the variance of x that z determines.
    """
    other = x.var(0) + drawn.var(0) + (x.mean(0) - drawn.mean(0)).square()
    return 1 - ((x - drawn).square().mean(0).sum() / other.sum()).item()


HAIR = {"synthetic": (-0.58, -0.42), "celeba": (-0.85, -0.6)}  # rows, from -1 to 1
SKIN = (0.15, 0.3)  # rows below eyes and glasses, above the mouth


def masks(dataset, size, device):
    """{region: its pixels, bool (size, size)}."""
    axis = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
    across, down = axis.expand(size, size), axis[:, None].expand(size, size)
    outside = torch.hypot(across / FACE_ELLIPSE[0], down / FACE_ELLIPSE[1]) > 1

    def patch(top, bottom):
        return (across.abs() < 0.2) & (down > top) & (down < bottom)
    return {"picture": outside | True, "outside": outside, "inside": ~outside,
            "hair": patch(*HAIR[dataset]), "skin": patch(*SKIN)}


def ridge(z, target, z_test):
    """Ridge regression of target (n, k) on z (n, d), its prediction from z_test (m, d): (m, k).

    Each column has the penalty of least leave-one-out error.
    """
    offset, scale, centre = z.mean(0), z.std(0) + 1e-6, target.mean(0)
    z, target = (z - offset) / scale, target - centre
    values, vectors = torch.linalg.eigh(z.T @ z)
    scores, errors, weights = z @ vectors, [], []
    for penalty in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10):
        shrunk = 1 / (values.clamp(min=0) + penalty * len(z))
        weights.append(shrunk * (target.T @ scores))
        leverage = scores.square() @ shrunk + 1 / len(z)
        left_out = (target - scores @ weights[-1].T) / (1 - leverage[:, None])
        errors.append(left_out.square().mean(0))
    best, column = torch.stack(errors).argmin(0), torch.arange(len(centre), device=z.device)
    return centre + (z_test - offset) / scale @ vectors @ torch.stack(weights)[best, column].T


def gaussian_nats(target, predicted):
    """-1/2 sum log(1 - R^2) over the columns of a target (m, k) that has mean 0 in training.

    A lower bound of I(z;target) if it is Gaussian, with uncorrelated columns; attributes are not.
    """
    unexplained = (target - predicted).square().mean(0) / target.square().mean(0)
    return -0.5 * unexplained.log().sum().item()


def ridge_targets(data, dataset, components):
    """{measure: training and test values (n, k), of mean 0 in training}; of pixels components."""
    images, attributes, factors, parts = data
    train, few = parts["train"], parts["train"][:4000]
    values = {"attribute_nats": attributes.float()}
    if factors.shape[1]:
        by_name = dict(zip(FACE_FACTORS, factors.float().split(list(FACE_FACTORS.values()), 1)))
        values["not_named_nats"] = torch.cat([by_name[name] for name in NOT_NAMED], 1)
    regions = masks(dataset, images.shape[2], images.device)
    torch.manual_seed(0)  # of svd_lowrank, so that all cells have the same components
    for name, region in (("", "picture"), ("_outside", "outside"), ("_inside", "inside")):
        mask = regions[region].expand(images.shape[1:]).flatten()
        mean = images[few].flatten(1)[:, mask].float().mean(0)
        basis = torch.svd_lowrank(images[few].flatten(1)[:, mask] - mean, components, niter=4)[2]
        projected = [(part.flatten(1)[:, mask] - mean) @ basis for part in images.split(500)]
        values[f"picture_nats{name}"] = torch.cat(projected)
    return {name: (v[train] - v[train].mean(0), v[parts["test"]] - v[train].mean(0))
            for name, v in values.items()}


def measure_z(z, z_test, targets):
    """{measure: nats of its targets that ridge regression reads from z}, on test faces."""
    known = torch.cat([train for train, _ in targets.values()], 1)
    z = z[:len(known)]  # without the mirror images
    predicted = ridge(z.flatten(1).float(), known, z_test.flatten(1).float())
    row, start = {}, 0
    for name, (_, test) in targets.items():
        end = start + test.shape[1]
        row[name] = gaussian_nats(test, predicted[:, start:end])
        start = end
    return row


def add_noise(noise, z, z_test):
    """Both with white noise, whose standard deviation is noise times that of each unit of z."""
    torch.manual_seed(0)  # the same draw whatever the amount, so that the bisection converges
    std = z.float().std(0)
    return [part.float() + noise * std * torch.randn_like(std.expand_as(part))
            for part in (z, z_test)]


def noise_that_leaves(nats, z, z_test, targets, steps):
    """The noise under which as many nats of the attributes are read from z, by bisection."""
    targets = {"attribute_nats": targets["attribute_nats"]}
    z, low, high = z[:len(targets["attribute_nats"][0])], 1e-3, 30.0
    for _ in range(steps):
        middle = (low * high) ** 0.5
        left = measure_z(*add_noise(middle, z, z_test), targets)["attribute_nats"]
        low, high = (middle, high) if left > nats else (low, middle)
    return low


LARGE = 5.0  # the beta of which most claims speak
NATS = {"attribute_nats": "attributes", "picture_nats": "pixels",
        "picture_nats_outside": "pixels of the background", "not_named_nats": "factors not named"}


def excess(accuracy, chance):
    return (accuracy - chance) / (1 - chance)


def named(row):
    return excess(row["drawn_attributes"], row["majority_acc"])


def not_named(row):
    """How much draws keep of factors that no attribute tells, or of the background's colour."""
    if "drawn_background" not in row:
        return row["kept_outside_colour"]
    return np.mean([excess(row[f"drawn_{name}"], 1 / FACE_FACTORS[name]) for name in NOT_NAMED])


def add_shares(rows):
    """The rows of seeds that have the smallest beta, with shares of what is kept there."""
    found = []
    for own in group_by(ok_rows(rows), "seed").values():
        for base in ok_rows(own, beta=min(BETAS)):
            for row in own:
                shares = {f"share_{key}": row[key] / base[key] for key in NATS if key in row}
                if "control" not in row:
                    shares["share_named"] = named(row) / named(base)
                    shares["share_not_named"] = not_named(row) / not_named(base)
                found.append(row | shares)
    return found


def beta_panel(ax, rows, title, curves, style="o-"):
    """Curves {key: label} of rows against beta."""
    for number, (key, label) in enumerate(curves.items()):
        if key in rows[0]:
            plot_points(ax, summarise(rows, "beta", key), style, color=f"C{number}", label=label)
    betas = sorted({row["beta"] for row in rows})
    ax.set_xscale("symlog", linthresh=0.03, linscale=0.3)  # shows beta = 0
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
    ax.minorticks_off()
    ax.set(xlabel="β", title=title)
    ax.legend()


def nats_panel(ax, rows, control):
    """Penalty, and dotted white noise that leaves the attributes as many nats."""
    if control:
        noise = {f"share_{key}": f"{label}, noise in z" for key, label in NATS.items()}
        beta_panel(ax, control, "", noise, "s:")
    beta_panel(ax, rows, "nats read from z, share of those at β = 0",
               {f"share_{key}": label for key, label in NATS.items()})


def plot(rows, control, args):
    panels = []
    if len({row["beta"] for row in rows}) > 1:
        panels = [
            partial(beta_panel, rows=rows, title="excess over chance in draws, share of β = 0's",
                    curves={"share_named": "attributes (named)", "share_not_named": "not named"}),
            partial(beta_panel, rows=rows, title="share of variance that draws keep",
                    curves={"kept_outside_colour": "colour of the background",
                            "kept_hair_colour": "colour of the hair",
                            "kept_skin_colour": "colour of the skin", "kept_picture": "pixels"}),
            partial(nats_panel, rows=rows, control=control)]
    save_panels(panels, f"Fig. 5: {args.dataset}, scale {args.scale}", args)


def plot_faces(rows, args):
    """The paper's figure, <out>/<figure>-<scale>-faces.png, of the first seed's faces there are."""
    from matplotlib.figure import Figure
    files = {row["beta"]: file_of(args, "faces", row["beta"], row["seed"])
             for row in rows if row["seed"] == rows[0]["seed"]}
    faces = {beta: torch.load(path) for beta, path in sorted(files.items()) if path.exists()}
    if not faces:
        return
    columns = {"x": next(iter(faces.values()))[:1]}
    for beta, pictures in faces.items():
        columns[f"β = {beta:g}"] = pictures[1:]
    widths = [len(pictures) for pictures in columns.values()]
    fig = Figure(figsize=(0.6 * sum(widths) + 0.6, 0.6 * SHOWN + 0.8), layout="constrained")
    axes = fig.subplots(1, len(widths), width_ratios=widths)
    for ax, (title, pictures) in zip(axes, columns.items()):
        ax.imshow(rearrange(pictures, "draw face c h w -> (face h) (draw w) c"))
        ax.set_title(title)
        ax.axis("off")
    fig.supxlabel("Three draws of one z for each β:\nwhat all share with x, z holds; what differs "
                  "is filled in", fontsize=9)
    fig.savefig(args.out / f"{args.figure}-{args.scale}-faces.png", dpi=150)


def named_at_half(rows):
    """Share of the attributes at the first beta where what is not named is below half; or nan."""
    for own in group_by(rows, "beta").values():
        if own[0]["share_not_named"] < 0.5:
            return own[0]["share_named"]
    return np.nan


def beyond_noise(rows, control, key):
    """{"β = 2:": share under the penalty minus that under noise, per seed}."""
    found = {}
    for (beta, _), own in group_by(ok_rows(rows + control), "beta", "seed").items():
        shares = [row[f"share_{key}"] for row in own if key in row]
        if len(shares) == 2:  # penalty, control
            found.setdefault(f"β = {beta:g}:", []).append(shares[0] - shares[1])
    return found


def claims(rows, control, demo):
    """The paper's claims; their thresholds were set before the grid was trained."""
    at_zero, at_large = ok_rows(rows, beta=0.0), ok_rows(rows, beta=LARGE)
    seeds = {row["seed"] for row in at_large}
    tried = [row for row in rows if row["seed"] in seeds]
    background = [row["kept_outside_colour"] for row in at_large]
    table = [
        check("β = 0: draws keep over 80% of the variance of the background's colour", "yes",
              {"": [row["kept_outside_colour"] for row in at_zero]}, (0.8, 1), "{:.0%}"),
        check(f"β = {LARGE:g}: they keep 10 points more of the hair's and the skin's "
              "(differences)", "yes",
              {part: [row[f"kept_{part}_colour"] - row["kept_outside_colour"] for row in at_large]
               for part in ("hair", "skin")}, (0.1, np.inf)),
        check(f"β = {LARGE:g}: of the excess over chance at β = 0 attributes keep a share 10 "
              "points larger than what is not named (difference)", "yes",
              {"": [row["share_named"] - row["share_not_named"] for row in at_large]},
              (0.1, np.inf)),
    ]
    if demo:  # whose networks are trained too briefly for the next
        return table
    table += [
        check(f"β = {LARGE:g}: the background is new: under 50% of its colour's variance is kept",
              "yes", {"": background}, (-np.inf, 0.5), "{:.0%}"),
        check(f"β = {LARGE:g}: over 80% of the attributes' excess is kept", "yes",
              {"": [row["share_named"] for row in at_large]}, (0.8, np.inf), "{:.0%}"),
        check("so it is at the first β where less than half is kept of what is not named", "yes",
              {"": per_seed(named_at_half, tried)}, (0.8, np.inf), "{:.0%}"),
    ]
    for key in ("picture_nats_outside", "not_named_nats"):
        table.append(check(f"nats of {NATS[key]} in z: a share at least 2 points less than under "
                           "noise that leaves the attributes as much (differences)", "implied",
                           beyond_noise(rows, control, key), (-np.inf, -0.02)))
    return table


def means(rows, columns):
    """A table of means over seeds, by beta, of the columns {title: key} that the rows have."""
    table = []
    for (beta,), own in group_by(rows, "beta").items():
        table.append({"β": f"{beta:g}", "seeds": len(own)})
        for title, key in columns.items():
            if key in own[0]:
                table[-1][title] = fmt([row[key] for row in own])
    return table


IN_DRAWS = {"colour of background": "kept_outside_colour", "of hair": "kept_hair_colour",
            "of skin": "kept_skin_colour", "pixels": "kept_picture",
            "attributes": "drawn_attributes"}
IN_DRAWS |= {name.replace("_", " "): f"drawn_{name}" for name in FACE_FACTORS}
IN_Z = {"accuracy of attributes": "attribute_acc", "noise": "noise"}
IN_Z |= {f"nats of {name}": key for key, name in NATS.items()}


def make_cells(scale):
    return [{"beta": beta} for beta in GRID[scale]] + [
        {"beta": beta, "control": "noise"} for beta in CONTROLS[scale]]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    all_penalty, shares = ok_rows(rows, control=None), add_shares(rows)
    penalty, control = ok_rows(shares, control=None), ok_rows(shares, control="noise")
    plot(penalty, control, args)
    plot_faces(all_penalty, args)
    save_tables(args, claims=claims(penalty, control, args.scale == "demo"),
                read_from_draws_share_of_variance_or_accuracy=means(all_penalty, IN_DRAWS),
                read_from_z=means(all_penalty, IN_Z),
                white_noise_in_z_of_the_smallest_β=means(ok_rows(rows, control="noise"), IN_Z))


if __name__ == "__main__":
    main()
