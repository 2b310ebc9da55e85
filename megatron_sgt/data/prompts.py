"""Files of prompts: plain text, one per line."""

from pathlib import Path

from megatron_sgt.data.contents import compression_of, head_of, opened, require_library
from megatron_sgt.data.inputs import by_name
from megatron_sgt.data.progress import note
from megatron_sgt.errors import DataError, first_line


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, compressed or not. Only line ends separate prompts, no other sign.

    Raises:
        DataError: the file cannot be read or is no UTF-8, with the line.
    """
    compression = compression_of(head_of(path).bytes)
    require_library(compression, path)
    try:
        with opened(path, compression) as (stream, _):
            lines = stream.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    if not lines[-1]:
        lines.pop()
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: {error}; convert the file") from error
    if by_name(path.name)[0] != "text" and prompts and all(prompt.lstrip().startswith("{") for prompt in prompts):
        note(f"{path} looks like JSON, but every line of it is a prompt as it stands")
    return prompts
