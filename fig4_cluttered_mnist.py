"""Fig. 4: the penalty on information removes a nuisance from the representation, not the label.

    python fig4_cluttered_mnist.py --scale demo     # synthetic digits, 2 minutes on 2 cores
    python fig4_cluttered_mnist.py --scale cpu      # MNIST, 1/8 width, an hour on 2 cores
    python fig4_cluttered_mnist.py --gpu 0          # MNIST, the paper's All-CNN and 60,000 digits

An All-CNN reads digits under clutter, ten white 4x4 squares at random positions, new ones for every
batch, with L = cross-entropy + beta/N * I(w;D). The representation z is its last convolutional map,
the nuisance n the mask of the squares. The paper: I(z;n) falls from 9.7 to 3.1 nats as beta
grows from 0.001 to 3, below the bound of Cor. 5.3; I(z;y) stays at 2.2. Measured at 1/8 width over
these beta: I(z;n) falls from 2.7 to 0.6 nats, I(z;y) from 2.2 to 2.1. The last panel is what the
paper bounds together with I(x;z) and does not plot: the total correlation TC(z).

All layers but the first and the last are stochastic. In training a batch shares one weight sample.
When z is drawn from p(z|x), every example and position has noise of its own, as Cor. 5.3 counts it.
I(z;n) is estimated on digits and masks that neither network was trained on, by InfoNCE and by
Donsker and Varadhan's bound; the plug-in estimate, from the same scores, is in the rows.
"""
import numpy as np
import torch
import torch.nn as nn
from einops import rearrange

from common import (DataError, StochasticConv2d, accuracy, add_clutter, bn_recalibrated, claim,
                    complete_seeds, density_ratio_information, draw_subset, fmt, ib_loss,
                    label_information, layer_information, layer_information_bound, load_images,
                    lr_factor, minibatches, new_figure, ok_rows, param_groups, parse_args,
                    plot_points, predict, run_grid, save_figure, save_tables, summarise,
                    synthetic_digits, total_correlation, weight_information)

# What a cell is trained and measured with, stored in its row. n digits train the classifier,
# `pairs` of them the discriminator, the last `validation` of which decide when it stops.
RATES = dict(lr=0.003, lr_noise=0.05)
SETTINGS = {
    "demo": dict(width=1 / 8, n=4000, steps=400, batch=64, pairs=4000, discriminator_steps=300,
                 validation=500, test=1000, **RATES),
    "cpu": dict(width=1 / 8, n=60_000, steps=1800, batch=100, pairs=20_000,
                discriminator_steps=1200, validation=1000, test=5000, **RATES),
    "paper": dict(width=1, n=60_000, steps=20_000, batch=100, pairs=60_000,
                  discriminator_steps=20_000, validation=2000, test=10_000, **RATES),
}
BETAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = {"demo": (0.001, 0.1, 1.0), "cpu": BETAS, "paper": BETAS}
SEEDS = {"demo": [0], "cpu": [0, 1], "paper": [0, 1, 2]}
DATASETS = {"demo": ["synthetic"], "cpu": ["mnist", "synthetic"], "paper": ["mnist", "synthetic"]}


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
    """Scores all pairs of z (k, channels, 7, 7) and masks (m, 1, 28, 28): (k, m), inner products.

    No batch normalisation: a pair's score depends on this pair alone.
    """

    def __init__(self, channels, hidden=128, features=32):
        super().__init__()
        self.of_z = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(hidden, features, 1))
        self.of_mask = nn.Sequential(nn.Conv2d(1, hidden, 8, stride=4, padding=2), nn.ReLU(),
                                     nn.Conv2d(hidden, features, 1))

    def forward(self, z, n):
        z, mask = self.of_z(z).flatten(1), self.of_mask(n.float()).flatten(1)
        return z @ mask.T / z.shape[1] ** 0.5


