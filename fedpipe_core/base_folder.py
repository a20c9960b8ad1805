"""Where a base model lies and what names its content; how it becomes a model in memory is `model`'s to decide."""

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from fedpipe_core.errors import ModelError

BASE_FILE = "base.json"  # lies in an adapter's folder and says which base it belongs to
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_PATTERNS = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md"]  # no pickled weights


def resolve_base(base: str) -> Path:
    """Find the folder of a base given as a folder, as `package:NAME` or as a hub id (the hub's cache when offline).

    Raises ModelError when there is none.
    """
    if base.startswith("package:"):
        return _package_folder(base.removeprefix("package:"))
    if Path(base).is_dir():
        return _checked_folder(Path(base))
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(f"model.base {base} is not a folder; give a folder in Hugging Face format or a hub id")
    return _hub_folder(base)


def base_sha256(folder: Path) -> str:
    """Hash config, tokenizer and weights of a base in order of name; the same files give the same hash anywhere."""
    digest = hashlib.sha256()
    for path in sorted(_hashed_files(folder), key=lambda path: path.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.base package:{package}: no such package is installed; install it or name a folder")
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = sorted(path.parent for path in root.rglob("config.json") if _has_weights(path.parent))
    if not folders:
        raise ModelError(f"model.base package:{package} holds no folder with config.json and weights")
    return folders[0]


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; needed a folder in Hugging Face format")
    if not _has_weights(folder):
        raise ModelError(f"model folder {folder} has no weights; needed *.safetensors beside config.json")
    return folder


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS)


def _hub_folder(base: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.base {base!r} is neither a folder nor a model of the hub or its local cache ({reason}); "
            "give a folder in Hugging Face format, package:NAME or a hub id"
        ) from None
    return _checked_folder(folder)


def _hashed_files(folder: Path) -> Iterator[Path]:
    for pattern in ("config.json", *_TOKENIZER_PATTERNS, *_WEIGHT_PATTERNS):
        yield from folder.glob(pattern)
