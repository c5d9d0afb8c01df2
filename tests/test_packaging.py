"""What the package asks of others: lower bounds for users, one locked set for the tests."""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
READ = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, BUILD = READ["project"], READ["build-system"]["requires"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = ("dev", "audio", "datasets", "optuna", "ray")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# What `make` installs besides: the fuzzer, which not every system has.
MADE = re.findall(r"\$\(PIP\) (?!-e)\"?([^\"\n]+)", MAKEFILE)
ASKED = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]


def locked():
    """The pinned versions by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len(pins) > 90
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.mark.parametrize("asked", [*ASKED, *BUILD, *MADE])
def test_every_dependency_has_a_lower_bound_and_no_upper_one(asked):
    requirement = Requirement(asked)
    if requirement.name != "omnimerge":
        assert [each.operator for each in requirement.specifier] == [">="], asked


def test_the_extras_of_the_tests_are_those_that_are_locked():
    own = next(Requirement(each) for each in EXTRAS["dev"] if each.startswith("omnimerge["))
    assert own.extras == set(TESTED) - {"dev"}


def test_every_pin_is_exact():
    for pin in locked().values():
        assert [each.operator for each in pin.specifier] == ["=="], str(pin)
        assert re.fullmatch(r"[\d.]+", next(iter(pin.specifier)).version), str(pin)


def test_builds_are_isolated_with_the_pins_too():
    """`pip -c` alone does not reach what a package is built with."""
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):  # pip before 25.3, and since
        assert f"export {name} := $(CURDIR)/constraints.txt" in MAKEFILE


def test_everything_that_the_tests_install_is_locked():
    """What is asked for, what that asks for, and so on, as the installed packages say it."""
    pins, seen = locked(), set()
    todo = [Requirement(each) for each in PROJECT["dependencies"]]
    todo += [Requirement(each) for extra in TESTED for each in EXTRAS[extra]]
    # An editable install takes the latter, which hatchling asks for when it builds one.
    todo += [Requirement(each) for each in (*BUILD, *MADE, "editables")]
    assert any(each.name == "atheris" for each in todo)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        known = (name, tuple(sorted(requirement.extras)))
        if known in seen or name == "omnimerge":
            continue
        seen.add(known)
        assert name in pins, f"{name} is missing in constraints.txt"
        version = Version(next(iter(pins[name].specifier)).version)
        assert requirement.specifier.contains(version, prereleases=True), str(requirement)
        try:
            inner = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:
            continue  # not on this machine
        for each in inner:
            extras = [{"extra": extra} for extra in (*requirement.extras, "")]
            if each.marker is None or any(each.marker.evaluate(extra) for extra in extras):
                todo.append(each)
    assert len(seen) > 60
