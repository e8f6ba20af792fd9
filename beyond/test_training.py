"""What nets are trained and measured on, and the code that counts as training. pytest beyond.

Then estimators that are trained, where the answer is known.
"""
import argparse
import copy
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from common import (_ratio_estimates, density_ratio_information, label_information, normalise,
                    total_correlation)
from test_common import TINY

HERE = Path(common.__file__).resolve().parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def demo(monkeypatch, script, tmp_path):
    """(its module at the demo scale with TINY settings, args, its cells, one of each kind)."""
    figure, kinds = importlib.import_module(script), {}
    for name, changes in zip(("SETTINGS", "GRID"), TINY[script]):
        if changes:
            own = getattr(figure, name)
            monkeypatch.setitem(own, "demo", own["demo"] | changes)
    args = argparse.Namespace(figure=script, scale="demo", dataset="synthetic", data_dir=tmp_path,
                              out=tmp_path, device=torch.device("cpu"))

    def grid_instead(cells, *_):
        for cell in cells:  # of one kind: same keys, same words
            kind = *cell, *(value for value in cell.values() if isinstance(value, str))
            kinds.setdefault(kind, cell | {"seed": 0})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(figure, "parse_args", lambda *_: args)
        patch.setattr(figure, "run_grid", grid_instead)
        figure.main()
    for cached in [common.load_images, *vars(figure).values()]:
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    return figure, args, list(kinds.values())


def names(images):
    """What tells images (n, ...) apart, as one key each."""
    return [image.numpy().tobytes() for image in images.detach().float().contiguous()]


