"""Fig. 4: the penalty on information removes a nuisance from the representation, not the label.

    python fig4_cluttered_mnist.py --scale demo     # synthetic digits, 2 minutes on 2 cores
    python fig4_cluttered_mnist.py --scale cpu      # MNIST, 1/8 width, 8 hours on 2 cores
    python fig4_cluttered_mnist.py --gpu 0          # MNIST, the paper's All-CNN

An All-CNN reads digits under clutter, ten white 4x4 squares at random positions, new for every
batch, with L = cross-entropy + beta/N * I(w;D). z is the map that its last layer reads, a 1x1
convolution to the classes; the nuisance n is the mask of the squares. The paper: as beta grows from
0.001 to 3, I(z;n) falls from 9.7 to 3.1 nats, below a bound as in Cor. 5.3; I(z;y) stays at 2.2.

Two lower bounds on I(z;n), on held-out digits and clutter. A decoder reads the squares' positions,
uniform over 625 places, from z: I(z;n) >= 10 * (log 625 - cross-entropy). InfoNCE: a
discriminator tells pairs (z, n) from others. Their values depend on decoder and discriminator, and
on how fast these learn; what counts is how they change with beta, at equal effort.

The control: does the penalty remove clutter, or anything? White noise on z of the net at the
smallest beta, as much as leaves the label the nats that a larger beta leaves it, removes clutter
too. If the penalty selects, it leaves less clutter than that noise. The test is hard to pass: the
noise is independent at every position, and the label is read from the mean over 49 of them, where
the noise is 7 times smaller than where the clutter is read.
"""
import contextlib
import copy
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (StochasticConv2d, accuracy, add_clutter, beta_at, cell_table, check,
                    complete_seeds, density_ratio_information, draw_subset,
                    label_information, layer_information, layer_information_bound, load_images,
                    lr_factor, mean_network, minibatches, ok_rows, param_groups, parse_args,
                    per_seed, plot_points, predict, recalibrate_bn, run_grid, sample_weights,
                    save_panels, save_tables, summarise, to_stochastic, total_correlation,
                    values_by, weight_information, with_information)

# How a cell is trained and read, stored in its row. n digits train the classifier; passes * n z,
# each under clutter of its own, train what reads z. patience: steps without gain after which the
# discriminator stops.
SHARED = dict(lr=0.003, lr_noise=0.05)
SETTINGS = {
    "demo": dict(n=2000, test=1000, validation=500, passes=5, width=1 / 12, steps=600, batch=32,
                 decoder_channels=64, decoder_steps=600, discriminator_channels=32,
                 discriminator_steps=150, patience=150, **SHARED),
    "cpu": dict(n=60_000, test=5000, validation=1000, passes=3, width=1 / 8, steps=1800,
                batch=100, decoder_channels=64, decoder_steps=8000, discriminator_channels=128,
                discriminator_steps=8000, patience=800, **SHARED),
    "paper": dict(n=60_000, test=10_000, validation=2000, passes=3, width=1, steps=20_000,
                  batch=100, decoder_channels=128, decoder_steps=16_000,
                  discriminator_channels=128, discriminator_steps=20_000, patience=1000,
                  **SHARED),
}
BETAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = {"demo": dict(betas=(0.001, 0.01, 0.1), controls=(0.1,)),  # at a small n beta/n is large
        "cpu": dict(betas=BETAS, controls=BETAS[2:]),
        "paper": dict(betas=BETAS, controls=BETAS[2:])}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic", "mnist"], "cpu": ["mnist", "synthetic"],
            "paper": ["mnist", "synthetic"]}
SQUARES = 10
STARTS = 25  # a 4x4 square in 28x28 pixels starts in one of 25 rows and columns


