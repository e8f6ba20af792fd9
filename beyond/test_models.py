"""Layers in models of all kinds: conversion and its warning, precision, compilation."""
import argparse
import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn as nn
import torchvision
from torch.nn.utils import parametrizations, prune

import common
from common import (StochasticLinear, ib_loss, mean_network, sample_weights, sampled_network,
                    to_stochastic, weight_information, with_information)
from test_common import BOTH, KINDS, LOCAL, naive_kl, noisy_net, plain_layer, small_net


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_log_sigma2_beyond_its_largest_value_can_come_back():
    beyond = torch.tensor(30.0, requires_grad=True)
    common._CappedExp.apply(beyond, 0.5).backward()
    assert beyond.grad.item() == pytest.approx(0.5 * math.exp(0.5 * common.MAX_LOG_SIGMA2))


def test_derivatives_beyond_the_largest_log_sigma2_are_the_same_by_either_way():
    layer = StochasticLinear(2, 2, dtype=torch.double)
    layer.weight.data.fill_(1e5)
    layer.log_sigma2.data.fill_(24.0)
    slopes = [torch.autograd.grad(layer.information(), [layer.weight, layer.log_sigma2],
                                  create_graph=twice) for twice in (False, True)]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("twice", [False, True])
def test_a_variance_of_0_that_was_rounded_to_less_is_0(twice):
    variance = torch.tensor([-1e-5, 0.0, 1.0], requires_grad=True)
    y = common._GaussianNoise.apply(torch.ones(3), variance)
    slope, = torch.autograd.grad(y.sum(), variance, create_graph=twice)
    assert y[:2].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert slope.isfinite().all()


@BOTH
@LOCAL
def test_a_step_compiles_whole(noise, local):
    model = to_stochastic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),
                                        nn.Linear(4 * 36, 5)), noise=noise, local=local)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, y):
        return ib_loss(model(x), y, model, 1.0, 100)

    loss, _, nats = compiled(torch.randn(4, 3, 8, 8), torch.arange(4))
    loss.backward()
    assert nats.item() == pytest.approx(weight_information(model).item(), rel=1e-5)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@BOTH
@LOCAL
def test_under_bfloat16_autocast_the_information_is_float32(noise, local):
    model = to_stochastic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)),
                          noise=noise, local=local)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(4, 3, 8, 8))
        loss, _, nats = ib_loss(logits, torch.arange(4), model, 1.0, 100)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert nats.item() == pytest.approx(weight_information(model).item(), rel=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.double])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_other_dtypes_train_under_a_cap(dtype, kind):
    layer, x = plain_layer(kind)
    layer = to_stochastic(layer.to(dtype), local=False, max_log_alpha=0.0)
    y = layer(x.to(dtype))
    y.sum().backward()
    assert y.dtype == layer.log_sigma2.grad.dtype == sampled_network(layer).weight.dtype == dtype
    assert layer.log_sigma2.grad.any()


def test_information_of_a_bfloat16_layer():
    layer = StochasticLinear(30, 20, log_alpha=-2.0)
    nats = layer.information().item()
    assert layer.bfloat16().information().dtype == torch.float32
    assert layer.information().item() == pytest.approx(nats, rel=0.05)


def test_denormals_are_flushed():
    assert (torch.tensor([1e-39]) * torch.tensor([0.5])).item() == 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models_convert_with_equal_outputs(name, recwarn):
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, keys = model(x), set(model.state_dict())
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert to_stochastic(model) is model
        assert torch.equal(model(x), before)
        with sample_weights(model):
            assert not torch.equal(model(x), before)
    assert not [w for w in recwarn if "noise" in str(w.message)]
    assert keys < set(model.state_dict())
    nats = sum(m.information().item() for m in layers)
    assert weight_information(model).item() == pytest.approx(nats, rel=1e-5)
    ib_loss(model.train()(x), torch.tensor([1, 2]), model, 1.0, 100)[0].backward()
    assert all(m.log_sigma2.grad.abs().sum() > 0 for m in layers)


