import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # tests share `stage_runs`, and configs name `stage_faults` by import path
