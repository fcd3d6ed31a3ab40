"""The views a run leaves in TensorBoard: pictures, the joint embedding space, the recipe.

Shapes: N images, M texts, E embedding width, C channels, H/W pixels. Of attention: B pictures, M
queries, N tokens of a picture, in a grid of G x G.
"""

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.evaluation.pictures import (
    point_sprite,
    retrieved_captions_picture,
    retrieved_images_picture,
    similarity_picture,
)
from latentmodal.experiments.evaluation.retrieval import unit_rows
from latentmodal.experiments.evaluation.sheets import (
    captions_picture,
    query_attention_picture,
    token_grid,
)

log = logging.getLogger(__name__)

MAX_MATRIX: Final = 32
"""Pictures in a similarity matrix at most; more could not be read."""

SPRITE: Final = 48
"""Pixels of a projector point. 1,000 points make a sprite of 1,536 x 1,536, of 8,192 allowed."""


def similarity_matrix(
    writer: SummaryWriter,
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_NE: Tensor,
    text_NE: Tensor,
    step: int,
    max_pairs: int = 16,
    tag: str = "views/similarity",
) -> None:
    """Caption i against picture j, for pairs spread evenly; see `similarity_picture`.

    Args:
        writer: where to.
        images: uint8 pictures CHW, of any size.
        captions: caption i belongs to picture i.
        image_NE: their embeddings.
        text_NE: their embeddings.
        step: global step.
        max_pairs: pairs shown, never more than `MAX_MATRIX`; up to 16 have their cosines written.
        tag: name in TensorBoard.
    """
    rows = spread(len(captions), min(max_pairs, MAX_MATRIX))
    shown, texts = [images[row] for row in rows], [captions[row] for row in rows]
    picture = similarity_picture(shown, texts, image_NE[rows], text_NE[rows])
    _add(writer, tag, picture, step)


def retrieved_examples(
    writer: SummaryWriter,
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_NE: Tensor,
    text_ME: Tensor,
    text_to_image_M: Tensor,
    step: int,
    num_queries: int = 6,
    tag: str = "views/retrieved",
) -> None:
    """What some captions, and some pictures, find in the whole gallery.

    Queries are spread evenly and are the same at every step, so that the step slider of
    TensorBoard shows them improve.

    Args:
        writer: where to.
        images: uint8 pictures CHW; only those shown are read.
        captions: one per text.
        image_NE: the gallery of pictures.
        text_ME: the gallery of texts.
        text_to_image_M: the row of ``image_NE`` each text describes.
        step: global step.
        num_queries: rows of each picture.
        tag: name in TensorBoard; two pictures are written under it.
    """
    gallery = (images, captions, image_NE, text_ME, text_to_image_M)
    texts = spread(len(captions), num_queries)
    _add(writer, f"{tag}/by_caption", retrieved_images_picture(*gallery, queries=texts), step)
    # Only pictures that have a caption can find it.
    captioned = text_to_image_M.unique().tolist()
    rows = [captioned[place] for place in spread(len(captioned), num_queries)]
    _add(writer, f"{tag}/by_picture", retrieved_captions_picture(*gallery, queries=rows), step)


def embedding_projector(
    writer: SummaryWriter,
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_NE: Tensor,
    text_NE: Tensor,
    splits: Sequence[str],
    step: int,
    max_pairs: int = 500,
    tag: str = "joint_space",
) -> None:
    """Pictures and texts as points of one space, with sprites, for TensorBoard's Projector.

    Write it once, at the end of a run: Projector opens on the oldest step it finds.

    Args:
        writer: where to.
        images: uint8 pictures CHW.
        captions: caption i belongs to picture i.
        image_NE: their embeddings, normalised here; of several per picture, the one nearest to
            its caption is shown.
        text_NE: their embeddings, normalised here.
        splits: the split of each pair, to colour by.
        step: global step.
        max_pairs: pairs shown, spread evenly; each gives two points.
        tag: name in TensorBoard.
    """
    rows = spread(len(captions), max_pairs)
    image_PE, text_PE = unit_rows(image_NE[rows], "image"), unit_rows(text_NE[rows], "text")
    if image_PE.dim() == 3:
        best_P = (image_PE @ text_PE[:, :, None]).squeeze(2).argmax(dim=1)
        image_PE = image_PE[torch.arange(len(rows)), best_P]
    points = torch.cat([image_PE, text_PE])
    kinds = [kind for kind in ("image", "text") for _ in rows]
    sprites = [
        point_sprite(images[row], kind, SPRITE) for kind, row in zip(kinds, rows * 2, strict=True)
    ]
    sprites_PCHW = torch.stack([as_tensor(sprite) for sprite in sprites])
    writer.add_embedding(
        points.float(),
        # Metadata are tab-separated lines: a tab or a line break would shift all later labels.
        metadata=[
            [kind, " ".join(captions[row].split()), splits[row]]
            for kind, row in zip(kinds, rows * 2, strict=True)
        ],
        metadata_header=["kind", "caption", "split"],
        label_img=sprites_PCHW.float() / 255,
        global_step=step,
        tag=tag,
    )


def query_attention(
    writer: SummaryWriter,
    images: Sequence[Tensor],
    attention_BMN: Tensor,
    step: int,
    tag: str = "views/query_attention",
) -> None:
    """Where each query looks, laid over the pictures; see `query_attention_picture`.

    Where the tokens are no square grid, a line in the log says so and nothing is written.

    Args:
        writer: where to.
        images: uint8 pictures CHW.
        attention_BMN: of M queries to the N tokens of each picture.
        step: global step.
        tag: name in TensorBoard.
    """
    grid_BMGG = token_grid(attention_BMN)
    if grid_BMGG is None:
        tokens = attention_BMN.shape[2]
        log.info("%s is left out: %d tokens of a picture are no square grid", tag, tokens)
        return
    _add(writer, tag, query_attention_picture(images, grid_BMGG), step)


def generated_captions(
    writer: SummaryWriter,
    images: Sequence[Tensor],
    captions: Sequence[str],
    generated: Sequence[str],
    step: int,
    tag: str = "views/captions",
) -> None:
    """What the model says of some pictures, below what is true of them.

    Args:
        writer: where to.
        images: uint8 pictures CHW.
        captions: a true one for each.
        generated: the model's.
        step: global step.
        tag: name in TensorBoard.
    """
    _add(writer, tag, captions_picture(images, captions, generated), step)


def recipe_text(writer: SummaryWriter, recipe_yaml: str, step: int = 0) -> None:
    """The resolved recipe, as it was written, in the Text tab."""
    writer.add_text("recipe", f"```yaml\n{recipe_yaml.rstrip()}\n```", step)


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` places, evenly apart; the same at every step."""
    count = min(total, count)
    return [place * total // count for place in range(count)]


def as_tensor(picture: Image.Image) -> Tensor:
    """A drawn picture as TensorBoard takes it: uint8 CHW."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _add(writer: SummaryWriter, tag: str, picture: Image.Image, step: int) -> None:
    writer.add_image(tag, as_tensor(picture), step)
