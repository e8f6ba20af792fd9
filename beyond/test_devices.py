"""Cells of the figure scripts on a GPU that is only pretended. pytest beyond.

What is sent to "cuda" or made there stays on the CPU, and refuses to be mixed with what is not.
"""
import json

import numpy as np
import pytest
import torch
import torch.distributed.tensor  # imported late by torch, it would meet the pretended Generator
from torch.utils._pytree import tree_leaves, tree_map

from beyond.test_training import demo
from test_common import TINY


class Far(torch.Tensor):
    device, is_cuda = torch.device("cuda:0"), True


class FarGenerator(torch._C.Generator):
    device = Far.device


def is_gpu(x):
    return isinstance(x, (str, torch.device)) and str(x).startswith("cuda")


def is_far(x):
    return is_gpu(x) or isinstance(x, (Far, FarGenerator))


def copied(x, memo):
    twin = memo[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, torch.nn.Parameter):
        twin._is_param = True
    return twin


class Pretence(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        if name == "__deepcopy__":
            return copied(*args)
        if name[0] == "_" != name[1]:  # inside torch
            return function(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        goal = [x for x in leaves if isinstance(x, (str, torch.device))
                and str(x).startswith(("cpu", "cuda"))] or tensors[name == "to":] or tensors
        far = name != "cpu" and any(map(is_far, goal))
        free = name in ("to", "cpu", "copy_", "__set__") or (
            name in ("__getitem__", "__setitem__") and is_far(args[0])  # may be indexed by others
            or torch._C._current_graph_task_id() != -1)  # backward sees plain gradients
        if far and name in ("numpy", "__array__") or not free and any(
                is_far(x) != far for x in leaves if isinstance(x, torch._C.Generator)
                or isinstance(x, torch.Tensor) and x.dim()):
            raise RuntimeError(f"{name}: some on the GPU, some not")
        args, kwargs = tree_map(lambda x: "cpu" if is_gpu(x) else x, (args, kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, torch.Size):
            return result
        return tree_map(lambda x: x.as_subclass(Far if far else torch.Tensor) if isinstance(
            x, torch.Tensor) and isinstance(x, Far) != far else x, result)


def graphed(both, sample):
    """A CUDA graph takes only what is like its sample."""
    def forward(x):
        kinds = {(x.shape, x.dtype, x.device, x.stride()) for x in (x, *sample)}
        assert len(kinds) == len(sample) == 1
        return both(x)
    return forward


@pytest.mark.parametrize("script", TINY)
def test_cells_keep_to_one_device(monkeypatch, tmp_path, script):
    figure, args, cells = demo(monkeypatch, script, tmp_path)
    near, far = torch.ones(2), torch.ones(2).as_subclass(Far)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": (
        FarGenerator if is_far(device) else torch._C.Generator)())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    with Pretence():
        for wrong in (lambda: near + far, lambda: near[far.long()], lambda: np.asarray(far),
                      lambda: torch.rand(2, device="cuda", generator=torch.Generator())):
            with pytest.raises(RuntimeError):
                wrong()
        assert type(far[near.long()] + 1) is type(near.to("cuda")) is Far
        assert type(far.cpu()) is torch.Tensor
        for cell in cells:
            json.dumps(figure.train_cell(cell, Far.device, args, lambda *_: None))
