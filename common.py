"""Shared pieces of the reproduction of Achille & Soatto, "Emergence of Invariance and
Disentanglement in Deep Representations" (JMLR 2018, arXiv 1706.01350). Information is in nats.

Each of the five sections also runs alone when pasted under this import block.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import glob
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent import futures
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: files are not locked
    fcntl = None

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Adam's moments of pruned weights decay into denormals, which slow a CPU several times.
torch.set_flush_denormal(True)

# === 1. Stochastic layers =================================
# w = w_mean * eps, with an alpha learned for every weight. The parameter is
# log sigma^2 = log alpha + log w_mean^2, so that a step of the mean keeps the noise.

EPS = 1e-16  # added to w^2 before its logarithm, as a weight can be zero
MAX_LOG_SIGMA2 = 20.0  # far beyond any useful noise

# Molchanov et al. 2017 (arXiv 1701.05369), eq. 14
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def gaussian_kl(log_alpha):
    """KL of a weight with noise N(1, alpha) from the log-uniform prior, nats; 0 at alpha = inf."""
    return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


def log_normal_kl(log_alpha, max_log_alpha):
    """The same for log eps ~ N(-alpha/2, alpha) (Prop. 4.1), nats; 0 at the largest alpha."""
    return 0.5 * (max_log_alpha - log_alpha)


def draw_weight(weight, log_sigma2, noise="gaussian"):
    """One draw from q(w|D) of weights with these means: a tensor like weight."""
    normal = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device)
    if noise == "gaussian":  # eps ~ N(1, alpha)
        return torch.addcmul(weight, _CappedExp.apply(log_sigma2, 0.5).to(normal), normal)
    alpha = _log_normal_alpha(weight, log_sigma2)
    log_eps = (alpha + 1e-30).sqrt() * normal - 0.5 * alpha
    return weight * torch.exp(log_eps).to(weight.dtype)


def draw_outputs(linear, x, weight, bias, log_sigma2, noise="gaussian"):
    """linear(x, w, bias) with another draw of w for every output: local reparameterisation.

    The outputs are Gaussian, of the right mean and variance (Kingma et al. 2015). noise:
    "gaussian", or "lognormal" with alpha, its variance expm1(alpha).
    """
    with torch.autocast(x.device.type, enabled=False):  # squares overflow half precision
        if noise == "gaussian":
            variance = _CappedExp.apply(_at_least_float32(log_sigma2), 1.0)
        else:
            alpha = _log_normal_alpha(weight, log_sigma2)
            variance = _at_least_float32(weight) ** 2 * torch.expm1(alpha)
        x_wide = _at_least_float32(x)
        variance = linear(x_wide * x_wide, variance, None)
    return _GaussianNoise.apply(linear(x, weight, bias), variance)


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_square(weight):
    return torch.log(_at_least_float32(weight) ** 2 + EPS)


def _log_square_or_scale(weight):
    """log w^2; where w = 0, which has no noise of its own, that of the layer's scale."""
    square = _at_least_float32(weight) ** 2
    usual = 1 / (3 * max(1, weight.shape[1:].numel()))  # of torch's own initialisation
    scale = torch.where((square > 0).any(), square.mean(), usual)
    return torch.log(torch.where(square == 0, scale, square) + EPS)


def _log_normal_alpha(weight, log_sigma2):
    return torch.exp(_at_least_float32(log_sigma2) - _log_square(weight))


class _CappedExp(torch.autograd.Function):
    """exp(scale * min(x, MAX_LOG_SIGMA2)), with the gradient of exp beyond the cap too."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        out = x.clamp(max=MAX_LOG_SIGMA2).mul_(scale).exp_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(ctx.scale), None


class _GaussianNoise(torch.autograd.Function):
    """mean + sqrt(variance + 1e-12) * randn_like(mean), in one pass where autograd takes five."""

    @staticmethod
    def forward(ctx, mean, variance):
        # a convolution by Winograd's or Fourier's transform can round 0 to less
        std = variance.clamp(min=0).add_(1e-12).sqrt_()
        # drawn flat: torch fills channels-last tensors with normals several times slower
        noise = torch.randn(std.numel(), dtype=std.dtype, device=std.device)
        noise = noise.as_strided(std.shape, std.stride())
        sample = torch.addcmul(mean, std.to(mean.dtype), noise.to(mean.dtype))
        ctx.save_for_backward(noise.div_(std).mul_(0.5), variance)
        return sample

    @staticmethod
    def backward(ctx, grad):
        slope, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph: the slope as a function of variance
            std = (variance.clamp(min=0) + 1e-12).sqrt()
            slope = slope * std.detach() / std
        return grad, grad * slope


class _GaussianKL(torch.autograd.Function):
    """gaussian_kl(log_sigma2 - log(weight^2 + EPS)).sum(), value and gradient in one pass."""

    @staticmethod
    def forward(ctx, weight, log_sigma2):
        w, s = _at_least_float32(weight), _at_least_float32(log_sigma2).clamp(max=MAX_LOG_SIGMA2)
        w2 = torch.mul(w, w).add_(EPS)
        total = torch.exp(s).add_(w2)  # 1 + 1/alpha = total / sigma^2
        k = torch.log(w2).sub_(s).mul_(-K3).add_(K2).sigmoid_()
        kl = K1 * (w.numel() - k.sum()) + 0.5 * torch.log(total).sub_(s).sum()
        slope = k.addcmul_(k, k, value=-1).mul_(-K1 * K3)
        slope.sub_(w2 / total, alpha=0.5)
        ctx.save_for_backward(torch.mul(w, slope).div_(w2), slope, weight, log_sigma2)
        return kl

    @staticmethod
    def backward(ctx, grad):
        weight_slope, slope, weight, log_sigma2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph: the slopes as functions of both
            w, beyond = _at_least_float32(weight), F.relu(log_sigma2.detach() - MAX_LOG_SIGMA2)
            log_alpha = log_sigma2 - beyond - _log_square(weight)
            k = torch.sigmoid(K2 + K3 * log_alpha)
            slope = -K1 * K3 * k * (1 - k) - 0.5 * torch.sigmoid(-log_alpha)
            weight_slope = slope * w / (w**2 + EPS)
        return weight_slope * (-2 * grad), slope * grad


class _StochasticWeight:
    """Shared by the stochastic layers: noise on `weight`, and its information."""

    sampling = None  # draw noise? None: in train() only. Set by sample_weights().

    def __init__(self, *args, noise="gaussian", local=None, log_alpha=-6.0, max_log_alpha=None,
                 **kwargs):
        super().__init__(*args, **kwargs)
        self._make_stochastic(noise, local, log_alpha, max_log_alpha)

    def _make_stochastic(self, noise="gaussian", local=None, log_alpha=-6.0, max_log_alpha=None):
        if noise not in ("gaussian", "lognormal"):
            raise ValueError(f"noise={noise!r}: choose 'gaussian' or 'lognormal'")
        if max_log_alpha is None and noise == "lognormal":
            max_log_alpha = 1.0
        if not (math.isfinite(log_alpha) and math.isfinite(max_log_alpha or 0)):
            raise ValueError(f"{max_log_alpha=} and {log_alpha=} have to be finite")
        self.noise, self.max_log_alpha = noise, max_log_alpha
        self.local = isinstance(self, nn.Linear) if local is None else local
        trained = self.weight.requires_grad
        self.log_sigma2 = nn.Parameter(torch.empty_like(self.weight), requires_grad=trained)
        self._initial_log_alpha = log_alpha
        self.log_alpha = log_alpha

    def reset_parameters(self):
        super().reset_parameters()
        if "log_sigma2" in self._parameters:  # not within __init__
            self.log_alpha = self._initial_log_alpha

    def _make_plain(self):
        """Be the plain layer again, in place, with the present weights."""
        own_forward = type(self).forward is not _StochasticWeight.forward
        if own_forward or "weight" not in self._parameters:
            raise TypeError(f"{type(self).__name__} has a forward or a weight of its own, as no "
                            "plain layer has: remove its parametrisations, or use its base class")
        for name in ("log_sigma2", "noise", "local", "max_log_alpha", "_initial_log_alpha"):
            delattr(self, name)
        self.__class__ = next(plain for plain in STOCHASTIC if isinstance(self, plain))

    @property
    def log_alpha(self):
        """log alpha of every weight. Assign a float or a tensor."""
        log_alpha = _at_least_float32(self.log_sigma2) - _log_square(self.weight)
        return log_alpha if self.max_log_alpha is None else log_alpha.clamp(max=self.max_log_alpha)

    @log_alpha.setter
    def log_alpha(self, value):
        with torch.no_grad():
            self.log_sigma2.copy_(value + _log_square_or_scale(self.weight))

    def _capped_log_sigma2(self):
        """log sigma^2 under the cap on log alpha, which lets the gradient of log sigma^2 pass."""
        if self.max_log_alpha is None:
            return self.log_sigma2
        log_alpha = _at_least_float32(self.log_sigma2.detach()) - _log_square(self.weight)
        return self.log_sigma2 - F.relu(log_alpha - self.max_log_alpha)

    def information(self):
        """The paper's I~(w;D), the information in this layer's weights: 0-d tensor, nats.

        Sum of KLs from the log-uniform prior (Prop. 4.1), with C such that a weight at the largest
        alpha (infinity, or the cap) holds zero nats. Gaussian: to 0.0095 nats and 3.5%.
        """
        if self.noise == "lognormal":
            return log_normal_kl(self.log_alpha, self.max_log_alpha).sum()
        kl = _GaussianKL.apply(self.weight, self._capped_log_sigma2())
        if self.max_log_alpha is None:
            return kl
        at_cap = gaussian_kl(torch.tensor(self.max_log_alpha, dtype=torch.float32))
        return kl - self.weight.numel() * at_cap.item()

    def sample_weight(self):
        """One draw of the weights from q(w|D): a tensor like weight."""
        return draw_weight(self.weight, self._capped_log_sigma2(), self.noise)

    def forward(self, input):
        """The layer's own linear map, with noise on the weights if it is on."""
        linear = F.linear if isinstance(self, nn.Linear) else self._conv_forward
        if not (self.training if self.sampling is None else self.sampling):
            return linear(input, self.weight, self.bias)
        if self.local:
            log_sigma2 = self._capped_log_sigma2()
            return draw_outputs(linear, input, self.weight, self.bias, log_sigma2, self.noise)
        return linear(input, self.sample_weight(), self.bias)

    def __getstate__(self):
        """Copies and pickles made within sample_weights() start clean."""
        state = super().__getstate__()
        state.pop("sampling", None)
        return state

    def get_extra_state(self):
        """What the state needs to mean as many nats: the kind of noise and its cap, a tensor."""
        cap = math.inf if self.max_log_alpha is None else self.max_log_alpha
        return torch.tensor([self.noise == "lognormal", cap], dtype=torch.double)

    def set_extra_state(self, state):
        log_normal, cap = state.tolist()
        self.noise = "lognormal" if log_normal else "gaussian"
        self.max_log_alpha = cap if math.isfinite(cap) else None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint of the plain layer has no noise: begin with the initial log alpha."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape == self.weight.shape:
            log_sigma2 = (self._initial_log_alpha + _log_square_or_scale(weight)).detach()
            state_dict.setdefault(prefix + "log_sigma2", log_sigma2.to(self.log_sigma2.dtype))
            state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


