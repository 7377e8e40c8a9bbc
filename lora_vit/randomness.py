"""Keyed randomness: every draw is a pure function of its key, so that no generator state decides a result."""

import hashlib

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """A 63-bit integer from the parts; the same in every process (unlike Python's ``hash``)."""
    text = "\0".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """A random order of ``range(n)``, int64 [n], that depends on the parts alone."""
    return torch.randperm(n, generator=generator("permutation", *parts)).numpy()


def uniforms(ids: np.ndarray, count: int, *parts: int | str) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) for each sample id, float64 [len(ids), count].

    Splitmix64 (Steele et al., 2014) over (key of the parts, id, draw): row i depends on ``ids[i]`` alone.
    """
    with np.errstate(over="ignore"):
        state = _splitmix64(np.uint64(key("uniforms", *parts)) ^ _splitmix64(ids))
        draws = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _splitmix64(state[:, None] + draws[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray | np.uint64) -> np.ndarray:
    x = np.asarray(np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
