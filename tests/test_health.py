"""What ends a run early: signals, broken numbers, lost processes, full disks. What it leaves, and what it says."""

import dataclasses
import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ONE, small_finetuning, small_pretraining
from soak import ROOT, read_log, same_runs

import evaluate
import finetune
import pretrain
from plumbing import annotations, ending, optim, runs
from plumbing.settings import InputError


@pytest.fixture
def at_update(monkeypatch):
    """at_update(number, do): `do(loss)` replaces the loss of that update (from 1) of an ITC run."""
    original, calls = pretrain.OBJECTIVES["itc"], []

    def patch(number, do):
        def objective(model, batch):
            loss, metrics = original(model, batch)
            calls.append(0)
            return (do(loss) if len(calls) == number else loss), metrics

        monkeypatch.setitem(pretrain.OBJECTIVES, "itc", objective)

    return patch


def itc(catalogue, out, **changes):
    settings = dict(objectives={"itc": 1.0}, max_steps=8, log_interval=1, eval_interval=3)
    return small_pretraining(catalogue, out, **{**settings, **changes})


def terminate_all():
    """As SLURM and systemd do: SIGTERM to the main process and to its loader workers at once."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.5)  # the error must wait for the end of this update


@pytest.mark.parametrize(
    "end, says",
    [
        (signal.SIGTERM, "^stopped after update 4, .*; --resume=auto goes on"),
        (signal.SIGINT, "^stopped after update 4, .*; --resume=auto goes on"),
        (terminate_all, "^stopped after update 4, .*; --resume=auto goes on"),
        (kill_a_worker, "a data loader worker was lost, .*fewer --workers; stopped after update 4, .*=auto goes on"),
    ],
)
def test_a_stopped_run_saves_and_its_resume_is_the_whole_run(catalogue, tmp_path, at_update, end, says):
    """By a signal to its only process, by one to its loader worker, or to both."""
    workers, steps = (1, 20) if callable(end) else (0, 8)
    pretrain.train(itc(catalogue, tmp_path / "whole", max_steps=steps), ONE)
    at_update(4, lambda loss: (end() if callable(end) else os.kill(os.getpid(), end)) or loss)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    config = itc(catalogue, tmp_path / "parts", max_steps=steps, resume="auto", workers=workers)
    with pytest.raises(ending.Stopped, match=says):
        pretrain.train(config, ONE)
    assert not multiprocessing.active_children()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 4
    pretrain.train(config, ONE)
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "number, code, says", [(signal.SIGKILL, 75, "a data loader worker was lost"), (signal.SIGHUP, 75, "stopped after")]
)
def test_a_program_with_two_workers_ends(catalogue, tmp_path, number, code, says):
    """Its workers ignore the first SIGTERM, which Python sends them when it ends. SIGKILL goes to one of them, SIGHUP,
    as from a terminal that closes, to the main process."""
    command = [sys.executable, ROOT / "pretrain.py", ROOT / "configs" / "demo.py", f"--data_root={catalogue}"]
    command += ["--objectives=itc", "--max_steps=100000", "--log_interval=1", "--eval_interval=-1", "--workers=2"]
    command += ["--image_size=32", "--batch_size=8", f"--out_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or not read_log(tmp_path):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]) if number == signal.SIGKILL else process.pid, number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == code and says in printed.strip().splitlines()[-1] and "Traceback" not in printed
    assert (tmp_path / "last.pt").exists() and not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize(
    "error, code, says",
    [
        (
            RuntimeError("DataLoader worker (pid(s) 1234) exited unexpectedly"),
            2,
            "error: a data loader worker was lost.*",
        ),
        (ending.Stopped("stopped after update 4"), 75, "stopped after update 4"),
    ],
)
def test_a_program_ends_in_one_line_with_an_exit_code(capsys, error, code, says):
    def fail():
        raise error

    with pytest.raises(SystemExit) as left:
        ending.run(fail)
    assert left.value.code == code and re.fullmatch(f"{says}\n", capsys.readouterr().err)
    assert ending.EXIT_STOPPED == 75


def test_a_run_that_ends_in_its_validation_has_saved_and_resumes_with_that_validation(catalogue, tmp_path, monkeypatch):
    pretrain.train(itc(catalogue, tmp_path / "whole"), ONE)
    config = itc(catalogue, tmp_path / "parts", resume="auto")
    measure = pretrain.evaluate.embed_retrieval
    by_signal, by_fault = ending.Stopped, InputError
    # The first validation is stopped by a signal, and then each one fails once.
    for due, kept, end in ((3, 0, by_signal), (3, 0, by_fault), (6, 1, by_fault), (8, 2, by_fault)):

        def validate(model, *args, kept=kept, end=end):
            if len([row for row in read_log(tmp_path / "parts") if "val_mean_recall" in row]) == kept:
                if end is by_fault:
                    raise InputError("9.jpg: image cannot be read")
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(model, *args)

        says = r"9\.jpg: image cannot be read" if end is by_fault else f"stopped after update {due}, "
        with monkeypatch.context() as patch, pytest.raises(end, match=says):
            patch.setattr(pretrain.evaluate, "embed_retrieval", validate)
            pretrain.train(config, ONE)
        assert len([row for row in read_log(tmp_path / "parts") if "val_mean_recall" in row]) == kept
        state = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
        assert state["step"] == due and state["validation_due"]
    pretrain.train(config, ONE)
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_broken_photo_in_the_middle_of_training_ends_the_run_after_a_save(catalogue, tmp_path, monkeypatch):
    opened, original = [], pretrain.data.open_image

    def open_image(path):
        opened.append(path)
        if len(opened) > 3 * 16 + 2:  # in the fourth update of 16 photos
            raise InputError(f"{path}: image cannot be read")
        return original(path)

    monkeypatch.setattr(pretrain.data, "open_image", open_image)
    config = itc(catalogue, tmp_path, eval_interval=-1)
    with pytest.raises(InputError, match="image cannot be read"):
        pretrain.train(config, ONE)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def test_a_float32_run_goes_on_as_float16_and_shows_the_skipped_updates(catalogue, tmp_path, at_update):
    at_update(4, lambda loss: loss + (loss - loss.detach()) * 3e38)  # infinite once it is scaled
    pretrain.train(itc(catalogue, tmp_path, max_steps=3), ONE)
    pretrain.train(itc(catalogue, tmp_path, max_steps=6, dtype="float16", resume="auto"), ONE)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 6 and state["scaler"]["scale"] > 0
    assert [row["skipped_updates"] for row in read_log(tmp_path) if "lr" in row and row["step"] > 3] >= [1, 1, 1]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda loss: loss * float("nan"), "loss nan, gradient norm nan"),
        (lambda loss: loss + float("inf"), "loss inf, gradient norm "),
        (lambda loss: loss + (loss - loss.detach()) * float("inf"), "loss nan, gradient norm "),
    ],
)
def test_a_broken_number_stops_the_run_and_names_update_objective_rate_and_products(
    catalogue, tmp_path, at_update, spoil, says
):
    config = itc(catalogue, tmp_path, warmup=8, save_interval=3, eval_interval=-1, log_interval=5)
    at_update(4, spoil)
    with pytest.raises(InputError) as error:
        pretrain.train(config, ONE)
    message = str(error.value)
    lr = 1e-3 * optim.lr_multiplier(3, 8, ())
    assert message.startswith(f"update 4: {says}") and "\n" not in message
    assert f"(objective itc, learning rate {lr:.3g}); the last checkpoint is older and stays" in message
    products = annotations.load_pretraining(config.data_root)
    _, rows, _ = pretrain.data.BatchSampler(len(products), config, ONE).update_at(3)
    assert message.endswith("products: " + ", ".join(products[i].name for i in rows))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def test_a_broken_gradient_under_a_finite_loss_is_found():
    model = torch.nn.Linear(2, 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    watcher = runs.Health(optimizer, scaler, torch.device("cpu"))
    for step, gradient in enumerate((1.0, float("inf"), float("nan"))):
        model.weight.grad = torch.full((1, 2), gradient)
        watcher.watch(step, torch.tensor(0.5, dtype=torch.bfloat16))
    assert watcher.note.tolist() == [1.0, 0.5, float("inf")]


def test_float16_counts_the_updates_that_the_scaler_skips_and_gives_up_below_scale_1():
    model = torch.nn.Linear(2, 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    watcher = runs.Health(optimizer, scaler, torch.device("cpu"))
    for step in range(4):
        scaler.scale((model.weight * 0 + float("inf")).sum() * 0 + model.weight.sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        watcher.watch(step, torch.tensor(1.0))
        optimizer.zero_grad()
    assert watcher.skipped_updates == 4
    assert watcher.note.tolist() == [2.0, 1.0, float("inf")]  # scales 2 and 1 were worth a try, .5 was not


# ---- disks and folders -----------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_its_last_checkpoint_is_good(
    catalogue, tmp_path, at_update, monkeypatch
):
    pretrain.train(itc(catalogue, tmp_path / "whole", save_interval=2), ONE)
    config = itc(catalogue, tmp_path / "parts", save_interval=2, resume="auto")
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        at_update(5, lambda loss: patch.setattr(os, "fsync", full) or loss)
        pretrain.train(config, ONE)
    path = tmp_path / "parts" / "log.jsonl"
    assert str(error.value) == (f"{path}: cannot be saved: No space left on device; what was there before is unharmed")
    assert not list((tmp_path / "parts").glob("*.tmp"))
    pretrain.train(config, ONE)
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_folder_that_cannot_be_written_ends_before_the_first_update(catalogue, tmp_path):
    (tmp_path / "file").write_text("")
    for out, cause in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(InputError) as error:
            pretrain.train(itc(catalogue, out), ONE)
        assert str(error.value).startswith(f"{out}: cannot be saved: {cause}")


def test_a_resume_says_which_settings_and_data_are_new_and_uses_them(catalogue, tmp_path, capsys):
    config = itc(catalogue, tmp_path, max_steps=2, resume="auto", sets=("FashionGen",))
    pretrain.train(config, ONE)
    assert "resume: the data" not in capsys.readouterr().out
    more = dataclasses.replace(config, max_steps=4, lr=2e-3, sets=("FashionGen", "Fashion200k"))
    pretrain.train(more, ONE)
    printed = capsys.readouterr().out
    assert f"{tmp_path}/last.pt: resumed after update 2" in printed
    assert "resume: lr was 0.001, is 0.002 from here on" in printed
    n = [len(annotations.load_products(catalogue, name, "train")) for name in more.sets]
    assert f"resume: the data had {n[0]} items, has {sum(n)}; their order is another" in printed
    assert read_log(tmp_path)[-2]["lr"] == 2e-3
    with pytest.raises(InputError, match="last.pt: cannot be resumed: 4 updates done, but max_steps is 2"):
        pretrain.train(config, ONE)


def test_fine_tuning_stops_for_signals_and_broken_numbers_too(catalogue, tmp_path, monkeypatch):
    config = small_finetuning("fashioniq", catalogue, tmp_path, eval_interval=-1, resume="auto")
    task = evaluate.TASKS["fashioniq"]
    objective = task.objective
    for effect, error, says in (
        (lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss, ending.Stopped, "stopped after update 1"),
        (lambda loss: loss * float("nan"), InputError, r"update 2: loss nan.*objective fashioniq.*cap\..*entry"),
    ):

        def broken(model, batch, effect=effect):
            loss, metrics = objective(model, batch)
            return effect(loss), metrics

        monkeypatch.setitem(evaluate.TASKS, "fashioniq", dataclasses.replace(task, objective=broken))
        with pytest.raises(error, match=says):
            finetune.train(config, ONE)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_a_new_start_gives_the_folder_of_an_older_run_another_name(catalogue, tmp_path, capsys):
    """zai-org/ChatGLM-6B#1074, roboflow/rf-detr#688: a start in the same folder destroyed an earlier run."""
    config = itc(catalogue, tmp_path / "run", max_steps=2)
    kept = []
    for number in (1, 2):
        pretrain.train(config, ONE)
        kept.append({path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "lock"})
        pretrain.train(dataclasses.replace(config, lr=number * 1e-4), ONE)
        assert f"the older run in it is now {tmp_path}/run.{2 * number - 1}; --out_dir=" in capsys.readouterr().out
        for name, content in kept[-1].items():
            assert (tmp_path / f"run.{2 * number - 1}" / name).read_bytes() == content
    runs.lock_folder(tmp_path / "run")  # the new folder is locked by this process, so no other one trains in it
    assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_resume_from_elsewhere_gives_the_folder_another_name_and_seeks_its_best_model_anew(catalogue, tmp_path):
    config = itc(catalogue, tmp_path / "run", max_steps=2)
    pretrain.train(config, ONE)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["best"] = 1.0  # a best that no validation beats
    torch.save(state, tmp_path / "run" / "copy.pt")  # in the folder that gets another name
    pretrain.train(dataclasses.replace(config, max_steps=3, resume=str(tmp_path / "run" / "copy.pt")), ONE)
    assert (tmp_path / "run.1" / "copy.pt").exists() and read_log(tmp_path / "run")[0]["step"] == 2
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert 0 <= best["best"] < 1 and best["step"] in (2, 3)
    # The folder's own last.pt goes on, whatever it is called on the command line.
    pretrain.train(dataclasses.replace(config, max_steps=4, resume=str(tmp_path / "run" / "." / "last.pt")), ONE)
    assert not (tmp_path / "run.2").exists() and read_log(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("part, max_steps", [("val", 2), ("train", 99)])
def test_one_process_that_fails_ends_all_and_torchrun_reports_its_line(catalogue, tmp_path, part, max_steps):
    """One process opens a broken photo. In a validation the other one loses it, and says so in one line."""
    shutil.copytree(catalogue, tmp_path / "data")
    photos = sorted((tmp_path / "data" / "FashionGen" / part).iterdir())
    for photo in photos[: 1 if part == "val" else None]:
        photo.write_bytes(b"no photo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["pretrain.py", "configs/demo.py", f"--data_root={tmp_path}/data", f"--out_dir={tmp_path}/run"]
    command += ["--objectives=itc:1.0", "--size=tiny", "--width=8", "--batch_size=8", "--workers=0"]
    command += [f"--max_steps={max_steps}"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    begun = time.monotonic()
    with open(tmp_path / "output.txt", "w") as file:  # which no process that is left over keeps waiting
        process = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment, timeout=120)
    assert process.returncode == 1  # torchrun's own
    assert time.monotonic() - begun < 60  # the end itself takes seconds
    printed = (tmp_path / "output.txt").read_text()
    _, _, report = printed.partition("pretrain.py FAILED")
    assert re.search(r"\n  plumbing\.settings\.InputError: error: .*: image cannot be read: .*--missing=skip\n", report)
    assert report.count("Traceback") <= (1 if part == "val" else 2)  # of those alone who opened a broken photo
    if part == "val":
        assert printed.count("Traceback") == 2  # torchrun's own, too
        assert len(re.findall("\nerror: lost the other processes; one of them says why: .*gloo", printed)) == 1
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2