class StochasticLinear(_StochasticWeight, nn.Linear):
    """nn.Linear with multiplicative noise on its weights, one learned alpha each (Sec. 4).

    noise="gaussian" or "lognormal". local=True, the default here: local reparameterisation (Kingma
    et al. 2015), pre-activations independent for every example and token (log-normal: mean and
    variance are matched); False: one weight per forward. log_alpha=-6: initial value;
    max_log_alpha: its cap (None: 1 if log-normal, else no cap), above which log_sigma2 may rise.
    train() draws noise, eval() uses the means. A weight that is read past its layer, as in
    F.linear(x, layer.weight), is counted and trained without noise, which nothing then keeps small
    in sampled_network: skip it. ValueError: unknown noise.
    """


class StochasticConv1d(_StochasticWeight, nn.Conv1d):
    """nn.Conv1d with the options of StochasticLinear, local=False by default."""


class StochasticConv2d(_StochasticWeight, nn.Conv2d):
    """nn.Conv2d with the options of StochasticLinear, local=False by default.

    local=True costs a second convolution and takes the noise at all positions as independent.
    """


class StochasticConv3d(_StochasticWeight, nn.Conv3d):
    """nn.Conv3d with the options of StochasticLinear, local=False by default."""


STOCHASTIC = {nn.Linear: StochasticLinear, nn.Conv1d: StochasticConv1d,
              nn.Conv2d: StochasticConv2d, nn.Conv3d: StochasticConv3d}


def to_stochastic(module, *, skip=(), **options):
    """Turn every nn.Linear and nn.Conv1d to 3d of a model stochastic, in place; return the model.

    skip: names, as in named_modules() or named_parameters(), to leave alone; ValueError for an
    unknown one. A warning names the weights, parameters of two or more dimensions, that stay plain
    without being skipped: those of other layers, and of subclasses. options: of StochasticLinear;
    layers that are stochastic already keep theirs. Tied weights share their noise; frozen ones
    have noise that is frozen, and counted: skip them. Initialise weights and load those of a plain
    model before, as sigma is stored, not alpha; make the optimiser, and wrap in DDP, after, or the
    noise is not trained.
    """
    StochasticLinear(1, 1, device="meta", **options)  # refuses options before anything changes
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    layers = dict(module.named_modules(remove_duplicate=False))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if unknown := set(skip) - set(layers) - set(parameters):
        raise ValueError(f"skip names {unknown}, which the model does not have")
    spared_layers = {m for name in skip if name in layers for m in layers[name].modules()}
    spared = {parameters[name] for name in skip if name in parameters}  # shared by whatever layers
    spared = spared.union(*(m.parameters() for m in spared_layers))
    noise = {}  # of every weight one, the first
    for layer in sorted(layers.values(), key=lambda m: not isinstance(m, _StochasticWeight)):
        if type(layer) in STOCHASTIC and "forward" not in vars(layer):  # which would draw no noise
            weight = layer._parameters.get("weight")  # not that of a hook, such as weight_norm's
            if weight is not None and weight.is_floating_point() and weight not in spared:
                layer.__class__ = STOCHASTIC[type(layer)]  # the same object, wherever it is held
                layer._make_stochastic(**options)
        if isinstance(layer, _StochasticWeight) and "weight" in layer._parameters:
            layer.log_sigma2 = noise.setdefault(layer.weight, layer.log_sigma2)
    _warn_of_plain_weights(layers, spared_layers, spared)
    return module


def _warn_of_plain_weights(layers, spared_layers, spared):
    """Name the weights without noise, but the spared ones, and their share of all weights."""
    plain, sizes, sizes_plain = [], {}, {}
    noisy = [m for m in layers.values() if isinstance(m, _StochasticWeight)]
    counted = set().union(*(m.parameters() for m in noisy))
    for prefix, layer in layers.items():
        weights = dict(layer.named_parameters(recurse=False))
        if ".quantized" in type(layer).__module__:  # whose weights are no parameters
            if hasattr(layer, "get_weight"):  # recurrent
                weights |= layer.get_weight()
            elif callable(getattr(layer, "weight", None)):
                weights["weight"] = layer.weight()
        for name, weight in weights.items():
            lazy = nn.parameter.is_lazy(weight)
            if name in ("log_sigma2", "bias") or not lazy and weight.dim() < 2:
                continue
            size = 0 if lazy else weight.numel()
            sizes[weight] = size  # holds the weights: no two have one id
            if weight not in counted | spared and layer not in spared_layers:
                plain.append(f"{prefix}.{name}".lstrip("."))
                sizes_plain[weight] = size
    if plain:
        share = sum(sizes_plain.values()) / max(1, sum(sizes.values()))
        warnings.warn(f"{share:.1%} of the weights stay without noise and are not counted "
                      f"(skip= silences a name): {', '.join(plain)}", stacklevel=3)


@contextlib.contextmanager
def sample_weights(model):
    """A context in which stochastic layers draw noise in any mode, for activations z ~ p(z|x)."""
    before = {m: m.sampling for m in model.modules() if isinstance(m, _StochasticWeight)}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's: past the layers
    try:
        for m in before:
            m.sampling = True
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for m, sampling in before.items():
            m.sampling = sampling


def sampled_network(model):
    """A plain deep copy of a model whose weights are one draw from q(w|D): no noise is left.

    Modes are kept: call eval(). Its batch-norm statistics are still the model's: see
    recalibrate_bn. Tied weights are drawn once.
    """
    return _plain_copy(model, draw=True)


def mean_network(model):
    """A plain deep copy of a model, with the means of its weights; else as sampled_network."""
    return _plain_copy(model, draw=False)


@torch.no_grad()
def _plain_copy(model, draw):
    net, drawn = copy.deepcopy(model), set()
    for name, module in net.named_modules():
        if "forward" in vars(module):  # compiled, or wrapped: it would run the original
            raise TypeError(f"module {name!r} has a forward of its own, set on the object: copies "
                            "would share it; use model.compile(), or set it after copying")
    for layer in [m for m in net.modules() if isinstance(m, _StochasticWeight)]:
        if draw and layer.weight not in drawn:
            layer.weight.copy_(layer.sample_weight())
        drawn.add(layer.weight)
        layer._make_plain()
    return net


@torch.no_grad()
def recalibrate_bn(net, x):
    """Estimate the statistics of the batch-norm layers of a net from images x, in place; return it.

    A layer in eval() within a net in train() is frozen and left, as is one that the net does not
    call. Dropout is off meanwhile. ValueError without images.
    """
    if not len(x):
        raise ValueError("no images to estimate the statistics of batch norm from")
    modes = [(m, m.training) for m in net.modules()]
    layers = {m: m.momentum for m in net.modules()
              if isinstance(m, nn.modules.batchnorm._BatchNorm)
              and m.running_mean is not None and (m.training or not net.training)}
    seen, before = dict.fromkeys(layers, 0), {m: copy.deepcopy(m.state_dict()) for m in layers}

    def weigh(layer, args, kwargs):  # every part counts by its number of samples
        inputs, *_ = (*args, *kwargs.values())
        if not seen[layer]:
            layer.reset_running_stats()
        seen[layer] += len(inputs)
        layer.momentum = len(inputs) / seen[layer]

    hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in layers]
    try:
        net.eval()
        for layer in layers:
            layer.train()
        parts = math.ceil(len(x) / 500) if layers else 0
        for part in range(parts):  # interleaved, as rows may be sorted by class; none is small
            net(x[part::parts])
    except BaseException:  # the statistics are those of some parts, or none
        for layer, state in before.items():
            layer.load_state_dict(state)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in layers.items():
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
    return net


# --- Training a stochastic network, and measuring it

