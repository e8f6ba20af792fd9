"""Fig. 4: the penalty on information removes a nuisance from the representation, not the label.

    python fig4_cluttered_mnist.py --scale demo     # synthetic digits, 2 minutes on 2 cores
    python fig4_cluttered_mnist.py --scale cpu      # MNIST, 1/8 width, 4 hours on 2 cores
    python fig4_cluttered_mnist.py --gpu 0          # MNIST, the paper's All-CNN

An All-CNN reads digits under clutter, ten white 4x4 squares at random positions, new for every
batch, with L = cross-entropy + beta/N * I(w;D). z is its last convolutional map, the nuisance n
the mask of the squares. The paper: as beta grows from 0.001 to 3, I(z;n) falls from 9.7 to 3.1
nats, below a bound as in Cor. 5.3; I(z;y) stays at 2.2.

Two lower bounds on I(z;n), on held-out digits and clutter. A decoder reads the squares' positions,
uniform over 625 places, from z: I(z;n) >= 10 * (log 625 - cross-entropy). InfoNCE: a
discriminator tells pairs (z, n) from others.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (StochasticConv2d, accuracy, add_clutter, claim,
                    complete_seeds, density_ratio_information, draw_subset, fmt,
                    label_information, layer_information, layer_information_bound, load_images,
                    lr_factor, mean_network, minibatches, new_figure, ok_rows, param_groups,
                    parse_args, plot_points, predict, recalibrate_bn, run_grid, sample_weights,
                    save_figure, save_tables, summarise,
                    total_correlation, weight_information, with_information)

# n digits train the classifier, `passes` * n what reads its z.
ALL = dict(n=60_000, batch=100, passes=3, lr=0.003, lr_noise=0.05)
SETTINGS = {
    "demo": ALL | dict(width=1 / 8, n=4000, steps=400, batch=64, passes=4, decoder_steps=140,
                       discriminator_steps=100, validation=500, test=1000),
    "cpu": ALL | dict(width=1 / 8, steps=1800, discriminator_steps=1200, decoder_steps=4000,
                      validation=1000, test=5000),
    "paper": ALL | dict(width=1, steps=20_000, discriminator_steps=20_000, decoder_steps=4000,
                        validation=2000, test=10_000),
}
BETAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = {"demo": (0.001, 0.1, 1.0), "cpu": BETAS, "paper": BETAS}
EXTRA = {"demo": [], "paper": [{"beta": 0.001, "seed": 0}], "cpu": [
    {"beta": beta, "seed": 0} | change for beta, change in (
        (0.001, {}), (0.001, {"decoder_steps": 32_000}), (10.0, {"decoder_steps": 8000}),
        (0.01, {"decoder_steps": 16_000, "width": 1 / 4}), (1.0, {"width": 1 / 4}))]}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["mnist", "synthetic"], "paper": ["mnist", "synthetic"]}


def main_cells(scale):
    """Curves' cells (None: as set). If z holds more, a decoder levels later."""
    return [{"beta": beta, "width": None,
             "decoder_steps": 16_000 if beta < 0.3 and scale != "demo" else None}
            for beta in GRID[scale]]


def load_data(args):
    s, dataset = SETTINGS[args.scale], "digits" if args.dataset == "synthetic" else args.dataset
    return load_images(dataset, args.data_dir, s["n"], s["test"])


