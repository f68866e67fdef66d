"""Translate settings' names: other tools' and papers', and earlier ones of ours."""

from __future__ import annotations

from collections.abc import Mapping

FP16 = (
    "dtype=bf16; fp16 is DeepSpeed's alone: strategy=deepspeed_zero2 "
    "+strategy.dp.deepspeed.fp16.enabled=true"
)
TRACKER = "logger=[default,tracker] logger.tracker.name={word} (pip install accelerate {word})"

# Other tools' words, and what to type here. A word is looked up by the last part of its key, in
# lower case, with _ for -.
ALIASES = {
    "lr learning_rate base_lr max_lr peak_lr": "optimizer.lr",
    "wd decay weight_decay": "optimizer.weight_decay",
    "beta1 beta2 adam_beta1 adam_beta2": "optimizer.betas, such as optimizer.betas=[0.9,0.95]",
    "adam_epsilon adam_eps epsilon": "optimizer.eps",
    "momentum": "optimizer=sgd optimizer.momentum",
    "adam optim": "optimizer=adamw",
    "scheduler lr_scheduler lr_scheduler_type lr_decay":
        "lr_schedule.warmup_steps and lr_schedule.min_lr_ratio of a cosine",
    "warmup warmup_iters num_warmup_steps warmup_ratio": "lr_schedule.warmup_steps",
    "min_lr lr_min": "lr_schedule.min_lr_ratio, over the highest learning rate",
    "grad_clip max_grad_norm gradient_clip_val gradient_clipping clip": "clip_norm",
    "batch_size bs train_batch_size":
        "global_batch_size (over all ranks) or micro_batch_size (a rank's)",
    "per_device_train_batch_size per_gpu_batch_size train_micro_batch_size_per_gpu mbs":
        "micro_batch_size (a rank's)",
    "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches gas":
        "micro_batch_size: a rank's rows of global_batch_size, over that, are its micro-batches",
    "epochs epoch num_epochs n_epochs max_epochs num_train_epochs":
        "steps: an epoch of text is train_tokens / (global_batch_size x seq_len) of them, of rows "
        "train_rows / global_batch_size; a run begins by telling how many",
    "max_steps num_steps n_steps iters max_iters train_iters train_steps total_steps iterations":
        "steps",
    "block_size max_seq_len max_seq_length max_length seq_length sequence_length context_length "
    "n_ctx n_positions max_position_embeddings": "seq_len, of at most model.context",
    "hidden_size hidden_dim n_embd embed_dim d_hidden": "model.d_model",
    "n_layer num_layers num_hidden_layers depth": "model.n_layers",
    "n_head num_heads num_attention_heads": "model.n_heads",
    "num_key_value_heads num_kv_heads": "model.n_kv_heads",
    "intermediate_size ffn_dim ffn_hidden_size": "model.d_ff",
    "num_experts num_local_experts": "model.n_experts",
    "vocab": "model.vocab_size",
    "attention_dropout hidden_dropout resid_pdrop": "model.dropout",
    "gradient_checkpointing activation_checkpoint recompute checkpointing":
        "activation_checkpointing",
    "torch_compile": "compile",
    "fp16 float16 half amp use_fp16": FP16,
    "bf16 bfloat16 use_bf16 mixed_precision": "precision=bf16_mixed",
    "float32 tf32": "dtype=fp32",
    "nproc nproc_per_node num_processes world_size gpus n_gpus ngpus num_gpus devices":
        "launch.nproc",
    "master_port port":
        "nothing: ranks that we start meet in a file of theirs; torchrun has --master-port",
    "timeout ddp_timeout": "launch.timeout_s",
    "num_workers workers dataloader_num_workers":
        "nothing: a rank reads its rows itself; launch.threads are those that it computes with",
    "random_seed manual_seed": "seed",
    "output_dir out_dir save_dir log_dir logging_dir": "hydra.run.dir",
    "save_every save_steps save_interval save_freq": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_every eval_steps eval_interval eval_freq": "eval.every",
    "eval_iters": "eval.batches",
    "resume_from resume_from_checkpoint ckpt ckpt_path load": "resume",
    "pretrained init_checkpoint load_weights": "init_from",
    "dataset data_dir data_path dataset_path train_file": "data=files data.source.path",
    "wandb mlflow aim comet_ml clearml dvclive swanlab trackio": TRACKER,
    "report_to log_with use_wandb": TRACKER.format(word="wandb"),
    "dp data_parallel distributed_data_parallel": "strategy=ddp",
    "tp tensor_parallel tensor_parallel_size tensor_model_parallel_size":
        "strategy=tensor strategy.tp.degree",
    "pp pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size":
        "strategy=pipeline strategy.pp.degree",
    "cp context_parallel context_parallel_size ring ulysses": "strategy=context strategy.cp.degree",
    "ep expert_parallel expert_parallel_size": "strategy=expert strategy.ep.degree",
    "fsdp2 fully_sharded_data_parallel zero_3 zero3": "strategy=fsdp, or strategy=deepspeed_zero3",
    "deepspeed zero zero_stage":
        "strategy=deepspeed_zero1, strategy=deepspeed_zero2 or strategy=deepspeed_zero3",
    "accelerate":
        "strategy=accelerate_ddp, strategy=accelerate_fsdp or strategy=accelerate_deepspeed",
    "hybrid hybrid_shard": "strategy=hsdp",
}  # fmt: skip
# Earlier names of our settings, in full, and today's; a group's choice is group=name.
RENAMED = {
    "schedule": "lr_schedule",
    "schedule.warmup_steps": "lr_schedule.warmup_steps",
    "schedule.final_ratio": "lr_schedule.min_lr_ratio",
    "measure.warmup_steps": "measure.skip_steps",
    "model=mini": "model=toy_3m",
    "precision=bf16": "precision=bf16_mixed",
    "model=small": "model=toy_11m",
    "model=medium": "model=gpt2_medium",
    "model=large": "model=gpt2_large",
    "model=xl": "model=gpt2_xl",
    "strategy=ddp_tensor": "strategy=replicate_tensor",
    "fault": "inject.missed_collective",
    "fault.rank": "inject.missed_collective.rank",
    "fault.step": "inject.missed_collective.step",
    "straggler": "inject.straggler",
    "straggler.rank": "inject.straggler.rank",
    "straggler.factor": "inject.straggler.factor",
    "strategy.dp.every": "strategy.dp.sync_every",
    "strategy.dp.local_sgd_steps": "strategy.dp.sync_every",
    "strategy.dp.mixing": "strategy.dp.keep_local",
    "strategy.dp.delay": "strategy.dp.sync_delay",
    "strategy.dp.fragments": "strategy.dp.num_fragments",
    "strategy.dp.keep": "strategy.dp.top_k_fraction",
    "strategy.dp.rank": "strategy.dp.power_sgd_rank",
}
# Where modules and classes are now that users name in configurations and in their own code.
MOVED = {
    "dtrain.layout": "dtrain.model.layout",
    "dtrain.initialize": "dtrain.model.initialize",
    "dtrain.batch": "dtrain.task.batch",
    "dtrain.task.batch.ModelFactory": "dtrain.model.layout.ModelFactory",
    "dtrain.rehearsal": "dtrain.parallel.checks.rehearsal",
    "dtrain.stepping": "dtrain.parallel.checks.optimizer",
    "dtrain.units": "dtrain.parallel.fsdp_units",
    "dtrain.parallel.footprint.Piece": "dtrain.parallel.footprint.ModelPart",
    "dtrain.parallel.footprint.Kept": "dtrain.parallel.footprint.Activation",
    "dtrain.parallel.footprint.Call": "dtrain.parallel.footprint.ModuleCall",
    "dtrain.parallel.accumulate.Accumulate": "dtrain.parallel.accumulate.GradientAccumulation",
    "dtrain.parallel.checks.stepping": "dtrain.parallel.checks.optimizer",
    "dtrain.parallel.units": "dtrain.parallel.fsdp_units",
    "dtrain.parallel.presence": "dtrain.parallel.unused_parameters",
    "dtrain.draw": "dtrain.data.seeded",
    "dtrain.task.rows": "dtrain.task.labelled_rows",
    "dtrain.data.library": "dtrain.data.stdlib_rows",
    "dtrain.plan": "dtrain.parallel.plan",
    "dtrain.optimizer": "dtrain.parallel.optimizer",
    "dtrain.accumulate": "dtrain.parallel.accumulate",
    "dtrain.footprint": "dtrain.parallel.footprint",
    "dtrain.cost.trace": "dtrain.cost.recorder",
    "dtrain.cost.Message": "dtrain.parallel.messages.Message",
    "dtrain.cost.message": "dtrain.parallel.messages.message",
    "dtrain.cost.all_reduce_each": "dtrain.parallel.messages.all_reduce_each",
    "dtrain.strategy.base": "dtrain.parallel.strategy",
    "dtrain.strategy.deepspeed_autotp": "dtrain.strategy.deepspeed.autotp",
    "dtrain.strategy.deepspeed_pipeline": "dtrain.strategy.deepspeed.pipeline",
    "dtrain.strategy.deepspeed_ulysses": "dtrain.strategy.deepspeed.ulysses",
    "dtrain.strategy.tensor.TensorParallel": "dtrain.strategy.tensor.strategy.TensorParallel",
    "dtrain.strategy.pipeline.Pipeline": "dtrain.strategy.pipeline.strategy.PipelineParallel",
    "dtrain.strategy.pipeline.stages.PipelineExecutor":
        "dtrain.strategy.pipeline.executor.PipelineExecutor",
    "dtrain.strategy.context.Context": "dtrain.strategy.context.strategy.ContextParallel",
    "dtrain.strategy.context.exchange": "dtrain.strategy.context.ring",
    "dtrain.strategy.expert.Expert": "dtrain.strategy.expert.ExpertParallel",
    "dtrain.strategy.parameter_server.ParameterServer":
        "dtrain.strategy.parameter_server.strategy.ParameterServer",
    "dtrain.strategy.accelerate.strategy": "dtrain.strategy.accelerate",  # and see below
    "dtrain.strategy.accelerate.AccelerateDDP": "dtrain.strategy.accelerate.ddp.AccelerateDDP",
    "dtrain.strategy.accelerate.AccelerateFSDP":
        "dtrain.strategy.accelerate.fsdp.AccelerateFSDP",
    "dtrain.strategy.accelerate.AccelerateDeepSpeed":
        "dtrain.strategy.accelerate.deepspeed.AccelerateDeepSpeed",
    "dtrain.strategy.accelerate.AccelerateLocalSGD":
        "dtrain.strategy.accelerate.local_sgd.AccelerateLocalSGD",
    "dtrain.strategy.deepspeed.DeepSpeed": "dtrain.strategy.deepspeed.zero.DeepSpeed",
    "dtrain.parallel.strategy.whole": "dtrain.parallel.strategy.full_tensor",
    "dtrain.parallel.strategy.local": "dtrain.parallel.strategy.local_part",
    "dtrain.parallel.strategy.average": "dtrain.parallel.strategy.all_reduce_mean",
    "dtrain.parallel.strategy.add_up": "dtrain.parallel.strategy.all_reduce_sum",
    "dtrain.parallel.optimizer.rate": "dtrain.parallel.optimizer.lr_factor",
    "dtrain.parallel.optimizer.fill_state": "dtrain.parallel.optimizer.materialize_state",
    "dtrain.parallel.clip.clip": "dtrain.parallel.clip.clip_gradients",
    "dtrain.task.base.the_model": "dtrain.task.base.single_model",
    "dtrain.task.base.as_weights": "dtrain.task.base.in_weight_dtype",
    "dtrain.task.base.wide": "dtrain.task.base.at_least_fp32",
    "dtrain.data.seeded.rows_of": "dtrain.data.seeded.shuffled_rows",
    "dtrain.data.seeded.some": "dtrain.data.seeded.random_subset",
    "dtrain.launch.collectives.gathered": "dtrain.launch.collectives.all_gather_object",
    "dtrain.launch.collectives.agree": "dtrain.launch.collectives.on_rank_zero",
    "dtrain.launch.collectives.together": "dtrain.launch.collectives.on_all_ranks",
    "dtrain.config.schema.make": "dtrain.config.build.build",
}  # fmt: skip
_BY_WORD = {word: setting for words, setting in ALIASES.items() for word in words.split()}


def our_name(word: str) -> str:
    """Return what to type for another tool's word, or an earlier one of ours; empty: unknown."""
    if word in RENAMED:
        return RENAMED[word]
    name = word.rpartition(".")[2].lower().replace("-", "_")
    return _BY_WORD.get(name, "").replace("{word}", name)


def moved(name: str) -> str:
    """Return the end of a message on a missing module or class: where it is now, if it moved."""
    return f": it is {MOVED[name]} now" if name in MOVED else ""


def refuse_earlier_names(cls: type, base: type, earlier: Mapping[str, str]) -> None:
    """Refuse a user's class with a method or attribute that nothing calls or reads any more.

    Args:
        cls: a subclass of `base`.
        earlier: earlier names, and those of today; the ones that `base` has count.

    Raises:
        TypeError: names both; the class would do something else without a word.
    """
    for name, now in earlier.items():
        if name in vars(cls) and hasattr(base, now):
            raise TypeError(f"{cls.__name__}.{name}: it is {now} now")
