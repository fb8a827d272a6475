"""Starts a job on a Ray cluster's job server and follows its log to the end, even over a bad connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.exit_codes import EXIT_DONE, EXIT_FAILED
from orchestrator.recipe.errors import first_line
from tasks.cluster.connection import our_package_folders

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 120.0
QUIET_S = 60.0
"""After this time without log output the connection is opened again.

A connection that was cut silently never reports it.
"""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
GIVE_UP_AFTER_S = 3600.0


class JobServerError(RuntimeError):
    """The job server does not answer, refuses the connection, or fails at a request.

    Attributes:
        is_lost: whether the server may answer again by itself.
        id_is_taken: whether the fault is that the submission id is in use.
    """

    def __init__(self, message: str, *, is_lost: bool = False, id_is_taken: bool = False) -> None:
        super().__init__(message)
        self.is_lost, self.id_is_taken = is_lost, id_is_taken


class JobServer(JobSubmissionClient):
    """Wraps Ray's client with timeouts, and with errors that name the remedy.

    Args:
        address: URL of the head's job server.

    Raises:
        JobServerError: nothing answers at the address, another server does, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self._last_status = 0
        try:
            super().__init__(address)
        except AuthenticationError as error:
            raise _refused(error) from error
        except (ConnectionError, requests.Timeout) as error:
            raise JobServerError(
                f"nobody answers ({first_line(error)}); check host, port and network, and that the head was started "
                "with --dashboard-host where it is another machine"
            ) from error
        except (RuntimeError, requests.RequestException, KeyError, ValueError) as error:
            raise JobServerError(
                f"no job server answers there ({first_line(error)}); give the address of the head's dashboard, whose "
                "port is 8265 by default"
            ) from error

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        response = super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), **kwargs)
        self._last_status = response.status_code
        return response

    def send_our_packages(self) -> list[str]:
        """Uploads LayerBoost's own packages and returns their URIs for `py_modules`."""
        # This is a separate upload, because the excludes of the working directory would apply to these folders too.
        sent: dict[str, Any] = {"py_modules": our_package_folders(), "excludes": ["__pycache__"]}
        self._asked(self._upload_py_modules_if_needed, sent)
        return sent["py_modules"]

    def start(self, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Uploads the package and starts the job.

        Raises:
            JobServerError: the job did not start.
        """
        try:
            self._asked(self.submit_job, submission_id=submission_id, entrypoint=entrypoint, runtime_env=runtime_env)
        except JobServerError as error:
            # The answer may have been lost after the job had started.
            if not (error.is_lost and self._is_known(submission_id)):
                raise

    def details(self, submission_id: str) -> JobDetails:
        """Returns what the server knows of a job.

        Raises:
            JobServerError: the server does not answer, or knows no such job.
        """
        return self._asked(self.get_job_info, submission_id)

    def log(self, submission_id: str) -> str:
        """Returns everything that a job has written so far.

        Raises:
            JobServerError: in the same cases as `details`.
        """
        return self._asked(self.get_job_logs, submission_id)

    def _is_known(self, submission_id: str) -> bool:
        try:
            return bool(self.details(submission_id))
        except JobServerError:
            return False

    def _asked(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self._last_status = 0
        try:
            return ask(*arguments, **named)
        except AuthenticationError as error:
            raise _refused(error) from error
        except requests.RequestException as error:
            raise JobServerError(f"the connection is lost ({first_line(error)})", is_lost=True) from error
        except RuntimeError as error:
            raise self._unwilling(str(error)) from error

    def _unwilling(self, answer: str) -> JobServerError:
        # The answer is a traceback of the server, and its last line says what went wrong.
        reason = ([line for line in answer.splitlines() if line.strip(" .")] or ["it gave no reason"])[-1].strip()
        if "already exists" in answer:
            return JobServerError("is the id of another job on that cluster; give another", id_is_taken=True)
        if self._last_status == 404:
            return JobServerError("the cluster knows no such job, so its head was restarted; submit again to go on")
        if self._last_status == 413:
            return JobServerError("the package is too large for the job server; exclude more files in a .rayignore")
        return JobServerError(f"the job server failed ({reason}); look at the head's logs", is_lost=True)


def follow(
    server: JobServer, submission_id: str, write: Callable[[str], None], say: Callable[[str], None]
) -> JobDetails:
    """Writes a job's log until the job has ended, without gaps or repetitions even if the connection is lost.

    Args:
        server: the job server.
        submission_id: the id of the job.
        write: receives the log in pieces.
        say: receives one line when the connection is lost, and one when it is back.

    Returns:
        The details of the ended job.

    Raises:
        JobServerError: the job is no longer known, the token is refused, or nobody has answered for an hour.
    """
    log, line = _Log(write), _Line(say)
    while True:
        cut = log.tail(server, submission_id, line.works)
        try:
            details = server.details(submission_id)
        except JobServerError as error:
            if not error.is_lost:
                raise
            line.is_lost(str(error))
            continue
        line.answers()
        has_ended = details.status.is_terminal()
        if cut is not None:
            # Plain HTTP may work where websockets are blocked, and it also gives what was written just before the end.
            try:
                log.write_new(server.log(submission_id))
            except JobServerError as error:
                if has_ended:
                    say(f"the end of the log cannot be read: {error}")
        if has_ended:
            return details
        if cut:
            line.wait()


def exit_code(details: JobDetails) -> int:
    """Returns the exit code of an ended job's command; a job that was stopped or never started its command gives 1."""
    code = EXIT_DONE if details.status == JobStatus.SUCCEEDED else details.driver_exit_code
    return code if code is not None and 0 <= code < 256 else EXIT_FAILED


class _Log:
    """Remembers how much of a log has been written, because every read of it starts at its first character."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._n_written = 0

    def write_new(self, text: str, *, start: int = 0) -> None:
        """Writes the new part of a piece that begins at character `start` of the log."""
        if (fresh := text[max(0, self._n_written - start) :]) and start + len(text) > self._n_written:
            self._write(fresh)
            self._n_written = start + len(text)

    def tail(self, server: JobServer, submission_id: str, on_piece: Callable[[], None]) -> str | None:
        """Writes the log as it grows.

        Returns:
            None at the end of the log, else the reason why it stopped, which is empty after a long silence.
        """
        try:
            asyncio.run(self._tail(server, submission_id, on_piece))
        except TimeoutError:
            return ""
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            return first_line(error)
        return None

    async def _tail(self, server: JobServer, submission_id: str, on_piece: Callable[[], None]) -> None:
        start = 0
        tail = cast("AsyncGenerator[str, None]", server.tail_job_logs(submission_id))
        async with aclosing(tail) as pieces:
            while (piece := await asyncio.wait_for(anext(pieces, None), QUIET_S)) is not None:
                on_piece()
                self.write_new(piece, start=start)
                start += len(piece)


class _Line:
    """Watches the connection: it reports a loss once and the return once, and waits longer before each further try."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lost_at: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def works(self) -> None:
        self.answers()
        self._pause_s = FIRST_PAUSE_S

    def answers(self) -> None:
        if self._lost_at is not None:
            self._say("connected again")
        self._lost_at = None

    def is_lost(self, reason: str) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self._say(f"{reason}; the job goes on, trying again")
        elif time.monotonic() - self._lost_at > GIVE_UP_AFTER_S:
            raise JobServerError(f"nobody has answered for {GIVE_UP_AFTER_S / 60:.0f} minutes; the job may go on")
        self.wait()

    def wait(self) -> None:
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _refused(error: AuthenticationError) -> JobServerError:
    return JobServerError(
        f"the token is missing or refused ({first_line(error)}); copy the head's ~/.ray/auth_token here (or set "
        "RAY_AUTH_TOKEN) and set RAY_AUTH_MODE=token"
    )
