"""Layers in models that hold weights in other ways; what goes wrong on a user's machine."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations

import common
from common import (DataError, bn_recalibrated, load_images, load_mnist, pac_bayes_bound, run_grid,
                    to_stochastic, weight_information)

torch.set_num_threads(1)


def test_information_counts_every_layer_however_its_weight_is_held():
    model = to_stochastic(nn.Sequential(*(nn.Linear(20, 20) for _ in range(4))))
    before = weight_information(model).item()
    parameters = dict(model.named_parameters())

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return weight_information(self.model)

    held = {f"model.{name}": p.detach().clone() for name, p in parameters.items()}  # no Parameters
    assert torch.func.functional_call(Counted(), held, ()).item() == before
    for layer in model:  # weights are new tensors whenever they are looked up
        parametrizations.weight_norm(layer)
    for _ in range(5):
        assert abs(weight_information(model).item() / before - 1) < 1e-4

    class Head(nn.Module):  # of a Gaussian likelihood, no layer of ours
        def __init__(self):
            super().__init__()
            self.log_sigma2 = nn.Parameter(torch.zeros(1))

    assert weight_information(nn.Sequential(model, Head())).item() / before > 0.99


def test_a_layer_is_skipped_under_each_of_its_names():
    shared = nn.Linear(2, 2)
    model = to_stochastic(nn.ModuleDict(dict(a=shared, b=shared, c=nn.Linear(2, 2))), skip="b")
    assert not hasattr(shared, "log_sigma2") and hasattr(model["c"], "log_sigma2")


def test_a_seeds_own_cells_stay_apart_when_other_seeds_are_trained(tmp_path):
    cells = [{"beta": 1}, {"beta": 1, "budget": 2, "seed": 0}]
    args = argparse.Namespace(figure="toy", scale="demo", dataset="synthetic", out=tmp_path, jobs=1,
                              shard=(1, 1), device=torch.device("cpu"), plot_only=False)

    def rows(seed):
        args.seeds = [seed]
        return run_grid(cells, lambda cell, *_: {"value": 0.0}, args)

    assert len(rows(0)) == 2 and len(rows(1)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer, shape", [(nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
                                          (nn.Linear(5, 4), (2, 5))])
def test_half_precision_models_train_under_a_cap(dtype, layer, shape):
    model = to_stochastic(layer.to(dtype), local=False, max_log_alpha=0.0)
    y = model(torch.ones(shape, dtype=dtype))
    y.sum().backward()
    assert y.dtype == model.log_sigma2.grad.dtype == dtype and model.log_sigma2.grad.any()


def test_batch_normalisation_is_restored_after_a_batch_that_fails():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=0.2))
    with pytest.raises(RuntimeError):
        with bn_recalibrated(model, [torch.ones(4, 3), torch.ones(4, 5)], draw=False):
            pass
    assert model.training and model[1].momentum == 0.2 and (model[1].running_mean == 0).all()


def test_data_in_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    found = {"x_train": np.zeros((3, 28, 28), int), "y_train": np.zeros(3, int),
             "x_test": np.ones((2, 28, 28), int), "y_test": np.ones(2, int)}
    monkeypatch.setattr(common, "_from_torchvision", lambda *_: found)

    def refuse(path, **arrays):
        path.touch()
        raise PermissionError(path)

    monkeypatch.setattr(np, "savez", refuse)
    assert load_mnist(tmp_path)[2].shape == (2, 1, 28, 28) and not list(tmp_path.iterdir())
    found["y_test"] += 10
    with pytest.raises(DataError, match="y_test should be 0 to 9"):
        load_mnist(tmp_path)


def test_a_data_folder_that_is_a_file_and_an_unknown_data_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--scale demo needs no data"):
        load_mnist(tmp_path / "file")
    with pytest.raises(KeyError):
        load_images("cifar-10", str(tmp_path), 1, 1)


@pytest.mark.parametrize("n, delta", [(0, 0.05), (-100, 0.05), (10, 0.0), (10, 2.0)])
def test_pac_bayes_bound_refuses_impossible_samples_and_probabilities(n, delta):
    with pytest.raises(ValueError):
        pac_bayes_bound(0.5, 10.0, n, delta=delta)


def test_rows_are_written_in_a_notebook_too(monkeypatch):
    monkeypatch.delattr(common, "__file__")
    assert common._git_revision()
