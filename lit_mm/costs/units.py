"""Formats large numbers."""

from __future__ import annotations


def in_flops(count: float) -> str:
    """`3.78 T`, with at most four digits."""
    factor, unit = unit_of(count)
    return f"{count / factor:.4g} {unit}".rstrip() if count else "0"


def unit_of(count: float) -> tuple[float, str]:
    """The factor and prefix to show a number with: 1e12 and `T` for 3e12."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= factor:
            return factor, unit
    return 1.0, ""


def in_bytes(count: float) -> str:
    """`320 MiB`."""
    power = min(3, max(0, (int(count).bit_length() - 1) // 10))
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
