"""Load, balancing, autoscaling and scraping: against hand-computed cases, and against small live servers."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from labkit import capacity
from labkit.serve import autoscale, balance, load, scrape
from labkit.serve.supervisor import supervise, taken
from labkit.stats import Estimate
from labkit.types import LabkitError, NotInstalled

needs_httpx = pytest.mark.skipif(not pytest.importorskip("importlib.util").find_spec("httpx"), reason="httpx is not installed")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")
BODY = {"messages": [{"role": "user", "content": "a prompt"}]}


# --- load --------------------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_repeatable():
    moments = load.arrivals(50, 400, seed=3)
    gaps = np.diff(moments)
    assert (gaps > 0).all() and moments[-1] < 400
    assert abs(len(moments) / 400 - 50) < 5 * (50 / 400) ** 0.5
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # exponential: deviation equals mean
    assert (load.arrivals(50, 400, seed=3) == moments).all() and len(load.arrivals(50, 400, seed=4)) != len(moments)
    assert len(load.arrivals(7, count=11)) == 11


@pytest.mark.parametrize("given", [{"rate": 0, "seconds": 1}, {"rate": 1}, {"rate": 1, "seconds": 1, "count": 1}, {"rate": 1, "seconds": -1}])
def test_arrivals_refuse_what_makes_no_sense(given):
    with pytest.raises(LabkitError, match="expected a rate above 0"):
        load.arrivals(**given)


def test_a_line_of_an_answer_whole_and_streamed():
    whole = json.dumps({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})
    part = "data: " + json.dumps({"choices": [{"delta": {"content": "h"}, "finish_reason": None}]})
    assert load.piece(whole) == ("hi", True) and load.piece(part) == ("h", False)
    assert load.piece("data: [DONE]") == ("", False) and load.piece('data: {"choices": []}') == ("", False) and load.piece("[1]") == ("", False)


def test_the_knee_is_where_the_curve_turns():
    rates, latencies = [1, 2, 3, 4, 5], [1.0, 1.1, 1.2, 1.3, 9.0]
    assert load.knee(rates, latencies) == 3
    with pytest.raises(LabkitError, match="three or more"):
        load.knee([1, 2], [1, 2])


def test_a_verdict_needs_the_whole_interval():
    assert load.verdict(Estimate(1, 0.5, 2), 2) == "within" and load.verdict(Estimate(3, 2.5, 4), 2) == "over"
    assert load.verdict(Estimate(1, 0.5, 2.1), 2) == "unsure" and load.verdict(Estimate(1, 0.5, math.inf), 2) == "unsure"
    assert load.verdict(Estimate(math.nan, math.nan, math.nan), 2) == "unsure"


def test_the_mean_wait_is_that_of_known_queues():
    assert capacity.waiting(5 * 3600, [0.1]) == pytest.approx(0.05)  # M/D/1 at half load: rho s / (2 (1 - rho))
    exponential = np.random.default_rng(0).exponential(0.1, 400_000)
    assert capacity.waiting(5 * 3600, exponential) == pytest.approx(0.1, rel=0.02)  # M/M/1: rho s / (1 - rho)
    assert capacity.waiting(10 * 3600, [0.1]) == math.inf


@needs_httpx
def test_latency_begins_when_a_request_was_due_not_when_the_server_took_it():
    with balance.lights(1, decode=0.1) as (server,):
        replies = load.run(server.url, [BODY], [0.0, 0.0, 0.0])
        alone = load.one_by_one(server.url, [BODY] * 3)
        most = load.capacity(server.url, [BODY] * 5)
    assert all(reply.good and reply.server == "a" for reply in replies)
    assert sorted(round(reply.latency, 1) for reply in replies)[0] >= 0.1 and max(reply.latency for reply in replies) >= 0.3
    assert all(0.1 <= reply.latency < 0.3 for reply in alone)  # a patient client never sees the queue
    assert 3 < most <= 10
    told = load.told(30, replies, 0.5)
    assert told.failed == 0 and told.requests == 3 and told.latency.low <= told.latency.value <= told.latency.high


@needs_httpx
def test_a_server_that_is_not_there_is_a_failure_not_an_error():
    (reply,) = load.run("http://127.0.0.1:9", [BODY], [0.0])
    assert reply.status == 0 and reply.problem and not reply.good
    assert load.told(1, [reply]).failed == 1


@needs_httpx
def test_locust_sends_the_same_schedule():
    try:
        load.locust_program()
    except NotInstalled:
        pytest.skip("Locust is not installed")
    due = load.arrivals(20, 1.5, seed=1)
    with balance.lights(1, decode=0.02) as (server,):
        ours, theirs = load.run(server.url, [BODY], due), load.locust(server.url, [BODY], due)
    assert [reply.due for reply in theirs] == pytest.approx(due.tolist())
    assert all(reply.good for reply in theirs) and {reply.server for reply in theirs} == {"a"}
    assert np.median([abs(a.latency - b.latency) for a, b in zip(ours, theirs, strict=True)]) < 0.05


# --- balancing ---------------------------------------------------------------------------------------------------


def test_only_the_keys_of_the_server_that_went_move():
    servers, keys = ["a", "b", "c", "d"], [f"k{i}" for i in range(400)]
    before = {key: balance.rendezvous(key, servers) for key in keys}
    after = {key: balance.rendezvous(key, servers[:-1]) for key in keys}
    assert all(before[key] == after[key] for key in keys if before[key] != "d")
    assert min(list(before.values()).count(one) for one in servers) > 60
    assert sum(balance.modulo(k, servers) != balance.modulo(k, servers[:-1]) for k in keys) > 200


def test_the_configuration_says_what_was_asked():
    text = balance.configuration("prefix", [1001, 1002], 8000, "/tmp/x", repeat=True, prefix=40)
    assert "hash $labkit_prefix consistent;" in text and "{1,40}" in text and "non_idempotent" in text
    assert "server 127.0.0.1:1002 max_fails=1" in text and "listen 127.0.0.1:8000;" in text
    assert "non_idempotent" not in balance.configuration("round robin", [1001], 8000, "/tmp/x")
    with pytest.raises(LabkitError, match="no policy 'random'"):
        balance.configuration("random", [1], 2, "/tmp")
    with pytest.raises(LabkitError, match="at least one port"):
        balance.configuration("session", [], 2, "/tmp")


def test_without_nginx_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(balance.shutil, "which", lambda *_, **__: None)
    with pytest.raises(NotInstalled, match="apt-get install nginx-light"), balance.nginx([1]):
        pass


@needs_httpx
@needs_nginx
def test_each_policy_sends_where_it_says():
    sessions = [{"X-Session": f"s{i % 4}"} for i in range(24)]
    bodies = [load.chat("m", f"prefix number {i % 4} " + "x" * 200) for i in range(24)]
    with balance.lights(3, decode=0.002, memory=2, prefix=40) as servers:
        seen = {}
        for policy in balance.POLICIES:
            with balance.nginx(servers, policy) as balancer:
                seen[policy] = load.run(balancer.url, bodies, np.arange(24) * 0.02, headers=sessions)
            entries = balancer.entries()  # readable after the program ended
            assert len(entries) == 24 and all(row["status"] == 200 and row["retries"] == 0 for row in entries)
    assert sorted([r.server for r in seen["round robin"]].count(name) for name in "abc") == [8, 8, 8]
    for policy in ("session", "prefix"):
        assert all(len({r.server for r in seen[policy][i::4]}) == 1 for i in range(4)), policy
    assert not any(taken(server.port) for server in servers)


@needs_httpx
@needs_nginx
def test_a_killed_server_loses_at_most_what_it_had_and_nothing_when_repeating_is_allowed():
    from concurrent.futures import ThreadPoolExecutor
    from time import sleep

    def struck(repeat):
        with balance.lights(3, decode=0.08) as servers, balance.nginx(servers, "least connections", repeat=repeat) as balancer:
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(load.run, balancer.url, [BODY], np.arange(60) * 0.025)
                sleep(0.8)
                balance.kill(servers[0])
                replies = job.result()
            return sum(not one.good for one in replies), balancer.entries()

    lost, _ = struck(repeat=False)
    assert lost <= 4  # what one server of three held at this load, with room for a busy machine
    none, log = struck(repeat=True)
    assert none == 0 and any(row["retries"] for row in log) and any("502" in row["statuses"] or "504" in row["statuses"] for row in log)


# --- autoscaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "metric", "target", "tolerance", "expected"),
    [(1, 200, 100, 0.1, 2), (4, 100, 100, 0.1, 4), (10, 105, 100, 0.1, 10), (10, 111, 100, 0.1, 12), (4, 50, 100, 0.1, 2), (3, 90, 100, 0.1, 3),
     (10, 105, 100, 0.01, 11), (5, 0, 100, 0.1, 0), (3, 0.7, 0.6, 0.1, 4)],
)  # fmt: skip
def test_the_published_ratio(current, metric, target, tolerance, expected):
    assert autoscale.desired(current, metric, target, tolerance) == expected


def test_scaling_down_waits_for_the_highest_wish_of_five_minutes():
    hpa = autoscale.Hpa(target=1, low=1, high=10)
    assert hpa.step(0, 2, 3.0) == 6
    assert [hpa.step(now, 6, 0.5) for now in (15, 150, 300)] == [6, 6, 6]  # the wish for six is still remembered
    assert hpa.step(301, 6, 0.5) == 3


def test_scaling_up_is_limited_within_a_period():
    hpa = autoscale.Hpa(target=1, high=100)
    assert hpa.step(0, 1, 50.0) == 5  # four pods, which is more than 100 %
    assert hpa.step(5, 5, 50.0) == 5  # within the same period
    assert hpa.step(15, 5, 50.0) == 10  # 100 % of five is more than four
    slow = autoscale.Hpa(target=1, high=100, up=60)
    assert [slow.step(now, 2, metric) for now, metric in ((0, 1.0), (15, 9.0), (59, 9.0))] == [2, 2, 2] and slow.step(75, 2, 9.0) == 6


def test_a_queue_of_one_server_by_hand():
    run = autoscale.simulate([0.0, 1.0, 1.5, 10.0], [2.0], autoscale.Fixed(1))
    assert run.latencies.tolist() == [2.0, 3.0, 4.5, 2.0] and run.server_seconds == 12.0
    two = autoscale.simulate([0.0, 1.0, 1.5, 10.0], [2.0], autoscale.Fixed(2))
    assert two.latencies.tolist() == [2.0, 2.0, 2.5, 2.0] and two.server_seconds == 24.0
    fast = autoscale.simulate([0.0, 1.0, 1.5, 10.0], [2.0], autoscale.Fixed(1), speed=2)
    assert fast.latencies.tolist() == [1.0, 1.0, 1.5, 1.0]
    assert run.over(2.5) == 0.5 and run.latency(1.0) == 4.5


def test_a_new_server_helps_only_when_it_is_ready():
    class Two:
        start = 1

        def step(self, now, current, metric):
            return 2

    arrived = np.arange(60) * 1.0
    run = autoscale.simulate(arrived, [2.0], Two(), ready=20, sync=10)
    assert run.replicas == ((0.0, 1), (10.0, 2))
    assert run.latencies[29] > run.latencies[10]  # asked for at 10, working from 30
    assert run.latencies[59] <= run.latencies[31]
    assert run.server_seconds == pytest.approx(run.arrived[-1] + run.latencies[-1] + (run.arrived[-1] + run.latencies[-1] - 10), abs=2.1)


def test_the_simulated_queue_agrees_with_theory():
    work = np.random.default_rng(1).uniform(0.05, 0.15, 500)
    moments = load.arrivals(6, 20_000, seed=5)
    run = autoscale.simulate(moments, work, autoscale.Fixed(1), seed=2)
    assert run.latencies.mean() == pytest.approx(capacity.waiting(6 * 3600, work) + work.mean(), rel=0.05)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(LabkitError, match="no metric"):
        autoscale.simulate([0.0], [1.0], autoscale.Fixed(1), metric="cpu")
    with pytest.raises(LabkitError, match="at least one of each"):
        autoscale.simulate([], [1.0], autoscale.Fixed(1))
    with pytest.raises(LabkitError, match="above 0"):
        autoscale.desired(1, 1, 0)


# --- scraping ----------------------------------------------------------------------------------------------------


def test_our_reader_agrees_with_the_official_one():
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    registry = CollectorRegistry()
    Counter("asked", "Requests", ["route"], registry=registry).labels('a "quoted", {odd}\\ route\n').inc(3)
    Histogram("seconds", "Time", registry=registry, buckets=(0.1, 1)).observe(0.5)
    text = generate_latest(registry).decode()
    theirs = [(one.name, dict(one.labels), one.value) for family in text_string_to_metric_families(text) for one in family.samples]
    assert [tuple(one) for one in scrape.parse(text)] == theirs
    assert scrape.total(scrape.parse(text), "seconds_bucket", le="1.0") == 1
    with pytest.raises(LabkitError, match="Line 2 is no sample"):
        scrape.parse("a 1\nwhat is this?")


def test_a_counter_that_fell_was_started_again():
    assert scrape.increase([3, 5, 5, 9]) == 6 and scrape.increase([10, 14, 2, 6]) == 10 and scrape.increase([4]) == 0


def test_hurrying_divides_every_duration_and_nothing_else():
    text = 'expr: rate(x[5m]) > 8\nfor: 1m\ninterval: 15s\nsummary: "5m is five minutes"'
    assert scrape.hurried(text, 60) == 'expr: rate(x[5000ms]) > 8\nfor: 1000ms\ninterval: 250ms\nsummary: "5m is five minutes"'
    with pytest.raises(LabkitError, match="above 0"):
        scrape.hurried(text, 0)


@needs_prometheus
def test_the_rules_pass_their_tests_and_a_turned_rule_does_not(tmp_path):
    passed, said = scrape.rule_tests()
    assert passed, said
    copy = shutil.copytree(scrape.RULES, tmp_path / "rules")
    for before, after in (("labkit_queue_length > 8", "labkit_queue_length < 8"), ("canary_request_psi > canary", "canary_request_psi < canary"), ("for: 1m", "for: 1h")):
        for name in ("recording.yml", "alerts.yml"):
            (copy / name).write_text((scrape.RULES / name).read_text())
        (copy / "alerts.yml").write_text((copy / "alerts.yml").read_text().replace(before, after))
        assert not scrape.rule_tests(copy / "rules_test.yml")[0], before


@needs_prometheus
def test_every_alert_is_tested_both_ways_where_it_can_be():
    rules, tests = (scrape.RULES / "alerts.yml").read_text(), (scrape.RULES / "rules_test.yml").read_text()
    names = {line.split("alert:")[1].strip() for line in rules.splitlines() if "- alert:" in line}
    fired = {line.split("alertname:")[1].strip() for line in tests.splitlines() if line.strip().startswith("alertname:")}
    assert fired == names and len(names) >= 7


@needs_prometheus
def test_the_settings_are_ones_prometheus_takes(tmp_path):
    for name in ("recording.yml", "alerts.yml"):
        (tmp_path / name).write_text(scrape.hurried((scrape.RULES / name).read_text(), 40))
    (tmp_path / "prometheus.yml").write_text(scrape.settings({"labkit": [8000]}, 40))
    for file in (tmp_path / "prometheus.yml", scrape.RULES / "prometheus.yml"):
        done = subprocess.run(["promtool", "check", "config", file.name], cwd=file.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@needs_prometheus
def test_prometheus_reads_a_canary_and_raises_its_alert():
    pytest.importorskip("prometheus_client")
    with scrape.Canary([50, 50], [1.5], window=20) as canary, scrape.prometheus({"canary": [canary.port]}, faster=60) as watcher:
        assert watcher.ready(1) == 1
        for i in range(20):
            canary.tell(True, 1.0 + i % 2)
        assert watcher.until("RequestsDrifted", 1.5) is None and "AnswersWrong" not in watcher.alerts()
        for _ in range(20):
            canary.tell(False, 3.0)
        assert watcher.until("AnswersWrong", 15) is not None and watcher.until("RequestsDrifted", 15) is not None
        assert watcher.history("canary_request_psi", 5, 1)[-1][1] > canary.limit
    assert not taken(canary.port)


def test_without_prometheus_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(scrape.shutil, "which", lambda *_: None)
    with pytest.raises(NotInstalled, match="apt-get install prometheus"), scrape.prometheus({}):
        pass


# --- TLS ---------------------------------------------------------------------------------------------------------


def test_a_supervised_server_may_speak_https(tmp_path):
    pytest.importorskip("cryptography")
    from labkit.serve.certificate import self_signed

    certificate, key = self_signed(tmp_path)
    assert key.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    program = tmp_path / "server.py"
    program.write_text(
        "import http.server, ssl, sys\n"
        "server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)\n"
        f"context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain({str(certificate)!r}, {str(key)!r})\n"
        "server.socket = context.wrap_socket(server.socket, server_side=True)\nserver.serve_forever()\n"
    )
    with supervise([sys.executable, str(program), "{port}"], health="/", certificate=certificate) as child:
        assert child.url.startswith("https://")
    with pytest.raises(LabkitError, match="did not answer"), supervise([sys.executable, str(program), "{port}"], health="/", wait=1.5):
        pass
    assert Path(certificate).exists()
