"""kill -9 at random moments and the same command again: the end is that of the undisturbed run, to the bit.

All with a loader worker, dropout, augmentation, gradient accumulation and bfloat16."""

import os
import random
import signal
import subprocess
import sys

import pytest
import soak
import torch

from plumbing import ending, runs, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    soak.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """whole(task, processes): the folder of the undisturbed run, made once."""

    def run(task, processes):
        out = folder / f"whole_{task}_{processes}"
        if not out.exists():
            soak.finish(soak.start(task, processes, folder, out), out)
        return out

    return run


def test_three_kills(folder, whole, tmp_path):
    """Past a random step, in a save, and by a signal that asks: three ends of a process, one run."""
    process = soak.start("pretrain", 1, folder, tmp_path / "run")
    assert soak.wait_for(process, tmp_path / "run", random.Random(0).randrange(4, 9))
    soak.kill(process)
    code = soak.IN_SAVE.format(n=3)
    process = soak.start("pretrain", 1, folder, tmp_path / "run", [sys.executable, "-c", code])
    assert process.wait(600) == -signal.SIGKILL
    process = soak.start("pretrain", 1, folder, tmp_path / "run")
    assert soak.wait_for(process, tmp_path / "run", soak.reached(tmp_path / "run") + 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == ending.EXIT_STOPPED
    assert "; --resume=auto goes on" in (tmp_path / "run" / "output.txt").read_text()
    soak.finish(soak.start("pretrain", 1, folder, tmp_path / "run"), tmp_path / "run")
    soak.same_runs(whole("pretrain", 1), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("task, processes, kills", [("fashioniq", 1, 3), ("pretrain", 2, 2), ("fashioniq", 2, 2)])
def test_kills(task, processes, kills, folder, whole, tmp_path):
    done = soak.run_with_kills(task, processes, folder, tmp_path / "run", kills, random.Random(processes))
    assert done >= 1
    soak.same_runs(whole(task, processes), tmp_path / "run")


@pytest.mark.slow
def test_torchrun_brings_the_group_back_when_a_worker_is_killed(folder, whole, tmp_path):
    out = tmp_path / "run"
    process = soak.start("pretrain", 2, folder, out, restarts=3)
    assert soak.wait_for(process, out, 9)
    workers = [pid for pid in soak.children(process.pid) if f"RANK={random.Random(0).randrange(2)}" in environment(pid)]
    os.kill(min(workers), signal.SIGKILL)
    soak.finish(process, out)
    assert "resumed after update" in (out / "output.txt").read_text()
    soak.same_runs(whole("pretrain", 2), out)


@pytest.mark.slow
def test_torchrun_stops_on_a_signal_with_a_save(folder, whole, tmp_path):
    out = tmp_path / "run"
    process = soak.start("pretrain", 2, folder, out)
    assert soak.wait_for(process, out, 9)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) != 0
    assert "stopped after update" in (out / "output.txt").read_text()
    assert torch.load(out / "last.pt", weights_only=True)["step"] >= 9
    soak.finish(soak.start("pretrain", 2, folder, out), out)
    soak.same_runs(whole("pretrain", 2), out)


def environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(tmp_path):
    """A scheduler that starts a job twice must not have two processes write one checkpoint."""
    code = "import pathlib, sys, time; from plumbing import runs; runs.open_folder(pathlib.Path(sys.argv[1]), False)"
    code += "; print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=soak.ROOT) as first:
        first.stdout.readline()
        with pytest.raises(settings.InputError, match=f"{tmp_path}: process {first.pid} on .* trains in it; stop it "):
            runs.open_folder(tmp_path, False)
        first.kill()
    runs.open_folder(tmp_path, False)