def test_linear_layers_are_local_and_convolutions_are_not():
    model = to_stochastic(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1)))
    assert [m.local for m in model] == [True, False, False]


def test_converting_twice_changes_nothing():
    model = to_stochastic(nn.Linear(2, 2), log_alpha=-3.0)
    before = copy.deepcopy(model.state_dict())
    assert to_stochastic(model) is model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_tied_to_converted_ones_share_their_noise():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    to_stochastic(model[0], log_alpha=-3.0)
    to_stochastic(model)
    assert model[1].log_sigma2 is model[0].log_sigma2
    torch.testing.assert_close(model[1].log_alpha, torch.full((3, 3), -3.0))


def test_weights_tied_to_an_embedding_are_counted(recwarn):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    model[1].weight = model[0].weight
    to_stochastic(model)
    assert not [w for w in recwarn if "counted" in str(w.message)]


def test_a_layer_held_twice_stays_one():
    shared = nn.Linear(3, 3)
    model = to_stochastic(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert len(list(model.parameters())) == 3


def test_a_layer_is_skipped_under_each_of_its_names():
    shared = nn.Linear(2, 2)
    model = to_stochastic(nn.ModuleDict(dict(a=shared, b=shared, c=nn.Linear(2, 2))), skip="b")
    assert type(shared) is nn.Linear
    assert type(model["c"]) is StochasticLinear


def test_skip_silences_one_name_of_several():
    model = nn.Sequential(nn.MultiheadAttention(10, 2), nn.Linear(5, 20))
    with pytest.warns(UserWarning, match=r"counted .*: 0.out_proj.weight$"):
        to_stochastic(model, skip="0.in_proj_weight")


def test_a_zero_among_weights_starts_with_noise_of_the_others():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, 3.0]])
    to_stochastic(layer, log_alpha=-6.0)
    expected = torch.tensor([[-6 + math.log(9 / 2), -6 + math.log(9)]])
    torch.testing.assert_close(layer.log_sigma2.data, expected)


def test_weight_information_under_functional_call():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = to_stochastic(nn.Linear(20, 20))

        def forward(self):
            return weight_information(self.model)

    counted = Counted()
    held = {name: 2 * p.detach() for name, p in counted.named_parameters()}  # no Parameters
    nats = torch.func.functional_call(counted, held, ())
    assert nats.item() == pytest.approx(naive_kl(held["model.weight"], held["model.log_sigma2"])
                                        .item(), rel=1e-4)


def test_ib_loss_takes_classes_of_pixels_and_small_integers():
    model, logits = to_stochastic(nn.Linear(5, 4)), torch.randn(7, 4, 3, 2)
    target = torch.randint(4, (7, 3, 2))
    expected = -logits.log_softmax(1).gather(1, target[:, None]).mean().item()
    for target in (target, target.to(torch.uint8)):
        assert ib_loss(logits, target, model, 0.0, 7)[1].item() == pytest.approx(expected)


def test_on_a_gpu_with_information_is_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda both, args: (both, args))
    batch = argparse.Namespace(device=torch.device("cuda"), clone=lambda: "copy")
    net = to_stochastic(nn.Linear(2, 2))
    both, args = with_information(net, batch)
    assert args == ("copy",)  # a graph overwrites its input
    assert both.model is net
    assert isinstance(with_information(net, batch, lambda net: 0), nn.Module)  # may be no graph


@KINDS
@BOTH
@LOCAL
@pytest.mark.parametrize("log_alpha, scale", [(-100.0, 0.0), (-100.0, 1.0), (100.0, 1.0)])
def test_values_and_gradients_are_finite(kind, noise, local, log_alpha, scale):
    plain, x = plain_layer(kind)
    layer = to_stochastic(plain, noise=noise, local=local, log_alpha=log_alpha)
    with torch.no_grad():
        layer.weight.view(-1)[0] = 0
    x = (scale * x).requires_grad_()
    (layer(x).square().mean() + layer.information()).backward()
    assert layer.information().isfinite()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("make", [sampled_network, mean_network])
def test_copies_keep_the_modes_of_layers(make):
    model = noisy_net().train()
    model[1].eval()
    assert [m.training for m in make(model)] == [True, False, True, True]