def param_groups(model, lr, lr_noise):
    """Two parameter groups for an optimiser: names ending in sigma2 at lr_noise, the rest at lr.

    log sigma^2 gets no weight decay, which would pull sigma to 1.
    """
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr_noise, "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name.endswith("sigma2")]["params"].append(parameter)
    return groups


def lr_factor(t, hold=0.8):
    """Learning-rate factor at fraction t of the steps: 10% warm-up, 1 until hold, a cosine to 0."""
    if t < hold:
        return min(1, max(t, 0) / 0.1 + 0.001)
    progress = (min(t, 1) - hold) / (round(1 - hold, 9) or 1)
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def beta_at(t, beta, peak):
    """beta at fraction t of the steps: up to max(beta, peak) over 40%, to beta from 50% to 70%.

    Nets have to fit the labels before the penalty tells, as at chance they stay there from a small
    beta on. Passing through a larger beta lowers the final information.
    """
    top = max(beta, peak)
    if t < 0.5:
        return top * min(1, max(t, 0) / 0.4)
    return top + (beta - top) * min(1, (t - 0.5) / 0.2)


def minibatches(n, batch, device):
    """Indices of shuffled epochs without end; what is left of an epoch is dropped."""
    batch = min(n, batch)
    while True:
        yield from torch.randperm(n, device=device)[:n - n % batch].split(batch)


@torch.no_grad()
def predict(model, x):
    """model(x), in batches."""
    return torch.cat([model(part) for part in x.split(100)])


def accuracy(logits, labels):
    """Fraction of logits (n, classes) whose largest entry is at the label (n,): float, or nan.

    nan if a logit is. ValueError for labels that are not integers from 0 to classes - 1.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)}, logits {tuple(logits.shape)}: "
                         "they should be (n,) and (n, classes)")
    if labels.is_floating_point() or not ((labels >= 0) & (labels.long() < logits.shape[1])).all():
        raise ValueError(f"labels should be integers from 0 to {logits.shape[1] - 1}")
    if logits.isnan().any():
        return math.nan
    return (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def evaluate(model, x, y, x_test, y_test, draws=8):
    """Accuracies, and nats per training sample, of networks with batch norm of their own: dict.

    train_acc, cross_entropy, test_acc_sampled: of one sampled network, the mean over draws.
    train_acc_mean, test_acc: of the mean network. ValueError without draws.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be >= 1")

    def measure(net):
        recalibrate_bn(net, x).eval()
        logits, logits_test = predict(net, x), predict(net, x_test)
        nats = F.cross_entropy(logits, y.long()).item()
        return accuracy(logits, y), nats, accuracy(logits_test, y_test)

    sampled = zip(*[measure(sampled_network(model)) for _ in range(draws)])
    train_acc, cross_entropy, test_acc_sampled = (float(np.mean(values)) for values in sampled)
    train_acc_mean, _, test_acc = measure(mean_network(model))
    return {"train_acc": train_acc, "cross_entropy": cross_entropy,
            "test_acc_sampled": test_acc_sampled, "train_acc_mean": train_acc_mean,
            "test_acc": test_acc}


# === 2. Weight-IB loss ====================================

def weight_information(model):
    """Information in the weights of a model's stochastic layers: 0-d tensor, nats.

    Tied weights count once. ValueError if there is no stochastic layer, or tied ones have noise
    of their own each.
    """
    found = [(m.weight, m) for m in model.modules()  # holds the weights: no two have one id
             if hasattr(m, "log_sigma2") and hasattr(m, "information")]
    layers = {id(weight): m for weight, m in found}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no stochastic layer: see to_stochastic")
    if any(layers[id(weight)].log_sigma2 is not m.log_sigma2 for weight, m in found):
        raise ValueError("weights were tied after to_stochastic: call it once more")
    return sum(layer.information() for layer in layers.values())


class _WithInformation(nn.Module):
    def __init__(self, model, information):
        super().__init__()
        self.model, self.information = model, information

    def forward(self, x):
        return self.model(x), self.information(self.model)


def with_information(model, x, information=weight_information):
    """A function for training only: batch -> (model(batch), information(model)).

    On a GPU a CUDA graph, as launching the kernels of small layers and batches takes longer than
    running them: Small AlexNet, batch 100, H200: 1.6 instead of 7.4 ms a step. It keeps training
    mode; batches have the shape, type and layout of x; the next call overwrites what it returned,
    and the gradients, so they cannot be accumulated over batches.
    No graph with another `information`, which may do what a graph cannot.
    """
    both = _WithInformation(model, information)
    if x.device.type != "cuda" or information is not weight_information:
        return both
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # of the warm-up
    return torch.cuda.make_graphed_callables(both, (x.clone(),))  # batches are written into it


def ib_loss(logits, target, model, beta, n, *, attributes=False, information=weight_information):
    """Information Lagrangian per sample (eq. 3): cross-entropy + beta/n * I(w;D), nats.

    logits: (batch, classes). target: classes (batch,), as in F.cross_entropy; with attributes=True
    0/1 like logits, whose nats are summed. n: number of training samples (of pixels, where each has
    a class). information(model): the penalty.

    Returns (loss, cross_entropy, information), 0-d. ValueError if beta < 0 or n < 1, for other
    targets, or without stochastic layers.
    """
    if not (beta >= 0 and n >= 1):
        raise ValueError(f"beta={beta} must be >= 0 and n={n}, the number of samples, >= 1")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if attributes:
        if target.shape != logits.shape or not ((target == 0) | (target == 1)).all():
            raise ValueError(f"target {tuple(target.shape)} should be 0 or 1 for each of logits "
                             f"{tuple(logits.shape)}")
        target = target.to(logits.dtype)
        nats = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        cross_entropy = nats / len(logits)
    else:
        expected = logits.shape[:1] + logits.shape[2:]
        if (logits.dim() < 2 or target.shape != expected or target.is_floating_point()
                or target.dtype == torch.bool):
            raise ValueError(f"target {target.dtype} {tuple(target.shape)} should be classes, "
                             f"integers {tuple(expected)}; for 0/1 attributes: attributes=True")
        cross_entropy = F.cross_entropy(logits, target.long())
    nats = information(model)
    return cross_entropy + beta / n * nats, cross_entropy, nats


# === 3. Information estimators ============================
# x: inputs of a layer, z: its outputs, y: labels, n: a nuisance. alpha is that of log-normal noise;
# for Gaussian noise of variance a it is log1p(a).

def g(alpha):
    """Capacity per dimension under log-normal noise: -log(1 - exp(-alpha))/2 nats (Prop. 5.2).

    alpha: float or tensor. ValueError for alpha < 0, or nan.
    """
    alpha = torch.as_tensor(alpha)
    if not (alpha >= 0).all():
        raise ValueError("alpha has to be 0 or more; is it a logarithm?")
    return -0.5 * torch.log(-torch.expm1(-alpha))


def alpha_from_information(information, dim):
    """The alpha of dim weights that hold these nats: exp(-2*information/dim) (Prop. 4.1, C = 0).

    ValueError for dim < 1 and what is not finite.
    """
    information = torch.as_tensor(information)
    if not 1 <= dim < math.inf:
        raise ValueError(f"{dim} weights hold no nats")
    _require_finite(information=information)
    return torch.exp(-2 * information / dim)


def layer_information_bound(dim_z, alpha):
    """Upper bound dim_z * (g(alpha) + 1) on I(z;x) + TC(z) of a layer, nats (Prop. 5.2, Cor. 5.3).

    For centred, uncorrelated, non-zero inputs. alpha: float, or (channels,) of equally many of the
    dim_z units; that of a unit i whose weights have different ones solves
    expm1(alpha_i) = sum_j expm1(alpha_ij) w_ij^2 / sum_j w_ij^2. ValueError for one a weight.
    """
    capacity = g(alpha)
    if capacity.dim() > 1 or dim_z < 1 or not capacity.numel() or dim_z % capacity.numel():
        raise ValueError(f"alpha {tuple(capacity.shape)}: one for each of {dim_z} units is needed")
    return dim_z * (capacity.mean() + 1)


def layer_information(weight, alpha, x):
    """I(z;x) + TC(z) of z = Wx with noise on its weights, estimated from inputs x: 0-d, nats.

    Prop. 5.1, which takes z and z|x as Gaussian. weight: (out, in), means. alpha: float or
    (out, in). x: (n, in). A unit that is always 0 holds 0 nats, another inf if some x, being all
    zero, gets no noise. ValueError for what is not finite, other shapes, and alpha < 0 or over 700.
    """
    weight, x = weight.double(), x.double()
    alpha = torch.as_tensor(alpha, dtype=torch.double, device=weight.device)
    _require_finite(weight=weight, alpha=alpha, x=x)
    if (weight.dim() != 2 or x.dim() != 2 or not len(x) or x.shape[1] != weight.shape[1]
            or alpha.shape not in ((), weight.shape)):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, alpha "
                         f"{tuple(alpha.shape)}: should be (n, in), (out, in) and one or (out, in)")
    if not ((alpha >= 0) & (alpha <= 700)).all():
        raise ValueError("alpha has to be from 0 to 700; is it a logarithm?")
    noise = x**2 @ (torch.expm1(alpha) * weight**2).T
    signal = (x @ weight.T).var(0, correction=0)
    nats = 0.5 * (torch.log(signal + noise.mean(0)) - torch.log(noise).mean(0))
    return nats[signal + noise.mean(0) > 0].sum()


