"""Rows of prompts with reference answers: from files, `datasets` names and tasks, each checked at the door."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet

from sgopd.config import MAX_DEPTH, Config, UserError, nested_deeper, read_text

Example = dict[str, Any]  # {"prompt": text or messages, "answer": text, … the data set's own columns}
# More than MAX_DEPTH brackets opened in a row: pyarrow, which reads JSON for `datasets`, crashes on a hundred thousand.
DEEP = re.compile(rb"""(?:[\[{]\s*(?:"[^"]{0,99}"\s*:\s*)?){%d}""" % (MAX_DEPTH + 1))


class Row(NamedTuple):
    place: str  # where it stands, for messages
    columns: Example
    several: bool = False  # whether its answer is a list


def load_rows(config: Config, split: str) -> list[Row]:
    """Rows of the "train" or the "eval" side of `config`, with "prompt" and "answer" beside their own columns.

    Raises:
        UserError: the data cannot be read, a column is missing, or a row's prompt or answer is none.
    """
    evaluating = split == "eval"
    name = (config.eval_dataset_name if evaluating else None) or config.dataset_name
    size = config.eval_dataset_size if evaluating else config.dataset_size
    part = (config.dataset_test_split if evaluating else None) or config.dataset_train_split
    columns = {"prompt_column": config.prompt_column, "answer_column": config.answer_column}
    if name.startswith("task:"):
        # The questions do not follow the run's seed: runs with different seeds are compared on the same ones.
        rows = read_task(name, part, size, 0 if evaluating else config.seed, config.dataset_kwargs)
        columns = {"prompt_column": "prompt", "answer_column": "answer"}
    elif is_file(name):
        rows = read_file(name, config.answer_column)
    else:
        rows = read_hub(name, part, config)
    if evaluating:
        rows = rows[:size]
    elif config.teacher_column is not None:
        for row in rows:
            check_teacher(row, config.teacher_column, config.teachers)
    return [with_prompt_and_answer(row, columns, config) for row in rows]


def check_teacher(row: Row, column: str, teachers: Collection[str]) -> None:
    """Refuses a row that does not name one of several teachers."""
    if column not in row.columns:
        raise UserError(
            f"{row.place} has no column {column!r}; its columns are {', '.join(map(str, row.columns)) or 'none'}. Name "
            "the one with each prompt's teacher with teacher_column"
        )
    name = row.columns[column]
    if not isinstance(name, str) or name not in teachers:
        raise UserError(
            f"{row.place}, column {column!r}: {shown(name)} is no teacher's name; those in "
            f"teacher_model_name_or_path are {', '.join(teachers)}. Correct the row, or give that teacher there"
        )


def is_file(name: str) -> bool:
    return name.endswith((".jsonl", ".json", ".parquet"))


def with_prompt_and_answer(row: Row, columns: dict[str, str], config: Config) -> Row:
    """`row` with its prompt, and its answer as text, under these names."""
    place, values, _ = row
    for setting, column in columns.items():
        if column not in values:
            raise UserError(
                f"{place} has no column {column!r}; its columns are {', '.join(map(str, values)) or 'none'}. "
                f"Name the right one with {setting}"
            )
    prompt, answer = values[columns["prompt_column"]], values[columns["answer_column"]]
    several = isinstance(answer, list)
    try:
        check_prompt(prompt)
    except ValueError as error:
        raise UserError(f"{place}, column {columns['prompt_column']!r}: {error}") from error
    # Some of reasoning_gym's puzzles have no answer, and a scorer that needs none.
    if not (answer is None and config.verifier == "reasoning-gym"):
        try:
            answer = answer_text(answer)
        except ValueError as error:
            raise UserError(
                f"{place}, column {columns['answer_column']!r}: {error}. Expected text, a number, or a list of these "
                "that all belong to the answer: write it so, or leave the row out"
            ) from error
    return Row(place, {**values, "prompt": prompt, "answer": answer}, several)


# --- what a prompt and an answer may be. A ValueError says what came instead ---


def answer_text(value: Any) -> str:
    """A reference answer as text: numbers without exponents, and the elements of a list with commas between them."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, list) and value and not any(isinstance(item, list) for item in value):
        return ", ".join(map(answer_text, value))
    if isinstance(value, str) and value.strip():
        return check_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        text = format(Decimal(str(value)), "f")
        # The zeros at the end of a Decimal are its column's, not the number's.
        return text.rstrip("0").rstrip(".") if isinstance(value, Decimal) and "." in text else text
    raise ValueError(f"got {shown(value)}")


def check_prompt(value: Any) -> None:
    """Refuses what is neither text nor a conversation in which it is the assistant's turn."""
    if isinstance(value, str):
        check_text(value)
        return
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"got {shown(value)}; expected text or a list of {{role, content}} messages")
    role = None
    for number, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not {"role", "content"} <= message.keys():
            keys = ", ".join(map(str, message)) or "none"
            raise ValueError(f"message {number} has the keys {keys}; expected role and content")
        if not isinstance(role, str) or not role.strip():
            raise ValueError(f"the role of message {number} is {shown(role)}; expected text such as 'user'")
        for text in (role, *texts_of(content, number)):
            check_text(text)
    if role == "assistant":
        raise ValueError(
            "the conversation ends with the assistant's turn, but it is the student that writes it. Leave the last "
            "message out of the prompt"
        )


def texts_of(content: Any, number: int = 0) -> list[str]:
    """The texts of a message's content: its own, or those of its parts."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content:
        raise ValueError(f"the content of message {number} is {shown(content)}; expected text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else shown(part)
            raise ValueError(
                f"the content of message {number} has {what}; expected text, or parts {{type: text, text: …}} only: "
                "models are trained on text alone"
            )
    return [part["text"] for part in content]


def check_text(text: str) -> str:
    """Refuses half a character, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of {shown(text)} is a lone surrogate, half of a character. Write the file anew "
            "from the original text"
        ) from error
    return text


