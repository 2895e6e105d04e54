"""The batches of latent mode: the data's latents and captions, encoded once by frozen networks."""

from pathlib import Path

import numpy as np

from .. import UserError
from ..config import Config, sides
from ..data.batches import Batches, Pixels
from ..data.buckets import BucketBatches, bucket_sizes, read_shapes
from ..data.cache import Cache
from ..data.image_set import digest
from ..data.latents import EncodedBatches, caption_embeddings, image_latents, weights_digest
from ..data.stream import StreamBatches
from ..files.text_files import read_prompt_lines
from ..runtime.distributed import log
from ..sampling.codec import LatentCodec
from ..sampling.conditioning import Prompts

MAX_CAPTIONS = 100  # of an image


def encode_batches(
    config: Config, source: Batches | StreamBatches, codec: LatentCodec, prompts: Prompts | None
) -> EncodedBatches | StreamBatches:
    """Encode the images and captions of pixel batches; those of a stream are when they come.

    Raises UserError if captions are needed and there are none.
    """
    captioned = source.captioned if config.streaming else source.pixels.images.texts is not None
    if config.condition == "text" and not captioned:
        raise UserError(
            f"--condition text: {config.data} has no captions; put name.txt beside each image, "
            "or a metadata.jsonl or .csv, name its column by --caption_column, or give "
            "--default_caption"
        )
    if config.streaming:
        return source
    return encode_images(config, source.pixels, codec, prompts, config.seed)


def encode_images(
    config: Config, pixels: Pixels, codec: LatentCodec, prompts: Prompts | None, seed: int
) -> EncodedBatches:
    """Encode images, and their captions where the network reads texts; both are cached."""
    c = config
    folder = Path(c.cache_dir)

    def encode(pixels: Pixels) -> Cache:
        h, w = sides(pixels.size)
        return image_latents(
            pixels,
            codec.moments,
            f"{codec.digests['VAE']} {codec.amp}",
            (codec.channels, h // codec.factor, w // codec.factor),
            c.flip,
            folder,
            codec.device,
        )

    if c.aspect_buckets:
        pixels, shapes = read_shapes(pixels, folder)
    text = (None, None)
    if c.condition == "text":
        text = encode_captions(pixels.images.texts, prompts, folder)
    parts = (pixels, c.batch_size, seed, c.flip)
    if c.aspect_buckets:
        sizes = bucket_sizes(c.image_size, codec.factor)
        return BucketBatches(encode, sizes, shapes, *parts, None, *text)
    return EncodedBatches(*parts, encode(pixels), *text)


def encode_captions(
    texts: list[tuple[str, ...]], prompts: Prompts, cache_dir: Path
) -> tuple[Cache, np.ndarray]:
    """Encode every different caption, the empty one last; and number each image's captions.

    Gives ids (U, L) for a text encoder that is trained along, else embeddings (U, L, D); and
    (N, K) indices, -1 where an image has fewer than K captions.
    """
    if long := sum(len(captions) > MAX_CAPTIONS for captions in texts):
        log(f"warning: {long} images have more than {MAX_CAPTIONS} captions; the first are used")
        texts = [captions[:MAX_CAPTIONS] for captions in texts]
    warn_of_long(prompts, [caption for captions in texts for caption in captions])
    every = sorted({caption for captions in texts for caption in captions} - {""}) + [""]
    number = {caption: i for i, caption in enumerate(every)}
    text_of = np.full((len(texts), max(map(len, texts))), -1)
    for row, captions in zip(text_of, texts):
        row[: len(captions)] = [number[caption] for caption in captions]
    if prompts.joint:
        return prompts.encode(every), text_of
    tokenizer = prompts.tokenizer
    key = digest(
        weights_digest(prompts.encoder),
        str(prompts.skip),
        *map(str, tokenizer.merges),
        str(tokenizer.added),
    )
    shape = (tokenizer.context_length, prompts.encoder.config.hidden_size)
    return caption_embeddings(every, prompts.encode, key, shape, cache_dir), text_of


def warn_of_long(prompts: Prompts, captions: list[str]) -> None:
    """Print how many captions are longer than the text encoder reads."""
    limit = prompts.tokenizer.context_length - 2
    if long := sum(len(prompts.tokenizer.encode(caption)) > limit for caption in captions):
        log(
            f"warning: {long} of {len(captions)} captions are longer than {limit} tokens; what "
            "is beyond is not read"
        )


def grid_prompts(
    config: Config, batches: EncodedBatches | StreamBatches, prompts: Prompts | None
) -> list[str]:
    """Choose the prompts of the sample grids: --validation_prompts, or captions of the data."""
    if config.validation_prompts is not None:
        return read_prompt_lines(Path(config.validation_prompts.removeprefix("@")))
    if config.condition != "text":
        return []
    if config.streaming:
        captions = [texts[0] for _, _, texts in batches.first]
        warn_of_long(prompts, captions)
        return captions
    chosen = [*batches.held_out, *batches.train][: max(1, config.num_samples)]
    return [batches.pixels.images.captions[i] for i in chosen]
