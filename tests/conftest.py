import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("helpers")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on tiny tensors mostly wait
CACHE = tempfile.TemporaryDirectory(prefix="cache")  # not the user's own; removed at exit
os.environ["XDG_CACHE_HOME"] = CACHE.name


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


@pytest.fixture
def tiny(faces, tmp_path) -> dict:
    """The options of a class-conditional run of a second or two."""
    from helpers import tiny_run

    return tiny_run(faces, tmp_path)


@pytest.fixture(scope="session")
def vae(tmp_path_factory, faces) -> Path:
    """A run of --mode vae of a few steps."""
    from diffusion.config import Config
    from diffusion.training.trainer import train

    folder = tmp_path_factory.mktemp("vae")
    train(Config(
        mode="vae", data=str(faces), image_size=16, unet_dim=16, dim_mults=(1, 2), batch_size=8,
        train_steps=30, save_and_sample_every=15, log_every=5, num_samples=4, device="cpu", amp="no",
        cache_dir=str(folder / "cache"), save_folder=str(folder / "run"), latent_channels=3,
    ))  # fmt: skip
    return folder / "run"


@pytest.fixture
def latent(tiny, vae) -> dict:
    """The options of a text-conditioned run of seconds."""
    from helpers import plain

    return plain(tiny) | dict(
        mode="latent", vae=str(vae), condition="text", text_encoder="scratch", text_dim=32,
        text_layers=1, text_length=64, layers_per_block=1, unet_dim=16,
    )  # fmt: skip


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory) -> str:
    """A diffusers folder of a tiny Stable Diffusion with random weights."""
    pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
    pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")
    from diffusers_models import make_pipeline

    return str(make_pipeline(tmp_path_factory.mktemp("sd"), "small")[1])


@pytest.fixture(scope="session")
def scratch(tmp_path_factory, faces, vae) -> Path:
    """A text-conditioned model from scratch."""
    from diffusion.config import Config
    from diffusion.training.trainer import train

    folder = tmp_path_factory.mktemp("scratch")
    train(Config(
        mode="latent", data=str(faces), vae=str(vae), image_size=16, condition="text", text_encoder="scratch",
        text_dim=32, text_layers=2, text_length=64, unet_dim=16, dim_mults=(1, 2), layers_per_block=1, batch_size=8,
        time_steps=20, train_steps=20, save_and_sample_every=20, num_samples=0, learning_rate=3e-3, objective="eps",
        device="cpu", amp="no", cache_dir=str(folder / "cache"), save_folder=str(folder / "run"),
    ))  # fmt: skip
    return folder / "run" / "model.pt"


@pytest.fixture(scope="session")
def parquet(tmp_path_factory, faces):
    """A hub repository as the datasets library sees one: parquet shards with images and captions."""
    library = pytest.importorskip(
        "datasets", reason="optional extra not installed: pip install datasets"
    )
    root = tmp_path_factory.mktemp("hub")
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    library.config.HF_DATASETS_CACHE = Path(tmp_path_factory.mktemp("hf_cache"))
    files = sorted(faces.rglob("*.png")) * 3
    columns = {
        "image": [{"bytes": f.read_bytes(), "path": None} for f in files],
        "text": [f"caption {i}" for i in range(len(files))],
        "label": [i % 2 for i in range(len(files))],
    }
    features = library.Features(
        {
            "image": library.Image(),
            "text": library.Value("string"),
            "label": library.ClassLabel(names=["a", "b"]),
        }
    )
    made = library.Dataset.from_dict(columns, features=features)
    for i in range(2):
        made.shard(2, i, contiguous=True).to_parquet(root / f"train-0000{i}-of-00002.parquet")
    return root, files


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


@pytest.fixture(scope="session")
def pooled(tmp_path_factory) -> Path:
    """A feature network of 24 dimensions as a TorchScript file."""
    import torch
    from feature_networks import Pooled

    file = tmp_path_factory.mktemp("network") / "pooled.pt"
    torch.jit.script(Pooled()).save(str(file))
    return file


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """40 toy faces of 16 px."""
    from feature_networks import pictures

    return pictures(tmp_path_factory.mktemp("real"), range(40))


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory where there is one: runs sync their files, and disks take their time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
