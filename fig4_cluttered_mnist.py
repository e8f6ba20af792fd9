"""Fig. 4: the penalty on information removes a nuisance from the representation, not the label.

    python fig4_cluttered_mnist.py --scale demo     # synthetic digits, 2 minutes on 2 cores
    python fig4_cluttered_mnist.py --scale cpu      # MNIST, 1/8 width, 6 hours on 2 cores
    python fig4_cluttered_mnist.py --gpu 0          # MNIST, the paper's All-CNN

An All-CNN reads digits under clutter, ten white 4x4 squares at random positions, new for every
batch, with L = cross-entropy + beta/N * I(w;D). z is its last convolutional map, the nuisance n
the mask of the squares. The paper: as beta grows from 0.001 to 3, I(z;n) falls from 9.7 to 3.1
nats, below a bound as in Cor. 5.3; I(z;y) stays at 2.2.

Two lower bounds on I(z;n), on held-out digits and clutter. A decoder reads the squares' positions,
uniform over 625 places, from z: I(z;n) >= 10 * (log 625 - cross-entropy). InfoNCE: a
discriminator tells pairs (z, n) from others. Their values depend on decoder and discriminator;
what counts is how they change with beta, at equal effort.

The control: does the penalty remove clutter, or anything? White noise on z of the net at the
smallest beta, of the size that leaves as many label nats as a larger beta does, removes clutter
too. If the penalty selects, it leaves less clutter than that noise.
"""
import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (StochasticConv2d, accuracy, add_clutter, beta_at, cell_table, check,
                    complete_seeds, density_ratio_information, draw_subset, group_by,
                    label_information, layer_information, layer_information_bound, load_images,
                    lr_factor, mean_network, minibatches, ok_rows, param_groups, parse_args,
                    per_seed, plot_points, predict, recalibrate_bn, run_grid, sample_weights,
                    save_panels, save_tables, summarise, to_stochastic, total_correlation,
                    weight_information, with_information)

# How a cell is trained and read, stored in its row. n digits train the classifier; passes * n z,
# each under clutter of its own, train what reads z. bfloat16: of the decoder; 20 times as slow on
# a CPU without AVX512.
SHARED = dict(lr=0.003, lr_noise=0.05)
SETTINGS = {
    "demo": dict(n=3000, test=1000, validation=500, passes=4, width=1 / 8, steps=400, batch=64,
                 decoder_channels=32, decoder_steps=200, discriminator_steps=150, patience=150,
                 bfloat16=False, **SHARED),
    "cpu": dict(n=60_000, test=5000, validation=1000, passes=3, width=1 / 8, steps=1800,
                batch=100, decoder_channels=64, decoder_steps=8000, discriminator_steps=8000,
                patience=800, bfloat16=False, **SHARED),
    "paper": dict(n=60_000, test=10_000, validation=2000, passes=3, width=1, steps=20_000,
                  batch=100, decoder_channels=128, decoder_steps=16_000,
                  discriminator_steps=20_000, patience=1000, bfloat16=True, **SHARED),
}
BETAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = {"demo": dict(betas=(0.001, 0.03, 0.3), controls=(0.3,)),  # more per sample at a small n
        "cpu": dict(betas=BETAS, controls=BETAS[2:]),
        "paper": dict(betas=BETAS, controls=BETAS[2:])}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic", "mnist"], "cpu": ["mnist", "synthetic"],
            "paper": ["mnist", "synthetic"]}
SQUARES, STARTS = 10, 25  # a 4x4 square in 28x28 pixels starts in one of 25 rows and columns


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


def classifier(width, device):
    """The All-CNN with stochastic weights in all layers but the first and the last."""
    model = to_stochastic(all_cnn(width), skip=("0.0", "1.0"))
    return model.to(device, memory_format=torch.channels_last)  # faster on a CPU


def load_data(args):
    s, name = SETTINGS[args.scale], {"synthetic": "digits"}.get(args.dataset, args.dataset)
    return load_images(name, args.data_dir, s["n"], s["test"])


def cluttered_digits(seed, device, args):
    """(x, y, x_test, y_test, draw): draw(digits) -> images, masks, positions, clutter ever new."""
    s, generator = SETTINGS[args.scale], torch.Generator().manual_seed(seed)
    x, y, x_test, y_test, mean, std = load_data(args)
    x, y = draw_subset(x, y, s["n"], generator)
    x_test, y_test = draw_subset(x_test, y_test, s["test"], generator)
    x, y, x_test, y_test, mean, std = (t.to(device) for t in (x, y, x_test, y_test, mean, std))
    clutter = torch.Generator(device).manual_seed(seed)

    def draw(digits):
        images, mask, starts = add_clutter(digits, clutter, squares=SQUARES, positions=True)
        images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
        return images, mask, STARTS * starts[..., 0] + starts[..., 1]

    return x, y, x_test, y_test, draw


