"""Calls in threads, side by side, of functions that release the GIL."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")


def side_by_side(
    call: Callable[[Given], Found], given: Iterable[Given], *, threads: int
) -> Generator[Found]:
    """Results of `call` in the order of `given`, up to `threads` calls at a time.

    `given` is read in the calling thread, each item when its call is begun, and no more results
    than threads wait for the reader. Whoever stops reading waits for the calls that are begun.
    """
    if threads == 1:
        yield from map(call, given)
        return
    begun: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in given:
                begun.append(pool.submit(call, item))
                if len(begun) == threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
