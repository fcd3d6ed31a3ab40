"""The command line: `latentmodal fit | eval | ablate | compare | chat | curate | cache | …`.

A mistake of the user's is one line on stderr and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from latentmodal.experiments.ablation.cli import ablate
from latentmodal.experiments.ablation.compare_cli import compare
from latentmodal.experiments.chat.cli import chat, generate
from latentmodal.experiments.curation.cli import curate_app
from latentmodal.experiments.errors import UserError

# Loader workers share the cores with the training threads, which would otherwise spin while they
# wait for one another; on a busy machine this halves the step. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Connect a frozen encoder to a language model: recipes over reusable bridges.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
data_app = typer.Typer(help="Make and inspect training data.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(curate_app, name="curate")
app.command()(ablate)
app.command()(compare)
app.command()(chat)
app.command()(generate)

console = Console()
if not console.is_terminal:
    console = Console(width=100)  # a file has no width; 80 columns would cut tables
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override keys of the recipe")
]


@app.callback()
def _setup(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=debug, show_time=False)],
        force=True,
    )
    for noisy in ("fsspec", "PIL", "urllib3", "httpx", "asyncio", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def fit(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe such as clip/emoji, or a file")],
    overrides: Overrides = None,
) -> None:
    """Train a recipe, evaluate it, and say where to look."""
    from latentmodal.experiments.recipe import load_recipe
    from latentmodal.experiments.training.fit import fit as run_fit

    keys = list(overrides or [])
    resume = _flag(keys, "resume")
    run_fit(load_recipe(recipe, keys), resume=resume, console=console)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a trained run")],
    overrides: Overrides = None,
) -> None:
    """Evaluate a run: JSON in its folder, a table here, scalars in TensorBoard.

    Overrides reach the run's `evaluation` keys, e.g. another split or other shards.
    """
    from latentmodal.experiments.evaluation.run import evaluate_run

    evaluate_run(run, list(overrides or []), console=console)


@recipe_app.command("show")
def recipe_show(recipe: Annotated[str, typer.Argument()], overrides: Overrides = None) -> None:
    """Print a recipe as it will run: bases, overrides and defaults resolved."""
    from rich.syntax import Syntax

    from latentmodal.experiments.recipe import load_recipe, to_yaml

    text = to_yaml(load_recipe(recipe, list(overrides or [])))
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        sys.stdout.write(text)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the shipped recipes, and what `ablate` compares."""
    from rich.table import Table

    from latentmodal.experiments.ablation.config import read_ablation, shipped_ablations
    from latentmodal.experiments.recipe import load_recipe, shipped_recipes

    table = Table(box=None, show_header=False)
    for name in shipped_recipes():
        table.add_row(f"[bold]{name}", load_recipe(name).description)
    for name in shipped_ablations():
        config = read_ablation(name)
        varied, seeds = " x ".join(config.axes), len(config.seeds)
        about = f"compares {varied} in {config.base}, {seeds} seed{'s' * (seeds > 1)}"
        table.add_row(f"ablate [bold]{name}", about)
    console.print(table)


@data_app.command("emoji")
def data_emoji(
    preset: Annotated[str, typer.Argument(help="tiny, few, default or large")] = "default",
    seed: Annotated[int, typer.Option(help="another seed is another data set")] = 0,
) -> None:
    """Build the embedded data set (or find it built) and say where it is."""
    from latentmodal.experiments.data.emoji import EmojiConfig, ensure_emoji

    data = ensure_emoji(EmojiConfig(preset=preset, seed=seed))
    console.print(f"{data.folder}")


