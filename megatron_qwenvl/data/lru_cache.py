"""A small cache that, unlike `functools.lru_cache`, belongs to one object and closes the values that it drops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LruCache(Generic[T]):
    """Keeps the most recently used values; a value that falls out is given to `drop`."""

    def __init__(self, size: int, drop: Callable[[T], None] | None = None) -> None:
        self._size = size
        self._drop = drop
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def forget(self, key: Hashable) -> None:
        """Drop the value of `key`, if it is there."""
        if key in self._values:
            value = self._values.pop(key)
            if self._drop:
                self._drop(value)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`, made if it is not there."""
        if key not in self._values:
            value = make()
            if len(self._values) >= self._size:
                _, oldest = self._values.popitem(last=False)
                if self._drop:
                    self._drop(oldest)
            self._values[key] = value
        self._values.move_to_end(key)
        return self._values[key]
