"""Adapters from files: bound to their base, put on a model, merged into weights by the formula, else refused."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_records import make_record
from plain_models import randomised
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit import (
    disable_adapter,
    load_adapter,
    mark_lora_and_head_as_trainable,
    merge_adapter,
    remove_adapter,
    replace_linear_with_lora,
    save_adapter,
)
from lora_vit.config import SCHEMA_VERSION
from lora_vit.errors import ConfigError
from lora_vit.files import write_json
from lora_vit.lora.adapter import Adapter, base_of, bind, merged_state_dict, read_adapter, sha256_of, write_tensors
from lora_vit.records import write_record

D, MLP, CLASSES, RANK, SCALING = 16, 24, 3, 2, 1.5
BLOCK = "encoder.layers.encoder_layer_1"
PLACES = {  # target: the projection, and the widths of its lora_A and lora_B
    **{t: (f"self_attention.{t}", D, D) for t in "qkv"},
    "o": ("self_attention.out_proj", D, D),
    "fc1": ("mlp.0", D, MLP),
    "fc2": ("mlp.3", MLP, D),
}
EVERY = list(PLACES)
FC1 = f"{BLOCK}.mlp.0"
WEIGHTS = "weights are not those that the adapter was trained on .GLYPHS_V1.: give these, in fp32"


def new_model(seed: int = 0, **changes: Any) -> VisionTransformer:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": D, "mlp_dim": MLP}
    return randomised(VisionTransformer(**{**sizes, "num_classes": 5, **changes}), 0.3, seed)


@pytest.fixture
def model() -> VisionTransformer:
    return new_model()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tensors(*targets: str, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = dict(more)
    for target in targets:
        place, width_in, width_out = PLACES[target]
        found[f"{BLOCK}.{place}.lora_A"] = torch.randn(RANK, width_in, generator=generator)
        found[f"{BLOCK}.{place}.lora_B"] = torch.randn(width_out, RANK, generator=generator)
    found["heads.head.weight"] = torch.randn(CLASSES, D, generator=generator)
    found["heads.head.bias"] = torch.randn(CLASSES, generator=generator)
    return found


def card(*targets: str, base: VisionTransformer | None = None, **lora: Any) -> dict[str, Any]:
    """The card of an adapter on the second block of the model, or of a linear probe."""
    settings = {"rank": RANK, "targets": list(targets), "blocks": [1], "dropout": 0.0, "bias": "none"}
    settings["method"] = "lora" if targets else "none"
    return {
        "schema": SCHEMA_VERSION,
        "trial_id": "0123456789",
        "base": {"model": "vit_tiny", "weights": "GLYPHS_V1", **base_of(base or new_model())},
        "data": {"fingerprint": "f", "classes": CLASSES, "train": 60, "val": 20},
        "lora": {**settings, **lora},
        "effective_scaling": SCALING if targets else None,
        "class_names": ["ant", "bee", "cat"],
    }


def folder_of(path: Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> Path:
    card = {"sha256": sha256_of(tensors), **card}
    write_tensors(path / "adapter.safetensors", tensors, card)
    write_json(path / "adapter.json", card)
    return path


def assert_same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(tensors), dict(others), rtol=0, atol=0)


def assert_refused(model: nn.Module, folder: Path | str, message: str) -> None:
    """By both functions, in one line; the model is left as it was."""
    before = copy.deepcopy(model.state_dict())
    for place in (load_adapter, merge_adapter):
        with pytest.raises(ConfigError, match=message) as error:
            place(model, folder)
        assert "\n" not in str(error.value)
        assert_same(model.state_dict(), before)
        assert "lora_vit" not in {type(m).__module__.partition(".")[0] for m in model.modules()}


def test_merging_gives_fp32_of_one_rounding_and_changes_nothing_that_it_is_given(model):
    model.bfloat16()
    adapter = Adapter(tensors("fc1"), card("fc1"))
    copies = copy.deepcopy((model.state_dict(), adapter.tensors))
    merged = merged_state_dict(model, adapter)
    assert {t.dtype for t in merged.values()} == {torch.float32}
    a, b = (adapter.tensors[f"{FC1}.lora_{m}"].double() for m in "AB")
    exact = model.state_dict()[f"{FC1}.weight"].double() + SCALING * b @ a
    assert torch.equal(merged[f"{FC1}.weight"], exact.float())
    for t in merged.values():
        t.zero_()
    for now, before in zip((model.state_dict(), adapter.tensors), copies, strict=True):
        assert_same(now, before)


@pytest.mark.parametrize("method", ["lora_only", "all", "full", "none"])
def test_what_was_trained_besides_replaces_the_bases(model, method, tmp_path):
    """Biases, everything, or a probe's head alone: nothing that a second time could add."""
    names = [n for n in model.state_dict() if "heads" not in n and (n.endswith("bias") or method == "full")]
    if method == "lora_only":
        names = [f"{FC1}.bias", f"{BLOCK}.self_attention.in_proj_bias"]
    values = {n: torch.randn(model.state_dict()[n].shape) for n in names if method != "none"}
    lora = {"bias": method} if method in ("lora_only", "all") else {"method": method}
    targets = ("v", "fc1") if "bias" in lora else ()
    folder, base = folder_of(tmp_path, tensors(*targets, **values), card(*targets, **lora)), model.state_dict()
    for place in (merge_adapter, load_adapter):
        changed = place(copy.deepcopy(model), folder)
        assert_same({n: changed.state_dict()[n] for n in values}, values)
        if not targets:
            assert_same(changed.state_dict(), base | read_adapter(folder).tensors)
    if method == "none":
        assert_same(load_adapter(changed, folder).state_dict(), base | read_adapter(folder).tensors)


