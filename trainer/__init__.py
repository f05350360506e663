"""What is trained and how: configuration, data, models, the loop, checkpoints and what a person
sees.
"""

if __name__ != "interlace.trainer":
    raise ImportError(
        "import this package as interlace.trainer: the bare name 'trainer' belongs to other "
        "projects"
    )
