"""Adapters on a plain torchvision model: the public pair, every target, and the properties of an adapter."""

import copy
import inspect
import zlib

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import VisionTransformer, vit_b_16

from lora_vit import (
    mark_lora_and_head_as_trainable,
    randomness,
    remove_adapter,
    replace_linear_with_lora,
    trainable_parameters,
)
from lora_vit.config import TARGETS
from lora_vit.distributed import Process
from lora_vit.lora.dropout import DropoutState
from lora_vit.lora.inject import Attention
from lora_vit.lora.layers import LoRAAdapters


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    m = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(m.heads.head.weight)
    return m.double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    modules = (m for m in model.modules() if isinstance(m, LoRAAdapters))
    return {name: t.detach().clone() for m in modules for name, t in m.trial_tensors(0).items()}


def train_steps(model: nn.Module, images: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def test_the_documented_snippet_runs_as_it_stands():
    model = vit_b_16(weights=None)
    model.heads.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(768, 200))
    replace_linear_with_lora(model)
    mark_lora_and_head_as_trainable(model, head_substring="heads.head", bias="none")
    # r (in + out) for q, k, v, o and the two MLP layers of 12 blocks, and the head
    adapter = 12 * 4 * (4 * (768 + 768) + 2 * (768 + 3072))
    head = 768 * 200 + 200
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter + head
    table = {row.split()[-1]: row.split()[:2] for row in trainable_parameters(model).splitlines()}
    assert table.pop("trained") == [f"{adapter + head:,}", f"{(adapter + head) / (85_798_656 + adapter + head):.3%}"]
    assert (table.pop("frozen")[0], table.pop("all")[1]) == ("85,798,656", "100.000%")
    assert len(table) == 4 * 2 + 2
    assert table["encoder.layers.encoder_layer_*.mlp.3.lora.lora_B"][0] == f"{12 * 4 * 768:,}"


def test_library_defaults_equal_the_config(project_root):
    config = yaml.safe_load((project_root / "conf/lora/default.yaml").read_text())
    defaults = {n: p.default for n, p in inspect.signature(replace_linear_with_lora).parameters.items()}
    for key in ("rank", "alpha", "dropout", "blocks", "scaling"):
        assert defaults[key] == config[key]
    assert list(defaults["targets"]) == config["targets"]
    assert defaults["seed"] == yaml.safe_load((project_root / "conf/config.yaml").read_text())["seed"]


def test_the_processes_of_a_group_draw_other_masks(model, images, monkeypatch):
    """As the parts of one batch do."""
    replace_linear_with_lora(model, dropout=0.5).double().train()
    adapters = next(m for m in model.modules() if isinstance(m, LoRAAdapters))
    model(images)
    whole = adapters.state.rows(1, 5)
    for rank in (0, 1):
        adapters.state._forwards = 0
        monkeypatch.setattr("lora_vit.lora.dropout.this_process", lambda rank=rank: Process(rank, 2))
        model(images[:2])
        assert torch.equal(adapters.state.rows(1, 5), whole[:, 2 * rank : 2 * rank + 2])


def test_masks_are_keyed_by_seed_pass_and_the_inputs_name(model, images):
    """Passes in train mode count; names are torchvision's, one for q, k and v together."""
    replace_linear_with_lora(model, dropout=0.5, seed=7).double()
    inputs = ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
    names = [f"encoder.layers.encoder_layer_{i}.{name}" for i in range(2) for name in inputs]
    adapters = {a._module_key: a for a in model.modules() if isinstance(a, LoRAAdapters)}
    assert adapters.keys() == {zlib.crc32(name.encode()) for name in names}
    expected = DropoutState([randomness.key("dropout", 7)])
    for step, batch in enumerate((4, 3, 1)):
        model.train()(images[:batch])
        model.eval()(images)
        expected.set(torch.tensor([step]), torch.arange(batch))
        for key, a in adapters.items():
            assert torch.equal(a.state.rows(key, 5), expected.rows(key, 5))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_keeps_its_mode_and_device(model, images, training):
    model.train(training).to("meta")
    parts = replace_linear_with_lora(model, dropout=0.5).double().modules()
    assert all(m.training == training for m in parts)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model(images.to("meta")).is_meta  # dropout in train mode: its key follows the images


def test_blocks_are_found_at_any_depth_and_keep_their_order(model, images):
    expected = model.eval()(images)
    wrapped = nn.ModuleDict({"vit": model, "other": nn.Linear(2, 2)})
    assert replace_linear_with_lora(wrapped) is wrapped
    assert all(isinstance(m.self_attention, Attention) for m in model.encoder.layers)
    torch.testing.assert_close(model.double()(images), expected, rtol=1e-12, atol=1e-12)
    assert len(adapters_of(wrapped)) == 2 * 2 * len(TARGETS)
    assert all(name.startswith("vit.encoder.layers.encoder_layer_") for name in adapters_of(wrapped))


