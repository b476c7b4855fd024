"""What both ends of a worker's pipe know: the pool (`sgopd.verifier`) and the worker (`sgopd.verifier_worker`)."""

from __future__ import annotations

import traceback

LOST_PIPE = 113  # exit status of a grader whose pipes were closed or replaced


def describe(error: BaseException) -> str:
    """A traceback, and on its last line the error alone."""
    try:
        *frames, _ = traceback.format_exception(type(error), error, error.__traceback__, limit=-10, chain=False)
        last = "".join(traceback.format_exception_only(type(error), error))
        return "".join(frames) + " ".join(last[:500].split())
    except BaseException:  # of an error whose own methods raise, or for want of memory
        return type(error).__name__
