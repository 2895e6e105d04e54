"""The hub: what is downloaded of hf:owner/name, and what --push_to_hub uploads.

The hub is a server of this process, on the loopback device, with the parts of its interface that
huggingface_hub calls.
"""

import base64
import dataclasses
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import script
from helpers import INVERSION, LORA, flags, on_sd, tiny_run

import diffusion
from diffusion import UserError
from diffusion.commands.sample import parse as parse_sample
from diffusion.commands.sample import short_name, weighted
from diffusion.config import Config, shared_path
from diffusion.files import checkpoint
from diffusion.files.hub_files import local
from diffusion.files.sd_files import load_sd, load_vae
from diffusion.sampling.load import open_pipeline
from diffusion.training.trainer import train

library = pytest.importorskip(
    "huggingface_hub", reason="optional extra not installed: pip install huggingface_hub"
)
CPU = torch.device("cpu")
TOKEN = "hf_of_a_test"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body=b"", status: int = 200, **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.asked.append(path)
        if path == "/api/whoami-v2":
            return self.reply({"name": "me", "type": "user", "orgs": [], "auth": {}})
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        name = "/".join(words[:2])
        if name not in hub.repositories:
            return self.refuse(401, "RepoNotFound")
        files = hub.repositories[name]
        revision = words[3] if len(words) > 3 else "main"
        if revision not in ("main", "v1", hub.sha(name)):
            return self.refuse(404, "RevisionNotFound")
        if api and words[2:3] == ["tree"]:
            row = lambda n, b: {"type": "file", "path": n, "size": len(b), "oid": git_sha(b)}
            return self.reply([row(n, b) for n, b in files.items()])
        if api:
            row = {"id": name, "modelId": name, "sha": hub.sha(name), "private": False}
            siblings = [{"rfilename": n} for n in files]
            return self.reply(row | {"siblings": siblings, "tags": [], "downloads": 0})
        if name in hub.gated:
            return self.refuse(403, "GatedRepo")
        file = "/".join(words[4:])
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            hub.taken.append(file)
        about = {"ETag": f'"{git_sha(files[file])}"', "X_Repo_Commit": hub.sha(name)}
        if file == hub.dies_in and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[file])))
            self.end_headers()
            self.wfile.write(files[file][: len(files[file]) // 2])
            self.close_connection = True
            return None
        return self.reply(files[file], Accept_Ranges="none", **about)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return self.refuse(403, "Forbidden")
            if name in hub.repositories:
                return self.reply({"url": f"{hub.url}/{name}", "error": "exists"}, 409)
            hub.repositories[name] = {}
            return self.reply({"url": f"{hub.url}/{name}"})
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        name = "/".join(path.split("/")[3:5])
        files = hub.repositories[name]
        if "/preupload/" in path:
            rows = []
            for one in json.loads(body)["files"]:
                mode = "lfs" if one["path"].endswith((".safetensors", ".png")) else "regular"
                rows.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False})
            return self.reply({"files": rows})
        if hub.full:
            return self.refuse(507, "Full")
        for line in body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        hub.commits.append(sorted(files))
        return self.reply({"commitUrl": f"{hub.url}/{name}/commit/x", "commitOid": hub.sha(name)})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hub.objects[hashlib.sha256(body).hexdigest()] = body
        self.reply(ETag="x")


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A hub. taken: the files that were downloaded; commits: what was there after each commit."""

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated = set()
        self.dies_in = None
        self.full = False
        self.objects, self.taken, self.asked, self.commits = {}, [], [], []

    def sha(self, name: str) -> str:
        files = sorted(self.repositories[name].items())
        return hashlib.sha1(repr([(n, git_sha(b)) for n, b in files]).encode()).hexdigest()

    def add(self, name: str, root: Path, names=None) -> str:
        """Add files below a folder, or one file, as a repository."""
        files = [root] if root.is_file() else [f for f in root.rglob("*") if f.is_file()]
        base = root.parent if root.is_file() else root
        found = {f.relative_to(base).as_posix(): f.read_bytes() for f in files}
        found = {n: b for n, b in found.items() if names is None or n in names}
        self.repositories.setdefault(name, {}).update(found)
        return f"hf:{name}"


@pytest.fixture(scope="session")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """An empty hub, for this process and for those that it starts; its cache is empty, too."""
    from huggingface_hub import constants, hf_api

    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    # fmt: off
    for name, value in dict(HF_ENDPOINT=server.hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1",
                            HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_TOKEN=TOKEN).items():
        monkeypatch.setenv(name, value)
    # fmt: on
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    use(monkeypatch, constants, hf_api, server.hub.url)
    yield server.hub
    local.cache_clear()


def use(monkeypatch, constants, hf_api, url: str) -> None:
    """Name the hub to a library that has been imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    local.cache_clear()


