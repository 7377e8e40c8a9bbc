"""The memory-lean layer against its plain reference, and what it keeps for backward."""

import pytest
import torch

from lora_vit.lora import functional
from lora_vit.lora.dropout import DropoutState, feature_keys, threshold
from lora_vit.lora.functional import AdaptedProduct, MaskKey, Prologue, runs_of

K, B, S, I, O, R = 3, 2, 5, 6, 4, 3
RANKS = (1, 3, 2)
KINDS = ["none", "gelu", "layer_norm"]
DROPOUTS = [None, (0.0, 0.3, 0.6), (0.3, 0.0, 0.6)]


def reference(z, weight, bias, a_KGRI, b_KGOR, scale_K, slots, mask=None, prologue=functional.NOTHING):
    """The layer in plain operations, trial by trial."""
    x = prologue(z)
    y_trials = torch.nn.functional.linear(x, weight, bias).chunk(len(a_KGRI))
    xd_trials = (x if mask is None else mask.apply(x)).chunk(len(a_KGRI))
    out = []
    for k, (y, xd) in enumerate(zip(y_trials, xd_trials, strict=True)):
        parts = list(y.split(b_KGOR.shape[2], dim=-1))
        for g, slot in enumerate(slots):
            parts[slot] = parts[slot] + scale_K[k] * (xd @ a_KGRI[k, g].T) @ b_KGOR[k, g].T
        out.append(torch.cat(parts, dim=-1))
    return torch.cat(out)


def adapted_linear(z, weight, bias, a_KGRI, b_KGOR, scale_K, slots, mask=None, prologue=functional.NOTHING):
    norm, tensors = (prologue.weight, prologue.bias), (a_KGRI, b_KGOR, None, scale_K)
    return AdaptedProduct.apply(z, *norm, weight, bias, *tensors, prologue, slots, mask, False)


def inputs(kind: str, slots: tuple[int, ...], dropouts: tuple[float, ...] | None, bias: bool = True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    G, width = len(slots), (max(slots) + 1) * O
    a, b = draw(K, G, R, I), draw(K, G, O, R)
    with torch.no_grad():
        for k, rank in enumerate(RANKS):
            a[k, :, rank:], b[k, :, :, rank:] = 0, 0
    tensors = {"z": draw(K * B, S, I), "bias": draw(width) if bias else None, "a": a, "b": b}
    if kind == "layer_norm":
        tensors |= {"ln_weight": draw(I), "ln_bias": draw(I)}
    mask = None
    if dropouts is not None:
        state = DropoutState([1, 2, 3])
        state.set(torch.tensor([0, 4, 7]), torch.arange(B))
        thresholds = torch.tensor([threshold(p) for p in dropouts], dtype=torch.int32)
        runs = runs_of([p > 0 for p in dropouts])
        mask = MaskKey(state.rows(77, S), feature_keys(I), thresholds, runs)
    fixed = {"scale_K": torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64), "slots": slots, "mask": mask, "kind": kind}
    return tensors, fixed | {"weight": torch.randn(width, I, generator=generator, dtype=torch.float64)}


def call(function, t, fixed):
    prologue = Prologue(fixed["kind"], 1e-6, t.get("ln_weight"), t.get("ln_bias"))
    adapters = t["a"], t["b"], fixed["scale_K"], fixed["slots"]
    return function(t["z"], fixed["weight"], t["bias"], *adapters, fixed["mask"], prologue)


