"""The status line, on streams that pretend to be terminals and on a real pseudo-terminal."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd import _progress
from isograd._progress import Progress

STATUS = re.compile(r"isograd  step \d+[^\r]*\r")


def screen(transcript):
    """What a terminal shows after `transcript`: a naive reading of line feeds, carriage returns and erased lines."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[2?K|\r|\n|.", transcript, re.DOTALL):
        if token == "\n":
            lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[-1] = ""
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1].ljust(column)[:column] + token + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Terminal(io.StringIO):
    """A stream that says it is a terminal and writes to one transcript shared with others."""

    def __init__(self, transcript):
        super().__init__()
        self.transcript = transcript

    def isatty(self):
        return True

    def write(self, text):
        self.transcript.append(text)
        return len(text)


@contextmanager
def streams(*, interval=0.0, term="xterm"):
    """stdout and stderr on the same pretended terminal, whose transcript it gives; updates are drawn when they come."""
    transcript = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal(transcript))
        patch.setattr(sys, "stderr", Terminal(transcript))
        patch.setattr(_progress, "_INTERVAL", interval)
        patch.setenv("TERM", term)
        yield transcript


def drawn(transcript):
    return STATUS.findall("".join(transcript))


@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["stdout", "stderr"]), st.sampled_from(["loss 2.3\n", "50 %", "\n", "", "\rab", "x\ny"])
            ),
            st.tuples(st.just("update"), st.integers(0, 10**9)),
        )
    )
)
def test_the_script_sees_its_own_screen(actions):
    """Whatever the script writes, and whenever the line is drawn in between, the screen ends as without the line."""
    written = []
    with streams() as transcript:
        progress = Progress()
        progress.start()
        for target, value in actions:
            if target == "update":
                progress.update(value, loss=2.3)
            else:
                getattr(sys, target).write(value)
                written.append(value)
        progress.stop()

    assert screen("".join(written)) == screen("".join(transcript))


def test_the_line_tells_the_state():
    """The line names the step of so many, the loss, the gradient norm, the overhead and the last deep step."""
    with streams() as transcript:
        progress = Progress(total=200)
        progress.start()
        progress.update(7, 2.34567, 0.5, 0.0061, deep=5)
        progress.stop()

    assert "isograd  step 7/200  loss 2.346  grad norm 0.5  overhead 0.6 %  deep tier at 5\r" == drawn(transcript)[0]


def test_speed_is_steps_over_time():
    """The speed in the second line is what was done since the first, within the clock's own error."""
    with streams() as transcript:
        progress = Progress()
        progress.start()
        progress.update(0)
        before = time.monotonic()
        time.sleep(0.05)
        progress.update(100)
        slowest = 100 / (time.monotonic() - before + 0.01)
        progress.stop()

    assert slowest <= float(re.search(r"([\d.e+]+) steps/s", drawn(transcript)[1]).group(1)) <= 100 / 0.05 + 50


def test_the_line_waits_for_the_beginning_of_a_line():
    """While the script has an unfinished line on the screen, nothing is drawn over it."""
    with streams() as transcript:
        progress = Progress()
        progress.start()
        sys.stdout.write("downloading ... ")
        progress.update(1, 1.0)
        meanwhile = drawn(transcript)
        sys.stdout.write("done\n")
        progress.update(2, 1.0)
        progress.stop()

    assert [] == meanwhile
    assert 1 == len(drawn(transcript))


def test_at_most_four_drawings_a_second():
    """A thousand updates within a moment draw one line, or as many as quarters of a second have passed."""
    with streams(interval=0.25) as transcript:
        progress = Progress()
        progress.start()
        start = time.monotonic()
        for step in range(1000):
            progress.update(step, 1.0)
        most = 1 + (time.monotonic() - start) / 0.25
        progress.stop()

    assert 1 <= len(drawn(transcript)) <= most


def test_streams_come_back():
    """After `stop` the streams are the script's own again, and a reference kept to a stand-in still writes."""
    with streams() as transcript:
        before = sys.stdout, sys.stderr
        progress = Progress()
        progress.start()
        kept = sys.stdout
        progress.stop()
        after = sys.stdout, sys.stderr
        kept.write("late\n")

    assert before[0] is not kept
    assert before == after
    assert ["late\n"] == transcript


