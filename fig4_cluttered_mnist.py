"""Fig. 4: the price of information in the weights takes the nuisance out of the code, and leaves the label in.

    python fig4_cluttered_mnist.py --scale demo     # synthetic digits, 2 minutes on 2 cores
    python fig4_cluttered_mnist.py --scale cpu      # MNIST, 1/8 width, about an hour on 2 cores
    python fig4_cluttered_mnist.py --gpu 0          # MNIST, the paper's All-CNN and 60,000 digits

An All-CNN learns to read digits under clutter, ten white 4x4 squares at random places drawn anew for every batch, with
L = cross-entropy + beta/N * I(w;D). Its code z is its last convolutional map, the nuisance n the mask of the squares.
Expected (paper, Fig. 4): I(z;n) falls from 9.7 to 3.1 nats as beta grows from 0.001 to 3, below the bound of Cor. 5.3;
I(z;y) stays at 2.2. The last panel is what the paper bounds together with I(x;z) and does not plot: the total
correlation TC(z), which here falls from beta = 0.01 on.

All layers but the first and the last are stochastic. In training a batch shares one weight sample. When z is drawn from
p(z|x), every example and place has noise of its own (local reparametrisation): that is what Cor. 5.3 counts, and batch
normalisation cannot cancel it. I(z;n) is estimated on digits and masks that neither network was trained on: by the
log-ratio of a discriminator (plug-in), by Donsker and Varadhan's bound and by InfoNCE, from the same scores.
"""
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange

from common import (StochasticConv2d, accuracy, add_clutter, annealed, calibrated, channel_statistics, claim,
                    complete_seeds, density_ratio_information, draw_subset, ib_loss, label_information,
                    layer_information, layer_information_bound, load_mnist, minibatches, new_figure, parse_args,
                    plot_points, predict, print_claims, run_grid, save_figure, summarise, synthetic_digits,
                    total_correlation, weight_information)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. `n` digits train the classifier, `pairs` of them, under new clutter, the discriminator, but for the last
# `validation`, which decide how long it learns, at most `discriminator_steps`; everything is measured on `test` others.
# ----------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "demo": dict(width=1 / 16, betas=(0.001, 0.1, 10.0), n=4000, steps=400, batch=64, pairs=4000,
                 discriminator_steps=300, validation=500, test=1000),
    "cpu": dict(width=1 / 8, betas=(0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0), n=60_000, steps=1800, batch=100,
                pairs=20_000, discriminator_steps=1200, validation=1000, test=5000),
    "paper": dict(width=1, betas=(0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0), n=60_000, steps=20_000, batch=100,
                  pairs=60_000, discriminator_steps=20_000, validation=2000, test=10_000),
}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["mnist", "synthetic"], "paper": ["mnist", "synthetic"]}
LR, LR_NOISE = 3e-3, 0.05  # Adam's learning rates of the means and of log sigma^2


# ----------------------------------------------------------------------------------------------------------------------
# Data and models
# ----------------------------------------------------------------------------------------------------------------------
def load_data(args):
    """(x_train, y_train, x_test, y_test) as loaded, uint8, and the mean and std of x_train."""
    return load_once(args.dataset, args.data_dir, SETTINGS[args.scale]["n"], SETTINGS[args.scale]["test"])


@functools.lru_cache(maxsize=1)
def load_once(dataset, data_dir, n_train, n_test):
    if dataset == "synthetic":
        data = *synthetic_digits(n_train, seed=0), *synthetic_digits(n_test, seed=1)
    else:
        data = load_mnist(data_dir)
    return *data, *channel_statistics(data[0])


def all_cnn(width=1.0):
    """The All-CNN in two parts: images to the last convolutional map z, and z to logits. Noise in all but the ends."""
    layers, channels = [], 1
    for i, (out, size, stride) in enumerate([(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1), (192, 3, 2),
                                             (192, 3, 1), (192, 1, 1)]):
        convolution, out = nn.Conv2d if i == 0 else StochasticConv2d, int(out * width)
        layers += [convolution(channels, out, size, stride=stride, padding=size // 2), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    readout = nn.Sequential(nn.Conv2d(channels, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Sequential(*layers), readout).to(memory_format=torch.channels_last)


class Discriminator(nn.Module):
    """Scores all pairs of codes (k, channels, 7, 7) and masks (m, 1, 28, 28): (k, m), inner products of two embeddings.

    It may use what a mask shows within two places of the map. No batch normalisation: each pair is judged by itself.
    """

    def __init__(self, channels, hidden=128, features=32):
        super().__init__()
        self.code = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, features, 1))
        self.mask = nn.Sequential(nn.Conv2d(1, hidden, 8, stride=4, padding=2), nn.ReLU(),
                                  nn.Conv2d(hidden, features, 1))

    def forward(self, z, n):
        code, mask = self.code(z).flatten(1), self.mask(n.float()).flatten(1)
        return code @ mask.T / code.shape[1] ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
