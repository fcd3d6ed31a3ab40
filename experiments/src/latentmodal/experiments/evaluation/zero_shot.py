"""Naming pictures by text alone: prompt templates averaged into one classifier per class name.

Shapes: N images, V embeddings of an image, C classes, E embedding width, P prompts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.retrieval import TIE, cosines, unit_rows

TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "name": ("{}",),
    "drawing": ("{}", "a {}", "a picture of a {}", "a drawing of a {}"),
    "photo": ("a photo of a {}.",),
    # The seven that CLIP's authors found to do most of the work of their eighty.
    "clip7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Named sets of prompt templates."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """Shares in [0, 1]. ``acc5`` and its chance are None when there are fewer than five classes."""

    acc1: float
    acc5: float | None
    mean_per_class_recall: float
    chance_acc1: float
    chance_acc5: float | None
    confusions: list[tuple[str, str, int]]
    """(true class, chosen class, times), most frequent first."""
    num_images: int
    num_classes: int


def fill_template(template: str, name: str) -> str:
    """Put ``name`` in place of every ``{}``; braces within the name are left alone.

    Raises:
        UserError: the template has no ``{}``, so all classes would get the same prompt.
    """
    if "{}" not in template:
        raise UserError(f"template {template!r} has no {{}}: mark the place of the class name")
    return template.replace("{}", name)


def class_embeddings(
    class_names: Sequence[str],
    templates: Sequence[str],
    encode_text: Callable[[list[str]], Tensor],
    batch_size: int = 256,
) -> Tensor:
    """One unit vector per class, ``(C, E)``: the mean of its normalised prompts, renormalised.

    Args:
        class_names: different names.
        templates: each with ``{}`` where the name goes.
        encode_text: prompts to embeddings ``(P, E)``.
        batch_size: prompts handed to ``encode_text`` at once.

    Raises:
        UserError: no classes, no templates, a name given twice, or embeddings that are not finite.
    """
    if not class_names or not templates:
        raise UserError(f"{len(class_names)} class names, {len(templates)} templates: give both")
    repeated = [name for name, times in Counter(class_names).items() if times > 1]
    if repeated:
        raise UserError(f"class name {repeated[0]!r} is given twice: names must differ")
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
    prompts_PE = torch.cat([unit_rows(encode_text(batch), "prompt") for batch in batches])
    mean_CE = prompts_PE.view(len(class_names), len(templates), -1).mean(dim=1)
    return F.normalize(mean_CE, dim=1)


def zero_shot_metrics(
    image_NE: Tensor,
    class_CE: Tensor,
    labels_N: Tensor,
    class_names: Sequence[str],
    num_confusions: int = 10,
) -> ZeroShotResult:
    """Name every image by its nearest class; ties count against the model.

    Mean per-class recall is over the classes that have images.

    Args:
        image_NE: image embeddings; or (N, V, E), the best of each image counting.
        class_CE: from `class_embeddings`.
        labels_N: int64, the true class of each image.
        class_names: names in the order of ``class_CE``.
        num_confusions: how many confused pairs to list.

    Raises:
        UserError: no images, labels outside the classes, or embeddings that are not finite.
    """
    num_images, num_classes = len(image_NE), len(class_names)
    if num_images == 0 or len(labels_N) != num_images:
        raise UserError(f"{len(labels_N)} labels for {num_images} images: give one per image")
    if int(labels_N.min()) < 0 or int(labels_N.max()) >= num_classes:
        raise UserError(
            f"labels {int(labels_N.min())}..{int(labels_N.max())} do not fit "
            f"{num_classes} class names (0..{num_classes - 1})"
        )
    scores_NC = cosines(unit_rows(image_NE, "image"), unit_rows(class_CE, "class"))
    labels_N = labels_N.to(scores_NC.device)
    target_N1 = scores_NC.gather(1, labels_N[:, None])
    others_NC = scores_NC.scatter(1, labels_N[:, None], -torch.inf)
    rank_N = 1 + (others_NC >= target_N1 - TIE).sum(dim=1)

    right_N = (rank_N == 1).double()
    images_C = torch.bincount(labels_N, minlength=num_classes)
    right_C = torch.bincount(labels_N, weights=right_N, minlength=num_classes)
    wrong_N = rank_N > 1
    chosen = others_NC[wrong_N].argmax(dim=1).tolist() if wrong_N.any() else []
    pairs = Counter(zip(labels_N[wrong_N].tolist(), chosen, strict=True))
    return ZeroShotResult(
        acc1=right_N.mean().item(),
        acc5=(rank_N <= 5).double().mean().item() if num_classes >= 5 else None,
        mean_per_class_recall=(right_C / images_C)[images_C > 0].mean().item(),
        chance_acc1=1 / num_classes,
        chance_acc5=5 / num_classes if num_classes >= 5 else None,
        confusions=[
            (class_names[true], class_names[named], times)
            for (true, named), times in pairs.most_common(num_confusions)
        ],
        num_images=num_images,
        num_classes=num_classes,
    )
