"""An adapter cut to a lower rank is the nearest one: to torch's SVD of the dense update, in fp64."""

from __future__ import annotations

import pytest
import torch

from lora_vit.lora.adapter import cut

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
