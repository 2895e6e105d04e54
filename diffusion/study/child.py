"""Runs a script as `python SCRIPT ...` would, and leaves what it cost in a file.

python child.py RESULT.json SCRIPT ARGUMENTS...

Ends as by Ctrl-C when the process that started it is gone.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most."""
    try:
        status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's, too
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_device_memory() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated()


def watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    result = Path(sys.argv[1])
    script = sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        found = {
            "cpu_seconds": time.process_time(),
            "peak_memory": peak_memory(),
            "peak_device_memory": peak_device_memory(),
        }
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
