"""Distribution of test files over the workers of pytest-xdist that outlasts a worker's crash."""

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class FileScheduling(LoadFileScheduling):
    """A file runs in one worker; if the worker crashes, its other tests run in the next one.

    xdist 3.8 would run the crashed test again and again, or wait without end for a worker that it
    gave only files whose tests are all done.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """The test during which the worker crashed; None if it had ended its work."""
        files = self.assigned_work.pop(node)
        unfinished = [
            (tests, name) for tests in files.values() for name, done in tests.items() if not done
        ]
        if not unfinished:
            return None
        tests, crashed = unfinished[0]
        tests[crashed] = True
        self.workqueue.update({f: tests for f, tests in files.items() if not all(tests.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        # A worker begins a test only when it knows the next one, or that there is none.
        if self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)
