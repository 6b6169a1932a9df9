"""Something that can be waited for."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress


class News:
    """A number that grows, and whoever waits for it.

    Attributes:
        version: grows with every piece of news.
    """

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def tell(self) -> None:
        """There is news."""
        self.version += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, seconds: float) -> None:
        """Until there is news, or so many seconds are over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()


class Bells:
    """A bell for everybody who has a name: whoever waits for one is not woken by the others'."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    def ring(self, names: Iterable[str] | None = None) -> None:
        """Wake whoever waits for one of these; None: everybody."""
        for name in list(self._waiting) if names is None else names:
            for waiter in self._waiting.get(name, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self, name: str, seconds: float) -> None:
        """Until the bell of this name is rung, or so many seconds are over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[name].add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await waiter
        finally:
            self._waiting[name].discard(waiter)
            if not self._waiting[name]:
                del self._waiting[name]