def offline(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library.close_session() if hasattr(library, "close_session") else None
    local.cache_clear()


def picture(pipeline, **options) -> torch.Tensor:
    return pipeline.sample([0, 1], steps=2, seed=1, **options)


# --- what is downloaded --------------------------------------------------------------------------


def sd_names(folder: str) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in Path(folder).rglob("*") if f.is_file()}


def test_stable_diffusion_of_the_hub(hub, sd_folder, monkeypatch):
    name = hub.add("o/sd", Path(sd_folder))
    more = "v1-5.safetensors v1-5.ckpt unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin \
        unet/diffusion_pytorch_model.non_ema.safetensors safety_checker/config.json \
        safety_checker/model.safetensors feature_extractor/preprocessor_config.json".split()  # fmt: skip
    hub.repositories["o/sd"] |= dict.fromkeys(more, b"{}")
    for path in (name, "hf:o/sd@v1"):
        found = diffusion.load(path)
        assert found.config.sd_path == path
        same = [picture(p, prompts=["a face"] * 2) for p in (found, diffusion.load(sd_folder))]
        assert torch.equal(*same)
    assert set(hub.taken) == sd_names(sd_folder) - {"model_index.json"}
    assert len(hub.taken) == len(set(hub.taken))  # the cache is used
    offline(monkeypatch)
    assert torch.equal(picture(diffusion.load(name), prompts=["a face"] * 2), same[0])


@pytest.mark.parametrize("kept", ["fp16.safetensors", "bin"])
def test_other_weights_of_a_network(hub, sd_folder, kept):
    """fp16, and what torch.save has written, where there is nothing better."""
    hub.add("o/sd", Path(sd_folder))
    files = hub.repositories["o/sd"]
    for part in ("unet", "vae", "text_encoder"):
        old = next(n for n in files if n.startswith(part) and n.endswith(".safetensors"))
        stem = old.removesuffix("safetensors")
        if kept == "bin" and part == "text_encoder":
            stem = "text_encoder/pytorch_model."
        content = files.pop(old)
        files[f"{stem}{kept}"] = content  # what a file is, its content says
        if kept != "bin":
            files[f"{stem}fp16.bin"] = b"not read"
    assert torch.equal(
        load_sd("hf:o/sd").unet.conv_in.weight, load_sd(sd_folder).unet.conv_in.weight
    )
    assert not [n for n in hub.taken if n.endswith("fp16.bin")]
    same = [diffusion.load(path, amp="no") for path in ("hf:o/sd", sd_folder)]
    assert torch.equal(*(picture(p, prompts=["a face"] * 2) for p in same))


def test_own_models(hub, model):
    folder = model.parent
    name = hub.add("me/faces", folder, ("ema.safetensors", "model.pt", "metrics.jsonl"))
    expected = picture(diffusion.load(model))
    assert torch.equal(picture(diffusion.load(name)), expected)
    assert hub.taken == ["ema.safetensors"]
    assert torch.equal(picture(diffusion.load(f"{name}/model.pt")), expected)
    raw = picture(diffusion.load(f"{name}/model.pt", weights="raw"))
    assert torch.equal(raw, picture(diffusion.load(model, weights="raw")))
    with pytest.raises(UserError):
        diffusion.load(name, weights="raw")  # ema.safetensors has none
    guided = diffusion.load(name, guide=f"{name}/model.pt")
    assert torch.equal(picture(guided.guide), expected)
    del hub.repositories["me/faces"]["ema.safetensors"]
    local.cache_clear()
    assert local(name).name == "model.pt"


