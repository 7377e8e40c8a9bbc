"""Adapters from files: put on a model, merged into weights by the formula, and refused where they do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit import load_adapter, merge_adapter
from lora_vit.lora.merge import Adapter, AdapterError, merged_state_dict, read_adapter

D, MLP, CLASSES, RANK, SCALING = 16, 24, 3, 2, 1.5
BLOCK = "encoder.layers.encoder_layer_1"
PLACES = {  # projection: its lora_A's and lora_B's widths, the base's weight, and which rows of it
    "self_attention.q": (D, D, "self_attention.in_proj_weight", slice(0, D)),
    "self_attention.k": (D, D, "self_attention.in_proj_weight", slice(D, 2 * D)),
    "self_attention.v": (D, D, "self_attention.in_proj_weight", slice(2 * D, 3 * D)),
    "self_attention.out_proj": (D, D, "self_attention.out_proj.weight", slice(None)),
    "mlp.0": (D, MLP, "mlp.0.weight", slice(None)),
    "mlp.3": (MLP, D, "mlp.3.weight", slice(None)),
}


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    m = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=D, mlp_dim=MLP, num_classes=5)
    for p in m.parameters():
        nn.init.normal_(p, std=0.3)
    return m


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tensors(*places: str, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = dict(more)
    for place in places:
        width_in, width_out, *_ = PLACES[place]
        found[f"{BLOCK}.{place}.lora_A"] = torch.randn(RANK, width_in, generator=generator)
        found[f"{BLOCK}.{place}.lora_B"] = torch.randn(width_out, RANK, generator=generator)
    found["heads.head.weight"] = torch.randn(CLASSES, D, generator=generator)
    found["heads.head.bias"] = torch.randn(CLASSES, generator=generator)
    return found


def card(targets: list[str] | None, dropout: float = 0.0, scaling: float | None = SCALING) -> dict:
    lora = {"method": "lora" if targets else "none", "rank": RANK, "targets": targets, "blocks": [1]}
    lora |= {"dropout": dropout, "init": "kaiming_uniform"}
    return {"model": {"image_size": 16}, "lora": lora, "effective_scaling": scaling if targets else None}


def folder_of(path: Path, tensors: dict[str, Tensor], card: dict) -> Path:
    save_file(tensors, path / "adapter.safetensors")
    (path / "adapter.json").write_text(json.dumps(card))
    return path


@pytest.mark.parametrize("place", PLACES)
def test_each_projection_merges_into_its_own_weight(model, place):
    base = model.state_dict()
    adapter = Adapter(tensors(place), card(["any"]))
    merged = merged_state_dict(base, adapter)
    weight, rows = PLACES[place][2:]
    for name, tensor in merged.items():
        expected = adapter.tensors[name] if name.startswith("heads.") else base[name].clone()
        if name == f"{BLOCK}.{weight}":
            a, b = (adapter.tensors[f"{BLOCK}.{place}.lora_{m}"] for m in "AB")
            expected[rows] += SCALING * b @ a
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)  # fp32, one rounding of the sum
    assert merged.keys() == base.keys()
    assert not any(t.data_ptr() == base[n].data_ptr() for n, t in merged.items() if n in base)


def test_merging_does_not_change_what_it_is_given(model):
    base, adapter = model.state_dict(), Adapter(tensors(*PLACES), card(["any"]))
    copies = [{n: t.clone() for n, t in d.items()} for d in (base, adapter.tensors)]
    merged = merged_state_dict(base, adapter)
    for t in merged.values():
        t.zero_()
    for now, before in zip((base, adapter.tensors), copies, strict=True):
        assert all(torch.equal(now[n], before[n]) for n in before)


def test_merging_a_bf16_base_gives_fp32_of_one_rounding(model):
    model.bfloat16()
    adapter = Adapter(tensors("mlp.0"), card(["fc1"]))
    merged = merged_state_dict(model.state_dict(), adapter)
    assert {t.dtype for t in merged.values()} == {torch.float32}
    a, b = (adapter.tensors[f"{BLOCK}.mlp.0.lora_{m}"].double() for m in "AB")
    exact = model.state_dict()[f"{BLOCK}.mlp.0.weight"].double() + SCALING * b @ a
    assert torch.equal(merged[f"{BLOCK}.mlp.0.weight"], exact.float())


@pytest.mark.parametrize("bias", ["encoder.layers.encoder_layer_1.mlp.0.bias", "encoder.ln.bias", "conv_proj.bias"])
def test_trained_biases_replace_the_bases(model, images, bias, tmp_path):
    value = torch.randn_like(model.state_dict()[bias])
    folder = folder_of(tmp_path, tensors("mlp.0", **{bias: value}), card(["fc1"]))
    assert torch.equal(merged_state_dict(model.state_dict(), read_adapter(folder))[bias], value)
    load_adapter(model, folder)
    assert torch.equal(model.state_dict()[bias], value)


@pytest.mark.parametrize("head", ["another size", "the same size", "behind dropout", "another size behind dropout"])
def test_loaded_and_merged_compute_the_same_and_not_the_base(model, images, head, tmp_path):
    linear = nn.Linear(D, 5 if "another" in head else CLASSES)
    model.heads.head = nn.Sequential(nn.Dropout(0.5), linear) if "dropout" in head else linear
    loaded = model.double().eval()
    merged = copy.deepcopy(loaded)
    targets = ["q", "k", "v", "o", "fc1", "fc2"]
    folder = folder_of(tmp_path, tensors(*PLACES), card(targets, dropout=0.5))
    assert load_adapter(loaded, folder) is loaded
    assert merge_adapter(merged, folder) is merged
    x = images.double()
    expected = merged(x)
    assert expected.shape == (4, CLASSES)
    # merged weights are rounded to fp32
    torch.testing.assert_close(loaded.double().eval()(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(merged.heads.head, nn.Sequential) == ("dropout" in head)
    if "dropout" in head:
        assert isinstance(merged.heads.head[0], nn.Dropout)
        assert isinstance(loaded.heads.head[0], nn.Dropout)
    names = set(merged.state_dict())
    assert not [n for n in names if "lora" in n]
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if "lora_B" in name:
                assert p.any()
                p.zero_()
    assert not torch.allclose(loaded(x), expected, atol=1e-2)


def test_a_loaded_adapter_trains_with_its_dropout(model, images, tmp_path):
    folder = folder_of(tmp_path, tensors("mlp.0"), card(["fc1"], dropout=0.5))
    load_adapter(model, folder).train()
    first, second = model(images), model(images)
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_a_probe_has_a_head_alone(model, images, tmp_path):
    folder = folder_of(tmp_path, tensors(), card(None))
    assert read_adapter(folder).scaling == 1.0
    base = model.state_dict()
    loaded = load_adapter(model, folder)
    assert not [n for n in loaded.state_dict() if "lora" in n]
    assert torch.equal(loaded.heads.head.bias, read_adapter(folder).tensors["heads.head.bias"])
    assert all(torch.equal(t, base[n]) for n, t in loaded.state_dict().items() if not n.startswith("heads."))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another model", r"the adapter's .*encoder_layer_1\.mlp\.0\.lora_A has no place in the base"),
        ("unknown projection", r"conv_proj\.lora_A is not on a known projection"),
        ("unknown bias", r"the adapter's extra\.bias has no place in the base"),
        ("width", r"mlp\.0\.lora_A is for a layer of \[24, 9\], not \[24, 16\]"),
    ],
)
def test_what_does_not_fit_is_not_merged(model, change, message):
    found, base = tensors("mlp.0"), model.state_dict()
    if change == "another model":
        base = {n: t for n, t in base.items() if "encoder_layer_1" not in n}
    elif change == "unknown projection":
        found["conv_proj.lora_A"] = torch.zeros(1, 1)
    elif change == "unknown bias":
        found["extra.bias"] = torch.zeros(1)
    else:
        found[f"{BLOCK}.mlp.0.lora_A"] = torch.zeros(RANK, 9)
    with pytest.raises(AdapterError, match=message):
        merged_state_dict(base, Adapter(found, card(["fc1"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size", "the adapter is for 32 px, the model for 16 px: build the model with image_size="),
        ("missing", r"encoder_layer_1\.self_attention\.q\.lora_A \[2, 16\] is not in the adapter"),
        ("rank", r"encoder_layer_1\.mlp\.0\.lora_A \[2, 16\] is not in the adapter"),
        ("unknown bias", r"the adapter's extra\.bias has no place in the model"),
        ("bias of another shape", r"the adapter's conv_proj\.bias has no place in the model"),
        ("not adapted", r"the adapter's .*mlp\.3\.lora_A has no place in the model"),
    ],
)
def test_what_does_not_fit_is_not_loaded(model, change, message, tmp_path):
    found, about = tensors("mlp.0"), card(["fc1"])
    if change == "size":
        about["model"]["image_size"] = 32
    elif change == "missing":
        about["lora"]["targets"] = ["q", "fc1"]
    elif change == "rank":
        found[f"{BLOCK}.mlp.0.lora_A"] = torch.zeros(3, D)
    elif change == "unknown bias":
        found["extra.bias"] = torch.zeros(1)
    elif change == "bias of another shape":
        found["conv_proj.bias"] = torch.zeros(3)
    else:
        found |= tensors("mlp.3")
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder_of(tmp_path, found, about))


def test_a_folder_without_a_readable_adapter(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter\.json does not exist: give the folder of a completed trial"):
        read_adapter(tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"does not exist: give the folder of a completed trial"):
        read_adapter(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="the adapter cannot be read") as error:
        read_adapter(str(tmp_path))
    assert "\n" not in str(error.value)
