"""Faults of what the model is shown and asked: formats, labels, masks, pixels, generation."""

from __future__ import annotations

from .mutant import PACKAGE, STAGE1, STAGE2, STAGE3, Mutant

CHATML = f"{PACKAGE}/data/rendering/chatml.py"
COLLATE = f"{PACKAGE}/data/loading/collate.py"
FORMATS = f"{PACKAGE}/data/rendering/formats.py"
GENERATE = f"{PACKAGE}/inference/generate.py"
IMAGES = f"{PACKAGE}/data/images.py"
PIXELS = ("tests/recipe/test_pixels.py",)
BUILDER = f"{PACKAGE}/data/rendering/token_builder.py"
UNREADABLE = ("tests/end_to_end/test_faults.py::test_unreadable_images_are_masked_alike_in_every_layout",)
GENERATION = ("tests/recipe/test_generation_ends.py",)

DATA = [
    Mutant(
        "labels: not shifted", COLLATE,
        "labels[start:last] = tokenized.tokens[1:]", "labels[start:last] = tokenized.tokens[:-1]", STAGE1,
    ),
    Mutant(
        "loss mask: not shifted", COLLATE,
        "loss_mask[start:last] = tokenized.loss_mask[1:]", "loss_mask[start:last] = tokenized.loss_mask[:-1]", STAGE1,
    ),
    Mutant(
        "interleaved samples do not see each other", COLLATE,
        'if packing == "isolated":', 'if packing != "none":', STAGE2,
    ),
    Mutant(
        "isolated samples see each other", COLLATE,
        'if packing == "isolated":', 'if packing == "nothing":', STAGE1,
    ),
    Mutant(
        "loss mask: of unreadable samples", f"{PACKAGE}/training/step.py",
        "loss_mask=batch.loss_mask.masked_fill(lost, 0.0)", "loss_mask=batch.loss_mask", UNREADABLE,
    ),
    Mutant(
        "loss mask: an unreadable sample is masked on its own rank only", f"{PACKAGE}/training/step.py",
        "agreed = self.runtime.model_parallel_max(flags.to(self.runtime.device)).cpu()", "agreed = flags", UNREADABLE,
    ),
    Mutant(
        "formats: the end of the text is not supervised", FORMATS,
        "builder.ids([builder.tokenizer.eos])", "builder.ids([builder.tokenizer.eos], supervised=False)", STAGE1,
    ),
    Mutant("formats: prompts are supervised", BUILDER, "self.supervised = False", "self.supervised = True", STAGE1),
    Mutant(
        "formats: image slots are supervised", BUILDER,
        "*slots, tokenizer.img_end], supervised=False)", "*slots, tokenizer.img_end], supervised=True)", STAGE1,
    ),
    Mutant(
        "dialogues: the user's text is supervised", CHATML,
        'builder.supervised = turn.speaker == "assistant"', "builder.supervised = True", STAGE3,
    ),
    Mutant(
        "dialogues: the begin of a turn is not supervised", CHATML,
        "builder.ids([builder.tokenizer.im_start], supervised=True)", "builder.ids([builder.tokenizer.im_start])",
        STAGE3,
    ),
    Mutant(
        "dialogues: the newline after a turn is not supervised", CHATML,
        'builder.text("\\n", supervised=True)', 'builder.text("\\n", supervised=False)', STAGE3,
    ),
    Mutant(
        "images: resized before RGB", IMAGES,
        "_to_rgb(image).resize((side, side), Image.Resampling.BICUBIC)",
        "_to_rgb(image.resize((side, side), Image.Resampling.BICUBIC))", PIXELS,
    ),
    Mutant("images: bilinear", IMAGES, "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR", PIXELS),
    Mutant(
        "images: columns and rows exchanged", IMAGES, "transpose(2, 0, 1)", "transpose(2, 1, 0)", PIXELS,
    ),
    Mutant(
        "images: mean of another model", f"{PACKAGE}/model/pixels.py",
        "CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)", "CLIP_MEAN = (0.5, 0.5, 0.5)", STAGE1,
    ),
]  # fmt: skip

INFERENCE = [
    Mutant(
        "generation: padding rows are produced", GENERATE,
        "logits[:, : self._tokenizer.vocab_size].argmax", "logits.argmax", GENERATION,
    ),
    Mutant(
        "generation: goes on after <|im_end|>", GENERATE,
        "(self._tokenizer.eos, self._tokenizer.im_end)", "(self._tokenizer.eos,)", GENERATION,
    ),
    Mutant(
        "generation: goes on after <|endoftext|>", GENERATE,
        "(self._tokenizer.eos, self._tokenizer.im_end)", "(self._tokenizer.im_end,)", GENERATION,
    ),
    Mutant(
        "generation: images of prompts that have ended", GENERATE,
        "images = [found for i in unanswered if", "images = [found for i in range(len(prompts)) if", GENERATION,
    ),
    Mutant(
        "generation: keeps the stop token", GENERATE,
        "                if token not in",
        "                sequences[i].append(token)\n                if token not in",
        GENERATION,
    ),
]  # fmt: skip