def _require_finite(**tensors):
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def flat_minimum_bound(weight, trace, beta):
    """Upper bound K/2 * (log|w|^2 + log tr H - log(K^2 beta)) on I~(w;D), nats (Prop. 4.3, C = 0).

    Of a net at a minimum of the summed cross-entropy, with the best noise for beta, which is
    alpha_i = beta / (w_i^2 H_ii), well below 1. weight: all K means. trace: of the Hessian H there.
    As in the paper's proof; README.md says where its statement differs. ValueError unless all is
    finite, trace and beta positive, and a weight not 0.
    """
    if not (0 < trace < math.inf and 0 < beta < math.inf):
        raise ValueError(f"{trace=} and {beta=} have to be positive and finite")
    _require_finite(weight=weight)
    if not weight.any():
        raise ValueError("all weights are 0")
    k = weight.numel()
    return 0.5 * k * (torch.log((weight.double()**2).sum() * trace) - math.log(k**2 * beta))


LAMBDAS = tuple(0.5 + 2 ** (k / 2) for k in range(-6, 15))  # few, as the union bound costs each


def pac_bayes_bound(loss, divergence, n, *, max_loss=math.log(10), delta=0.05, lambdas=LAMBDAS):
    """With probability 1 - delta, an upper bound on the test loss (McAllester 2013; eq. 7).

    loss: the mean over n training samples and random weights, of losses from 0 to max_loss.
    divergence: KL of these weights from a prior that has not seen the samples, nats. The bound is
    the least over lambdas (> 1/2), by a union bound. ValueError for impossible values.
    """
    if not (0 <= loss <= max_loss < math.inf and 0 <= divergence < math.inf and 1 <= n < math.inf
            and 0 < delta <= 1 and all(0.5 < lam < math.inf for lam in lambdas)):
        raise ValueError(f"{loss=} must be 0 to {max_loss:g}, {divergence=} >= 0, lambdas > 1/2, "
                         f"{n=} >= 1, {delta=} in (0, 1], all finite")
    penalty = max_loss * (divergence + math.log(len(lambdas) / delta)) / n
    return min((loss + lam * penalty) / (1 - 1 / (2 * lam)) for lam in lambdas)


def label_information(logits, labels):
    """H(y) - cross-entropy, on test data a lower bound on I(z;y): 0-d tensor, nats.

    logits: (n, classes), finite; labels: (n,), whose frequencies give H(y). Else ValueError.
    """
    _require_finite(logits=logits)
    if not len(labels):
        raise ValueError("no labels")
    frequencies = torch.bincount(labels).double() / len(labels)
    return torch.special.entr(frequencies).sum() - F.cross_entropy(logits.double(), labels.long())


@torch.enable_grad()
def density_ratio_information(discriminator, z, n, *, validation=1000, held_out=2000, batch=256,
                              lr=3e-3, steps=3000, patience=300, shuffle=True):
    """I(z;n) in nats from a discriminator that tells pairs from shuffled pairs (Sec. 6): dict.

    Returns floats: plug_in, and the lower bounds info_nce (at most log held_out) and
    donsker_varadhan (of few pairs too high). discriminator(z, n) -> scores (len(z), len(n)) of all
    pairs of rows; it is trained, and gets columns of floats standardised. `validation` pairs stop
    the training once InfoNCE has not risen for `patience` steps, held_out pairs are measured. Pairs
    are split at random, or without shuffle in this order: training, validation, held out.
    ValueError: too few pairs, not finite, impossible options, scores of another shape;
    FloatingPointError: scores not finite.
    """
    z, n, critic = z.detach(), n.detach(), copy.deepcopy(discriminator).train()
    train = len(z) - validation - held_out
    if len(z) != len(n) or train < 2 or min(validation, held_out) < 2:
        raise ValueError(f"{len(z)} z, {len(n)} n: not over {validation + held_out + 1} pairs")
    if not (steps >= 1 and patience >= 1 and batch >= 2 and lr > 0):
        raise ValueError(f"{steps=} and {patience=} must be >= 1, {batch=} >= 2, {lr=} > 0")
    _require_finite(z=z, n=n)
    order = torch.arange(len(z))
    if shuffle:
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    train, validation, held_out = order.to(z.device).split([train, validation, held_out])
    scale_z, scale_n = _standardiser(z[train]), _standardiser(n[train])
    batch = min(batch, len(train))

    def estimates(part):
        critic.eval()
        with torch.no_grad():
            all_n = scale_n(n[part])
            scores = torch.cat([critic(scale_z(z[rows]), all_n) for rows in part.split(500)])
        critic.train()
        if not scores.isfinite().all():
            raise FloatingPointError("scores that are not finite")
        return _ratio_estimates(scores.float())

    optimizer = torch.optim.Adam(critic.parameters(), lr, fused=True)
    best, best_step = -math.inf, 0
    for step in range(1, steps + 1):
        index = train[torch.randperm(len(train), device=z.device)[:batch]]
        scores = critic(scale_z(z[index]), scale_n(n[index]))
        if scores.shape != (batch, batch):
            raise ValueError(f"scores {tuple(scores.shape)}: not of every pair of {batch} rows")
        log_odds = scores - math.log(batch - 1)  # one true pair among batch - 1 shuffled ones
        loss = (F.softplus(log_odds).sum() - log_odds.trace()) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            bound = estimates(validation)["info_nce"]
            if bound > best:
                best, best_step = bound, step
                discriminator.load_state_dict(critic.state_dict())
            elif step - best_step >= patience:
                break
    critic.load_state_dict(discriminator.state_dict())
    if best <= 0:  # no dependence was found: constant scores are no worse
        return _ratio_estimates(torch.zeros(len(held_out), len(held_out)))
    return estimates(held_out)


def _standardiser(rows):
    """A function that standardises columns of floats by the statistics of these rows."""
    if not rows.is_floating_point():
        return lambda x: x
    std, mean = torch.std_mean(rows, 0)
    return lambda x: (x - mean) / torch.where(std > 0, std, 1)


def _ratio_estimates(scores):
    """The results of density_ratio_information, from scores (m, m), true pairs on the diagonal."""
    m, true = len(scores), scores.diagonal()
    on_diagonal = torch.eye(m, dtype=torch.bool, device=scores.device)
    off_diagonal = scores.masked_fill(on_diagonal, -math.inf).logsumexp(1)
    log_mean = off_diagonal.logsumexp(0) - math.log(m * (m - 1))
    nce = (true - torch.logaddexp(true, off_diagonal)).mean() + math.log(m)
    return {"plug_in": true.mean().item(), "info_nce": nce.item(),
            "donsker_varadhan": (true.mean() - log_mean).item()}


def total_correlation(z):
    """TC(z) = KL(p(z) || prod_i p(z_i)) of a Gaussian with the covariance of z: 0-d, nats.

    z: (n, ...), flattened to (n, d), without constants; inf if a column is a linear combination
    of others. About d^2/(4n) too high; ValueError unless z is finite and n > d + 1.
    """
    precision = torch.finfo(z.dtype if z.is_floating_point() else torch.double).eps
    z = z.detach().reshape(len(z), math.prod(z.shape[1:])).double()
    _require_finite(z=z)
    z = z[:, (z != z[:1]).any(0)]
    if len(z) <= z.shape[1] + 1:
        raise ValueError(f"{len(z)} samples of {z.shape[1]} varying dimensions: too few")
    largest, z = z.abs().amax(0), z - z.mean(0)
    scale = z.abs().amax(0)
    correlation = torch.corrcoef((z / scale).T).view(z.shape[1], z.shape[1])
    eigenvalues, directions = torch.linalg.eigh(correlation)
    # what the rounding of z, which may be far from 0, and of this matrix leaves of a 0
    errors = (precision * largest / scale).square() @ directions.square()
    rounding = errors + 10 * len(eigenvalues) * torch.finfo(torch.double).eps
    return -0.5 * torch.log(torch.where(eigenvalues > rounding, eigenvalues, 0)).sum()


# === 4. Data ==============================================
# Images are uint8 (n, channels, height, width), one tensor a data set. Rows may be sorted by class:
# take N of them by draw_subset.

class DataError(OSError):
    """A data set is missing, too small, or its file is damaged."""


ARRAYS = {  # in each file: {array: (shape of a row, largest value)}
    "cifar10": {"x_train": ((32, 32, 3), 255), "y_train": ((), 9),
                "x_test": ((32, 32, 3), 255), "y_test": ((), 9)},
    "mnist": {"x_train": ((28, 28), 255), "y_train": ((), 9),
              "x_test": ((28, 28), 255), "y_test": ((), 9)},
    "celeba64": {"images": ((64, 64, 3), 255), "attrs": ((40,), 1), "partition": ((), 2)},
}
TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "mnist": "MNIST", "celeba64": "celeba"}


def load_cifar10(data_dir="data"):
    """CIFAR-10: x_train uint8 (50000, 3, 32, 32), y_train int64, x_test (10000, ...), y_test.

    From <data_dir>/cifar10.npz, as Keras has it, else from torchvision's copy in data_dir or its
    download, which then write it. DataError if all fail.
    """
    arrays = _load_arrays("cifar10", data_dir)
    return tuple(a.permute(0, 3, 1, 2) if a.dim() == 4 else a.long() for a in arrays.values())


def load_mnist(data_dir="data"):
    """MNIST: x_train uint8 (60000, 1, 28, 28), y_train int64, x_test, y_test. See load_cifar10."""
    arrays = _load_arrays("mnist", data_dir)
    return tuple(a.unsqueeze(1) if a.dim() == 3 else a.long() for a in arrays.values())


