r"""Read prompts as AUTOMATIC1111's web UI does: weights, escapes, BREAK, and the tags of LoRAs.

    (red)   1.1 times       (red:1.4)   1.4 times           \( \) \[ \] \\    the character itself
    [red]   1 / 1.1 times   BREAK       the next chunk      <lora:name:0.8>   a LoRA, its weight

Weights of nested brackets multiply. A bracket that is never closed reaches to the prompt's end, one
that closes nothing is text, a backslash before any other character is dropped. The web UI's prompt
editing ([a:b:0.5]), alternation ([a|b]) and hypernetworks are refused by name.
"""

import re
from itertools import groupby

from .. import UserError, shown

MAX_WEIGHT = 1000  # far beyond it numbers overflow
MAX_DEPTH = 72  # 1.1 ** 72 is below the largest weight
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+))"
# an escape, a bracket, a weight, other text
TOKEN = re.compile(rf"\\[\\()\[\]]?|[()\[\]]|:\s*{NUMBER}\s*\)|[^\\()\[\]:]+|:")
CLOSE = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}
BREAK = re.compile(r"\b(BREAK)\b")
LORA = re.compile(rf"(?i)<(?:lora|lyco):([^<>:]+)(?::{NUMBER})?>")
TAG = r"(?i:<(?:lora|lyco|hypernet):[^<>]*>)"
INSIDE = r"(?:\\.|[^\[\]\\])*"  # of brackets
ALTERNATION = rf"(?={INSIDE}\])(?:\\.|[^\[\]\\|])*\|{INSIDE}\]"
EDITING = rf"(?<!\\)\[(?:{ALTERNATION}|{INSIDE}:\s*[\d.]+\s*\])"
UNREAD = re.compile(f"{TAG}|{EDITING}")


def parse(prompt: str) -> list[tuple[str | None, float]]:
    """Split a prompt into texts with their weights, as the web UI does; None: BREAK.

    Raises UserError, which names it, for what is not supported, and for absurd weights.
    """
    if match := UNREAD.search(prompt):
        raise UserError(
            f"{shown(match[0])} in a prompt is not supported, as prompt editing, alternation and "
            r"hypernetworks are not: --plain_prompts takes it as it stands, \[ is a bracket of the "
            "text; <lora:NAME:WEIGHT> is read from --prompt of sample.py with --lora_dir FOLDER"
        )
    pieces: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= factor

    for match in TOKEN.finditer(prompt):
        token = match[0]
        if token[0] == "\\":
            pieces.append([token[1:], 1.0])
        elif token in opened:
            if len(opened[token]) == MAX_DEPTH:
                raise UserError(f"prompt {shown(prompt)}: more than {MAX_DEPTH} {token} are open")
            opened[token].append(len(pieces))
        elif match[1] and opened["("]:
            close("(", float(match[1]))
        elif token in CLOSE and opened[CLOSE[token][0]]:
            close(*CLOSE[token])
        else:
            pieces += [[None if i % 2 else p, 1.0] for i, p in enumerate(BREAK.split(token))]
    for bracket, factor in CLOSE.values():
        while opened[bracket]:
            close(bracket, factor)
    found = []
    for (new_chunk, weight), same in groupby(pieces, lambda piece: (piece[0] is None, piece[1])):
        text = None if new_chunk else "".join(piece[0] for piece in same)
        if not abs(weight) <= MAX_WEIGHT:
            raise UserError(f"{shown(text)} has weight {weight:g}; weights go to {MAX_WEIGHT}")
        found.append((text, weight))
    return found or [("", 1.0)]
