"""Hooks of the documentation site (mkdocs.yml): pages that are made of the code, and links that lead out of the docs."""

import re
from pathlib import Path

from mkdocs.structure.files import File

from bupo.cli.help import COMMANDS, Option, get_option_classes, group_options

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")  # from docs/ up: what is in the repository, not on the site


def on_files(files, config):
    """Add the pages of the commands, and those that stand elsewhere in the repository."""
    made = {f"reference/{name}.md": command_page(name) for name in COMMANDS}
    made |= {
        "changelog.md": text_of("CHANGELOG.md"),
        "contributing.md": text_of("CONTRIBUTING.md"),
        "claims.md": claims(),
    }
    made["notebooks/one-file.md"] = one_file()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of the docs as plain text: the site stands without the repository."""
    return OUTSIDE.sub(r"\1", markdown) if page.file.src_uri.count("/") == 0 else markdown


def command_page(name: str) -> str:
    """A command: what it is for, examples, every option by group."""
    command = COMMANDS[name]
    lines = [
        f"# bupo {name}",
        "",
        f"`bupo {name}{command.positional_arguments} [--config FILE.yaml] [--option value ...]`",
        "",
    ]
    lines += [command.sentence, "", "```"]
    lines += [row for line, what in command.examples.items() for row in (f"# {what}", line)]
    lines += ["```", "", "Options may stand in the YAML file of `--config` too; a flag overrides the file."]
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
    """A file at the root of the repository; its links to docs/ are links within the site."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!http|#)(?:src|tests|recipes|examples|\.\.)[^)]*\)", r"\1", text)


def claims() -> str:
    """The README's table of what is claimed, and which command shows it."""
    section = text_of("README.md").partition("## What it rests on\n")[2].rpartition("\nMIT license")[0]
    return "# Claims and their tests\n" + section.replace("(CONTRIBUTING.md)", "(contributing.md)")


def one_file() -> str:
    """The script of examples/, to be read."""
    text = (ROOT / "examples" / "bottom_up.py").read_text()
    about = (
        "`examples/bottom_up.py` is the method in plain torch, without TRL. Its losses are `BuPOTrainer`'s, to 1e-5 in both "
        "phases (`pytest tests/project/test_example.py`)."
    )
    return f"# The method in one file\n\n{about}\n\n```python\n{text}```\n"