@pytest.mark.parametrize("head", ["another size", "the same size", "behind dropout", "another size behind dropout"])
def test_loaded_and_merged_compute_the_same_and_once_only(model, images, head, tmp_path):
    linear = nn.Linear(D, 5 if "another" in head else CLASSES)
    model.heads.head = nn.Sequential(nn.Dropout(0.5), linear) if "dropout" in head else linear
    loaded, x = model.double().eval(), images.double()
    merged = copy.deepcopy(loaded)
    folder = folder_of(tmp_path, tensors(*EVERY), card(*EVERY, dropout=0.5))
    assert load_adapter(loaded, folder) is loaded
    assert merge_adapter(merged, folder) is merged
    expected = merged(x)
    assert expected.shape == (4, CLASSES)
    for again, (adapted, said) in itertools.product(
        (load_adapter, merge_adapter), ((loaded, "has adapters already"), (merged, WEIGHTS))
    ):
        with pytest.raises(ConfigError, match=said):
            again(adapted, folder)
    # merged weights are rounded to fp32
    torch.testing.assert_close(loaded.double().eval()(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged(x), expected)
    for m in (loaded, merged):
        assert isinstance(m.heads.head, nn.Sequential) == ("dropout" in head)
    assert not [n for n in merged.state_dict() if "lora" in n]


def test_a_trials_adapter_is_trained_on_and_saved_for_the_trials_base(model, images, tmp_path):
    """With trained biases: what they were before the trial is known, so base and digest stay."""
    bias = {f"{FC1}.bias": torch.ones(MLP)}
    folder, base = folder_of(tmp_path, tensors("v", "fc1", **bias), card("v", "fc1", bias="lora_only")), new_model()
    base.requires_grad_(False)
    mark_lora_and_head_as_trainable(load_adapter(model, folder).train(), bias="all")
    model(images).square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    for p in model.requires_grad_(False).parameters():
        p.add_(0.1 * (p.grad is not None))
    (tmp_path / "new").mkdir()
    for names in (["a", "b", "c"], ["d", "e", "f"]):  # again, as in each epoch
        save_adapter(model, tmp_path / "new", class_names=names)
    found = read_adapter(tmp_path / "new")
    assert found.card["class_names"] == ["d", "e", "f"]
    assert (found.card["base"]["sha256"], found.card["lora"]["bias"]) == (base_of(base)["sha256"], "all")
    assert (found.card["lora"]["rank"], found.card["effective_scaling"]) == (RANK, SCALING)
    torch.testing.assert_close(found.tensors[f"{FC1}.bias"], torch.full((MLP,), 1.1))
    assert torch.equal(load_adapter(new_model(), tmp_path / "new").eval()(images), model.eval()(images))
    merged = merge_adapter(new_model(), tmp_path / "new").eval()(images)
    torch.testing.assert_close(merged, model(images), rtol=1e-4, atol=1e-4)  # fp32
    model.heads = base.heads
    with disable_adapter(model):
        torch.testing.assert_close(model(images), base(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(remove_adapter(model)(images), base(images))


@pytest.mark.parametrize("how", ["itself", "copied", "pickled", "by name", "replaced, not loaded"])
def test_each_pass_in_train_mode_draws_other_masks(model, images, how, tmp_path):
    if how == "replaced, not loaded":
        for name, p in replace_linear_with_lora(model, dropout=0.5).named_parameters():
            if "lora_B" in name:
                nn.init.ones_(p)
    else:
        load_adapter(model, folder_of(tmp_path, tensors("fc1"), card("fc1", dropout=0.5)))
    model.train()
    if how == "copied":
        model(images)
    used = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(how, lambda m: m)(model)
    first, second = (used(x=images) if how == "by name" else used(images) for _ in range(2))
    assert not torch.allclose(first, second)
    assert torch.equal(used.eval()(images), used(images))


def changed(change: Any) -> Any:
    """A function that changes the model of these tests."""
    return torch.no_grad()(lambda model: (change(model), model)[1])


def heads(**modules: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(modules))


LINEAR = nn.Linear(D, CLASSES)
HEADS = {
    "no bias": heads(head=nn.Linear(D, CLASSES, bias=False)),
    "identity": heads(head=nn.Identity()),
    "softmax": heads(head=nn.Sequential(LINEAR, nn.Softmax(-1))),
    "norm": heads(head=nn.Sequential(nn.LayerNorm(D), LINEAR)),
    "two layers": heads(head=nn.Sequential(nn.Linear(D, D), LINEAR)),
    "empty": heads(head=nn.Sequential()),
    "norm beside it": heads(norm=nn.LayerNorm(D), head=LINEAR),
    "softmax after it": heads(head=LINEAR, softmax=nn.Softmax(-1)),
    "hidden layer": new_model(representation_size=7).heads,
    "no Sequential": LINEAR,
}
HEAD = "heads are not one linear layer with bias, alone or after"
POSITIONS = "position embedding and perhaps other weights are not those"
NOT_PLAIN = r"not a plain model of torchvision's or timm's \(\w+\): wrap or compile it"
ANOTHER: dict[str, tuple[Any, str]] = {  # base
    "image size": (lambda m: new_model(image_size=32), "is for a model with image_size=16, here image_size=32"),
    "patch size": (lambda m: new_model(patch_size=4), "patch_size=8, here patch_size=4"),
    "blocks": (lambda m: new_model(num_layers=4), "num_layers=2, here num_layers=4"),
    "attention heads": (lambda m: new_model(num_heads=4), "num_heads=2, here num_heads=4"),
    "width": (lambda m: new_model(hidden_dim=32), "hidden_dim=16, here hidden_dim=32"),
    "hidden width": (lambda m: new_model(mlp_dim=32), "mlp_dim=24, here mlp_dim=32"),
    "random weights": (lambda m: new_model(seed=1), POSITIONS),
    "one weight": (changed(lambda m: m.encoder.layers[1].mlp[0].weight[3, 4].add_(1e-6)), WEIGHTS),
    "one bias": (changed(lambda m: m.encoder.ln.bias[0].fill_(0.5)), WEIGHTS),
    "positions": (changed(lambda m: m.encoder.pos_embedding[0, 2].add_(0.01)), POSITIONS),
    "eps": (changed(lambda m: setattr(m.encoder.layers[1].ln_2, "eps", 1e-5)), WEIGHTS),
    "bf16": (lambda m: m.bfloat16(), WEIGHTS),
    "activation": (
        changed(lambda m: setattr(m.encoder.layers[1].mlp, "1", nn.ReLU())),
        "the model has the weights of vit_tiny, but computes something else with them: make it by that name",
    ),
    "compiled": (torch.compile, NOT_PLAIN),
    "compiled in place": (changed(lambda m: m.compile()), NOT_PLAIN),
    "in parallel": (nn.DataParallel, NOT_PLAIN),
    "no ViT": (lambda m: nn.Sequential(nn.Linear(2, 2)), NOT_PLAIN),
    **{f"head: {name}": (changed(lambda m, h=h: setattr(m, "heads", h)), HEAD) for name, h in HEADS.items()},
}
SLOW = {"compiled": [pytest.mark.slow], "compiled in place": [pytest.mark.slow]}  # torch takes seconds to import it


@pytest.mark.parametrize("which", [pytest.param(name, marks=SLOW.get(name, ())) for name in ANOTHER])
def test_another_base_is_refused_and_left_as_it_was(which, model, tmp_path):
    change, message = ANOTHER[which]
    assert_refused(change(model), folder_of(tmp_path, tensors("fc1"), card("fc1")), message)


def test_weights_of_half_precision_take_no_adapter_though_they_are_the_bases(model, tmp_path):
    folder = folder_of(tmp_path, tensors("fc1"), card("fc1", base=model.half()))
    assert_refused(model, folder, r"the model is of torch\.float16, which would round the update away")
    load_adapter(model.float(), folder)


def test_a_position_embedding_interpolated_elsewhere_is_the_same(model, images, tmp_path):
    """Kinds of CPU differ in the last bits of what they interpolate."""
    folder, base = folder_of(tmp_path, tensors("fc1"), card("fc1")), copy.deepcopy(model.eval())
    model.encoder.pos_embedding.data *= 1 + 1e-6
    # a relative change of 1e-6 stays about as small in logits of size 1
    adapted = load_adapter(base, folder)(images)
    torch.testing.assert_close(load_adapter(model, folder)(images), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_base_is_known_by_its_values(model, dtype):
    trained = model.to(dtype)
    trained.heads.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(D, 7))
    assert base_of(trained) == base_of(new_model())


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["ant", "bee", "dog"], {}, "it lacks 'cat'"),
        (["bee", "ant", "cat"], {}, "in another order"),
        (["ant", "bee", "cat", "dog"], {}, "it has 'dog' in addition"),
        (None, {"fingerprint": "g", "train": 68, "val": 24}, "train 60 then, 68 now, val 20 then, 24 now"),
        (None, {"fingerprint": "g"}, "other contents or splits of as many images"),
    ],
)
def test_other_data_is_refused(names, data, message, model):
    about = card("fc1")
    adapter, base = Adapter(tensors("fc1"), about), base_of(model)
    bind(adapter, base, about["class_names"], about["data"])
    with pytest.raises(ConfigError, match=message):
        bind(adapter, base, names or about["class_names"], {**about["data"], **data})


