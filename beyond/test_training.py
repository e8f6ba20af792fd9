"""What nets are trained and measured on. pytest beyond.

Then estimators that are trained, where the answer is known.
"""
import argparse
import importlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import fig4_cluttered_mnist as fig4
from common import normalise
from test_common import TINY

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
    (FIG2, {"panel": "corruption", "corruption": 0.0, "n": 100, "beta": 0.1, "steps_factor": 2},
     (1, 1)),
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
    _, args, _ = demo(monkeypatch, "fig4_cluttered_mnist", tmp_path)
    s, pairs, clutter, training, drawn, local = fig4.SETTINGS["demo"], [], [], [], [], []
    x, _, x_test, *_ = fig4.load_data(args)
    add_clutter, estimate = fig4.add_clutter, fig4.density_ratio_information

    def add(digits, *arguments, **options):
        clutter.append(names(digits))
        return add_clutter(digits, *arguments, **options)

    def estimated(*arguments, **options):
        pairs.append((*arguments[1:3], options["held_out"]))
        assert not options["shuffle"]  # the last z are those of test digits
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
    white = images.max()
    windows = images.unfold(0, len(z), 1).movedim(-1, 1)  # z is of one of them
    assert len(z) == len(masks) > s["test"] == held_out
    assert masks.dtype == torch.bool
    assert any((window[masks] == white).all() for window in windows)
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


def test_fig4_noise_is_in_units_of_each_channel_and_leaves_the_nats_asked_for():
    s, labels = dict(n=4000, test=1000), torch.randint(10, (5000,))
    z = torch.randn(5000, 12, 4, 4)
    z[:, :10] += 3 * F.one_hot(labels, 10)[:, :, None, None]
    z[:, 1] *= 10
    z[:, 11] = 0  # a pruned channel
    std = z.std((0, 2, 3))
    size = fig4.noise_size(z, labels, 1.0, s)
    fig4.add_noise(z, size)
    assert torch.allclose(z.std((0, 2, 3)), std * (1 + size**2) ** 0.5, rtol=0.02)
    assert fig4.label_nats(z.mean((2, 3)), labels, s) == pytest.approx(1.0, abs=0.05)


def test_fig5_test_faces_are_not_trained_on(monkeypatch, tmp_path):
    fig5, args, _ = demo(monkeypatch, "fig5_celeba_vae", tmp_path)
    images, *_, parts = fig5.load_data(args)
    parts = {name: set(rows.tolist()) for name, rows in parts.items()}
    rows = dict(zip(names(images.flip(3)), range(len(images))))
    rows |= dict(zip(names(images), range(len(images))))
    assert not parts["train"] & parts["test"]
    assert not parts["unseen"] & parts["classifier"]
    assert not parts["ridge"] & parts["classifier"]
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
    assert len(trained) > 1
    for seen in trained.values():  # every net by faces of one part
        assert len(seen) > 9
        assert any(seen <= part for part in parts.values())
        assert not seen & parts["test"]
    assert parts["test"] <= measured


def test_fig5_mirror_images_have_the_factors_that_they_show(monkeypatch, tmp_path):
    fig5, args, _ = demo(monkeypatch, "fig5_celeba_vae", tmp_path)
    monkeypatch.setitem(fig5.SETTINGS["demo"], "synthetic", (4000, 10))
    images, _, factors, _ = fig5.load_data(args)

    def mean_pictures(images, labels):
        return torch.stack([images[rows.bool()].float().mean(0).flatten() for rows in labels.T])

    for name, labels in factors.items():
        of_images, of_mirrored = labels.split(len(images))
        distance = torch.cdist(mean_pictures(images, of_images),
                               mean_pictures(images.flip(3), of_mirrored))
        assert (distance.argmin(1) == torch.arange(len(distance))).all(), name
