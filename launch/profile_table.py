"""A machine's profile as a table."""

from interlace.offload.hardware import HardwareProfile
from interlace.trainer.observe.units import human_bytes, human_count, human_flops, human_seconds


def profile_table(profile: HardwareProfile) -> str:
    """Return the table: what was measured, and where each figure comes from."""
    lines = [
        f"{profile.name}: {profile.device_name}",
        f"  {'device memory':<42} {human_bytes(profile.device_memory_bytes)}",
        f"  {'host memory':<42} {human_bytes(profile.host_memory_bytes)}",
        f"  {'matrix products':<42} {human_flops(profile.matmul_flops)}/s",
    ]
    if profile.rates is not None:
        for name, value in profile.rates:
            words = name.replace("_", " ")
            if words.endswith("bytes per second"):
                shown = f"{value / 1e9:.1f} GB/s"
                words = words.removesuffix(" bytes per second")
            elif words.endswith(" seconds"):
                shown = human_seconds(value)
                words = words.removesuffix(" seconds")
            else:
                shown = f"{value:.3g}" if value < 1e6 else f"{human_count(value)}/s"
            lines.append(f"  {words:<42} {shown}")
    for title, figures in profile.measurements.items():
        lines += ["", f"  {title}"]
        lines += [f"    {what:<40} {show(value)}" for what, value in figures.items()]
    if profile.sources:
        lines += ["", "  sources"]
        lines += [f"    {what}: {source}" for what, source in profile.sources.items()]
    return "\n".join(lines)


def show(value: float) -> str:
    """Return a rate in GB/s, or a share."""
    return f"{value / 1e9:.1f} GB/s" if value > 1e6 else f"{value:.2f}"
