"""Runs a function in a forked process, which need not import torch again."""

import os
import traceback
from collections.abc import Callable


def forked(job: Callable[[], object]) -> int:
    """Return 0, or 1 after an exception, which is printed, or minus the number of the signal that ended the process."""
    child = os.fork()
    if not child:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
