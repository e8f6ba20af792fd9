"""Fig. 5: does a large beta leave only its attributes of a face in the representation?

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 2 minutes on 2 cores
    python fig5_celeba_vae.py --scale cpu      # CelebA, 2 to 5 hours on 2 cores
    python fig5_celeba_vae.py --gpu 0          # all of CelebA

A classifier of a face's attributes is trained with L = cross-entropy + beta/N * I(w;D); z is its
last map, drawn with the noise of its weights. The paper draws faces x^ ~ p(x|z) by a GAN: at small
beta the face with its background, at large beta the attributes stay and the rest is new.

Here p(x|z) is a VAE of faces alone, whose code u has a prior p(u|z) learned by flow matching. The
picture, <out>/*-faces.png: x, then for up to four beta three draws of one z. What all share with
x, z holds; what differs z lacks, or p(u|z) has not learned to use. Measured on held-out faces: from
draws, attributes (named in training), hair style, pose and background (not named), by a classifier
trained on other faces; from z itself, a score of ridge regression in nats. What reads z is fitted
on faces that the classifier of attributes has not seen.
Control: white noise, which knows no task, added to z of the net at beta = 0, as much as leaves the
attributes the score that the penalty leaves them.
"""
import math
from functools import lru_cache, partial
from operator import itemgetter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (DataError, FACE_ELLIPSE, FACE_FACTORS, accuracy, beta_at, cell_table, check,
                    complete_seeds, group_by, ib_loss, load_celeba, lr_factor, minibatches,
                    ok_rows, param_groups, parse_args, per_seed, plot_points, predict, run_grid,
                    sample_weights, save_figure, save_panels, save_tables, summarise,
                    synthetic_faces, to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row. channels: of each layer of the
# classifier, whose last map, 4x4, is z. vae: channels; prior: channels, blocks. synthetic: numbers
# of training and test faces drawn by code. components: principal components of the pixels that
# ridge regression predicts. drawn: how many test faces are measured through a draw. rarest: the
# share that each value of an attribute needs among the test faces to be measured.
SETTINGS = {
    "demo": dict(size=32, channels=(16, 32, 32), vae=48, prior=(48, 2), synthetic=(4000, 600),
                 batch=16, lr=0.008, lr_noise=0.1, classifier_steps=800, evaluator_steps=1000,
                 vae_steps=800, prior_steps=600, draw_steps=10, drawn=300, components=50,
                 rarest=0.05),
    "cpu": dict(size=64, channels=(24, 48, 96, 64), vae=64, prior=(64, 2),
                synthetic=(15_000, 2000), batch=32, lr=0.004, lr_noise=0.005,
                classifier_steps=6000, evaluator_steps=3000, vae_steps=3000, prior_steps=5000,
                draw_steps=20, drawn=500, components=100, rarest=0.05),
    "paper": dict(size=64, channels=(64, 128, 256, 128), vae=128, prior=(128, 4),
                  synthetic=(30_000, 4000), batch=128, lr=0.002, lr_noise=0.005,
                  classifier_steps=20_000, evaluator_steps=20_000, vae_steps=20_000,
                  prior_steps=60_000, draw_steps=30, drawn=4000, components=200,
                  rarest=0.05),
}
BETAS = (0.0, 0.03, 0.1, 0.3, 0.7, 2.0, 5.0, 10.0, 20.0, 50.0)
GRID = {"demo": (0.0, 0.3, 5.0), "cpu": (0.0, 0.3, 5.0, 20.0), "paper": BETAS}
ONE_SEED = {"demo": (), "cpu": (0.03, 0.1, 0.7, 2.0, 10.0, 50.0), "paper": ()}  # of seed 0 alone
LARGE = {"demo": 5.0, "cpu": 20.0, "paper": 20.0}  # attributes begin to go; set after its rows
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic", "celeba"], "cpu": ["celeba", "synthetic"],
            "paper": ["celeba", "synthetic"]}
