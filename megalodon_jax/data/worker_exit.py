"""Loader workers end with the process that started them, however it ends."""

import multiprocessing
import multiprocessing.connection
import os
import threading

# A fork of the main process without exec would keep the pipe open, so its id is compared too.
_CHECK_SECONDS = 1.0


def exit_with_parent(index: int, count: int) -> None:
    """Ends this worker process soon after its parent has gone, also by SIGKILL.

    `multiprocessing` has a tracker process that removes shared memory and semaphores, but only
    after the last process that uses it has ended. (Linux's PR_SET_PDEATHSIG acts when the thread
    that started the worker ends, which grain's do.)

    Args:
      index: number of the worker; not used.
      count: number of workers; not used.
    """
    del index, count
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_wait_for_end, args=(parent.sentinel, os.getppid()), daemon=True
        ).start()


def _wait_for_end(sentinel: int, parent_id: int) -> None:
    while os.getppid() == parent_id:
        if multiprocessing.connection.wait([sentinel], timeout=_CHECK_SECONDS):
            break
    # The main thread may be inside a call that does not return to Python.
    os._exit(1)
