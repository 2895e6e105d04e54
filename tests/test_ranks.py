"""Faults of several ranks: one killed, one that hangs, two machines of which one is cut off."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm
from conftest import ROOT, environment, script
from helpers import flags, same_runs, wait_for_step
from torch.distributed import HashStore, PrefixStore

from diffusion import UserError
from diffusion.config import Config
from diffusion.data.batches import open_batches
from diffusion.files import checkpoint
from diffusion.runtime import distributed
from diffusion.runtime.seeding import permutation

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# train.py with something done to one rank, and each batch written to a file
PATCHED = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from diffusion.data.batches import Batches
from diffusion.runtime import distributed
real = Batches._load
rank = int(os.environ.get("RANK", 0))
plan = json.loads(os.environ.get("PLAN", "null"))
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
def load(self, step, low, high):
    if plan is not None and first and plan["rank"] == rank and plan["step"] == step:
        time.sleep(1000) if plan["what"] == "hang" else os.kill(os.getpid(), 9)
    batch = real(self, step, low, high)
    if "SEEN" in os.environ:
        with open(os.environ["SEEN"], "a") as out:
            out.write(json.dumps([step, low, self.indices(step)[low:high].tolist()]) + "\\n")
    return batch
Batches._load = load
if "FOLDERS" in os.environ:
    os.chdir(os.path.join(os.environ["FOLDERS"], str(rank)))
sys.argv[0] = {str(ROOT / "train.py")!r}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def patched(tmp_path) -> Path:
    (tmp_path / "patched.py").write_text(PATCHED)
    return tmp_path / "patched.py"


def launched(file: Path, options: dict, cwd: Path, ranks: int, *more: str, **env) -> list:
    command = [
        *TORCHRUN,
        "--standalone",
        f"--nproc_per_node={ranks}",
        *more,
        str(file),
        *flags(options),
    ]
    return subprocess.run(command, cwd=cwd, env=environment(ranks) | env, capture_output=True,
                          text=True, timeout=280)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(faces, tmp_path_factory):
    """(options, folder of a run of two ranks that nothing happened to)."""
    root = tmp_path_factory.mktemp("undisturbed")
    options = dict(
        data=str(faces), image_size=16, unet_dim=8, dim_mults=(1, 2), heads=2, batch_size=8,
        time_steps=20, train_steps=24, save_and_sample_every=4, log_every=1, lr_warmup_steps=4,
        num_samples=2, sample_steps=2, cache_dir=str(root / "cache"), device="cpu", amp="no",
        save_folder=str(root / "run"), condition="class", dropout=0.1, ema_decay=0.99,
        rank_timeout=15.0,
    )  # fmt: skip
    done = script("train.py", *flags(options), cwd=root, ranks=2)
    assert done.returncode == 0, done.stderr
    return options, root / "run"


@pytest.fixture
def two(undisturbed, tmp_path):
    options, whole = undisturbed
    return options | {"save_folder": str(tmp_path / "run")}, whole


def test_each_start_of_a_group_has_a_store_of_its_own():
    """torchrun's store outlives the ranks; what they wrote must not be read by the next ones."""
    store, size = HashStore(), 3

    def start() -> list:
        with ThreadPoolExecutor(size) as pool:
            came = [pool.submit(distributed.agree_on_name, store, r, size, 20.0) for r in (2, 1, 0)]
            return [PrefixStore(rank.result(), store) for rank in came]

    first = start()
    first[0].set("address", "old")
    with ThreadPoolExecutor(1) as pool:  # rank 1 comes, and dies before the others come
        pool.submit(distributed.agree_on_name, Stop(store), 1, size, 20.0).exception(10)
    second = start()
    assert not second[0].check(["address"])
    second[0].set("address", "new")
    assert [s.get("address") for s in second] == [b"new"] * size
    assert first[1].get("address") == b"old"


class Stop:
    """A store whose reader is killed while it waits."""

    def __init__(self, store):
        self.add = store.add

    def wait(self, *_):
        raise KeyboardInterrupt


