import json
import sys
from pathlib import Path

import pytest

from tulu_lightning.data.sources import Source

sys.path.append(str(Path(__file__).parent))  # the chat tests share `chat_tokenizers`


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or raw lines) to a JSON-lines file and returns its source."""

    def write(rows, name="rows") -> Source:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return Source(name, path=str(path))

    return write