def train_classifier(beta, seed, device, args, progress):
    """A net trained at beta, and the digits it was trained on: the same for the same seed."""
    s = SETTINGS[args.scale]
    torch.manual_seed(seed)
    x, y, x_test, y_test, draw = cluttered_digits(seed, device, args)
    model, steps = classifier(s["width"], device), s["steps"]
    forward = with_information(model, draw(x[:s["batch"]])[0])
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps))
    for step, index in zip(range(steps), minibatches(s["n"], s["batch"], device)):
        images, _, _ = draw(x[index])
        logits, nats = forward(images)
        cross_entropy = F.cross_entropy(logits, y[index])
        beta_now = beta_at(step / steps, beta, 0)
        loss = cross_entropy + beta_now / s["n"] * nats  # eq. 3, per sample

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return model, (x, y, x_test, y_test, draw)


def train_cell(cell, device, args, progress):
    """Train a classifier and measure what its z holds; or what z of the control holds."""
    s, seed = SETTINGS[args.scale], cell["seed"]
    model, digits = train_classifier(cell["beta"], seed, device, args, progress)
    z, masks, positions, labels = sample_z(model, digits, s)
    row = {"i_zy": label_nats(z.mean((2, 3)), labels, s["test"])}
    if cell.get("control"):  # its label nats are the aim, then the other net is all that counts
        smallest = GRID[args.scale]["betas"][0]
        model, digits = train_classifier(smallest, seed, device, args, progress)
        z, masks, positions, labels = sample_z(model, digits, s)
        size = noise_size(z, labels, row["i_zy"], s["test"])
        z = z.add_(torch.randn_like(z), alpha=size)
        row = {"i_zy": label_nats(z.mean((2, 3)), labels, s["test"]), "noise": size}
    else:
        row |= measure_classifier(model, digits, s)

    row["i_zn_positions"] = position_information(z, positions, s, progress)
    ratio = density_ratio_information(
        Discriminator(z.shape[1]).to(device), z, masks, steps=s["discriminator_steps"],
        patience=s["patience"], validation=s["validation"], held_out=s["test"])
    return row | {"i_zn_nce": ratio["info_nce"], "i_zn_dv": ratio["donsker_varadhan"]}


