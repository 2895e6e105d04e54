#!/usr/bin/env python3
"""Seconds from the command to the end of the first training step, cold and warm.

python benchmarks/startup.py [--repeats 3] [options of train.py, such as --data FOLDER]

Cold: nothing is cached; warm: the data's cache is there. For scale, what `import torch` alone takes.
--whole: instead, a whole run in an empty cache, from the command to its end. The last line is JSON.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch


def first_step(options: list[str], folder: Path) -> float:
    """Until the first line of metrics.jsonl."""
    command = [sys.executable, str(common.ROOT / "train.py"), *options, "--save_folder", str(folder),
               "--train_steps", "2", "--log_every", "1", "--num_samples", "0"]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors.decode())
    return seconds


def import_torch() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="measure whole runs instead")
    args, options = parser.parse_known_args()
    times = {"whole": []} if args.whole else {"import_torch": [], "cold": [], "warm": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            run = ["--cache_dir", str(root / "cache"), *options]
            if args.whole:
                run += ["--save_folder", str(root / "run")]
                times["whole"].append(common.run_script("train.py", run, root / "train.log"))
            else:
                times["import_torch"].append(import_torch())
                times["cold"].append(first_step(run, root / "a"))
                times["warm"].append(first_step(run, root / "b"))
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in median.items():
        print(f"{name:>12}: {seconds:.2f} s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common.report("startup", device, {"options": options, "repeats": args.repeats, "seconds": median})  # fmt: skip


if __name__ == "__main__":
    main()