def all_cnn(width=1.0, channels=1):
    """The All-CNN in two parts: x (n, channels, 28, 28) to its last map z, z to logits."""
    layers, inputs = [], channels
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2),
                   nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    head = nn.Sequential(nn.Conv2d(inputs, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Sequential(*layers), head)


def train_cell(cell, device, args, progress):
    """Train a classifier and measure what its z holds; or what z of the control holds.

    A control trains two: one at its beta, and one at the smallest of BETAS, to whose z it adds as
    much noise as leaves the label the nats that the first leaves it.
    """
    s, seed = SETTINGS[args.scale], cell["seed"]
    model, digits = train_classifier(cell["beta"], seed, device, args, progress)
    if cell.get("control"):
        # one pass is enough: label_nats reads no more
        z, _, _, labels = sample_z(model, digits, passes=1)
        aim = label_nats(z.mean((2, 3)), labels, s)
        model, digits = train_classifier(BETAS[0], seed, device, args, progress)
        z, masks, positions, labels = sample_z(model, digits, s["passes"])
        row = {"noise": noise_size(z, labels, aim, s)}
        add_noise(z, row["noise"])
    else:
        row = measure_classifier(model, digits)
        z, masks, positions, labels = sample_z(model, digits, s["passes"])

    # Train what reads z: the label, the squares' positions, the mask
    row["i_zy"] = label_nats(z.mean((2, 3)), labels, s)
    row["i_zn_positions"] = position_information(z, positions, s, progress)
    # shuffle=False: z of the test digits come last, so that they are the ones held out
    discriminator = Discriminator(z.shape[1], s["discriminator_channels"]).to(device)
    ratio = density_ratio_information(
        discriminator, z, masks, steps=s["discriminator_steps"], patience=s["patience"],
        validation=s["validation"], held_out=s["test"], shuffle=False)
    return row | {"i_zn_nce": ratio["info_nce"], "i_zn_dv": ratio["donsker_varadhan"]}


def train_classifier(beta, seed, device, args, progress):
    """A net trained at beta and its digits; the same for the same seed."""
    s = SETTINGS[args.scale]
    steps = s["steps"]
    torch.manual_seed(seed)
    digits = ClutteredDigits(seed, device, args)
    model = to_stochastic(all_cnn(s["width"]), skip=("0.0", "1.0"))  # the first and last layer
    model.to(device, memory_format=torch.channels_last)  # faster on a CPU
    forward = with_information(model, digits.draw(digits.x[:s["batch"]])[0])
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps))
    for step, index in zip(range(steps), minibatches(s["n"], s["batch"], device)):
        images, _, _ = digits.draw(digits.x[index])  # new clutter every time
        logits, nats = forward(images)
        cross_entropy = F.cross_entropy(logits, digits.y[index])
        beta_now = beta_at(step / steps, beta, 0)
        loss = cross_entropy + beta_now / s["n"] * nats  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return model, digits


def load_data(args):
    s = SETTINGS[args.scale]
    name = "digits" if args.dataset == "synthetic" else args.dataset
    return load_images(name, args.data_dir, s["n"], s["test"])


class ClutteredDigits:
    """Digits x, y to train on and x_test, y_test, on a device, and clutter that is ever new."""

    def __init__(self, seed, device, args):
        s, generator = SETTINGS[args.scale], torch.Generator().manual_seed(seed)
        x, y, x_test, y_test, mean, std = load_data(args)
        x, y = draw_subset(x, y, s["n"], generator)
        x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
        self.x, self.y = x.to(device), y.to(device)
        self.x_test, self.y_test = x_test.to(device), y_test.to(device)
        self.mean, self.std = mean.to(device), std.to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, digits):
        """Digits (n, 1, 28, 28) under clutter: images, masks, positions (n, squares) below 625."""
        images, masks, starts = add_clutter(digits, self.generator, SQUARES, positions=True)
        row, column = starts.unbind(2)
        return (images.float() - self.mean) / self.std, masks, STARTS * row + column


# What z holds

def noisy_copy(model, digits):
    """A copy with noise drawn anew at every position, as Cor. 5.3 has it, and batch norm for it."""
    net = copy.deepcopy(model)
    for layer in net.modules():
        if isinstance(layer, StochasticConv2d):
            layer.local = True
    images, _, _ = digits.draw(digits.x[:1000])  # each has at least 49 positions of a channel
    with sample_weights(net):
        return recalibrate_bn(net, images).eval()


@torch.no_grad()
def sample_z(model, digits, passes):
    """z ~ p(z|x) (n, channels, 7, 7), masks, positions, labels.

    Of the training digits `passes` times, then of the test digits, each under clutter of its own.
    """
    net, parts = noisy_copy(model, digits), []
    with sample_weights(net):
        # in parts, as the squares of all images at once would fill the memory
        for x in torch.cat([digits.x] * passes + [digits.x_test]).split(1000):
            images, masks, positions = digits.draw(x)
            parts.append((predict(net[0], images), masks, positions))
    z, masks, positions = map(torch.cat, zip(*parts))
    return z, masks, positions, torch.cat([digits.y] * passes + [digits.y_test])