def test_a_vae(hub, vae, sd_folder):
    weights = load_vae(vae).state_dict()
    name = hub.add("me/vae", vae, ("ema.safetensors",))
    assert load_vae(name).state_dict().keys() == weights.keys()
    expected = load_vae(sd_folder).state_dict()
    hub.add("o/sd", Path(sd_folder))
    hub.add("o/alone", Path(sd_folder) / "vae")
    for name in ("hf:o/sd", "hf:o/alone", "hf:o/sd/vae/diffusion_pytorch_model.safetensors"):
        hub.taken.clear()
        found = load_vae(name).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
        assert not [n for n in hub.taken if n.startswith("unet/diff")]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, faces, sd_folder) -> dict[str, Path]:
    """Folders of runs that trained a LoRA and a token."""
    found = {}
    for name, options in dict(lora=LORA, token=INVERSION).items():
        folder = tmp_path_factory.mktemp(name)
        run = {**quick(faces, folder, sd_folder), **options, "train_steps": 2, "num_samples": 0}
        train(Config(**run), set(run))
        found[name] = folder / "run"
    return found


def quick(faces, folder, sd_path) -> dict:
    """The options of a run of Stable Diffusion of two steps."""
    names = "data batch_size lr_warmup_steps cache_dir device amp save_folder".split()
    own = {k: v for k, v in tiny_run(faces, folder).items() if k in names}
    return own | on_sd(sd_path) | dict(condition="text", num_samples=0, batch_size=2, learning_rate=0.01,
        train_steps=2, save_and_sample_every=2, log_every=1, objective="eps", sample_steps=2)  # fmt: skip


def test_adapters(hub, sd_folder, adapters):
    sd = hub.add("o/sd", Path(sd_folder))
    lora = hub.add("me/lora", adapters["lora"])
    token = hub.add("me/token", adapters["token"])
    file = f"{lora}/adapter_kohya.safetensors"
    peft = f"{lora}/adapter_model.safetensors"
    for name in (lora, file, peft):
        hub.taken.clear()
        own = adapters["lora"] / (
            name.rpartition("/")[2] if name != lora else "adapter.safetensors"
        )
        found = diffusion.load(sd, lora=(name, 0.7))
        expected = diffusion.load(sd_folder, lora=(own, 0.7))
        pictures = [picture(p, prompts=["a face"] * 2) for p in (found, expected)]
        assert torch.equal(*pictures)
        assert not torch.equal(
            pictures[0], picture(diffusion.load(sd_folder), prompts=["a face"] * 2)
        )
    found = diffusion.load(sd, embedding=token)
    expected = diffusion.load(sd_folder, embedding=adapters["token"] / "adapter.safetensors")
    assert torch.equal(*(picture(p, prompts=["a <new> face"] * 2) for p in (found, expected)))


def test_adapters_of_other_names(hub, adapters):
    whole = (adapters["lora"] / "adapter.safetensors").read_bytes()
    hub.repositories["o/one"] = {"style.safetensors": whole, "README.md": b""}
    hub.repositories["o/two"] = {"b.safetensors": whole, "a.safetensors": whole, "README.md": b""}
    hub.repositories["o/theirs"] = {"pytorch_lora_weights.safetensors": whole, "a.safetensors": b""}
    assert local("hf:o/one").name == "style.safetensors"
    assert local("hf:o/theirs").name == "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match=r"b\.safetensors, a\.safetensors:"):
        local("hf:o/two")
    assert local("hf:o/two/b.safetensors").read_bytes() == whole


# --- names ---------------------------------------------------------------------------------------


def test_names_stay_as_they_are_typed():
    assert weighted("hf:o/lora") == ("hf:o/lora", 1.0)
    assert weighted("hf:o/lora/a.safetensors:0.5") == ("hf:o/lora/a.safetensors", 0.5)
    assert short_name("hf:o/lora-v1.5") == "o/lora-v1.5"
    assert shared_path("hf:o/sd") == "hf:o/sd"
    args = parse_sample(["--load_path", "hf:o/m", "--vae", "hf:o/v", "--lora", "hf:o/l:2"])
    assert (args.load_path, args.vae, args.lora) == ("hf:o/m", "hf:o/v", [("hf:o/l", 2.0)])
    config = Config(mode="latent", condition="text", sd_path="hf:o/sd", objective="eps")
    assert Config.from_dict(json.loads(config.to_json())).sd_path == "hf:o/sd"
    for path, useful in {"hf:o/sd": False, "hf:o/sd/a.ckpt": True}.items():
        config = dataclasses.replace(config, sd_path=path, sd_config="x")
        if useful:
            config.check_use({"sd_config"})
        else:
            with pytest.raises(UserError):
                config.check_use({"sd_config"})
    assert local("results/model.pt") == Path("results/model.pt")


