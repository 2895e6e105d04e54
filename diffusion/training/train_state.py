"""Everything that changes while a run trains, and how a checkpoint keeps it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import UserError, shown
from ..files import checkpoint
from ..runtime import distributed as dist
from .autoencoder import AutoencoderRecipe
from .ema import EMA
from .optimizer import AdamW
from .recipe import Recipe
from .run_folder import RunLog, write_metadata
from .steps import BatchSplit, StepStats

DIVERGED_HINT = "Try a lower --learning_rate, --amp no, or --grad_clip 1"


@dataclass(eq=False)
class TrainState:
    """Hold all that changes while a run trains: what a checkpoint holds.

    origin: the digest of --load_path's weights, if training began with them.
    """

    recipe: Recipe | AutoencoderRecipe
    split: BatchSplit
    model: nn.Module
    ema: EMA
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    stats: StepStats
    step: int = 0
    best_loss: float | None = None
    origin: str | None = None

    @property
    def samples_seen(self) -> int:
        return self.step * self.recipe.config.batch_size

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint."""
        trainable = self.recipe.trainable
        self.step = saved["step"]
        self.best_loss = saved["best_loss"]
        trainable.restore(self.model, saved["model"], saved)
        trainable.restore(self.ema.model, saved["ema"], saved)
        for track, values in zip(self.ema.tracks, saved.get("tracks", ()), strict=True):
            trainable.restore(track.model, values, saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.stats.values.copy_(saved["tally"])
        length = saved["data"]["length"]
        if not isinstance(length, int | None):
            raise TypeError(f"its data has the length {shown(length)}")
        self.recipe.batches.length = length

    def save(self, folder: Path, logs: RunLog, improved: bool) -> None:
        """Write the checkpoint, then what is made of it: a run killed between them resumes there.

        Raises UserError, and writes nothing, for weights that are not finite.
        """
        if not dist.is_main():
            return
        if not torch.nn.utils.get_total_norm(self.optimizer.parameters).isfinite():
            raise UserError(
                f"the weights of step {self.step} are not finite and are not saved; the "
                f"checkpoints in {folder} are from before. {DIVERGED_HINT}"
            )
        config = self.recipe.config
        trainable = self.recipe.trainable
        batches = self.recipe.batches
        metadata = self.recipe.metadata(self.ema.model)
        logs.sync()
        saved = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "best_loss": self.best_loss,
            "ranks": self.split.ranks,
            "threads": torch.get_num_threads() if self.recipe.device.type == "cpu" else None,
            "config": config.shared(),
            "origin": self.origin,
            **metadata,
            "data": {"order": batches.order_key(), "length": batches.length},
            "model": trainable.state(self.model),
            "ema": trainable.state(self.ema.model),
            "tracks": [trainable.state(track.model) for track in self.ema.tracks],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": self.stats.values.cpu(),
        }
        checkpoint.save(folder, saved, config.keep_last)
        self.publish(folder, metadata, improved)

    def publish(self, folder: Path, metadata: dict, improved: bool) -> None:
        """Write what is to be shared, and then metadata.json, whose step says that all is there."""
        self.recipe.trainable.write(folder, self.ema.model, self.step, metadata, improved)
        data = self.recipe.batches
        values = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "epoch": self.samples_seen / data.length if data.length else None,
            "best_loss": self.best_loss,
            "num_train_images": data.length,
            "num_held_out": len(data.held_out),
        }
        write_metadata(folder, values)
