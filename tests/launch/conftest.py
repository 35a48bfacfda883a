import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))  # configs name the toy classes by import path


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name, text_or_data)` makes a file in an empty working directory and returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, content) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return name

    return make


TOY = """\
trainer:
  max_steps: 2
  default_root_dir: runs/toy
  logger: true
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
model:
  class_path: launch_toys.ToyStage
  init_args:
    backbone:
      path: m
    optimizer:
      lr: 0.1
data:
  class_path: launch_toys.ToyData
  init_args:
    sources:
    - path: a.jsonl
"""


@pytest.fixture
def toy(write):
    """The path of a config that works, in an empty working directory."""
    return write("toy.yaml", TOY)
