"""The pair of torch and numpy is checked before work, and costs no --help."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from art_edm.runtime import cli


@pytest.mark.parametrize("torch, numpy, fits", [
    ("2.0.1+cu118", "2.0.2", False), ("2.2.2", "2.1.0", False), ("2.0.1", "1.26.4", True), ("2.3.0", "2.0.2", True),
    ("2.13.0+cpu", "2.4.6", True), ("2.0.0", "1.23.5", True), ("3.0", "3.0", True),
])
def test_an_old_torch_needs_an_old_numpy(torch, numpy, fits, monkeypatch):
    monkeypatch.setattr(cli, "version", {"torch": torch, "numpy": numpy}.__getitem__)

    @click.command(cls=cli.Command)
    def main():
        click.echo("done")

    result = CliRunner().invoke(main)
    expected = f"Error: found torch {torch} with numpy {numpy}, expected a numpy before 2 with a torch before 2.3: " \
               "pip install 'numpy<2'\n"
    assert (result.exit_code, result.output) == ((0, "done\n") if fits else (2, expected))
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


def test_a_torch_before_2_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(cli, "version", {"torch": "1.12.1+cu116", "numpy": "1.26.4"}.get)
    with pytest.raises(ValueError, match=r"found torch 1\.12\.1\+cu116, expected 2\.0 or newer.*patched scripts"):
        cli.check_versions()
    monkeypatch.setattr(cli, "version", {"torch": "2.0.0", "numpy": "1.26.4"}.get)
    cli.check_versions()


def test_what_is_installed_without_a_record_is_not_judged(monkeypatch):
    def absent(name):
        raise cli.PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", absent)
    assert cli.check_versions() is None


@pytest.mark.parametrize("argument, expected", [
    ("--out=~/a/b.npy", "/home/me/a/b.npy"), ("--out=a/~/b", "a/~/b"), ("--out=~other/b", "~other/b"),
])
def test_home_after_an_equals_sign(monkeypatch, argument, expected):
    monkeypatch.setenv("HOME", "/home/me")

    def seen(kind):
        @click.command(cls=kind)
        @click.option("--out")
        def main(out):
            click.echo(out)

        return CliRunner().invoke(main, [argument]).output.strip()

    assert seen(cli.Command) == expected
    assert seen(click.Command) == argument.partition("=")[2]  # the twin
