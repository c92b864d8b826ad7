"""Models of data/models, of a user's config.json, or of a reachable hub."""

import json
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from kit.catalog.architecture import ModelSpec, parse_config
from kit.catalog.paths import DATA
from kit.catalog.quantization import split_suffix
from kit.errors import UserError, unknown

# Words that name a tuning of one shape, not another shape.
_VARIANT = re.compile(r"-(instruct|it|chat|hf|base|text|thinking|\d{4})(?=-|$)")


def normalize(name: str) -> str:
    """A name as look-ups compare it: no organisation, case, tuning or "meta-" prefix.

    >>> normalize("RedHatAI/Meta-Llama-3.1-8B-Instruct")
    'llama-3.1-8b'
    """
    return _VARIANT.sub("", _short(name).replace("_", "-").removeprefix("meta-"))


def _short(name: str) -> str:
    return name.strip().rstrip("/").rsplit("/", 1)[-1].lower()


@cache
def _index() -> dict[str, Path]:
    """Every key, id and alias, as written, then normalised; an exact name wins."""
    records = [(path, _read_json(path)) for path in sorted((DATA / "models").glob("*.json"))]
    index: dict[str, Path] = {path.stem: path for path, _ in records}
    for rule in (_short, normalize, lambda name: normalize(split_suffix(name)[0])):
        for path, record in records:
            for name in (record["id"], *record.get("aliases", [])):
                index.setdefault(rule(name), path)
    return index


def model_keys() -> list[str]:
    """Every key of data/models."""
    return [path.stem for path in sorted((DATA / "models").glob("*.json"))]


def model(name: str) -> ModelSpec:
    """The model of a key, id, config.json path or hub id; refuses others with near names."""
    if spec := _from_path(name):
        return spec
    direct = DATA / "models" / f"{name.strip().lower()}.json"
    if "/" not in name and direct.is_file():
        return _from_record(direct)
    base, quantization = split_suffix(name.strip())
    names = (_short(name), _short(base), normalize(name), normalize(base))
    path = next((_index()[one] for one in names if one in _index()), None)
    if path is None:
        return _from_hub(name)
    spec = _from_record(path)
    exact = _short(name) in _index() and spec.quantization is not None
    return replace(spec, quantization=quantization) if quantization and not exact else spec


@cache
def _from_record(path: Path) -> ModelSpec:
    record = _read_json(path)
    return parse_config(
        record["config"],
        key=path.stem,
        vision_parameters=record.get("vision_parameters"),
        kept={name: tuple(words) for name, words in record.get("kept_16_bit", {}).items()},
        source=record.get("source", path.name),
    )


def _from_path(name: str) -> ModelSpec | None:
    """A folder or file on disk; None where the name is no path."""
    path = Path(name).expanduser()
    looks_like_path = name.endswith(".json") or name.startswith((".", "/", "~"))
    if not path.exists():
        if looks_like_path:
            raise UserError(f"no such file or folder: {name}")
        return None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder")
        path = path / "config.json"
    config = _read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: config.json must hold a JSON object")
    return parse_config(config, key=str(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _from_hub(name: str) -> ModelSpec:
    """The config.json of a hub id; UserError where there is none, or the hub is not reached."""
    told, offline = unknown("model", name, model_keys()), os.environ.get("HF_HUB_OFFLINE") == "1"
    if "/" not in name or offline:
        raise UserError(f"{told}; the hub is not asked (HF_HUB_OFFLINE)" if "/" in name else str(told))
    import urllib.request  # 20 ms that only this path needs
    from urllib.parse import quote

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(f"{endpoint}/{quote(name)}/resolve/main/config.json")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            config = json.load(answer)
    except (OSError, ValueError) as error:  # not reachable, no such model, or no JSON
        raise UserError(f"{told}; {endpoint} has no config.json of it: {getattr(error, 'reason', error)}") from None
    return parse_config(config, key=name, source=f"{endpoint}/{name}")
