"""Files of the Hugging Face hub, where people keep models, by the names that options take.

    hf:owner/name                  what is read of the repository
    hf:owner/name/file             one of its files
    hf:owner/name@revision[/file]  of a branch, a tag or a commit

The library (pip install huggingface_hub) downloads, keeps and locks: HF_ENDPOINT, HF_HOME, HF_TOKEN
and HF_HUB_OFFLINE are its own. A name is resolved where files are opened, and stands in
configurations as it was typed: it means the same on every machine.
"""

import contextlib
import fnmatch
import functools
import glob
import re
from pathlib import Path

from .. import UserError, some
from .atomic import reason
from .strict import PARTS

NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")
# of a network of Stable Diffusion: the first that there is
WEIGHTS = """diffusion_pytorch_model.safetensors model.safetensors
    diffusion_pytorch_model.fp16.safetensors model.fp16.safetensors diffusion_pytorch_model.bin
    pytorch_model.bin diffusion_pytorch_model.fp16.bin pytorch_model.fp16.bin""".split()
# of a model, an adapter, a token or a VAE: the same; what an adapter's run has for resuming comes
# after the adapter; of several files that the last stands for none is taken
FILES = """ema.safetensors adapter.safetensors adapter_model.safetensors adapter_model.bin
    pytorch_lora_weights.safetensors pytorch_lora_weights.bin learned_embeds.safetensors
    learned_embeds.bin model.pt""".split()
FILES += [*(part + name for part in ("vae/", "") for name in WEIGHTS[::2]), "*.safetensors"]
# what is read beside weights
SMALL = """unet/config.json vae/config.json text_encoder/config.json tokenizer/* scheduler/*
    config.json adapter_config.json */adapter_config.json""".split()
REASONS = {  # of errors, by their names
    "ModuleNotFoundError": "the huggingface_hub library is needed: pip install huggingface_hub",
    "RepositoryNotFoundError": "no such repository, or a private one: check the name, or log in "
    "with `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    "GatedRepoError": "it is gated: accept its terms on the hub, and `hf auth login`",
    "ConnectError": "the hub cannot be reached: check the network and HF_ENDPOINT. What was "
    "downloaded elsewhere (hf download OWNER/NAME --local-dir FOLDER) is named as a folder",
    401: "not logged in, or the token may not do this: `hf auth login`",
}


@contextlib.contextmanager
def _library(what):
    """Give the library, and turn what it raises into a UserError on `what`."""
    try:
        import huggingface_hub

        yield huggingface_hub
    except UserError:
        raise
    except Exception as error:
        usual = f"{reason(error)}; check the name, the network and HF_ENDPOINT, or `hf auth login`"
        usual = REASONS.get(getattr(getattr(error, "response", None), "status_code", None), usual)
        raise UserError(f"{what}: {REASONS.get(type(error).__name__, usual)}") from None


@functools.cache  # a process sees one revision
def local(path: str | Path, sd: bool = False) -> Path:
    """Find a path on this machine: of one of the hub's names the download, else the path itself.

    sd: Stable Diffusion is wanted, as a folder; else, and where there is none, a file: the first of
    FILES, or the only .safetensors. Raises UserError for what cannot be had.
    """
    match = NAME.fullmatch(Path(path).as_posix())  # a Path of Windows turns the slashes
    if match is None:
        if str(path).startswith("hf:"):
            raise UserError(f"{path} is no name on the hub; expected hf:owner/name[/file]")
        return Path(path)
    repo, revision, file = match.groups()
    with _library(path) as hub:
        take = functools.partial(hub.snapshot_download, repo, revision=revision)
        try:
            files = hub.list_repo_files(repo, revision=revision)
        except Exception as error:
            try:
                folder = take(local_files_only=True, allow_patterns=[])
            except Exception:
                raise error from None
            files = glob.glob("**", root_dir=folder, recursive=True)
        pick = lambda names: next(filter(None, (fnmatch.filter(files, name) for name in names)), [])
        wanted = [name for part in PARTS for name in pick(f"{part}/{end}" for end in WEIGHTS)]
        if file or not sd or len(wanted) < 3:
            wanted = pick([glob.escape(file)] if file else FILES)
            if len(wanted) != 1:
                raise UserError(
                    f"{path} is not one file of the repository, which has "
                    f"{some(wanted or files, 20) or 'none'}: give hf:owner/name/file"
                )
            file = wanted[0]
        return Path(take(allow_patterns=[*map(glob.escape, wanted), *SMALL]), file or "")


def upload(name: str, files: dict) -> None:
    """Upload files to a repository, which is made if need be.

    files: by their names there, paths or bytes. Raises UserError if that fails.
    """
    with _library(f"--push_to_hub {name}") as hub:
        hub.create_repo(name, exist_ok=True)
        if files:
            added = [hub.CommitOperationAdd(*row) for row in files.items()]
            hub.create_commit(name, added, commit_message="train.py")
            local.cache_clear()
