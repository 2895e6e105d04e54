"""viz/index.html in a real browser: headless Chromium (Debian's package chromium)."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from diffusion.config import Config
from diffusion.pictures.grid import Picked, Trajectory
from diffusion.pictures.page import embed, frame_strip, write_page
from diffusion.process.schedule import make_schedule
from diffusion.sampling.pipeline import Pipeline

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")  # fmt: skip

EVIL = "</script><script>window.evil=1</script><img src=x onerror=evil=1>&\u2028'\""


def write(path, size=16, trained=True, images=2):
    """A page in which every frame has a colour of its own."""
    pipeline = Pipeline(Config(image_size=size), torch.nn.Identity(), make_schedule("cosine", 1000))
    colour = lambda v: np.full((images, size, size, 3), v, np.uint8)  # noqa: E731

    def process(name, n, shift):
        t = [999.0 - 1000 * i / n for i in range(n + 1)]
        x = np.stack([colour(10 + 2 * i + shift) for i in range(n + 1)])
        return Trajectory(name, t, x, x + 100)

    forward = Trajectory("forward", [0.0, 500.0, 999.0], np.stack([colour(v) for v in (7, 8, 9)]))
    runs = [process("ddpm, 50 steps", 50, 0), process("ddim, 10 steps", 10, 1)] if trained else []
    data = Picked(torch.zeros(images, 3, size, size), ["a.png", EVIL], ["", EVIL])
    write_page(path, pipeline, forward, data, runs)


def play(page, script: str) -> dict:
    """What `script` puts into `out`, run in the page once its pictures are loaded."""
    probe = """<script>
      const errors = []; window.onerror = m => { errors.push(String(m)); };
      const warn = console.error; console.error = (...a) => { errors.push(a.join(" ")); };
    </script>"""
    run = """<script>
      const pixel = id => [...document.getElementById(id).getContext("2d").getImageData(2, 2, 1, 1).data].slice(0, 3);
      const key = k => document.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
      const slide = v => { $("time").value = v; $("time").dispatchEvent(new Event("input")); };
      setTimeout(() => { const out = {}; @@SCRIPT@@; out.errors = errors; out.evil = window.evil || 0;
        for (const p of [D.forward, ...D.runs]) for (const s of [...p.x, ...(p.x0 || [])])
          if (!s.naturalWidth) errors.push("a strip does not load");
        const e = document.createElement("pre"); e.id = "out"; e.textContent = JSON.stringify(out);
        document.body.append(e); }, 800);
    </script></body>"""
    run = run.replace("@@SCRIPT@@", script)
    text = page.read_text().replace("<head>", "<head>" + probe, 1).replace("</body>", run)
    test = page.with_name("test.html")
    test.write_text(text)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
         f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", test.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@needs_chromium
def test_the_slider_and_the_keys_move_the_frames(tmp_path):
    write(tmp_path / "index.html")
    out = play(tmp_path / "index.html", """
      out.start = pixel("x"); slide(500); out.half = pixel("x"); out.x0 = pixel("x0");
      out.forward = pixel("forward"); key("End"); out.end = pixel("x"); key("ArrowLeft");
      out.back = pixel("x"); key("Home"); key("ArrowRight"); out.second = pixel("x");
      key("s"); out.other = pixel("x"); out.sampler = $("xtext").textContent;
      key("ArrowDown"); out.caption = $("forwardtext").textContent;
      document.querySelectorAll(".run")[0].click(); out.clicked = $("xtext").textContent;
      out.cards = document.querySelectorAll(".run").length;
      out.dots = document.querySelectorAll("#plots circle").length""")  # fmt: skip
    assert out["errors"] == [] and out["evil"] == 0
    near = lambda name, value: np.testing.assert_allclose(out[name], value, atol=1)  # noqa: E731
    near("start", 10), near("half", 10 + 2 * 25), near("x0", 110 + 2 * 25), near("end", 110)
    near("forward", 8)  # t = 499
    near("back", 108), near("second", 12), near("other", 11)
    assert "ddim, 10 steps" in out["sampler"] and "ddpm, 50 steps" in out["clicked"]
    assert out["cards"] == 2 and out["dots"] == 2 * 50
    assert EVIL.replace("\u2028", "") in out["caption"].replace("\u2028", "")  # shown as text


@needs_chromium
def test_play_runs_to_the_image(tmp_path):
    write(tmp_path / "index.html")
    page = tmp_path / "index.html"
    # time in which nothing happens is skipped: let the player's clock be ours
    out = play(page, """
      let now = 0, todo; performance.now = () => now; window.requestAnimationFrame = f => { todo = f; };
      $("play").click(); out.label = $("play").textContent;
      for (let i = 0; i < 200 && state.playing; i++) { now += 50; todo(now); }
      out.end = pixel("x"); out.after = $("play").textContent""")  # fmt: skip
    assert out["label"] == "Pause" and out["after"] == "Play" and out["errors"] == []
    np.testing.assert_allclose(out["end"], 110, atol=1)


@needs_chromium
def test_without_a_model_the_forward_process_remains(tmp_path):
    write(tmp_path / "index.html", trained=False)
    out = play(tmp_path / "index.html", """
      slide(0); out.noise = pixel("forward"); slide(1000); out.image = pixel("forward");
      out.hidden = [...document.querySelectorAll(".model")].every(e => e.hidden)""")  # fmt: skip
    assert out["errors"] == [] and out["hidden"]
    np.testing.assert_allclose(out["noise"], 9, atol=1)
    np.testing.assert_allclose(out["image"], 7, atol=1)


def test_nothing_of_a_caption_is_markup(tmp_path):
    text = embed({"caption": EVIL})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"caption": EVIL}
    write(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "onerror" in page and page.count("<script") == 2 and "<img" not in page
    assert not re.search(r'(src|href)="?https?:', page)  # nothing is fetched


def test_large_pictures_are_reduced_to_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.pictures.page.MAX_BYTES", 150_000)
    noise = np.random.default_rng(0).integers(0, 256, (20, 2, 64, 64, 3), np.uint8)
    pipeline = Pipeline(Config(image_size=64), torch.nn.Identity(), make_schedule("cosine", 1000))
    t = [float(v) for v in range(950, -50, -50)]
    forward = Trajectory("forward", t[::-1], noise)
    data = Picked(torch.zeros(2, 3, 64, 64), ["a"] * 2, [""] * 2)
    write_page(tmp_path / "index.html", pipeline, forward, data, [Trajectory("r", t, noise, noise)])
    page = (tmp_path / "index.html").read_text()
    assert len(page) < 150_000 and '"size": 32' in page


def test_a_strip_holds_its_frames():
    import base64
    import io

    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    uri = frame_strip(frames, 128, {"lossless": True})
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")).reshape(3, 8, 8, 3), frames)
