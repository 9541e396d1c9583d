"""The bookkeeping of a training run, the same for all stages: run folder, log, checkpoints, stops, health.

pretrain.py shows how a loop uses it. A run folder holds run.json (how to run it again), log.jsonl, last.pt (all that a
resume needs), best.pt (the best model by the metric that selects) and lock."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import checkpoint, ending, optim, settings, weights
from plumbing.files import reading, replacing, shown, write_json, writing
from plumbing.processes import all_mean, any_process, copy_from_main, gather_objects, in_group, start_processes
from plumbing.settings import COUNT, DEVICES, DTYPES, FROM_0, InputError, setting

VALIDATION = {"data_root", "missing", "image_size", "max_tokens", "split", "gallery"}  # settings that change its values
# SIGHUP is a closed terminal. SLURM sends SIGTERM, or before the end of the time what its --signal says, often SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"))


@dataclass
class RunConfig:
    """The settings of the machine and of the log, which all stages have."""

    device: str = setting("auto", "auto, cpu or cuda", choices=DEVICES, group="machine")
    dtype: str = setting("float32", "float32, bfloat16 (autocast) or float16 (and GradScaler)", choices=DTYPES)
    tf32: bool = setting(
        True, "float32 matrix products on GPUs in TF32, as torch did it in the paper's time; the final table: without"
    )
    compile: bool = setting(False, "torch.compile the model")
    workers: int = setting(4, "data loader workers per process; 0: load in the training process", FROM_0)
    seed: int = setting(0, "every random draw follows from it", (0, 2**63 - 1))
    deterministic: bool = setting(False, "only deterministic kernels; on CPU they always are")

    out_dir: str = setting("", "run folder; empty: runs/<name of the config file>", group="log and checkpoints")
    resume: str = setting("", "auto (newest whole checkpoint of the run folder, else start) or a checkpoint")
    log_interval: int = setting(50, "updates between log lines", COUNT)
    eval_interval: int = setting(2_000, "updates between validations; 0: only at the end, -1: never", (-1, math.inf))
    eval_batch_size: int = setting(64, "images or texts a process embeds at a time in validation", COUNT)
    save_interval: int = setting(0, "updates between further checkpoints; 0: none but those of validations", FROM_0)
    wandb: str = setting("", "Weights & Biases project; empty: off")


def main(config_class, train, description, files=None):
    """A stage's whole program: `train(config, processes)` with the settings of the command line.

    config_class: its settings, which inherit RunConfig. description: what `--help` says of it.
    files: see `settings.load_config`. How it ends: see `ending.run`."""

    def start():
        config = settings.load_config(config_class, description=description, files=files)
        processes = start_processes(config.device, config.deterministic, config.tf32)
        check_machine(config, processes.device)
        train(config, processes)

    ending.run(start)


def check_machine(config, device):
    """Raise InputError, before any work, where the machine lacks what training or a setting needs."""
    if None in STOP_SIGNALS:
        raise InputError("training needs Linux or macOS; on Windows start it in WSL")
    if config.wandb:
        try:
            from wandb import init  # noqa: F401 - a folder wandb/ can be imported, too, but has no init
        except ImportError as error:
            raise InputError(f"wandb: {error}; `pip install wandb`, or leave --wandb out") from None
    # torch.compile calls a C++ compiler for the CPU; Triton calls a C compiler for a GPU.
    cxx = "clang++" if sys.platform == "darwin" else "g++"
    name, default = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", cxx)
    compilers = os.environ.get(name, default).split()
    if config.compile and not any(map(shutil.which, compilers)):
        found = f"found no compiler {' or '.join(compilers)}, which torch.compile needs"
        raise InputError(f"compile: {found}; install one, name yours in {name}, or leave --compile out")


class Run:
    """One training run of this process. `start` is the number of updates that were done before.

    After `end_update`, `done` is the number of finished updates; `log_due`, `save_due` and `validation_due` say what is
    due. A resumed run may begin with a validation that is due. `metrics` are those of the last validation.
    `skipped_images` counts images that the loader left out. This count, that of updates skipped under float16, and the
    sums of the next log line begin anew after a resume."""

    def __init__(self, config, processes, model, contents):
        """Resume from the checkpoint that config.resume means, if any.

        contents: what every checkpoint holds beside weights and progress, as `checkpoint.contents`."""
        self.config, self.processes, self.model, self.contents = config, processes, model, contents
        lr_factor = getattr(config, "lr_factor", 1.0)  # the image tokenizer has no parts that learn faster
        self.optimizer = optim.make_optimizer(model, config.lr, config.weight_decay, lr_factor)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.dtype == "float16")
        self.folder = Path(config.out_dir)
        self.start, self.best, self.metrics, self.validation_due = 0, -1.0, {}, False
        self.goes_on, self.n_items, self.report = False, None, []
        self.skipped_images, self.stop_asked, self.wandb_id = 0, False, None
        self.sums = {}  # {objective: {name: sum since the last log line}}, on the device
        self.update_loss = 0.0  # of the current update, over its micro-batches
        state = find_resume(config.resume, self.folder, model)
        if state is not None:
            self._restore(state)
        self.done = self.saved = self.start
        self.health = Health(self.optimizer, self.scaler, processes.device)
        if len(starts := set(gather_objects(self.start))) > 1:
            raise InputError(f"resume: found starts at updates {starts}; the run folder must be the same on every node")

    def _restore(self, state):
        """Go on from what `find_resume` found. Learning rates and weight decay are those of the settings.

        Raises InputError where the file does not fit, or where the data mean something else than before."""
        path, config = state["path"], self.config
        checkpoint.check_same(path, state, self.contents)
        rates = [(group["base_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        with reading(path, "cannot be resumed"):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # only float16 has one, and the earlier run may have had another dtype
                self.scaler.load_state_dict(state["scaler"])
            if state["step"] > config.max_steps:
                raise ValueError(f"{state['step']} updates done, but max_steps is {config.max_steps}")
        for group, (base_lr, decay) in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"], group["weight_decay"] = base_lr, decay
        # An update begins with a gradient of zero, not None, for each parameter that was used before. It is so after a
        # resume, too, else pre-training's heads would not move by their momentum.
        for parameter in self.optimizer.state:
            parameter.grad = torch.zeros_like(parameter)
        self.report = [f"{path}: resumed after update {state['step']}"]
        changed = {name for name, value in state["config"].items() if getattr(config, name, value) != value}
        for name in sorted(changed - {"out_dir", "resume"}):
            is_now = shown(getattr(config, name))
            self.report.append(f"resume: {name} was {shown(state['config'][name])}, is {is_now} from here on")
        self.start, self.best, self.n_items = state["step"], state["best"], state["n_items"]
        self.validation_due = state["validation_due"]  # the run ended while it validated
        self.goes_on = path.resolve() == (self.folder / "last.pt").resolve()
        self.wandb_id = state.get("wandb_id") if self.goes_on else None
        # The best model of another folder, or by other data, is no measure for this run, so it is sought anew.
        is_lost = not self.goes_on or not (self.folder / "best.pt").exists() or VALIDATION & changed
        if self.best > -1 and is_lost:
            self.best, self.validation_due = -1.0, config.eval_interval >= 0

    def open(self, sampler, name_of, lines=()):
        """Make the run folder ready and print how the run starts. Nothing is written before this.

        sampler: data.BatchSampler, and name_of(row): how messages call a row of the data set, both for `Health`."""
        self.sampler, self.name_of, self.wandb = sampler, name_of, None
        if self.n_items not in (None, sampler.n):
            line = f"resume: the data had {self.n_items} items, has {sampler.n}; their order is another from here on"
            self.report.append(line)
        if self.processes.is_main:
            open_folder(self.folder, self.goes_on)
            write_json(self.folder / "run.json", describe_run(self.config))
            cut_log(self.folder / "log.jsonl", self.start, self.validation_due)
            if self.config.wandb:
                import wandb

                config = dataclasses.asdict(self.config)
                self.wandb_id = self.wandb_id or os.urandom(4).hex()  # a resumed run goes on in its own W&B run
                where = {"project": self.config.wandb, "id": self.wandb_id, "resume": "allow"}
                self.wandb = wandb.init(**where, config=config, dir=str(self.folder))
            print(*lines, *self.report, sep="\n")
        steps = range(self.start, self.config.max_steps)
        self.bar = tqdm(steps, disable=not self.processes.is_main, initial=self.start)
        # For the speed in the log: since when time counts, when the last update ended, and the update of the last line.
        self.clock = self.ended = time.perf_counter()
        self.logged = self.start

    def steps(self):
        """The numbers of the updates to do. Meanwhile the STOP_SIGNALS only ask for a stop.

        When a loader worker dies, torch's handler of SIGCHLD raises an error wherever the main process is, perhaps
        within an update. Here the handler is removed, so the error waits for `next_batches`."""
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # the user has said that the run goes on
        asking = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_nohup]
        handlers = {number: signal.signal(number, self._ask_stop) for number in asking}
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from self.bar
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask_stop(self, number, frame):
        """The loop finishes its update, saves and leaves. A second Ctrl-C ends a run of one process at once.

        In a validation, which may take long, everything has just been saved, so a run of one process ends at once."""
        if self.validation_due and self.saved == self.done and not in_group():
            raise ending.Stopped(self._stopped())
        if self.stop_asked and number == signal.SIGINT and not in_group():
            raise KeyboardInterrupt
        self.stop_asked = True

    def next_batches(self, loader):
        """The micro-batches of the next update. The weights are whole here, so here a run ends early.

        It ends where a stop was asked for, an image is broken or a loader worker died, on any process. The run then
        saves and raises Stopped or, for an image, InputError."""
        batches, error = [], None
        try:
            if not self.stop_asked:
                batches = [next(loader) for _ in range(self.config.grad_accum)]
        except (InputError, RuntimeError, ConnectionError, EOFError) as caught:
            error = caught
        if not any_process(self.stop_asked or error is not None):
            return batches
        if self.saved < self.done:
            self.save()
        if error is not None and not ending.is_dead_worker(error):
            raise error
        cause = "" if error is None else f"{ending.WORKER_DIED}; "
        raise ending.Stopped(cause + self._stopped())

    def _stopped(self):
        return f"stopped after update {self.done}, {self.folder / 'last.pt'}; --resume=auto goes on"

    def set_lr(self, step):
        """Set the learning rates of update `step` (from 0)."""
        optim.set_lr(self.optimizer, step, self.config.warmup, self.config.milestones)

    def add(self, objective, loss, metrics):
        """Add a micro-batch to the sums of the next log line. They stay on the device, so nothing waits for it."""
        n = self.config.grad_accum
        self.update_loss = self.update_loss + loss.detach() / n
        sums = self.sums.setdefault(objective, {})
        for name, value in {"loss": loss.detach(), **metrics, "updates": 1}.items():
            sums[name] = sums.get(name, 0) + value / n

    def end_update(self, step):
        """After the optimizer's update `step`: note its health and find out what is due."""
        self.health.watch(step, self.update_loss)
        self.update_loss, self.done = 0.0, step + 1

        def every(interval):
            return self.done == self.config.max_steps or (interval > 0 and self.done % interval == 0)

        self.log_due = every(self.config.log_interval)
        self.validation_due = self.config.eval_interval >= 0 and every(self.config.eval_interval)
        self.save_due = self.validation_due or every(self.config.save_interval)
        if self.log_due:
            self._check_health()
        self.ended = time.perf_counter()

    def _check_health(self):
        """Raise InputError where an update was broken: its number, objective, learning rate and products."""
        broken = [note for note in gather_objects(self.health.note.tolist()) if note[0] >= 0]
        if not broken:
            return
        step, loss, norm = min(broken)
        _, rows, objective = self.sampler.update_at(int(step))
        factor = optim.lr_multiplier(step, self.config.warmup, self.config.milestones)
        raise InputError(
            f"update {int(step) + 1}: loss {loss:g}, gradient norm {norm:g} (objective {objective}, learning rate "
            f"{self.config.lr * factor:.3g}); the last checkpoint is older and stays; lower --lr, or look at this "
            f"update's products: {', '.join(self.name_of(int(row)) for row in rows)}"
        )

    def log(self, **more):
        """Write a log line: means per update over all processes since the last line, speed, memory, and `more`."""
        row = {"step": self.done, "lr": self.optimizer.param_groups[0]["lr"]}
        for objective, sums in self.sums.items():
            n = sums.pop("updates")
            prefix = f"{objective}_" if objective else ""
            for name, total in sums.items():
                total = torch.as_tensor(total, dtype=torch.float64, device=self.processes.device)
                row[f"{prefix}loss" if name == "loss" else name] = float(all_mean(total / n))
            row[f"{prefix}updates"] = round(n)
        self.sums.clear()
        row |= more
        row["samples_per_s"] = self.config.batch_size * (self.done - self.logged) / (self.ended - self.clock)
        self.clock, self.logged = self.ended, self.done
        row["memory_gb"] = peak_memory_gb(self.processes.device)
        if self.config.missing == "skip":
            row["skipped_images"] = sum(gather_objects(self.skipped_images))
        if self.scaler.is_enabled():
            row["skipped_updates"] = self.health.skipped_updates
        self._write_line(row)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name.endswith("loss")})

    def end_validation(self, metrics, criterion=None):
        """Log a validation. Where metrics[criterion] is the best so far, save best.pt. Then save last.pt again."""
        self._write_line({"step": self.done, **{f"val_{name}": value for name, value in metrics.items()}})
        if criterion:
            if self.processes.is_main:
                self.bar.write(f"step {self.done}: val {criterion} {100 * metrics[criterion]:.1f} %")
            if metrics[criterion] > self.best:
                self.best = metrics[criterion]
                self._write_checkpoint("best.pt")
        self.metrics, self.validation_due = metrics, False
        self.save()

    def save(self):
        """Write last.pt with all that a resume needs. A validation comes after it, for a validation may fail.

        Raises InputError, and writes nothing, where an update was broken."""
        self._check_health()
        copy_from_main(self.model.buffers())  # BatchNorm's averages, which each process moves by its own batch
        self._write_checkpoint(
            "last.pt",
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            validation_due=self.validation_due,
        )
        self.saved, now = self.done, time.perf_counter()
        self.clock += now - self.ended  # validations and saves do not count as training time
        self.ended = now

    def _write_line(self, row):
        if self.processes.is_main:
            append_log(self.folder / "log.jsonl", row)
            if self.wandb:
                self.wandb.log(row, step=self.done)

    def _write_checkpoint(self, name, **more):
        if self.processes.is_main:
            state = {**self.contents, "model": self.model.state_dict(), "config": dataclasses.asdict(self.config)}
            state |= {"step": self.done, "best": self.best, "n_items": self.sampler.n, "wandb_id": self.wandb_id}
            checkpoint.save(self.folder / name, {**state, **more})