class Oracle:
    """While it is active, nets whose images are known answer with the truth.

    truth: {name of an image: label}. right: of which copies, "sampled" or "mean", None: of all
    nets; the others are wrong. It notes which images are seen in training and in measuring, the
    learning rates, and beta/n of each step.
    """

    def __init__(self, monkeypatch, figure, truth, right=None):
        self.truth, self.right = truth, right
        self.trained, self.measured, self.rates, self.betas = set(), set(), [], []
        for kind in ("sampled", "mean"):
            make = getattr(common, f"{kind}_network")
            for module in (common, figure):  # wherever they are looked up
                monkeypatch.setattr(module, f"{kind}_network", self.named(make, kind),
                                    raising=False)
        backward = torch.Tensor.backward
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(self.note(loss)))

    def named(self, make, kind):
        def named_network(model):
            net = make(model)
            net.kind = kind
            return net
        return named_network

    def __enter__(self):
        self.hooks = [nn.modules.module.register_module_forward_hook(self.answer),
                      register_optimizer_step_pre_hook(self.step)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def answer(self, net, arguments, logits):
        known = names(arguments[0]) if arguments and arguments[0].dim() == 4 else []
        if (not known or known[0] not in self.truth or isinstance(logits, tuple)
                or logits.shape != (len(known), 10)):
            return None
        if torch.is_grad_enabled():
            self.net = net
            self.trained.update(known)
        else:
            self.measured.update(known)
        labels = torch.tensor([self.truth[name] for name in known])
        if self.right not in (None, getattr(net, "kind", None)):
            labels = (labels + 1) % 10
        return 0 * logits + 50 * F.one_hot(labels, 10)

    def step(self, optimizer, *_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.decays = [group["weight_decay"] for group in optimizer.param_groups]

    def note(self, loss):
        nats = [m.information().item() for m in self.net.modules() if hasattr(m, "information")]
        self.betas.append(loss.item() / max(sum(nats), 1))  # the cross-entropy is 0
        return loss


def prepare(monkeypatch, tmp_path, script, right=None):
    """(the script's module, args, {image: label} of training images, of test images, an Oracle)."""
    figure, args, _ = demo(monkeypatch, script, tmp_path)
    x, y, x_test, y_test, mean, std = figure.load_data(args)
    size = 32 if "fig3" in script else 28
    train = dict(zip(names(normalise(x, mean, std, size)), y.tolist()))
    test = dict(zip(names(normalise(x_test, mean, std, size)), y_test.tolist()))
    return figure, args, train, test, Oracle(monkeypatch, figure, train | test, right)


FIG1, FIG2, FIG3 = "fig1_phase_transition", "fig2_corrupted_labels", "fig3_width_beta"
CELLS = [  # script, cell, accuracy on the labels it is given of an oracle that knows the true ones
    (FIG1, {"labels": "random", "n": 200, "beta": 0.1, "steps_factor": 2}, (0.02, 0.2)),
    (FIG1, {"labels": "real", "n": 100, "beta": 0.1}, (1, 1)),
    (FIG2, {"panel": "models", "model": "ResNet", "n": 100, "beta": 0.1}, (0.02, 0.2)),
    (FIG2, {"panel": "corruption", "corruption": 0.0, "n": 100, "beta": 0.1}, (1, 1)),
    (FIG2, {"panel": "corruption", "corruption": 0.5, "n": 100, "beta": 0.1}, (0.4, 0.7)),
    (FIG3, {"panel": "beta", "beta": 0.1, "max_log_alpha": 0.0, "width": 1 / 32}, (1, 1)),
    (FIG3, {"panel": "width", "weight_decay": 0.1, "width": 1 / 32}, (1, 1))]


@pytest.mark.parametrize("script, cell, true", CELLS)
def test_what_nets_are_trained_and_measured_on(monkeypatch, tmp_path, script, cell, true):
    figure, args, train, test, oracle = prepare(monkeypatch, tmp_path, script)
    with oracle:
        row = figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
    n = cell.get("n", len(train))
    assert not train.keys() & test.keys()
    assert not oracle.trained & test.keys()
    assert 0.75 * n < len(oracle.trained) <= n
    assert oracle.measured >= oracle.trained
    assert len(oracle.measured & train.keys()) == n
    assert len(oracle.measured & test.keys()) == figure.SETTINGS["demo"]["test"]
    assert true[0] <= row["train_acc"] <= true[1]
    assert row["test_acc"] == 1


@pytest.mark.parametrize("script, cell, true", CELLS)
def test_rates_and_penalty_in_training(monkeypatch, tmp_path, script, cell, true):
    figure, args, _, _, oracle = prepare(monkeypatch, tmp_path, script)
    s, noisy = figure.SETTINGS["demo"], "beta" in cell
    with oracle:
        row = figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
    top = [s["lr"], s["lr_noise"]] if noisy else [s["lr_sgd"]]
    assert oracle.rates[0] == pytest.approx([rate / 1000 for rate in top])
    assert np.max(oracle.rates, 0) == pytest.approx(top)
    assert oracle.rates[-1][0] < top[0]
    assert len(oracle.rates) == s.get("steps", s.get("beta_steps")) * cell.get("steps_factor", 1)
    assert set(oracle.decays) == {cell.get("weight_decay", 0)}
    caps = {m.max_log_alpha for m in oracle.net.modules() if hasattr(m, "log_sigma2")}
    assert caps == ({cell.get("max_log_alpha")} if noisy else set())
    if noisy and true == (1, 1):  # beta/n rises from 0 to its value
        assert oracle.betas[0] < 1e-6
        assert oracle.betas[-1] == pytest.approx(cell["beta"] / row["n"] if "n" in row
                                                 else cell["beta"] / cell["n"], rel=1e-3)


@pytest.mark.parametrize("right", ["sampled", "mean"])
@pytest.mark.parametrize("script, cell", [(script, cell) for script, cell, true in CELLS
                                          if "beta" in cell and true == (1, 1)])
def test_which_network_is_measured(monkeypatch, tmp_path, script, cell, right):
    figure, args, _, _, oracle = prepare(monkeypatch, tmp_path, script, right)
    with oracle:
        row = figure.train_cell(cell | {"seed": 3}, args.device, args, lambda *_: None)
    sampled, mean = float(right == "sampled"), float(right == "mean")
    assert (row["train_acc"], row["test_acc_sampled"]) == (sampled, sampled)
    assert row["test_acc"] == mean
    assert (row["cross_entropy"] < 1e-6) == (right == "sampled")
    assert row.get("train_acc_mean", mean) == mean


def test_the_resnet_is_one(monkeypatch, tmp_path):
    figure, args, _, _, oracle = prepare(monkeypatch, tmp_path, FIG2)
    with oracle:
        figure.train_cell(CELLS[2][1] | {"seed": 3}, args.device, args, lambda *_: None)
    assert any(isinstance(m, figure.Block) for m in oracle.net)


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_networks_have_the_sizes_they_claim():
    import fig1_phase_transition as fig1
    import fig2_corrupted_labels as fig2
    import fig3_width_beta as fig3
    shifts = -64 - 64 - 384 - 192 - 10 + 64 + 384 + 192  # instead of biases
    assert size(fig1.small_alexnet()) == size(fig2.small_alexnet()) == 1_387_786 + shifts
    for width, count in ((1 / 4, 102_610), (1 / 2, 406_810), (1, 1_620_010)):  # the paper's
        assert size(fig3.all_cnn(width)) == size(fig2.all_cnn(width)) == count - 1344 * width - 10
    convolutions = [m for m in fig2.resnet(1 / 8, 2).modules()
                    if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 6 * 2 + 1


@pytest.mark.parametrize("name", ["small_alexnet", "all_cnn", "resnet"])
def test_every_parameter_of_figs_1_to_3_has_noise(name):
    import fig2_corrupted_labels as fig2
    make = {"resnet": lambda: fig2.resnet(1 / 8, 1)}.get(name, lambda: getattr(fig2, name)(1 / 16))
    model = common.to_stochastic(make())
    noisy = sum(m.weight.numel() for m in model.modules() if hasattr(m, "log_sigma2"))
    assert size(model) == 2 * noisy


def test_fig4_masks_noise_and_clutter(monkeypatch, tmp_path):
    fig4, args, _ = demo(monkeypatch, "fig4_cluttered_mnist", tmp_path)
    s, pairs, clutter, training, drawn, local = fig4.SETTINGS["demo"], [], [], [], [], []
    x, _, x_test, *_ = fig4.load_data(args)
    add_clutter, estimate = fig4.add_clutter, fig4.density_ratio_information

    def add(digits, *arguments, **options):
        clutter.append(names(digits))
        return add_clutter(digits, *arguments, **options)

    def estimated(*arguments, **options):
        pairs.append((*arguments[1:3], options["held_out"]))
        return estimate(*arguments, **options)

    def look(m, inputs):
        if pairs or not isinstance(m, nn.Conv2d):
            return
        if inputs[0].shape[1:] == (1, 28, 28):
            if m.training and torch.is_grad_enabled():
                training.append((inputs[0], set(clutter[-1])))
            elif not m.training:
                drawn.append(inputs[0])
        elif not m.training and getattr(m, "sampling", False):
            local.append(m.local)

    monkeypatch.setattr(fig4, "add_clutter", add)
    monkeypatch.setattr(fig4, "density_ratio_information", estimated)
    hook = nn.modules.module.register_module_forward_pre_hook(look)
    fig4.train_cell({"beta": 0.1, "seed": 0}, args.device, args, lambda *_: None)
    hook.remove()
    (z, masks, held_out), images = pairs[0], torch.cat(drawn)
    images, white = images[-len(z):], images.max()
    assert len(z) == len(masks) > s["test"] == held_out
    assert masks.dtype == torch.bool
    assert (images[masks] == white).all()
    assert 80 < masks.sum() / len(masks) < 161
    assert local
    assert all(local)  # every example and position has noise of its own
    train, test = set(names(x)), set(names(x_test))
    assert not train & test
    assert set(sum(clutter, [])) & test
    for shown, digits in training:  # training digits, under clutter
        assert digits <= train
        assert (shown == white).sum((1, 2, 3)).min() > 60
    shown = sum((names(shown) for shown, _ in training), [])
    assert len(set(shown)) == s["steps"] * s["batch"]  # new in every batch


def test_fig5_test_faces_are_not_trained_on(monkeypatch, tmp_path):
    fig5, args, _ = demo(monkeypatch, "fig5_celeba_vae", tmp_path)
    images, *_, parts = fig5.load_data(args)
    parts = {name: set(rows.tolist()) for name, rows in parts.items()}
    rows = dict(zip(names(images.flip(3)), range(len(images))))
    rows |= dict(zip(names(images), range(len(images))))
    assert not parts["train"] & parts["test"]
    assert not parts["evaluation"] & parts["classifier"]
    trained, measured = {}, set()

    def look(m, inputs):
        if isinstance(m, nn.Conv2d) and inputs[0].shape[1:] == images.shape[1:]:
            pixels = ((inputs[0] + 1) * 127.5).round().to(torch.uint8)
            known = {rows[name] for name in names(pixels) if name in rows}
            if torch.is_grad_enabled() and m.training:
                trained.setdefault(m, set()).update(known)
            else:
                measured.update(known)

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    fig5.train_cell({"beta": 0.1, "seed": 0}, args.device, args, lambda *_: None)
    hook.remove()
    evaluator, classifier, *others = trained.values()
    assert min(len(evaluator), len(classifier)) > 9
    assert evaluator <= parts["evaluation"]
    assert classifier <= parts["classifier"]
    assert not parts["test"] & set.union(*others)
    assert parts["test"] <= measured


# === The code that counts as training

FIG1_TEXT = (HERE / "fig1_phase_transition.py").read_text()


def code_of(folder, text):
    """training_code of a script of this text, imported from a folder of its own."""
    number = len(list(folder.iterdir()))
    path = folder / f"script{number}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return common.training_code(module.train_cell, module.load_data)


@pytest.mark.parametrize("old, new, changes", [
    ("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", True),  # the network
    ("int(384 * width)", "int(256 * width)", True),
    ("x + (shift", "x - (shift", True),  # a class that the network calls
    ("beta_now / n * nats", "beta_now * nats", True),  # the training loop
    ('s["draws"])', '4)', True),
    ("# eq. 3, per sample", "# the loss", False),
    ('"""Train and measure one net.', '"""Measure and train one net.', False),
    ("        loss.backward()\n", "        loss.backward()\n\n", False),
    ("F.cross_entropy(logits, y[index])", "F.cross_entropy( logits, y[index] )", False),
    ("ax.legend()", "ax.legend(loc=2)", False),  # a plot
    ("PAPER_LINE = -2.8", "PAPER_LINE = -2.9", False)])
def test_training_code_is_that_of_nets_and_training(monkeypatch, tmp_path, old, new, changes):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))  # where the project is
    assert old in FIG1_TEXT
    before, after = code_of(tmp_path, FIG1_TEXT), code_of(tmp_path, FIG1_TEXT.replace(old, new))
    assert (before != after) == changes


# === Estimators that are trained, and others, where the answer is known

class PairCritic(nn.Module):
    """Scores all pairs of rows of z and n: a bilinear form and inner products of two embeddings."""

    def __init__(self, dim):
        super().__init__()
        self.z, self.n = (nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16))
                          for _ in range(2))
        self.product = nn.Linear(dim, dim)
        nn.init.zeros_(self.product.weight)

    def forward(self, z, n):
        return self.product(z) @ n.T + self.z(z) @ self.n(n).T