def with_local_noise(model):
    """A copy of a classifier that draws noise anew at every position, as Cor. 5.3 has it."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, StochasticConv2d):
            layer.local = True
    return twin


@torch.no_grad()
def sample_z(model, digits, s):
    """z ~ p(z|x), masks, positions, labels: training digits `passes` times, then test digits."""
    x, y, x_test, y_test, draw = digits
    model, parts = with_local_noise(model), []
    with sample_weights(model):
        recalibrate_bn(model, draw(x[:2000])[0]).eval()
        for part in torch.cat([x] * s["passes"] + [x_test]).split(1000):
            images, masks, positions = draw(part)
            parts.append((predict(model[0], images), masks, positions))
    z, masks, positions = map(torch.cat, zip(*parts))
    return z, masks, positions, torch.cat([y] * s["passes"] + [y_test])


class Discriminator(nn.Module):
    """Inner products (k, m) of features of z (k, channels, 7, 7) and masks (m, 1, 28, 28)."""

    def __init__(self, channels):
        super().__init__()
        self.of_z, self.of_mask = self.features(channels), self.features(16)

    def features(self, channels):
        return nn.Sequential(nn.Conv2d(channels, 128, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(128, 32, 1), nn.Flatten())

    def forward(self, z, n):
        # the 4x4 pixels at each of z's 7x7 positions as channels
        blocks = rearrange(n.float(), "m 1 (h a) (w b) -> m (a b) h w", a=4, b=4)
        z, mask = self.of_z(z), self.of_mask(blocks)
        return z @ mask.T / z.shape[1] ** 0.5


def position_decoder(channels, width):
    """z and log z (n, 2 channels, 7, 7) -> (n, 1, 28, 28), a logit for each start of a square."""
    layers, inputs = [], 2 * channels
    for _ in range(4):
        layers += [nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        inputs = width
    decoder = nn.Sequential(*layers, nn.Conv2d(width, 16, 1), nn.PixelShuffle(4))
    return decoder.to(memory_format=torch.channels_last)


def position_information(z, positions, s, progress):
    """Barber and Agakov's lower bound on I(z;n), nats, by a decoder of the squares' positions.

    z: (n, channels, 7, 7). positions: (n, squares), from 0 to 624. The last s["test"] are held out;
    the s["validation"] before them choose when training stops.
    """
    steps, test = s["decoder_steps"], len(z) - s["test"]
    train = test - s["validation"]
    decoder = position_decoder(z.shape[1], s["decoder_channels"]).to(z.device)

    def bound(rows):
        code = z[rows]
        # the logarithm too: what is small in z can tell as much
        inputs = torch.cat([code, torch.log(code.relu() + 0.05)], 1)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=s["bfloat16"]):
            logits = decoder(inputs.contiguous(memory_format=torch.channels_last))
        # one distribution over the starts; each of the ten squares is a draw from it
        log_p = logits[:, 0, :STARTS, :STARTS].float().flatten(1).log_softmax(1)
        nats = log_p.gather(1, positions[rows]) + math.log(STARTS**2)
        return nats.sum(1).mean()

    @torch.no_grad()
    def evaluate(start, end):
        decoder.eval()
        parts = torch.arange(start, end, device=z.device).split(500)
        total = sum(len(rows) * bound(rows).item() for rows in parts)
        decoder.train()
        return total / (end - start)

    optimizer = torch.optim.Adam(decoder.parameters(), 0.003, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step / steps, hold=0.3))
    best = -math.inf
    for step, rows in zip(range(steps), minibatches(train, 128, z.device)):
        loss = -bound(rows)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % max(1, steps // 20) == 0 or step == steps - 1:
            progress(step, steps, loss.item())
            nats = evaluate(train, test)
            if nats > best:
                best = nats
                state = {name: v.clone() for name, v in decoder.state_dict().items()}
    decoder.load_state_dict(state)
    return evaluate(test, len(z))


def label_nats(features, labels, held_out):
    """A lower bound on I(z;y), nats: by a linear classifier of features, as the net's last layer.

    Fitted anew, as that layer does not know of noise on z. The last held_out rows are tested on.
    """
    train = len(features) - held_out
    mean, std = features[:train].mean(0), features[:train].std(0)
    features = (features - mean) / (std + 1e-6)
    head = nn.Linear(features.shape[1], 10).to(features.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(features[:train]), labels[:train])
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return label_information(head(features[train:]), labels[train:]).item()


def noise_size(z, labels, nats, held_out):
    """The standard deviation of white noise on z that leaves this many label nats, by bisection."""
    pooled = z.mean((2, 3))
    noise = torch.randn_like(pooled) / z[0, 0].numel() ** 0.5  # of the mean over positions
    low, high = 1e-3 * z.std().item(), 100 * z.std().item()
    for _ in range(12):  # to 0.3%
        middle = (low * high) ** 0.5
        if label_nats(pooled + middle * noise, labels, held_out) > nats:
            low = middle
        else:
            high = middle
    return low


def measure_classifier(model, digits, s):
    """Accuracy of the mean network, nats in the weights, the bound of Cor. 5.3, Prop. 5.1."""
    x, _, x_test, y_test, draw = digits
    images, images_test = draw(x[:2000])[0], draw(x_test)[0]
    net = recalibrate_bn(mean_network(model), images).eval()
    test_acc = accuracy(predict(net, images_test), y_test)
    local = with_local_noise(model)
    with sample_weights(local):
        recalibrate_bn(local, images).eval()
        features = local[0]
        last_layer = disentanglement(features[-3], predict(features[:-3], images_test))
    tightest = min(layer_bounds(features).values(), key=lambda layer: layer["bound"])
    return {"test_acc": test_acc, "information": weight_information(model).item(), **tightest,
            **last_layer}


@torch.no_grad()
def layer_bounds(features):
    """{layer: the bound of Cor. 5.3 on I(z;x), and without its 1 nat a unit, nats}.

    A unit whose weights have noise of variance a is a channel of capacity log(1 + 1/a)/2 if its
    inputs are uncorrelated; Cor. 5.3 allows 1 nat more. The paper's plot seems to be without it.
    """
    bounds, side = {}, 28
    for number, layer in enumerate((m for m in features if isinstance(m, nn.Conv2d)), 1):
        side //= layer.stride[0]
        if isinstance(layer, StochasticConv2d):
            noise = layer.log_sigma2.exp().flatten(1).sum(1) / (layer.weight**2).flatten(1).sum(1)
            units = layer.out_channels * side**2
            bound = layer_information_bound(units, torch.log1p(noise)).item()
            bounds[f"conv{number}"] = {"bound": bound, "capacity": bound - units}
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
    return {"total_correlation": correlation, "i_xz": both - correlation}


# The paper's Fig. 4, digitised, nats.
PAPER_BETAS = (0.001, 0.01, 0.1, 0.3, 1, 3)
PAPER_CLUTTER = (9.7, 8.45, 5.0, 4.2, 3.25, 3.1)
PAPER_BOUND = (19_900, 18_900, 10_700, 6000, 4000, 3400)
PAPER_LABEL = 2.21
READERS = {"i_zn_positions": "decoder of positions", "i_zn_nce": "InfoNCE"}


def by_beta(rows, key):
    """{β: the value of each seed}, ascending."""
    return {beta: np.array([row[key] for row in own])
            for (beta,), own in group_by(rows, "beta").items()}


def rises(rows, key):
    """{"to β = 0.01:": by how much the value rises from the β before, per seed, ...}."""
    curve = list(by_beta(rows, key).items())
    return {f"to β = {beta:g}:": after - before
            for (_, before), (beta, after) in zip(curve, curve[1:])}


def rank_correlation(rows, x, y):
    """Spearman's, of one seed's values over β."""
    x, y = (np.argsort(np.argsort([row[key] for row in rows])) for key in (x, y))
    return np.corrcoef(x, y)[0, 1]


def log_slope(rows, x, y):
    """The k of a fit of y ~ x^k over β, of one seed."""
    x, y = (np.log([row[key] for row in rows]) for key in (x, y))
    return np.polyfit(x, y, 1)[0]


def noise_excess(main, control, key):
    """{"β = 0.1:": clutter that as costly noise leaves minus that the penalty leaves, ...}."""
    penalty = {(row["beta"], row["seed"]): row[key] for row in main}
    excess = {}
    for row in control:
        cell = row["beta"], row["seed"]
        if cell in penalty:
            excess.setdefault(f"β = {row['beta']:g}:", []).append(row[key] - penalty[cell])
    return excess


def digits_panel(ax, args):
    """Test digits under clutter: the paper's left panel."""
    digits = load_data(args)[2][:8]
    images, _ = add_clutter(digits, torch.Generator().manual_seed(0))
    ax.imshow(rearrange(images.numpy(), "(a b) 1 h w -> (a h) (b w)", a=2), cmap="gray")
    ax.set(title="digits under clutter")
    ax.axis("off")


