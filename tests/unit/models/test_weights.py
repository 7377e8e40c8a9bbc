"""Weights as people have them: found in what training scripts save, by content, and refused in one line."""

from __future__ import annotations

import argparse
import io
import json
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_models import load, model_config, randomised
from safetensors.torch import save, save_file
from torch import Tensor
from torchvision.models import VisionTransformer

from lora_vit.build import inputs_of
from lora_vit.errors import ConfigError
from lora_vit.lora.adapter import base_of
from lora_vit.models.vit import trunk_of
from lora_vit.models.weights import check_beside, fetch_weights, load_weights

SHAPE = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
RECOGNISED = "2 blocks of width 32, patch 8, left out: heads"


def theirs(seed: int = 1) -> VisionTransformer:
    return randomised(VisionTransformer(**SHAPE, num_classes=5), 0.1, seed)


def loaded(path: Path) -> tuple[VisionTransformer, str]:
    trunk = trunk_of(model_config(**SHAPE))
    return trunk, load(trunk, path, "vit_tiny")


def assert_has(trunk: VisionTransformer, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(t, state[name]) for name, t in trunk.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(path)
    message = str(error.value)
    assert (message.startswith(f"model.weights={path}"), "\n" in message) == (True, False)
    return message


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "weights"])
@pytest.mark.parametrize("content", ["torch", "safetensors", "torch before 1.6"])
def test_a_file_is_what_it_holds_not_what_its_name_says(content, name, tmp_path):
    state = theirs().state_dict()
    if content == "safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=content == "torch")
    trunk, note = loaded(tmp_path / name)
    assert_has(trunk, state)
    assert note == f"model.weights={tmp_path / name}: {RECOGNISED}"
    assert base_of(trunk) == base_of(theirs())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.ones(1)}}}
WRAPPED = {
    "model": lambda s: {"model": s, "optimizer": OPTIMIZER, "lr": 0.1, "args": argparse.Namespace(opt="adamw")},
    "model_ema.module": lambda s: {"model_ema": {**prefixed(s, "module."), "n_averaged": torch.tensor(9)}},
    "teacher.backbone": lambda s: {"teacher": {**prefixed(s, "backbone."), "head.mlp.weight": torch.ones(2)}},
    "ema.module._orig_mod": lambda s: {"ema": prefixed(s, "module._orig_mod.")},
    "module": lambda s: prefixed(s, "module."),
    "state_dict.model": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 0.1}},
    "checkpoint.weights.trunk": lambda s: {"checkpoint": {"weights": prefixed(s, "trunk.")}},
}


SEVERAL = [  # what is saved of two models, which is taken, and which is named
    (lambda a, b: {"model_ema": b, "model": a}, "model", "model_ema"),
    (lambda a, b: {**prefixed(b, "student."), **prefixed(a, "teacher.")}, "teacher", "student"),
    (lambda a, b: {"other": b, "state_dict": a}, "state_dict", "other"),
    (lambda a, b: {**prefixed(b, "student_vit."), **prefixed(a, "teacher_vit.")}, "teacher_vit", "student_vit"),
    (lambda a, b: {"ssl_model": {"online": b, "target": a}}, "ssl_model.target", "ssl_model.online"),
    (lambda a, b: {"state_dict": {**prefixed(b, "ema."), **prefixed(a, "net.")}}, "state_dict.net", "state_dict.ema"),
]


@pytest.mark.parametrize(
    ("held", "taken", "other"), [*((lambda a, b, h=h: h(a), where, None) for where, h in WRAPPED.items()), *SEVERAL]
)
def test_wrapped_weights_are_found_and_reported(held, taken, other, tmp_path):
    path, state = tmp_path / "w.pth", theirs().state_dict()
    torch.save(held(state, theirs(seed=2).state_dict()), path)
    trunk, note = loaded(path)
    assert_has(trunk, state)
    others = f" (it also has {other}: model.weights=FILE::{other} takes that)" if other else ""
    assert note == f"model.weights={path}: {RECOGNISED}, taken from '{taken}'{others}"


