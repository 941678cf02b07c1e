"""`mlxproxy completion`: shell completion of commands, options and model names.

The scripts run this installation by its absolute path, so it need not be on PATH. They work in
a shell without any set-up (zsh on a Mac has not run compinit) and in bash 3.2 on a Mac. They ask
the hidden command ``complete``, whose output does not depend on the version of click.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import ShellComplete

from mlxproxy import program
from mlxproxy.text import harmless

START_UP_FILES = {
    "zsh": "~/.zshrc",
    # Terminal on a Mac opens login shells.
    "bash": "~/.bash_profile" if sys.platform == "darwin" else "~/.bashrc",
    "fish": "~/.config/fish/config.fish",
}

ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }

_mlxproxy() {
    local kind value
    local -a plain
    COMMAND complete -- "${(@Q)words[2,CURRENT-1]}" "$PREFIX" |
    while IFS=$'\\t' read -r kind value; do
        case $kind in
            plain) plain+=("$value") ;;
            dir) _files -/ ;;
            file) _files ;;
        esac
    done
    (( $#plain )) && compadd -U -V unsorted -a plain
}

compdef _mlxproxy mlxproxy
"""

BASH = """\
_mlxproxy() {
    local kind value words current line="${COMP_LINE:0:COMP_POINT}" IFS=$' \\t\\n'
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]}-1]}
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            dir) IFS=$'\\n' COMPREPLY+=($(compgen -d -- "$current")) ;;
            file) IFS=$'\\n' COMPREPLY+=($(compgen -f -- "$current")) ;;
        esac
    done < <(COMMAND complete -- "${words[@]:1}")
}

complete -F _mlxproxy mlxproxy
"""

FISH = """\
function _mlxproxy
    set -l words (commandline -opc)
    for answer in (COMMAND complete -- $words[2..] (commandline -ct))
        set -l parts (string split -m 1 \\t -- $answer)
        switch $parts[1]
            case plain
                echo $parts[2]
            case dir
                __fish_complete_directories (commandline -ct)
            case file
                __fish_complete_path (commandline -ct)
        end
    end
end

complete --no-files --command mlxproxy --arguments '(_mlxproxy)'
"""

SCRIPTS = {"zsh": ZSH, "bash": BASH, "fish": FISH}


def completion(shell: str | None) -> None:
    """Print the script for a shell; without a shell, the line that loads it in the user's own.

    Raises:
        click.UsageError: the user's shell is not supported.
    """
    command = shlex.join(program.command())
    if shell is not None:
        click.echo(SCRIPTS[shell].replace("COMMAND", command), nl=False)
        return
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in SCRIPTS:
        raise click.UsageError(
            f"Your shell is {harmless(shell) or 'unknown'}. Name one: {', '.join(SCRIPTS)}."
        )
    line = f"{command} completion {shell}"
    click.echo(f"Add this line at the end of {START_UP_FILES[shell]} and open a new terminal:")
    click.echo(f"  {line} | source" if shell == "fish" else f'  eval "$({line})"')


def complete(main: click.Command, words: Sequence[str]) -> None:
    """Print the candidates for the last word, one per line: ``plain``, a tab and the word.

    ``file`` or ``dir`` instead of ``plain`` asks the shell to complete file or folder names.

    Args:
        words: the command line up to the cursor, without the program; the last word is the one
            to complete, and may be empty.
    """
    *args, begun = words or ("",)
    for item in ShellComplete(main, {}, program.NAME, "").get_completions(args, begun):
        click.echo(f"{item.type}\t{harmless(item.value)}")