@pytest.mark.parametrize("make", [copy.deepcopy, sampled_network, mean_network])
def test_copies_of_a_compiled_layer_have_weights_of_their_own(make):
    layer, x = StochasticLinear(4, 3).eval(), torch.randn(2, 4)
    layer.compile(backend="eager")
    other = make(layer)
    other.weight.data.zero_()
    torch.testing.assert_close(other(x), layer.bias.expand(2, 3))


class Doubled(StochasticLinear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("make", [sampled_network, mean_network])
@pytest.mark.parametrize("layer", [Doubled(4, 3), parametrizations.weight_norm(
    StochasticLinear(4, 3))], ids=["subclass", "parametrised"])
def test_layers_that_no_plain_layer_can_stand_for_are_refused(make, layer):
    with pytest.raises(TypeError, match="no plain layer has"):
        make(nn.Sequential(layer))


@pytest.mark.parametrize("make", [sampled_network, mean_network])
def test_a_subclass_with_the_forward_of_its_layer_becomes_that_layer(make):
    assert type(make(type("Named", (StochasticLinear,), {})(4, 3))) is nn.Linear


@pytest.mark.parametrize("skip, plain", [("0", [0]), (["1", "2"], [1, 2]), ("1.0.weight", [1]),
                                         (("0.weight", "2"), [0, 2])])
def test_skipped_layers_blocks_and_weights_stay_plain(skip, plain):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    to_stochastic(model, skip=skip)
    layers = model[0], model[1][0], model[2]
    assert [i for i, layer in enumerate(layers) if type(layer) is nn.Linear] == plain


def test_unknown_names_and_noise_are_refused():
    with pytest.raises(ValueError, match="classifier"):
        to_stochastic(nn.Linear(2, 2), skip="classifier")
    with pytest.raises(ValueError, match="uniform"):
        to_stochastic(nn.Linear(2, 2), noise="uniform")


@pytest.mark.parametrize("skip", ["0", "0.weight"])
@pytest.mark.parametrize("first", [nn.Linear(4, 4), nn.Embedding(4, 4)])
def test_a_skipped_weight_is_plain_in_every_layer_that_shares_it(skip, first, recwarn):
    model = nn.Sequential(first, nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    to_stochastic(model, skip=skip)
    assert [type(m) for m in model[1:]] == [nn.Linear, StochasticLinear]
    assert not [w for w in recwarn if "noise" in str(w.message)]


def test_weights_tied_after_conversion_are_to_be_converted_again():
    model = to_stochastic(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), log_alpha=-3.0)
    model[1].weight = model[0].weight
    model[1].log_alpha = 0.0
    with pytest.raises(ValueError, match="tied"):
        weight_information(model)
    nats = model[0].information().item()
    assert weight_information(to_stochastic(model)).item() == pytest.approx(nats)


class Subclass(nn.Linear):
    pass


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(10, 30),
                             torch.ao.nn.quantized.dynamic.Linear(30, 20),
                             torch.ao.nn.quantized.dynamic.Linear(20, 10))


PLAIN = {  # layer: what holds its weights, how many they are
    "MultiheadAttention": (lambda: nn.MultiheadAttention(10, 2),
                           ["0.in_proj_weight", "0.out_proj.weight"], 400),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 5, 3), ["0.weight"], 90),
    "LSTM": (lambda: nn.LSTM(3, 5), ["0.weight_ih_l0", "0.weight_hh_l0"], 160),
    "Embedding": (lambda: nn.Embedding(10, 4), ["0.weight"], 40),
    "subclass": (lambda: Subclass(5, 8), ["0.weight"], 40),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(5, 8)), [
        "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"], 48),
    "hooked": (lambda: torch.nn.utils.spectral_norm(nn.Linear(5, 8)), ["0.weight_orig"], 40),
    "lazy": (lambda: nn.LazyLinear(8), ["0.weight"], 0),
    "quantised": (quantised, ["0.0.weight", "0.1.weight", "0.2.weight"], 1100),
    "quantised, recurrent": (lambda: torch.ao.nn.quantized.dynamic.GRUCell(4, 5),
                             ["0.weight_ih", "0.weight_hh"], 135),
    "scripted": (lambda: torch.jit.script(nn.Linear(5, 8)), ["0.weight"], 40),
    "complex": (lambda: nn.Linear(5, 8, dtype=torch.cfloat), ["0.weight"], 40),
}


