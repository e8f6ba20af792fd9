"""Stochastic layers in models that hold weights in other ways; rows of other seeds."""
import argparse

import torch
import torch.nn as nn
from torch.nn.utils import parametrizations

from common import run_grid, to_stochastic, weight_information

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
        return run_grid(cells, lambda cell, *_: {"value": 0.0}, args, {}, lambda args: None)

    assert len(rows(0)) == 2 and len(rows(1)) == 3
