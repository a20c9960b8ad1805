"""What memory is left, told for a machine and for a container."""

import torch

from fedpipe_core.free_memory import container_free_bytes, free_memory_bytes


def test_free_memory_of_the_machine_is_a_sensible_number():
    assert 2**20 < free_memory_bytes(torch.device("cpu")) < 2**50


def test_a_containers_limit_counts_cached_files_as_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert container_free_bytes(tmp_path) == 450
    (tmp_path / "memory.current").write_text("1300\n")
    assert container_free_bytes(tmp_path) == 0


def test_a_container_without_a_limit_says_nothing(tmp_path):
    assert container_free_bytes(tmp_path) is None
    for name, text in {"memory.max": "max", "memory.current": "700", "memory.stat": ""}.items():
        (tmp_path / name).write_text(text)
    assert container_free_bytes(tmp_path) is None