NOT_NAMED = ("hair_style", "pose", "background")  # factors that no attribute tells
NOISE = np.geomspace(0.1, 10, 20).tolist()  # standard deviations, in those of z, of the control
CODE = 4  # maps of the VAE's code u
SHOWN, DRAWS = 6, 3  # faces in the picture, and draws of each for each beta


def train_cell(cell, device, args, progress):
    """Train a classifier and p(u|z), draw faces given z; what these and z itself tell of x."""
    s, beta, seed = SETTINGS[args.scale], cell["beta"], cell["seed"]
    source = args.scale, args.dataset, args.data_dir, device
    images, attributes, factors, parts = load_faces(*source)
    unseen, test = parts["unseen"], parts["test"]
    frequent = without_rare(attributes, test, s["rarest"])
    vae, evaluator = shared_networks(*source)
    torch.manual_seed(seed)  # after shared_networks, which has a seed of its own

    # The classifier; z of faces that it has not seen, which train what reads z, and of test faces
    classifier = train_classifier(images, attributes, parts["classifier"], beta, s, progress)
    with sample_weights(classifier):  # z ~ p(z|x)
        # weights are resampled for every eight faces, as one face alone costs nearly as much
        z = map_faces(classifier[0], images, unseen, batch=8)
        z_test = map_faces(classifier[0], images, test, batch=8)
        logits = predict(classifier[1], z_test)
    mean, std = z.mean(0), z.std(0) + 1e-6
    z, z_test = (z - mean) / std, (z_test - mean) / std

    # p(x|z): u ~ p(u|z), decoded
    prior = train_prior(map_faces(vae.encoder, images, unseen), z, s, progress)

    def draw(z):
        u = prior.draw(z, s["draw_steps"])
        return vae.decoder(u).clamp(-1, 1)

    first = test[:s["drawn"]]
    x, drawn = take(images, first), predict(draw, z_test[:len(first)])
    # For the picture: some x, and draws of each
    shown = [x[:SHOWN]] + [predict(draw, z_test[:SHOWN]) for _ in range(DRAWS)]
    shown = (torch.stack(shown) * 127.5 + 127.5).round().to(torch.uint8)
    torch.save({"settings": str(s), "faces": shown.cpu()}, faces_file(args, beta, seed))

    majority = attributes[parts["classifier"]].float().mean(0) - 0.5
    row = {"n": len(parts["classifier"]) // 2,  # without mirror images
           "information": weight_information(classifier).item(),
           "attribute_acc": agreement(logits, attributes[test]),
           "majority_acc": agreement(majority, attributes[test])}
    # What draws keep of x
    row |= colours_kept(x, drawn, args.dataset)
    row |= read_from_draws(predict(evaluator, drawn), frequent, factors, first)
    rebuilt = predict(evaluator, predict(vae.rebuild, x))[:, :frequent.shape[1]]
    row["rebuilt_attributes"] = agreement(rebuilt, frequent[first])  # what draws could reach
    # What ridge regression reads from z itself, and from z under white noise
    targets = ridge_targets(images, frequent, factors, parts, args.dataset, s["components"])
    z = z[:len(parts["ridge"])]  # with which the unseen faces begin
    row |= measure_z(z, z_test, targets)
    if beta == 0:
        row["noise"] = measure_noise(z, z_test, targets)
    return row


def train_classifier(images, attributes, indices, beta, s, progress):
    """A stochastic classifier of the faces with these indices."""
    model = to_stochastic(attribute_classifier(s["channels"], attributes.shape[1]))
    model.to(images.device, memory_format=torch.channels_last)  # faster on a CPU
    n = len(indices) // 2  # a mirror image is no sample of its own

    def loss_at(index, t):
        logits = model(take(images, index))
        beta_now = beta_at(t, beta, 0)  # raised slowly, else a large beta stops all learning
        return ib_loss(logits, attributes[index], model, beta_now, n, attributes=True)[0]  # eq. 3

    return minimise(model, loss_at, indices, s["classifier_steps"], s, progress)


def train_prior(u, z, s, progress):
    """p(u|z), from codes u of faces and their z."""
    prior = Prior(*s["prior"], u.shape[2], z.shape[1])
    prior.to(u.device, memory_format=torch.channels_last)

    def loss_at(index, t):
        return prior.loss(u[index], z[index])

    indices = torch.arange(len(u), device=u.device)
    return minimise(prior, loss_at, indices, s["prior_steps"], s, progress, hold=0.5)


