import pytest

from megatron_sgt.errors import CheckpointError, ConfigError, DataError, ExitCode, SGTError, first_line


@pytest.mark.parametrize(("error", "code"), [(SGTError, 1), (ConfigError, 2), (DataError, 3), (CheckpointError, 4)])
def test_exit_codes(error: type[SGTError], code: int) -> None:
    assert error.exit_code == code
    assert issubclass(error, SGTError)
    with pytest.raises(SGTError, match=r"^cause; fix$"):
        raise error("cause; fix")


def test_a_configuration_error_is_a_value_error_the_others_are_not() -> None:
    """Callers that know nothing of this project may treat a bad value as Python does."""
    assert issubclass(ConfigError, ValueError)
    assert not issubclass(DataError, ValueError) and not issubclass(CheckpointError, ValueError)


def test_every_exit_code_says_what_it_means() -> None:
    assert ExitCode.SAVED == 75 and f"{ExitCode.SAVED:d}" == "75"
    assert all(code.meaning for code in ExitCode)


def test_the_first_line_of_what_a_library_says() -> None:
    assert first_line(RuntimeError("\nno GPU\nstack")) == "no GPU"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("field 'eps':\n    TypeError: a text\nstack")) == "field 'eps': TypeError: a text"
