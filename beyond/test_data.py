"""Data sets: look-up, download, damage; synthetic images. pytest beyond."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import (DataError, accuracy, draw_subset, load_celeba, load_cifar10, load_images,
                    load_mnist, synthetic_digits, synthetic_faces, synthetic_objects)
from test_common import cifar_arrays, corrupt

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def celeba_arrays():
    return {"images": np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8),
            "attrs": np.eye(3, 40, dtype=np.uint8), "partition": np.array([0, 1, 2]),
            "attr_names": np.array([f"a{i}" for i in range(40)])}


def test_mnist_is_read_from_its_npz(tmp_path):
    digits = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    labels = np.arange(3).astype(">i4")  # big-endian
    np.savez(tmp_path / "mnist.npz", x_train=digits, y_train=labels, x_test=digits, y_test=labels)
    x, y, *_ = load_mnist(tmp_path)
    assert torch.equal(x, torch.from_numpy(digits)[:, None])
    assert y.tolist() == [0, 1, 2]


def test_celeba_is_read_from_its_npz(tmp_path):
    arrays = celeba_arrays()
    np.savez(tmp_path / "celeba64.npz", **arrays)
    images, attrs, names, partition = load_celeba(tmp_path)
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(arrays["images"]))
    assert torch.equal(attrs, torch.eye(3, 40).byte())
    assert names == [f"a{i}" for i in range(40)]
    assert partition.tolist() == [0, 1, 2]


@pytest.mark.parametrize("key, value", [("partition", np.array([0, 1, 3])),
                                        ("attrs", 2 * np.ones((3, 40), int)),
                                        ("attr_names", np.array(["a"] * 39))])
def test_damaged_celeba_is_named(tmp_path, key, value):
    np.savez(tmp_path / "celeba64.npz", **celeba_arrays() | {key: value})
    with pytest.raises(DataError, match=f"celeba64.npz: {key}"):
        load_celeba(tmp_path)


@pytest.mark.parametrize("damage, named", [("truncated", ""), ("labels", "y_train"),
                                           ("shape", "x_train")])
def test_damaged_files_are_named_in_one_line(tmp_path, damage, named):
    path, arrays = tmp_path / "cifar10.npz", cifar_arrays()
    if damage == "labels":
        arrays["y_train"] = np.array([0, 1, 2, 10])
    elif damage == "shape":
        arrays["x_train"] = arrays["x_train"][:, :28]
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="(?s)" + re.escape(f"{path}: ") + ".*" + named) as error:
        load_cifar10(tmp_path)
    assert "\n" not in str(error.value)
    assert path.exists()


def test_look_up_is_npz_then_torchvision_then_its_download(tmp_path, monkeypatch):
    calls = []

    class FakeCIFAR10:
        def __init__(self, root, train, download):
            calls.append((train, download))
            arrays = cifar_arrays()
            self.data, self.targets = arrays["x_train"], arrays["y_train"].ravel().tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    x, *_ = load_cifar10(tmp_path)
    assert calls == [(True, True), (False, True)]
    assert os.listdir(tmp_path) == ["cifar10.npz"]  # in one step
    again, *_ = load_cifar10(tmp_path)
    assert torch.equal(x, again)
    assert len(calls) == 2


def test_celeba_is_cropped_and_cached(tmp_path, monkeypatch):
    from PIL import Image

    class FakeCelebA:
        attr_names = [f"a{i}" for i in range(40)] + [""]  # the header ends in an empty name
        attr = torch.eye(2, 40, dtype=torch.long)

        def __init__(self, root, split, transform, download):
            assert split == "all"
            (Path(root) / "celeba").mkdir(exist_ok=True)
            partition = Path(root) / "celeba" / "list_eval_partition.txt"
            partition.write_text("000001.jpg 0\n000002.jpg 2\n")
            self.transform = transform

        def __len__(self):
            return 2

        def __getitem__(self, index):
            picture = np.zeros((218, 178, 3), np.uint8)
            picture[35:183, 15:163] = 100 + index  # the centre 148 x 148
            return self.transform(Image.fromarray(picture)), self.attr[index]

    monkeypatch.setattr(torchvision.datasets, "CelebA", FakeCelebA)
    images, attrs, names, partition = load_celeba(tmp_path)
    assert images.shape == (2, 3, 64, 64)
    assert [image.unique().tolist() for image in images] == [[100], [101]]
    assert names == FakeCelebA.attr_names[:40]
    assert torch.equal(attrs.long(), FakeCelebA.attr)
    assert partition.tolist() == [0, 2]
    assert (tmp_path / "celeba64.npz").exists()


@pytest.mark.parametrize("load, name, hints", [
    (load_cifar10, "CIFAR10", ["cifar10.npz"]), (load_mnist, "MNIST", ["mnist.npz"]),
    (load_celeba, "CelebA", ["gdown", "img_align_celeba", "quota"])])
def test_failed_downloads_say_what_to_do(tmp_path, monkeypatch, load, name, hints):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset not found" if not kwargs["download"] else "no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, name, fail)
    with pytest.raises(DataError) as error:
        load(tmp_path / "data")
    message = str(error.value)
    hints = [*hints, "no network", "--scale demo", str(tmp_path)]
    assert "\n" not in message
    assert all(hint in message for hint in hints)
    assert not (tmp_path / "data").exists()


def test_data_in_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    found = {"x_train": np.zeros((3, 28, 28), int), "y_train": np.zeros(3, int),
             "x_test": np.ones((2, 28, 28), int), "y_test": np.ones(2, int)}
    monkeypatch.setattr(common, "_from_torchvision", lambda *_: found)

    def refuse(path, **arrays):
        path.touch()
        raise PermissionError(path)

    monkeypatch.setattr(np, "savez", refuse)
    assert load_mnist(tmp_path)[2].shape == (2, 1, 28, 28)
    assert not list(tmp_path.glob("*.npz"))
    found["y_test"] += 10
    with pytest.raises(DataError, match="y_test should be"):
        load_mnist(tmp_path)


def test_a_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--scale demo needs no data"):
        load_mnist(tmp_path / "file")


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(KeyError):
        load_images("cifar-10", str(tmp_path), 1, 1)


def test_subsets_are_drawn_without_repetition():
    x, y = torch.arange(50), torch.arange(50) + 100
    few, labels = draw_subset(x, y, 20, torch.Generator().manual_seed(1))
    assert len(few.unique()) == 20
    assert torch.equal(labels, few + 100)
    assert torch.equal(few, draw_subset(x, y, 20, torch.Generator().manual_seed(1))[0])
    with pytest.raises(DataError, match="51 .* 50"):
        draw_subset(x, y, 51, torch.Generator())
    with pytest.raises(DataError, match="-1"):
        draw_subset(x, y, -1, torch.Generator())
    with pytest.raises(DataError, match="labels"):
        draw_subset(x, y[1:], 1, torch.Generator())


def test_images_smaller_than_their_crop_are_refused():
    with pytest.raises(ValueError, match="smaller than 28 x 28"):
        common.normalise(torch.zeros(2, 1, 20, 40, dtype=torch.uint8), 0.0, 1.0, 28)


def test_a_constant_channel_becomes_0():
    images = torch.randint(256, (9, 4, 8, 8), dtype=torch.uint8)
    images[:, 3] = 255  # opaque
    x = common.normalise(images, *common.channel_statistics(images), 8)
    assert x[:, 3].eq(0).all()
    torch.testing.assert_close(x[:, :3].std((0, 2, 3)), torch.ones(3), rtol=0.01, atol=0)


@pytest.mark.parametrize("make", [common.synthetic_objects, common.synthetic_digits,
                                  common.synthetic_faces])
def test_no_images_cannot_be_drawn(make):
    with pytest.raises(ValueError, match="0 images"):
        make(0)


@pytest.mark.parametrize("labels, classes", [(torch.eye(3).long(), 3),
                                             (torch.zeros(3, dtype=torch.int8), 200)])
def test_labels_that_cannot_hold_the_classes_are_refused(labels, classes):
    with pytest.raises(ValueError, match="labels"):
        common.corrupt_labels(labels, 1.0, classes, torch.Generator())


def test_the_next_class_of_256():
    labels = torch.tensor([0, 255], dtype=torch.uint8)
    ours = common.corrupt_labels(labels, 1.0, 256, torch.Generator(), "pair")
    assert ours.tolist() == [1, 0]


@pytest.mark.parametrize("fraction, kind", [(1.5, "uniform"), (-0.1, "uniform"), (0.5, "flip")])
def test_impossible_corruption_is_refused(fraction, kind):
    with pytest.raises(ValueError):
        corrupt(torch.zeros(9).long(), fraction, kind)


@pytest.mark.parametrize("make, shape", [(synthetic_objects, (3, 32, 32)), (synthetic_digits, (
    1, 28, 28)), (synthetic_faces, (3, 64, 64))])
def test_synthetic_images_are_seeded_and_differ(make, shape):
    images, labels, *_ = make(300, seed=1)
    assert (images.shape, images.dtype) == ((300, *shape), torch.uint8)
    assert torch.equal(images, make(300, seed=1)[0])
    assert not torch.equal(images, make(300, seed=2)[0])
    assert len(images.flatten(1).unique(dim=0)) == 300
    assert labels.dim() == 2 or torch.bincount(labels, minlength=10).min() > 15


def test_attributes_of_synthetic_faces_are_of_their_factors():
    _, attributes, factors = synthetic_faces(600, seed=1)
    assert {name: len(values.unique()) for name, values in factors.items()} == common.FACE_FACTORS
    told = [factors["hair_colour"] == 0, factors["hair_colour"] == 2, factors["skin"] >= 2,
            factors["glasses"] == 1, factors["smile"] == 2, factors["beard"] == 1]
    assert torch.equal(attributes.bool(), torch.stack(told, 1))


def test_synthetic_digits_need_more_than_a_linear_model():
    (x, y), (x_test, y_test) = synthetic_digits(2500, seed=0), synthetic_digits(1000, seed=1)
    x, x_test, right = x.float() / 255, x_test.float() / 255, []
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10))
    for model in (cnn, nn.Sequential(nn.Flatten(), nn.Linear(784, 10))):
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for index in (part for _ in range(4) for part in torch.randperm(2500).split(50)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
        right.append(accuracy(model.eval()(x_test), y_test))
    assert right[0] > 0.9
    assert right[1] < right[0] - 0.2
