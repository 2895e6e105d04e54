"""Tiny Stable Diffusions of random weights as diffusers makes them, and latents of both programs.

Only for tests that skip themselves without diffusers and transformers.
"""

import diffusers
import torch
import transformers

from diffusion.files.sd_files import SCHEDULER
from diffusion.files.tokenizer_files import save_tokenizer
from diffusion.models.tokenizer import byte_level

SHAPES = {
    # name: (U-Net's channels, layers, heads, VAE's channels, text width)
    "small": ((32, 64), 1, 2, (16, 32), 32),
    "deep": ((32, 64, 64), 2, 4, (16, 32, 32), 48),
}


def make_parts(shape: str, prediction: str = "epsilon"):
    """diffusers' pipeline with random weights."""
    dims, layers, heads, vae_dims, width = SHAPES[shape]
    torch.manual_seed(0)
    n = len(dims)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=dims, layers_per_block=layers, attention_head_dim=heads,
        cross_attention_dim=width, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * (n - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n - 1),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=vae_dims, layers_per_block=layers, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(vae_dims), sample_size=32,
        up_block_types=("UpDecoderBlock2D",) * len(vae_dims),
    )  # fmt: skip
    vocab = byte_level(77)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, eos_token_id=vocab.eos_id, bos_token_id=vocab.bos_id,
    ))  # fmt: skip
    known = SCHEDULER | {"prediction_type": prediction}
    scheduler = diffusers.PNDMScheduler.from_config(known)
    return unet, vae, text, scheduler


def make_pipeline(folder, shape, prediction="epsilon"):
    """(diffusers' pipeline, its folder)."""
    unet, vae, text, scheduler = make_parts(shape, prediction)
    save_tokenizer(byte_level(77), folder / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline, folder


SCHEDULERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


def their_latents(pipeline, sampler, eps, steps, **options):
    kind = getattr(diffusers, SCHEDULERS[sampler])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline(latents=eps, num_inference_steps=steps, output_type="latent", **options).images


def our_latents(pipeline, sampler, eps, steps, **options):
    *_, (x, _) = pipeline.frames(range(len(eps)), sampler=sampler, steps=steps, eps=eps, amp="no",
                                 **options)  # fmt: skip
    return x
