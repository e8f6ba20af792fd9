"""Secs. 2, 3 and 7 as tests, on toy worlds whose distributions are known: pytest beyond.

Quantities are exact sums over finite joint distributions, in nats.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

LOG2 = math.log(2)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def entropy(joint, names, of):
    """H of the variables `of`; names: one letter for each axis of the joint distribution."""
    return torch.special.entr(torch.einsum(f"{names}->{of}", joint)).sum().item()


def mutual(joint, names, a, b, given=""):
    """I(a;b|given)."""
    both = "".join(dict.fromkeys(a + b + given))
    return (entropy(joint, names, a + given) + entropy(joint, names, b + given)
            - entropy(joint, names, both) - entropy(joint, names, given))


def channel(*shape):
    """A random conditional distribution of the last index given the others, rather sharp."""
    return torch.softmax(3 * torch.randn(*shape, dtype=torch.double), -1)


# === Sec. 2: decomposition of the cross-entropy; Sec. 7: random labels ============================

def toy_world(priors, inputs, temperature):
    """p(t,x,y,w) of a task t, two inputs x, their two labels y and learned weights w; and q(y|x,w).

    priors: of the three tasks; the last one's labels are random. Index x runs over the four values
    of two binary inputs, whose distribution is `inputs`, and index y over those of two labels.
    w, one of five, is drawn from the Bayesian posterior at this temperature.
    """
    task = torch.tensor([[0.9, 0.2], [0.3, 0.6], [0.5, 0.5]]).double()  # p(y=1|x,t)
    net = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.9, 0.9], [0.1, 0.1], [0.5, 0.5]]).double()
    bits = torch.tensor(list(itertools.product((0, 1), repeat=2)))

    def likelihood(p):  # of both labels given both inputs: (tasks or weights, x, y)
        ones = p[:, bits][:, :, None]
        return torch.where(bits[None, None].bool(), ones, 1 - ones).prod(-1)

    q = likelihood(net)
    learned = torch.softmax(q.log() / temperature, 0)  # p(w|x,y)
    priors = torch.tensor(priors).double()
    data = torch.einsum("t,x,txy->txy", priors, inputs, likelihood(task))
    return torch.einsum("txy,wxy->txyw", data, learned), torch.einsum("wxy->xyw", q)


def expected_cross_entropy(joint, q):
    return -(joint.sum(0) * q.log()).sum().item()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_four_terms_of_the_decomposition_add_up_to_the_cross_entropy(temperature):
    joint, q = toy_world((0.5, 0.3, 0.2), channel(4), temperature)
    intrinsic = entropy(joint, "txyw", "txy") - entropy(joint, "txyw", "tx")  # H(y|x,t)
    sufficiency = mutual(joint, "txyw", "t", "y", "xw")
    posterior = joint.sum(0) / joint.sum((0, 2))[:, None]  # p(y|x,w)
    efficiency = (joint.sum(0) * (posterior / q).log()).sum().item()
    overfitting = mutual(joint, "txyw", "y", "w", "tx")
    total = intrinsic + sufficiency + efficiency - overfitting
    assert expected_cross_entropy(joint, q) == pytest.approx(total, abs=1e-9)
    assert min(intrinsic, sufficiency, efficiency, overfitting) > 1e-3
    information = mutual(joint, "txyw", "xy", "w")
    assert overfitting <= information <= mutual(joint, "txyw", "xyt", "w") + 1e-9


def test_random_labels_are_overfitted_by_the_information_in_the_weights():
    fixed = torch.tensor([0, 1, 0, 0]).double()  # the inputs are given: 0 and 1
    for temperature in (0.02, 0.3, 1, 3, 30):
        joint, q = toy_world((0, 0, 1), fixed, temperature)
        information = mutual(joint, "txyw", "xy", "w")
        assert information > 1e-4
        assert mutual(joint, "txyw", "y", "w", "tx") == pytest.approx(information)
        # two random labels, less what was memorised
        assert expected_cross_entropy(joint, q) >= 2 * LOG2 - information - 1e-9


def test_memorising_random_labels_pays_below_beta_1_and_not_from_1_on():
    fixed = torch.tensor([0, 1, 0, 0]).double()

    def largest_gain(beta):  # over weights of every temperature, against knowing nothing
        gains = []
        for temperature in (0.02, 0.3, 1, 3, 30):
            joint, q = toy_world((0, 0, 1), fixed, temperature)
            objective = expected_cross_entropy(joint, q) + beta * mutual(joint, "txyw", "xy", "w")
            gains.append(2 * LOG2 - objective)
        return max(gains)

    assert largest_gain(0.5) > 0.1
    assert largest_gain(1.0) <= 1e-9
    assert largest_gain(2.0) < 0


def test_with_random_inputs_overfitting_is_more_than_i_y_w():
    # Sec. 7.1 has I(y;w|x,t) = I(y;w); weights that store which label goes where break it
    joint, _ = toy_world((0, 0, 1), channel(4), 1.0)
    overfitting, alone = mutual(joint, "txyw", "y", "w", "tx"), mutual(joint, "txyw", "y", "w")
    assert overfitting > alone + 1e-3
    assert overfitting == pytest.approx(alone + mutual(joint, "txyw", "x", "y", "w"))
    assert overfitting <= mutual(joint, "txyw", "xy", "w")


# === Sec. 3: nuisances, invariance, stacking ======================================================

# p(y|x) of six inputs: labels that are a function of x, and labels that are not
DETERMINISTIC = torch.eye(2, dtype=torch.double)[[0, 0, 0, 1, 1, 1]]
NOISY = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8], [0.5, 0.5]],
                     dtype=torch.double)
BOTH = pytest.mark.parametrize("y_given_x", [DETERMINISTIC, NOISY])


def with_nuisance(y_given_x):
    """p(y,n,x) of a nuisance n, independent of y, such that x = f(y,n): the construction of Sec. 3.

    y_given_x: (x, y), x uniform. n is a uniform number, cut where P(x' <= x|y) steps for some y.
    """
    size, classes = y_given_x.shape
    joint = y_given_x / size
    cumulative = (joint / joint.sum(0)).cumsum(0)
    edges = torch.cat([torch.zeros(1), cumulative.flatten()]).unique()
    edges = edges[torch.cat([edges.diff() > 1e-12, torch.tensor([True])])]
    middle = (edges[1:] + edges[:-1]) / 2
    x = [torch.searchsorted(cumulative[:, y].contiguous(), middle) for y in range(classes)]
    y_and_n = joint.sum(0)[:, None] * edges.diff() / edges.diff().sum()
    return torch.einsum("yn,ynx->ynx", y_and_n, F.one_hot(torch.stack(x), size).double())


@BOTH
def test_every_task_has_a_nuisance_that_explains_the_rest_of_the_input(y_given_x):
    joint = with_nuisance(y_given_x)
    assert torch.allclose(torch.einsum("ynx->xy", joint) * 6, y_given_x)
    assert mutual(joint, "ynx", "y", "n") == pytest.approx(0, abs=1e-12)
    x_given_both = entropy(joint, "ynx", "ynx") - entropy(joint, "ynx", "yn")
    assert x_given_both == pytest.approx(0, abs=1e-12)
    assert mutual(joint, "ynx", "n", "x") > 0.5


@BOTH
def test_sufficient_representations_are_invariant_as_far_as_they_are_minimal(y_given_x):
    joint = with_nuisance(y_given_x)
    labels_noise = entropy(joint, "ynx", "xy") - entropy(joint, "ynx", "x")  # H(y|x)
    # the minimal sufficient statistic: which p(y|x) an input has
    kind = (y_given_x[:, None] == y_given_x.unique(dim=0)).all(-1).double()
    totals, nuisances = [], []
    for sharpness in (0.0, 0.3, 1.0, 3.0, 50.0):  # z holds the kind, and more and more of x
        within = torch.softmax(sharpness * torch.eye(6, dtype=torch.double), -1)
        world = torch.einsum("ynx,xk,xz->ynxkz", joint, kind, within).flatten(3)
        task, total, nuisance = (mutual(world, "ynxz", a, "z") for a in "yxn")
        assert task == pytest.approx(mutual(world, "ynxz", "x", "y"))  # sufficient
        # I(z;n) <= I(z;x) - I(x;y), an equality up to H(y|x)
        assert -1e-9 <= total - task - nuisance <= labels_noise + 1e-9
        totals.append(total)
        nuisances.append(nuisance)
    assert totals == sorted(totals) and nuisances == sorted(nuisances)
    assert nuisances[-1] > nuisances[0] + 0.5
    if y_given_x is DETERMINISTIC:  # minimal is invariant
        assert (totals[0], nuisances[0]) == pytest.approx((LOG2, 0))
        assert nuisances[-1] == pytest.approx(math.log(3))


@BOTH
def test_any_representation_obeys_the_invariance_bound_and_stacking_adds_invariance(y_given_x):
    joint, names = with_nuisance(y_given_x), "ynxzvw"
    for _ in range(20):
        layers = channel(6, 5), channel(5, 4), channel(4, 4)
        world = torch.einsum("ynx,xz,zv,vw->ynxzvw", joint, *layers)
        nuisance = {layer: mutual(world, names, layer, "n") for layer in "xzvw"}
        assert nuisance["x"] > nuisance["z"] > nuisance["v"] > nuisance["w"] > 0
        for below, layer in zip("xzv", "zvw"):  # what passes from below and is not the task
            passes = mutual(world, names, below, layer)
            assert nuisance[layer] <= passes - mutual(world, names, layer, "y") + 1e-9
