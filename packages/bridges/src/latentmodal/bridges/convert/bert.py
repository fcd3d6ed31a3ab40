"""BERT as the beginning of a Q-Former, as BLIP-2's first stage begins."""

import torch
from torch import Tensor

from latentmodal.bridges.convert.qformer import Converted, StateDict, read_lavis_names, refuse

# BERT's parts that a Q-Former does without.
_LEFT_OUT = (
    "bert.embeddings.token_type_embeddings.",
    "bert.embeddings.position_ids",
    "bert.pooler.",
    "cls.seq_relationship.",
)
# Old files call the parameters of a norm by other names.
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# Of ours, what BERT has nothing for.
_OWN = ("queries", "input_norm.", "input_positions", "feature_kv.", "proj.")
_WORD_ROWS = ("word_embed.weight", "caption_head.bias")
_TEXT_BRANCH = ("word_embed.", "position_embed.", "caption_head.")


def qformer_from_bert(state: StateDict, bridge_state: StateDict) -> Converted:
    """Put BERT's weights into a freshly initialised Q-Former's.

    Both feed-forwards of a layer begin as BERT's. The last row of the word embedding (the id that
    captioning starts from, which BERT does not know), cross-attention, queries, the norm over the
    features and the projection stay as they are; so does the caption head if BERT comes without.

    Args:
        state: BERT's, with or without the prefix `bert.`, with or without its heads.
        bridge_state: `QFormer.state_dict()`; is not changed.

    Returns:
        The whole Q-Former under `bridge.`; `unused` lists keys of BERT, `absent` the weights that
        stay wholly as they are.

    Raises:
        ValueError: unknown, missing or wrongly shaped weights, all in one line.
    """
    keys = {f"Qformer.{_full_name(key)}": key for key in state}
    bert = {name: state[key] for name, key in keys.items()}
    names, repeats, problems = read_lavis_names(bert)
    unused = []
    result = dict(bridge_state)
    begun = set()
    for name, value in bert.items():
        targets = _targets(names[name]) if name in names else []
        present = [target for target in targets if target in bridge_state]
        for target in present:
            result[target], problem = _fit(target, value, bridge_state[target])
            problems += problem
        begun.update(present)
        without_text = targets and targets[0].startswith(_TEXT_BRANCH)
        if without_text or name.removeprefix("Qformer.").startswith(_LEFT_OUT):
            unused += [] if present else [keys[name]]
        elif not present and name not in repeats:
            problems.append(f"{keys[name]} is unknown")

    captions = any(name.startswith("caption_head.") for name in begun)
    absent = [name for name in bridge_state if name not in begun]
    problems += [
        f"nothing becomes {name}"
        for name in absent
        if not name.startswith(_OWN)
        and ".cross_attention." not in name
        and (captions or not name.startswith("caption_head."))
    ]
    refuse(sorted(problems))
    return Converted(
        {f"bridge.{name}": value for name, value in result.items()},
        {},
        sorted(unused),
        [f"bridge.{name}" for name in absent],
    )


def _full_name(key: str) -> str:
    for old, new in _LEGACY.items():
        key = key.replace(old, new)
    return key if key.startswith(("bert.", "cls.")) else f"bert.{key}"


def _targets(name: str) -> list[str]:
    """Where a weight goes; without the prefix of the bridge."""
    name = name.removeprefix("bridge.")
    query_name = name.replace(".text_mlp.", ".query_mlp.")
    return [name] if query_name == name else [query_name, name]


def _fit(name: str, value: Tensor, fresh: Tensor) -> tuple[Tensor, list[str]]:
    """A copy of BERT's value in the place of ours, and what stands against it."""
    value = value.to(fresh)
    less = name in _WORD_ROWS
    wanted = (len(fresh) - less, *fresh.shape[1:])
    if value.shape != wanted:
        rows = ", all but the last row" if less else ""
        return fresh, [f"{name} takes {wanted}{rows}, BERT has {tuple(value.shape)}"]
    return (torch.cat([value, fresh[-1:]]) if less else value.clone()), []
