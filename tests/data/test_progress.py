import io

from megatron_sgt.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_gets_a_line_now_and_then() -> None:
    out = io.StringIO()
    with Progress("tokenizing", 1000, out, line_every_seconds=0.0) as progress:
        progress.update(250, 12, 3456)
    assert " 25.0%  12 documents  3,456 tokens " in out.getvalue()
    assert "eta 0s" in out.getvalue()

    out = io.StringIO()
    with Progress("tokenizing", 1000, out) as progress:
        progress.update(250, 12, 3456)
    assert out.getvalue() == "", "30 s are not over"


def test_terminal_gets_a_bar() -> None:
    out = Terminal()
    with Progress("tokenizing", 1000, out) as progress:
        progress.update(1000, 12, 3456)
    assert "100%" in out.getvalue() and "12 documents, 3,456 tokens" in out.getvalue()