def clutter_panel(ax, main):
    ax.plot(PAPER_BETAS, PAPER_CLUTTER, "s-", color="0.6", ms=4, label="paper")
    for (key, name), style in zip(READERS.items(), ("C0o-", "C1^-")):
        plot_points(ax, summarise(main, "beta", key), style, label=name)
    ax.set(xscale="log", xlabel="β", ylabel="I(z;n), nats", title="clutter in z", ylim=(0, None))
    ax.legend()


def bound_panel(ax, main):
    """Clutter against the bound, a point for each β."""
    ax.plot(PAPER_BOUND, PAPER_CLUTTER, "s-", color="0.6", ms=4, label="paper, 9,408 units")
    for key, style, name in (("bound", "C0o-", "Cor. 5.3"),
                             ("capacity", "C0o:", "less 1 nat per unit")):
        bound = [v.mean() for v in by_beta(main, key).values()]
        clutter = [v.mean() for v in by_beta(main, "i_zn_positions").values()]
        ax.plot(bound, clutter, style, ms=4, lw=1.2, label=name)
    ax.set(xscale="log", yscale="log", xlabel="bound on I(z;x), nats",
           ylabel="I(z;n), nats, decoder of positions", title="clutter against the bound")
    ax.legend()


def control_panel(ax, main, control):
    """Penalty against noise that leaves as many label nats."""
    for (key, name), colour in zip(READERS.items(), ("C0", "C1")):
        plot_points(ax, summarise(main, "beta", key), "o-", color=colour, label=f"penalty, {name}")
        plot_points(ax, summarise(control, "beta", key), "D--", color=colour, mfc="w",
                    label=f"noise, {name}")
    ax.set(xscale="log", xlabel="β, or noise with as many label nats", ylabel="I(z;n), nats",
           title="does the penalty select?", ylim=(0, None))
    ax.legend()


def label_panel(ax, main, control):
    ax.axhline(PAPER_LABEL, color="0.6", lw=2)
    ax.annotate("paper", (main[0]["beta"], PAPER_LABEL), color="0.45", va="bottom")
    plot_points(ax, summarise(main, "beta", "i_zy"), "C2o-", label="penalty")
    plot_points(ax, summarise(control, "beta", "i_zy"), "C2D--", mfc="w", label="noise")
    ax.set(xscale="log", xlabel="β", ylabel="I(z;y), nats", title="label in z",
           ylim=(0, math.log(10)))
    ax.legend()


