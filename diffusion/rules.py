"""What values options take, and which runs have a use for them. Each rule is a row.

RULES: (the message, whether a value is good, the options' names), for all scripts
RULES_OF: the same, of one script each
USES: (what is needed, whether a configuration has a use for the options, their names)
USES_OF: the same, of one script each, asked of its arguments
An option that would do nothing is an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from . import UserError

# The names in the tables of process/samplers.py and process/schedule.py, which need torch:
# --help does without it. A test compares them.
SAMPLERS = ("ddpm", "ddpm_large", "ddim", "dpmpp_2m", "dpmpp_2m_sde")
SPACINGS = ("leading", "trailing", "linspace", "logsnr")
MOST_GUIDANCE = MOST_LORA = 1000  # far beyond it pictures saturate, then numbers overflow


def is_text(value: str) -> bool:
    """Check that a text can be written: the shell may hand on bytes that are no UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


RULES = (
    ("it must be above 0", lambda v: v > 0,
     "image_size unet_dim heads batch_size train_steps epochs learning_rate grad_accum "
     "save_and_sample_every log_every keep_last sample_steps fid_every text_dim text_layers "
     "clip_skip rank_timeout latent_channels layers_per_block rank alpha vectors class_images "
     "num_images height width steps size mix_images ti_learning_rate dreambooth_learning_rate"),
    ("it cannot be negative", lambda v: v >= 0,
     "grad_clip weight_decay min_snr_gamma lr_warmup_steps num_samples num_workers noise_offset "
     "kl_weight perceptual_weight prior_weight"),
    ("it must be in [0, 1)", lambda v: 0 <= v < 1, "ema_decay dropout lora_dropout"),
    ("it must be in [0, 1]", lambda v: 0 <= v <= 1,
     "condition_dropout guidance_rescale eta"),
    ("it must be above 0 and at most 1", lambda v: 0 < v <= 1, "strength"),
    ("it must be at least 2", lambda v: v >= 2, "time_steps fid_num_images points"),
    ("it must be at least 3", lambda v: v >= 3, "text_length"),
    ("it must be at most 1,000,000", lambda v: v <= 1_000_000, "time_steps rank_timeout steps"),
    ("it must be at most 16,384", lambda v: v <= 16_384, "height width"),
    ("it must be even", lambda v: v % 2 == 0, "unet_dim"),
    ("it is not in UTF-8", lambda v: is_text("".join(v)),
     "prompt negative_prompt default_caption instance_prompt class_prompt token init_word"),
    ("give whole numbers above 0, such as 1,2,4,8", lambda v: v and min(v) > 0,
     "dim_mults"),
    ("each must be above 0", lambda v: v and min(v) > 0, "ranks"),
)  # fmt: skip

# asked of what is typed only: models trained before there were these bounds are still read
TYPED = (
    (f"it must be finite, from 0 to {MOST_GUIDANCE}", lambda v: 0 <= v <= MOST_GUIDANCE,
     "guidance_scale"),
    ("it must be from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, "seed"),
    ("give whole numbers from 0 to 2**63 - 1, such as 0,1,2",
     lambda v: v and all(0 <= one < 2**63 for one in v), "seeds"),
)  # fmt: skip

RULES_OF = {
    "train": TYPED,
    "sample": TYPED,
    "visualize": (*TYPED, ("it must be 1 to 16", lambda v: 1 <= v <= 16, "num_images")),
    "metrics": (*TYPED, ("it must be at least 2", lambda v: v >= 2, "num_images")),  # a covariance
    "study": (*TYPED, ("it must be at least 2", lambda v: v >= 2, "steps num_images"),
              ("it must be at most 101", lambda v: v <= 101, "points")),
}  # fmt: skip

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
     "sd_config sd_weights"),
    ("a start from --sd_path itself", lambda c: c.load_path is None, "sd_weights"),
    ("--adapter or --instance_prompt", lambda c: c.adapts,
     "rank alpha targets lora_dropout train_text_encoder token init_word vectors class_prompt "
     "class_images class_data prior_weight"),
    ("--adapter lora", lambda c: c.adapter == "lora", "rank alpha targets lora_dropout"),
    ("--adapter textual_inversion", lambda c: c.adapter == "textual_inversion",
     "token init_word vectors"),
    ("--class_prompt", lambda c: c.class_prompt is not None,
     "class_images class_data prior_weight"),
)  # fmt: skip

GUIDED = "a --guidance_scale other than 1, no guidance,"
USES_OF = {
    "sample": (
        ("--prompt", lambda a: a.prompt, "embedding"),
        ("--prompt", lambda a: a.prompt, "negative_prompt"),
        (GUIDED, lambda a: a.guidance_scale != 1,
         "negative_prompt guidance_rescale sequential_guidance"),
        ("--init_image", lambda a: a.init_image is not None, "mask strength"),
        ("--lora_interpolate", lambda a: a.lora_interpolate, "points"),
    ),
    "visualize": (
        ("--load_path (they are parts of a model)", lambda a: a.load_path is not None,
         "sd_path vae"),
        ("--load_path, a model,", lambda a: a.load_path is not None,
         "weights guidance_scale class_label prompt"),
    ),
    "metrics": (
        ("a model in place of the folder FAKE (they are parts of a model)",
         lambda a: not Path(a.fake).is_dir(), "sd_path vae"),
        ("a model in place of the folder FAKE", lambda a: not Path(a.fake).is_dir(),
         "num_images samplers seeds guidance_scale weights save_folder overwrite"),
    ),
    "study": (
        ("--sd_path", lambda a: a.sd_path is not None, "sd_config sd_weights objective"),
        ("experiment 3", lambda a: 3 in a.experiments,
         "class_prompt init_word vectors ti_learning_rate dreambooth_learning_rate"),
        ("experiment 4", lambda a: 4 in a.experiments, "points mix_images"),
    ),
}  # fmt: skip


def check_bounds(values: Mapping[str, object], script: str = "") -> None:
    """Check values of options by the rules; None is an option that was not given.

    script: whose arguments they are; "" for a stored configuration, which may hold infinity.
    Raises UserError for the first bad one, also for a float that is no finite number.
    """
    for name, value in values.items():
        finite = math.isfinite if script else lambda v: not math.isnan(v)
        if isinstance(value, float) and not finite(value):
            raise UserError(f"{name} is {value}; it must be a finite number")
    for message, holds, names in (*RULES_OF.get(script, ()), *RULES):
        for name in names.split():
            value = values.get(name)
            if value is not None and not holds(value):
                raise UserError(f"{name} is {value}; {message}")


def check_used(
    options, defaults: Mapping[str, object], rows, message: str = "nothing without {}"
) -> None:
    """Check that options do something: those of `defaults` that are not at these.

    options: a configuration, or a script's arguments. Raises UserError for those without use.
    """
    for needed, holds, names in rows:
        useless = [n for n in names.split() if n in defaults and getattr(options, n) != defaults[n]]
        if useless and not holds(options):
            names = ", ".join(f"--{n}" for n in useless)
            raise UserError(f"{names}: {message.format(needed)}")


def check_options(options, defaults: Mapping[str, object], script: str) -> None:
    """Check a script's arguments by all rows. Raises UserError."""
    check_used(options, defaults, USES_OF[script], "nothing by itself: give {} as well")
    check_bounds(vars(options), script)