def train_cell(cell, device, args, progress):
    """Train one classifier, then measure it and what its codes hold."""
    s, beta = SETTINGS[args.scale], cell["beta"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, y, x_test, y_test, mean, std = (t.to(device) for t in (x, y, x_test, y_test, mean, std))
    clutter = torch.Generator(device).manual_seed(cell["seed"])

    def draw(digits):
        """Normalised images of these digits under new clutter, and the mask of its squares."""
        images, mask = add_clutter(digits, clutter)
        return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last), mask

    model = all_cnn(s["width"]).to(device)
    variances = [p for name, p in model.named_parameters() if name.endswith("log_sigma2")]
    others = [p for name, p in model.named_parameters() if not name.endswith("log_sigma2")]
    optimizer = torch.optim.Adam([{"params": others, "lr": LR}, {"params": variances, "lr": LR_NOISE}], fused=True)
    batches = minibatches(s["n"], s["batch"], device)
    for step in range(s["steps"]):
        t = step / s["steps"]
        for group, lr in zip(optimizer.param_groups, (LR, LR_NOISE)):
            group["lr"] = lr * annealed(t)
        index = next(batches)
        loss, _, _ = ib_loss(model(draw(x[index])[0]), y[index], model, beta * min(1, t / 0.4), s["n"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == s["steps"] - 1:
            progress(step, s["steps"], loss.item())
    return measure(model, draw, x, x_test, y_test, s)


def measure(model, draw, x, x_test, y_test, s):
    """What a row holds. Codes are drawn from p(z|x), of digits under new clutter, with noise for every example."""
    images = [draw(part)[0] for part in x[:2000].split(100)]
    images_test, mask_test = draw(x_test)
    with calibrated(model, images, draw=False):
        test_acc = accuracy(predict(model, images_test), y_test)
    for layer in model.modules():
        if isinstance(layer, StochasticConv2d):
            layer.local = True
    features, readout = model
    last = features[-3]  # the last stochastic layer; batch normalisation and ReLU follow
    with calibrated(model, images, draw=True):
        z, masks = zip(*((predict(features, shown), mask) for shown, mask in map(draw, x[:s["pairs"]].split(1000))))
        inputs = predict(features[:-3], images_test)
        units = predict(last, inputs)
        z_test = predict(features[-2:], units)
        logits = predict(readout, z_test)
    ratio = density_ratio_information(
        Discriminator(z_test.shape[1]).to(z_test.device), torch.cat([*z, z_test]), torch.cat([*masks, mask_test]),
        validation=s["validation"], held_out=s["test"], steps=s["discriminator_steps"])
    bounds = layer_bounds(features)
    bottleneck = min(bounds, key=bounds.get)
    return {"test_acc": test_acc, "test_acc_sampled": accuracy(logits, y_test),
            "i_zn": ratio["plug_in"], "i_zn_dv": ratio["donsker_varadhan"], "i_zn_nce": ratio["info_nce"],
            "calibration_error": ratio["calibration_error"], "i_zy": label_information(logits, y_test).item(),
            "bound": bounds[bottleneck], "bottleneck": bottleneck, "information": weight_information(model).item(),
            **disentanglement(last, inputs, units)}


@torch.no_grad()
def layer_bounds(features):
    """{layer: the bound of Cor. 5.3 on I(z;x) from this layer's information, nats}.

    Gaussian noise of variance a on the weights of a unit with centred, uncorrelated inputs: noise of variance
    a * sum w^2 x^2 on a signal of variance sum w^2 x^2, a Gaussian channel of capacity log(1 + 1/a)/2. The paper's
    alpha is the one whose capacity is the layer's information per weight, so a = 1 / (exp(2 * information/dim w) - 1).
    As in the paper it is one alpha a layer, from its mean information: where alphas differ within a unit, this can lie
    below the capacity of the unit's own noise, which disentanglement() has for the last layer.
    """
    bounds, side = {}, 28
    for number, layer in enumerate((m for m in features if isinstance(m, nn.Conv2d)), 1):
        side //= layer.stride[0]
        if isinstance(layer, StochasticConv2d):
            variance = 1 / torch.expm1(2 * layer.information() / layer.weight.numel())
            bound = layer_information_bound(layer.out_channels * side**2, torch.log1p(variance))
            bounds[f"conv{number}"] = bound.item()
    return bounds


@torch.no_grad()
def disentanglement(layer, inputs, units):
    """TC(z), I(x;z) + TC(z) and its bounds for the units of a 1x1 convolution at a place of the map, nats.

    inputs, units: (n, channels, height, width), what goes in and what came out with noise on; all places count as
    samples. Places with no input at all, where the noise vanishes and Prop. 5.1 diverges, are left out.
    """
    inputs, units = (rearrange(t, "n c h w -> (n h w) c") for t in (inputs, units))
    alive = inputs.any(1)
    weight, variance = layer.weight.flatten(1), layer.log_alpha.flatten(1).exp()
    of_unit = (variance * weight**2).sum(1) / (weight**2).sum(1)
    upper = layer_information_bound(len(weight), torch.log1p(of_unit)).item()
    return {"total_correlation": total_correlation(units[alive]).item(), "layer_dim": len(weight),
            "layer_information": layer_information(weight, torch.log1p(variance), inputs[alive]).item(),
            "layer_lower": upper - len(weight), "layer_upper": upper}


# ----------------------------------------------------------------------------------------------------------------------
# What the rows say
# ----------------------------------------------------------------------------------------------------------------------
# The paper's Fig. 4, digitised, in nats: beta, I(z;n), the bound of Cor. 5.3 (for 9,408 units; here there may be fewer)
PAPER = [(0.001, 9.7, 19_900), (0.01, 8.45, 18_900), (0.1, 5.0, 10_700), (0.3, 4.2, 6000), (1, 3.25, 4000),
         (3, 3.1, 3400)]
PAPER_LABEL = 2.21  # I(z;y), nats, throughout


def claims(rows, args):
    """The claims table of the figure; a claim of which cells are missing is not decided."""
    betas = SETTINGS[args.scale]["betas"]
    labelled = [beta for beta in betas if beta <= 1]  # where the label is to stay
    rows = complete_seeds(rows, [{"beta": beta} for beta in betas])

    def by_beta(value, some=betas):
        return {f"β={beta:g}": [value(r) for r in rows if r["beta"] == beta] for beta in some}

    def falls(key, slack, last=betas[-1], to=1.0):
        """Whether no mean is over slack above the one before, and at the last beta it is below `to` times the first."""
        means = {beta: np.mean([r[key] for r in rows if r["beta"] == beta]) for beta in betas}
        return max(np.diff(list(means.values()))) < slack and means[last] < to * means[betas[0]]

    return [
        claim("I(z;n) falls with β (no mean over 0.1 nats above the one before), by more than half up to "
              f"β = {labelled[-1]:g}", "9.7 to 3.1 nats", by_beta(lambda r: r["i_zn"]),
              lambda v: falls("i_zn", 0.1, labelled[-1], 0.5), "{:.2f}"),
        claim(f"I(z;y) stays within 0.15 nats of its best up to β = {labelled[-1]:g}, and near 2.2 (± 0.15)",
              "2.21 nats", by_beta(lambda r: r["i_zy"], labelled),
              lambda v: v.max() - v.min() < 0.15 and abs(v.max() - 2.2) < 0.15, "{:.2f}"),
        claim("every estimate of I(z;n) is below the bound of Cor. 5.3 (shown: by how many nats)", "yes",
              by_beta(lambda r: r["bound"] - max(r["i_zn"], r["i_zn_dv"], r["i_zn_nce"])), lambda v: v.min() > 0,
              "{:.0f}"),
        claim("the total correlation TC(z) falls with β", "not shown", by_beta(lambda r: r["total_correlation"]),
              lambda v: falls("total_correlation", 0), "{:.2f}"),
    ]


def print_table(rows):
    """What was measured at each beta, means over seeds, and the layer that bounds what z holds."""
    print("\n| β | test accuracy, mean weights / sampled z | I(z;n) plug-in / DV / InfoNCE | calibration error "
          "| I(z;y) | bound (bottleneck) | TC(z) | I(x;z)+TC(z), its bounds | units |\n|" + "---|" * 9)
    keys = ("test_acc", "test_acc_sampled", "i_zn", "i_zn_dv", "i_zn_nce", "calibration_error", "i_zy", "bound",
            "total_correlation", "layer_information", "layer_lower", "layer_upper")
    for beta, *_ in summarise(rows, "beta", "i_zn"):
        some = [r for r in rows if r["status"] == "ok" and r["beta"] == beta]
        v = {key: summarise(some, "beta", key)[0][1] for key in keys}
        layers = ", ".join(sorted({r["bottleneck"] for r in some}))
        print(f"| {beta:g} | {v['test_acc']:.1%} / {v['test_acc_sampled']:.1%} | {v['i_zn']:.2f} / "
              f"{v['i_zn_dv']:.2f} / {v['i_zn_nce']:.2f} | {v['calibration_error']:.3f} | {v['i_zy']:.2f} | "
              f"{v['bound']:.0f} ({layers}) | {v['total_correlation']:.2f} | {v['layer_information']:.1f}, "
              f"{v['layer_lower']:.1f} to {v['layer_upper']:.1f} | {some[0]['layer_dim']} |")


# ----------------------------------------------------------------------------------------------------------------------
# Plot
# ----------------------------------------------------------------------------------------------------------------------
def plot(rows, args):
    s = SETTINGS[args.scale]
    good = [r for r in rows if r["status"] == "ok"]
    seeds = sorted({r["seed"] for r in good})
    fig, axes = new_figure(1, 3, f"Fig. 4: All-CNN, width ×{s['width']:g}, {args.dataset} with clutter, scale "
                           f"{args.scale}, up to {len(seeds)} seeds a cell")
    ax = axes[0, 0]
    digits, title = synthetic_digits(100)[0], "training images"
    if args.dataset == "mnist":
        try:
            digits = np.load(Path(args.data_dir, "mnist.npz"))["x_train"][:, None]
        except (OSError, ValueError, KeyError):
            title = "synthetic stand-ins: no mnist.npz here"
    digits = torch.as_tensor(digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:16]])
    images, _ = add_clutter(digits, torch.Generator().manual_seed(0))
    ax.imshow(rearrange(images, "(a b) 1 h w -> (a h) (b w)", a=4), cmap="gray")
    ax.set(xticks=[], yticks=[], title=title)

    ax = axes[0, 1]
    beta, nuisance, bound = zip(*PAPER)
    for values, name in ((nuisance, "I(z;n)"), (bound, "bound"), ([PAPER_LABEL] * len(beta), "I(z;y)")):
        ax.plot(beta, values, "D-", color="0.7", ms=4, lw=1, label="the paper (192 channels): I(z;n), I(z;y), bound"
                if name == "bound" else None)
    for key, fmt, colour, name in (("i_zn", "o-", "C3", "I(z;n), plug-in"), ("i_zn_nce", "^:", "C1", "InfoNCE"),
                                   ("i_zn_dv", "v--", "C3", "Donsker–Varadhan"), ("i_zy", "s-", "C0", "I(z;y)"),
                                   ("bound", "o-", "k", "bound of Cor. 5.3, fewer units than the paper's")):
        plot_points(ax, summarise(good, "beta", key), fmt=fmt, color=colour, label=name)
    ax.set(xscale="log", xlabel="β", ylabel="nats (linear up to 1)", title="what the code holds of clutter and label")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(-0.5, 3e4)
    ax.legend(loc=(0.28, 0.5))

    ax = axes[0, 2]
    for r in good:
        r |= {f"{key}_of_unit": r[key] / r["layer_dim"] for key in ("total_correlation", "layer_information",
                                                                    "layer_lower", "layer_upper")}
    edges = [summarise(good, "beta", f"layer_{end}_of_unit") for end in ("lower", "upper")]
    ax.fill_between([p[0] for p in edges[0]], *([p[1] for p in edge] for edge in edges), color="0.88",
                    label="g(α) to g(α) + 1 (Prop. 5.2)")
    plot_points(ax, summarise(good, "beta", "layer_information_of_unit"), color="C2", label="I(x;z) + TC(z), Prop. 5.1")
    plot_points(ax, summarise(good, "beta", "total_correlation_of_unit"), color="C4", label="TC(z), Gaussian")
    ax.set(xscale="log", xlabel="β", ylabel="nats per unit", title="last stochastic layer: disentanglement")
    ax.set_ylim(bottom=0)
    ax.legend()
    save_figure(fig, args)


# ----------------------------------------------------------------------------------------------------------------------
def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid([{"beta": beta} for beta in SETTINGS[args.scale]["betas"]], train_cell, args, load_data)
    plot(rows, args)
    print_claims(claims(rows, args))
    print_table(rows)


if __name__ == "__main__":
    main()
