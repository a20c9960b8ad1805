import os
import shutil
import subprocess
import sys

import pytest

from fedpipe_core.base_folder import base_sha256, resolve_base
from fedpipe_core.errors import ModelError


def resolve_offline(base: str, home) -> str:
    """Resolve in a fresh process that must not ask the network; the hub's library reads that setting once."""
    code = (
        "from fedpipe_core.base_folder import resolve_base\n"
        "from fedpipe_core.errors import ModelError\n"
        f"try: print(resolve_base({base!r}))\n"
        "except ModelError as error: print('ModelError:', error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_a_base_is_found_as_a_folder(tiny_folder):
    assert resolve_base(str(tiny_folder("bert"))) == tiny_folder("bert")


def test_a_base_is_found_inside_an_installed_package(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "tiny_weights").mkdir()
    (tmp_path / "tiny_weights" / "__init__.py").touch()
    shutil.copytree(tiny_folder("bert"), tmp_path / "tiny_weights" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_base("package:tiny_weights") == tmp_path / "tiny_weights" / "model"


@pytest.mark.parametrize("package", ["no_such_package", "not a name", "../up"])
def test_a_package_that_is_not_installed_is_named(package):
    with pytest.raises(ModelError, match=f"package:{package}: no such package is installed"):
        resolve_base(f"package:{package}")


def test_a_package_without_weights_is_refused():
    with pytest.raises(ModelError, match=r"package:json holds no folder with config\.json and weights"):
        resolve_base("package:json")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_says_what_is_missing(tiny_folder, tmp_path, missing):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    (folder / missing).unlink()
    word = "config.json" if missing == "config.json" else "no weights"
    with pytest.raises(ModelError, match=f"{folder} has no.*{word.removeprefix('no ')}"):
        resolve_base(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "../nowhere"])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(path):
    with pytest.raises(ModelError, match="is not a folder; give a folder in Hugging Face format"):
        resolve_base(path)


def test_a_hub_id_offline_is_refused_at_once_unless_it_is_cached(tiny_folder, tmp_path):
    answer = resolve_offline("someone/some-model", tmp_path)
    assert answer.startswith("ModelError: model.base 'someone/some-model' is neither a folder nor a model of the hub")

    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_folder("bert"), snapshot)
    references = snapshot.parents[1] / "refs"
    references.mkdir()
    (references / "main").write_text("0" * 40)
    assert resolve_offline("someone/some-model", tmp_path) == str(snapshot)


def test_copies_of_a_base_have_the_same_hash(tiny_folder, tmp_path):
    copied = shutil.copytree(tiny_folder("bert"), tmp_path / "elsewhere")
    (copied / "README.md").write_text("notes do not change a model")
    assert base_sha256(copied) == base_sha256(tiny_folder("bert"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_any_change_of_config_tokenizer_or_weights_changes_the_hash(tiny_folder, tmp_path, name):
    copied = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    with (copied / name).open("ab") as file:
        file.write(b" ")
    assert base_sha256(copied) != base_sha256(tiny_folder("bert"))


def test_a_new_vocabulary_file_changes_the_hash(tiny_folder, tmp_path):
    copied = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")
    (copied / "merges.txt").write_text("a b")
    assert base_sha256(copied) != base_sha256(tiny_folder("bert"))
