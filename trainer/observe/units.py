"""Numbers as people read them."""

DECIMAL = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

LONG_TIMES = ((172_800.0, 86_400.0, "d"), (7200.0, 3600.0, "h"), (119.95, 60.0, "min"))
"""From how many seconds on a unit is used, its seconds, and its name."""


def human_count(value: float) -> str:
    """Return a count with a decimal suffix: 950, 18.4k, 1.9M, 7.1B, 3.2T, 4.4P."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def human_flops(value: float) -> str:
    """Return floating-point operations with their unit: 4.4 PFLOP."""
    for size, prefix in DECIMAL:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.1f} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def human_bytes(value: float) -> str:
    """Return a size in binary units: 512 B, 1.5 MiB, 9.8 GiB."""
    for size, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def human_duration(seconds: float) -> str:
    """Return a duration with its two largest units: 8s, 6m 05s, 3h 20m, 2d 04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02d}h"


def human_seconds(seconds: float) -> str:
    """Return a time of machines: three digits up to two minutes (62.0 ms, 1.00 ms, 11.9 s), then
    minutes, hours and days with one decimal (3.2 min, 1.6 h, 4.8 d).
    """
    if seconds == 0:
        return "0 s"
    for limit, size, unit in LONG_TIMES:
        if seconds >= limit:
            return f"{seconds / size:,.1f} {unit}"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds * 1e6)} us"


def three_digits(value: float) -> str:
    """Return a number below 1000 with three digits."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
