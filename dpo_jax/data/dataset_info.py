"""LLaMA-Factory's `dataset_info.json`: which files a dataset has, and what its columns and roles mean."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_jax.data.files import is_inside, is_remote
from dpo_jax.data.forms.rename import Columns
from dpo_jax.errors import UserError

FILE = "dataset_info.json"
_NAMED = re.compile(rf"(.*\b{re.escape(FILE)})(?::(.+))?")
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "om_hub_url", "cloud_file_name")
# Our names for the columns that an entry maps, in its two formats, and the columns that it means where it maps none.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHAREGPT = {"messages": "conversations"}
_BOTH = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios")}
_KEYS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
_ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_UNREAD = ("num_samples", "subset", "folder", "samples_ratio")


class _Described(BaseModel):
    """What is read of an entry, as it has to be spelt."""

    model_config = ConfigDict(strict=True)

    file_name: str | None = None
    hf_hub_url: str | None = None
    split: str | None = None
    ranking: bool | None = None
    formatting: str | None = None
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


@dataclass(frozen=True)
class Entry:
    """One dataset: its files (a path, or OWNER/NAME on the hub with a split), and its columns."""

    path: str
    hub: str
    split: str
    columns: Columns


def find_entry(dataset: str) -> Entry | None:
    """The dataset that `DIR/dataset_info.json:NAME` names, or the only ranking one of `DIR`; None for other names.

    UserError if the file, the name or what it says of the dataset cannot be used.
    """
    match = _NAMED.fullmatch(dataset)
    if match is None:
        path = os.path.join(os.path.expanduser(dataset), FILE)
        if is_remote(dataset) or not os.path.isfile(path) or not (ranking := _ranking(path, _entries(path))):
            return None
        name = ""
    else:
        path, name = os.path.expanduser(match[1]), match[2] or ""
        if not os.path.isfile(path):
            raise UserError(f"dataset={dataset}: there is no {path}; check the path")
        entries = _entries(path)
        if name and name not in entries:
            raise UserError(
                f"dataset={dataset}: {path} has no {name}; it has {', '.join(list(entries)[:20]) or 'none'}"
            )
        ranking = {name: entries[name]} if name else _ranking(path, entries)
    if len(ranking) != 1:
        there = f"has {len(ranking)} preference datasets ({', '.join(list(ranking)[:20]) or 'ranking is true of none'})"
        raise UserError(f"dataset={dataset}: {path} {there}; choose one by --config.dataset={path}:NAME")
    ((name, entry),) = ranking.items()
    return _entry(f"dataset={path}:{name}", os.path.dirname(path), entry)


def _entries(path: str) -> dict[str, Mapping[str, Any]]:
    """The entries of a file in LLaMA-Factory's form; none of any other file of this name."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())[:100]}); mend it") from None
    entries = found.items() if isinstance(found, dict) else ()
    return {name: one for name, one in entries if isinstance(one, dict) and any(one.get(place) for place in _PLACES)}


def _is_preference(entry: Mapping[str, Any]) -> bool:
    columns = entry.get("columns")
    return bool(entry.get("ranking")) or (isinstance(columns, dict) and bool(columns.get("kto_tag")))


def _ranking(path: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: entry for name, entry in entries.items() if _is_preference(entry)}


def _entry(what: str, directory: str, entry: Mapping[str, Any]) -> Entry:
    try:
        _Described.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{what}: {where}={first['input']!r:.60}: {first['msg']}; mend it") from None
    if not _is_preference(entry):
        raise UserError(
            f"{what}: ranking is not true, so its rows are no preferences; name a dataset with ranking: true"
        )
    if unread := next((key for key in _UNREAD if entry.get(key)), ""):
        raise UserError(
            f"{what}: {unread}={entry[unread]!r} is not read here; take it out, and choose the files yourself"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{what}: formatting={formatting!r} is unknown; use alpaca or sharegpt")
    ours = {**(_ALPACA if formatting == "alpaca" else _SHAREGPT), **_BOTH}
    mapped = entry.get("columns") or {}
    names = {str(column): ours[key] for key, column in mapped.items() if key in ours and column}
    if wrong := sorted(key for key in mapped if key not in {*_ALPACA, *_SHAREGPT, *_BOTH}):
        raise UserError(f"{what}: columns has {wrong[0]}, which is none of {', '.join((*_ALPACA, *_SHAREGPT, *_BOTH))}")
    columns = Columns({old: new for old, new in names.items() if old != new}, turns=_turns(entry.get("tags") or {}))
    if name := entry.get("file_name"):
        path = os.path.join(directory, str(name))
        if not is_inside(path, directory or "."):
            raise UserError(
                f"{what}: file_name={name} is not in the directory of {FILE}; name that file as the dataset"
            )
        return Entry(path, "", "", columns)
    if hub := entry.get("hf_hub_url"):
        return Entry("", str(hub), str(entry.get("split") or ""), columns)
    place = next(key for key in _PLACES if entry.get(key))
    raise UserError(f"{what}: {place} is not read here; download the files, and name them by file_name")


def _turns(tags: Mapping[str, Any]) -> dict[str, str]:
    """How messages spell their keys and roles where it is not as ours: `Columns.turns`."""
    keys = {str(tags[tag]): ours for tag, (usual, ours) in _KEYS.items() if tags.get(tag) not in (None, usual, ours)}
    roles = {str(tags[tag]): ours for tag, (usual, ours) in _ROLES.items() if tags.get(tag) not in (None, usual, ours)}
    if roles and not keys:
        keys = {"from": "role", "value": "content"}
    return {**keys, **{f"role {theirs}": ours for theirs, ours in roles.items()}}
