"""Fig. 5: the larger beta, the less a representation keeps of a face beyond its attributes.

    python fig5_celeba_vae.py --scale demo     # synthetic faces, 1 minute on 2 cores
    python fig5_celeba_vae.py --scale cpu      # CelebA, 20 minutes per seed on 2 cores
    python fig5_celeba_vae.py --scale cpu --dataset synthetic --out results/synthetic
    python fig5_celeba_vae.py --gpu 0          # all of CelebA

A classifier of a face's attributes is trained with L = cross-entropy + beta/N * I(w;D); its last
map z is drawn from p(z|x), with noise. The paper, in pictures of a GAN: at small beta the decoded
x^ is the face with its background; at large beta the attributes stay, the rest is new. Here, on
held-out faces: the nats that ridge regression reads from z, of the picture outside and inside an
ellipse around the face, and of the attributes. From beta = 0.03 to 0.7 55% of the picture's are
left. <out>/*-faces.png: x, then for each beta E[x|z] by a decoder, and a draw of a conditional VAE,
whose u ~ N(0, I) invents what z does not hold.
"""
import functools

import torch
import torch.nn as nn
from torchvision.io import read_image
from torchvision.utils import save_image

from common import (FACE_ELLIPSE, claim, complete_seeds, fmt, ib_loss, load_celeba, lr_factor,
                    minibatches, new_figure, ok_rows, param_groups, parse_args, per_seed,
                    plot_points, predict, run_grid, sample_weights, save_figure, save_tables,
                    summarise, synthetic_faces, to_stochastic, weight_information)

# What a cell is trained and measured with, stored in its row. `channels`: of the maps from 32x32
# to 4x4, the last one z; `synthetic`: training and test faces drawn by code; `components`: of the
# pixels; `maps` of u, whose nats cost kl_weight at first. The decoder learns E[x|z] before.
COMMON = dict(kl_weight=100, sigma2=0.05, lr=0.002, lr_noise=0.04)
SETTINGS = {
    "demo": dict(channels=(12, 24, 48, 32), maps=4, synthetic=(3000, 1000), batch=32,
                 components=50, classifier_steps=500, decoder_steps=600, vae_steps=200, **COMMON),
    "cpu": dict(channels=(24, 48, 96, 64), maps=8, synthetic=(10_000, 2000), batch=64,
                components=100, classifier_steps=1500, decoder_steps=2000, vae_steps=1000,
                **COMMON),
    "paper": dict(channels=(64, 128, 256, 128), maps=16, synthetic=(20_000, 4000), batch=128,
                  components=200, classifier_steps=20_000, decoder_steps=30_000, vae_steps=30_000,
                  **COMMON),
}
BETAS = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7)  # 0: no penalty
GRID = {"demo": (0.03, 0.3, 1.0), "cpu": BETAS, "paper": BETAS}
SEEDS = {"demo": [0], "cpu": [0, 1, 2], "paper": [0, 1, 2]}
REAL = ["celeba", "synthetic"]
DATASETS = {"demo": ["synthetic"], "cpu": REAL, "paper": REAL}
axis = (torch.arange(64) + 0.5) / 32 - 1
BACKGROUND = torch.hypot(axis / FACE_ELLIPSE[0], axis[:, None] / FACE_ELLIPSE[1]) > 1  # (64, 64)
REGIONS = {"": BACKGROUND | True, "_outside": BACKGROUND, "_inside": ~BACKGROUND}


def load_data(args, device=torch.device("cpu")):
    return load_faces(args.scale, args.dataset, args.data_dir, device)


@functools.lru_cache(maxsize=1)
def load_faces(scale, dataset, data_dir, device):
    """Images uint8 (n, 3, 64, 64), attributes (n, a), and {part: indices of its images}."""
    if dataset == "synthetic":
        n_train, n_test = SETTINGS[scale]["synthetic"]
        images, attributes, _ = synthetic_faces(n_train + n_test, seed=0)
        partition = 2 * (torch.arange(len(images)) >= n_train)
    else:
        images, attributes, _, partition = load_celeba(data_dir)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = (order[partition[order] == part].to(device) for part in range(3))
    third = len(train) // 3
    return images.to(device), attributes.to(device), {
        "train": train, "evaluation": torch.cat([train[:third], validation]),
        "classifier": train[third:], "validation": validation, "test": test[:4000]}


