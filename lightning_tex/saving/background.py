"""A thread that writes checkpoints while training goes on, one after another, in the order they were asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Runs jobs beside training, in order. After one has failed the rest are not run, until the failure was raised.

    Jobs may communicate as long as all ranks submit the same ones in one order.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process has nothing to do yet."""
        return Background, ()

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return self._jobs.unfinished_tasks > 0

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those submitted before."""
        self._jobs.put(job)
        if self._thread is None:
            # A daemon: a run that is torn down by an error must not wait for a rank that is gone.
            self._thread = threading.Thread(target=self._work, name="lightning_tex checkpoints", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None:
                    job()
            except BaseException as error:
                self._failure = error
            finally:
                del job
                self._jobs.task_done()
        self._jobs.task_done()

    def check(self) -> None:
        """Raise what a job has failed with, once."""
        if self._failure is not None:
            self._jobs.join()  # of what waits behind it nothing is done
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until all jobs are done; then as :meth:`check`."""
        self._jobs.join()
        self.check()

    def close(self) -> BaseException | None:
        """Wait, end the thread, and give the failure that nobody saw."""
        self._jobs.join()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure
