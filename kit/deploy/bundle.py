"""A bundle: every template of an architecture, rendered with one set of values; values.yaml stays the user's."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kit import __version__
from kit.catalog.paths import DATA, load_yaml
from kit.deploy.context import TEMPLATES, context
from kit.deploy.values import Source, defaults
from kit.errors import UserError, unknown

ARCHITECTURES: Mapping[str, Any] = load_yaml(DATA / "deploy.yaml")["architectures"]
SIZED = ("sessions", "sessions_interval", "kv_cache_tokens", "speed", "speed_interval", "start_s", "weight")
FREE = ("flags", "node_selector")  # maps whose keys are the engine's or the cluster's own
KINDS = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
HEAD = "# Yours to edit: kit deploy keeps this file and renders the others from it.\n"


def render(source: Source, architecture: str, out: Path, target: str | None = None) -> dict[str, Any]:
    """Writes the bundle and returns what bundle.json holds: architecture, target, values, files with their hashes."""
    target = check_target(architecture, target)
    before = _manifest(out)
    computed = defaults(source, architecture)
    text, path = _values_text(computed), out / "values.yaml"
    values, untouched = computed, before.get("values_sha256")
    if path.is_file() and _hash(path.read_text(encoding="utf-8")) != untouched:
        text = path.read_text(encoding="utf-8")
        values = _merge(computed, _own(path), str(path))
    made = context(source.case, architecture, target, values)
    files = {"values.yaml": text, **_rendered(made, architecture, target)}
    record: dict[str, Any] = {"kit_version": __version__, "scenario": source.case.key, "architecture": architecture}
    record |= {"target": target, "values_sha256": _hash(_values_text(computed)), "values": values}
    record |= {"pools": {one["name"]: {name: one[name] for name in SIZED} for one in made["pools"]}}
    record |= {name: made[name] for name in ("warnings", "usd_per_hour", "gpus", "sessions")}
    record["files"] = {name: _hash(one) for name, one in sorted(files.items())}
    _write(out, files, before, record)
    return record


def check_target(architecture: str, target: str | None) -> str:
    """The target, by default the architecture's first; refuses unknown ones."""
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    targets = ARCHITECTURES[architecture]["targets"]
    if target is not None and target not in targets:
        raise unknown(f"target of {architecture}", target, targets)
    return target or str(next(iter(targets)))


def _rendered(values: Mapping[str, Any], architecture: str, target: str) -> dict[str, str]:
    """Text by path in the bundle; a name with __pool__ stands for a file per pool."""
    import jinja2

    texts = jinja2.Environment(
        "[%", "%]", "[[", "]]", "[#", "#]", trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip
    texts.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    texts.filters["shell"] = shlex.join
    files: dict[str, str] = {}
    root, *parts = ARCHITECTURES[architecture]["targets"][target]
    for folder in (root, *parts):
        for path in sorted((TEMPLATES / folder).rglob("*")):
            if path.is_file():
                name = path.relative_to(TEMPLATES / folder if folder == root else TEMPLATES).as_posix()
                files |= _expand(texts, path, name, values)
    tidy = {name: re.sub(r"\n{3,}", "\n\n", text).lstrip("\n") for name, text in files.items()}
    return {name: text for name, text in tidy.items() if text}  # what does not apply is empty


def _expand(texts: Any, path: Path, name: str, values: Mapping[str, Any]) -> dict[str, str]:
    if not name.endswith(".j2"):
        return {name: path.read_text(encoding="utf-8")}
    name, template = name.removesuffix(".j2"), texts.get_template(path.relative_to(TEMPLATES).as_posix())
    if not (each := re.search(r"__(\w+?)__", name)):
        return {name: template.render(values)}
    items = values[f"{each[1]}s"]
    return {name.replace(each[0], one["name"]): template.render(values, **{each[1]: one}) for one in items}


def _values_text(values: Mapping[str, Any]) -> str:
    comments = load_yaml(DATA / "deploy.yaml")["comments"]
    lines = yaml.safe_dump(dict(values), sort_keys=False, width=110, allow_unicode=True).splitlines()
    told = [(line, comments.get(line.strip().partition(":")[0])) for line in lines]
    return HEAD + "".join(f"{line}  # {note}\n" if note else f"{line}\n" for line, note in told)


def _own(path: Path) -> dict[str, Any]:
    load_yaml.cache_clear()
    own = load_yaml(path)
    if not isinstance(own, dict):
        raise UserError(f"{path}: not a mapping of names to values")
    return own


def _merge(computed: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The user's values over the computed ones; a name that nothing reads and a value of another kind are refused."""
    merged = dict(computed)
    for name, value in own.items():
        if name not in computed and not where.endswith(FREE):
            raise unknown(f"value in {where}:", name, computed, shown=30)
        base = computed.get(name)
        if base is not None and KINDS.get(type(value)) != KINDS[type(base)]:
            raise UserError(f"{where}: {name} is {KINDS[type(base)]}, like {base!r}; got {value!r}")
        if KINDS.get(type(value)) == "a number" and value <= 0:
            raise UserError(f"{where}: {name} must be above 0, got {value!r}")
        merged[name] = _merge(base or {}, value, f"{where}: {name}") if isinstance(value, dict) else value
    return merged


def _manifest(out: Path) -> dict[str, Any]:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is in the way")
    path = out / "bundle.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if strange := [one.name for one in out.glob("*") if one.name != "values.yaml"]:
        raise UserError(f"--out {out}: no bundle, but holds {strange[0]}; choose an empty or new folder")
    return {}


def _write(out: Path, files: Mapping[str, str], before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Only what changed; files of an earlier render that this one has no more are removed."""
    files = {**files, "bundle.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n"}
    for name in before.get("files", {}).keys() - files.keys():
        (out / name).unlink(missing_ok=True)
    for name, text in files.items():
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
