"""The best pictures in a fixed time, by the rules of docs/speedrun.md.

python benchmarks/speedrun.py cpu --data FOLDER --features FEATURES.pt      our record, three seeds
python benchmarks/speedrun.py gpu --data FOLDER --features FEATURES.pt
python benchmarks/speedrun.py cpu ... --train "--preset afhq_cat32 --train_steps 1200" --sample "--steps 20"

--data: the training cats of AFHQ at 128 px, in one folder. --features: what tests/resnet56.py makes.
--train and --sample replace the record's options, where {run} is the folder of the run. Says for each
seed how long training took and the Fréchet distance of 1,000 pictures. The last line is JSON.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import common
import torch

sys.path.insert(0, str(common.ROOT))

from diffusion.evaluation.distances import frechet_distance
from diffusion.evaluation.features import open_features

IMAGES = 1000


class Track(NamedTuple):
    """What is allowed, and the options of train.py and sample.py: the record's, for gpu a first try."""

    about: str
    seconds: float  # of training, from its start to its end
    size: int  # of the pictures
    train: str
    sample: str


TRACKS = {
    "cpu": Track(
        "two CPU cores, 400 s, cats at 32 px", 400, 32,
        "--preset afhq_cat32 --device cpu --amp no --train_steps 1000 --save_and_sample_every 250"
        " --keep_last 9 --num_samples 0",
        "--steps 10 --batch_size 50 --amp no --guide {run}/checkpoints/step_00000250.pt --guidance_scale 2",
    ),
    "gpu": Track(
        "one H100, 10 minutes, cats at 64 px", 600, 64,
        "--preset afhq_cat32 --device cuda --image_size 64 --unet_dim 64 --batch_size 128"
        " --train_steps 12000 --save_and_sample_every 3000 --num_samples 0",
        "--steps 20 --batch_size 250",
    ),
}  # fmt: skip


def cores() -> set[int]:
    """Two of the cores that this process may use."""
    return set(sorted(os.sched_getaffinity(0))[:2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--seeds", default="1001,1002,1003")
    parser.add_argument("--train", help="options of train.py in place of the record's")
    parser.add_argument("--sample", help="options of sample.py in place of the record's")
    parser.add_argument("--save_folder", type=Path, help="for the runs (default: a temporary one)")
    args = parser.parse_args()
    track = TRACKS[args.track]
    training, sampling = args.train or track.train, args.sample or track.sample
    if args.track == "cpu":
        os.sched_setaffinity(0, cores())  # of what it starts, too
    features = open_features(args.features, torch.device("cpu"))
    real = common.moments_of(args.data, features, track.size)
    print(f"{track.about}\ntrain.py {training}\nsample.py {sampling}", flush=True)

    seconds, distances = [], []
    for seed in args.seeds.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            root = (args.save_folder or Path(temporary)).resolve() / seed
            if root.exists():  # a run that is there would be continued, in no time
                parser.error(f"{root} exists: give another --save_folder, or delete it")
            own = ["--data", str(args.data.resolve()), "--cache_dir", str(root / "cache")]
            own += ["--seed", seed, "--save_folder", str(root / "run")]
            took = common.run_script("train.py", shlex.split(training) + own, root / "train.log")
            own = ["--load_path", str(root / "run" / "model.pt"), "--seed", seed]
            own += ["--num_images", str(IMAGES), "--save_folder", str(root / "fake")]
            options = shlex.split(sampling.replace("{run}", str(root / "run")))
            common.run_script("sample.py", options + own, root / "sample.log")
            found = common.moments_of(root / "fake" / "images", features, track.size)
        seconds.append(round(took, 1))
        distances.append(round(float(frechet_distance(*found, *real)), 3))
        late = "" if took <= track.seconds else f", TOO LONG: {track.seconds:g} s are allowed"
        print(f"seed {seed}: {distances[-1]:.4g} after {took:.0f} s{late}", flush=True)
    device = torch.device("cuda" if args.track == "gpu" else "cpu")
    valid = max(seconds) <= track.seconds
    common.report("speedrun", device, {
        "track": args.track, "distances": distances, "distance": statistics.mean(distances),
        "seconds": seconds, "valid": valid, "train": training, "sample": sampling,
    })  # fmt: skip


if __name__ == "__main__":
    main()
