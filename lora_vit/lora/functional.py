"""The linear layer with LoRA adapters of K trials, memory-lean.

For each trial, with its own rank, scaling and dropout (Hu et al., 2021, eq. 3)::

    x = prologue(z)                        # LayerNorm, GELU or nothing
    u = x W'                               # frozen, one product for all trials
    u[g] += s/(1-p) * (mask * x) A_g' B_g' # the trial's adapters
    y = c * u + b                          # c: 1, or DoRA's magnitude over norm (Liu et al., 2024, eq. 5)

Like a frozen layer it keeps ``z`` alone for its backward pass, and ``h = x A'`` (R wide): the LayerNorm or GELU output
and the dropout mask are computed again, for about 2 % of time. The gradient of ``c`` also needs ``u``, which is
computed again, or follows from ``y`` if that is kept (the next layer or attention may keep it anyway). The products
with a skinny side are written in the layout in which BLAS is fast; written the other way several take five times as
long.

Shape legend: K trial, B image, S token, N = B*S rows of a trial, I input width, O output width, R rank,
G adapted projections that share this input (q, k, v: up to three on the fused projection; elsewhere one).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_vit.lora.dropout import fused, keep_by_bits_, keep_by_product_, keep_mask

_AT_ONCE = 1 << 17  # elements of activations that a CPU multiplies and sums at once: they stay in its cache
_TO_DROP: Any = {"cpu": (keep_by_bits_, 1 << 18), "cuda": (partial(fused, keep_by_product_), 1 << 26)}
"""The faster way to drop elements, and of how many at once: 1 MiB of mask stays within a CPU's second-level cache; a
GPU's fused kernel holds no mask, and 256 MiB without it are little beside the activations of so many elements."""


@dataclass(frozen=True)
class Prologue:
    """Between the saved input and the linear layer: "none", "gelu" or "layer_norm", whose parameters are [I]."""

    kind: str = "none"
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.kind == "gelu":
            return F.gelu(z)
        if self.kind == "layer_norm":
            return F.layer_norm(z, z.shape[-1:], self.weight, self.bias, self.eps)
        return z


NOTHING = Prologue()


