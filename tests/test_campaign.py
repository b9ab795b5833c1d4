"""bench/campaign.py: parts that fail, end late or are killed, and what is kept of all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import campaign  # noqa: E402
from campaign import Campaign, Part, run_parts  # noqa: E402


def part(name: str, code: str, limit: int = 60, **more: object) -> Part:
    return Part(name, f"what of {name}?", limit, ("-c", code), **more)


def counts(file: Path) -> str:
    """Code that notes each time that it runs."""
    return f"open({str(file)!r}, 'a').write('x')"


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(campaign, "all_parts", lambda *_: [])
    return lambda quick=True: Campaign(tmp_path, "cpu", quick)


def test_a_part_that_fails_does_not_end_the_rest_and_is_named(tmp_path, begin, capsys) -> None:
    ran = tmp_path / "ran"
    parts = [part("bad", "print('why'); exit(3)"), part("good", counts(ran))]
    assert run_parts(begin(), parts) == {"bad": "failed with status 3"}
    assert f"NOT DONE: bad: failed with status 3; see {tmp_path}/bad.log" in capsys.readouterr().out
    assert (tmp_path / "bad.log").read_text() == "why\n"
    run_parts(begin(), parts)  # the bad one again
    assert ran.read_text() == "x"
    assert run_parts(begin(), [part("bad", "")]) == {}


def test_a_part_over_its_limit_is_killed_with_all_that_it_started(tmp_path, begin) -> None:
    sleeper = "import subprocess; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True)"
    started = time.monotonic()
    missing = run_parts(begin(), [part("late", f"{sleeper}; p.wait()", limit=2)])
    assert missing == {"late": "killed: it took longer than its limit of 2 s"}
    assert time.monotonic() - started < 30
    child = Path(f"/proc/{(tmp_path / 'late.log').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_killed_campaign_goes_on_where_it_was(tmp_path, begin) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    parts = [part("one", counts(first)), part("two", counts(second))]
    wait = f"; import time; time.sleep({{}} if {str(second)!r} else 0)"
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from pathlib import Path\n"
        "import campaign\n"
        "campaign.all_parts = lambda *_: []\n"
        f"one = campaign.Part('one', '', 60, ('-c', {parts[0].command[1]!r}))\n"
        f"two = campaign.Part('two', '', 60, ('-c', {parts[1].command[1] + wait.format(30)!r}))\n"
        f"campaign.run_parts(campaign.Campaign(Path({str(tmp_path)!r}), 'cpu', True), [one, two])"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(BENCH)]) as process:
        while not second.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert json.loads((tmp_path / "campaign.json").read_text())["parts"].keys() == {"one"}
    assert run_parts(begin(), parts) == {}
    assert (first.read_text(), second.read_text()) == ("x", "xx")


def test_the_file_holds_results_and_what_they_depend_on(tmp_path, begin, monkeypatch) -> None:
    result = {"benchmarks": [{"stats": {"median": 1, "data": [1] * 1000}}]}
    code = f"import json, sys; json.dump({result}, open(sys.argv[1], 'w')); print('said')"
    command = ("-c", code, "RESULT", "pytest")
    kept = Part("kept", "why?", 60, command, ("small",), lambda r: f"{r}")
    monkeypatch.setattr(campaign, "all_parts", lambda *_: [kept])
    assert run_parts(begin(), [kept]) == {}
    record = json.loads((tmp_path / "campaign.json").read_text())["parts"]["kept"]
    assert record["result"] == {"benchmarks": [{"stats": {"median": 1}}]}
    assert record["status"] == "done" and record["log"] == ["said"] and 0 < record["seconds"] < 60
    assert record["command"][-1] == "small"
    assert record["at"] == {"commit": campaign.commit(), "device": "CPU", "quick": True}
    assert {"python", "torch"} <= record["machine"]["versions"].keys()
    assert "driver" in record["machine"]
    text = (tmp_path / "campaign.md").read_text()
    assert text.startswith("## kept: why?\n\ndone, ") and text.endswith(
        f"said\n\n{record['result']}\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        *("campaign.json", "campaign.md", "kept.log")
    }


def test_a_part_is_done_again_with_other_code_or_in_full(tmp_path, begin, monkeypatch) -> None:
    ran = tmp_path / "ran"
    once = [part("one", counts(ran))]
    run_parts(begin(), once)
    run_parts(begin(quick=False), once)
    monkeypatch.setattr(campaign, "commit", lambda: "another")
    run_parts(begin(quick=False), once)
    assert ran.read_text() == "xxx"


def test_what_does_not_fit_or_cannot_run_is_left_out_and_named(begin) -> None:
    parts = [part("long", "", limit=600), part("real", "", needs="no_such_module")]
    assert run_parts(begin(), parts, minutes=9) == {
        "long": "skipped: its limit of 600 s would end after --minutes",
        "real": "skipped: no_such_module is not installed",
    }


def test_the_parts_fit_into_pieces_of_ten_minutes_and_into_half_an_hour() -> None:
    parts = campaign.all_parts()
    assert max(part.limit for part in parts) <= 540
    assert sum(part.limit for part in parts) <= 1800
    names = ["tests", "errors", "kernels", "operations", "steps", "profile", "memory", "training"]
    assert {*names, "compiled"} <= {part.name for part in parts}


def test_the_command_names_its_parts_and_refuses_others() -> None:
    command = [sys.executable, BENCH / "campaign.py"]
    listed = subprocess.run([*command, "--list"], check=True, capture_output=True, text=True)
    assert "kernels " in listed.stdout and "1800 s" in listed.stdout
    refused = subprocess.run([*command, "--only", "kernel"], capture_output=True, text=True)
    assert refused.returncode == 2 and "there is no part kernel: see --list" in refused.stderr
