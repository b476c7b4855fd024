"""What both ends of a worker's pipe know: the pool (`sgopd.verifier`) and the worker (`sgopd.verifier_worker`)."""

from __future__ import annotations

import traceback

LOST_PIPE = 113  # exit status of a grader whose pipes were closed or replaced


def describe(error: BaseException) -> str:
    """A traceback from where the worker's own frames end, if it goes on there, and on its last line the error alone."""
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") == "sgopd.verifier_worker":
            trace = trace.tb_next
        *frames, _ = traceback.format_exception(type(error), error, trace, limit=-10, chain=False)
        last = "".join(traceback.format_exception_only(type(error), error))
        return "".join(frames) + " ".join(last[:500].split())
    except BaseException:  # of an error whose own methods raise, or for want of memory
        return type(error).__name__