def test_a_prefix_chooses_among_several(tmp_path):
    path, student = tmp_path / "w.pth", theirs(seed=2).state_dict()
    torch.save({**prefixed(student, "student.backbone."), **prefixed(theirs().state_dict(), "teacher.")}, path)
    trunk, note = loaded(Path(f"{path}::student"))
    assert_has(trunk, student)
    assert note.endswith(", taken from 'student.backbone'")
    assert "(but 'student.backbone', 'teacher'): give" in refusal(Path(f"{path}::stud"))


def test_weights_from_a_gpu_need_none(tmp_path, monkeypatch):
    state = theirs().state_dict()
    with monkeypatch.context() as there:
        there.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, tmp_path / "w.pth")
    assert_has(loaded(tmp_path / "w.pth")[0], state)


def test_weights_of_timms_hub(monkeypatch):
    """A download puts its values into the model."""
    pytest.importorskip("timm")
    config = model_config(library="timm", name="vit_tiny_patch16_224", image_size=32, weights="DEFAULT")
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: randomised(model, 0.1))
    trunk, expected = trunk_of(config), randomised(trunk_of(config), 0.1)
    assert load_weights(trunk, config) == ""
    torch.testing.assert_close(trunk.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_where_the_hub_has_them_is_said_without_a_network(monkeypatch):
    pytest.importorskip("timm")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    config = model_config(library="timm", name="vit_tiny_patch16_224.augreg_in21k", weights="DEFAULT")
    with pytest.raises(ConfigError, match=r"no route.*published at timm/vit_tiny_patch16_224\.augreg_in21k\) and give"):
        fetch_weights(config, download=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_points_become_fp32(dtype, tmp_path):
    state = {name: t.to(dtype) for name, t in theirs().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    trunk, _ = loaded(tmp_path / "w.pth")
    assert_has(trunk, {name: t.float() for name, t in state.items()})
    assert {t.dtype for t in trunk.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv_proj.bias", torch.full((32,), float("nan")), "conv_proj.bias holds NaN or infinite values"),
        ("class_token", torch.full((1, 1, 32), 1e300, dtype=torch.float64), "class_token holds NaN or infinite values"),
        ("conv_proj.bias", torch.zeros(32, dtype=torch.int64), "conv_proj.bias is of torch.int64 on cpu, not"),
        ("conv_proj.bias", torch.zeros(32, device="meta"), "conv_proj.bias is of torch.float32 on meta, not dense"),
        ("conv_proj.bias", torch.zeros(7), "does not fit vit_tiny: conv_proj.bias is [7], expected [32]"),
        ("class_token", None, "does not fit vit_tiny: it lacks class_token (the file has 2 blocks of width 32"),
        ("extra", torch.zeros(1), "does not fit vit_tiny: it has the unknown extra"),
        ("encoder.pos_embedding", torch.zeros(1, 13, 32), "[1, 13, 32] is not for a square grid of patches"),
        ("encoder.pos_embedding", torch.zeros(1, 2, 17, 32), "[1, 2, 17, 32] is not for a square grid"),
        ("conv_proj.weight", None, "holds no Vision Transformer as torchvision, timm, HF, DINO, DINOv2 or MAE name it"),
        ("encoder.pos_embedding", torch.zeros(1, 17, 16), "encoder.pos_embedding is [1, 17, 16], expected [1, 17, 32]"),
    ],
)
def test_weights_that_do_not_fit(name, value, message, tmp_path):
    state = dict(theirs().state_dict())
    state[name] = value
    torch.save({n: t for n, t in state.items() if t is not None}, tmp_path / "w.pth")
    assert message in refusal(tmp_path / "w.pth")


def sparse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to_sparse() if name.endswith("mlp.0.weight") else t for name, t in state.items()}


def fp8(state: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in state.items()} | more


def test_weights_of_eight_bits_are_told(tmp_path):
    torch.save(fp8(theirs().state_dict()), tmp_path / "w.pth")
    assert ", rounded to torch.float8_e4m3fn" in loaded(tmp_path / "w.pth")[1]


def zipped(**members: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(held: Any, new: bool = True) -> bytes:
    torch.save(held, buffer := io.BytesIO(), _use_new_zipfile_serialization=new)
    return buffer.getvalue()


NO_FORMAT = "is neither a PyTorch nor a safetensors file: give the weights themselves"
FILES = {
    "empty": (lambda: b"", NO_FORMAT),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", NO_FORMAT),
    "page": (lambda: b"\n <!DOCTYPE html><html>not found</html>", NO_FORMAT),
    "model": (lambda: torch_bytes({"model": theirs()}), "objects (torchvision.models.vision_transformer.VisionT"),
    "cut torch": (lambda: torch_bytes(theirs().state_dict())[:9000], "is damaged or cut off"),
    "cut old": (lambda: torch_bytes(theirs().state_dict(), False)[:9000], "is damaged or cut off"),
    "sparse": (lambda: torch_bytes(sparse(theirs().state_dict())), "0.weight is of torch.float32 on cpu, not dense"),
    "sparse rows": (lambda: torch_bytes({"conv_proj.weight": torch.eye(3).to_sparse_csr()}), "not dense"),
    "scaled": (lambda: torch_bytes(fp8(theirs().state_dict(), **{"conv_proj.weight_scale": torch.ones(())})),
               "it has the unknown conv_proj.weight_scale"),
    "adapter": (lambda: save({"encoder.q.lora_A": torch.ones(2, 2)}), "is an adapter: merge it"),
    "wrapped by PEFT": (lambda: torch_bytes({"model": prefixed(theirs().state_dict(), "base_model.model.") |
                                             {"base_model.model.x.lora_A.default.weight": torch.ones(2, 2)}}),
                        "is an adapter: merge it"),
    "checkpoint": (lambda: torch_bytes({"trial_id": "a", "values": {"heads.head.bias": torch.ones(2)}, "exp_avg": {}}),
                   "is an adapter: merge it"),
    "npz": (lambda: zipped(**{"embedding/kernel.npy": b""}), "or another archive: get it again, or save"),
    "TorchScript": (lambda: zipped(**{"w/data.pkl": b"", "w/code/x.py": b""}), "a program or another archive: get it"),
    "cut safetensors": (lambda: save(theirs().state_dict())[:9000], "is damaged or cut off"),
    "tensor": (lambda: torch_bytes(torch.ones(2)), "(but no state dict at all)"),
    "nothing": (lambda: torch_bytes({}), "(but no state dict at all)"),
    "resnet": (lambda: torch_bytes({"conv1.weight": torch.ones(2), "bn1.bias": torch.ones(2)}), "conv1.weight, bn1"),
}  # fmt: skip


def test_numbers_of_numpy_beside_weights_are_no_hindrance(tmp_path):
    numbers = {"best": np.float64(1), "step": np.int64(2), "history": np.ones(3, dtype="f4")}
    torch.save({"model": theirs().state_dict(), **numbers}, tmp_path / "w.pth")
    assert_has(loaded(tmp_path / "w.pth")[0], theirs().state_dict())


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_weights_is_refused_in_one_line(kind, name, tmp_path):
    content, message = FILES[kind]
    (tmp_path / name).write_bytes(content())
    assert message in refusal(tmp_path / name)


def test_a_folder_or_nothing_there(tmp_path):
    assert "the folder has none of model.safetensors, model.safetensors.index.json, py" in refusal(tmp_path)
    assert ": fetch them too, with shards (*-of-*) their index" in refusal(tmp_path)
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    assert "is an adapter: merge it" in refusal(tmp_path)
    assert "is not a file: check the path" in refusal(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"model\.weights=GLYPHS is unknown for vit_tiny: one of GLYPHS_V1, a path"):
        fetch_weights(model_config(weights="GLYPHS"))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (True, r"b_16-c867db91\.pth, which was downloaded earlier"),
        (False, r"cannot be downloaded \(no route to host\): connect to the network, give"),
    ],
)
def test_a_download_that_is_damaged_or_impossible(there, message, tmp_path, monkeypatch):
    """torchvision's own file where torch keeps downloads, or a network that is not there."""

    def offline(url: str, file: str, hash_prefix: str, **_: object) -> None:
        assert hash_prefix == "c867db91", "else half a download would be taken"
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    if there:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "vit_b_16-c867db91.pth").write_bytes(b"half")
    with pytest.raises(ConfigError, match=message) as error:
        fetch_weights(model_config(name="vit_b_16", weights="IMAGENET1K_V1"), download=True)
    assert "\n" not in str(error.value)