def minimise(model, loss_at, indices, steps, s, progress=None, hold=0.8):
    """Minimise loss_at(minibatch of indices, fraction of the steps done) by Adam."""
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, hold))
    model.train()
    for step, index in zip(range(steps), minibatches(len(indices), s["batch"], indices.device)):
        loss = loss_at(indices[index], step / steps)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if progress and (step % 50 == 0 or step == steps - 1):
            progress(step, steps, loss.item())
    return model.eval()


@lru_cache(maxsize=1)
def shared_networks(scale, dataset, data_dir, device):
    """The VAE of faces, and a classifier of attributes and factors that evaluates its draws.

    All cells are measured with one pair: trained once in each process, from the same seed.
    """
    s = SETTINGS[scale]
    images, attributes, factors, parts = load_faces(scale, dataset, data_dir, device)
    frequent = without_rare(attributes, parts["test"], s["rarest"])
    labels = torch.cat([frequent, *factors.values()], 1).float()
    torch.manual_seed(1_000_000)  # of no cell
    vae, evaluator = VAE(s["vae"]), attribute_classifier(s["channels"], labels.shape[1])
    for net in (vae, evaluator):
        net.to(images.device, memory_format=torch.channels_last)

    def vae_loss(index, t):
        return vae.loss(take(images, index))

    def evaluator_loss(index, t):
        logits = evaluator(take(images, index))
        return F.binary_cross_entropy_with_logits(logits, labels[index])

    minimise(vae, vae_loss, parts["train"], s["vae_steps"], s)
    minimise(evaluator, evaluator_loss, parts["unseen"], s["evaluator_steps"], s)
    return vae, evaluator


def load_data(args):
    return load_faces(args.scale, args.dataset, args.data_dir, torch.device("cpu"))


@lru_cache(maxsize=1)
def load_faces(scale, dataset, data_dir, device):
    """Images uint8, attributes 0/1 (2n, a), {factor: one-hot (2n, k)}, {part: its indices}.

    Index n + i is the mirror image of face i. CelebA has no factors. Parts, and what learns there:
        train       the VAE                    all training faces, and mirrored
        classifier  the attribute classifier   two thirds of these, and mirrored
        unseen      the prior, the evaluator   the other third and validation, and mirrored
        ridge       ridge regression           the third with which unseen begins
        test        nothing                    up to 4,000 faces, all that is measured
    """
    s, values = SETTINGS[scale], {}
    if dataset == "synthetic":
        n_train, n_test = s["synthetic"]
        images, attributes, values = synthetic_faces(n_train + n_test, seed=0)
        partition = 2 * (torch.arange(len(images)) >= n_train)  # CelebA's: 0 train, 2 test
    else:
        images, attributes, _, partition = load_celeba(data_dir)
    factors = {}
    for name, value in values.items():
        # a mirrored head is turned the other way
        mirrored = FACE_FACTORS[name] - 1 - value if name == "pose" else value
        factors[name] = F.one_hot(torch.cat([value, mirrored]), FACE_FACTORS[name]).to(device)
    if s["size"] < 64:
        small = [F.avg_pool2d(part.float(), 64 // s["size"]) for part in images.split(1000)]
        images = torch.cat(small).round().to(torch.uint8)
    if {0, 2} - set(partition.tolist()):
        raise DataError("faces of partition 0, to train on, and 2, to test on, are needed")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part].to(device) for part in range(3))
    third = len(train) // 3  # z of faces that a classifier was trained on tells more of them
    parts = {"train": train, "classifier": train[third:],
             "unseen": torch.cat([train[:third], validation])}
    for name, indices in parts.items():
        parts[name] = torch.cat([indices, indices + len(images)])
    parts |= {"ridge": train[:third], "test": test[:4000]}  # without mirror images
    return images.to(device), attributes.repeat(2, 1).to(device), factors, parts