def test_a_rank_that_does_not_come_is_named():
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(distributed.agree_on_name, store, 1, 3, 5.0)
        with pytest.raises(UserError, match=r"rank 2 has not come within 1 s \(1 of 3 ranks"):
            distributed.agree_on_name(store, 0, 3, 1.0)
    with pytest.raises(UserError, match="rank 0 has not come within 1 s"):
        distributed.agree_on_name(HashStore(), 1, 2, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_and_the_group_restarts(two, tmp_path, patched, rank):
    options, whole = two
    plan = json.dumps({"rank": rank, "step": 14, "what": "kill"})
    done = launched(patched, options, tmp_path, 2, "--max_restarts=2", PLAN=plan)
    assert done.returncode == 0, done.stderr
    assert "from step" in done.stdout
    same_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_and_the_group_restarts(two, tmp_path, patched):
    """It sleeps while it reads a batch, in a call that nothing interrupts."""
    options, whole = two
    plan = json.dumps({"rank": 1, "step": 14, "what": "hang"})
    done = launched(patched, options, tmp_path, 2, "--max_restarts=2", PLAN=plan)
    assert done.returncode == 0, done.stderr
    assert re.search(r"error: step 14: rank 0 lost another rank", done.stderr), done.stderr
    same_runs(tmp_path / "run", whole)


FAULTS = """
import os, sys, time
from diffusion.config import run_script
from diffusion.runtime import distributed as dist
import torch

def main():
    dist.setup("cpu", 3.0)
    dist.any_rank(False)
    bad = dist.rank() == int(os.environ["BAD"])
    if bad and os.environ["WHAT"] == "dies":
        os._exit(9)
    if bad:
        time.sleep(600)
    if os.environ["WHERE"] == "milestone":
        dist.barrier("step 4")
    try:
        dist.all_reduce_sum(torch.ones(3))
    except RuntimeError as error:
        sys.exit("error: " + dist.describe_comm_error(error))

run_script(main)
"""


@pytest.mark.parametrize("where", ["milestone", "step"])
@pytest.mark.parametrize("what, count, bad", [
    pytest.param("hangs", 3, 1, marks=pytest.mark.slow), ("dies", 3, 2), ("hangs", 2, 0), ("dies", 2, 0),
])  # fmt: skip
def test_a_rank_that_dies_or_hangs_ends_the_others(tmp_path, where, what, count, bad):
    """At a milestone rank 0 names it; in a step each says that it lost another rank."""
    (tmp_path / "work.py").write_text(FAULTS)
    env = {"BAD": str(bad), "WHAT": what, "WHERE": where}
    group = warm.Process(str(tmp_path / "work.py"), cwd=tmp_path, ranks=count, env=env)
    good = [rank for rank in range(count) if rank != bad]
    try:
        for rank in good:
            group.processes[rank].join(20)
            assert group.processes[rank].exitcode == 1, group.read(rank)
    finally:
        group.kill()  # the one that sleeps
    for process in group.processes:
        process.join(20)
        assert not process.is_alive()
    said = [group.read(rank)[1] for rank in good]
    if where == "step":
        assert all(
            f"error: rank {rank} lost another rank" in text for rank, text in zip(good, said)
        )
    elif bad == 0:
        assert all("step 4" in text and "rank 0" in text for text in said)
    else:
        assert re.search(rf"error: rank 0 .*step 4: rank {bad} ", said[0]), said


def children(pid: int) -> list[int]:
    text = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return sorted(map(int, text.split()))


@pytest.mark.slow
def test_a_rank_that_is_frozen_ends_the_others(tiny, tmp_path):
    """As by a debugger, or a machine that swaps: it is not dead, and does nothing."""
    options = tiny | dict(train_steps=4000, rank_timeout=12.0, num_samples=0)
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
        *flags(options),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(2), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    wait_for_step(tmp_path / "run", 6, process)
    stopped = children(process.pid)[-1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    printed, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert re.search(r"error: step \d+: rank 0 lost another rank|error: rank 0 .*rank 1", printed), printed  # fmt: skip
    assert time.monotonic() - began < 120
    assert checkpoint.newest(tmp_path / "run", print)["step"] >= 4


@pytest.mark.slow
def test_the_order_of_the_data_over_changing_world_sizes(tiny, tmp_path, patched):
    """1, 2, 4 and 1 ranks, one of them killed: each epoch is a permutation, nothing twice."""
    seen = tmp_path / "seen.jsonl"
    options = tiny | dict(num_samples=0, save_and_sample_every=4)
    before = 0
    for n, steps in ((1, 10), (2, 20), (4, 28), (1, 44)):
        done = launched(patched, options | dict(train_steps=steps), tmp_path, n, SEEN=str(seen))
        assert done.returncode == 0, done.stderr
        if before:
            found = rf"from step \d+; {before} ranks .*, {n} "
            assert re.search(found, done.stdout), done.stdout
        before = n
    table: dict[tuple, set] = {}
    for line in seen.read_text().splitlines():
        step, low, chosen = json.loads(line)
        for j, image in enumerate(chosen):
            table.setdefault((step, low + j), set()).add(image)
    assert sorted(table) == [(s, j) for s in range(44) for j in range(8)]
    assert all(len(images) == 1 for images in table.values()), "a step done again saw others"
    order = [images.pop() for _, images in sorted(table.items())]
    train = open_batches(Config(**options)).train
    for epoch in range(len(order) // len(train)):
        part = order[epoch * len(train) : (epoch + 1) * len(train)]
        assert part == train[permutation(len(train), 0, "order", epoch)].tolist()
        assert sorted(part) == train.tolist()


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_are_told(two, tmp_path, patched):
    """Else rank 0 would go on with its run, and the others start one of their own."""
    options, whole = two
    for rank in "01":
        (tmp_path / rank).mkdir()
    shutil.copytree(whole, tmp_path / "0" / "run")
    options = options | dict(save_folder="run", train_steps=28)
    done = launched(patched, options, tmp_path, 2, FOLDERS=str(tmp_path))
    assert done.returncode != 0 and "not all ranks find the same run in run" in done.stderr


LONG_WORK = """
import os, sys, time
from diffusion.runtime import distributed as dist
dist.setup("cpu", 3.0)
if dist.rank() == int(os.environ["WORKER"]):
    for _ in dist.progress(range(40), disable=False):
        time.sleep(0.2)
dist.barrier()
for _ in dist.progress(range(25), disable=False):  # and now both, without a word to each other
    time.sleep(0.2)
dist.barrier()
print("done")
dist.cleanup()
"""


@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, 1])
def test_a_rank_that_works_for_long_is_waited_for(tmp_path, worker):
    """For more than twice as long as a rank may hang."""
    (tmp_path / "work.py").write_text(LONG_WORK)
    done = warm.script(
        str(tmp_path / "work.py"), cwd=tmp_path, ranks=2, env={"WORKER": str(worker)}
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


def test_small_worlds_poll_for_a_stop_at_each_step(monkeypatch):
    assert all(distributed.should_poll_stop(step) for step in range(9))
    monkeypatch.setattr(distributed, "world_size", lambda: 512)
    polled = [step for step in range(1, 97) if distributed.should_poll_stop(step)]
    assert polled == list(range(8, 97, 8))


# --- two machines --------------------------------------------------------------------------------------


@contextmanager
def two_machines():
    """Two network namespaces joined by a cable: (run in one of them, pull or plug the cable)."""
    names = [f"diffusion{os.getpid()}{x}" for x in "ab"]
    ip = lambda *args: subprocess.run(["ip", *args], capture_output=True, text=True)  # noqa: E731
    if not shutil.which("ip") or ip("netns", "add", names[0]).returncode:
        pytest.skip("network namespaces are not permitted here")
    try:
        ip("netns", "add", names[1])
        made = ip(
            "link", "add", "va", "netns", names[0], "type", "veth", "peer", "vb", "netns", names[1]
        )
        if made.returncode:
            pytest.skip(f"no virtual cable: {made.stderr.strip()}")
        for name, device, address in zip(names, ("va", "vb"), ("10.99.0.1/24", "10.99.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield (lambda machine, command: ["ip", "netns", "exec", names[machine], *command],
               lambda state: ip("-n", names[1], "link", "set", "vb", state))  # fmt: skip
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_one_cut_off_and_brought_back(two, tmp_path):
    """The cable is pulled in mid-run: both sides say so and end; started again on both, as a
    cluster's scheduler does, the run ends in the bits of the one that nothing happened to."""
    options, whole = two
    with two_machines() as (on, cable):

        def start(machine: int) -> subprocess.Popen:
            command = on(machine, [
                *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={machine}", "--max_restarts=0",
                "--rdzv_backend=c10d", "--rdzv_endpoint=10.99.0.1:29517", "--rdzv_id=7",
                f"--local_addr=10.99.0.{machine + 1}",
                # a name does not lead to this address here, as it does on a real machine
                f"--rdzv_conf=is_host={machine == 0},join_timeout=100", str(ROOT / "train.py"), *flags(options),
            ])  # fmt: skip
            env = environment(2) | {"GLOO_SOCKET_IFNAME": "va" if machine == 0 else "vb"}
            out = open(tmp_path / f"machine{machine}.log", "a")
            return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)

        both = [start(0), start(1)]
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "step_00000008.pt").exists():
            assert time.monotonic() < deadline, logs(tmp_path)
            time.sleep(0.01)
        cable("down")
        began = time.monotonic()
        said = [
            rf"error: (rank {r} has finished|step \d+: rank {r} lost another rank)" for r in (0, 1)
        ]
        while not all(re.search(line, logs(tmp_path)) for line in said):
            assert time.monotonic() - began < 90, logs(tmp_path)
            time.sleep(0.1)
        print(f"both said so {time.monotonic() - began:.0f} s after the cable was pulled")
        for process in both:  # as Slurm does; torchrun itself waits 300 s for the other machine
            process.kill()
            process.wait(30)
        at = checkpoint.newest(tmp_path / "run", print)["step"]
        assert 8 <= at < 24
        cable("up")
        both = [start(0), start(1)]
        for process in both:
            assert process.wait(200) == 0, logs(tmp_path)
    same_runs(tmp_path / "run", whole)


def logs(folder: Path) -> str:
    return "\n".join(f.read_text() for f in sorted(folder.glob("machine*.log")))