@pytest.mark.filterwarnings("ignore:.*(quant|LazyModule|lazy|script)")
@pytest.mark.parametrize("kind", PLAIN)
def test_one_warning_names_the_plain_weights_and_their_share(kind):
    make, names, count = PLAIN[kind]
    with pytest.warns(UserWarning) as caught:
        to_stochastic(nn.Sequential(make(), nn.Linear(5, 20), nn.LayerNorm(20)))
    message, = (str(w.message) for w in caught if "skip=" in str(w.message))
    assert message.startswith(f"{count / (count + 100):.1%} of the weights")
    assert message.endswith(": " + ", ".join(names))


@pytest.mark.filterwarnings("ignore:.*(quant|LazyModule|lazy|script)")
@pytest.mark.parametrize("kind", PLAIN)
def test_skip_silences_the_warning(kind, recwarn):
    to_stochastic(nn.Sequential(PLAIN[kind][0](), nn.Linear(5, 20)), skip="0")
    assert not [w for w in recwarn if "skip=" in str(w.message)]


@pytest.mark.parametrize("rename", [
    parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", amount=0.5)])
def test_weights_with_noise_are_not_called_plain_by_another_name(rename, recwarn):
    to_stochastic(nn.Sequential(rename(StochasticLinear(4, 3)), nn.Linear(3, 2)))
    assert not [w for w in recwarn if "noise" in str(w.message)]


def test_a_checkpoint_gives_the_same_net():
    model, x = to_stochastic(small_net(), log_alpha=-2.0), torch.randn(2, 1, 6, 6)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    twin = to_stochastic(small_net())
    twin.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(twin[0].log_sigma2, model[0].log_sigma2)


def test_weight_information_is_that_of_all_layers_however_held():
    model = to_stochastic(nn.Sequential(*(nn.Linear(20, 20) for _ in range(4))))
    nats = sum(naive_kl(m.weight, m.log_sigma2).item() for m in model)
    assert weight_information(model).item() == pytest.approx(nats, rel=1e-4)
    for layer in model:  # weights are new tensors whenever they are looked up
        parametrizations.weight_norm(layer)
    assert weight_information(model).item() == pytest.approx(nats, rel=1e-4)


def test_a_checkpoint_keeps_the_cap_to_the_last_digit():
    twin = StochasticLinear(4, 3)
    twin.load_state_dict(StochasticLinear(4, 3, max_log_alpha=-0.71).state_dict())
    assert twin.max_log_alpha == -0.71


@torch.no_grad()
def test_noise_is_drawn_in_the_encoder_of_torch_in_eval():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True).eval()
    model, x = to_stochastic(layer, skip="self_attn", log_alpha=0.0), torch.randn(2, 3, 8)
    assert torch.equal(model(x), model(x))
    with sample_weights(model):
        assert not torch.allclose(model(x), model(x))
    assert torch.backends.mha.get_fastpath_enabled()


def test_after_to_empty_a_plain_checkpoint_starts_with_noise_of_the_start():
    with torch.device("meta"):
        layer = StochasticLinear(50, 40, log_alpha=-3.0)
    layer.to_empty(device="cpu").load_state_dict(nn.Linear(50, 40).state_dict())
    torch.testing.assert_close(layer.log_alpha, torch.full((40, 50), -3.0))


def test_a_plain_checkpoint_of_a_head_tied_to_an_embedding_has_noise_of_the_start():
    model = nn.Sequential(nn.Embedding(40, 50), nn.Linear(50, 40, bias=False))
    model[1].weight = model[0].weight
    weight = 0.02 * torch.randn(40, 50)
    to_stochastic(model, log_alpha=-3.0)
    model.load_state_dict({"0.weight": weight, "1.weight": weight})
    torch.testing.assert_close(model[1].log_alpha, torch.full((40, 50), -3.0))


def test_parameters_that_are_reset_have_noise_of_the_start():
    layer = StochasticLinear(20, 30)
    layer.log_sigma2.data.fill_(2.0)
    layer.reset_parameters()
    torch.testing.assert_close(layer.log_alpha, torch.full((30, 20), -6.0))


@pytest.mark.parametrize("option", [dict(noise="normal"), dict(log_alpha=math.nan),
                                    dict(max_log_alpha=math.nan), dict(max_log_alpha=math.inf)])
def test_a_bad_option_leaves_the_model_as_it_was(option):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=next(iter(option))):
        to_stochastic(model, **option)
    assert to_stochastic(model)[0].local


