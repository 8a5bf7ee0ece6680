"""Records to token ids with a loss mask.

renderer        the front of the room: `Renderer.render`, and the version of all renderings
formats         the seven task formats of the paper
chatml          dialogues
token_builder   appends text, special tokens, images and boxes to a sample
tokenizer       text to token ids and back
hf_tokenizer    the same from a `tokenizer.json`
special_tokens  ids of images, references and boxes in each vocabulary
"""
