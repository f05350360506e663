"""DeepSpeed's ZeRO optimizers with the update schedule of this package.

`attach(engine)`, one line after `deepspeed.initialize`, puts the interleaved update of
`interlace.offload` in the place of ZeRO's own, for stages 1, 2 and 3 with `offload_optimizer` on
the CPU. What DeepSpeed knows of its state stays where DeepSpeed looks for it: masters, gradients
and `optimizer.state` become views of the slabs that the update works on, so that its checkpoints
and its `safe_get_...` functions go on working. `detach(engine)` undoes it.

How it is done: `names` says what must be found, `rules` translates the client optimizer, `flats`
lays DeepSpeed's flat partitions into slabs, `stages` binds a few methods of the one optimizer
object anew, `attachment` runs the update. Reference: Deep Optimizer States (arXiv 2410.21316),
which is a fork of DeepSpeed; this needs none. DeepSpeed itself is loaded by `attach` only.
"""

from interlace.offload.deepspeed.attaching import attach, detach
from interlace.offload.deepspeed.attachment import Attachment

__all__ = ["Attachment", "attach", "detach"]
