"""CLIP score against transformers, LPIPS diversity against lpips, and both in the command."""

import json
import sys

import numpy as np
import pytest
import torch
from feature_networks import Pooled, pictures
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.testing import assert_close

from diffusion import UserError
from diffusion.data import toy
from diffusion.data.folder import walk
from diffusion.evaluation import __main__ as metrics
from diffusion.evaluation import diversity as lpips_diversity
from diffusion.evaluation.clip_score import open_clip, read_prompts
from diffusion.evaluation.diversity import diversity, open_lpips
from diffusion.evaluation.features import Features
from diffusion.evaluation.image_batches import collect, folder_batches
from diffusion.evaluation.metrics import Metrics, open_metrics
from diffusion.files.tokenizer_files import save_tokenizer
from diffusion.models.configs import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion.models.tokenizer import byte_level
from diffusion.pictures.grid import parameters_text, read_parameters, save_png

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "zwei grüne Gesichter", "a", "long " * 30]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(folder as transformers writes it, its model, its image processor)."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    folder, tokenizer = tmp_path_factory.mktemp("clip") / "tiny-clip", byte_level(24)
    save_tokenizer(tokenizer, folder)
    text = CLIPTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                          vocab_size=len(tokenizer), max_position_embeddings=24, eos_token_id=tokenizer.eos_id)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                              num_attention_heads=3, image_size=28, patch_size=7)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**CLIPConfig(text, vision, 20).to_dict())
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():  # random, but not as small as transformers begins with
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    images = processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images.save_pretrained(folder)
    return folder, model, images


def photos() -> list[np.ndarray]:
    """Larger and smaller than CLIP's, square, wide and high."""
    random = np.random.default_rng(0)
    plain = [toy.draw(1, 64), toy.draw(2, 16)]
    return [
        *plain,
        *(random.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 57), (61, 30))),
    ]


