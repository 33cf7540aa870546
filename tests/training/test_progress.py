from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from dscore_plugin.training.progress import NoProgress, Progress, RichProgress


def terminal() -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, force_terminal=True, width=140)


def loop(progress: Progress) -> None:
    with progress.task("training", 4) as advance:
        for _ in range(2):
            advance(1, loss=0.512345, top1=87.5)
            with progress.task("evaluating", 1) as inner:
                inner()
            advance()


def test_a_terminal_sees_the_name_the_count_and_the_numbers() -> None:
    text, console = terminal()
    loop(RichProgress(console=console))
    last = text.getvalue()
    assert "training" in last
    assert "4/4" in last
    assert "loss 0.5123" in last
    assert "top1 87.5" in last


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_written_when_quiet_or_to_a_file(quiet: bool) -> None:
    text, console = terminal()
    if not quiet:
        console = Console(file=text, force_terminal=False)
    loop(RichProgress(console=console, quiet=quiet))
    assert text.getvalue() == ""


def test_stdout_stays_free(capfd: pytest.CaptureFixture[str]) -> None:
    loop(RichProgress(console=Console(stderr=True, force_terminal=True, width=100)))
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err


def test_no_progress_does_nothing() -> None:
    loop(NoProgress())


def test_bars_end_with_an_exception_and_can_be_used_again() -> None:
    text, console = terminal()
    progress = RichProgress(console=console)
    with pytest.raises(KeyboardInterrupt), progress.task("first", 3), progress.task("inside", 3):
        raise KeyboardInterrupt
    with progress.task("second", 1) as advance:
        advance()
    assert "second" in text.getvalue()
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h") == 2  # cursor comes back


def test_progress_can_be_had_without_the_training_loop() -> None:
    code = "import sys, dscore_plugin.training.progress as p; p.NoProgress(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "dscore_plugin.training.progress" in loaded
    assert not {"accelerate", "timm", "nni", "matplotlib", "sklearn", "torch_pruning"} & loaded
