"""BLIP-2's chain of tiny trainings: CLIP, stage 1 on its tower, a language model, stage 2."""

from __future__ import annotations

STEPS = 6

ALIGNMENT = """
base: blip2/stage1_emoji
name: tiny-stage1
run_dir: RUNS/stage1
system:
  image_encoder: {path: RUNS/clip}
  tokenizer: {path: RUNS/clip}
  bridge: {width: 32, layers: 2, mlp_dim: 32, heads: 2, num_input_positions: 9, dropout: 0.1}
  embed_dim: 16
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2}
evaluation:
  tasks:
    unseen_pairs: {source: {preset: tiny}}
    unseen_pairs_itm: {source: {preset: tiny}, top_k: 4}
    swapped_by_itc: {source: {preset: tiny}}
    swapped_by_itm: {source: {preset: tiny}}
    swapped_by_itg: {source: {preset: tiny}}
    captions: {source: {preset: tiny}, baseline: {preset: tiny}}
"""

LANGUAGE_MODEL = """
base: lm/emoji
name: tiny-lm
run_dir: RUNS/lm
system: {width: 32, layers: 1, heads: 2, mlp_dim: 32}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 3, log_every: 1}
"""

GENERATION = """
base: blip2/stage2_emoji
name: tiny-stage2
run_dir: RUNS/stage2
system:
  image_encoder: {path: RUNS/clip}
  bridge: {width: 32, layers: 2, mlp_dim: 32, heads: 2, num_input_positions: 9, dropout: 0.1}
  llm: {name: causal, gguf: null, model: RUNS/lm/llm}
  pretrained: {path: RUNS/stage1}
  generation: {max_new_tokens: 6}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2}
evaluation:
  tasks:
    unseen_pairs: {source: {preset: tiny}, baseline: {preset: tiny}}
"""

NO_TASKS = "evaluation.tasks=null"
QUESTION = "system.prompt.text='{image}{bos}Question: {question} Answer: {answer}{eos}'"
SPLIT = "source: {name: emoji, preset: tiny, split: unseen_pairs}"
ASKED = f"evaluation.tasks.asked={{name: vqa, scoring: exact, {SPLIT}}}"
CAPTIONS = f"evaluation.tasks.said={{name: captions, {SPLIT}}}"
ITM = f"evaluation.tasks.found={{name: itm_retrieval, {SPLIT}}}"
