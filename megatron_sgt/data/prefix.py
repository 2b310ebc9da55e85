"""Which .bin/.idx pair a user's path means. Reads no file and needs no NumPy, so a login node can use it."""

from pathlib import Path

from megatron_sgt.errors import DataError

DEFAULT_SUFFIX = "_text_document"
_PAIR_SUFFIXES = (".bin", ".idx")


def resolve_prefix(path: str) -> tuple[str, str | None]:
    """The prefix of the pair meant by ``path``, and a note if something had to be assumed.

    Accepts the prefix itself, one of its two files, and the prefix without ``_text_document``.

    Raises:
        DataError: there is no such pair.
    """
    tried = []
    stem = path[:-4] if path.endswith(_PAIR_SUFFIXES) else path
    for prefix in dict.fromkeys((path, stem, path + DEFAULT_SUFFIX, stem + DEFAULT_SUFFIX)):
        present = [suffix for suffix in _PAIR_SUFFIXES if Path(prefix + suffix).is_file()]
        if len(present) == 2:
            return prefix, None if prefix == path else f"data_path {path}: taken as {prefix}.bin/.idx"
        if present:
            missing = ".idx" if present == [".bin"] else ".bin"
            raise DataError(
                f"{prefix}{present[0]} exists but {prefix}{missing} does not; copy both files, or run "
                "tools/preprocess_data.py again"
            )
        tried.append(prefix + ".idx")
    raise DataError(f"no indexed data set at {path} (looked for {', '.join(tried)}){_hint(path) or _neighbours(path)}")


def _hint(path: str) -> str:
    """What was probably meant by what is no path, or not yet a data set."""
    if Path(path).is_file():
        return f"; {path} is no indexed data set: tools/preprocess_data.py makes one of it"
    words = path.replace(",", " ").split()
    if len(words) > 1 and any(Path(f"{word}{end}.idx").is_file() for word in words for end in ("", DEFAULT_SUFFIX)):
        return "; several data sets are a blend: data.data_path='[weight, prefix, weight, prefix]'"
    return ""


def _neighbours(path: str) -> str:
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist"
    found = sorted(str(file)[:-4] for file in folder.glob("*.idx"))[:5]
    return f"; data sets in {folder}: {', '.join(found)}" if found else f"; {folder} holds no .idx file"
