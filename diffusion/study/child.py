"""Run a script as `python SCRIPT ...` would, and write what it cost to a file.

python child.py RESULT.json SCRIPT ARGUMENTS...

The costs are taken here and not by the parent: os.wait4 and RUSAGE_CHILDREN count the parent's own
memory at the start of a child, too. The script ends as by Ctrl-C when the parent is gone.
"""

import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


def peak_memory() -> int:
    """Return the peak of this process's main memory, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def stop_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    result = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
        used = cuda is not None and cuda.is_initialized()
        cost = {
            "cpu_seconds": time.process_time(),
            "peak_memory": peak_memory(),
            "peak_device_memory": cuda.max_memory_allocated() if used else None,
        }
        with open(result, "x") as file:
            json.dump(cost, file)


if __name__ == "__main__":
    main()
