"""From a topic to the entries of all filters that match it: a tree of levels that never changes.

Adding or removing copies the path to one filter and gives a new router, so that the network thread matches
without a lock while other threads make its successor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from tars_mqtt.topics import split_share

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

_CACHED_SEARCHES: Final = 4096
_CACHED_TOPIC_LENGTH: Final = 256
_CACHED_ENTRIES: Final = 64  # beyond, the search is little beside what is then done with the entries


class _Node(NamedTuple, Generic[T]):
    """Where filters that begin alike have come after some levels. Its dicts do not change either.

    Attributes:
        children: The next level, a wildcard or a name, and what follows it.
        entries: The filters that end here, one plain and any number shared, with their place in the order of
            registration and their entry.
    """

    children: dict[str, _Node[T]]
    entries: dict[str, tuple[int, T]]


_NOTHING: Final[_Node[Any]] = _Node({}, {})


class Router(Generic[T]):
    """Immutable: one entry per filter, found by topic. The filters given to it have passed `check_filter`.

    ``f`` and ``$share/g/f`` match the same topics and are two filters.
    """

    __slots__ = ("_found", "_root", "_total")

    def __init__(self) -> None:
        self._root: _Node[T] = _NOTHING
        self._total = 0  # filters ever registered: the next one's place in the order
        # All that changes. Each step on it is atomic, and an entry lost to a race costs one search.
        self._found: dict[str, tuple[T, ...]] = {}

    def __iter__(self) -> Iterator[T]:
        """The entries in order of registration."""
        ordered: list[tuple[int, T]] = []
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            ordered.extend(node.entries.values())
            nodes.extend(node.children.values())
        return iter(_in_order(ordered))

    def get(self, topic_filter: str) -> T | None:
        """The entry of exactly this filter, None if there is none."""
        _, path = self._path(topic_filter)
        known = path[-1].entries.get(topic_filter)
        return None if known is None else known[1]

    def add(self, topic_filter: str, entry: T) -> Router[T]:
        """A router with *topic_filter* too. A filter that is known gets the new entry and keeps its place."""
        levels, path = self._path(topic_filter)
        entries = path[-1].entries
        known = entries.get(topic_filter)
        place = self._total if known is None else known[0]
        router: Router[T] = Router()
        router._root = _rebuild(levels, path, {**entries, topic_filter: (place, entry)})
        router._total = self._total + (known is None)
        return router

    def remove(self, topic_filter: str) -> Router[T]:
        """A router without *topic_filter*; this one if it has no such filter."""
        levels, path = self._path(topic_filter)
        entries = path[-1].entries.copy()
        if entries.pop(topic_filter, None) is None:
            return self
        router: Router[T] = Router()
        router._root = _rebuild(levels, path, entries)
        router._total = self._total
        return router

    def match(self, topic: str) -> tuple[T, ...]:
        """The entry of each filter that matches, in order of registration."""
        found = self._found.get(topic)
        if found is None:
            found = tuple(_in_order(_search(self._root, topic)))
            if len(topic) <= _CACHED_TOPIC_LENGTH and len(found) <= _CACHED_ENTRIES:
                if len(self._found) >= _CACHED_SEARCHES:
                    self._found.clear()
                self._found[topic] = found
        return found

    def _path(self, topic_filter: str) -> tuple[list[str], list[_Node[T]]]:
        """The levels of a filter and the nodes before, between and after them."""
        levels = split_share(topic_filter)[1].split("/")
        path = [self._root]
        for level in levels:
            path.append(path[-1].children.get(level, _NOTHING))
        return levels, path


def _rebuild(levels: list[str], path: list[_Node[T]], entries: dict[str, tuple[int, T]]) -> _Node[T]:
    """The root of a tree where the end of *path* has *entries*; nodes that lead nowhere are left out."""
    node = _Node(path.pop().children, entries)
    while path:
        parent = path.pop()
        children = parent.children.copy()
        level = levels[len(path)]
        if node.children or node.entries:
            children[level] = node
        else:
            children.pop(level, None)
        node = _Node(children, parent.entries)
    return node


def _search(root: _Node[T], topic: str) -> list[tuple[int, T]]:
    """Walk down all matching branches side by side: no node is visited twice, and no depth is too deep."""
    if "+" in topic or "#" in topic:
        return []  # a filter, not a topic: its wildcards are keys of the tree
    found: list[tuple[int, T]] = []
    live = [root]
    wildcards = not topic.startswith("$")  # at the first level only [MQTT-4.7.2-1]
    for level in topic.split("/"):
        following = []
        for node in live:
            children = node.children
            if (child := children.get(level)) is not None:
                following.append(child)
            if wildcards:
                if (child := children.get("+")) is not None:
                    following.append(child)
                if (child := children.get("#")) is not None:
                    found.extend(child.entries.values())
        if not following:
            return found
        live = following
        wildcards = True
    for node in live:
        found.extend(node.entries.values())
        # "a/#" matches "a" too (section 4.7.1.2).
        found.extend(node.children.get("#", _NOTHING).entries.values())
    return found


def _in_order(entries: list[tuple[int, T]]) -> list[T]:
    entries.sort()  # never looks at an entry: no two have the same place
    return [entry for _, entry in entries]