@data_app.command("import")
def data_import(
    layout: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="karpathy, coco_captions, vg_captions, nocaps, vqav2, okvqa, gqa, cc_sbu_align, "
            "llava, pope",
        ),
    ],
    images: Annotated[Path, typer.Option(help="folder of the pictures")],
    split: Annotated[str, typer.Option(help="split to read and to call the samples by")],
    out: Annotated[Path, typer.Option(help="folder to write the shards into")],
    annotations: Annotated[
        Path | None, typer.Option(help="captions, conversations, or answers of a VQA")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="questions of a VQA, GQA or POPE")] = None,
    max_missing: Annotated[
        float, typer.Option(help="share of pictures that may be missing")
    ] = 0.05,
) -> None:
    """Turn a published data set on this disk into shards, and say how to train on them."""
    from latentmodal.experiments.data.readers.importing import import_dataset

    done = import_dataset(
        layout,
        annotations=annotations,
        questions=questions,
        images=images,
        split=split,
        out=out,
        max_missing=max_missing,
    )
    talks = f"{done.conversations} conversations, " if done.conversations else ""
    lines = [
        f"{done.samples} samples, {done.captions} captions, {done.questions} questions, {talks}"
        f"{done.shards} shards in {done.folder}",
        *([f"left out: {done.skipped}"] if done.skipped else []),
        "for data.train of a recipe:",
        f"  {done.recipe_line}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(help="a recipe whose image tower is frozen")],
    overrides: Overrides = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="augmented versions of each picture to keep")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    folder: Annotated[
        Path | None, typer.Option(help="where to write (default: where data.features=auto looks)")
    ] = None,
    upto: Annotated[
        str, typer.Option(help="frozen (bridge included, as far as it is) or encoder")
    ] = "frozen",
) -> None:
    """Encode a recipe's training pictures once; data.features=auto then trains from that."""
    from latentmodal.experiments.feature_cache.filling import cache_features
    from latentmodal.experiments.recipe import load_recipe

    made = cache_features(
        load_recipe(recipe, list(overrides or [])),
        views=views,
        dtype=dtype,
        folder=folder,
        upto=upto,
        console=console,
    )
    sys.stdout.write(f"{made}\n")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a run's folder, a checkpoint, or see --from")],
    target: Annotated[Path, typer.Argument(help="file or folder to write")],
    to: Annotated[
        str,
        typer.Option("--to", help="open_clip, hf_clip, hf_siglip; lavis, hf_blip2; latentmodal"),
    ],
    form: Annotated[
        str, typer.Option("--from", help="run, or BLIP-2 as lavis, hf_blip2 or latentmodal")
    ] = "run",
    heads: Annotated[
        int | None, typer.Option(min=1, help="heads of the Q-Former (default: 64 wide each)")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="EVA weights, such as eva_vit_g.pth, where SOURCE has none")
    ] = None,
    vision_heads: Annotated[
        int | None, typer.Option(min=1, help="heads of that tower (default: 88 wide each)")
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(help="language model: hub name (configuration) or folder (weights too)"),
    ] = None,
    projection: Annotated[
        str | None, typer.Option(help="LAVIS' name: opt_proj, t5_proj or llm_proj")
    ] = None,
    with_vision: Annotated[
        bool, typer.Option("--with-vision", help="write the image tower though it was frozen")
    ] = False,
) -> None:
    """Write a run's weights under another library's names, or BLIP-2's from one to another."""
    from latentmodal.experiments.exports.blip2 import Options
    from latentmodal.experiments.weights import convert as convert_weights

    options = Options(
        heads=heads,
        vision=vision,
        vision_heads=vision_heads,
        llm=llm,
        projection=projection,
        with_vision=with_vision,
    )
    lines = convert_weights(source, target, to, form=form, options=options)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    console.print(f"wrote {target}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run's folder, or a checkpoint in it")],
    target: Annotated[
        Path | None, typer.Argument(help="folder to write (default: RUN/bridge)")
    ] = None,
    bridge: Annotated[
        bool, typer.Option("--bridge", help="the bridge alone, as latentmodal.bridges loads it")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="also put it on the Hugging Face hub: owner/name")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="make the repository of --push a private one")
    ] = False,
) -> None:
    """Take a trained bridge out of its run, with its weights, configuration and model card."""
    from latentmodal.experiments.exports.bridge import check_address, export_bridge, push_folder

    if not bridge:
        raise UserError("say what to export: --bridge; whole models go by latentmodal convert")
    if push is not None:
        check_address(push)
    folder = export_bridge(run, target)
    console.print(f"wrote {folder}", soft_wrap=True)
    if push is not None:
        console.print(f"wrote {push_folder(folder, push, private=private)}", soft_wrap=True)


def _flag(keys: list[str], name: str) -> bool:
    """Take `name=true|false` out of the overrides."""
    value = "false"
    for item in [key for key in keys if key.startswith(f"{name}=")]:
        keys.remove(item)
        value = item.split("=", 1)[1].lower()
    if value not in ("true", "false"):
        raise UserError(f"{name}={value}: give true or false")
    return value == "true"


def main() -> None:
    """Entry point: user errors become one line and exit code 2."""
    if not sys.stderr.isatty():  # bars of downloads and of weights read are for a person
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # A second rank may be waiting in a collective; leave without the interpreter's farewell.
        os._exit(2) if "LOCAL_RANK" in os.environ else sys.exit(2)


if __name__ == "__main__":
    main()