def edited(path: Path, **changes: Any) -> None:
    about = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**about, **changes}))


def retrained(path: Path, change: Any) -> None:
    """Write other tensors with the card of those that were there."""
    found = tensors("fc1")
    change(found)
    write_tensors(path / "adapter.safetensors", found, json.loads((path / "adapter.json").read_text()))


OTHER_VALUES = r"adapter\.safetensors does not hold the values that were trained"


DAMAGED = {  # the files are changed afterwards
    "scaling edited": (lambda f: edited(f, effective_scaling=16.0), "not of one trial, or were edited"),
    "of another trial": (lambda f: edited(f, trial_id="9876543210"), "not of one trial, or were edited"),
    "no card": (lambda f: (f / "adapter.json").unlink(), r"adapter\.json does not exist: give the folder of a comp"),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), r"adapter\.safetensors does not exist: give the"),
    "nonsense": (lambda f: (f / "adapter.safetensors").write_bytes(b"nonsense"), "the adapter cannot be read"),
    "half a card": (lambda f: (f / "adapter.json").write_text('{"base": {'), "the adapter cannot be read"),
    "no card in either": (
        lambda f: [save_file(tensors("fc1"), f / "adapter.safetensors"), (f / "adapter.json").write_text("null")],
        "not of one trial, or were edited",
    ),
    "another version": (
        lambda f: folder_of(f, tensors("fc1"), {**card("fc1"), "schema": 0}),
        "the adapter is of version 0, this one reads",
    ),
    "another trial's record": (lambda f: write_record(f, make_record()), "not of one trial"),
    "half a record": (lambda f: (f / "record.json").write_text("{"), r"record\.json is not complete JSON"),
    "a tensor less": (lambda f: retrained(f, lambda found: found.pop(f"{FC1}.lora_A")), OTHER_VALUES),
    "a tensor more": (lambda f: retrained(f, lambda found: found.update(extra=torch.zeros(1))), OTHER_VALUES),
    "transposed": (
        lambda f: retrained(f, lambda found: found.update({f"{FC1}.lora_A": found[f"{FC1}.lora_A"].T.contiguous()})),
        OTHER_VALUES,
    ),
    "last bit": (
        lambda f: retrained(f, lambda found: found["heads.head.bias"].view(torch.int32)[-1:].bitwise_xor_(1)),
        OTHER_VALUES,
    ),
    **{
        status: (lambda f, s=status: write_record(f, make_record(status=s)), f"the trial is {status}, not completed")
        for status in ("running", "failed", "stopped", "interrupted")
    },
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_is_refused(what, model, tmp_path):
    folder = folder_of(tmp_path, tensors("fc1"), card("fc1"))
    damage, message = DAMAGED[what]
    damage(folder)
    assert_refused(model, folder, message)
