"""Settings of DeepSpeed that would let it train otherwise than the loop of this project expects."""

from interlace.trainer.engines.zero.merging import Refusal

OTHER_ENGINE = "the trainer has no such engine; take it out"

REFUSALS = {
    # The recipe has a table of its own for each of these.
    "optimizer": Refusal((), "[optimizer] of the recipe decides; take it out"),
    "scheduler": Refusal((), "optimizer.schedule of the recipe decides; take it out"),
    "activation_checkpointing": Refusal(
        (),
        "only models that call DeepSpeed's own function read it; take it out, and type "
        "train.activation_checkpointing=block",
    ),
    "data_efficiency.enabled": Refusal((False,), "[data] decides on rows and order; take it out"),
    "data_types.param_dtype": Refusal((), "train.compute_dtype decides; take it out"),
    # What the numbers are computed with.
    "fp16.enabled": Refusal(
        (False,), "the trainer scales no losses; take it out, and type train.compute_dtype=bfloat16"
    ),
    "torch_autocast.enabled": Refusal((False,), "train.compute_dtype decides; take it out"),
    "bf16.bf16_master_weights_and_grads": Refusal(
        (False,), "masters are kept in float32; take it out"
    ),
    "bf16.bf16_optimizer_states": Refusal((False,), "moments are kept in float32; take it out"),
    "gradient_allreduce_op": Refusal(("mean",), "a loss is the mean over all ranks; take it out"),
    "prescale_gradients": Refusal(
        (False,), "ZeRO divides by the number of ranks where it sums; take it out"
    ),
    "gradient_predivide_factor": Refusal(
        (1,), "ZeRO divides by the number of ranks where it sums; take it out"
    ),
    "managed_gradient_accumulation": Refusal(
        (True,), "DeepSpeed counts the passes of a step here; take it out"
    ),
    "zero_optimization.compute_grad_norm": Refusal(
        (True,), "every step's gradient norm is logged and judged; take it out"
    ),
    # Who updates, and where state lies.
    "zero_force_ds_cpu_optimizer": Refusal(
        (False,), "optimizer.rule decides who updates; take it out"
    ),
    "zero_allow_untested_optimizer": Refusal(
        (True,), "ZeRO would refuse what optimizer.rule makes; take it out"
    ),
    "zero_optimization.zenflow": Refusal(
        (None,), "ZenFlow updates with old gradients, which no rule of recipes means; take it out"
    ),
    "zero_optimization.offload_optimizer.super_offload": Refusal(
        (False,), "SuperOffload updates in a process of its own; take it out"
    ),
    "zero_optimization.offload_optimizer.ratio": Refusal(
        (1,),
        "which state stays on the device is for offload.strategy=optimal and "
        "offload.device_budget_gib to say; take it out",
    ),
    "zero_optimization.offload_param.device": Refusal(
        ("none",), "weights stay on the device, where updates bring them; take it out"
    ),
    "zero_optimization.cpu_offload": Refusal(
        (False, None), "the name is old and offload.strategy decides; take it out"
    ),
    "zero_optimization.cpu_offload_param": Refusal(
        (False, None), "weights stay on the device, where updates bring them; take it out"
    ),
    "zero_optimization.cpu_offload_use_pin_memory": Refusal(
        (), "the name is old; write offload_optimizer.pin_memory"
    ),
    # Where weights and gradients are found again, for checkpoints.
    "zero_optimization.round_robin_gradients": Refusal(
        (False,), "checkpoints take weights to lie in their order; take it out"
    ),
    "zero_optimization.zero_hpz_partition_size": Refusal(
        (1,), "a second copy of weights is not filled from checkpoints; take it out"
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": Refusal(
        (False,), "checkpoints hold weights as they are; take it out"
    ),
    "zero_optimization.legacy_stage1": Refusal((False,), OTHER_ENGINE),
    # Other engines of DeepSpeed.
    "compile.deepcompile": Refusal((False,), OTHER_ENGINE),
    "hybrid_engine.enabled": Refusal((False,), OTHER_ENGINE),
    "pipeline": Refusal((), OTHER_ENGINE),
    "tensor_parallel": Refusal((), OTHER_ENGINE),
    "expert_parallel": Refusal((), OTHER_ENGINE),
    "sequence_parallel_size": Refusal((1,), OTHER_ENGINE),
    "autotuning.enabled": Refusal((False,), OTHER_ENGINE),
}
"""What is refused, by path."""
