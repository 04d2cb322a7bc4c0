"""Every key of a run with its default and its unit. The dataset's files change what differs; keys are flat."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    # --- what is trained
    c.seed = 0  # of every random choice: data order, hold-out, fresh parameters, sampling
    c.model = ""  # Hugging Face id, a local directory in that layout, or "tiny" (made from scratch, no download)
    c.reference = ""  # empty = the policy as it is when DPO starts; else an id or a directory

    # --- data
    # hhh, helpsteer3, ultrafeedback, synthetic, a path or glob, hf:OWNER/NAME, my_module:my_function, or a mixture of
    c.dataset = "hhh"  # these, by proportions: hhh:0.7,ultrafeedback:0.3
    c.dataset_path = ""  # where its raw files lie (of a mixture: PATH,PATH); empty = download from the hub
    c.split = ""  # of an hf: dataset, to train on; empty = told by its file names
    c.eval_path = ""  # a file of held-out pairs; empty = the published test split, else a seeded hold-out
    c.eval_pairs = 512  # held-out pairs; 0 = no evaluation, -1 = the whole published split
    c.shuffle = True  # a new order every epoch with evenly filled batches; False = file order
    c.drop_remainder = True  # leave out the last, short batch of an epoch
    c.drop_ties = True  # drop pairs whose scores are equal
    c.max_bad_fraction = 0.1  # stop before training if more of the rows are malformed
    c.prompt_format = "auto"  # chat (the tokenizer's template), plain (\n\nHuman: ...), auto = chat if there is one
    c.max_prompt_length = 512  # tokens; a longer prompt loses its beginning
    c.max_completion_length = 512  # tokens; a longer completion loses its end
    c.overlong = "truncate"  # truncate, or drop the pair
    c.cache_dir = ""  # tokenised pairs: a directory or gs://bucket/dir; empty = $DPO_JAX_CACHE or ~/.cache/dpo_jax

    # --- batch and length of the run
    c.batch_size = 64  # pairs a step, exactly
    c.microbatches = 1  # parts of a batch computed one after the other, to save memory
    c.num_steps = 0  # updates of DPO; 0 = num_epochs
    c.num_epochs = 1.0  # passes over the training pairs
    c.sft_steps = 0  # updates of light SFT on chosen completions before DPO
    c.sft_learning_rate = 1e-5  # constant after the warm-up

    # --- objective and optimiser
    c.dpo_beta = 0.1  # start at 0.1; higher keeps the policy closer to the reference
    c.loss = "sigmoid"  # one of docs/losses.md, or a weighted sum: sigmoid:1.0,sft:0.2
    c.label_smoothing = 0.0  # probability that a label is flipped, below 0.5 (exo_pair: 1e-3)
    c.f_divergence = "reverse_kl"  # from the reference: reverse_kl, forward_kl, js, alpha
    c.f_alpha = 0.5  # of f_divergence=alpha: 1 = reverse_kl, 0 = forward_kl
    c.wpo = False  # weigh pairs by how likely the policy itself would have answered so
    c.ld_alpha = 1.0  # weight of tokens beyond the shorter completion's length, in [0, 1]; 1 = off
    c.router_aux_loss_coef = 0.0  # weight of the load-balancing loss of a mixture of experts; 0 = off
    c.simpo_gamma = 0.5  # of loss=simpo: the margin asked for
    c.cpo_alpha = 1.0  # of loss=cpo: weight of the likelihood of chosen completions
    c.discopop_tau = 0.05  # of loss=discopop: temperature of the blend
    c.reference_cache = False  # compute the reference once, keep it on disk, and free its memory; False = in every step
    c.reference_sync_steps = 0  # updates after which the reference moves towards the policy; 0 = never
    c.reference_sync_alpha = 0.6  # how far it moves: 1 = all the way
    c.learning_rate = 1e-6  # peak; 5e-7 to 1e-5, lower than SFT's; of adapters 1e-5 and more
    c.lr_schedule = "linear"  # constant, linear or cosine to 0 after the warm-up
    c.warmup_steps = 0.1  # updates from 0 to the peak; below 1 = a fraction of all updates
    c.optimizer = "adamw"  # adamw or rmsprop
    c.weight_decay = 0.0  # decoupled; norms do not decay
    c.max_grad_norm = 1.0  # clip by global norm; 0 = off

    # --- adapters (docs/lora.md): the base is frozen and, without them, the reference
    c.lora_rank = 0  # 0 = all parameters are trained; else 8 to 64, with a learning_rate from 1e-5
    c.lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
    c.lora_rslora = False  # divide lora_alpha by the root of the rank, for large ranks
    c.lora_targets = "all"  # all projections, or some of q,k,v,o,gate,up,down (also q_proj, ...)
    c.lora_base_dtype = "auto"  # of the frozen base; auto = compute_dtype

    # --- numbers and machine
    c.param_dtype = "float32"  # of the trained parameters; bfloat16 is rounded at random, moments stay float32
    c.compute_dtype = "auto"  # of activations, products and the reference; auto = bfloat16, on CPU float32
    # what the backward pass computes again: none, dots (element-wise work), attention (all but q, k, v and attention's
    c.remat = "dots"  # output), attention_offload (the same, kept in the host's memory meanwhile), full
    # auto = splash (kernel) on TPU, tiles (skips most of other pairs' keys) on CPU, dense (XLA blocks) on GPU; all give
    c.attention = "auto"  # the same numbers
    c.optimizer_offload = False  # keep the optimiser's moments in the host's memory between updates
    c.reference_offload = False  # keep the reference in the host's memory, a layer at a time on the device
    c.mesh_data = 1  # devices over which rows are spread and parameters are whole; -1 = all that are left
    c.mesh_fsdp = -1  # devices over which rows and parameters are spread
    c.mesh_tensor = 1  # devices over which heads, ffn and vocabulary are spread

    c.compiler_options = ""  # XLA's for the steps, NAME=VALUE,NAME=VALUE, on top of those of the TPU generation
    c.compilation_cache = ""  # compiled programs: a directory, off, or empty = beside the cache of tokenised pairs

    # --- faults (docs/faults.md)
    c.max_bad_steps = 5  # updates in a row that are skipped, as loss or gradient are not finite; one more ends the run
    c.stuck_after_seconds = 600.0  # without any progress, the process ends with the stacks of its threads; 0 = never

    # --- what is written
    c.log_every = 10  # updates between train records (the first is always written)
    c.eval_every = 100  # updates between evaluations; one comes first and last in any case; 0 = only those
    c.checkpoint_every = 200  # updates between checkpoints; the end is always saved; 0 = only the end
    c.keep_checkpoints = 2  # newest ones kept
    c.export = True  # write export/: a Hugging Face directory of the aligned policy
    c.kl_prompts = 8  # held-out prompts, answered twice at every evaluation: KL from the reference; 0 = no estimate
    c.sample_prompts = 4  # held-out prompts answered before and after; 0 = none
    c.sample_tokens = 64  # most tokens of an answer
    c.sample_temperature = 0.8  # of the sampled answers, shown beside the greedy ones
    c.sample_top_p = 0.95  # nucleus mass of the sampled answers
    c.wandb_project = ""  # Weights & Biases project for a copy of the records (pip install wandb); empty = off
    c.trackio_project = ""  # the same for trackio (pip install trackio)
    return c


def choose(presets: dict, name: str, file: str) -> dict:
    """The preset `name` ("" = the default one)."""
    if name not in presets:
        known = ", ".join(f"{file}:{p}" if p else file for p in presets)
        raise ValueError(f"preset {name!r} does not exist; there are {known}")
    return presets[name]
