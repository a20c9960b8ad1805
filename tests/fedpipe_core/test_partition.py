import gzip
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpipe_core import partition as partition_module
from fedpipe_core.config import EdgeSpec, FederationConfig, PartitionSpec
from fedpipe_core.config_file import parse_config
from fedpipe_core.data import Examples
from fedpipe_core.errors import ConfigError, DataError
from fedpipe_core.partition import Partition, deal_examples, load_edge_examples, load_partition, load_split_examples

IID = PartitionSpec(by="iid")
BY_DOMAIN = PartitionSpec(by="column", column="domain")


def dirichlet(alpha: float) -> PartitionSpec:
    return PartitionSpec(by="dirichlet", alpha=alpha)


def edges(*names: str, values: dict | None = None) -> list[EdgeSpec]:
    return [EdgeSpec(edge_id=name, values=(values or {}).get(name)) for name in names]


def examples_of(labels: list[int]) -> Examples:
    return Examples([f"text {i}" for i in range(len(labels))], labels)


def rows_by_edge(partition: Partition) -> dict[str, Counter]:
    return {name: Counter(zip(e.texts, e.labels, strict=True)) for name, e in partition.shards.items()}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_for(train, test="unused.jsonl", edge_list=({"edge_id": "a"}, {"edge_id": "b"}), **data) -> FederationConfig:
    data = {"train": str(train), "test": str(test), "labels": 3, **data}
    return parse_config({"name": "small", "model": {"base": "unused"}, "data": data, "edges": list(edge_list)})


LABELS = st.lists(st.integers(0, 4), min_size=8, max_size=80)


@settings(deadline=None, max_examples=60)
@given(LABELS, st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from([None, 0.3, 5.0]))
def test_every_row_is_in_exactly_one_shard(labels, num_edges, seed, alpha):
    examples, names = examples_of(labels), [f"e{k}" for k in range(num_edges)]
    try:
        partition = deal_examples(examples, None, dirichlet(alpha) if alpha else IID, edges(*names), seed)
    except DataError:
        assume(alpha is None)
    assert sum(rows_by_edge(partition).values(), Counter()) == Counter(zip(examples.texts, labels, strict=True))
    assert list(partition.shards) == names
    assert all(len(shard) for shard in partition.shards.values())
    assert partition.left_out == 0


@settings(deadline=None, max_examples=60)
@given(LABELS, st.randoms(use_true_random=False), st.integers(0, 99), st.sampled_from([None, 1.0]))
def test_the_dealing_does_not_depend_on_the_order_of_rows_in_the_file(labels, random, seed, alpha):
    examples, order = examples_of(labels), list(range(len(labels)))
    random.shuffle(order)
    spec = dirichlet(alpha) if alpha else IID
    try:
        before = deal_examples(examples, None, spec, edges("a", "b", "c"), seed)
    except DataError:
        assume(alpha is None)
    after = deal_examples(examples.select(order), None, spec, edges("a", "b", "c"), seed)
    assert rows_by_edge(before) == rows_by_edge(after)


@pytest.mark.parametrize("spec", [IID, dirichlet(1.0)], ids=["iid", "dirichlet"])
def test_another_seed_deals_other_rows_and_the_same_seed_the_same(spec):
    examples = examples_of([i % 3 for i in range(60)])
    first, again, other = (deal_examples(examples, None, spec, edges("a", "b"), seed) for seed in (1, 1, 2))
    assert first == again
    assert rows_by_edge(first) != rows_by_edge(other)


def test_a_shard_keeps_the_order_of_the_file():
    partition = deal_examples(examples_of([0] * 30), None, IID, edges("a", "b"), 0)
    numbers = [int(text.split()[1]) for text in partition.shards["a"].texts]
    assert numbers == sorted(numbers)


@given(st.integers(3, 60))
def test_iid_shards_differ_by_one_row_at_most(num_rows):
    sizes = [
        len(s) for s in deal_examples(examples_of([0] * num_rows), None, IID, edges("a", "b", "c"), 0).shards.values()
    ]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_with_a_large_alpha_deals_every_label_evenly_and_with_a_small_one_to_few_edges():
    examples = examples_of([label for label in range(20) for _ in range(50)])

    def largest_share(alpha):
        shards = deal_examples(examples, None, dirichlet(alpha), edges("a", "b", "c", "d"), 0).shards.values()
        counts = np.array([np.bincount(shard.labels, minlength=20) for shard in shards])
        return (counts.max(axis=0) / 50).mean()

    assert largest_share(1000.0) == pytest.approx(0.25, abs=0.03)
    assert largest_share(0.05) > 0.85


def test_column_deals_the_values_an_edge_names_and_counts_the_rows_nobody_names():
    examples, domains = examples_of([0, 1, 2, 0, 1]), ["home", "travel", "work", "home", "money"]
    names = edges("a", "b", values={"a": ("home", "work"), "b": ("travel",)})
    partition = deal_examples(examples, domains, BY_DOMAIN, names, 0)
    assert partition.shards == {"a": examples.select([0, 2, 3]), "b": examples.select([1])}
    assert partition.left_out == 1


def test_column_matches_a_number_of_the_config_with_the_text_of_a_csv_file():
    examples = examples_of([0, 1])
    partition = deal_examples(examples, ["3", "4"], BY_DOMAIN, edges("a", "b", values={"a": (3,), "b": ("4",)}), 0)
    assert partition.shards["a"] == examples.select([0])


def test_column_names_the_values_found_when_an_edge_names_one_that_no_row_has():
    names = edges("a", "b", values={"a": ("home",), "b": ("travle",)})
    with pytest.raises(
        DataError, match=r"edge 'b' names the value 'travle'.*found 'home', 'travel'; did you mean 'travel'"
    ):
        deal_examples(examples_of([0, 1]), ["home", "travel"], BY_DOMAIN, names, 0)