@pytest.mark.parametrize("targets", [TARGETS, ("fc1",), ("fc2",)])
def test_ranks_up_to_the_narrowest_layer(targets):
    model = VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=8, num_classes=5)
    with pytest.raises(ValueError, match=r"rank=9 is impossible: encoder\..*_0\.mlp\.\d is 8 wide"):
        replace_linear_with_lora(model, rank=9, targets=targets)
    replace_linear_with_lora(copy.deepcopy(model), rank=16, targets=["o"])
    replace_linear_with_lora(model, rank=8, targets=targets)


def test_trained_adapters_are_not_replaced_unasked_and_leave_nothing(model, images):
    again = copy.deepcopy(model)
    replace_linear_with_lora(model, rank=3, dropout=0.9, seed=5)
    trained = adapters_of(model)
    with pytest.raises(ValueError, match="the model has adapters already: take them out with"):
        replace_linear_with_lora(model, rank=2)
    torch.testing.assert_close(adapters_of(model), trained, rtol=0, atol=0)
    remove_adapter(model)
    for m in (model, again):
        replace_linear_with_lora(m, rank=2, targets=["v", "fc1"], dropout=0.3, seed=7).double()
        mark_lora_and_head_as_trainable(m)
        train_steps(m.train(), images, 2)
    assert {n.split(".")[-2] for n in adapters_of(model)} == {"v", "0"}
    torch.testing.assert_close(adapters_of(model), adapters_of(again), rtol=0, atol=0)


SETTINGS = {
    "rank": {"rank": 2},
    "alpha": {"alpha": 8.0},
    "dropout": {"dropout": 0.5},
    "targets": {"targets": ["q", "v"]},
    "blocks": {"blocks": [1]},
    "scaling": {"scaling": "rslora"},
    "seed": {"seed": 1},
    "method": {"method": "dora"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_outcome(model, images, name):
    def outcome(**settings) -> torch.Tensor:
        m = copy.deepcopy(model)
        replace_linear_with_lora(m, **settings).double()
        mark_lora_and_head_as_trainable(m)
        train_steps(m.train(), images, 3)
        return m.eval()(images)

    assert not torch.allclose(outcome(), outcome(**SETTINGS[name]), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": []}, r"blocks=None, targets=\[\] match nothing"),
        ({"targets": ["q", "qkv"]}, "q, k, v, o, fc1, fc2"),
        ({"blocks": [0, 7]}, "blocks 0 to 1"),
        ({"blocks": [-1]}, "blocks 0 to 1"),
        ({"blocks": []}, "blocks 0 to 1"),
        ({"rank": 0}, "rank=0 is impossible"),
        ({"rank": 2.5}, "rank=2.5 is impossible"),
        ({"rank": "8"}, "rank=8 is impossible"),
        ({"rank": 17}, "16 wide"),
        ({"alpha": 0.0}, "alpha=0.0 is impossible"),
        ({"alpha": float("nan")}, "alpha=nan is impossible"),
        ({"alpha": float("inf")}, "alpha=inf is impossible"),
        ({"dropout": 1.0}, "dropout=1.0 is impossible"),
        ({"dropout": -0.1}, "dropout=-0.1 is impossible"),
        ({"scaling": "half"}, "scaling=half is unknown.*standard, rslora"),
        ({"method": "full"}, "method=full is unknown.*lora, dora"),
    ],
)
def test_impossible_settings_say_what_exists_and_change_nothing(model, settings, message):
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_linear_with_lora(model, **settings)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("settings", [{"bias": False}, {"kdim": 8}, {"add_bias_kv": True}])
def test_a_block_that_cannot_be_adapted_leaves_the_others_alone(model, settings):
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(16, 2, **settings)
    before = list(model.modules())
    with pytest.raises(ValueError, match="only self-attention with one biased q, k, v projection"):
        replace_linear_with_lora(model)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


def test_a_model_without_encoder_blocks_lists_its_linear_layers():
    with pytest.raises(ValueError, match=r"no target matches.*linear layers: 0, 1, .*, 18, 19\)"):  # not all of many
        replace_linear_with_lora(nn.Sequential(*(nn.Linear(1, 1) for _ in range(30))))
    with pytest.raises(ValueError, match=r"linear layers: none\)"):
        replace_linear_with_lora(nn.Sequential(nn.ReLU()))


def test_mark_needs_adapters_and_a_head(model):
    with pytest.raises(ValueError, match="replace_linear_with_lora first"):
        mark_lora_and_head_as_trainable(model)
    replace_linear_with_lora(model)
    with pytest.raises(ValueError, match=r"'classifier' \(top level: class_token, conv_proj, encoder, heads\)"):
        mark_lora_and_head_as_trainable(model, head_substring="classifier")
    with pytest.raises(ValueError, match=r"bias=some is unknown.*none, lora_only, all"):
        mark_lora_and_head_as_trainable(model, bias="some")
