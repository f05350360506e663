"""Numbers as people read them."""


def human_count(value: float) -> str:
    """Return a count with a decimal suffix: 950, 18.4k, 1.9M, 7.1B, 3.2T, 4.4P."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


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
