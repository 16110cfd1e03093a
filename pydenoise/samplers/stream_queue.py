"""A bounded queue between two threads that has an end, carries errors in order, and can be given up by either side."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ended(Exception):
    """There are no more items."""


class GivenUp(Exception):
    """One of the sides has left."""


class Channel(Generic[T]):
    """Items in the order in which they were put, at most ``size`` of them at a time.

    Whoever puts waits for room, whoever gets waits for items; from threads with ``put`` and ``get``, in an event loop
    with ``aput`` and ``aget``, which do not block it.
    """

    def __init__(self, size: int):
        self._size, self._items = size, deque()
        self._changed = threading.Condition()
        self._ended = self._given_up = False
        self._error: BaseException | None = None
        self._watchers: set[Callable[[], None]] = set()  # of event loops

    def put(self, item: T, timeout: float | None = None) -> None:
        """Raises TimeoutError after ``timeout`` seconds without room, GivenUp where nobody takes the item."""
        self._wait(lambda: self._try_put(item), timeout)

    def get(self, timeout: float | None = None) -> T:
        """Raises TimeoutError after ``timeout`` seconds without an item, Ended (or the error) after the last one, and
        GivenUp after ``give_up``."""
        return self._wait(self._try_get, timeout)[0]

    async def aput(self, item: T) -> None:
        await self._await(lambda: self._try_put(item))

    async def aget(self) -> T:
        return (await self._await(self._try_get))[0]

    def end(self, error: BaseException | None = None) -> None:
        """No more items: whoever gets is told so, or gets ``error``, after those that are here."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._tell()

    def give_up(self) -> None:
        """Items are dropped, and whoever puts or gets is told so by GivenUp."""
        with self._changed:
            self._given_up = True
            self._items.clear()
            self._tell()

    @property
    def ended(self) -> bool:
        """Whether no more items can be put."""
        return self._ended or self._given_up

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def _try_put(self, item: T) -> tuple | None:
        if self.ended:
            raise GivenUp
        if len(self._items) >= self._size:
            return None
        self._items.append(item)
        self._tell()
        return ()

    def _try_get(self) -> tuple[T] | None:
        if self._given_up:
            raise GivenUp
        if self._items:
            item = self._items.popleft()
            self._tell()
            return (item,)
        if self._error is not None:
            raise self._error
        if self._ended:
            raise Ended
        return None

    def _tell(self) -> None:
        self._changed.notify_all()
        for watcher in tuple(self._watchers):
            watcher()

    def _wait(self, attempt: Callable[[], tuple | None], timeout: float | None) -> tuple:
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while (done := attempt()) is None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"stream: nothing happened within {timeout:g} s")
                self._changed.wait(left)
            return done

    async def _await(self, attempt: Callable[[], tuple | None]) -> tuple:
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def watcher() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

        try:
            while True:
                event.clear()
                with self._changed:
                    self._watchers.add(watcher)
                    done = attempt()
                if done is not None:
                    return done
                await event.wait()
        finally:
            with self._changed:
                self._watchers.discard(watcher)