@pytest.mark.parametrize("name", ["hf:", "hf:o", "hf:o/", "hf:/o/n", "hf:o /n", "hf:o/n@/f"])
def test_bad_names(hub, name):
    with pytest.raises(UserError, match="hf:owner/name"):
        local(name)
    assert not hub.asked


# --- what goes wrong -----------------------------------------------------------------------------


def test_unknown_repositories_and_files(hub, model):
    hub.add("me/faces", model.parent, ("ema.safetensors", "metrics.jsonl"))
    hub.add("me/closed", model.parent, ("ema.safetensors",))
    hub.gated.add("me/closed")
    hub.repositories["me/empty"] = {}
    for name, said in {
        "hf:me/unknown": "hf auth login",
        "hf:me/faces@v9": "revision",
        "hf:me/faces/best.safetensors": "ema.safetensors",
        "hf:me/faces/../x": "ema.safetensors",
        "hf:me/closed": "terms",
        "hf:me/empty": "hf:me/empty",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            diffusion.load(name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(UserError, match="ema.safetensors"):
        load_sd("hf:me/faces")
    with pytest.raises(UserError):
        open_pipeline(None, "hf:me/unknown", None, CPU)


def test_without_network(hub, model, monkeypatch):
    """What is in the cache is used; what is not is named."""
    from huggingface_hub import constants, hf_api

    name = hub.add("me/faces", model.parent, ("ema.safetensors",))
    expected = picture(diffusion.load(name))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    use(monkeypatch, constants, hf_api, "http://127.0.0.1:9")
    assert torch.equal(picture(diffusion.load(name)), expected)
    for asked in ("hf:me/other", f"{name}/model.pt"):
        with pytest.raises(UserError, match=asked):
            diffusion.load(asked)


def test_a_cache_of_another_machine(hub, model, monkeypatch, tmp_path):
    """A folder of the cache's layout, copied, and no network."""
    offline(monkeypatch)
    sha = "0" * 40
    folder = tmp_path / "home" / "hub" / "models--me--faces"
    (folder / "snapshots" / sha).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)
    shutil.copy(model.parent / "ema.safetensors", folder / "snapshots" / sha)
    assert torch.equal(picture(diffusion.load("hf:me/faces")), picture(diffusion.load(model)))
    with pytest.raises(UserError, match="hf:me/other"):
        diffusion.load("hf:me/other")
    assert not hub.asked


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        diffusion.load("hf:me/absent")
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        train(Config(push_to_hub="me/absent", device="cpu", save_folder="run"))
    assert not Path("run").exists()


def test_a_download_that_breaks(hub, model, monkeypatch):
    """Half a file is no file: neither then nor when the network is away; and the next try goes on."""
    name = hub.add("me/faces", model.parent, ("ema.safetensors",))
    hub.dies_in = "ema.safetensors"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=name):
        diffusion.load(name)
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(UserError, match=name):
            diffusion.load(name)
    hub.dies_in = None
    local.cache_clear()
    assert torch.equal(picture(diffusion.load(name)), picture(diffusion.load(model)))


# --- training ------------------------------------------------------------------------------------


def test_training_from_the_hub(hub, faces, sd_folder, tmp_path):
    """A run names its base by the hub's name, resumes by the same command, and may move."""
    sd = hub.add("o/sd", Path(sd_folder))
    options = quick(faces, tmp_path, sd)
    train(Config(**options), set(options))
    local.cache_clear()
    longer = options | {"train_steps": 4}
    train(Config(**longer), set(longer))
    folder = tmp_path / "run"
    assert checkpoint.read(folder / "model.pt")["step"] == 4
    assert json.loads((folder / "config.json").read_text())["sd_path"] == sd
    moved = folder.rename(tmp_path / "moved")
    for file in ("model.pt", "ema.safetensors"):
        assert checkpoint.load_weights(moved / file)[1].sd_path == sd
    found = picture(diffusion.load(moved), prompts=["a face"] * 2)
    local_base = diffusion.load(moved, sd_path=sd_folder)
    assert torch.equal(found, picture(local_base, prompts=["a face"] * 2))


