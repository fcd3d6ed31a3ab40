"""`latentmodal chat` and `latentmodal generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmodal.experiments.errors import UserError

if TYPE_CHECKING:
    from latentmodal.llm import GenerationSettings

Run = Annotated[
    str, typer.Argument(help="folder of a trained run, or a recipe over released weights")
]
Style = Annotated[
    str | None,
    typer.Option(help="conversation style: vicuna_v0, vicuna_v1, llama2_chat, chat_template"),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="longest answer (the recipe's)")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token")]
TopP = Annotated[float | None, typer.Option(help="share of probability sampled from")]
Greedy = Annotated[bool, typer.Option("--greedy", help="take the likeliest token")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="above 1 says less again")]
Seed = Annotated[int, typer.Option(help="decides what is sampled")]


def chat(
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys of the recipe")
    ] = None,
    style: Style = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    greedy: Greedy = False,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    web: Annotated[bool, typer.Option("--web", help="a page in the browser instead")] = False,
    host: Annotated[str, typer.Option(help="with --web, where to listen")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="with --web; 0 takes a free one")
    ] = 8360,
) -> None:
    """Talk with a run about pictures, here or on a local page."""
    import torch

    from latentmodal.experiments.chat.opening import open_speaker
    from latentmodal.experiments.chat.terminal import talk

    if web:
        from latentmodal.experiments.chat.serving import check_installed

        check_installed()
    speaker = open_speaker(run, list(overrides or []), style)
    settings = _settings(
        speaker.system.config.generation,
        max_new_tokens,
        temperature,
        top_p,
        greedy,
        repetition_penalty,
    )
    torch.manual_seed(seed)
    if web:
        from latentmodal.experiments.chat.serving import serve_chat

        serve_chat(speaker, settings, host=host, port=port)
    else:
        talk(speaker, settings)


def generate(
    run: Run,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="files or folders")],
    prompt: Annotated[
        str | None, typer.Option(help="what to say about each picture (caption it)")
    ] = None,
    style: Style = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures at a time")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to go on with; stdout if not given")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    greedy: Greedy = False,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
) -> None:
    """Say something about each picture: a line of JSON each; exit code 1 if any was bad."""
    import torch

    from latentmodal.experiments.chat.batch import describe_files, find_pictures
    from latentmodal.experiments.chat.opening import open_speaker

    files = find_pictures(images)
    speaker = open_speaker(run, (), style, converse=prompt is not None)
    settings = _settings(
        speaker.system.config.generation,
        max_new_tokens,
        temperature,
        top_p,
        greedy,
        repetition_penalty,
        keep_beams=True,
    )
    torch.manual_seed(seed)
    bad = describe_files(speaker, files, settings, prompt=prompt, batch_size=batch_size, out=out)
    if bad:
        raise typer.Exit(1)


def _settings(
    own: GenerationSettings,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    greedy: bool,
    repetition_penalty: float | None,
    *,
    keep_beams: bool = False,
) -> GenerationSettings:
    """The recipe's settings with those given; a conversation has no beams, they cannot stream."""
    if greedy and (temperature is not None or top_p is not None):
        raise UserError("--greedy: samples nothing; leave out --temperature and --top-p")
    samples = own.do_sample
    if greedy or temperature == 0:
        samples = False
    elif temperature is not None or top_p is not None:
        samples = True
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature or None,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    longest = fields.get("max_new_tokens", own.max_new_tokens)
    try:
        return replace(
            own,
            do_sample=samples,
            num_beams=own.num_beams if keep_beams and not (greedy or samples) else 1,
            min_new_tokens=max(0, min(own.min_new_tokens, int(longest))),
            **fields,
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
