"""The position-aware adapter as plain numbers: one cross-attention from learned queries to an image's patches."""

from __future__ import annotations

from dataclasses import dataclass

from .tower import Shape


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of the adapter."""

    patch_width: int
    """Channels of a patch, the ViT's width."""
    hidden: int
    """Channels of a query and of the output, the decoder's width."""
    heads: int
    """Attention heads."""
    queries: int
    """Learned queries, which are an image's decoder tokens."""

    def tensor_shapes(self) -> dict[str, Shape]:
        """Full shape of every tensor by checkpoint key."""
        hidden = self.hidden
        shapes: dict[str, Shape] = {
            "adapter.query": (self.queries, hidden),
            "adapter.kv_proj.weight": (hidden, self.patch_width),
            "adapter.proj.weight": (hidden, hidden),
        }
        for norm in ("ln_q", "ln_kv", "ln_post"):
            shapes[f"adapter.{norm}.weight"] = shapes[f"adapter.{norm}.bias"] = (hidden,)
        for linear in ("linear_q", "linear_k", "linear_v", "linear_proj"):
            shapes[f"adapter.{linear}.weight"] = (hidden, hidden)
            shapes[f"adapter.{linear}.bias"] = (hidden,)
        return shapes

    def products(self, images: float, patches: int) -> tuple[float, float, float]:
        """Multiply-adds over `images` images of `patches` patches each.

        Returns:
            Products of the input with weights, of later activations with weights, and of activations with activations.
        """
        square, all_patches, queries = self.hidden**2, images * patches, images * self.queries
        learned = self.queries if images else 0  # queries are projected once for all images
        inner = (
            2 * all_patches + 2 * queries + learned
        ) * square  # keys, values; attention output, `proj`; queries
        return all_patches * self.patch_width * self.hidden, inner, 2 * queries * patches * self.hidden
