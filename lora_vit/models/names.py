"""A Vision Transformer's weights under others' names, brought to those of the model that is to be filled.

Both sides are brought to timm's names here, and the model's own follow from what each of its names became.
"""

import math
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_HF_PREFIX = r"(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|vision_model)\."
PATCHES = re.compile(  # a Vision Transformer's tensors are where the projection of its patches is, after its prefix
    rf"(?<![^.])(?:conv_proj|patch_embed\.proj|(?:{_HF_PREFIX})?embeddings\.patch_embeddings?(?:\.projection)?)\.weight$"
    r"|(?<=visual\.)class_embedding$"  # OpenAI's projection is conv1, as a ResNet's first layer is
)
_TO_TIMM = (  # whole dotted parts of a name, as a pattern, and what timm calls them; one after another
    ("^" + _HF_PREFIX[:-2], ""),
    (r"conv_proj|^conv1|embeddings\.patch_embeddings?(?:\.projection)?", "patch_embed.proj"),
    (r"class_token|(?:embeddings\.)?class_embedding|embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"(?:embeddings\.)?register_tokens|storage_tokens", "reg_token"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"encoder\.pos_embedding|embeddings\.position_embedding(?:s|\.weight)|positional_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)|blocks\.\d+\.(\d+)", r"blocks.\1\2"),  # DINOv2 trains in chunks of blocks
    (r"(?:encoder\.|model\.)?layers?|transformer\.resblocks", "blocks"),
    (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.qkv.\1"),
    (r"head\.attention\.out_proj", "attn_pool.proj"),
    (r"head\.layernorm", "attn_pool.norm"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.mlp\.fc([12])", r"attn_pool.mlp.fc\1"),
    (r"(?:self_attention|attn)\.in_proj_(weight|bias)", r"attn.qkv.\1"),
    (r"attn\.([qv])_bias", r"attn.\1.bias"),
    (r"(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)", r"attn.\1"),
    (r"(?:self_attention|self_attn|attn)\.out_proj|attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"mlp\.(?:0|linear_1|weights_in|w12|c_fc|up_proj|w2|fc1_x)|intermediate\.dense", "mlp.fc1"),
    (r"mlp\.(?:3|linear_2|weights_out|w3|c_proj|down_proj)|output\.dense", "mlp.fc2"),
    (r"mlp\.(?:w1|gate_proj)", "mlp.fc1_g"),
    (r"(?:ln_|layer_norm)([12])", r"norm\1"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    (r"(?:layer_scale|gamma_)([12])(?:\.lambda1)?", r"ls\1.gamma"),
    ("pre_layrnorm|ln_pre", "norm_pre"),
    (r"encoder\.ln|layernorm|post_layernorm|ln_post", "norm"),
)
_COUNTED = r"(?:relative_position_index|position_ids|bias_mask|periods)"  # buffers that follow from the sizes
_LEFT_OUT = re.compile(  # no part of features: heads of other tasks, tokens of the pretraining, another modality
    r"(?:heads?|head_dist|fc|classifier|cls_classifier|distillation_classifier|pooler|pre_logits|mask_token|decoder\w*"
    rf"|local_cls_norm|proj|text_model|(?:visual|text)_projection|logit_scale|logit_bias)(?:\.|$)|.*\.{_COUNTED}$"
)
_SIZES = {
    (192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1152, 27): "so400m",
    (1280, 32): "huge", (1536, 40): "giant", (4096, 40): "7b",
}  # fmt: skip
_TOKENS = ("cls_token", "dist_token", "reg_token")


def translate(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights under the names, and in the arrangement, of the model to be filled (``own``, without head); fp32.

    Query, key and value are stacked or taken apart as the model has them. Positions go to the model's grid as its
    library does it; those of class, distillation and register tokens are added to the tokens where the model has none.
    Tensors may be missing, unexpected or of another shape; a line says the sizes, and what was left out. Raises
    ValueError where a tensor is not plain, finite values of floating point, or positions are not for a square grid.
    """
    names = {timm_name(name): name for name in own}
    theirs = {timm_name(name): name for name in state}
    if hidden := [name for name in state if theirs[timm_name(name)] != name]:
        one = f"{hidden[0]} and {theirs[timm_name(hidden[0])]} are one tensor"
        raise ValueError(f"{one}: the file holds parts of two models, save one alone")
    left_out = [name for name in theirs if name not in names and _LEFT_OUT.match(name)]
    found = {name: _checked(there, state[there]) for name, there in theirs.items() if name not in left_out}
    for bias in [name for name in found if f"{name}_mask" in theirs]:  # DINOv3 computes without a bias of its keys
        found[bias] = found[bias] * (state[theirs[f"{bias}_mask"]] != 0)
    line = describe(state)[0]
    if named := sorted({name.split(".")[0] for name in left_out if not re.search(f"{_COUNTED}$", name)}):
        line += ", left out: " + ", ".join(named)
    for name, whole, parts in _stacked(found):
        if name not in names and any(part in names for part in parts):
            found |= dict(zip(parts, found.pop(name).chunk(len(whole)), strict=False))
    for name, _, parts in _stacked(names):
        if name not in found and all(part in found for part in parts):
            found[name] = torch.cat([found.pop(part) for part in parts])
    found = {name: t for name, t in found.items() if name in names or not name.endswith(".bias") or t.any()}
    if "pos_embed" in found and found.keys() == names.keys():
        wanted = {name: own[there] for name, there in names.items()}
        side, own_side = _grid(theirs["pos_embed"], found), _grid(names["pos_embed"], wanted)
        ahead, grid = found["pos_embed"][:, : -(side**2)], found["pos_embed"][:, -(side**2) :]
        if side != own_side:
            # each library's own way, which its users' numbers come from
            mode = {"align_corners": True} if "class_token" in own else {"antialias": True}
            grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(own_side, own_side), mode="bicubic", **mode)
            grid = grid.flatten(2).transpose(1, 2)
            line += f", positions {side}x{side} resampled to {own_side}x{own_side}"
        tokens = wanted["pos_embed"].shape[1] - own_side**2
        if ahead.shape[1] != tokens:  # what counts is the sum of a token and its position
            for name in [name for name in _TOKENS if name in found]:
                n = min(found[name].shape[1], ahead.shape[1])
                found[name] = torch.cat([found[name][:, :n] + ahead[:, :n], found[name][:, n:]], 1)
                ahead = ahead[:, n:]
            ahead = grid.new_zeros(1, tokens, grid.shape[2])
        found["pos_embed"] = torch.cat([ahead, grid], 1)
    return {names.get(name, theirs.get(name, name)): t for name, t in found.items()}, line


def describe(state: dict[str, Tensor]) -> tuple[str, list[str]]:
    """What a state dict is in a few words, and the names of timm's models that may have its sizes."""
    found = {timm_name(name): t for name, t in state.items()}
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    width, patch = (found["patch_embed.proj.weight"].shape[i] for i in (0, -1))
    line = f"{depth or 'no known'} blocks of width {width}, patch {patch}"
    if "reg_token" in found:
        line += f", {found['reg_token'].shape[1]} registers"
    parts = {"blocks.0.ls1.gamma": "layer scale", "fc_norm.weight": "average pooling",
             "norm_pre.weight": "a norm in front (CLIP: OpenAI's needs *_quickgelu_*)"}  # fmt: skip
    line += "".join(f", {what}" for name, what in parts.items() if name in found)
    line += "".join(sorted({f", rounded to {t.dtype}" for t in state.values() if "float8" in str(t.dtype)}))
    size, kinds = _SIZES.get((width, depth)), "224 clip_224 siglip_224 dinov2 reg4_dinov2 dinov3 dinov3_qkvb"
    names = [f"vit_{size}_patch{patch}_{kind}" for kind in kinds.split()]
    return line, [*names, f"deit3_{size}_patch{patch}_224", f"deit_{size}_distilled_patch{patch}_224"]


def timm_name(name: str) -> str:
    """A tensor's name in timm's VisionTransformer; what is unknown stays as it is."""
    for theirs, timms in _TO_TIMM:
        name = re.sub(rf"(?<![^.])(?:{theirs})(?![^.])", timms, name).lstrip(".")
    return name


def _checked(name: str, tensor: Tensor) -> Tensor:
    has_values = tensor.layout == torch.strided and not tensor.is_meta
    if not has_values or not (tensor.is_floating_point() or name.endswith(".num_batches_tracked")):
        raise ValueError(f"{name} is of {tensor.dtype} on {tensor.device}, not dense values of floating point")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    is_token = timm_name(name) in (*_TOKENS, "pos_embed") and tensor.ndim in (1, 2)  # CLIP has them without batch
    return tensor.reshape(1, -1, tensor.shape[-1]) if is_token else tensor


def _stacked(names: Iterable[str]) -> list[tuple[str, str, list[str]]]:
    """Of names of stacked projections: the name, which they are, and the names that they have alone."""
    matches = [re.fullmatch(r"(.*\.)(qkv|kv)(\.\w+)", name) for name in names]
    return [(m[0], m[2], [f"{m[1]}{part}{m[3]}" for part in m[2]]) for m in matches if m]


def _grid(name: str, tensors: dict[str, Tensor]) -> int:
    """Side of the square grid of the positions, which may start with those of the class or of all tokens."""
    shape = tensors["pos_embed"].shape
    tokens = sum(tensors[name].shape[1] for name in _TOKENS if name in tensors)
    for extra in (0, min(tokens, 1), tokens) if len(shape) == 3 and shape[0] == 1 else ():
        side = math.isqrt(max(shape[1] - extra, 0))
        if side > (extra < tokens) and side**2 == shape[1] - extra:
            return side
    raise ValueError(f"{name} {list(shape)} is not for a square grid of patches")
