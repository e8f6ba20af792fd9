"""Shared pieces of the reproduction of Achille & Soatto, "Emergence of Invariance and Disentanglement in Deep
Representations" (JMLR 2018, arXiv 1706.01350): the information in the weights as a regulariser.

Five sections, each of which also runs alone when pasted under this import block:

    1. Stochastic layers       weights with learned multiplicative noise
    2. Weight-IB loss          cross-entropy + beta/N * I(w;D)
    3. Information estimators  capacities, bounds, what logits and representations hold
    4. Data                    CIFAR-10, MNIST, CelebA, and synthetic sets that need no files
    5. Running a grid          command line, resumable runs, plot style, claims tables

Information is in nats throughout.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import update_bn

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs from writing one file
    fcntl = None

torch.set_flush_denormal(True)  # the moments of pruned weights decay into denormals, which slow a CPU several times

# ======================================================================================================================
# 1. Stochastic layers
# ======================================================================================================================
# w = w_mean * eps, with noise eps of mean one and one alpha a weight that is learned: eps ~ N(1, alpha), or
# log eps ~ N(-alpha/2, alpha). The parameter is log sigma^2 = log alpha + log w_mean^2 rather than log alpha, so that a
# step of the mean leaves the size of the noise as it is.

EPS = 1e-16  # added to w^2 before its logarithm: a weight that is exactly zero has a finite log alpha
MAX_LOG_SIGMA2 = 20.0  # noise beyond this drowns everything already; without it exp overflows at log alpha = 100


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_square(weight):
    return torch.log(_at_least_float32(weight) ** 2 + EPS)


class _CappedExp(torch.autograd.Function):
    """exp(scale * x), capped in value but not in gradient, so that a parameter beyond the cap can come back."""

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
    """mean + sqrt(variance) * n, n ~ N(0, 1): one pass each way where autograd takes five. First derivatives only."""

    @staticmethod
    def forward(ctx, mean, variance):
        std = torch.add(variance, 1e-12).sqrt_()
        # drawn flat: into a channels-last tensor torch draws normals several times slower
        noise = torch.randn(std.numel(), dtype=std.dtype, device=std.device).as_strided(std.shape, std.stride())
        sample = torch.addcmul(mean, std.to(mean.dtype), noise.to(mean.dtype))
        ctx.save_for_backward(noise.div_(std).mul_(0.5))
        return sample

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, grad * ctx.saved_tensors[0]


# KL of N(w, alpha*w^2) from the log-uniform prior, up to a constant: Molchanov et al. 2017 (arXiv 1701.05369), eq. 14
K1, K2, K3 = 0.63576, 1.87320, 1.48695


class _GaussianKL(torch.autograd.Function):
    """Sum over the weights of k1 - k1*sigmoid(k2 + k3*u) + softplus(-u)/2, u = log alpha; gradient in closed form.

    One sweep forward yields the value and both gradients, at half the cost of leaving them to autograd. First
    derivatives only.
    """

    @staticmethod
    def forward(ctx, weight, log_sigma2):
        w, s = _at_least_float32(weight), _at_least_float32(log_sigma2).clamp(max=MAX_LOG_SIGMA2)
        w2 = torch.mul(w, w).add_(EPS)
        total = torch.exp(s).add_(w2)  # 1 + 1/alpha = total / sigma^2
        k = torch.log(w2).sub_(s).mul_(-K3).add_(K2).sigmoid_()
        kl = K1 * (w.numel() - k.sum()) + 0.5 * torch.log(total).sub_(s).sum()
        grad = k.addcmul_(k, k, value=-1).mul_(-K1 * K3).sub_(torch.div(w2, total, out=total), alpha=0.5)
        ctx.save_for_backward(torch.mul(w, grad).div_(w2), grad)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_weight, grad_log_sigma2 = ctx.saved_tensors
        return grad_weight * (-2 * grad), grad_log_sigma2 * grad


class _StochasticWeight:
    """What StochasticLinear and StochasticConv2d share: the noise on `weight` and the information in it."""

    sampling = None  # draw noise? None: in train() only. sample_weights() sets it

    def _make_stochastic(self, noise, local, log_alpha, max_log_alpha):
        if noise not in ("gaussian", "lognormal"):
            raise ValueError(f"noise={noise!r}: choose 'gaussian' or 'lognormal'")
        self.noise, self.local, self.max_log_alpha = noise, local, max_log_alpha
        self.log_sigma2 = nn.Parameter(torch.empty_like(self.weight, requires_grad=False))
        self.log_alpha = log_alpha

    @property
    def log_alpha(self):
        """log alpha of every weight, shape of `weight`; log-normal: at most max_log_alpha. Assign a float or tensor."""
        log_alpha = self._free_log_alpha()
        return log_alpha.clamp(max=self.max_log_alpha) if self.noise == "lognormal" else log_alpha

    @log_alpha.setter
    def log_alpha(self, value):
        with torch.no_grad():
            self.log_sigma2.copy_(value + _log_square(self.weight))

    def _free_log_alpha(self):
        return _at_least_float32(self.log_sigma2) - _log_square(self.weight)

    def _capped_alpha(self):
        """alpha of log-normal noise, capped in value but not in gradient, so that a weight at the cap can come back."""
        log_alpha = self._free_log_alpha()
        return torch.exp(log_alpha - F.relu(log_alpha - self.max_log_alpha).detach())

    def information(self):
        """Upper bound I~(w;D) on what the weights of this layer hold about the data: 0-d tensor, nats (Prop. 4.1).

        KL(q(w|D) || log-uniform prior), summed over the weights. Gaussian noise: the approximation of Molchanov et al.
        (2017), 0 for alpha to infinity, off by at most 0.0095 nats a weight for |log alpha| <= 10; the divergence lies
        between the capacity log(1 + 1/alpha)/2 and that plus 0.636. Log-normal noise: (max_log_alpha - log alpha)/2, so
        that a weight at the cap holds zero nats: the choice of the paper's arbitrary constant C, and of what "no
        information" means. It is the divergence from a prior uniform over an interval of log|w|, of length
        sqrt(2 pi e * cap on alpha), for a posterior well within it. No divergence from a proper prior, unlike
        prior_divergence: nothing to certify with.
        """
        if self.noise == "gaussian":
            return _GaussianKL.apply(self.weight, self.log_sigma2)
        return 0.5 * (self.max_log_alpha - self.log_alpha).sum()

    def _apply_noisy(self, linear, x):
        """linear(x, weight, bias), the layer's own map, with noise on the weights where it is to be drawn."""
        if not (self.training if self.sampling is None else self.sampling):
            return linear(x, self.weight, self.bias)
        if self.local:
            with torch.autocast(x.device.type, enabled=False):  # squares leave the range of half precision
                if self.noise == "gaussian":
                    variance = _CappedExp.apply(_at_least_float32(self.log_sigma2), 1.0)
                else:
                    variance = _at_least_float32(self.weight) ** 2 * torch.expm1(self._capped_alpha())
                wide = _at_least_float32(x)
                variance = linear(wide * wide, variance, None)
            return _GaussianNoise.apply(linear(x, self.weight, self.bias), variance)
        noise = torch.randn(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
        if self.noise == "gaussian":
            weight = torch.addcmul(self.weight, _CappedExp.apply(self.log_sigma2, 0.5), noise)
        else:
            alpha = self._capped_alpha()
            weight = self.weight * torch.exp((alpha + 1e-30).sqrt() * noise - 0.5 * alpha).to(self.weight.dtype)
        return linear(x, weight, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint of the plain layer has no noise: keep this layer's alpha, relative to the weights it brings."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.shape == self.weight.shape and prefix + "log_sigma2" not in state_dict:
            log_sigma2 = self._free_log_alpha().detach() + _log_square(weight.to(self.weight))
            state_dict[prefix + "log_sigma2"] = log_sigma2.to(self.log_sigma2.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return f"{super().extra_repr()}, noise={self.noise!r}, local={self.local}"


class StochasticLinear(_StochasticWeight, nn.Linear):
    """nn.Linear with multiplicative noise on its weights, one learned alpha a weight (Sec. 4; Kingma et al. 2015).

    noise: "gaussian", eps ~ N(1, alpha), or "lognormal", log eps ~ N(-alpha/2, alpha). local=True draws the
    pre-activations, with independent noise for every example (local reparametrisation); log-normal noise has no exact
    local form, its mean and variance are matched there (central limit). local=False draws one weight sample a forward.
    log_alpha: start of every weight's log alpha. max_log_alpha: cap of log-normal noise, see information().
    train() draws noise, eval() uses the means; see sample_weights. (..., in_features) -> (..., out_features).
    Extra parameter: log_sigma2, shape of weight. ValueError for an unknown noise.
    """

    def __init__(self, in_features, out_features, bias=True, *, noise="gaussian", local=True, log_alpha=-6.0,
                 max_log_alpha=1.0, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._make_stochastic(noise, local, log_alpha, max_log_alpha)

    def forward(self, x):
        return self._apply_noisy(F.linear, x)


class StochasticConv2d(_StochasticWeight, nn.Conv2d):
    """nn.Conv2d with multiplicative noise on its weights; the options are those of StochasticLinear.

    local=False by default: one weight sample a forward costs next to nothing, local=True a second convolution and noise
    for every pre-activation, independent between places although these share their weights (the usual approximation).
    """

    def __init__(self, *args, noise="gaussian", local=False, log_alpha=-6.0, max_log_alpha=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_stochastic(noise, local, log_alpha, max_log_alpha)

    def forward(self, x):
        return self._apply_noisy(self._conv_forward, x)


def to_stochastic(module, *, skip=(), noise="gaussian", local=None, log_alpha=-6.0, max_log_alpha=1.0):
    """Turn every nn.Linear and nn.Conv2d of a model into its stochastic twin, in place, and return the model.

    Weights, device, dtype, hooks, names and eval-mode outputs stay as they are; layers shared between places stay
    shared. skip: names of layers to leave alone, as in named_modules(); the name of a block spares all within. local:
    None for each layer's own default. A module that is itself a layer is converted too. Subclasses of the two, such as
    the projections of nn.MultiheadAttention, stay plain; nn.TransformerEncoderLayer bypasses its layers in eval() with
    no_grad() unless torch.backends.mha.set_fastpath_enabled(False). ValueError for a name in skip that is unknown.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    layers = dict(module.named_modules())
    if unknown := [name for name in skip if name not in layers]:
        raise ValueError(f"skip names {', '.join(map(repr, unknown))}, which the model does not have")
    twins = {nn.Linear: (StochasticLinear, True), nn.Conv2d: (StochasticConv2d, False)}
    for name, layer in layers.items():
        if type(layer) in twins and not any(name == s or name.startswith(s + ".") for s in skip):
            layer.__class__, default = twins[type(layer)]  # the same object: whoever holds it holds the twin
            layer._make_stochastic(noise, default if local is None else local, log_alpha, max_log_alpha)
    return module


@contextlib.contextmanager
def sample_weights(model, draw=True):
    """A context in which the stochastic layers of model draw noise whatever their mode; with draw=False, use the means.

    Everything else keeps its mode: in eval() batch normalisation uses its running statistics. Yields the model.
    """
    layers = [m for m in model.modules() if isinstance(m, _StochasticWeight)]
    before = [m.sampling for m in layers]
    try:
        for m in layers:
            m.sampling = draw
        yield model
    finally:
        for m, state in zip(layers, before):
            m.sampling = state


@contextlib.contextmanager
def calibrated(model, batches, draw):
    """A context with the model in eval() and batch normalisation re-estimated for the weights that are to be measured.

    draw: True for sampled weights, drawn anew for every batch, False for mean weights. The running statistics of a
    noisy net are wrong for its means, and lag behind. batches: inputs to estimate on. On leaving, the statistics are
    what they were before. Yields the model.
    """
    running = [(m, m.running_mean.clone(), m.running_var.clone()) for m in model.modules()
               if getattr(m, "running_mean", None) is not None]
    try:
        with sample_weights(model, draw):
            update_bn(batches, model)
            model.eval()
            yield model
    finally:
        for m, mean, var in running:
            m.running_mean.copy_(mean), m.running_var.copy_(var)


@torch.no_grad()
def predict(model, x, batch=100):
    """model(x) in batches."""
    return torch.cat([model(part) for part in x.split(batch)])


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def evaluate(model, x, y, x_test, y_test):
    """Accuracies and train cross-entropy (nats a sample) of sampled and of mean weights, each calibrated.

    Sampled weights are drawn anew for every batch of 100, over at least 2,000 training images in all. Returns
    (logits, labels, results): those of sampled weights on the training images, with repetitions, and a dict.
    """
    passes = max(1, 2000 // len(x))
    with calibrated(model, x.split(100) * passes, draw=True):
        logits, labels = torch.cat([predict(model, x) for _ in range(passes)]), y.repeat(passes)
        test_sampled = accuracy(predict(model, x_test), y_test)
    with calibrated(model, x.split(100), draw=False):
        train_mean, test_mean = accuracy(predict(model, x), y), accuracy(predict(model, x_test), y_test)
    return logits, labels, {"train_acc": accuracy(logits, labels), "train_acc_mean": train_mean, "test_acc": test_mean,
                            "test_acc_sampled": test_sampled, "cross_entropy": F.cross_entropy(logits, labels).item()}


# ======================================================================================================================
# 2. Weight-IB loss
# ======================================================================================================================

def weight_information(model):
    """Information in the weights of a model, the sum over its stochastic layers of I~(w;D): 0-d tensor, nats.

    Biases, batch normalisation and plain layers have no noise and are not counted, tied weights are counted once.
    ValueError where nothing is stochastic.
    """
    layers = {id(m.weight): m for m in model.modules() if isinstance(getattr(m, "log_sigma2", None), nn.Parameter)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no stochastic layer: see to_stochastic(model)")
    return sum(layer.information() for layer in layers.values())


def ib_loss(logits, target, model, beta, n):
    """The information Lagrangian for the weights (eq. 3), per sample: cross-entropy + beta/n * I(w;D), in nats.

    logits: (batch, classes). target: class indices (batch,), or 0/1 attributes (batch, attributes), whose binary
    cross-entropies are summed over the attributes. beta: float. n: the number of training samples, not of the batch;
    the paper's Lagrangian has the sum over them, so with the mean the information weighs beta/n; beta = 1 is the ELBO.
    Returns (loss, cross_entropy, information), 0-d tensors; the last two carry gradients too.
    ValueError where the model has no stochastic layer, beta < 0 or n < 1.
    """
    if beta < 0 or n < 1:
        raise ValueError(f"beta={beta} must be 0 or more, n={n} (the number of training samples) 1 or more")
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if target.shape == logits.shape:
        target = target.to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)
    else:
        cross_entropy = F.cross_entropy(logits, target)
    information = weight_information(model)
    return cross_entropy + beta / n * information, cross_entropy, information


# ======================================================================================================================
# 3. Information estimators
# ======================================================================================================================

def g(alpha):
    """Capacity lost to log-normal noise: g(alpha) = -log(1 - exp(-alpha))/2, nats per dimension (Prop. 5.2).

    alpha: float or tensor, > 0; falls from infinity at 0 to 0. ValueError for alpha < 0.
    """
    alpha = torch.as_tensor(alpha)
    alpha = alpha if alpha.is_floating_point() else alpha.double()
    if (alpha < 0).any():
        raise ValueError("alpha is a variance and cannot be negative")
    return -0.5 * torch.log(-torch.expm1(-alpha))


def alpha_from_information(information, dim):
    """The common alpha of dim weights that hold `information` nats in all: exp(-2*information/dim) (Prop. 4.1, C = 0).

    The paper prints exp(-information/dim); from I = -1/2 * sum of log alpha follows the factor 2.
    """
    return torch.exp(-2 * torch.as_tensor(information) / dim)


def layer_information_bound(dim_z, alpha):
    """Most that the noisy units of one layer let through: dim_z * (g(alpha) + 1) >= I(z;x) + TC(z), nats (Prop. 5.2).

    I(z;x) + TC(z) lies between dim_z * g(alpha) and this. The least of it over the layers bounds what any later layer
    holds about the input (Cor. 5.3). dim_z: number of units; of a convolution, channels * height * width. alpha: float,
    or tensor with an alpha a unit, of log-normal noise; for Gaussian noise of variance a pass log1p(a), which has the
    same first two moments, so that g becomes the capacity log(1 + 1/a)/2 of a Gaussian channel.
    It asks for inputs that are centred, uncorrelated and hardly ever all zero: correlated ones carry up to
    dim_z * log(dim x)/2 nats more, and noise that multiplies a zero hides nothing. And for one alpha a unit: where the
    alphas of its weights differ, alpha_i is that of its noise, expm1(alpha_i) = sum_j expm1(alpha_ij) w_ij^2 /
    sum_j w_ij^2. It does not hold for noise that places share, as in a convolution with local=False.
    """
    return dim_z * (g(alpha).mean() + 1)


def layer_information(weight, alpha, x):
    """I(z;x) + TC(z) of a layer z = Wx with noise on its weights, for the inputs x: 0-d tensor, nats (Prop. 5.1).

    weight: (out, in), the means. alpha: (out, in) or float, of log-normal noise; for Gaussian noise of variance a pass
    log1p(a). x: (n, in), samples of the input, correlated and off centre as they are; a bias changes nothing. The sum
    over the units of log(Var z_i)/2 - E_x log(Var z_i|x)/2, which takes z_i and z_i|x as Gaussian: many inputs a unit,
    none dominant. inf where some x is all zero. The noise has to be independent between units.
    """
    x, alpha = torch.as_tensor(x), torch.as_tensor(alpha, dtype=weight.dtype, device=weight.device)
    noise = x**2 @ (torch.expm1(alpha) * weight**2).T
    signal = (x @ weight.T).var(0, correction=0)
    return 0.5 * (torch.log(signal + noise.mean(0)) - torch.log(noise).mean(0)).sum()


def hessian_trace(loss, parameters, probes=100):
    """Hutchinson's estimate of the trace of the Hessian of loss in the parameters: (estimate, standard error), floats.

    loss: 0-d tensor with a graph, of mean weights: noise and information have first derivatives only.
    """
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    traces = []
    for _ in range(probes):
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in parameters]
        products = torch.autograd.grad(gradients, parameters, signs, retain_graph=True)
        traces.append(sum((v * hv).sum() for v, hv in zip(signs, products)))
    traces = torch.stack(traces)
    return traces.mean().item(), (traces.std() / probes**0.5).item()


def flat_minimum_bound(weight, trace, beta):
    """Most that the weights hold at a flat minimum: K/2 * (log|w|^2 + log tr H - log(K^2 * beta)), nats (Prop. 4.3).

    It bounds -1/2 * sum of log alpha_i (C = 0) at the alpha_i = beta / (w_i^2 H_ii) that minimise the Lagrangian with
    the cross-entropy to second order, and equals it where all w_i^2 and all H_ii are alike. weight: tensor of all K
    means. trace: of the Hessian H of the cross-entropy summed over the samples, at a minimum; elsewhere the nuclear
    norm of H, as long as all H_ii > 0. Not for alpha near 1 or above, where the variance exp(alpha) - 1 is not alpha.
    The paper prints K * log(K^2 * beta/2) in the bracket, one K more than its proof; dropping Taylor's 1/2, as it does,
    is to put beta/2 for beta.
    """
    k = weight.numel()
    return 0.5 * k * (torch.log((weight**2).sum() * trace) - math.log(k**2 * beta))


LAMBDAS = tuple(0.5 + 2 ** (k / 2) for k in range(-6, 15))


def pac_bayes_bound(loss, divergence, n, *, max_loss=math.log(10), delta=0.05, lambdas=LAMBDAS):
    """Most that the test loss can be, but for a share delta of the training sets (McAllester 2013; eq. 7).

    min over lambda of (loss + lambda * max_loss * (divergence + log(len(lambdas)/delta)) / n) / (1 - 1/(2 lambda)): the
    union bound pays for the choice of lambda > 1/2. loss: expected over the weights, mean over the n samples, of a loss
    within 0 and max_loss: each sample's cross-entropy clipped at chance, log 10 nats, or the error, max_loss=1.
    divergence: KL(q(w|D) || p(w)), nats, of all that was learned, from a proper prior that has not seen these samples:
    prior_divergence(model, prior), not weight_information(model). A result of max_loss or more says nothing.
    delta=1 with one lambda is eq. 7 as printed, which bounds the expectation over training sets of the test loss by
    that of this. For a given lambda the best posterior minimises the Lagrangian with beta = lambda * max_loss.
    ValueError for a loss or divergence that cannot be one, or lambda <= 1/2.
    """
    if not (0 <= loss <= max_loss and divergence >= 0 and min(lambdas) > 0.5):
        raise ValueError(f"loss={float(loss):g} must be from 0 to max_loss={max_loss:g} (clip it), divergence="
                         f"{float(divergence):g} 0 or more (is the prior proper?), and every lambda over 1/2")
    penalty = max_loss * (divergence + math.log(len(lambdas) / delta)) / n
    return min((loss + lam * penalty) / (1 - 1 / (2 * lam)) for lam in lambdas)


def prior_divergence(model, prior):
    """KL(q(w|D) || p(w)) of a model with Gaussian noise from a proper Gaussian prior: 0-d tensor, nats.

    prior: a copy of the model's state_dict from before it saw the samples that the bound is on: at its start, or
    trained on others. p(w) = N(prior weight, s^2), with s^2 for each layer the best of 1,000 values from e^-40 to e^10,
    a choice that costs log 1000 nats (union bound). To be minimised together with the cross-entropy.
    ValueError where what has no noise, biases or batch normalisation say, is not as in the prior, for it would hold
    information that is not counted; or where noise is log-normal.
    """
    noisy = {f"{name}.".lstrip("."): m for name, m in model.named_modules()
             if isinstance(getattr(m, "log_sigma2", None), nn.Parameter)}
    if not noisy or any(m.noise != "gaussian" for m in noisy.values()):
        raise ValueError("the model has no stochastic layer, or one with log-normal noise")
    charged = {name + part for name in noisy for part in ("weight", "log_sigma2")}
    if moved := [k for k, v in model.state_dict().items() if k not in charged and not torch.equal(v, prior[k])]:
        raise ValueError(f"{', '.join(moved)}: without noise, and not as in the prior")
    total = 0
    for name, m in noisy.items():
        square = torch.exp(m.log_sigma2) + (m.weight - prior[name + "weight"]) ** 2
        log_s2 = (square.detach().mean().log() * 20).round().clamp(-799, 200) / 20
        total = total + 0.5 * (log_s2 - m.log_sigma2 + square / torch.exp(log_s2) - 1).sum() + math.log(1000)
    return total


def label_information(logits, labels):
    """Label nats that the logits hold: H(y) - cross-entropy, a lower bound on I(z;y) on test data; 0-d tensor, nats.

    logits: (n, classes); labels: (n,) indices. H(y) is the entropy of the labels' frequencies here. On the train set
    of random labels this is what was memorised. Negative where the logits are worse than those frequencies.
    """
    frequencies = torch.bincount(labels).double() / len(labels)
    return torch.special.entr(frequencies).sum() - F.cross_entropy(logits.double(), labels)


def density_ratio_information(discriminator, z, n, *, validation=1000, held_out=2000, batch=256, lr=3e-3, steps=3000,
                              patience=300):
    """I(z;n) in nats by learning the log-ratio log p(z,n)/(p(z)p(n)): pairs are told from shuffled pairs (Sec. 6).

    discriminator: a module, discriminator(z, n) -> scores (len(z), len(n)) of all pairs of rows; is trained, in place.
    z, n: (count, ...) pairs, of any shapes and types; z is detached. The last `held_out` of them are reported on, the
    `validation` ones before decide how long to train, the rest are trained on; rows of one origin belong together.
    Every pair of a batch is told from the batch - 1 others that its z makes with the batch's n, at these odds, so that
    the score of least cross-entropy is the log-ratio itself. Adam; training ends, at the best state, when InfoNCE on
    the validation pairs has not risen for `patience` steps, or after `steps`; if it never rose above 0, scores of 0 are
    reported. Measured on 60,000 Gaussian pairs in 20 dimensions: of 0.5 nats 0.44 are found, of 2 1.9, of 5 4.4, of 8
    6.0 to 6.7. It saturates, the sooner the fewer pairs and steps.

    Returns a dict of floats. plug_in: mean score of held-out pairs, high or low where the scores are off. info_nce: a
    lower bound in expectation, whatever the discriminator, which cannot exceed log(held_out). donsker_varadhan: plug_in
    less log E exp(score) of all shuffled pairs, a lower bound but for the error of that mean, which errs upwards.
    calibration_error: mean gap between sigmoid(score) and the frequency of true pairs among as many shuffled ones, in
    ten bins; 0 to 1, about 0.01 by chance.
    ValueError for too few pairs, or scores of another shape; FloatingPointError for scores that are not finite.
    """
    z, n = z.detach(), n.detach()
    train = len(z) - validation - held_out
    if len(z) != len(n) or train < 2 or min(validation, held_out) < 2:
        raise ValueError(f"{len(z)} z and {len(n)} n: as many of each are wanted, and over {validation + held_out + 1}")

    def estimates(part):
        discriminator.eval()
        with torch.no_grad():
            scores = torch.cat([discriminator(rows, n[part]) for rows in z[part].split(500)]).float()
        discriminator.train()
        if not scores.isfinite().all():
            raise FloatingPointError("the scores of the discriminator are not finite")
        return _ratio_estimates(scores)

    optimizer = torch.optim.Adam(discriminator.parameters(), lr, fused=True)
    best, best_step, batch = -math.inf, 0, min(batch, train)
    for step in range(1, steps + 1):
        index = torch.randperm(train, device=z.device)[:batch]
        scores = discriminator(z[index], n[index])
        if scores.shape != (batch, batch):
            raise ValueError(f"discriminator(z, n) gave {tuple(scores.shape)}, not a score for each of {batch}² pairs")
        log_odds = scores - math.log(batch - 1)
        loss = (F.softplus(log_odds).sum() - log_odds.trace()) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            bound = estimates(slice(train, train + validation))["info_nce"]
            if bound > best:
                best, best_step = bound, step
                state = {name: value.clone() for name, value in discriminator.state_dict().items()}
            elif step - best_step >= patience:
                break
    discriminator.load_state_dict(state)
    return estimates(slice(train + validation, None)) if best > 0 else _ratio_estimates(torch.zeros(held_out, held_out))


def _ratio_estimates(scores):
    """What density_ratio_information returns, from the scores (m, m) of m pairs, the true ones on the diagonal."""
    m = len(scores)
    true, shuffled = scores.diagonal(), scores.roll(1, 0).diagonal()
    off_diagonal = scores.masked_fill(torch.eye(m, dtype=torch.bool, device=scores.device), -math.inf).logsumexp(1)
    plug_in = true.mean()
    probability = torch.cat([true, shuffled]).sigmoid()
    excess = probability - (torch.arange(2 * m, device=scores.device) < m).float()
    gaps = torch.zeros(10, device=scores.device).index_add(0, (10 * probability).long().clamp(max=9), excess)
    results = {"plug_in": plug_in, "donsker_varadhan": plug_in - off_diagonal.logsumexp(0) + math.log(m * (m - 1)),
               "info_nce": (true - torch.logaddexp(true, off_diagonal)).mean() + math.log(m),
               "calibration_error": gaps.abs().sum() / (2 * m)}
    return {name: value.item() for name, value in results.items()}


def total_correlation(z):
    """TC(z) = KL(p(z) || prod p(z_i)) of a Gaussian with the covariance of the samples: 0-d tensor, nats.

    z: (n, ...), flattened to (n, d); TC = -log det(correlation)/2. Components that do not vary are left out. It reads
    linear dependence only, and high by about d^2/(4n) for n samples. ValueError unless n > d.
    """
    z = z.detach().flatten(1).double()
    z = z[:, z.std(0) > 0]
    if len(z) <= z.shape[1] + 1:
        raise ValueError(f"{len(z)} samples of {z.shape[1]} varying dimensions: need more samples")
    return -0.5 * torch.linalg.slogdet(torch.corrcoef(z.T).view(z.shape[1], z.shape[1])).logabsdet


# ======================================================================================================================
# 4. Data
# ======================================================================================================================
# All loaders return tensors of whole data sets, images as uint8 (n, channels, height, width). Rows may be sorted by
# class: draw a seeded permutation before taking the first N.

class DataError(OSError):
    """A data set is missing, cannot be downloaded, or its file is damaged; the message says what to do."""


def load_cifar10(data_dir="data"):
    """CIFAR-10: (x_train uint8 [50000,3,32,32], y_train int64, x_test [10000,3,32,32], y_test).

    Looked for as <data_dir>/cifar10.npz (arrays x_train, y_train, x_test, y_test as in Keras), then torchvision's copy
    in data_dir, then downloaded by torchvision; the last two write that npz. DataError where none can be had.
    """
    return _train_and_test("cifar10", data_dir, (32, 32, 3))


def load_mnist(data_dir="data"):
    """MNIST: (x_train uint8 [60000,1,28,28], y_train int64, x_test [10000,1,28,28], y_test). See load_cifar10."""
    return _train_and_test("mnist", data_dir, (28, 28))


def load_celeba(data_dir="data"):
    """CelebA at 64x64: (images uint8 [n,3,64,64], attrs uint8 [n,40], attr_names list, partition uint8 [n]).

    partition: 0 train, 1 validation, 2 test. Images are the centre 148x148 of the aligned ones, resized; 2.5 GB in all.
    Looked for as <data_dir>/celeba64.npz (images [n,64,64,3], attrs, attr_names, partition), and so on as load_cifar10.
    """
    names = "images", "attrs", "attr_names", "partition"
    images, attrs, attr_names, partition = _arrays("celeba64", data_dir, names, (64, 64, 3), _celeba_of_torchvision)
    images = rearrange(torch.from_numpy(images), "n h w c -> n c h w")
    return images, torch.from_numpy(attrs), [str(name) for name in attr_names], torch.from_numpy(partition)


def _train_and_test(name, data_dir, shape):
    def of_torchvision(data_dir, download):
        from torchvision import datasets
        train, test = (getattr(datasets, name.upper())(data_dir, part, download=download) for part in (True, False))
        return {"x_train": train.data, "y_train": train.targets, "x_test": test.data, "y_test": test.targets}

    names = "x_train", "y_train", "x_test", "y_test"
    x, y, x_test, y_test = map(torch.from_numpy, _arrays(name, data_dir, names, shape, of_torchvision))
    pattern = "n h w c -> n c h w" if len(shape) == 3 else "n h w -> n 1 h w"
    return rearrange(x, pattern), y.flatten().long(), rearrange(x_test, pattern), y_test.flatten().long()


def _celeba_of_torchvision(data_dir, download):
    from torchvision import datasets, transforms
    crop = transforms.Compose([transforms.CenterCrop(148), transforms.Resize((64, 64))])
    data = datasets.CelebA(data_dir, "all", transform=crop, download=download)
    images = np.empty((len(data), 64, 64, 3), np.uint8)
    for i in range(len(data)):
        images[i] = np.asarray(data[i][0])
    partition = np.loadtxt(Path(data_dir, "celeba", "list_eval_partition.txt"), usecols=1, dtype=np.uint8)
    names = [name for name in data.attr_names if name]  # the file's header ends in a blank
    return {"images": images, "attrs": data.attr, "attr_names": names, "partition": partition}


def _arrays(name, data_dir, keys, shape, of_torchvision):
    """The arrays of <data_dir>/<name>.npz, which is first made from torchvision's copy or download if need be."""
    path = Path(data_dir, f"{name}.npz")
    if not path.exists():
        try:
            try:
                arrays = of_torchvision(str(data_dir), download=False)
            except (RuntimeError, OSError):  # torchvision's ways to say that it has no copy
                print(f"{path} is not there, trying torchvision's download", flush=True)
                arrays = of_torchvision(str(data_dir), download=True)
        except Exception as error:  # urllib, gdown, tar and md5 checks each raise their own
            raise DataError(_how_to_get(path, keys, error)) from error
        arrays = {key: np.asarray(value, None if key == "attr_names" else np.uint8) for key, value in arrays.items()}
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return [arrays[key] for key in keys]
    try:
        with np.load(path) as file:
            missing = [key for key in keys if key not in file.files]
            arrays = {} if missing else {key: file[key] for key in keys}
    except Exception as error:  # zip, zlib, header and pickle errors each have their own type
        raise DataError(f"{path} is damaged ({error}): delete it to have it made anew, or use --scale demo") from error
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it should hold the arrays {', '.join(keys)}")
    for key, of in (("x_train", "y_train"), ("x_test", "y_test"), ("images", "attrs")):
        if key in arrays:
            images, labels = arrays[key], arrays[of]
            if (images.dtype, images.shape) != (np.uint8, (len(labels), *shape)) or labels.dtype.kind not in "ui":
                raise DataError(f"{path}: {key} should be uint8 {('n', *shape)} and {of} n integers, not "
                                f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}")
    return [arrays[key] for key in keys]


def _how_to_get(path, keys, error):
    """One line: what is missing, why it could not be had, and the ways out."""
    if path.stem == "celeba64":
        hand = ("torchvision needs the package gdown (pip install gdown), and Google Drive has a daily quota; by hand: "
                "get img_align_celeba/ (unzipped), list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
                "list_landmarks_align_celeba.txt and list_eval_partition.txt from "
                f"mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put them into {path.parent}/celeba/")
    else:
        hand = f"run this once where there is a network, or put a {path.name} there with arrays {', '.join(keys)}"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"no {path}, and the download failed ({reason}): {hand}; --scale demo needs no data"


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 images (n, c, h, w), 0 to 255: two (1, c, 1, 1) tensors."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    levels, counts = torch.arange(256).double(), counts / counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels**2 - mean**2).sqrt()
    return mean.view(1, -1, 1, 1).float(), std.view(1, -1, 1, 1).float()


@functools.lru_cache(maxsize=1)
def load_objects(dataset, data_dir, n_train, n_test):
    """Pictures of ten kinds: (x_train, y_train, x_test, y_test, mean, std), read once a process.

    dataset: "cifar10" or "mnist", all of it, or "synthetic", that many synthetic_objects. mean and std:
    channel_statistics of x_train.
    """
    if dataset == "synthetic":
        data = *synthetic_objects(n_train, seed=0), *synthetic_objects(n_test, seed=1)
    else:
        data = (load_mnist if dataset == "mnist" else load_cifar10)(data_dir)
    return *data, *channel_statistics(data[0])


def draw_subset(x, y, n, generator):
    """n of the pairs (x, y), a seeded draw without repetition. DataError where there are fewer."""
    if n > len(x):
        raise DataError(f"{n} images are wanted, the data set has {len(x)}")
    pick = torch.randperm(len(x), generator=generator)[:n]
    return x[pick], y[pick]


def corrupt_labels(labels, fraction, num_classes, generator):
    """A copy of labels (n,) in which exactly round(fraction*n) places are drawn anew, uniformly over the classes.

    A new label may be the old one by chance, so that fraction = 1 leaves nothing of the true labels, and in each
    log(num_classes) nats to memorise. generator draws the places and the labels. ValueError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must be between 0 and 1")
    count = round(fraction * len(labels))
    places = torch.randperm(len(labels), generator=generator, device=generator.device)[:count]
    new = torch.randint(num_classes, (count,), generator=generator, device=generator.device)
    corrupted = labels.clone()
    corrupted[places.to(labels.device)] = new.to(labels)
    return corrupted


def add_clutter(images, generator, squares=10, size=4):
    """Paste white squares at uniform places; returns (images with clutter (n, c, h, w), bool mask (n, 1, h, w)).

    images: uint8, white being 255, or float, white being 1. Squares may overlap one another and the digit; they lie
    wholly within the image. The mask is the nuisance of Fig. 4.
    """
    n, _, height, width = images.shape

    def strips(length):  # (n, squares, length), 1 where a square covers the row or column
        start = torch.randint(length - size + 1, (n, squares, 1), generator=generator, device=generator.device)
        offset = torch.arange(length, device=images.device) - start.to(images.device)
        return ((offset >= 0) & (offset < size)).float()

    mask = einsum(strips(height), strips(width), "n s h, n s w -> n h w").gt(0).unsqueeze(1)
    return images.masked_fill(mask, 1 if images.is_floating_point() else 255), mask


OBJECT_SHAPES = {  # functions of a point (x, y), its radius r and its larger coordinate b that are negative inside
    "disc": lambda x, y, r, b: r - 0.8,
    "square": lambda x, y, r, b: b - 0.75,
    "triangle": lambda x, y, r, b: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.5,
    "ring": lambda x, y, r, b: (r - 0.72).abs() - 0.2,
    "plus": lambda x, y, r, b: torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.25, b - 1),
    "star": lambda x, y, r, b: r - 0.68 - 0.32 * torch.cos(5 * torch.atan2(y, x)),
    "crescent": lambda x, y, r, b: torch.maximum(r - 0.9, 0.75 - torch.hypot(x - 0.45, y)),
    "bar": lambda x, y, r, b: torch.maximum(x.abs() - 1, y.abs() - 0.28),
    "frame": lambda x, y, r, b: (b - 0.65).abs() - 0.17,
    "pair": lambda x, y, r, b: torch.hypot(x.abs() - 0.55, y) - 0.4,
}
DIGIT_FONTS = ("DejaVuSans[-.M]*", "DejaVuSerif[-.]*", "STIXGeneral*", "cm[brt]*", "cmss*")
# The number of values of each factor; hair styles are short, long and fringe, mouths turn down, flat and up.
FACE_FACTORS = dict(hair_colour=4, hair_style=3, skin=4, glasses=2, smile=3, beard=2, background=8, pose=5)
FACE_ATTRIBUTES = ("black_hair", "brown_hair", "blond_hair", "grey_hair", "dark_skin", "glasses", "smiling", "beard")
FACE_PALETTES = {  # hair in the order of the attributes, skin from pale to dark, backgrounds the corners of a cube
    "hair_colour": torch.tensor([[0.07, 0.06, 0.08], [0.46, 0.20, 0.07], [0.93, 0.78, 0.35], [0.66, 0.67, 0.70]]),
    "skin": torch.tensor([[0.98, 0.84, 0.74], [0.88, 0.67, 0.50], [0.63, 0.43, 0.29], [0.40, 0.27, 0.19]]),
    "background": torch.cartesian_prod(*torch.tensor([[0.25, 0.85]] * 3)),
}
FACE_ELLIPSE = (0.75, 0.9)  # half-axes, in half-images, of the centred ellipse outside which all is background


def _uniform(rng, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=rng)


def _smooth_field(rng, n, channels, cells, size):
    """Random fields [n, channels, size, size], about -1 to 1, interpolated from a lattice of cells x cells."""
    return F.interpolate(_uniform(rng, -1, 1, n, channels, cells, cells), size, mode="bicubic", align_corners=True)


def _local_grid(rng, n, size, shift, turn, scale):
    """Pixel coordinates x, y [n, size, size] in the frames of randomly shifted, rotated and scaled objects."""
    dx, dy, angle = torch.tensor([shift, shift, turn]).view(3, 1, 1, 1) * _uniform(rng, -1, 1, 3, n, 1, 1)
    cos, sin = torch.stack([angle.cos(), angle.sin()]) / _uniform(rng, *scale, n, 1, 1)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = axis - dx, axis[:, None] - dy
    return x * cos + y * sin, y * cos - x * sin


def _ellipse(x, y, a, b):
    return (torch.hypot(x / a, y / b) - 1) * min(a, b)


def _paint(canvas, colour, distance, shown=1):
    """Lay colour on canvas [n, 3, h, w], in place, where distance [n, h, w] is negative and shown is 1."""
    cover = shown * (0.5 - distance * canvas.shape[-1] / 2.5).clamp(0, 1)
    canvas.lerp_(torch.as_tensor(colour).expand_as(canvas), cover[:, None])


def _draw_in_chunks(draw, n, seed, chunk=250):
    rng = torch.Generator().manual_seed(seed)
    images, labels = zip(*(draw(rng, min(chunk, n - start)) for start in range(0, n, chunk)))
    return (torch.cat(images).clamp(0, 1) * 255).round().to(torch.uint8), torch.cat(labels)


def synthetic_objects(n, seed=0):
    """Coloured shapes on textured grounds, a stand-in for CIFAR-10: images uint8 [n, 3, 32, 32], labels int64 [n].

    Labels index OBJECT_SHAPES. Position, size, rotation, colours, gratings, texture and noise vary independently.
    """
    def draw(rng, n):
        labels = torch.randint(len(OBJECT_SHAPES), (n,), generator=rng)
        x, y = _local_grid(rng, n, 32, 0.35, math.pi, (0.45, 0.8))
        point = x, y, torch.hypot(x, y), torch.maximum(x.abs(), y.abs())
        distance = torch.stack([shape(*point) for shape in OBJECT_SHAPES.values()], 1)[torch.arange(n), labels]
        waves = _local_grid(rng, 2 * n, 32, 1, math.pi, (0.05, 0.3))[0].sin()[:, None]
        texture = _uniform(rng, -0.15, 0.15, 2 * n, 3, 1, 1) * waves + 0.25 * _smooth_field(rng, 2 * n, 3, 5, 32)
        ground = torch.rand(n, 3, 1, 1, generator=rng)
        canvas, front = ground + texture[:n], (ground + _uniform(rng, 0.3, 0.7, n, 3, 1, 1)) % 1 + 0.6 * texture[n:]
        _paint(canvas, front, distance)
        return canvas + 0.04 * torch.randn(canvas.shape, generator=rng), labels
    return _draw_in_chunks(draw, n, seed)


def synthetic_digits(n, seed=0):
    """Printed digits, white on black, a stand-in for MNIST: images uint8 [n, 1, 28, 28], labels int64 [n].

    The fonts are the text ones that matplotlib ships; each digit goes through a random affine map and a smooth warp.
    """
    from matplotlib import ft2font, get_data_path
    paths = [path for name in DIGIT_FONTS for path in sorted(Path(get_data_path(), "fonts", "ttf").glob(name))]
    glyphs = torch.zeros(len(paths), 10, 1, 56, 56)
    for i, path in enumerate(paths):
        font = ft2font.FT2Font(str(path))
        font.set_size(50, 72)
        for digit in range(10):
            font.set_text(str(digit))
            font.draw_glyphs_to_bitmap()
            ink = torch.tensor(font.get_image()) / 255
            rows, columns = (slice((56 - side) // 2, (56 + side) // 2) for side in ink.shape)
            glyphs[i, digit, 0, rows, columns] = ink

    def draw(rng, n):
        labels = torch.randint(10, (n,), generator=rng)
        ink = glyphs[torch.randint(len(paths), (n,), generator=rng), labels]
        (angle, shear, dx, dy), (wide, tall) = _uniform(rng, -0.25, 0.25, 4, n), _uniform(rng, 0.9, 1.4, 2, n)
        affine = wide * angle.cos(), shear - tall * angle.sin(), dx, wide * angle.sin(), tall * angle.cos(), dy
        grid = F.affine_grid(torch.stack(affine, 1).view(n, 2, 3), ink.shape, align_corners=False)
        grid += 0.1 * _smooth_field(rng, n, 2, 4, 56).permute(0, 2, 3, 1)
        return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2), labels
    return _draw_in_chunks(draw, n, seed)


def synthetic_faces(n, seed=0):
    """Cartoon faces with known, independent, uniform factors, a stand-in for CelebA.

    Returns images uint8 [n, 3, 64, 64], attributes uint8 [n, len(FACE_ATTRIBUTES)] and factors, a dict from each name
    in FACE_FACTORS to int64 [n]. Light, hues, texture and the head's size, tilt and place vary too, continuously.
    """
    def draw(rng, n):
        codes = torch.stack([torch.randint(k, (n,), generator=rng) for k in FACE_FACTORS.values()], 1)
        factor = dict(zip(FACE_FACTORS, codes.T[..., None, None]))
        hair, skin, canvas = (palette[factor[name]].view(n, 3, 1, 1) + _uniform(rng, -0.05, 0.05, n, 3, 1, 1)
                              for name, palette in FACE_PALETTES.items())
        hair = hair * (1 + 0.15 * _smooth_field(rng, n, 1, 16, 64))
        canvas = canvas + 0.12 * _smooth_field(rng, n, 3, 2, 64) + 0.1 * _smooth_field(rng, n, 1, 9, 64)
        u, v = _local_grid(rng, n, 64, 0.06, 0.12, (0.9, 1.02))  # in the frame of the head, v downwards
        turn, lift, smile = 0.02 * _uniform(rng, -1, 1, 3, n, 1, 1)
        turn, smile = turn + 0.055 * (factor["pose"] - 2), smile + 0.07 * (factor["smile"] - 1)
        x, y, eye_x, eye_y = u - turn, v + lift, (u - turn).abs() - 0.18, v + lift + 0.03  # in that of the features
        skull, face = torch.hypot(u, v + 0.12) - 0.56, _ellipse(u, v - 0.1, 0.47, 0.58)
        hairline = torch.where(factor["hair_style"] == 2, v + 0.2, v + 0.42 - 0.5 * (x - 0.1).abs())
        beard = torch.maximum(face - 0.02, torch.maximum(0.3 - 0.9 * x ** 2 - y, -_ellipse(x, y - 0.38, 0.22, 0.11)))
        lips = torch.maximum((y - 0.38 + smile * (60 * x ** 2 - 0.5)).abs() - 0.03, x.abs() - 0.17)
        bridge = torch.maximum(eye_y.abs(), x.abs() - 0.03)
        _paint(canvas, hair, _ellipse(u, v - 0.05, 0.62, 0.68), factor["hair_style"] == 1)
        _paint(canvas, hair, torch.maximum(skull, v))
        _paint(canvas, skin, face)
        _paint(canvas, hair, torch.maximum(skull, hairline))
        _paint(canvas, hair, beard, factor["beard"])
        _paint(canvas, 0.95, _ellipse(eye_x, eye_y, 0.085, 0.06))
        _paint(canvas, 0.15, _ellipse(eye_x, eye_y, 0.045, 0.05))
        _paint(canvas, 0.7 * skin, _ellipse(x - 0.4 * turn, y - 0.15, 0.05, 0.08))
        _paint(canvas, torch.tensor([0.75, 0.2, 0.25]).view(3, 1, 1), lips)
        glasses = torch.minimum(_ellipse(eye_x, eye_y, 0.14, 0.12).abs(), bridge) - 0.02
        _paint(canvas, torch.rand(n, 3, 1, 1, generator=rng), glasses, factor["glasses"])
        return canvas * _uniform(rng, 0.6, 1.15, n, 1, 1, 1) + 0.02 * torch.randn(canvas.shape, generator=rng), codes
    images, codes = _draw_in_chunks(draw, n, seed)
    hair, _, skin, glasses, smile, beard, *_ = codes.T
    attributes = torch.stack([*F.one_hot(hair, 4).T, skin >= 2, glasses, smile == 2, beard], 1).to(torch.uint8)
    return images, attributes, dict(zip(FACE_FACTORS, codes.T))


# ======================================================================================================================
# 5. Running a grid
# ======================================================================================================================
# A figure is a grid of cells; a cell is one training run, a dict of what sets it apart ({"n": 300, "beta": 0.1, ...}).
# Finished cells are lines of <out>/<figure>-<scale>.jsonl and are never run again.

class UsageError(Exception):
    """Something the user can mend: scripts print it as one line on stderr and exit with status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        _exit_with(f"{message} (see python {self.prog} --help)")


def parse_args(doc, datasets, seeds, extra=None, argv=None):
    """Read the command line that all figure scripts share.

    doc: the script's docstring, for --help. datasets: {scale: names}, the first the default. seeds: {scale: list}.
    extra: {flag: keywords of add_argument}, the script's own. argv: instead of sys.argv[1:].
    Returns a namespace: figure, scale, dataset, data_dir, out, seeds, jobs, shard ((i, n) or None), plot_only, devices
    (list of torch devices). Bad values: one line on stderr, exit status 2.
    """
    def checked(convert, valid, wanted):
        def parse(text):
            try:
                value = convert(text)
                if valid(value):
                    return value
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return parse

    gpus = checked(lambda t: [int(v) for v in t.split(",")], lambda v: min(v) >= 0, "a GPU index such as 0, or 0,1")
    shard = checked(lambda t: tuple(int(v) for v in t.split("/")), lambda v: len(v) == 2 and 1 <= v[0] <= v[1],
                    "I/N with I from 1 to N")
    parser = _Parser(prog=Path(sys.argv[0]).name, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpu", type=gpus, metavar="0", help="index of the GPU to use, or several: 0,1. Default: the first, if any")
    add("--scale", choices=list(datasets), help="demo: synthetic data, under two minutes; cpu: real data, reduced; "
        "paper: the paper's sizes. Default: paper on a GPU, cpu without")
    add("--dataset", help="the data, where a scale has a choice: " + "; ".join(
        f"{scale}: {' or '.join(names)}" for scale, names in datasets.items()))
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie or are downloaded to (data)")
    add("--out", type=Path, default=Path("results"), help="where rows and plots go, and are looked for (results)")
    add("--seeds", type=checked(int, lambda v: 0 <= v < 2**63, "a whole number from 0 up"), nargs="+", metavar="0",
        help="run every cell once for each of these seeds")
    add("--jobs", type=checked(int, lambda v: v > 0, "a whole number from 1 up"), metavar="K",
        help="cells trained at once, in processes, each on one CPU thread. Default: one a GPU, or one a CPU core")
    add("--shard", type=shard, metavar="I/N", help="run every N-th cell only, into a file of its own: for job arrays")
    add("--plot-only", action="store_true", help="draw from the rows there are, train nothing")
    for flag, keywords in (extra or {}).items():
        add(flag, **keywords)
    args = parser.parse_args(argv)
    args.devices = _devices(args.gpu)
    on_cpu = args.devices[0].type == "cpu"
    args.scale = args.scale or ("cpu" if on_cpu else "paper")
    args.dataset = args.dataset or datasets[args.scale][0]
    if args.dataset not in datasets[args.scale]:
        parser.error(f"argument --dataset: {args.dataset!r} does not go with --scale {args.scale}: "
                     f"choose {' or '.join(datasets[args.scale])}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    args.jobs = args.jobs or (cores if on_cpu else len(args.devices))
    args.seeds = list(dict.fromkeys(args.seeds or seeds[args.scale]))
    args.figure = Path(sys.argv[0]).stem
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show β still shows the rest
    return args


def _devices(gpus):
    """The torch devices of --gpu: the CPU, with a warning, where a wanted GPU cannot be used."""
    if gpus is None:
        gpus = [0] if torch.cuda.is_available() else []
    devices = []
    for index in gpus:
        try:
            torch.zeros(1, device=f"cuda:{index}")
            devices.append(torch.device(f"cuda:{index}"))
        except Exception:  # no driver, no such index, an unusable card: torch raises another type for each
            print(f"warning: --gpu {index} is not usable on this machine, going on without it", file=sys.stderr)
    return devices or [torch.device("cpu")]


def _exit_with(error):
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run_grid(cells, train_cell, args, prepare=None):
    """Train every cell that has no row yet, once for each seed, and return all rows there are.

    cells: list of dicts. train_cell(cell, device, args, progress) returns what was measured as a dict; where a value of
    the cell is a list, a list of dicts, a row for each element. It sees the cell with "seed" added and calls
    progress(step, steps, loss) now and then; FloatingPointError, which progress raises for a loss that is not finite,
    is recorded as status "diverged". prepare(args) is called once before the first cell, to load the data.

    A finished cell is appended at once, in one write, to <out>/<figure>-<scale>.jsonl (--shard: to a file of its own),
    so that a crash loses the cells in flight and nothing else. A cell on the CPU runs on one thread, whatever --jobs:
    its numbers stay the same. Ctrl-C: exit status 130. What the user can mend, a full disk say: one line, status 2.
    """
    try:
        rows = _run_missing_cells(cells, train_cell, args, prepare)
        if not rows:
            raise UsageError(f"no rows of {args.figure} at --scale {args.scale} with --dataset {args.dataset} in "
                             f"{args.out}: run without --plot-only first")
        if all(row["status"] == "diverged" for row in rows):
            raise UsageError(f"all {len(rows)} rows in {args.out} diverged: there is nothing to draw")
        return rows
    except (UsageError, OSError) as error:
        _exit_with(error)
    except KeyboardInterrupt:
        print(f"\nstopped: finished cells are safe in {args.out}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def _run_missing_cells(cells, train_cell, args, prepare):
    cells = [cell | {"seed": seed} for seed in args.seeds for cell in cells]
    names = sorted({name for cell in cells for name in cell})
    if args.shard:
        cells = cells[args.shard[0] - 1::args.shard[1]]

    def key(row):
        return json.dumps([row.get(name) for name in names])

    def rows_by_key():  # of rows that stand twice, one counts
        return {key(row): row for row in read_rows(args)}

    rows = rows_by_key()
    todo = [cell for cell in cells if not all(key(row) in rows for row in _rows_of(cell))]
    devices = ", ".join(map(_device_name, args.devices))
    print(f"{args.figure}: device {devices}, scale {args.scale}, data {args.dataset}, {len(cells)} cells, "
          f"{len(cells) - len(todo)} done", flush=True)
    if args.plot_only or not todo:
        print("redrawing" + ("" if args.plot_only else "; to train anew, add --out elsewhere"), flush=True)
        return list(rows.values())
    if prepare:
        prepare(args)
    stem = f"{args.figure}-{args.scale}" + (".{}-of-{}".format(*args.shard) if args.shard else "")
    path = args.out / f"{stem}.jsonl"
    shared = {"figure": args.figure, "scale": args.scale, "dataset": args.dataset, "status": "ok",
              "torch": torch.__version__, "git": _git_revision()}
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with _open_for_rows(path) as file, contextlib.closing(_finished_cells(todo, train_cell, args)) as finished:
        for count, (cell, results, device, seconds) in enumerate(finished, 1):
            new = [shared | {"seconds": round(seconds / len(results), 1), "device": device} | row | result
                   for row, result in zip(_rows_of(cell), results)]
            data = "".join(json.dumps(row) + "\n" for row in new).encode()
            if file.write(data) != len(data):
                raise OSError(f"{path}: only part of a row could be written, is the disk full?")
            os.fsync(file.fileno())
            _print_row(cell, new[-1], count, len(todo), time.monotonic() - started)
    return list(rows_by_key().values())


def read_rows(args):
    """All finished rows of this figure, scale and data set, those of shards included; torn lines draw a warning."""
    rows = []
    stem = f"{args.figure}-{args.scale}"
    for path in sorted([*args.out.glob(f"{stem}.jsonl"), *args.out.glob(f"{stem}.*-of-*.jsonl")]):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line if line.endswith("\n") else "torn")
                rows += [row] if row["dataset"] == args.dataset else []
            except (ValueError, KeyError, TypeError):
                print(f"warning: {path}: line {number} is torn, its cell counts as not run", file=sys.stderr)
    return rows


def _rows_of(cell):
    """The rows that a cell stands for: one for each element of the values that are lists."""
    names = [name for name, value in cell.items() if isinstance(value, list)]
    return [cell | dict(zip(names, values)) for values in zip(*(cell[name] for name in names))] if names else [cell]


def _open_for_rows(path):
    """Open for appending by this run alone, less a last line that a crash left unfinished."""
    file = open(path, "ab", buffering=0)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing {path}: wait for it, or give each its --shard or --out") from None
    if path.is_file():
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _finished_cells(todo, train_cell, args):
    """Yield (cell, list of results, device name, seconds) as cells finish, in this process or in args.jobs of them."""
    tasks = [(train_cell, cell, args.devices[i % len(args.devices)], args) for i, cell in enumerate(todo)]
    if min(args.jobs, len(todo)) == 1:
        _set_up_process()
        yield from (_run_cell(*task) for task in tasks)
        return
    pool = futures.ProcessPoolExecutor(min(args.jobs, len(todo)), multiprocessing.get_context("spawn"), _set_up_worker)
    try:
        for future in futures.as_completed([pool.submit(_run_cell, *task) for task in tasks]):
            yield future.result()
    except futures.BrokenExecutor:
        raise UsageError("a worker process was killed, for want of memory perhaps: try fewer --jobs") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _run_cell(train_cell, cell, device, args):
    def progress(step, steps, loss):
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {step}")
        if sys.stdout.isatty():
            print(f"\r\033[K{_describe(cell)}: step {step}/{steps}, loss {loss:.3f}\r", end="", flush=True)

    started = time.monotonic()
    try:
        results = train_cell(cell, device, args, progress)
        results = results if isinstance(results, list) else [results]
        if not all(math.isfinite(v) for result in results for v in result.values() if isinstance(v, float)):
            raise FloatingPointError("a result is not finite")
    except FloatingPointError:
        results = [{"status": "diverged"}] * len(_rows_of(cell))
    return cell, results, _device_name(device), time.monotonic() - started


def _set_up_process():
    """One thread and kernels that repeat (same seed, same numbers), and memory that is kept between steps."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.suppress(OSError, AttributeError):  # glibc gives buffers back: page faults, a third of a step
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _set_up_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no orphans if it is killed
    _set_up_process()


def _device_name(device):
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _git_revision():
    """Commit of this folder, with -dirty where its Python files differ from it; "unknown" where there is none."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _describe(cell):
    return " ".join(f"{name}={value}" for name, value in cell.items() if not isinstance(value, list))


def _print_row(cell, row, count, total, elapsed):
    """One line of the progress table: the cell, what was measured, time gone and time to go."""
    measured = [k for k in row if row[k] is not None and (k.endswith("acc") or k in ("cross_entropy", "information"))]
    values = " ".join(f"{k} {row[k]:<8.4g}" for k in measured) if row["status"] == "ok" else row["status"]
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{clear}{count:4d}/{total} {_describe(cell):<52} {values} {elapsed / 60:.1f} min, "
          f"{elapsed / 60 / count * (total - count):.1f} to go", flush=True)


def minibatches(n, batch, device):
    """Indices of shuffled epochs without end; the tail of an epoch too short for a batch is dropped."""
    batch = min(n, batch)
    while True:
        yield from torch.randperm(n, device=device)[:n - n % batch].split(batch)


def annealed(t):
    """Factor of the learning rate when the share t of the steps is gone: up over 10%, held to 80%, to 0 by a cosine."""
    return min(1, t / 0.1 + 0.001) if t < 0.8 else 0.5 + 0.5 * math.cos(math.pi * (t - 0.8) / 0.2)


def summarise(rows, x, y, **where):
    """[(x, mean, spread, count), ...] of key y over the finished rows that fit, by ascending x; spread: sample std."""
    groups = {}
    for row in rows:
        if row["status"] == "ok" and all(row.get(name) == value for name, value in where.items()):
            groups.setdefault(row[x], []).append(row[y])
    return [(key, float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v))
            for key, v in sorted(groups.items())]


def crossing(points, level):
    """First x at which a curve [(x, y, ...), ...] falls through the level, linear in log x; nan if it does not."""
    for (x0, y0, *_), (x1, y1, *_) in zip(points, points[1:]):
        if y0 >= level > y1:
            return x0 * (x1 / x0) ** ((y0 - level) / (y0 - y1))
    return math.nan


def per_seed(function, rows):
    """function of the rows of each seed, stacked in an array."""
    seeds = sorted({row["seed"] for row in rows})
    return np.array([function([row for row in rows if row["seed"] == seed]) for seed in seeds])


def complete_seeds(rows, cells):
    """The finished rows of the seeds in which none of these cells (dicts) is missing; others are left out of claims."""
    names = sorted({name for cell in cells for name in cell})
    wanted, have = {tuple(cell.get(name) for name in names) for cell in cells}, {}
    rows = [row for row in rows if row["status"] == "ok"]
    keys = [tuple(row.get(name) for name in names) for row in rows]
    for row, key in zip(rows, keys):
        have.setdefault(row["seed"], set()).add(key)
    return [row for row, key in zip(rows, keys) if key in wanted and have[row["seed"]] >= wanted]


def new_figure(rows, columns, title):
    """A figure in the house style and its axes (rows, columns): drawn to files, never to a window."""
    import matplotlib.pyplot as plt
    plt.switch_backend("agg")
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "font.size": 9, "axes.titlesize": 10,
                         "legend.fontsize": 7})
    size = 4.3 * columns, 4.0 * rows + 0.4
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    fig.suptitle(title)
    return fig, axes


def plot_points(ax, points, fmt="o-", **style):
    """Draw what summarise returns: means, with the seeds' spread as error bars."""
    if points:
        x, mean, spread, _ = zip(*points)
        ax.errorbar(x, mean, spread, fmt=fmt, ms=4, capsize=2, lw=1.2, **style)


def save_figure(fig, args):
    """Write <out>/<figure>-<scale>.png (150 dpi) and .pdf, each in one step."""
    try:
        for ending in ("png", "pdf"):
            path = args.out / f"{args.figure}-{args.scale}.{ending}"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            fig.savefig(temporary, dpi=150, format=ending)
            fig.set_layout_engine("none")  # the layout stands: finding it is half of the time
            os.replace(temporary, path)
    except OSError as error:
        _exit_with(error)
    print(f"plot: {path.with_suffix('.png')} and .pdf", flush=True)


def claim(sentence, paper, values, test, form="{:.3g}", complete=True):
    """A row of the claims table: (sentence, the paper's value, ours, "yes", "NO" or "not measured").

    values: {what: numbers, one a seed}, shown by form as mean ± spread; test(all of them) decides. A number that is
    not finite fails the claim; without values, or with complete=False (cells are missing), it is not decided.
    """
    numbers = np.array([x for v in values.values() for x in v])
    ours = [f"{what} {form.format(np.mean(v))}" + (f" ± {form.format(np.std(v, ddof=1))}" if len(v) > 1 else "")
            for what, v in values.items() if len(v)]
    if complete and len(ours) == len(values) > 0:
        return sentence, paper, "; ".join(ours), "yes" if np.isfinite(numbers).all() and test(numbers) else "NO"
    return sentence, paper, "; ".join(ours), "not measured"


def print_claims(claims):
    """Print the rows that claim returns as a table."""
    for row in [("claim", "paper", "ours", "holds?"), ("---",) * 4, *claims]:
        print("|", " | ".join(row), "|")
