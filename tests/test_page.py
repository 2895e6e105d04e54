"""viz/index.html in a real browser: headless Chromium (Debian's package chromium)."""

import html
import json
import math
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch

from diffusion.config import Config
from diffusion.pictures import page as page_module
from diffusion.pictures.grid import Picked, Trajectory
from diffusion.pictures.page import embed, frame_strip, write_page
from diffusion.process import loop
from diffusion.process.names import SAMPLERS, SPACINGS
from diffusion.process.samplers import make_table
from diffusion.process.schedule import make_path, make_schedule
from diffusion.sampling.pipeline import Pipeline

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")  # fmt: skip

EVIL = "</script><script>window.evil=1</script><img src=x onerror=evil=1>&\u2028'\""


@pytest.fixture
def few_tables(monkeypatch):
    """For tests of the rest: making all of the laboratory's takes seconds."""
    monkeypatch.setattr(page_module, "STEPS", (1,))
    monkeypatch.setattr(page_module, "EXACT", ("ddim", 1))


def write(path, size=16, images=2, name="vp"):
    """A page in which every frame has a colour of its own."""
    config = Config(image_size=size, path=name)
    pipeline = Pipeline(config, torch.nn.Identity(), make_path(name, 1000, "v"))
    colour = lambda v: np.full((images, size, size, 3), v, np.uint8)  # noqa: E731

    def process(name, n, shift):
        t = [999.0 - 1000 * i / n for i in range(n + 1)]
        x = np.stack([colour(10 + 2 * i + shift) for i in range(n + 1)])
        return Trajectory(name, t, x, x + 100)

    forward = Trajectory("forward", [0.0, 500.0, 999.0], np.stack([colour(v) for v in (7, 8, 9)]))
    runs = [process("ddpm, 50 steps", 50, 0), process("ddim, 10 steps", 10, 1)]
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
@pytest.mark.usefixtures("few_tables")
def test_the_slider_and_the_keys_move_the_frames(tmp_path):
    write(tmp_path / "index.html")
    out = play(tmp_path / "index.html", """
      out.opened = pixel("x"); slide(0); out.start = pixel("x"); slide(500); out.half = pixel("x"); out.x0 = pixel("x0");
      out.forward = pixel("forward"); key("End"); out.end = pixel("x"); key("ArrowLeft");
      out.back = pixel("x"); key("Home"); key("ArrowRight"); out.second = pixel("x");
      key("s"); out.other = pixel("x"); out.sampler = $("xtext").textContent;
      key("ArrowDown"); out.caption = $("forwardtext").textContent;
      document.querySelectorAll(".run")[0].click(); out.clicked = $("xtext").textContent;
      out.cards = document.querySelectorAll(".run").length;
      out.dots = document.querySelectorAll("#plots circle").length""")  # fmt: skip
    assert out["errors"] == [] and out["evil"] == 0
    near = lambda name, value: np.testing.assert_allclose(out[name], value, atol=1)  # noqa: E731
    near("opened", 110)
    near("start", 10), near("half", 10 + 2 * 25), near("x0", 110 + 2 * 25), near("end", 110)
    near("forward", 8)  # t = 499
    near("back", 108), near("second", 12), near("other", 11)
    assert "ddim, 10 steps" in out["sampler"] and "ddpm, 50 steps" in out["clicked"]
    assert out["cards"] == 2 and out["dots"] == 2 * 50
    assert EVIL.replace("\u2028", "") in out["caption"].replace("\u2028", "")  # shown as text


@needs_chromium
@pytest.mark.usefixtures("few_tables")
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