class PositionDecoder(nn.Module):
    """z (n, channels, 7, 7) to log p (n, 625) of where a square starts."""

    def __init__(self, channels, width):
        super().__init__()
        layers, inputs = [], 2 * channels
        for _ in range(4):
            layers += [nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        # 4x4 pixels for each of z's 7x7 positions
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 16, 1), nn.PixelShuffle(4))

    def forward(self, z):
        # the logarithm too: what is small in z can tell as much; under noise z can be negative
        logits = self.layers(torch.cat([z, torch.log(z.relu() + 0.05)], 1))
        return logits[:, 0, :STARTS, :STARTS].flatten(1).log_softmax(1)


def position_nats(log_p, positions):
    """Barber and Agakov's lower bound on I(z;n), nats: entropy of the positions - cross-entropy.

    Each of the squares is a draw from the one distribution (n, 625) that the decoder gives.
    """
    nats = math.log(STARTS**2) + log_p.gather(1, positions)
    return nats.sum(1).mean()


def position_information(z, positions, s, progress):
    """position_nats of a decoder on z of test digits, trained on those of training digits.

    The last s["validation"] of the latter choose when: at a large beta it learns its z by heart.
    Their digits are trained on too, under other clutter.
    """
    steps, every = s["decoder_steps"], max(1, s["decoder_steps"] // 20)
    parts = len(z) - s["validation"] - s["test"], s["validation"], s["test"]
    z, z_validation, z_test = z.split(parts)
    positions, positions_validation, positions_test = positions.split(parts)
    decoder = PositionDecoder(z.shape[1], s["decoder_channels"])
    decoder.to(z.device, memory_format=torch.channels_last)  # faster on a CPU
    optimizer = torch.optim.Adam(decoder.parameters(), 0.003, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, hold=0.3))
    best = -math.inf
    for step, index in zip(range(steps), minibatches(len(z), 128, z.device)):
        loss = -position_nats(decoder(z[index]), positions[index])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % every == every - 1:
            progress(step, steps, loss.item())
            nats = held_out_nats(decoder, z_validation, positions_validation)
            if nats > best:
                best, best_decoder = nats, copy.deepcopy(decoder)
    return held_out_nats(best_decoder, z_test, positions_test)


@torch.no_grad()
def held_out_nats(decoder, z, positions):
    decoder.eval()
    nats = position_nats(predict(decoder, z), positions).item()
    decoder.train()
    return nats


class Discriminator(nn.Module):
    """Inner products (k, m) of features of z (k, channels, 7, 7) and masks (m, 1, 28, 28).

    So all pairs of a batch cost one pass of its z and one of its masks.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.of_z, self.of_mask = self.features(channels, width), self.features(16, width)

    def features(self, channels, width):
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(width, 32, 1), nn.Flatten())

    def forward(self, z, n):
        # the 4x4 pixels at each of z's 7x7 positions as channels
        blocks = rearrange(n.float(), "m 1 (h a) (w b) -> m (a b) h w", a=4, b=4)
        z, mask = self.of_z(z), self.of_mask(blocks)
        return z @ mask.T / z.shape[1] ** 0.5


def label_nats(features, labels, s):
    """A lower bound on I(z;y), nats: by a linear classifier of z's mean over positions.

    Fitted anew, as the net's own last layer does not know of the noise of the control.
    """
    parts = [s["n"], s["test"]]  # one pass over the training digits is enough to fit it
    x, x_test = features[-sum(parts):].split(parts)
    y, y_test = labels[-sum(parts):].split(parts)
    mean, std = x.mean(0), x.std(0) + 1e-6  # a pruned channel is constant
    head = nn.Linear(x.shape[1], 10).to(x.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head((x - mean) / std), y)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return label_information(head((x_test - mean) / std), y_test).item()


def add_noise(z, size):
    """White noise on z, in place; size: its standard deviation, in those of z's channels."""
    std = z.std((0, 2, 3))
    for part in z.split(1000):  # z is 1 GB at scale cpu
        part.addcmul_(torch.randn_like(part), size * std[:, None, None])