def load_celeba(data_dir="data"):
    """CelebA: images uint8 (n, 3, 64, 64), attrs uint8 (n, 40), attr_names, partition uint8 (n,).

    partition: 0 train, 1 validation, 2 test. From celeba64.npz, images there (n, 64, 64, 3), or as
    in load_cifar10.
    """
    images, attrs, partition, names = _load_arrays("celeba64", data_dir).values()
    return images.permute(0, 3, 1, 2), attrs, names.tolist(), partition


def _load_arrays(name, data_dir):
    path = Path(data_dir, f"{name}.npz")
    if not path.exists():
        with _one_process(path):
            if not path.exists():
                return _make_arrays(name, path)
    try:
        with np.load(path) as file:
            return _checked(name, file)
    except Exception as error:  # zip, zlib, header and pickle errors each have their own type
        raise DataError(f"{path}: {error}; delete it to have it made again, or use --scale demo"
                        ) from error


@contextlib.contextmanager
def _one_process(path):
    """Of processes that start together one makes the file, the others wait for it."""
    lock, made = path.with_suffix(".lock"), not path.parent.exists()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written to
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "w"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
                if made:
                    path.parent.rmdir()  # if it is empty


def _make_arrays(name, path):
    """The arrays from torchvision; they are written to path, in one step, if that can be."""
    folder, copy = path.parent, path.parent / TORCHVISION_FOLDERS[name]
    try:
        found = _from_torchvision(name, str(folder))
        arrays = _checked(name, found)
    except Exception as error:  # urllib, gdown, tar and md5 checks each raise their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = "--scale demo needs no data"
        if copy.exists():
            advice += f", or delete {copy} if its files are damaged"
        if name == "celeba64":
            advice += (", or pip install gdown (with a daily quota), or unpack CelebA's "
                       f"img_align_celeba.zip and .txt files in {copy}/")
        raise DataError(f"no {path}, and the download failed ({reason}): {advice}") from error
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        try:
            np.savez(temporary, **found)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return arrays


def _checked(name, file):
    """The arrays as uint8 tensors; ValueError that names one of wrong shape or values."""
    arrays, rows = {}, {}
    for key, (shape, largest) in ARRAYS[name].items():
        array = file[key].ravel() if key.startswith("y_") else file[key]  # Keras's are (n, 1)
        n = rows.setdefault(key.partition("_")[2], len(array))  # of train, test or all
        if (array.dtype.kind not in "ui" or array.shape != (n, *shape)
                or array.min() < 0 or array.max() > largest):
            raise ValueError(f"{key} should be {(n, *shape)} integers from 0 to {largest}")
        arrays[key] = torch.from_numpy(array.astype(np.uint8))
    if name == "celeba64":
        arrays["attr_names"] = file["attr_names"]
        if len(arrays["attr_names"]) != 40:
            raise ValueError("attr_names should be 40 names")
    return arrays


def _from_torchvision(name, data_dir):
    """The arrays of torchvision's copy in data_dir, else of its download."""
    from torchvision import datasets, transforms
    print(f"no {name}.npz in {data_dir}, trying torchvision's copy or its download", flush=True)
    if name != "celeba64":
        arrays = []
        for train in (True, False):
            part = getattr(datasets, name.upper())(data_dir, train, download=True)
            arrays += [np.asarray(part.data), np.asarray(part.targets)]
        return dict(zip(ARRAYS[name], arrays))
    crop = transforms.Compose([transforms.CenterCrop(148), transforms.Resize((64, 64))])
    faces = datasets.CelebA(data_dir, "all", transform=crop, download=True)
    partition = np.loadtxt(Path(data_dir, "celeba", "list_eval_partition.txt"), np.uint8, usecols=1)
    return {"images": np.stack([np.asarray(faces[i][0]) for i in range(len(faces))]),
            "attrs": np.asarray(faces.attr, np.uint8), "partition": partition,
            "attr_names": np.asarray(faces.attr_names[:40])}  # its header ends in a blank


def channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images (n, c, h, w): two (1, c, 1, 1).

    The standard deviation of a constant channel is given as 1, to divide by.
    """
    # by the frequencies of the 256 levels: exact, and without a copy of the images as floats
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    frequencies = torch.stack(counts).double() / counts[0].sum()
    levels = torch.arange(256, device=images.device).double()
    mean = frequencies @ levels
    std = (frequencies @ levels**2 - mean**2).sqrt()
    std[std == 0] = 1
    return mean.view(1, -1, 1, 1).float(), std.view(1, -1, 1, 1).float()


@functools.lru_cache(maxsize=1)
def load_images(dataset, data_dir, n_train, n_test):
    """(x_train, y_train, x_test, y_test, *channel_statistics(x_train)), read once per process.

    dataset: "cifar10", "mnist", or n_train and n_test images drawn by code, "synthetic" (objects)
    or "digits"; KeyError for others.
    """
    if draw := {"synthetic": synthetic_objects, "digits": synthetic_digits}.get(dataset):
        data = *draw(n_train, seed=0), *draw(n_test, seed=1)
    else:
        data = {"cifar10": load_cifar10, "mnist": load_mnist}[dataset](data_dir)
    return *data, *channel_statistics(data[0])


def draw_subset(x, y, n, generator):
    """n of the pairs (x, y), drawn without repetition. DataError if there are fewer."""
    if not 0 <= n <= len(x) == len(y):
        raise DataError(f"{n} images are needed, the data set has {len(x)}, and {len(y)} labels")
    index = torch.randperm(len(x), generator=generator, device=generator.device)[:n].to(x.device)
    return x[index], y[index]


def normalise(images, mean, std, size):
    """Central size x size crops of uint8 images, normalised by channel: float, channels last.

    ValueError for smaller images.
    """
    if min(images.shape[2:]) < size:
        raise ValueError(f"images {tuple(images.shape)} are smaller than {size} x {size}")
    top, left = ((side - size) // 2 for side in images.shape[2:])
    crop = images[:, :, top:top + size, left:left + size]
    return ((crop.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def corrupt_labels(labels, fraction, num_classes, generator, kind="uniform"):
    """A copy of labels (n,) with exactly round(fraction*n) of them, at random, corrupted.

    kind: "uniform", resampled over all classes, or "pair", the next class. ValueError for others,
    and for labels that are not one integer each.
    """
    if labels.dim() != 1 or num_classes - 1 > torch.iinfo(labels.dtype).max:
        raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)} should be integers (n,), "
                         f"which can be {num_classes - 1}")
    if not 0 <= fraction <= 1 or kind not in ("uniform", "pair"):
        raise ValueError(f"fraction={fraction} must be from 0 to 1, kind={kind!r} uniform or pair")
    device, count = generator.device, round(fraction * len(labels))
    index = torch.randperm(len(labels), generator=generator, device=device)[:count]
    index, corrupted = index.to(labels.device), labels.clone()
    if kind == "pair":
        new = (labels[index].long() + 1) % num_classes
    else:
        new = torch.randint(num_classes, (count,), generator=generator, device=device)
    corrupted[index] = new.to(labels)
    return corrupted


def add_clutter(images, generator, squares=10, size=4, positions=False):
    """Paste white squares at uniform positions: (images (n, c, h, w), bool mask (n, 1, h, w)).

    images: uint8 (white: 255) or float (white: 1). Squares may overlap, not leave the image.
    positions: return also the squares' first row and column, int64 (n, squares, 2).
    """
    strips, starts = [], []
    for length in images.shape[2:]:  # (n, squares, length), 1 where a square covers row or column
        shape, device = (len(images), squares, 1), generator.device
        start = torch.randint(length - size + 1, shape, generator=generator, device=device)
        starts.append(start.to(images.device))
        offset = torch.arange(length, device=images.device) - starts[-1]
        strips.append(((offset >= 0) & (offset < size)).float())
    mask = torch.einsum("nsh,nsw->nhw", *strips).gt(0).unsqueeze(1)
    images = images.masked_fill(mask, 1 if images.is_floating_point() else 255)
    return (images, mask, torch.cat(starts, 2)) if positions else (images, mask)


# Objects and faces are painted in coordinates x, y from -1 to 1, y downwards. A shape is a distance
# from its edge, negative inside.
DIGIT_FONTS = ("DejaVuSans[-.M]*", "DejaVuSerif[-.]*", "STIXGeneral*", "cm[brt]*", "cmss*")
FACE_FACTORS = dict(hair_colour=4, hair_style=3, skin=4, glasses=2, smile=3, beard=2, background=8,
                    pose=5)  # number of values
FACE_COLOURS = {
    "hair_colour": [[0.07, 0.06, 0.08], [0.46, 0.2, 0.07], [0.93, 0.78, 0.35], [0.66, 0.67, 0.7]],
    "skin": [[0.98, 0.84, 0.74], [0.88, 0.67, 0.5], [0.63, 0.43, 0.29], [0.4, 0.27, 0.19]],
    "background": [[r, g, b] for r in (0.25, 0.85) for g in (0.25, 0.85) for b in (0.25, 0.85)],
}
FACE_ELLIPSE = (0.75, 0.9)  # half-axes, in half-images, of the ellipse outside which is background


def _uniform(rng, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=rng)


def _smooth_field(rng, n, channels, cells, size):
    """Random fields (n, channels, size, size), about -1 to 1, from a lattice of cells x cells."""
    field = _uniform(rng, -1, 1, n, channels, cells, cells)
    return F.interpolate(field, size, mode="bicubic", align_corners=True)


def _local_grid(rng, n, size, shift, turn, scale):
    """Pixel coordinates x, y (n, size, size) of randomly shifted, rotated and scaled objects."""
    spread = torch.tensor([shift, shift, turn]).view(3, 1, 1, 1)
    dx, dy, angle = spread * _uniform(rng, -1, 1, 3, n, 1, 1)
    cos, sin = torch.stack([angle.cos(), angle.sin()]) / _uniform(rng, *scale, n, 1, 1)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = axis - dx, axis[:, None] - dy
    return x * cos + y * sin, y * cos - x * sin


def _paint(canvas, colour, distance, shown=1):
    """Paint colour on canvas (n, 3, h, w), in place, where distance (n, h, w) < 0 and shown."""
    cover = shown * (0.5 - distance * canvas.shape[-1] / 2.5).clamp(0, 1)  # smooth at the edge
    canvas.lerp_(torch.as_tensor(colour).expand_as(canvas), cover[:, None])


def _draw_in_chunks(draw, n, seed):
    """uint8 images and labels of draw(rng, count) -> (images from 0 to 1, labels), part by part."""
    if n < 1:
        raise ValueError(f"{n} images cannot be drawn")
    rng = torch.Generator().manual_seed(seed)
    parts = [draw(rng, min(250, n - start)) for start in range(0, n, 250)]
    images, labels = (torch.cat(part) for part in zip(*parts))
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def synthetic_objects(n, seed=0):
    """Coloured shapes on textures: uint8 (n, 3, 32, 32), labels int64 (n,). For CIFAR-10."""
    def draw(rng, n):
        labels = torch.randint(10, (n,), generator=rng)
        x, y = _local_grid(rng, n, 32, 0.35, math.pi, (0.45, 0.8))
        radius, larger = torch.hypot(x, y), torch.maximum(x.abs(), y.abs())
        distances = [
            radius - 0.8,  # disc
            larger - 0.75,  # square
            torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.5,  # triangle
            (radius - 0.72).abs() - 0.2,  # ring
            torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.25, larger - 1),  # plus
            radius - 0.68 - 0.32 * torch.cos(5 * torch.atan2(y, x)),  # star
            torch.maximum(radius - 0.9, 0.75 - torch.hypot(x - 0.45, y)),  # crescent
            torch.maximum(x.abs() - 1, y.abs() - 0.28),  # bar
            (larger - 0.65).abs() - 0.17,  # frame
            torch.hypot(x.abs() - 0.55, y) - 0.4,  # pair of discs
        ]
        distance = torch.stack(distances, 1)[torch.arange(n), labels]
        waves = _local_grid(rng, 2 * n, 32, 1, math.pi, (0.05, 0.3))[0].sin()[:, None]
        texture = _uniform(rng, -0.15, 0.15, 2 * n, 3, 1, 1) * waves
        texture = texture + 0.25 * _smooth_field(rng, 2 * n, 3, 5, 32)
        ground = torch.rand(n, 3, 1, 1, generator=rng)
        canvas = ground + texture[:n]
        front = (ground + _uniform(rng, 0.3, 0.7, n, 3, 1, 1)) % 1 + 0.6 * texture[n:]
        _paint(canvas, front, distance)
        return canvas + 0.04 * torch.randn(canvas.shape, generator=rng), labels
    return _draw_in_chunks(draw, n, seed)


def synthetic_digits(n, seed=0):
    """Digits in matplotlib's fonts, warped: uint8 (n, 1, 28, 28), labels int64 (n,). For MNIST."""
    from matplotlib import ft2font, get_data_path
    folder = Path(get_data_path(), "fonts", "ttf")
    paths = [path for name in DIGIT_FONTS for path in sorted(folder.glob(name))]
    glyphs = torch.zeros(len(paths), 10, 1, 56, 56)
    for i, path in enumerate(paths):
        font = ft2font.FT2Font(str(path))
        font.set_size(50, 72)
        for digit in range(10):
            font.set_text(str(digit))
            font.draw_glyphs_to_bitmap()
            ink = torch.tensor(font.get_image()) / 255
            top, left = ((56 - side) // 2 for side in ink.shape)
            glyphs[i, digit, 0, top:top + ink.shape[0], left:left + ink.shape[1]] = ink

    def draw(rng, n):
        labels = torch.randint(10, (n,), generator=rng)
        ink = glyphs[torch.randint(len(paths), (n,), generator=rng), labels]
        angle, shear, dx, dy = _uniform(rng, -0.25, 0.25, 4, n)
        wide, tall = _uniform(rng, 0.9, 1.4, 2, n)
        rows = [wide * angle.cos(), shear - tall * angle.sin(), dx,
                wide * angle.sin(), tall * angle.cos(), dy]
        affine = torch.stack(rows, 1).view(n, 2, 3)
        grid = F.affine_grid(affine, ink.shape, align_corners=False)
        grid += 0.1 * _smooth_field(rng, n, 2, 4, 56).permute(0, 2, 3, 1)
        return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2), labels
    return _draw_in_chunks(draw, n, seed)