def test_a_stream_that_the_script_replaced_stays():
    """A script that puts its own object in place of sys.stdout keeps it."""
    with streams():
        progress = Progress()
        progress.start()
        own = sys.stdout = io.StringIO()
        progress.stop()

        assert sys.stdout is own


def test_stand_ins_pass_for_what_they_stand_for():
    """`isinstance`, attributes, `writelines`, bytes through `buffer` and `print` work as on the stream itself."""
    with streams() as transcript:
        raw = sys.stdout.buffer = io.BytesIO()
        sys.stdout.reads_as = "attribute"
        progress = Progress()
        progress.start()

        assert isinstance(sys.stdout, io.StringIO)
        assert "attribute" == sys.stdout.reads_as
        assert 3 == sys.stdout.write("abc")
        sys.stdout.writelines(["d\n", "e\n"])
        sys.stdout.buffer.write(memoryview(b"raw"))
        print("p", "q", sep="-")
        progress.stop()

    assert ("abcd\ne\np-q\n", b"raw") == ("".join(transcript), raw.getvalue())


def test_a_terminal_that_goes_away_ends_the_line():
    """When stderr breaks, updates do nothing and raise nothing."""
    with streams() as transcript:
        sys.stderr.flush = lambda: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        progress = Progress()
        progress.start()
        progress.update(1, 1.0)
        progress.update(2, 1.0)
        progress.stop()

    assert 1 == len(drawn(transcript))


def test_no_line_where_it_could_not_be_erased():
    """A terminal without cursor control gets no line, and the streams stay as they are."""
    with streams(term="dumb") as transcript:
        before = sys.stdout
        progress = Progress()
        progress.start()
        progress.update(1, 1.0)
        progress.stop()

        assert before is sys.stdout
    assert [] == transcript


SCRIPT = """
import os, subprocess, sys, time
from isograd._progress import Progress
progress = Progress()
progress.start()
for step in range(12):
    progress.update(step, loss=2.0 / (step + 1), grad_norm=0.5)
    if step % 4 == 1:
        print("epoch", step)
    if step == 6:
        child = os.fork()
        if child == 0:
            print("from a child", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    time.sleep(0.1)
progress.stop()
print("end")
"""
PRINTED = ["epoch 1", "epoch 5", "from a child", "epoch 9", "end"]


def on_a_terminal(*, stdout_too):
    """Run SCRIPT with stderr on a pseudo-terminal of 60 columns; what the terminal and the pipe received."""
    primary, secondary = pty.openpty()
    os.set_blocking(primary, False)
    __import__("fcntl").ioctl(secondary, __import__("termios").TIOCSWINSZ, b"\x18\x00\x3c\x00\x00\x00\x00\x00")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=secondary if stdout_too else subprocess.PIPE,
        stderr=secondary,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(secondary)
        terminal = b""
        while select.select([primary], [], [], 30)[0]:
            try:
                part = os.read(primary, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            terminal += part
        piped = b"" if stdout_too else process.stdout.read()
    os.close(primary)
    assert 0 == process.returncode
    return terminal.decode().replace("\r\n", "\n"), piped.decode()


def test_a_real_terminal_ends_with_the_scripts_output_alone():
    """On a pseudo-terminal the line appears while the script runs, fits, and leaves only the script's output behind."""
    terminal, _ = on_a_terminal(stdout_too=True)

    lines = drawn(terminal)
    assert 2 <= len(lines)
    assert all(len(line) <= 60 for line in lines)
    assert PRINTED == [line for line in screen(terminal) if line]


def test_piped_output_is_untouched():
    """With stderr on a terminal and stdout in a pipe, the pipe holds what the script printed and not a byte more."""
    terminal, piped = on_a_terminal(stdout_too=False)

    assert sorted(PRINTED) == sorted(piped.splitlines())
    assert STATUS.search(terminal)


def test_no_terminal_no_line():
    """Where stderr is no terminal, the script's output is all there is."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)

    assert ("", 0) == (done.stderr, done.returncode)
    assert "end" in done.stdout