def without_rare(attributes, indices, rarest):
    """The attributes (n, a) of which neither value is rarer than this in these faces."""
    share = attributes[indices].float().mean(0)
    return attributes[:, (share - 0.5).abs() <= 0.5 - rarest]


def take(images, indices):
    """Images as floats from -1 to 1; indices beyond their number are of mirror images."""
    x, mirrored = images[indices % len(images)], indices >= len(images)
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def map_faces(function, images, indices, batch=100):
    """function(faces with these indices), in batches."""
    return torch.cat([function(take(images, part)) for part in indices.split(batch)])


def faces_file(args, beta, seed):
    return args.out / f"{args.figure}-{args.scale}-faces-{args.dataset}-{beta:g}-{seed}.pt"


class Residual(nn.Module):
    """x + two convolutions, between which a condition (n, c, 4, 4) is added."""

    def __init__(self, channels, condition=None):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Conv2d(condition, channels, 1) if condition else None

    def forward(self, x, condition=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.condition:
            h = h + F.interpolate(self.condition(condition), x.shape[2:])
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
    """Faces x (n, 3, s, s) to codes u (n, CODE, s/4, s/4), and back; q(u|x) = N(encoder(x), 0.2^2).

    Batch norm gives the codes unit variance, so that the mean of KL(q(u|x) || N(0, I)) is constant,
    and left out of the loss.
    """

    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, width, 3, padding=1), Residual(width),
            nn.Conv2d(width, CODE, 1), nn.BatchNorm2d(CODE, affine=False))
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE, width, 3, padding=1), Residual(width),
            nn.Conv2d(width, 48, 3, padding=1), nn.PixelShuffle(4))

    def rebuild(self, x):
        return self.decoder(self.encoder(x)).clamp(-1, 1)

    def loss(self, x):
        u = self.encoder(x)
        error = self.decoder(u + 0.2 * torch.randn_like(u)) - x
        return error.square().mean() + 0.2 * error.abs().mean()  # the latter keeps edges sharp