@dataclass(frozen=True)
class MaskKey:
    """What a dropout mask is computed from: int32 keys of tokens and features, and each trial's threshold."""

    rows_KBS: Tensor
    feature_I: Tensor
    threshold_K: Tensor
    runs: tuple[tuple[int, int], ...]  # of neighbouring trials that drop at all; the others' elements are not looked at

    def apply(self, x: Tensor) -> Tensor:
        """``x`` [K*B, S, I] with the dropped elements at zero (not rescaled)."""
        return x * keep_mask(self.rows_KBS, self.feature_I, self.threshold_K).view(x.shape)

    def apply_(self, *xs: Tensor) -> None:
        """The same in place, for tensors that share the mask."""
        K, B, S = self.rows_KBS.shape
        keep_, elements = _TO_DROP["cpu" if self.rows_KBS.device.type == "cpu" else "cuda"]
        piece = max(1, elements // len(self.feature_I))
        for first, last in self.runs:
            parts = [x.view(K, B * S, -1)[first:last].flatten(0, 1) for x in xs]  # views
            rows_N = self.rows_KBS[first:last].flatten()
            threshold_N = self.threshold_K[first:last].repeat_interleave(B * S)
            for start in range(0, len(rows_N), piece):  # the mask never exists whole
                here = slice(start, start + piece)
                keep_([part[here] for part in parts], rows_N[here], self.feature_I, threshold_N[here])


def runs_of(flags: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """First and last + 1 of each run of true flags."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *flags, False])) if a != b]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


class AdaptedProduct(torch.autograd.Function):
    """Linear layer plus the adapters of K trials (see the module's formula), [K*B, S, slots*O].

    ``z``: input before the prologue, in its dtype, [K*B, S, I]; trial k's images are rows k*B to (k+1)*B. ``ln_weight,
    ln_bias``: the prologue's own, which get gradients if they require them, as ``bias`` [slots*O] does. ``weight``:
    frozen, without gradient, in the result's dtype, [slots*O, I]. ``a_KGRI, b_KGOR``: lora_A and lora_B, ranks below R
    padded with zeros. ``factor_Ko``: on the outputs before the bias, [K, slots*O]. ``scale_K``: each trial's factor,
    with a ``mask`` (of the adapters' input) over 1-p. ``slots``: which O-wide part of the output each of the G adapters
    adds to. ``keeps_output``: for the gradient of ``factor_Ko``, rather than compute the layer's product again (nothing
    may then change the output in place).
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
        a_KGRI: Tensor, b_KGOR: Tensor, factor_Ko: Tensor | None, scale_K: Tensor, prologue: Prologue,
        slots: tuple[int, ...], mask: MaskKey | None, keeps_output: bool,
    ) -> Tensor:  # fmt: skip
        K = len(scale_K)
        mean = rstd = None
        if prologue.kind == "layer_norm":
            x, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], ln_weight, ln_bias, prologue.eps)
        else:
            x = prologue(z)
        x = x.to(weight.dtype)
        y = F.linear(x, weight, bias if factor_Ko is None else None)
        if mask is not None:
            x = x.clone() if prologue.kind == "none" else x
            mask.apply_(x)
        h_KNr = _rows(x, K) @ a_KGRI.flatten(1, 2).mT
        del x
        h_KNr.mul_(scale_K.view(K, 1, 1))
        y_KNo = _add_adapters(_rows(y, K), h_KNr, b_KGOR, slots)
        if factor_Ko is not None:
            factor_K1o = factor_Ko[:, None]
            y_KNo.mul_(factor_K1o) if bias is None else torch.addcmul(bias, y_KNo, factor_K1o, out=y_KNo)
        kept = (y, bias) if keeps_output else (None, None)
        norm = ln_weight, ln_bias, mean, rstd
        ctx.save_for_backward(z, *norm, weight, *kept, a_KGRI, b_KGOR, factor_Ko, scale_K, h_KNr)
        ctx.prologue, ctx.slots, ctx.mask = prologue, slots, mask
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, ln_weight, ln_bias, mean, rstd, weight, y, bias, *adapters, h_KNr = ctx.saved_tensors
        a_KGRI, b_KGOR, factor_Ko, scale_K = adapters
        prologue, slots, mask = ctx.prologue, ctx.slots, ctx.mask
        K, _, R, _ = a_KGRI.shape
        O = b_KGOR.shape[2]
        g = grads[0].contiguous()
        g_KNo, needs = _rows(g, K), ctx.needs_input_grad
        x = Prologue(prologue.kind, prologue.eps, ln_weight, ln_bias)(z).to(weight.dtype)  # from the saved tensors
        dbias = g.sum((0, 1)) if needs[4] else None
        dfactor_Ko = None
        if factor_Ko is not None:
            if y is None:
                u_KNo = _add_adapters(_rows(F.linear(x, weight), K), h_KNr, b_KGOR, slots)
                g_KNo, dfactor_Ko = _through_factor(g_KNo, factor_Ko, u_KNo)
                del u_KNo
            else:  # u is (y - b) / c; where c is 0, y does not tell it, and c gets no gradient
                g_KNo, dfactor_Ko = _through_factor(g_KNo, factor_Ko, _rows(y, K), bias)
                dfactor_Ko = torch.where(factor_Ko == 0, 0.0, dfactor_Ko / factor_Ko)
            g = g_KNo.view_as(g)

        db_KGOR = torch.empty_like(b_KGOR)
        dh_KNr = torch.empty_like(h_KNr)
        for i, slot in enumerate(slots):
            g_slot = g_KNo[:, :, slot * O : (slot + 1) * O]
            rows = slice(i * R, (i + 1) * R)
            db_KGOR[:, i] = (h_KNr[:, :, rows].mT @ g_slot).mT
            if g.dtype == torch.bfloat16:  # its kernels prefer the plain layout, five times as fast
                dh_KNr[:, :, rows] = g_slot @ b_KGOR[:, i]
            else:
                dh_KNr[:, :, rows] = (b_KGOR[:, i].mT @ g_slot.mT).mT
        dh_KNr.mul_(scale_K.view(K, 1, 1))

        dx_adapters = None
        if mask is not None:
            x = x.clone() if prologue.kind == "none" else x
            dx_adapters = (dh_KNr @ a_KGRI.flatten(1, 2)).view_as(x) if any(needs[:3]) else None
            mask.apply_(*(t for t in (x, dx_adapters) if t is not None))
        da_KGRI = (dh_KNr.mT @ _rows(x, K)).view_as(a_KGRI)
        del x

        dz = dln_weight = dln_bias = None
        if any(needs[:3]):
            dx = g @ weight
            if dx_adapters is None:
                _rows(dx, K).baddbmm_(dh_KNr, a_KGRI.flatten(1, 2))
            else:
                dx += dx_adapters
                dx_adapters = None  # before the prologue's gradient takes its place
            dz = dx = dx.to(z.dtype)
            if prologue.kind == "gelu":
                dz = torch.ops.aten.gelu_backward(dx, z)
            elif prologue.kind == "layer_norm":
                dz, dln_weight, dln_bias = torch.ops.aten.native_layer_norm_backward(
                    dx, z, z.shape[-1:], mean, rstd, ln_weight, ln_bias, list(needs[:3])
                )
        return dz, dln_weight, dln_bias, None, dbias, da_KGRI, db_KGOR, dfactor_Ko, *(None,) * 5


def _rows(x: Tensor, K: int) -> Tensor:
    """[K*B, S, D] seen as [K, B*S, D]."""
    return x.view(K, -1, x.shape[-1])


def _add_adapters(y_KNo: Tensor, h_KNr: Tensor, b_KGOR: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Add ``h B'`` to the adapted parts of the output, in place."""
    _, _, O, R = b_KGOR.shape
    for g, slot in enumerate(slots):
        y_KNo[:, :, slot * O : (slot + 1) * O].baddbmm_(h_KNr[:, :, g * R : (g + 1) * R], b_KGOR[:, g].mT)
    return y_KNo


def _through_factor(g_KNo: Tensor, factor_Ko: Tensor, u_KNo: Tensor,
                    bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``c g``, the gradient of u in ``y = c u + b``, and the sum of ``g (u - bias)`` over a trial's rows."""
    (K, N, width), factor_K1o = g_KNo.shape, factor_Ko[:, None]
    du_KNo, dfactor_Ko = torch.empty_like(g_KNo), torch.zeros_like(factor_Ko)
    rows = max(1, _AT_ONCE // (K * width)) if g_KNo.device.type == "cpu" else N
    for start in range(0, N, rows):
        here = (slice(None), slice(start, start + rows))
        own = u_KNo[here] if bias is None else u_KNo[here] - bias
        dfactor_Ko += (g_KNo[here] * own).sum(1, dtype=factor_Ko.dtype)
        torch.mul(g_KNo[here], factor_K1o, out=du_KNo[here])
    return du_KNo, dfactor_Ko
