"""What a GPU hour and a million tokens cost: the dated price book, a user's own prices, Spheron's offers API."""

import datetime as dt
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError, unknown

BOOK = DATA / "prices.yaml"
SPHERON = "https://app.spheron.ai"
MARKETS = ("on_demand", "spot", "reserved")
STALE_DAYS = 90
TIMEOUT_S = 30


class Dated(BaseModel):
    """A figure with its source; without a date its age is unknown and it counts as stale."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    provider: str = "own"
    source: str = "the user's own price"
    date: dt.date | None = None
    confidence: str = "quoted"

    def age_days(self, today: dt.date) -> int | None:
        """Days since the price was read."""
        return (today - self.date).days if self.date else None

    def is_stale(self, today: dt.date) -> bool:
        """Whether it is older than 90 days; a user's own price is not."""
        age = self.age_days(today)
        return self.provider != "own" and (age is None or age > STALE_DAYS)

    def told(self, today: dt.date) -> dict[str, Any]:
        """The record as JSON holds it, with its age."""
        return self.model_dump(mode="json") | {"age_days": self.age_days(today), "is_stale": self.is_stale(today)}


class GpuPrice(Dated):
    """One row of the book: USD per GPU and hour by market, None where none was found."""

    gpu: str
    on_demand: PositiveFloat | None = None
    spot: PositiveFloat | None = None
    reserved: PositiveFloat | None = None
    reserved_term: str | None = None
    region: str | None = None
    discount_fraction: float = Field(0.0, ge=0, lt=1)  # what the user was granted on the prices above
    minimum_runtime_s: NonNegativeFloat | None = None
    interruption_notice_s: NonNegativeFloat | None = None

    def usd_per_hour(self, market: str) -> float | None:
        """USD per GPU and hour, discount taken off.

        >>> GpuPrice(gpu="t4-16gb", on_demand=2.0, discount_fraction=0.25).usd_per_hour("on_demand")
        1.5
        """
        usd = getattr(self, market)
        return None if usd is None else usd * (1 - self.discount_fraction)


class TokenPrice(Dated):
    """USD per million tokens of an API; cached is None where it has no such price."""

    model: str
    input: PositiveFloat
    output: PositiveFloat
    cached: PositiveFloat | None = None


def own_prices(prices: Mapping[str, Any] | str) -> list[GpuPrice]:
    """A user's prices: GPU to its fields, in a scenario or in a YAML file that it names."""
    records = load_yaml(Path(prices)) if isinstance(prices, str) else prices
    if not isinstance(records, Mapping) or not all(isinstance(one, Mapping) for one in records.values()):
        raise UserError(f"prices {prices!r}: not a mapping from GPU to on_demand, spot, reserved")
    try:
        return [GpuPrice(**{"gpu": gpu, **fields}) for gpu, fields in records.items()]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"prices: {first['loc'][0]}: {first['msg'].lower()} (got {first['input']!r})") from None


def book(path: Path = BOOK) -> list[GpuPrice]:
    """The newest row of each provider, GPU and region, with that provider's runtime and notice."""
    data = load_yaml(path)
    newest: dict[tuple[str, str, str | None], GpuPrice] = {}
    for record in sorted(data["gpus"], key=lambda one: one["date"] or dt.date.min):
        terms = data["providers"].get(record["provider"], {})
        kept = {name: terms.get(name) for name in ("minimum_runtime_s", "interruption_notice_s")}
        row = GpuPrice(**kept | record)
        newest[row.provider, row.gpu, row.region] = row
    return list(newest.values())


def find(gpu: str, market: str, rows: list[GpuPrice], provider: str | None = None) -> GpuPrice | None:
    """The cheapest row for a GPU on that market; the user's own first, undated ones only where none is dated."""
    if provider is not None and provider not in (names := {row.provider for row in rows}):
        raise unknown("provider", provider, names, shown=20)
    found = [row for row in rows if row.gpu == gpu and row.usd_per_hour(market) is not None]
    found = [row for row in found if provider in (None, row.provider) or row.provider == "own"]

    def rank(row: GpuPrice) -> tuple[bool, bool, float]:
        return row.provider != "own", row.date is None, row.usd_per_hour(market) or 0.0

    return min(found, key=rank, default=None)


def token_price(model: str) -> TokenPrice | None:
    """The cheapest per-token API for a model of the catalogue, dated ones first."""
    rows = [TokenPrice(**record) for record in load_yaml(BOOK)["tokens"] if record["model"] == model]
    return min(rows, key=lambda row: (row.date is None, row.input + row.output), default=None)


def spheron_offers(base_url: str = SPHERON, today: dt.date | None = None) -> list[GpuPrice]:
    """The cheapest on-demand and spot price per GPU of Spheron's public offers API, now."""
    names = load_yaml(BOOK)["spheron_names"]
    lowest: dict[str, dict[str, float]] = {}
    for offer in _offers(base_url):
        text = " ".join(str(offer.get(name) or "") for name in ("gpuType", "displayName", "name", "interconnectType"))
        gpu = next((key for pattern, key in names if re.search(pattern, text.lower())), None)
        count = int(offer.get("gpuCount") or 0)
        if gpu is None or not count or not offer.get("available") or offer.get("maintenance"):
            continue
        is_spot = str(offer.get("instanceType")).upper() == "SPOT"
        for market, usd in ((MARKETS[is_spot], offer.get("price")), ("spot", offer.get("spot_price"))):
            if usd:
                prices = lowest.setdefault(gpu, {})
                prices[market] = min(float(usd) / count, prices.get(market, float("inf")))
    source = {"provider": "spheron", "source": f"{base_url}/api/gpu-offers", "date": today or dt.date.today()}
    return [GpuPrice(gpu=gpu, **prices, **source) for gpu, prices in lowest.items()]  # type: ignore[arg-type]


def _offers(base_url: str) -> Iterator[dict[str, Any]]:
    """Every offer of every page, with the names of the GPU group that holds it."""
    page = pages = 1
    while page <= pages:
        url = f"{base_url}/api/gpu-offers?page={page}&limit=100"
        try:
            with urlopen(Request(url, headers={"Accept": "application/json"}), timeout=TIMEOUT_S) as answer:
                data = json.load(answer)
            groups, pages = data["data"], int(data.get("totalPages", 1))
        except (URLError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url}: no offers could be read ({error})") from None
        for group in groups:
            for offer in group.get("offers", []):
                yield {name: group.get(name) for name in ("gpuType", "displayName")} | offer
        page += 1


def refresh(path: Path = BOOK, base_url: str = SPHERON, today: dt.date | None = None) -> list[GpuPrice]:
    """Append Spheron's prices of today to a price book; its older rows stay."""
    rows = spheron_offers(base_url, today)
    lines = [
        yaml.safe_dump(row.model_dump(exclude_defaults=True), default_flow_style=True, width=10**6) for row in rows
    ]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"  - {line}" for line in lines)
    load_yaml.cache_clear()
    return rows
