"""How a program ends: in one line for the user, after a save, and for all processes together."""

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from plumbing.settings import InputError

EXIT_STOPPED = 75  # exit code of a run that was stopped and has saved: "try again" in sysexits.h
WORKER_DIED = "a data loader worker was lost, perhaps for lack of memory, /dev/shm or `ulimit -n`; set fewer --workers"


_stores = []  # of the process group, where its processes leave notes for each other
_watchers = []  # the thread of `watch_others`
_ended = threading.Event()  # this process needs its watcher no more


class Stopped(Exception):
    """The run was asked to stop, and has saved. Its text is the one line that the user sees."""


def run(main):
    """Call `main()`. InputError and Stopped print their one line and exit with 2 and EXIT_STOPPED; a bug traces.

    Where one of several processes fails, the others leave within seconds, and its line is the last one."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # `>&-` makes it None
        # A file's name can hold bytes that the terminal's encoding refuses.
        stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Stopped as stopped:
        tqdm.write(str(stopped), file=sys.stderr)
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        code = 130  # as a shell says it of Ctrl-C
        if _stores:
            os._exit(code)  # to close the process group would wait for the others
    except (InputError, RuntimeError, OSError, EOFError) as error:
        if getattr(error, "errno", 0) == errno.ENOSPC:
            error = InputError("what is printed cannot be written: the disk is full")
        if not isinstance(error, InputError) and not is_dead_worker(error):
            if _stores and _stores[-1].check(["failed"]):  # it is the lost connection to the process that failed
                os._exit(2)
            raise
        # An error of a loader worker arrives inside that worker's traceback. Its last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix("plumbing.settings.InputError: ")
        line = f"error: {line if isinstance(error, InputError) else WORKER_DIED}"
        if _stores:
            end_group(line)
        tqdm.write(line, file=sys.stderr)
        code = 2
    finally:
        # Loader workers ignore the first SIGTERM, and Python waits for them when it ends. torch's handler would raise.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        _ended.set()
        for watcher in _watchers:  # a thread that still runs when Python ends aborts it
            watcher.join()
    if _stores:
        import torch.distributed as dist  # here, for programs that prepare data do without torch

        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        sys.exit(code)


def is_dead_worker(error):
    """Whether an error is how torch says that a data loader worker was killed or cannot send any more."""
    if isinstance(error, (ConnectionError, EOFError)):
        return True
    signs = ("DataLoader worker", "Pin memory thread", "Too many open files", "received 0 items of ancdata")
    return any(sign in str(error) for sign in signs)


def watch_others(store):
    """In a thread: leave soon after another process has failed. This one may wait for that one's gradient forever."""

    def watch():
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not _ended.wait(1):
                if store.check(["failed"]):
                    time.sleep(3)  # torchrun reports the process that ends first, and that is the one that failed
                    os._exit(2)

    _stores.append(store)
    _watchers.append(threading.Thread(target=watch, daemon=True))
    _watchers[-1].start()


def end_group(line):
    """End this process and tell the others, which end within seconds. To close the group would wait for them.

    torchrun's own report follows `line`, so a small process prints it once more when torchrun has ended."""
    _stores[-1].set("failed", "")
    tqdm.write(line, file=sys.stderr)
    wait = 'while kill -0 "$0" 2>/dev/null; do sleep 0.1; done; echo "$1" >&2'
    subprocess.Popen(["timeout", "60", "sh", "-c", wait, str(os.getppid()), line], start_new_session=True)
    os._exit(2)