class Prior(nn.Module):
    """p(u|z) by flow matching: the velocity of u_t = (1 - t) * noise + t * u, given z and t."""

    def __init__(self, width, blocks, side, z_channels):
        super().__init__()
        self.condition = nn.Conv2d(z_channels, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        self.input = nn.Conv2d(CODE, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.up = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.blocks = nn.ModuleList(Residual(width, width) for _ in range(blocks + 2))
        self.output = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(),
                                    nn.Conv2d(width, CODE, 3, padding=1))

    def forward(self, u, t, z):
        first, *low, last = self.blocks
        waves = torch.cos(torch.pi * t[:, None] * torch.arange(16, device=u.device))
        condition = self.condition(z) + self.time(waves)[:, :, None, None]
        h = first(self.input(u) + self.positions, condition)
        below = self.down(h)
        for block in low:
            below = block(below, condition)
        return self.output(last(h + self.up(below), condition))

    def loss(self, u, z):
        t = torch.randn(len(u), device=u.device).sigmoid()  # seldom near 0 and 1, which are easy
        noise, mix = torch.randn_like(u), t[:, None, None, None]
        velocity = self((1 - mix) * noise + mix * u, t, z)
        return (velocity - (u - noise)).square().mean()

    def draw(self, z, steps):
        """u ~ p(u|z) (n, CODE, side, side), by the midpoint rule from t = 0 to 1."""
        u = torch.randn(len(z), CODE, *self.positions.shape[2:], device=z.device)
        for step in range(steps):
            t = torch.full((len(z),), step / steps, device=z.device)
            middle = u + self(u, t, z) / (2 * steps)
            u = u + self(middle, t + 0.5 / steps, z) / steps
        return u


def agreement(logits, y):
    """Fraction of logits (n, a) whose sign is that of the 0/1 attributes y (n, a)."""
    return ((logits > 0) == y.bool()).float().mean().item()


def chance_agreement(logits, y):
    """The agreement of signs as frequent as these that know nothing of y."""
    truth, found = y.float().mean(0), (logits > 0).float().mean(0)
    return (truth * found + (1 - truth) * (1 - found)).mean().item()


def read_from_draws(logits, attributes, factors, indices):
    """Accuracy of these faces' attributes and factors, in the evaluation classifier's logits."""
    count = attributes.shape[1]  # first the attributes, then the values of each factor
    named, others = logits[:, :count], logits[:, count:]
    found = {"drawn_attributes": agreement(named, attributes[indices]),
             "drawn_chance": chance_agreement(named, attributes[indices])}
    for name, value in factors.items():
        scores, others = others.tensor_split([value.shape[1]], 1)
        found[f"drawn_{name}"] = accuracy(scores, value[indices].argmax(1))
    return found


HAIR = {"synthetic": (-0.58, -0.42), "celeba": (-0.85, -0.6)}  # heights, from -1 to 1
SKIN = (0.15, 0.3)  # heights below eyes and glasses, above the mouth


def regions(dataset, size, device):
    """{region: its pixels, bool (size, size)}."""
    axis = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
    across, down = axis.expand(size, size), axis[:, None].expand(size, size)
    outside = torch.hypot(across / FACE_ELLIPSE[0], down / FACE_ELLIPSE[1]) > 1
    found = {"picture": torch.ones_like(outside), "outside": outside, "inside": ~outside}
    for name, (top, bottom) in (("hair", HAIR[dataset]), ("skin", SKIN)):
        found[name] = (across.abs() < 0.2) & (down > top) & (down < bottom)
    return found


def colours_kept(x, drawn, dataset):
    """share_kept of the pixels, and of the mean colour of three regions."""
    found = {"kept_picture": share_kept(x.flatten(1), drawn.flatten(1))}
    masks = regions(dataset, x.shape[2], x.device)
    for name in ("outside", "hair", "skin"):
        mask = masks[name]
        found[f"kept_{name}_colour"] = share_kept(x[:, :, mask].mean(2), drawn[:, :, mask].mean(2))
    return found


def share_kept(x, drawn):
    """1 - E|x - x^|^2 / E|x' - x^|^2, x' another face (n, k): 1 if draws are x, 0 if any face.

    For exact draws of p(x|z) the share of the variance of x that z determines; larger for draws
    that vary too little.
    """
    other = x.var(0) + drawn.var(0) + (x.mean(0) - drawn.mean(0)).square()
    return 1 - ((x - drawn).square().mean(0).sum() / other.sum()).item()


def ridge_targets(images, attributes, factors, parts, dataset, components):
    """{measure: values (n, k) of the faces to fit and to test, less the mean of the former}.

    Of pixels principal components.
    """
    train, values = parts["ridge"], {"attribute_nats": attributes}
    if factors:
        values["not_named_nats"] = torch.cat([factors[name] for name in NOT_NAMED], 1)
    masks = regions(dataset, images.shape[2], images.device)
    for ending, region in (("", "picture"), ("_outside", "outside"), ("_inside", "inside")):
        pixels = images[:, :, masks[region]].flatten(1)
        mean = pixels[train].float().mean(0)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)  # of svd_lowrank, so that all cells have the same components
            basis = torch.svd_lowrank(pixels[train] - mean, components, niter=4)[2]
        projected = [(part - mean) @ basis for part in pixels.split(500)]
        values[f"picture_nats{ending}"] = torch.cat(projected)
    targets = {}
    for name, value in values.items():
        centred = value.float() - value[train].float().mean(0)
        targets[name] = centred[train], centred[parts["test"]]
    return targets


def measure_z(z, z_test, targets):
    """{measure: nats of its targets that ridge regression reads from z}, on test faces.

    -1/2 sum log(1 - R^2) over the columns of a target: a lower bound of I(z;target) if it is
    Gaussian with uncorrelated columns, which components of pixels nearly are. Of attributes and
    factors it is only a score.
    """
    known = torch.cat([train for train, _ in targets.values()], 1)
    predicted = ridge(z.flatten(1), known, z_test.flatten(1))
    nats, start = {}, 0
    for name, (_, test) in targets.items():
        end = start + test.shape[1]
        unexplained = (test - predicted[:, start:end]).square().mean(0) / test.square().mean(0)
        nats[name] = -0.5 * unexplained.log().sum().item()
        start = end
    return nats


