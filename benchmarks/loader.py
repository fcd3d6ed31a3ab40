"""Samples per second and core: this loader against open_clip's webdataset pipeline, same shards.

    python benchmarks/loader.py --images 512 --repeats 9

Both read the same local shards in one process without workers, crop and resize to the same size,
tokenize with the same tokenizer and batch. open_clip's stages are its own functions
(`open_clip_train.data`, `open_clip.image_transform`), which end in normalised floats; ours ends in
uint8, which the encoder normalises. The two sides take turns (A B B A ...), and what is reported is
the median of the ratios of neighbours with its interquartile range.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from latentmodal.encoders.preprocess import Preprocess
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.data.shard_writer import write_shards


class Texts(NamedTuple):
    """Tokens in the form the loader wants."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels, stored")
    parser.add_argument("--size", type=int, default=224, help="pixels, trained on")
    parser.add_argument("--images", type=int, default=512, help="images per measurement")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9, help="measurements per side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    return parser.parse_args()


def photographs(count: int, side: int, quality: int) -> Iterator[dict[str, Any]]:
    """Pictures that compress like photographs: blurred noise over gradients, with some grain."""
    rng = np.random.default_rng(side)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        smooth = rough.resize((side, side), Image.Resampling.BICUBIC)
        smooth = smooth.filter(ImageFilter.GaussianBlur(2))
        grain = rng.normal(0, 6, (side, side, 3))
        array = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        caption = f"a photograph of thing number {i} beside a wooden table in the afternoon light"
        meta = {"width": side, "height": side, "status": "success", "caption": caption}
        yield {"__key__": f"{i:09d}", "jpg": buffer.getvalue(), "txt": caption, "json": meta}


def ours(shards: list[str], args: argparse.Namespace, tokenizer: Any) -> Callable[[], float]:
    """A function that measures samples per second of this package's loader."""

    def tokens(texts: list[str]) -> Texts:
        ids_BT = tokenizer(texts)
        return Texts(ids_BT, ids_BT != 0)

    def measure() -> float:
        loader = TrainLoader(
            [ShardSourceConfig(urls=shards)],
            LoaderConfig(batch_size=args.batch, workers=0, shuffle_window=1000),
            steps=args.images // args.batch,
            seed=0,
            image_transform=Preprocess(size=args.size).train((0.9, 1.0)),
            text_transform=tokens,
            pin_memory=False,
        )
        return _rate(iter(loader), args, lambda batch: batch.pixels_BCHW)

    return measure


def theirs(shards: list[str], args: argparse.Namespace, tokenizer: Any) -> Callable[[], float]:
    """A function that measures samples per second of open_clip's training pipeline."""
    # Its module imports pandas for tables; shards do not need it.
    with contextlib.suppress(ImportError):
        import pandas  # noqa: F401
    sys.modules.setdefault("pandas", ModuleType("pandas"))
    import open_clip_train.data as theirs_data
    from open_clip import image_transform
    from webdataset.tariterators import tar_file_expander

    # Recent webdataset marks the end of each shard; this version of open_clip trips over the mark.
    theirs_data.tar_file_expander = partial(tar_file_expander, eof_value=None)

    transform = image_transform(args.size, is_train=True)  # RandomResizedCrop(0.9-1), as floats

    def measure() -> float:
        options = Namespace(
            train_data="::".join(shards),
            train_num_samples=args.images,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=args.batch,
            workers=0,
            world_size=1,
        )
        loader = theirs_data.get_wds_dataset(
            options, transform, True, tokenizer=tokenizer
        ).dataloader
        return _rate(iter(loader), args, lambda batch: batch[0])

    return measure


def _rate(
    batches: Iterator[Any], args: argparse.Namespace, pixels: Callable[[Any], torch.Tensor]
) -> float:
    started = time.perf_counter()
    seen = 0
    for batch in itertools.islice(batches, args.images // args.batch):
        assert pixels(batch).shape[1:] == (3, args.size, args.size)
        seen += len(pixels(batch))
    elapsed = time.perf_counter() - started
    assert seen == args.images, f"{seen} of {args.images} samples arrived"
    return seen / elapsed


def compare(side: int, args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Alternating measurements on shards of ``side``-pixel JPEGs."""
    with tempfile.TemporaryDirectory() as folder:
        samples = photographs(args.images, side, args.quality)
        paths = write_shards(samples, Path(folder), -(-args.images // 4))
        kilobytes = sum(path.stat().st_size for path in paths) / args.images / 1000
        shards = [str(path) for path in paths]
        a, b = ours(shards, args, tokenizer), theirs(shards, args, tokenizer)
        a(), b()  # warm the page cache and the interpreter
        pairs = []
        for turn in range(args.repeats):
            if turn % 2 == 0:
                rate_a, rate_b = a(), b()
            else:
                rate_b, rate_a = b(), a()
            pairs.append((rate_a, rate_b))
    ratios = [rate_a / rate_b for rate_a, rate_b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "side": side,
        "kilobytes": round(kilobytes, 1),
        "ours": round(statistics.median(rate for rate, _ in pairs), 1),
        "open_clip": round(statistics.median(rate for _, rate in pairs), 1),
        "ratio": round(middle, 3),
        "iqr": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    """Prints a table and a line of JSON."""
    args = parse_args()
    if args.images % args.batch or args.repeats < 2:
        raise SystemExit("--images must be a multiple of --batch, and --repeats at least 2")
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    from open_clip import get_tokenizer

    tokenizer = get_tokenizer("ViT-B-32")
    print(f"{'stored':>8} {'kB':>6} {'ours/s':>8} {'open_clip/s':>12} {'ratio':>6}  IQR")
    results = []
    for side in args.sides:
        result = compare(side, args, tokenizer)
        results.append(result)
        low, high = result["iqr"]
        print(
            f"{side:>5} px {result['kilobytes']:>6} {result['ours']:>8} "
            f"{result['open_clip']:>12} {result['ratio']:>6.2f}  {low:.2f} to {high:.2f}"
        )
    versions = {"torch": torch.__version__, "pillow": Image.__version__, "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": "loader", **vars(args), **versions, "results": results}))


if __name__ == "__main__":
    main()
