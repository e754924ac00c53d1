"""Hooks of the documentation site (mkdocs.yml): pages generated from the code, and links out of the docs."""

import re
import runpy
from pathlib import Path

from mkdocs.structure.files import File

from bupo.cli.help import COMMANDS, Option, get_option_classes, group_options

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")  # a link to a file of the repository that is not on the site


def on_files(files, config):
    """Add the pages of the commands, and files from other folders of the repository."""
    made = {f"reference/{name}.md": command_page(name) for name in COMMANDS}
    made |= {
        "changelog.md": text_of("CHANGELOG.md"),
        "contributing.md": text_of("CONTRIBUTING.md"),
        "reference/trl_options.md": trl_options(),
    }
    made["notebooks/one-file.md"] = one_file()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links out of the docs by plain text, because the site does not contain the repository."""
    return OUTSIDE.sub(r"\1", markdown) if page.file.src_uri.count("/") == 0 else markdown


def command_page(name: str) -> str:
    """Return a command's page: purpose, examples, every option by group."""
    command = COMMANDS[name]
    lines = [
        f"# bupo {name}",
        "",
        f"`bupo {name}{command.positional_arguments} [--config FILE.yaml] [--option value ...]`",
        "",
    ]
    lines += [command.sentence, "", "```"]
    lines += [row for line, what in command.examples.items() for row in (f"# {what}", line)]
    lines += ["```", "", "The YAML file of `--config` takes the same options; a flag overrides the file."]
    for title, options in group_options(get_option_classes(name)).items():
        lines += ["", f"## {title}", "", "| option | takes | default | |", "| --- | --- | --- | --- |"]
        lines += [_row(option) for option in options]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    takes, default = (f"`{word}`".replace("|", "/") if word else "" for word in (option.placeholder, option.default))
    pieces = re.split(r"(`[^`]*`)", option.help)  # every second one is code
    pieces[::2] = [re.sub(r"([|<\[])", r"\\\1", piece) for piece in pieces[::2]]
    about = "".join(pieces)
    return f"| `--{option.name}` | {takes} | {default} | {about} |"


def text_of(name: str) -> str:
    """Return a file at the root of the repository, with its links to docs/ as links within the site."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!http|#)(?:src|tests|recipes|examples|\.\.)[^)]*\)", r"\1", text)


def trl_options() -> str:
    """Return the page of TRL's options and arguments, from the table that tests/training/test_trl_parity.py checks."""
    table = runpy.run_path(str(ROOT / "tests" / "helpers" / "trl_table.py"))
    lines = [
        "# TRL's options in BuPOTrainer",
        "",
        "*Not by these tests* needs hardware or packages that the tests do not have.",
    ]
    for title, rows in (("Arguments of GRPOTrainer", table["ARGUMENTS"]), ("Options of GRPOConfig", table["OPTIONS"])):
        by_outcome: dict[tuple[str, str], list[str]] = {}
        for name, row in rows.items():
            by_outcome.setdefault((row.outcome, row.why), []).append(f"`{name}`")
        order = [table["TRAINS"], table["REFUSED"], table["ELSEWHERE"]]
        lines += ["", f"## {title}", "", "| name | in BuPOTrainer | |", "| --- | --- | --- |"]
        lines += [
            f"| {', '.join(names)} | {outcome} | {why} |"
            for (outcome, why), names in sorted(by_outcome.items(), key=lambda item: order.index(item[0][0]))
        ]
    return "\n".join(lines) + "\n"


def one_file() -> str:
    """Return the page of the script in examples/."""
    text = (ROOT / "examples" / "bottom_up.py").read_text()
    about = (
        "`examples/bottom_up.py` is the method in plain torch, without TRL. Its losses equal those of `BuPOTrainer` to 1e-5 "
        "in both phases (`pytest tests/project/test_example.py`)."
    )
    return f"# The method in one file\n\n{about}\n\n```python\n{text}```\n"
