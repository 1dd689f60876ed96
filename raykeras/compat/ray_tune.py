"""Let Ray Tune wait for the end of a run when it stops its trial."""

from __future__ import annotations

import functools

from raykeras.compat.versions import PrivateName

SESSION = PrivateName(
    "ray.train._internal.session:get_session",
    "let Ray Tune wait until the run of a stopped trial has ended",
    "Tune ends the process of a stopped trial at once, and its run is listed as running",
    parameters=(),
)


def wait_for_end_of_function() -> None:
    """Let Ray Tune wait, when it stops the current trial, until the trial's function has returned.

    By default, it ends the process at once. It still does so after `TUNE_FORCE_TRIAL_CLEANUP_S`.
    """
    get_session = SESSION.find()
    session = get_session() if get_session else None
    if session is not None and "finish" not in vars(session):
        finish = session.finish

        @functools.wraps(finish)
        def wait(timeout: float | None = None) -> None:
            finish(timeout=None)

        session.finish = wait
