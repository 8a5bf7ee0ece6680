"""The front of this room: a record and its images to token ids with a loss mask.

Indexing counts tokens with it, the reader makes training samples with it, and generation makes prompts with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwenvl.data.records.dialogues import Chat
from megatron_qwenvl.data.records.tasks import TaskRecord

from .chatml import write_dialogue
from .formats import write_task
from .token_builder import DEFAULT_OPTIONS, ImageInfo, RenderOptions, TokenBuilder, TokenizedSample
from .tokenizer import Tokenizer

RENDERING_VERSION = 6
"""Raised whenever a record may render to other tokens, or is accepted or refused where it was not before: an index
made by another version is refused, as its lengths would be wrong. `test_rendering_version.py` watches.
"""


@dataclass(frozen=True)
class Renderer:
    """Renders the records of one directory.

    Attributes:
        tokenizer: the vocabulary.
        image_tokens: slots of one image; 0 counts the tokens of the text alone.
        language: `en` or `zh`, of the caption prompt where a record does not name its own.
        options: how a record is rendered where there is a choice.
    """

    tokenizer: Tokenizer
    image_tokens: int
    language: str = "en"
    options: RenderOptions = DEFAULT_OPTIONS

    def render(self, record: TaskRecord, images: Sequence[ImageInfo], answer: bool = True) -> TokenizedSample:
        """Render a whole record for training, or its prompt for generation.

        Args:
            record: what the sample's `json` or `txt` file holds.
            images: the sample's images, in the order of its image files.
            answer: include the answer. Without it the result ends where the answer begins; the record's own answer
                is not used and may be missing. Pure text is its own prompt.

        Raises:
            SampleError: the images do not match the record, a box is invalid, markup does not parse, or the answer is
                wanted and missing.
        """
        builder = TokenBuilder(self.tokenizer, images, self.image_tokens, self.language, self.options)
        if isinstance(record, Chat):
            write_dialogue(builder, record, answer)
        else:
            write_task(builder, record, answer)
        return builder.sample
