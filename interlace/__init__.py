"""Interlace pretrains large sequence models on less GPU memory than their optimizer needs.

The folders of the project stand at the top level of the repository and are imported through the links
in this folder, as `interlace.kernels`, `interlace.offload`, `interlace.trainer` and `interlace.launch`.
Imports point one way: kernels <- offload <- trainer <- launch.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