def noise_size(z, labels, nats, s):
    """The size of white noise on z that leaves this many label nats, by bisection.

    0.001, hardly any, if z holds fewer even without noise.
    """
    features, std = z.mean((2, 3)), z.std((0, 2, 3))
    noise = torch.randn_like(features) * std / z[0, 0].numel() ** 0.5  # its mean over positions
    low, high = 1e-3, 100
    # 12 halvings of a factor 10^5 on a logarithmic scale: to 0.3%
    for _ in range(12):
        middle = (low * high) ** 0.5
        if label_nats(features + middle * noise, labels, s) > nats:
            low = middle
        else:
            high = middle
    return low


# Accuracy, bounds and disentanglement of a classifier

@torch.no_grad()
def measure_classifier(model, digits):
    """Accuracy of the mean network, nats in the weights, the bound of Cor. 5.3, Prop. 5.1."""
    images, _, _ = digits.draw(digits.x[:1000])
    images_test, _, _ = digits.draw(digits.x_test)
    net = recalibrate_bn(mean_network(model), images).eval()
    test_acc = accuracy(predict(net, images_test), digits.y_test)

    layers = noisy_copy(model, digits)[0]
    before, last = layers[:-3], layers[-3]  # the last convolution; batch norm and ReLU follow
    with sample_weights(layers):
        inputs = predict(before, images_test)
        units = predict(last, inputs)
    return {"test_acc": test_acc, "information": weight_information(model).item(),
            **tightest_bound(layers), **disentanglement(last, inputs, units)}


def tightest_bound(layers):
    """The least bound of Cor. 5.3 on I(z;x) of the layers, and without its 1 nat a unit, nats.

    A unit whose weights have noise of variance a is a channel of capacity log(1 + 1/a)/2 if its
    inputs are centred, uncorrelated and of equal variance. Ours are not, so this is the paper's
    formula, no guarantee. Cor. 5.3 allows 1 nat more; the paper's plot seems to be without it.
    """
    tightest, side = {"bound": math.inf}, 28
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            side //= layer.stride[0]
        if isinstance(layer, StochasticConv2d):
            noise = layer.log_sigma2.exp().flatten(1).sum(1)
            noise = noise / layer.weight.square().flatten(1).sum(1)
            units = layer.out_channels * side**2
            bound = layer_information_bound(units, torch.log1p(noise)).item()
            if bound < tightest["bound"]:
                tightest = {"bound": bound, "capacity": bound - units}
    return tightest


def disentanglement(layer, inputs, units):
    """TC(z) and I(x;z) + TC(z) of a 1x1 convolution's units at a position, nats (Prop. 5.1)."""
    inputs, units = (rearrange(t, "n c h w -> (n h w) c") for t in (inputs, units))
    alive = inputs.any(1)  # without inputs a unit has no noise, and holds infinitely many nats
    weight = layer.weight.flatten(1).double() + 1e-30  # 0 in pruned units
    alpha = torch.log1p(layer.log_sigma2.flatten(1).exp() / weight**2)
    information_and_tc = layer_information(weight, alpha, inputs[alive].double()).item()
    correlation = total_correlation(units[alive]).item()
    return {"total_correlation": correlation, "i_and_tc": information_and_tc}


# The paper's Fig. 4, digitised, nats.
PAPER_BETAS = (0.001, 0.01, 0.1, 0.3, 1, 3)
PAPER_CLUTTER = (9.7, 8.45, 5.0, 4.2, 3.25, 3.1)
PAPER_BOUND = (19_900, 18_900, 10_700, 6000, 4000, 3400)
PAPER_LABEL = 2.21
READERS = {"i_zn_positions": "decoder of positions", "i_zn_nce": "InfoNCE"}


def largest_rise(rows, key):
    """{"to β = 0.01:": rise of the value from the β before, per seed}, of the largest rise."""
    curve = values_by(rows, "beta", key)
    rises = {f"to β = {beta:g}:": curve[beta] - curve[before] for before, beta in pairwise(curve)}
    if not rises:
        return {}
    means = [values.mean() for values in rises.values()]
    largest = list(rises)[np.argmax(means)]  # one that is nan, if there is one
    return {largest: rises[largest]}


def rank_correlation(rows, x, y):
    """Spearman's, of one seed's values over β."""
    x_ranks = np.argsort(np.argsort([row[x] for row in rows]))
    y_ranks = np.argsort(np.argsort([row[y] for row in rows]))
    return np.corrcoef(x_ranks, y_ranks)[0, 1]


