"""Numerics: one file or folder per operation, each with a plain twin that it is tested against."""

if __name__ != "interlace.kernels":
    raise ImportError("import this package as interlace.kernels: the bare name 'kernels' belongs to other projects")
