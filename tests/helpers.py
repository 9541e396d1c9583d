"""What several test files share: runs of seconds, and work in two processes."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from finetune import FinetuneConfig
from plumbing.processes import Processes
from pretrain import PretrainConfig

ONE = Processes(0, 1, torch.device("cpu"))
SMALL = dict(size="tiny", resnet="resnet18", width=8, image_size=64, init="random", lr=1e-3, lr_factor=1.0, workers=0)
ALL = dict.fromkeys(("itc", "itm", "mlm", "mpfc", "mvc", "pac"), 1 / 6)


def small_pretraining(catalogue, out, **changes):
    """A run of seconds: tiny sizes, all six objectives."""
    run = dict(objectives=ALL, n_attributes=0, batch_size=16, max_steps=14, warmup=2, milestones=(10,))
    run |= dict(eval_interval=7, log_interval=4)
    return PretrainConfig(**{**SMALL, **run, "data_root": str(catalogue), "out_dir": str(out), **changes})


def small_finetuning(task, catalogue, out, **changes):
    run = dict(task=task, batch_size=8, max_steps=6, warmup=0, milestones=(), eval_interval=3, log_interval=2)
    return FinetuneConfig(**{**SMALL, **run, "data_root": str(catalogue), "out_dir": str(out), **changes})


def in_two_processes(work, port, folder, *args):
    """[result of work(rank, *args) for both ranks] of two processes that are a group of gloo's."""
    mp.spawn(_work_in_group, (work, port, folder, args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _work_in_group(rank, work, port, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # to close the group can hang on torch 2.6, where a thread of gloo waits for Python and Python for it
