"""Time that a benchmark may spend."""

import time


class Budget:
    """Seconds to spend: what would start after the deadline is left out, and noted.

    Attributes:
      start: when the time began, of `time.monotonic`.
      deadline: after which nothing starts; it may be moved.
      left_out: labels of what did not start.

    Example:
      >>> budget = Budget(0)
      >>> budget.skip("the long way"), budget.left_out
      (True, ['the long way'])
    """

    def __init__(self, seconds: float):
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.left_out: list[str] = []

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the deadline, or 0."""
        return max(self.deadline - time.monotonic(), 0.0)

    def skip(self, label: str) -> bool:
        """Whether it is too late for `label`, which is noted then."""
        late = time.monotonic() >= self.deadline
        if late:
            self.left_out.append(label)
        return late
