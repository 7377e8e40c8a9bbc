"""Every draw is a function of its key: known answers, and keys that do not get in one another's way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from lora_vit import randomness

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Output of the reference generator (Vigna, splitmix64.c) in this state, in Python's own integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_gives_the_published_numbers():
    """The first outputs for the seed 1234567."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) & MASK for i in range(3)]
    assert [splitmix64(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("parts", [("a",), ("a", 1), (3, "epoch", -2), ()])
def test_a_key_is_63_bits_of_the_digest_of_typed_parts(parts):
    text = "\0".join(("str:" if isinstance(p, str) else "int:") + str(p) for p in parts)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    assert randomness.key(*parts) == number // 2


def test_generators_and_permutations_follow_their_key_alone():
    before = torch.get_rng_state()
    assert randomness.generator("init", 3).initial_seed() == randomness.key("init", 3)
    order = randomness.permutation(50, "order", 1, 2)
    generator = torch.Generator().manual_seed(randomness.key("permutation", "order", 1, 2))
    assert order.tolist() == torch.randperm(50, generator=generator).tolist()
    assert (sorted(order), order.dtype) == (list(range(50)), np.int64)
    randomness.uniforms(np.arange(3), 2, "a")
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_uniforms_are_splitmix64_over_key_id_and_draw():
    ids, count = np.array([0, 5, 5, 2**40]), 3
    found = randomness.uniforms(ids, count, "augment", 9)
    key = randomness.key("uniforms", "augment", 9)
    for row, sample in zip(found, ids.tolist(), strict=True):
        state = splitmix64(key ^ splitmix64(sample))
        bits = [splitmix64((state + draw * 0x9E3779B97F4A7C15) & MASK) for draw in (1, 2, 3)]
        assert row.tolist() == [(b >> 11) / 2**53 for b in bits]
    assert found.dtype == np.float64
