"""TFRecord shards are read at random through an index, and damage to either is seen."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from resjax.config import UsageError
from resjax.data import tfrecord

COUNTS = [5, 1, 7]


def record(i):
    """Record i of all shards: its own bytes, of lengths from 0 on."""
    return np.random.RandomState(i).bytes(i * 37)


def write_shard(path, records):
    writer = RecordWriter(str(path))
    for data in records:
        writer.write(data)
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, first = tmp_path_factory.mktemp("written"), 0
    for i, count in enumerate(COUNTS):
        path = folder / f"data-train.tfrecord-{i:05}-of-{len(COUNTS):05}"
        write_shard(path, map(record, range(first, first + count)))
        first += count
    return folder


@pytest.fixture
def paths(written, tmp_path, monkeypatch):
    """Three shards of thirteen records that no other test sees, and no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(written, tmp_path / "data")
    return sorted(map(str, (tmp_path / "data").iterdir()))


def assert_whole(records):
    assert len(records) == sum(COUNTS)
    for i in np.random.RandomState(0).permutation(sum(COUNTS)):
        assert records[i] == record(i)


def built(capfd):
    """Whether an index has been built since the last call."""
    return "indexing 3 shards" in capfd.readouterr().err


# RFC 3720, appendix B.4; the last is the check value of the catalogue of CRCs.
def test_checksum_is_that_of_other_writers():
    data = np.random.RandomState(0).bytes(300)
    for length in (0, 1, 8, 255, 300):
        assert tfrecord.masked_crc32c(data[:length]) == masked_crc32c(data[:length])


def test_every_record_is_read_in_any_order(paths):
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))


def test_no_file_stays_open(paths):
    records = tfrecord.open_tfrecords(paths, COUNTS)
    before = len(os.listdir("/proc/self/fd"))
    assert_whole(records)
    assert len(os.listdir("/proc/self/fd")) == before


def test_index_is_built_once_beside_the_shards(paths, capfd):
    beside, cached = tfrecord.index_paths(paths)
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))
    assert built(capfd)
    assert beside.parent == type(beside)(paths[0]).parent
    assert beside.exists() and not cached.exists()
    assert sorted(os.listdir(beside.parent)) == sorted(
        [beside.name, *map(os.path.basename, paths)]
    )
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))
    assert not built(capfd)


@pytest.mark.parametrize("change", ["content", "time", "name"])
def test_index_of_other_shards_is_built_anew(change, paths, capfd):
    tfrecord.open_tfrecords(paths, COUNTS)
    built(capfd)
    if change == "content":  # as many records, and bytes, in another place
        write_shard(paths[0], map(record, reversed(range(5))))
    elif change == "time":
        os.utime(paths[2], ns=(1, 1))
    else:
        renamed = [path.replace("00003", "00004") for path in paths]
        for old, new in zip(paths, renamed, strict=True):
            os.rename(old, new)
        paths = renamed
    records = tfrecord.open_tfrecords(paths, COUNTS)
    assert built(capfd)
    if change == "content":
        assert [records[i] for i in range(5)] == [record(4 - i) for i in range(5)]
    else:
        assert_whole(records)


def test_damage_to_the_index_gives_no_wrong_record(paths):
    tfrecord.open_tfrecords(paths, COUNTS)
    beside, _ = tfrecord.index_paths(paths)
    whole = beside.read_bytes()
    damaged = [whole[:length] for length in (0, 1, 100, len(whole) - 1)]
    for place in range(0, len(whole), 97):
        damaged.append(
            whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :],
        )
    for data in damaged:
        beside.write_bytes(data)
        assert_whole(tfrecord.open_tfrecords(paths, COUNTS))


def test_index_that_is_damaged_is_written_anew(paths, capfd):
    tfrecord.open_tfrecords(paths, COUNTS)
    beside, _ = tfrecord.index_paths(paths)
    beside.write_bytes(beside.read_bytes()[:-30])
    tfrecord.open_tfrecords(paths, COUNTS)
    assert built(capfd)
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))
    assert not built(capfd)


def test_several_build_an_index_at_once(paths):
    with ThreadPoolExecutor(8) as threads:
        opened = [threads.submit(tfrecord.open_tfrecords, paths, COUNTS) for _ in range(8)]
    for each in opened:
        assert_whole(each.result())
    beside, _ = tfrecord.index_paths(paths)
    assert len(os.listdir(beside.parent)) == len(paths) + 1


def test_index_goes_to_the_cache_where_the_shards_cannot_be_written_to(paths, capfd):
    beside, cached = tfrecord.index_paths(paths)
    beside.mkdir()  # the same for root, whom no permission stops
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))
    assert built(capfd)
    assert cached.is_file()
    assert str(cached).startswith(os.environ["XDG_CACHE_HOME"])
    assert_whole(tfrecord.open_tfrecords(paths, COUNTS))
    assert not built(capfd)


def test_cache_is_in_the_home_folder_and_apart_for_every_data_set(
    paths, monkeypatch, tmp_path
):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    _, cached = tfrecord.index_paths(paths)
    assert cached.parent == tmp_path / ".cache" / "resjax"
    elsewhere = [path.replace("data", "other") for path in paths]
    assert tfrecord.index_paths(elsewhere)[1] != cached


def test_full_disk_is_one_line(paths, monkeypatch):
    def full(file, **arrays):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    beside, cached = tfrecord.index_paths(paths)
    with pytest.raises(UsageError) as error:
        tfrecord.open_tfrecords(paths, COUNTS)
    text = str(error.value)
    assert str(cached) in text and "No space left on device" in text and "\n" not in text
    assert not list(cached.parent.iterdir()) and not beside.exists()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A shard of three records, all of which are in the sample that is checked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data-train.tfrecord-00000-of-00001"
    write_shard(path, [b"one", b"", b"three" * 5])
    return path


def error_of(path, counts=(3,)):
    with pytest.raises(UsageError) as error:
        tfrecord.open_tfrecords([str(path)], list(counts))
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


def test_shard_cut_off_anywhere_is_seen(small):
    whole = small.read_bytes()
    ends = [0, 19, 35]  # where whole records remain: 16 bytes around each
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        text = error_of(small)
        if length in ends:
            assert f"{ends.index(length)} records, but dataset_info.json says 3" in text
        else:
            assert "cut off near record" in text


def test_changed_byte_anywhere_is_seen(small):
    whole = small.read_bytes()
    starts = [0, 19, 35]
    for place in range(len(whole)):
        small.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        )
        text = error_of(small)
        number = max(i for i, start in enumerate(starts) if start <= place)
        assert f"record {number}," in text and "CRC" in text


def test_another_number_of_records_than_the_data_set_has_is_seen(small):
    for count in (2, 4):
        text = error_of(small, [count])
        assert f"3 records, but dataset_info.json says {count}" in text


def test_eight_records_of_a_large_shard_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data-train.tfrecord-00000-of-00001"
    write_shard(path, [b"0123456789"] * 30)
    whole, seen = path.read_bytes(), 0
    for i in range(30):
        data = bytearray(whole)
        data[i * 26 + 12] ^= 1
        path.write_bytes(data)
        try:
            tfrecord.open_tfrecords([str(path)], [30])
        except UsageError as error:
            assert f"record {i}," in str(error)
            seen += 1
    assert seen == 8


def test_shard_that_changes_after_it_was_indexed_is_seen(small):
    records = tfrecord.open_tfrecords([str(small)], [3])
    write_shard(small, [b"three" * 5, b"", b"one"])
    for i in (0, 2):
        with pytest.raises(ValueError, match="changed since it was indexed"):
            records[i]
