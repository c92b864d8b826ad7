"""The price book, a user's own prices, staleness, and the client of Spheron's offers API on a recorded server."""

import json
import threading
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from kit import prices
from kit.catalog import gpu_keys, model
from kit.catalog.paths import DATA, load_yaml
from kit.errors import UserError

TODAY = date(2026, 11, 24)
BOOK = load_yaml(DATA / "prices.yaml")

# Two pages as the public offers API lays them out: groups by GPU, each with its offers.
PAGES = [
    {"total": 3, "page": 1, "limit": 100, "totalPages": 2, "data": [
        {"gpuType": "H100_SXM5", "gpuModel": "H100", "displayName": "H100 SXM5", "lowestPrice": 2.9, "offers": [
            {"offerId": "a1", "provider": "voltage-park", "name": "1x H100 SXM5", "gpuCount": 1, "gpu_memory": 80,
             "price": 3.1, "available": True, "maintenance": False, "instanceType": "DEDICATED", "clusters": ["us-1"]},
            {"offerId": "a8", "provider": "voltage-park", "name": "8x H100 SXM5", "gpuCount": 8, "gpu_memory": 80,
             "price": 23.2, "available": True, "maintenance": False, "instanceType": "DEDICATED", "clusters": ["us-1"]},
            {"offerId": "a1::spot", "provider": "data-crunch", "name": "1x H100 SXM5", "gpuCount": 1, "gpu_memory": 80,
             "price": 1.4, "available": True, "maintenance": False, "instanceType": "SPOT", "clusters": ["fin-3"]},
            {"offerId": "a2", "provider": "sesterce", "name": "1x H100 SXM5", "gpuCount": 1, "gpu_memory": 80,
             "price": 0.9, "available": False, "maintenance": False, "instanceType": "DEDICATED", "clusters": []}]}]},
    {"total": 3, "page": 2, "limit": 100, "totalPages": 2, "data": [
        {"gpuType": "rtx-5090", "displayName": "RTX 5090", "offers": [
            {"offerId": "b1", "provider": "tensordock", "name": "RTX 5090", "gpuCount": 1, "gpu_memory": 32,
             "price": 0.8, "spot_price": 0.5, "available": True, "maintenance": False, "instanceType": "DEDICATED"}]},
        {"gpuType": "A6000", "displayName": "RTX A6000", "offers": [
            {"offerId": "c1", "name": "A6000", "gpuCount": 1, "price": 0.4, "available": True, "maintenance": False,
             "instanceType": "DEDICATED"}]}]},
]  # fmt: skip


