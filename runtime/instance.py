"""The IPC objects under one name: a lock, an arena and a paging queue. Made and removed in one place."""

from __future__ import annotations

from hotset.runtime.plan import InstancePlan
from hotset.shm.geometry import Geometry
from hotset.shm.layout import ArenaState
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects, remove_stale_instances

LOCK_PATIENCE_SECONDS = 0.5


class NamedArena:
    """Owned by who makes it, which first removes what killed instances of this user have left.

    Raises:
        InstanceNameTaken: it runs already. NotEnoughSharedMemory: the arena does not fit /dev/shm.
    """

    def __init__(self, name: str, geometry: Geometry) -> None:
        self.name = name
        remove_stale_instances()
        self._lock = InstanceLock(name, patience=LOCK_PATIENCE_SECONDS)
        try:
            self.segment = Segment.create(name, geometry)
            self.queue = PagingQueue.create(name)
        except BaseException:
            remove_ipc_objects(name)
            self._lock.release()
            raise
        self.arena = self.segment.arena

    def remove(self) -> None:
        """Nothing is left afterwards; the processes that use it must have stopped, or hold nothing of it."""
        self.arena.state = ArenaState.CLOSED
        self.queue.close()
        remove_ipc_objects(self.name)
        self._lock.release()


class Instance(NamedArena):
    """Of a whole instance, owned by its coordinator."""

    def __init__(self, name: str, plan: InstancePlan) -> None:
        self.plan = plan
        super().__init__(name, plan.geometry)
