"""What the values of options may be; each is a function for argparse's `type`."""

import argparse
import re

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def whole(text: str) -> int:
    """An integer of at least 0, such as 200_000_000."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 200_000_000")
    return number


def count(text: str) -> int:
    """An integer of at least 1."""
    if whole(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return whole(text)


def seconds(text: str) -> float:
    """A positive time."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return number


def size(text: str) -> int:
    """Bytes: 512MiB is 512 * 2**20, 512MB is 512 * 10**6, a bare number is bytes."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB, 2GiB or 1_000_000")
    found = int(float(match[1]) * UNITS[match[2].upper()])
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return found
