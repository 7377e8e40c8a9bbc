"""An adapter cut to a lower rank is the nearest one: to torch's SVD of the dense update, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_vit.lora.adapter import cut, decomposed

SIZES = {"block.q": (12, 10), "block.fc1": (40, 10), "block.fc2": (10, 40)}
RANK = 5


@pytest.fixture
def tensors():
    """Updates whose sizes differ by layer, with a head and a magnitude beside them."""
    generator = torch.Generator().manual_seed(0)
    found = {"heads.head.weight": torch.ones(3, 10), "block.q.lora_magnitude": torch.ones(12)}
    for scale, (name, (rows, columns)) in enumerate(SIZES.items(), 1):
        found[f"{name}.lora_A"] = torch.randn(RANK, columns, generator=generator)
        found[f"{name}.lora_B"] = scale**2 * torch.randn(rows, RANK, generator=generator)
    return found


def dense(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()


def test_the_decomposition_is_torchs_of_the_dense_update(tensors):
    """At 1e-10 of the largest value: both are of fp64, QR and SVD are stable, and 16 digits lose a few."""
    for name in SIZES:
        u, values, v = decomposed(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])
        update = dense(tensors, name)
        theirs = torch.linalg.svdvals(update)
        close = {"rtol": 0, "atol": 1e-10 * float(theirs[0])}
        torch.testing.assert_close(values, theirs[:RANK], **close)
        torch.testing.assert_close(u * values @ v, update, **close)
        torch.testing.assert_close(u.T @ u, torch.eye(RANK).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_each_layer_becomes_its_nearest_of_that_rank(tensors, rank):
    """The error is Eckart and Young's; 1e-6: the factors are written in fp32."""
    smaller = cut(tensors, rank)
    for name in SIZES:
        rows, columns = SIZES[name]
        assert smaller[f"{name}.lora_A"].shape == (rank, columns)
        assert smaller[f"{name}.lora_B"].shape == (rows, rank)
        u, values, v = torch.linalg.svd(dense(tensors, name), full_matrices=False)
        nearest = u[:, :rank] * values[:rank] @ v[:rank]
        torch.testing.assert_close(dense(smaller, name), nearest, rtol=0, atol=1e-6 * float(values[0]))
    assert all(smaller[name] is tensors[name] for name in ("heads.head.weight", "block.q.lora_magnitude"))


@pytest.mark.parametrize("rank", [1, 2, 4, RANK])
def test_a_threshold_leaves_as_many_parameters_and_loses_least(tensors, rank):
    """Of all ranks of the layers that cost no more, none of those that a threshold allows is nearer."""
    smaller = cut(tensors, rank, "threshold")
    costs = {name: sum(sizes) for name, sizes in SIZES.items()}
    ranks = {name: int((smaller[f"{name}.lora_B"] != 0).any(0).sum()) for name in SIZES}
    budget = rank * sum(costs.values())
    assert sum(ranks[name] * costs[name] for name in SIZES) <= budget
    square = {name: torch.linalg.svdvals(dense(tensors, name))[:RANK].square() for name in SIZES}
    kept = [float(square[n][k] / costs[n]) for n in SIZES for k in range(ranks[n])]
    gone = [float(square[n][k] / costs[n]) for n in SIZES for k in range(ranks[n], RANK)]
    assert not gone or min(kept) > max(gone)
    assert bool(gone) == (rank < RANK)
    if gone:  # the next one would not have had room
        following = max((float(square[n][k] / costs[n]), costs[n]) for n in SIZES for k in range(ranks[n], RANK))
        assert sum(ranks[name] * costs[name] for name in SIZES) + following[1] > budget
    for name, k in itertools.product(SIZES, range(RANK)):
        if k >= ranks[name]:
            assert not smaller[f"{name}.lora_A"][k].any()