def train_cell(cell, device, args, progress):
    """Train one classifier, then measure it and what its representation holds."""
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
        images = (images.float() - mean) / std
        return images.contiguous(memory_format=torch.channels_last), mask

    model, steps = all_cnn(s["width"]).to(device), s["steps"]
    optimizer = torch.optim.Adam(param_groups(model, s["lr"], s["lr_noise"]), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps))
    batches = minibatches(s["n"], s["batch"], device)
    for step in range(steps):
        index, warm_up = next(batches), min(1, step / steps / 0.4)
        images, _ = draw(x[index])
        loss, _, _ = ib_loss(model(images), y[index], model, beta * warm_up, s["n"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            progress(step, steps, loss.item())
    return measure(model, draw, x, x_test, y_test, s)


def measure(model, draw, x, x_test, y_test, s):
    """What a row holds. z is drawn from p(z|x), with independent noise for every example."""
    images = [draw(part)[0] for part in x[:2000].split(100)]
    images_test, mask_test = draw(x_test)
    with bn_recalibrated(model, images, draw=False):
        test_acc = accuracy(predict(model, images_test), y_test)
    for layer in model.modules():
        if isinstance(layer, StochasticConv2d):
            layer.local = True
    features, head = model
    last = features[-3]  # the last stochastic layer; batch normalisation and ReLU follow
    with bn_recalibrated(model, images, draw=True):
        z, masks = [], []
        for part in x[:s["pairs"]].split(1000):
            shown, mask = draw(part)
            z.append(predict(features, shown))
            masks.append(mask)
        inputs = predict(features[:-3], images_test)
        units = predict(last, inputs)
        z_test = predict(features[-2:], units)
        logits = predict(head, z_test)
    ratio = density_ratio_information(
        Discriminator(z_test.shape[1]).to(z_test.device), torch.cat([*z, z_test]),
        torch.cat([*masks, mask_test]), validation=s["validation"], held_out=s["test"],
        steps=s["discriminator_steps"])
    bounds = layer_bounds(features)
    bottleneck = min(bounds, key=bounds.get)
    return {"test_acc": test_acc, "test_acc_sampled": accuracy(logits, y_test),
            "i_zn": ratio["plug_in"], "i_zn_dv": ratio["donsker_varadhan"],
            "i_zn_nce": ratio["info_nce"], "i_zy": label_information(logits, y_test).item(),
            "bound": bounds[bottleneck], "bottleneck": bottleneck,
            "information": weight_information(model).item(),
            **disentanglement(last, inputs, units)}


@torch.no_grad()
def layer_bounds(features):
    """{layer: the bound of Cor. 5.3 on I(z;x), nats}, with one alpha per layer as in the paper.

    Gaussian noise of variance a on the weights makes a unit with centred, uncorrelated inputs a
    Gaussian channel of capacity log(1 + 1/a)/2, here set to the layer's information per weight.
    If alphas differ within a unit, this can be below the capacity of the unit's own noise.
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
    """TC(z), I(x;z) + TC(z) and its bounds for the units of a 1x1 convolution at a position, nats.

    inputs, units: (n, channels, height, width), what goes in and what comes out with noise; all
    positions count as samples, but those without any input, where Prop. 5.1 diverges.
    """
    inputs, units = (rearrange(t, "n c h w -> (n h w) c") for t in (inputs, units))
    alive = inputs.any(1)
    weight, variance = layer.weight.flatten(1), layer.log_alpha.flatten(1).exp()
    of_unit = (variance * weight**2).sum(1) / (weight**2).sum(1)
    upper = layer_information_bound(len(weight), torch.log1p(of_unit)).item()
    information = layer_information(weight, torch.log1p(variance), inputs[alive]).item()
    return {"total_correlation": total_correlation(units[alive]).item(), "layer_dim": len(weight),
            "layer_information": information, "layer_lower": upper - len(weight),
            "layer_upper": upper}


# The paper's Fig. 4, digitised, in nats: beta, I(z;n), the bound of Cor. 5.3 (for 9,408 units)
PAPER = [(0.001, 9.7, 19_900), (0.01, 8.45, 18_900), (0.1, 5.0, 10_700), (0.3, 4.2, 6000),
         (1, 3.25, 4000), (3, 3.1, 3400)]
PAPER_LABEL = 2.21  # I(z;y), nats, throughout


def claims(ok, scale):
    """The claims table, over the seeds of which no cell is missing."""
    betas = GRID[scale]
    up_to_1 = [beta for beta in betas if beta <= 1]  # where the label is to stay
    rows, table = complete_seeds(ok, make_cells(scale)), []
    if not rows:
        return table

    def values(key, betas=betas):
        return {beta: [row[key] for row in ok_rows(rows, beta=beta)] for beta in betas}

    def add(sentence, paper, values, holds, form="{:.2f}"):
        ours = "; ".join(f"β={beta:g} {fmt(v, form)}" for beta, v in values.items())
        table.append(claim(sentence, paper, ours, holds))

    def falls(values, slack):  # is no mean over slack above the one before?
        return max(np.diff([np.mean(v) for v in values.values()])) < slack

    nuisance, label = values("i_zn_nce"), values("i_zy", up_to_1)
    first, last = (np.mean(nuisance[up_to_1[i]]) for i in (0, -1))
    add("I(z;n), InfoNCE, falls with β (no mean over 0.1 nats above the one before), by more "
        f"than half up to β = {up_to_1[-1]:g}", "9.7 to 3.1 nats", nuisance,
        falls(nuisance, 0.1) and last < 0.5 * first)
    if scale != "demo":  # whose classifier is trained too briefly to read all of the label
        best, worst = max(map(max, label.values())), min(map(min, label.values()))
        add(f"I(z;y) stays within 0.15 nats of its best, and of 2.2, up to β = {up_to_1[-1]:g}",
            "2.21 nats", label, best - worst < 0.15 and abs(best - 2.2) < 0.15)
        for row in rows:
            row["slack"] = row["bound"] - max(row["i_zn"], row["i_zn_dv"], row["i_zn_nce"])
        add("every estimate of I(z;n) is below the bound of Cor. 5.3 (shown: by how much)", "yes",
            values("slack"), min(map(min, values("slack").values())) > 0, "{:.0f}")
        correlation = values("total_correlation")
        add("the total correlation TC(z) falls with every step of β", "not shown", correlation,
            falls(correlation, 0))
    return table


def measured(ok):
    """What was measured at each beta, means over seeds, nats; bound: and the layer it is from."""
    columns = {"I(z;n) InfoNCE": "i_zn_nce", "DV": "i_zn_dv", "plug-in": "i_zn", "I(z;y)": "i_zy",
               "TC(z)": "total_correlation", "I(x;z)+TC(z)": "layer_information"}
    table = []
    for beta in sorted({row["beta"] for row in ok}):
        rows = ok_rows(ok, beta=beta)
        layers = ", ".join(sorted({row["bottleneck"] for row in rows}))
        accuracies = [fmt([row[key] for row in rows], "{:.1%}")
                      for key in ("test_acc", "test_acc_sampled")]
        table.append({"β": f"{beta:g}", "test accuracy": accuracies[0], "sampled z": accuracies[1]}
                     | {name: fmt([row[key] for row in rows]) for name, key in columns.items()}
                     | {"bound": f"{np.mean([row['bound'] for row in rows]):.0f} ({layers})"})
    return table


def plot(ok, args):
    width = SETTINGS[args.scale]["width"]
    fig, axes = new_figure(1, 4, f"Fig. 4: All-CNN, width ×{width:g}, {args.dataset} with "
                           f"clutter, scale {args.scale}, {len({row['seed'] for row in ok})} seeds")
    picture_ax, nats_ax, bound_ax, unit_ax = axes[0]
    try:
        digits, title = load_data(args)[0], "training images"
    except DataError:
        digits, title = synthetic_digits(100)[0], "synthetic stand-ins: no mnist.npz here"
    generator = torch.Generator().manual_seed(0)
    digits = digits[torch.randperm(len(digits), generator=generator)[:16]]
    images, _ = add_clutter(digits, generator)
    picture_ax.imshow(rearrange(images, "(a b) 1 h w -> (a h) (b w)", a=4), cmap="gray")
    picture_ax.set(xticks=[], yticks=[], title=title)

    beta, nuisance, bound = zip(*PAPER)
    nats_ax.plot(beta, nuisance, "D-", color="0.6", ms=4, label="paper, I(z;n), 192 channels")
    nats_ax.axhline(PAPER_LABEL, color="0.6", ls="--", label="paper, I(z;y)")
    for key, form, colour, name in (("i_zn_nce", "o-", "C3", "I(z;n), InfoNCE"),
                                    ("i_zn_dv", "v--", "C1", "I(z;n), Donsker–Varadhan"),
                                    ("i_zy", "s-", "C0", "I(z;y)")):
        plot_points(nats_ax, summarise(ok, "beta", key), form, color=colour, label=name)
    nats_ax.set(xscale="log", xlabel="β", ylabel="nats", ylim=(0, 10.5),
                title="what z holds of clutter and label")
    bound_ax.plot(beta, bound, "D-", color="0.6", ms=4, label="paper, 9,408 units")
    plot_points(bound_ax, summarise(ok, "beta", "bound"), color="k", label="ours, fewer units")
    bound_ax.set(xscale="log", yscale="log", xlabel="β", ylabel="nats",
                 title="bound of Cor. 5.3 on I(z;n)")
    per_unit = [row | {key: row[key] / row["layer_dim"] for key in (
        "total_correlation", "layer_information", "layer_lower", "layer_upper")} for row in ok]
    lower, upper = (summarise(per_unit, "beta", f"layer_{end}") for end in ("lower", "upper"))
    unit_ax.fill_between([p[0] for p in lower], [p[1] for p in lower], [p[1] for p in upper],
                         color="0.88", label="g(α) to g(α) + 1 (Prop. 5.2)")
    plot_points(unit_ax, summarise(per_unit, "beta", "layer_information"), color="C2",
                label="I(x;z) + TC(z), Prop. 5.1")
    plot_points(unit_ax, summarise(per_unit, "beta", "total_correlation"), color="C4",
                label="TC(z), Gaussian")
    unit_ax.set(xscale="log", xlabel="β", ylabel="nats per unit", ylim=(0, None),
                title="last stochastic layer: disentanglement")
    for ax in axes[0, 1:]:
        ax.legend()
    save_figure(fig, args)


def make_cells(scale):
    return [{"beta": beta} for beta in GRID[scale]]


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    rows = run_grid(make_cells(args.scale), train_cell, args, SETTINGS[args.scale], load_data)
    ok = ok_rows(rows)
    plot(ok, args)
    save_tables(args, claims=claims(ok, args.scale), measured=measured(ok))


if __name__ == "__main__":
    main()
