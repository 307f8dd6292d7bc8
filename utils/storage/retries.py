"""How long requests to a bucket are retried, and the delays between attempts."""

import random
import time
from dataclasses import dataclass

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 5.0


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts of requests in seconds: maximum silence of the server, and time to keep retrying after a failure."""

    silence: float
    failing: float


WORK = RetryPolicy(silence=30, failing=120)  # a run survives storage that is down for a minute
CHECK = RetryPolicy(silence=5, failing=2)  # a check answers within about 10 seconds
REQUEST = RetryPolicy(silence=10, failing=5)  # a request to a service is answered within about 20 seconds


class Attempts:
    """The failed attempts of one operation and the delay after each."""

    def __init__(self, retry_policy: RetryPolicy):
        self.failed = 0
        self._retry_policy = retry_policy
        self._until = 0.0
        self._delay = _FIRST_DELAY_SECONDS

    def are_over(self) -> bool:
        """Return whether the time for retries is over."""
        return self.failed > 0 and time.monotonic() >= self._until

    def progressed(self) -> None:
        """Reset the retry time, because data has arrived."""
        self.failed, self._delay = 0, _FIRST_DELAY_SECONDS

    def wait(self) -> None:
        """Sleep with exponential backoff and jitter, so that clients do not retry at the same moment."""
        if not self.failed:
            self._until = time.monotonic() + self._retry_policy.failing
        self.failed += 1
        time.sleep(self._delay * random.uniform(0.5, 1))
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)
