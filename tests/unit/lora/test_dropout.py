"""Keyed dropout: keep rate, independence in every direction of the key, and each decision in plain integers."""

import itertools
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch

from lora_vit.lora import dropout
from lora_vit.lora.dropout import DropoutState, feature_keys, keep_by_bits_, keep_by_product_, keep_mask, threshold

B, S, D = 32, 65, 256


def mask(seed=5, step=3, module="fc1", p=0.3, positions=None) -> torch.Tensor:
    """One trial's mask, float [B, S, D]."""
    state = DropoutState([seed])
    state.set(torch.tensor([step]), torch.arange(B) if positions is None else positions)
    rows = state.rows(crc32(module.encode()), S)
    limit = torch.tensor([threshold(p)], dtype=torch.int32)
    return keep_mask(rows, feature_keys(D), limit)[0].float()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In units of its standard deviation under independence."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std())) * a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_and_neighbours_are_uncorrelated(p):
    m = mask(p=p)
    sd = (p * (1 - p) / m.numel()) ** 0.5
    assert abs(float(m.mean()) - (1 - p)) <= 5 * sd
    pairs = {
        "image": (m[1:], m[:-1]),
        "token": (m[:, 1:], m[:, :-1]),
        "feature": (m[..., 1:], m[..., :-1]),
        "two features on": (m[..., 2:], m[..., :-2]),
        "step": (m, mask(step=4, p=p)),
        "seed": (m, mask(seed=6, p=p)),
        "module": (m, mask(module="fc2", p=p)),
        "step and image together": (m[1:], mask(step=4, p=p)[:-1]),
    }
    # 10 comparisons of one fixed key: 4.5 standard deviations leave one false alarm in ten thousand
    assert {name: c for name, (a, b) in pairs.items() if abs(c := correlation(a, b)) > 4.5} == {}


def test_all_pairs_of_token_rows_are_uncorrelated():
    m = mask(p=0.5).flatten(0, 1)
    m = (m - m.mean()) / m.std()
    c = (m @ m.T) / D**0.5
    off = c[~torch.eye(len(c), dtype=torch.bool)]
    assert float(off.std()) == pytest.approx(1.0, rel=0.02)
    assert float(off.abs().max()) < 7


def test_all_pairs_of_features_are_uncorrelated():
    """Over the width of an MLP: keys that differ in few bits are rare, and the same in each mask."""
    state = DropoutState([5])
    state.set(torch.tensor([3]), torch.arange(B))
    rows = state.rows(crc32(b"fc2"), 2 * S)
    m = keep_mask(rows, feature_keys(3072), torch.tensor([threshold(0.5)], dtype=torch.int32))[0].flatten(0, 1)
    m = 2 * m.float() - 1
    c = (m.T @ m) / len(m) ** 0.5
    assert float(c.fill_diagonal_(0).abs().max()) < 6.5  # 4.7 million pairs, independent: above 6 once in a hundred


