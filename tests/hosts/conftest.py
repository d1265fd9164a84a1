"""`--out FILE`: write what passed on a GPU to FILE, from which docs/hosts.md says what was seen."""

from pathlib import Path

SEEN = []


def pytest_addoption(parser):
    parser.addoption("--out", type=Path, help="a file for what passed on a GPU, bench/results/<gpu>/hosts.json")


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        SEEN.extend(tuple(value) for name, value in report.user_properties if name == "seen on a GPU")


def pytest_sessionfinish(session):
    path = session.config.getoption("--out", None)
    if path and SEEN and not hasattr(session.config, "workerinput"):
        from .page import write_seen

        write_seen(path, SEEN)
