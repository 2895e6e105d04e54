"""Train and sample on the null device; print, as JSON, what was launched and waited for.

    tests/nullcuda/run python3 tests/nullcuda/watch.py [--plain] pixel class sample:class

Names are those of MODES, and sample:MODE after it. --plain: as where Triton is missing.
"""

import collections
import ctypes
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from diffusion import load  # noqa: E402
from diffusion.config import Config  # noqa: E402
from diffusion.data import toy  # noqa: E402
from diffusion.models import cuda  # noqa: E402
from diffusion.training.autoencoder import AutoencoderRecipe  # noqa: E402
from diffusion.training.recipe import Recipe  # noqa: E402
from diffusion.training.steps import StepStats  # noqa: E402
from diffusion.training.trainer import train  # noqa: E402

DEVICE = ctypes.CDLL(os.environ["NULLCUDA"])
DEVICE.nullcuda_get.restype = ctypes.c_long
# what it counts, in its order: kernels, copies and replays; waits; ...
COUNTED = ("launches", "waits", "mallocs", "host_mallocs", "copies", "waiting_copies", "memsets",
           "replays", "events", "blas", "convolutions", "bytes", "violations")  # fmt: skip


def counts() -> collections.Counter:
    """Count from the start of the process on; a violation is a call that a capture forbids."""
    return collections.Counter({name: DEVICE.nullcuda_get(i) for i, name in enumerate(COUNTED)})


# --- training ------------------------------------------------------------------------------------

RUN = dict(
    batch_size=8, train_steps=14, save_and_sample_every=14, log_every=7, lr_warmup_steps=4,
    num_samples=4, amp="bf16", device="cuda", num_workers=0,
)  # fmt: skip
SIZES = dict(image_size=32, unet_dim=16)
PIXEL = SIZES | dict(heads=4, sample_steps=5)
LATENT = SIZES | dict(
    after="vae", mode="latent", dim_mults=(1, 2), layers_per_block=1, sample_steps=5
)
TEXT = dict(condition="text", text_encoder="scratch", text_dim=32, text_layers=1, text_length=64)
LORA = dict(adapter="lora", targets="all", rank=4, sample_steps=5)
MODES: dict[str, dict] = {  # options; `after`: the mode whose model it starts from
    "pixel": PIXEL,
    "class": PIXEL | dict(condition="class"),
    "dropout": PIXEL | dict(dropout=0.1),
    "muon": PIXEL | dict(optimizer="muon"),
    "fp16": PIXEL | dict(amp="fp16"),
    "accumulated": PIXEL | dict(grad_accum=2),
    "eager": PIXEL | dict(cuda_graph="off"),
    "vae": SIZES | dict(mode="vae", dim_mults=(1, 2)),
    "latent": LATENT,
    "latent class": LATENT | dict(condition="class"),
    "latent text": LATENT | TEXT | dict(guidance_scale=2.0),
    "lora": LORA | dict(after="pixel"),
    "text lora": LORA | dict(after="latent text"),
    "inversion": dict(
        after="latent text", adapter="textual_inversion", token="<x>", init_word="face"
    ),
}  # fmt: skip


class Watch:
    """Notes what the steps of a run do between two that write a log line, from the second line on."""

    def __init__(self):
        self.steps: list[collections.Counter] = []
        self.where: collections.Counter = collections.Counter()
        self.began = None
        self.lines = 0
        self.violations = counts()["violations"]

    def begin_step(self) -> None:
        now = counts()
        if self.began is not None:
            self.steps.append(now - self.began)
        self.began = now if self.lines else None

    def write_line(self) -> None:
        self.lines += 1
        self.began = None  # a line may read the device: this step does not count

    def warn(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Note where a wait comes from, by torch's warning."""
        if "synchronizing" in str(message) and self.began is not None:
            frames = [f for f in traceback.extract_stack() if f"{ROOT}/diffusion" in f.filename]
            self.where[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1
        elif "without Triton" in str(message):
            raise RuntimeError(str(message))

    def report(self) -> dict:
        """Give the most that a step did, and the kernels of the last graph that was captured."""
        most = {name: max(step[name] for step in self.steps) for name in COUNTED}
        most["violations"] = counts()["violations"] - self.violations  # in all: who knows when
        captured = DEVICE.nullcuda_get(len(COUNTED))
        return most | {"steps": len(self.steps), "where": dict(self.where), "captured": captured}


watch = Watch()


def watched(function, note):
    def call(*args, **options):
        getattr(watch, note)()
        return function(*args, **options)

    return call


def options_of(name: str, root: Path) -> dict:
    options = RUN | MODES[name]
    after = options.pop("after", None)
    if after is not None:
        model = ("load_path", "model.pt") if "adapter" in options else ("vae", "")
        options[model[0]] = str(root / after / model[1])
    return options | dict(
        data=str(root / "faces"), cache_dir=str(root / "cache"), save_folder=str(root / name)
    )


def train_as(name: str, root: Path) -> dict:
    watch.__init__()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        train(Config(**options_of(name, root)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return watch.report()


# --- sampling ------------------------------------------------------------------------------------


def per_step(pipeline, **options) -> dict:
    """Count what a step of sampling does, without what comes before the first and after the last."""
    made = []
    for _ in range(2):  # the first time captures, where there are graphs
        frames = pipeline.frames(range(4), **options)
        next(frames)
        began = counts()
        next(frames)
        made.append(counts() - began)
        list(frames)
    return {name: made[-1][name] for name in COUNTED}


def sample_from(name: str, root: Path) -> dict:
    """Sample from a mode's model, kernel by kernel and as graphs, of two batch sizes."""
    found = {}
    for sampler in ("ddim", "dpmpp_2m_sde"):
        for how in ("eager", "graph"):
            pipeline = load(str(root / name / "model.pt"), device="cuda")
            options = dict(sampler=sampler, steps=6, cuda_graph=how == "graph")
            before = counts()
            steps = per_step(pipeline, **options, **TOLD[name](4))
            captured = DEVICE.nullcuda_get(len(COUNTED))
            pipeline.sample(range(2), **options, **TOLD[name](2))
            violations = (counts() - before)["violations"]
            found[f"{sampler} {how}"] = steps | {"violations": violations, "captured": captured}
    return found


TOLD = {  # what a model is told with n images
    "pixel": lambda n: {},
    "class": lambda n: dict(labels=torch.zeros(n, dtype=torch.long), guidance_scale=3.0),
    "latent text": lambda n: dict(prompts=["a face"] * n, guidance_scale=3.0),
}


def main() -> None:
    for recipe in (Recipe, AutoencoderRecipe):
        recipe.draw = watched(recipe.draw, "begin_step")
    StepStats.read = watched(StepStats.read, "write_line")
    warnings.showwarning = watch.warn
    warnings.simplefilter("always")
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(24):
            place = root / "faces" / ("bald", "bob", "spiky")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(toy.draw(i, 32)).save(place / f"{i:03d}.png")
            (place / f"{i:03d}.txt").write_text(toy.caption(i))
        names = sys.argv[1:]
        if "--plain" in names:
            names.remove("--plain")
            cuda.works = lambda device: False
        for name in names:
            kind, _, of = name.partition(":")
            try:
                if kind == "sample":
                    found[name] = sample_from(of, root)
                else:
                    found[name] = train_as(name, root)
            except (Exception, SystemExit):
                found[name] = {"error": traceback.format_exc()[-2000:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
