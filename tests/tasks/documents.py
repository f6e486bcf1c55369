"""The documents of the tasks here."""

import json
from pathlib import Path

from datasets import Dataset


def read(**_metadata: object) -> dict[str, Dataset]:
    """sums_and_letters.jsonl as lm-eval wants its documents."""
    lines = (Path(__file__).parent / "sums_and_letters.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
