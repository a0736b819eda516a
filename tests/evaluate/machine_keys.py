"""The metrics that depend on the machine, which two equal evaluations do not share."""

MACHINE_KEYS = {
    "seconds_per_image",
    "seconds_per_image_p90",
    "images_per_second",
    "peak_memory_bytes",
    "machine",
    "measured_at",
    "other_load",
}
