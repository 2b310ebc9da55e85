import pytest

from tests.helpers.commands import Finished
from tests.helpers.edges import refused


@pytest.mark.parametrize(
    "finished",
    [
        Finished(0, "", "error: a.jsonl: line 3 ..."),
        Finished(3, "", "Traceback (most recent call last):\nerror: a.jsonl: line 3 ..."),
        Finished(3, "", "error: a.jsonl: line 3 ...\nerror: again"),
        Finished(3, "", "error: something"),
        Finished(3, "", ""),
    ],
)
def test_what_is_no_refusal(finished: Finished) -> None:
    with pytest.raises(AssertionError):
        refused(finished, 3, "line 3")


def test_a_refusal() -> None:
    assert refused(Finished(3, "", "error: a.jsonl: line 3 is bad; fix it\n"), 3, r"line \d", "fix") != ""