def log_slope(rows, x, y):
    """The k of a fit of y ~ x^k over β, of one seed; nan if some value is not positive."""
    values = np.array([[row[x], row[y]] for row in rows])
    if (values <= 0).any():
        return math.nan
    return np.polyfit(*np.log(values.T), 1)[0]


def noise_excess(penalty, controls, key):
    """{"β = 0.1:": clutter that as costly noise leaves minus that the penalty leaves, ...}.

    nan where the penalty costs the label so little that hardly any noise does.
    """
    left = {(row["beta"], row["seed"]): row[key] for row in penalty}
    excess = {}
    for row in controls:
        cell = row["beta"], row["seed"]
        if cell in left:
            value = row[key] - left[cell] if row["noise"] > 0.01 else math.nan
            excess.setdefault(f"β = {row['beta']:g}:", []).append(value)
    return excess


def digits_panel(ax, digits):
    """Eight digits under clutter: the paper's left panel."""
    images, _ = add_clutter(digits, torch.Generator().manual_seed(0))
    ax.imshow(rearrange(images.numpy(), "(a b) 1 h w -> (a h) (b w)", a=2), cmap="gray")
    ax.set(title="digits under clutter")
    ax.axis("off")


def clutter_panel(ax, penalty, noise):
    """Clutter that the penalty leaves, and noise that leaves as many label nats."""
    ax.plot(PAPER_BETAS, PAPER_CLUTTER, "s-", color="0.6", ms=4, label="paper")
    for (key, name), colour in zip(READERS.items(), ("C0", "C1")):
        plot_points(ax, summarise(penalty, "beta", key), "o-", color=colour, label=name)
        plot_points(ax, summarise(noise, "beta", key), "D--", color=colour, mfc="w",
                    label=f"{name}, noise")
    ax.set(xscale="log", xlabel="β, or noise with as many label nats", ylabel="I(z;n), nats",
           title="clutter in z", ylim=(-0.3, None))  # what is at 0 shows
    ax.legend()


def bound_panel(ax, penalty):
    """Clutter against the bound, a point for each β."""
    ax.plot(PAPER_BOUND, PAPER_CLUTTER, "s-", color="0.6", ms=4, label="paper, 9,408 units")
    clutter = [mean for _, mean, *_ in summarise(penalty, "beta", "i_zn_positions")]
    for key, style, name in (("bound", "C0o-", "Cor. 5.3"),
                             ("capacity", "C0o:", "less 1 nat per unit")):
        bound = [mean for _, mean, *_ in summarise(penalty, "beta", key)]
        ax.plot(bound, clutter, style, ms=4, lw=1.2, label=name)
    ax.set(xscale="log", yscale="log", xlabel="bound on I(z;x), nats",
           ylabel="I(z;n), nats, decoder of positions", title="clutter against the bound")
    ax.legend()


def label_panel(ax, penalty, noise):
    ax.axhline(PAPER_LABEL, color="0.6", lw=2)
    ax.annotate("paper", (penalty[0]["beta"], PAPER_LABEL - 0.02), color="0.45", va="top")
    plot_points(ax, summarise(penalty, "beta", "i_zy"), "C2o-", label="penalty")
    plot_points(ax, summarise(noise, "beta", "i_zy"), "C2D--", mfc="w", label="noise")
    ax.set(xscale="log", xlabel="β", ylabel="I(z;y), nats", title="label in z",
           ylim=(0, math.log(10)))
    ax.legend()


