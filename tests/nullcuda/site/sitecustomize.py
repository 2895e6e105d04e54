"""What torch needs on a device that computes nothing: its own attention, and values that are good.

cuDNN's attention asks for plans, and the device has none. Whether numbers are finite it answers
with 0, as it answers all, and a run would end for that.

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
            finite = module.Tensor.isfinite

            def isfinite(x):
                return module.ones(x.shape, dtype=module.bool) if x.is_cuda else finite(x)

            module.Tensor.isfinite = isfinite

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Torch())
