"""Adapters cut to a lower rank: each update B A becomes the nearest one of that rank (Eckart & Young, 1936)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def decomposed(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, R], falling singular values [R] and V' [R, I] of ``lora_B @ lora_A``, in fp64.

    No product is made dense: with B = Q P and A' = S T (QR), B A = Q (P T') S', and P T' is [R, R].
    """
    (q_OR, p_RR), (s_IR, t_RR) = (torch.linalg.qr(x.double()) for x in (lora_B, lora_A.T))
    u_RR, values_R, v_RR = torch.linalg.svd(p_RR @ t_RR.T)
    return q_OR @ u_RR, values_R, v_RR @ s_IR.T


def cut(tensors: Mapping[str, Tensor], rank: int, by: str = "layer") -> dict[str, Tensor]:
    """A trial's tensors with adapters of a lower rank, fp32; both factors of an update get its square roots.

    ``by="layer"``: each layer has this rank. ``by="threshold"``: all together have at most as many parameters; what
    stays has the largest squared singular values for each of the I + O parameters that it costs, in whatever layer.
    There factors keep their shapes, and what goes is zero. DoRA's magnitudes stay, as head and biases do: they say how
    long each output's weights are, whatever their direction.
    """
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    parts = {name: decomposed(*(tensors[f"{name}.lora_{m}"] for m in "AB")) for name in names}
    costs = {name: len(u_OR) + v_RI.shape[1] for name, (u_OR, _, v_RI) in parts.items()}
    worth = {name: values_R.square() / costs[name] for name, (_, values_R, _) in parts.items()}
    left, least = rank * sum(costs.values()), 0.0
    for value, cost in sorted(((v, costs[name]) for name in names for v in worth[name].tolist()), reverse=True):
        if by == "layer" or (left := left - cost) < 0:
            break
        least = value
    smaller = dict(tensors)
    for name, (u_OR, values_R, v_RI) in parts.items():
        root_R, r = (values_R * (worth[name] >= least)).sqrt(), rank if by == "layer" else len(values_R)
        smaller[f"{name}.lora_A"] = (root_R[:, None] * v_RI)[:r].float()
        smaller[f"{name}.lora_B"] = (u_OR * root_R)[:, :r].float()
    return smaller
