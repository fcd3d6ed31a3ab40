"""Pairwise sigmoid loss, the loss of SigLIP (arXiv 2303.15343), in constant memory.

Images stay where they are; texts travel round the ring of ranks, one block at a time. With

    l = scale * <image, text> + bias        y = 1 for a matching pair, else 0
    loss = sum over all pairs of -log sigmoid((2y - 1) l), over the number of images

the gradient of a pair is d loss / d l = sigmoid(l) - y, known as soon as the block is. So it is
taken in the forward pass: the gradient of the images gathers here, that of the texts travels with
them and is complete when they are home again. Only gradients of the size of the features are kept
for the backward pass; no block of logits is, whatever the number of ranks.

Shape suffixes: B local images, M local texts, E embed dim, R rows of one chunk of images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentmodal.bridges.distributed import check_equal_shapes, rank, world_size
from latentmodal.bridges.losses.rows import check_rows, widen

# Pairs looked at in one go: 16 MiB per float32 matrix, 1024 images against 4096 texts.
CHUNK_PAIRS = 1 << 22


def sigmoid_loss(
    image_BE: Tensor,
    text_ME: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    image_ids_B: Tensor | None = None,
    text_ids_M: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Binary cross-entropy of every image with every text of all ranks.

    The maths is done in float32, whatever autocast says. Gradients can be taken once, not twice.

    Args:
        image_BE: unit rows; the same B on every rank.
        text_ME: unit rows; the same M on every rank.
        logit_scale: the factor on the cosines, shape () or (1,).
        logit_bias: added to all logits, shape () or (1,).
        image_ids_B, text_ids_M: int64, meaningful across ranks (an index into the data set, say).
            Pairs of equal id are the matching ones. None: text i of a rank belongs to its image i.
        group: the ranks that share a batch; default: all.

    Returns:
        Scalar: the sum over local images and the texts of all ranks, divided by B; see the package
        docstring for what ranks add up to.

    Raises:
        ValueError: no bias, or shapes and ids that make no sense.
    """
    if logit_bias is None:
        raise ValueError("logit_bias is None; build the head with init_logit_bias (SigLIP: -10)")
    check_rows(image_BE, text_ME, image_ids_B, text_ids_M)
    check_equal_shapes(image_BE, text_ME, group=group)
    with torch.autocast(image_BE.device.type, enabled=False):
        inputs = (widen(image_BE), widen(text_ME), widen(logit_scale), widen(logit_bias))
        # Inside the function autograd is off, and cannot tell whether anybody wants gradients.
        wanted = _Wanted(*(torch.is_grad_enabled() and x.requires_grad for x in inputs))
        loss: Tensor = _SigmoidLoss.apply(*inputs, image_ids_B, text_ids_M, wanted, group)
    return loss


class _Wanted(NamedTuple):
    """Which inputs need a gradient; the same on all ranks, as all train the same weights."""

    image: bool
    text: bool
    scale: bool
    bias: bool


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_ME: Tensor,
        scale: Tensor,
        bias: Tensor,
        image_ids_B: Tensor | None,
        text_ids_M: Tensor | None,
        wanted: _Wanted,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        sums = _Sums(image_BE, scale, bias, wanted)
        _walk_ring(sums, image_ids_B, text_ME, text_ids_M, group)
        loss, grads = sums.finish()
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad_loss * grad for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None)


