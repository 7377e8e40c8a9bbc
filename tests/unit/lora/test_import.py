"""torchvision is imported without torch's compiler, which comes when something of it is wanted."""

from __future__ import annotations

import subprocess
import sys

LATER = """
import sys
import lora_vit.run
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") == sys.modules["torch._dynamo.utils"].is_compile_supported("cpu")
"""


def test_the_compiler_is_imported_when_it_is_wanted(tmp_path):
    done = subprocess.run([sys.executable, "-c", LATER], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
