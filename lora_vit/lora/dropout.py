"""Keyed dropout: whether an element is kept is a hash of where it is, not of what was drawn before.

The key of an element is (trial seed, trial step, module, position of the image in the trial's global batch, token,
feature). Forward and backward recompute the same mask, a trial in a pack gets the mask that it gets alone, and any
number of processes agrees. All arithmetic is 32-bit with wrap-around, in place: on a CPU one pass over int32 costs a
tenth of one over int64. Shape legend: K trial, B image, S token, D feature.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_vit.distributed import this_process
from lora_vit.errors import one_line

_C1, _C2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # of the 32-bit finaliser "lowbias32" (Wellons, 2018), signed
_GOLDEN = 0x9E3779B9 - (1 << 32)

_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))
_refused: list[str] = []  # why torch cannot compile here


def _wrap(value: int) -> int:
    """The signed 32-bit integer with the same low bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix(x: Tensor) -> Tensor:
    """Avalanche an int32 tensor (shifts are arithmetic in torch, hence the masks)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _C1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _C2
    return x ^ ((x >> 16) & 0xFFFF)


class DropoutState:
    """The part of the key that all layers of a model share: trial seeds, trial steps and image positions.

    The trainer calls :meth:`set` before each forward pass; without a trainer :meth:`advance` counts the passes.
    """

    def __init__(self, seeds: list[int]):
        self._seed_K2 = torch.tensor([(_wrap(s), _wrap(s >> 32)) for s in seeds], dtype=torch.int32)
        self._forwards = 0
        self.base_KB: Tensor | None = None

    def set(self, step_K: Tensor, position_B: Tensor) -> None:
        """Key the next pass: the trials' steps, int [K], and the images' places in the global batch, int [B]."""
        self._seed_K2 = self._seed_K2.to(step_K.device)
        x_K = _mix(self._seed_K2[:, 0] + _GOLDEN)
        x_K = _mix(x_K ^ self._seed_K2[:, 1])
        x_K = _mix(x_K ^ step_K.to(torch.int32))
        self.base_KB = _mix(x_K[:, None] ^ _mix(position_B.to(torch.int32) + _GOLDEN)[None, :])

    def advance(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a model without a trainer: in train mode, each pass is one more step for every trial."""
        if module.training:
            images = (*args, *kwargs.values())[0]  # each process of a group has others
            step_K = torch.full((len(self._seed_K2),), self._forwards, device=images.device)
            self.set(step_K, torch.arange(len(images), device=images.device) + this_process().rank * len(images))
            self._forwards += 1

    def rows(self, module_key: int, tokens: int) -> Tensor:
        """One well-mixed int32 for each token of each image in this module, [K, B, S]."""
        if self.base_KB is None:
            raise RuntimeError("dropout is on but no pass was keyed: call DropoutState.set or .advance first")
        return fused(_rows, _wrap(module_key), tokens, self.base_KB)


def _rows(module_key: int, tokens: int, base_KB: Tensor) -> Tensor:
    token_S = torch.arange(tokens, dtype=torch.int32, device=base_KB.device) * _GOLDEN + module_key
    return _mix(base_KB[:, :, None] ^ _mix(token_S))


def fused(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, the last a tensor; on a GPU one kernel, where Triton and a C compiler let torch compile."""
    if args[-1].is_cuda and not _refused and not torch.compiler.is_compiling():
        try:
            return _compiled(function)(*args)
        except Exception as error:
            _refused.append(one_line(error))
            print(f"note: torch.compile does not work here, so that dropout takes more memory and time ({_refused[0]})")
    return function(*args)


def feature_keys(width: int) -> Tensor:
    """One well-mixed int32 for each feature, [D]."""
    return _mix(torch.arange(1, width + 1, dtype=torch.int32) * _C1)


def threshold(p: float) -> int:
    """The int32 below which a uniform int32 lies with probability ``p``, to 31 bits: always even."""
    return 2 * round(p * 2**31) - 2**31


def _hashed(rows: Tensor, feature_D: Tensor) -> Tensor:
    """One uniform int32 for each element, [..., D].

    Both inputs are well mixed, and odd here. The high bits alone decide the comparison: RC6's permutation
    x (2 x + 1), one pass over memory, has them depend on all bits of the product, and not linearly.
    """
    x = (rows[..., None] | 1) * (feature_D | 1)
    if torch.compiler.is_compiling():  # its ``addcmul`` of integers is one of floats
        return x + 2 * (x * x)
    return x.addcmul_(x, x, value=2)


def keep_mask(rows: Tensor, feature_D: Tensor, threshold: Tensor) -> Tensor:
    """True where an element is kept, bool [..., D]; ``rows`` is int32 [...], and ``threshold`` has a prefix of that."""
    x = _hashed(rows, feature_D)
    return x >= threshold.view(threshold.shape + (1,) * (x.ndim - threshold.ndim))


def keep_by_product_(xs: Sequence[Tensor], rows_N: Tensor, feature_D: Tensor, threshold_N: Tensor) -> None:
    """Set the dropped elements of several tensors [N, D] to zero, with one mask: the fewest passes over memory."""
    keep_ND = keep_mask(rows_N, feature_D, threshold_N)
    for x in xs:
        x.mul_(keep_ND)


def keep_by_bits_(xs: Sequence[Tensor], rows_N: Tensor, feature_D: Tensor, threshold_N: Tensor) -> None:
    """The same mask as all ones or all zeros in the bits of an integer.

    On a CPU a comparison that gives bools, and a product with them, each take as long as four passes over integers.
    """
    bits = _hashed(rows_N, feature_D)
    # x >= t is (t - 1 - x) < 0; halved, so that it cannot overflow, which loses nothing as t is even
    bits.bitwise_right_shift_(1)
    torch.sub((threshold_N[:, None] >> 1) - 1, bits, out=bits)
    bits.bitwise_right_shift_(31)
    for x in xs:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x.view(integer).bitwise_and_(bits.to(integer))