def measure_noise(z, z_test, targets):
    """measure_z under white noise of each standard deviation in NOISE: a list of dicts."""
    noise, noise_test = torch.randn_like(z), torch.randn_like(z_test)
    levels = []
    for std in NOISE:
        nats = measure_z(z + std * noise, z_test + std * noise_test, targets)
        levels.append({"std": std} | nats)
    return levels


def ridge(z, target, z_test):
    """Ridge regression of target (n, k) on z (n, d), its prediction from z_test (m, d): (m, k).

    Each column has the penalty of least leave-one-out error.
    """
    mean, std, centre = z.mean(0), z.std(0) + 1e-6, target.mean(0)
    z, target = (z - mean) / std, target - centre
    values, vectors = torch.linalg.eigh(z.T @ z)
    scores, errors, weights = z @ vectors, [], []
    for penalty in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10):
        shrunk = 1 / (values.clamp(min=0) + penalty * len(z))
        weights.append(shrunk * (target.T @ scores))
        leverage = scores.square() @ shrunk + 1 / len(z)
        left_out = (target - scores @ weights[-1].T) / (1 - leverage[:, None])
        errors.append(left_out.square().mean(0))
    best = torch.stack(errors).argmin(0)
    weight = torch.stack(weights)[best, torch.arange(len(best), device=z.device)]
    return centre + (z_test - mean) / std @ vectors @ weight.T


# --- What follows from rows
# kept_*: share of the variance of x that draws keep. drawn_*: accuracy of what is read from draws;
# its excess is the share of the way from chance to 1. *_nats: ridge scores of z. share_*: these
# excesses and scores as shares of those at beta = 0; noise_*: the same under white noise.

NATS = {"attributes": "attribute_nats", "pixels": "picture_nats",
        "pixels of the background": "picture_nats_outside", "factors not named": "not_named_nats"}


def excess(value, chance):
    """The share of the way from chance to an accuracy of 1."""
    return (value - chance) / (1 - chance)


def named(row):
    """How much draws keep of the attributes; 0 if they know nothing of them.

    Cohen's kappa, with the means over attributes of agreement and of chance.
    """
    return excess(row["drawn_attributes"], row["drawn_chance"])


def not_named(row):
    """The same of the factors that no attribute tells, whose values are equally frequent."""
    return np.mean([excess(row[f"drawn_{name}"], 1 / FACE_FACTORS[name]) for name in NOT_NAMED])


def under_noise(base, nats, key):
    """What is left of key where white noise in z of the row base leaves this score of attributes.

    Between two amounts of noise it is linear in that score; nan below the score that most noise
    leaves, and the value without noise above the score without.
    """
    levels = sorted([base, *base["noise"]], key=itemgetter("attribute_nats"))
    attribute_nats = [level["attribute_nats"] for level in levels]
    return np.interp(nats, attribute_nats, [level[key] for level in levels], left=np.nan)


def add_shares(rows):
    """The rows of seeds that have beta = 0, with shares of what is kept there."""
    found = []
    for own in group_by(rows, "seed").values():
        base = ok_rows(own, beta=0.0)
        if base:
            found += [row | shares(row, base[0]) for row in own]
    return found


def ratio(value, base):
    """value / base; nan if the base is hardly more than 0."""
    return value / base if base > 0.1 else np.nan


def shares(row, base):
    """What a row keeps, as shares of what its seed keeps at beta = 0; noise_: white noise does."""
    found = {"share_named": ratio(named(row), named(base))}
    if "drawn_background" in row:  # there are factors
        found["share_not_named"] = ratio(not_named(row), not_named(base))
    for key in NATS.values():
        if key in row:
            found[f"share_{key}"] = ratio(row[key], base[key])
            if key != "attribute_nats":  # of which noise leaves as much
                left = under_noise(base, row["attribute_nats"], key)
                found[f"noise_{key}"] = ratio(left, base[key])
    return found


