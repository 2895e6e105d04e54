"""The number of threads: the free cores', kept by a run, the user's where there is one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion.runtime import threads
from diffusion.runtime.threads import free_cores, idle_cores, quota, ticks

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
    assert idle_cores(before, after, {0, 9}) == 1.0
    assert idle_cores(before, before, {0, 1}) == 2.0  # less than a tick has passed


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
    monkeypatch.setattr(threads, "cores", lambda: 8)
    threads.use_free_cores.cache_clear()
    yield chosen
    threads.use_free_cores.cache_clear()


@pytest.mark.parametrize("free, expected", [
    (8.0, 8), (7.7, 8), (7.5, 7), (1.0, 1), (0.0, 1), (None, 8),
])  # fmt: skip
def test_as_many_threads_as_free_cores(machine, monkeypatch, free, expected):
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    said = threads.use_free_cores()
    assert machine[-1] == expected
    assert (said is None) == (expected == 8)
    if said:
        assert f" {expected} of 8 " in said and f"{free:.1f}" in said


@pytest.mark.parametrize("name", [*threads.ASKED, "RANK"])
def test_a_choice_is_left_alone(machine, monkeypatch, name):
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    monkeypatch.setenv(name, "3")
    assert threads.use_free_cores() is None
    assert threads.use_threads_of(2) is None
    assert machine == [8]


@pytest.mark.parametrize("saved, expected", [(2, 2), (8, 8), (None, 8), (16, 8)])
def test_a_run_keeps_its_number(machine, saved, expected):
    said = threads.use_threads_of(saved)
    assert machine[-1] == expected
    assert (said is None) == (expected == 8)


ASK = """
import json
import torch
from diffusion.runtime import threads
usual = torch.get_num_threads()
said = threads.use_free_cores()
print(json.dumps([usual, torch.get_num_threads(), said]))
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what cores do")
def test_under_load():
    """Beside a busy process for each core there is one thread, and the user is told."""
    count = len(os.sched_getaffinity(0))
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        assert free_cores() < 0.5 * count
        env = {k: v for k, v in os.environ.items() if k not in (*threads.ASKED, "RANK")}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=env, cwd=ROOT, capture_output=True, text=True
        )
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    usual, chosen, said = json.loads(done.stdout)
    if count > 1:
        assert chosen < usual and f"{chosen} of {usual}" in said
    else:
        assert (chosen, said) == (usual, None)


def test_a_resumed_run_computes_on_its_threads(tiny, monkeypatch, capsys):
    """The number is in the checkpoint; the one of this process does not count."""
    from diffusion.config import Config
    from diffusion.training.trainer import train

    for name in (*threads.ASKED, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "free_cores", lambda: None)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(Config(**tiny | dict(train_steps=1, save_and_sample_every=1, num_samples=0)))
        torch.set_num_threads(1)
        train(Config(**tiny | dict(train_steps=2, save_and_sample_every=1, num_samples=0)))
        assert torch.get_num_threads() == 2
        assert "2 threads" in capsys.readouterr().out
    finally:
        torch.set_num_threads(usual)