def test_fine_tuning_a_model_of_the_hub(hub, tiny, model):
    """--load_path: the run resumes by the same command, and by the path of the same weights."""
    own = {k: v for k, v in tiny.items() if k != "dropout"} | {"train_steps": 2, "num_samples": 0}
    name = hub.add("me/faces", model.parent, ("ema.safetensors",))
    train(Config(**own, load_path=name))
    train(Config(**own | {"train_steps": 3}, load_path=name))
    train(Config(**own | {"train_steps": 4}, load_path=str(model.parent / "ema.safetensors")))
    assert checkpoint.read(Path(own["save_folder"]) / "model.pt")["step"] == 4


def test_export_and_study_of_the_hub(hub, faces, sd_folder, tmp_path, monkeypatch):
    """What was trained from the hub is exported with its base, and a study knows the base again."""
    from diffusion.files import sd_export
    from diffusion.study.__main__ import parse
    from diffusion.study.study_folder import describe

    sd = hub.add("o/sd", Path(sd_folder))
    options = quick(faces, tmp_path, sd)
    train(Config(**options), set(options))
    hub.add("me/tuned", tmp_path / "run", ("ema.safetensors",))
    monkeypatch.setattr(sys, "argv", ["export", "hf:me/tuned", "exported"])
    sd_export.main()
    tuned = checkpoint.load_weights("hf:me/tuned")[0]
    assert torch.equal(load_sd("exported").unet.conv_in.weight, tuned["conv_in.weight"])
    about = [describe(parse(["--sd_path", sd, "--data", str(faces)])[0]) for _ in range(2)]
    assert about[0] == about[1]
    tuned = ["--load_path", "hf:me/tuned", "--guide", "hf:me/tuned", "--guidance_scale", "2"]
    assert describe(parse([*tuned, "--sd_path", sd, "--data", str(faces)])[0]) != about[0]


# --- uploading -----------------------------------------------------------------------------------

SHARED = {"README.md", "metadata.json", "metrics.jsonl"}