def synthetic_faces(n, seed=0):
    """Cartoon faces: uint8 (n, 3, 64, 64), attributes uint8 (n, 6), factors {name: int64 (n,)}.

    The FACE_FACTORS are independent. The attributes tell some of them: black hair, blond hair, dark
    skin, glasses, smiling, beard. For CelebA.
    """
    def draw(rng, n):
        codes = torch.stack([torch.randint(k, (n,), generator=rng) for k in FACE_FACTORS.values()])
        factor = dict(zip(FACE_FACTORS, codes.view(-1, n, 1, 1)))

        def colour(name):
            return torch.tensor(FACE_COLOURS[name])[factor[name].flatten()].view(n, 3, 1, 1)

        hair, skin, style = colour("hair_colour"), colour("skin"), factor["hair_style"]
        canvas = colour("background") + 0.12 * _smooth_field(rng, n, 3, 3, 64)
        u, v = _local_grid(rng, n, 64, 0.06, 0.12, (0.9, 1.02))  # of the head
        x = u - 0.055 * (factor["pose"] - 2)  # of eyes and mouth, which move as it turns
        skull = torch.hypot(u, v + 0.12) - 0.56
        face = torch.hypot(u, 0.8 * v - 0.08) - 0.47
        hairline = v + torch.where(style == 2, 0.2, 0.36)
        mouth = (v - 0.38 + 0.07 * (factor["smile"] - 1) * (60 * x**2 - 0.5)).abs() - 0.03
        eyes = torch.hypot(x.abs() - 0.18, v + 0.03)
        _paint(canvas, hair, torch.hypot(u, v - 0.05) - 0.64, style == 1)  # long hair
        _paint(canvas, hair, torch.maximum(skull, v))
        _paint(canvas, skin, face)
        _paint(canvas, hair, torch.maximum(skull, hairline))
        _paint(canvas, hair, torch.maximum(face, 0.5 - v), factor["beard"])
        _paint(canvas, 0.1, eyes - 0.05)
        _paint(canvas, 0.1, (eyes - 0.14).abs() - 0.02, factor["glasses"])
        _paint(canvas, 0.5 * skin, torch.maximum(mouth, x.abs() - 0.17))
        canvas = canvas * _uniform(rng, 0.6, 1.15, n, 1, 1, 1)
        return canvas + 0.02 * torch.randn(canvas.shape, generator=rng), codes.T
    images, codes = _draw_in_chunks(draw, n, seed)
    hair, _, skin, glasses, smile, beard, *_ = codes.T
    attributes = [hair == 0, hair == 2, skin >= 2, glasses, smile == 2, beard]
    return images, torch.stack(attributes, 1).to(torch.uint8), dict(zip(FACE_FACTORS, codes.T))


# === 5. Running a grid ====================================
# A cell is one training run: a dict of what sets it apart, such as {"n": 300, "beta": 0.1}. When
# finished it is a row, one line of <out>/<figure>-<scale>.jsonl, and is not run again.

@contextlib.contextmanager
def _user_errors():
    """As a decorator: OSError and Ctrl-C end the program with one line, exit status 2 and 130."""
    try:
        yield
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped: the rows are saved, --plot-only draws them", file=sys.stderr)
        raise SystemExit(130) from None


@_user_errors()
def parse_args(doc, datasets, seeds):
    """The command line that all scripts share: a namespace of its options, device and figure.

    doc: the script's docstring, for --help. datasets: {scale: names}, the default first. seeds:
    {scale: list}. Bad values: one line on stderr, exit status 2.
    """
    def number(text):
        if not text.isdecimal() or int(text) >= 2**63:
            raise argparse.ArgumentTypeError(f"{text}: a whole number from 0 on is needed")
        return int(text)

    def shard(text):
        part, _, parts = text.partition("/")
        if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise argparse.ArgumentTypeError(f"{text}: I/N with I from 1 to N is needed")
        return int(part), int(parts)

    def folder(text):
        try:
            return Path(text).expanduser()  # which shells do not in --out=~/x
        except RuntimeError as error:  # no such home
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout, allow_abbrev=False)
    # argparse would print the usage too
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--gpu", type=number, help="index of the GPU")
    add("--scale", choices=list(datasets), help="default: paper on a GPU, else cpu")
    add("--dataset", help=f"one of {datasets}")
    add("--data-dir", type=folder, default="data", help="folder of the data sets (data)")
    add("--out", type=folder, default="results", help="folder of rows and plots (results)")
    add("--seeds", type=number, nargs="+", help="run each cell once per seed")
    add("--jobs", type=number, help="cells trained at once (1 on a GPU, else one per core)")
    add("--shard", type=shard, default="1/1", help="I/N: every N-th cell, from the I-th")
    add("--plot-only", action="store_true", help="only draw the rows there are")
    args = parser.parse_args()
    if args.jobs == 0:
        parser.error("--jobs 0: at least 1 is needed")
    if args.out.is_file():
        parser.error(f"--out {args.out}: a folder is needed, this is a file")
    args.device = _device(args.gpu)
    on_cpu = args.device.type == "cpu"
    args.scale = args.scale or ("cpu" if on_cpu else "paper")
    args.dataset = args.dataset or datasets[args.scale][0]
    if args.dataset not in datasets[args.scale]:
        parser.error(f"--dataset {args.dataset} is not in {datasets[args.scale]}, of --scale "
                     f"{args.scale}")
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    args.jobs = args.jobs or (len(affinity(0)) if on_cpu else 1)
    args.seeds = list(dict.fromkeys(args.seeds or seeds[args.scale]))
    args.figure = Path(sys.argv[0]).stem
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook may be unknown here
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if closed, as by >&-
    with contextlib.suppress(AttributeError):  # of a notebook's stdout
        sys.stdout.reconfigure(errors="replace")  # where β cannot be shown, the rest is
    return args