def assert_as_reference(tensors, fixed, wanted=None, upstream=None):
    """Output and gradients, by default of all tensors and of the sum of squares."""
    wanted = [tensors[name] for name in wanted or tensors if tensors[name] is not None]
    y, expected = (call(function, tensors, fixed) for function in (adapted_linear, reference))
    # fp64, sums of at most 10 terms of size about 10: rounding stays well below 1e-12
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(o, wanted, 2 * o if upstream is None else upstream) for o in (y, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [(0,), (0, 1, 2), (0, 2), (2, 0)])  # the last: the first adapter adds to a later part
@pytest.mark.parametrize("dropouts", DROPOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_every_gradient_equal_the_reference(kind, slots, dropouts, bias):
    """Of an upstream gradient that is strided; the tests below have contiguous ones."""
    tensors, fixed = inputs(kind, slots, dropouts, bias)
    shape = (max(slots) + 1) * O, S, K * B
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    assert_as_reference(tensors, fixed, upstream=upstream)


@pytest.mark.parametrize("kind", ["gelu", "layer_norm"])
def test_only_the_input_and_skinny_tensors_are_kept(kind):
    tensors, fixed = inputs(kind, (0,), (0.1, 0.1, 0.1))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(adapted_linear, tensors, fixed)
    wide = [t for t in kept if t.shape == tensors["z"].shape]
    assert [t.data_ptr() for t in wide] == [tensors["z"].data_ptr()]


@pytest.mark.parametrize("trained", [("a", "b"), ("z",), ("ln_weight",), ("ln_bias",)], ids=" ".join)
@pytest.mark.parametrize("dropouts", DROPOUTS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_some_gradients_alone_are_the_same(kind, dropouts, trained):
    """Of the adapters without the input's, and of one that comes before them."""
    tensors, fixed = inputs(kind, (0, 2), dropouts)
    if trained[0] in tensors:
        some = {n: t if n in trained else t.detach() for n, t in tensors.items()}
        assert_as_reference(some, fixed, trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropouts", [None, (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_given_stays_as_it_is(kind, dropouts, frozen):
    """The input may be the residual stream, the upstream gradient another branch's too."""
    tensors, fixed = inputs(kind, (0, 2), dropouts)
    if frozen:
        tensors["z"] = tensors["z"].detach()
    given = {n: t.detach().clone() for n, t in tensors.items()} | {"weight": fixed["weight"].clone()}
    y = call(adapted_linear, tensors, fixed)
    upstream = torch.randn_like(y)
    before = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, before)
    for name, t in (tensors | {"weight": fixed["weight"]}).items():
        assert torch.equal(t.detach(), given[name]), name


def test_a_second_derivative_is_refused():
    tensors, fixed = inputs("gelu", (0,), None)
    output = call(adapted_linear, tensors, fixed).square().sum()
    (first,) = torch.autograd.grad(output, tensors["z"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def counted(way: str, elements: int, monkeypatch) -> list[int]:
    """Rows that are dropped at once, in one of the two ways and in pieces of so many elements (0: its own)."""
    keep_, own = functional._TO_DROP[way]
    lengths = []

    def counting(xs, rows_N, feature_D, threshold_N):
        lengths.append(len(rows_N))
        keep_(xs, rows_N, feature_D, threshold_N)

    monkeypatch.setattr(functional, "_TO_DROP", {"cpu": (counting, elements or own)})
    return lengths


@pytest.mark.parametrize("way", ["cpu", "cuda"])
@pytest.mark.parametrize("rows_at_once", [0, 1, 3, 7, 10, 29, 30, 1000])
def test_a_mask_in_pieces_is_the_whole_mask(way, rows_at_once, monkeypatch):
    """Both ways to drop, with borders between pieces inside an image, at a trial's end and beyond all rows."""
    lengths = counted(way, rows_at_once * I + I - 1, monkeypatch)
    for dropouts in ((0.3, 0.5, 0.0), (0.0, 0.5, 0.3), (0.3, 0.0, 0.6), (0.9, 0.1, 0.6)):
        mask = inputs("none", (0,), dropouts)[1]["mask"]
        xs = [torch.randn(K * B, S, I, dtype=torch.float64) for _ in range(2)]
        dropped = [x.clone() for x in xs]
        mask.apply_(*dropped)
        for x, y in zip(xs, dropped, strict=True):
            assert torch.equal(y, mask.apply(x))
            kept = (y != 0).view(K, -1).double().mean(1)
            assert all(bool(share == 1) == (p == 0) for share, p in zip(kept, dropouts, strict=True))
    assert max(lengths) == min(max(rows_at_once, 1), K * B * S)


@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_memory_for_a_mask_is_bounded(way, monkeypatch):
    rows, lengths = functional._TO_DROP[way][1] // I + 5, counted(way, 0, monkeypatch)
    keys = torch.zeros(1, rows, 1, dtype=torch.int32), torch.arange(I), torch.zeros(1, dtype=torch.int32)
    MaskKey(*keys, ((0, 1),)).apply_(torch.zeros(rows, 1, I, dtype=torch.bfloat16))
    assert len(lengths) == 2
    assert 4 * I * max(lengths) <= {"cpu": 1 << 20, "cuda": 1 << 28}[way]


def test_another_device_drops_by_products(monkeypatch):
    """On "meta", which stands for every device but the CPU."""
    asked: list[int] = []
    monkeypatch.setattr(functional, "_TO_DROP", {"cuda": (lambda xs, *key: asked.append(len(xs[0])), 3 * I)})
    rows, limits = torch.zeros(2, B, S, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    mask = MaskKey(*(t.to("meta") for t in (rows, torch.zeros(I, dtype=torch.int32), limits)), ((1, 2),))
    mask.apply_(torch.zeros(2 * B, S, I, device="meta"))
    assert asked == [3, 3, 3, 1]


def test_runs_of_neighbours():
    runs = {"": (), "...": (), "x": ((0, 1),), "xxx": ((0, 3),), ".xx.x": ((1, 3), (4, 5)), "x.x.": ((0, 1), (2, 3))}
    assert {flags: runs_of([f == "x" for f in flags]) for flags in runs} == runs


def test_the_reference_is_the_formula():
    """With numbers small enough to work out by hand: one trial of two images, two adapters, one input feature."""
    z, a = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[[3.0]], [[5.0]]]])
    b, weight = torch.tensor([[[[7.0]], [[11.0]]]]), torch.tensor([[1.0], [2.0], [4.0]])
    scale, bias = torch.tensor([0.5]), torch.tensor([0.25, 0.5, 1.0])
    for function in (adapted_linear, reference):
        y = function(z, weight, bias, a, b, scale, (0, 2))
        # x W' + b and, in the first and third place, half of x * 3 * 7 and of x * 5 * 11
        assert y.tolist() == [[[1.25 + 10.5, 2.5, 5.0 + 27.5]], [[2.25 + 21.0, 4.5, 9.0 + 55.0]]]