def named_at_half(rows):
    """Share of the attributes at the first beta where what is not named is below half; or nan."""
    for own in group_by(rows, "beta").values():
        if own[0]["share_not_named"] < 0.5:
            return own[0]["share_named"]
    return np.nan


def beyond_noise(rows, key):
    """{"β = 2:": the share that noise leaves minus that the penalty leaves, per seed}."""
    found = {}
    for (beta,), own in group_by(rows, "beta").items():
        if beta > 0 and key in own[0]:
            found[f"β = {beta:g}:"] = difference(own, f"noise_{key}", f"share_{key}")
    return found


def column(rows, key):
    return [row[key] for row in rows]


def difference(rows, key, other):
    return [row[key] - row[other] for row in rows]


# {label: key of the rows}
IN_DRAWS = {"attributes (named)": "share_named", "not named": "share_not_named"}
COLOURS = {"colour of the background": "kept_outside_colour",
           "colour of the hair": "kept_hair_colour", "colour of the skin": "kept_skin_colour",
           "pixels": "kept_picture"}
ACCURACIES = {"attributes, of x rebuilt by the VAE": "rebuilt_attributes",
              "attributes": "drawn_attributes"}
ACCURACIES |= {name.replace("_", " "): f"drawn_{name}" for name in FACE_FACTORS}
IN_Z = {label: f"share_{key}" for label, key in NATS.items()}
UNDER_NOISE = {label: f"noise_{key}" for label, key in NATS.items()}


def beta_panel(ax, rows, title, curves, controls=()):
    """Curves {label: key} of rows against beta; controls: the same under noise, dotted."""
    for number, (label, key) in enumerate(curves.items()):
        if key in rows[0]:
            plot_points(ax, summarise(rows, "beta", key), "o-", color=f"C{number}", label=label)
        if label in controls and controls[label] in rows[0]:
            plot_points(ax, summarise(rows, "beta", controls[label]), "s:", color=f"C{number}",
                        label=f"{label}, noise in z")
    betas = sorted(set(column(rows, "beta")))
    ax.set_xscale("symlog", linthresh=0.03, linscale=0.3)  # shows beta = 0
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
    ax.minorticks_off()
    ax.set(xlabel="β", title=title, ylim=(0, None))
    ax.legend()


def plot(rows, args):
    panels = []
    if len(set(column(rows, "beta"))) > 1:
        panels = [partial(beta_panel, rows=rows, curves=IN_DRAWS,
                          title="excess over chance in draws, share of β = 0's"),
                  partial(beta_panel, rows=rows, curves=COLOURS,
                          title="share of variance that draws keep"),
                  partial(beta_panel, rows=rows, curves=IN_Z, controls=UNDER_NOISE,
                          title="ridge scores of z, shares of those at β = 0")]
    save_panels(panels, f"Fig. 5: {args.dataset}, scale {args.scale}", args)


def saved_faces(args, beta, seed):
    """x and draws of a cell, uint8 (1 + DRAWS, SHOWN, 3, s, s), or None."""
    try:
        saved = torch.load(faces_file(args, beta, seed))
    except Exception:  # missing or damaged, in ways that differ in type
        return None
    return saved["faces"] if saved["settings"] == str(SETTINGS[args.scale]) else None


def plot_faces(rows, args):
    """The paper's figure, <out>/<figure>-<scale>-faces.png and .pdf: draws of one seed by beta."""
    from matplotlib.figure import Figure
    seed, saved = min(column(rows, "seed")), []
    for beta in sorted(column(ok_rows(rows, seed=seed), "beta")):
        faces = saved_faces(args, beta, seed)
        if faces is not None:
            saved.append((beta, faces))
    if not saved:
        return
    columns = {"x": saved[0][1][:1]}
    for beta, faces in saved[::math.ceil(len(saved) / 4)]:  # more would not fit
        columns[f"β = {beta:g}"] = faces[1:]
    widths = [len(faces) for faces in columns.values()]
    fig = Figure(figsize=(0.6 * sum(widths) + 0.6, 0.6 * SHOWN + 0.8), layout="constrained")
    axes = fig.subplots(1, len(widths), width_ratios=widths)
    for ax, (title, faces) in zip(axes, columns.items()):
        ax.imshow(rearrange(faces, "draw face c h w -> (face h) (draw w) c"))
        ax.set_title(title)
        ax.axis("off")
    fig.supxlabel("Three draws of one z for each β: what all share with x, z holds;\nwhat differs "
                  "z lacks, or the generator has not learned to use", fontsize=9)
    fig.suptitle(f"Fig. 5: {args.dataset}, scale {args.scale}")
    save_figure(fig, args.out / f"{args.figure}-{args.scale}-faces", bbox_inches="tight")


