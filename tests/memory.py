"""How much memory tensors take while something runs."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by work held at one time."""
    with profile(profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))
