"""The number of threads: the free cores', kept by a run, the user's where there is one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion import UserError
from diffusion.config import Config
from diffusion.files import checkpoint
from diffusion.runtime import distributed, threads
from diffusion.runtime.threads import free_cores, idle_cores, quota, ticks
from diffusion.training import recipe
from diffusion.training.trainer import train

ROOT = Path(__file__).resolve().parent.parent
# user nice system idle iowait irq softirq steal guest guest_nice
BEFORE = """cpu  300 0 30 600 0 0 0 0 0 0
cpu0 100 0 10 200 0 0 0 0 0 0
cpu1 100 0 10 200 0 0 0 0 0 0
cpu2 100 0 10 200 0 0 0 0 0 0
intr 1 2 3
"""
AFTER = """cpu  0 0 0 0 0 0 0 0 0 0
cpu0 100 0 10 210 10 0 0 0 0 0
cpu1 110 0 15 205 0 0 0 0 9 0
cpu2 100 5 10 200 0 5 5 5 0 0
intr 1 2 3
"""


def test_idle_cores():
    """Core 0 was idle, or waited for a disk; a quarter of core 1 was; all of core 2 was used."""
    before, after = ticks(BEFORE), ticks(AFTER)
    assert idle_cores(before, after, {0, 1, 2}) == 1.25
    assert idle_cores(before, after, {1}) == 0.25
    assert idle_cores(before, after, {0, 9}) is None  # a container that numbers them anew
    assert idle_cores(before, before, {0, 1}) == 2.0  # less than a tick has passed
    assert idle_cores({0: (10, 100)}, {0: (8, 110)}, {0}) == 0.0  # waiting may be counted back


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "max 100000\n"}, float("inf")),
    ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ({}, float("inf")),
])  # fmt: skip
def test_quota_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == cores


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight cores with torch's own eight threads, and nobody's choice."""
    for name in (*threads.ASKED, "RANK"):
        monkeypatch.delenv(name, raising=False)
    chosen = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "USUAL", 8)
    monkeypatch.setattr(threads, "_set", [8])
    threads.use_free_cores.cache_clear()
    yield chosen
    threads.use_free_cores.cache_clear()


@pytest.mark.parametrize("free, expected", [
    (8.0, 8), (7.7, 8), (7.5, 7), (1.0, 1), (0.0, 1), (None, 8),
])  # fmt: skip
def test_as_many_threads_as_free_cores(machine, monkeypatch, free, expected):
    monkeypatch.setattr(threads, "free_cores", lambda seconds: free)
    said = threads.use_free_cores()
    assert machine[-1] == expected
    assert (said is None) == (expected == 8)
    if said:
        assert f" {expected} of 8 " in said and f"{free:.1f}" in said


def test_a_moments_load_decides_nothing(machine, monkeypatch):
    looks = {0.2: 1.0, 1.0: 7.9}
    monkeypatch.setattr(threads, "free_cores", looks.pop)
    assert threads.use_free_cores() is None
    assert machine[-1] == 8 and not looks
    assert threads.use_free_cores() is None  # once in a process: nothing is left to look at


@pytest.mark.parametrize("name", [*threads.ASKED, "RANK"])
def test_a_users_choice_is_left_alone(machine, monkeypatch, name):
    monkeypatch.setattr(threads, "free_cores", lambda seconds: 1.0)
    monkeypatch.setenv(name, "3")
    assert threads.use_free_cores() is None
    assert "8" in threads.use_threads_of(2) and "2" in threads.use_threads_of(2)
    assert machine == [8]


def test_a_callers_choice_is_left_alone(machine, monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda seconds: 1.0)
    torch.set_num_threads(5)
    assert threads.use_free_cores() is None
    assert "5" in threads.use_threads_of(2)
    assert machine == [8, 5]


@pytest.mark.parametrize("now", [8, 1])
@pytest.mark.parametrize("saved, expected", [(2, 2), (8, 8), (None, 8), (16, None)])
def test_a_run_keeps_its_number(machine, now, saved, expected):
    """Also beside other load, and torch's own number if it is not known; 16 there are not."""
    threads.use(now)
    said = threads.use_threads_of(saved)
    assert machine[-1] == (expected or now)
    assert (said is None) == (machine[-1] == saved == now or (saved is None and now == 8))


def test_what_follows_a_run_computes_as_before(machine):
    with pytest.raises(KeyError), threads.kept():
        threads.use(2)
        raise KeyError
    assert machine[-1] == 8 and not threads.is_asked()


ASK = """
import json
from diffusion.runtime import distributed, threads
said = threads.use_free_cores()
print(json.dumps([threads.USUAL, threads.torch.get_num_threads(), said]))
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what cores do")
def test_under_load():
    """Beside busy processes on both of its cores there is one thread, and the user is told."""
    before = os.sched_getaffinity(0)
    cores = set(sorted(before)[:2])
    if quota(Path("/sys/fs/cgroup")) < len(before):
        pytest.skip("the machine is a part of one: its cores are idle when its time is used up")
    env = {k: v for k, v in os.environ.items() if k not in (*threads.ASKED, "RANK")}
    load = []
    os.sched_setaffinity(0, cores)  # the children's, too
    try:
        for core in cores:
            load.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(load[-1].pid, {core})
        time.sleep(0.3)
        free = free_cores(0.3)
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=env, cwd=ROOT, capture_output=True, text=True
        )
    finally:
        os.sched_setaffinity(0, before)
        for process in load:
            process.kill()
            process.wait()
    assert free is None or free < 0.5
    assert done.returncode == 0, done.stderr
    usual, chosen, said = json.loads(done.stdout)
    if usual > 1 and free is not None:
        assert chosen == 1 and f"1 of {usual}" in said
    else:
        assert (chosen, said) == (usual, None)


def test_a_resumed_run_computes_on_its_threads(tiny, monkeypatch, capsys):
    """The number is in the checkpoint; the one of this process does not count, and comes back."""
    for name in (*threads.ASKED, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "USUAL", 2)
    monkeypatch.setattr(distributed, "use_free_cores", lambda: None)
    seen = []
    monkeypatch.setattr(recipe.Recipe, "start", seeing(recipe.Recipe.start, seen))
    options = dict(save_and_sample_every=1, num_samples=0)
    usual = torch.get_num_threads()
    try:
        threads.use(2)
        train(Config(**tiny | options | dict(train_steps=1)))
        threads.use(1)
        train(Config(**tiny | options | dict(train_steps=2)))
        assert seen == [2, 2]  # before anything is computed
        assert torch.get_num_threads() == 1
        assert "2 of 2 threads" in capsys.readouterr().out
    finally:
        threads.use(usual)


def seeing(method, seen: list):
    """A method that also notes the number of threads when it is called."""

    def called(*args, **options):
        seen.append(torch.get_num_threads())
        return method(*args, **options)

    return called


@pytest.mark.parametrize("threads", ["2", 0, -1, True, 1.5, [1]])
def test_a_damaged_number_is_damage(threads):
    with pytest.raises(UserError, match="threads"):
        checkpoint.check_parts(Path("model.pt"), {"threads": threads}, {})
    for state in ({}, {"threads": None}, {"threads": 3}):  # old, of a GPU, of a CPU
        checkpoint.check_parts(Path("model.pt"), state, {})
