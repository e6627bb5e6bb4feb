"""The thresholds of a compiled model, by node name, changeable between frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence

from deltafx.config import Config, check_threshold
from deltafx.errors import UnknownNodeError


class Thresholds(MutableMapping[str, float]):
    """Maps the name of each node that truncates to its threshold.

    Before the first frame the names are not known; what is set then is kept and checked later.
    """

    def __init__(self, config: Config, changed: Callable[[], None]) -> None:
        """Takes the defaults from the config; `changed` is called after every write."""
        self._config = config
        self._changed = changed
        self._given: dict[str, float] = dict(config.thresholds)
        self._default: float | None = None
        self._names: tuple[str, ...] = ()
        self._inputs: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> float:
        """The threshold of a node."""
        if self._names and name not in self._names:
            raise self._unknown(name)
        if name in self._given:
            return self._given[name]
        if not self._names:
            raise self._unknown(name)
        if self._default is not None:
            return self._default
        gate = self._config.input_threshold
        return gate if gate is not None and name in self._inputs else self._config.threshold

    def __setitem__(self, name: str, value: float) -> None:
        """Sets the threshold of a node from the next frame on."""
        if self._names and name not in self._names:
            raise self._unknown(name)
        self._given[name] = check_threshold(f"thresholds[{name!r}]", value)
        self._changed()

    def __delitem__(self, name: str) -> None:
        """Takes a node back to the default."""
        if name not in self._given:
            raise self._unknown(name)
        del self._given[name]
        self._changed()

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the graph."""
        return iter(self._names or tuple(self._given))

    def __len__(self) -> int:
        """How many nodes truncate."""
        return len(self._names or self._given)

    def set_all(self, value: float) -> None:
        """Gives every node, the input node too, one threshold."""
        self._default = check_threshold("threshold", value)
        self._given.clear()
        self._changed()

    def resolve(self, names: Sequence[str], inputs: Sequence[str]) -> list[float]:
        """The thresholds of nodes in their order; from now on those are the names.

        Raises:
            UnknownNodeError: A name that was set before is none of them.
        """
        self._names, self._inputs = tuple(names), frozenset(inputs)
        for name in self._given:
            if name not in self._names:
                raise self._unknown(name)
        return [self[name] for name in self._names]

    def any_positive(self) -> bool:
        """Whether any node truncates at all."""
        return any(self[name] > 0 for name in self._names)

    def _unknown(self, name: str) -> UnknownNodeError:
        known = ", ".join(self._names[:8]) or "known after the first frame"
        return UnknownNodeError(
            f"no node {name!r} that truncates; the names are {known}, ...; see explain()"
        )
