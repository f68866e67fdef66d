"""Where the tests' time goes: wall and CPU seconds of each file, of all processes that its tests
start.

A pytest plugin: it prints a table at the end. `DTRAIN_TIMES` names a file of lines `name wall cpu`
with what else was timed, which comes first; `--times-into FILE` also writes the table into FILE,
between its two marks.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import warm

BEGIN, END = "<!-- times -->", "<!-- /times -->"
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Of this process, of its descendants and warm processes, and of those that these have
    waited for.
    """
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    ours = {os.getpid(), *warm.ALIVE}
    for pid in parents:
        line = [pid]
        while line[-1] in parents and line[-1] not in ours:
            line.append(parents[line[-1]])
        if line[-1] in ours:
            ours.update(line)
    return sum(ticks.get(pid, 0) for pid in ours) / TICKS + sum(warm.SPENT)


class Times:
    """Adds to each test's last report the CPU time since the test before, and adds all up where
    the reports arrive.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seen = cpu_seconds()
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report = yield
        if report.when == "teardown":
            now = cpu_seconds()
            report.user_properties.append(("cpu_seconds", max(0.0, now - self.seen)))
            self.seen = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self.wall[file] += report.duration
        self.cpu[file] += sum(
            value for name, value in report.user_properties if name == "cpu_seconds"
        )
        self.tests[file] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = [
            (
                f"tests/{file}".replace("tests/tests/", "tests/"),
                str(self.tests[file]),
                wall,
                self.cpu[file],
            )
            for file, wall in self.wall.most_common()
        ]
        rows.append(("all tests", str(self.tests.total()), self.wall.total(), self.cpu.total()))
        if others := os.environ.get("DTRAIN_TIMES"):
            lines = [line.rsplit(maxsplit=2) for line in Path(others).read_text().splitlines()]
            rows = [(name, "", float(wall), float(cpu)) for name, wall, cpu in lines] + rows
        terminalreporter.section("times")
        table = ["| what | tests | wall s | CPU s |", "| --- | ---: | ---: | ---: |"]
        table += [
            f"| {name} | {tests} | {wall:.0f} | {cpu:.0f} |" for name, tests, wall, cpu in rows
        ]
        terminalreporter.write_line("\n".join(table))
        if into := self.config.getoption("times_into"):
            before, _, rest = Path(into).read_text().partition(BEGIN)
            after = rest.partition(END)[2]
            Path(into).write_text("\n".join([before + BEGIN, *table, END]) + after)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--times-into", metavar="FILE", help="write the table of times into FILE, between its marks"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Times(config), "times-of-tests")