def test_column_shortens_a_long_list_of_values_found():
    values = [f"v{i:03}" for i in range(50)]
    with pytest.raises(DataError, match=r"'v011' and 38 more;"):
        deal_examples(examples_of([0] * 50), values, BY_DOMAIN, edges("a", values={"a": ("zzz",)}), 0)


def test_column_refuses_a_value_that_two_edges_name():
    names = edges("a", "b", values={"a": ("home", "work"), "b": ("work",)})
    with pytest.raises(ConfigError, match="edges 'a' and 'b' both name the value 'work'"):
        deal_examples(examples_of([0, 1]), ["home", "work"], BY_DOMAIN, names, 0)


def test_more_edges_than_rows_name_the_empty_edges():
    with pytest.raises(DataError, match=r"edges 'c', 'd' get none of the 2 rows .*list fewer edges"):
        deal_examples(examples_of([0, 1]), None, IID, edges("a", "b", "c", "d"), 0)


def test_dirichlet_that_leaves_an_edge_empty_says_to_raise_alpha():
    with pytest.raises(DataError, match=r"get.* none of the 20 rows .*raise data.partition.alpha \(now 0.001\)"):
        deal_examples(examples_of([0] * 20), None, dirichlet(0.001), edges("a", "b"), 0)


def test_load_edge_examples_reads_the_edges_own_file_without_a_partition(tmp_path):
    for name, label in (("a", 0), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"from {name}", "label": label}])
    config = config_for(tmp_path / "{edge_id}.jsonl")
    assert [load_edge_examples(config, edge) for edge in config.edges] == [
        Examples(["from a"], [0]),
        Examples(["from b"], [2]),
    ]


def test_rows_to_judge_on_are_a_share_or_all_of_a_file_of_their_own_whose_bad_rows_are_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": 0} for i in range(20)])
    config = config_for(tmp_path / "{edge_id}.jsonl")
    assert [len(part) for part in load_split_examples(config, config.edges[0])] == [18, 2]
    kept = write_jsonl(tmp_path / "a-kept.jsonl", [{"text": "kept", "label": 1}, {"text": "kept", "label": 99}])
    named = config.data.model_copy(update={"validation": str(tmp_path / "{edge_id}-kept.jsonl")})
    with pytest.raises(DataError, match=r"a-kept.jsonl has 1 unusable row: line 2"):
        load_split_examples(config.model_copy(update={"data": named}), config.edges[0])
    write_jsonl(kept, [{"text": "kept", "label": 1}])
    training, judged = load_split_examples(config.model_copy(update={"data": named}), config.edges[0])
    assert (len(training), judged) == (20, Examples(["kept"], [1]))


def test_load_edge_examples_takes_the_edges_shard_by_a_columns_values(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 3, "domain": "home" if i < 3 else "work"} for i in range(5)]
    edge_list = [{"edge_id": "a", "values": ["home"]}, {"edge_id": "b", "values": ["work"]}]
    partition = {"by": "column", "column": "domain"}
    config = config_for(write_jsonl(tmp_path / "train.jsonl", rows), edge_list=edge_list, partition=partition)
    assert load_edge_examples(config, config.edges[1]) == Examples(["t3", "t4"], [0, 1])


def test_edges_that_start_together_read_the_file_once(tmp_path):
    rows = [{"text": f"t{i}", "label": 0} for i in range(50)]
    config = config_for(write_jsonl(tmp_path / "train.jsonl", rows), partition={"by": "iid"})
    misses = partition_module._read_partition.cache_info().misses
    with ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(lambda k: load_edge_examples(config, config.edges[k % 2]), range(8)))
    assert partition_module._read_partition.cache_info().misses == misses + 1
    assert len(shards[0]) + len(shards[1]) == 50


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": f"old{i}", "label": 0} for i in range(4)])
    config = config_for(path, partition={"by": "iid"})
    assert load_partition(config).shards["a"].texts[0].startswith("old")
    write_jsonl(path, [{"text": f"new{i}", "label": 0} for i in range(4)])
    os.utime(path, ns=(1, 1))
    assert load_partition(config).shards["a"].texts[0].startswith("new")


def test_pinned_ranks_do_not_keep_a_partition_from_being_cached(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": 0} for i in range(4)])
    config = config_for(path, edge_list=[{"edge_id": "a", "pin": {"ranks": {"layer.0": 4}}}], partition={"by": "iid"})
    assert load_partition(config) is load_partition(config)


def test_load_partition_refuses_a_config_without_a_partition(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.partition is missing"):
        load_partition(config_for(tmp_path / "{edge_id}.jsonl"))


def test_load_partition_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist"):
        load_partition(config_for(tmp_path / "nothing.jsonl", partition={"by": "iid"}))


def test_load_partition_says_which_column_is_missing(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a", "label": 0, "domian": "home"}\n'))
    config = config_for(
        path, edge_list=[{"edge_id": "a", "values": ["home"]}], partition={"by": "column", "column": "domain"}
    )
    with pytest.raises(DataError, match=r"no column 'domain'.*did you mean 'domian'"):
        load_partition(config)


def test_dirichlet_deals_the_values_of_a_named_column_where_labels_say_nothing():
    examples, values = examples_of([0] * 400), [f"kind {i % 2}" for i in range(400)]
    spec = PartitionSpec(by="dirichlet", alpha=0.1, column="kind")
    shards = deal_examples(examples, values, spec, edges("a", "b"), seed=3).shards
    kinds = Counter(values[int(text.removeprefix("text "))] for text in shards["a"].texts)
    assert sum(map(len, shards.values())) == 400
    assert max(kinds.values()) > 2 * (min(kinds.values()) if len(kinds) == 2 else 1)