def gaussian_pairs(information, dim, count):
    """(z, n), each (count, dim), of known I(z;n): dim pairs of Gaussians of one correlation."""
    square = -math.expm1(-2 * information / dim)  # I = -dim/2 log(1 - correlation^2)
    z = torch.randn(count, dim)
    return z, square**0.5 * z + (1 - square) ** 0.5 * torch.randn(count, dim)


@pytest.mark.parametrize("information, dim, within", [(0, 20, 0.05), (0.5, 1, 0.1),
                                                      (5, 20, 0.75)])
def test_density_ratio_of_correlated_gaussians(information, dim, within):
    z, n = gaussian_pairs(information, dim, 60_000)
    ours = density_ratio_information(PairCritic(dim), z, n, lr=5e-3, steps=800, patience=200)
    assert ours["plug_in"] == pytest.approx(information, abs=within)
    for bound in ("donsker_varadhan", "info_nce"):
        assert information - 2 * within < ours[bound] < information + within / 2


def test_density_ratio_measures_what_it_was_given():
    z, n = gaussian_pairs(2, 5, 3000)
    z.requires_grad_()
    critic, parts = PairCritic(5), dict(validation=500, held_out=500)

    def estimate(n):
        torch.manual_seed(0)
        net = copy.deepcopy(critic)
        return density_ratio_information(net, z, n, **parts, steps=60, batch=64)

    ours = estimate(n)
    assert z.grad is None
    assert estimate(n) == ours
    # what was learned does not hold of the held-out pairs
    shuffled = torch.cat([n[:-500], n[-500:].roll(1, 0)])
    assert estimate(shuffled)["info_nce"] < 0 < ours["info_nce"]
    for arguments in ((z[:-1], n), (z[:900], n[:900])):
        with pytest.raises(ValueError, match="pairs"):
            density_ratio_information(critic, *arguments)
    with pytest.raises(ValueError, match="every pair"):
        density_ratio_information(nn.Bilinear(5, 5, 1), z, n, **parts)
    with pytest.raises(FloatingPointError):
        density_ratio_information(critic, z * math.nan, n, **parts, steps=1)


