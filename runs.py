"""The run folder of a training stage, requests to stop it, and its health."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch

from common import all_mean, gather_objects, in_group, lr_multiplier, replacing, write_json, writing
from settings import InputError


class StopSignals:
    """SIGTERM and SIGINT, from here to `restore()`, only set `asked`: the loop finishes its update, saves and leaves.

    A second Ctrl-C ends a run of one process at once; under torchrun, which passes each one on, it does not."""

    def __init__(self):
        self.asked = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT and not in_group():
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Health:
    """Notes the first update whose loss or gradient is NaN or infinite, on the device, where nothing waits for it.

    `check` reads the note, at log lines and before every save: so the run ends some updates later, yet names the right
    one, for what an update was made of follows from its number. Under float16 infinite gradients are the scaler's
    business, which skips such updates; they are counted, and count as broken once its scale has fallen below 1."""

    def __init__(self, device, skipped_updates=0):
        self.note = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # update, loss, gradient norm
        self.skipped_updates = skipped_updates

    def step(self, step, loss, optimizer, scaler):
        """Do the optimizer's update `step` (from 0), whose loss on this process is `loss` (), and look at both."""
        scale = scaler.get_scale()  # 1.0 without a scaler; with one, scaler.step waits for the device anyway
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [] if scaler.is_enabled() else [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss.device)  # of nothing: 0
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            self.skipped_updates += 1
            norm = norm + (math.inf if scale < 1 else 0.0)
        number = torch.full((), step, device=loss.device)
        row = torch.stack([value.to(self.note) for value in (number, loss.detach(), norm)])
        self.note = torch.where((self.note[0] < 0) & ~row.isfinite().all(), row, self.note)

    def check(self, optimizer, config, batches, name_of):
        """Raise InputError, on every process, where an update was broken: its number, objective, rate and products.

        name_of(index): how messages call the data set's item. To be called by all processes together."""
        broken = [row for row in gather_objects(self.note.tolist()) if row[0] >= 0]
        if not broken:
            return
        step, loss, norm = min(broken, key=lambda row: row[0])
        _, rows, objective = batches.rows_of(int(step))
        lr = optimizer.param_groups[0]["base_lr"] * lr_multiplier(step, config.warmup, config.milestones)
        raise InputError(
            f"update {int(step) + 1}: loss {loss:g}, gradient norm {norm:g} (objective {objective}, learning rate "
            f"{lr:.3g}); the last checkpoint is older and stays; lower --lr, or look at this update's products: "
            f"{', '.join(name_of(int(row)) for row in rows)}"
        )


def mean_of_updates(sums, device):
    """{name: mean per update over all processes} of {name: sum, "updates": n}; sums are floats or device tensors."""
    n = sums["updates"]
    flat = {k: torch.as_tensor(v, dtype=torch.float64, device=device).sum() for k, v in sums.items() if k != "updates"}
    return {name: float(all_mean(value / n)) for name, value in flat.items()}


def describe_run(config):
    """What must be known to run this again: command, settings, git commit, versions."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "config": dataclasses.asdict(config),
        "git_commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def due(config, done, stopping=False):
    """(log, validate, save): what is to be done after `done` updates; `stopping`: and then the run leaves."""

    def every(interval):
        return done == config.max_steps or (interval > 0 and done % interval == 0)

    validate = config.eval_interval >= 0 and every(config.eval_interval)
    return every(config.log_interval), validate, validate or every(config.save_interval) or stopping


_locks = {}  # {run folder: its open lock file}; the system lets go of it when the process dies, however it does


def lock_folder(folder):
    """Raise InputError where another process trains in the folder: two would write one checkpoint in turns."""
    import fcntl  # not on Windows

    _locks.pop(folder, None)
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers, which may outlive us, do not hold it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        who = file.read().strip() or "another process"
        raise InputError(f"{folder}: {who} trains in it; stop it or choose another --out_dir") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    _locks[folder] = file


def open_run(config, start):
    """Make the run folder ready for updates from `start` on: a lock, run.json, and a log without lines past `start`.

    A new start in the folder of another run renames that one's files to *.before: a later --resume=auto must not find
    them, and they may be days of work. Raises InputError where the folder cannot be written, or is in use."""
    folder = Path(config.out_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if start == 0 and (folder / "last.pt").exists():
            for name in ("last.pt", "best.pt", "log.jsonl"):
                if (folder / name).exists():
                    os.replace(folder / name, folder / f"{name}.before")
            print(f"{folder}: holds an older run, kept as *.before (--resume=auto would have gone on with it)")
    write_json(folder / "run.json", describe_run(config))
    cut_log(folder / "log.jsonl", start)


def start_wandb(config):
    """A Weights & Biases run where the setting `wandb` names a project, else None; InputError if not installed."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise InputError(f"wandb: set to {config.wandb!r}, but the package is missing; pip install wandb") from None
    return wandb.init(project=config.wandb, config=dataclasses.asdict(config), dir=config.out_dir)


def append_log(path, row):
    """One JSON line; not-a-number and infinity are not JSON, so they are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that lasts, with log lines that do not, would leave a gap


def cut_log(path, step):
    """Drop the lines past `step`, and a last line cut short, so that a resumed run writes each step once."""
    if not Path(path).exists():
        return
    kept = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def as_values(tree):
    """A dict of sums, nested or not, for a checkpoint: scalars as floats, exactly; other tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: as_values(value) for key, value in tree.items()}
    return tree.cpu() if torch.is_tensor(tree) and tree.ndim else float(tree)


def own_part(state, processes):
    """This process's part of what differs between them, state["parts"] = gather_objects(...); {} where there is none.

    A run resumed with another number of processes shares the parts out as they come."""
    parts = state.get("parts") or [{}]
    return parts[processes.rank % len(parts)]


def peak_memory_gb(device):
    """Peak memory so far in GB: the GPU's allocator where there is one, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows, which has no torchrun on GPUs to speak of either

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
