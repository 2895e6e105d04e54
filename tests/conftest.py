import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on tiny tensors mostly wait


def script(name: str, *args, cwd: Path, ranks: int = 0, **options) -> subprocess.CompletedProcess:
    """Run train.py or sample.py as a user would; ranks > 0 launches it with torchrun."""
    done = subprocess.run(command(name, *args, ranks=ranks), cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=environment(ranks), **options)  # fmt: skip
    return done


def command(name: str, *args, ranks: int = 0) -> list[str]:
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launch, str(ROOT / name), *map(str, args)]


def environment(ranks: int = 0) -> dict[str, str]:
    # the same number of threads everywhere: sums in another order are other bits
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch) -> None:
    """Run each test in an empty folder, so that none finds what a user keeps in the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder of 120 small PNG files in three class folders, with captions."""
    from PIL import Image

    from diffusion.data import toy

    root = tmp_path_factory.mktemp("data") / "faces"
    for i in range(120):
        folder = root / ("bald", "bob", "spiky")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy.draw(i, 24)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(toy.caption(i))
    return root


@pytest.fixture(scope="session")
def model(tmp_path_factory, faces):
    """The model.pt of a class-conditional run of 60 steps."""
    from diffusion.config import Config
    from diffusion.training.trainer import train

    folder = tmp_path_factory.mktemp("model")
    train(Config(
        data=str(faces), image_size=16, unet_dim=8, dim_mults=(1, 2), heads=2, batch_size=8, time_steps=20,
        train_steps=60, save_and_sample_every=60, num_samples=0, cache_dir=str(folder / "cache"), device="cpu",
        amp="no", save_folder=str(folder), condition="class", learning_rate=3e-3,
    ))  # fmt: skip
    return folder / "model.pt"
