"""Lists the keys that a ds_config may have, for `recipes.common.config.ds_config`. DeepSpeed 0.19.8, runtime/config.py.

Every key is allowed by name or refused by name, with the place where it belongs. To allow one more, add a line here.
The fields of blocks that DeepSpeed declares with pydantic (bf16, fp16, zero_optimization, comms_logger, ...) are not
listed: they are read from DeepSpeed.
"""

# Keys that the recipe or the code sets: key -> where
RECIPE_OWNED = {
    "train_batch_size": "it is batch.global_seqs of the recipe",
    "train_micro_batch_size_per_gpu": "it is batch.micro_seqs of the recipe",
    "gradient_accumulation_steps": "it follows from batch.global_seqs, batch.micro_seqs and the number of GPUs",
    "gradient_clipping": "it is optimizer.clip of the recipe",
    "optimizer": "it is optimizer=AdamW(...) or SGD(...) of the recipe",
    "scheduler": "it is schedule=Cosine(...), WSD(...), ... of the recipe",
    "zero_allow_untested_optimizer": "it follows from the recipe's optimizer",
    "activation_checkpointing": "it is recompute of the recipe's layout",
    "tensor_parallel": "it is tensor of the recipe's layout",
    "sequence_parallel_size": "it is context of the recipe's layout",
    "expert_parallel": "the layout is the recipe's, which has tensor, pipeline and data parallelism",
    "data_efficiency": "which data is read, and in which order, is the recipe's",
    "data_types.param_dtype": "it follows from bf16.enabled and fp16.enabled",
    "pipeline.activation_checkpoint_interval": "it is recompute of the recipe's layout",
    "pipeline.stages": "it is pipeline of the recipe's layout",
    "pipeline.partition": "it is layers_per_stage of the recipe's layout; without it, stages are balanced by cost, head included",
    "pipeline.seed_layers": "initial weights follow from the recipe's seed, equal in every layout",
    "gradient_allreduce_op": "gradients are averaged over the batch; 'sum' would change what is learned",
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed's own boundaries",
}
# Keys that must not be set at all: key -> reason
REFUSED = {
    "wall_clock_breakdown": "it crashes with pipeline > 1 in DeepSpeed 0.19; metrics.jsonl has the times",
    "flops_profiler": "it turns on wall_clock_breakdown, which crashes with pipeline > 1 in DeepSpeed 0.19",
    "steps_per_print": "the training loop prints its own lines; metrics.jsonl has every step",
    "tensorboard": "the run writes metrics.jsonl, TensorBoard and W&B itself",
    "wandb": "the run writes metrics.jsonl, TensorBoard and W&B itself",
    "csv_monitor": "the run writes metrics.jsonl, TensorBoard and W&B itself",
    "comet": "the run writes metrics.jsonl, TensorBoard and W&B itself",
    "checkpoint": "checkpoints are written in Hugging Face names by the recipe's checkpoints=..., not by DeepSpeed",
    "datastates_ckpt": "checkpoints are written in Hugging Face names by the recipe's checkpoints=..., not by DeepSpeed",
    "torch_autocast": "parameters would stay fp32; use bf16.enabled",
    "bfloat16": "the old name of bf16; rename it",
    "autotuning": "it restarts the run with other batch sizes",
    "compile": "DeepCompile rewrites the backward pass that the pipeline engine drives",
    "hybrid_engine": "it is for generation inside reinforcement learning",
    "weight_quantization": "it is for inference",
    "data_types.buffer_dtype": "it rounds the rotary tables",
    "bf16.bf16_master_weights_and_grads": "master weights and their gradients are fp32",
    "bf16.bf16_optimizer_states": "optimizer states are fp32",
    "fp16.fp16_master_weights_and_grads": "master weights and their gradients are fp32",
    "zero_optimization.compute_grad_norm": "clipping and metrics.jsonl need the gradient norm",
    "zero_optimization.elastic_checkpoint": "checkpoints have no topology; resume in any layout as they are",
    "zero_optimization.legacy_stage1": "removed from DeepSpeed; stage 1 needs no more than stage=1",
    "zero_optimization.zenflow": "it delays updates, so a resumed run would differ",
    "zero_optimization.cpu_offload": 'the old name of offload_optimizer={"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'the old name of offload_param={"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "the old name of offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "checkpoints are not written by DeepSpeed",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeedCPUAdam; the optimizer is torch's AdamW",
    "zero_optimization.offload_optimizer.ratio": "it needs DeepSpeedCPUAdam; the optimizer is torch's AdamW",
}
# Blocks that DeepSpeed itself refuses (runtime/config.py, issue 8489); a test compares this list with DeepSpeed's
REMOVED = {
    "": [
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ],
    "zero_optimization": ["mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"],
}
TOP_LEVEL = {
    "bf16": dict,
    "fp16": dict,
    "data_types": dict,
    "communication_data_type": str,
    "zero_optimization": dict,
    "zero_force_ds_cpu_optimizer": bool,
    "pipeline": dict,
    "timers": dict,
    "comms_logger": dict,
    "aio": dict,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": str,
}
# Nested blocks that DeepSpeed reads without checking them
UNCHECKED_BLOCKS = {
    "data_types": {"grad_accum_dtype": str, "keep_in_fp32_modules": list},
    "pipeline": {"pipe_partitioned": bool, "grad_partitioned": bool, "use_reentrant": bool},
    "timers": {"throughput": dict},
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
}
