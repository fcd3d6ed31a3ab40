"""Published annotation layouts, one module each, and their way into shards (`importing`)."""

from latentmodal.experiments.data.readers.cc_sbu_align import CcSbuAlignReader
from latentmodal.experiments.data.readers.coco_captions import CocoCaptionsReader
from latentmodal.experiments.data.readers.gqa import GqaReader
from latentmodal.experiments.data.readers.karpathy import KarpathyReader
from latentmodal.experiments.data.readers.llava import LlavaReader
from latentmodal.experiments.data.readers.nocaps import NocapsReader
from latentmodal.experiments.data.readers.okvqa import OkVqaReader
from latentmodal.experiments.data.readers.pope import PopeReader
from latentmodal.experiments.data.readers.reader import AnnotatedImage, Reader
from latentmodal.experiments.data.readers.vg_captions import VgCaptionsReader
from latentmodal.experiments.data.readers.vqav2 import VqaV2Reader

READERS: dict[str, type[Reader]] = {
    "karpathy": KarpathyReader,
    "coco_captions": CocoCaptionsReader,
    "vg_captions": VgCaptionsReader,
    "nocaps": NocapsReader,
    "vqav2": VqaV2Reader,
    "okvqa": OkVqaReader,
    "gqa": GqaReader,
    "cc_sbu_align": CcSbuAlignReader,
    "llava": LlavaReader,
    "pope": PopeReader,
}

__all__ = ["READERS", "AnnotatedImage", "Reader"]