def test_without_a_key_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"DropoutState\.set or \.advance"):
        DropoutState([1]).rows(0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_decides_alike(dtype):
    """Also at both ends, and where a hash lies on the threshold or next to it."""
    rows, features = torch.arange(9, dtype=torch.int32) * 12345, feature_keys(300)
    shares = (0.0, 2**-31, 0.1, 0.5, 0.7, 0.999, 1 - 2**-31, 0.5, 0.5)
    limits = torch.tensor([threshold(p) for p in shares], dtype=torch.int32)
    hashed = dropout._hashed(rows, features)
    even = (hashed % 2 == 0).int().argmax(1).tolist()  # thresholds are even
    odd = (hashed % 2 == 1).int().argmax(1).tolist()
    limits[3], limits[7], limits[8] = hashed[3, even[3]], hashed[7, even[7]] + 2, hashed[8, odd[8]] + 1
    kept = keep_mask(rows, features, limits)
    assert kept[0].all()
    assert kept[3, even[3]]
    assert not kept[7, even[7]]
    assert not kept[8, odd[8]]
    assert not kept[6].any()
    xs = [torch.randn(9, 300).to(dtype) for _ in range(2)]
    for way in (keep_by_bits_, keep_by_product_):
        changed = [x.clone() for x in xs]
        way(changed, rows, features, limits)
        for x, y in zip(xs, changed, strict=True):
            assert torch.equal(y, x * kept)


@pytest.mark.slow  # torch's compiler takes seconds
def test_one_kernel_gives_the_same_masks():
    """What a GPU runs, compiled for a CPU: integers wrap around there too. One graph serves every size."""
    rows_of, keep_ = (torch.compile(function, dynamic=True) for function in (dropout._rows, keep_by_product_))
    for S, D, dtypes in ((9, 300, (torch.bfloat16,)), (1, 7, (torch.bfloat16,)), (12, 33, (torch.float32,) * 2)):
        base_KB = torch.arange(-4, 8, dtype=torch.int32).view(3, 4) * 123456789
        rows = rows_of(-1234567, S, base_KB)
        assert torch.equal(rows, dropout._rows(-1234567, S, base_KB))
        limits = torch.tensor([threshold(p) for p in (0.1, 0.5, 0.9)], dtype=torch.int32).repeat_interleave(4 * S)
        xs = [torch.randn(12 * S, D).to(dtype) for dtype in dtypes]
        changed = [x.clone() for x in xs]
        keep_(changed, rows.flatten(), feature_keys(D), limits)
        for x, y in zip(xs, changed, strict=True):
            assert torch.equal(y, x * keep_mask(rows.flatten(), feature_keys(D), limits))


def test_without_a_compiler_a_gpu_drops_as_ever(monkeypatch, capsys):
    """One line says so, once."""
    tried = []

    def compiled(function):
        tried.append(function)
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(dropout, "_compiled", compiled)
    monkeypatch.setattr(dropout, "_refused", [])
    on_gpu = SimpleNamespace(is_cuda=True)
    for _ in range(2):
        assert dropout.fused(lambda *args: args, 3, on_gpu) == (3, on_gpu)
    assert len(tried) == 1
    assert capsys.readouterr().out.count("working triton") == 1
    assert dropout.fused(lambda x: x, torch.ones(1)) == torch.ones(1), "on a CPU nothing is compiled"
    monkeypatch.setattr(dropout, "_refused", [])
    monkeypatch.setattr(dropout, "_compiled", lambda function: lambda *args: "of one kernel")
    assert dropout.fused(len, on_gpu) == "of one kernel"


def lowbias32(x: int) -> int:
    """Wellons' finaliser, as he writes it, on unsigned integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def kept_by_integers(seed: int, step: int, module: int, image: int, token: int, feature: int, p: float) -> bool:
    """The decision on one element, in Python's integers: it must stay, or a resumed run takes other masks."""
    low, golden = 0xFFFFFFFF, 0x9E3779B9
    x = lowbias32((seed + golden) & low)
    x = lowbias32(x ^ seed >> 32)
    x = lowbias32(x ^ step)
    x = lowbias32(x ^ lowbias32((image + golden) & low))
    x = lowbias32(x ^ lowbias32((token * golden + module) & low))
    x = (x | 1) * (lowbias32((feature + 1) * 0x7FEB352D & low) | 1)
    return signed(x * (2 * x + 1)) >= round((p - 0.5) * 2**31) * 2


def signed(x: int) -> int:
    """The low 32 bits as a two's complement."""
    return (x + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("p", [0.1, 0.5, 0.73])
@pytest.mark.parametrize("module", [crc32(b"encoder.layers.encoder_layer_0.mlp.0"), 0, 2**31 - 1, 2**31, 2**32 - 1])
def test_each_decision_equals_integer_arithmetic(p, module):
    """Also at the borders of 32 bits, of seeds and of module keys."""
    seeds, steps = [2**31, (3 << 40) + 0xF0000001, 2**63 - 1], [0, 70000, 2**31 - 1]
    state = DropoutState(seeds)
    state.set(torch.tensor(steps), torch.tensor([0, 3, 4000]))
    limits = torch.full((3,), threshold(p), dtype=torch.int32)
    kept = keep_mask(state.rows(module, 4), feature_keys(6), limits)
    for (k, b, s, d), keep in zip(
        itertools.product(range(3), range(3), range(4), range(6)), kept.flatten(), strict=True
    ):
        assert bool(keep) == kept_by_integers(seeds[k], steps[k], module, (0, 3, 4000)[b], s, d, p)
