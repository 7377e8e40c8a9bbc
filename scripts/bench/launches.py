"""What one training step asks of a GPU, counted without one: operations that it launches, bytes that they move.

    python scripts/bench/launches.py --batch 64

Tensors on the meta device have shapes only. An operation counts as one kernel, a view as none; each reads its inputs
and writes its results once. Attention counts as flash attention's operations, and what ``lora_vit.lora.dropout.fused``
compiles as one kernel that reads and writes each of its tensors once.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.nn.functional as F
from common import report
from step import our_step, trial
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_vit.build import DTYPES, ModelFactory
from lora_vit.lora import dropout, functional

FREE = ("empty", "new_empty", "detach", "_unsafe_view")  # beginnings of what launches nothing, beside views


def size(values: Any) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


class Count(TorchDispatchMode):
    """Counts kernels and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.within = 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (self.within or is_view or func.overloadpacket.__name__.startswith(FREE)):
            self.add(size((args, kwargs)) + size(out))
        return out

    def add(self, moved: int) -> None:
        self.kernels, self.bytes = self.kernels + 1, self.bytes + moved

    def fused(self, function: Any, *args: Any) -> Any:
        """In the place of the compiled function."""
        self.within = True
        out = function(*args)
        self.within = False
        self.add(2 * size(args[0]) + size(out))
        return out


def flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    args = parser.parse_args()
    F.scaled_dot_product_attention = flash  # type: ignore[assignment]
    base, dtype, meta = [f"model={args.model}", "model.weights=null"], DTYPES[args.precision], torch.device("meta")
    factory = ModelFactory(trial(*base), 200, torch.device("cpu"), dtype)
    factory.device, factory.original = meta, factory.original.to(meta)
    images = torch.empty(args.batch, 3, 224, 224, device=meta, dtype=dtype)
    labels = torch.zeros(args.batch, dtype=torch.int64, device=meta)
    rows = []
    for name, p in (("no dropout", 0.0), ("dropout, each operation a kernel", 0.1), ("dropout, fused", 0.1)):
        config, count = trial(*base, "lora.rank=8", f"lora.dropout={p}"), Count()
        keep_ = dropout.keep_by_product_
        if name.endswith("fused"):
            dropout.fused, keep_ = count.fused, functools.partial(count.fused, keep_)  # type: ignore[assignment]
        functional._TO_DROP["cuda"] = keep_, 1 << 26
        step = our_step(factory([config]).to(meta), config, images, labels)
        step()
        count.kernels = count.bytes = 0
        with count:
            step()
        rows.append({"step": name, "kernels": count.kernels, "GB": round(count.bytes / 1e9, 1)})
    report(rows, {"model": args.model, "px": 224, "batch": args.batch, "rank": 8, "precision": args.precision}, None)


if __name__ == "__main__":
    main()
