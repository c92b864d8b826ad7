"""What a GPU hour and a million tokens cost: the dated price book, a user's own prices, Spheron's offers API."""

import datetime as dt
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError, unknown

BOOK = DATA / "prices.yaml"
SPHERON = "https://app.spheron.ai"
STALE_DAYS = 90


class Dated(BaseModel):
    """A figure with its source; one of unknown age counts as stale, a user's own never."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    provider: str = "own"
    source: str = "the user"
    date: dt.date | None = None
    confidence: str = "quoted"

    def told(self, today: dt.date) -> dict[str, Any]:
        """The record as JSON holds it, with `age_days` and `is_stale`: older than 90 days."""
        age = (today - self.date).days if self.date else None
        stale = self.provider != "own" and (age is None or age > STALE_DAYS)
        return self.model_dump(mode="json") | {"age_days": age, "is_stale": stale}


class GpuPrice(Dated):
    """One row of the book: USD per GPU and hour by market, None where none was found."""

    gpu: str
    on_demand: PositiveFloat | None = None
    spot: PositiveFloat | None = None
    reserved: PositiveFloat | None = None
    reserved_term: str | None = None
    region: str | None = None
    discount_fraction: float = Field(0.0, ge=0, lt=1)  # what the user was granted on these prices
    minimum_runtime_s: NonNegativeFloat | None = None
    interruption_notice_s: NonNegativeFloat | None = None

    def usd_per_hour(self, market: str) -> float:
        """USD per GPU and hour on that market, discount taken off.

        >>> GpuPrice(gpu="t4-16gb", on_demand=2.0, discount_fraction=0.25).usd_per_hour("on_demand")
        1.5
        """
        return float(getattr(self, market) * (1 - self.discount_fraction))


class TokenPrice(Dated):
    """USD per million tokens of an API; `cached` is None where it has no such price."""

    model: str
    input: PositiveFloat
    output: PositiveFloat
    cached: PositiveFloat | None = None


def own_prices(prices: Mapping[str, Any] | str) -> list[GpuPrice]:
    """A user's prices, GPU to fields of GpuPrice, given or in a YAML file of that name."""
    try:
        records = load_yaml(Path(prices)) if isinstance(prices, str) else prices
        return [GpuPrice(**{"gpu": gpu, **fields}) for gpu, fields in records.items()]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"prices: {first['loc'][0]}: {first['msg'].lower()} (got {first['input']!r})") from None
    except (AttributeError, TypeError):
        raise UserError(f"prices {prices!r}: not a mapping from GPU to on_demand, spot, reserved") from None


def book(path: Path = BOOK) -> list[GpuPrice]:
    """The newest row of each provider, GPU and region, with that provider's runtime and notice."""
    data, newest = load_yaml(path), {}
    for record in sorted(data["gpus"], key=lambda one: one["date"] or dt.date.min):
        terms = data["providers"].get(record["provider"], {})
        kept = {name: terms.get(name) for name in ("minimum_runtime_s", "interruption_notice_s")}
        newest[record["provider"], record["gpu"], record.get("region")] = GpuPrice(**kept | record)
    return list(newest.values())


def find(gpu: str, market: str, rows: list[GpuPrice], provider: str | None = None) -> GpuPrice | None:
    """The cheapest row for a GPU on that market; the user's own first, undated ones last."""
    if provider is not None and provider not in (names := {row.provider for row in rows}):
        raise unknown("provider", provider, names, shown=20)
    found = [row for row in rows if row.gpu == gpu and getattr(row, market)]
    found = [row for row in found if provider is None or row.provider in (provider, "own")]
    return min(found, key=lambda row: (row.provider != "own", not row.date, row.usd_per_hour(market)), default=None)


def token_price(model: str) -> TokenPrice | None:
    """The cheapest per-token API for a model of the catalogue, dated ones first."""
    rows = [TokenPrice(**record) for record in load_yaml(BOOK)["tokens"] if record["model"] == model]
    return min(rows, key=lambda row: (row.date is None, row.input + row.output), default=None)


def spheron_offers(base_url: str = SPHERON, today: dt.date | None = None) -> list[GpuPrice]:
    """The cheapest price per GPU and market that Spheron's public offers API has now."""
    lowest: dict[str, dict[str, float]] = {}
    page = pages = 1
    while page <= pages:
        url = f"{base_url}/api/gpu-offers?page={page}&limit=100"
        try:
            with urlopen(url, timeout=30) as reply:
                answer = json.load(reply)
            offers = [(group, offer) for group in answer["data"] for offer in group["offers"]]
            page, pages = page + 1, int(answer["totalPages"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url}: no offers could be read ({error!r})") from None
        for group, offer in offers:
            text = " ".join(str((group | offer).get(name)) for name in ("gpuType", "displayName", "name")).lower()
            gpu = next((key for pattern, key in load_yaml(BOOK)["spheron_names"] if re.search(pattern, text)), None)
            if gpu is None or not offer.get("available") or offer.get("maintenance") or not offer.get("gpuCount"):
                continue
            market = "spot" if str(offer.get("instanceType")).upper() == "SPOT" else "on_demand"
            for name, usd in ((market, offer.get("price")), ("spot", offer.get("spot_price"))):
                if usd:
                    prices = lowest.setdefault(gpu, {})
                    prices[name] = min(float(usd) / int(offer["gpuCount"]), prices.get(name, 1e9))
    source = {"provider": "spheron", "source": f"{base_url}/api/gpu-offers", "date": today or dt.date.today()}
    return [GpuPrice.model_validate({"gpu": gpu, **prices, **source}) for gpu, prices in lowest.items()]


def refresh(path: Path = BOOK, base_url: str = SPHERON, today: dt.date | None = None) -> list[GpuPrice]:
    """Append Spheron's prices of today to a price book; its older rows stay."""
    rows = spheron_offers(base_url, today)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            record = row.model_dump(exclude_unset=True) | {"confidence": "quoted"}
            file.write(f"  - {yaml.safe_dump(record, default_flow_style=True, width=999)}")
    load_yaml.cache_clear()
    return rows