class Offers(BaseHTTPRequestHandler):
    """Answers GET /api/gpu-offers?page=N; any other path is an error page."""

    def do_GET(self):
        where = urlparse(self.path)
        good = where.path == "/api/gpu-offers"
        page = int(parse_qs(where.query).get("page", ["1"])[0])
        body = json.dumps(PAGES[page - 1] if good else {"error": "not found"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    one = HTTPServer(("127.0.0.1", 0), Offers)
    thread = threading.Thread(target=one.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()
    thread.join()


def test_every_row_names_a_known_gpu_and_its_source():
    for record in BOOK["gpus"]:
        row = prices.GpuPrice(**record)
        assert row.gpu in gpu_keys()
        assert row.provider in BOOK["providers"]
        assert row.source
        assert row.confidence in ("quoted", "low")
        assert row.on_demand or row.spot or row.reserved
        assert row.date is None or row.date <= TODAY
        assert row.date is not None or row.confidence == "low"


def test_token_prices_name_models_of_the_catalogue():
    for record in BOOK["tokens"]:
        price = prices.TokenPrice(**record)
        assert model(price.model).key == price.model
    assert prices.token_price("llama-3.1-8b").provider == "deepinfra"
    assert prices.token_price("opt-125m") is None


@pytest.mark.parametrize(
    ("read", "provider", "stale"),
    [(date(2026, 8, 26), "aws", False), (date(2026, 8, 25), "aws", True), (None, "aws", True), (None, "own", False)],
)
def test_stale_after_ninety_days(read, provider, stale):
    told = prices.Dated(provider=provider, date=read).told(TODAY)
    assert told["is_stale"] is stale
    assert told["age_days"] == (None if read is None else (TODAY - read).days)


def test_the_newest_row_of_a_provider_counts():
    rows = [row for row in prices.book() if (row.provider, row.gpu) == ("spheron", "h100-sxm-80gb")]
    assert [(row.on_demand, row.date) for row in rows] == [(5.07, date(2026, 6, 3))]
    assert rows[0].minimum_runtime_s == 1200


def test_the_cheapest_dated_row_is_found_and_a_provider_can_be_chosen():
    rows = prices.book()
    assert prices.find("h100-pcie-80gb", "on_demand", rows).provider == "runpod-community"
    assert prices.find("h100-pcie-80gb", "spot", rows).usd_per_hour("spot") == 2.0
    assert prices.find("h100-sxm-80gb", "spot", rows).date is not None  # an undated 1.00 exists
    assert prices.find("h100-sxm-80gb", "on_demand", rows, "aws").usd_per_hour("on_demand") == 6.88
    assert prices.find("t4-16gb", "on_demand", rows) is None
    with pytest.raises(UserError, match=r"unknown provider 'asw'; nearest: aws"):
        prices.find("t4-16gb", "on_demand", rows, "asw")


def test_an_own_price_goes_before_any(tmp_path):
    own = {"h100-pcie-80gb": {"on_demand": 9.0, "discount_fraction": 0.1}}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(own))
    for given in (own, str(file)):
        found = prices.find("h100-pcie-80gb", "on_demand", prices.own_prices(given) + prices.book())
        assert found.provider == "own"
        assert found.usd_per_hour("on_demand") == pytest.approx(8.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"t4-16gb": {"on_demand": 1, "discount_fraction": -0.2}}, r"discount_fraction: .*greater.*\(got -0.2\)"),
        ({"t4-16gb": {"on_demand": -1}}, r"on_demand: .*\(got -1\)"),
        ({"t4-16gb": {"ondemand": 1}}, "ondemand: extra"),
        ({"t4-16gb": 3}, "not a mapping"),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
    ],
)
def test_bad_own_prices_are_told_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as told:
        prices.own_prices(given)
    assert "\n" not in str(told.value)


def test_offers_become_the_cheapest_price_per_gpu_and_market(server):
    rows = {row.gpu: row for row in prices.spheron_offers(server, TODAY)}
    assert set(rows) == {"h100-sxm-80gb", "rtx-5090-32gb"}  # an A6000 is no GPU of the catalogue
    assert rows["h100-sxm-80gb"].on_demand == pytest.approx(2.9)  # eight for 23.2; 0.9 is not available
    assert rows["h100-sxm-80gb"].spot == 1.4
    assert (rows["rtx-5090-32gb"].on_demand, rows["rtx-5090-32gb"].spot) == (0.8, 0.5)
    assert all(row.date == TODAY and row.provider == "spheron" for row in rows.values())


def test_a_refresh_appends_and_keeps_what_was_there(server, tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text(prices.BOOK.read_text())
    prices.refresh(file, server, date(2026, 11, 25))
    assert len(load_yaml(file)["gpus"]) == len(BOOK["gpus"]) + 2
    spot = prices.find("rtx-5090-32gb", "spot", prices.book(file))
    assert (spot.spot, spot.date, spot.minimum_runtime_s) == (0.5, date(2026, 11, 25), 1200)
    assert file.read_text().startswith(prices.BOOK.read_text())


def test_a_server_without_offers_is_told(server):
    with pytest.raises(UserError, match="no offers could be read"):
        prices.spheron_offers(f"{server}/elsewhere")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/api/gpu-offers"):
        prices.spheron_offers("http://127.0.0.1:1")