def plot(penalty, noise, args):
    panels = []
    files = Path(args.data_dir, "mnist.npz"), Path(args.data_dir, "MNIST")
    if args.dataset == "synthetic" or any(file.exists() for file in files):  # no download
        with contextlib.suppress(OSError):  # a damaged file
            digits = load_data(args)[2]  # which may be sorted by class
            panels.append(partial(digits_panel, digits=digits[::len(digits) // 8][:8]))
    if penalty:
        panels.append(partial(clutter_panel, penalty=penalty, noise=noise))
        panels.append(partial(bound_panel, penalty=penalty))
        panels.append(partial(label_panel, penalty=penalty, noise=noise))
    save_panels(panels, f"Fig. 4: All-CNN, {args.dataset}, scale {args.scale}", args, columns=2)


def clutter_claims(penalty, key, first, last):
    """How I(z;n) by one reader falls, from β = first to last and beyond."""
    curve, clutter = values_by(penalty, "beta", key), f"I(z;n) by {READERS[key]}"
    paper = dict(zip(PAPER_BETAS, PAPER_CLUTTER))
    share = f"{paper[last] / paper[first]:.2f}" if {first, last} <= paper.keys() else "falls"
    return [
        check(f"{clutter}: no step of β raises it by over 0.1 nats (shown: largest rise)", "falls",
              largest_rise(penalty, key), (-math.inf, 0.1)),
        check(f"{clutter}: at β = {last:g} less than half of that at β = {first:g}", share,
              {"": curve[last] / curve[first]}, (0, 0.5)),
    ]


def control_claim(penalty, noise, key):
    """Does the penalty select what it removes?"""
    return check(f"I(z;n) by {READERS[key]}: what noise leaves minus what the penalty leaves, at "
                 "equal label nats, is over 0.1 nats", "not shown",
                 noise_excess(penalty, noise, key), (0.1, math.inf))


def bound_claims(penalty):
    correlation = partial(rank_correlation, x="bound", y="i_zn_positions")
    slope = partial(log_slope, x="capacity", y="i_zn_positions")
    return [
        check("I(z;n) and the bound of Cor. 5.3 over β: rank correlation at least 0.9", "1",
              {"": per_seed(correlation, penalty)}, (0.9, 1)),
        check("I(z;n) ~ bound^k, the bound less 1 nat per unit: k within a factor 2 of the paper's",
              "0.62", {"": per_seed(slope, penalty)}, (0.31, 1.23)),
        check("layer of z: I(x;z) + TC(z), limited by Prop. 5.1, falls with every step of β "
              "(shown: largest rise)", "suggested", largest_rise(penalty, "i_and_tc"),
              (-math.inf, 0)),
    ]


def claims(penalty, noise, grid):
    """The paper's claims, of complete seeds.

    Thresholds were set before the first grid; decoder and discriminator were enlarged after it.
    """
    penalty = complete_seeds(penalty, [{"beta": beta} for beta in grid["betas"]])
    noise = complete_seeds(noise, [{"beta": beta} for beta in grid["controls"]])
    moderate = sorted(beta for beta in grid["betas"] if beta <= 1)
    if not penalty or len(moderate) < 2:
        return []
    if len(moderate) < 4:  # a demo trains classifier and discriminator too briefly for more
        return clutter_claims(penalty, "i_zn_positions", moderate[0], moderate[-1])
    label = values_by(penalty, "beta", "i_zy")
    table = [check("I(z;y) stays within 0.15 nats of 2.2 up to β = 1", f"{PAPER_LABEL} nats",
                   {f"β = {beta:g}:": label[beta] for beta in moderate}, (2.05, 2.35))]
    for key in READERS:
        table += clutter_claims(penalty, key, moderate[0], moderate[-1])
        table.append(control_claim(penalty, noise, key))
    return table + bound_claims(penalty)


NOISE_COLUMNS = {"I(z;n), positions": ("i_zn_positions", "{:.2f}"),
                 "InfoNCE": ("i_zn_nce", "{:.2f}"), "Donsker-Varadhan": ("i_zn_dv", "{:.2f}"),
                 "I(z;y)": ("i_zy", "{:.3f}")}
PENALTY_COLUMNS = NOISE_COLUMNS | {
    "test accuracy": ("test_acc", "{:.3f}"), "I(w;D)": ("information", "{:.0f}"),
    "bound": ("bound", "{:.0f}"), "less 1 per unit": ("capacity", "{:.0f}"),
    "layer of z, I + TC": ("i_and_tc", "{:.1f}"), "TC": ("total_correlation", "{:.1f}")}


def make_cells(scale):
    grid = GRID[scale]
    return ([{"beta": beta} for beta in grid["betas"]]
            + [{"beta": beta, "control": "noise"} for beta in grid["controls"]])


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    penalty, noise = ok_rows(rows, control=None), ok_rows(rows, control="noise")
    plot(penalty, noise, args)
    save_tables(args, claims=claims(penalty, noise, GRID[args.scale]),
                penalty=cell_table(penalty, {"β": "beta"}, PENALTY_COLUMNS),
                noise=cell_table(noise, {"β": "beta"},
                                 NOISE_COLUMNS | {"size": ("noise", "{:.3f}")}))


if __name__ == "__main__":
    main()
