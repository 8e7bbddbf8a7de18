"""A recipe that uses every section, and files to read recipes from."""

from __future__ import annotations

from tensormix.recipe import Recipe

FULL = """
model: ./model
seed: 3
dtype: bfloat16
plan:
  - {blocks: last 2, sites: [q, k, v], method: {name: mixt, num_branches: 3}}
  - {blocks: 0, method: {name: mean_output}}
calibration: {text: {file: data/a.txt}, num_windows: 4, window: 64}
recover:
  steps: 30
  learning_rate: 1e-3
  text:
    - {file: data/a.txt, weight: 2}
    - {exam: true}
evaluate:
  perplexity: [{text: {hub: owner/text, config: raw, split: test}, window: 64, stride: 32}]
  exam: {num_questions: 40}
diagnose: {num_prompts: 8}
profile: {tokens: [1, 16]}
"""


def load(tmp_path, text, cls=Recipe, name="recipe.yaml"):
    (tmp_path / name).write_text(text)
    return cls.load(tmp_path / name)
