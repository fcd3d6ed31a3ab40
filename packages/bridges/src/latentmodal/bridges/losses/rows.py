"""What both losses ask of their arguments.

Shape suffixes: B local images, M local texts, E embed dim.
"""

import torch
from torch import Tensor


def check_rows(
    image_BE: Tensor, text_ME: Tensor, image_ids_B: Tensor | None, text_ids_M: Tensor | None
) -> None:
    """Raise ValueError unless images, texts and ids fit together."""
    images, texts = tuple(image_BE.shape), tuple(text_ME.shape)
    if len(images) != 2 or len(texts) != 2 or images[1] != texts[1]:
        raise ValueError(
            f"image has shape {images} and text {texts}; both must be (rows, embed_dim) with the "
            "same embed_dim"
        )
    if (image_ids_B is None) != (text_ids_M is None):
        absent = "image_ids_B" if image_ids_B is None else "text_ids_M"
        raise ValueError(f"{absent} is missing; give ids for both images and texts, or for neither")
    if image_ids_B is None or text_ids_M is None:
        if images[0] != texts[0]:
            raise ValueError(
                f"{images[0]} images and {texts[0]} texts cannot be paired row by row; pass "
                "image_ids_B and text_ids_M to say which belong together"
            )
        return
    for name, ids, rows in (
        ("image_ids_B", image_ids_B, images[0]),
        ("text_ids_M", text_ids_M, texts[0]),
    ):
        if tuple(ids.shape) != (rows,) or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; it must be int64 of shape "
                f"({rows},)"
            )


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()
