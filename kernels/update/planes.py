"""A float32 number in two 16-bit planes: a bfloat16 and a remainder, together exact.

The high plane is the number's bit pattern rounded to 16 bits, halves away from zero; the remainder
is what was rounded off, as a signed integer. Round-to-nearest-even would not do: a high plane whose
last bit is 0 would have 65,537 originals, one more than 16 bits tell apart. The two roundings
differ only in exact halves.
"""

import torch


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the planes (bfloat16, int16) of a float32 tensor."""
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def merge_master(high: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 tensor of which these are the planes, bit for bit."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)
