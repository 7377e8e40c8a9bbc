"""LoRA for packs of trials: functions, layers, injection into a model and merging out of it."""

import importlib
import sys
from types import ModuleType
from typing import Any


def _import_torchvision() -> None:
    """Import torchvision without torch's compiler, whose own import takes a third of the start of a command.

    torchvision wants one function of it, for boxes, and gets one that imports the compiler when it is called; so does
    everything else that is asked of this module meanwhile.
    """
    name = "torch._dynamo.utils"
    if name in sys.modules:
        return
    later: Any = ModuleType(name)

    def of_compiler(attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system looks for some
            raise AttributeError(attribute)
        if sys.modules.get(name) is later:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    later.__getattr__ = of_compiler
    later.is_compile_supported = lambda device_type: of_compiler("is_compile_supported")(device_type)
    sys.modules[name] = later
    import torchvision  # noqa: F401

    if sys.modules.get(name) is later:
        del sys.modules[name]


_import_torchvision()
