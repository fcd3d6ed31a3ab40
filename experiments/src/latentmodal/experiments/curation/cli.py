"""`latentmodal curate`: from a first-stage model's descriptions to second-stage data."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentmodal.experiments.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

curate_app = typer.Typer(
    help="Curate descriptions: generate, refine, filter, review, export.", no_args_is_help=True
)
LedgerPath = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="folder made by generate, or its ledger.jsonl")
]


@curate_app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="folder of a trained generation run")],
    source: Annotated[
        str,
        typer.Option(help="emoji:SPLIT, emoji:SPLIT:PRESET:SEED, or an address of shards"),
    ],
    out: Annotated[Path, typer.Option(help="folder of the ledger and its pictures")],
    style: Annotated[
        str, typer.Option(help="conversation style, or 'run' for the one it was trained with")
    ] = "vicuna_v0",
    instruction: Annotated[str | None, typer.Option(help="what the model is asked")] = None,
    min_tokens: Annotated[
        int, typer.Option(help="shorter answers are asked to continue; 0 never")
    ] = 80,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 300,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of probability sampled from")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 says less again")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 8,
    limit: Annotated[int | None, typer.Option(help="pictures at most")] = None,
    seed: Annotated[int, typer.Option(help="decides what is sampled")] = 0,
) -> None:
    """Describe pictures at length; those in the ledger already are passed over."""
    from latentmodal.experiments.curation import generating
    from latentmodal.experiments.curation.describer import describer_of
    from latentmodal.experiments.curation.ledger import LEDGER_FILE, Ledger
    from latentmodal.llm import GenerationSettings

    with _one_line_errors():
        config = generating.GenerateConfig(
            instruction=generating.INSTRUCTION if instruction is None else instruction,
            min_tokens=min_tokens,
            batch_size=batch_size,
            limit=limit,
            seed=seed,
            settings=GenerationSettings(
                num_beams=1,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
            ),
        )
    pictures = generating.parse_source(source)
    ledger = Ledger(out / LEDGER_FILE)
    with _progress("describing", limit) as progress:
        described = generating.generate(
            ledger,
            describer_of(run, style),
            pictures,
            config,
            on_progress=lambda count: progress.advance(progress.task_ids[0], count),
        )
    _say(f"{described} described, {len(ledger)} in {ledger.path}")


@curate_app.command()
def refine(
    ledger: LedgerPath,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="a model at the endpoint of OPENAI_BASE_URL and OPENAI_API_KEY",
        ),
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="a chat model's folder, hub name or GGUF file"),
    ] = None,
    tidy: Annotated[
        bool, typer.Option("--tidy", help="no model: whole sentences, each once, and their marks")
    ] = False,
    instruction_file: Annotated[
        Path | None, typer.Option(help="text file with another instruction")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="of the endpoint's model (its own)")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="at most so many, retries included")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="requests at a time")] = 4,
    timeout: Annotated[float, typer.Option(help="seconds for one request")] = 60.0,
    attempts: Annotated[int, typer.Option(help="per text")] = 6,
    batch_size: Annotated[int, typer.Option(help="texts at a time, with --local")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, with --local")] = 400,
    limit: Annotated[int | None, typer.Option(help="texts at most, in this call")] = None,
) -> None:
    """Mend the texts that nobody has mended; refused ones stay, and are due again next time."""
    from latentmodal.experiments.curation import refining
    from latentmodal.experiments.curation.ledger import existing_ledger

    if (endpoint is not None) + (local is not None) + tidy != 1:
        raise UserError("give one of --endpoint MODEL, --local MODEL and --tidy")
    opened = existing_ledger(ledger)
    text = refining.INSTRUCTION if instruction_file is None else _read(instruction_file)
    refiner: refining.Refiner
    with _one_line_errors():
        if endpoint is not None:
            from latentmodal.experiments.curation.endpoint import EndpointConfig

            refiner = EndpointConfig(
                model=endpoint,
                instruction=text,
                temperature=temperature,
                requests_per_minute=requests_per_minute,
                concurrency=concurrency,
                timeout=timeout,
                attempts=attempts,
            ).build()
        elif local is not None:
            from latentmodal.experiments.curation.local import LocalConfig

            refiner = LocalConfig(
                model=local,
                instruction=text,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
            ).build()
        else:
            from latentmodal.experiments.curation.tidying import TidyRefiner

            refiner = TidyRefiner()
    with _progress("refining", None) as progress:

        def show(tally: refining.Tally, total: int) -> None:
            progress.update(
                progress.task_ids[0], completed=tally.refined + tally.refused, total=total
            )

        tally = refining.refine_ledger(opened, refiner, limit=limit, on_progress=show)
    _say(f"{tally.refined} refined, {tally.refused} refused, {len(opened)} in {opened.path}")
    if tally.reason is not None:
        _say(f"refused last, because {tally.reason}")


@curate_app.command("filter")
def filter_(
    ledger: LedgerPath,
    min_words: Annotated[int, typer.Option(help="shorter is too_short")] = 10,
    max_words: Annotated[int, typer.Option(help="longer is too_long")] = 300,
    max_nonsense: Annotated[int, typer.Option(help="characters out of place")] = 0,
    max_word_run: Annotated[int, typer.Option(help="times one word in succession")] = 2,
    ngram: Annotated[int, typer.Option(help="words of an n-gram")] = 4,
    max_ngram_share: Annotated[float, typer.Option(help="share of n-grams said before")] = 0.25,
    max_repeated_sentences: Annotated[int, typer.Option(help="sentences said again")] = 0,
    max_broken: Annotated[int, typer.Option(help="broken sentences before the last")] = 0,
    finished: Annotated[bool, typer.Option(help="the last sentence must be whole")] = True,
) -> None:
    """Drop texts by rules, each with its reason; called again, it decides anew."""
    from latentmodal.experiments.curation.filtering import filter_ledger
    from latentmodal.experiments.curation.ledger import existing_ledger
    from latentmodal.experiments.curation.rules import Rules

    with _one_line_errors():
        rules = Rules(
            min_words=min_words,
            max_words=max_words,
            max_nonsense=max_nonsense,
            max_word_run=max_word_run,
            ngram=ngram,
            max_ngram_share=max_ngram_share,
            max_repeated_sentences=max_repeated_sentences,
            max_broken=max_broken,
            finished=finished,
        )
    counts = filter_ledger(existing_ledger(ledger), rules, by=f"rules ({_login()})")
    for name, count in sorted(counts.items(), key=lambda item: (item[0] != "kept", -item[1])):
        _say(f"{count:6d}  {name}")


@curate_app.command()
def review(
    ledger: LedgerPath,
    by: Annotated[str | None, typer.Option(help="the reviewer's name (login name)")] = None,
    host: Annotated[str, typer.Option(help="where to listen: this machine only")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8350,
    open_browser: Annotated[bool, typer.Option("--open", help="open this machine's browser")] = (
        False
    ),
) -> None:
    """Serve a local page to keep, edit or drop each text by keyboard, its picture beside it."""
    from latentmodal.experiments.curation.review import serve_review

    serve_review(ledger, by=by, host=host, port=port, open_browser=open_browser, say=_say)


@curate_app.command()
def export(
    ledger: LedgerPath,
    to: Annotated[str, typer.Option(help="shards, or cc_sbu_align")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    unreviewed: Annotated[
        str, typer.Option(metavar="keep|drop", help="what nobody has reviewed")
    ] = "drop",
) -> None:
    """Write what was kept as training data."""
    from latentmodal.experiments.curation.exporting import export_ledger
    from latentmodal.experiments.curation.ledger import existing_ledger

    if unreviewed not in ("keep", "drop"):
        raise UserError(f"--unreviewed {unreviewed}: give keep or drop")
    opened = existing_ledger(ledger)
    kept = export_ledger(opened, to, out, unreviewed=unreviewed == "keep")
    _say(f"{kept} of {len(opened)} descriptions in {out}")


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Progress]:
    """A bar on a terminal; nothing in a file."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        progress.add_task(label, total=total)
        yield progress


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A value that a config refuses is the user's mistake."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text") from error
    if not text:
        raise UserError(f"{path}: holds no instruction")
    return text


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return str(os.getuid())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