def shown(value: Any) -> str:
    """A value as JSON has it, cut to what a message can hold."""
    if isinstance(value, (str, list, dict, bool, float, type(None))):
        text = json.dumps(value, default=repr, ensure_ascii=False)
    else:
        text = f"{value!r} ({type(value).__name__})"
    return text[:80].encode("utf-8", "backslashreplace").decode()


# --- readers ---


def read_task(name: str, split: str, size: int, seed: int, options: dict[str, Any]) -> list[Row]:
    """Examples of a procedural task."""
    from sgopd.tasks import load_task

    try:
        examples = load_task(name.removeprefix("task:"), **{"split": split, "size": size, "seed": seed, **options})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"dataset_name {name!r}: {error}") from error
    return numbered(name, examples)


def read_file(name: str, answer_column: str) -> list[Row]:
    """Rows of a JSON Lines or parquet file."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no data file {name} (looked from {Path.cwd()})")
    if path.suffix != ".parquet":
        return list(read_json_lines(path))
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{name} is not a readable parquet file: {error}") from error
    try:
        rows = table.to_pylist()
    except (ValueError, ArithmeticError) as error:  # text that is not UTF-8, dates that Python does not have
        raise UserError(f"{fault_of(name, table)}: {error}") from error
    return numbered(name, as_meant(rows, table.schema, answer_column))


def read_json_lines(path: Path) -> Iterable[Row]:
    """Rows of a file with a JSON object a line; the blank lines count as lines."""

    def unique(pairs: list[tuple[str, Any]]) -> Example:
        if len(row := dict(pairs)) < len(pairs):
            key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise UserError(f"{place}: the key {shown(key)} is there twice. Leave one of them out")
        return row

    for number, line in enumerate(io.StringIO(read_text(path, "data file"), newline=None), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=unique)
            if nested_deeper(row):
                raise RecursionError
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error}); expected one object a line") from error
        except ValueError as error:
            raise UserError(f"{place}: a number has more digits than Python reads. Write it as text") from error
        except RecursionError as error:
            raise UserError(
                f"{place}: lists and objects are nested more than {MAX_DEPTH} deep. Leave that column out"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, got {type(row).__name__}")
        yield Row(place, row)


def read_hub(name: str, split: str, config: Config) -> list[Row]:
    """Rows of a split of a `datasets` name or folder."""
    import datasets

    if name == "pandas":  # datasets' reader of .pkl files, in versions that still have it
        raise UserError(
            "dataset_name: 'pandas' reads pickles, which can run code. Save the data as parquet or JSON Lines"
        )
    for path in sorted(Path(name).rglob("*.json*")) if Path(name).is_dir() else ():
        if opened := DEEP.search(path.read_bytes()):
            line = path.read_bytes().count(b"\n", 0, opened.start()) + 1
            raise UserError(f"{path}, line {line}: lists and objects are nested more than {MAX_DEPTH} deep")
    try:
        data = datasets.load_dataset(name, config.dataset_config, split=split, **config.dataset_kwargs)
        rows, schema = data.to_list(), data.with_format("arrow")[:0].schema
    except Exception as error:  # datasets raises its own, the hub's, pyarrow's and fsspec's
        causes, cause = [str(error)], error.__cause__
        while cause is not None:
            causes.append(str(cause))
            cause = cause.__cause__
        raise UserError(
            f"datasets cannot load {name!r} (split {split!r}): {': '.join(dict.fromkeys(causes))}. Expected a .jsonl "
            "or .parquet file, a name or folder that datasets.load_dataset takes, or task:<name>. Where there is no "
            "evaluation split, set dataset_test_split to null"
        ) from error
    return numbered(f"{name} ({split})", as_meant(rows, schema, config.answer_column))


def numbered(name: str, rows: Iterable[Example]) -> list[Row]:
    return [Row(f"{name}, row {number} (the first is 0)", row) for number, row in enumerate(rows)]


def as_meant(rows: list[Example], schema: pyarrow.Schema, column: str) -> list[Example]:
    """`rows` with what the numbers of `column` stand for: names of classes, and 0.1 where float32 has its nearest."""
    if column not in schema.names:
        return rows
    kind, feature = schema.field(column).type, None
    while hasattr(kind, "value_type"):  # lists
        kind = kind.value_type
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        feature = datasets.Features.from_arrow_schema(schema)[column]
        while hasattr(feature, "feature"):
            feature = feature.feature
    if names := getattr(feature, "names", None):
        mean: Callable[[Any], Any] = lambda number: names[number] if 0 <= number < len(names) else None  # noqa: E731
    elif pyarrow.types.is_floating(kind) and kind.bit_width < 64:
        width = numpy.float16 if kind.bit_width == 16 else numpy.float32
        mean = lambda number: float(str(width(number)))  # noqa: E731
    else:
        return rows

    def meant(value: Any) -> Any:
        if isinstance(value, list):
            return [meant(item) for item in value]
        return None if value is None else mean(value)

    return [{**row, column: meant(row[column])} for row in rows]


def fault_of(name: str, table: pyarrow.Table) -> str:
    """Where the value is that cannot be read."""
    for column in table.column_names:
        for number, value in enumerate(table[column]):
            try:
                value.as_py()
            except (ValueError, ArithmeticError):
                return f"{name}, row {number} (the first is 0), column {column!r}"
    return name
