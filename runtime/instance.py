"""The IPC objects of one instance: its lock, its arena and its paging queue. Made and removed in one place."""

from __future__ import annotations

from hotset.runtime.plan import InstancePlan
from hotset.shm.layout import ArenaState
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects, remove_stale_instances

LOCK_PATIENCE_SECONDS = 0.5


class Instance:
    """Owned by the coordinator. Creating one first removes what killed instances of this user have left.

    Raises:
        InstanceNameTaken: it runs already. NotEnoughSharedMemory: the plan does not fit /dev/shm.
    """

    def __init__(self, name: str, plan: InstancePlan) -> None:
        self.name = name
        self.plan = plan
        remove_stale_instances()
        self._lock = InstanceLock(name, patience=LOCK_PATIENCE_SECONDS)
        try:
            self.segment = Segment.create(name, plan.geometry)
            self.queue = PagingQueue.create(name)
        except BaseException:
            remove_ipc_objects(name)
            self._lock.release()
            raise
        self.arena = self.segment.arena

    def remove(self) -> None:
        """Nothing of the instance is left afterwards; its processes must have stopped."""
        self.arena.state = ArenaState.CLOSED
        self.queue.close()
        remove_ipc_objects(self.name)
        self._lock.release()