def test_a_conversion_draws_no_random_numbers():
    torch.manual_seed(0)
    to_stochastic(nn.Linear(2, 2))
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(2, 2)
    assert torch.equal(after, torch.rand(1))


def test_a_forward_set_on_a_layer_before_conversion_keeps_it_plain():
    layer = nn.Linear(2, 2)
    layer.forward = layer.forward
    with pytest.warns(UserWarning, match="100.0% .*: 0.weight$"):
        to_stochastic(nn.Sequential(layer))


@pytest.mark.parametrize("make", [sampled_network, mean_network])
def test_copies_that_would_share_a_forward_are_refused(make):
    model = noisy_net()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(TypeError, match="forward of its own"):
        make(model)


def test_checkpoints_whose_caps_were_interpolated_have_none():
    layer = StochasticLinear(2, 2)
    layer.set_extra_state(layer.get_extra_state() - layer.get_extra_state())
    assert layer.max_log_alpha is None


def test_frozen_weights_have_frozen_noise():
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    to_stochastic(layer)
    assert not layer.log_sigma2.requires_grad
    assert to_stochastic(nn.Linear(4, 3)).log_sigma2.requires_grad


def test_statistics_are_kept_if_new_ones_cannot_be_estimated():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    net[0].running_mean.fill_(7.0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):  # by the second layer, when the first has new ones
        common.recalibrate_bn(net, torch.randn(50, 3))
    torch.testing.assert_close(net.state_dict(), before)


def test_batch_norm_may_be_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=x)

    net, x = Net(), 2 + torch.randn(50, 3)
    torch.testing.assert_close(common.recalibrate_bn(net, x).norm.running_mean, x.mean(0))


def test_batch_norm_that_is_not_called_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.auxiliary = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.auxiliary.running_mean.fill_(7.0)

        def forward(self, x):
            return self.norm(x)

    net = common.recalibrate_bn(Net().eval(), torch.randn(50, 3))
    assert net.auxiliary.running_mean.tolist() == [7, 7, 7]
    assert not net.auxiliary.training


def test_logits_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match="should be classes"):
        ib_loss(torch.zeros(4), torch.arange(4), to_stochastic(nn.Linear(2, 2)), 1.0, 4)


def test_batch_norm_statistics_of_rows_sorted_by_class():
    x = torch.cat([torch.randn(1000, 3), 10 + torch.randn(1000, 3)])
    net = common.recalibrate_bn(nn.Sequential(nn.BatchNorm1d(3)), x)
    torch.testing.assert_close(net[0].running_var, x.var(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("layer", [StochasticLinear(50, 30), to_stochastic(nn.Conv2d(3, 4, 3))])
def test_layers_start_at_a_log_alpha_of_minus_6(layer):
    torch.testing.assert_close(layer.log_alpha, torch.full_like(layer.weight, -6.0))


def test_batch_norm_without_running_statistics_is_left():
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    common.recalibrate_bn(net, torch.randn(50, 3))
    assert net[0].running_mean is None


def test_evaluate_takes_labels_of_any_integers():
    model, x, y = noisy_net().eval(), torch.randn(50, 5), torch.randint(3, (50,))
    found = []
    for labels in (y, y.int()):
        torch.manual_seed(7)
        found.append(common.evaluate(model, x, labels, x, labels, 1))
    assert found[0] == found[1]