def all_cnn(width=1.0):
    """The All-CNN in two parts: x to its last map z, z to logits. Noise but at the ends."""
    layers, inputs = [], 1
    for outputs, kernel, stride in [(96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1),
                                    (192, 3, 2), (192, 3, 1), (192, 1, 1)]:
        outputs = int(outputs * width)
        convolution = StochasticConv2d if layers else nn.Conv2d
        layers += [convolution(inputs, outputs, kernel, stride=stride, padding=kernel // 2),
                   nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    head = nn.Sequential(nn.Conv2d(inputs, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Sequential(*layers), head).to(memory_format=torch.channels_last)


class Discriminator(nn.Module):
    """Inner products (k, m) of features of z (k, channels, 7, 7) and masks (m, 1, 28, 28)."""

    def __init__(self, channels):
        super().__init__()
        self.of_z, self.of_mask = (
            nn.Sequential(layer, nn.ReLU(), nn.Conv2d(128, 32, 1), nn.Flatten()) for layer in (
                nn.Conv2d(channels, 128, 3, padding=1), nn.Conv2d(1, 128, 8, stride=4, padding=2)))

    def forward(self, z, n):
        z, mask = self.of_z(z), self.of_mask(n.float())
        return z @ mask.T / z.shape[1] ** 0.5


def descend(groups, steps, hold, loss):
    """Adam on loss(step): yields (step, value)."""
    optimizer = torch.optim.Adam(groups, 0.003, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i / steps, hold))
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        yield step, value.detach()


def position_information(z, places, s):
    """Barber and Agakov's lower bound on I(z;n), nats, and [[step, bound], ...].

    z: (n, channels, 7, 7). places: (n, squares), from 0 to 624. The last s["test"] are held out.
    """
    steps, train = s["decoder_steps"], len(z) - s["test"]
    layers, inputs, curve = [], 2 * z.shape[1], [[0, 0.0]]
    for _ in range(4):
        layers += [nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 128, 3, padding=1), nn.ReLU()]
        inputs = 128
    decoder = nn.Sequential(*layers, nn.ConvTranspose2d(128, 16, 4, stride=4), nn.ReLU(),
                            nn.Conv2d(16, 1, 4), nn.Flatten()).to(z.device)

    def bound(rows):  # sum over the squares
        code = z[rows]
        log_p = decoder(torch.cat([code, torch.log(code.relu() + 0.05)], 1)).log_softmax(1)
        return (math.log(625) + log_p.gather(1, places[rows])).sum(1).mean()

    batches = minibatches(train, 128, z.device)
    held_out = torch.arange(train, len(z), device=z.device).split(500)
    for step, _ in descend(decoder.parameters(), steps, 0.3, lambda _: -bound(next(batches))):
        if (step + 1) * 8 % steps < 8:
            decoder.eval()
            with torch.no_grad():
                curve.append([step + 1, np.mean([bound(rows).item() for rows in held_out])])
            decoder.train()
    return curve[-1][1], curve


def train_cell(cell, device, args, progress):
    """Train a classifier and measure what z holds."""
    s, beta = SETTINGS[args.scale] | cell, cell["beta"]
    torch.manual_seed(cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"])
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, y, x_test, y_test, mean, std = (t.to(device) for t in (x, y, x_test, y_test, mean, std))
    clutter = torch.Generator(device).manual_seed(cell["seed"])

    def draw(digits):
        """Normalised images under new clutter, its mask and places."""
        images, mask, positions = add_clutter(digits, clutter, positions=True)
        images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
        return images, mask, 25 * positions[..., 0] + positions[..., 1]

    model, steps = all_cnn(s["width"]).to(device), s["steps"]
    batches = minibatches(s["n"], s["batch"], device)
    forward = with_information(model, torch.zeros(s["batch"], 1, 28, 28, device=device))

    def loss(step):
        index, warm_up = next(batches), min(1, step / steps / 0.4)
        logits, nats = forward(draw(x[index])[0])
        return F.cross_entropy(logits, y[index]) + beta * warm_up / s["n"] * nats

    for step, value in descend(param_groups(model, s["lr"], s["lr_noise"]), steps, 0.8, loss):
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, value.item())
    row = measure(model, draw, x, x_test, y_test, s)
    if beta == GRID[args.scale][0] and "decoder_steps" not in cell:
        row |= anchors(draw, x, x_test, s)
    return row


def codes(model, draw, x, x_test, passes):
    """z ~ p(z|x), masks, places: training digits `passes` times, then test."""
    for layer in model.modules():
        if isinstance(layer, StochasticConv2d):
            layer.local = True  # noise for every position, as in Cor. 5.3
    with sample_weights(model):
        recalibrate_bn(model, draw(x[:2000])[0]).eval()
        parts = [(predict(model[0], images), *rest) for images, *rest in map(
            draw, torch.cat([x] * passes + [x_test]).split(1000))]
    return map(torch.cat, zip(*parts))


def measure(model, draw, x, x_test, y_test, s):
    features, head = model
    images, images_test = draw(x[:2000])[0], draw(x_test)[0]
    net = recalibrate_bn(mean_network(model), images).eval()
    test_acc = accuracy(predict(net, images_test), y_test)
    z, masks, places = codes(model, draw, x, x_test, s["passes"])
    logits = predict(head, z[-len(x_test):])
    positions, curve = position_information(z, places, s)
    ratio = density_ratio_information(
        Discriminator(z.shape[1]).to(z.device), z, masks, steps=s["discriminator_steps"],
        validation=s["validation"], held_out=s["test"])
    with sample_weights(model):
        disentangled = disentanglement(features[-3], predict(features[:-3], images_test))
    layers = layer_bounds(features)
    return {"test_acc": test_acc, "i_zn_positions": positions, "curve": curve,
            "i_zn_nce": ratio["info_nce"], "i_zn_dv": ratio["donsker_varadhan"],
            "i_zy": label_information(logits, y_test).item(), "layers": layers,
            "information": weight_information(model).item(), **disentangled,
            **min(layers.values(), key=lambda layer: layer["bound"])}


def anchors(draw, x, x_test, s):
    """Nats from an untrained net's z, from another image's, from x."""
    z, _, places = codes(all_cnn(s["width"]).to(x.device), draw, x, x_test, s["passes"])
    images, _, squares = map(torch.cat, zip(*map(draw, torch.cat([x, x_test]).split(1000))))
    return {"i_zn_untrained": position_information(z, places, s)[0],
            "i_zn_shuffled": position_information(z, places.roll(1, 0), s)[0],
            "i_zn_picture": position_information(F.pixel_unshuffle(images, 4), squares, s)[0]}


@torch.no_grad()
def layer_bounds(features):
    """{layer: the bound of Cor. 5.3 on I(z;x), and the information per weight, nats}.

    A unit whose weights have noise of variance a is a channel of capacity log(1 + 1/a)/2 if its
    inputs are uncorrelated; Cor. 5.3 allows 1 nat more.
    """
    bounds, side = {}, 28
    for number, layer in enumerate((m for m in features if isinstance(m, nn.Conv2d)), 1):
        side //= layer.stride[0]
        if isinstance(layer, StochasticConv2d):
            noise = layer.log_sigma2.exp().flatten(1).sum(1) / (layer.weight**2).flatten(1).sum(1)
            units = layer.out_channels * side**2
            bound = layer_information_bound(units, torch.log1p(noise)).item()
            bounds[f"conv{number}"] = {
                "bound": bound, "capacity": bound - units, "per_unit": bound / units - 1,
                "per_weight": layer.information().item() / layer.weight.numel()}
    return bounds


@torch.no_grad()
def disentanglement(layer, inputs):
    """TC(z) and I(x;z) of a 1x1 convolution's units at one position, nats (Prop. 5.1)."""
    inputs, units = (rearrange(t, "n c h w -> (n h w) c") for t in (inputs, predict(layer, inputs)))
    alive = inputs.any(1)
    weight = layer.weight.flatten(1).double() + 1e-30  # 0 in pruned units
    alpha = torch.log1p(layer.log_sigma2.flatten(1).exp() / weight**2)
    both = layer_information(weight, alpha, inputs[alive].double()).item()
    correlation = total_correlation(units[alive]).item()
    return {"total_correlation": correlation, "i_xz": both - correlation,
            "tc_share": correlation / both}


# The paper's, digitised, nats: beta, I(z;n), the bound of Cor. 5.3
PAPER = [(0.001, 9.7, 19_900), (0.01, 8.45, 18_900), (0.1, 5.0, 10_700), (0.3, 4.2, 6000),
         (1, 3.25, 4000), (3, 3.1, 3400)]


def claims(ok, scale):
    """Of complete seeds."""
    betas, s, table = GRID[scale], SETTINGS[scale], []
    if not (rows := complete_seeds(ok, main_cells(scale))):
        return table

    def values(key):
        return np.array([[row[key] for row in ok_rows(rows, beta=beta)] for beta in betas])

    def add(sentence, paper, values, holds, form="{:.2f}", names=[f"β={b:g}" for b in betas]):
        ours = "; ".join(f"{name} {fmt(v, form)}" for name, v in zip(names, values))
        table.append(claim(sentence, paper, ours, holds))

    one = betas.index(1)
    label, share, tc, i = map(values, ("i_zy", "tc_share", "total_correlation", "i_xz"))
    for key, name in (("i_zn_positions", "positions"), ("i_zn_nce", "InfoNCE")):
        n = values(key)
        mean = n.mean(1)
        add(f"I(z;n) by {name} falls (no rise over 0.1), by half up to β = 1", "9.7 to 3.1 nats",
            n, np.diff(mean).max() < 0.1 and mean[one] < mean[0] / 2)
        if scale == "demo":
            return table
        kept = [n[-1] / n[one], label[-1] / label[one]]
        add(f"beyond β = 1, I(z;n) by {name} keeps a smaller share than I(z;y)", "–", kept,
            kept[0].max() < kept[1].min(), "{:.0%}", ("I(z;n)", "I(z;y)"))
    for key, sentence, test in (
            ("decoder_steps", "decoder's steps: under 5%", np.less),
            ("width", "width: over 5%", np.greater)):
        more = {f"β={row['beta']:g}": row["i_zn_positions"] / main["i_zn_positions"] - 1
                for row in ok for main in ok_rows(rows, beta=row["beta"], seed=row["seed"])
                if row.get(key, s[key]) == 2 * main.get(key, s[key])}
        if len(more) == 2:
            add(f"gain from twice the {sentence} (seed 0)", "–", more.values(),
                test([*more.values()], 0.05).all(), "{:+.0%}", more)
    add("I(z;y) stays within 0.15 nats of 2.2 up to β = 1", "2.21 nats", label,
        abs(label[:one + 1] - 2.2).max() < 0.15)
    for name, v in ("I + TC", i + tc), ("TC / (I + TC)", share):
        add(f"last layer: {name} falls with every step of β", "–", v,
            np.diff(v.mean(1)).max() < 0)
    return table


def plot(rows, args):
    ok = [row for cell in main_cells(args.scale) for row in ok_rows(rows, **cell)] or rows
    fig, axes = new_figure(2, 3, f"Fig. 4: All-CNN, {args.dataset}, scale {args.scale}, "
                           f"{len({row['seed'] for row in ok})} seeds")
    nats_ax, steps_ax, bound_ax, layer_ax, weight_ax, unit_ax = axes.flat
    beta, nuisance, bound = zip(*PAPER)
    nats_ax.plot(beta, nuisance, "D-", color="0.6", ms=4, label="paper, I(z;n)")
    nats_ax.axhline(2.21, color="0.6", ls="--", label="paper, I(z;y)")
    bound_ax.plot(beta, bound, "D-", color="0.6", ms=4, label="paper, 9,408 units")
    for ax, key, name in ((nats_ax, "i_zn_positions", "I(z;n), positions"),
                          (nats_ax, "i_zn_nce", "I(z;n), InfoNCE"), (nats_ax, "i_zy", "I(z;y)"),
                          (bound_ax, "bound", "ours"), (bound_ax, "capacity", "less 1 per unit"),
                          (unit_ax, "i_xz", "I"), (unit_ax, "total_correlation", "TC")):
        plot_points(ax, summarise(ok, "beta", key), label=name)
    for number, beta in enumerate(GRID[args.scale]):
        for row in ok_rows(rows, beta=beta, seed=ok[0]["seed"], width=None):
            steps_ax.plot(*np.transpose(row["curve"][1:]), f"C{number}" + "-:"[row not in ok],
                          label=f"β = {beta:g}" if row in ok else None)
            for key, line in ("picture", "-"), ("untrained", "--"), ("shuffled", ":"):
                if (nats := row.get(f"i_zn_{key}")) is not None:
                    nats_ax.axhline(nats, color="C0", ls=line, label=f"I({key};n): {nats:.1f}")
    for name in ok[0]["layers"]:
        layer = [row | row["layers"][name] for row in ok]
        plot_points(layer_ax, summarise(layer, "beta", "per_unit"), label=name)
        plot_points(weight_ax, summarise(layer, "beta", "per_weight"), label=name)
    for ax, title in zip(axes.flat, (
            "what z holds", "I(z;n) from positions", "bound of Cor. 5.3",
            "per unit, less 1", "information per weight", "last layer, at one position")):
        ax.set(xscale="log", yscale="log", xlabel="β", ylabel="nats", title=title)
        ax.legend()
    nats_ax.set_ylim(0.02)
    steps_ax.set_xlabel("decoder steps")
    save_figure(fig, args)


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = [{k: v for k, v in cell.items() if v} for cell in main_cells(args.scale)]
    cells += EXTRA[args.scale]
    ok = ok_rows(run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data))
    plot(ok, args)
    save_tables(args, claims=claims(ok, args.scale))


if __name__ == "__main__":
    main()
