"""The one description of the model: towers, adapter and layer list as plain numbers, without torch.

All code that needs the architecture reads it here: validation, parameter counts, FLOPs, the engine's
configuration, checkpoint keys and the mappings of the published layouts.

    tower.py      a stack of transformer layers: sizes, switches, shapes of its tensors
    vit.py        the ViT as a tower
    adapter.py    the adapter
    family.py     interface of a decoder family
    qwen.py       family `qwen`: Qwen-7B
    qwen2.py      family `qwen2`: Qwen2 and Qwen2.5
    model.py      the whole model from a configuration, and the table of families

`docs/families.md` walks through adding a decoder family.
"""
