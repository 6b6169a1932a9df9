"""Something that can be waited for."""

import asyncio
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
            await asyncio.wait_for(self._event.wait(), seconds)
