"""The command line and the ways to start a run; every one of them ends in
`interlace.trainer.loop.train`.
"""

if __name__ != "interlace.launch":
    raise ImportError(
        "import this package as interlace.launch: the bare name 'launch' belongs to other projects"
    )