@pytest.mark.usefixtures("few_tables")
def test_nothing_of_a_caption_is_markup(tmp_path):
    text = embed({"caption": EVIL})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"caption": EVIL}
    write(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "onerror" in page and page.count("<script") == 3 and "<img" not in page
    assert not re.search(r'(src|href)="?https?:', page)  # nothing is fetched


def test_large_pictures_are_reduced_to_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_BYTES", 150_000)
    monkeypatch.setattr(page_module, "tables", lambda pipeline: [])
    noise = np.random.default_rng(0).integers(0, 256, (20, 2, 64, 64, 3), np.uint8)
    pipeline = Pipeline(Config(image_size=64), torch.nn.Identity(), make_schedule("cosine", 1000))
    t = [float(v) for v in range(950, -50, -50)]
    forward = Trajectory("forward", t[::-1], noise)
    data = Picked(torch.zeros(2, 3, 64, 64), ["a"] * 2, [""] * 2)
    write_page(tmp_path / "index.html", pipeline, forward, data, [Trajectory("r", t, noise, noise)])
    page = (tmp_path / "index.html").read_text()
    assert len(page) < 150_000 and '"size": [32, 32]' in page


def test_a_strip_holds_its_frames():
    import base64
    import io

    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    uri = frame_strip(frames, 128, {"lossless": True})
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")).reshape(3, 8, 8, 3), frames)


# --- the laboratory ------------------------------------------------------------------------------

STD = 0.16


def uniforms(seed: int):
    """mulberry32, of numbers modulo 2^32."""
    mask = 2**32 - 1
    while True:
        seed = (seed + 0x6D2B79F5) & mask
        z = (seed ^ seed >> 15) * (1 | seed) & mask
        z = (z + ((z ^ z >> 7) * (61 | z) & mask)) & mask ^ z
        yield (z ^ z >> 14) / 2**32


def points(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(500, 2, 1, 1)


def draws(seed: int):
    """Make a function of no argument that gives the laboratory's noise, (500, 2, 1, 1)."""
    u = uniforms(seed)

    def normal() -> float:
        first, second = next(u), next(u)
        return math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)

    return lambda: points([normal() for _ in range(1000)])


class ExactDenoiser:
    """x0 of the mixture: torch's own softmax over all components, or over those of the class."""

    def __init__(self, guides: bool):
        s = torch.linspace(0, 1, 8, dtype=torch.float64)
        angle = math.pi * (0.1 + 1.15 * s)
        arm = (0.4 + 1.05 * s)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        self.means = torch.cat([arm, -arm])
        own = (torch.arange(16) // 8)[None] == (torch.arange(500) % 2)[:, None]
        self.own = torch.where(own, 0.0, -math.inf)
        self.guides = guides

    def coefficients(self, t, alpha, sigma):
        return torch.stack([alpha, sigma, t, t], 1)

    def __call__(self, x, k, *cond):
        alpha, sigma, _, _, weight = k
        variance = (alpha * STD) ** 2 + sigma**2
        away = x[:, None, :, 0, 0] - alpha * self.means
        logits = -away.square().sum(-1) / (2 * variance)
        per_component = self.means + alpha * STD**2 / variance * away
        mean = lambda logits: (logits.softmax(1)[..., None] * per_component).sum(1)
        cond, uncond = mean(logits + self.own), mean(logits)
        return (uncond + weight * (cond - uncond) if self.guides else cond)[:, :, None, None]


def end_of(monkeypatch, path, table, weight):
    """The end of process/loop.py's own loop, in float64."""
    double = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(loop, "torch", double)
    x = path.prior_std(*table.levels[0].tolist()) * draws(1)()
    table = table.guided(weight)
    options = dict(clip=False, guided=ExactDenoiser(True), noise=draws(2))
    return loop.sample(ExactDenoiser(False), x, table, **options)[..., 0, 0]


PATHS = ["vp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("edm", "flow"))]


@needs_chromium
@pytest.mark.parametrize("name", PATHS)
def test_the_laboratorys_end_is_pythons(tmp_path, monkeypatch, name):
    """Every sampler's, stochastic ones and guided ones, to 1e-6."""
    monkeypatch.setattr(page_module, "STEPS", (2, 20))
    write(tmp_path / "index.html", name=name)
    cases = [
        (sampler, 20, SPACINGS[i % len(SPACINGS)], float(kind.etas[1]), (1.0, 2.5)[i % 2])
        for i, (sampler, kind) in enumerate(SAMPLERS.items())
    ]
    cases += [("ddim", 20, "trailing", 0.5, 0.0), ("heun", 2, "trailing", 0.0, 1.0)]
    cases += [(sampler, 20, "logsnr", 0.0, 1.0) for sampler in ("unipc3", "ipndm", "deis", "heun")]
    out = play(tmp_path / "index.html", f"""
      tab("laboratory");
      out.ends = {json.dumps(cases)}.map(([sampler, steps, spacing, eta, weight]) =>
        [...endOf(TABLES[sampler][eta][spacing][steps], weight)]);
      out.exact = [...exactEnd()]; out.eps = [...EPS]""")  # fmt: skip
    assert out["errors"] == []
    torch.testing.assert_close(points(out["eps"]), draws(1)(), rtol=0, atol=1e-12)
    path = make_path(name, 1000, "v")
    for (sampler, steps, spacing, eta, weight), end in zip(cases, out["ends"]):
        table = make_table(path, sampler, steps, spacing=spacing, eta=eta)
        expected = end_of(monkeypatch, path, table, weight)
        found = points(end)[..., 0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m: f"{sampler} {spacing} {weight}: {m}")  # fmt: skip
    if name == "vp":
        return
    # what the page calls exact is, next to the errors that it shows
    fine = end_of(monkeypatch, path, make_table(path, "adams4", 800, spacing="logsnr"), 1.0)
    found = points(out["exact"])[..., 0, 0]
    assert (found - fine).square().sum(1).mean().sqrt() < 2e-5


@needs_chromium
def test_the_laboratory_shows_what_is_chosen(tmp_path):
    write(tmp_path / "index.html")
    page = tmp_path / "index.html"
    assert page.stat().st_size < 3_000_000  # the pictures need the rest of 10 MB
    out = play(page, """
      const todo = []; window.requestAnimationFrame = f => todo.push(f);
      const settle = () => { while (todo.length) todo.shift()(performance.now()); };
      const text = id => $("lab-" + id).textContent, rows = () => $("lab-table").tBodies[0].rows;
      const set = (key, value) => { $("lab-" + key).value = value; $("lab-" + key).dispatchEvent(new Event("change")); settle(); };
      const read = () => [text("error"), text("order"), rows().length, rows()[0].cells.length, $("lab-eta").disabled];
      $("tab-laboratory").click(); settle(); out.hidden = [$("pictures").hidden, $("laboratory").hidden];
      set("steps", "50"); for (const name of ["ddim", "dpmpp_2m", "unipc2", "adams4"]) { set("sampler", name); out[name] = read(); }
      out.error = rms(endOf(lab.table, 1), exactEnd());
      set("sampler", "ddpm"); out.ddpm = read(); set("sampler", "ddim"); set("eta", "0.5"); out.half = read();
      set("eta", "0"); out.again = read();
      out.ranked = $("lab-rank").children.length; $("lab-rank").children[0].click(); settle(); out.first = lab.sampler;
      $("lab-weight").value = 3; $("lab-weight").dispatchEvent(new Event("input")); settle(); out.weight = text("weighttext");
      const canvas = $("lab-canvas"), dots = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.width).data.reduce((a, b) => a + b, 0);
      out.end = dots(); $("lab-time").value = 0; $("lab-time").oninput({ target: $("lab-time") }); out.start = dots();
      let now = 0; key(" "); out.playing = text("play");
      for (let i = 0; i < 100 && lab.playing; i++) todo.shift()(now += 50);
      out.after = text("play"); out.u = lab.u; out.played = dots();
      const before = state.u; key("End"); out.moved = state.u !== before""")  # fmt: skip
    assert out["errors"] == [] and out["hidden"] == [True, False]
    for name, order in {"ddim": 1, "dpmpp_2m": 2, "unipc2": 3, "adams4": 4}.items():
        error, measured, rows, _, fixed = out[name]
        assert float(measured) == pytest.approx(order, abs=0.7) and rows == 50, out
        assert fixed == (name != "ddim")
    assert float(out["adams4"][0]) == pytest.approx(out["error"], rel=1e-2)
    assert float(out["adams4"][0]) < float(out["dpmpp_2m"][0]) < float(out["ddim"][0])
    assert out["ddpm"][:2] == out["half"][:2] == ["none: random", "none"]
    assert out["again"] == out["ddim"]
    assert out["ranked"] == 10 and out["first"] == "adams4" and out["weight"] == "3.0"
    assert out["playing"] == "Pause" and out["after"] == "Play" and out["u"] == 1
    assert out["start"] != out["end"] and not out["moved"]
    assert out["played"] == pytest.approx(out["end"], rel=0.02)
