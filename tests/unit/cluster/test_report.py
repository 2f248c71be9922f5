import base64
import hashlib
import itertools
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster.records.metric_table import EVALUATION_KEYS, METRIC_KEYS
from cluster.records.reader import BUSY, load_run, pace, with_throughput
from cluster.records.writer import SUMMARY_KEYS, TRAJECTORY_KEYS, read_jsonl, read_summary
from cluster.report.charts import Axis, Mark, Series, compact, line_chart, percent, thinned
from cluster.report.figures import GROUPS, HERO, HISTOGRAMS
from cluster.report.page import write_report
from cluster.report.samples import LEVELS, shade
from cluster.report.timeline import lives
from tests.fake_run import make_fake_run, make_full_run

VOID = {"meta", "link", "br", "line", "path", "circle", "rect", "polygon", "g"}


class Page(HTMLParser):
    """Elements and texts of a page; fails where tags are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {key: value or "" for key, value in attributes}))
        if tag not in VOID or (tag == "g" and not self.get_starttag_text().endswith("/>")):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {key: value or "" for key, value in attributes}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {key.replace("_", "-"): value for key, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def page_of(*runs: Path) -> Page:
    return Page(write_report(list(runs), runs[0].parent / "page.html"))


def edit(path: Path, change) -> None:
    rows = read_jsonl(path)
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path) -> Path:
    return make_fake_run(tmp_path / "plain")


def test_the_made_up_run_keeps_the_contract(run):
    rows = read_jsonl(run / "metrics.jsonl")
    assert set(METRIC_KEYS) <= set(rows[1]) and set(EVALUATION_KEYS) <= set(rows[0])
    assert set(SUMMARY_KEYS) <= set(read_summary(run))
    assert set(TRAJECTORY_KEYS) == set(read_jsonl(run / "trajectories" / "step_00000040.jsonl")[0])


def test_every_metric_of_every_update_is_shown_on_the_page():
    plotted = {key for figure in (*HERO, *(f for group in GROUPS.values() for f in group)) for key, _ in figure.keys}
    plotted |= {*BUSY.values(), *HISTOGRAMS}
    axes_and_tables = {"step", "policy_version", "wall_seconds", "trajectories", "tokens_generated", "dropped_share"}
    assert {*METRIC_KEYS, *EVALUATION_KEYS} - plotted == axes_and_tables


def test_the_page_tells_what_was_learnt(run):
    page, summary = page_of(run), read_summary(run)
    assert page.all("svg", aria_label="Accuracy on held-out prompts against updates")
    assert page.all("svg", aria_label="Accuracy on held-out prompts against tokens")
    assert page.all("svg", aria_label="Reverse KL to the teacher against time")
    for key in ("accuracy_start", "accuracy_end", "accuracy_teacher"):
        assert f"{summary[key]:.1%}" in page.text
    for text in ("116,000", "40 s", compact(summary["reverse_kl_end"]), "finished", "learning_rate: 0.0002"):
        assert text in page.text
    for figure in ("Entropy", "Gradient norm", "Ratio", "Clipped", "Staleness", "Engine against learner"):
        assert page.all("svg", aria_label=figure), figure
    assert "Weight version447 kB" in page.text and not page.all("svg", aria_label="Weight version")  # it never changed


def test_the_values_under_the_pointer_are_those_of_the_metrics(run):
    page = page_of(run)
    greedy, by_tokens, by_time = page.all("g", data_label="greedy")
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "eval/accuracy" in row]
    assert greedy["data-x"].split(";") == [str(row["step"]) for row in rows]
    assert by_tokens["data-x"].split(";") == [str(row.get("tokens_generated", 0)) for row in rows]
    assert by_time["data-x"].split(";") == [f"{row['wall_seconds']:g}" for row in rows]
    assert greedy["data-y"].split(";") == [percent(row["eval/accuracy"]) for row in rows]


def test_nothing_that_was_written_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>&' onclick='alert(3) \" onclick=\"alert(4)"
    run = make_fake_run(tmp_path / "evil")
    text = {"id", "prompt", "response", "finish_reason", "reference"}
    for path in (run / "trajectories").iterdir():
        edit(
            path,
            lambda row: {k: evil if k in text else v for k, v in row.items()} | {"tokens": [evil] * len(row["tokens"])},
        )
    edit(
        run / "events.jsonl",
        lambda row: {**row, "cause": evil, evil: evil} | ({"actor": evil} if "actor" in row else {}),
    )
    config = (run / "config.yaml").read_text()
    quoted = json.dumps(evil)
    config = config.replace("name: evil", f"name: {quoted}").replace("examples/addition/student", quoted)
    (run / "config.yaml").write_text(config + f"# {evil}\n{quoted}: 1\n")
    other = make_fake_run(tmp_path / "other", seed=1)
    for page in (page_of(run), page_of(run, other)):
        assert len(page.all("script")) == 1 and page.all("img") == []
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
        assert all(re.fullmatch(r"[a-z][a-zA-Z0-9-]*", key) for _, attributes in page.elements for key in attributes)
        assert page.text.count("<script>alert(1)</script>") > 20


def test_no_request_leaves_the_page_and_no_foreign_script_runs(run):
    page = page_of(run)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", page.source)
    assert all(found.get("href", "data:").startswith("data:") for found in page.all("link"))
    assert not any("src" in attributes for _, attributes in page.elements)
    script = page.source.split("<script>")[1].split("</script>")[0]
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = page.all("meta", http_equiv="Content-Security-Policy")
    assert (
        policy["content"].startswith("default-src 'none'") and f"script-src 'sha256-{fingerprint}'" in policy["content"]
    )


def test_tokens_are_coloured_by_who_was_surer(run):
    assert shade(-0.1, -0.15) == "" and shade(-0.1, -0.3) == "p1" and shade(-0.3, -0.1) == "n1"
    assert shade(-0.1, -9.0) == f"p{len(LEVELS)}" and shade(-9.0, -0.1) == f"n{len(LEVELS)}"
    assert shade(-0.1, None) == "x"
    row = read_jsonl(run / "trajectories" / "step_00000000.jsonl")[0]
    row |= {"tokens": ["a", "\n", "<b>", ""], "policy_versions": [0] * 4, "reward": 0.0}
    row |= {"student_logprobs": [-0.01, -0.02, -5.0, -1.0], "teacher_logprobs": [-3.0, -0.02, -0.5, None]}
    (run / "trajectories" / "step_00000000.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(run)
    assert "<i class=p5>a</i><i>⏎\n</i><i class=n6>&lt;b&gt;</i><i class=x>∅</i>" in page.source
    [tokens] = page.all("p", data_s="-10 -20 -5000 -1000")
    assert tokens["data-t"] == "-3000 -20 -500 x"
    [article] = page.all("article", data_step="0")
    assert article["data-verdict"] == "wrong" and "hidden" in article
    row |= {"trained": [True, False, False, True], "student_logprobs": [-0.01, None, None, -1.0]}
    (run / "trajectories" / "step_00000000.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(run)
    first, last = ('<span class=turn data-by="turn 1"><i class=p5>a</i></span>',
                   '<span class=turn data-by="turn 2"><i class=x>∅</i></span>')  # fmt: skip
    others = '<span class=others data-by="others"><i class=c>⏎\n</i><i class=c>&lt;b&gt;</i></span>'
    assert first + others + last in page.source, "turns by number, and what others wrote without a colour"
    assert "2 tokens <i></i> 2 of others <i></i>" in page.source and "conversations" not in page.source
    row |= {"begins": [2]}
    (run / "trajectories" / "step_00000000.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(run)
    others = '<span class=others data-by="others"><i class=c>⏎\n</i></span>'
    another = '<span class=others data-by="conversation 2"><i class=c>&lt;b&gt;</i></span>'
    assert first + others + another + last in page.source
    assert "2 tokens <i></i> 2 of others <i></i> 2 conversations <i></i>" in page.source


def test_the_trajectories_of_the_last_step_are_shown_first(run):
    page = page_of(run)
    shown = [found for found in page.all("article") if "hidden" not in found]
    assert {found["data-step"] for found in shown} == {"40"} and len(shown) == 6
    assert [found["data-step"] for found in page.all("button") if "data-step" in found] == ["0", "10", "20", "30", "40"]
    assert {found["data-verdict"] for found in page.all("article")} == {"right", "wrong"}
    assert [found["data-verdict"] for found in page.all("button") if "data-verdict" in found] == ["", "right", "wrong"]


def test_of_a_run_that_was_scaled_the_mean_is_measured_and_the_last_size_is_advised_on(tmp_path):
    path = make_fake_run(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    before = pace(load_run(path))
    counted = {"rollout": 3.0, "teacher": 1.0, "learner": 1.0}
    summary["actors"] = {"mean": counted, "end": {"rollout": 4, "teacher": 1, "learner": 1}}
    (path / "summary.json").write_text(json.dumps(summary))
    run = load_run(path)
    assert pace(run).shares["rollout"] == pytest.approx(before.shares["rollout"] * 2 / 3)
    assert pace(run).replicas == {"rollout": 4, "teacher": 1, "learner": 1}


def test_the_bottleneck_is_the_busiest_role_for_each_actor(tmp_path):
    run = load_run(make_fake_run(tmp_path / "run"))  # two rollout actors: 0.8 s an update between them, of 0.5 s
    told = pace(run)
    assert max(told.shares, key=told.shares.get) == "rollout"
    assert told.shares["rollout"] == pytest.approx(run.summary["busy"]["rollout"] / 2 / run.summary["loop_seconds"])
    assert told.over_slowest == pytest.approx(run.summary["wall_over_slowest_stage"])
    text = page_of(run.path).text
    with_three = max(told.shares["rollout"] * 2 / 3, told.shares["teacher"], told.shares["learner"])
    gain = f"{told.shares['rollout'] / with_three - 1:.0%}"
    assert f"Rollout-bound: a third rollout actor would give +{gain}. The rollout is the slowest stage" in text
    assert "each of its 2 actors works" in text
    assert f"{told.over_slowest:.2f} times" in text and "take turns" not in text
    assert "take turns" in page_of(make_fake_run(tmp_path / "synchronous", max_staleness=0)).text


def test_a_run_that_waited_for_environments_says_so(tmp_path):
    path = make_fake_run(tmp_path / "run")
    waits = {"environment_seconds_mean": 30.0, "environment_idle_seconds": 0.4}  # of two engines, in half a second
    edit(path / "metrics.jsonl", lambda row: row | (waits if row["step"] else {}))
    text = page_of(path).text
    assert "Environment-bound: quicker answers" in text and "Of the other stages, the rollout is the slowest" in text
    assert "Rollout engines had nothing to write for 40% of it" in text
    told = pace(load_run(path))  # an update takes half a second, and an episode waits 30
    assert told.over_slowest == pytest.approx(0.5 / (30 / 2), rel=1e-6)
    assert f"takes {told.over_slowest:.2f} times as long as the environments alone" in text


def test_a_run_without_rollout_actors_has_a_report(tmp_path):
    path = make_fake_run(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    alone = {"rollout": 0, "teacher": 0, "learner": 1}
    summary["actors"] = {"mean": alone, "end": alone}
    summary["busy"] |= {"rollout": 0.0, "teacher": 0.0}
    (path / "summary.json").write_text(json.dumps(summary))
    assert "Learner-bound" in page_of(path).text


def test_a_campaign_under_way_has_a_report(tmp_path):
    run = make_fake_run(tmp_path / "running", updates=25, of=100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "policy_ver')
    page = page_of(run)
    assert "update 25 of 100" in page.text and "finished" not in page.text
    assert "Rollout-bound: a third" in page.text and "99.0%" in page.text


@pytest.mark.parametrize("missing", ["config.yaml", "events.jsonl", "trajectories", "summary.json"])
def test_a_report_needs_nothing_but_metrics(run, missing):
    path = run / missing
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
    page = page_of(run)
    assert "plain" in page.text and page.all("svg", aria_label="Entropy")


def test_a_campaign_that_has_measured_nothing_has_a_report(tmp_path):
    for name, content in (("empty", ""), ("start", '{"step": 0, "policy_version": 0, "wall_seconds": 3}\n')):
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text(content)
        assert "Nothing has been measured yet." in page_of(run).text
    nulls = make_fake_run(tmp_path / "nulls")
    edit(nulls / "metrics.jsonl", lambda row: {k: v if k in ("step", "wall_seconds") else None for k, v in row.items()})
    (nulls / "summary.json").unlink()
    assert "Nothing has been measured yet." in page_of(nulls).text


def test_a_failed_campaign_says_why(run):
    edit(
        run / "events.jsonl",
        lambda row: (
            {**row, "kind": "failed", "cause": "NonFiniteLossError: step 12"} if row["kind"] == "finished" else row
        ),
    )
    page = page_of(run)
    [state] = [found for found in page.all("span") if found.get("class") == "state bad"]
    assert state["title"] == "NonFiniteLossError: step 12" and "failed" in page.text


def test_several_runs_are_overlaid(tmp_path):
    runs = [make_fake_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3)]
    page = page_of(*runs)
    assert "3 campaigns" in page.text and "Where they differ" in page.text
    [chart] = re.findall(r'<svg[^>]*aria-label="Entropy".*?</svg>', page.source)
    assert re.findall(r'class="line (c\d)', chart) == ["c0", "c1", "c2"]
    assert [found["data-run"] for found in page.all("button") if "data-run" in found] == ["0", "1", "2"]
    differing = page.source.split("Where they differ")[1].split("</table>")[0]
    assert "learner.optimizer.learning_rate" in differing and "rollout.replicas" not in differing


def test_two_runs_of_one_name_are_told_apart_by_their_directories(tmp_path):
    runs = [make_fake_run(tmp_path / parent / "same", seed=i) for i, parent in enumerate(("a", "b"))]
    page = page_of(*runs)
    names = [found["data-label"] for found in page.all("g") if found.get("data-label", "").endswith("greedy")]
    assert names[:2] == [f"{runs[0]}, greedy", f"{runs[1]}, greedy"]


def test_a_directory_that_is_no_run_is_the_users_mistake(tmp_path, run):
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    for name, found in (("other", "no metrics.jsonl in it"), ("absent", "nothing"), ("file", "a file")):
        with pytest.raises(UserError, match=f"{name}: found {found}, expected the run directory of a campaign"):
            write_report([run, tmp_path / name], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    (run / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        write_report([run], tmp_path / "page.html")


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path, run):
    with pytest.raises(UserError, match=r"page\.html: found"):
        write_report([run], run / "metrics.jsonl" / "page.html")


def test_a_long_campaign_with_long_responses_has_a_small_page(tmp_path):
    run = make_fake_run(tmp_path / "long", updates=4000, evaluate_every=200, rows=20, tokens_per_response=900)
    path = write_report([run], tmp_path / "page.html")
    assert os.path.getsize(path) < 500_000
    assert "500 more tokens" in path.read_text()


def test_a_long_series_is_thinned_to_means_on_a_band_and_gaps_stay():
    series = Series("x", range(1000), [float(i % 10) for i in range(1000)])
    thin = thinned(series, 100)
    assert len(thin.ys) == 100 and set(thin.ys) == {4.5} and set(thin.low) == {0.0} and set(thin.high) == {9.0}
    assert thin.xs[-1] == 999 and thinned(series, 1000) is series
    chart = line_chart([Series("x", [0, 1, 2, 3, 4], [1.0, 2.0, None, 2.0, 3.0])], label="gap", y_format=compact)
    assert len(re.findall("M", re.search(r'class="line[^"]*" d="([^"]*)"', chart).group(1))) == 2


def test_axes_have_round_numbers_and_peaks_are_drawn_on_a_logarithm():
    assert Axis(0, 1, 0, 100).ticks(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert Axis(0, 60, 0, 100).ticks(5) == pytest.approx([0, 20, 40, 60])
    assert Axis(1, 1000, 0, 90, log=True).ticks(4) == [1, 10, 100, 1000]
    assert Axis(1, 1000, 0, 90, log=True).at(10) == pytest.approx(30)
    peaks = line_chart([Series("norm", range(9), [1.0] * 8 + [500.0])], label="peak", y_format=compact)
    assert ">100<" in peaks and ">10<" in peaks and ">200<" not in peaks
    flat = line_chart([Series("flat", [3], [0.0])], label="flat", y_format=compact)
    assert "nan" not in flat and "inf" not in flat
    assert ">3e-8<" in line_chart([Series("flat", [1, 2], [3e-8, 3e-8])], label="flat", y_format=compact)


def test_numbers_are_short():
    assert [compact(x) for x in (0, 0.0312, 12, 2999, 12345, 2.1e6, 3.04e-8)] == [
        "0", "0.0312", "12", "2,999", "12.3k", "2.1M", "3e-8",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 0.023, 0.6602, 1)] == ["0%", "2.3%", "66%", "100%"]


def test_throughput_is_tokens_over_the_time_since_the_line_before():
    rows = [
        {"step": 0, "wall_seconds": 10.0},
        *({"step": i, "wall_seconds": 10.0 + 2 * i, "tokens_generated": 500 * i} for i in (1, 2)),
    ]
    assert [row.get("tokens_per_second", math.nan) for row in with_throughput(rows)][1:] == [250, 250]


def test_actors_live_until_they_die_or_the_campaign_ends():
    def event(wall: float, kind: str, actor: str | None = None) -> dict:
        return {"wall_seconds": wall, "kind": kind, "cause": ""} | ({"actor": actor} if actor else {})

    events = [
        event(0, "started"), event(1, "actor_started", "a"), event(2, "actor_started", "b"), event(5, "actor_died", "b"),
        event(7, "actor_started", "b"), event(7.5, "actor_restarted", "b"), event(9, "checkpoint"), event(9.5, "resumed"),
        event(11, "actor_started", "a"), event(20, "finished"),
    ]  # fmt: skip
    assert lives(events, 25) == {"a": [(1, 9), (11, 20)], "b": [(2, 5), (7, 9)]}
    assert lives(events[:3], 25) == {"a": [(1, 25)], "b": [(2, 25)]}
    assert lives([*events[:3], event(6, "actor_ended", "b")], 25) == {"a": [(1, 25)], "b": [(2, 6)]}


def test_histograms_add_up_the_last_tenth_of_the_updates(run):
    rows = read_jsonl(run / "metrics.jsonl")
    for row in rows[1:]:
        row["log_ratio_histogram"] = [0] * 8 + [row["step"], 2 * row["step"]] + [0] * 7
        row["staleness_histogram"] = [row["step"], 1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = [row["step"] for row in rows[1:]][-(len(rows) - 1) // 10 :]
    assert 1 < len(last) < 10
    page = page_of(run)
    [ratios], [staleness] = page.all("g", data_label="nats"), page.all("g", data_label="versions behind")
    assert page.all("svg", aria_label="Log-ratios") and page.all("svg", aria_label="Staleness of trajectories")
    assert ratios["data-x"].split(";") == [f"{-4 + place / 2:g}" for place in range(17)]
    assert ratios["data-y"].split(";") == ["0"] * 8 + [compact(sum(last)), compact(2 * sum(last))] + ["0"] * 7
    assert staleness["data-y"].split(";") == [compact(sum(last)), compact(len(last))]


@pytest.mark.parametrize("gpus", [0.0, 0.5])
def test_what_it_has_cost_is_told_in_gpu_hours_where_there_were_gpus(run, gpus):
    summary = json.loads((run / "summary.json").read_text())
    hours = {"rollout": 8.0, "teacher.default": 0.25, "learner": 0.0}
    summary["cost"] = {
        "cpu_hours": hours,
        "gpu_hours": {role: found * gpus for role, found in hours.items()},
        "tokens_per_gpu_hour": 123456.7 if gpus else None,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report([run], run / "page.html").read_text()
    name, rollout, teacher = ("GPU hours", "4", "0.125") if gpus else ("core hours", "8", "0.25")
    assert f"<dd>{rollout}</dd><dt>{name}, rollout</dt>" in page
    assert f"<dd>{teacher}</dd><dt>{name}, teacher.default</dt>" in page and f"{name}, learner" not in page
    assert ("<dd>123,457</dd><dt>tokens sampled in a GPU hour</dt>" in page) == bool(gpus)


def test_faults_and_scaling_are_marked_on_the_lanes_of_the_actors_that_they_concern(run):
    section = write_report([run], run / "page.html").read_text().split('<div class="lanes">')[1].split("<details")[0]
    lanes = {lane.split("<")[0]: lane for lane in section.split("<div><span>")[1:]}
    assert lanes["rollout-1"].count('class="mark bad"') == 1 and "rollout-1 died" in lanes["rollout-1"]
    assert lanes["rollout-2"].count("<b ") == 1 and lanes["rollout-2"].count('class="mark warn line"') == 2
    assert "rollout: 2 -&gt; 3 actors" in lanes["rollout-0"] and "rollout: 2 -&gt; 3 actors" in lanes["campaign"]
    assert "actors" not in lanes["teacher.default-0"] and "mark" not in lanes["learner-0"]


def test_what_a_guard_did_is_marked_and_what_it_undid_is_drawn_behind(run):
    rows = read_jsonl(run / "metrics.jsonl")
    undone = [{**row, "reverse_kl": 7.5} for row in rows if 20 < row["step"] <= 24]
    (run / "undone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in undone))
    event = {"kind": "guard_rolled_back", "step": 24, "guard": "mine", "metric": "reverse_kl", "to_step": 20,
             "cause": "reverse_kl is 7.5, <above> 3", "wall_seconds": 9.0, "time": 0.0}  # fmt: skip
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    page = write_report([run], run / "marked.html").read_text()
    assert page.count(">rolled back</text>") > 3 and "mine: reverse_kl is 7.5, &lt;above&gt; 3" in page
    assert 'class="undone' in page and "<above>" not in page
    plain = write_report([run, make_fake_run(run.parent / "other")], run / "two.html").read_text()
    assert ">rolled back</text>" not in plain, "several runs are drawn without their guards"


def test_names_of_marks_stand_apart_and_the_gravest_keep_theirs():
    marks = [Mark(step, "changed", "warn", "told") for step in range(10, 60)] + [Mark(30, "rolled back", "bad", "told")]
    chart = line_chart([Series("a", [0, 100], [0, 1])], label="", y_format=str, marks=marks)
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">(changed|rolled back)<', chart)
    assert chart.count("<title>told</title>") == 51, "every line stays, with its text under the pointer"
    assert 3 <= len(names) < 51 and sum(name == "rolled back" for *_, name in names) == 1
    boxes = [
        (y, float(x) - 6.0 * len(name) * (side == "end"), float(x) + 6.0 * len(name) * (side == "start"))
        for x, y, side, name in names
    ]
    for one, other in itertools.combinations(boxes, 2):
        assert one[0] != other[0] or one[2] <= other[1] or other[2] <= one[1], (one, other)


def test_exports_and_alerts_are_told(tmp_path):
    path = make_full_run(tmp_path / "run", updates=40)
    page = write_report([path], tmp_path / "page.html").read_text()
    assert "the checkpoint of update 40 was exported to /models/student" in page, "a mark in the charts"
    assert re.search(r"Exports</summary>.*update 40</td><td><code>/models/student</code> bfloat16", page)
    rows = dict.fromkeys(re.findall(r'<span class="kind[^>]*>([^<]*)</span>( <span class="alert")?', page))
    assert ("actor died", ' <span class="alert"') in rows and ("checkpoint", "") in rows
    config = (path / "config.yaml").read_text().replace("alerts: {command: page}", "")
    (path / "config.yaml").write_text(config)
    assert 'class="alert"' not in write_report([path], tmp_path / "page.html").read_text(), "nobody was called"