def _device(gpu):
    if gpu is None and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return torch.zeros(1, device=f"cuda:{gpu or 0}").device
    except Exception:  # no driver, no such index, an unusable card: all differ in type
        print(f"warning: GPU {gpu or 0} is not usable, going on with the CPU", file=sys.stderr)
        return torch.device("cpu")


@_user_errors()
def run_grid(cells, train_cell, args, settings=None, prepare=lambda args: None):
    """Train every cell that has no row yet, for each seed or the cell's own; return all rows.

    train_cell(cell, device, args, progress) returns what it measured (dict), and calls
    progress(step, steps, loss), which ends a cell whose loss is not finite. settings: how cells are
    trained; rows of others, and of other cells, do not count. prepare(args) loads the data, before
    training. A row has figure, scale, dataset, status ("ok" or "diverged"), device, torch, git,
    settings, seconds, keys (of the cell), the cell and what was measured. A cell that raises is
    reported and gets no row; when the others are trained, exit status 1.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit  # a worker imports a script without a __main__ guard: its parent says so
    try:
        grid = [_through_json(cell) for cell in cells]
        cells = [cell | {"seed": seed} for seed in args.seeds for cell in grid
                 if cell.get("seed", seed) == seed]
        settings = _through_json(dict(settings or {}))
    except Exception as error:
        raise OSError(f"a cell or setting that a row cannot hold: {error}") from None
    on_cpu = args.device.type == "cpu"
    head = {"figure": args.figure, "scale": args.scale, "dataset": args.dataset, "status": "ok",
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(args.device),
            "torch": torch.__version__, "git": _git_revision(), "settings": settings}

    if taken := {"seconds", "keys", *head} & set().union(*cells):
        raise OSError(f"cells cannot have the keys {sorted(taken)}: every row has them")
    found = read_rows(args)
    # what tells cells apart; some lack some, or only those of rows have them
    names = sorted({"seed"}.union(*cells, *(row.get("keys", ()) for row in found)))

    def key(row):  # what a row measured under the name of another cell's key does not count
        own = row.get("keys", names)
        return _hashable([row.get(name) if name in own else None for name in names])

    in_grid = {key(cell | {"seed": None}) for cell in grid}
    part, parts = args.shard
    cells = list({key(cell): cell for cell in cells}.values())[part - 1::parts]  # none twice

    def counts(row):
        return row["settings"] == settings and key(row | {"seed": None}) in in_grid

    def counted(rows):  # of rows that stand twice, one
        return {key(row): row for row in rows if counts(row)}

    def missing(rows):
        return [cell for cell in cells if key(cell) not in rows]

    rows = counted(found)
    todo = missing(rows)
    print(f"{args.figure}: device {head['device']}, scale {args.scale}, data {args.dataset}, "
          f"{len(cells)} cells, {len(cells) - len(todo)} done, commit {head['git']}")
    if others := sum(not counts(row) for row in found):
        print(f"{others} rows in {args.out} have other settings or cells: left aside")
    clean = None if head["git"].endswith(("-dirty", "unknown")) else head["git"]
    if commits := {str(row.get("git")) for row in rows.values()} - {clean}:
        print(f"rows were trained at commit {', '.join(sorted(commits))}, perhaps by other code: "
              "to train anew, add --out elsewhere")
    if args.plot_only or not todo:
        print("redrawing; to train again, add --out elsewhere" if rows else "no rows", flush=True)
    else:
        try:
            failed = _train(lambda: missing(counted(read_rows(args))), train_cell, args, head,
                            prepare)
        except KeyboardInterrupt:
            print(f"\nstopped: {args.out} has the finished cells, the same command goes on",
                  file=sys.stderr)
            raise SystemExit(130) from None
        if failed:
            print(f"{failed} of {len(todo)} cells failed, see above: the same command tries them "
                  "again, --plot-only draws the others", file=sys.stderr)
            raise SystemExit(1)
        rows = counted(read_rows(args))
    if not ok_rows(rows.values()):
        if not cells:  # a shard beyond the last cell
            raise SystemExit
        what = "every cell diverged" if rows else "no finished row"
        raise OSError(f"{what} of {args.figure} --scale {args.scale} --dataset "
                      f"{args.dataset} with the present settings in {args.out}")
    return list(rows.values())


def _through_json(value):
    """A value as it is read again: a tuple as a list, a number of numpy or torch as a plain one.

    FloatingPointError for what is not finite, at any depth; others for what JSON cannot hold.
    """
    def refuse(constant):
        raise FloatingPointError(f"{constant} in {value}")

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):  # 1 and "1" are
            raise ValueError(f"two keys that are one in JSON, in {value}")
        return dict(pairs)

    text = json.dumps(value, default=lambda number: number.tolist())
    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def _hashable(value):
    """Lists and dicts as tuples, which can be keys."""
    if isinstance(value, dict):
        value = sorted(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _train(missing, train_cell, args, head, prepare):
    """Train the missing() cells, append a row for each; return how many failed."""
    part, parts = args.shard
    shard = f".{part}-of-{parts}" if parts > 1 else ""
    path = args.out / f"{args.figure}-{args.scale}{shard}.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args)
    started, failed = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a"))
        _lock(file)
        todo = missing()  # now that no other run adds rows to this file
        finished = _finished_cells(todo, train_cell, args)
        stack.enter_context(contextlib.closing(finished))
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
            print(file=file)  # ends a line that a crash left unfinished
        for count, (cell, result, seconds) in enumerate(finished, 1):
            if isinstance(result, str):
                failed += 1
                print(f"{cell} failed: {result}", file=sys.stderr, flush=True)
                continue
            own = head | {"seconds": round(seconds, 1), "keys": list(cell)} | cell
            if result == {"status": "diverged"}:
                own |= result
            if taken := [name for name in result if own.get(name, result[name]) != result[name]]:
                print(f"warning: measured {taken} left out, as rows have these names for other "
                      "values", file=sys.stderr)
            row = own | result | own  # what was measured comes last, and changes nothing
            print(json.dumps(row), file=file, flush=True)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                raise OSError(f"{path} was removed or replaced: rows of this run went with it")
            os.fsync(file.fileno())
            shown = " ".join(f"{name} {value:.3f}" for name, value in result.items()
                             if name.endswith("acc") and isinstance(value, float))
            minutes = (time.monotonic() - started) / 60
            print(f"{count}/{len(todo)} {cell} {row['status']} {shown} {minutes:.1f} min, "
                  f"{minutes / count * (len(todo) - count):.1f} to go", flush=True)
    return failed


def _lock(file):
    """Make this process the only writer of a file of rows, or raise OSError."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{file.name} is being written by another run: wait for it, or use --shard "
                      "or another --out") from None
    except OSError:  # a file system without locks
        pass


def read_rows(args):
    """All finished rows of this figure, scale and data set, shards included; warns of bad lines."""
    rows, stem = [], f"{args.figure}-{args.scale}"
    wanted = args.figure, args.scale, int, dict
    shards = args.out.glob(f"{glob.escape(stem)}.*-of-*.jsonl")
    for path in sorted([args.out / f"{stem}.jsonl", *shards]):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                kind = row["figure"], row["scale"], type(row["seed"]), type(row["settings"])
                names = all(isinstance(name, str) for name in row.get("keys", ()))
                if kind != wanted or row["status"] not in ("ok", "diverged") or not names:
                    raise ValueError
                if row["dataset"] == args.dataset:
                    rows.append(row)
            except (ValueError, KeyError, TypeError):
                print(f"warning: {path}: line {number} is no row of this figure, not counted",
                      file=sys.stderr)
    return rows


def _finished_cells(todo, train_cell, args):
    """Yield (cell, result or why it failed, seconds) as cells finish, in args.jobs processes."""
    jobs = min(args.jobs, len(todo))
    if jobs == 1:
        _set_up_process()
        yield from (_run_cell(train_cell, cell, args) for cell in todo)
        return
    # A worker is a pool of one process: if the system kills it, no other worker's cell is lost.
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    todo, idle, running, started = list(todo), [], {}, False
    try:
        while todo or running:
            while todo and len(running) < jobs:
                if not idle:
                    worker = futures.ProcessPoolExecutor(1, context)
                    idle.append((worker, worker.submit(_set_up_worker, train_cell)))
                worker, ready = idle.pop()
                cell = todo.pop(0)
                running[worker.submit(_run_cell, train_cell, cell, args)] = cell, worker, ready
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                cell, worker, ready = running.pop(future)
                if (error := ready.exception()) and not started:
                    raise OSError(f"worker processes cannot start ({error}): call main() under "
                                  'if __name__ == "__main__", or use --jobs 1')
                started = started or not error
                if future.exception():
                    yield cell, "its process was killed, out of memory? Try fewer --jobs", 0
                else:
                    idle.append((worker, ready))
                    yield future.result()
    finally:
        for child in set(multiprocessing.active_children()).difference(others):
            child.terminate()


