"""How a program ends: in one line for the user, with an exit code that says why."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

from tqdm import tqdm

from plumbing.settings import InputError

EXIT_STOPPED = 75  # exit code of a run that was stopped and has saved: "try again" in sysexits.h
WORKER_DIED = "a data loader worker was lost, perhaps for lack of memory, /dev/shm or `ulimit -n`; set fewer --workers"


class Stopped(Exception):
    """The run was asked to stop, and has saved. Its text is the one line that the user sees."""


def run(main):
    """Call `main()`. InputError and Stopped print their one line and exit with 2 and EXIT_STOPPED; a bug traces.

    torchrun ends the other processes of one that fails, and repeats its error in a report."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # `>&-` makes it None
        stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that the terminal refuses
    code, line, others_failed = 0, "", False
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Stopped as stopped:
        code, line = EXIT_STOPPED, str(stopped)
    except KeyboardInterrupt:
        code, line = 130, "interrupted"  # as a shell says it of Ctrl-C
    except (InputError, RuntimeError, ConnectionError, EOFError) as error:
        code, text = 2, str(error).strip()
        if isinstance(error, InputError):
            # An error of a loader worker arrives inside that worker's traceback. Its last line is ours.
            line = "error: " + text.splitlines()[-1].removeprefix("plumbing.settings.InputError: ")
        elif is_dead_worker(error):
            line = f"error: {WORKER_DIED}"
        elif "gloo" in text or "NCCL" in text:
            others_failed, line = True, f"error: lost the other processes; one of them says why: {text.splitlines()[0]}"
        else:
            raise
    finally:
        # Loader workers ignore the first SIGTERM, and Python waits for them when it ends. torch's handler would raise.
        if hasattr(signal, "SIGCHLD"):  # Windows has none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
    if line:
        tqdm.write(line, file=sys.stderr)
    if others_failed:
        time.sleep(3)  # torchrun reports the process that ends first, and that is the one that failed
    elif code == 2:
        tell_torchrun(line)
    torch = sys.modules.get("torch")  # programs that prepare data do without it
    if torch and torch.distributed.is_initialized():
        if code:
            os._exit(code)  # to close the group would wait for the others
        time.sleep(0.1)  # a thread of gloo may still free a tensor; torch 2.6 would then wait for it, and it for Python
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)


def is_dead_worker(error):
    """Whether an error is how torch says that a data loader worker was killed or cannot send any more."""
    signs = ("DataLoader worker", "Pin memory thread", "Too many open files", "received 0 items of ancdata")
    return isinstance(error, (ConnectionError, EOFError)) or any(sign in str(error) for sign in signs)


def tell_torchrun(line):
    """Put the line into torchrun's last report, if this process is one of torchrun's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        @record
        def fail():
            raise InputError(line)

        with contextlib.suppress(InputError):
            fail()