def _walk_ring(
    sums: "_Sums",
    image_ids_B: Tensor | None,
    text_ME: Tensor,
    text_ids_M: Tensor | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Show `sums` the texts of every rank once; bring the gradient of the texts home.

    Both journeys overlap with the work: the next texts are under way while a block is computed,
    and what earlier ranks found for a block is only needed after this rank's part is.
    """
    steps = world_size(group)
    travelling: _Exchange | None = None
    for step in range(steps):
        last = step == steps - 1
        texts = [text_ME] if text_ids_M is None else [text_ME, text_ids_M]
        following = None if last else _Exchange(texts, group, tag=0)

        if image_ids_B is not None and text_ids_M is not None:
            grad_text_ME = sums.add(text_ME, ids=(image_ids_B, text_ids_M))
        else:
            grad_text_ME = sums.add(text_ME, diagonal=step == 0)

        if grad_text_ME is not None and steps > 1:
            if travelling is not None:
                grad_text_ME += travelling.receive()[0]
            travelling = _Exchange([grad_text_ME], group, tag=len(texts))
            if last:
                grad_text_ME = travelling.receive()[0]
        sums.grad_text_ME = grad_text_ME

        if following is not None:
            text_ME, *rest = following.receive()
            text_ids_M = rest[0] if rest else None


class _Exchange:
    """Send tensors to the next rank of the ring while the previous one's arrive."""

    def __init__(
        self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None, tag: int
    ) -> None:
        me, size = rank(group), world_size(group)
        # Kept alive until they have been sent.
        self._outgoing = [tensor.contiguous() for tensor in tensors]
        self._incoming = [torch.empty_like(tensor) for tensor in self._outgoing]
        operations = []
        for offset, (out, into) in enumerate(zip(self._outgoing, self._incoming, strict=True)):
            to, source, label = (me + 1) % size, (me - 1) % size, tag + offset
            operations += [
                dist.P2POp(dist.isend, out, group=group, tag=label, group_peer=to),
                dist.P2POp(dist.irecv, into, group=group, tag=label, group_peer=source),
            ]
        self._works = dist.batch_isend_irecv(operations)

    def receive(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._incoming


class _Sums:
    """Loss and gradients of the local images, summed block by block."""

    def __init__(self, image_BE: Tensor, scale: Tensor, bias: Tensor, wanted: _Wanted) -> None:
        self.image_BE, self.scale, self.bias, self.wanted = image_BE, scale, bias, wanted
        self.loss = image_BE.new_zeros(())
        self.grad_image_BE = torch.zeros_like(image_BE) if wanted.image else None
        self.grad_text_ME: Tensor | None = None
        self.grad_scale = torch.zeros_like(scale) if wanted.scale else None
        self.grad_bias = torch.zeros_like(bias) if wanted.bias else None

    def add(
        self, text_ME: Tensor, *, ids: tuple[Tensor, Tensor] | None = None, diagonal: bool = False
    ) -> Tensor | None:
        """Take in all local images against one block of texts; return the texts' gradient.

        Matching pairs are those of equal `ids`, else the diagonal, else none.
        """
        grad_text_ME = torch.zeros_like(text_ME) if self.wanted.text else None
        rows = max(1, CHUNK_PAIRS // text_ME.shape[0])
        for start in range(0, self.image_BE.shape[0], rows):
            chunk = slice(start, start + rows)
            image_RE = self.image_BE[chunk]
            cosine_RM = image_RE @ text_ME.T
            if ids is not None:
                match_RM = ids[0][chunk, None] == ids[1][None, :]
            elif diagonal:
                match_RM = torch.zeros_like(cosine_RM, dtype=torch.bool)
                match_RM.diagonal(start).fill_(True)
            else:
                match_RM = None
            self._add_chunk(chunk, image_RE, text_ME, cosine_RM, match_RM, grad_text_ME)
        return grad_text_ME

    def _add_chunk(
        self,
        chunk: slice,
        image_RE: Tensor,
        text_ME: Tensor,
        cosine_RM: Tensor,
        match_RM: Tensor | None,
        grad_text_ME: Tensor | None,
    ) -> None:
        logits_RM = torch.addcmul(self.bias, cosine_RM, self.scale)
        # -log sigmoid(z l) with z = 1 where the pair matches, else -1.
        signed_RM = -logits_RM if match_RM is None else torch.where(match_RM, logits_RM, -logits_RM)
        self.loss -= F.logsigmoid(signed_RM).sum()
        if not any(self.wanted):
            return
        grad_logits_RM = logits_RM.sigmoid_()
        if match_RM is not None:
            grad_logits_RM -= match_RM.to(grad_logits_RM.dtype)
        if self.grad_image_BE is not None:
            self.grad_image_BE[chunk].addmm_(grad_logits_RM, text_ME)
        if grad_text_ME is not None:
            grad_text_ME.addmm_(grad_logits_RM.T, image_RE)
        if self.grad_scale is not None:
            self.grad_scale += cosine_RM.mul_(grad_logits_RM).sum()
        if self.grad_bias is not None:
            self.grad_bias += grad_logits_RM.sum()

    def finish(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Loss, and gradients of image, text, scale and bias, divided by the number of images."""
        images = self.image_BE.shape[0]
        for grad in (self.grad_image_BE, self.grad_text_ME):
            if grad is not None:
                grad *= self.scale / images
        for grad in (self.grad_scale, self.grad_bias):
            if grad is not None:
                grad /= images
        grads = (self.grad_image_BE, self.grad_text_ME, self.grad_scale, self.grad_bias)
        return self.loss / images, grads
