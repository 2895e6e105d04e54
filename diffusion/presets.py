"""Recipes: what each changes of the defaults in config.py. `python train.py --preset NAME,...`."""

PRESETS: dict[str, dict] = {
    # the first run: two CPU cores, within five minutes
    "toy": dict(
        data="toy", image_size=32, unet_dim=24, dim_mults=(1, 2, 4), batch_size=32,
        optimizer="muon", learning_rate=3e-3, lr_schedule="linear", objective="eps", loss="l2",
        train_steps=600, save_and_sample_every=150,
    ),
    # the same on your own pictures, for which it takes a little longer
    "small": dict(
        data=None, image_size=32, unet_dim=24, dim_mults=(1, 2, 4), batch_size=32,
        optimizer="muon", learning_rate=3e-3, lr_schedule="linear", objective="eps", loss="l2",
        train_steps=2000, save_and_sample_every=250,
    ),
    # 8 GPUs: torchrun --nproc_per_node=8 train.py --mode pixel --data anime_faces
    "anime_faces128": dict(
        data="anime_faces", image_size=128, unet_dim=64, batch_size=256, epochs=300,
        learning_rate=2e-4, lr_warmup_steps=500, loss="l2",
    ),
    "pokemon64": dict(
        data="pokemon", image_size=64, unet_dim=64, batch_size=64, epochs=400,
        learning_rate=1e-4, lr_schedule="cosine", lr_warmup_steps=500, dropout=0.1, loss="l2",
    ),
    "afhq_cat32": dict(
        data="data/afhq_cat_128", image_size=32, batch_size=32, optimizer="muon",
        learning_rate=3e-3, lr_schedule="linear", objective="eps", time_steps=50, unet_dim=16,
        train_steps=10_000,
    ),
    # from scratch on two CPU cores: a VAE, then text-conditioned latents
    "sd_tiny_vae": dict(
        mode="vae", data="toy", image_size=64, unet_dim=32, dim_mults=(1, 2, 2), batch_size=16,
        train_steps=1500, lr_schedule="cosine", save_and_sample_every=500, num_samples=16,
        save_folder="results/vae",
    ),
    "sd_tiny": dict(
        mode="latent", vae="results/vae", data="toy", image_size=64, condition="text",
        text_encoder="scratch", text_length=112, text_layers=3, unet_dim=64, dim_mults=(1, 2),
        layers_per_block=1, batch_size=32, train_steps=3500, lr_schedule="cosine",
        lr_warmup_steps=100, loss="l2", save_and_sample_every=500, num_samples=16,
        sampler="dpmpp_2m", guidance_scale=3.0, save_folder="results/sd_tiny",
    ),
    # what --sd_path means where neither --preset nor --adapter is given; the size is the model's
    "fine_tune": dict(
        mode="latent", condition="text", objective="eps", loss="l2", learning_rate=1e-5,
        num_samples=4, guidance_scale=7.5,
    ),
    # fine-tuning, 4 GPUs: torchrun --nproc_per_node=4 train.py --preset anime_sd15 --sd_path PATH
    "anime_sd15": dict(
        mode="latent", data=None, image_size=512, condition="text",
        objective="eps", loss="l2", batch_size=128, train_steps=50_000,
        learning_rate=1e-4, lr_warmup_steps=500, ema_decay=0.9995,
        save_and_sample_every=500, num_samples=4, guidance_scale=7.5,
    ),
    "cifar10": dict(
        data="cifar10", image_size=32, unet_dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1,
        batch_size=128, train_steps=400_000, learning_rate=2e-4, lr_warmup_steps=5000, loss="l2",
    ),
    # processes of the papers, for any data; sizes and the rest are those of the data's own preset
    "ddpm": dict(schedule="linear", objective="eps", loss="l2", sampler="ddpm"),
    "edm": dict(
        path="edm", objective="edm", noise_dist="lognormal", noise_mean=-1.2, noise_std=1.2,
        loss="l2", sampler="heun",
    ),
    "flow": dict(path="flow", objective="flow", noise_dist="logit_normal", loss="l2"),
    # JiT's time is 1 where there is no noise: its mean of -0.8 is 0.8 here
    "jit": dict(
        path="flow", objective="x0", loss_space="flow", noise_dist="logit_normal", noise_mean=0.8,
        noise_std=0.8, loss="l2", sampler="heun",
    ),
}  # fmt: skip
PROCESSES = ("ddpm", "edm", "flow", "jit")  # which come on top of the preset of --data

# What --data NAME means where neither --preset nor the recipe's own options are given.
PRESET_OF_DATA = {
    "toy": "toy", "anime_faces": "anime_faces128", "pokemon": "pokemon64", "cifar10": "cifar10",
}  # fmt: skip
