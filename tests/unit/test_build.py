"""What packs share of a backbone, and what they do not."""

import pytest
import torch
from helpers import trial_config

from lora_vit.build import ModelFactory


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [(["lora.rank=2"], True), (["lora=none"], True), (["lora=full"], False), (["lora.bias=lora_only"], False)],
)
def test_a_trunk_that_is_trained_is_no_other_packs(overrides, shared):
    """What is trained is in full precision also under bf16."""
    config = trial_config(*overrides)
    factory = ModelFactory(config, 4, torch.device("cpu"), torch.bfloat16)
    one, two = factory([config]), factory([config])
    assert (one.trunk is two.trunk) is shared
    assert not {p.data_ptr() for p in factory.original.parameters()} & {p.data_ptr() for p in two.trunk.parameters()}
    trained = {p.dtype for p in two.parameters() if p.requires_grad}
    frozen = {p.dtype for p in two.trunk.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, set() if "lora=full" in overrides else {torch.bfloat16})
