"""Without a GPU, Triton kernels run in Triton's interpreter.

Triton reads the variable when a kernel is decorated and when its own library is imported, so it is
set here, before any test module of this folder is imported. Modules with kernels are imported
where they are used, never at the top of a module that a user without Triton imports.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
