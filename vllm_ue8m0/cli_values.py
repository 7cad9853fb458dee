"""Values of command line options: text -> value, ArgumentTypeError says what is allowed."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number of 1 or more.")
    return int(text)


def size(text: str) -> int:
    """Bytes, e.g. 500MB."""
    from .checkpoint.workers import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def tolerance(text: str) -> float:
    """0 or more."""
    value = float(text)
    if not value >= 0:  # NaN is not either
        raise ValueError
    return value


def shape(text: str) -> tuple[int, int]:
    """N,K of a weight."""
    try:
        N, K = (positive(size) for size in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not N,K such as 7168,2048.") from None
    return N, K


def rate(text: str) -> float:
    """More than 0, and finite."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above 0.")
    return value