def test_density_ratio_keeps_the_best_state_and_stops():
    class Spoiled(nn.Module):  # good until its 100th training step
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, z, n):
            self.seen += self.training
            return (self.scale if self.seen <= 100 else -self.scale) * (z @ n.T)

    z, n = gaussian_pairs(2, 5, 1000)
    net = Spoiled()
    ours = density_ratio_information(net, z, n, validation=300, held_out=300, patience=200)
    assert net.seen in (50, 100)
    assert ours["info_nce"] > 0.5


def test_label_information():
    labels, two = torch.arange(10).repeat(20), torch.tensor([0, 0, 0, 1])
    for y, nats in ((labels, math.log(10)), (two, 0.5623)):  # H(y) is theirs, not log 2
        assert label_information(F.one_hot(y) * 50.0, y).item() == pytest.approx(nats, abs=1e-4)
    assert label_information(torch.zeros(200, 10), labels).item() == pytest.approx(0, abs=1e-6)
    # a noisy channel: right with probability p, else uniform over the rest
    p, n = 0.7, 200_000
    x = torch.randint(10, (n,))
    y = torch.where(torch.rand(n) < p, x, (x + torch.randint(1, 10, (n,))) % 10)
    channel = torch.full((10, 10), (1 - p) / 9).fill_diagonal_(p)
    exact = math.log(10) + p * math.log(p) + (1 - p) * math.log((1 - p) / 9)
    assert label_information(channel.log()[x], y).item() == pytest.approx(exact, abs=0.01)


def test_total_correlation_of_a_gaussian():
    a = torch.randn(4, 4, dtype=torch.double)
    covariance = a @ a.T + torch.eye(4)
    exact = 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance))
    normal = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    z = F.pad(normal.sample((100_000,)), (0, 1), value=3.0)
    z = z.view(-1, 5, 1) * 7 + 2  # scale, shift, constants do not matter
    assert total_correlation(z).item() == pytest.approx(exact.item(), abs=0.01)
    assert total_correlation(torch.randn(100_000, 3)).item() == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="samples"):
        total_correlation(torch.randn(4, 5))


def test_ratio_estimates_of_scores_written_by_hand():
    scores = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 0.5], [-2.0, 0.0, 1.0]])
    ours = _ratio_estimates(scores)
    wrong = [0.0, -1.0, 1.0, 0.5, -2.0, 0.0]
    assert ours["plug_in"] == pytest.approx(2.0)
    assert ours["donsker_varadhan"] == pytest.approx(2 - math.log(sum(map(math.exp, wrong)) / 6))
    info_nce = scores.log_softmax(1).diagonal().mean().item() + math.log(3)
    assert ours["info_nce"] == pytest.approx(info_nce)