def take(images, rows, index):
    """Images rows[index], from -1 to 1; an index beyond len(rows) gives a mirror image."""
    x = images[rows[index % len(rows)]]
    x = torch.where((index < len(rows)).view(-1, 1, 1, 1), x, x.flip(3))
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def scaled(convolution, channels, norm):
    """Layers that halve the sides (nn.Conv2d) or double them (nn.ConvTranspose2d)."""
    layers = []
    for before, after in zip(channels, channels[1:]):
        layers += [convolution(before, after, 4, 2, 1, bias=False), norm(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class ConditionalVAE(nn.Module):
    """Encoder q(u|x) and decoder x^(z,u); u: (n, maps, 4, 4)."""

    def __init__(self, channels, maps):
        super().__init__()
        self.maps, (c1, c2, c3, c4) = maps, channels
        self.encoder = nn.Sequential(scaled(nn.Conv2d, (3, *channels), nn.BatchNorm2d),
                                     nn.Conv2d(c4, 2 * maps, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(c4 + maps, c3, 3, 1, 1, bias=False), nn.BatchNorm2d(c3), nn.LeakyReLU(0.2),
            scaled(nn.ConvTranspose2d, (c3, c3, c2, c1), nn.BatchNorm2d),
            nn.ConvTranspose2d(c1, 3, 4, 2, 1))
        self.to(memory_format=torch.channels_last)

    def decode(self, z, u=None):
        """E[x|z,u], or E[x|z] without u: (n, 3, 64, 64)."""
        u = z.new_zeros(len(z), self.maps, 4, 4) if u is None else u
        return self.decoder(torch.cat([z, u], 1))

    def forward(self, x, z):
        """x^ for u from q, and KL(q(u|x) || N(0, I)) (n,), nats."""
        mean, log_sigma2 = self.encoder(x).chunk(2, 1)
        u = mean + (log_sigma2 / 2).exp() * torch.randn_like(mean)
        kl = mean**2 + log_sigma2.exp() - log_sigma2 - 1
        return self.decode(z, u), kl.sum((1, 2, 3)) / 2


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


def train_classifier(images, labels, rows, beta, s, progress):
    """A classifier of these rows and their mirror images: x -> z, then the head z -> logits."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * s["channels"][-1], labels.shape[1]))
    features = scaled(nn.Conv2d, (3, *s["channels"]), lambda c: nn.GroupNorm(4, c))
    model = nn.Sequential(features, head).to(images.device, memory_format=torch.channels_last)
    to_stochastic(model)

    def loss_at(index, t):
        logits, target = model(take(images, rows, index)), labels[rows[index % len(rows)]]
        return ib_loss(logits, target, model, beta * min(1, t / 0.4), len(rows))[0]
    fit(model, 2 * len(rows), loss_at, s["classifier_steps"], s, progress)
    return model


@functools.lru_cache(maxsize=1)
def evaluation_classifier(seed, *data):
    """Of other faces, with beta 0 and another seed; trained once per process and seed."""
    torch.manual_seed(seed + 1_000_000)
    images, labels, parts = load_faces(*data)
    return train_classifier(images, labels, parts["evaluation"], 0, SETTINGS[data[0]],
                            progress=lambda *_: None)


@torch.no_grad()
def draw_z(classifier, images, rows, n):
    """z ~ p(z|x), half (n, c, 4, 4), and logits (n, a), weights resampled for every eight faces."""
    with sample_weights(classifier.eval()):
        drawn = []
        for index in torch.arange(n, device=images.device).split(8):
            z = classifier[0](take(images, rows, index))
            drawn.append((z.half(), classifier[1](z)))
    return [torch.cat(parts) for parts in zip(*drawn)]


def ridge(z, target, z_test):
    """Ridge regression of target (n, k) on z (n, d), its prediction from z_test (m, d): (m, k).

    Each column has the penalty of least leave-one-out error.
    """
    scale = z.std(0) + 1e-6
    offset, centre = z.mean(0), target.mean(0)
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


def measure_z(z, z_test, images, labels, parts, components):
    """What ridge regression, fitted to the training faces' z, reads from the test faces' z.

    Nats of attributes and of leading principal components of the pixels; errors of the pixels, and
    those of the mean face and of these components of x itself.
    """
    train, test = parts["train"], parts["test"]
    z, z_test = z.flatten(1).float(), z_test.flatten(1).float()
    known = labels.float() - labels[train].float().mean(0)
    row = {"attribute_nats": gaussian_nats(known[test], ridge(z, known[train], z_test))}
    for region, mask in REGIONS.items():
        mask = mask.expand(3, 64, 64).flatten().to(images.device)
        mean = images[train[:4000]].flatten(1)[:, mask].float().mean(0)

        def pixels(rows):
            return (images[rows].flatten(1)[:, mask] - mean) / 127.5
        basis = torch.svd_lowrank(pixels(train[:4000]), components, niter=4)[2]
        known, x = torch.cat([pixels(rows) @ basis for rows in train.split(500)]), pixels(test)
        read, held = ridge(z, known, z_test), x @ basis
        row[f"picture_nats{region}"] = gaussian_nats(held, read)
        for name, guess in ("ridge", read), ("components", held), ("mean_face", 0 * held):
            row[f"{name}_mse{region}"] = (x - guess @ basis.T).square().mean().item()
    return row


def train_cell(cell, device, args, progress):
    """Train the classifier, draw z, train the decoder, and measure both on held-out faces."""
    s, beta, seed = SETTINGS[args.scale], cell["beta"], cell["seed"]
    evaluator = evaluation_classifier(seed, args.scale, args.dataset, args.data_dir, device)
    torch.manual_seed(seed)  # the above is cached
    images, labels, parts = load_data(args, device)
    rows, train, test = parts["classifier"], parts["train"], parts["test"]

    classifier = train_classifier(images, labels, rows, beta, s, progress)
    z, _ = draw_z(classifier, images, train, 2 * len(train))
    z_test, logits = draw_z(classifier, images, test, len(test))
    vae = ConditionalVAE(s["channels"], s["maps"]).to(device)

    def mean_loss(index, t):
        return (take(images, train, index) - vae.decode(z[index].float())).square().mean()

    def vae_loss(index, t):
        x = take(images, train, index)
        decoded, kl = vae(x, z[index].float())
        kl_weight = s["kl_weight"] ** max(0, 1 - 2 * t)
        return (x - decoded).square().mean() / 2 / s["sigma2"] + kl_weight * kl.mean() / 3 / 64**2
    fit(vae, len(z), mean_loss, s["decoder_steps"], s, progress)
    mean = predict(vae.decode, z_test.float()).clamp(-1, 1)
    fit(vae, len(z), vae_loss, s["vae_steps"], s, progress)
    with torch.no_grad():
        drawn = vae.decode(z_test[:8].float(), torch.randn(8, vae.maps, 4, 4, device=device))

    x, y = take(images, test, torch.arange(len(test), device=device)), labels[test]
    shown = torch.stack([x[:8], mean[:8], drawn], 1).flatten(0, 1).cpu() / 2 + 0.5
    save_image(shown, faces_path(args, beta, seed), nrow=3, padding=0)
    error = (mean - x).square().mean((0, 1))
    return {"n": len(rows), "information": weight_information(classifier).item(),
            "attribute_acc": agreement(logits, y),
            "majority_acc": agreement(labels[rows].float().mean(0) - 0.5, y),
            "attribute_agreement": agreement(predict(evaluator, mean), y),
            "reconstruction_mse": error.mean().item(),
            "background_mse": error[BACKGROUND.to(device)].mean().item(),
            } | measure_z(z[:len(train)], z_test, images, labels, parts, s["components"])


def agreement(logits, y):
    """Fraction of logits (n, a) whose sign is that of the 0/1 attributes y (n, a)."""
    return ((logits > 0) == y.bool()).float().mean().item()


def faces_path(args, *cell):
    """Of the picture of a cell, (beta, seed), or of all beta, ()."""
    name = "".join(f"-{value:g}" for value in cell)
    return args.out / f"{args.figure}-{args.scale}-{args.dataset}{name}-faces.png"


def claims(ok, args):
    """The claims table, over the seeds of which no beta is missing but the reference."""
    betas, table = [beta for beta in GRID[args.scale] if beta > 0], []
    rows = complete_seeds(ok, [{"beta": beta} for beta in betas])
    for row in rows:
        row["excess"] = row["attribute_agreement"] - row["majority_acc"]

    def kept(key):
        return per_seed(lambda rows: rows[-1][key] / rows[0][key], rows)

    def add(sentence, paper, holds, *shares):
        ours = ", ".join(fmt(share, "{:.0%}") for share in shares)
        table.append(claim(sentence, paper, ours, all(holds)))

    if not rows:
        return table
    picture, attributes = kept("picture_nats"), kept("attribute_nats")
    add(f"of z's nats of the picture at most ⅔ are kept, from β = {betas[0]:g} to {betas[-1]:g}",
        "the rest is new", picture <= 2 / 3, picture)
    add("a smaller share than of those of the attributes", "attributes stay", picture < attributes,
        picture, attributes)
    if args.scale != "demo":  # whose faces are too plain, and its decoder too briefly trained
        outside, inside, excess = (kept(key) for key in (
            "picture_nats_outside", "picture_nats_inside", "excess"))
        add("of the background a smaller share than of the face", "background is new",
            outside < inside, outside, inside)
        add("of the accuracy of attributes seen in E[x|z], less the majority's, 80% is kept",
            "attributes stay", excess >= 0.8, excess)
    return table


def plot(ok, args):
    panels = {
        "nats that ridge regression reads from z": {
            "picture_nats_outside": "of pixels outside the ellipse",
            "picture_nats_inside": "of pixels inside",
            "attribute_nats": "of attributes, as if Gaussian"},
        "mean square error, pixels in [−1, 1]": {
            f"{key}_mse_{region}": f"{label}, {region}" for region in ("outside", "inside")
            for key, label in (("mean_face", "mean face"), ("ridge", "ridge from z"),
                               ("components", "components of x"))}}
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
        ax.set_ylim(0, 1.6 * ax.get_ylim()[1])
    save_figure(fig, args)
    paths = [faces_path(args, beta, ok[0]["seed"]) for beta in betas]
    if all(path.exists() for path in paths):
        faces = [read_image(str(path))[..., 64 * (path != paths[0]):] for path in paths]
        save_image(torch.cat(faces, 2) / 255, faces_path(args))


def main():
    args = parse_args(__doc__, DATASETS, SEEDS)
    cells = [{"beta": beta} for beta in GRID[args.scale]]
    ok = ok_rows(run_grid(cells, train_cell, args, SETTINGS[args.scale], load_data))
    plot(ok, args)
    save_tables(args, claims=claims(ok, args))


if __name__ == "__main__":
    main()
