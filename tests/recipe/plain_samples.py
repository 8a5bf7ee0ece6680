"""Training samples in the paper's text formats (Appendix B, and the ChatML of the published fine-tuning code), written
down as text and turned into ids, loss mask and pixels without any code of `megatron_qwenvl/data`.

In the texts `=>` marks where the loss starts and `<=` where it ends again.
"""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
]  # fmt: skip
IDS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
"""Special tokens stand behind the 256 byte values."""
_PIECES = re.compile("(=>|<=|" + "|".join(re.escape(name) for name in SPECIAL_TOKENS) + ")")
WORDS = "red green blue circle square below above three small large with and the".split()


@dataclass(frozen=True)
class Example:
    """A sample as it is stored, and the text that the decoder must see."""

    key: str
    record: dict[str, Any]
    image: bytes | None
    text: str

    def stored(self) -> dict[str, Any]:
        """The sample as webdataset writes it."""
        members = {"__key__": self.key, "json": json.dumps(self.record).encode()}
        return members if self.image is None else {**members, "png": self.image}


@dataclass(frozen=True)
class Tokens:
    """A sample as the model sees it.

    Attributes:
        ids: token ids; image slots hold `<imgpad>`.
        loss_mask: whether predicting the token belongs to the loss.
        image_starts: first slot of each image.
        pixels: uint8 `[images, 3, side, side]`.
    """

    ids: list[int]
    loss_mask: list[bool]
    image_starts: list[int]
    pixels: Tensor


def tokens_of(example: Example, slots: int, side: int) -> Tokens:
    """Ids of the bytes and special tokens of an example's text, an image being `slots` positions."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    starts = []
    supervised = False
    for piece in _PIECES.split(example.text):
        if piece in ("=>", "<="):
            supervised = piece == "=>"
            continue
        new = [IDS[piece]] if piece in IDS else list(piece.encode())
        if piece == "<img>":
            starts.append(len(ids) + 1)
            new += [IDS["<imgpad>"]] * slots
        ids += new
        loss_mask += [supervised] * len(new)
    return Tokens(ids, loss_mask, starts, _pixels(example.image, side))


def _pixels(image: bytes | None, side: int) -> Tensor:
    if image is None:
        return torch.empty(0, 3, side, side, dtype=torch.uint8)
    square = Image.open(io.BytesIO(image)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())[None]


def examples(tasks: tuple[str, ...], count: int, seed: int) -> list[Example]:
    """`count` examples with the given tasks in turn."""
    rng = random.Random(seed)
    return [_EXAMPLES[tasks[i % len(tasks)]](f"{i:04d}", rng) for i in range(count)]


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def _noise(rng: random.Random) -> bytes:
    """A PNG of 20x10 random pixels, every third with a palette."""
    pixels = np.frombuffer(rng.randbytes(600), dtype=np.uint8).reshape(10, 20, 3)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if rng.random() < 2 / 3 else image.quantize(16)).save(buffer, "PNG")
    return buffer.getvalue()


def _caption(key: str, rng: random.Random) -> Example:
    caption = _words(rng, 10)
    record = {"task": "caption", "caption": caption, "language": "en"}
    text = f"<img></img>Generate the caption in English:=> {caption}<|endoftext|>"
    return Example(key, record, _noise(rng), text)


def _vqa(key: str, rng: random.Random) -> Example:
    question, answer = _words(rng, 5) + "?", _words(rng, 4)
    record = {"task": "vqa", "question": question, "answer": answer}
    return Example(key, record, _noise(rng), f"<img></img>{question} Answer:=> {answer}<|endoftext|>")


def _referring(key: str, rng: random.Random) -> Example:
    phrase = _words(rng, 3)
    record = {"task": "referring", "phrase": phrase, "boxes": [[2, 1, 12, 8]]}  # of 20x10 pixels
    text = f"<img></img><ref>{phrase}</ref>=><box>(100,100),(600,800)</box><|endoftext|>"
    return Example(key, record, _noise(rng), text)


def _text(key: str, rng: random.Random) -> Example:
    text = _words(rng, 14)
    return Example(key, {"task": "text", "text": text}, None, f"=>{text}<|endoftext|>")


def _chat(key: str, rng: random.Random) -> Example:
    """One or two questions; supervised are answers, `<|im_start|>`, `<|im_end|>` and the newline after it."""
    turns, text = [], "=><|im_start|><=system\nYou are a helpful assistant.=><|im_end|>\n"
    for number in range(rng.randint(1, 2)):
        question, answer = _words(rng, 3) + "?", _words(rng, 3)
        image, shown = (
            ("Picture 1: <img>png</img>\n", "Picture 1: <img></img>\n") if number == 0 else ("", "")
        )
        turns += [{"from": "user", "value": image + question}, {"from": "assistant", "value": answer}]
        text += f"<|im_start|><=user\n{shown}{question}=><|im_end|>\n"
        text += f"<|im_start|><=assistant\n=>{answer}<|im_end|>\n"
    return Example(key, {"task": "chat", "conversations": turns}, _noise(rng), text)


_EXAMPLES = {"caption": _caption, "vqa": _vqa, "referring": _referring, "text": _text, "chat": _chat}
