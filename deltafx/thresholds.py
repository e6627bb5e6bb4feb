"""The thresholds of a compiled model, by node name, changeable between frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from deltafx.config import Config, check_threshold
from deltafx.errors import UnknownNodeError

if TYPE_CHECKING:
    from deltafx.module import DeltaModule


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

    def copied(self, other: Thresholds | RegionThresholds) -> None:
        """Takes over what was set in another one."""
        self._given, self._default = dict(other._given), other._default
        self._changed()

    def any_positive(self) -> bool:
        """Whether any node truncates at all."""
        return any(self[name] > 0 for name in self._names)

    def _unknown(self, name: str) -> UnknownNodeError:
        known = ", ".join(self._names[:8]) or "known after the first frame"
        return UnknownNodeError(
            f"no node {name!r} that truncates; the names are {known}, ...; see explain()"
        )


def joined(region: str, node: str) -> str:
    """The name of a region's node among those of all regions."""
    return f"{region}.{node}" if region else node


class RegionThresholds(MutableMapping[str, float]):
    """The thresholds of a model of several regions, by `region.node`.

    What is set before the first frame is kept, and checked after it.
    """

    def __init__(self, config: Config, regions: Callable[[], Mapping[str, DeltaModule]]) -> None:
        """Takes the defaults from the config; `regions` tells the regions of the day."""
        self._regions = regions
        self._given: dict[str, float] = dict(config.thresholds)
        self._default: float | None = None

    def find(self, name: str) -> tuple[DeltaModule, str]:
        """The region of a node, and the node's name in it.

        Raises:
            UnknownNodeError: There is no such region.
        """
        regions = self._regions()
        region, _, node = name.rpartition(".")
        if region not in regions:
            known = ", ".join(joined(r, "...") for r in list(regions)[:8])
            raise UnknownNodeError(
                f"no node {name!r}; the regions are {known or 'known after the first frame'}; "
                "see explain() for the names"
            )
        return regions[region], node

    def __getitem__(self, name: str) -> float:
        """The threshold of a node."""
        if not self._regions() and name in self._given:
            return self._given[name]
        region, node = self.find(name)
        return region.thresholds[node]

    def __setitem__(self, name: str, value: float) -> None:
        """Sets the threshold of a node from the next frame on."""
        value = check_threshold(f"thresholds[{name!r}]", value)
        if self._regions():
            region, node = self.find(name)
            region.thresholds[node] = value
        self._given[name] = value

    def __delitem__(self, name: str) -> None:
        """Takes a node back to the default."""
        if self._regions():
            region, node = self.find(name)
            del region.thresholds[node]
        elif name not in self._given:
            raise UnknownNodeError(f"no threshold of {name!r} was set")
        self._given.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        """The names, region by region."""
        regions = self._regions()
        if not regions:
            return iter(tuple(self._given))
        return (
            joined(name, node) for name, region in regions.items() for node in region.thresholds
        )

    def __len__(self) -> int:
        """How many nodes truncate."""
        return sum(1 for _ in self)

    def set_all(self, value: float) -> None:
        """Gives every node, the input nodes too, one threshold."""
        self._default = check_threshold("threshold", value)
        self._given.clear()
        for region in self._regions().values():
            region.thresholds.set_all(value)

    def adopt(self, name: str, region: DeltaModule) -> None:
        """Gives a new region what was set for it.

        Raises:
            UnknownNodeError: A name that it does not have.
        """
        if self._default is not None:
            region.thresholds.set_all(self._default)
        for given, value in self._given.items():
            owner, _, node = given.rpartition(".")
            if owner == name:
                region.thresholds[node] = value

    def check(self) -> None:
        """Checks, after a frame, what was set before it.

        Raises:
            UnknownNodeError: A name of no region.
        """
        for name in self._given:
            self.find(name)

    def copied(self, other: Thresholds | RegionThresholds) -> None:
        """Takes over what was set in another one."""
        self._given, self._default = dict(other._given), other._default