def claims(rows, scale):
    """The paper's claims, of complete seeds.

    Thresholds were set before the grid was trained, LARGE after.
    """
    rows = complete_seeds(rows, [{"beta": beta} for beta in GRID[scale]])
    large, factors = LARGE[scale], any("share_not_named" in row for row in rows)
    at_zero, at_large = ok_rows(rows, beta=0.0), ok_rows(rows, beta=large)
    over_background = {part: difference(at_large, f"kept_{part}_colour", "kept_outside_colour")
                       for part in ("hair", "skin")}
    table = []
    if factors:
        table.append(check(
            f"β = {large:g}: of their excess over chance at β = 0, attributes keep at least 10 "
            "points more than what is not named (difference)", "in pictures",
            {"": difference(at_large, "share_named", "share_not_named")}, (0.1, np.inf),
            "{:.0%}"))
    table += [
        check("β = 0: draws keep over 80% of the variance of the background's colour",
              "in pictures", {"": column(at_zero, "kept_outside_colour")}, (0.8, 1), "{:.0%}"),
        check(f"β = {large:g}: draws keep at least 10 points more of the variance of the hair's "
              "and the skin's colour than of the background's (differences)", "in pictures",
              over_background, (0.1, np.inf), "{:.0%}")]
    if scale == "demo":  # whose networks are trained too briefly for the next
        return table
    table += [
        check(f"β = {large:g}: the background is new: under 50% of its colour's variance is kept",
              "in pictures", {"": column(at_large, "kept_outside_colour")}, (-np.inf, 0.5),
              "{:.0%}"),
        check(f"β = {large:g}: over 80% of the attributes' excess at β = 0 is kept",
              "in pictures", {"": column(at_large, "share_named")}, (0.8, np.inf), "{:.0%}")]
    in_z = ["pixels of the background"]
    if factors:
        in_z.append("factors not named")
        table.append(check(
            "at the first β where under half of the excess of what is not named is kept, over 80% "
            "of that of the attributes is", "in pictures",
            {"": per_seed(named_at_half, rows)}, (0.8, np.inf), "{:.0%}"))
    for label in in_z:
        table.append(check(
            f"ridge score of {label} in z: the share that noise leaves minus that the penalty "
            "leaves, at equal score of the attributes, is at least 2 points", "implied",
            beyond_noise(rows, NATS[label]), (0.02, np.inf), "{:.1%}"))
    return table


def make_cells(scale):
    cells = [{"beta": beta} for beta in GRID[scale]]
    return cells + [{"beta": beta, "seed": 0} for beta in ONE_SEED[scale]]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    rows = ok_rows(rows)
    compared = add_shares(rows)
    plot(compared, args)
    plot_faces(rows, args)
    beta = {"β": "beta"}
    information = {"I(w;D)": ("information", "{:.0f}")}
    share_under_noise = {f"{label}, noise in z": key for label, key in UNDER_NOISE.items()}
    save_tables(args, claims=claims(compared, args.scale),
                draws_share_of_variance_kept=cell_table(rows, beta, COLOURS),
                accuracy_of_what_is_read_from_draws=cell_table(rows, beta, ACCURACIES),
                ridge_scores_of_z_in_nats=cell_table(
                    rows, beta, {"accuracy of all attributes": "attribute_acc",
                                 "of the majority": "majority_acc"} | NATS | information),
                shares_of_these_scores_and_under_noise=cell_table(
                    compared, beta, IN_Z | share_under_noise))


if __name__ == "__main__":
    main()
