"""The processes that a coordinator starts, keeps alive and stops: workers, pager and regret helper."""

from __future__ import annotations

import selectors
import sys
from functools import partial
from typing import Protocol

from hotset.runtime.config import BackendConfig
from hotset.runtime.messages.message import ProcessFailed
from hotset.runtime.messages.pager import FromPager, StartPager
from hotset.runtime.messages.regret import FromRegret, StartRegret, ToRegret
from hotset.runtime.messages.worker import FromWorker, StartWorker, ToWorker, WorkerReady
from hotset.runtime.pager_process import PagerProcess
from hotset.runtime.plan import InstancePlan
from hotset.runtime.watched_child import FailedStarts, Fatal, WatchedChild, reap_all

WORKER_MODULE = "hotset.workers.worker"
REGRET_MODULE = "hotset.workers.regret"


class Listener(Protocol):
    """The coordinator, as its children see it."""

    def on_worker(self, process: int, message: FromWorker) -> None: ...
    def on_pager(self, message: FromPager) -> None: ...
    def on_helper(self, message: FromRegret) -> None: ...

    def on_worker_death(self, process: int) -> None:
        """It is a zombie: nobody has its process id yet. Its last messages have been heard."""

    def on_worker_replaced(self, process: int, how: str) -> None:
        """Another is starting; `how` says what became of the dead one."""

    def on_pager_death(self, pid: int) -> None:
        """It is a zombie. The next one makes sense of the slots that it left (Arena.recover)."""

    def on_helper_death(self) -> None: ...

    def on_progress(self) -> None:
        """All that the workers had to say for now has been heard."""


class Children:
    """Starts the interpreters at once, and their work with `start`. Raises `Fatal`, from wherever the selector calls
    back, when the instance cannot go on.

    Args:
        selector: calls back `key.data()` when a child speaks, dies, or has room for what is queued for it; the
            coordinator polls it.

    Attributes:
        ready_workers: those that take requests.
        worker_restarts: so far.
    """

    def __init__(
        self,
        instance: str,
        config: BackendConfig,
        plan: InstancePlan,
        selector: selectors.BaseSelector,
        listener: Listener,
    ) -> None:
        self._instance = instance
        self._config = config
        self._plan = plan
        self._selector = selector
        self._listener = listener
        self._failed_starts = FailedStarts()
        self.ready_workers: set[int] = set()
        self.worker_restarts = 0
        self._workers = [self._spawn_worker(process) for process in range(plan.num_workers)]
        self._pager = PagerProcess(selector, listener.on_pager, listener.on_pager_death)
        self._helper: WatchedChild[FromRegret] | None = None

    # ---- who they are

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def pager_pid(self) -> int:
        return self._pager.pid

    @property
    def pager_restarts(self) -> int:
        return self._pager.restarts

    @property
    def all_ready(self) -> bool:
        return self._pager.is_ready and len(self.ready_workers) == len(self._workers)

    # ---- their beginning

    def start(self) -> None:
        """Once the arena is there."""
        for process in range(self._plan.num_workers):
            self._start_worker(process)
        self._pager.start(StartPager.of(self._instance, self._plan, self._config))

    def start_helper(self) -> None:
        """When everybody else is up: the figures that it computes are wanted last."""
        self._helper = WatchedChild[FromRegret](
            REGRET_MODULE, FromRegret, "the regret helper", self._selector, self._hear_helper, self._on_helper_death
        )
        self._helper.send(StartRegret(self._instance, self._plan))

    def _spawn_worker(self, process: int) -> WatchedChild[FromWorker]:
        return WatchedChild[FromWorker](
            WORKER_MODULE,
            FromWorker,
            f"worker {process}",
            self._selector,
            partial(self._hear_worker, process),
            partial(self._on_worker_death, process),
            self._listener.on_progress,
        )

    def _start_worker(self, process: int) -> None:
        self.send_worker(process, StartWorker(self._instance, self._plan, self._config, process))

    # ---- what is said

    def send_worker(self, process: int, message: ToWorker) -> None:
        self._workers[process].send(message)

    def send_helper(self, message: ToRegret) -> None:
        if self._helper is not None:
            self._helper.send(message)

    def _hear_worker(self, process: int, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self.ready_workers.add(process)
            case ProcessFailed(reason):
                raise Fatal(f"worker {process}: {reason}")
            case _:
                pass
        self._listener.on_worker(process, message)

    def _hear_helper(self, message: FromRegret) -> None:
        if isinstance(message, ProcessFailed):
            print(f"the regret helper ended: {message.reason}", file=sys.stderr, flush=True)
        else:
            self._listener.on_helper(message)

    # ---- their end

    def _on_worker_death(self, process: int) -> None:
        """What it held is recovered while it is a zombie; then it is reaped and another one started."""
        dead, was_ready = self._workers[process], process in self.ready_workers
        dead.hear()  # what it said before it died; it gets no work for that, or would lose it
        self.ready_workers.discard(process)
        self._listener.on_worker_death(process)
        how = dead.bury()
        self._failed_starts.note_death(was_ready, "worker", how)
        self.worker_restarts += 1
        self._workers[process] = self._spawn_worker(process)
        self._start_worker(process)
        self._listener.on_worker_replaced(process, how)

    def _on_helper_death(self) -> None:
        """Nothing but its figures is missing from now on."""
        if self._helper is not None:
            self._helper.bury()
            self._helper = None
            self._listener.on_helper_death()

    def stop(self) -> None:
        """All of them, in good order where they have begun to work."""
        if self._helper is not None:
            self._helper.kill()  # it holds nothing, and at its priority it would be the last to hear that it may leave
            self._helper.bury()
        for process, worker in enumerate(self._workers):
            worker.ask_to_leave(working=process in self.ready_workers)
        reap_all(self._workers)
        self._pager.stop()  # the last: a worker finishes its step with the experts that it waits for
