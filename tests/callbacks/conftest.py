"""The helpers beside these tests, and those of the stages, can be imported."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "stages"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
