"""Data loader workers: what keeps them alive while a run saves, and whether their batches fit into memory."""

import os
import shutil
import signal

from plumbing.settings import InputError


def init_worker(worker=0):
    """Keep a data loader worker alive while its main process finishes an update and saves.

    Ctrl-C and torchrun send their signals to the whole process group, so the worker leaves it. SLURM and systemd send
    SIGTERM to every process, so the first one does nothing. The second one ends the worker, as it ends any program.
    SLURM may send SIGUSR1 before the end of its time, which the main process alone answers."""
    if not hasattr(signal, "SIGUSR1"):  # Windows has neither these signals nor groups
        return
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def check_shared_memory(n_batches, n_images, size):
    """Raise InputError where /dev/shm cannot hold the batches that are ready at a time: the run would wait for ever.

    Workers send their batches through /dev/shm, which all processes of a machine share. n_batches: of one process.
    n_images: of one batch, uint8 of size x size pixels each."""
    if not os.path.isdir("/dev/shm"):
        return
    needed = n_batches * n_images * 3 * size**2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    free = shutil.disk_usage("/dev/shm").free
    if needed > free:
        found = f"batches that are read ahead need up to {needed >> 20} MiB of /dev/shm, where {free >> 20} are free"
        raise InputError(f"workers: {found}; set fewer --workers, or `docker run --shm-size={1 + (needed >> 30)}g`")
