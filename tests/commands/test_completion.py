"""What a shell completes, asked of a real bash."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TYPED = {
    "ru": "run",
    "run digits/sw": "digits/swa digits/swad",
    "recipes continual/digits-e": "continual/digits-emr",
    "run digits/swa --trainer.max_ep": "--trainer.max_epochs",
    "fit --trainer.max_ep": "--trainer.max_epochs",
    "soup --weig": "--weights",
    "soup --stat": "--statistics",
    "soup --statistics a.c": "a.ckpt",
    "inspect a.c": "a.ckpt",
    "completion z": "zsh",
}
ASK = """
source script.sh
COMP_WORDS=(lightning-merge {words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_lightning_merge lightning-merge "${{COMP_WORDS[COMP_CWORD]}}" ""
echo "${{COMPREPLY[*]}}"
"""


def test_bash_completes_commands_recipes_options_and_files(run: Callable[..., Any]) -> None:
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    code, script, err = run("completion", "bash")
    assert code == 0, err
    Path("script.sh").write_text(script)
    Path("a.ckpt").touch()
    for words, expected in TYPED.items():
        asked = ["bash", "-c", ASK.format(words=words)]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, (words, done.stderr)
