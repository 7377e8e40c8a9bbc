"""torchvision is imported without torch's compiler, which comes when something of it is wanted."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = """
import sys
import lora_vit.run
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") == sys.modules["torch._dynamo.utils"].is_compile_supported("cpu")
"""
MEANWHILE = """
import sys, types
class Asks(types.SimpleNamespace):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.ops":
            from torch._dynamo.utils import counters
            self.found = counters
sys.meta_path.insert(0, asks := Asks())
import lora_vit.run, torch._dynamo
assert asks.found is torch._dynamo.utils.counters
"""


@pytest.mark.parametrize("script", [LATER, MEANWHILE])
def test_the_compiler_is_imported_when_it_is_wanted(script, tmp_path):
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