HF_VIT = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
NEW = {"weights_sha256": "0" * 64}  # of a trial that is to be trained
BESIDE: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # a configuration, one of images, and what is told
    (HF_VIT, IMAGENET, ""),
    ({"vision_config": HF_VIT, "text_config": {"num_attention_heads": 8, "hidden_act": "quick_gelu"}}, IMAGENET, ""),
    ({"quick_gelu": False, "pretrained_cfg": {"mean": IMAGENET["image_mean"]}}, {}, ""),
    (HF_VIT | {"hidden_act": "silu", "use_swiglu_ffn": True}, IMAGENET, ""),
    (HF_VIT, {}, "images get vit_tiny's mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]: nothing says others"),
    (HF_VIT | {"layer_norm_eps": 1e-12}, IMAGENET, "epsilon is 1e-12 beside the weights, 1e-06 here"),
    ({"hidden_act": "gelu_pytorch_tanh"}, IMAGENET, "activation is gelutanh beside the weights, gelu here"),
    (HF_VIT, HALF, "model.std is [0.5, 0.5, 0.5] beside the weights, [0.229, 0.224, 0.225] here"),
    ({"num_attention_heads": 8}, {}, "refused: heads is 8 beside the weights, 4 here: give a model with these"),
    ({"vision_config": {"hidden_act": "quick_gelu"}}, {}, "refused: activation is quickgelu beside the weights, gelu"),
    ({"model_cfg": {"quick_gelu": True}}, {}, "refused: activation is quickgelu beside the weights, gelu here: give"),
    ({"model_args": {"num_heads": 8}}, {}, "refused: heads is 8 beside the weights, 4 here"),
    ({"model_args": {"act_layer": "quick_gelu"}}, {}, "refused: activation is quickgelu beside the weights, gelu here"),
    ({"architecture": "vit_base_clip_quickgelu_224"}, {}, "refused: activation is quickgelu beside the weights"),
    ({"hidden_act": "swoosh"}, {}, "refused: activation is swoosh beside the weights, gelu here"),
]


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(("model", "images", "told"), BESIDE)
def test_what_files_beside_weights_say(model, images, told, as_folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    m = model_config(**SHAPE, weights=str(tmp_path if as_folder else tmp_path / "w.pth"), **NEW)
    trunk = trunk_of(m)
    if told.startswith("refused: "):
        with pytest.raises(ConfigError, match=told.removeprefix("refused: ")):
            check_beside(m, trunk, inputs_of(m, trunk))
    else:
        line = check_beside(m, trunk, inputs_of(m, trunk))
        assert (told in line, bool(told)) == (True, bool(line))


def test_what_files_beside_weights_say_of_timms_models(tmp_path):
    timm = pytest.importorskip("timm")
    m = model_config(library="timm", name="vit_xsmall_patch16_clip_224", image_size=32, weights=str(tmp_path), **NEW)
    trunk = trunk_of(m)
    (tmp_path / "config.json").write_text('{"architecture": "other", "hidden_act": "gelu"}')
    assert check_beside(m, trunk, inputs_of(m, trunk)).startswith(f"model.name is other beside the weights, {m.name}")
    with torch.device("meta"):
        quick = timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=0)
    (tmp_path / "config.json").write_text('{"hidden_act": "quick_gelu", "num_attention_heads": 12}')
    assert "activation" not in check_beside(m, quick, inputs_of(m, trunk))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json, beside model\.weights, is damaged"):
        check_beside(m, trunk, inputs_of(m, trunk))


@pytest.mark.parametrize("settings", [{"mean": [0.1] * 3, "std": [0.2] * 3, **NEW}, {}], ids=["own means", "trained"])
def test_what_is_not_questioned(settings, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HALF))
    m = model_config(**SHAPE, weights=str(tmp_path), **settings)
    trunk = trunk_of(m)
    assert check_beside(m, trunk, inputs_of(m, trunk)) == ""
