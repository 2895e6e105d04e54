"""What a latent model is told, what it remembers, and which options it has a use for."""

import pytest
import torch
from test_latent import CPU, latent, options_of, sd_folder, vae  # noqa: F401
from test_training import tiny  # noqa: F401
from torch.testing import assert_close

from diffusion.assemble import load_vae, open_pipeline, text_config, unet_config
from diffusion.config import Config
from diffusion.models.clip import CLIPTextModel
from diffusion.models.sd_blocks import Attention
from diffusion.models.sd_unet import SDUNet
from diffusion.models.tokenizer import byte_level
from diffusion.training.autoencoder import KLAutoencoder, vae_config
from diffusion.training.latents import LatentDiffusion
from diffusion.training.trainer import train

# --- labels ---------------------------------------------------------------------------------------


def test_classes_are_learnt_and_drawn(latent, tmp_path):  # noqa: F811
    options = latent | dict(
        condition="class", learning_rate=1e-2, train_steps=20, condition_dropout=0.5
    )
    task = LatentDiffusion(Config(**options), CPU)
    network = task.build()
    for p in network.parameters():  # a new network's output is zero
        torch.nn.init.normal_(p, std=0.05)
    batch, drawn = task.data(0, 0, 8), task.draw(0)
    task.loss(network, batch, drawn, 0, 8).mean().backward()
    moved = network.class_embedding.weight.grad.abs().amax(1) > 0
    told = batch.labels.masked_fill(drawn[2], 3).unique()
    assert moved.nonzero().flatten().tolist() == told.tolist() and len(told) > 1
    train(Config(**options))
    pipeline = open_pipeline(str(tmp_path / "run" / "model.pt"), None, "raw", CPU)
    eps = torch.randn(1, *pipeline.shape)
    draw = lambda label, scale=2.0: pipeline.sample([0], steps=4, eps=eps, amp="no", guidance_scale=scale,  # noqa: E731
                                                    labels=torch.tensor([label]))  # fmt: skip
    assert (draw(0) - draw(1)).abs().max() > 1e-3
    assert (draw(0) - draw(0, 1.0)).abs().max() > 1e-3


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_heads_have_about_32_channels(latent, vae, condition):  # noqa: F811
    config = Config(**latent | dict(condition=condition, unet_dim=64, dim_mults=(1, 2, 4)))
    network = SDUNet(unet_config(config, load_vae(str(vae)), 3))
    found = [
        (m.heads, m.to_q.weight.shape[0]) for m in network.modules() if isinstance(m, Attention)
    ]
    assert {dim for _, dim in found} == {128, 256}
    assert all(dim == 32 * heads for heads, dim in found)


def test_odd_widths(latent, vae):  # noqa: F811
    for condition in ("none", "text"):
        config = Config(
            **latent | dict(condition=condition, unet_dim=50, dim_mults=(1, 2), text_dim=100)
        )
        SDUNet(unet_config(config, load_vae(str(vae)), 0))
    CLIPTextModel(text_config(config, byte_level(64)))
    for dim in (66, 70, 130):
        network = KLAutoencoder(vae_config(Config(mode="vae", unet_dim=dim, dim_mults=(1, 2))))
        x = torch.zeros(1, 3, 8, 8)
        assert network(x, torch.zeros(1, 4, 4, 4))[0].shape == x.shape
