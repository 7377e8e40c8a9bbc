"""The adapters of K trials on one linear projection, and the heads of K trials: they alone know of several trials.

Shape legend: K trial, G adapted projections, R rank, I input width, O output width, B image, S token, C class.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.errors import ConfigError
from lora_vit.lora.dropout import DropoutState, feature_keys, threshold
from lora_vit.lora.functional import NOTHING, AdaptedProduct, MaskKey, Prologue, runs_of


class AdapterSpec(NamedTuple):
    """What one trial asks of its adapters: a factor of their output, a probability of dropping their input, a key."""

    rank: int
    scaling: float
    dropout: float
    seed: int
    method: str = "lora"  # or dora: one for all trials of a pack


def initial_lora_A(spec: AdapterSpec, name: str, width: int) -> Tensor:
    """A trial's lora_A at the start, fp32 [rank, width], from its seed and name, drawn as loralib does (Kaiming)."""
    bound = 1 / math.sqrt(width)  # kaiming_uniform_ with a = sqrt(5)
    generator = randomness.generator("lora_A", spec.seed, name)
    return torch.empty(spec.rank, width).uniform_(-bound, bound, generator=generator)


class Factors(nn.Module):
    """Numbers, as one for each of K trials, that no cast of the model rounds: buffers of integers hold the bits."""

    def __init__(self, factors: Sequence[float] | Tensor):
        super().__init__()
        exact_K = torch.as_tensor(factors, dtype=torch.float64)
        self.bits32_K = nn.Buffer(exact_K.float().view(torch.int32), persistent=False)
        self.bits64_K = nn.Buffer(exact_K.view(torch.int64), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """In fp64 for that, which not every device has, else in fp32 (in bf16 one would be off by up to 0.2 %)."""
        return self.bits64_K.view(dtype) if dtype == torch.float64 else self.bits32_K.view(torch.float32)


class _KeyedDropout(nn.Module):
    """Base of both modules: a dropout probability for each of K trials, with masks by key."""

    def __init__(self, dropouts: Sequence[float], width: int, key: str, state: DropoutState):
        """``width``: I of what is dropped; ``key``: name that sets its masks apart from those of other modules."""
        super().__init__()
        self.state, self._module_key = state, zlib.crc32(key.encode())
        self._dropping = runs_of([p > 0 for p in dropouts])
        thresholds = torch.tensor([threshold(p) for p in dropouts], dtype=torch.int32)
        self.threshold_K = nn.Buffer(thresholds, persistent=False)
        self.feature_I = nn.Buffer(feature_keys(width), persistent=False)

    def mask(self, tokens: int) -> MaskKey | None:
        """Key of this pass's mask; None where nothing is dropped."""
        if not (self.training and self._dropping):
            return None
        return MaskKey(self.state.rows(self._module_key, tokens), self.feature_I, self.threshold_K, self._dropping)


class LoRAAdapters(_KeyedDropout):
    """Adapters of K trials, one spec each, on one (possibly fused) linear projection.

    ``slots``: by ``out_features``-wide part of the output, the name of the projection (``...self_attention.q``) that
    adds to it, key of initialisation and export; ``input_name``: of the shared input, key of the dropout mask, so that
    q, k and v share one; ``state``: shared by all layers of the model.
    """

    lora_magnitude: nn.Parameter | None
    disabled = False  # whether the layer computes what the base does

    def __init__(self, specs: Sequence[AdapterSpec], slots: Mapping[int, str], input_name: str, in_features: int,
                 out_features: int, state: DropoutState):  # fmt: skip
        super().__init__([s.dropout for s in specs], in_features, input_name, state)
        K, G, R = len(specs), len(slots), max(s.rank for s in specs)
        self.specs, self.names, self.slots = specs, tuple(slots.values()), tuple(slots)
        self.lora_A = nn.Parameter(torch.zeros(K, G, R, in_features))
        self.lora_B = nn.Parameter(torch.zeros(K, G, out_features, R))
        self.register_parameter("lora_magnitude", None)  # DoRA's, from :meth:`decompose`
        self.keeps_output = False
        for k, spec in enumerate(specs):
            for g, name in enumerate(self.names):
                self.lora_A.data[k, g, : spec.rank] = initial_lora_A(spec, name, in_features)  # drawn at its own rank
        self.scale_K = Factors([s.scaling for s in specs])
        self.train_scale_K = Factors([s.scaling / (1 - s.dropout) for s in specs])

    def linear(self, z: Tensor, weight: Tensor, bias: Tensor | None, prologue: Prologue = NOTHING) -> Tensor:
        """``prologue(z) weight' + bias`` plus the adapters, [K*B, S, I] to [K*B, S, O]; dtype: z's or autocast's."""
        mask, device, dtype = self.mask(z.shape[1]), z.device.type, z.dtype
        if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):  # as torch's own layers
            dtype = torch.get_autocast_dtype(device)
        scale_K = (self.scale_K if mask is None else self.train_scale_K)(dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        tensors = self.lora_A.to(dtype), self.lora_B.to(dtype), self.factors(weight), scale_K
        how = prologue, self.slots, mask, self.keeps_output
        return AdaptedProduct.apply(z, prologue.weight, prologue.bias, weight, bias, *tensors, *how)

    def factors(self, weight: Tensor) -> Tensor | None:
        """DoRA's magnitude over norm of each output for each trial, 1 where nothing is adapted, [K, slots*O]."""
        if self.lora_magnitude is None:
            return None
        factor_KGO = self.lora_magnitude / self.norms(weight)
        one_KO = torch.ones_like(factor_KGO[:, 0])
        parts = range(len(weight) // one_KO.shape[1])
        return torch.cat([factor_KGO[:, self.slots.index(s)] if s in self.slots else one_KO for s in parts], 1)

    def decompose(self, weight: Tensor, keeps_output: bool) -> None:
        """Give each output DoRA's magnitude: at first the norm of its row of the weight, which then changes nothing."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        square_GO = torch.linalg.vector_norm(self._adapted_rows(weight), dim=-1, dtype=dtype).square()
        self.square_GO = Factors(square_GO)
        self.lora_magnitude = nn.Parameter(square_GO.sqrt().repeat(len(self.specs), 1, 1))
        self.keeps_output = keeps_output

    def _adapted_rows(self, weight: Tensor) -> Tensor:
        rows_GOI = weight.unflatten(0, (-1, self.lora_B.shape[2]))
        return rows_GOI if len(self.slots) == len(rows_GOI) else torch.stack([rows_GOI[slot] for slot in self.slots])

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Norm of each adapted row of W + s B A for each trial, fp32 (of fp64: fp64), [K, G, O].

        ``|W_o|^2 + 2 s B_o.(A W')_o + s^2 B_o (A A') B_o'``: no dense product, but R columns of one. No gradient goes
        through it, as the paper has it (its section 4.3).
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a_KGRI, b_KGOR = self.lora_A.to(dtype), self.lora_B.to(dtype)
        wa_GOr = self._adapted_rows(weight) @ a_KGRI.to(weight.dtype).movedim(0, 1).flatten(1, 2).mT
        wa_KGOR = wa_GOr.unflatten(-1, (len(a_KGRI), -1)).movedim(-2, 0)
        sb_KGOR = self.scale_K(dtype).view(-1, 1, 1, 1) * b_KGOR
        base_GO = self.square_GO(dtype)
        square_KGO = base_GO + (sb_KGOR * (2 * wa_KGOR + sb_KGOR @ (a_KGRI @ a_KGRI.mT))).sum(-1)
        info = torch.finfo(dtype)  # rounding may leave less where an update cancels a row; a row of zeros stays one
        return torch.maximum(square_KGO, info.eps * base_GO).clamp_min(info.tiny).sqrt()

    def trial_tensors(self, k: int, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Trial k's adapters, unpadded: ``NAME.lora_A`` [rank, I], ``NAME.lora_B`` [O, rank], ``NAME.lora_magnitude``.

        They are views of the parameters, or of ``own``: tensors by parameter, laid out like one trial's.
        """
        own = {name: p[k] for name, p in self.named_parameters()} if own is None else own
        rank = self.specs[k].rank
        tensors: dict[str, Tensor] = {}
        for g, name in enumerate(self.names):
            tensors |= {f"{name}.lora_A": own["lora_A"][g, :rank], f"{name}.lora_B": own["lora_B"][g, :, :rank]}
            if self.lora_magnitude is not None:
                tensors[f"{name}.lora_magnitude"] = own["lora_magnitude"][g]
        return tensors


def adapters_in(model: nn.Module) -> dict[str, LoRAAdapters]:
    """A model's adapters by their modules' names. Raises ConfigError while they are disabled, which is for a block."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRAAdapters)}
    if any(adapters.disabled for adapters in found.values()):
        raise ConfigError("the model's adapters are disabled: do this behind the block of disable_adapter")
    return found


class PackedHead(_KeyedDropout):
    """Dropout and a linear classifier for each of K trials: ``weight`` [K, C, I] and ``bias`` [K, C].

    Both are drawn as ``nn.Linear`` draws them, keyed by the trial's seed (torchvision's own head starts at zero, and
    then no adapter gets a gradient at the first step).
    """

    KEY = "heads.head"

    def __init__(self, seeds: Sequence[int], dropouts: Sequence[float], in_features: int, classes: int,
                 state: DropoutState, name: str = KEY):  # fmt: skip
        """``name``: of the layer in adapter files."""
        super().__init__(dropouts, in_features, self.KEY, state)
        self.name, self.keep_K = name, Factors([1 - p for p in dropouts])
        bound, K = 1 / math.sqrt(in_features), len(seeds)
        self.weight, self.bias = (nn.Parameter(torch.empty(K, classes, *width)) for width in ((in_features,), ()))
        for k, seed in enumerate(seeds):
            generator = randomness.generator(self.KEY, seed)
            for p in (self.weight, self.bias):
                p.data[k] = torch.empty(p.shape[1:]).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [K*B, I] to logits [K, B, C], in the dtype of the weights."""
        x_KBI = x.view(len(self.weight), -1, x.shape[-1]).to(self.weight.dtype)
        if (mask := self.mask(1)) is not None:
            x_KBI = mask.apply(x_KBI) / self.keep_K(x_KBI.dtype).view(-1, 1, 1)
        return torch.baddbmm(self.bias[:, None, :], x_KBI, self.weight.mT)