def plot(main, control, args):
    panels = []
    if args.dataset == "synthetic" or Path(args.data_dir, "mnist.npz").exists():
        panels.append(partial(digits_panel, args=args))
    if main:
        panels += [partial(panel, main=main) for panel in (clutter_panel, bound_panel)]
    if main and control:
        panels.append(partial(control_panel, main=main, control=control))
    if main:
        panels.append(partial(label_panel, main=main, control=control))
    save_panels(panels, f"Fig. 4: All-CNN, {args.dataset}, scale {args.scale}", args)


def claims(main, control, grid):
    """The paper's claims, of complete seeds; their thresholds were set before the grid was trained.
    """
    main = complete_seeds(main, [{"beta": beta} for beta in grid["betas"]])
    control = complete_seeds(control, [{"beta": beta} for beta in grid["controls"]])
    if not main:
        return []
    table, first = [], grid["betas"][0]
    last = max(beta for beta in grid["betas"] if beta <= 1)
    for key, name in READERS.items():
        curve = by_beta(main, key)
        table += [
            check(f"I(z;n) by {name}: no step of β raises it by over 0.1 nats", "falls",
                  rises(main, key), (-math.inf, 0.1)),
            check(f"I(z;n) by {name}: at β = {last:g} less than half of that at β = {first:g}",
                  "0.34", {"": curve[last] / curve[first]}, (0, 0.5)),
            check(f"I(z;n) by {name}: noise that costs the label as much leaves over 0.1 nats more "
                  "than the penalty", "not shown", noise_excess(main, control, key),
                  (0.1, math.inf)),
        ]
        if len(grid["betas"]) < 4:  # a demo trains its discriminator too briefly for more
            return table
    label = {f"β = {beta:g}:": v for beta, v in by_beta(main, "i_zy").items() if beta <= 1}
    table.append(check("I(z;y) stays within 0.15 nats of 2.2 up to β = 1", f"{PAPER_LABEL} nats",
                       label, (2.05, 2.35)))
    correlation = partial(rank_correlation, x="bound", y="i_zn_positions")
    slope = partial(log_slope, x="capacity", y="i_zn_positions")
    return table + [
        check("I(z;n) and the bound of Cor. 5.3 over β: rank correlation at least 0.9", "1",
              {"": per_seed(correlation, main)}, (0.9, 1)),
        check("I(z;n) ~ bound^k, the bound less 1 nat per unit: k within a factor 2 of the paper's",
              "0.62", {"": per_seed(slope, main)}, (0.31, 1.23)),
        check("last layer: I + TC falls with every step of β", "theory", rises(main, "i_and_tc"),
              (-math.inf, 0)),
        check("last layer: TC / (I + TC) falls with every step of β", "theory",
              rises(main, "tc_share"), (-math.inf, 0)),
    ]


CONTROL_COLUMNS = {"I(z;n), positions": ("i_zn_positions", "{:.2f}"),
                   "InfoNCE": ("i_zn_nce", "{:.2f}"), "Donsker-Varadhan": ("i_zn_dv", "{:.2f}"),
                   "I(z;y)": ("i_zy", "{:.3f}")}
MAIN_COLUMNS = CONTROL_COLUMNS | {
    "test accuracy": ("test_acc", "{:.3f}"), "I(w;D)": ("information", "{:.0f}"),
    "bound": ("bound", "{:.0f}"), "less 1 per unit": ("capacity", "{:.0f}"),
    "last layer, I": ("i_xz", "{:.1f}"), "TC": ("total_correlation", "{:.1f}")}


def make_cells(scale):
    grid = GRID[scale]
    return ([{"beta": beta} for beta in grid["betas"]]
            + [{"beta": beta, "control": "noise"} for beta in grid["controls"]])


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    trained, control = ok_rows(rows, control=None), ok_rows(rows, control="noise")
    for row in trained:
        row["i_and_tc"] = row["i_xz"] + row["total_correlation"]
        row["tc_share"] = row["total_correlation"] / row["i_and_tc"]
    plot(trained, control, args)
    save_tables(args, claims=claims(trained, control, GRID[args.scale]),
                penalty=cell_table(trained, {"β": "beta"}, MAIN_COLUMNS),
                noise=cell_table(control, {"β": "beta"},
                                 CONTROL_COLUMNS | {"size": ("noise", "{:.3f}")}))


if __name__ == "__main__":
    main()
