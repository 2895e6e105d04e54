"""What values options take, and which runs have a use for them. Each rule is a row.

RULES: (what is told, whether a value is good, the options' names)
USES: (what is told, whether a configuration has a use for them, their names); given beside any
other one, options that would do nothing are an error.
"""

from pathlib import Path

RULES = (
    ("it must be above 0", lambda v: v > 0,
     "image_size unet_dim heads batch_size train_steps epochs learning_rate grad_accum "
     "save_and_sample_every log_every keep_last sample_steps fid_every text_dim text_layers "
     "clip_skip rank_timeout latent_channels layers_per_block rank alpha vectors class_images"),
    ("it cannot be negative", lambda v: v >= 0,
     "grad_clip weight_decay min_snr_gamma lr_warmup_steps num_samples num_workers noise_offset "
     "kl_weight perceptual_weight prior_weight"),
    ("it must be in [0, 1)", lambda v: 0 <= v < 1, "ema_decay dropout lora_dropout"),
    ("it must be in [0, 1]", lambda v: 0 <= v <= 1, "condition_dropout"),
    ("it must be at least 2", lambda v: v >= 2, "time_steps fid_num_images"),
    ("it must be at least 3", lambda v: v >= 3, "text_length"),
    ("it must be at most 1,000,000", lambda v: v <= 1_000_000, "time_steps rank_timeout"),
    ("it must be even", lambda v: v % 2 == 0, "unet_dim"),
    ("give whole numbers above 0, such as 1,2,4,8", lambda v: v and min(v) > 0, "dim_mults"),
)  # fmt: skip

USES = (
    ("--data FOLDER or hf:owner/name: the toy has no choice", lambda c: c.data != "toy",
     "split image_column caption_column"),
    ("--mode pixel", lambda c: c.mode == "pixel", "heads dropout"),
    ("--mode pixel or latent", lambda c: c.mode != "vae",
     "objective loss min_snr_gamma noise_offset schedule time_steps zero_snr condition_dropout "
     "checkpointing sampler sample_steps guidance_scale"),
    ("--mode vae", lambda c: c.mode == "vae", "latent_channels kl_weight perceptual_weight"),
    ("--mode latent", lambda c: c.mode == "latent", "sd_path vae"),
    ("a network from scratch: Stable Diffusion has its own", lambda c: c.sd_path is None,
     "unet_dim dim_mults schedule time_steps zero_snr"),
    ("a latent network from scratch", lambda c: c.mode == "latent" and c.sd_path is None,
     "layers_per_block"),
    ("--condition class or text", lambda c: c.condition != "none", "condition_dropout"),
    ("--condition text", lambda c: c.condition == "text", "validation_prompts"),
    ("--condition text from scratch", lambda c: c.condition == "text" and c.sd_path is None,
     "text_encoder text_dim text_layers text_length"),
    ("--sd_path", lambda c: c.sd_path is not None, "clip_skip"),
    ("--sd_path FILE: a folder has its own", lambda c: c.sd_path and not Path(c.sd_path).is_dir(),
     "sd_config"),
    ("--adapter or --instance_prompt", lambda c: c.adapts,
     "rank alpha targets lora_dropout train_text_encoder token init_word vectors class_prompt "
     "class_images class_data prior_weight"),
    ("--adapter lora", lambda c: c.adapter == "lora", "rank alpha targets lora_dropout"),
    ("--adapter textual_inversion", lambda c: c.adapter == "textual_inversion",
     "token init_word vectors"),
    ("--class_prompt", lambda c: c.class_prompt is not None,
     "class_images class_data prior_weight"),
)  # fmt: skip
