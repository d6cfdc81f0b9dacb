"""Read ahead by one: the next tensor comes from the disk while this one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import closing, nullcontext, suppress
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], ahead: int = 1) -> Generator[T]:
    """Yield ``items``, at most ``ahead`` of them produced before they are asked for, in a thread.

    An exception of the producer is raised here, in its place. Closing the generator stops the thread, and closes ``items`` there.
    """
    line: queue.Queue[object] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                line.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            with closing(items) if isinstance(items, Generator) else nullcontext():
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
        except BaseException as error:  # noqa: BLE001  # handed to the consumer, which raises it
            put(_Failure(error))
        else:
            put(_END)

    thread = threading.Thread(target=produce, name="lowbit-prefetch", daemon=True)
    try:
        thread.start()
        while (item := line.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item  # type: ignore[misc]  # the queue carries T, failures and the end
    finally:
        stopped.set()
        if thread.ident is not None:  # interrupted before it ran
            thread.join()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error
