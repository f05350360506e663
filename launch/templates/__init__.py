"""Jobs for schedulers, as text with `$NAMES` that `interlace.launch.launchers.templates` fills."""
