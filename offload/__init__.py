"""Where optimizer state lives and who updates it; for now, what the machine can do (`hardware`)."""

if __name__ != "interlace.offload":
    raise ImportError(
        "import this package as interlace.offload: the bare name 'offload' belongs to other "
        "projects"
    )