def _run_cell(train_cell, cell, args):
    def progress(step, steps, loss):
        if not math.isfinite(loss):
            raise FloatingPointError
        if sys.stdout and sys.stdout.isatty():
            print(f"{cell}: step {step}/{steps}, loss {loss:.3f}\033[K\r", end="", flush=True)

    started = time.monotonic()
    try:
        own = copy.deepcopy(cell)  # which train_cell may change
        result = _through_json({**train_cell(own, args.device, args, progress)})
    except FloatingPointError:
        result = {"status": "diverged"}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as SystemExit is
        ours = isinstance(error, OSError) and error.errno is None  # of the data: a line will do
        result = ours and str(error) or traceback.format_exc()
    return cell, result, time.monotonic() - started


def _set_up_process():
    """One thread and deterministic kernels, and memory that is kept between steps."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.suppress(OSError, AttributeError, TypeError):  # page faults: a third of a step
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _set_up_worker(train_cell):
    """Get a new process ready; train_cell is only sent along to see that it can be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _set_up_process()


def _git_revision():
    """Commit of this folder, "-dirty" if its Python files differ; "unknown" if not tracked."""
    file = Path(globals().get("__file__", "."))

    def git(*arguments):
        command = ["git", "-C", file.parent, *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        git("ls-files", "--error-unmatch", "--", file.name)  # else an outer folder's commit
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def ok_rows(rows, **where):
    """The rows that did not diverge and have these values; None: or lack the key."""
    return [row for row in rows if row["status"] == "ok"
            and all(_hashable(row.get(name)) == _hashable(value) for name, value in where.items())]


def complete_seeds(rows, cells):
    """The rows of these cells (dicts), of the seeds for which none is missing or diverged."""
    complete = []
    for (seed,), own in group_by(rows, "seed").items():
        found = [ok_rows(own, **cell) for cell in cells if cell.get("seed", seed) == seed]
        if all(found):
            complete += sum(found, [])
    return complete


def complete_curves(rows, cells, *keys):
    """The rows of each curve, with the same values of keys, and seed that has all of its cells.

    Of half a curve a maximum or a crossing, and so a claim, can be anywhere.
    """
    complete = []
    for values, own in group_by(cells, *keys).items():
        complete += complete_seeds(ok_rows(rows, **dict(zip(keys, values))), own)
    return complete


def group_by(rows, *keys):
    """{values of these keys, ascending: the rows that have them}."""
    groups = {}
    for row in rows:
        groups.setdefault(_hashable([row[key] for key in keys]), []).append(row)
    return dict(sorted(groups.items()))


def values_by(rows, x, y):
    """{value of x, ascending: y of each seed, array}."""
    return {value: np.array([row[y] for row in own])
            for (value,), own in group_by(rows, x).items()}


def summarise(rows, x, y, **where):
    """[(x, mean of y, sample std, count), ...] over the ok rows with these values, by x."""
    points = []
    for value, measured in values_by(ok_rows(rows, **where), x, y).items():
        spread = float(np.std(measured, ddof=1)) if len(measured) > 1 else 0.0
        points.append((value, float(np.mean(measured)), spread, len(measured)))
    return points


def crossing(points, level):
    """First x at which a curve [(x, y, ...), ...] falls through level, linear in log x; or nan.

    nan too between x of which one is not positive, as its logarithm is not finite.
    """
    for (x0, y0, *_), (x1, y1, *_) in zip(points, points[1:]):
        if y0 >= level > y1:
            return x0 * (x1 / x0) ** ((y0 - level) / (y0 - y1)) if min(x0, x1) > 0 else math.nan
    return math.nan


def per_seed(function, rows):
    """function(ok rows of one seed) for each seed: array."""
    return np.array([function(own) for own in group_by(ok_rows(rows), "seed").values()])


def cell_table(rows, keys, columns):
    """Means over seeds, a line for each kind of cell.

    keys, columns: {title: key in the rows}; of a column also (key, format). Columns whose key no
    row has are left out.
    """
    table, measured = [], set().union(*rows)
    for cell, own in group_by(rows, *keys.values()).items():
        line = dict(zip(keys, cell)) | {"seeds": len(own)}
        for title, column in columns.items():
            key, form = column if isinstance(column, tuple) else (column, "{:.2f}")
            if key in measured:
                line[title] = fmt([row[key] for row in own if key in row], form)
        table.append(line)
    return table


def fmt(values, form="{:.2f}"):
    """Mean and sample std of the seeds' values as text: "0.52 ± 0.03"; "–" for none or a nan."""
    values = np.atleast_1d(np.asarray(values, float))
    if not len(values) or np.isnan(values).any():
        return "–"
    spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + spread


@_user_errors()
def save_panels(panels, title, args, columns=3):
    """Draw panels, functions of an axes, as one figure: <out>/<figure>-<scale>.png and .pdf.

    Nothing is written without panels.
    """
    if not panels:
        print("nothing to plot yet")
        return
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # of no backend, whatever MPLBACKEND says
    rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
                     "axes.titlesize": 10, "legend.fontsize": 7, "axes.formatter.min_exponent": 4,
                     "text.usetex": False})
    columns = 2 if len(panels) == 4 else min(columns, len(panels))  # none stands alone
    rows = math.ceil(len(panels) / columns)
    fig = Figure((4.3 * columns, 4.0 * rows + 0.4), layout="constrained")
    fig.suptitle(title)
    axes = [fig.add_subplot(rows, columns, place + 1) for place in range(len(panels))]
    for panel, ax in zip(panels, axes):
        panel(ax)
    path = args.out / f"{args.figure}-{args.scale}"
    save_figure(fig, path)
    print(f"plot: {path}.png and .pdf", flush=True)


def save_figure(fig, path, **options):
    """<path>.png and .pdf, the same bytes for the same figure."""
    for ending in (".png", ".pdf"):
        fig.savefig(f"{path}{ending}", dpi=150, metadata={"CreationDate": None}, **options)
        fig.set_layout_engine("none")  # keep the layout: finding it is half of the time


def plot_points(ax, points, fmt="o-", **style):
    """Draw the output of summarise: means, with the seeds' spread as error bars."""
    if points:
        x, mean, spread, _ = zip(*points)
        ax.errorbar(x, mean, spread, fmt=fmt, ms=4, capsize=2, lw=1.2, **style)


def check(sentence, paper, values, threshold, form="{:.2f}"):
    """A row of the claims table: whether measured values are within a threshold of the paper's.

    values: {name: a value per seed}; None without any. threshold: (least, largest). The claim holds
    if the mean of each is within, and fails if one is beyond; else, with a nan, it is undecided.
    """
    values = {name: seeds for name, seeds in values.items() if np.size(seeds)}
    if not values:
        return None
    ours = "; ".join(f"{name} {fmt(seeds, form)}".strip() for name, seeds in values.items())
    means = np.array([np.mean(seeds) for seeds in values.values()])
    least, largest = threshold
    if ((means < least) | (means > largest)).any():
        holds = "NO"
    else:
        holds = "undecided" if np.isnan(means).any() else "yes"
    return {"claim": sentence, "paper": paper, "ours": ours, "holds": holds}


@_user_errors()
def save_tables(args, **tables):
    """Print tables, {title: list of dicts}, and write them to <out>/<figure>-<scale>.md.

    <out>/README.md gets, between <!-- FIGURE-SCALE --> and <!-- end -->, the claims that do not
    hold, at most six. A row that is None, a claim without values, is only counted there.
    """
    stem = f"{args.figure}-{args.scale}"
    unmeasured = tables.get("claims", []).count(None)
    tables = {title: [row for row in table if row] for title, table in tables.items()}
    text = ""
    for title, table in tables.items():
        if table:
            text += f"{title.replace('_', ' ')}:\n\n{_markdown(table)}\n"
    print("\n" + text, end="")
    (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
    page, claims = args.out / "README.md", tables.get("claims", [])
    if page.exists() and (claims or unmeasured):
        verdicts = [row["holds"] for row in claims]
        summary = f"Claims: {verdicts.count('yes')} hold, {verdicts.count('NO')} fail"
        if undecided := verdicts.count("undecided"):
            summary += f", {undecided} undecided"
        if unmeasured:
            summary += f", {unmeasured} not measured yet"
        summary += f" ([all, and every cell]({stem}.md)).\n"
        block = re.compile(f"(<!-- {re.escape(stem)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        shown = [row for row in claims if row["holds"] != "yes"][:6]
        new = f"\n{summary}\n{_markdown(shown)}\n" if shown else f"\n{summary}\n"
        encoding = {"encoding": "utf-8", "errors": "surrogateescape"}  # of any page
        old = page.read_text(**encoding)
        changed = block.sub(lambda match: match[1] + new, old)
        if changed != old:
            page.write_text(changed, **encoding)


def _markdown(table):
    lines = [table[0], ["---"] * len(table[0]), *(row.values() for row in table)]
    text = ""
    for line in lines:
        cells = [str(cell).replace("|", "\\|") for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text
