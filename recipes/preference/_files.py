"""Preference pairs and plain text, read from files."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lightning.pytorch.utilities import rank_zero_info

_ANSWER = "\n\nAssistant:"  # what precedes an answer in the dialogues of Anthropic's data


@final
@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which people chose one."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> list[Pair]:
    """Reads JSON lines with ``chosen`` and ``rejected``, and ``prompt`` if the two do not begin with it.

    Without ``prompt``, what both texts begin with is the prompt, up to the last ``Assistant:`` in it. Pairs with an
    empty answer or with two equal ones say nothing; they are left out, and counted in one line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object or lacks a field, with the line's number; or if no pair is left.
    """
    pairs, empty, equal = [], 0, 0
    for number, line in enumerate(_lines(path, "pairs"), 1):
        if not line.strip():
            continue
        pair = _pair(line, f"{path}, line {number}")
        if not (pair.chosen.strip() and pair.rejected.strip()):
            empty += 1
        elif pair.chosen == pair.rejected:
            equal += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} holds no pair of two different answers ({empty} with an empty one, {equal} equal).")
    if empty or equal:
        rank_zero_info(f"{path}: left out {empty} pairs with an empty answer and {equal} with two equal answers.")
    return pairs


def _pair(line: str, where: str) -> Pair:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with `chosen` and `rejected`, got {type(record).__name__}.")
    for field in ("chosen", "rejected"):
        if field not in record:
            raise ValueError(f"{where} lacks `{field}`; it has: {', '.join(record) or 'nothing'}.")
    for field in ("prompt", "chosen", "rejected"):
        if not isinstance(record.get(field, ""), str):
            raise ValueError(f"`{field}` in {where} must be text, got {type(record[field]).__name__}.")
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" in record:
        return Pair(record["prompt"], chosen, rejected)
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    prompt = chosen[: min(len(chosen), len(rejected)) if common is None else common]
    if _ANSWER in prompt:
        prompt = prompt[: prompt.rindex(_ANSWER) + len(_ANSWER)]
    return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def read_text(path: Path) -> str:
    """The text of a file, plain or compressed by gzip.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return "".join(_lines(path, "text"))


def _lines(path: Path, argument: str) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}`: there is no file {path}. Give one: --data.{argument} FILE.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from file
