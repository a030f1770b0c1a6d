"""recipe/gad/cli.py: an option can be spelled with hyphens or underscores, in every subcommand."""

from importlib.metadata import version

import pytest
from typer.main import get_command

from recipe.gad.cli import app, main


def commands(group, names=()):
    """(names, command) of every subcommand, however deep."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*names, name))
        yield (*names, name), command


@pytest.mark.parametrize(("names", "command"), list(commands(get_command(app))), ids=str)
def test_both_spellings_of_every_option(names, command):
    parent = get_command(app).make_context("gad", [], resilient_parsing=True)
    for option in command.params:
        if option.param_type_name == "option":
            (name,) = (text for text in option.opts if text.startswith("--"))
            assert "-" not in name[2:]  # the help shows one spelling
            for text in (name, "--" + name[2:].replace("_", "-")):
                parser = command.make_parser(command.context_class(command, parent=parent))
                values, _, _ = parser.parse_args([text] if option.is_flag else [text, "1"])
                assert values[option.name] == (True if option.is_flag else ["1"] if option.multiple else "1")


def test_version_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"verl-gad {version('verl-gad')}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit codes: 0 all is well" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--output_dir", "--output-dir"])
def test_an_empty_output_is_no_folder(option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["prepare", "a.jsonl", option, ""])
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: {option} is empty. Fix: name a file or folder\n"
