"""What a walk over our source finds: uses of a library, and classes that extend its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """Arguments passed: positional ones, keywords, and whether * or ** may bring more."""

    positional: int = 0
    keywords: tuple[str, ...] = ()
    star: bool = False
    star_star: bool = False

    def __str__(self) -> str:
        words = ["..."] * self.positional + ["*..."] * self.star
        words += [f"{k}=..." for k in self.keywords] + ["**..."] * self.star_star
        return f"({', '.join(words)})"


@dataclass(frozen=True)
class Use:
    """One place where a name of the library's is needed: the first of `paths` that exists.

    instance: reached through an object of the class, so that a call brings `self`. attaches: what
    is needed is that objects of the class take attributes of ours.
    """

    where: str
    paths: tuple[str, ...]
    call: Call | None = None
    instance: bool = False
    attaches: bool = False


@dataclass(frozen=True)
class Object:
    """The library's class (or function) that an expression of ours is; our own attributes on it."""

    path: str
    ours: tuple[str, ...] = ()  # beginnings of the names that we attach

    def is_ours(self, attribute: str) -> bool:
        return attribute.startswith(self.ours) if self.ours else False


@dataclass(frozen=True)
class OwnClass:
    """A class of ours that extends one of the library's; members as Source.describe says them."""

    where: str
    name: str
    base: tuple[str, ...]
    members: Mapping[str, str]


@dataclass
class Found:
    """Everything that was found."""

    uses: list[Use] = field(default_factory=list)
    classes: list[OwnClass] = field(default_factory=list)
    unused_objects: set[tuple[str, str]] = field(default_factory=set)