def test_push_and_load_back(hub, tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", tiny["data"], f"--cache_dir={tiny['cache_dir']}"])  # fmt: skip
    train(Config(**tiny, push_to_hub="me/new"))
    files = hub.repositories["me/new"]
    assert files.keys() == SHARED | {"ema.safetensors", "best.safetensors", "samples.png"}
    assert len(hub.commits) == 3  # at each milestone
    folder = Path(tiny["save_folder"])
    assert files["ema.safetensors"] == (folder / "ema.safetensors").read_bytes()
    assert files["samples.png"] == (folder / "samples" / "step_00000012.png").read_bytes()
    card = files["README.md"].decode()
    assert "](samples.png)" in card
    assert card.startswith("---\n") and "--data faces" in card and "--cache_dir=" in card
    for name, content in files.items():
        for private in (tiny["data"], str(folder.parent), TOKEN):
            assert private.encode() not in content, name
    last = json.loads(files["metrics.jsonl"].splitlines()[-1])
    assert f"| loss | {last['loss']} |" in card and "| step | 12 |" in card
    assert torch.equal(picture(diffusion.load("hf:me/new")), picture(diffusion.load(folder)))

    # a finished run may be uploaded later, elsewhere or after a failure
    train(Config(**tiny, push_to_hub="me/later"))
    assert hub.repositories["me/later"].keys() == files.keys()
    # and a run may go on without
    train(Config(**tiny | {"train_steps": 13}))
    assert "| step | 12 |" in hub.repositories["me/new"]["README.md"].decode()


def test_a_failing_upload_is_a_warning(hub, tiny, capsys):
    hub.full = True
    own = tiny | {"train_steps": 4, "num_samples": 0}
    train(Config(**own, push_to_hub="me/new"))
    assert checkpoint.read(Path(tiny["save_folder"]) / "model.pt")["step"] == 4
    assert "hf upload me/new" in capsys.readouterr().out + capsys.readouterr().err
    assert not hub.repositories["me/new"]


@pytest.mark.parametrize("name", ["new", "me/a/b", "me/", "/home/me/x", "hf:me/new", "me/n ew"])
def test_no_name_to_upload_to(name):
    with pytest.raises(UserError, match="owner/name"):
        Config(push_to_hub=name)


@pytest.mark.parametrize("why", ["token", "other", "network"])
def test_refused_before_anything_is_written(hub, tiny, monkeypatch, why):
    from huggingface_hub import constants, hf_api

    if why == "token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "absent")
    if why == "network":
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        use(monkeypatch, constants, hf_api, "http://127.0.0.1:9")
    name = "them/new" if why == "other" else "me/new"
    with pytest.raises(UserError, match="HF_ENDPOINT" if why == "network" else "hf auth login"):
        train(Config(**tiny, push_to_hub=name))
    assert not Path(tiny["save_folder"]).exists() and not hub.repositories


def test_push_an_adapter(hub, faces, sd_folder, adapters, tmp_path):
    sd = hub.add("o/sd", Path(sd_folder))
    for kind, more in dict(lora=LORA, token=INVERSION).items():
        options = quick(faces, tmp_path / kind, sd) | more | {"push_to_hub": f"me/{kind}"}
        train(Config(**options), set(options))
        files = hub.repositories[f"me/{kind}"]
        peft = {"adapter_config.json", "adapter_model.safetensors"} if kind == "lora" else set()
        assert files.keys() == SHARED | peft | {"adapter.safetensors", "adapter_kohya.safetensors"}
        card = files["README.md"].decode()
        assert not [n for n, content in files.items() if str(tmp_path).encode() in content]
        assert "base_model: o/sd\n" in card and f"hf:me/{kind}" in card and sd in card
    code = card.split("\n\n")[-1]  # it runs as it stands
    found = {}
    exec("\n".join(line.strip() for line in code.splitlines()), found)
    assert len(found["images"]) == 4


def test_push_a_vae(hub, faces, vae, tmp_path):
    config = Config.from_dict(json.loads((vae / "config.json").read_text()))
    train(dataclasses.replace(config, push_to_hub="me/vae"))
    assert "--vae hf:me/vae" in hub.repositories["me/vae"]["README.md"].decode()
    assert load_vae("hf:me/vae").state_dict().keys() == load_vae(vae).state_dict().keys()


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands(hub, tiny, model, tmp_path, monkeypatch):
    """Each in its own process, with the library's own variables."""
    name = hub.add("me/faces", model.parent, ("ema.safetensors",))
    options = ["--steps", 2, "--num_images", 2, "--device", "cpu"]
    for path, folder in ((name, "a"), (model, "b")):
        done = script(
            "sample.py", "--load_path", path, "--save_folder", folder, *options, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    a, b = (sorted((tmp_path / f / "images").iterdir()) for f in "ab")
    from PIL import Image

    assert [Image.open(f).tobytes() for f in a] == [Image.open(f).tobytes() for f in b]
    assert "Model: me/faces" in Image.open(a[0]).text["parameters"]
    done = script(
        "visualize.py", "--load_path", name, "--steps", 2, "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "home")  # both ranks find an empty cache
    run = flags(tiny | {"train_steps": 4, "load_path": name}) + ["--push_to_hub", "me/new"]
    done = script("train.py", *run, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "ema.safetensors" in hub.repositories["me/new"]
    assert "--preset none" in hub.repositories["me/new"]["README.md"].decode()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = script("sample.py", "--load_path", "hf:me/unknown", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: hf:me/unknown")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "program", ["train.py", "/home/me/bin/diffusion-train", "ipykernel_launcher.py"]
)
def test_the_command_of_a_card(monkeypatch, program):
    """None of it tells where things are; what was no program of ours is a call."""
    from diffusion.training.share import command_of

    typed = [
        "--data",
        "/home/me/pics",
        "--vae=/home/me/v",
        "--load_path",
        "../../me/model.pt",
        "--cache_dir",
        "~/me",
    ]
    monkeypatch.setattr("sys.argv", [program, *typed, "--preset", "none"])
    config = Config(data="/home/me/pics", load_path="/home/me/model.pt", train_steps=7)
    said = command_of(config)
    assert "/home" not in said and "me/" not in said and "~" not in said
    if program.startswith("ipy"):
        assert said == "diffusion.train(load_path='model.pt', data='pics', train_steps=7)"
    else:
        assert said.split()[-2:] == ["--preset", "none"] and "--data pics" in said
        assert said.startswith("python train.py" if program == "train.py" else "diffusion-train")