class Health:
    """Notes the first update whose loss or gradient is NaN or infinite, on the device, where nothing waits for it.

    The note is read at log lines and saves, so the run ends some updates later and still names the right one.
    Under float16 the scaler skips updates with infinite gradients. They are counted; below scale 1 they are broken."""

    def __init__(self, optimizer, scaler, device):
        self.optimizer, self.scaler, self.skipped_updates = optimizer, scaler, 0
        self.scale = scaler.get_scale()  # 1.0 without a scaler
        self.note = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # update, loss, gradient norm

    def watch(self, step, loss):
        """Look at update `step` (from 0) after the optimizer's step: at its loss () and at its gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [] if self.scaler.is_enabled() else [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss.device)  # of nothing: 0
        # After an update that it skipped, the scaler lowers its scale. If even a scale below 1 gives infinite
        # gradients, they are broken, and not only too large for float16.
        before, self.scale = self.scale, self.scaler.get_scale()
        if self.scale < before:
            self.skipped_updates += 1
            norm = norm + (math.inf if before < 1 else 0.0)
        number = torch.full((), step, device=loss.device)
        row = torch.stack([value.to(self.note) for value in (number, loss.detach(), norm)])
        self.note = torch.where((self.note[0] < 0) & ~row.isfinite().all(), row, self.note)


def find_resume(resume, folder, model):
    """The whole dict of the checkpoint that the setting `resume` means, with its "path"; None for a fresh start.

    "": none; "auto": last.pt of the run folder if it exists; else a file.
    Raises InputError where the file is broken, holds no optimizer state or does not fit `model`."""
    path = Path(folder, "last.pt") if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.exists()):
        return None
    with reading(path, "cannot be resumed"):
        file = weights.read_file(path)
    if "format" not in file or "optimizer" not in file:
        raise InputError(f"{path}: holds no optimizer state, so it cannot be resumed; --init={path} starts from it")
    checkpoint.check_names(path, model.state_dict(), file["model"])
    return {**file, "path": path}


_locks = {}  # {run folder: its open lock file}; the system lets go of it when the process dies


def lock_folder(folder):
    """Raise InputError where another process trains in the folder: two would write one checkpoint in turns."""
    import fcntl  # Windows has none

    _locks.pop(folder, None)
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not hold it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{folder}: {file.read().strip()} trains in it; stop it or choose another --out_dir") from None
    except OSError:
        return  # a file system without locks
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    _locks[folder] = file


def open_folder(folder, goes_on):
    """Make and lock the run folder.

    A run that does not go on from the folder's last.pt gives a folder with an older run, which may be days of work,
    another name: FOLDER.1, the next time FOLDER.2, and so on."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if goes_on or not ((folder / "last.pt").exists() or (folder / "best.pt").exists()):
            return
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        folder.rename(aside)
        print(f"{folder}: the older run in it is now {aside}; --out_dir={aside} --resume=auto goes on with it")
        folder.mkdir()
        lock_folder(folder)


def describe_run(config):
    """What must be known to run this again: command, settings, git commit, versions."""
    commit = ""
    with contextlib.suppress(OSError):  # a small container has no git
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    command = shlex.join([sys.executable, *sys.argv])
    return {"command": command, "config": dataclasses.asdict(config), "git_commit": commit or None, **versions}


def append_log(path, row):
    """Append one JSON line. Not-a-number and infinity are not JSON, so they are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint must not outlast its log lines


def cut_log(path, step, validating):
    """Drop the lines past `step` and a last line cut short, so that a resumed run writes each step once.

    validating: drop the line of the validation at `step`, too."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    with replacing(path) as file:
        for row in rows:
            is_repeated = validating and row["step"] == step and "lr" not in row  # of a validation
            if row["step"] <= step and not is_repeated:
                file.write((json.dumps(row) + "\n").encode())


def peak_memory_gb(device):
    """Peak memory so far in GB: of the GPU's allocator where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
