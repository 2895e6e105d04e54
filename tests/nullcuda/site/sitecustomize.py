"""Have torch take its own attention: cuDNN's asks for plans, of which a device of nothing has none.

Python imports this at its start, before any script; torch is watched for, not imported.
"""

import importlib.abc
import importlib.util
import sys


class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            module.backends.cuda.enable_cudnn_sdp(False)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Torch())
