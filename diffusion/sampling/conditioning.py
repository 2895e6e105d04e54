"""What a network is conditioned on: nothing, a class, or a text.

The same object serves both ways: training turns batches into `Cond` and drops some of it, for
classifier-free guidance; sampling turns what a caller asks for into a pair of `Cond`, with and
without the condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import UserError, shown
from ..data.batch import Batch
from ..data.batches import move
from ..data.latents import settings_digest, weights_digest
from ..models.clip import CLIPTextModel, encode_chunks
from ..models.cond import Cond
from ..models.prompt_syntax import parse
from ..models.tokenizer import Tokenizer
from ..runtime.distributed import log

MAX_PROMPT = 1 << 16  # characters; captions are cut off at as many bytes


@dataclass(frozen=True)
class Request:
    """Hold what n pictures are asked for with; None: not given.

    plain_prompts: whether prompts are taken as they stand, or else read as A1111 reads them. None:
    as they stand, unless one of them has A1111's syntax.
    """

    n: int
    labels: Tensor | None = None  # (n,) int64, the null label where there is none
    prompts: Sequence[str] | None = None
    negative_prompts: Sequence[str] | None = None
    chunks: int | None = None  # in how many every prompt is read; None: as the longest needs
    plain_prompts: bool | None = None
    amp: torch.dtype | None = None  # autocast type of networks in float32


def check_no_text(request: Request) -> None:
    if request.prompts is not None or request.negative_prompts is not None:
        raise UserError("this model reads no text: it takes no prompts")


class WithoutNetwork:
    """Need no network of its own: all that the condition depends on is in the configuration."""

    digests = {}

    def of_networks(self, networks: dict[str, nn.Module]):
        return self


@dataclass(frozen=True, eq=False)
class Unconditional(WithoutNetwork):
    """Condition on nothing. classes: those of the data, all the same."""

    classes: Sequence[str] = ()

    def of_batch(self, batch: Batch, drop: Tensor) -> Cond:
        return Cond()

    def of_request(self, request: Request, guided: bool) -> tuple[Cond, Cond]:
        """Give (Cond(), Cond()). Raises UserError if anything is asked for."""
        check_no_text(request)
        if request.labels is not None or guided:
            raise UserError(
                "this model was trained without --condition class: it takes no class label and "
                "no guidance but by another model, --guide"
            )
        return Cond(), Cond()


@dataclass(frozen=True, eq=False)
class ClassLabels(WithoutNetwork):
    """Condition on one of `classes`, by its index; the index behind the last means none."""

    classes: Sequence[str]
    device: torch.device = torch.device("cpu")

    def of_batch(self, batch: Batch, drop: Tensor) -> Cond:
        """Give the labels of a batch; null where `drop` (b,) says so, or an image has none."""
        dropped = drop | (batch.labels < 0)
        return Cond(labels=move(batch.labels.masked_fill(dropped, len(self.classes)), self.device))

    def of_request(self, request: Request, guided: bool) -> tuple[Cond, Cond]:
        check_no_text(request)
        if request.labels is None and guided:
            raise UserError("guidance leads towards a class: give a class label with it")
        null = torch.full((request.n,), len(self.classes), device=self.device)
        labels = null if request.labels is None else request.labels.to(self.device)
        return Cond(labels=labels), Cond(labels=null)


@dataclass(frozen=True, eq=False)
class Prompts:
    """Condition on a text, by what a text encoder makes of it.

    skip: 1 reads the encoder's last layer, n the n-th from the end (A1111's and kohya's clip skip).
    joint: the encoder is part of the network that is trained, which is then given ids. Prompts are
        cut off after the context length, as in its training; otherwise they are read in chunks.
    """

    tokenizer: Tokenizer
    encoder: CLIPTextModel | None
    skip: int = 1
    joint: bool = False
    classes: Sequence[str] = ()
    device: torch.device = torch.device("cpu")

    def of_batch(self, batch: Batch, drop: Tensor) -> Cond:
        """Give the texts of a batch; the empty one where `drop` (b,) says so."""
        if batch.text is None:  # a stream's captions are not encoded beforehand
            captions = ["" if dropped else c for c, dropped in zip(batch.captions, drop.tolist())]
            text = self.encode(captions).clone()  # a clone may take part in backward
        else:
            text = batch.text.clone()
            text[drop] = batch.empty
        text = move(text, self.device) if text.device.type == "cpu" else text
        return Cond(context=text.float() if text.is_floating_point() else text)

    def encode(self, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        """Give what the network is trained on: ids (B, L), or embeddings (B, L, D)."""
        return self.tokenizer(prompts) if self.joint else self.embed(prompts, chunks)

    def read(
        self, prompts: Sequence[str], chunks: int | None, plain: bool | None
    ) -> tuple[int, bool]:
        """Choose in how many chunks all of these prompts are read, and whether as they stand.

        chunks, plain: what is decided already, see `Request`. Raises UserError for a prompt of
        absurd length, and for what `parse` does not take.
        """
        for prompt in prompts:
            if len(prompt) > MAX_PROMPT:
                raise UserError(
                    f"prompt {shown(prompt)} has {len(prompt):,} characters; give at most "
                    f"{MAX_PROMPT:,}"
                )
            if plain is None and (pieces := parse(prompt)) != [(prompt, 1.0)]:
                plain = False
                log(
                    f"prompts are read as A1111 reads them: {shown(prompt)} is {shown(pieces)}; "
                    "--plain_prompts takes them as they stand"
                )
        if chunks is not None:
            return chunks, plain is not False
        if plain is False:
            return max(len(self.tokenizer.weighted_chunks(prompt)) for prompt in prompts), False
        return 1 if self.joint else self.tokenizer.count_chunks(prompts), True

    @torch.no_grad()  # and not inference_mode: a table may be learned with what this gives
    def embed(
        self,
        prompts: Sequence[str],
        chunks: int = 1,
        amp: torch.dtype | None = None,
        plain: bool = True,
    ) -> Tensor:
        """Give what the U-Net attends to, (B, chunks (L - 2) + 2, D), or (B, chunks L, D).

        amp: the autocast type of an encoder that was trained along. plain: see `Request`.
        """
        if plain:
            ids = self.tokenizer(prompts, chunks=chunks)
            weights = None
        else:
            cut = list(map(self.tokenizer.weighted_chunks, prompts))
            ids, weights = self.tokenizer.rows(cut, chunks)
        with torch.autocast(self.device.type, amp, enabled=self.joint and amp is not None):
            return encode_chunks(self.encoder, ids.to(self.device), self.skip, weights)

    def of_request(self, request: Request, guided: bool) -> tuple[Cond, Cond]:
        if request.labels is not None:
            raise UserError("this model reads prompts: it takes no class label")
        texts = [
            [""] * request.n if given is None else list(given)
            for given in (request.prompts, request.negative_prompts)
        ]
        chunks, plain = self.read(sum(texts, []), request.chunks, request.plain_prompts)
        read = [self.embed(part, chunks, request.amp, plain) for part in texts[: 1 + guided]]
        return Cond(context=read[0]), Cond(context=read[-1])

    def in_turn(
        self, prompts: Sequence[str], negative: str = "", plain: bool | None = None
    ) -> Callable[..., dict]:
        """Make a function of indices that gives the options of `Pipeline.frames`, prompts in turn.

        All are read in one way and in as many chunks as the longest needs, so that batch mates
        change nothing. plain: see `Request.plain_prompts`.
        """
        chunks, plain = self.read([*prompts, negative], None, plain)
        return lambda indices: {
            "prompts": [prompts[i % len(prompts)] for i in indices],
            "negative_prompts": [negative] * len(indices),
            "chunks": chunks,
            "plain_prompts": plain,
        }

    def of_networks(self, networks: dict[str, nn.Module]) -> "Prompts":
        """Read texts by the encoder among a trained module's networks, where it has one."""
        return replace(self, encoder=networks["text_encoder"]) if self.joint else self

    @cached_property
    def digests(self) -> dict:
        """Describe the tokenizer, and the frozen network that the condition depends on."""
        t = self.tokenizer  # with its own words: training may have added one
        own = {"tokenizer": settings_digest([t.vocab, t.merges, t.pad, t.context_length])}
        if not self.joint:
            own["text encoder"] = weights_digest(self.encoder)
            own["text encoder configuration"] = settings_digest(self.encoder.config.to_dict())
        return own
