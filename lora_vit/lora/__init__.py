"""LoRA for packs of trials: functions, layers, injection into a model and merging out of it."""

import importlib
import sys
from types import ModuleType
from typing import Any

# torchvision wants one function of torch's compiler, whose own import takes a third of the start of a command: it gets
# one that imports the compiler when it is called.
_COMPILER = "torch._dynamo.utils"
if _COMPILER not in sys.modules:
    _later: Any = ModuleType(_COMPILER)
    _later.is_compile_supported = lambda device: importlib.import_module(_COMPILER).is_compile_supported(device)
    sys.modules[_COMPILER] = _later
    import torchvision  # noqa: F401

    del sys.modules[_COMPILER]
