"""Kills training runs at random moments, resumes them, and compares their ends bit for bit with undisturbed runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TIMES = ("samples_per_s", "memory_gb")  # of a log line, no two runs agree on them
SIZES = "--size=tiny --resnet=resnet18 --width=8 --image_size=64 --init=random --lr=1e-3 --lr_factor=1 --seed=5"
EXACT = "--dropout=0.1 --dtype=bfloat16 --grad_accum=2 --workers=1 --log_interval=1 --save_interval=2 --warmup=3"
STEPS = {"pretrain": 36, "fashioniq": 24}
SCRIPT = {
    "pretrain": "pretrain.py --n_attributes=0 --batch_size=16 --eval_interval=18 --milestones=20",
    "fashioniq": "finetune.py configs/demo_finetune.py --task=fashioniq --batch_size=8 --eval_interval=12",
}
# SIGKILL to oneself at the {n}th time that last.pt is about to get its name; then the stage, as from the command line
IN_SAVE = """
import os, runpy, sys
replace, left = os.replace, [{n}]
def killing(source, target):
    left[0] -= str(target).endswith("last.pt")
    if not left[0]:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace, sys.argv = killing, sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_data(folder):
    """A small catalogue and an image tokenizer in `folder`."""
    import vqvae
    from plumbing import checkpoint
    from prepare.demo import make_catalogue

    make_catalogue(folder / "data", products=150, size=64)
    sizes = vqvae.ImageTokenizerConfig(ch=8, ch_mult=(1, 1, 1, 1), n_blocks=1, latent_dim=8, n_codes=16, unshuffle=4)
    torch.manual_seed(0)
    checkpoint.save(
        folder / "tokenizer.pt", {"kind": "image_tokenizer", "model": vqvae.random_image_tokenizer(sizes).state_dict()}
    )


def start(task, processes, folder, out, launcher=None, restarts=0):
    """Popen of a stage that resumes where it can; `folder` as `make_data` left it, `out` the run folder."""
    script, *words = SCRIPT[task].split()
    launcher = launcher or [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher.append(f"--max-restarts={restarts}")
    words += [*SIZES.split(), *EXACT.split(), f"--max_steps={STEPS[task]}", f"--data_root={folder / 'data'}"]
    words += [f"--out_dir={out}", "--resume=auto"] + [f"--image_tokenizer={folder / 'tokenizer.pt'}"] * (
        task == "pretrain"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as output:
        command = [*launcher, str(ROOT / script), *words]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)


def finish(process, out):
    """Wait for a run's good end."""
    try:
        code = process.wait(600)
    finally:
        kill(process)  # nothing where it has ended; a test that is stopped leaves no process behind
    assert code == 0, (out / "output.txt").read_text()[-3000:]


def children(pid):
    """The processes below `pid`, as Linux lists them; torchrun's workers are in sessions of their own."""
    found = []
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *children(child)]
    return found


def kill(process):
    """SIGKILL to a run and everything below it."""
    if process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def reached(out):
    """The last step in the log of a run folder, 0 before the first."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def wait_for(process, out, step):
    """Wait until the log has reached `step`; False where the run ended before."""
    while reached(out) < step:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def run_with_kills(task, processes, folder, out, kills, rng):
    """A run with `kills` SIGKILLs at random moments, each past a random step, or in a save, or during the start."""
    done, last = 0, STEPS[task] - 9
    for step in sorted(rng.randrange(last) for _ in range(kills)):
        in_save = processes == 1 and rng.random() < 0.3
        launcher = [sys.executable, "-c", IN_SAVE.format(n=rng.randint(1, 3))] if in_save else None
        process = start(task, processes, folder, out, launcher)
        if in_save:
            process.wait(600)
            done += process.returncode == -signal.SIGKILL
        elif wait_for(process, out, step):
            time.sleep(rng.uniform(0, 0.4))
            done += process.poll() is None
            kill(process)
    finish(start(task, processes, folder, out), out)
    return done


def read_log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same(a, b, where=""):
    """Assert that two trees of a checkpoint are equal to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def same_runs(a, b):
    """Assert that two run folders hold the same run: checkpoints but for the settings, log lines, final results."""
    for name in ("last.pt", "best.pt"):
        if (a / name).exists() or (b / name).exists():
            states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
            for state in states:
                del state["config"]
            same(*states)
    assert read_log(a) == read_log(b)
    if (a / "results.json").exists():
        results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
        for result in results:
            del result["checkpoint"], result["seconds"]
        assert results[0] == results[1]
    left = [path.name for path in b.iterdir() if path.name.endswith(".tmp")]
    assert left in ([], ["last.pt.tmp"], ["log.jsonl.tmp"]), left  # what a kill in a write leaves, never under the name