def test_clip_score_is_transformers(clip):
    folder, theirs, processor = clip
    ours, images = open_clip(folder, CPU), photos()
    pixels = torch.tensor(np.stack(processor(images)["pixel_values"]))
    assert_close(ours.pixels(images), pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        out = theirs(input_ids=ours.tokenizer(PROMPTS), pixel_values=pixels)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    assert (cosine > 0.1).all() and cosine.std() > 0.01
    assert_close(ours(images, PROMPTS), 100 * cosine.double(), rtol=1e-4, atol=1e-3)
    ours.model.visual_projection.weight.neg_()
    assert (ours(images, PROMPTS) == 0).all()  # max(cos, 0)
    assert ours.name == "tiny-clip"


def test_a_giant_text_in_a_picture_is_cut_off(tmp_path):
    """As a caption is; what Pillow would not hold is none."""
    for count, expected in ((1, "x" * 65_535), (80, None)):
        info = PngInfo()
        for i in range(count):
            info.add_text("parameters" if i == count - 1 else f"k{i}", "x" * 1_000_000, zip=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
        assert read_parameters(tmp_path / "a.png") == expected


def test_the_tokenizer_of_the_folder_is_transformers(clip):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(clip[0])
    ids = theirs(PROMPTS, padding="max_length", truncation=True, max_length=24)["input_ids"]
    assert open_clip(clip[0], CPU).tokenizer(PROMPTS).tolist() == ids


def test_other_normalisation_is_read(clip, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    score = open_clip(folder, CPU)
    white = np.full((1, 28, 28, 3), 255, np.uint8)
    assert_close(score.pixels(white), torch.ones(1, 3, 28, 28))


def test_mistakes(clip, tmp_path):
    with pytest.raises(UserError, match="none"):
        open_clip(tmp_path / "none", CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(UserError, match="clip_text_model.* without vision tower"):
        open_clip(tmp_path, CPU)
    (tmp_path / "config.json").write_text((clip[0] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no weights"):
        open_clip(tmp_path, CPU)
    (tmp_path / "model.safetensors").write_bytes((clip[0] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds no vocabulary"):
        open_clip(tmp_path, CPU)
    save_tokenizer(byte_level(200), tmp_path)
    with pytest.raises(UserError, match="in rows of 200"):
        open_clip(tmp_path, CPU)


def test_diversity_is_the_mean_over_pairs(monkeypatch):
    images = np.stack([toy.draw(i, 8) for i in range(5)])
    distance = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
    x = images.astype(np.float64) / 127.5 - 1
    by_hand = [np.abs(x[i] - x[j]).mean() for i in range(5) for j in range(i)]
    assert diversity(images, distance, CPU) == pytest.approx(np.mean(by_hand), rel=1e-6)
    monkeypatch.setattr(lpips_diversity, "MAX_PAIRS", 4)
    few = diversity(images, distance, CPU)
    assert min(by_hand) < few < max(by_hand) and few == diversity(images, distance, CPU)


def test_diversity_with_the_lpips_package():
    """Random weights: the published ones cannot be had here."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    net = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False).eval()
    images = np.stack([toy.draw(i, 32) for i in range(3)])
    pairs = [net(lpips.im2tensor(images[i]), lpips.im2tensor(images[j]))
             for i, j in ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    assert diversity(images, net, CPU) == pytest.approx(float(sum(pairs)) / 3, rel=1e-5)
    metrics = Metrics(Features("pooled", "pooled", "", Pooled(), CPU), lpips=net)
    found = collect([(range(3), {}, images)], metrics.rows, "x")
    result = metrics.compare(found, found)["lpips_diversity"]
    assert result["value"] == pytest.approx(float(sum(pairs)) / 3, rel=1e-5)
    assert result["num_images"] == 3 and "1801.03924" in result["definition"]


def test_lpips_without_its_weights(monkeypatch, tmp_path):
    pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="(?s)could not load its network.*--lpips"):
        open_lpips(CPU, "alex", "--lpips")


def test_lpips_says_what_is_missing(monkeypatch, pooled):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="--lpips needs LPIPS: pip install lpips"):
        open_metrics(pooled, None, True, CPU)


def offline(*args, **options):
    raise OSError("no network")


# --- prompts and the command ---------------------------------------------------------------------


def test_prompts_come_from_captions_or_from_the_png(tmp_path):
    folder = tmp_path / "fake"
    settings = {"Steps": 3, "Sampler": "DDIM"}
    prompts = ["a fox, red", "two\nlines"]
    for i, prompt in enumerate(prompts):
        text = parameters_text(prompt, "blurry" if i else "", settings)
        save_png(toy.draw(i, 16), folder / f"{i}.png", {"parameters": text})
    assert read_prompts(walk(folder, sampled=True)) == prompts
    save_png(toy.draw(1, 16), folder / "2.png", {"parameters": parameters_text(None, "", settings)})
    assert read_parameters(folder / "2.png") is None
    with pytest.raises(UserError, match=r"2\.png' has none"):
        read_prompts(walk(folder, sampled=True))
    (folder / "2.txt").write_text("by hand")
    assert read_prompts(walk(folder, sampled=True))[-1] == "by hand"


def test_the_command_measures_a_folder(clip, real, pooled, tmp_path, monkeypatch, capsys):
    fake = pictures(tmp_path / "fake", range(6))
    for i, file in enumerate(sorted(fake.iterdir())):
        file.with_suffix(".txt").write_text(toy.caption(i))
    monkeypatch.setattr(sys, "argv", ["metrics", str(real), str(fake), "--fid_features", str(pooled),
                                      "--clip", str(clip[0]), "--device", "cpu"])  # fmt: skip
    metrics.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    score = open_clip(clip[0], CPU)
    images = [np.asarray(Image.open(f)) for f in sorted(fake.glob("*.png"))]
    expected = score(images, [toy.caption(i) for i in range(6)]).mean()
    assert found["clip_score"] == pytest.approx(float(expected), rel=1e-6)
    about = found["definitions"]["clip_score"]
    assert about["model"] == "tiny-clip" and about["num_images"] == 6
    assert "value" not in about and "1706.08500" in found["definitions"]["pooled"]["definition"]
    assert {"pooled", "pooled_kid", "precision", "recall"} <= set(found["definitions"])


def test_a_model_that_reads_nothing_has_no_clip_score(clip, real, pooled, model):
    with pytest.raises(UserError, match="reads none"):
        call_metrics(real, model, "--fid_features", pooled, "--clip", clip[0])


def call_metrics(*args):
    old = sys.argv
    sys.argv = ["metrics", *map(str, args), "--device", "cpu"]
    try:
        metrics.main()
    finally:
        sys.argv = old


def metrics_of(clip) -> Metrics:
    return Metrics(Features("pooled", "pooled", "", Pooled(), CPU), open_clip(clip[0], CPU))


def test_the_name_of_an_image_without_a_prompt_stays_on_its_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a\nerror: b\x1b[31m.png")
    with pytest.raises(UserError, match="error: b") as told:
        read_prompts(walk(tmp_path))
    assert "\n" not in str(told.value) and "\x1b" not in str(told.value)


def test_batches_do_not_change_the_score(clip):
    metrics, images = metrics_of(clip), photos()
    batches = [([i], {"prompts": [PROMPTS[i]]}, images[i][None]) for i in (2, 0, 3, 1)]
    found = collect(batches, metrics.rows, "x")
    assert_close(found["clip"], metrics.clip(images, PROMPTS), rtol=1e-5, atol=0)
    record = metrics.compare(found, found)["clip_score"]
    assert (
        record["value"] == pytest.approx(float(found["clip"].mean())) and record["num_images"] == 4
    )


def test_broken_images_are_left_out(clip, tmp_path):
    fake = pictures(tmp_path / "fake", range(3))
    (fake / "broken.png").write_bytes(b"\x89PNG\r\n")
    for file in list(fake.iterdir()):
        file.with_suffix(".txt").write_text(f"face {file.stem}")
    found, metrics = walk(fake), metrics_of(clip)
    prompts = read_prompts(found)
    rows = collect(folder_batches(fake, found.images, None, prompts), metrics.rows, fake)
    images = [np.asarray(Image.open(f)) for f in found.images if f.stem != "broken"]
    expected = metrics.clip(images, [f"face {i:03d}" for i in range(3)])
    assert_close(rows["clip"], expected, rtol=1e-5, atol=0)
