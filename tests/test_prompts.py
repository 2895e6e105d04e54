"""Prompts in A1111's syntax: weights, escapes, BREAK and LoRAs by name, against its formulas.

The oracle computes them from what is published: the grammar's documented examples, its rule for
commas at the end of a chunk, and weights times vectors with the mean restored, over transformers'
own text encoder and tokenizer.
"""

import shutil
import time

import numpy as np
import pytest
import tiny_sd
import torch
from PIL import Image

from diffusion import UserError
from diffusion.files import adapter_files
from diffusion.models import lora
from diffusion.models.prompt_syntax import parse
from diffusion.models.tokenizer import byte_level
from diffusion.sampling.conditioning import MAX_PROMPT, Request
from diffusion.sampling.load import load

# --- the grammar ---------------------------------------------------------------------------------

EXAMPLES = {  # the web UI's own
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
    ],
}  # fmt: skip
OTHERS = {
    "": [("", 1.0)], "()": [("", 1.0)], "((red))": [("red", 1.1 * 1.1)], "[red]": [("red", 1 / 1.1)],
    "[[red": [("red", 1 / 1.1 / 1.1)], "a)b]c": [("a)b]c", 1.0)], ":) x:1.4)": [(":) x:1.4)", 1.0)],
    "(a: -.5 )": [("a", -0.5)], "(a:+2)": [("a", 2.0)], "(a:1.)": [("a", 1.0)], "(a:0)": [("a", 0.0)],
    "(a:1e400)": [("a:1e400", 1.1)], "(a:nan)": [("a:nan", 1.1)], "(a:1.2.3)": [("a:1.2.3", 1.1)],
    r"a\b\\c\[d": [(r"ab\c[d", 1.0)], "[0.5]": [("0.5", 1 / 1.1)], "(a[b)c]": [("a", 1.1), ("b", 1.0), ("c", 1 / 1.1)],
    "a BREAK b": [("a ", 1.0), (None, 1.0), (" b", 1.0)], "aBREAK break": [("aBREAK break", 1.0)],
    "(a BREAK b:2)": [("a ", 2.0), (None, 2.0), (" b", 2.0)], "a < b > c <d>": [("a < b > c <d>", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", [*EXAMPLES, *OTHERS])
def test_pieces_of_a_prompt(prompt):
    found, expected = parse(prompt), (EXAMPLES | OTHERS)[prompt]
    assert [text for text, _ in found] == [text for text, _ in expected]
    exact = prompt in EXAMPLES
    for (_, weight), (_, value) in zip(found, expected):
        assert weight == (value if exact else pytest.approx(value))


@pytest.mark.parametrize("prompt, named", [
    ("a <lora:fox:0.8>", "lora:fox:0.8.*lora_dir"), ("<lyco:x>", "lyco:x"), ("<LORA:x:1>", "LORA:x:1"),
    ("<hypernet:style:1> a", "hypernet:style"), ("a [cat:dog:0.5]", r"cat:dog:0.5"), ("[dog: 3 ]", "dog"),
    ("[cat|dog] x", r"cat\|dog"), ("(x:1e400) (y:99999)", "'y'.*99999"), ("(x:" + "9" * 400 + ")", "'x'.*inf"),
    ("((x:0):" + "9" * 400 + ")", "'x'.*nan"), ("(" * 200, r"\("), ("[" * 20000, r"\["),
])  # fmt: skip
def test_what_is_not_read_is_named(prompt, named):
    with pytest.raises(UserError, match=named):
        parse(prompt)


def test_the_refusal_names_the_way_out_and_escapes_are_none():
    with pytest.raises(UserError, match=r"'\[name\|nick\]' .*--plain_prompts"):
        parse("[name|nick]")
    for prompt in (r"[a\|b]", r"[a:b\:0.5]"):
        assert [weight for _, weight in parse(prompt)] == [pytest.approx(1 / 1.1)]


@pytest.mark.parametrize(
    "text", [":1", "BREAK ", "<lora:", "[a", "\\", " ", ": ", "[a|", "(a)", "[:1", "é"]
)
def test_reading_takes_no_more_than_moments(text):
    start = time.perf_counter()
    try:
        parse(text * (MAX_PROMPT // len(text)))
    except UserError:
        pass
    assert time.perf_counter() - start < 5


def test_a_word_of_100_000_letters():
    letters = np.random.default_rng(0).choice(list("etaoinshrdlu"), 100_000)
    start = time.perf_counter()
    assert len(byte_level().encode("".join(letters))) == 100_000
    assert time.perf_counter() - start < 20


# --- what the network is given -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_sd.save_folder(folder)
    return folder


@pytest.fixture(scope="module")
def a1111(tiny):
    """Compute what A1111 gives the U-Net for one prompt, of pieces with weights."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle")
    encoder = transformers.CLIPTextModel.from_pretrained(tiny / "text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids

    def chunked(pieces) -> list:
        done, tokens, last_comma = [], [], -1
        for text, weight in pieces:
            if text == "BREAK":
                done.append(tokens)
                tokens, last_comma = [], -1
                continue
            for token in tokenizer(text, add_special_tokens=False).input_ids:
                if token == comma:
                    last_comma = len(tokens)
                elif len(tokens) == 75 and last_comma != -1 and 75 - last_comma <= 20:
                    done.append(tokens[: last_comma + 1])
                    tokens, last_comma = tokens[last_comma + 1 :], -1
                if len(tokens) == 75:
                    done.append(tokens)
                    tokens, last_comma = [], -1
                tokens.append((token, weight))
        return done + [tokens] if tokens or not done else done

    @torch.no_grad()
    def compute(pieces, chunks: int, skip: int = 1) -> torch.Tensor:
        out = []
        cut = chunked(pieces)
        assert len(cut) <= chunks
        for chunk in cut + [[]] * (chunks - len(cut)):
            fill = 75 - len(chunk)
            ids = torch.tensor([[bos, *(i for i, _ in chunk), eos, *[eos] * fill]])
            weights = torch.tensor([1.0, *(w for _, w in chunk), 1.0, *[1.0] * fill])
            z = encoder(ids, output_hidden_states=True).hidden_states[-skip]
            text_model = getattr(encoder, "text_model", encoder)
            z = text_model.final_layer_norm(z)
            original_mean = z.mean()
            z = z * weights[None, :, None]
            out.append(z * (original_mean / z.mean()))
        return torch.cat(out, 1)[0]

    return compute


def context(pipeline, prompts, **options):
    request = Request(len(prompts), prompts=prompts, **options)
    return pipeline.conditioning.of_request(request, False)[0].context


LONG = "a red fox, " * 12 + "and " * 10  # 12 x 9 + 30 tokens in this vocabulary
PROMPTS = {
    "a (red:1.4) fox": [("a ", 1.0), ("red", 1.4), (" fox", 1.0)],
    "[a fox": [("a fox", 1 / 1.1)],
    "(a:-1) fox (of:0) it": [("a", -1.0), (" fox ", 1.0), ("of", 0.0), (" it", 1.0)],
    "a fox BREAK (red:1.3)": [("a fox", 1.0), ("BREAK", -1), ("red", 1.3)],
    "BREAK a BREAK BREAK b BREAK": [("BREAK", 0), ("a", 1.0), ("BREAK", 0), ("BREAK", 0), ("b", 1.0), ("BREAK", 0)],
    f"({LONG}:1.2) x": [(LONG, 1.2), (" x", 1.0)],
    "(" + "x, " * 90 + ")": [("x, " * 90, 1.1)],
    "(" + "x " * 55 + ", " + "x " * 30 + ":0.7)": [("x " * 55 + ", " + "x " * 30, 0.7)],
    "(" + "x " * 54 + ", " + "x " * 30 + ":0.7)": [("x " * 54 + ", " + "x " * 30, 0.7)],
    "(" + "x " * 75 + ":2), b": [("x " * 75, 2.0), (", b", 1.0)],
    r"\(a\) fox" + " x" * 80: [("(a) fox" + " x" * 80, 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(PROMPTS)))
@pytest.mark.parametrize("skip", [1, 2])
def test_vectors_are_those_of_a1111(tiny, a1111, number, skip):
    prompt = list(PROMPTS)[number]
    pipeline = load(tiny, amp="no", clip_skip=skip)
    ours = context(pipeline, [prompt])
    assert ours.shape[1] % 77 == 0
    expected = a1111(PROMPTS[prompt], ours.shape[1] // 77, skip)
    assert torch.allclose(ours[0], expected, atol=1e-5, rtol=1e-5)
    plain = context(pipeline, [prompt], plain_prompts=True)
    assert plain.shape != ours.shape or (plain - ours).abs().max() > 1e-3


def test_batch_mates_change_nothing(tiny, a1111):
    pipeline = load(tiny, amp="no")
    prompts = ["a (red:1.4) fox", "a fox", "x " * 100, "a BREAK b"]
    options = pipeline.prompted(prompts, "(bad:1.2)")
    together = options(range(4))
    assert together["chunks"] == 2 and together["plain_prompts"] is False
    rows = pipeline.conditioning.of_request(Request(4, **together), True)
    for i in range(4):
        alone = pipeline.conditioning.of_request(Request(1, **options([i])), True)
        for row, one in zip(rows, alone):
            assert torch.allclose(row.context[i : i + 1], one.context, atol=1e-5)
    assert torch.allclose(rows[1].context[0], a1111([("bad", 1.2)], 2), atol=1e-5)
    # a prompt without syntax keeps its vectors beside one that has it
    plain = context(pipeline, ["a fox"])
    assert torch.equal(
        context(pipeline, ["a fox"] * 2 + ["(a)"])[:1], context(pipeline, ["a fox"] * 3)[:1]
    )
    assert torch.allclose(plain, context(pipeline, ["a fox"], plain_prompts=False), atol=0)


def test_prompts_without_syntax_are_read_as_before(tiny):
    pipeline = load(tiny, amp="no")
    prompts = ["a fox: red, 10:30 :) 50% {x} a|b ]) <my-cat>", "x " * 100]
    options = pipeline.prompted(prompts)(range(2))
    assert options["plain_prompts"] is True and options["chunks"] == 2
    assert context(pipeline, prompts).shape == (2, 2 * 75 + 2, 16)
    assert torch.equal(context(pipeline, prompts), context(pipeline, prompts, plain_prompts=True))


def test_embeddings_in_brackets(tiny, tmp_path):
    torch.save({"<my-cat>": torch.randn(3, 16)}, tmp_path / "cat.bin")
    pipeline = load(tiny, embeddings=[tmp_path / "cat.bin"])
    (chunk,) = pipeline.conditioning.tokenizer.weighted_chunks("a (<my-cat>:1.5) [cat]")
    ids = pipeline.conditioning.tokenizer.embeddings["<my-cat>"]
    assert [pair for pair in chunk if pair[0] in ids] == [(i, 1.5) for i in ids] + [
        (i, 1 / 1.1) for i in ids
    ]


def test_an_embedding_moves_to_the_next_chunk_as_one(tiny, tmp_path):
    """As in the web UI; one that is longer than a chunk is cut."""
    torch.save({"<my-cat>": torch.randn(6, 16)}, tmp_path / "cat.bin")
    torch.save({"<my-dog>": torch.randn(80, 16)}, tmp_path / "dog.bin")
    tokenizer = load(
        tiny, embeddings=[tmp_path / "cat.bin", tmp_path / "dog.bin"]
    ).conditioning.tokenizer
    before = len(tokenizer.encode("x"))
    prompt = "x " * (72 // before) + "(<my-cat>:1.5)"
    first, second = tokenizer.weighted_chunks(prompt)
    ids = tokenizer.embeddings["<my-cat>"]
    assert len(first) == 72 // before * before and second == [(i, 1.5) for i in ids]
    first, second = tokenizer.weighted_chunks("(<my-dog>:1.5)")
    assert (len(first), len(second)) == (75, 5)


def test_models_with_a_text_encoder_of_their_own(scratch):
    """Chunks of its own length; a prompt without syntax is cut off, as in its training."""
    pipeline = load(scratch)
    plain, weighted, broken = (context(pipeline, [p]) for p in ("red hair", "red (hair:1.5)", "red BREAK hair"))  # fmt: skip
    assert plain.shape == weighted.shape == (1, 64, 32) and broken.shape == (1, 128, 32)
    tokenizer = pipeline.conditioning.tokenizer
    weights = torch.tensor([1.0] * 4 + [1.5] * 4 + [1.0] * 56)
    assert tokenizer("red hair")[0, :9].tolist() == [tokenizer.bos_id, *tokenizer.encode("red hair"), tokenizer.eos_id]  # fmt: skip
    expected = plain * weights[:, None]
    expected = expected * plain.mean() / expected.mean()
    assert torch.allclose(weighted, expected, atol=1e-5)


def test_captions_are_no_syntax(scratch, tmp_path, capsys):
    from diffusion.evaluation.__main__ import captions_in_turn

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("(red:1.4) [hair")
    pipeline = load(scratch)
    given = captions_in_turn(str(tmp_path), [tmp_path / "a.png"], pipeline)([0])
    assert given["prompts"] == ["(red:1.4) [hair"] and given["plain_prompts"] is True
    assert "--plain_prompts" not in capsys.readouterr().out.split("next: ")[0]


# --- through the commands ------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, tmp_path):
    """sample.py of two steps in this process: the pictures of a folder."""
    from diffusion.commands import sample

    def main(tiny, name, *args):
        given = ["--sd_path", tiny, "--steps", 2, "--save_folder", tmp_path / name, "--device", "cpu", "--amp", "no"]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["sample", *map(str, [*given, *args])])
        sample.main()
        files = sorted((tmp_path / name / "images").glob("*.png"))
        return [(np.asarray(Image.open(f)), Image.open(f).text["parameters"]) for f in files]

    return main


def test_the_default_and_plain_prompts(tiny, call, capsys):
    typed = "a (red:1.9) fox"
    (weighted, text), = call(tiny, "a", "--prompt", typed)  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("--plain_prompts") == 1 and "'red', 1.9" in said
    assert text.startswith(typed + "\n")
    ((plain, _),) = call(tiny, "b", "--prompt", typed, "--plain_prompts")
    assert "--plain_prompts" not in capsys.readouterr().out.split("next: ")[0]
    assert (plain != weighted).any()
    ((other, _),) = call(tiny, "c", "--prompt", "a red fox")
    assert (other != weighted).any() and "--plain_prompts" not in capsys.readouterr().out
    ((escaped, _),) = call(tiny, "d", "--prompt", r"a \(red:1.9\) fox")
    assert abs(escaped.astype(int) - plain).max() <= 1


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """A folder of LoRAs: fox.v1, and wolf in two places."""
    parts = {"unet": load(tiny, amp="no").model}
    lora.inject(parts["unet"], lora.find(parts["unet"], "attention"), 1, 1.0)
    states = lora.state(parts["unet"])
    for branch in states.values():
        branch.up.fill_(0.3)
    folder = tmp_path_factory.mktemp("x") / "loras"
    (folder / "sub").mkdir(parents=True)
    adapter_files.write_diffusers(folder / "sub" / "fox.v1.safetensors", {"unet": states})
    for place in ("wolf", "sub/wolf", "../outside"):
        shutil.copy(folder / "sub" / "fox.v1.safetensors", folder / f"{place}.safetensors")
    return folder


def test_loras_by_name(tiny, call, loras):
    typed = "a fox <lora:fox.v1:0.5>"
    named = call(
        tiny, "a", "--lora_dir", loras, "--prompt", typed, "--prompt", "<lora:fox.v1:.5> b"
    )
    given = call(tiny, "b", "--lora", f"{loras}/sub/fox.v1.safetensors:0.5", "--prompt", "a fox", "--prompt", "b")  # fmt: skip
    without = call(tiny, "c", "--prompt", "a fox", "--prompt", "b")
    for (a, _), (b, _), (c, _) in zip(named, given, without):
        assert (a == b).all() and (a != c).any()
    assert named[0][1].startswith(typed + "\n") and 'Lora: "fox.v1:0.5"' in named[0][1]
    full = call(tiny, "d", "--lora_dir", loras, "--prompt", "a fox<lora:fox.v1>")
    assert "fox.v1:1" in full[0][1]


@pytest.mark.parametrize("args, named", [
    (["--prompt", "a <lora:fox.v1:1>"], "lora:fox.v1:1.*lora_dir"),
    (["--prompt", "a <lora:nofox>", "--lora_dir", "{}"], "'nofox'.*none"),
    (["--prompt", "a <lora:wolf>", "--lora_dir", "{}"], "loras/sub/wolf.*loras/wolf"),
    (["--prompt", "a <lora:../outside>", "--lora_dir", "{}"], "outside.*none"),
    (["--prompt", "a <lora:sub/fox.v1>", "--lora_dir", "{}"], "sub/fox.v1.*none"),
    (["--prompt", "a <lora:*>", "--lora_dir", "{}"], r"'\*'.*none"),
    (["--prompt", "<lora:fox.v1:5000>", "--lora_dir", "{}"], "lora is .*5000"),
    (["--prompt", "a fox", "--lora_dir", "{}"], "no effect.*lora:NAME"),
    (["--prompt", "<lora:fox.v1:1:0.5>", "--lora_dir", "{}"], "lora:fox.v1:1:0.5"),
    (["--prompt", "<lora:fox.v1:1e3>", "--lora_dir", "{}"], "lora:fox.v1:1e3"),
    (["--prompt", "<hypernet:fox.v1:1>", "--lora_dir", "{}"], "hypernet"),
    (["--prompt", "a", "--negative_prompt", "<lora:fox.v1:1>", "--lora_dir", "{}"], "lora:fox.v1"),
    (["--prompt", "a <lora:fox.v1:1>", "--prompt", "b", "--lora_dir", "{}"], "fox.v1"),
    (["--prompt", "a", "--lora_dir", "{}", "--plain_prompts"], "lora_dir.*plain_prompts"),
    (["--plain_prompts"], "plain_prompts.*--prompt"), (["--lora_dir", "{}"], "lora_dir.*--prompt"),
    (["--prompt", "(x:99999)"], "'x'.*99999"),
    (["--prompt", "a", "--lora_dir", "{}/nowhere"], "--lora_dir .*nowhere"),
])  # fmt: skip
def test_mistakes_in_tags(tiny, call, loras, tmp_path, args, named):
    with pytest.raises(UserError, match=named):
        call(tiny, "s", *(arg.format(loras) for arg in args))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("text, plain", [
    ("a" * 4_000_000, []), ("a fox, " * 600_000, ["--plain_prompts"]), ("(" * 4_000_000, []),
])  # fmt: skip
def test_a_prompt_of_megabytes(tiny, call, tmp_path, text, plain):
    (tmp_path / "p.txt").write_text(f"a fox\n{text}\n")
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"{len(text):,}.*{MAX_PROMPT:,}") as error:
        call(tiny, "s", "--prompt", f"@{tmp_path / 'p.txt'}", *plain)
    assert len(str(error.value)) < 500 and time.perf_counter() - start < 20
    with pytest.raises(UserError, match="prompt is .*UTF-8") as error:
        call(tiny, "s", "--prompt", text + "\udcff", *plain)
    assert len(str(error.value)) < 500


def test_visualize_reads_prompts_too(scratch, tmp_path, monkeypatch, capsys):
    from diffusion.commands import visualize

    seen = []
    monkeypatch.setattr("diffusion.pictures.views.Gallery.draw", lambda self, *_: seen.append(self.options([0])))  # fmt: skip
    for args in (["--prompt", "(a:1.5)"], ["--prompt", "(a:1.5)", "--plain_prompts"], []):
        monkeypatch.setattr("sys.argv", ["visualize", "--load_path", str(scratch), "--save_folder", str(tmp_path),
                                         "--device", "cpu", "--amp", "no", "--steps", "2", *args])  # fmt: skip
        visualize.main()
    assert [given["plain_prompts"] for given in seen] == [False, True, True]
    lines = capsys.readouterr().out.splitlines()
    assert sum("--plain_prompts" in line for line in lines if not line.startswith("next: ")) == 1
