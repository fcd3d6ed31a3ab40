"""The version of `config.json`, by the rules of semantic versioning.

MAJOR: a field, a weight or a bridge of before means something else; refused until converted.
MINOR: bridges or optional fields are new; whoever leaves them out is read as before.
PATCH: nothing that a reader would notice.

History: 1.0.0 was written as the number 1. 1.1.0 added average_pool, resampler, c_abstractor and
identity; 1.2.0 the Q-Former's input_position_init.
"""

import re

FORMAT_VERSION = "1.2.0"

_SHAPE = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def check_version(version: object) -> str | None:
    """See whether this package reads a version.

    Returns:
        What to add to a complaint about the rest of the file; None where it is no newer than us.

    Raises:
        ValueError: it is none, or of another major.
    """
    text = f"{version}.0.0" if type(version) is int else version
    match = _SHAPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"format_version is {version!r}, expected one like {FORMAT_VERSION}; this is not a "
            "folder written by save_pretrained"
        )
    found, ours = tuple(map(int, match.groups())), tuple(map(int, FORMAT_VERSION.split(".")))
    newer = f"format_version {text} is newer than {FORMAT_VERSION}, the newest this package knows"
    if found[0] > ours[0]:
        raise ValueError(f"{newer}; upgrade latentmodal-bridges")
    if found[0] < ours[0]:
        raise ValueError(
            f"format_version {text} is of a time before {ours[0]}.0.0; nothing reads it"
        )
    return f"{newer}; upgrade latentmodal-bridges" if found[:2] > ours[:2] else None
